"""Which snapshot is of which step: the evidence cross-checked, copies of a step set aside, contradictions collected."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from farcast_cli.errors import (
    MixedRunsError,
    SnapshotError,
    StepConflictError,
    TooFewSnapshotsError,
    UsageError,
    listed,
    printable,
    shell_word,
)
from farcast_cli.run.epochs import epoch_in, in_epochs, known_steps
from farcast_cli.run.mixed import begun_anew, number_of, plain_name, saved_at, shape_of, two_runs, two_versions, version_of
from farcast_cli.run.trust import (
    BY_EVIDENCE,
    KINDS,
    WORDS,
    StepRule,
    chosen,
    sources_in,
    trusted,
    with_evidence_of,
    without_constant,
)
from farcast_cli.trainers.base import Evidence, Snapshot
from farcast_cli.trainers.names import MAX_DIGITS, find_epoch_in_name, is_alias, is_copy, split_ending, varying_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.choices import StepFrom
    from farcast_cli.trainers.base import EvidenceKind

_MIN_FOR_A_RATE = 3
_SHOWN_ENDS = 4  # of a series of names, at each end


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

    def __str__(self) -> str:
        last, every = "" if self.last is None else self.last, "" if self.every == 1 else f":{self.every}"
        return f"{self.first or ''}:{last}{every}"

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

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

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

    def add(self, others: Findings) -> None:
        self.ignored += others.ignored
        self.notes += others.notes
        self.conflicts += others.conflicts


def settle_steps(
    snapshots: Sequence[Snapshot],
    wanted: StepRange | StepList | None,
    directory: Path,
    findings: Findings,
    rule: StepRule = BY_EVIDENCE,
) -> list[Snapshot]:
    """The snapshots of the wanted steps in their order; step -1 where nothing tells it, which is a conflict.

    Where evidence disagrees, the hints and notes name each `--step-from` with which nothing stands against the run any more.
    """
    own = Findings()
    settled, outvoted = _settle(snapshots, wanted, directory, own, rule)
    if rule.source is None and (own.conflicts or outvoted):
        ways = _ways_out(snapshots, wanted, directory, rule)
        own.notes = [text + _instead(outvoted.get(text), ways) for text in own.notes]
        _hint_at(ways, own.conflicts)
    findings.add(own)
    return settled


def _settle(
    snapshots: Sequence[Snapshot],
    wanted: StepRange | StepList | None,
    directory: Path,
    findings: Findings,
    rule: StepRule,
) -> tuple[list[Snapshot], dict[str, EvidenceKind]]:
    """The same by one rule; and the notes on kinds of evidence that do not tell the steps, each with its kind."""
    if rule.unit == "epoch" and any(snapshot.unit == "step" for snapshot in snapshots):
        conflict = known_steps(snapshots, directory)
        findings.conflicts += [conflict] if conflict else []
        snapshots = in_epochs(snapshots)
    snapshots = _with_numbers(snapshots, is_asked=rule.source == "name" or _is_constant(snapshots))
    if rule.source is None:
        snapshots, notes = without_constant(snapshots)
        findings.notes.extend(notes)
    else:
        snapshots = _asked_for(rule.source, snapshots, directory, findings)
    if any(snapshot.evidence for snapshot in snapshots):
        known = _with_evidence(snapshots, findings, rule)
    else:
        known = _in_order_of_saving(snapshots, wanted, directory, findings, rule) if rule.source is None else list(snapshots)
    found = trusted(known) if rule.source is None else chosen(known, rule.source)
    findings.notes.extend(text for _, text in found.notes)
    settled = [s.settle(s.evidence[0].step, s.evidence[0].source) if s.evidence else s for s in found.snapshots]
    within = [s for s in settled if wanted is None or s.step < 0 or s.step in wanted]
    _cross_check(settled, {snapshot.path for snapshot in within}, found.others, findings)
    if isinstance(wanted, StepList):
        _check_listed(within, wanted, directory, findings)
    kept = _without_duplicates(within, directory, findings, is_chosen=wanted is not None)
    return kept, {text: kind for kind, text in found.notes}


# --- the user's choice of evidence -----------------------------------------------------------------------------------


def _is_constant(snapshots: Sequence[Snapshot]) -> bool:
    """Whether all evidence of all snapshots is one number, which tells them not apart."""
    return len({item.step for snapshot in snapshots for item in snapshot.evidence}) == 1


def _asked_for(source: StepFrom, snapshots: Sequence[Snapshot], directory: Path, findings: Findings) -> list[Snapshot]:
    """The snapshots with the evidence that the user asks for; it is a conflict if none has it."""
    told = with_evidence_of(source, snapshots)
    if not any(snapshot.evidence for snapshot in told):
        others = listed(sources_in(snapshots)) or "none"
        findings.conflicts.append(
            StepConflictError(
                f"{directory}: --step-from {source}: expected {WORDS[source]}, found no snapshot that has it",
                hint=f"evidence for the steps: {others}; without --step-from, farcast chooses among it",
            )
        )
    return told


def _ways_out(
    snapshots: Sequence[Snapshot], wanted: StepRange | StepList | None, directory: Path, rule: StepRule
) -> dict[StepFrom, str]:
    """The values of `--step-from` with which nothing stands against the run, and the steps that it then has, in words."""
    found: dict[StepFrom, list[int]] = {}
    for source in dict.fromkeys((*sources_in(snapshots), "name")):
        trial = Findings()
        settled, _ = _settle(snapshots, wanted, directory, trial, replace(rule, source=source))
        steps = [snapshot.step for snapshot in settled]
        if not trial.conflicts and 1 < len(steps) >= len(snapshots) / 2 and steps not in found.values():
            found[source] = steps
    return {source: f"{steps[0]} to {steps[-1]}" for source, steps in found.items()}


def _instead(kind: EvidenceKind | None, ways: Mapping[StepFrom, str]) -> str:
    source = next((source for source in ways if KINDS[source] == kind), None)
    return f" (--step-from {source} takes it instead)" if source else ""


def _hint_at(ways: Mapping[StepFrom, str], conflicts: Sequence[SnapshotError]) -> None:
    """Name the ways out in the hints: first where evidence disagrees, last where there seem to be two runs."""
    told = ", ".join(f"--step-from {source} if {WORDS[source]} is right (steps {steps})" for source, steps in ways.items())
    for error in conflicts if told else ():
        if isinstance(error, (StepConflictError, MixedRunsError)):
            first, last = (told, error.hint) if isinstance(error, StepConflictError) else (error.hint, told)
            error.hint = printable(f"{first}; or {last}")


def first_of(conflicts: Sequence[SnapshotError], directory: Path) -> SnapshotError:
    """The first conflict as the error to stop with, and how many more there are."""
    first, num_more = conflicts[0], len(conflicts) - 1
    if not num_more:
        return first
    return type(first)(f"{first} (and {num_more} more: farcast inspect {shell_word(directory)} -v shows all)", hint=first.hint)


# --- snapshots without evidence --------------------------------------------------------------------------------------


def _with_evidence(snapshots: Sequence[Snapshot], findings: Findings, rule: StepRule) -> list[Snapshot]:
    """The snapshots but `last`, `best` and their like without evidence; any other without evidence is a conflict."""
    kept = []
    for snapshot in snapshots:
        if not snapshot.evidence and (is_alias(snapshot.path) or _is_last_of(snapshot, snapshots)):
            findings.ignore(snapshot.path, "unknown step")
            continue
        kept.append(snapshot)
        if not snapshot.evidence:
            findings.conflicts.append(_nothing_tells(snapshot.path, rule))
    return kept


def _with_numbers(snapshots: Sequence[Snapshot], *, is_asked: bool) -> list[Snapshot]:
    """The same; where none has evidence and names are equal but for one number, that is their step.

    Args:
        is_asked: evidence of other kinds does not matter, because the user asks for the names.
    """
    has_any = any(item.source == "name" or not is_asked for snapshot in snapshots for item in snapshot.evidence)
    names = [] if has_any else [snapshot.path.name for snapshot in snapshots]
    steps = {name: number for name, (word, number) in varying_numbers(names).items() if not word}
    return [
        replace(s, evidence=(*s.evidence, Evidence("name", s.path.name, steps[s.path.name]))) if s.path.name in steps else s
        for s in snapshots
    ]


def _is_last_of(snapshot: Snapshot, others: Sequence[Snapshot]) -> bool:
    """Whether a name is that of the others without their number, as a trainer names the last one."""
    stem, ending = split_ending(snapshot.path.name)
    like = re.compile(re.escape(stem) + r"[-_.]?\d+" + re.escape(ending))
    return sum(like.fullmatch(other.path.name) is not None for other in others) > 1


def _nothing_tells(path: Path, rule: StepRule) -> StepConflictError:
    if rule.source is not None:
        return StepConflictError(
            f"{path}: --step-from {rule.source}: expected {WORDS[rule.source]}, found none",
            hint="leave --step-from out, or move the file out of this folder",
        )
    unit = rule.unit
    return StepConflictError(
        f"{path}: unknown {unit}: expected {'an epoch' if unit == 'epoch' else 'a counter'} in the file or a number in the name",
        hint=f"add its {unit} to its name, such as {unit}_1000, or move it out of this folder",
    )


def _in_order_of_saving(
    snapshots: Sequence[Snapshot], wanted: StepRange | StepList | None, directory: Path, findings: Findings, rule: StepRule
) -> list[Snapshot]:
    """Snapshots none of which has evidence: a list of steps gives them theirs, by their epochs or else by their times."""
    order = _order_of(snapshots)
    ordered = sorted(snapshots, key=lambda snapshot: (order.key(snapshot), snapshot.path.name))
    if not isinstance(wanted, StepList):
        findings.conflicts.extend(_ask_for_steps(ordered, order, directory, rule))
        return ordered
    named = [snapshot for snapshot in ordered if not is_alias(snapshot.path)]
    chosen = next((group for group in (ordered, named) if len(group) == len(wanted.steps)), None)
    if chosen is None or len(set(map(order.key, chosen))) < len(chosen):
        count = f"{len(ordered)} snapshots" if chosen is None else "some that were saved at the same time"
        give = f"give one number for each: {_numbers_for(len(ordered))}; or " if chosen is None else ""
        findings.conflicts.append(
            StepConflictError(
                f"{directory}: unknown steps: --steps lists {len(wanted.steps)} for {count}: {_in_words(ordered)}",
                hint=f"{give}add the steps to the snapshots' names, such as step_1000",
            )
        )
        return ordered
    for snapshot in ordered:
        if snapshot not in chosen:
            findings.ignore(snapshot.path, "unknown step")
    pairs = list(zip(chosen, wanted.steps, strict=True))
    told = _first_and_last([f"{snapshot.path.name} = {step}" for snapshot, step in pairs])
    findings.notes.append(f"steps as --steps lists them, {order.words}: {told}")
    return [replace(snapshot, evidence=(Evidence("order", f"--steps, {order.words}", step),)) for snapshot, step in pairs]


@dataclass(frozen=True, slots=True)
class _Order:
    """The order of snapshots whose steps nothing tells: a number for each, and what the order is, in words."""

    key: Callable[[Snapshot], int]
    words: str
    is_of_epochs: bool = False


def _first_and_last(words: Sequence[str]) -> str:
    """A series of any length, whose ends must be seen: a wrong order shows there."""
    few = len(words) <= 2 * _SHOWN_ENDS + 1
    return ", ".join(words if few else (*words[:_SHOWN_ENDS], "...", *words[-_SHOWN_ENDS:]))


def _order_of(snapshots: Sequence[Snapshot]) -> _Order:
    """By the epochs in names or payloads, if all have one and no two of them contradict; else by the times of change.

    A copy has the time of copying, so times are the last resort.
    """
    named = [snapshot for snapshot in snapshots if not is_alias(snapshot.path)]
    epochs = _named_epochs(named)
    in_names = {s.path: epochs[s.path.name] for s in named if s.path.name in epochs}
    in_files = {s.path: epoch for s in named if (epoch := epoch_in(s)) is not None}
    whole = [one for one in (in_names, in_files) if len(set(one.values())) == len(named)]
    orders = [sorted(one, key=one.__getitem__) for one in whole]
    if not whole or orders[0] != orders[-1]:
        return _Order(saved_at, "oldest file first")
    return _Order(lambda snapshot: whole[0].get(snapshot.path, -1), "first epoch first", is_of_epochs=True)


def _named_epochs(snapshots: Sequence[Snapshot]) -> dict[str, int]:
    found = varying_numbers([snapshot.path.name for snapshot in snapshots])
    told = {one.path.name: match for one in snapshots if (match := find_epoch_in_name(one.path.name))}
    return {name: int(match[1]) for name, match in told.items()} | {name: n for name, (word, n) in found.items() if word}


def _ask_for_steps(ordered: Sequence[Snapshot], order: _Order, directory: Path, rule: StepRule) -> Iterator[StepConflictError]:
    if len(ordered) == 1:
        yield _nothing_tells(ordered[0].path, rule)
    elif ordered:
        epochs = "; or --unit epoch counts in epochs" if order.is_of_epochs else ""
        count, unit = len(ordered), rule.unit
        yield StepConflictError(
            f"{directory}: unknown {unit}s of its {count} snapshots; {order.words} they are {_in_words(ordered)}",
            hint=f"{_numbers_for(count)} assigns the {unit}s in that order{epochs}; or add the {unit} to each name",
        )


def _numbers_for(count: int) -> str:
    """The option that lists a step for each of some snapshots.

    >>> _numbers_for(3), _numbers_for(10)
    ('--steps S1,S2,S3 (3 numbers)', '--steps S1,S2,...,S10 (10 numbers)')
    """
    few = count <= 3  # noqa: PLR2004 - more need no list
    names = [f"S{number}" for number in range(1, count + 1)] if few else ["S1", "S2", "...", f"S{count}"]
    return f"--steps {','.join(names)} ({count} numbers)"


def _in_words(snapshots: Sequence[Snapshot]) -> str:
    return _first_and_last([snapshot.path.name for snapshot in snapshots])


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
        f"{snapshot.path}: {_place_of(chosen)} says {snapshot.unit} {chosen.step}, but {item.source} ({item.where}) {says} {item.step}",
        hint="rename the snapshot to its real step, or move it out of this folder",
    )


def _place_of(item: Evidence) -> str:
    """Where evidence lies; with its kind if it is a key that is called as what it counts."""
    return f"{item.source} ({item.where})" if item.where in {"step", "epoch"} else item.where


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

    A copy without a number in its name, and a snapshot with the same weights, are left out; names that are equal but for their
    numbers, with different weights, are no copies. Of Lightning's NAME and
    NAME-v1 with different weights, the one that was saved last stays: the trainer adds -vN where NAME is there already.
    """
    left, was_replaced = [same[0]], False
    for snapshot in same[1:]:
        twin = next((other for other in left if snapshot.has_weights_of(other)), None)
        older = next((other for other in left if plain_name(other) == plain_name(snapshot)), None)
        in_series = any(shape_of(other) == shape_of(snapshot) for other in left) and not twin
        if number_of(snapshot) is None and not in_series:
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
