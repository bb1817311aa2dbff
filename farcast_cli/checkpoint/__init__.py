"""The plan of a new checkpoint."""
