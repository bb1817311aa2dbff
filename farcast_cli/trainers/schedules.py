"""Learning-rate schedules, stepped on from their saved state.

torch_schedules.py steps a schedule of torch's own as often as training would, without torch. So what is written is to the
last bit what torch would have written. Formulas are not: most of torch's schedules compute the next rate from the one
before, and rounding adds up. After 5,000 steps StepLR is off its formula by 4e-16 of the rate, LinearLR and ExponentialLR by
3e-15, PolynomialLR by 6e-15, CosineAnnealingLR by 3e-13. Only CosineAnnealingWarmRestarts, OneCycleLR and CyclicLR compute
each rate from the count.

A LambdaLR (all of transformers' schedules) holds no formula: its counters move, and its rates are worked out by finding
the formula of formulas.py that explains every rate seen so far. What cannot be worked out is said.

Source: torch/optim/lr_scheduler.py; transformers/optimization.py.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import UsageError
from farcast_cli.formats.tree import at
from farcast_cli.trainers.falls import shapes
from farcast_cli.trainers.formulas import (
    FormulaInputs,
    constant_with_warmup,
    cosine,
    geometric,
    held,
    linear,
    rise_hold_fall,
    rising,
)
from farcast_cli.trainers.torch_schedules import schedule_name, step_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.trainers.formulas import Formula


TOLERANCE = 1e-9  # relative; a formula that is the right one agrees to rounding
MAX_WARMUP = 1_000_000_000
MAX_COUNT = 10_000_000  # steps at once, some minute; a counter that claims more is damaged
MIN_FOR_A_FACTOR = 3  # observations; any two lie on a geometric curve
MIN_ON_A_FALL = 3  # observations; any two lie on a line, and on a half wave

LAMBDA_NOTE = (
    "the file does not store its formula: the first resumed step uses the old learning rate, later steps are correct"
    " (a MultiplicativeLR, whose file looks the same, stays wrong)"
)
NO_GROUPS_NOTE = "keeps its rates in the optimizer, which the file lacks: only counters are advanced"
INFERRED_NOTE = "its rate at the valid step is computed from the rates of the last snapshots: check the first resumed step"
PLATEAU_NOTE = "depends on a metric: its learning rate does not change"


@dataclass(frozen=True, slots=True)
class Observation:
    """The learning rates of all groups after `step` steps of the schedule."""

    step: int
    rates: tuple[float, ...]


_RATES_IN_GROUPS = {"OneCycleLR", "SWALR"}
_WITHOUT_FORMULA = {"LambdaLR", "ReduceLROnPlateau"}


def is_scheduler_state(tree: object) -> bool:
    """Whether it is a schedule's state: its count with its rates, a chain, or the count alone, as torchtitan saves it."""
    if not isinstance(tree, dict):
        return False
    known = any(key in tree for key in ("_last_lr", "base_lrs", "_schedulers"))
    return (("last_epoch" in tree or "_schedulers" in tree) and known) or tree.keys() == {"last_epoch"}


def with_rates(state: dict[str, Any], optimizers: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A schedule's state with the rates that its optimiser's groups have, where it holds none and there is one optimiser."""
    if state.keys() != {"last_epoch"} or len(optimizers) != 1 or not all("initial_lr" in group for group in optimizers[0]):
        return state
    (groups,) = optimizers
    return state | {"base_lrs": [group["initial_lr"] for group in groups], "_last_lr": [group["lr"] for group in groups]}


def counter_path(state: object) -> TreePath:
    """Where a schedule's state counts its steps: itself, or (a chain) in its first member."""
    if isinstance(state, dict) and "last_epoch" not in state and state.get("_schedulers"):
        return ("_schedulers", 0, *counter_path(state["_schedulers"][0]))
    return ("last_epoch",)


def _counter(state: dict[str, Any]) -> int:
    return int(at(state, counter_path(state)))


def advance_scheduler(
    state: dict[str, Any],
    groups: list[dict[str, Any]],
    target: int,
    *,
    total_steps: int | None = None,
    observations: Sequence[Observation] = (),
    named: Formula | None = None,
) -> str:
    """Move a schedule's state, in place, to `target` steps, and the groups' learning rates with it.

    Args:
        groups: the optimiser's parameter groups; may be empty, where the file holds none.
        total_steps: the length of the whole run, where the trainer says it.
        observations: what the schedule was seen to do, the present state among them.
        named: the formula that the run's arguments name; believed where it explains what was seen.

    Returns:
        What could not be done, in words; empty where everything is exact.
    """
    counter, name = _counter(state), schedule_name(state)
    if name == "ReduceLROnPlateau":
        state["last_epoch"] = target
        return PLATEAU_NOTE
    if name in _RATES_IN_GROUPS and not groups:
        state["_step_count"] += target - counter
        state["last_epoch"] = target
        return NO_GROUPS_NOTE
    if name == "LambdaLR":
        return _advance_lambda(state, groups, target, _Known(observations, total_steps, named))
    _step_on(state, groups, target - counter)
    return LAMBDA_NOTE if _holds_lambda(state) else ""


# --- where a schedule ends -------------------------------------------------------------------------------------------

_ENDS: dict[str, tuple[str, Callable[[dict[str, Any], int, int], bool]]] = {
    "CosineAnnealingLR": ("T_max", lambda state, count, end: count == end and state["eta_min"] == 0),
    "OneCycleLR": ("total_steps", lambda _, count, end: count >= end - 1),
    "LinearLR": ("total_iters", lambda state, count, end: count >= end and state["end_factor"] == 0),
    "PolynomialLR": ("total_iters", lambda _, count, end: count >= end),
}
"""By class of torch: the key of its last count, and whether it has ended: at a rate of 0, or where it has no more steps.

A CosineAnnealingLR that is stepped beyond T_max rises again. A run whose count is past T_max does so on purpose.
"""


def ended_at(state: dict[str, Any]) -> tuple[str, int] | None:
    """What says that a schedule has ended at its present count, as `CosineAnnealingLR.T_max`, and its value; None if it goes on."""
    name, members = schedule_name(state), state.get("_schedulers") or []
    if name == "SequentialLR":
        milestones = state["_milestones"]
        return ended_at(members[-1]) if milestones and _counter(state) >= milestones[-1] else None
    if name == "ChainedScheduler":
        return next(filter(None, map(ended_at, members)), None)
    if name not in _ENDS:
        return None
    key, has_ended = _ENDS[name]
    end = state[key]
    return (f"{name}.{key}", end) if has_ended(state, state["last_epoch"], end) else None


def rises_after(state: dict[str, Any], target: int) -> int | None:
    """The count at T_max of a CosineAnnealingLR, after which its rate rises, if a schedule at `target` is the first past it."""
    before, begin, member = _counter(state), 0, state
    if schedule_name(state) == "SequentialLR" and state["_milestones"]:
        begin, member = state["_milestones"][-1], state["_schedulers"][-1]
    if schedule_name(member) != "CosineAnnealingLR":
        return None
    turn: int = begin + member["T_max"]
    return turn if before <= turn < target else None


# --- schedules that hold their formula -------------------------------------------------------------------------------


def _holds_lambda(state: dict[str, Any]) -> bool:
    return any(schedule_name(inner) in _WITHOUT_FORMULA or _holds_lambda(inner) for inner in state.get("_schedulers", []))


def _step_on(state: dict[str, Any], groups: list[dict[str, Any]], count: int) -> None:
    if count > MAX_COUNT:
        raise UsageError(f"the learning-rate schedule needs {count} steps, which takes too long", hint="--counters keep")
    moved, own, done = copy.deepcopy(state), _own_groups(state, groups), 0
    try:
        for done in range(count):  # noqa: B007 - where the schedule ends, it tells how far it came
            step_once(moved, own)
    except ValueError as error:
        raise UsageError(
            f"the learning-rate schedule ends before the valid step: {error}",
            hint=f"a horizon that ends {count - done} steps earlier, or --counters keep",
        ) from error
    state.update(moved)
    for group, new in zip(groups, own, strict=False):
        group.update({key: new[key] for key in group if key != "params" and key in new})


def rates_ahead(state: dict[str, Any], groups: list[dict[str, Any]], count: int) -> list[tuple[float, ...]]:
    """The groups' rates at a schedule's present count and at each of the `count` counts after it; the state stays as it is.

    Fewer where the schedule ends before; none where the state does not hold the formula.
    """
    name = schedule_name(state)
    unknown = name in _WITHOUT_FORMULA or _holds_lambda(state)
    if unknown or (name in _RATES_IN_GROUPS and not groups):
        return []
    moved, own = copy.deepcopy(state), _own_groups(state, groups)
    rates = [tuple(group["lr"] for group in own)]
    with suppress(ValueError):  # OneCycleLR's, at its end
        for _ in range(min(count, MAX_COUNT)):
            step_once(moved, own)
            rates.append(tuple(group["lr"] for group in own))
    return rates


def _own_groups(state: dict[str, Any], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the groups; where the file holds none, groups with the schedule's own rates."""
    base = _base_rates(state)
    rates = state.get("_last_lr") or base
    if not groups:
        return [{"lr": lr, "initial_lr": first} for lr, first in zip(rates, base or rates, strict=False)]
    first_rates = [base[min(index, len(base) - 1)] if base else group["lr"] for index, group in enumerate(groups)]
    return [{"initial_lr": first, **copy.deepcopy(group)} for first, group in zip(first_rates, groups, strict=True)]


def _base_rates(state: dict[str, Any]) -> list[float]:
    if state.get("base_lrs"):
        return list(state["base_lrs"])
    return next((rates for inner in state.get("_schedulers", []) if (rates := _base_rates(inner))), [])


# --- LambdaLR --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """What tells the formula of a LambdaLR."""

    observations: Sequence[Observation]
    total_steps: int | None
    named: Formula | None


def _advance_lambda(state: dict[str, Any], groups: list[dict[str, Any]], target: int, known: _Known) -> str:
    """Move the counters, and each group's rate by the formula that explains it."""
    count = target - state["last_epoch"]
    state["last_epoch"] = target
    if isinstance(state.get("_step_count"), int):
        state["_step_count"] += count
    base, rates = list(state.get("base_lrs") or []), list(state.get("_last_lr") or [])
    note, is_sure = "", known.total_steps is not None
    for index, first in enumerate(base[: len(rates)]):
        seen = [(o.step, o.rates[index]) for o in known.observations if index < len(o.rates)]
        rate = infer_rate(seen, first, target, known.total_steps, named=known.named)
        is_sure = is_sure and (known.named is None or _is_of(known.named, _factors(seen, first)))
        if rate is None:
            note = LAMBDA_NOTE
            continue
        rates[index] = rate
        if index < len(groups):
            groups[index]["lr"] = rate
    if "_last_lr" in state:
        state["_last_lr"] = rates
    if rates and not note and not is_sure:
        return INFERRED_NOTE
    return note if rates else LAMBDA_NOTE


def infer_rate(
    seen: Sequence[tuple[int, float]], base: float, target: int, total_steps: int | None, *, named: Formula | None = None
) -> float | None:
    """The learning rate at `target` by the first formula that explains all (step, rate) seen; None where none does."""
    formula = find_formula(seen, base, total_steps, named=named)
    factor = formula(target) if formula else math.nan
    return base * factor if math.isfinite(factor) else None


def find_formula(
    seen: Sequence[tuple[int, float]], base: float, total_steps: int | None, *, named: Formula | None = None
) -> Formula | None:
    """The first formula, a factor of `base` by the count of steps, that explains all (step, rate) seen; None where none does."""
    factors = _factors(seen, base)
    if len(factors) < 2:  # noqa: PLR2004 - one point fits anything
        return None
    candidates = _formulas(factors, total_steps)
    return named if named and _is_of(named, factors) else next((one for one in candidates if _explains(one, factors)), None)


def _factors(seen: Sequence[tuple[int, float]], base: float) -> list[tuple[int, float]]:
    return sorted({(step, rate / base) for step, rate in seen}) if base else []


def _is_of(named: Formula, factors: Sequence[tuple[int, float]]) -> bool:
    """Whether a formula that is named is the run's: of one resumed with other arguments it explains the last rates alone."""
    last = factors[-MIN_ON_A_FALL:]
    tells = len({factor for _, factor in last}) == MIN_ON_A_FALL
    return _explains(named, factors) or (tells and _explains(named, last))


def _explains(formula: Formula, factors: Sequence[tuple[int, float]]) -> bool:
    return all(math.isclose(formula(step), factor, rel_tol=TOLERANCE, abs_tol=1e-12) for step, factor in factors)


def _formulas(seen: Sequence[tuple[int, float]], total: int | None) -> Iterator[Formula]:
    """Transformers' schedules with every warm-up that the observations allow; then other shapes, and a constant factor per step."""
    last, factor = seen[-1]
    if len({value for _, value in seen}) == 1:
        yield partial(held, factor=factor)
    peaks = list(_peaks(seen))
    yield from (partial(constant_with_warmup, run=FormulaInputs(warmup)) for warmup in peaks if last >= warmup)
    for end in [total] if total is not None else _ends(seen, lambda factor: 1 - factor):
        warmups = _whole(end - (end - last) / factor if factor and last < end else None)
        yield from (partial(linear, run=FormulaInputs(warmup, end)) for warmup in warmups if last >= warmup)
    for end in [total] if total is not None else _ends(seen, _progress):
        progress = _progress(factor) if last < end else 1.0
        warmups = _whole((last - progress * end) / (1 - progress) if progress < 1 else None)
        yield from (partial(cosine, run=FormulaInputs(warmup, end)) for warmup in warmups if last >= warmup)
    yield from (partial(rising, run=FormulaInputs(warmup)) for warmup in peaks)
    yield from (partial(rise_hold_fall, shape=shape) for shape in shapes(seen))
    if len(seen) >= MIN_FOR_A_FACTOR and factor > 0 and seen[0][1] > 0:
        yield partial(geometric, last=last, factor=factor, per_step=(factor / seen[0][1]) ** (1 / (last - seen[0][0])))


def _progress(factor: float) -> float:
    """How far along a half wave is at a factor."""
    return math.acos(2 * factor - 1) / math.pi if 0 < factor < 1 else 1.0


def _ends(seen: Sequence[tuple[int, float]], progress: Callable[[float], float]) -> Iterator[int]:
    """Where the fall ends that the last observations lie on, if its progress is straight: three tell it from chance."""
    falling = [(step, progress(factor)) for step, factor in seen if 0 < factor < 1]
    if len(falling) >= MIN_ON_A_FALL:
        (s0, p0), (s1, p1) = falling[-MIN_ON_A_FALL], falling[-1]
        yield from _whole(s1 + (1 - p1) * (s1 - s0) / (p1 - p0) if p1 > p0 else None)


def _peaks(seen: Sequence[tuple[int, float]]) -> Iterator[int]:
    """The warm-up length that an observation on its way up tells."""
    for step, factor in seen:
        if 0 < factor < 1:
            yield from _whole(step / factor)
            return


def _whole(value: float | None) -> Iterator[int]:
    if value is not None and math.isfinite(value) and -1 < value < MAX_WARMUP:
        yield max(0, round(value))
