"""Damaged and hostile files for every reader: `python -m tests.fuzz` (`make fuzz`) at length, `test_fuzz.py` a few of each.

A file ends in a FarcastError with a sensible exit code, or is read as the format's own reader reads it. Nothing else: no
other exception, no code run, little memory, little time.
"""
