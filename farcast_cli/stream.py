"""Stretches of a tensor at several snapshots, read side by side within a fixed memory budget.

Knows how many bytes to read at once and where a sample of a tensor lies. No tensor is ever whole in memory.

Shapes: T snapshots, N elements of a stretch.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from farcast_cli.errors import NonFiniteError
from farcast_cli.formats.files import open_read_only, read_into

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.tensors import TensorEntry

SAMPLE_BLOCK = 512  # elements that lie side by side; short, so that a sample of an embedding sees many of its rows
STRETCH_BYTES = 8 << 20  # of float32 or float64 working memory that one stretch takes at all its snapshots
MAX_STRETCH = 1 << 17  # elements; in float32 half a MiB, which a core keeps in its cache while it works on it
_MAX_OPEN = 64  # per thread, far below the usual limit of 1,024 for a process


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, start + count) of a tensor."""

    start: int
    count: int


class Reader:
    """Reads stretches of tensors; keeps files open, per thread, because a run has more files than a process may open."""

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, entry: TensorEntry, stretch: Stretch, out: torch.Tensor) -> None:
        """Fill `out` (N bytes x itemsize, uint8) with a stretch's raw bytes."""
        offset = entry.offset + stretch.start * entry.dtype.itemsize
        read_into(self.file(entry.path), buffer_of(out), offset, entry.path)

    def read_values(self, entry: TensorEntry, stretch: Stretch, raw: torch.Tensor | None = None) -> torch.Tensor:
        """A stretch's values in their own dtype, shape (N,); in the memory of `raw` where that is given."""
        if raw is None:
            raw = torch.empty(stretch.count * entry.dtype.itemsize, dtype=torch.uint8)
        self.read(entry, stretch, raw)
        return raw.view(getattr(torch, entry.dtype.name))

    def read_bytes(self, path: Path, offset: int, out: torch.Tensor) -> None:
        """Fill `out` (uint8) from byte `offset` of a file."""
        read_into(self.file(path), buffer_of(out), offset, path)

    def file(self, path: Path) -> int:
        """The descriptor of a file that this thread keeps open."""
        files: dict[Path, _OpenFile] = self._local.__dict__.setdefault("files", {})
        if path not in files:
            if len(files) >= _MAX_OPEN:
                files.pop(next(iter(files)))
            files[path] = _OpenFile(path)
        return files[path].fd


class _OpenFile:
    """A descriptor that is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.fd = open_read_only(path)

    def __del__(self) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:
            os.close(fd)


class Scratch:
    """Working memory that is allocated once: fresh memory costs a page fault for every 4 KiB, more than the arithmetic.

    `named` memory belongs to the calling thread until it asks for the same name again. Memory that was `taken` goes
    from thread to thread until it is given back.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._free: deque[torch.Tensor] = deque()

    def named(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor (count,) of the calling thread."""
        held: dict[str, torch.Tensor] = self._local.__dict__
        num_bytes = count * dtype.itemsize
        if name not in held or held[name].numel() < num_bytes:
            held[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return held[name][:num_bytes].view(dtype)

    def take(self, num_bytes: int) -> torch.Tensor:
        """An uninitialised uint8 tensor (num_bytes,) that the caller owns."""
        try:
            whole = self._free.popleft()
        except IndexError:
            whole = torch.empty(0, dtype=torch.uint8)
        if whole.numel() < num_bytes:
            whole = torch.empty(num_bytes, dtype=torch.uint8)
        return whole[:num_bytes]

    def give_back(self, taken: torch.Tensor) -> None:
        """Let others have what `take` returned."""
        whole = taken if taken._base is None else taken._base  # noqa: SLF001 - the tensor that a slice is of
        self._free.append(whole)


def buffer_of(raw: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor, to read into or to write from."""
    return raw.numpy().data


def sample_stretches(num_elements: int, num_samples: int) -> list[Stretch]:
    """Blocks spread evenly over a tensor; the whole tensor where it is no larger than the sample.

    Depends on the size alone, so that equal tensors are sampled alike.
    """
    if num_elements <= num_samples:
        return [Stretch(0, num_elements)]
    num_blocks = max(2, num_samples // SAMPLE_BLOCK)
    count = min(SAMPLE_BLOCK, num_samples // num_blocks)
    last_start = num_elements - count
    return [Stretch(last_start * i // (num_blocks - 1), count) for i in range(num_blocks)]


def stretches(num_elements: int, *, num_snapshots: int, itemsize: int = 4) -> Iterator[Stretch]:
    """The whole tensor in stretches that fit the budget at all snapshots together."""
    count = max(1 << 12, min(MAX_STRETCH, STRETCH_BYTES // (itemsize * num_snapshots)))
    for start in range(0, num_elements, count):
        yield Stretch(start, min(count, num_elements - start))


def read_trajectory(
    reader: Reader, entries: Sequence[TensorEntry], pieces: Sequence[Stretch], dtype: torch.dtype
) -> torch.Tensor:
    """Stretches of one tensor at all its snapshots, one after another: shape (T, N), converted to `dtype`.

    Elements that are not finite but the same in all snapshots (an attention mask's -inf) are returned as 0: they
    never move.

    Raises:
        NonFiniteError: NaN, or an infinity that is not in every snapshot.
    """
    values = torch.stack([_read_pieces(reader, entry, pieces).to(dtype) for entry in entries])
    if bool(torch.isfinite(values).all()):
        return values
    bad = ~torch.isfinite(values) & ~(values == values[-1]).all(dim=0)
    if bool(bad.any()):
        raise non_finite(entries[int(bad.any(dim=1).nonzero()[0])], values[bad][0].item())
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


def _read_pieces(reader: Reader, entry: TensorEntry, pieces: Sequence[Stretch]) -> torch.Tensor:
    """Stretches of one tensor, one behind the other, in one allocation."""
    itemsize = entry.dtype.itemsize
    raw = torch.empty(sum(piece.count for piece in pieces) * itemsize, dtype=torch.uint8)
    memory, position = buffer_of(raw), 0
    fd = reader.file(entry.path)
    for piece in pieces:
        end = position + piece.count * itemsize
        read_into(fd, memory[position:end], entry.offset + piece.start * itemsize, entry.path)
        position = end
    return raw.view(getattr(torch, entry.dtype.name))


def non_finite(entry: TensorEntry, value: float) -> NonFiniteError:
    return NonFiniteError(
        f"{entry.path}: tensor {entry.name!r} holds {value}: expected finite numbers",
        hint="the run diverged or the file is damaged: leave the snapshot out with --steps",
    )
