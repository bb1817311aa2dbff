"""The memory of a run's leaps: one file beside the forecasts, from which the next leap goes on.

A safetensors file. It holds the mean move of the run's past stretches (`move.NAME`, bfloat16: two bytes a weight, and the
type's range keeps even the smallest move), and where no leap was made, the weights at which the next stretch begins
(`landing.NAME`). Its metadata say of which run it is, where the last forecast lies, and the numbers of `Momentum` and `Losses`. With the
run's newest snapshot that is all that a leap reads, so the trainer may rotate its snapshots as it likes. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from farcast_cli import __version__
from farcast_cli.checkpoint.pieces import Copy, OutputFile, Planned, Values
from farcast_cli.checkpoint.plan import safetensors_output
from farcast_cli.choices import ClockName, StepFrom, StepUnit  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.errors import FarcastError, FileFormatError, OutputError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import list_files
from farcast_cli.files.reading import local, reading, short_name
from farcast_cli.forecast.momentum import Momentum, Remembered
from farcast_cli.forecast.steering import LARGEST, Losses
from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.run.alignment import AlignedTensor, Alignment, align
from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tensors import DTYPES, FLOATING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.checkpoint.pieces import Piece
    from farcast_cli.tensors import TensorEntry
    from farcast_cli.trainers.base import Snapshot

SCHEMA_VERSION: Literal[1] = 1
MEMORY_ENDING = ".memory.safetensors"
_METADATA_KEY = "farcast"
_MOVE, _LANDING = "move.", "landing."

_Step = Annotated[int, Field(ge=0, le=1 << 63)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Square = Annotated[float, Field(ge=0, le=4 * LARGEST**2)]


class MemoryRecord(BaseModel):
    """What a memory says beside its tensors. `run` is relative to its folder, and `forecast` lies in it.

    The bounds keep a damaged or a stranger's memory from naming other places, and its numbers from leaving arithmetic.
    """

    model_config = ConfigDict(defer_build=True, frozen=True)
    kind: Literal["memory of leaps"] = "memory of leaps"
    schema_version: Literal[1] = SCHEMA_VERSION
    farcast_version: str = __version__
    run: str
    pattern: str = ""
    """Which entries of the folder are the run's."""
    step_from: StepFrom | None = None
    unit: StepUnit = "step"
    weights: tuple[str, ...] = ()
    """The keys of the weights, where they were chosen."""
    strides: dict[str, tuple[int, ...]] = {}
    """Of the tensors that are not stored in row-major order."""
    origin: str
    origin_step: _Step
    origin_digest: str
    averages: dict[str, str] = {}
    """Marks of the averages at the origin: one that has the same mark at the next call does not move."""
    landing_step: _Step
    """Where the trainer's counters are when it goes on."""
    forecast: str = ""
    """The checkpoint of the last leap; empty where none was made, and `landing.NAME` are the weights."""
    files: tuple[dict[str, Any], ...] = ()
    """Of that checkpoint, with their fingerprints."""
    horizon: _Step = 0
    every: int = Field(ge=1, le=1 << 63)
    """Steps that the next stretch was to have."""
    rate: float | None = Field(None, ge=0, le=LARGEST)
    """The learning rate at the origin."""
    length: float = Field(ge=1 / LARGEST, le=LARGEST)
    """Of the last stretch, and so of the moves that the file holds, in `clock`."""
    clock: ClockName
    count: int = Field(ge=0, le=1 << 30)
    gain: float = Field(ge=0, le=LARGEST)
    made: float = Field(ge=-(LARGEST**2), le=LARGEST**2)
    foretold: _Square
    level: float | None = Field(None, ge=-LARGEST, le=LARGEST)
    """Of the loss that the user's command gave, at the last call; this and the next six are `Losses`."""
    falls: _Square = 0.0
    falls_weight: _Share = 0.0
    told: float = Field(0.0, ge=-1, le=1)
    told_size: _Share = 0.0
    bend: float = Field(0.0, ge=-(LARGEST**2), le=LARGEST**2)
    bend_weight: _Share = 0.0
    reason: str = ""
    """Why no leap was made."""

    @field_validator("run", "forecast")
    @classmethod
    def _is_a_path(cls, name: str) -> str:
        if "\0" in name:
            raise ValueError("no path holds a zero byte")
        return name

    @field_validator("forecast")
    @classmethod
    def _lies_beside(cls, name: str) -> str:
        if {"/", os.sep} & set(name) or name in {".", ".."}:
            raise ValueError("the last leap lies elsewhere")
        return name

    @property
    def momentum(self) -> Momentum:
        return Momentum(self.count, self.gain, self.made, self.foretold)

    @property
    def losses(self) -> Losses:
        return Losses(**{name.name: getattr(self, name.name) for name in fields(Losses)})


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory that was read, and is whole. `path` is its file."""

    path: Path
    record: MemoryRecord
    moves: Mapping[str, TensorEntry]
    landing: Mapping[str, TensorEntry]

    @property
    def run(self) -> Path:
        """The folder of the run that it remembers."""
        return (self.path.parent.resolve() / local(self.record.run)).resolve()

    @property
    def forecast(self) -> Path | None:
        """The checkpoint of the last leap."""
        return self.path.parent / local(self.record.forecast) if self.record.forecast else None

    def began_at(self, origin: Snapshot) -> bool:
        """Whether the last call's origin was this snapshot."""
        # the digest reads a block of every tensor: of another step it need not
        return self.record.origin_step == origin.step and self.record.origin_digest == origin.full_digest


def memory_of(forecasts: Path, run: Path, pattern: str = "") -> Path:
    """Where the memory of a run lies; each `--pattern` is a run of its own in the folder, with a memory of its own."""
    which = f"-{hashlib.sha256(pattern.encode(errors='surrogateescape')).hexdigest()[:8]}" if pattern else ""
    return forecasts / f"{short_name(run.resolve().name or 'run')}{which}{MEMORY_ENDING}"


def read_memory(path: Path) -> Memory | None:
    """The memory at a path; None where there is none.

    Raises:
        FileFormatError: something else, or a damaged memory.
    """
    with reading(path):
        if not os.path.lexists(path):
            return None
        file = read_safetensors(path)
    try:
        record = MemoryRecord.model_validate(parse_json(file.metadata[_METADATA_KEY].encode()))
    except (KeyError, ValueError, ValidationError) as error:
        raise FileFormatError(
            f"{path}: not a memory of leaps that this version of farcast can read",
            hint="move it away: the next leap starts a new one",
        ) from error
    moves = {e.name.removeprefix(_MOVE): e for e in file.entries if e.name.startswith(_MOVE)}
    landing = {e.name.removeprefix(_LANDING): e for e in file.entries if e.name.startswith(_LANDING)}
    return Memory(path, record, moves, landing)


def check_memory_ours(path: Path, run: Path) -> None:
    """That a file may be replaced by a new memory of a run.

    Raises:
        OutputError: it is none, or that of another run.
    """
    try:
        found = None if path.is_symlink() else read_memory(path)
    except FileFormatError as error:
        raise OutputError(f"{path}: exists and is not a memory of leaps", hint="move it away") from error
    if found is None:
        raise OutputError(f"{path}: exists and is not a memory of leaps", hint="move it away")
    check_memory_of(found, run)


def check_memory_of(memory: Memory, run: Path) -> None:
    """That a memory is the run's own.

    Raises:
        OutputError: it is that of another run.
    """
    if memory.run != run.resolve():
        raise OutputError(
            f"{memory.path}: the memory of another run, {memory.run}",
            hint="-o OUT/ gives this run a folder of its own; if the run was moved, remove its old memory",
        )


# --- what a leap is computed from ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryBasis:
    """Aligned files, the move of the last stretch over their Gram basis, and what is remembered over the same basis.

    Args:
        alignment: of the memory (where it holds moves), the landing and the origin, in this order.
        snapshots: the checkpoints among these.
    """

    alignment: Alignment
    snapshots: tuple[Snapshot, ...]
    has_moves: bool


def basis_of(memory: Memory, origin: Snapshot, *, include: Sequence[str], exclude: Sequence[str]) -> MemoryBasis | str:
    """What the next leap is computed from; or in words why this memory cannot be used."""
    where = memory.forecast
    landing: Snapshot | None = None
    if where is not None:
        lost = changed(where, memory.record)
        if lost:
            return lost
        landing = open_snapshot(where, memory.record.weights)
    try:
        shared = align([landing, origin] if landing else [origin], include=include, exclude=exclude)
    except FarcastError as error:
        return str(error)
    tensors = []
    for tensor in shared.tensors:
        entries = list(tensor.entries)
        for held, is_held in ((memory.landing, landing is None), (memory.moves, memory.record.count > 0)):
            if is_held:
                entry = held.get(tensor.name)
                last = tensor.entries[-1]
                order = memory.record.strides.get(tensor.name, ())
                if entry is None or entry.dtype.name not in FLOATING or (entry.shape, order) != (last.shape, last.strides):
                    return f"its tensors are not those of {origin.path.name}"
                entries.insert(0, replace(entry, strides=order))
        tensors.append(AlignedTensor(tensor.name, tuple(entries), tensor.remark))
    known = set(memory.moves if memory.record.count else memory.landing)
    if known != {tensor.name for tensor in shared.tensors}:
        return f"its tensors are not those of {origin.path.name}"
    snapshots = (landing, origin) if landing else (origin,)
    return MemoryBasis(Alignment(tuple(tensors), shared.copied), snapshots, memory.record.count > 0)


def changed(forecast: Path, record: MemoryRecord) -> str:
    """What is wrong with the last forecast; empty where it is as it was written."""
    with reading(forecast):
        if not forecast.exists():
            return f"{forecast}, the last leap, was removed"
        is_same = list_files(forecast) == list(record.files)
    return "" if is_same else f"{forecast}, the last leap, was changed since then"


def remembered(memory: Memory, moves: NDArray[Any]) -> Remembered | None:
    """What a memory knows, given the vector of its moves over the basis; None where it holds none."""
    return Remembered(memory.record.momentum, moves / memory.record.length) if memory.record.count else None


# --- writing ---------------------------------------------------------------------------------------------------------


def plan_memory(alignment: Alignment, record: MemoryRecord, *, holds_landing: bool) -> OutputFile:
    """The file of a new memory; its moves are the values of a bare forecast (`LinearMap.bare`).

    Args:
        alignment: the origin's tensors are the last ones.
        holds_landing: the origin's weights go into it.
    """
    planned = []
    for index, tensor in enumerate(alignment.tensors):
        entry = tensor.entries[-1]
        if record.count:
            values = Values(entry, index, DTYPES["bfloat16"])
            planned.append(Planned(_MOVE + tensor.name, values.dtype, entry.shape, (values,)))
    for tensor in alignment.tensors if holds_landing else ():
        entry = tensor.entries[-1]
        piece: Piece = Copy(entry.path, entry.offset, entry.num_bytes)
        planned.append(Planned(_LANDING + tensor.name, entry.dtype, entry.shape, (piece,)))
    text = json.dumps(record.model_dump(), separators=(",", ":"))
    return safetensors_output("", planned, {_METADATA_KEY: text})
