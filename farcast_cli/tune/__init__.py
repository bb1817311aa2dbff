"""Tuning a wide layer of a checkpoint without ever holding it: it is read once, every iteration after that is small."""
