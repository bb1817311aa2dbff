"""One training run: its snapshots in order, their steps, and the tensors that they have in common."""
