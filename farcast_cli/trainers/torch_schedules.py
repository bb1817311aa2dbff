"""torch's own learning-rate schedules, stepped on from their saved state without torch.

Each function does the floating-point operations of one class of torch in torch's order, so that the bits are the same.
Most classes compute the next rate from the one before, and a formula of the count would round differently.

state: what a schedule's `state_dict()` holds; groups: the optimiser's parameter groups, as dicts. Both change in place.
A state gets no key that it lacks: older versions of torch wrote fewer. What torch does only while it builds a schedule
(`_is_initial`) is left out, for no saved state is of that moment.

Source: torch/optim/lr_scheduler.py and torch/optim/swa_utils.py of torch 2.13.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    State = dict[str, Any]
    Groups = list[dict[str, Any]]

SIGNATURES = {
    "SequentialLR": {"_schedulers", "_milestones"},
    "ChainedScheduler": {"_schedulers"},
    "LambdaLR": {"lr_lambdas"},
    "ReduceLROnPlateau": {"num_bad_epochs"},
    "OneCycleLR": {"_schedule_phases"},
    "CyclicLR": {"step_ratio", "total_size"},
    "SWALR": {"_anneal_strategy", "anneal_epochs"},
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


def schedule_name(state: State) -> str:
    """Which of torch's schedules a state is of; `LambdaLR` where it holds no formula that is known here."""
    return next((name for name, keys in SIGNATURES.items() if keys <= state.keys()), "LambdaLR")


def step_once(state: State, groups: Groups) -> list[float]:
    """What one `step()` does; the rates that the schedule calls its last.

    A schedule without a formula here (LambdaLR, an unknown class) counts, and leaves the rates as they are.

    Raises:
        ValueError: the schedule has no such step.
    """
    name = schedule_name(state)
    if name == "SequentialLR":
        return _step_sequence(state, groups)
    if name == "ChainedScheduler":
        for member in state["_schedulers"]:
            step_once(member, groups)
        return _with_last_rates(state, [group["lr"] for group in groups])
    if name == "CosineAnnealingWarmRestarts":
        _turn(state)  # torch counts no `_step_count` here
    elif "_step_count" in state:
        state["_step_count"] += 1
    state["last_epoch"] += 1
    return _with_rates(state, groups, _next_rates(name, state, groups))


def _step_sequence(state: State, groups: Groups) -> list[float]:
    state["last_epoch"] += 1
    count, milestones = state["last_epoch"], state["_milestones"]
    index = bisect_right(milestones, count)
    member = state["_schedulers"][index]
    begins = index > 0 and milestones[index - 1] == count
    return _with_last_rates(state, _begin(member, groups) if begins else step_once(member, groups))


def _begin(state: State, groups: Groups) -> list[float]:
    """The member of a SequentialLR whose turn it is: at count 0, and by its formula of the count where it has one."""
    name = schedule_name(state)
    if "_schedulers" in state:
        raise ValueError(f"torch can begin no {name} at a milestone of a SequentialLR")
    state["last_epoch"] = 0
    at_zero = RATES_AT_ZERO.get(name)
    rates = [at_zero(state, base) for base in state["base_lrs"]] if at_zero else _next_rates(name, state, groups)
    return _with_rates(state, groups, rates)


def _with_rates(state: State, groups: Groups, rates: list[float]) -> list[float]:
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return _with_last_rates(state, rates)


def _with_last_rates(state: State, rates: list[float]) -> list[float]:
    if "_last_lr" in state:
        state["_last_lr"] = rates
    return rates


def _next_rates(name: str, state: State, groups: Groups) -> list[float]:
    """The rates at `last_epoch`, from those of the groups."""
    if name in RATES:
        return RATES[name](state, groups)
    factor = FACTORS[name](state, state["last_epoch"]) if name in FACTORS else None
    return [group["lr"] if factor is None else group["lr"] * factor for group in groups]


# --- schedules that multiply the rate by a factor (s: the state; n: the count) ---------------------------------------


def _line(s: State) -> tuple[float, float, int]:
    start, end = s["start_factor"], s["end_factor"]
    return start, end - start, s["total_iters"]


def _rise(s: State, n: int) -> float:
    start, span, total = _line(s)
    return 1.0 + span / (total * start + (n - 1) * span)


def _line_at_zero(s: State, base: float) -> float:
    start, span, total = _line(s)
    return base * (start + span * min(total, 0) / total)


def _left(s: State, n: int) -> float:
    total: int = s["total_iters"]
    return 1.0 - n / total


FACTORS: dict[str, Callable[[State, int], float | None]] = {
    "StepLR": lambda s, n: s["gamma"] if n != 0 and n % s["step_size"] == 0 else None,
    "MultiStepLR": lambda s, n: s["gamma"] ** s["milestones"][n] if n in s["milestones"] else None,
    "ConstantLR": lambda s, n: s["factor"] if n == 0 else 1.0 / s["factor"] if n == s["total_iters"] else None,
    "LinearLR": lambda s, n: s["start_factor"] if n == 0 else None if n > s["total_iters"] else _rise(s, n),
    "PolynomialLR": lambda s, n: (_left(s, n) / _left(s, n - 1)) ** s["power"] if n <= s["total_iters"] else None,
    "ExponentialLR": lambda s, _: s["gamma"],
}
"""By class: the factor from one rate to the next; None where the rate stays."""

RATES_AT_ZERO: dict[str, Callable[[State, float], float]] = {
    "StepLR": lambda s, base: base * s["gamma"] ** (0 // s["step_size"]),
    "MultiStepLR": lambda s, base: base * s["gamma"] ** sum(times for n, times in s["milestones"].items() if n <= 0),
    "ConstantLR": lambda s, base: base * (s["factor"] + (s["total_iters"] <= 0) * (1 - s["factor"])),
    "LinearLR": _line_at_zero,
    "PolynomialLR": lambda s, base: base * _left(s, min(s["total_iters"], 0)) ** s["power"],
    "ExponentialLR": lambda s, base: base * s["gamma"] ** 0,
    "CosineAnnealingLR": lambda s, base: _half_wave(s, base, 0.0),
}
"""By class: the rate at count 0 by its formula of the count."""


# --- schedules with rates of their own -------------------------------------------------------------------------------


def _half_wave(state: State, base: float, angle: float) -> float:
    low: float = state["eta_min"]
    return low + (base - low) * (1 + math.cos(angle)) / 2


def _of_cosine(state: State, groups: Groups) -> list[float]:
    count, half, low = state["last_epoch"], state["T_max"], state["eta_min"]
    pairs = zip(state["base_lrs"], groups, strict=True)
    if state.get("_step_count") == 1 and count > 0:
        return [_half_wave(state, base, count * math.pi / half) for base, _ in pairs]
    if (count - 1 - half) % (2 * half) == 0:
        return [group["lr"] + (base - low) * (1 - math.cos(math.pi / half)) / 2 for base, group in pairs]
    factor = (1 + math.cos(math.pi * count / half)) / (1 + math.cos(math.pi * (count - 1) / half))
    return [factor * (group["lr"] - low) + low for group in groups]


def _turn(state: State) -> None:
    """Move a schedule of warm restarts on within its cycle, or into the next."""
    if state["last_epoch"] < 0:
        state["T_cur"], state["T_i"] = 0, state["T_0"]
        return
    state["T_cur"] += 1
    if state["T_cur"] >= state["T_i"]:
        state["T_cur"] %= state["T_i"]
        state["T_i"] *= state["T_mult"]


def _of_restarts(state: State, _: Groups) -> list[float]:
    return [_half_wave(state, base, math.pi * state["T_cur"] / state["T_i"]) for base in state["base_lrs"]]


def _of_averaging(state: State, groups: Groups) -> list[float]:
    length, count = state["anneal_epochs"], state["_step_count"] - 1
    if length == 0:
        count = max(1, count)
    before, now = (_annealed(state, max(0, min(1, one / max(1, length)))) for one in (count - 1, count))
    return [
        group["swa_lr"] * now
        + (group["swa_lr"] if before == 1 else (group["lr"] - before * group["swa_lr"]) / (1 - before)) * (1 - now)
        for group in groups
    ]


def _annealed(state: State, share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2 if state["_anneal_strategy"] == "cos" else share


def _of_one_cycle(state: State, groups: Groups) -> list[float]:
    count, total, phases = state["last_epoch"], state["total_steps"], state["_schedule_phases"]
    if count > total:
        raise ValueError(f"a OneCycleLR of {total} steps has no step {count}")
    index = next((i for i, phase in enumerate(phases) if count <= phase["end_step"]), len(phases) - 1)
    phase, begin = phases[index], phases[index - 1]["end_step"] if index else 0.0
    share = (count - begin) / (phase["end_step"] - begin)
    is_line = state["_anneal_func_type"] == "linear"

    def between(start: float, end: float) -> float:
        return (end - start) * share + start if is_line else end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)

    if state["cycle_momentum"]:
        _set_momentum(state, groups, [between(one[phase["start_momentum"]], one[phase["end_momentum"]]) for one in groups])
    return [between(group[phase["start_lr"]], group[phase["end_lr"]]) for group in groups]


def _of_cycles(state: State, groups: Groups) -> list[float]:
    count, peak = state["last_epoch"], state["step_ratio"]
    cycle = math.floor(1 + count / state["total_size"])
    share = 1.0 + count / state["total_size"] - cycle
    height = share / peak if share <= peak else (share - 1) / (peak - 1)
    scale = CYCLE_SCALES[state["mode"]](state, cycle)
    if state["cycle_momentum"]:
        pairs = zip(state["base_momentums"], state["max_momentums"], strict=True)
        _set_momentum(state, groups, [high - (high - low) * height * scale for low, high in pairs])
    return [low + (high - low) * height * scale for low, high in zip(state["base_lrs"], state["max_lrs"], strict=True)]


CYCLE_SCALES: dict[str, Callable[[State, int], float]] = {
    "triangular": lambda _, __: 1.0,
    "triangular2": lambda _, cycle: 1 / 2.0 ** (cycle - 1),
    "exp_range": lambda state, _: state["gamma"] ** state["last_epoch"],
}


def _set_momentum(state: State, groups: Groups, values: list[float]) -> None:
    for group, value in zip(groups, values, strict=True):
        if state.get("use_beta1"):
            group["betas"] = (value, *group.get("betas", ())[1:])
        else:
            group["momentum"] = value


RATES: dict[str, Callable[[State, Groups], list[float]]] = {
    "CosineAnnealingLR": _of_cosine,
    "CosineAnnealingWarmRestarts": _of_restarts,
    "SWALR": _of_averaging,
    "OneCycleLR": _of_one_cycle,
    "CyclicLR": _of_cycles,
}
"""By class: the rates of all groups; momenta are set on the way."""
