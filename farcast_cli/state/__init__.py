"""What a trainer's state is some steps on: counters, learning-rate schedules, loops, and where the run ends."""
