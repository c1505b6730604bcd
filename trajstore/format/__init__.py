"""What the bytes mean. Nothing here knows a filesystem; ``schemas/FORMAT.md`` is the same on one screen."""
