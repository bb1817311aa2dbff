"""Signs that one folder holds two runs: two snapshots of a step, and an order of saving that is not the order of steps."""

from __future__ import annotations

import glob
import itertools
import re
import shlex
from collections import Counter
from typing import TYPE_CHECKING

from farcast_cli.errors import MAX_LISTED, MixedRunsError
from farcast_cli.run.closed import reopened
from farcast_cli.trainers.names import find_number_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Snapshot

_VERSION = re.compile(r"-v(\d+)(?=(?:\.[a-z]+)*$)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_MIN_OF_A_RUN = 2  # snapshots; a single one may have been saved again by hand
_PACE_OF_COPYING = 10**9  # ns from one file to the next; files that came faster were copied, or edited by a program


def saved_at(snapshot: Snapshot) -> int:
    """When the last of the files that hold its weights was changed, in ns."""
    files = reopened(snapshot).weights_files
    return max((mark[1] for path, mark in snapshot.marks.items() if path in files), default=0)


def number_of(snapshot: Snapshot) -> re.Match[str] | None:
    """The step in a name; its last number where only the names of the whole run tell that it is one."""
    found = find_number_in_name(snapshot.path.name, snapshot.unit)
    is_told = any(item.source == "name" for item in snapshot.evidence)
    return found or (re.search(r"(\d+)(?=\D*$)", snapshot.path.stem) if is_told else None)


def shape_of(snapshot: Snapshot) -> str:
    """A name without its numbers, and without Lightning's version."""
    return _NUMBER.sub("#", plain_name(snapshot))


def version_of(snapshot: Snapshot) -> int:
    found = _VERSION.search(snapshot.path.name)
    return int(found[1]) if found else 0


def plain_name(snapshot: Snapshot) -> str:
    return _VERSION.sub("", snapshot.path.name)


def two_versions(kept: Sequence[Snapshot], directory: Path) -> Iterator[MixedRunsError]:
    """Where a later run was shorter, what follows its last version is the earlier run's, and was saved before it."""
    for early, late in itertools.pairwise(kept):
        if version_of(late) < version_of(early) and saved_at(late) <= saved_at(early):
            yield MixedRunsError(
                f"{directory}: two runs: {early.path.name} was saved after {late.path.name}, which has a later step",
                hint=f"--pattern '*-v{version_of(early)}.*' reads the later run; or move it to its own folder",
            )


def two_runs(collisions: Sequence[Sequence[Snapshot]], kept: Sequence[Snapshot], directory: Path) -> MixedRunsError:
    first, num_more = collisions[0], len(collisions) - 1
    groups = _groups(collisions, kept)
    kinds = ", ".join(f"{pattern!r} ({count})" for pattern, count in groups.most_common(MAX_LISTED))
    choose = f"--pattern {shlex.quote(max(groups))} reads one of the runs; or " if groups else "a trajectory is one run: "
    return MixedRunsError(
        f"{directory}: two snapshots of step {first[0].step}: {first[0].path.name} and {first[1].path.name}"
        + (f", and two at {num_more} more steps" if num_more else "")
        + (f"; their names form {len(groups)} groups: {kinds}" if groups else ""),
        hint=f"{choose}move the other run to its own folder",
    )


def _groups(collisions: Sequence[Sequence[Snapshot]], kept: Sequence[Snapshot]) -> Counter[str]:
    """How many snapshots have which kind of name, as globs that tell colliding names apart; none where nothing does."""
    for kind in _KINDS:
        apart = all(len({kind(snapshot) for snapshot in same}) == len(same) for same in collisions)
        if apart and all(kind(snapshot) for snapshot in kept):
            return Counter(kind(snapshot) for snapshot in kept)
    return Counter()


def _before_word(snapshot: Snapshot) -> str:
    found = number_of(snapshot)
    return glob.escape(snapshot.path.name[: found.start()]) + "*" if found and found.start() else ""


def _before_number(snapshot: Snapshot) -> str:
    found = number_of(snapshot)
    return glob.escape(snapshot.path.name[: found.start(1)]) + "*" if found else ""


def _after_number(snapshot: Snapshot) -> str:
    found = number_of(snapshot)
    return "*[0-9]" + glob.escape(snapshot.path.name[found.end(1) :]) if found else ""


_KINDS: tuple[Callable[[Snapshot], str], ...] = (_before_word, _before_number, _after_number)


# --- the order of saving ---------------------------------------------------------------------------------------------


def begun_anew(snapshots: Sequence[Snapshot], directory: Path) -> MixedRunsError | None:
    """A run that began again: in the order of saving the steps rise, fall once, and rise again.

    Copies have the times of copying. Their order is that of the names, or the steps fall more than once, or some came within a second.

    Args:
        snapshots: in the order of their steps.
    """
    in_time = sorted(snapshots, key=saved_at)
    falls = [index for index, (a, b) in enumerate(itertools.pairwise(in_time), start=1) if b.step < a.step]
    if len(falls) != 1 or _were_copied(in_time):
        return None
    earlier, later = in_time[: falls[0]], in_time[falls[0] :]
    if min(len(earlier), len(later)) < _MIN_OF_A_RUN:
        return None
    return MixedRunsError(
        f"{directory}: two runs, or one that began again: {later[0].path.name} was saved after {earlier[-1].path.name}, which"
        " has a later step",
        hint=f"{_steps_of(later, earlier)} reads the later run, {_steps_of(earlier, later)} the earlier one;"
        f" --steps {snapshots[0].step}:{snapshots[-1].step} reads both as one",
    )


def _were_copied(in_time: Sequence[Snapshot]) -> bool:
    """Whether times of change tell of copying, not of saving."""
    times, names = [saved_at(snapshot) for snapshot in in_time], [snapshot.path.name for snapshot in in_time]
    came_at_once = any(late - early < _PACE_OF_COPYING for early, late in itertools.pairwise(times))
    return came_at_once or names == sorted(names)


def _steps_of(run: Sequence[Snapshot], other: Sequence[Snapshot]) -> str:
    """The `--steps` that reads one of two runs."""
    first, last = run[0].step, run[-1].step
    if last < other[0].step:
        return f"--steps :{last}"
    if first > other[-1].step:
        return f"--steps {first}:"
    is_apart = all(not first <= snapshot.step <= last for snapshot in other)
    return f"--steps {first}:{last}" if is_apart else "--steps " + ",".join(str(snapshot.step) for snapshot in run)
