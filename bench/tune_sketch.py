"""The paper's tensor sketch, as a preconditioner of the Gauss-Newton regression, against the exact Gram matrix.

    python bench/tune_sketch.py [--quick]

Every variant is checked against the plain computation before it is timed. One thread.

Shapes: n rows, m neurons, d inputs of a neuron, s buckets of a sketch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
from dataclasses import dataclass
from functools import partial
from itertools import product as product_of
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import linalg, sparse
from tune_timing import WrongResultError, drawn, per_call, same

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

CASES = ((16384, 1024, 2048), (16384, 1024, 8192), (4096, 1024, 2048), (1024, 2048, 4096))
"""m, n, s."""


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


@dataclass
class Step:
    """One Gauss-Newton solve, (G + damping) alpha = r with G = (A A^T) o K: one output, ReLU."""

    slopes: Array
    """A (n, m): the head where a neuron fires, 0 elsewhere."""
    inputs: Array
    overlap: Array
    right: Array
    damping: float = 0.0

    @classmethod
    def make(cls, width: int, num_rows: int, *, clustered: bool) -> Step:
        """Rows at random, or in 32 clusters, where G is ill-conditioned."""
        random = np.random.default_rng(0)
        inputs = random.normal(size=(num_rows, width)) * np.linspace(1, 0.01, width) / np.sqrt(width)
        if clustered:
            inputs = 0.1 * inputs + inputs[np.arange(num_rows) % 32]
        slopes = (random.normal(size=width) / np.sqrt(width)) * (drawn(inputs, width, random) > 0)
        step = cls(slopes, inputs, inputs @ inputs.T, random.normal(size=num_rows))
        step.damping = 1e-6 * float(linalg.eigvalsh(step.gram(), subset_by_index=[num_rows - 1, num_rows - 1])[0])
        return step

    def gram(self) -> Array:
        """G, damped."""
        gram = (self.slopes @ self.slopes.T) * self.overlap
        gram[np.diag_indices_from(gram)] += self.damping
        return gram

    def by_cholesky(self, gram: Array) -> Array:
        return np.asarray(linalg.cho_solve(linalg.cho_factor(gram), self.right))

    def sketched(self, sketch: TensorSketch) -> Any:
        """The Cholesky factor of the sketch's own Gram matrix, damped."""
        rows = sketch.rows(self.slopes)
        return linalg.cho_factor(rows @ rows.T + self.damping * np.eye(len(rows)))

    def by_sketch(self, gram: Array, factor: Any) -> tuple[Array, int]:
        return conjugate_gradients(gram, self.right, lambda rest: linalg.cho_solve(factor, rest))

    def product(self) -> Array:
        """G r without G: what conjugate gradients that never form it would pay each time."""
        return np.asarray((self.slopes * ((self.overlap * self.right) @ self.slopes)).sum(axis=1) + self.damping * self.right)


def sketching(cases: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """Milliseconds of a solve. Exact: G and Cholesky. Sketch: the sketch's factor as preconditioner of conjugate gradients.

    Their products want G too: without it each costs as much as G does.
    """
    check_sketch()
    found: list[dict[str, Any]] = []
    for clustered, (width, num_rows, num_buckets) in product_of((False, True), cases):
        step = Step.make(width, num_rows, clustered=clustered)
        about = {"rows": "clustered" if clustered else "random", "m": width, "n": num_rows, "s": num_buckets}
        found.append(about | _compared(step, TensorSketch(width, step.inputs, num_buckets)))
        print(found[-1], flush=True)
    return found


def _compared(step: Step, sketch: TensorSketch) -> dict[str, float]:
    gram, factor = step.gram(), step.sketched(sketch)
    exact = step.by_cholesky(gram)
    by_sketch, count = step.by_sketch(gram, factor)
    plain, plain_count = conjugate_gradients(gram, step.right, np.copy)
    same("by sketch", by_sketch, exact, 1e-3)
    same("by conjugate gradients", plain, exact, 1e-3)
    same("a product without G", step.product(), gram @ step.right, 1e-10)
    alone = linalg.cho_solve(factor, step.right)
    return {
        "exact: G": per_call(step.gram),
        "exact: Cholesky": per_call(partial(step.by_cholesky, gram)),
        "sketch: factor": per_call(partial(step.sketched, sketch)),
        "sketch: products": per_call(partial(step.by_sketch, gram, factor)),
        "a product without G": per_call(step.product),
        "count": count,
        "count, no sketch": plain_count,
        "sketch in place of G: error": float(np.linalg.norm(alone - exact) / np.linalg.norm(exact)),
    }


if __name__ == "__main__":
    sketching(((1024, 512, 1024),) if "--quick" in sys.argv else CASES)
