"""Where a Lightning run stands within its epochs, and what its `loops` hold at a later step.

Lightning counts everything twice: over the whole run (`total`) and since the epoch began (`current`). Both follow
from the run's rhythm: batches per epoch, batches per optimizer step, batches between validations, and the moment at
which it saves. The rhythm is read off the snapshots; totals then move by the difference that it makes, so that what
an interrupted run lost stays lost, and counts within an epoch are worked out.

B batches per epoch, A batches per optimizer step, e epoch from 0, p batch within the epoch from 1, V batches between
validations. Source: lightning/pytorch/loops/{fit_loop,training_epoch_loop,evaluation_loop,progress}.py, 2.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from farcast_cli.errors import UsageError, listed
from farcast_cli.formats.tree import find
from farcast_cli.trainers.schedules import counter_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.formats.tree import TreePath

    Counts = dict[str, Any]

Moment = Literal["batch", "validation", "epoch", "end"]
"""When a checkpoint is saved: on_train_batch_end, on_validation_end, on_train_epoch_end, or after training."""

Unit = Literal["step", "late step", "epoch", "epoch hook", "late epoch"]
"""When a schedule is stepped: with the optimizer, behind the batch's checkpoint, at an epoch's last batch, in
on_train_epoch_end, or behind the epoch's checkpoint."""

VERSION_KEY = "pytorch-lightning_version"
_FIT = "fit_loop"
_BATCH = "epoch_loop.batch_progress"
_SCHEDULER = "epoch_loop.scheduler_progress"
_OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"
_MANUAL = "epoch_loop.manual_optimization.optim_step_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_STATE = "epoch_loop.state_dict"
_EPOCH = "epoch_progress"
MAX_SPACING = 100_000  # batches that gradients are accumulated over, or between validations
MAX_FREQUENCY = 1_000  # of a schedule's steps


@dataclass(frozen=True, slots=True)
class LoopPosition:
    """A point of the run: epoch from 0, batch within it from 1, and the moment of saving."""

    epoch: int
    batch: int
    moment: Moment


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation after every `spacing` batches of every `epochs`-th epoch; of the whole run where `epochs` is 0."""

    spacing: int
    epochs: int
    num_batches: int

    def count(self, place: LoopPosition, batches: int | None) -> int:
        """Validations that have ended in this epoch."""
        done = place.batch - (place.moment == "batch")
        if self.epochs:
            return 0 if (place.epoch + 1) % self.epochs else max(done, 0) // self.spacing
        before = place.epoch * (batches or 0)
        return (before + max(done, 0)) // self.spacing - before // self.spacing

    def has_run(self, place: LoopPosition, batches: int | None) -> bool:
        earlier = place.epoch // self.epochs if self.epochs else place.epoch * (batches or 0) // self.spacing
        return bool(earlier or self.count(place, batches))


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a learning-rate schedule is stepped: a unit of the run, and how many of them a step takes."""

    unit: Unit
    every: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One snapshot: its step, the fit loop's counts, its schedules' counts, and where it stands."""

    step: int
    loop: Counts
    schedules: tuple[int | None, ...]
    place: LoopPosition

    def total(self, name: str, key: str = "ready") -> int:
        return int(self.loop[name]["total"][key])


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How a run goes through its epochs. `batches` is None where no epoch has ended yet."""

    batches: int | None
    accumulate: int
    per_batch: Fraction | None
    """Optimizer steps a batch, under manual optimization; None under automatic."""
    validation: Validation | None = None
    schedules: tuple[Schedule | None, ...] = ()

    # --- what has happened by a place ---

    def stepping(self, batch: int) -> int:
        """Batches of an epoch, up to one, at which the optimizer steps: every A-th and the last."""
        return batch // self.accumulate + (batch == self.batches and batch % self.accumulate > 0)

    def zeroing(self, batch: int) -> int:
        """Batches of an epoch, up to one, before which gradients are set to zero: the first, and each behind a step."""
        return -(-batch // self.accumulate)

    def steps_into(self, batch: int) -> int:
        """Optimizer steps of an epoch, up to a batch."""
        return self.stepping(batch) if self.per_batch is None else int(batch * self.per_batch)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch; None where that is not known, or not a whole number."""
        if self.batches is None or (self.per_batch is not None and (self.batches * self.per_batch).denominator > 1):
            return None
        return self.steps_into(self.batches)

    def place_after(self, start: LoopPosition, horizon: int) -> LoopPosition:
        """The place `horizon` optimizer steps on: the batch that takes the last of them.

        Raises:
            UsageError: that step lies within a batch that takes several.
        """
        epoch, batch = start.epoch, start.batch
        if self.per_batch is None:
            step, each = self.stepping(batch) + horizon, self.stepping(self.batches or 0)
            if each:
                epoch, step = epoch + (step - 1) // each, (step - 1) % each + 1
            batch = self.batches if self.batches is not None and step == each else step * self.accumulate
        else:
            more = horizon / self.per_batch
            if more.denominator != 1:
                raise _between_batches(horizon, self.per_batch)
            batch += int(more)
            if self.batches:
                epoch, batch = epoch + (batch - 1) // self.batches, (batch - 1) % self.batches + 1
        return LoopPosition(epoch, batch, self._moment(start.moment, epoch, batch))

    def _moment(self, usual: Moment, epoch: int, batch: int) -> Moment:
        """The usual moment of saving where it can come about at a batch; else the end of that batch."""
        validated = LoopPosition(epoch, batch, "validation")
        if usual == "validation" and self.validation is not None:
            before = replace(validated, moment="batch")
            ran = self.validation.count(validated, self.batches) > self.validation.count(before, self.batches)
            return usual if ran else "batch"
        return usual if usual == "batch" or batch == self.batches else "batch"

    def schedule_count(self, schedule: Schedule, place: LoopPosition) -> int:
        """How often a schedule has been stepped by a place."""
        late = place.moment in {"batch", "validation"}
        if schedule.unit in {"step", "late step"}:
            whole = place.epoch * self._scheduled(self.batches or 0, schedule.every)
            return whole + self._scheduled(place.batch - (late and schedule.unit == "late step"), schedule.every)
        ended = {
            "epoch": place.batch == self.batches,
            "epoch hook": place.moment in {"epoch", "end"},
            "late epoch": place.moment == "end",
        }[schedule.unit]
        return (place.epoch + ended) // schedule.every

    def _scheduled(self, batch: int, every: int) -> int:
        """Batches of an epoch, up to one, at which the optimizer steps and whose number is a multiple of `every`."""
        last = batch == self.batches and batch % self.accumulate > 0 and batch % every == 0
        return max(batch, 0) // math.lcm(self.accumulate, every) + last

    # --- the loops' counts at a place ---

    def counts(self, place: LoopPosition) -> Counts:
        """The fit loop's progress, as Lightning lays it out."""
        size = self.batches or 0
        num_batches = place.epoch * size + place.batch
        steps, zeroed = self.stepping(place.batch), self.zeroing(place.batch)
        in_epochs = place.epoch * self.stepping(size)
        within = place.moment in {"batch", "validation"}
        pending = within and (place.batch % self.accumulate == 0 or place.batch == self.batches)
        manual = int(num_batches * self.per_batch) if self.per_batch is not None else 0
        automatic = self.per_batch is None
        return {
            _BATCH: _both(num_batches, place.batch, lag=place.moment == "batch")
            | {"is_last_batch": place.batch == self.batches},
            _SCHEDULER: self._scheduler_counts(place) if automatic else _both(0, 0),
            _OPTIMIZER: {
                "optimizer": {
                    "step": _both((in_epochs + steps) * automatic, steps * automatic),
                    "zero_grad": _both((in_epochs + zeroed) * automatic, zeroed * automatic),
                }
            },
            _MANUAL: _both(manual, manual),
            _STATE: {"_batches_that_stepped": in_epochs + steps - pending},
            _EPOCH: _epochs(place),
        } | ({_VALIDATION: self._validation_counts(place)} if self.validation else {})

    def _scheduler_counts(self, place: LoopPosition) -> Counts:
        known = [schedule for schedule in self.schedules if schedule]
        start = LoopPosition(place.epoch, 0, "batch")
        total = sum(self.schedule_count(schedule, place) for schedule in known)
        return _both(total, total - sum(self.schedule_count(schedule, start) for schedule in known))

    def _validation_counts(self, place: LoopPosition) -> Counts:
        assert self.validation is not None  # noqa: S101 - the caller's branch
        ran, each = self.validation.has_run(place, self.batches), self.validation.num_batches
        return _both(each * self.validation.count(place, self.batches), each * ran) | {"is_last_batch": ran}


def _both(total: int, current: int, *, lag: int = 0) -> Counts:
    """Counts over the run and since it last began; `completed` may lag by the one that is being completed."""
    return {
        kind: dict.fromkeys(("ready", "started", "processed"), count) | {"completed": count - lag}
        for kind, count in (("total", total), ("current", current))
    }


def _epochs(place: LoopPosition) -> Counts:
    processed = place.epoch + (place.moment in {"epoch", "end"})
    begun = dict.fromkeys(("ready", "started"), place.epoch + 1)
    counts = begun | {"processed": processed, "completed": place.epoch + (place.moment == "end")}
    return {"total": counts, "current": counts}


def _between_batches(horizon: int, per_batch: Fraction) -> UsageError:
    unit = per_batch.numerator
    below, above = horizon // unit * unit, -(-horizon // unit) * unit
    return UsageError(
        f"horizon {horizon}: this run takes {per_batch} optimizer steps a batch, expected a whole number of batches",
        hint=" or ".join(f"--horizon {value}" for value in (below, above) if value),
    )


_OPTIONAL = {"started", "processed"}  # which schedules and optimizers do not have
_LAYOUT = Rhythm(1, 1, None, Validation(1, 1, 1)).counts(LoopPosition(0, 1, "batch"))


# --- reading the rhythm off the snapshots ----------------------------------------------------------------------------


def is_lightning(tree: object) -> bool:
    return isinstance(tree, dict) and VERSION_KEY in tree


def read_rhythm(states: Sequence[tuple[int, Any]]) -> tuple[Rhythm, list[Seen]] | None:
    """The rhythm that explains the loops of all snapshots, (step, tree), the origin last; None where none does."""
    seen = [found for step, tree in states if (found := _seen(step, tree))]
    if not seen or seen[-1].step != states[-1][0]:
        return None
    batches = _batches(seen)
    lost = [one.total(_BATCH) - one.place.epoch * (batches or 0) - one.place.batch for one in seen]
    seen = [one for one, count in zip(seen, lost, strict=True) if count == lost[-1]]  # since the run was last resumed
    rhythm = _optimization(seen, batches)
    if rhythm is None:
        return None
    rhythm = replace(rhythm, validation=_validation(seen, rhythm.batches))
    number = len(seen[-1].schedules)
    return replace(rhythm, schedules=tuple(_schedule(seen, rhythm, index) for index in range(number))), seen


def _seen(step: int, tree: Any) -> Seen | None:
    """What one snapshot tells; None without loops, or between two batches, where training has not begun."""
    loops = tree.get("loops") if is_lightning(tree) else None
    loop = loops.get(_FIT) if isinstance(loops, dict) else None
    if not _is_laid_out(loop, _LAYOUT):
        return None
    assert isinstance(loop, dict)  # noqa: S101 - has just been looked at
    batch, epoch = loop[_BATCH]["current"], loop[_EPOCH]["current"]
    if not batch["ready"] or not epoch["ready"]:
        return None
    moment: Moment = "end"
    if batch["ready"] > batch["completed"]:
        moment = "batch"
    elif epoch["ready"] > epoch.get("processed", 0):
        moment = "validation"
    elif epoch["ready"] > epoch["completed"]:
        moment = "epoch"
    schedules = tuple(_count_of(state) for state in tree.get("lr_schedulers") or ())
    return Seen(step, loop, schedules, LoopPosition(epoch["ready"] - 1, batch["ready"], moment))


def _is_laid_out(found: Any, template: Counts) -> bool:
    """Whether progress has the keys that are known, and whole numbers under them."""
    if not isinstance(found, dict) or template.keys() - found.keys() - _OPTIONAL:
        return False
    return all(
        _is_laid_out(found[key], value) if isinstance(value, dict) else isinstance(found[key], int)
        for key, value in template.items()
        if key in found
    )


def _count_of(state: Any) -> int | None:
    count = find(state, counter_path(state))
    return count if isinstance(count, int) else None


def _batches(seen: Sequence[Seen]) -> int | None:
    """Batches per epoch: where an epoch was seen to end, else by what two snapshots in different epochs have in total."""
    ended = [one.place.batch for one in seen if one.loop[_BATCH]["is_last_batch"]]
    if ended:
        return ended[-1]
    last = seen[-1]
    begun = [(one.place.epoch, one.total(_BATCH) - one.place.batch) for one in seen]
    for epoch, total in [*reversed(begun[:-1]), (0, 0)]:
        if epoch < last.place.epoch:
            size = Fraction(begun[-1][1] - total, last.place.epoch - epoch)
            return int(size) if size.denominator == 1 and size >= last.place.batch else None
    return None


def _optimization(seen: Sequence[Seen], batches: int | None) -> Rhythm | None:
    """How batches make optimizer steps; a change in mid-run leaves the last snapshot to tell."""
    last = seen[-1]
    if last.total(_MANUAL, "completed"):
        first = next((one for one in seen if one.total(_BATCH) < last.total(_BATCH)), None)
        steps, num = (
            last.total(name, key) - (first.total(name, key) if first else 0)
            for name, key in ((_MANUAL, "completed"), (_BATCH, "ready"))
        )
        return Rhythm(batches, 1, Fraction(steps, num)) if steps else None
    for some in (seen, seen[-1:]):
        longest = max(one.place.batch for one in some)
        rhythms = (Rhythm(batches, accumulate, None) for accumulate in range(1, min(longest, MAX_SPACING) + 1))
        fitting = [one for one in rhythms if all(one.stepping(each.place.batch) == _in_epoch(each, "step") for each in some)]
        exact = (one for one in fitting if all(one.zeroing(each.place.batch) == _in_epoch(each, "zero_grad") for each in some))
        if fitting:
            return next(exact, fitting[0])
    return None


def _in_epoch(one: Seen, what: Literal["step", "zero_grad"]) -> int:
    return int(one.loop[_OPTIMIZER]["optimizer"][what]["current"]["completed"])


def _validation(seen: Sequence[Seen], batches: int | None) -> Validation | None:
    """The widest spacing of validations that explains how many each snapshot's epoch has had."""
    sizes = [int(one.loop[_VALIDATION]["current"]["ready"]) for one in seen]
    each = min((size for size in sizes if size), default=0)
    if not each:
        return None

    def fits(rule: Validation) -> bool:
        return all(rule.count(one.place, batches) * each == one.total(_VALIDATION) for one in seen)

    for epochs in range(1, min(seen[-1].place.epoch + 2, MAX_FREQUENCY)):
        ran = [(one, one.total(_VALIDATION) // each) for one in seen]
        widest = min([one.place.batch // count for one, count in ran if count], default=0)
        for spacing in (batches, widest):
            if spacing and fits(rule := Validation(spacing, epochs, each)):
                return rule
    widest = min(seen[-1].total(_BATCH), MAX_SPACING)
    rules = (Validation(spacing, 0, each) for spacing in range(widest, 0, -1))
    return next((rule for rule in rules if fits(rule)), None)


def _schedule(seen: Sequence[Seen], rhythm: Rhythm, index: int) -> Schedule | None:
    """When a schedule is stepped, by its counts; None where nothing explains them, or several rules do that differ."""
    counts = [(one, one.schedules[index]) for one in seen if index < len(one.schedules)]
    known = [(one, count) for one, count in counts if count is not None]
    if len({count for _, count in known}) < 2:  # noqa: PLR2004 - one that was never seen to move tells nothing
        return None
    origin, last = known[-1]

    def fits(schedule: Schedule) -> bool:
        ahead = rhythm.schedule_count(schedule, origin.place)
        return all(ahead - rhythm.schedule_count(schedule, one.place) == last - count for one, count in reversed(known))

    units: tuple[Unit, ...] = ("step", "late step", "epoch", "epoch hook", "late epoch")
    plain = [found for unit in units if fits(found := Schedule(unit, 1))]
    exact = [found for found in plain if rhythm.schedule_count(found, origin.place) == last]
    if plain:
        return (exact or plain)[0]
    sparse = [found for unit in units for every in range(2, MAX_FREQUENCY) if fits(found := Schedule(unit, every))]
    return sparse[0] if len({("step" in found.unit, found.every) for found in sparse}) == 1 else None


# --- moving on -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoopsClock:
    """From the origin to the valid step: the rhythm, the last snapshots, and both places."""

    rhythm: Rhythm
    seen: tuple[Seen, ...]
    target: LoopPosition
    step: int

    @property
    def origin(self) -> Seen:
        return self.seen[-1]

    @property
    def paths(self) -> tuple[tuple[str], ...]:
        return ("loops",), ("epoch",), ("global_step",)

    @property
    def epochs(self) -> int:
        """By how many `trainer.current_epoch` rises, which counts an epoch when its checkpoint has been saved."""
        before, after = (place.epoch + (place.moment == "end") for place in (self.origin.place, self.target))
        return after - before

    @property
    def epoch_ends(self) -> list[int]:
        each = self.rhythm.steps_per_epoch
        if not each:
            return []
        below = self.step - self.origin.step - self.rhythm.steps_into(self.target.batch) % each
        return [horizon for horizon in (below, below + each) if horizon > 0]

    def schedule_count(self, path: TreePath) -> int | None:
        if len(path) != 2 or path[0] != "lr_schedulers":  # noqa: PLR2004 - the key and a number
            return None
        rule, count = self.rhythm.schedules[path[1]], self.origin.schedules[path[1]]
        if rule is None or count is None:
            return None
        moved = self.rhythm.schedule_count(rule, self.target) - self.rhythm.schedule_count(rule, self.origin.place)
        return int(count + moved)

    def optimizer_count(self, _: float) -> None:
        """By its own rate."""

    def move(self, tree: dict[str, Any]) -> list[tuple[str, int, int]]:
        """Move the loops and the step and epoch beside them: one line for each of the loops' counters."""
        loop = tree["loops"][_FIT]
        before, after = self.rhythm.counts(self.origin.place), self.rhythm.counts(self.target)
        changes = []
        for key, more in (("epoch", self.epochs), ("global_step", self.step - self.origin.step)):
            if isinstance(tree.get(key), int) and more:
                changes.append((key, tree[key], tree[key] + more))
                tree[key] += more
        for name, counts in after.items():
            moved = list(_move(loop[name], before[name], counts, (name,)))
            if moved:
                (_, old, new), names = moved[0], listed((where for where, _, _ in moved), most=1)
                changes.append((f"loops.{names}", old, new))
        return changes

    def notes(self, _: str, tree: dict[str, Any]) -> Iterator[str]:
        rhythm, target = self.rhythm, self.target
        if rhythm.batches is None:
            yield (
                "the snapshots do not tell how long an epoch is, none of them having seen one end:"
                f" at step {self.step} the present one counts as not ended"
            )
        elif target.batch != rhythm.batches:
            ends = " or ".join(f"--horizon {horizon}" for horizon in self.epoch_ends)
            yield (
                f"step {self.step} lies within epoch {tree.get('epoch', target.epoch)}, at batch {target.batch} of {rhythm.batches}:"
                " Lightning's plain DataLoader starts its data again there and repeats this epoch's data"
                + (f"; {ends} ends with an epoch" if ends else "")
            )
        if tree["loops"][_FIT].get("state_dict"):
            yield "loops: the data loader's state stays at the origin, so the data continues from there"
        if rhythm.per_batch is None and None in rhythm.schedules:
            yield "loops: scheduler_progress ignores a schedule whose pattern the snapshots do not show; nothing resumes from it"
        yield from _unexplained(self)


class StillLoops:
    """Loops whose rhythm is not known: they stay, and no rate moves them."""

    paths = (("loops",),)
    epoch_ends = ()

    def move(self, _: object) -> tuple[()]:
        return ()

    def notes(self, name: str, _: object) -> Iterator[str]:
        yield f"{name}: loops stay at the origin: their pattern is unknown; the trainer continues counting from there"

    def schedule_count(self, _: TreePath) -> None:
        return None

    def optimizer_count(self, _: float) -> None:
        return None


def loops_clock(states: Sequence[tuple[int, Any]], target: int) -> LoopsClock | StillLoops | None:
    """The clock of a Lightning run's loops from the last of its states, (step, tree), to step `target`."""
    tree = states[-1][1]
    if not is_lightning(tree) or "loops" not in tree:
        return None
    return _known_clock(states, target) or StillLoops()


def _known_clock(states: Sequence[tuple[int, Any]], target: int) -> LoopsClock | None:
    found = read_rhythm(states)
    if found is None:
        return None
    rhythm, seen = found
    return LoopsClock(rhythm, tuple(seen), rhythm.place_after(seen[-1].place, target - seen[-1].step), target)


def _move(found: Counts, before: Counts, after: Counts, path: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Set what starts again with every epoch; move the rest by what the rhythm adds."""
    for key, value in found.items():
        if key not in after:
            continue
        if isinstance(value, dict):
            yield from _move(value, before[key], after[key], (*path, key))
            continue
        again = isinstance(value, bool) or _starts_again(path)
        new = after[key] if again else value + after[key] - before[key]
        if new != value:
            yield ".".join((*path, key)), value, new
        found[key] = new


def _starts_again(path: tuple[str, ...]) -> bool:
    """With every epoch. Validation's totals do as well; epochs and the steps of manual optimization never."""
    return path[0] == _VALIDATION or ("current" in path and path[0] not in {_EPOCH, _MANUAL})


def _unexplained(clock: LoopsClock) -> Iterator[str]:
    """Counts within the epoch that the rhythm does not give at the origin itself."""
    expected = clock.rhythm.counts(clock.origin.place)
    for name in (_BATCH, _OPTIMIZER, _SCHEDULER, _VALIDATION):
        if name == _SCHEDULER and None in clock.rhythm.schedules:
            continue
        if name in expected and (odd := next(_differences(clock.origin.loop[name], expected[name]), None)):
            where, found, value = odd
            yield f"loops: {name}.{where} is {found} at the origin, expected {value} by the run's pattern: set to the expected value"
    if _VALIDATION not in expected and clock.origin.loop[_VALIDATION]["current"]["ready"]:
        yield f"loops: {_VALIDATION} is unchanged: no regular distance explains it"


def _differences(found: Counts, expected: Counts, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in found.items():
        if isinstance(value, dict) and key != "total":
            yield from _differences(value, expected[key], f"{path}{key}.")
        elif "current" in path and key in expected and value != expected[key]:
            yield f"{path}{key}", value, expected[key]


def steps_to_end(tree: Any, num_epochs: int) -> int | None:
    """Optimizer steps from a checkpoint to the end of a run of so many epochs; None where it does not tell."""
    found = read_rhythm([(0, tree)])
    each = found[0].steps_per_epoch if found else None
    if found is None or not each:
        return None
    place = found[1][-1].place
    return (num_epochs - place.epoch) * each - found[0].steps_into(place.batch)


def epoch_after(tree: Any, horizon: int) -> int | None:
    """What Lightning calls the epoch `horizon` steps on, as it does in a checkpoint's name; None where nothing tells."""
    clock = _known_clock([(0, tree)], horizon) if is_lightning(tree) else None
    if clock is None or not isinstance(tree.get("epoch"), int):
        return None
    return int(tree["epoch"]) + clock.epochs
