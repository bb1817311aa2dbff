"""The compiled kernel (`_kernel.c`): whether this installation has it, and what it takes.

It computes what `arithmetic` and `casts` compute, to the same bytes, and inner products, to rounding, in a fraction of the time:
it takes a block through all operations while the block is in the nearest cache, and needs no interpreter lock, so that threads
work side by side. It is built where there is a C compiler. FARCAST_ENGINE=numpy switches it off, FARCAST_ENGINE=native insists on it.

Shapes: S segments, T snapshots other than the origin, H horizons.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from farcast_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.files.reading import InFile
    from farcast_cli.tensors import DType

VARIABLE = "FARCAST_ENGINE"
_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
_BLOCK = 1 << 17  # elements of a batch: Python between two calls then costs a tenth
_BLOCK_BYTES = 4 << 20  # of a batch at all snapshots together, as float32
_MIN_BLOCK = 1 << 12
SIDE = 2
"""Products are made in tiles of so many rows."""


Values: TypeAlias = "NDArray[Any] | InFile"
"""Values in memory, or in a file that the kernel reads itself."""


class Kernel(Protocol):
    """The functions of the compiled module. They check sizes, and nothing else."""

    def combine(  # noqa: PLR0913, PLR0917 - C takes its arguments by position
        self,
        origin: tuple[Values, ...],
        others: tuple[Values, ...],
        outs: tuple[NDArray[Any], ...],
        types: bytes,
        moves: bytes,
        bare: bytes,
        counts: NDArray[Any],
        weights: NDArray[Any],
        gains: NDArray[Any] | None,
        unchanged: NDArray[Any],
        non_negative: bool,  # noqa: FBT001
        in_double: bool,  # noqa: FBT001
        /,
    ) -> bool:
        """Compute a batch at every horizon; whether all results are finite. See `Update` for what it takes.

        Args:
            origin, others, outs: raw values, one behind the other, at any byte; one origin, and an output for each horizon.
            counts: (S,) int64, elements of the segments; one, where values are in files.
            unchanged: (H,) int64, to which the elements with the origin's own bits are added.

        Raises:
            OSError, EOFError: a file, which it names, could not be read, or ends early (path, bytes expected and found).
        """

    def products(  # noqa: PLR0917 - likewise
        self,
        snapshots: tuple[Values, ...],
        types: bytes,
        count: int,
        products: NDArray[Any],
        totals: NDArray[Any],
        moved: NDArray[Any],
        /,
    ) -> None:
        """Add up inner products of the rows w_0, d_1 .. of T snapshots, in float32 over some hundred values, in float64 from there on.

        Args:
            snapshots: raw values of each, one after the other, at any byte.
            count: how many.
            products: (P, P) float64, P the next even number, to whose lower triangle they are added.
            totals: (T,) float64, to which the sums of the rows are added.
            moved: (T,) bytes, set where a row has a value other than 0.

        Raises:
            OSError, EOFError: likewise.
        """


def _chosen() -> Kernel | None:
    """The kernel, unless it was not built or the environment switches it off.

    Raises:
        UsageError: the environment asks for what there is not.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in {"", "native", "numpy"}:
        raise UsageError(f"{VARIABLE}={wanted}: expected native or numpy")
    if wanted == "numpy":
        return None
    try:
        found: Any = import_module("farcast_cli.engine._kernel")
    except ImportError as error:
        if wanted:
            raise UsageError(
                f"{VARIABLE}=native: this installation has no compiled kernel",
                hint="install farcast again where there is a C compiler",
            ) from error
        return None
    kernel: Kernel = found
    return kernel


KERNEL = _chosen()


def engine() -> str:
    """What computes, as `--version -v` and FARCAST_ENGINE name it."""
    return "numpy" if KERNEL is None else "native"


def codes(others: Sequence[DType], origin: DType, output: DType) -> bytes | None:
    """Element types as the kernel takes them, of the others, the origin and the output; None if it does not know them.

    float64 to float16 is left to numpy and torch, which round it once and twice.
    """
    if output.name == ("float16" if origin.name == "float64" else "float64"):
        return None
    return codes_of([*others, origin, output])


def codes_of(types: Sequence[DType]) -> bytes | None:
    """Element types as the kernel takes them; None if it does not know one."""
    names = [dtype.name for dtype in types]
    return bytes(_CODES[name] for name in names) if all(name in _CODES for name in names) else None


def block(num_snapshots: int) -> int:
    """Elements of a batch."""
    return max(_MIN_BLOCK, min(_BLOCK, _BLOCK_BYTES // (4 * num_snapshots)))


@dataclass(frozen=True, slots=True)
class Update:
    """A batch's update as the kernel takes it.

    Args:
        types: of the T others, the origin and the output.
        moves: of the T others, whether they hold moves and not weights.
        bare: of the H horizons, whether the update is written alone.
        weights: (S, H, T).
        gains: (S, H, 2) of gain and constant; None where all are zero.
    """

    types: bytes
    moves: bytes
    bare: bytes
    weights: NDArray[Any]
    gains: NDArray[Any] | None
