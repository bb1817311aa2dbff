"""What the paper speeds training up with, and tune does not use: shifted ReLU and tensor sketch, for real, to see when they pay.

    python bench/tune_paper.py [--quick]

Every variant is checked against the plain computation before it is timed. One thread.

Shapes: n rows, m neurons, d inputs of a neuron, k outputs of the head, s buckets of a sketch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product as product_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg, sparse
from tune_timing import per_call

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

LEAF = 32  # neurons of a leaf of the tree
RATE = 1e-3


class WrongResultError(Exception):
    """A variant does not do what it is compared with."""


def same(what: str, found: Any, expected: Any, tolerance: float) -> None:
    """See that a variant is right, to a share of the largest number."""
    error = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    if not error <= tolerance:
        raise WrongResultError(f"{what}: off by {error:.1e} of the largest number, expected {tolerance:.0e}")


def threshold(width: int) -> float:
    """The shift b with exp(-b^2 / 2) = m^(-1/5), which bounds the share of the neurons that fire: at most m^(4/5) of m."""
    return float(np.sqrt(0.4 * np.log(width)))


def drawn(inputs: Array, width: int, random: Any) -> Array:
    """Pre-activations (n, m) as m neurons of normal weights, of variance 1 / d, give them; without making the weights."""
    gram = inputs @ inputs.T / inputs.shape[1]
    return np.linalg.cholesky(gram) @ random.normal(size=(len(inputs), width))


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
                "sparse, scan": per_call(lambda one=by_fired: one.by_fired(one.fired())),  # type: ignore[misc]
                "sparse, free query": per_call(lambda one=by_fired, known=known: one.by_fired(known)),  # type: ignore[misc]
            }
        )
        print(found[-1], flush=True)
    return found


# --- shifted ReLU, inputs that move ----------------------------------------------------------------------------------


def moving_inputs(width: int = 8192, counts: tuple[int, ...] = (1, 4, 16, 64)) -> list[dict[str, float]]:
    """A dense layer's forward, gradient and step in float32, against the rows of W that fire, known for nothing."""
    random = np.random.default_rng(0)
    start = random.standard_normal((width, width), dtype=np.float32)
    head = random.standard_normal(width, dtype=np.float32)
    found = []
    for count in counts:
        inputs = random.standard_normal((count, width), dtype=np.float32) / np.float32(np.sqrt(width))
        pre = inputs @ start.T
        shift = np.float32(threshold(width))
        used = np.flatnonzero((pre > shift).any(axis=0))

        def dense(weights: Array = start, inputs: Array = inputs, shift: Any = shift) -> Array:
            pre = inputs @ weights.T - shift
            error = np.maximum(pre, 0) @ head
            change = (np.float32(RATE) * np.multiply.outer(error, head) * (pre > 0)).T @ inputs
            weights -= change
            return error

        def by_rows(weights: Array = start, inputs: Array = inputs, shift: Any = shift, used: Array = used) -> Array:
            rows = weights[used]
            pre = inputs @ rows.T - shift
            error = np.maximum(pre, 0) @ head[used]
            rows -= (np.float32(RATE) * np.multiply.outer(error, head[used]) * (pre > 0)).T @ inputs
            weights[used] = rows
            return error

        one, other = start.copy(), start.copy()
        same("errors by the rows that fire", by_rows(other), dense(one), 1e-4)
        same("weights by the rows that fire", other, one, 1e-5)
        row = {"n": count, "share of W that fires": len(used) / width, "dense": per_call(dense), "by rows": per_call(by_rows)}
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
        by_tree = per_call(lambda tree=tree: tree.query(queries[0], shift))  # type: ignore[misc]  # noqa: B023 - called at once
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


# --- tensor sketch ---------------------------------------------------------------------------------------------------


class TensorSketch:
    """A sketch (n, s) of rows a (x) x without their (m d) products: count sketches of both, convolved by FFT.

    Source: Pham, Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (2013), section 3.
    """

    def __init__(self, width: int, inputs: Array, num_buckets: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.num_buckets = num_buckets
        self.left, self.right = (self._count_sketch(random, size) for size in (width, inputs.shape[1]))
        self.right_fft = np.fft.rfft(inputs @ self.right, axis=1)  # of inputs that stay: once

    def _count_sketch(self, random: Any, size: int) -> Any:
        signs, buckets = random.choice([-1.0, 1.0], size=size), random.integers(self.num_buckets, size=size)
        return sparse.csr_matrix((signs, buckets, np.arange(size + 1)), shape=(size, self.num_buckets))

    def rows(self, slopes: Array) -> Array:
        """Sketches of a_i (x) x_i, (n, s)."""
        return np.fft.irfft(np.fft.rfft(slopes @ self.left, axis=1) * self.right_fft, n=self.num_buckets, axis=1)


def check_sketch() -> None:
    """Equal to the count sketch of the whole products, and right on average."""
    random = np.random.default_rng(0)
    slopes, inputs = random.normal(size=(4, 9)), random.normal(size=(4, 7))
    sketch = TensorSketch(9, inputs, 16)
    whole = np.zeros((4, 16))
    for i in range(9):
        for j in range(7):
            bucket = (sketch.left.indices[i] + sketch.right.indices[j]) % 16
            whole[:, bucket] += sketch.left.data[i] * sketch.right.data[j] * slopes[:, i] * inputs[:, j]
    same("tensor sketch", sketch.rows(slopes), whole, 1e-12)
    many = [TensorSketch(9, inputs, 64, seed=seed).rows(slopes) for seed in range(2000)]
    same(
        "mean of sketched products",
        np.mean([one @ one.T for one in many], axis=0),
        (slopes @ slopes.T) * (inputs @ inputs.T),
        0.03,
    )


def conjugate_gradients(matrix: Array, right: Array, solve: Any, tolerance: float = 1e-8) -> tuple[Array, int]:
    """Preconditioned, to a residual of `tolerance`; also the number of products."""
    solution, rest = np.zeros_like(right), right.copy()
    way = solve(rest)
    square, moved = float(rest @ way), way
    for count in range(1, 2001):
        image = matrix @ way
        length = square / float(way @ image)
        solution += length * way
        rest -= length * image
        if np.linalg.norm(rest) <= tolerance * np.linalg.norm(right):
            return solution, count
        moved = solve(rest)
        before, square = square, float(rest @ moved)
        way = moved + square / before * way
    raise WrongResultError("conjugate gradients do not end")


def make_rows(width: int, num_rows: int, *, clustered: bool) -> tuple[Array, Array]:
    """The head's slopes at n rows (n, m), and their inputs (n, d): random, or in 32 clusters, where G is ill-conditioned."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(num_rows, width)) * np.linspace(1, 0.01, width) / np.sqrt(width)
    if clustered:
        inputs = 0.1 * inputs + inputs[np.arange(num_rows) % 32]
    pre = drawn(inputs, width, random)
    return (random.normal(size=width) / np.sqrt(width)) * (pre > 0), inputs


def sketching(cases: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """Milliseconds of one Gauss-Newton solve, (G + damping) alpha = r with G = (A A^T) o K, one output, ReLU.

    Exact: G and Cholesky. Sketch: tensor sketch, its Gram matrix and Cholesky as preconditioner; then conjugate gradients,
    whose products want G too: without it, each product costs as much as G does.
    """
    check_sketch()
    found: list[dict[str, Any]] = []
    for clustered, (width, num_rows, num_buckets) in product_of((False, True), cases):
        slopes, inputs = make_rows(width, num_rows, clustered=clustered)
        right, overlap = np.random.default_rng(1).normal(size=num_rows), inputs @ inputs.T
        sketch = TensorSketch(width, inputs, num_buckets)
        matrix = (slopes @ slopes.T) * overlap
        damping = 1e-6 * float(linalg.eigvalsh(matrix, subset_by_index=[num_rows - 1, num_rows - 1])[0])
        eye = damping * np.eye(num_rows)

        def solved(slopes: Array = slopes, overlap: Array = overlap, eye: Array = eye, right: Array = right) -> Array:
            return np.asarray(linalg.cho_solve(linalg.cho_factor((slopes @ slopes.T) * overlap + eye), right))

        def factor(sketch: TensorSketch = sketch, slopes: Array = slopes, eye: Array = eye) -> Any:
            rows = sketch.rows(slopes)
            return linalg.cho_factor(rows @ rows.T + eye)

        def product(slopes: Array = slopes, overlap: Array = overlap, right: Array = right) -> Array:
            return np.asarray((slopes * ((overlap * right) @ slopes)).sum(axis=1))

        damped, known = matrix + eye, factor()
        exact = solved()
        by_sketch, products = conjugate_gradients(damped, right, lambda rest, known=known: linalg.cho_solve(known, rest))
        plain, plain_products = conjugate_gradients(damped, right, np.copy)
        same("by sketch", by_sketch, exact, 1e-3)
        same("by conjugate gradients", plain, exact, 1e-3)
        same("a product without G", product(), matrix @ right, 1e-10)
        alone = linalg.cho_solve(known, right)
        timed = {
            "exact: G": per_call(lambda slopes=slopes, overlap=overlap: (slopes @ slopes.T) * overlap),  # type: ignore[misc]
            "exact: Cholesky": per_call(lambda damped=damped, right=right: linalg.cho_solve(linalg.cho_factor(damped), right)),  # type: ignore[misc]
            "sketch: factor": per_call(factor),
            "sketch: products": per_call(
                lambda damped=damped, right=right, known=known: conjugate_gradients(  # type: ignore[misc]
                    damped, right, lambda rest: linalg.cho_solve(known, rest)
                )
            ),
            "a product without G": per_call(product),
        }
        error = float(np.linalg.norm(alone - exact) / np.linalg.norm(exact))
        found.append(
            {"rows": "clustered" if clustered else "random", "m": width, "n": num_rows, "s": num_buckets, **timed}
            | {"count": products, "count, no sketch": plain_products, "sketch in place of G: error": error}
        )
        print(found[-1], flush=True)
    return found


# --- several layers --------------------------------------------------------------------------------------------------


def several_layers(width: int, num_rows: int = 16, iterations: int = 60) -> list[dict[str, Any]]:
    """Tune's own cache against dense training: passes over the second layer, time per iteration, largest error of the loss."""
    import torch
    from safetensors.torch import load_file, save_file

    from farcast_cli.trajectory import open_snapshot
    from farcast_cli.tune.layers import Stack, tune_layers
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.one_layer import Settings
    from farcast_cli.tune.weight import find_weight

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    inputs, targets = random.normal(size=(num_rows, 256)), random.normal(size=(num_rows, 1))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        path, shapes = Path(work) / "step_1.safetensors", {"0": (width, 256), "1": (width, width), "head": (1, width)}
        scale = {name: np.sqrt((1 if name == "head" else 2) / shape[1]) for name, shape in shapes.items()}
        made = {name: torch.from_numpy(random.normal(size=shape) * scale[name]).float() for name, shape in shapes.items()}
        save_file(made, path)
        head = made["head"].double().numpy()
        cases: tuple[tuple[Any, float, float], ...] = (
            ("gelu", 1e-3, 0.0),
            ("gelu", 1.5e-4, 0.9),
            ("relu", 1e-3, 0.0),
            ("relu", 1.5e-4, 0.9),
        )
        for name, rate, momentum in cases:
            settings = Settings("gradient-descent", iterations, rate=rate * 4096 / width, momentum=momentum)
            weights = tuple(find_weight(open_snapshot(path), layer) for layer in ("0", "1"))
            started = time.process_time()
            lazy = tune_layers(
                Stack(weights, (name,), Objective("mse", name, head)), inputs, targets, settings, num_tuned=num_rows
            )
            ours = time.process_time() - started
            exact = _dense_losses(load_file(path), name, (inputs, targets), settings, torch.float64)
            started = time.process_time()
            _dense_losses(load_file(path), name, (inputs, targets), settings, torch.float32)
            dense = time.process_time() - started
            error = np.abs(np.array(lazy.losses) - exact).max() / exact[0]
            found.append(
                {
                    "activation": name,
                    "momentum": momentum,
                    "m": width,
                    "passes": weights[1].num_passes,
                    "exact passes": 2 * iterations,
                    "ms": 1000 * ours / iterations,
                    "dense ms": 1000 * dense / iterations,
                    "error": float(error),
                    "loss left": exact[-1] / exact[0],
                    "notes": list(lazy.notes),
                }
            )
            print(found[-1], flush=True)
    return found


def _dense_losses(made: Any, activation: str, rows: Any, settings: Any, dtype: Any) -> list[float]:
    """The loss before each step of torch's SGD on both layers."""
    import torch

    layers = [made[name].to(dtype).requires_grad_() for name in ("0", "1")]
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation]
    optimizer = torch.optim.SGD(layers, settings.rate, settings.momentum)
    x, y = (torch.from_numpy(one).to(dtype) for one in rows)
    head = made["head"].to(dtype)
    losses = []
    for _ in range(settings.num_iterations + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(act(act(x @ layers[0].T) @ layers[1].T) @ head.T, y)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def paper(*, quick: bool) -> dict[str, Any]:
    """All of it; the quick one at small widths."""
    widths = (1024, 4096) if quick else (1024, 4096, 16384)
    cases = (
        ((1024, 512, 1024),) if quick else ((16384, 1024, 2048), (16384, 1024, 8192), (4096, 1024, 2048), (1024, 2048, 4096))
    )
    return {
        "several layers": several_layers(1024 if quick else 4096),
        "fixed inputs": fixed_inputs(widths),
        "moving inputs": moving_inputs(2048 if quick else 8192),
        "half-space queries": reporting(4096 if quick else 16384),
        "a real model": on_a_real_model(128 if quick else 512),
        "tensor sketch": sketching(cases),
    }


if __name__ == "__main__":
    print(json.dumps(paper(quick="--quick" in sys.argv), indent=2))
