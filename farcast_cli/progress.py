"""How the library tells how far it is; it prints nothing itself."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a phase of so many bytes; what it returns is told the bytes done.

A phase of 0 bytes is one of unknown length, such as a run of the evaluation command; it is over when anything is told.
"""


def silent(_phase: str, _total: int) -> Callable[[int], None]:
    """The progress that nobody looks at."""
    return lambda _done: None
