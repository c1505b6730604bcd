"""From appended trajectories to durable segments, in the background."""
