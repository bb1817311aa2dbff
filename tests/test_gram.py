"""The statistic equals inner products of whole tensors, however it was summed up."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.engine import native
from farcast_cli.errors import NonFiniteError
from farcast_cli.forecast.accumulate import KEPT_SAMPLE, MIN_KEPT, accumulate, bytes_to_sample
from farcast_cli.run.alignment import align
from farcast_cli.run.trajectory import discover
from farcast_cli.tensors import sample_stretches
from tests.tiny import basis, save_safetensors, statistic, stored, wander, without_kernel, write_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.forecast.gram import Gram, Sample

STEPS = (100, 200, 300, 450, 500)
SIZES = {"a": 300, "b": 1, "c": 4000}
FLOAT64_SUM = 1e-12  # of the largest entry: sums of some thousand products in float64, in another order
FLOAT32_SUM = 1e-7  # of the two vectors' norms: increments rounded to float32 (6e-8), sums of 2,048 products (2e-8)


@pytest.fixture(params=["native", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the two that multiply in float32."""
    if request.param == "native" and native.KERNEL is None:
        pytest.skip("this installation has no compiled kernel")
    with nullcontext() if request.param == "native" else without_kernel():
        yield


def _accumulated(folder: Path, *, num_samples: int | None = DEFAULT_SAMPLE) -> tuple[Gram, Sample]:
    trajectory = discover(folder)
    return accumulate(align(trajectory.snapshots), trajectory.steps, num_samples=num_samples)


def _oracle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products one by one."""
    vectors = [values[t] - values[t - 1] for t in range(1, len(values))] + [values[0], np.ones(values.shape[1])]
    return np.array([[np.sum(a * b) for b in vectors] for a in vectors])


def _assert_close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64_SUM * np.abs(expected).max())


@pytest.mark.parametrize("num_samples", [DEFAULT_SAMPLE, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_matrix_holds_the_inner_products_of_the_stored_increments(
    dtype: torch.dtype, num_samples: int | None, tmp_path: Path
) -> None:
    """Of the values as the files hold them: rounding to 16 bits is part of the data."""
    run = write_run(tmp_path, wander(1, num_snapshots=5, sizes=SIZES), STEPS, dtype=dtype)
    gram, _ = _accumulated(run, num_samples=num_samples)
    assert gram.steps.tolist() == list(STEPS)
    for index, name in enumerate(SIZES):
        _assert_close(gram.matrix[index], _oracle(stored(run, STEPS, name)))


def test_the_increments_of_a_hardly_moving_large_weight_do_not_cancel(tmp_path: Path) -> None:
    """Moves of 1e-4 on weights of 1000: raw inner products in float32 would lose all of them."""
    values = 1000 + 1e-4 * np.arange(5)[:, None] * np.ones((1, 50))
    gram, _ = _accumulated(write_run(tmp_path, {"w": values}, STEPS, dtype=torch.float64))
    np.testing.assert_allclose(gram.matrix[0][:4, :4], np.full((4, 4), 50 * 1e-8), rtol=1e-8)  # float64: 1e-13 / 1e-4


def _assert_close_by_norms(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    norms = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
    np.testing.assert_array_less(np.abs(found - expected), FLOAT32_SUM * norms[..., :, None] * norms[..., None, :])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("num_elements", [16_385, 50_001, 200_000, (1 << 20) + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_full_pass_over_a_large_tensor_multiplies_in_float32_and_adds_up_in_float64(
    dtype: torch.dtype, num_elements: int, tmp_path: Path
) -> None:
    run = write_run(tmp_path, wander(2, num_snapshots=5, sizes={"w": num_elements}), STEPS, dtype=dtype)
    gram, sample = _accumulated(run, num_samples=None)
    expected = _oracle(stored(run, STEPS, "w"))
    _assert_close_by_norms(gram.matrix[0], expected)
    assert len(sample.values) == KEPT_SAMPLE
    if dtype == torch.float64:
        np.testing.assert_allclose(gram.matrix[0], expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.usefixtures("engine")
def test_very_many_snapshots_are_multiplied_alike(tmp_path: Path) -> None:
    steps = tuple(range(100, 2100, 100))
    run = write_run(tmp_path, wander(2, num_snapshots=20, sizes={"w": 30_000}), steps)
    gram, _ = _accumulated(run, num_samples=None)
    _assert_close_by_norms(gram.matrix[0], _oracle(stored(run, steps, "w")))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("size", [1e-25, 1e22])
def test_what_float32_cannot_square_is_multiplied_in_float64(size: float, tmp_path: Path) -> None:
    values = size * wander(3, num_snapshots=5, sizes={"w": 20_000})["w"]
    run = write_run(tmp_path, {"w": values}, STEPS)
    gram, _ = _accumulated(run, num_samples=None)
    _assert_close_by_norms(gram.matrix[0], _oracle(stored(run, STEPS, "w")))


@pytest.mark.usefixtures("engine")
def test_a_frozen_tensor_counts_as_still_in_a_full_pass(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"w": np.repeat(np.linspace(-1, 1, 20_000)[None], 5, axis=0)}, STEPS)
    gram, _ = _accumulated(run, num_samples=None)
    assert not gram.matrix[0, :4].any()


@pytest.mark.usefixtures("engine")
def test_a_full_pass_refuses_or_forgives_what_is_not_finite_as_a_sample_does(tmp_path: Path) -> None:
    values = wander(4, num_snapshots=5, sizes={"w": 20_000})["w"]
    values[:, 7] = -np.inf
    gram, _ = _accumulated(write_run(tmp_path / "mask", {"w": values}, STEPS), num_samples=None)
    values[:, 7] = 0
    _assert_close_by_norms(gram.matrix[0], _oracle(values.astype(np.float32).astype(np.float64)))
    values[2, 19_999] = np.nan
    with pytest.raises(NonFiniteError, match=r"step_300\.safetensors: tensor 'w' holds nan"):
        _accumulated(write_run(tmp_path / "nan", {"w": values}, STEPS), num_samples=None)


@pytest.mark.usefixtures("engine")
def test_the_size_of_the_stretches_changes_only_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, wander(2, num_snapshots=5, sizes={"w": 50_000}), STEPS)
    whole, _ = _accumulated(run, num_samples=None)
    for stretch, span in ((4096, 1 << 20), (5_000, 12_000), (49_999, 50_000)):
        monkeypatch.setattr("farcast_cli.engine.reader.MAX_STRETCH", stretch)
        monkeypatch.setattr("farcast_cli.forecast.accumulate.SPAN", span)
        pieces, _ = _accumulated(run, num_samples=None)
        _assert_close_by_norms(pieces.matrix, whole.matrix)


def test_a_small_tensor_is_its_own_sample(tmp_path: Path) -> None:
    run = write_run(tmp_path, wander(3, num_snapshots=5, sizes=SIZES), STEPS)
    sampled, kept = _accumulated(run, num_samples=4000)
    full, kept_of_full = _accumulated(run, num_samples=None)
    _assert_close(sampled.matrix, full.matrix)
    np.testing.assert_array_equal(kept.values[: kept.bounds[2]], kept_of_full.values[: kept_of_full.bounds[2]])


def test_a_large_tensors_matrix_is_that_of_its_sample_times_its_share(tmp_path: Path) -> None:
    run = write_run(tmp_path, wander(4, num_snapshots=5, sizes={"w": 40_000}), STEPS)
    gram, _ = _accumulated(run, num_samples=4096)
    values = stored(run, STEPS, "w")
    seen = np.concatenate([np.arange(s.start, s.start + s.count) for s in sample_stretches(40_000, 4096)])
    _assert_close(gram.matrix[0], _oracle(values[:, seen]) * 40_000 / 4096)
    assert gram.matrix[0, -1, -1] == pytest.approx(40_000)
    whole = np.diag(_oracle(values))[:4]
    np.testing.assert_allclose(np.diag(gram.matrix[0])[:4], whole, rtol=0.1)  # 4,096 samples: 1 / sqrt(2048) = 2 %, four sigma


@given(num_elements=st.integers(1, 10**7), num_samples=st.integers(1000, 40_000))
def test_a_sample_covers_its_tensor_evenly_from_the_first_element_to_the_last(num_elements: int, num_samples: int) -> None:
    pieces = sample_stretches(num_elements, num_samples)
    assert pieces[0].start == 0
    assert pieces[-1].start + pieces[-1].count == num_elements
    total = sum(piece.count for piece in pieces)
    assert total == num_elements if num_elements <= num_samples else num_samples / 2 < total <= num_samples
    gaps = [b.start - a.start - a.count for a, b in itertools.pairwise(pieces)]
    assert min(gaps, default=0) >= 0
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(keep=st.sets(st.integers(0, 7), min_size=1).map(sorted), seed=st.integers(0, 100))
def test_restricting_to_some_snapshots_equals_starting_from_them(keep: list[int], seed: int) -> None:
    arrays = wander(seed, num_snapshots=8, sizes={"a": 20, "b": 3})
    steps = np.arange(8) * 10
    gram, sample = statistic(arrays, steps.tolist())
    expected, rows = statistic({name: values[keep] for name, values in arrays.items()}, steps[keep].tolist())
    found = gram.restrict(keep)
    assert found.steps.tolist() == expected.steps.tolist()
    _assert_close(found.matrix, expected.matrix)
    np.testing.assert_array_equal(sample.restrict(keep).values, rows.values)


@given(keep=st.sets(st.integers(0, 7), min_size=1).map(sorted), seed=st.integers(0, 100))
def test_a_change_of_basis_leaves_the_vector_what_it_is(keep: list[int], seed: int) -> None:
    values = wander(seed, num_snapshots=8, sizes={"a": 20})["a"]
    gram, _ = statistic({"a": values}, list(range(8)))
    coefficients = np.random.default_rng(seed).normal(size=len(keep) + 1)
    there = coefficients @ basis(values[keep])
    here = coefficients @ gram.change_of_basis(keep) @ basis(values)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-12)  # sums of eight numbers near 1


@given(seed=st.integers(0, 100))
def test_norms_are_those_of_the_vectors(seed: int) -> None:
    arrays = wander(seed, num_snapshots=6, sizes={"a": 20, "b": 3})
    gram, _ = statistic(arrays, list(range(6)))
    coefficients = np.random.default_rng(seed).normal(size=(2, 7))
    vectors = [row @ basis(values) for row, values in zip(coefficients, arrays.values(), strict=True)]
    np.testing.assert_allclose(gram.norms(coefficients), [np.linalg.norm(vector) for vector in vectors], rtol=1e-9)
    assert gram.total_norm(coefficients) == pytest.approx(np.linalg.norm(np.concatenate(vectors)), rel=1e-9)
    shared = [np.linalg.norm(coefficients[0] @ basis(values)) for values in arrays.values()]
    np.testing.assert_allclose(gram.norms(coefficients[0]), shared, rtol=1e-9)


def test_the_kept_sample_holds_the_weights_themselves_evenly_spread(tmp_path: Path) -> None:
    run = write_run(tmp_path, wander(5, num_snapshots=5, sizes={"a": 40, "b": 20_000}), STEPS)
    _, sample = _accumulated(run)
    assert sample.bounds.tolist() == [0, 40, 40 + KEPT_SAMPLE]
    assert sample.sizes.tolist() == [40, 20_000]
    np.testing.assert_array_equal(sample.values[:40], stored(run, STEPS, "a").T)
    values = stored(run, STEPS, "b").T
    places = [int(np.flatnonzero((values == row).all(axis=1))[0]) for row in sample.values[40:]]
    assert (places[0], places[-1]) == (0, 19_999)
    assert np.all(np.diff(places) > 0)
    assert max(np.diff(places)) < 200  # 20,000 / 1,024 apart, and the gap between two blocks on top


def test_the_kept_sample_shrinks_when_there_are_very_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farcast_cli.forecast.accumulate.KEPT_BYTES", 4 * 5 * 3 * 100)  # a hundred weights of each tensor
    sizes = {"a": 500, "b": 500, "c": 10}
    _, sample = _accumulated(write_run(tmp_path / "a", wander(6, num_snapshots=5, sizes=sizes), STEPS))
    assert np.diff(sample.bounds).tolist() == [100, 100, 10]
    monkeypatch.setattr("farcast_cli.forecast.accumulate.KEPT_BYTES", 1)
    _, sample = _accumulated(tmp_path / "a")
    assert np.diff(sample.bounds).tolist() == [MIN_KEPT, MIN_KEPT, 10]


def test_a_mask_of_infinities_that_never_moves_counts_as_still(tmp_path: Path) -> None:
    mask = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    arrays = wander(7, num_snapshots=5, sizes={"w": 30})
    run = write_run(tmp_path, arrays, STEPS, extra=lambda _: {"mask": mask})
    gram, _ = _accumulated(run)
    assert not gram.matrix[0, :4, :4].any()  # tensors are in the order of their data in the file: mask, w
    assert np.isfinite(gram.matrix).all()
    _assert_close(gram.matrix[1], _oracle(stored(run, STEPS, "w")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_file_and_tensor(bad: float, tmp_path: Path) -> None:
    write_run(tmp_path, wander(8, num_snapshots=5, sizes={"u": 10, "v.weight": 10}), STEPS)
    tensors = load_file(tmp_path / "step_300.safetensors")
    tensors["v.weight"][4] = bad
    save_file(tensors, tmp_path / "step_300.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"step_300\.safetensors: tensor 'v\.weight' holds {bad}"):
        _accumulated(tmp_path)


def test_nan_in_every_snapshot_is_refused_too(tmp_path: Path) -> None:
    write_run(tmp_path, {"w": np.full((5, 3), np.nan)}, STEPS)
    with pytest.raises(NonFiniteError, match="tensor 'w' holds nan"):
        _accumulated(tmp_path)


def test_the_bytes_to_read_are_known_in_advance(tmp_path: Path) -> None:
    for step in STEPS:
        save_safetensors(tmp_path / f"step_{step}.safetensors", {"w": torch.ones(20_000), "h": torch.ones(10).half()})
    trajectory, read = discover(tmp_path), [0]

    def count(done: int) -> None:
        read[0] += done

    for num_samples, expected in ((16_384, 5 * (4 * 16_384 + 2 * 10)), (None, 5 * (4 * 20_000 + 2 * 10))):
        read[0] = 0
        accumulate(align(trajectory.snapshots), trajectory.steps, num_samples=num_samples, progress=count)
        assert read[0] == expected == bytes_to_sample(trajectory.snapshots, num_samples)
