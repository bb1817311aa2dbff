"""Moving a trainer's state h steps on: counters, learning-rate schedules and the optimiser's own step.

Works on the object trees of state files alone (trainer_state.json, optimizer.pt, scheduler.pt, a plain payload), so
that a layout only has to say which files hold state. Each counter is moved by its own rate, measured between
snapshots. Optimiser moments are never forecast: copied they do as well as the true ones, extrapolated they do harm.
"""

from __future__ import annotations

import copy
import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, listed
from farcast_cli.files.reading import read_bytes
from farcast_cli.formats.dcp_file import DcpFile
from farcast_cli.formats.pickled_module import is_module
from farcast_cli.formats.torch_pickle import Made, StorageRef, TensorRef, is_streamable, iter_storages, iter_tensors
from farcast_cli.formats.tree import at, dotted, find, is_below, put, walk
from farcast_cli.state.counters import MIN_TO_COUNT, epoch_at, extrapolate, in_epochs, is_steady, schedule_count_at
from farcast_cli.state.files import (
    STATE_ROLES,
    StateHistory,
    as_numbers,
    load_histories,
    numbers_in,
    observation,
    optimizer_states,
    param_groups,
    schedule_at,
    scheduler_paths,
)
from farcast_cli.state.pickled import pickled_at
from farcast_cli.state.places import places_at
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.base import LeapMark
from farcast_cli.trainers.schedules import (
    INFERRED_NOTE,
    advance_scheduler,
    counter_path,
    infer_rate,
    is_scheduler_state,
    rises_after,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from fractions import Fraction

    from farcast_cli.choices import CountersMode, OptimizerMode
    from farcast_cli.formats.torch_file import TorchFile
    from farcast_cli.formats.tree import TreePath
    from farcast_cli.tensors import TensorEntry
    from farcast_cli.trainers.base import Clock, Part, Snapshot, Trainer


HISTORY = 8  # snapshots that a counter's rate is measured on
_FLOAT_COUNTERS = {"epoch", "step", "total_flos", "weight_sum"}  # the last one is of the mean in Schedule-free
_NOT_A_COUNTER = re.compile(r"best|seed|^max_|^num_train_epochs$|^(?:logging|save|eval)_steps$|^log_history$|^_growth_tracker$")
_STARTS_AGAIN = re.compile(r"patience|wait_count|bad_epoch|in_epoch|since|remaining")
"""Keys of what starts again from zero, though it may rise with the step for a while."""
_OPAQUE = "bytes with more than counts that rise with the step, such as the place in the data: a resumed loop gets the origin's"
_OBJECT = "an object of the loop's own class {}, whose numbers change along the run"
_MAY_SCHEDULE = re.compile(r"sched|state|meta|train|\.(?:pkl|pickle)$", re.IGNORECASE)
"""Names of files that may hold a schedule where they could not be read."""
_SCHEDULE = re.compile(r"schedulers?$|schedules?$|lr_sched$", re.IGNORECASE)
"""Keys of a schedule's state."""
_FIRST_MOMENTS = {"exp_avg", "momentum_buffer", "exp_inf"}
_PACK = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}

StorageSpan = tuple[str, int, int]


_MARKED_ROLES = frozenset({"trainer-state", "state"})
"""Of the files in which a trainer carries a mark on."""


@dataclass(frozen=True, slots=True)
class Change:
    """One value that was rewritten, for people and for the sidecar."""

    where: str
    old: int | float
    new: int | float


@dataclass(slots=True)
class StateTree:
    """A state file's tree after the leap, with the tensors that change: new bytes, zeros, or a forecast.

    All are kept by what they replace: (storage key, first element, elements).
    """

    part: Part
    tree: Any
    file: TorchFile | None
    literals: dict[StorageSpan, bytes] = field(default_factory=dict)
    zeroed: set[StorageSpan] = field(default_factory=set)
    forecast: Mapping[StorageSpan, tuple[TensorEntry, int]] = field(default_factory=dict)
    """Second copies of the weights: each is forecast tensor number so many of the engine's inputs."""

    @property
    def name(self) -> str:
        """What people know the file by."""
        return self.part.name or self.part.path.name


@dataclass(slots=True)
class Advanced:
    """The origin's state files after the leap, by part name, and what was done."""

    trees: dict[str, StateTree]
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    """Counters that changed along the run and were not moved."""


def advance(
    snapshots: Sequence[Snapshot],
    horizon: int,
    *,
    optimizer: OptimizerMode = "copy",
    counters: CountersMode = "advance",
    is_marked: bool = False,
    copies: Mapping[str, Mapping[StorageSpan, tuple[TensorEntry, int]]] | None = None,
) -> Advanced:
    """The state of the last snapshot as it should be `horizon` steps later.

    Args:
        snapshots: the last few up to the origin, in order; rates are measured on them.
        is_marked: the trainer's own state bears a mark of the leap, if the trainer carries such a mark on.
        copies: second copies of the weights that are forecast, by the name of their part.
    """
    origin, copies = snapshots[-1], copies or {}
    trainer = trainer_of(origin)
    histories = load_histories(snapshots[-HISTORY:])
    result = Advanced(
        {
            name: StateTree(
                part,
                copy.deepcopy(histories[name].states[-1][1]),
                histories[name].states[-1][2],
                forecast=copies.get(name, {}),
            )
            for name, part in ((part.name, part) for part in origin.parts if part.role in STATE_ROLES)
        },
        notes=list(origin.notes),
    )
    if counters == "advance":
        target = origin.step + horizon
        clocks = {name: trainer.clock([state[:2] for state in history.states], target) for name, history in histories.items()}
        for name, state in result.trees.items():
            _advance_counters(state, histories[name], target, result, clocks[name])
        result.notes.extend(_left_behind(origin, target, result))
        _advance_schedules(result, histories, origin, target, clocks)
    if optimizer == "drop" and trainer.needs_optimizer:
        result.notes.append(f"optimizer state emptied instead of left out: {trainer.needs_optimizer}")
        optimizer = "reset"
    for state in result.trees.values():
        _treat_optimizers(state, optimizer, result, trainer)
    if is_marked:
        target = origin.step + horizon
        mark = LeapMark(target if counters == "advance" else origin.step, origin.step, target)
        for state in result.trees.values():
            if state.part.role in _MARKED_ROLES:
                trainer.mark(state.tree, mark)
    result.trees = {name: state for name, state in result.trees.items() if _is_rewritten(state, histories[name])}
    return result


@contextmanager
def told_as_damage(origin: Snapshot) -> Iterator[None]:
    """A trainer's state that is not what it should be may raise anything at all; none of it is ours."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{origin.path}: its trainer's state cannot be advanced: {type(error).__name__}: {error}",
            hint="the state is damaged: --counters keep forecasts the weights only, or leave the snapshot out with --steps",
        ) from error


def _is_rewritten(state: StateTree, history: StateHistory) -> bool:
    """Whether a state file is another than the origin's, which is copied as it is otherwise."""
    return (
        state.part.role == "state"
        or isinstance(state.part.content, DcpFile)
        or bool(state.literals or state.zeroed or state.forecast)
        or state.tree != history.states[-1][1]
    )


def advance_batch_counts(snapshots: Sequence[Snapshot], horizon: int) -> dict[str, Change]:
    """Counters among the weights by tensor name, such as BatchNorm's `num_batches_tracked`, moved on by their own rates."""
    moved = {}
    for name, entry in snapshots[-1].tensors.items():
        if entry.dtype.name == "int64" and entry.num_elements == 1:
            entries = [(s.step, s.tensors[name]) for s in snapshots[-HISTORY:] if name in s.tensors]
            series = [(step, struct.unpack("<q", read_bytes(e.path, e.offset, 8))[0]) for step, e in entries]
            new = _buffer_at(name, series, snapshots[-1].step + horizon)
            if new is not None:
                moved[name] = Change(name, series[-1][1], int(new))
    return moved


def _buffer_at(name: str, series: Sequence[tuple[int, int]], target: int) -> int | Fraction | None:
    """A counter among the weights; one that is no BatchNorm's has to rise steadily, or it is none."""
    if is_steady(series) and (len(series) >= MIN_TO_COUNT or _is_batch_count(name)):
        return extrapolate(series, target)
    by_epochs = in_epochs(series, target)
    return extrapolate(series, target) if by_epochs is None and _is_batch_count(name) else by_epochs


def _is_batch_count(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


# --- counters --------------------------------------------------------------------------------------------------------


def _advance_counters(state: StateTree, history: StateHistory, target: int, result: Advanced, clock: Clock | None) -> None:
    if state.part.role == "state" and state.part.is_bare:
        return  # a bare state dict: weights and buffers, no counters
    name = state.name
    result.notes.extend(f"{name}: {path} is copied as the origin has it: {why}" for path, why in _opaque(state.tree, history))
    apart = _advance_apart(state, history, target, result, clock)
    adam: list[Change] = []
    for path, value in list(_counters(state.tree, skip=state.part.weights_paths)):
        series = history.series(path)
        if (
            is_below(path, apart)
            or not _counts(series, is_new=_is_new(state.tree, path, history))
            or _is_measured(path, value, series)
        ):
            continue  # a setting or a loss, not a counter
        where = f"{name}: {dotted(path)}"
        told = clock.optimizer_count(series[-1][1]) if clock and _is_adam_step(path) else None
        new = moved(path, value, series, target) if told is None else told
        if new is None:
            result.left.add(where)
            result.notes.append(f"{where} stays at {series[-1][1]}: it does not rise in proportion to the steps")
            continue
        if isinstance(value, TensorRef):
            state.literals[place_of(value)] = _packed(value, new)
        else:
            put(state.tree, path, new)
        (adam if _is_adam_step(path) else result.changes).append(Change(where, series[-1][1], new))
    if adam:
        result.changes.append(Change(listed((one.where for one in adam), most=1), adam[0].old, adam[0].new))


def _left_behind(origin: Snapshot, target: int, result: Advanced) -> Iterator[str]:
    """That a counter of steps which disagrees with the step of the run did not move: the trainer goes on from it."""
    names = [state.name for state in result.trees.values()]
    for item in origin.evidence:
        if item.step != origin.step and result.left.intersection(f"{name}: {item.where}" for name in names):
            yield (
                f"caution: {item.where} stays at {item.step}: a training that counts by it resumes at step {item.step}, with the"
                f" weights of {origin.unit} {target}"
            )


def _opaque(tree: object, history: StateHistory) -> Iterator[tuple[str, str]]:
    """Objects of a loop's own classes whose numbers change from snapshot to snapshot; and what they are."""
    for path, node in walk(tree):
        if (
            isinstance(node, Made)
            and not is_module(node)
            and not node.maker.name.startswith("_rebuild_")
            and node.maker.module != "datetime"  # a date, or a time that has passed, is no counter
        ):
            seen = [numbers_in(find(earlier, path)) for _, earlier, _ in history.states]
            if any(len(one) == len(seen[-1]) and one != seen[-1] for one in seen):
                yield dotted(path) or "all", _OBJECT.format(node.maker)


def _advance_apart(
    state: StateTree, history: StateHistory, target: int, result: Advanced, clock: Clock | None
) -> set[TreePath]:
    """Move what has a rule of its own: a trainer's clock, the place in the data; says where these are."""
    apart: set[TreePath] = set()
    if clock:
        apart |= set(clock.paths)
        result.changes.extend(Change(f"{state.name}: {where}", old, new) for where, old, new in clock.move(state.tree))
        result.notes.extend(clock.notes(state.name, state.tree))
    for path in _changing_bytes(state.tree, history):
        loop = pickled_at(history, path, target)
        if loop is None:
            result.notes.append(f"{state.name}: {dotted(path)} is copied as the origin has it: {_OPAQUE}")
        else:
            put(state.tree, path, loop.raw)
            result.changes.extend(Change(f"{state.name}: {dotted((*path, *at))}", old, new) for at, old, new in loop.changes)
    for path, old, count in list(places_at(history, target)):
        if not is_below(path, apart):
            put(state.tree, path, count)
            result.changes.extend([Change(f"{state.name}: {dotted(path)}", old, count)] if count != old else [])
            apart.add(path)
    return apart


def _changing_bytes(tree: object, history: StateHistory) -> list[TreePath]:
    """What a loop pickled by itself, a data loader's place for one, where it changes from snapshot to snapshot."""
    nodes = [(path, node) for path, node in walk(tree) if isinstance(node, bytes)]
    return [path for path, node in nodes if any(find(earlier, path) != node for _, earlier, _ in history.states)]


def _counts(series: Sequence[tuple[int, int | float]], *, is_new: bool) -> bool:
    """Whether a leaf changed over the snapshots; a lone value counts if it is the step itself, and not the newest of a log."""
    return len({value for _, value in series}) > 1 or (len(series) == 1 and series[0][0] == series[0][1] and not is_new)


def _is_new(tree: Any, path: TreePath, history: StateHistory) -> bool:
    """Whether a leaf lies in a list that the earlier snapshots have shorter, as a log is."""
    return len(history.states) > 1 and any(
        isinstance(at(tree, path[:depth]), list) and find(history.states[-2][1], path[: depth + 1]) is None
        for depth in range(len(path))
    )


def _is_measured(path: TreePath, value: object, series: Sequence[tuple[int, int | float]]) -> bool:
    """Whether a float under no counter's name is none: a count kept as a float (tokens seen) rises in whole steady steps."""
    if not isinstance(value, float) or path[-1] in _FLOAT_COUNTERS:
        return False
    return not (len(series) >= MIN_TO_COUNT and all(float(v).is_integer() for _, v in series) and is_steady(series))


def _is_adam_step(path: TreePath) -> bool:
    return path[-1] == "step" and "state" in path


def moved(path: TreePath, value: object, series: Sequence[tuple[int, int | float]], target: int) -> int | float | None:
    """The new value of a counter. Adam's may lag where steps were skipped; other integers must be steady."""
    if _STARTS_AGAIN.search(str(path[-1])):
        return None
    is_float = isinstance(value, float)
    if _is_adam_step(path) or is_steady(series):
        new = extrapolate(series, target)
    elif path[-1] == "epoch" and not is_float:
        new = epoch_at(series, target)
    else:
        new = in_epochs(series, target)
        new = extrapolate(series, target) if new is None and is_float else new
    if new is None:
        return None
    return float(f"{float(new):.12g}") if isinstance(value, float) else int(new)


def _counters(tree: Any, *, skip: Collection[TreePath]) -> Iterator[tuple[TreePath, int | float | TensorRef]]:
    """Every value in a dict that may count: integers, a few floats, and the optimiser's `step` tensors.

    Left out: weights, schedules (they have rules of their own), and whatever remembers a best value.
    """

    def is_looked_at(path: TreePath, node: object) -> bool:
        return is_counter(path) and not (path in skip or is_scheduler_state(node))

    for path, node in walk(tree, enters=is_looked_at):
        if path and _may_count(node, path) and is_counter(path) and isinstance(at(tree, path[:-1]), dict):
            yield path, node


def is_counter(path: TreePath) -> bool:
    """Whether a key may be that of a counter, by its words."""
    return not (path and _NOT_A_COUNTER.search(str(path[-1])))


def _may_count(value: object, path: TreePath) -> bool:
    """Whole numbers anywhere, as a float or a tensor of one element too; an epoch, and the optimiser's `step`."""
    if isinstance(value, float):
        return path[-1] in _FLOAT_COUNTERS or value.is_integer()
    if isinstance(value, TensorRef):
        is_adam = _is_adam_step(path) and value.dtype.name in _PACK
        return prod(value.shape) == 1 and (is_adam or value.dtype.name in {"int64", "int32"})
    return isinstance(value, int) and not isinstance(value, bool)


def place_of(ref: TensorRef) -> StorageSpan:
    """Where a tensor's elements lie in its file's storages."""
    return ref.storage.key, ref.offset, prod(ref.shape)


def _packed(ref: TensorRef, value: float) -> bytes:
    kind = _PACK[ref.dtype.name]
    return struct.pack(kind, value if kind in {"<f", "<d"} else int(value))


# --- schedules and optimisers ----------------------------------------------------------------------------------------


def _advance_schedules(
    result: Advanced,
    histories: Mapping[str, StateHistory],
    origin: Snapshot,
    target: int,
    clocks: Mapping[str, Clock | None],
) -> None:
    """Step every schedule on, and hand its learning rates to the optimiser that it belongs to.

    Rates that are tensors (of compiled optimisers) are worked on as numbers and written back as tensors.
    """
    optimizers = [(state, groups) for state in result.trees.values() for groups in param_groups(state.tree)]
    schedulers = [(name, path) for name, state in result.trees.items() for path in scheduler_paths(state.tree)]
    trainer = trainer_of(origin)
    total, named = trainer.num_steps(origin), trainer.formula(origin)
    set_by: dict[int, str] = {}
    is_told = schedulers or trainer.computes_rates
    if not is_told and (_unread_schedules(origin) or not _infer_rates(result, histories, target, total)):
        result.notes.extend(_rates_left(result, histories, _where_schedules_may_be(origin, result)))
    for index, (name, path) in enumerate(schedulers):
        holder, history = result.trees[name], histories[name]
        saved = find(holder.tree, path)
        where = ".".join([name or origin.path.name, *map(str, path)])
        series = history.series((*path, *counter_path(saved)))
        clock = clocks[name]
        known = clock.schedule_count(path) if clock else None
        new = schedule_count_at(series, target) if known is None else known
        if new is None:
            why = "last_epoch does not rise steadily with the step"
            result.notes.append(f"{where} is unchanged: {why}, and its learning rate stays at the origin's")
            continue
        plain = schedule_at(holder.tree, path, holder.file)
        owners = _owners(plain, optimizers, index if len(optimizers) == len(schedulers) else None, holder.part)
        owner = owners[0] if owners else None
        if owner is None and optimizers:
            result.notes.append(f"{where}: its optimizer is unknown: no learning rate is changed")
        groups = as_numbers(owner[1], owner[0].file) if owner else []
        before = [group["lr"] for group in groups]
        seen = [observation(tree, path, file) for _, tree, file in history.states]
        observations = [item for item in seen if item is not None]
        turn, old = rises_after(plain, int(new)), int(series[-1][1])
        if turn is not None:
            last = origin.step + (target - origin.step) * (turn - old) // (int(new) - old)
            result.notes.append(f"{where}: the learning rate rises again after step {last}, T_max of CosineAnnealingLR")
        note = advance_scheduler(plain, groups, int(new), total_steps=total, observations=observations, named=named)
        result.changes.append(Change(f"{where}: last_epoch", series[-1][1], int(new)))
        result.changes.extend(
            Change("optimizer: lr", old, group["lr"]) for old, group in zip(before, groups, strict=True) if old != group["lr"]
        )
        _write_back(saved, {key: plain[key] for key in saved}, holder)
        for owner in owners:
            _write_back(owner[1], groups, owner[0])
            if set_by.setdefault(id(owner[1]), where) != where:
                other = set_by[id(owner[1])]
                result.notes.append(f"{where}: sets the same rates as {other}: the new rate is approximate")
        if note:
            result.notes.append(f"{where}: {note}")


def _where_schedules_may_be(origin: Snapshot, result: Advanced) -> str:
    """Why a learning rate that follows a schedule cannot be moved on, in words."""
    own = [f"{name}: {key}" for name, state in result.trees.items() for key in _schedule_keys(state.tree)]
    own += [part.name for part in origin.parts if part.role == "scheduler" and part.name in result.trees]
    if own:
        return f"the schedule in {listed(own)} is of a kind that farcast does not know"
    unread = _unread_schedules(origin)
    return f"a schedule may be in {listed(unread)}, which is copied" if unread else "no schedule is saved"


def _unread_schedules(origin: Snapshot) -> list[str]:
    """The files that are copied unread and may hold a schedule, by their names."""
    return [part.name for part in origin.parts if part.role == "other" and _MAY_SCHEDULE.search(part.name)]


def _schedule_keys(tree: Any) -> Iterator[str]:
    """Keys that say that a schedule's state lies under them."""
    return (dotted(path) for path, node in walk(tree) if path and node and _SCHEDULE.search(str(path[-1])))


def _infer_rates(result: Advanced, histories: Mapping[str, StateHistory], target: int, total: int | None) -> bool:
    """Set the rates that moved by the formula that explains them from those that the groups began with; whether it did.

    A schedule that no file tells of may compute each rate from the one before, as mmengine's do.
    """
    found: list[tuple[StateTree, dict[str, Any], float, float]] = []
    for name, state in result.trees.items():
        groups = [group for one in param_groups(state.tree) for group in one]
        rows = [(step, _rates_of(tree, file)) for step, tree, file in histories[name].states]
        if any(len(rates) != len(groups) for _, rates in rows):
            return False
        for index, group in enumerate(groups):
            seen = [(step, rates[index][0]) for step, rates in rows]
            first = rows[-1][1][index][1]
            if len({rate for _, rate in seen}) > 1:
                rate = infer_rate(seen, first, target, total) if first else None
                if rate is None:
                    return False
                found.append((state, group, seen[-1][1], rate))
    for state, group, old, rate in found:
        _write_back(group, {"lr": rate}, state)
        result.changes.append(Change("optimizer: lr", old, rate))
    if found:
        result.notes.append(f"optimizer: {INFERRED_NOTE}")
    return bool(found)


def _rates_of(tree: Any, file: TorchFile | None) -> list[tuple[float, float]]:
    """The rate of each parameter group, and the one that it began with; 0 where that is not kept."""
    groups = (group for one in param_groups(tree) for group in as_numbers(one, file))
    return [(float(group["lr"]), float(group.get("initial_lr") or 0)) for group in groups]


def _rates_left(result: Advanced, histories: Mapping[str, StateHistory], why: str) -> Iterator[str]:
    """Learning rates that moved along the run, where no file says by what schedule."""
    for name, state in result.trees.items():
        _, first, file = histories[name].states[0]
        earlier = StateTree(state.part, first, file)
        for before, groups in zip(param_groups(first), param_groups(state.tree), strict=False):
            old, new = (
                [g["lr"] for g in as_numbers(tree, holder.file)] for tree, holder in ((before, earlier), (groups, state))
            )
            if old != new:
                yield f"{state.name}: the learning rate stays at {new[0]:.6g}: {why}; a loop that sets the rate at each step corrects it"


def _owners(
    schedule: dict[str, Any], optimizers: Sequence[tuple[StateTree, list[dict[str, Any]]]], index: int | None, part: Part
) -> Sequence[tuple[StateTree, list[dict[str, Any]]]]:
    """The optimiser whose rates the schedule in a part last set; all pieces of one; by position where that tells nothing."""
    rates = schedule.get("_last_lr")
    fitting = [
        (state, groups) for state, groups in optimizers if [g.get("lr") for g in as_numbers(groups, state.file)] == rates
    ]
    if fitting and not part.is_shard and all(state.part.is_shard for state, _ in fitting):
        return fitting
    if index is not None and (not fitting or optimizers[index] in fitting):
        return [optimizers[index]]
    if len(fitting) == 1 or (fitting and index is not None):
        return fitting[:1]
    return optimizers if len(optimizers) == 1 else ()


_NESTED = (dict, list, TensorRef)


def _write_back(saved: Any, moved: Any, state: StateTree) -> None:
    """Put moved numbers into a state's tree; where a tensor holds the number, into the tensor's bytes.

    Lists of numbers are replaced, not filled: a schedule and its members may share one.
    """
    for key in moved if isinstance(moved, dict) else range(len(moved)):
        old = saved[key]
        if isinstance(old, TensorRef):
            if isinstance(moved[key], (int, float)) and old.dtype.name in _PACK:
                state.literals[place_of(old)] = _packed(old, moved[key])
        elif isinstance(old, dict) or (isinstance(old, list) and any(isinstance(x, _NESTED) for x in old)):
            _write_back(old, moved[key], state)
        else:
            saved[key] = moved[key]


def _treat_optimizers(state: StateTree, mode: OptimizerMode, result: Advanced, trainer: Trainer) -> None:
    if (isinstance(state.part.content, DcpFile) or state.part.is_shard) and mode in {"drop", "reset"}:
        _zero_optimizers(state, result)
        return
    if mode == "drop":
        _drop_optimizer(state, result, trainer)
    for optimizer in optimizer_states(state.tree):
        if mode == "reset":
            optimizer["state"] = {}
            result.notes.append("optimizer state reset: moments are zero, learning rates are kept")
        elif mode == "zero-momentum":
            refs = [ref for path, ref in iter_tensors(optimizer["state"]) if _FIRST_MOMENTS.intersection(path[-2:])]
            state.zeroed |= {place_of(ref) for ref in refs if is_streamable(ref)}
            result.notes.append(f"{len(refs)} first moments set to zero")


def _zero_optimizers(state: StateTree, result: Advanced) -> None:
    """An optimiser as it was when it was new, all its keys in their places: a loader that misses one stops."""
    refs = [ref for optimizer in optimizer_states(state.tree) for _, ref in iter_tensors(optimizer["state"])]
    places = {place_of(ref) for ref in refs} - state.forecast.keys()  # zeros would be the weights of the next step
    state.literals = {place: data for place, data in state.literals.items() if place not in places}
    state.zeroed |= places
    if places:
        result.notes.append(f"{len(places)} optimizer tensors set to zero instead of left out: the loader needs every key")


def _drop_optimizer(state: StateTree, result: Advanced, trainer: Trainer) -> None:
    if state.part.role == "optimizer":
        result.dropped.add(state.part.name)
        then = f": {trainer.without_optimizer}" if trainer.without_optimizer else ""
        result.notes.append(f"{state.part.name} left out{then}")
    elif state.part.role == "state" and isinstance(state.tree, dict):
        for key in [key for key, value in state.tree.items() if any(optimizer_states(value))]:
            del state.tree[key]
            result.notes.append(f"{key!r} left out")


# --- trees -----------------------------------------------------------------------------------------------------------


def storages_of(tree: object) -> list[StorageRef]:
    """The storages that a tree still refers to, each once, in order."""
    found = (ref.storage if isinstance(ref, TensorRef) else ref for ref in iter_storages(tree))
    return list({storage.key: storage for storage in found}.values())
