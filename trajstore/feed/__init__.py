"""Batches for a training loop."""
