"""Which kind of evidence tells the steps of a run where the usual order of trust cannot be right for the whole of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.trainers.base import Evidence, EvidenceKind, Snapshot

_MIN_TO_AGREE = 3  # snapshots
_INDEPENDENT: tuple[EvidenceKind, ...] = ("payload", "adam step", "name", "metadata")


@dataclass(frozen=True, slots=True)
class Trusted:
    """Snapshots with their trusted evidence first, and a note on each kind that counts something else."""

    snapshots: tuple[Snapshot, ...]
    notes: tuple[str, ...] = ()
    others: frozenset[EvidenceKind] = frozenset()


def trusted(snapshots: Sequence[Snapshot]) -> Trusted:
    """The usual order of trust, unless one of these holds.

    - Only a later kind is in every snapshot: it tells the steps.
    - Two later kinds agree on all steps, and the first differs from them in half of the snapshots or more: the two tell them.
    - The first kind starts anew while Adam counts on: it counts within an epoch, and Adam tells the steps.
    """
    first = _first_kind(snapshots)
    kinds = [kind for kind in _INDEPENDENT if _steps(snapshots, kind)]
    if first not in kinds or len(snapshots) < _MIN_TO_AGREE:
        return Trusted(tuple(snapshots))
    whole = [kind for kind in kinds if len(_steps(snapshots, kind)) == len(snapshots)]
    if first not in whole:
        return _led_by(whole[0], snapshots) if whole else Trusted(tuple(snapshots))
    for one, other in itertools.permutations((kind for kind in whole + kinds if kind != first), 2):
        if one in whole and _agree(snapshots, one, other) and _differs(snapshots, first, one):
            return _led_by(one, snapshots, outvoted={first}, why=f"{one} and {other} agree on the steps")
    within = {kind for kind in kinds if _starts_anew(snapshots, kind)}
    if first in within and "adam step" in whole and "adam step" not in within:
        return _led_by("adam step", snapshots, outvoted=within, why="it starts anew with each epoch, and adam step counts on")
    return Trusted(tuple(snapshots))


def _first_kind(snapshots: Sequence[Snapshot]) -> EvidenceKind | None:
    """The kind that most is trusted of all that is there."""
    found = {snapshot.evidence[0].source for snapshot in snapshots if snapshot.evidence}
    return next((kind for kind in ("trainer state", *_INDEPENDENT) if kind in found), None)


def _item(snapshot: Snapshot, kind: EvidenceKind) -> Evidence | None:
    return next((item for item in snapshot.evidence if item.source == kind), None)


def _steps(snapshots: Sequence[Snapshot], kind: EvidenceKind) -> dict[int, int]:
    """What a kind says, by the snapshot's place."""
    return {place: item.step for place, snapshot in enumerate(snapshots) if (item := _item(snapshot, kind))}


def _pairs(snapshots: Sequence[Snapshot], one: EvidenceKind, other: EvidenceKind) -> list[tuple[int, int]]:
    mine, its = _steps(snapshots, one), _steps(snapshots, other)
    return [(mine[place], its[place]) for place in sorted(mine.keys() & its.keys())]


def _agree(snapshots: Sequence[Snapshot], one: EvidenceKind, other: EvidenceKind) -> bool:
    pairs = _pairs(snapshots, one, other)
    return one != other and len(pairs) >= _MIN_TO_AGREE and all(mine == its for mine, its in pairs)


def _differs(snapshots: Sequence[Snapshot], one: EvidenceKind, other: EvidenceKind) -> bool:
    pairs = _pairs(snapshots, one, other)
    return 2 * sum(mine != its for mine, its in pairs) >= len(pairs)


def _starts_anew(snapshots: Sequence[Snapshot], kind: EvidenceKind) -> bool:
    """Whether a kind rises like Adam's count, falls now and then, and rises from near zero again with no gap."""
    pairs = sorted((adam, its) for its, adam in _pairs(snapshots, kind, "adam step"))
    moves = [(after[0] - before[0], after[1] - before[1], after[1]) for before, after in itertools.pairwise(pairs)]
    rises = [adam for adam, its, _ in moves if its > 0]
    is_even = all(adam == its for adam, its, _ in moves if its > 0)
    falls = [(adam, value) for adam, its, value in moves if its <= 0]
    return bool(rises and falls) and is_even and all(0 < adam < value + max(rises) for adam, value in falls)


def _led_by(
    kind: EvidenceKind, snapshots: Sequence[Snapshot], *, outvoted: set[EvidenceKind] | None = None, why: str = ""
) -> Trusted:
    ordered = tuple(
        replace(one, evidence=tuple(sorted(one.evidence, key=lambda item: item.source != kind))) for one in snapshots
    )
    return Trusted(ordered, tuple(_notes(ordered, outvoted or set(), why)), frozenset(outvoted or ()))


def _notes(ordered: Sequence[Snapshot], outvoted: set[EvidenceKind], why: str) -> Iterator[str]:
    last = max(ordered, key=lambda snapshot: snapshot.evidence[0].step)
    for kind in sorted(outvoted):
        item = _item(last, kind)
        if item:
            yield f"{kind} ({item.where}) counts something else, {item.step} at step {last.evidence[0].step}: {why}"
