"""What a user chose of a run: a folder, which snapshots in it, which tensors in them; and what of that can be used."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from farcast_cli.errors import FarcastError, SnapshotError
from farcast_cli.run.alignment import align, since_last_change
from farcast_cli.run.closed import reopened
from farcast_cli.run.kept import survey_all
from farcast_cli.run.thinning import thinned
from farcast_cli.run.trajectory import MIN_SNAPSHOTS
from farcast_cli.run.trust import BY_EVIDENCE, StepRule
from farcast_cli.trainers import trainer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.run.alignment import Alignment
    from farcast_cli.run.steps import StepList, StepRange
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot


class Entries(TypedDict):
    """How the snapshots in a folder are chosen and read."""

    steps: StepRange | StepList | None
    pattern: str
    rule: StepRule
    unsettled: frozenset[str]
    weights: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of a run; `pattern`, `include` and `exclude` are globs, of entries of the folder and of tensors."""

    directory: Path
    steps: StepRange | StepList | None = None
    pattern: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    history: Path | None = None
    """The folder of kept snapshots; None for the default one."""
    unsettled: frozenset[str] = frozenset()
    """Names of entries that are left out, because they changed a moment ago."""
    rule: StepRule = BY_EVIDENCE
    weights: tuple[str, ...] = ()
    """The keys of the weights in each file; by default all networks that are found."""

    @property
    def entries(self) -> Entries:
        """What `discover` and its kin take of it."""
        return {
            "steps": self.steps,
            "pattern": self.pattern,
            "rule": self.rule,
            "unsettled": self.unsettled,
            "weights": self.weights,
        }


def options_of(
    *,
    steps: object = None,
    pattern: str = "",
    rule: StepRule = BY_EVIDENCE,
    weights: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> str:
    """What was chosen of a run as the options of a command to paste, each with a blank before it.

    >>> options_of(steps="100:900", pattern="a*", weights=("g", "d"), include=("b c",))
    " --pattern 'a*' --weights g,d --include 'b c' --steps 100:900"
    """
    words = ["--pattern", pattern] if pattern else []
    words += rule.options
    words += ["--weights", ",".join(weights)] if weights else []
    words += [word for glob in include for word in ("--include", glob)]
    words += [word for glob in exclude for word in ("--exclude", glob)]
    words += ["--steps", str(steps)] if steps else []
    return "".join(f" {shlex.quote(word)}" for word in words)


@dataclass(frozen=True, slots=True)
class Usable:
    """The snapshots that a forecaster learns from, and what a person should know of how they were chosen."""

    snapshots: tuple[Snapshot, ...]
    begins: str
    """Where they begin, if the run's tensors changed; empty otherwise."""
    left_out: str
    """Which did not enter, if there were very many; empty otherwise."""

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.begins, self.left_out)))


def usable(snapshots: Sequence[Snapshot], selection: Selection) -> Usable:
    """The snapshots since the tensors last changed, thinned out where they are very many.

    Raises:
        MixedRunsError: too few since then to learn from, or two models.
    """
    include, exclude = selection.include, selection.exclude
    since, begins = since_last_change(snapshots, include=include, exclude=exclude, minimum=MIN_SNAPSHOTS)
    entering, left_out = thinned(since, include=include, exclude=exclude)
    return Usable(entering, begins, left_out)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds: its snapshots, how they align (None where they do not), and what stands against a forecast."""

    trajectory: Trajectory
    alignment: Alignment | None
    problems: tuple[str, ...]
    fatal: SnapshotError | None
    """The problem for which `fit` would refuse the run."""


def inspect(selection: Selection) -> Inspection:
    """All that can be said of a run from the headers of its files.

    Raises:
        TooFewSnapshotsError: no snapshot at all.
        FileFormatError: a snapshot that cannot be read, other than one that is half-written.
    """
    trajectory = survey_all(selection.directory, **selection.entries, history=selection.history)
    found, alignment, notes = list(trajectory.conflicts), None, tuple[str, ...]()
    fatal = next(iter(found), None)
    try:
        entering = usable(trajectory.snapshots, selection)
        alignment = align(entering.snapshots, include=selection.include, exclude=selection.exclude)
        notes = (*entering.notes, *_ended(entering.snapshots[-1]))
    except SnapshotError as error:
        fatal = error
        found.append(error)
    problems = [f"{error}; {error.hint}" if error.hint else str(error) for error in found]
    count = len(trajectory.snapshots)
    if count < MIN_SNAPSHOTS:
        problems.append(f"{count} snapshot{'s' * (count != 1)}: fit needs {MIN_SNAPSHOTS}")
    return Inspection(replace(trajectory, notes=(*trajectory.notes, *notes)), alignment, tuple(problems), fatal)


def end_of(origin: Snapshot) -> tuple[str, int] | None:
    """What says where the run ends, and the step; None if the newest snapshot does not tell."""
    try:
        return trainer_of(origin).end(reopened(origin))
    except FarcastError:  # the files are gone, or say nothing that can be read
        return None


def _ended(origin: Snapshot) -> Iterator[str]:
    """That the run is over."""
    end = end_of(origin)
    if end and end[1] <= origin.step:
        yield f"the run ended at {origin.unit} {origin.step}: {end[0]} = {end[1]}"
