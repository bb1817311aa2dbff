"""Inner products of a trajectory's basis vectors, from its values in working memory.

Shapes: T snapshots, R = T + 1 basis vectors, N elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from farcast_cli.engine.casts import Floats

CHUNK = 2048  # products that are added up in float32: their sum is right to 2e-8, and that of many such to less
_BY_MATRIX = 14  # basis vectors from which on a product of matrices is faster than dot products
_TINY = 1e-30  # a mean square below which float32 loses some of the squares


def to_basis(values: Floats) -> Floats:
    """Turn rows w_0 .. w_{T-1} and one to spare into w_0, d_1 .. d_{T-1} and ones, in place; returns them."""
    for after in range(len(values) - 2, 0, -1):
        values[after] -= values[after - 1]
    values[-1] = 1.0
    return values


def inner_products(rows: Floats) -> NDArray[np.float64]:
    """Products (R, R) of the rows w_0, d_1 .., 1 of (R, N), in the order d_1 .., w_0, 1.

    Of float64 rows in float64; of float32 rows in float32 by chunks, which are added up in float64.
    """
    if rows.dtype == np.float64:
        return in_basis_order(rows @ rows.T)
    whole = rows.shape[1] // CHUNK * CHUNK
    products = np.zeros((len(rows), len(rows)))
    if whole:
        products += _chunk_products(rows[:, :whole].reshape(len(rows), -1, CHUNK))
    if whole < rows.shape[1]:
        products += _chunk_products(rows[:, None, whole:])
    return in_basis_order(products)


def _chunk_products(rows: Floats) -> NDArray[np.float64]:
    """Of chunks (R, chunks, N)."""
    if len(rows) >= _BY_MATRIX:
        chunks = rows.transpose(1, 0, 2)
        return np.asarray((chunks @ chunks.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64))
    products = np.empty((len(rows), len(rows)))
    for row in range(len(rows)):
        products[row, : row + 1] = np.vecdot(rows[: row + 1], rows[row]).sum(axis=1, dtype=np.float64)
        products[: row + 1, row] = products[row, : row + 1]
    return products


def are_held(products: NDArray[np.float64], moved: Callable[[int], bool]) -> bool:
    """Whether float32 could hold these products (R, R): none is too large or not finite, none is lost as too small.

    Args:
        moved: whether increment number t, from 1 on, has a value other than 0; asked where its square is small.
    """
    if not bool(np.isfinite(products).all()):
        return False
    small = np.diag(products)[:-2] < _TINY * products[-1, -1]
    return not any(moved(int(index) + 1) for index in np.flatnonzero(small))


def whole_products(lower: NDArray[np.float64], totals: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Products (R, R) in the order d_1 .., w_0, 1 from the kernel's: a lower triangle of (T, T) at least, and sums (T,)."""
    num_rows = len(totals)
    products = np.empty((num_rows + 1, num_rows + 1))
    products[:-1, :-1] = np.tril(lower[:num_rows, :num_rows])
    products[:-1, :-1] += np.tril(lower[:num_rows, :num_rows], -1).T
    products[-1, :-1] = products[:-1, -1] = totals
    products[-1, -1] = count
    return in_basis_order(products)


def in_basis_order(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of w_0, d_1 .., 1 as those of d_1 .., w_0, 1; the last two axes."""
    order = [*range(1, products.shape[-1] - 1), 0, products.shape[-1] - 1]
    return products[..., order, :][..., order]
