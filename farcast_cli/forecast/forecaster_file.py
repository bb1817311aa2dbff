"""The forecaster file: what `fit` learned, and of which files.

A safetensors file with the Gram matrices and the kept sample; its metadata hold, as one JSON text, where the run is,
which snapshots were read (with sizes and header hashes) and which tensors. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from farcast_cli import __version__
from farcast_cli.choices import StepFrom, StepUnit  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.errors import FileFormatError, OutputError, SnapshotError, UnsafeFileError, UsageError, shell_word
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import check_place, open_new
from farcast_cli.files.reading import (
    fetch,
    file_size,
    is_address,
    local,
    mark_of,
    open_input,
    open_read_only,
    placed,
    portable,
    read_into,
    reading,
    seen_from,
)
from farcast_cli.files.staged import staged
from farcast_cli.forecast.backtest import Steadiness, steadiness
from farcast_cli.forecast.gram import Gram, Sample
from farcast_cli.forecast.ledger import Leap  # noqa: TC001 - pydantic reads the annotation
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.formats.safetensors_file import read_safetensors, write_arrays
from farcast_cli.remote.mirror import opened
from farcast_cli.run.alignment import Alignment, Copied, align, under_common_names
from farcast_cli.run.entries import run_entries
from farcast_cli.run.pace import Pace
from farcast_cli.run.selection import options_of
from farcast_cli.run.steps import StepRange, parse_steps
from farcast_cli.run.trust import StepRule
from farcast_cli.tensors import is_batch_norm_statistic
from farcast_cli.trainers import LAYOUTS, named
from farcast_cli.trainers.base import read_snapshot
from farcast_cli.trainers.kept import LAYOUT as KEPT
from farcast_cli.trainers.names import find_number_in_name, word_of_others

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.files.reading import Mark
    from farcast_cli.tensors import TensorEntry
    from farcast_cli.trainers.base import Snapshot

SCHEMA_VERSION = 1
_METADATA_KEY = "farcast"
_ARRAYS = {"steps", "gram", "sample.bounds", "sample.sizes", "sample.values"}


class SnapshotRecord(BaseModel):
    """A snapshot as it was when it was read; `path` is relative to the run's folder, or to that of its kept snapshots."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    path: str
    step: int
    step_source: str
    bytes: int
    digest: str
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor that is forecast, as the last snapshot holds it; there may be many, so each is as small as can be."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    remark: str = ""
    trained: bool | None = None
    """Whether the trainer's optimizer has a state for it; None where that is unknown."""


class CopiedRecord(BaseModel):
    """A tensor that is taken over unchanged, and why."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    name: str
    reason: str
    of: str = ""


class Provenance(BaseModel):
    """Of what a forecaster was made. `directory` and `kept` are relative to the forecaster file."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    schema_version: int = SCHEMA_VERSION
    farcast_version: str = __version__
    directory: str
    layout: str
    snapshots: tuple[SnapshotRecord, ...]
    tensors: tuple[TensorRecord, ...]
    copied: tuple[CopiedRecord, ...]
    num_samples: int | None
    leap: Leap | None = None
    """The leap that the run resumed from and after which the history begins."""
    pace: Pace = Pace(why="the forecaster is of an older farcast: fit reads the rates")
    """The learning rates along the history and for as far ahead as a forecast may reach, where they are known."""
    notes: tuple[str, ...] = ()
    """What was said of the run: where its history begins, if its tensors changed."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pattern: str = ""
    step_from: StepFrom | None = None
    """Which evidence told the steps, if the user said so."""
    unit: StepUnit = "step"
    weights: tuple[str, ...] = ()
    """The keys of the weights, where they were chosen."""
    steps: str = ""
    """The steps that the user chose, as `--steps` has them."""
    kept: str = ""
    """The folder of the run's kept snapshots, if some of the snapshots lie there."""
    checksum: str = ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted forecaster: the statistic, the kept sample, and where they came from."""

    gram: Gram
    sample: Sample
    provenance: Provenance
    directory: Path
    kept: Path | None = None
    """The folder of the run's kept snapshots, if some of the snapshots lie there."""

    @property
    def rule(self) -> StepRule:
        """How the user had the steps told."""
        return StepRule(self.provenance.step_from, self.provenance.unit)

    def path_of(self, record: SnapshotRecord) -> Path:
        """Where a snapshot lies."""
        return (self.kept if record.is_kept and self.kept else self.directory) / record.path

    @property
    def source(self) -> str:
        """The run's folder, and that of its kept snapshots, as a command to paste names them."""
        kept = f" --history {shell_word(self.kept)}" if self.kept else ""
        return shell_word(self.directory) + kept

    @property
    def narrowed(self) -> str:
        """The options beside `--steps` that chose what was read of the run, each with a blank before it."""
        return self._options("")

    def _options(self, steps: object) -> str:
        chosen = self.provenance
        return options_of(
            steps=steps,
            pattern=chosen.pattern,
            rule=self.rule,
            weights=chosen.weights,
            include=chosen.include,
            exclude=chosen.exclude,
        )

    @property
    def selected(self) -> str:
        """What a command to paste needs to read the same snapshots of the run: its folder, and all options that chose them."""
        return self.source + self._options(self.provenance.steps)

    @property
    def repeated(self) -> str:
        """The options that read the very snapshots of the fit again, also when the run has newer ones.

        A list stays a list, because it may be all that tells the steps.
        """
        chosen = parse_steps(self.provenance.steps)
        if chosen is None or isinstance(chosen, StepRange):
            chosen = StepRange(self.steps[0], self.steps[-1], chosen.every if chosen else 1)
        return self._options(chosen)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(record.step for record in self.provenance.snapshots)

    def judged(self) -> tuple[Gram, Sample]:
        """What forecasts are judged by: all that may be trained.

        BatchNorm's statistics are not, whose scale is the data's, nor what the optimizer has no state for.
        """
        chosen = self._is_judged()
        return (self.gram, self.sample) if chosen.all() else (self.gram.select(chosen), self.sample.select(chosen))

    @property
    def judged_tensors(self) -> tuple[TensorRecord, ...]:
        """The tensors of `judged`, in its order."""
        return tuple(record for record, chosen in zip(self.provenance.tensors, self._is_judged(), strict=True) if chosen)

    @property
    def timeline(self) -> Timeline:
        """The history as seen from its last snapshot."""
        return Timeline(self.gram.steps, float(self.steps[-1]))

    def steadiness(self) -> Steadiness:
        """All that the history says of its drift."""
        return steadiness(self.judged()[0], self.timeline)

    @property
    def copied(self) -> tuple[Copied, ...]:
        """What is taken over from the last snapshot."""
        return tuple(Copied(record.name, record.reason, record.of) for record in self.provenance.copied)

    @property
    def has_batch_norm(self) -> bool:
        return bool(self._batch_norm().any())

    def _is_judged(self) -> NDArray[np.bool_]:
        """Which tensors forecasts are judged by, (K,): all where none may be trained."""
        others = ~self._batch_norm() & np.array([record.trained is not False for record in self.provenance.tensors], np.bool_)
        return others if others.any() else np.ones_like(others)

    def _batch_norm(self) -> NDArray[np.bool_]:
        """Which tensors are BatchNorm's running statistics, (K,)."""
        return np.array([is_batch_norm_statistic(record.name) for record in self.provenance.tensors])

    def index_of(self, step: int) -> int:
        """The index of the snapshot of a step."""
        if step not in self.steps:
            raise SnapshotError(f"no snapshot of step {step}: expected one of {', '.join(map(str, self.steps))}")
        return self.steps.index(step)


def check_fitted_place(path: Path, directory: Path, *, clears: bool = True) -> None:
    """See that the forecaster of a run may be written at a place: an older one is replaced.

    Args:
        clears: whether what killed processes left of it may be removed.

    Raises:
        OutputError: it lies in the run's folder, or something else lies there.
    """
    check_place(path, run=directory, existing=refuse_to_replace, clears=clears)


def run_of_fitted(path: Path) -> Path | None:
    """The run's folder by an older forecaster file; None where there is none that tells."""
    try:
        with safe_open(path, framework="np") as file:
            directory = _provenance_of(path, file.metadata()).directory
            return placed(path.parent, directory) if is_address(directory) else path.parent / directory
    except (FileFormatError, SafetensorError, ValueError, OSError):
        return None


def save_fitted(fitted: Fitted, path: Path) -> None:
    """Write the forecaster file, whole or not at all; an older one is replaced."""
    check_fitted_place(path, fitted.directory)
    with staged(path, check=refuse_to_replace) as temporary:
        write_fitted(fitted, temporary, home=path.parent)


def write_fitted(fitted: Fitted, path: Path, *, home: Path) -> None:
    """Write a new forecaster file, as it is to lie in the folder `home`."""
    home = home.resolve()
    kept = "" if fitted.kept is None else seen_from(fitted.kept.resolve(), home)
    directory = seen_from(fitted.directory.resolve(), home)
    provenance = fitted.provenance.model_copy(update={"directory": directory, "kept": kept})
    if provenance.leap:
        provenance = provenance.model_copy(update={"leap": provenance.leap.relative_to(home)})
    arrays: dict[str, NDArray[Any]] = {
        "steps": fitted.gram.steps,
        "gram": fitted.gram.matrix,
        "sample.bounds": fitted.sample.bounds,
        "sample.sizes": fitted.sample.sizes,
        "sample.values": fitted.sample.values,  # last, since float32 needs no more than its place
    }
    provenance = provenance.model_copy(update={"checksum": _checksum(arrays)})
    last = fitted.path_of(fitted.provenance.snapshots[-1])
    with open_new(path, like=last) as file:
        text = json.dumps(_spelled(provenance, portable).model_dump(), separators=(",", ":"))
        write_arrays(file, {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {_METADATA_KEY: text})


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(arrays[name]).data)
    return whole.hexdigest()


def refuse_to_replace(path: Path) -> None:
    """An older forecaster is replaced; anything else is the user's own.

    Raises:
        OutputError: it is not a forecaster.
    """
    try:
        is_ours = _is_forecaster(path, mark_of(path))
    except FileFormatError:  # a link that leads nowhere
        is_ours = False
    if not is_ours:
        raise OutputError(f"{path}: exists and is not a forecaster", hint="choose another file with -o")


@lru_cache(maxsize=1)
def _is_forecaster(path: Path, _: Mark) -> bool:
    """Whether a file is a whole one of ours; looked at once as long as its mark stays."""
    try:
        with safe_open(path, framework="np") as file:
            _provenance_of(path, file.metadata())
            return set(file.keys()) == _ARRAYS
    except (FileFormatError, SafetensorError, ValueError, OSError):
        return False


def load_fitted(path: Path, *, home: Path | None = None) -> Fitted:
    """Read a forecaster file.

    Args:
        home: the folder that it is to lie in, if it does not yet.

    Raises:
        FileFormatError: no such file, not a forecaster, or damaged.
    """
    with reading(path):
        is_file = path.is_file()
    if not is_file:
        raise FileFormatError(f"{path}: no forecaster file found", hint="farcast fit CKPTS writes one", path=path)
    fetch([(path, 0, file_size(path))])
    open_input(path).close()  # says why it cannot be opened, which safetensors does not
    try:
        with reading(path), safe_open(path, framework="np") as file:
            provenance = _provenance_of(path, file.metadata())
            _check_paths(path, provenance)
        arrays = {entry.name: _array(entry) for entry in read_safetensors(path).entries}
        if provenance.checksum != _checksum(arrays):
            raise FileFormatError(
                f"{path}: a damaged forecaster: its numbers do not match their checksum",
                hint="write it again with farcast fit CKPTS",
            )
        gram = Gram(arrays["steps"], arrays["gram"])
        sample = Sample(arrays["sample.values"], arrays["sample.bounds"], arrays["sample.sizes"])
        _check_shapes(gram, sample, provenance)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: a damaged forecaster: {str(error).splitlines()[0]}", hint="write it again with farcast fit CKPTS"
        ) from error
    if provenance.schema_version != SCHEMA_VERSION or provenance.layout not in {layout.name for layout in LAYOUTS}:
        raise FileFormatError(
            f"{path}: a forecaster of another version of farcast ({provenance.farcast_version}, layout {provenance.layout!r})",
            hint="write it again with farcast fit CKPTS",
        )
    home = home or path.parent
    kept = opened(home, provenance.kept) if provenance.kept else None
    return Fitted(gram, sample, provenance, opened(home, provenance.directory), kept)


def _array(entry: TensorEntry) -> NDArray[Any]:
    """A tensor of the file, in memory of its own: a mapped file would count beside it."""
    found = np.empty(entry.shape, np.dtype(entry.dtype.name))
    fd = open_read_only(entry.path)
    try:
        read_into(fd, found.reshape(-1).view(np.uint8).data, entry.offset, entry.path)
    finally:
        os.close(fd)
    return found


def _provenance_of(path: Path, metadata: dict[str, str] | None) -> Provenance:
    text = (metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise FileFormatError(f"{path}: a safetensors file, but not a forecaster", hint="farcast fit CKPTS writes one")
    return _spelled(Provenance.model_validate(parse_json(text.encode())), local)


def _spelled(provenance: Provenance, spell: Callable[[str], str]) -> Provenance:
    """The same with its paths spelled for a file, or for this locale."""
    leap = provenance.leap
    return provenance.model_copy(
        update={
            "directory": spell(provenance.directory),
            "kept": spell(provenance.kept),
            "snapshots": tuple(record.model_copy(update={"path": spell(record.path)}) for record in provenance.snapshots),
            "leap": leap and leap.model_copy(update={"run": spell(leap.run), "forecast": spell(leap.forecast)}),
        }
    )


def _check_paths(path: Path, provenance: Provenance) -> None:
    """That it names entries of the run's folder only: what is read for a forecast is what was fitted on."""
    for record in provenance.snapshots:
        named = PurePath(record.path)
        if named.anchor or not named.name or ".." in named.parts:
            raise UnsafeFileError(f"{path}: a forecaster that names {record.path!r}, outside the run's folder")


def _check_shapes(gram: Gram, sample: Sample, provenance: Provenance) -> None:
    """That its numbers are of the snapshots and the tensors that it names."""
    num_snapshots, num_tensors = len(provenance.snapshots), len(provenance.tensors)
    steps = [record.step for record in provenance.snapshots]
    rows = num_snapshots + 1
    fits = (
        gram.matrix.shape == (num_tensors, rows, rows)
        and gram.steps.tolist() == steps == sorted(set(steps))
        and sample.sizes.shape == (num_tensors,)
        and sample.bounds.shape == (num_tensors + 1,)
        and sample.values.ndim == 2  # noqa: PLR2004 - (M, T)
        and sample.values.shape[1] == num_snapshots
        and sample.bounds[0] == 0
        and (np.diff(sample.bounds) >= 0).all()
        and sample.bounds[-1] == len(sample.values)
    )
    if not fits or num_tensors == 0:
        raise ValueError("its numbers are not of the snapshots and tensors that it names")


def reopen(fitted: Fitted, index: int) -> Snapshot:
    """Open a snapshot that the forecaster was fitted on, and check that it is still the same.

    Raises:
        SnapshotError: gone or changed since.
    """
    record = fitted.provenance.snapshots[index]
    path = fitted.path_of(record)
    again = f"farcast fit {fitted.selected}"
    with reading(path):
        is_there, has_run = path.exists(), fitted.directory.exists()
    if not has_run:
        raise SnapshotError(
            f"{fitted.directory}: the run's folder was moved, renamed or removed since the forecaster was fitted",
            hint="if it was moved, name its new place: farcast fit NEWPATH, or farcast predict NEWPATH without a forecaster file",
        )
    if not is_there:
        raise SnapshotError(f"{path}: removed since the forecaster was fitted", hint=again)
    layout = KEPT if record.is_kept else named(fitted.provenance.layout).choosing(fitted.provenance.weights)
    snapshot = read_snapshot(layout, path).settle(record.step, record.step_source, fitted.provenance.unit)
    if snapshot.digest != record.digest:
        raise SnapshotError(f"{path}: changed since the forecaster was fitted", hint=again)
    return snapshot


def realign(fitted: Fitted, snapshots: Sequence[Snapshot]) -> Alignment:
    """The alignment of reopened snapshots, in the forecaster's order of tensors.

    Some of the snapshots may be more alike than all of them: what the forecaster copies is copied here too.
    """
    alignment = align(snapshots, include=fitted.provenance.include, exclude=fitted.provenance.exclude)
    found = under_common_names({tensor.name: tensor for tensor in alignment.tensors})
    known = under_common_names({record.name: record for record in fitted.provenance.tensors})
    reasons = under_common_names({copied.name: copied for copied in fitted.copied})
    if known.keys() - found.keys() or found.keys() - known.keys() - reasons.keys():
        origin = fitted.provenance.snapshots[-1].step
        raise SnapshotError(
            f"{snapshots[-1].path}: its tensors differ from those of step {origin}, on which the forecaster was fitted",
            hint=f"farcast fit {fitted.source}{fitted.narrowed} --steps :{snapshots[-1].step}",
        )
    more = (replace(reasons[key], name=tensor.name) for key, tensor in found.items() if key not in known)
    return Alignment(tuple(found[key] for key in known), (*alignment.copied, *more))


def newer_snapshots(fitted: Fitted) -> list[str]:
    """Snapshots in the run's folder, by name, that came after the fit; nothing is opened."""
    known = {record.path for record in fitted.provenance.snapshots if not record.is_kept}
    origin = fitted.provenance.snapshots[-1].path
    unit = fitted.provenance.unit
    last = find_number_in_name(origin, unit)
    try:
        entries = run_entries(fitted.directory, fitted.provenance.layout, fitted.provenance.pattern)
        names = [path.name for path in entries if word_of_others(path.name) in {"", word_of_others(origin)}]
        wanted = parse_steps(fitted.provenance.steps)
    except (OSError, FileFormatError, UsageError):
        return []
    found = [(int(match[1]), name) for name in names if (match := find_number_in_name(name, unit)) and name not in known]
    numbered = [(number, name) for number, name in found if wanted is None or number in wanted]
    return [name for number, name in sorted(numbered) if last and number > int(last[1])]
