"""The mathematics: one pass over a run's increments, forecasters on it, and the evidence for or against a forecast."""
