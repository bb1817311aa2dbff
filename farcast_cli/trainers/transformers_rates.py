"""The learning-rate formulas of transformers, as a Trainer's arguments name them.

A LambdaLR's file holds no formula, but `training_args.bin` beside it says which one the Trainer made, and from what.
Each formula does the arithmetic of transformers in its order, so that its rates agree to the last bit.

Source: transformers/optimization.py and `TrainingArguments.get_warmup_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import Made, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from farcast_cli.trainers.base import Part

    Formula = Callable[[int], float]

ARGUMENTS_FILE = "training_args.bin"


@dataclass(frozen=True, slots=True)
class FormulaInputs:
    """What every formula may ask for: the steps of the warm-up and of the run, and the rate at the peak."""

    warmup: int
    total: int
    peak: float

    def risen(self, step: int) -> float:
        return step / max(1, self.warmup)

    def progress(self, step: int) -> float:
        return (step - self.warmup) / max(1, self.total - self.warmup)


def named_formula(parts: Sequence[Part], total: int | None) -> Formula | None:
    """The formula that the Trainer's arguments among a snapshot's files name; None where none or an unknown one is."""
    part = next((part for part in parts if part.name == ARGUMENTS_FILE), None)
    if part is None or total is None:
        return None
    arguments = _read_arguments(part)
    kind = arguments.get("lr_scheduler_type")
    if isinstance(kind, Member):  # whose values are their names in small letters
        name: object = kind.args[1].lower()
    else:
        name = kind.args[0] if isinstance(kind, Made) and kind.args else kind
    formula = FORMULAS.get(name) if isinstance(name, str) else None
    peak, settings = arguments.get("learning_rate"), arguments.get("lr_scheduler_kwargs") or {}
    if formula is None or not isinstance(peak, float) or not isinstance(settings, dict):
        return None
    return partial(_factor, formula, FormulaInputs(_warmup_of(arguments, total), total, peak), settings)


def _factor(formula: Callable[..., float], run: FormulaInputs, settings: Mapping[str, Any], step: int) -> float:
    """What the formula gives; NaN, which explains nothing, where it has no such settings."""
    try:
        return formula(step, run, **settings)
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return math.nan


def _read_arguments(part: Part) -> Mapping[str, Any]:
    """The arguments' fields; none where the file cannot be read, which is told where it is copied."""
    try:
        tree = read_torch_file(part.path).tree
    except FarcastError:
        return {}
    states = tree.states if isinstance(tree, Made) else ()
    return next((state for state in states if isinstance(state, dict)), {})


def _warmup_of(arguments: Mapping[str, Any], total: int) -> int:
    """Whole steps, or a share of the run; older versions keep the share under a name of its own."""
    steps, share = arguments.get("warmup_steps") or 0, arguments.get("warmup_ratio") or 0
    return int(steps) if steps >= 1 else math.ceil(total * (steps or share))


# --- the formulas ----------------------------------------------------------------------------------------------------


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


FORMULAS: dict[str, Callable[..., float]] = {
    formula.__name__: formula
    for formula in (
        *(constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt),
        *(cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay),
    )
}
