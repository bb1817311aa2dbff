"""Which kind of evidence tells the steps of a run: the user's choice, or what the evidence shows where the usual order cannot be right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.choices import StepFrom, StepUnit
    from farcast_cli.trainers.base import Evidence, EvidenceKind, Snapshot

KINDS: dict[StepFrom, EvidenceKind] = {
    "payload": "payload",
    "adam": "adam step",
    "name": "name",
    "metadata": "metadata",
    "trainer": "trainer state",
}
"""The kind of evidence that each value of `--step-from` means."""
WORDS: dict[StepFrom, str] = {
    "payload": "the counter in the files",
    "adam": "Adam's count",
    "name": "the number in the names",
    "metadata": "the metadata",
    "trainer": "the trainer's state",
}
_MIN_TO_AGREE = 3  # snapshots
_INDEPENDENT: tuple[EvidenceKind, ...] = ("payload", "adam step", "name", "metadata")


@dataclass(frozen=True, slots=True)
class StepRule:
    """How the user has the steps of a run told: by which evidence, None for the usual order, and in which unit."""

    source: StepFrom | None = None
    unit: StepUnit = "step"

    @property
    def options(self) -> tuple[str, ...]:
        """The same as words of a command."""
        source = () if self.source is None else ("--step-from", self.source)
        return (*source, *(("--unit", self.unit) if self.unit != "step" else ()))


BY_EVIDENCE = StepRule()


@dataclass(frozen=True, slots=True)
class Trusted:
    """Snapshots with their trusted evidence first, and a note on each kind that counts something else."""

    snapshots: tuple[Snapshot, ...]
    notes: tuple[tuple[EvidenceKind, str], ...] = ()
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


def without_constant(snapshots: Sequence[Snapshot]) -> tuple[list[Snapshot], tuple[str, ...]]:
    """The snapshots without each counter that says the same in all of them while their names tell steps apart, and notes on it."""
    names = _steps(snapshots, "name")
    if len(names) < max(len(snapshots), _MIN_TO_AGREE) or len(set(names.values())) < len(snapshots):
        return list(snapshots), ()
    others = [kind for kind in _INDEPENDENT if kind != "name"]
    constant = {
        kind for kind in others if len(told := _steps(snapshots, kind)) == len(snapshots) and len(set(told.values())) == 1
    }
    items = [item for item in snapshots[0].evidence if item.source in constant]
    notes = tuple(f"{item.source} ({item.where}) is {item.step} in every snapshot, and so no step" for item in items)
    left = [replace(one, evidence=tuple(item for item in one.evidence if item.source not in constant)) for one in snapshots]
    return left, notes


def with_evidence_of(source: StepFrom, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots; one that lacks that evidence loses the rest of its own."""
    return [one if _item(one, KINDS[source]) else replace(one, evidence=()) for one in snapshots]


def chosen(snapshots: Sequence[Snapshot], source: StepFrom) -> Trusted:
    """The evidence that the user says is right; every other kind may say what it likes, which is noted."""
    others: set[EvidenceKind] = {item.source for one in snapshots for item in one.evidence} - {KINDS[source]}
    found = _led_by(KINDS[source], snapshots, outvoted=others, why=f"--step-from {source}")
    return replace(found, others=frozenset(others))


def sources_in(snapshots: Sequence[Snapshot]) -> list[StepFrom]:
    """The values of `--step-from` that some of the snapshots have evidence for."""
    found = {item.source for snapshot in snapshots for item in snapshot.evidence}
    return [source for source, kind in KINDS.items() if kind in found]


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


def _notes(ordered: Sequence[Snapshot], outvoted: set[EvidenceKind], why: str) -> Iterator[tuple[EvidenceKind, str]]:
    for kind in sorted(outvoted):
        told = [(one.evidence[0].step, item) for one in ordered if one.evidence and (item := _item(one, kind))]
        odd = [(step, item) for step, item in told if item.step != step]
        if odd:
            step, item = max(odd, key=lambda pair: pair[0])
            yield kind, f"{kind} ({item.where}) counts something else, {item.step} at step {step}: {why}"
