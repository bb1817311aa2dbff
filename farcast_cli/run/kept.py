"""The kept snapshots of a run: found in their folder, and put before the snapshots that the run still has."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.choices import DEFAULT_KEPT
from farcast_cli.errors import MixedRunsError, TooFewSnapshotsError, listed, shell_word
from farcast_cli.files.place import folders_for
from farcast_cli.files.reading import reading
from farcast_cli.run.closed import MAX_OPEN, Shelf, closed
from farcast_cli.run.steps import StepList, StepRange
from farcast_cli.run.trajectory import Trajectory, required, survey
from farcast_cli.run.trust import BY_EVIDENCE, StepRule
from farcast_cli.trainers import recognise
from farcast_cli.trainers.base import Snapshot, read_snapshot
from farcast_cli.trainers.kept import LAYOUT

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path


def kept_in(folder: Path) -> tuple[Snapshot, ...]:
    """The kept snapshots in a folder, in the order of their steps; headers only. Anything else in it is passed over.

    Raises:
        FileFormatError: one of them is damaged.
        MixedRunsError: two of the same step.
    """
    found: list[Snapshot] = []
    num_open, shelf = 0, Shelf(LAYOUT)
    for path in _paths_in(folder):
        snapshot = read_snapshot(LAYOUT, path)
        found.append(snapshot.settle(snapshot.evidence[0].step, snapshot.evidence[0].source))
        num_open += len(snapshot.tensors)
        if num_open > MAX_OPEN:
            found = [closed(one, shelf) for one in found]
    found.sort(key=lambda snapshot: snapshot.step)
    for early, late in itertools.pairwise(found):
        if early.step == late.step:
            raise MixedRunsError(
                f"{folder}: two kept snapshots of step {early.step}: {early.path.name} and {late.path.name}",
                hint="remove one of them",
            )
    return tuple(found)


def _paths_in(folder: Path) -> list[Path]:
    with reading(folder):
        names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in names if not path.name.startswith(".") and recognise(path) is LAYOUT]


def default_folder(run: Path, pattern: str = "", weights: Sequence[str] = ()) -> Path:
    """Where the kept snapshots of a run lie unless an option says otherwise.

    In `kept/`, under the name of the run's folder; if another run's lie there, or those of other weights, the names of the
    folders above come before it.
    A run stays in the folder that it has, also when a name before it becomes free.
    """
    folders = folders_for(run, DEFAULT_KEPT)
    holdings = [(folder, _is_own(folder, run, pattern, weights)) for folder in folders]
    found = (folder for wanted in (True, None) for folder, is_own in holdings if is_own is wanted)
    return next(found, folders[0])


def _is_own(folder: Path, run: Path, pattern: str, weights: Sequence[str]) -> bool | None:
    """Whether the first kept snapshot in a folder is this run's; None where there is none."""
    first = _first_in(folder)
    return None if first is None else is_of(first, run, pattern, weights)


def _first_in(folder: Path) -> Snapshot | None:
    return next((read_snapshot(LAYOUT, path) for path in _paths_in(folder)), None)


def is_of(kept: Snapshot, run: Path, pattern: str, weights: Sequence[str]) -> bool:
    """Whether a kept snapshot was copied from a run, by the folder that it names, with the same weights chosen."""
    return _is_from(kept, run, pattern) and others_chosen(kept, weights) is None


def _is_from(kept: Snapshot, run: Path, pattern: str) -> bool:
    source = kept.source
    return source is not None and source.run.resolve() == run.resolve() and source.pattern == pattern


def others_chosen(kept: Snapshot, weights: Sequence[str]) -> str | None:
    """The option that a kept snapshot was copied with, where it chose other weights than these."""
    return None if kept.weights == tuple(weights) else as_option(kept.weights)


def as_option(weights: Sequence[str]) -> str:
    """The keys of the weights as the user gives them."""
    return f"--weights {','.join(weights)}" if weights else "no --weights"


def survey_all(
    directory: Path,
    *,
    steps: StepRange | StepList | None = None,
    pattern: str = "",
    rule: StepRule = BY_EVIDENCE,
    history: Path | None = None,
    unsettled: Collection[str] = (),
    weights: Sequence[str] = (),
) -> Trajectory:
    """The snapshots of a run, and the kept ones before the newest of them; all conflicts are in the result.

    Args:
        history: the folder of kept snapshots; by default the one in which `farcast keep` puts those of this run.
        unsettled, weights: as of `survey`.

    Raises:
        TooFewSnapshotsError: no snapshot in the run's folder, or no kept one in a folder that was named.
        FileFormatError: a snapshot that cannot be read, other than one that is half-written.
    """
    folder = default_folder(directory, pattern, weights) if history is None else history
    found = () if folder.resolve() == directory.resolve() else kept_in(folder)
    same = tuple(one for one in found if others_chosen(one, weights) is None)
    kept, odd = _sorted_out(same, folder, directory, pattern, is_named=history is not None)
    if len(same) < len(found):
        odd += (f"kept snapshots in {folder} are of {_options(found, weights)}, not of {as_option(weights)}: left out",)
    if history is not None and not kept:
        raise _none_kept(directory, history, weights, found)
    if not kept:
        own = survey(directory, steps=steps, pattern=pattern, rule=rule, unsettled=unsettled, weights=weights)
        return replace(own, kept_notes=(*_unused(directory, folder, weights), *odd))
    some = StepRange(steps.steps[0], steps.steps[-1]) if isinstance(steps, StepList) else steps
    own = survey(directory, steps=some, pattern=pattern, rule=rule, unsettled=unsettled, weights=weights)
    joined = _joined(own, kept, folder, steps)
    return replace(joined, notes=(*joined.notes, *odd), kept_notes=(*joined.kept_notes, *odd))


def _none_kept(run: Path, history: Path, weights: Sequence[str], found: Sequence[Snapshot]) -> TooFewSnapshotsError:
    if found:
        return TooFewSnapshotsError(
            f"{history}: expected kept snapshots of {as_option(weights)}, found those of {_options(found, weights)}",
            hint="choose the same weights, or name another folder with --history",
        )
    return TooFewSnapshotsError(
        f"{history}: expected kept snapshots, found none",
        hint=f"farcast keep {shell_word(run)} --into {shell_word(history)} writes them",
    )


def _options(kept: Sequence[Snapshot], weights: Sequence[str]) -> str:
    """What other weights kept snapshots are of, than these."""
    return listed(sorted({option for one in kept if (option := others_chosen(one, weights)) is not None}))


def _sorted_out(
    kept: Sequence[Snapshot], folder: Path, run: Path, pattern: str, *, is_named: bool
) -> tuple[tuple[Snapshot, ...], tuple[str, ...]]:
    """The kept snapshots to use, and a note on those that name another run; they are used only from a folder that was named."""
    own = tuple(one for one in kept if _is_from(one, run, pattern))
    if len(own) == len(kept):
        return own, ()
    names = listed(one.path.name for one in kept if not _is_from(one, run, pattern))
    if is_named:
        return tuple(kept), (f"caution: {folder} has kept snapshots that name another run, and they are used: {names}",)
    return own, (f"kept snapshots in {folder} name another run, and are left out: {names}",)


def _unused(directory: Path, folder: Path, weights: Sequence[str]) -> tuple[str, ...]:
    """That kept snapshots of another run or of other weights have the usual place, if they do and this run has none."""
    usual = folders_for(directory, DEFAULT_KEPT)[0]
    if usual.resolve() in {directory.resolve(), folder.resolve()}:
        return ()
    first = _first_in(usual)
    others = first and others_chosen(first, weights)
    if others:
        return (f"{usual} has kept snapshots of {others}: they are not used",)
    return (f"{usual} has kept snapshots of another run: they are not used (--history {shell_word(usual)} uses them)",)


def discover_all(
    directory: Path,
    *,
    steps: StepRange | StepList | None = None,
    pattern: str = "",
    rule: StepRule = BY_EVIDENCE,
    history: Path | None = None,
    unsettled: Collection[str] = (),
    weights: Sequence[str] = (),
    minimum: int = 1,
) -> Trajectory:
    """The same; the first conflict is raised.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` snapshots.
        MixedRunsError: a kept snapshot and one of the run are of the same step, and have other weights.
        SnapshotError, FileFormatError: as `discover`.
    """
    found = survey_all(
        directory, steps=steps, pattern=pattern, rule=rule, history=history, unsettled=unsettled, weights=weights
    )
    return required(found, minimum)


def _joined(found: Trajectory, kept: Sequence[Snapshot], folder: Path, steps: StepRange | StepList | None) -> Trajectory:
    """A run's trajectory with the kept snapshots that lie before its newest; the run's own go first."""
    conflicts = (*found.conflicts, *conflicts_of(found.snapshots, kept, folder))
    own = {snapshot.step: snapshot for snapshot in found.snapshots if steps is None or snapshot.step in steps}
    chosen = [one for one in kept if one.step not in own and (steps is None or one.step in steps)]
    newest = max(own, default=-1)
    older = [one for one in chosen if one.step < newest]
    later = [one for one in chosen if one.step > newest]
    missing = sorted({*steps.steps} - {*own} - {one.step for one in older}) if isinstance(steps, StepList) else []
    if missing:
        conflicts += (TooFewSnapshotsError(f"{found.directory}: no snapshot of step {listed(missing)}, which --steps lists"),)
    notes = [_used(older, folder)] if older else []
    if later:
        told = listed(one.path.name for one in later)
        notes.append(f"kept snapshots after step {newest}, the newest of the run, are not used: {told}")
    snapshots = sorted([*own.values(), *older], key=lambda snapshot: snapshot.step)
    return replace(
        found,
        snapshots=tuple(snapshots),
        conflicts=conflicts,
        notes=(*found.notes, *notes),
        kept=folder if older else None,
        kept_notes=tuple(notes),
        chosen=steps,
    )


def _used(older: Sequence[Snapshot], folder: Path) -> str:
    count = f"{len(older)} kept snapshot" + "s" * (len(older) != 1)
    return f"{count} from {folder}: steps {older[0].step} to {older[-1].step}"


def conflicts_of(own: Sequence[Snapshot], kept: Sequence[Snapshot], folder: Path) -> tuple[MixedRunsError, ...]:
    """The steps of which a run and its kept snapshots have other weights."""
    of_step = {snapshot.step: snapshot for snapshot in kept}
    pairs = [(snapshot, of_step[snapshot.step]) for snapshot in own if snapshot.step in of_step]
    return tuple(
        MixedRunsError(
            f"{one.path}: its weights differ from those of {twin.path}, which was kept at the same step {twin.step}",
            hint=f"these are two runs: move {shell_word(folder)} away, or choose another folder with farcast keep --into",
        )
        for one, twin in pairs
        if not one.includes(twin)
    )
