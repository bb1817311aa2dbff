"""A pickle that is only copied: the names that loading it would ask for, found without making anything of it.

A pickle has no jumps: one walk over its opcodes meets all that loading it meets. Where the walk cannot go on, loading
cannot either. What two unpicklers would read in two ways, no pickler writes: that is refused. Memory is the names
and the marks alone, whatever the file's size.

One call is looked into: `getattr` of a class and a name, which stands for a member of an enum.

Source: Lib/pickletools.py, whose table of opcodes this reads by.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import UnsafeFileError
from farcast_cli.formats.pickle_names import GETATTR, is_member

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Stream = io.BufferedReader[Any]

MAX_OPCODES = 20_000_000  # some 30 s
MAX_NAME = 1_000  # characters; a longer string is no name
MAX_REMEMBERED = 1_000_000  # strings and names that a later opcode may take
MAX_HELD = 1 << 23  # characters of names that wait for a call
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
_CHANGES = {pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS}
"""Methods of any object, which lies below what they take with it."""
_USES = {pickle.DUP, pickle.REDUCE, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX}
_CALLS = _CHANGES | _USES - {pickle.DUP}
_TUPLES = {pickle.TUPLE, pickle.TUPLE2}
_FRAMED = 4  # the first protocol that has frames
_CHUNK_BYTES = 1 << 16
_HIDDEN = "its pickle hides what it asks for"
_MISFRAMED = "its pickle has frames that no pickler writes"
_EFFECTS = {
    code.code.encode("latin-1"): (
        sum(kind not in {pickletools.markobject, pickletools.stackslice} for kind in code.stack_before)
        - (code.code.encode("latin-1") == pickle.OBJ),  # whose class lies above the mark
        pickletools.markobject in code.stack_before,
        len(code.stack_after),
    )
    for code in pickletools.opcodes
}
"""What opcodes take from the stack, whether they take a mark and what lies on that, and what they put on it."""


class _EndError(Exception):
    """The pickle cannot be followed to its end, by anybody."""


class _Sort(Enum):
    """An object that the walk knows again, beside texts and names."""

    PAIR = auto()  # a class and a member's name, which `getattr` may be called with
    MEMBER = auto()  # what that call gives: it is data, and nobody calls or changes it


_Known = str | tuple[str, str] | _Sort
_NUM_RECENT = 3  # a module and a name above a class, or two texts or names above `getattr`


@dataclass(slots=True)
class _Stack:
    """How many objects lie on the stack, each mark counted as one, where the marks are, and which objects are known.

    Of texts and names only the topmost few are kept; of what must not be lost sight of, all.
    """

    depth: int = 0
    marks: array[int] = field(default_factory=lambda: array("q"))
    known: list[tuple[int, _Known]] = field(default_factory=list)
    is_lost: bool = False
    """More was taken than there was, where an unpickler stops."""

    @property
    def top(self) -> _Known | None:
        return self.known[-1][1] if self.known and self.known[-1][0] == self.depth - 1 else None

    def follow(self, code: bytes) -> tuple[int, list[tuple[int, _Known]]]:
        """Take and give as an opcode does; returns how many objects it took, and those known by their numbers."""
        takes, to_mark, gives = _EFFECTS[code]
        before = self.depth
        taken = []
        if takes or to_mark:
            lowest = (self.marks[-1] if self.marks else -1) - takes if to_mark else before - takes
            if lowest < 0:
                lowest, self.is_lost = 0, True
            while self.marks and self.marks[-1] >= lowest:
                self.marks.pop()
            while self.known and self.known[-1][0] >= lowest:
                index, value = self.known.pop()
                taken.append((index - lowest, value))
            self.depth = lowest
        elif code == pickle.MARK:
            self.marks.append(before)
        num_taken = before - self.depth
        self.depth += gives
        return num_taken, taken[::-1]

    def note(self, value: _Known | None) -> None:
        """Say what the topmost object is."""
        if value is None:
            return
        if len(self.known) >= MAX_REMEMBERED:
            raise UnsafeFileError(_HIDDEN)
        self.known.append((self.depth - 1, value))
        if len(self.known) > _NUM_RECENT and not _is_watched(self.known[-_NUM_RECENT - 1][1]):
            del self.known[-_NUM_RECENT - 1]


def _is_watched(value: _Known) -> bool:
    return value is _Sort.MEMBER or value in GETATTR


@dataclass(slots=True)
class _Memory:
    """What is known of the objects on the stack, and of those that have a number."""

    stack: _Stack = field(default_factory=_Stack)
    known: dict[int, _Known] = field(default_factory=dict)
    num_memoized: int = 0
    is_numbered: bool = False

    def put(self, number: int) -> None:
        self.known.pop(number, None)
        if (top := self.stack.top) is not None:
            self.known[number] = top
        if len(self.known) > MAX_REMEMBERED:
            self.known.clear()
            raise UnsafeFileError(_HIDDEN)


@dataclass(slots=True)
class _Frames:
    """Where the frame ends that the walk is in; an opcode lies in one frame, or in none.

    CPython's unpickler in C loses a part of an argument that reaches over a frame's end, and so sees another pickle.
    """

    protocol: int = 0
    end: int | None = None

    def begin(self, stream: Stream) -> UnsafeFileError | None:
        size = int.from_bytes(_exactly(stream, 8), "little")
        if self.end is not None:
            raise UnsafeFileError(_MISFRAMED)
        self.end = stream.tell() + size
        return None if self.protocol >= _FRAMED else UnsafeFileError(_MISFRAMED)

    def check(self, position: int, *, is_last: bool) -> None:
        """Called behind an opcode; the last of a pickle is the last of its frame."""
        if self.end is None:
            return
        if position > self.end or (is_last and position < self.end):
            raise UnsafeFileError(_MISFRAMED)
        if position == self.end:
            self.end = None


_Found = tuple[str, str] | UnsafeFileError | None
_Taken = list[tuple[int, _Known]]


def iter_names(stream: Stream, opcodes: Iterator[int] | None = None) -> Iterator[tuple[str, str]]:
    """Module and name of all that one pickle asks for; leaves the stream behind it, or where it cannot be followed.

    Of a pickle that does not say that it is one (protocols 0 and 1), only what it asks for before a call: the words of
    a text may look like opcodes. The pickles of one file may share a count of opcodes that are still allowed.

    Raises:
        UnsafeFileError: a name that is worked out by the pickle, or is in the registry of the process that loads it;
            frames that no pickler writes.
        EOFError: the pickle does not come to an end.
    """
    is_told = peek(stream, 1) == pickle.PROTO
    steps = _iter_steps(stream, opcodes or iter(range(MAX_OPCODES)), is_told=is_told)
    try:
        for found in _found(steps) if is_told else _found_before_calls(steps):
            if isinstance(found, UnsafeFileError):
                raise found
            yield found
    except _EndError:
        raise EOFError from None


def peek(stream: Stream, count: int) -> bytes:
    """The next bytes, not taken from the stream."""
    return stream.peek(count)[:count]


def _found(steps: Iterable[tuple[bytes, _Found]]) -> Iterator[tuple[str, str] | UnsafeFileError]:
    return (found for _, found in steps if found)


def _found_before_calls(steps: Iterable[tuple[bytes, _Found]]) -> Iterator[tuple[str, str] | UnsafeFileError]:
    """What was found up to each call that has something on the stack to be called."""
    held, num_held = {}, 0
    for code, found in steps:
        if found and (key := str(found)) not in held:
            held[key] = found
            num_held += len(key)
        if num_held > MAX_HELD:
            raise UnsafeFileError(_HIDDEN)
        if code in _CALLS:
            yield from held.values()
            held, num_held = {}, 0


def _iter_steps(stream: Stream, opcodes: Iterator[int], *, is_told: bool) -> Iterator[tuple[bytes, _Found]]:
    """Every opcode up to the end, and what it asks for or why that cannot be said."""
    memory, frames = _Memory(), _Frames()
    for _ in opcodes:
        code = stream.read(1)
        if code == pickle.PROTO:
            frames.protocol = frames.protocol or int.from_bytes(peek(stream, 1), "little")
        try:
            found = frames.begin(stream) if code == pickle.FRAME else _asked(code, stream, memory)
        except _EndError:  # but an unpickler that drops what the frame held reads something else, and goes on
            if frames.end is not None:
                frames.check(stream.tell(), is_last=False)
            raise
        if frames.end is not None:
            frames.check(stream.tell(), is_last=code == pickle.STOP)
        if memory.stack.is_lost and not is_told:
            raise _EndError
        yield code, found
        if code == pickle.STOP:
            return
    raise UnsafeFileError(f"its pickle has more than {MAX_OPCODES} opcodes")


def _asked(code: bytes, stream: Stream, memory: _Memory) -> _Found:
    try:
        found = _step(code, stream, memory)
    except UnsafeFileError as error:
        return error
    return UnsafeFileError(_HIDDEN) if code in _EXTENSIONS else found


def _step(code: bytes, stream: Stream, memory: _Memory) -> tuple[str, str] | None:
    """Follow one opcode; returns the name that it asks for."""
    if code in _PUT or code == pickle.MEMOIZE:
        _remember(code, stream, memory)
        return None
    if code not in _ARGUMENTS:
        raise _EndError
    num_taken, taken = memory.stack.follow(code)
    if code in _NAMED:
        name = _named(code, stream, taken)
        _refuse_misuse(code, taken)
        if code == pickle.INST:
            return name
        memory.stack.note(name)
        return None if name in GETATTR else name
    if code in _TEXT:
        memory.stack.note(_text(code, stream))
    elif code in _GET:
        memory.stack.note(memory.known.get(_number(code, stream)))
    else:
        _skip(code, stream)
        if taken:
            _refuse_misuse(code, taken)
            memory.stack.note(_made(code, num_taken, taken))
    return None


def _named(code: bytes, stream: Stream, taken: _Taken) -> tuple[str, str]:
    if code != pickle.STACK_GLOBAL:
        lines = _line(stream), _line(stream)
        if max(map(len, lines)) > MAX_NAME:
            raise UnsafeFileError(_HIDDEN)
        return lines[0].decode("utf-8", "replace"), lines[1].decode("utf-8", "replace")
    match taken:
        case [(0, str(module)), (1, str(name))]:
            return module, name
    raise UnsafeFileError(_HIDDEN)


def _made(code: bytes, num_taken: int, taken: _Taken) -> _Sort | None:
    """What an opcode makes of what it took: the arguments of a `getattr`, a member of an enum, or nothing known."""
    num_items = num_taken - (code == pickle.TUPLE)  # but for the mark
    match [value for _, value in taken]:
        case [(module, kind), str(name)] if code in _TUPLES and num_items == 2 and is_member(module, kind, name):  # noqa: PLR2004
            return _Sort.PAIR
        case [function, _Sort.PAIR] if code == pickle.REDUCE and function in GETATTR:
            return _Sort.MEMBER
    return None


def _refuse_misuse(code: bytes, taken: _Taken) -> None:
    """Refuse a `getattr` that is not called for a member of an enum, and a member that is called, doubled or changed."""
    for place, value in taken:
        if value is _Sort.MEMBER:
            is_misused = code in _USES or (place == 0 and code in _CHANGES)
        else:
            is_misused = value in GETATTR and not (code == pickle.REDUCE and place == 0 and (1, _Sort.PAIR) in taken)
        if is_misused:
            raise UnsafeFileError("its pickle asks for builtins.getattr")


def _remember(code: bytes, stream: Stream, memory: _Memory) -> None:
    if code == pickle.MEMOIZE:
        memory.stack.is_lost |= not memory.stack.depth
        memory.put(memory.num_memoized)
        memory.num_memoized += 1
    else:
        memory.is_numbered = True
        memory.put(_number(code, stream))
    if memory.is_numbered and memory.num_memoized:  # no pickler mixes the two, which would give two meanings to a number
        raise UnsafeFileError(_HIDDEN)


def _number(code: bytes, stream: Stream) -> int:
    size = _ARGUMENTS[code]
    try:
        return int(_line(stream)) if size < 0 else int.from_bytes(_exactly(stream, size), "little")
    except ValueError:
        raise _EndError from None


def _text(code: bytes, stream: Stream) -> str | None:
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


def _skip(code: bytes, stream: Stream) -> None:
    """Step over an opcode's argument."""
    size = _ARGUMENTS.get(code)
    if size is None:
        raise _EndError
    if size == pickletools.UP_TO_NEWLINE:
        _line(stream)
    else:
        _seek(stream, size if size >= 0 else _length(code, stream))


def _length(code: bytes, stream: Stream) -> int:
    num_bytes, signed = _LENGTHS[_ARGUMENTS[code]]
    size = int.from_bytes(_exactly(stream, num_bytes), "little", signed=signed)
    if not 0 <= size < 1 << 62:
        raise _EndError
    return size


def _exactly(stream: Stream, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise _EndError
    return found


def _seek(stream: Stream, size: int) -> None:
    """Step over bytes; beyond the end there is nothing to read."""
    if size > _CHUNK_BYTES and stream.seekable():
        try:
            stream.seek(size, io.SEEK_CUR)
        except (OSError, OverflowError):  # further than any file may reach
            stream.seek(0, io.SEEK_END)
        return
    while size > 0:
        found = len(stream.read(min(size, _CHUNK_BYTES)))
        size = size - found if found else 0


def _line(stream: Stream) -> bytes:
    """A line without its end; of one that is too long for a name, more of its beginning than a name has."""
    line = rest = stream.readline(MAX_NAME + 2)
    while rest and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_NAME)
    if not rest:
        raise _EndError
    return line.removesuffix(b"\n")
