"""What is made small: activation, head and loss of the layer's pre-activations, with their derivatives.

    h = act(Z),   o = h H^T + c (or h itself without a head),   loss = sum over rows of s_i l(o_i, y_i)

mse:            l = mean_j (o_ij - y_ij)^2, of labels with y_ij = 1 for the label j, else 0
cross-entropy:  l = log sum_j exp(o_ij) - o_i,y_i

The shares s of the rows sum to 1.

Shapes: n rows, m outputs of the layer, k outputs in all (k = m without a head); Z (n, m), H (k, m), o (n, k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName, LossName

    Array = NDArray[np.float64]
    Targets = NDArray[Any]


MAX_TOGETHER = 1 << 20  # numbers of rows that are worked on at once: 8 MiB
_ERF_END = 6.5  # beyond it 1 - erf is below 4e-20
_ERF_DEGREE = 19  # of the polynomial below; the largest error measured is 7e-16, and more terms round worse
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # of gelu-tanh
_CHUNK = 1 << 14  # numbers that stay in a core's cache while a polynomial of them is computed


@dataclass(frozen=True, slots=True)
class Linear:
    """The derivatives J of the outputs by Z, and the curvature L = d2 l / d o2 of the loss, at a place."""

    forth: Callable[[Array], Array]
    """What J makes of a direction of Z, (n, k)."""
    back: Callable[[Array], Array]
    """What J^T makes of outputs, (n, m)."""
    curved: Callable[[Array], Array]
    """What L makes of outputs, (n, k)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Everything behind the layer's pre-activations."""

    loss: LossName
    activation: ActivationName = "none"
    head: Array | None = None
    head_bias: Array | None = None

    def outputs(self, pre: Array) -> Array:
        """O (n, k) for pre-activations (n, m)."""
        hidden = activate(self.activation, pre)
        if self.head is None:
            return hidden
        out = hidden @ self.head.T
        return out if self.head_bias is None else out + self.head_bias

    def row_losses(self, pre: Array, targets: Targets) -> Array:
        """L of each row, (n,), some rows at a time."""
        return np.concatenate([self._row_losses(self.outputs(pre[part]), targets[part]) for part in self.parts(pre)])

    def losses_and_gradient(self, pre: Array, targets: Targets, shares: Array) -> tuple[Array, Array]:
        """L of each row, (n,), and the gradient of the loss by Z of the first rows, as many as there are shares.

        The gradient takes the memory of the pre-activations; works on some rows at a time.
        """
        losses = np.empty(len(pre))
        for part in self.parts(pre):
            out, here = self.outputs(pre[part]), targets[part]
            losses[part] = self._row_losses(out, here)
            share = shares[part]
            tuned = slice(part.start, part.start + len(share))
            back = self._gradient(out[: len(share)], here[: len(share)], share)
            pre[tuned] = self._back(back, slope_of(self.activation, pre[tuned]))
        return losses, pre[: len(shares)]

    def parts(self, pre: Array) -> list[slice]:
        """The rows of pre-activations (n, m), or of outputs, in parts that take little memory."""
        count = max(1, MAX_TOGETHER // max(pre.shape[1], 0 if self.head is None else len(self.head)))
        return [slice(start, start + count) for start in range(0, len(pre), count)]

    def gradient(self, pre: Array, targets: Targets, shares: Array) -> Array:
        """Of the loss by the outputs, (n, k)."""
        return self._gradient(self.outputs(pre), targets, shares)

    def linear(self, pre: Array, shares: Array) -> Linear:
        """The outputs' derivatives by Z, and the curvature of the loss by the outputs."""
        slope = slope_of(self.activation, pre)

        def forth(direction: Array) -> Array:
            moved = direction if slope is None else direction * slope
            return np.asarray(moved if self.head is None else moved @ self.head.T)

        return Linear(forth, lambda outputs: self._back(outputs, slope), self._curvature(self.outputs(pre), shares[:, None]))

    def jacobian(self, pre: Array) -> Array:
        """The derivatives of each output by the pre-activations, (n, k, m)."""
        head = np.eye(pre.shape[1]) if self.head is None else self.head
        slope = slope_of(self.activation, pre)
        return np.repeat(head[None], len(pre), axis=0) if slope is None else head * slope[:, None]

    def _back(self, outputs: Array, slope: Array | None) -> Array:
        back = outputs if self.head is None else outputs @ self.head
        return np.asarray(back if slope is None else back * slope)

    def _gradient(self, out: Array, targets: Targets, shares: Array) -> Array:
        if self.loss == "mse":
            back = out - in_columns(targets, out.shape[1])
            back *= 2 / out.shape[1]
        else:
            back = softmax(out)
            back[np.arange(len(out)), targets.astype(np.intp)] -= 1
        return np.asarray(back * shares[:, None])

    def _curvature(self, out: Array, share: Array) -> Callable[[Array], Array]:
        if self.loss == "mse":
            scale = 2 / out.shape[1] * share
            return lambda moved: moved * scale
        likely = softmax(out)
        return lambda moved: likely * (moved - (likely * moved).sum(axis=1, keepdims=True)) * share

    def _row_losses(self, out: Array, targets: Targets) -> Array:
        if self.loss == "mse":
            return np.asarray(((out - in_columns(targets, out.shape[1])) ** 2).mean(axis=1))
        top = out.max(axis=1)
        logs = np.log(np.exp(out - top[:, None]).sum(axis=1)) + top
        return np.asarray(logs - out[np.arange(len(out)), targets.astype(np.intp)])


def in_columns(targets: Targets, count: int, first: int = 0) -> Array:
    """Columns [first, first + count) of targets (n, k), or of what labels (n,) stand for: 1 for the label, else 0."""
    if targets.ndim == 1:
        return np.asarray(targets[:, None] == np.arange(first, first + count), np.float64)
    return np.asarray(targets[:, first : first + count])


def softmax(out: Array) -> Array:
    """The probabilities (n, k) of outputs."""
    raised = np.exp(out - out.max(axis=1, keepdims=True))
    raised /= raised.sum(axis=1, keepdims=True)
    return np.asarray(raised)


# --- activations -----------------------------------------------------------------------------------------------------


def activate(name: ActivationName, pre: Array) -> Array:
    """act(z), elementwise. gelu is the exact one, z Phi(z); gelu-tanh approximates Phi by tanh, as GPT-2 has it."""
    if name == "relu":
        return np.maximum(pre, 0)
    if name == "tanh":
        return np.tanh(pre)
    gate = _gate(name, pre)
    return pre if gate is None else pre * gate[0]


def slope_of(name: ActivationName, pre: Array) -> Array | None:
    """act'(z), elementwise; None where it is 1. relu has slope 0 at 0, as torch has it."""
    if name == "relu":
        return (pre > 0).astype(np.float64)
    if name == "tanh":
        return np.asarray(1 - np.tanh(pre) ** 2)
    gate = _gate(name, pre)
    return None if gate is None else gate[0] + pre * gate[1]


def _gate(name: ActivationName, pre: Array) -> tuple[Array, Array] | None:
    """g(z) and g'(z) of an activation z g(z)."""
    if name == "gelu":
        return normal_cdf(pre), np.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
    if name == "silu":
        gate = 0.5 + 0.5 * np.tanh(0.5 * pre)
        return gate, gate * (1 - gate)
    if name == "gelu-tanh":
        bent = np.tanh(_TANH_SCALE * (pre + _TANH_CUBE * pre**3))
        return 0.5 + 0.5 * bent, 0.5 * (1 - bent * bent) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * pre * pre)
    return None


def normal_cdf(values: Array) -> Array:
    """Phi(z) = (1 + erf(z / sqrt 2)) / 2 to 7e-16; numpy has no erf.

    erfc(x) exp(x^2) is a polynomial in t = (2 - x) / (2 + x) to that accuracy, fitted at import to the C library's
    erfc at Chebyshev nodes, as in Numerical Recipes (3rd ed., 6.2.2) with another scale of t.
    """
    out = np.empty_like(values)
    source, target = values.reshape(-1), out.reshape(-1)
    coefficients = _erfc_polynomial()
    for start in range(0, source.size, _CHUNK):
        x = np.abs(source[start : start + _CHUNK]) * math.sqrt(0.5)
        np.minimum(x, _ERF_END, out=x)
        t = (2 - x) / (2 + x)
        series = np.full_like(t, coefficients[0])
        for coefficient in coefficients[1:]:
            series *= t
            series += coefficient
        tail = 0.5 * np.exp(-x * x) * series  # of the normal distribution beyond |z|
        target[start : start + _CHUNK] = np.where(source[start : start + _CHUNK] > 0, 1 - tail, tail)
    return out


@cache
def _erfc_polynomial() -> list[float]:
    """Coefficients in powers of t, the highest first."""
    low, high = (2 - _ERF_END) / (2 + _ERF_END), 1.0

    def scaled(node: Array) -> Array:
        t = (high - low) / 2 * (node + 1) + low
        x = 2 * (1 - t) / (1 + t)
        return np.array([math.erfc(one) * math.exp(one * one) for one in x])

    fitted = np.polynomial.Chebyshev.interpolate(scaled, _ERF_DEGREE, [-1, 1])
    in_t = np.polynomial.Chebyshev(fitted.coef, domain=[low, high]).convert(
        kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]
    )
    return [float(c) for c in in_t.coef[::-1]]
