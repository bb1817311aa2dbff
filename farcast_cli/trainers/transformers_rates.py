"""The learning-rate formula that a Trainer's arguments name.

A LambdaLR's file holds no formula, but `training_args.bin` beside it says which one the Trainer made, and from what.

Source: transformers/trainer_utils.py, `SchedulerType`; `TrainingArguments.get_warmup_steps`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import Made, Member
from farcast_cli.trainers import formulas
from farcast_cli.trainers.formulas import FormulaInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from farcast_cli.trainers.base import Part
    from farcast_cli.trainers.formulas import Formula

ARGUMENTS_FILE = "training_args.bin"

FORMULAS: dict[str, Callable[..., float]] = {
    formula.__name__: formula
    for formula in (
        *(formulas.constant, formulas.constant_with_warmup, formulas.linear, formulas.cosine, formulas.cosine_with_restarts),
        *(formulas.polynomial, formulas.inverse_sqrt, formulas.cosine_with_min_lr, formulas.cosine_warmup_with_min_lr),
        formulas.warmup_stable_decay,
    )
}
"""By what a Trainer calls them."""


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
