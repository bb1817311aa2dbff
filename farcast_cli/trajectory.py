"""From a folder to a trajectory: which entries are snapshots of the run, and in which order.

Knows how steps are settled: by evidence, in the order of trust, cross-checked.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.errors import (
    MixedRunsError,
    NoWeightsError,
    SnapshotError,
    StepConflictError,
    TooFewSnapshotsError,
    UsageError,
)
from farcast_cli.formats.files import file_size, read_bytes
from farcast_cli.layouts import recognise
from farcast_cli.layouts.base import Layout, Snapshot, find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIN_SNAPSHOTS = 6  # fewer leave nothing to test a forecast on; 6 against 81 differ by .04 of the ratio at most
OWN_MARK = b'{"__metadata__":{"farcast":'
"""How the header of a forecaster file begins."""
_ALIAS = re.compile(r"(?:.*[-_.])?(?:last|latest|best|final|model|current|ema)$", re.IGNORECASE)
_MIN_FOR_A_RATE = 3


@dataclass(frozen=True, slots=True)
class StepRange:
    """`A:B:K`: steps from A to B, both included, and of those only multiples of K. Parts may be left out."""

    first: int = 0
    last: int | None = None
    every: int = 1

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int):
            return False
        return self.first <= step and (self.last is None or step <= self.last) and step % self.every == 0

    @classmethod
    def parse(cls, text: str) -> StepRange:
        parts = text.split(":")
        if len(parts) > 3 or not all(part.isdecimal() or not part for part in parts):  # noqa: PLR2004 - A:B:K
            raise UsageError(f"--steps {text}: expected A:B:K, as in 1000:8000 or ::500")
        first, last, every = (*parts, "", "")[:3]
        if len(parts) == 1 or every == "0":
            raise UsageError(f"--steps {text}: expected A:B:K, as in 1000:8000 or ::500")
        return cls(int(first or 0), int(last) if last else None, int(every or 1))


@dataclass(frozen=True, slots=True)
class Ignored:
    """Something in the folder that is not part of the trajectory, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The snapshots of one run in the order of their steps, and what else lay in the folder."""

    directory: Path
    layout: str
    snapshots: tuple[Snapshot, ...]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(snapshot.step for snapshot in self.snapshots)

    @property
    def origin(self) -> Snapshot:
        """The last snapshot."""
        return self.snapshots[-1]


# --- discovery -------------------------------------------------------------------------------------------------------


def discover(directory: Path, *, steps: StepRange | None = None, minimum: int = 1) -> Trajectory:
    """Find the snapshots of the run in a folder and settle their steps; reads headers only.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` snapshots.
        StepConflictError: a step that nothing tells, or on which two pieces of evidence disagree.
        MixedRunsError: two snapshots of the same step.
        FileFormatError: a snapshot that cannot be read.
    """
    candidates, ignored = _candidates(directory)
    layout = _main_layout(candidates)
    snapshots: list[Snapshot] = []
    without: list[NoWeightsError] = []
    for path, kind in candidates:
        reason = _reason_to_ignore(path, kind, layout, steps)
        if reason:
            ignored.append(Ignored(path, reason))
            continue
        try:
            snapshots.append(kind.read(path))
        except NoWeightsError as error:
            without.append(error)
            ignored.append(Ignored(path, "it holds no weights"))
    if without and not snapshots:
        raise without[0]
    settled, notes = _settle_steps(_with_evidence(snapshots, ignored))
    chosen = [snapshot for snapshot in settled if steps is None or snapshot.step in steps]
    ordered = _without_duplicates(chosen, ignored)
    if len(ordered) < minimum:
        raise TooFewSnapshotsError(
            f"{directory}: expected at least {minimum} snapshots, found {len(ordered)}",
            hint="keep more checkpoints (in the Trainer: a smaller save_steps, no save_total_limit) or widen --steps",
        )
    return Trajectory(directory, layout.name, tuple(ordered), tuple(ignored), notes)


def open_snapshot(path: Path) -> Snapshot:
    """One checkpoint by itself, its step settled by its own evidence (-1 where there is none)."""
    layout = recognise(path)
    if layout is None:
        raise SnapshotError(f"{path}: no checkpoint here" if path.exists() else f"{path}: no such file or folder")
    snapshot = layout.read(path)
    first = snapshot.evidence[0] if snapshot.evidence else None
    return snapshot.settle(first.step, first.source) if first else snapshot


def _candidates(directory: Path) -> tuple[list[tuple[Path, Layout]], list[Ignored]]:
    if not directory.is_dir():
        what = "a file" if directory.exists() else "nothing"
        raise TooFewSnapshotsError(
            f"{directory}: expected a folder of checkpoints, found {what}", hint="name the folder that holds them"
        )
    found, ignored = [], []
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        layout = recognise(path)
        if layout is None:
            ignored.append(Ignored(path, "no checkpoint of a known layout"))
        else:
            found.append((path, layout))
    alone = recognise(directory)
    if alone and not any(find_step_in_name(path.name) for path, _ in found):
        raise TooFewSnapshotsError(
            f"{directory}: expected a folder of checkpoints, found one {alone.name} checkpoint",
            hint=f"name the folder above it: {directory.resolve().parent}",
        )
    if not found:
        raise TooFewSnapshotsError(f"{directory}: no snapshots found", hint="docs/formats.md lists the layouts that are read")
    return found, ignored


def _reason_to_ignore(path: Path, kind: Layout, main: Layout, steps: StepRange | None) -> str:
    if is_own_file(path):
        return "farcast's own file"
    if kind is not main:
        return f"a {kind.name} checkpoint among {main.name} ones"
    return "" if not main.names_are_steps or _named_within(path, steps) else "outside --steps"


def is_own_file(path: Path) -> bool:
    """Whether a file is a forecaster that `fit` wrote."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    head = read_bytes(path, 0, min(file_size(path), len(OWN_MARK) + 8))
    return head[8:] == OWN_MARK


def _with_evidence(snapshots: list[Snapshot], ignored: list[Ignored]) -> list[Snapshot]:
    """The snapshots whose step something tells; `last`, `best` and their like without it are set aside."""
    told = [snapshot for snapshot in snapshots if snapshot.evidence]
    for snapshot in snapshots:
        if snapshot.evidence:
            continue
        if not told or not _ALIAS.match(snapshot.path.stem):
            raise StepConflictError(
                f"{snapshot.path}: nothing tells its step: expected a counter in the file or a number in the name",
                hint="rename it with its step, as in step_1000, or move it out of this folder",
            )
        ignored.append(Ignored(snapshot.path, "nothing tells its step"))
    return told


def _main_layout(candidates: list[tuple[Path, Layout]]) -> Layout:
    """The layout of most candidates; the first in the order of the folder breaks a tie."""
    counts = Counter(layout.name for _, layout in candidates)
    most = counts.most_common(1)[0][0]
    return next(layout for _, layout in candidates if layout.name == most)


def _named_within(path: Path, steps: StepRange | None) -> bool:
    """Whether a name may belong to the asked-for steps; a snapshot left out by name is never opened."""
    found = find_step_in_name(path.name)
    return steps is None or found is None or int(found[1]) in steps


# --- steps -----------------------------------------------------------------------------------------------------------


def _settle_steps(snapshots: list[Snapshot]) -> tuple[list[Snapshot], tuple[str, ...]]:
    settled = [snapshot.settle(snapshot.evidence[0].step, snapshot.evidence[0].source) for snapshot in snapshots]
    settled.sort(key=lambda snapshot: (snapshot.step, snapshot.path.name))
    sources = {item.source for snapshot in settled for item in snapshot.evidence}
    notes = [note for source in sorted(sources) for note in _cross_check(settled, source)]
    return settled, tuple(notes)


def _cross_check(snapshots: Sequence[Snapshot], source: str) -> Iterator[str]:
    """Compare one kind of evidence with the settled steps.

    Equal is fine. A second counter in a unit of its own (a save index, micro-batches) rises in proportion to the
    step over all snapshots: fine too, and said. Anything else is a conflict. Adam's count may lag behind where
    steps were skipped, but never fall.
    """
    pairs = [(s, item) for s in snapshots for item in s.evidence if item.source == source]
    odd = [(s, item) for s, item in pairs if item.step != s.step]
    if not odd:
        return
    numbers = [(s.step, item.step) for s, item in pairs]
    if source == "adam step" and all(a[1] <= b[1] for a, b in itertools.pairwise(numbers)):
        return
    if _is_affine(numbers):
        yield f"{odd[0][1].where} counts in a unit of its own: {odd[0][1].step} at step {odd[0][0].step}"
        return
    snapshot, item = odd[0]
    chosen = snapshot.evidence[0]
    raise StepConflictError(
        f"{snapshot.path}: {chosen.where} says step {chosen.step}, but {item.source} ({item.where}) says {item.step}",
        hint="rename the snapshot to its real step, or move it out of this folder",
    )


def _is_affine(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether b rises in proportion to a over all pairs, of which there must be three to tell."""
    if len(pairs) < _MIN_FOR_A_RATE:
        return False
    (a0, b0), (a1, b1) = pairs[0], pairs[-1]
    return b1 > b0 and all((b - b0) * (a1 - a0) == (b1 - b0) * (a - a0) for a, b in pairs)


def _without_duplicates(snapshots: list[Snapshot], ignored: list[Ignored]) -> list[Snapshot]:
    """Drop `last`, `best` and other copies of a numbered snapshot; two numbered ones of a step are two runs."""
    by_step: dict[int, Snapshot] = {}
    for snapshot in sorted(snapshots, key=lambda s: (s.step, find_step_in_name(s.path.name) is None, s.path.name)):
        first = by_step.setdefault(snapshot.step, snapshot)
        if first is snapshot:
            continue
        if find_step_in_name(snapshot.path.name) is not None:
            raise MixedRunsError(
                f"{first.path.parent}: two snapshots of step {snapshot.step}: {first.path.name} and {snapshot.path.name}",
                hint="a trajectory is one run: move the other run to a folder of its own",
            )
        ignored.append(Ignored(snapshot.path, f"the same step as {first.path.name}"))
    return list(by_step.values())
