"""Keeping the weights of a run's checkpoints before the trainer deletes them: one file per checkpoint, in a folder of its own.

Copied are the tensors that can be forecast, and the counters among the weights; of the trainer's state only its numbers.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.errors import FarcastError, FileFormatError, OutputError, SnapshotError, UsageError, shell_word
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import check_outside, open_new
from farcast_cli.files.reading import open_read_only, portable, read_into, relative
from farcast_cli.files.staged import refuse_existing, staged
from farcast_cli.formats.safetensors_file import encode_header
from farcast_cli.run.alignment import align
from farcast_cli.run.closed import reopened
from farcast_cli.run.kept import as_option, conflicts_of, default_folder, is_of, kept_in, others_chosen
from farcast_cli.run.trajectory import discover
from farcast_cli.run.trust import BY_EVIDENCE, StepRule
from farcast_cli.second_copies import marks_of_averages
from farcast_cli.state.files import STATE_ROLES, load_histories
from farcast_cli.tensors import DType, Stretch, TensorEntry, sample_stretches
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.base import unchanged
from farcast_cli.trainers.kept import ENDING, KeptRecord, StateRecord, ViewRecord, encoded
from farcast_cli.trainers.names import find_number_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.progress import Progress
    from farcast_cli.run.selection import Selection
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Part, Snapshot

TRIES = 5  # to list a folder from which the trainer deletes checkpoints meanwhile
COPY_BYTES = 8 << 20  # at once
MAX_STATE_CHARS = 16 << 20  # of the numbers of one checkpoint's state; more is no state of counters


@dataclass(frozen=True, slots=True)
class KeepRequest:
    """What the user asks to be kept."""

    selection: Selection
    into: Path | None = None
    """The folder; by default kept/NAME in the working directory."""
    last: int | None = None
    """How many kept snapshots stay; None for all."""
    sampled: bool = False
    """Keep only the values that `fit` reads."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a call of `keep` did, and what the folder holds now."""

    run: Path
    folder: Path
    snapshots: tuple[Snapshot, ...]
    """All kept ones, in the order of their steps."""
    added: tuple[Path, ...]
    removed: tuple[Path, ...]
    cautions: tuple[str, ...]
    rule: StepRule = BY_EVIDENCE

    @property
    def num_bytes(self) -> int:
        return sum(snapshot.num_bytes for snapshot in self.snapshots)

    @property
    def whole_bytes(self) -> int:
        """What the checkpoints themselves would take."""
        return sum(snapshot.source.num_bytes for snapshot in self.snapshots if snapshot.source)


def keep(request: KeepRequest, progress: Progress) -> Keeping:
    """Copy what is not kept yet of a run's checkpoints; remove the oldest kept ones beyond the last few.

    A checkpoint that the trainer is writing, or deletes meanwhile, is left out with a caution. Each file appears when it is
    whole. Memory: a few megabytes, and the headers.

    Raises:
        SnapshotError: no snapshot; steps that contradict each other; a kept snapshot that has other weights at its step.
        FileFormatError: a checkpoint or a kept snapshot that cannot be read.
        OutputError: the folder lies in the run's, holds another run's kept snapshots, or cannot be written.
    """
    run, last = request.selection.directory, request.last
    folder = request.into or default_folder(run, request.selection.pattern, request.selection.weights)
    if last is not None and last < 1:
        raise UsageError(f"--last {last}: expected 1 or more")
    found, before = _found(request.selection), kept_in(folder)
    _check_folder(folder, request.selection, before)
    for conflict in conflicts_of(found.snapshots, before, folder):
        raise conflict
    known = {snapshot.step for snapshot in before}
    wanted = set(sorted(known | set(found.steps))[-(last or 0) :])
    missing = [snapshot for snapshot in found.snapshots if snapshot.step in wanted - known]
    cautions = [f"{one.path.name} left out: {one.reason}" for one in found.half_written]
    advance = progress("keep", sum(_size_of(snapshot, request) for snapshot in missing))
    added = [path for snapshot in missing if (path := _kept(snapshot, folder, request, cautions, advance))]
    present = kept_in(folder)  # a checkpoint that vanished has not been copied: the oldest one stays in its place
    removed = [snapshot.path for snapshot in present[: -(last or len(present) + 1)]]
    for path in removed:
        _remove(path)
    return Keeping(run, folder, present[len(removed) :], tuple(added), tuple(removed), tuple(cautions), found.rule)


def _size_of(snapshot: Snapshot, request: KeepRequest) -> int:
    """The bytes to copy."""
    return sum(tensor.num_bytes for tensor in _chosen(snapshot, sampled=request.sampled)[0])


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror}", hint="remove it, or call without --last") from error


def _found(selection: Selection) -> Trajectory:
    """The run's snapshots, looked for again where one was deleted while they were listed."""
    for tries_left in reversed(range(TRIES)):
        try:
            found = discover(selection.directory, **selection.entries, minimum=0)
        except FileFormatError as error:
            if not tries_left or error.path is None or error.path.exists():
                raise
        else:
            break
    if any(snapshot.source for snapshot in found.snapshots):
        raise UsageError(f"{selection.directory}: expected a run's checkpoints, found kept snapshots", hint="farcast keep RUN")
    return found


def _check_folder(folder: Path, selection: Selection, before: Sequence[Snapshot]) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder}: expected a folder for kept snapshots, found a file", hint="--into DIR")
    check_outside(folder, selection.directory, option="--into")
    others = next((option for one in before if (option := others_chosen(one, selection.weights)) is not None), None)
    if others is not None:
        raise OutputError(
            f"{folder}: holds kept snapshots of {others}, expected those of {as_option(selection.weights)}",
            hint="--into DIR, another folder; or choose the same weights",
        )
    stranger = next((one for one in before if not is_of(one, selection.directory, selection.pattern, selection.weights)), None)
    if stranger and stranger.source:
        raise OutputError(
            f"{folder}: holds kept snapshots of another run, {stranger.source.run.resolve()}",
            hint=f"--into DIR, another folder; or move {shell_word(folder)} away, if the run is gone",
        )


# --- one checkpoint --------------------------------------------------------------------------------------------------


def _kept(
    snapshot: Snapshot, folder: Path, request: KeepRequest, cautions: list[str], advance: Callable[[int], None]
) -> Path | None:
    """Copy a checkpoint; returns the file, or None (and a caution) if the checkpoint changed or vanished meanwhile."""
    place = folder / _name_of(snapshot)
    try:
        with staged(place, check=_refuse, option="--into") as temporary, unchanged([snapshot]):
            _write(reopened(snapshot), temporary, request, home=folder, cautions=cautions, advance=advance)
    except (SnapshotError, FileFormatError) as error:
        if isinstance(error, FileFormatError) and snapshot.path.exists():
            raise
        cautions.append(f"{snapshot.path.name} left out: it changed or was deleted while it was copied")
        return None
    return place


def _refuse(place: Path) -> None:
    refuse_existing(place, hint="move it away: farcast keep writes its file there; or --into DIR, another folder")


def _name_of(snapshot: Snapshot) -> str:
    """The checkpoint's own name, with its step if it has none: a loop may save all its checkpoints under one name."""
    name = snapshot.path.name.removesuffix(".safetensors")
    step = "" if find_number_in_name(snapshot.path.name, snapshot.unit) else f"-{snapshot.unit}_{snapshot.step}"
    return f"{name}{step}{ENDING}"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor that is copied: which of its values, and how the file describes them."""

    entry: TensorEntry
    """In real numbers."""
    stretches: Sequence[Stretch]
    dtype: DType
    shape: tuple[int, ...]
    view: ViewRecord | None

    @property
    def num_bytes(self) -> int:
        return sum(stretch.count for stretch in self.stretches) * self.entry.dtype.itemsize


def _stored(entry: TensorEntry, *, sampled: bool) -> _Stored:
    """A tensor's values row by row, in a type of safetensors; or a sample of them, if there are more."""
    real = entry.as_real()
    if sampled and real.num_elements > DEFAULT_SAMPLE:
        stretches = sample_stretches(real.num_elements, DEFAULT_SAMPLE)
        view = ViewRecord(dtype=entry.dtype.name, shape=entry.shape, strides=entry.strides, sample=DEFAULT_SAMPLE)
        return _Stored(real, stretches, real.dtype, (sum(stretch.count for stretch in stretches),), view)
    whole = (Stretch(0, real.num_elements),)
    if entry.dtype.code and not entry.strides:
        return _Stored(real, whole, entry.dtype, entry.shape, None)
    order = sorted(range(len(real.shape)), key=lambda axis: -real.strides[axis]) if real.strides else range(len(real.shape))
    view = ViewRecord(dtype=entry.dtype.name, shape=entry.shape, strides=entry.strides)
    return _Stored(real, whole, real.dtype, tuple(real.shape[axis] for axis in order), view)


def _chosen(snapshot: Snapshot, *, sampled: bool) -> tuple[list[_Stored], Counter[str]]:
    """The tensors to copy, and how many are not, by the reason."""
    alignment = align([snapshot])
    names = {tensor.name for tensor in alignment.tensors} | {name for name, e in snapshot.tensors.items() if _is_counter(e)}
    entries = sorted((snapshot.tensors[name] for name in names), key=lambda entry: (-entry.dtype.itemsize, entry.name))
    left_out = Counter(copied.kind for copied in alignment.copied if copied.name not in names)
    return [_stored(entry, sampled=sampled) for entry in entries], left_out


def _is_counter(entry: TensorEntry) -> bool:
    return entry.dtype.name == "int64" and entry.num_elements == 1 and not entry.strides


def _write(
    snapshot: Snapshot, path: Path, request: KeepRequest, *, home: Path, cautions: list[str], advance: Callable[[int], None]
) -> None:
    tensors, left_out = _chosen(snapshot, sampled=request.sampled)
    record = KeptRecord(
        name=portable(snapshot.path.name),
        step=snapshot.step,
        evidence=f"{snapshot.step_source} of {portable(snapshot.path.name)}",
        layout=snapshot.layout,
        run=relative(request.selection.directory, home),
        pattern=request.selection.pattern,
        weights=snapshot.weights,
        unit=snapshot.unit,
        bytes=snapshot.num_bytes,
        digest=snapshot.full_digest,
        views={tensor.entry.name: tensor.view for tensor in tensors if tensor.view},
        left_out=dict(left_out),
        marks=tuple((mark.step, mark.origin_step, mark.valid_step) for mark in trainer_of(snapshot).marks(snapshot)),
        states=tuple(_states_of(snapshot, cautions)),
        averages=dict(marks_of_averages(snapshot)),
    )
    stored = [(tensor.entry.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with open_new(path, like=snapshot.path) as file:
        file.write(encode_header(stored, record.metadata))
        for tensor in tensors:
            _copy(tensor, file, advance)


def _states_of(snapshot: Snapshot, cautions: list[str]) -> Iterator[StateRecord]:
    """The numbers of a checkpoint's state files."""
    for part in snapshot.parts:
        if part.role in STATE_ROLES:
            what = f"the numbers in {part.name}" if part.name else "its counters and learning rate"
            try:
                state = _state_of(snapshot, part)
            except FarcastError as error:
                cautions.append(f"{snapshot.path.name}: {what} are not kept: {error}")
                continue
            if _is_held(state):
                yield state
            else:
                cautions.append(f"{snapshot.path.name}: {what} are not kept: too many, or nested too deep")


def _state_of(snapshot: Snapshot, part: Part) -> StateRecord:
    (history,) = load_histories([replace(snapshot, parts=(part,))]).values()
    _, tree, file = history.states[0]
    numbers = encoded(tree, file, without=part.weights_paths)
    return StateRecord(name=part.key, role=part.role, is_read=part.content is not None, tree=numbers)


def _is_held(state: StateRecord) -> bool:
    """Whether a kept snapshot can hold the numbers of a state file, and give them back."""
    text = json.dumps(state.tree)
    if len(text) > MAX_STATE_CHARS:
        return False
    try:
        parse_json(text.encode())
    except ValueError:
        return False
    return True


def _copy(tensor: _Stored, file: BinaryIO, advance: Callable[[int], None]) -> None:
    entry, size = tensor.entry, tensor.entry.dtype.itemsize
    buffer = memoryview(bytearray(min(tensor.num_bytes, COPY_BYTES)))
    fd = open_read_only(entry.path)
    try:
        for stretch in tensor.stretches:
            begin, end = stretch.start * size, (stretch.start + stretch.count) * size
            for start in range(begin, end, COPY_BYTES):
                chunk = buffer[: min(COPY_BYTES, end - start)]
                read_into(fd, chunk, entry.offset + start, entry.path)
                file.write(chunk)
                advance(len(chunk))
    finally:
        os.close(fd)
