"""Leaps within a training process: the call of `farcast leap` on the run's files, then its weights in the live model."""
