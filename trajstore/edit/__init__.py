"""Stores made of stores: trajectories change places by new manifests, not by copies of their steps."""
