"""Stretches of a tensor at several snapshots, read side by side within a fixed memory budget.

Knows how files are read, how many bytes at once, and where a sample of a tensor lies. No tensor is ever whole in memory.

Shapes: T snapshots, N elements of a stretch.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli import system
from farcast_cli.engine.casts import widen
from farcast_cli.errors import NonFiniteError
from farcast_cli.files.reading import ends_early, open_read_only, read_into, reading, source_of
from farcast_cli.tensors import Stretch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import Io
    from farcast_cli.engine.casts import Floats
    from farcast_cli.files.reading import FileStretch, InFile
    from farcast_cli.tensors import TensorEntry

PAGE = 4096
LINE = 64  # of a processor's cache: a kernel copies to memory that begins elsewhere at a sixth of the speed (AMD, Linux 6)
STRETCH_BYTES = 8 << 20  # of float32 or float64 working memory that one stretch takes at all its snapshots
MAX_STRETCH = 1 << 17  # elements; in float32 half a MiB, which a core keeps in its cache while it works on it
_MAX_OPEN = (
    160  # per thread, so that a long run's snapshots stay open; some four threads read at once, and a process may have 1,024
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a pass over the files may use: a device by torch's name ("cpu" computes in numpy), and how many workers."""

    device: str = "cpu"
    io: Io = "auto"
    num_workers: int = 1


@dataclass(frozen=True, slots=True)
class TensorStretches:
    """Stretches of one tensor; `entries[t]` is where snapshot t holds it."""

    entries: Sequence[TensorEntry]
    stretches: Sequence[Stretch]

    @property
    def count(self) -> int:
        """Elements."""
        return sum(stretch.count for stretch in self.stretches)

    @property
    def num_bytes(self) -> int:
        """Of all snapshots together."""
        return self.count * sum(entry.dtype.itemsize for entry in self.entries)

    def at(self, snapshot: int) -> Iterator[FileStretch]:
        """Where a snapshot holds them."""
        entry = self.entries[snapshot]
        size, is_sample = entry.dtype.itemsize, entry.sample > 0
        for stretch in self.stretches:
            offset = entry.offset_of(stretch) if is_sample else entry.offset + stretch.start * size
            yield entry.path, offset, stretch.count * size


class Reader:
    """Reads stretches of files; keeps files open, per thread, because a run has more files than a process may open."""

    def __init__(self, io: Io = "auto") -> None:
        self._local = threading.local()
        self._is_mapped = io == "mmap"

    def fill(self, path: Path, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` from byte `offset` of a file."""
        file = self._file(path)
        if file.is_mapped:
            np.copyto(out, file.view(offset, len(out)))
        else:
            read_into(file.fd, out.data, offset, path)

    def raw(self, path: Path, offset: int, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As many bytes of a file as `memory` has: in that memory, or in place where files are mapped (read-only)."""
        file = self._file(path)
        if file.is_mapped:
            return file.view(offset, len(memory))
        self.fill(path, offset, memory)
        return memory

    def for_kernel(self, stretches: Sequence[FileStretch]) -> tuple[InFile, ...] | None:
        """Files as the kernel reads them itself; None where a file is mapped, or its bytes come from elsewhere.

        They stay open until this thread has asked for as many others as may be open.
        """
        if not hasattr(os, "preadv") or len(stretches) > _MAX_OPEN:
            return None
        files = [self._file(path) for path, _, _ in stretches]
        if any(file.is_mapped or file.is_elsewhere for file in files):
            return None
        return tuple((file.fd, offset, path) for file, (path, offset, _) in zip(files, stretches, strict=True))

    def prefetch(self, path: Path, offset: int, num_bytes: int) -> None:
        """Let the kernel start reading what will be asked for soon."""
        system.read_soon(self._file(path).fd, offset, num_bytes)

    def release(self) -> None:
        """Let go of what was read in place, so that what is resident does not grow with it."""
        for file in self._files.values():
            file.release()

    @property
    def _files(self) -> dict[Path, _OpenFile]:
        files: dict[Path, _OpenFile] = self._local.__dict__.setdefault("files", {})
        return files

    def _file(self, path: Path) -> _OpenFile:
        files = self._files
        file = files.pop(path, None)
        if file is None:
            if len(files) >= _MAX_OPEN:
                files.pop(next(iter(files)))
            is_elsewhere = source_of(path) is not None
            file = _OpenFile(path, is_mapped=self._is_mapped and not is_elsewhere, is_elsewhere=is_elsewhere)
        files[path] = file  # behind all others: who was asked for last is closed last
        return file


class _OpenFile:
    """A descriptor, and a mapping where one is asked for, that are closed with their last reference."""

    def __init__(self, path: Path, *, is_mapped: bool, is_elsewhere: bool) -> None:
        self.path, self.is_mapped, self.is_elsewhere, self.fd = path, is_mapped, is_elsewhere, open_read_only(path)
        self._map: mmap.mmap | None = None
        self._seen: list[tuple[int, int]] = []

    def view(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes of the mapped file."""
        if num_bytes == 0:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        if self._map is None:
            with reading(self.path):
                if os.fstat(self.fd).st_size == 0:
                    raise ends_early(self.path, expected=offset + num_bytes, found=0)
                self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        if offset + num_bytes > len(self._map):
            raise ends_early(self.path, expected=offset + num_bytes, found=len(self._map))
        self._seen.append((offset, num_bytes))
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)

    def release(self) -> None:
        """Drop the pages that were seen; whoever still looks at them has them read again."""
        for offset, num_bytes in self._seen:
            if self._map is not None:
                system.forget(self._map, offset, num_bytes)
        self._seen.clear()

    def __del__(self) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:
            os.close(fd)


class Scratch:
    """Working memory that is allocated once: fresh memory costs a page fault for every 4 KiB, more than the arithmetic.

    The memory of a name is the caller's until it asks for the same name again.
    """

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}
        self._last: dict[str, tuple[int, Any, NDArray[Any]]] = {}

    def named(self, name: str, count: int, dtype: Any) -> NDArray[Any]:
        """An uninitialised array (count,)."""
        last = self._last.get(name)
        if last is not None and last[0] == count and last[1] is dtype:  # nearly always; to make a view takes some microseconds
            return last[2]
        num_bytes = count * np.dtype(dtype).itemsize
        if name not in self._held or len(self._held[name]) < num_bytes:
            self._held[name] = aligned(num_bytes)
        found: NDArray[Any] = self._held[name][:num_bytes].view(dtype)
        self._last[name] = count, dtype, found
        return found

    @property
    def num_bytes(self) -> int:
        return sum(len(memory) for memory in self._held.values())


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that begin on a cache line."""
    memory = np.empty(num_bytes + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + num_bytes]


def stretches(num_elements: int, *, num_snapshots: int, itemsize: int = 8) -> Iterator[Stretch]:
    """The whole tensor in stretches that fit the budget at all snapshots together, `itemsize` bytes an element."""
    count = max(4096, min(MAX_STRETCH, STRETCH_BYTES // (itemsize * num_snapshots) // 2048 * 2048))
    for start in range(0, num_elements, count):
        yield Stretch(start, min(count, num_elements - start))


def read_trajectory(reader: Reader, tensors: Sequence[TensorStretches], out: Floats, scratch: Scratch) -> Floats:
    """Stretches of tensors at all their snapshots, one behind the other, into `out`: shape (T, N).

    Elements that are not finite but the same in all snapshots (an attention mask's -inf) are returned as 0: they
    never move.

    Args:
        tensors: with the same types.

    Raises:
        NonFiniteError: NaN, or an infinity that is not in every snapshot.
    """
    read_values(reader, tensors, out, scratch)
    if not bool(np.isfinite(out).all()):
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.count
            _still_infinities(tensor, out[:, start:end])
    return out


def _still_infinities(tensor: TensorStretches, values: Floats) -> None:
    """Put 0 for what is not finite but never moves; an error for anything else that is not finite."""
    bad = ~np.isfinite(values) & ~(values == values[-1]).all(axis=0)
    if bool(bad.any()):
        raise non_finite(tensor.entries[int(bad.any(axis=1).argmax())], float(values[bad][0]))
    values[~np.isfinite(values)] = 0


def read_values(reader: Reader, tensors: Sequence[TensorStretches], out: Floats, scratch: Scratch) -> None:
    """The same, but whatever the values are."""
    for snapshot, row in enumerate(out):
        raw = _raw(reader, (stretch for tensor in tensors for stretch in tensor.at(snapshot)), scratch)
        found = widen(raw, tensors[0].entries[snapshot].dtype, row)
        if found is not row:
            np.copyto(row, found)


def read_raw(reader: Reader, tensor: TensorStretches, scratch: Scratch) -> tuple[NDArray[np.uint8], ...]:
    """The bytes of stretches at all snapshots at once."""
    return tuple(_raw(reader, tensor.at(t), scratch, f"raw {t}") for t in range(len(tensor.entries)))


def _raw(reader: Reader, stretches: Iterable[FileStretch], scratch: Scratch, name: str = "raw") -> NDArray[np.uint8]:
    """Stretches of files, one behind the other."""
    found = joined(stretches)
    raw = scratch.named(name, sum(num_bytes for _, _, num_bytes in found), np.uint8)
    if len(found) == 1:
        path, offset, _ = found[0]
        return reader.raw(path, offset, raw)
    end = 0
    for path, offset, num_bytes in found:
        start, end = end, end + num_bytes
        reader.fill(path, offset, raw[start:end])
    return raw


def joined(stretches: Iterable[FileStretch]) -> list[FileStretch]:
    """The same with neighbours as one."""
    found: list[FileStretch] = []
    for path, offset, num_bytes in stretches:
        if found and found[-1][0] is path and found[-1][1] + found[-1][2] == offset:
            found[-1] = path, found[-1][1], found[-1][2] + num_bytes
        else:
            found.append((path, offset, num_bytes))
    return found


def non_finite(entry: TensorEntry, value: float) -> NonFiniteError:
    return NonFiniteError(
        f"{entry.path}: tensor {entry.name!r} holds {value}: expected finite numbers",
        hint="the run diverged or the file is damaged: leave the snapshot out with --steps",
    )
