"""Benchmarks against plain Python, pyarrow and zarr-python; run them with ``python -m benchmarks``."""
