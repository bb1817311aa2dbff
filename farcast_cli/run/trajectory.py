"""From a folder to a trajectory: the snapshots of the run opened, in the order of their steps, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, HalfWrittenError, NoWeightsError, SnapshotError
from farcast_cli.files.place import only_file_of
from farcast_cli.files.reading import reading
from farcast_cli.run.closed import MAX_OPEN, Shelf, closed
from farcast_cli.run.entries import candidates_in, is_output, is_own_file, main_layout, named_within, run_entries, too_few
from farcast_cli.run.steps import Findings, Ignored, StepList, StepRange, first_of, settle_steps
from farcast_cli.run.trust import BY_EVIDENCE, StepRule
from farcast_cli.trainers import recognise
from farcast_cli.trainers.base import Layout, Snapshot, read_snapshot, refuse_unfinished
from farcast_cli.trainers.names import find_step_in_name, says_step

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from farcast_cli.run.entries import Candidate

WHOLE = "farcast keep without --sampled keeps all weights"
MIN_SNAPSHOTS = 6  # fewer leave nothing to test a forecast on; 6 against 81 differ by .04 of the ratio at most


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The snapshots of one run in the order of their steps, and what else lay in the folder."""

    directory: Path
    layout: str
    snapshots: tuple[Snapshot, ...]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]
    conflicts: tuple[SnapshotError, ...] = ()
    pattern: str = ""
    rule: StepRule = BY_EVIDENCE
    weights: tuple[str, ...] = ()
    """The keys of the weights, where they were chosen."""
    kept: Path | None = None
    """The folder of kept snapshots, if some of the snapshots lie there."""
    kept_notes: tuple[str, ...] = ()
    """What a person should know of the kept snapshots."""
    chosen: StepRange | StepList | None = None
    """The steps that the user chose."""

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(snapshot.step for snapshot in self.snapshots)

    @property
    def origin(self) -> Snapshot:
        """The last snapshot."""
        return self.snapshots[-1]

    @property
    def half_written(self) -> tuple[Ignored, ...]:
        """What was left out though it is a snapshot by its looks."""
        return tuple(ignored for ignored in self.ignored if ignored.is_half_written)


def discover(
    directory: Path,
    *,
    steps: StepRange | StepList | None = None,
    pattern: str = "",
    rule: StepRule = BY_EVIDENCE,
    unsettled: Collection[str] = (),
    weights: Sequence[str] = (),
    minimum: int = 1,
) -> Trajectory:
    """Find the snapshots of the run in a folder and settle their steps; reads headers only.

    Args:
        pattern: a glob that the names of the run's entries match; "" for all.
        rule: how the user has the steps told.
        unsettled: names of entries that are left out, because they changed a moment ago.
        weights: the keys of the weights in each file; by default all networks that are found.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` snapshots.
        StepConflictError: a step that nothing tells, or on which two pieces of evidence disagree.
        MixedRunsError: two snapshots of the same step.
        FileFormatError: a snapshot that cannot be read, other than one that is half-written.
    """
    found = survey(
        directory, steps=steps, pattern=pattern, rule=rule, unsettled=unsettled, weights=weights, may_be_empty=minimum == 0
    )
    return required(found, minimum)


def required(found: Trajectory, minimum: int) -> Trajectory:
    """The same trajectory, which has no conflict and enough snapshots.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` snapshots.
        SnapshotError: the first of its conflicts.
    """
    if found.conflicts:
        raise first_of(found.conflicts, found.directory)
    if len(found.snapshots) < minimum:
        raise too_few(found.directory, len(found.snapshots), minimum, found.half_written)
    return found


def survey(
    directory: Path,
    *,
    steps: StepRange | StepList | None = None,
    pattern: str = "",
    rule: StepRule = BY_EVIDENCE,
    unsettled: Collection[str] = (),
    weights: Sequence[str] = (),
    may_be_empty: bool = False,
) -> Trajectory:
    """The same with all conflicts in the result, where `discover` raises the first of them.

    Args:
        may_be_empty: half-written snapshots alone, or some that were removed meanwhile, are no error.

    Raises:
        TooFewSnapshotsError: no snapshot at all.
        FileFormatError: a snapshot that cannot be read, other than one that is half-written.
    """
    findings = Findings()
    with reading(directory):
        candidates = candidates_in(directory, pattern, steps, findings)
        main = main_layout(candidates).choosing(weights)
        candidates = _settled(candidates, unsettled, findings)
        by_name = steps if main.names_are_steps and rule == BY_EVIDENCE else None
        settled = settle_steps(_read_all(candidates, main, by_name, findings), steps, directory, findings, rule)
    rule = replace(rule, unit=settled[0].unit) if settled else rule  # kept snapshots know theirs
    ignored, conflicts = tuple(findings.ignored), tuple(findings.conflicts)
    found = Trajectory(
        directory,
        main.name,
        tuple(settled),
        ignored,
        tuple(findings.notes),
        conflicts,
        pattern,
        rule,
        tuple(weights),
        chosen=steps,
    )
    if not settled and not conflicts and not may_be_empty:
        raise too_few(directory, 0, 1, found.half_written)
    return found


def open_snapshot(path: Path, weights: Sequence[str] = ()) -> Snapshot:
    """One checkpoint by itself, its step settled by its own evidence (-1 where there is none).

    Args:
        weights: as of `discover`, if it is of a layout that has several; in others, farcast wrote only these.
    """
    layout = recognise(path)
    if layout is None and (inner := only_file_of(path)) is not None:
        return open_snapshot(inner, weights)
    if layout is None:  # which has seen that the path can be looked at
        what = "no checkpoint here" if path.exists() else "no such file or folder"
        raise SnapshotError(f"{path}: {what}", path=path)
    snapshot = read_snapshot(layout.choosing(weights) if layout.read_chosen else layout, path)
    if snapshot.is_sample:
        raise SnapshotError(f"{path}: expected all weights, found a kept sample of them", hint=WHOLE, path=path)
    first = snapshot.evidence[0] if snapshot.evidence else None
    return snapshot.settle(first.step, first.source) if first else snapshot


def run_of(snapshot: Snapshot) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for a checkpoint that is by itself.

    A run is a folder with two checkpoints of this layout or more whose names tell a step, and which farcast did not write.
    """
    folder = snapshot.path.absolute().parent
    entries = (path for path in run_entries(folder, snapshot.layout) if find_step_in_name(path.name))
    others = (path for path in entries if not is_output(path))
    return folder if len(list(islice(others, 2))) > 1 else None


# --- snapshots -------------------------------------------------------------------------------------------------------


def _settled(candidates: Sequence[Candidate], unsettled: Collection[str], findings: Findings) -> list[Candidate]:
    """The candidates without those that changed a moment ago, which are noted."""
    for path, _ in candidates:
        if path.name in unsettled:
            findings.ignore(path, "it changed a moment ago")
    return [(path, kind) for path, kind in candidates if path.name not in unsettled]


def _read_all(
    candidates: Sequence[Candidate], main: Layout, steps: StepRange | StepList | None, findings: Findings
) -> list[Snapshot]:
    """Open every candidate of the run; what is half-written, gone or without weights is noted and left out.

    Where all together have very many tensors, they are closed again.

    Args:
        steps: what a name must be within; None if the names do not tell.
    """
    snapshots: list[Snapshot] = []
    without: list[NoWeightsError] = []
    num_open, shelf = 0, Shelf(main)
    for path, kind in candidates:
        if _is_left_out(path, kind, main, steps, findings):
            continue
        try:
            snapshot = read_snapshot(main, path)
            refuse_unfinished(snapshot)
            snapshots.append(snapshot)
            num_open += len(snapshots[-1].tensors)
            if num_open > MAX_OPEN:
                snapshots = [closed(snapshot, shelf) for snapshot in snapshots]
        except HalfWrittenError as error:
            what = str(error).removeprefix(str(path)).lstrip(":/ ")
            findings.ignore(path, f"half-written: {what}", is_half_written=True)
        except NoWeightsError as error:
            without.append(error)
            findings.ignore(path, "it holds no weights")
        except FileFormatError:
            if path.exists():
                raise
            findings.ignore(path, "removed while the folder was read")
    if without and not snapshots:
        raise without[0]
    return snapshots


def _is_left_out(path: Path, kind: Layout, main: Layout, steps: StepRange | StepList | None, findings: Findings) -> bool:
    """Whether a candidate is not opened; notes why."""
    if says_step(path.name) and not named_within(path, steps):
        findings.ignore(path, "outside --steps")
    elif is_own_file(path):
        findings.ignore(path, "farcast's own file")
    elif kind.name in main.trainer.half_written and find_step_in_name(path.name):
        findings.ignore(path, f"half-written: {main.trainer.half_written[kind.name]}", is_half_written=True)
    elif kind.name != main.name:
        findings.ignore(path, f"a {kind.name} checkpoint among {main.name} ones")
    else:
        return False
    return True
