"""Where the bytes are, and how a version becomes visible. The only part that imports fsspec."""
