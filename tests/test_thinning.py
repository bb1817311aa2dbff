"""A long run: what is kept of its snapshots in memory, which of them enter a fit, and that all else works as before."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from farcast_cli.errors import SnapshotError, StepConflictError
from farcast_cli.forecast import accumulate as accumulation
from farcast_cli.forecast.accumulate import KEPT_BYTES, KEPT_SAMPLE, MAX_KEPT_BYTES, accumulate
from farcast_cli.forecast.backtest import backtest_ratio, coherence, recent_coherence
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster import Task
from farcast_cli.forecast.forecaster_file import load_fitted, save_fitted
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.run import closed, thinning, trajectory
from farcast_cli.run.alignment import align, since_last_change
from farcast_cli.run.closed import ClosedTensors, reopened
from farcast_cli.run.thinning import GRAM_BYTES, MAX_DENSE, MIN_LIMIT, chosen, most_snapshots
from farcast_cli.run.trajectory import discover, survey
from farcast_cli.tensors import TensorEntry
from tests.conftest import make_loose_run, make_torch_run
from tests.tiny import SAMPLES, fit_run, statistic, wander, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.conftest import CallCli

LONG = tuple(range(10, 610, 10))


@pytest.fixture
def few_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a run of thousands of tensors for one of a few: at most 24 snapshots enter, and two are open at once."""
    monkeypatch.setattr(thinning, "MIN_LIMIT", 24)
    monkeypatch.setattr(thinning, "GRAM_BYTES", 1)
    monkeypatch.setattr(trajectory, "MAX_OPEN", 0)


# --- which snapshots enter -------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=300, unique=True).map(sorted),
    count=st.integers(MIN_LIMIT, 120),
)
def test_the_first_and_the_last_ones_always_enter_and_the_steps_alone_decide(steps: list[int], count: int) -> None:
    keep = chosen(steps, count)
    assert keep == sorted(set(keep))
    assert len(keep) == min(count, len(steps))
    assert keep[0] == 0
    dense = min(MAX_DENSE, count // 2, len(steps))
    assert keep[-dense:] == list(range(len(steps) - dense, len(steps)))
    shifted = [3 * step + 7 for step in steps]
    assert len(chosen(shifted, count)) == len(keep)
    assert keep == chosen(tuple(steps), count)


def test_the_rest_enter_evenly_by_their_steps_and_not_by_their_number() -> None:
    """Saved often at first, and seldom later."""
    steps = [*range(0, 1_000, 10), *range(1_000, 41_000, 400)]
    keep = [steps[index] for index in chosen(steps, 40)]
    early = keep[:-MAX_DENSE]
    gaps = np.diff(early)
    assert (early[0], early[-1]) == (0, pytest.approx(38_100, abs=600))
    assert gaps.min() >= 0.7 * gaps.mean()
    assert gaps.max() <= 1.3 * gaps.mean()


def test_the_inner_products_of_those_that_enter_fit_their_limit_and_short_runs_enter_whole() -> None:
    for num_tensors in (1, 40, 100, 500, 1_000, 5_000, 18_000):
        limit = most_snapshots(num_tensors)
        assert 8 * num_tensors * (limit + 1) ** 2 <= GRAM_BYTES < 8 * num_tensors * (limit + 2) ** 2
    assert [most_snapshots(count) for count in (100, 500, 5_000, 10**6)] == [288, 128, 39, MIN_LIMIT]
    assert chosen(range(20), MIN_LIMIT) == list(range(20))


def test_the_kept_sample_is_bounded_for_any_number_of_tensors_and_snapshots() -> None:
    for num_tensors in (1, 10, 1_000, 5_000, 50_000, 1_000_000):
        num_snapshots = most_snapshots(num_tensors)
        kept = accumulation._num_kept(num_snapshots, num_tensors)
        assert 1 <= kept <= KEPT_SAMPLE
        assert 4 * kept * num_snapshots * num_tensors <= MAX_KEPT_BYTES
        if num_tensors <= 5_000:
            assert 4 * kept * num_snapshots * num_tensors <= KEPT_BYTES


# --- what is kept of a snapshot --------------------------------------------------------------------------------------


def test_while_a_folder_is_read_the_tensors_of_few_snapshots_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", {f"{index}.w": np.zeros((40, 2)) for index in range(50)}, range(40))
    monkeypatch.setattr(trajectory, "MAX_OPEN", 150)
    found = discover(run)
    gc.collect()
    held = sum(type(one) is TensorEntry and one.path.parent == run for one in gc.get_objects())
    assert held <= 150
    since_last_change(found.snapshots)
    gc.collect()
    assert sum(type(one) is TensorEntry and one.path.parent == run for one in gc.get_objects()) <= 150
    for snapshot in found.snapshots:  # and yet each of them can be asked
        assert isinstance(snapshot.tensors, ClosedTensors)
        assert len(snapshot.tensors) == 50
        assert snapshot.tensors["7.w"].path == snapshot.path
        assert set(snapshot.tensors) == {f"{index}.w" for index in range(50)}


RUNS: dict[str, Callable[[Path], Path]] = {
    "safetensors": make_loose_run,
    "torch": make_torch_run,
    "trainer": lambda _: SAMPLES / "huggingface",
}


@pytest.mark.parametrize("kind", RUNS)
def test_closed_snapshots_give_the_forecaster_that_open_ones_give(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUNS[kind](tmp_path / "run")
    save_fitted(fit_run(run), tmp_path / "open.safetensors")
    seen = survey(run)
    monkeypatch.setattr(trajectory, "MAX_OPEN", 0)
    again = survey(run)
    assert all(isinstance(snapshot.tensors, ClosedTensors) for snapshot in again.snapshots)
    for one, other in zip(seen.snapshots, again.snapshots, strict=True):
        whole = reopened(other)
        assert (whole.step, whole.step_source, whole.evidence) == (one.step, one.step_source, one.evidence)
        assert dict(whole.tensors) == dict(one.tensors) == dict(other.tensors)
        assert whole.digest == one.digest
        assert other.num_bytes == one.num_bytes
    save_fitted(fit_run(run), tmp_path / "closed.safetensors")
    assert (tmp_path / "closed.safetensors").read_bytes() == (tmp_path / "open.safetensors").read_bytes()


def change_shape(run: Path) -> None:
    for step in (100, 200):
        tensors = load_file(run / f"step_{step}.safetensors")
        save_file({**tensors, "a": tensors["a"][:-1]}, run / f"step_{step}.safetensors")


def add_copy(run: Path) -> None:
    save_file(load_file(run / "step_400.safetensors"), run / "again_step_400.safetensors")


def add_other(run: Path) -> None:
    save_file(
        {name: value + 1 for name, value in load_file(run / "step_400.safetensors").items()}, run / "b_step_400.safetensors"
    )


def change_type(run: Path) -> None:
    for step in range(500, 900, 100):
        tensors = load_file(run / f"step_{step}.safetensors")
        save_file({**tensors, "b": tensors["b"].to(torch.bfloat16)}, run / f"step_{step}.safetensors")


@pytest.mark.parametrize("change", [change_shape, add_copy, add_other, change_type])
def test_what_is_said_of_a_run_is_the_same_whether_its_snapshots_were_closed(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", wander(1, num_snapshots=8, sizes={"a": 30, "b": 5}), range(100, 900, 100))
    change(run)

    def told() -> tuple[Any, ...]:
        found = survey(run)
        history, begins = since_last_change(found.snapshots, minimum=6)
        aligned = align([reopened(snapshot) for snapshot in history])
        conflicts = [str(conflict) for conflict in found.conflicts]
        return found.steps, found.ignored, found.notes, conflicts, begins, len(history), aligned

    expected = told()
    monkeypatch.setattr(trajectory, "MAX_OPEN", 0)
    assert told() == expected


def test_a_snapshot_that_is_saved_again_after_it_was_closed_is_refused(tmp_path: Path, few_enter: None) -> None:
    assert few_enter is None
    run = make_loose_run(tmp_path / "run")
    found = discover(run)
    make_loose_run(tmp_path / "run", seed=3)
    with pytest.raises(SnapshotError, match="changed while the folder was read"):
        fit(found, num_samples=None)


def test_only_two_snapshots_are_kept_open_at_once(tmp_path: Path, few_enter: None) -> None:
    assert few_enter is None
    found = discover(make_loose_run(tmp_path / "run"))
    read = [snapshot.tensors.read() for snapshot in found.snapshots if isinstance(snapshot.tensors, ClosedTensors)]
    assert len(read) == 8
    first, last = found.snapshots[0].tensors, found.snapshots[-1].tensors
    assert isinstance(first, ClosedTensors)
    assert isinstance(last, ClosedTensors)
    assert last.read() is read[-1]
    assert first.read() is not read[0]
    assert closed._KEPT == 2


# --- a fit of some of many -------------------------------------------------------------------------------------------

NOTE = "24 of 60 snapshots are used, to limit memory (4 tensors): the last 5, and others at even distances from step 10"


@pytest.mark.usefixtures("few_enter")
def test_a_long_run_is_fitted_forecast_and_verified_and_what_is_left_out_is_said(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run", LONG)
    make_loose_run(tmp_path / "later", (700,))
    done = call_cli("inspect", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0
    content = json.loads(done.stdout)
    assert len(content["snapshots"]) == 60
    assert any(NOTE in note for note in content["notes"])
    done = call_cli("fit", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert NOTE in done.stderr
    content = json.loads(done.stdout)
    assert content["num_snapshots"] == 24
    assert [note for note in content["notes"] if NOTE in note]
    fitted = load_fitted(tmp_path / "forecaster.safetensors")
    assert fitted.steps == tuple(LONG[index] for index in chosen(LONG, 24))
    assert (fitted.steps[0], fitted.steps[-5:]) == (10, LONG[-5:])
    assert any(NOTE in note for note in fitted.provenance.notes)
    assert call_cli("backtest", "--horizon", "50", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", "100", "-o", "out.safetensors", "--for", "evaluation", cwd=tmp_path)
    assert done.returncode == 0, done
    done = call_cli("verify", "out.safetensors", "--against", "later/step_000700.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["ratio"] < 0.9
    assert len(list(run.iterdir())) == 60


@pytest.mark.usefixtures("few_enter")
def test_an_origin_that_did_not_enter_is_refused_with_those_that_did(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", LONG)
    assert call_cli("fit", "run", "-q", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", "50", "--origin", "20", cwd=tmp_path)
    assert done.returncode == 3
    assert "no snapshot of step 20" in done.errors[0]


@pytest.mark.usefixtures("few_enter")
def test_a_long_run_that_resumed_from_a_forecast_is_fitted_on_what_came_after(tmp_path: Path, call_cli: CallCli) -> None:
    """The ledger sees all snapshots; the limit counts those since the leap."""
    make_loose_run(tmp_path / "run", LONG)
    assert call_cli("fit", "run", "-q", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", "200", "-o", "step_000800.safetensors", "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 0, done
    make_loose_run(tmp_path / "run", range(810, 1210, 10), seed=4)
    done = call_cli("fit", "run", cwd=tmp_path)
    assert done.returncode == 0, done
    assert "the run resumed from step_000800" in done.stderr
    assert "24 of 40 snapshots are used" in done.stderr
    fitted = load_fitted(tmp_path / "forecaster.safetensors")
    assert fitted.steps[0] == 810
    assert fitted.provenance.leap is not None


def test_a_run_below_the_limit_enters_whole_and_nothing_is_said(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", LONG)
    done = call_cli("fit", "run", "--json", cwd=tmp_path)
    assert "enter" not in done.stderr
    assert (json.loads(done.stdout)["num_snapshots"], json.loads(done.stdout)["notes"]) == (60, [])


def test_a_conflict_in_a_long_run_is_found_though_its_snapshots_are_closed(tmp_path: Path, few_enter: None) -> None:
    assert few_enter is None
    run = make_loose_run(tmp_path / "run", LONG)
    save_file(load_file(run / "step_000300.safetensors"), run / "step_000300.safetensors", metadata={"step": "310"})
    with pytest.raises(StepConflictError, match="step_000300"):
        discover(run)


def paths(seed: int, steps: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Slowing paths with the noise of training."""
    random, times = np.random.default_rng(seed), np.asarray(steps)[:, None] / steps[-1]
    return {
        name: random.normal(size=400) * (1 - np.exp(-2 * times)) + 0.02 * random.normal(size=(len(steps), 400))
        for name in "abc"
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_a_thinned_history_says_is_what_the_whole_one_says(seed: int) -> None:
    """300 snapshots against 39 of them: the coherence within .05, the ratios of the regressions within .1."""
    steps = tuple(range(0, 3000, 10))
    gram, sample = statistic(paths(seed, steps), steps)
    keep = chosen(steps, 39)
    thin = gram.restrict(keep), sample.restrict(keep)
    whole, few = (Task(one, other, Timeline(one.steps, float(steps[-1])), 600.0) for one, other in ((gram, sample), thin))
    assert coherence(few.gram, few.timeline) == pytest.approx(coherence(whole.gram, whole.timeline), abs=0.05)
    assert recent_coherence(few.gram, few.timeline) == pytest.approx(recent_coherence(whole.gram, whole.timeline), abs=0.15)
    for name in ("k5", "window-means"):
        assert backtest_ratio(METHODS[name], few) == pytest.approx(backtest_ratio(METHODS[name], whole), abs=0.1), name


# --- the memory of a fit ---------------------------------------------------------------------------------------------


def test_a_fit_takes_the_memory_of_its_inner_products_and_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 tensors of 2 elements: what they are read as is small, and their products are not."""
    run = write_run(
        tmp_path / "run", {f"{index}.w": np.random.default_rng(index).normal(size=(24, 2)) for index in range(1000)}, range(24)
    )
    found = discover(run)
    alignment = align(found.snapshots)
    grams = []
    for limit in (8 << 20, 1 << 19):
        monkeypatch.setattr(accumulation, "STRETCH_BYTES", limit)
        tracemalloc.start()
        gram, _ = accumulate(alignment, found.steps)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        grams.append(gram.matrix)
    assert peak < 2 * gram.matrix.nbytes
    np.testing.assert_allclose(grams[1], grams[0], rtol=1e-12, atol=1e-12)
