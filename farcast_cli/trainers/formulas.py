"""Learning-rate formulas: each a factor of the peak rate, by the count of steps and the run's numbers.

Those of transformers do its arithmetic in its order, so that rates agree to the last bit. torch's own schedules are
stepped, not computed: schedules.py says why.

Source: transformers/optimization.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Formula = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class FormulaInputs:
    """What a formula may ask for: the steps of the warm-up and of the run, and the rate at the peak."""

    warmup: int = 0
    total: int = 0
    peak: float = 1.0

    def risen(self, step: int) -> float:
        """The linear warm-up."""
        return step / max(1, self.warmup)

    def progress(self, step: int) -> float:
        """How much of the run behind the warm-up is over."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


# --- transformers ----------------------------------------------------------------------------------------------------


def constant(_: int, __: FormulaInputs) -> float:
    return 1.0


def constant_with_warmup(step: int, run: FormulaInputs) -> float:
    return step / max(1.0, run.warmup) if step < run.warmup else 1.0


def linear(step: int, run: FormulaInputs) -> float:
    return run.risen(step) if step < run.warmup else max(0.0, (run.total - step) / max(1, run.total - run.warmup))


def cosine(step: int, run: FormulaInputs, *, num_cycles: float = 0.5) -> float:
    return run.risen(step) if step < run.warmup else max(0.0, _wave(run.progress(step), num_cycles))


def cosine_with_restarts(step: int, run: FormulaInputs, *, num_cycles: int = 1) -> float:
    if step < run.warmup:
        return run.risen(step)
    progress = run.progress(step)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0)))) if progress < 1 else 0.0


def polynomial(step: int, run: FormulaInputs, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    if step < run.warmup:
        return run.risen(step)
    if step > run.total:
        return lr_end / run.peak
    remaining = 1 - (step - run.warmup) / (run.total - run.warmup)
    return float(((run.peak - lr_end) * remaining**power + lr_end) / run.peak)


def inverse_sqrt(step: int, run: FormulaInputs, *, timescale: int | None = None) -> float:
    timescale = timescale or run.warmup or 10_000
    return run.risen(step) if step < run.warmup else 1.0 / math.sqrt((step + timescale - run.warmup) / timescale)


def cosine_with_min_lr(
    step: int, run: FormulaInputs, *, num_cycles: float = 0.5, min_lr: float | None = None, min_lr_rate: float | None = None
) -> float:
    if step < run.warmup:
        return run.risen(step)
    return max(0.0, _above(_wave(run.progress(step), num_cycles), _least(run, min_lr, min_lr_rate)))


def cosine_warmup_with_min_lr(
    step: int,
    run: FormulaInputs,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    if step < run.warmup and warmup_lr_rate is None:
        return (step + 1.0) / max(1.0, run.warmup)
    if step < run.warmup and warmup_lr_rate is not None:
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, run.warmup - 1)
    progress = (step - run.warmup + 1.0) / max(1.0, run.total - run.warmup)
    return max(0.0, _above(_wave(progress, num_cycles), _least(run, min_lr, min_lr_rate)))


def warmup_stable_decay(
    step: int,
    run: FormulaInputs,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> float:
    if num_stable_steps is None:
        num_stable_steps = run.total - run.warmup - num_decay_steps
    decay_from = run.warmup + num_stable_steps
    if step < run.warmup:
        return max(0.0, _above(_RISES[warmup_type](run.risen(step)), min_lr_ratio))
    if step < decay_from:
        return 1.0
    if step < decay_from + num_decay_steps:
        progress = (step - decay_from) / max(1, num_decay_steps)
        fallen = _wave(progress, num_cycles) if decay_type == "cosine" else _FALLS[decay_type](progress)
        return max(0.0, _above(fallen, min_lr_ratio))
    return min_lr_ratio


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
}
_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def _wave(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _above(factor: float, least: float) -> float:
    return factor * (1.0 - least) + least


def _least(run: FormulaInputs, rate: float | None, factor: float | None) -> float:
    return rate / run.peak if rate is not None else factor or 0.0


# --- torchtitan, and what is known of a run in part ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """A warm-up, a level at the peak and a fall, as far as they are known."""

    warmup: int = 0
    counts_from: int = 0
    """1 where the first step already takes a share of the peak, as in torchtitan."""
    fall_from: float = math.inf
    """The last count at the peak."""
    fall_steps: float = 1.0
    fall: str = "linear"
    least: float = 0.0
    """The share of the peak at the end of the fall."""
    known_to: float = math.inf
    """The last count of which the factor is known."""


def rise_hold_fall(step: int, shape: Shape) -> float:
    """The factor of a shape; NaN where it is not known.

    Source: torchtitan/components/optimizer/lr_scheduler.py, `linear_warmup_stable_decay`, 0.3.
    """
    if step > shape.known_to:
        return math.nan
    if step < shape.warmup:
        return (step + shape.counts_from) / shape.warmup
    if step <= shape.fall_from:
        return 1.0
    progress = (step - shape.fall_from) / shape.fall_steps
    return _above(_wave(progress, 0.5) if shape.fall == "cosine" else _FALLS[shape.fall](progress), shape.least)


def held(_: int, *, factor: float) -> float:
    """A constant that is not the peak."""
    return factor


def rising(step: int, run: FormulaInputs) -> float:
    """The warm-up of a run whose formula behind the peak is not known."""
    return run.risen(step) if step <= run.warmup else math.nan


def geometric(step: int, *, last: int, factor: float, per_step: float) -> float:
    """A constant factor a step, as ExponentialLR and a MultiplicativeLR have it, from the last factor that was seen."""
    return factor * per_step ** (step - last)
