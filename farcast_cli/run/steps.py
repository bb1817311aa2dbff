"""Which snapshot is of which step: the evidence cross-checked, copies of a step set aside, contradictions collected."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from farcast_cli.errors import (
    SnapshotError,
    StepConflictError,
    TooFewSnapshotsError,
    UsageError,
    listed,
    shell_word,
)
from farcast_cli.run.mixed import begun_anew, number_of, plain_name, saved_at, two_runs, two_versions, version_of
from farcast_cli.run.trust import trusted
from farcast_cli.trainers.base import Evidence, Snapshot, is_step, tree_of
from farcast_cli.trainers.names import MAX_DIGITS, is_alias, is_copy, split_ending, varying_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import EvidenceKind

_MIN_FOR_A_RATE = 3


@dataclass(frozen=True, slots=True)
class StepRange:
    """`FROM:TO:EVERY`: steps from FROM to TO, both included, of those only multiples of EVERY. Parts may be left out."""

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
        if len(parts) > 3 or not all(part.isdecimal() or not part for part in parts):  # noqa: PLR2004 - FROM:TO:EVERY
            raise _no_steps(text)
        first, last, every = (*parts, "", "")[:3]
        if len(parts) == 1 or every == "0" or (first and last and int(first) > int(last)):
            raise _no_steps(text)
        return cls(int(first or 0), int(last) if last else None, int(every or 1))


@dataclass(frozen=True, slots=True)
class StepList:
    """`A,B,C`: exactly these steps, each of which must be there."""

    steps: tuple[int, ...]

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    @classmethod
    def parse(cls, text: str) -> StepList:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and len(part) <= MAX_DIGITS for part in parts):
            raise _no_steps(text)
        steps = tuple(map(int, parts))
        if any(late <= early for early, late in itertools.pairwise(steps)):
            raise UsageError(f"--steps {text}: expected a list of rising steps")
        return cls(steps)


def parse_steps(text: str | None) -> StepRange | StepList | None:
    """What `--steps` asks for; None where it is not given."""
    if not text:
        return None
    if any(len(number) > MAX_DIGITS for number in re.findall(r"\d+", text)):
        raise _no_steps(f"{text[:40]}...")
    return StepList.parse(text) if "," in text else StepRange.parse(text)


def _no_steps(text: str) -> UsageError:
    return UsageError(f"--steps {text}: expected FROM:TO:EVERY, such as 1000:8000 or ::500, or a list, such as 100,200,300")


@dataclass(frozen=True, slots=True)
class Ignored:
    """Something in the folder that is not part of the trajectory, and why."""

    path: Path
    reason: str
    is_half_written: bool = False
    """Whether it is a snapshot of the run by its looks, so that a person should hear of it."""


@dataclass(slots=True)
class Findings:
    """What is noticed on the way from a folder to its trajectory; every stage adds to it."""

    ignored: list[Ignored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conflicts: list[SnapshotError] = field(default_factory=list)

    def ignore(self, path: Path, reason: str, *, is_half_written: bool = False) -> None:
        self.ignored.append(Ignored(path, reason, is_half_written))


def settle_steps(
    snapshots: Sequence[Snapshot], wanted: StepRange | StepList | None, directory: Path, findings: Findings
) -> list[Snapshot]:
    """The snapshots of the wanted steps in their order; step -1 where nothing tells it, which is a conflict."""
    snapshots = _with_numbers(snapshots)
    told = any(snapshot.evidence for snapshot in snapshots)
    known = _with_evidence(snapshots, findings) if told else _in_order_of_saving(snapshots, wanted, directory, findings)
    found = trusted(known)
    findings.notes.extend(found.notes)
    settled = [s.settle(s.evidence[0].step, s.evidence[0].source) if s.evidence else s for s in found.snapshots]
    chosen = [s for s in settled if wanted is None or s.step < 0 or s.step in wanted]
    _cross_check(settled, {snapshot.path for snapshot in chosen}, found.others, findings)
    if isinstance(wanted, StepList):
        _check_listed(chosen, wanted, directory, findings)
    return _without_duplicates(chosen, directory, findings, is_chosen=wanted is not None)


def first_of(conflicts: Sequence[SnapshotError], directory: Path) -> SnapshotError:
    """The first conflict as the error to stop with, and how many more there are."""
    first, num_more = conflicts[0], len(conflicts) - 1
    if not num_more:
        return first
    return type(first)(f"{first} (and {num_more} more: farcast inspect {shell_word(directory)} shows all)", hint=first.hint)


# --- snapshots without evidence --------------------------------------------------------------------------------------


def _with_evidence(snapshots: Sequence[Snapshot], findings: Findings) -> list[Snapshot]:
    """The snapshots but `last`, `best` and their like without evidence; any other without evidence is a conflict."""
    kept = []
    for snapshot in snapshots:
        if not snapshot.evidence and (is_alias(snapshot.path) or _is_last_of(snapshot, snapshots)):
            findings.ignore(snapshot.path, "unknown step")
            continue
        kept.append(snapshot)
        if not snapshot.evidence:
            findings.conflicts.append(_nothing_tells(snapshot.path))
    return kept


def _with_numbers(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The same; where none has evidence and names are equal but for one number, that is their step."""
    names = [] if any(snapshot.evidence for snapshot in snapshots) else [snapshot.path.name for snapshot in snapshots]
    steps = {name: number for name, (word, number) in varying_numbers(names).items() if not word}
    return [
        replace(s, evidence=(Evidence("name", s.path.name, steps[s.path.name]),)) if s.path.name in steps else s
        for s in snapshots
    ]


def _is_last_of(snapshot: Snapshot, others: Sequence[Snapshot]) -> bool:
    """Whether a name is that of the others without their number, as a trainer names the last one."""
    stem, ending = split_ending(snapshot.path.name)
    like = re.compile(re.escape(stem) + r"[-_.]?\d+" + re.escape(ending))
    return sum(like.fullmatch(other.path.name) is not None for other in others) > 1


def _nothing_tells(path: Path) -> StepConflictError:
    return StepConflictError(
        f"{path}: unknown step: expected a counter in the file or a number in the name",
        hint="add its step to its name, such as step_1000, or move it out of this folder",
    )


def _in_order_of_saving(
    snapshots: Sequence[Snapshot], wanted: StepRange | StepList | None, directory: Path, findings: Findings
) -> list[Snapshot]:
    """Snapshots none of which has evidence: a list of steps gives them theirs, by their epochs or else by their times."""
    order = _order_of(snapshots)
    ordered = sorted(snapshots, key=lambda snapshot: (order.key(snapshot), snapshot.path.name))
    if not isinstance(wanted, StepList):
        findings.conflicts.extend(_ask_for_steps(ordered, order.words, directory))
        return ordered
    named = [snapshot for snapshot in ordered if not is_alias(snapshot.path)]
    chosen = next((group for group in (ordered, named) if len(group) == len(wanted.steps)), None)
    if chosen is None or len(set(map(order.key, chosen))) < len(chosen):
        count = f"{len(ordered)} snapshots" if chosen is None else "some that were saved at the same time"
        findings.conflicts.append(
            StepConflictError(
                f"{directory}: unknown steps: --steps lists {len(wanted.steps)} for {count}: {_in_words(ordered)}",
                hint="add the steps to the snapshots' names, such as step_1000",
            )
        )
        return ordered
    for snapshot in ordered:
        if snapshot not in chosen:
            findings.ignore(snapshot.path, "unknown step")
    pairs = list(zip(chosen, wanted.steps, strict=True))
    told = listed(f"{snapshot.path.name} = {step}" for snapshot, step in pairs)
    findings.notes.append(f"steps as --steps lists them, {order.words}: {told}")
    return [replace(snapshot, evidence=(Evidence("order", f"--steps, {order.words}", step),)) for snapshot, step in pairs]


@dataclass(frozen=True, slots=True)
class _Order:
    """The order of snapshots whose steps nothing tells: a number for each, and what the order is, in words."""

    key: Callable[[Snapshot], int]
    words: str


def _order_of(snapshots: Sequence[Snapshot]) -> _Order:
    """By the epochs in names or payloads, if all have one and no two of them contradict; else by the times of change.

    A copy has the time of copying, so times are the last resort.
    """
    named = [snapshot for snapshot in snapshots if not is_alias(snapshot.path)]
    epochs = _named_epochs(named)
    in_names = {s.path: epochs[s.path.name] for s in named if s.path.name in epochs}
    in_files = {s.path: epoch for s in named if (epoch := _epoch_in(s)) is not None}
    whole = [one for one in (in_names, in_files) if len(set(one.values())) == len(named)]
    orders = [sorted(one, key=one.__getitem__) for one in whole]
    if not whole or orders[0] != orders[-1]:
        return _Order(saved_at, "oldest file first")
    return _Order(lambda snapshot: whole[0].get(snapshot.path, -1), "first epoch first")


def _named_epochs(snapshots: Sequence[Snapshot]) -> dict[str, int]:
    found = varying_numbers([snapshot.path.name for snapshot in snapshots])
    return {name: number for name, (word, number) in found.items() if word}


def _epoch_in(snapshot: Snapshot) -> int | None:
    """The epoch at the top of a payload."""
    trees = (tree_of(part) for part in snapshot.parts if part.role == "state")
    found = next((tree.get("epoch") for tree in trees if isinstance(tree, dict)), None)
    return found if is_step(found) else None


def _ask_for_steps(ordered: Sequence[Snapshot], words: str, directory: Path) -> Iterator[StepConflictError]:
    if len(ordered) == 1:
        yield _nothing_tells(ordered[0].path)
    elif ordered:
        yield StepConflictError(
            f"{directory}: unknown steps of its {len(ordered)} snapshots; {words} they are {_in_words(ordered)}",
            hint=f"--steps 100,200,300 assigns the steps in that order, {len(ordered)} of them; or add the step to each name",
        )


def _in_words(snapshots: Sequence[Snapshot]) -> str:
    return listed(snapshot.path.name for snapshot in snapshots)


def _check_listed(chosen: Sequence[Snapshot], wanted: StepList, directory: Path, findings: Findings) -> None:
    missing = sorted(set(wanted.steps) - {snapshot.step for snapshot in chosen})
    if missing and all(snapshot.step >= 0 for snapshot in chosen):
        findings.conflicts.append(
            TooFewSnapshotsError(
                f"{directory}: no snapshot of step {listed(missing)}, which --steps lists",
                hint=f"farcast inspect {shell_word(directory)} lists the existing steps",
            )
        )


# --- evidence against evidence ---------------------------------------------------------------------------------------


def _cross_check(settled: Sequence[Snapshot], chosen: set[Path], others: frozenset[EvidenceKind], findings: Findings) -> None:
    """Compare every kind of evidence but `others` with the settled steps; conflicts count for the chosen snapshots only."""
    ordered = sorted(settled, key=lambda snapshot: (snapshot.step, snapshot.path.name))
    for source in sorted({item.source for snapshot in ordered for item in snapshot.evidence} - others):
        pairs = [(s, item) for s in ordered for item in s.evidence if item.source == source]
        odd = [(s, item) for s, item in pairs if item.step != s.step]
        numbers = [(s.step, item.step) for s, item in pairs]
        if odd and source == "adam step":
            odd = [late for early, late in itertools.pairwise(pairs) if late[1].step < early[1].step]
        if odd and _is_affine(numbers):
            findings.notes.append(f"{odd[0][1].where} counts in another unit: {odd[0][1].step} at step {odd[0][0].step}")
            continue
        findings.conflicts.extend(_contradiction(s, item) for s, item in odd if s.path in chosen)


def _contradiction(snapshot: Snapshot, item: Evidence) -> StepConflictError:
    chosen = snapshot.evidence[0]
    says = "falls back to" if chosen.step == item.step else "says"
    return StepConflictError(
        f"{snapshot.path}: {chosen.where} says step {chosen.step}, but {item.source} ({item.where}) {says} {item.step}",
        hint="rename the snapshot to its real step, or move it out of this folder",
    )


def _is_affine(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether b rises in proportion to a over all pairs, of which there must be three to tell."""
    if len(pairs) < _MIN_FOR_A_RATE:
        return False
    (a0, b0), (a1, b1) = pairs[0], pairs[-1]
    return b1 > b0 and all((b - b0) * (a1 - a0) == (b1 - b0) * (a - a0) for a, b in pairs)


# --- several snapshots of a step -------------------------------------------------------------------------------------


def _without_duplicates(
    snapshots: Iterable[Snapshot], directory: Path, findings: Findings, *, is_chosen: bool
) -> list[Snapshot]:
    """One snapshot per step where the others are copies of it; two runs where they are not."""
    kept: list[Snapshot] = []
    collisions: list[list[Snapshot]] = []
    were_replaced = False
    ordered = sorted(snapshots, key=lambda s: (s.step, number_of(s) is None, is_copy(s.path.name), version_of(s), s.path.name))
    for step, group in itertools.groupby(ordered, key=lambda snapshot: snapshot.step):
        same = list(group)
        left, was_replaced = (same, False) if step < 0 else _without_copies(same, findings)
        kept += left
        were_replaced |= was_replaced
        if step >= 0 and len(left) > 1:
            collisions.append(left)
    if collisions:
        findings.conflicts.append(two_runs(collisions, kept, directory))
    elif versions := list(two_versions(kept, directory)) if were_replaced else []:
        findings.conflicts.extend(versions)
    else:
        _check_order_of_saving(kept, directory, findings, is_chosen=is_chosen)
    return kept


def _check_order_of_saving(kept: Sequence[Snapshot], directory: Path, findings: Findings, *, is_chosen: bool) -> None:
    """Two runs are a conflict; only a note where `--steps` chose both of them."""
    conflict = begun_anew(kept, directory)
    if conflict and is_chosen:
        findings.notes.append(f"{conflict}; --steps takes both")
    elif conflict:
        findings.conflicts.append(conflict)


def _without_copies(same: Sequence[Snapshot], findings: Findings) -> tuple[list[Snapshot], bool]:
    """What is left of the snapshots of one step, and whether one replaced another.

    A copy without a number in its name, and a snapshot with the same weights, are left out. Of Lightning's NAME and
    NAME-v1 with different weights, the one that was saved last stays: the trainer adds -vN where NAME is there already.
    """
    left, was_replaced = [same[0]], False
    for snapshot in same[1:]:
        twin = next((other for other in left if snapshot.has_weights_of(other)), None)
        older = next((other for other in left if plain_name(other) == plain_name(snapshot)), None)
        if number_of(snapshot) is None:
            findings.ignore(snapshot.path, f"the same step as {left[0].path.name}")
        elif twin:
            findings.ignore(snapshot.path, f"the same step and weights as {twin.path.name}")
        elif older:
            findings.ignore(older.path, f"the same step as {snapshot.path.name}, which was saved later")
            left[left.index(older)] = snapshot
            was_replaced = True
        else:
            left.append(snapshot)
    return left, was_replaced
