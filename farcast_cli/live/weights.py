"""The weights of a model in memory: compared with those of a checkpoint, and overwritten by them in place.

One tensor of a checkpoint is in memory at a time. A model's tensors keep their storage, so tied weights stay tied, and the
optimizer's state stays with its parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from farcast_cli.errors import FarcastError, SnapshotError, UsageError
from farcast_cli.files.reading import open_read_only, read_into
from farcast_cli.tensors import canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from farcast_cli.tensors import TensorEntry
    from farcast_cli.trainers.base import Snapshot

BY_FILES = "call `farcast leap RUN` between two parts of the training, and resume from the path that it prints"
"""The way that needs nothing of the process."""


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model, and its tensors by the names that they have in its checkpoints."""

    module: torch.nn.Module
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, module: torch.nn.Module, named: Mapping[str, object]) -> LiveModel:
        """A model with the tensors of its state dict, which are its own storage."""
        found = {canonical_name(name): one for name, one in named.items() if isinstance(one, torch.Tensor)}
        return cls(module, found)

    def check(self, snapshot: Snapshot) -> None:
        """See that a checkpoint fits: each of its tensors is one of the model's own, and no trained weight is missing.

        Raises:
            SnapshotError: it does not.
        """
        own = {one.data_ptr() for one in (*self.module.parameters(), *self.module.buffers())}
        covered = set()
        for name, entry in _stored(snapshot):
            tensor = self.tensors.get(name)
            found = "none" if tensor is None or tensor.data_ptr() not in own else _described(tensor.dtype, tensor.shape)
            if tensor is None or found != f"{entry.dtype.name} {entry.shape}":
                raise SnapshotError(
                    f"{snapshot.path}: tensor {entry.name!r}: expected {entry.dtype.name} {entry.shape} in the model, found {found}",
                    hint=BY_FILES,
                )
            covered.add(tensor.data_ptr())
        for name, weight in self.module.named_parameters():
            if weight.requires_grad and weight.numel() and weight.data_ptr() not in covered:
                raise SnapshotError(f"{snapshot.path}: expected the trained weight {name!r}, found none", hint=BY_FILES)

    def check_same(self, snapshot: Snapshot) -> None:
        """See that a checkpoint holds the very weights that the model has now.

        Raises:
            SnapshotError: it holds others, such as an average of the weights.
        """
        for name, entry in _stored(snapshot):
            tensor = self.tensors[name].detach()
            if not torch.equal(_bits(tensor), _bits(_read(entry).to(tensor.device))):
                raise SnapshotError(
                    f"{snapshot.path}: tensor {entry.name!r} is not the model's: is the checkpoint one of averaged weights?",
                    hint=BY_FILES,
                )

    def fill(self, snapshot: Snapshot) -> None:
        """Overwrite the model's tensors with those of a checkpoint that fits.

        Raises:
            FarcastError: it cannot be read, or the model does not take it; some tensors may have the new values.
        """
        with torch.no_grad():
            for name, entry in _stored(snapshot):
                _copy(_read(entry), self.tensors[name], entry)

    def restore(self, snapshot: Snapshot) -> None:
        """The same where the model's own weights must come back: without them, training must not go on.

        Raises:
            RuntimeError: they cannot be read.
        """
        try:
            self.fill(snapshot)
        except (FarcastError, MemoryError) as error:
            raise RuntimeError(f"the model has other weights now: resume from {snapshot.path}") from error


def _stored(snapshot: Snapshot) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors of a checkpoint that can be forecast, and so all that a forecast changes."""
    return ((canonical_name(name), entry) for name, entry in snapshot.tensors.items() if name not in snapshot.not_streamable)


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _read(entry: TensorEntry) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype.name)
    if not entry.num_elements:
        return torch.empty(entry.shape, dtype=dtype)
    raw = bytearray(entry.num_bytes)
    fd = open_read_only(entry.path)
    try:
        read_into(fd, memoryview(raw), entry.offset, entry.path)
    finally:
        os.close(fd)
    flat = torch.frombuffer(raw, dtype=dtype)
    return flat.as_strided(entry.shape, entry.strides) if entry.strides else flat.view(entry.shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The values as whole numbers, so that a NaN equals itself."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])


def _copy(values: torch.Tensor, tensor: torch.Tensor, entry: TensorEntry) -> None:
    try:
        tensor.copy_(values)
    except Exception as error:  # whatever it is, such as a full device: training goes on
        raise SnapshotError(
            f"{entry.path}: tensor {entry.name!r}: the model does not take it: {type(error).__name__}: {error}"
        ) from error


def refuse_shards(module: torch.nn.Module, what: str) -> None:
    """Refuse a model whose weights are spread over processes.

    Raises:
        UsageError: they are.
    """
    for weight in module.parameters():
        kind = type(weight).__name__
        if kind in {"DTensor", "FlatParameter"} or type(weight.data).__name__ == "DTensor" or hasattr(weight, "ds_id"):
            raise sharded(f"{what}, {kind}")


def sharded(what: str) -> UsageError:
    """That weights are in shards, with the way out."""
    return UsageError(f"LeapCallback: expected whole weights in each process, found {what}: {BY_FILES}")
