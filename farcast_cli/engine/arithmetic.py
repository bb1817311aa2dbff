"""The forecast of a batch, elementwise and in a fixed order of operations, in numpy or in torch on a device.

    w_hat = w_s + sum_t c_t (w_t - w_s) + gain w_s + constant

A file may also hold moves m of the weights, which count as they are: c m. And the sum may be written alone, without w_s.

Every operation rounds by itself (no fused multiply-add, which rounds otherwise), so the bytes do not depend on how the work
is cut, and torch on the CPU gives numpy's to the last bit. numpy and torch name what is needed here alike.

Shapes: H horizons, N elements of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from farcast_cli.engine import native
from farcast_cli.engine.casts import narrow, widen
from farcast_cli.engine.reader import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from farcast_cli.engine.casts import WorkType
    from farcast_cli.engine.native import Kernel
    from farcast_cli.tensors import DType

Array = Any
"""An array of numpy, or a tensor of torch."""
Factor = Any
"""A number for a whole batch, or an array (N,)."""


class Arithmetic(Protocol):
    """Where a batch is computed. One belongs to one worker."""

    xp: Any
    """numpy or torch: multiply, add, subtract, where, zeros_like."""
    kernel: Kernel | None
    """What does all of it at once, to the same bytes, where there is such a thing."""

    @property
    def num_bytes(self) -> int:
        """Of the host's memory that it holds."""

    def context(self) -> AbstractContextManager[object]:
        """What a worker computes within."""

    def memory(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Memory to read into; free to be overwritten when it is asked for again under its name."""

    def floats(self, name: str, count: int, like: Array) -> Array:
        """Working memory (count,) of the type of `like`."""

    def load(self, raw: NDArray[np.uint8], dtype: DType, name: str, work: WorkType) -> Array:
        """The values of raw bytes, which must not be changed, in the type of the arithmetic."""

    def spread(self, values: NDArray[np.floating[Any]], counts: Sequence[int], work: WorkType) -> Factor:
        """One number for each segment's elements, over all of the batch's."""

    def store(self, values: Array, dtype: DType, out: NDArray[np.uint8]) -> bool:
        """Round values to a stored type, into its bytes; whether all results are finite."""

    def to_host(self, values: Array) -> NDArray[Any]: ...

    def from_host(self, values: NDArray[Any]) -> Array: ...


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A batch's update: what is added up, one weight for each horizon and each snapshot other than the origin.

    Args:
        weights: by horizon, by snapshot.
        gains, constants: by horizon; None where all are zero.
        moves: by snapshot, whether it holds moves and not weights; empty where none does.
        bare: by horizon, whether the update is written alone; empty where none is.
    """

    weights: Sequence[Sequence[Factor]]
    gains: Sequence[Factor] | None = None
    constants: Sequence[Factor] | None = None
    moves: Sequence[bool] = ()
    bare: Sequence[bool] = ()


def forecasts(
    arithmetic: Arithmetic, last: Array, others: Iterator[Array], coefficients: Coefficients, *, keep_zeros: bool
) -> Iterator[Array]:
    """The values of every horizon, (N,) each; the memory is the arithmetic's, good until the next is asked for.

    Args:
        last: the origin's values.
        others: the other snapshots' values, in order; each is used up before the next is asked for.
        keep_zeros: some of the last values are -0.0, which + 0.0 would lose: an element that never moved keeps its bits.
    """
    xp, count = arithmetic.xp, len(last)
    updates = [arithmetic.floats(f"update {horizon}", count, last) for horizon in range(len(coefficients.weights))]
    moved: Array = False
    number = -1
    for number, other in enumerate(others):
        is_alone = number == 0 and len(updates) == 1
        move = other
        if not (coefficients.moves and coefficients.moves[number]):
            move = xp.subtract(other, last, out=updates[0] if is_alone else arithmetic.floats("move", count, last))
        if coefficients.gains is not None:
            moved = (move != 0) | moved
        for update, weights in zip(updates, coefficients.weights, strict=True):
            if number == 0:
                xp.multiply(move, weights[number], out=update)
            else:
                term = xp.multiply(move, weights[number], out=arithmetic.floats("term", count, last))
                xp.add(update, term, out=update)
    for horizon, update in enumerate(updates):
        if number < 0:
            update[:] = 0
        whole = update
        if number >= 0 and coefficients.gains is not None and coefficients.constants is not None:
            whole = xp.where(
                moved, update + last * coefficients.gains[horizon] + coefficients.constants[horizon], xp.zeros_like(update)
            )
        if coefficients.bare and coefficients.bare[horizon]:
            yield whole
        else:
            yield xp.where(whole == 0, last, last + whole) if keep_zeros else xp.add(last, whole, out=update)


class HostArithmetic:
    """numpy on the CPU. Blocks of a batch stay in a core's cache from the first operation to the last."""

    xp: Any = np

    def __init__(self) -> None:
        self._scratch, self.kernel = Scratch(), native.KERNEL

    @property
    def num_bytes(self) -> int:
        return self._scratch.num_bytes

    def context(self) -> AbstractContextManager[object]:
        return np.errstate(all="ignore")  # what is not finite is looked for afterwards

    def memory(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        return self._scratch.named(f"raw {name}", num_bytes, np.uint8)

    def floats(self, name: str, count: int, like: Array) -> Array:
        return self._scratch.named(name, count, like.dtype)

    def load(self, raw: NDArray[np.uint8], dtype: DType, name: str, work: WorkType) -> Array:
        return widen(raw, dtype, self._scratch.named(name, len(raw) // dtype.itemsize, work))

    def spread(self, values: NDArray[np.floating[Any]], counts: Sequence[int], work: WorkType) -> Factor:
        if len(values) == 1:
            return float(values[0])
        return np.repeat(values.astype(work), counts)

    def store(self, values: Array, dtype: DType, out: NDArray[np.uint8]) -> bool:
        return narrow(values, dtype, out)

    def to_host(self, values: Array) -> NDArray[Any]:
        return np.asarray(values)

    def from_host(self, values: NDArray[Any]) -> Array:
        return values
