"""farcast: forecast the weights of a training run from the snapshots it left on disk."""

__version__ = "0.1.0"
