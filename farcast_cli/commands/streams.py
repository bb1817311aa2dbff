"""stdout and stderr as they may be: closed from the start, full, or without a reader.

Knows what becomes of text that cannot be printed. Writing to these streams never raises, so that no command ends half-way
for it, and what was lost is told at the end.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from farcast_cli import system

_STANDARD = (0, 1, 2)


class Sink(io.RawIOBase):
    """A descriptor that takes what it can; the first failure is kept, and all that comes after it is dropped."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.failure: OSError | None = None
        self.has_taken = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any, /) -> int:
        while self.failure is None:
            try:
                num_bytes = os.write(self._fd, data)
            except BlockingIOError:  # a pipe that was set not to wait
                select.select([], [self._fd], [])
            except OSError as error:
                self.failure = error
            else:
                self.has_taken = True
                return num_bytes
        return memoryview(data).nbytes


def take_over() -> None:
    """Put sinks in the place of this process's stdout and stderr, and open what is closed.

    A descriptor that is closed would be given to the next file that is opened, and whatever some library prints would go
    into that file. Streams that are no descriptors, as those of a test, stay.
    """
    for fd in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            system.open_file(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _text_to(system.open_file(os.devnull, os.O_WRONLY), "utf-8"))
        elif _descriptor_of(stream) == fd and not system.is_console(stream):
            stream.flush()
            setattr(sys, name, _text_to(fd, stream.encoding))


def _descriptor_of(stream: TextIO) -> int | None:
    with suppress(OSError):
        return stream.fileno()
    return None


def _text_to(fd: int, encoding: str) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(Sink(fd)), encoding=encoding, errors="backslashreplace", line_buffering=os.isatty(fd)
    )


def say(line: str) -> None:
    """A line on stderr with as little memory as can be."""
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace") + b"\n")


def has_printed() -> bool:
    """Whether a part of the result is on stdout."""
    sys.stdout.flush()
    sink = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(sink, Sink) and sink.has_taken


def is_broken() -> bool:
    """Whether stdout takes nothing any more: it is full, or nobody reads it."""
    sys.stdout.flush()
    sink = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(sink, Sink) and sink.failure is not None


def lost() -> OSError | None:
    """Why a part of stdout could not be printed; None where all was, or where the reader wanted no more of it."""
    sys.stdout.flush()
    sink = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = sink.failure if isinstance(sink, Sink) else None
    return None if failure is None or failure.errno == errno.EPIPE else failure
