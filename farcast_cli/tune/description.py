"""Whether the layer, its activation and its head, as they are described, give what the model gave.

A wrong description is tuned as well as a right one, and harms the model. The file of rows may hold `out`, what the model gave for
its rows: then a description that gives something else is refused, and the descriptions next to it are tried. Without `out`, what
can be seen is a loss no better than that of a constant.

Shapes: n rows, m outputs of the layer, k outputs in all; Z (n, m), o (n, k).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from farcast_cli.choices import ActivationName
from farcast_cli.errors import DataError, FarcastError, listed
from farcast_cli.tune.weight import find_weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.data import Data
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.solve import Model
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

AGREES = 1e-3  # of the length of `out`: float32 in another order of sums leaves 1e-6, a wrong activation some per cent
MAX_TRIED = 256  # rows


def check_description(model: Model, data: Data, snapshot: Snapshot) -> None:
    """See that the model as described is the one that the rows come from, where they say what it gave.

    Raises:
        DataError: it gives something else than `out`.
    """
    if data.out is None:
        return
    rows, out = data.inputs[:MAX_TRIED], data.out[:MAX_TRIED]
    apart = _apart(model.objective.outputs(model.pre(rows)), out)
    if apart <= AGREES:
        return
    fits = listed(text for text, found in _others(model, rows, snapshot) if _apart(found, out) <= AGREES)
    raise DataError(
        f"{data.path}: out: the layer and what follows, as described, differ from the model's outputs by {apart:.2g} times their"
        f" length: expected at most {AGREES:g}",
        hint=f"what fits is {fits}"
        if fits
        else "see --bias, --head and --head-bias; save out, before a softmax, in float32 and in evaluation"
        " mode; other layers may follow",
    )


def _apart(found: Array, out: Array) -> float:
    return float(np.linalg.norm(found - out) / (np.linalg.norm(out) or 1.0))


def _others(model: Model, rows: Array, snapshot: Snapshot) -> Iterator[tuple[str, Array]]:
    """The descriptions next to this one, as the options that change it, with what they give, (n, k)."""
    if len(model.weights) > 1:
        return
    (own,), after = model.weights, model.objective
    for layer_words, weight in _layers(own, snapshot):
        pre = weight.forward(weight.extended(rows))
        for name in get_args(ActivationName):
            act_words = () if name == after.activation else (f"--activation {name}",)
            for head_words, objective in _heads(after):
                if words := (*layer_words, *act_words, *head_words):
                    yield " ".join(words), replace(objective, activation=name).outputs(pre)


def _layers(own: Weight, snapshot: Snapshot) -> Iterator[tuple[tuple[str, ...], Weight]]:
    """The layer as it is described, and with another bias or the other way round."""
    likely = f"{own.name.rpartition('.')[0]}.bias".lstrip(".")
    turns = (False, True) if own.num_inputs == own.num_outputs else (own.is_transposed,)
    for turned in turns:
        for bias in dict.fromkeys((own.bias_name, likely, None)):
            try:
                weight = find_weight(snapshot, own.name, bias, is_transposed=turned)
            except FarcastError:  # there is no such bias
                continue
            words = []
            if turned != own.is_transposed:
                words.append("--transposed" if turned else "without --transposed")
            if bias != own.bias_name:
                words.append(f"--bias {bias}" if bias else "without --bias")
            yield tuple(words), weight


def _heads(own: Objective) -> Iterator[tuple[tuple[str, ...], Objective]]:
    """The head as it is described, the other way round, and without its bias."""
    yield (), own
    if own.head is not None and own.head.shape[0] == own.head.shape[1]:
        yield ("the head transposed",), replace(own, head=np.ascontiguousarray(own.head.T))
    if own.head_bias is not None:
        yield ("without --head-bias",), replace(own, head_bias=None)


def constant_loss(model: Model, data: Data) -> tuple[float, str]:
    """The loss of the best constant, and what that is; infinite where all targets are the same, so that it says nothing."""
    if data.is_constant:
        return math.inf, "y"
    if data.targets.ndim > 1:
        mean = data.shares @ data.targets
        return float((data.shares @ (data.targets - mean) ** 2).mean()), "the mean of y"
    shares = np.bincount(data.targets, weights=data.shares)
    shares, what = shares[shares > 0], "the shares of the classes"
    if model.objective.loss == "mse":
        return float(1 - shares @ shares) / model.num_outputs, what
    return float(-shares @ np.log(shares)), what
