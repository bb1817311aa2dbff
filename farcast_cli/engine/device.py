"""The forecast's arithmetic in torch, on a GPU (or, the same code, on the CPU).

Each worker is a thread with a stream of its own and pinned memory: while one reads its files, another's bytes are on their
way to the device, a third's are computed, a fourth's come back. Two pinned blocks are read into by turns, so that a worker reads
the next snapshot while the last one is copied.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farcast_cli.engine.casts import are_finite

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from farcast_cli.engine.arithmetic import Array, Factor
    from farcast_cli.engine.casts import WorkType
    from farcast_cli.engine.native import Kernel
    from farcast_cli.tensors import DType

_WORK: dict[WorkType, torch.dtype] = {np.float32: torch.float32, np.float64: torch.float64}
_NUM_PINNED = 2  # of each name


class DeviceArithmetic:
    """torch on one device; every operation is enqueued on this worker's stream."""

    xp: Any = torch
    kernel: Kernel | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._memory: dict[str, list[torch.Tensor]] = {}
        self._turn: dict[str, int] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._floats: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(block.numel() for blocks in self._memory.values() for block in blocks)

    def context(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def memory(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        blocks = self._memory.setdefault(name, [])
        turn = self._turn[name] = (self._turn.get(name, -1) + 1) % _NUM_PINNED
        if turn == len(blocks):
            blocks.append(torch.empty(0, dtype=torch.uint8))
        if blocks[turn].numel() < num_bytes:
            blocks[turn] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        if copied := self._copied.pop(blocks[turn].data_ptr(), None):
            copied.synchronize()
        return np.asarray(blocks[turn][:num_bytes].numpy())

    def floats(self, name: str, count: int, like: Array) -> Array:
        key = name, like.dtype
        if key not in self._floats or len(self._floats[key]) < count:
            self._floats[key] = torch.empty(count, dtype=like.dtype, device=self._device)
        return self._floats[key][:count]

    def load(self, raw: NDArray[np.uint8], dtype: DType, name: str, work: WorkType) -> Array:
        if not raw.flags.writeable:  # a file read in place: torch takes memory that it could write to, and that is pinned
            mapped, raw = raw, self.memory("mapped", len(raw))
            np.copyto(raw, mapped)
        host = torch.from_numpy(raw).view(getattr(torch, dtype.name))
        values = host.to(self._device, non_blocking=True)
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[host.data_ptr()] = event
        out = self.floats(name, len(values), torch.empty(0, dtype=_WORK[work]))
        return out.copy_(values)

    def spread(self, values: NDArray[np.floating[Any]], counts: Sequence[int], work: WorkType) -> Factor:
        if len(values) == 1:
            return float(values[0])
        numbers = torch.from_numpy(values.astype(work)).to(self._device)
        return torch.repeat_interleave(numbers, torch.tensor(counts, device=self._device))

    def store(self, values: Array, dtype: DType, out: NDArray[np.uint8]) -> bool:
        rounded = values.to(getattr(torch, dtype.name)).view(torch.uint8)
        pinned = self.memory("out", len(out))
        torch.from_numpy(pinned).copy_(rounded)
        np.copyto(out, pinned)
        return are_finite(out, dtype)

    def to_host(self, values: Array) -> NDArray[Any]:
        return np.asarray(values.cpu().numpy())

    def from_host(self, values: NDArray[Any]) -> Array:
        return torch.from_numpy(values).to(self._device)
