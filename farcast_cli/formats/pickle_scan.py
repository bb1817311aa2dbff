"""A pickle that is only copied: the names that loading it would ask for, found without making anything of it.

A pickle has no jumps: one walk over its opcodes meets all that loading it meets. Where the walk cannot go on, loading
cannot either. Memory is the names alone, whatever the file's size.

Source: Lib/pickletools.py, whose table of opcodes this reads by.
"""

from __future__ import annotations

import pickle
import pickletools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from farcast_cli.errors import UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_OPCODES = 20_000_000  # some 20 s
MAX_NAME = 1_000  # characters; a longer string is no name
MAX_REMEMBERED = 1_000_000  # strings that a later opcode may take for a name
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}
"""Of an argument that says its length first: how many bytes say it, and whether they have a sign."""
_ARGUMENTS = {code.code.encode("latin-1"): code.arg.n if code.arg else 0 for code in pickletools.opcodes}
_NAMED = {pickle.GLOBAL, pickle.INST, pickle.STACK_GLOBAL}
_TEXT = {pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8, pickle.UNICODE}
_GET = {pickle.GET, pickle.BINGET, pickle.LONG_BINGET}
_PUT = {pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT}
_EXTENSIONS = {pickle.EXT1, pickle.EXT2, pickle.EXT4}
_SILENT = {pickle.PROTO, pickle.FRAME}
_HIDDEN = "its pickle hides what it asks for"


class _EndError(Exception):
    """The pickle cannot be followed to its end, by anybody."""


@dataclass(slots=True)
class _Memory:
    """What is known of the two topmost objects of the stack, and of those that have a number: texts, or None."""

    top: tuple[str | None, str | None] = (None, None)
    texts: dict[int, str] = field(default_factory=dict)
    num_memoized: int = 0
    is_numbered: bool = False

    def push(self, text: str | None) -> None:
        self.top = (self.top[1], text)

    def put(self, number: int) -> None:
        self.texts.pop(number, None)
        if self.top[1] is not None:
            self.texts[number] = self.top[1]
        if len(self.texts) > MAX_REMEMBERED:
            raise UnsafeFileError(_HIDDEN)


def iter_names(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """Module and name of all that one pickle asks for; leaves the stream behind it, or where it cannot be followed.

    Raises:
        UnsafeFileError: a name that is worked out by the pickle, or is in the registry of the process that loads it.
        EOFError: the pickle does not come to an end.
    """
    memory, began = _Memory(), False
    try:
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            if code == pickle.STOP:
                return
            began = began or code == pickle.PROTO
            if code in _EXTENSIONS and began:
                raise UnsafeFileError(_HIDDEN)
            name = _step(code, stream, memory)
            if name:
                yield name
    except _EndError:
        raise EOFError from None
    raise UnsafeFileError(f"its pickle has more than {MAX_OPCODES} opcodes")


def _step(code: bytes, stream: BinaryIO, memory: _Memory) -> tuple[str, str] | None:
    """Follow one opcode; returns the name that it asks for."""
    if code in _NAMED:
        module, name = _named(code, stream, memory)
        memory.top = (None, None)
        return module, name
    if code in _TEXT:
        memory.push(_text(code, stream))
    elif code in _GET:
        memory.push(memory.texts.get(_number(code, stream)))
    elif code in _PUT or code == pickle.MEMOIZE:
        _remember(code, stream, memory)
    else:
        _skip(code, stream)
        if code not in _SILENT:
            memory.top = (None, None)
    return None


def _named(code: bytes, stream: BinaryIO, memory: _Memory) -> tuple[str, str]:
    if code != pickle.STACK_GLOBAL:
        lines = _line(stream), _line(stream)
        if max(map(len, lines)) > MAX_NAME:
            raise UnsafeFileError(_HIDDEN)
        return lines[0].decode("utf-8", "replace"), lines[1].decode("utf-8", "replace")
    module, name = memory.top
    if module is None or name is None:
        raise UnsafeFileError(_HIDDEN)
    return module, name


def _remember(code: bytes, stream: BinaryIO, memory: _Memory) -> None:
    if code == pickle.MEMOIZE:
        memory.put(memory.num_memoized)
        memory.num_memoized += 1
    else:
        memory.is_numbered = True
        memory.put(_number(code, stream))
    if memory.is_numbered and memory.num_memoized:  # no pickler mixes the two, which would give two meanings to a number
        raise UnsafeFileError(_HIDDEN)


def _number(code: bytes, stream: BinaryIO) -> int:
    size = _ARGUMENTS[code]
    try:
        return int(_line(stream)) if size < 0 else int.from_bytes(_exactly(stream, size), "little")
    except ValueError:
        raise _EndError from None


def _text(code: bytes, stream: BinaryIO) -> str | None:
    """A text that is short enough for a name."""
    if code == pickle.UNICODE:
        line = _line(stream)
        return None if len(line) > MAX_NAME else _decoded(line, "raw-unicode-escape")
    size = _length(code, stream)
    if size > MAX_NAME:
        _seek(stream, size)
        return None
    return _decoded(_exactly(stream, size), "utf-8")


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError:
        raise _EndError from None


def _skip(code: bytes, stream: BinaryIO) -> None:
    """Step over an opcode's argument."""
    size = _ARGUMENTS.get(code)
    if size is None:
        raise _EndError
    if size == pickletools.UP_TO_NEWLINE:
        _line(stream)
    else:
        _seek(stream, size if size >= 0 else _length(code, stream))


def _length(code: bytes, stream: BinaryIO) -> int:
    num_bytes, signed = _LENGTHS[_ARGUMENTS[code]]
    size = int.from_bytes(_exactly(stream, num_bytes), "little", signed=signed)
    if not 0 <= size < 1 << 62:
        raise _EndError
    return size


def _exactly(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise _EndError
    return found


def _seek(stream: BinaryIO, size: int) -> None:
    stream.seek(size, 1)  # beyond the end there is nothing to read


def _line(stream: BinaryIO) -> bytes:
    """A line without its end; of one that is too long for a name, more of its beginning than a name has."""
    line = rest = stream.readline(MAX_NAME + 2)
    while rest and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_NAME)
    if not rest:
        raise _EndError
    return line.removesuffix(b"\n")
