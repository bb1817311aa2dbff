"""One leap in a loop: the newest snapshot of a run, its memory, a decision, a checkpoint to resume from, a new memory."""
