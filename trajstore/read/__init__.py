"""From stored pages back to rows, and which trajectories there are."""
