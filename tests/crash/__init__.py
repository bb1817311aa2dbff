"""Every system call of every writing command killed, signalled, failed or cut short once: what is left, and the rerun.

`python -m tests.crash` (`make crash`) sweeps over all calls and prints a table; `test_crash.py` takes some of each.
"""
