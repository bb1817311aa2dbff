"""The paper's shifted ReLU, of which few neurons fire: when it pays to work on those alone, and what it does to a model.

    python bench/tune_relu.py [--quick]

Every variant is checked against the plain computation before it is timed. One thread.

Shapes: n rows, m neurons, d inputs of a neuron.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from tune_timing import WrongResultError, drawn, per_call, same

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

LEAF = 32  # neurons of a leaf of the tree
RATE = 1e-3


def threshold(width: int) -> float:
    """The shift b with exp(-b^2 / 2) = m^(-1/5), which bounds the share of the neurons that fire: at most m^(4/5) of m."""
    return float(np.sqrt(0.4 * np.log(width)))


# --- shifted ReLU, inputs that stay ----------------------------------------------------------------------------------


@dataclass
class Fixed:
    """Gradient descent in coordinates: Z (m, n) moves by U K, whatever fires; squared loss behind one output."""

    pre: Array
    gram: Array
    head: Array
    targets: Array
    shift: float
    losses: list[float]
    factors: Array

    @classmethod
    def make(cls, width: int, num_rows: int) -> Fixed:
        random = np.random.default_rng(0)
        inputs = random.normal(size=(num_rows, width))
        pre = drawn(inputs, width, random).T.copy()
        head = random.normal(size=width) / np.sqrt(width)
        shift = threshold(width)
        return cls(pre, inputs @ inputs.T / width, head, random.normal(size=num_rows), shift, [], np.zeros_like(pre))

    def errors(self, hidden: Array) -> Array:
        error = self.head @ hidden - self.targets
        self.losses.append(float(np.vdot(error, error)))
        return error

    def dense(self) -> None:
        """One step by dense products, as tune has it."""
        error = self.errors(np.maximum(self.pre - self.shift, 0))
        gradient = np.multiply.outer(RATE * self.head, error)
        gradient *= self.pre > self.shift
        self.factors -= gradient
        self.pre -= gradient @ self.gram

    def fired(self) -> tuple[Array, Array]:
        """Which neurons fire for which row: a scan, the exact answer to a half-space query where Z is at hand."""
        return np.nonzero(self.pre > self.shift)

    def by_fired(self, fired: tuple[Array, Array]) -> None:
        """The same step by what fires alone."""
        neurons, rows = fired
        hidden = self.pre[neurons, rows] - self.shift
        error = np.bincount(rows, weights=self.head[neurons] * hidden, minlength=len(self.gram)) - self.targets
        self.losses.append(float(np.vdot(error, error)))
        values = RATE * self.head[neurons] * error[rows]
        self.factors[neurons, rows] -= values
        starts = np.searchsorted(neurons, np.arange(len(self.pre) + 1))
        self.pre -= sparse.csr_matrix((values, rows, starts), shape=self.pre.shape) @ self.gram


def step_by_scan(one: Fixed) -> None:
    one.by_fired(one.fired())


def fixed_inputs(widths: tuple[int, ...], num_rows: int = 64) -> list[dict[str, float]]:
    """Milliseconds per iteration: dense products, what fires by a scan, and what fires if a query cost nothing."""
    found = []
    for width in widths:
        dense, by_fired = Fixed.make(width, num_rows), Fixed.make(width, num_rows)
        for _ in range(20):
            dense.dense()
            by_fired.by_fired(by_fired.fired())
        same("sparse steps", by_fired.pre, dense.pre, 1e-12)
        same("sparse steps", by_fired.factors, dense.factors, 1e-12)
        same("sparse losses", by_fired.losses, dense.losses, 1e-12)
        known = by_fired.fired()
        found.append(
            {
                "m": width,
                "share that fires": len(known[0]) / dense.pre.size,
                "dense": per_call(dense.dense),
                "sparse, scan": per_call(partial(step_by_scan, by_fired)),
                "sparse, free query": per_call(partial(by_fired.by_fired, known)),
            }
        )
        print(found[-1], flush=True)
    return found


# --- shifted ReLU, inputs that move ----------------------------------------------------------------------------------


@dataclass
class Moving:
    """A whole layer in float32: forward, gradient and step, of all its rows or of those in which a neuron fires."""

    weights: Array
    inputs: Array
    head: Array
    shift: Any

    def step(self) -> Array:
        self.weights, error = self._moved(self.weights, self.head)
        return error

    def step_of(self, used: Any) -> Array:
        """Only rows `used` of W."""
        self.weights[used], error = self._moved(self.weights[used], self.head[used])
        return error

    def _moved(self, rows: Array, head: Array) -> tuple[Array, Array]:
        """Rows after a step, in place, and the errors before it."""
        pre = self.inputs @ rows.T - self.shift
        error = np.maximum(pre, 0) @ head
        rows -= (np.float32(RATE) * np.multiply.outer(error, head) * (pre > 0)).T @ self.inputs
        return rows, error


def moving_inputs(width: int = 8192, counts: tuple[int, ...] = (1, 4, 16, 64)) -> list[dict[str, float]]:
    """Milliseconds of an iteration whose inputs are new: all of W against its rows that fire, known for nothing."""
    random = np.random.default_rng(0)
    start, head = random.standard_normal((width, width), dtype=np.float32), random.standard_normal(width, dtype=np.float32)
    found = []
    for count in counts:
        inputs = random.standard_normal((count, width), dtype=np.float32) / np.float32(np.sqrt(width))
        shift = np.float32(threshold(width))
        used = np.flatnonzero((inputs @ start.T > shift).any(axis=0))
        dense, by_rows = (Moving(start.copy(), inputs, head, shift) for _ in range(2))
        same("errors by the rows that fire", by_rows.step_of(used), dense.step(), 1e-4)
        same("weights by the rows that fire", by_rows.weights, dense.weights, 1e-5)
        row = {"n": count, "share of W that fires": len(used) / width, "dense": per_call(dense.step)}
        row["by rows"] = per_call(partial(by_rows.step_of, used))
        found.append(row | {"speed-up": row["dense"] / row["by rows"]})
        print(found[-1], flush=True)
    return found


# --- half-space queries ----------------------------------------------------------------------------------------------


class Tree:
    """Exact half-space reporting: neurons in leaves, each in a ball; a leaf whose ball lies outside is not looked at."""

    def __init__(self, weights: Array) -> None:
        self.weights = weights
        self.leaves = np.stack(list(self._split(np.arange(len(weights)))))
        members = weights[self.leaves]
        self.centers = members.mean(axis=1)
        self.radii = np.linalg.norm(members - self.centers[:, None], axis=2).max(axis=1)
        self.num_looked_at = 0

    def _split(self, members: Any) -> Any:
        """Halves along the coordinate that spreads most."""
        if len(members) <= LEAF:
            yield members
            return
        rows = self.weights[members]
        order = members[np.argsort(rows[:, np.argmax(rows.std(axis=0))], kind="stable")]
        yield from self._split(order[: len(order) // 2])
        yield from self._split(order[len(order) // 2 :])

    def query(self, inputs: Array, shift: float) -> Any:
        """The neurons w with <w, x> > b, in order."""
        near = self.leaves[self.centers @ inputs + self.radii * np.linalg.norm(inputs) > shift].reshape(-1)
        self.num_looked_at += len(near)
        return np.sort(near[self.weights[near] @ inputs > shift])


def reporting(width: int = 16384, dims: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 512), num: int = 20) -> list[dict[str, float]]:
    """Which share of the neurons a query looks at, and its time against computing them all, by the number of inputs."""
    found = []
    for dim in dims:
        random = np.random.default_rng(0)
        weights, queries = random.normal(size=(width, dim)), random.normal(size=(num, dim))
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        tree, shift = Tree(weights), threshold(width)
        for one in queries:
            if not np.array_equal(tree.query(one, shift), np.flatnonzero(weights @ one > shift)):
                raise WrongResultError(f"a half-space query in {dim} dimensions reports other neurons than all of them")
        looked_at = tree.num_looked_at / (num * width)
        by_tree = per_call(partial(tree.query, queries[0], shift))
        whole = per_call(lambda: np.flatnonzero(weights @ queries[0] > shift))  # noqa: B023 - called at once
        found.append({"d": dim, "looked at": looked_at, "tree": by_tree, "all": whole})
        print(found[-1], flush=True)
    return found


def on_a_real_model(hidden: int) -> dict[str, float]:
    """Test loss of the worked example's model with ReLU, and with its second layer's ReLU shifted as the paper shifts it."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
    import tune_example as example

    torch.set_num_threads(1)
    text, test = example.windows_of(example.old_text())
    model = example.train(text, hidden=hidden, steps=400)
    windows = test.some(4000, seed=0)
    with torch.no_grad():
        pre = model[:3](example.one_hot(windows.contexts))
        shift = threshold(hidden) * float(pre.square().mean().sqrt())
        found: dict[str, float] = {"hidden": hidden}
        for name, b in (("ReLU", 0.0), ("shifted", shift)):
            loss = torch.nn.functional.cross_entropy(model[4](torch.relu(pre - b)), windows.following)
            found |= {f"{name}: loss": float(loss), f"{name}: share that fires": float((pre > b).double().mean())}
    print(found, flush=True)
    return found


def shifted_relu(*, quick: bool) -> dict[str, Any]:
    """All of it; the quick one at small widths."""
    return {
        "fixed inputs": fixed_inputs((1024, 4096) if quick else (1024, 4096, 16384)),
        "moving inputs": moving_inputs(2048 if quick else 8192),
        "half-space queries": reporting(4096 if quick else 16384),
        "a real model": on_a_real_model(128 if quick else 512),
    }


if __name__ == "__main__":
    shifted_relu(quick="--quick" in sys.argv)
