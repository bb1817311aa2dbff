"""farcast: forecast the weights of a training run from the snapshots it left on disk.

    formats    what the bytes of one file mean, and what in them would do harm
    layouts    which files make up one snapshot, and what tells its step
    trajectory, alignment    which snapshots are one run, and which tensors they share
    forecast   how the weights move, forecasters, and the evidence for or against them
    trainer    counters and learning-rate schedules at the later step
    output     the checkpoint that is written: planned, streamed, published by one rename
    predict    from a fitted forecaster to a published checkpoint
    cli        the commands

Data flow downwards only; tests/test_structure.py holds the order.
"""

__version__ = "0.1.0"
