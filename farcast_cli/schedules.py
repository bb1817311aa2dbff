"""Learning-rate schedules, stepped on from their saved state.

A schedule of torch's own is recognised by the keys of its state, rebuilt on a stand-in optimiser and stepped as often
as training would: exact, because many of torch's schedules compute the next rate from the one before. A LambdaLR (all
of transformers' schedules) holds no formula: its counters move, and its rate is worked out by finding the formula
that explains every rate seen so far.

Source: torch/optim/lr_scheduler.py; transformers/optimization.py.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOLERANCE = 1e-9  # relative; a formula that is the right one agrees to rounding
_MAX_WARMUP_CANDIDATES = 1_000_000


@dataclass(frozen=True, slots=True)
class Observation:
    """The learning rate of the first group after `step` steps of the schedule."""

    step: int
    rate: float


SIGNATURES = {
    "SequentialLR": {"_schedulers", "_milestones"},
    "ChainedScheduler": {"_schedulers"},
    "OneCycleLR": {"_schedule_phases"},
    "CyclicLR": {"step_ratio", "total_size"},
    "CosineAnnealingWarmRestarts": {"T_0", "T_mult", "T_cur"},
    "CosineAnnealingLR": {"T_max", "eta_min"},
    "MultiStepLR": {"milestones", "gamma"},
    "StepLR": {"step_size", "gamma"},
    "PolynomialLR": {"total_iters", "power"},
    "LinearLR": {"start_factor", "end_factor", "total_iters"},
    "ConstantLR": {"factor", "total_iters"},
    "ExponentialLR": {"gamma"},
}
"""torch's schedules by keys that their states hold; the first that fits is the one."""


def is_scheduler_state(tree: object) -> bool:
    return (
        isinstance(tree, dict) and "last_epoch" in tree and ("_last_lr" in tree or "base_lrs" in tree or "_schedulers" in tree)
    )


def advance_scheduler(
    state: dict[str, Any],
    groups: list[dict[str, Any]],
    target: int,
    *,
    total_steps: int | None = None,
    observations: Sequence[Observation] = (),
) -> str:
    """Move a schedule's state, in place, to `target` steps, and the groups' learning rates with it.

    Returns:
        What could not be done, in words; empty where everything is exact.
    """
    if "num_bad_epochs" in state:  # ReduceLROnPlateau: its rate follows a metric, not the step
        state["last_epoch"] = target
        return "follows a metric: its learning rate stays"
    name = next((name for name, keys in SIGNATURES.items() if keys <= state.keys()), None)
    if name is not None and "lr_lambdas" not in state and not _holds_lambda(state):
        _step_on(name, state, groups, target - state["last_epoch"])
        return ""
    return _advance_lambda(state, groups, target, total_steps, observations)


def _holds_lambda(state: dict[str, Any]) -> bool:
    return any("lr_lambdas" in inner or _holds_lambda(inner) for inner in state.get("_schedulers", []))


def _step_on(name: str, state: dict[str, Any], groups: list[dict[str, Any]], count: int) -> None:
    stand_in = SimpleNamespace(param_groups=[_with_rates(group, state, i) for i, group in enumerate(groups)], step=lambda: None)
    schedule = _rebuild(name, state, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'step() before optimizer.step()': there is no optimiser here
        for _ in range(count):
            schedule.step()
    state.update(_state_of(schedule, state))
    for group, moved in zip(groups, stand_in.param_groups, strict=True):
        group.update({key: moved[key] for key in group if key != "params" and key in moved})


def _with_rates(group: dict[str, Any], state: dict[str, Any], index: int) -> dict[str, Any]:
    """A copy of a group; a payload without an optimiser still has the schedule's own rates."""
    base = state.get("base_lrs") or [group.get("lr")]
    return {"initial_lr": base[min(index, len(base) - 1)], **copy.deepcopy(group)}


def _rebuild(name: str, state: dict[str, Any], optimizer: SimpleNamespace) -> Any:
    from torch.optim import lr_scheduler

    kind = getattr(lr_scheduler, name)
    schedule = kind.__new__(kind)
    schedule.optimizer = optimizer
    plain = {key: copy.deepcopy(value) for key, value in state.items() if key != "_schedulers"}
    schedule.__dict__.update(plain)
    if name == "CyclicLR":
        schedule._scale_fn_custom = None  # noqa: SLF001
        schedule._init_scale_fn()  # noqa: SLF001
    if "_schedulers" in state:
        inner = [(_name_of(one), one) for one in state["_schedulers"]]
        schedule._schedulers = [_rebuild(kind_name, one, optimizer) for kind_name, one in inner]  # noqa: SLF001
    return schedule


def _name_of(state: dict[str, Any]) -> str:
    return next(name for name, keys in SIGNATURES.items() if keys <= state.keys())


def _state_of(schedule: Any, before: dict[str, Any]) -> dict[str, Any]:
    """The schedule's state with the keys that it had."""
    after = {key: value for key, value in schedule.__dict__.items() if key in before and key != "_schedulers"}
    if "_schedulers" in before:
        pairs = zip(schedule._schedulers, before["_schedulers"], strict=True)  # noqa: SLF001
        after["_schedulers"] = [{**old, **_state_of(inner, old)} for inner, old in pairs]
    return after


# --- LambdaLR --------------------------------------------------------------------------------------------------------


def _advance_lambda(
    state: dict[str, Any],
    groups: list[dict[str, Any]],
    target: int,
    total_steps: int | None,
    observations: Sequence[Observation],
) -> str:
    count = target - state["last_epoch"]
    state["last_epoch"] = target
    if isinstance(state.get("_step_count"), int):
        state["_step_count"] += count
    base = state.get("base_lrs") or []
    factor = infer_factor(observations, base[0], target, total_steps) if base and base[0] else None
    if factor is None:
        return "its formula is not in the file: the first resumed step runs at the old learning rate, later ones are right"
    state["_last_lr"] = [rate * factor for rate in base]
    for group, rate in zip(groups, base, strict=False):
        group["lr"] = rate * factor
    return ""


def infer_factor(observations: Sequence[Observation], base: float, target: int, total_steps: int | None) -> float | None:
    """The factor on the base rate at `target`, from the one formula that explains all observations; else None."""
    seen = sorted({(o.step, o.rate / base) for o in observations})
    if len(seen) < 2:  # noqa: PLR2004 - one point fits anything
        return None
    for formula in _formulas(seen, total_steps):
        if all(math.isclose(formula(step), factor, rel_tol=TOLERANCE, abs_tol=1e-12) for step, factor in seen):
            factor = formula(target)
            return factor if math.isfinite(factor) else None
    return None


def _formulas(seen: Sequence[tuple[int, float]], total: int | None) -> Iterator[Callable[[int], float]]:
    """Transformers' schedules with every warm-up that the last observation allows."""
    if len({factor for _, factor in seen}) == 1:
        yield lambda _: seen[0][1]
    step, factor = seen[-1]
    for warmup in _rising(seen):
        yield lambda x, w=warmup: min(1.0, x / w)  # type: ignore[misc]
    if total is None or step >= total:
        return
    for warmup in _whole(total - (total - step) / factor if factor else None, total):
        yield lambda x, w=warmup: _linear(x, w, total)  # type: ignore[misc]
    if 0 < factor < 1:
        progress = math.acos(2 * factor - 1) / math.pi
        for warmup in _whole((step - progress * total) / (1 - progress), total):
            yield lambda x, w=warmup: _cosine(x, w, total)  # type: ignore[misc]
    for warmup in _rising(seen):  # still warming up: linear and cosine agree so far, and only up to the peak
        if step <= warmup:
            yield lambda x, w=warmup: _linear(x, w, total) if x <= w else float("nan")  # type: ignore[misc]


def _rising(seen: Sequence[tuple[int, float]]) -> Iterator[int]:
    """The warm-up length that an observation on its way up tells."""
    for step, factor in seen:
        if 0 < factor < 1:
            yield from _whole(step / factor, _MAX_WARMUP_CANDIDATES)
            return


def _whole(value: float | None, limit: int) -> Iterator[int]:
    if value is not None and math.isfinite(value) and -1 < value < limit:
        yield max(0, round(value))


def _warmup(step: int, warmup: int) -> float | None:
    return step / max(1, warmup) if step < warmup else None


def _linear(step: int, warmup: int, total: int) -> float:
    early = _warmup(step, warmup)
    return early if early is not None else max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    early = _warmup(step, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return early if early is not None else max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
