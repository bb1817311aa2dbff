"""What is written is the origin plus the update, in the origin's own form, whatever the threads and the block size."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import farcast_cli.engine.output_files
import farcast_cli.engine.reader
from farcast_cli.engine import write as engine
from farcast_cli.engine.linear import LinearMap
from farcast_cli.errors import NonFiniteError, SnapshotError, UsageError
from farcast_cli.forecast.forecaster import Options, Task, forecast
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from tests.tiny import applied, basis, fit_run, predict_run, stored, wander, write_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.forecast.forecaster_file import Fitted
    from tests.tiny import Arrays

STEPS = tuple(range(100, 900, 100))
HORIZON = 200
SIZES = {"a.weight": 600, "b.bias": 7}
ROUNDING = {  # of a weight near 1: float32 arithmetic, then half a unit in the last place of the output's type
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def _expected(fitted: Fitted, folder: Path, name: str, *, method: str = "blend", horizon: int = HORIZON) -> Any:
    """The whole tensor in float64: what the files hold at the origin, plus the coefficients' step."""
    timeline = Timeline(fitted.gram.steps, float(fitted.steps[-1]))
    task = Task(fitted.gram, fitted.sample, timeline, float(horizon), Options())
    names = [record.name for record in fitted.provenance.tensors]
    values = stored(folder, fitted.steps, name)
    step = forecast(METHODS[method], task)[names.index(name)] @ basis(values)
    if method == "lfd2":  # reads two snapshots: what is equal in both counts as never moved, and stays
        step[values[0] == values[-1]] = 0
    return values[-1] + step


def _published(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_forecast_is_the_whole_tensors_linear_map_to_rounding(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    arrays = {name: values / np.abs(values).max() for name, values in wander(1, num_snapshots=8, sizes=SIZES).items()}
    run = write_run(tmp_path / "run", arrays, STEPS, dtype=dtype)
    fitted = fit_run(run)
    predict_run(fitted, tmp_path / "out.safetensors", horizons=[HORIZON], method=method)
    written = load_file(tmp_path / "out.safetensors")
    for name in SIZES:
        assert written[name].dtype == dtype
        expected = _expected(fitted, run, name, method=method)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(written[name].double().numpy(), expected, rtol=0, atol=scale * ROUNDING[dtype])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), num_tensors=st.integers(1, 3), num_snapshots=st.integers(2, 6))
def test_the_map_over_snapshots_equals_the_coefficients_over_increments(
    seed: int, num_tensors: int, num_snapshots: int
) -> None:
    """Sums of at most eight numbers near 1 in float64: equal to 1e-12."""
    random = np.random.default_rng(seed)
    step = random.normal(size=(num_tensors, num_snapshots + 1))
    arrays = {str(k): random.normal(size=(num_snapshots, 5)) for k in range(num_tensors)}
    origin = int(random.integers(num_snapshots))
    step[:, origin:-2] = 0  # increments after the origin are out of sight
    linear = LinearMap.from_updates([step], origin)
    for index, (values, wanted) in enumerate(zip(arrays.values(), applied(step, arrays).values(), strict=True)):
        last = values[origin]
        moves = (linear.weights[0, index][:, None] * (values - last)).sum(axis=0)
        # weights of snapshots add up to zero but for the share of w_0, which is the gain
        found = moves + linear.gain[0, index] * last + linear.constant[0, index]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small outputs in many ranges, written as large ones are: past the cache, by several processes."""
    monkeypatch.setattr(engine, "RANGE_BYTES", 8192)
    monkeypatch.setattr(engine, "MIN_RANGE_BYTES", 4096)
    monkeypatch.setattr(engine, "DEVICE_RANGE_BYTES", 8192)
    monkeypatch.setattr(engine, "FORK_BYTES", 0)
    monkeypatch.setattr(farcast_cli.engine.output_files, "DIRECT_BYTES", 0)


WAYS: list[dict[str, Any]] = [
    *({"num_threads": workers, "io": io} for workers in (1, 2, 5) for io in ("auto", "pread", "mmap")),
    *({"kernel": False, "num_threads": 2, "io": io} for io in ("auto", "mmap")),  # in numpy, also where there is a kernel
    *({"device": "cpu:0", "io": io} for io in ("auto", "mmap")),  # the GPU's code, on the CPU
]


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_bytes_do_not_depend_on_workers_ranges_blocks_the_way_of_reading_or_the_device(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of odd lengths, so that ranges cut through elements and through many small tensors."""
    sizes = {"w": 30_001, **{f"{index}.bias": 3 + index for index in range(40)}, "x": 4_097}
    arrays = {name: values / 10 for name, values in wander(2, num_snapshots=8, sizes=sizes).items()}
    arrays["0.bias"][:] = -0.0
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS, dtype=dtype))
    written = []
    for ranges, block in [(8192, 1 << 17), (4096, 1000), (1 << 20, 7)]:
        monkeypatch.setattr(engine, "RANGE_BYTES", ranges)
        monkeypatch.setattr(engine, "BLOCK", block)
        for number, way in enumerate(WAYS if block > 7 else WAYS[:1]):
            output = tmp_path / str(ranges) / str(number) / "out.safetensors"
            predict_run(fitted, output, horizons=[HORIZON], **way)
            written.append(output.read_bytes())
    assert len(set(written)) == 1
    values = load_file(output)
    for name in ("w", "0.bias", "39.bias", "x"):
        expected = _expected(fitted, tmp_path / "run", name)
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(values[name].double().numpy(), expected, rtol=0, atol=scale * ROUNDING[dtype])


@pytest.mark.usefixtures("small_tasks")
def test_a_gain_and_a_constant_are_added_alike_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lfd2 has them, for several tensors of one batch."""
    arrays = wander(2, num_snapshots=8, sizes={"w": 5_001, "b": 30, "still": 9})
    arrays["still"][:] = 0.1
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS))
    written: list[bytes] = []
    for block in (1 << 17, 1000):
        monkeypatch.setattr(engine, "BLOCK", block)
        for way in (WAYS[0], WAYS[4], *WAYS[-4:]):
            output = tmp_path / str(len(written)) / "out.safetensors"
            predict_run(fitted, output, horizons=[HORIZON], method="lfd2", **way)
            written.append(output.read_bytes())
    assert len(set(written)) == 1


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("way", WAYS)
def test_a_torch_file_has_the_same_bytes_and_right_checksums_whatever_the_way(way: dict[str, Any], tmp_path: Path) -> None:
    _torch_run(tmp_path / "run", {"a": 5000, "b": 3})
    fitted = fit_run(tmp_path / "run")
    predict_run(fitted, tmp_path / "plain" / "out.pt", horizons=[HORIZON])
    predict_run(fitted, tmp_path / "way" / "out.pt", horizons=[HORIZON], **way)
    assert (tmp_path / "way" / "out.pt").read_bytes() == (tmp_path / "plain" / "out.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "way" / "out.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.usefixtures("small_tasks")
def test_tensors_that_lie_at_odd_bytes_are_forecast(tmp_path: Path) -> None:
    """A tensor of three bytes before them moves all others off their alignment."""
    arrays = wander(2, num_snapshots=8, sizes={"a": 5_000, "b": 3})
    run = write_run(tmp_path / "run", arrays, STEPS)
    plain = tmp_path / "plain.safetensors"
    predict_run(fit_run(run), plain, horizons=[HORIZON])
    for path in run.iterdir():
        _put_first(path, np.array([1, 2, 3], np.uint8))
    for number, way in enumerate(WAYS):
        output = tmp_path / str(number) / "out.safetensors"
        predict_run(fit_run(run), output, horizons=[HORIZON], **way)
        written, expected = load_file(output), load_file(plain)
        assert written["odd"].tolist() == [1, 2, 3]
        assert all(torch.equal(written[name], value) for name, value in expected.items())


def _put_first(path: Path, odd: NDArray[np.uint8]) -> None:
    """Add a tensor of bytes before all others of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        entry["data_offsets"] = [offset + len(odd) for offset in entry["data_offsets"]]
    text = json.dumps({"odd": {"dtype": "U8", "shape": [len(odd)], "data_offsets": [0, len(odd)]}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + odd.tobytes() + data)


def test_the_memory_that_is_held_does_not_grow_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[farcast_cli.engine.reader.Scratch] = []
    make = farcast_cli.engine.reader.Scratch.__init__

    def remember(scratch: farcast_cli.engine.reader.Scratch) -> None:
        make(scratch)
        held.append(scratch)

    monkeypatch.setattr(farcast_cli.engine.reader.Scratch, "__init__", remember)
    sizes = {"large": 400_000, **{f"layer {index}": 3_000 for index in range(60)}}
    fitted = fit_run(write_run(tmp_path / "run", wander(2, num_snapshots=6, sizes=sizes), STEPS[:6]))
    held.clear()
    predict_run(fitted, tmp_path / "out.safetensors", horizons=[HORIZON])
    num_blocks = 8  # origin, another, last, move, term, update, output, equal
    assert 0 < sum(scratch.num_bytes for scratch in held) <= num_blocks * 4 * engine.BLOCK


def test_a_horizon_that_is_written_in_a_pass_of_its_own_has_counts_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in range(10, 90, 10):
        weights = {"w": torch.linspace(0, 1, 50) * step**0.5}
        torch.save({"model": weights, "steps": {str(key): step for key in range(40)}}, tmp_path / "run" / f"step_{step}.pt")
    outcomes = predict_run(fit_run(tmp_path / "run"), f"{tmp_path / 'all'}/", horizons=[50, 70_000, 60], method="persistence")
    assert [outcome.unchanged_share for outcome in outcomes] == [1.0, 1.0, 1.0]


def test_horizons_whose_counters_have_more_digits_are_written_as_alone(tmp_path: Path) -> None:
    """A longer pickle moves what follows it: such a horizon is written in a pass of its own."""
    (tmp_path / "run").mkdir()
    for index, step in enumerate(range(10, 90, 10)):
        weights = {"w": torch.linspace(0, 1, 50) * index**0.5}
        torch.save({"model": weights, "steps": {str(key): step for key in range(40)}}, tmp_path / "run" / f"step_{step}.pt")
    fitted = fit_run(tmp_path / "run")
    horizons = [50, 70_000, 60]
    predict_run(fitted, f"{tmp_path / 'all'}/", horizons=horizons, method="line")
    for horizon in horizons:
        alone = tmp_path / "alone" / f"{horizon}.pt"
        predict_run(fitted, alone, horizons=[horizon], method="line")
        assert (tmp_path / "all" / f"step_{80 + horizon}.pt").read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_several_horizons_in_one_pass_equal_each_by_itself(method: str, tmp_path: Path) -> None:
    arrays = wander(3, num_snapshots=8, sizes=SIZES)
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS))
    together = predict_run(fitted, tmp_path / "all", horizons=[100, 150, 300], method=method)
    for outcome in together:
        alone = tmp_path / "one" / f"{outcome.horizon}.safetensors"
        predict_run(fitted, alone, horizons=[outcome.horizon], method=method)
        assert outcome.path is not None
        assert outcome.path.name == f"step_{800 + outcome.horizon}.safetensors"
        assert outcome.path.read_bytes() == alone.read_bytes()


# --- what must not change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_never_moved_keeps_its_bits(method: str, tmp_path: Path) -> None:
    """Negative zero included: -0.0 + 0.0 would be 0.0."""
    frozen = torch.tensor([-0.0, 0.0, 1 / 3, -1e-42, 3e38])
    arrays = wander(4, num_snapshots=8, sizes=SIZES)
    run = write_run(tmp_path / "run", arrays, STEPS, extra=lambda _: {"frozen": frozen})
    predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON], method=method)
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["frozen"].view(torch.int32), frozen.view(torch.int32))
    if method != "persistence":
        last = load_file(run / "step_800.safetensors")
        assert not torch.equal(written["a.weight"], last["a.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_elements_that_never_moved_keep_their_bits_among_others_that_did(method: str, tmp_path: Path) -> None:
    arrays = wander(5, num_snapshots=8, sizes={"w": 100})
    arrays["w"][:, ::2] = -0.0
    arrays["w"][:, 1::4] = 0.1
    run = write_run(tmp_path / "run", arrays, STEPS)
    predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON], method=method)
    written, last = (load_file(path)["w"] for path in (tmp_path / "out.safetensors", run / "step_800.safetensors"))
    still = torch.ones(100, dtype=torch.bool)
    still[3::4] = False
    assert torch.equal(written.view(torch.int32)[still], last.view(torch.int32)[still])


def test_persistence_is_the_last_snapshot_byte_by_byte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", wander(6, num_snapshots=8, sizes=SIZES), STEPS)
    (outcome,) = predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON], method="persistence")
    written, last = load_file(tmp_path / "out.safetensors"), load_file(run / "step_800.safetensors")
    assert all(torch.equal(written[name], last[name]) for name in last)
    assert outcome.unchanged_share == 1.0


def test_integers_and_masks_are_copied_from_the_last_snapshot(tmp_path: Path) -> None:
    def extra(step: int) -> Mapping[str, torch.Tensor]:
        return {"ids": torch.arange(5) * step, "mask": torch.arange(6) % (step // 100 + 1) == 0, "empty": torch.empty(0, 3)}

    run = write_run(tmp_path / "run", wander(7, num_snapshots=8, sizes=SIZES), STEPS, extra=extra)
    (outcome,) = predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON])
    written = load_file(tmp_path / "out.safetensors")
    for name, value in extra(800).items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value)
    assert (outcome.num_forecast, outcome.num_copied) == (2, 3)


def test_a_mask_of_negative_infinities_survives(tmp_path: Path) -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    run = write_run(tmp_path / "run", wander(8, num_snapshots=8, sizes=SIZES), STEPS, extra=lambda _: {"mask": mask})
    for method in METHODS:
        output = tmp_path / method / "out.safetensors"
        predict_run(fit_run(run), output, horizons=[HORIZON], method=method)
        assert torch.equal(load_file(output)["mask"], mask)


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def test_a_running_variance_never_falls_below_zero_and_batches_are_counted_on(tmp_path: Path) -> None:
    falling = np.linspace(1.0, 0.1, 8)[:, None] * np.ones((1, 5))

    def extra(step: int) -> Mapping[str, torch.Tensor]:
        value = float(np.interp(step, STEPS, falling[:, 0]))
        return {
            "bn.running_var": torch.full((5,), value),
            "bn.weight": torch.full((5,), value),
            "bn.num_batches_tracked": torch.tensor(4 * step),
        }

    run = write_run(tmp_path / "run", wander(9, num_snapshots=8, sizes=SIZES), STEPS, extra=extra)
    predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON], method="line")
    written = load_file(tmp_path / "out.safetensors")
    assert float(written["bn.weight"].max()) < -0.1  # the same path is free to cross zero where it may
    assert torch.equal(written["bn.running_var"], torch.zeros(5))
    assert written["bn.num_batches_tracked"].dtype == torch.int64
    assert written["bn.num_batches_tracked"].shape == ()
    assert int(written["bn.num_batches_tracked"]) == 4 * 1000


def test_kept_counters_keep_the_number_of_batches(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        wander(9, num_snapshots=8, sizes=SIZES),
        STEPS,
        extra=lambda step: {"bn.num_batches_tracked": torch.tensor(step)},
    )
    predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=[HORIZON], counters="keep")
    assert int(load_file(tmp_path / "out.safetensors")["bn.num_batches_tracked"]) == 800


# --- values that cannot be forecast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [100, 800])
def test_a_bad_value_that_the_sample_missed_is_found_and_nothing_is_published(bad: float, step: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", wander(10, num_snapshots=8, sizes={"w": 40_000}), STEPS)
    tensors = load_file(run / f"step_{step}.safetensors")
    seen = farcast_cli.tensors.sample_stretches(40_000, 2048)
    outside = next(i for i in range(40_000) if not any(s.start <= i < s.start + s.count for s in seen))
    tensors["w"][outside] = bad
    save_file(tensors, run / f"step_{step}.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"step_{step}\.safetensors: tensor 'w' holds"):
        predict_run(fit_run(run, num_samples=2048), tmp_path / "out" / "w.safetensors", horizons=[HORIZON])
    assert _published(tmp_path / "out") == []


def test_a_forecast_beyond_the_range_of_float16_is_refused_and_nothing_is_published(tmp_path: Path) -> None:
    arrays = {"w": np.linspace(0, 60_000, 8)[:, None] * np.ones((1, 3))}
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS, dtype=torch.float16))
    with pytest.raises(SnapshotError, match=r"tensor 'w' leaves the range of its type \(\+-65504\)"):
        predict_run(fitted, tmp_path / "out" / "w.safetensors", horizons=[HORIZON], method="line")
    assert _published(tmp_path / "out") == []
    predict_run(fitted, tmp_path / "wide.safetensors", horizons=[HORIZON], method="line", dtype="float32")
    expected = 60_000 * 900 / 700  # steps 100 .. 800, then 200 more
    torch.testing.assert_close(load_file(tmp_path / "wide.safetensors")["w"], torch.full((3,), expected), rtol=1e-3, atol=0)


def test_last_weights_beyond_the_range_of_an_asked_for_type_are_refused(tmp_path: Path) -> None:
    """Whether the tensor is forecast or copied."""
    big = torch.full((3,), 1e6)
    run = write_run(tmp_path / "run", wander(11, num_snapshots=8, sizes=SIZES), STEPS, extra=lambda _: {"big": big})
    with pytest.raises(SnapshotError, match="tensor 'big' leaves the range"):
        predict_run(fit_run(run), tmp_path / "out" / "w.safetensors", horizons=[HORIZON], dtype="float16")
    assert _published(tmp_path / "out") == []


# --- element types and shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_an_asked_for_type_is_what_every_floating_tensor_gets(source: torch.dtype, dtype: str, tmp_path: Path) -> None:
    ids = torch.arange(4)
    arrays = {name: values / np.abs(values).max() for name, values in wander(12, num_snapshots=8, sizes=SIZES).items()}
    run = write_run(tmp_path / "run", arrays, STEPS, dtype=source, extra=lambda _: {"ids": ids})
    fitted = fit_run(run)
    predict_run(fitted, tmp_path / "out.safetensors", horizons=[HORIZON], dtype=dtype)
    written = load_file(tmp_path / "out.safetensors")
    assert {name: value.dtype for name, value in written.items()} == {
        "a.weight": getattr(torch, dtype),
        "b.bias": getattr(torch, dtype),
        "ids": torch.int64,
    }
    expected = _expected(fitted, run, "a.weight")
    atol = max(1.0, np.abs(expected).max()) * ROUNDING[getattr(torch, dtype)]
    np.testing.assert_allclose(written["a.weight"].double().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_torch_file_in_another_type_reads_back_with_ties_kept(dtype: str, tmp_path: Path) -> None:
    _torch_run(tmp_path / "run", {"a": 300, "b": 3})
    predict_run(fit_run(tmp_path / "run"), tmp_path / "source.pt", horizons=[HORIZON])
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[HORIZON], dtype=dtype)
    source, written = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("source.pt", "out.pt"))
    assert list(written) == list(source)
    for name in ("a", "b", "tied"):
        assert written[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(written[name], source[name].to(getattr(torch, dtype)), rtol=0, atol=0)
    assert written["tied"].data_ptr() == written["a"].data_ptr()
    assert torch.equal(written["ids"], source["ids"])


def _hub_run(folder: Path, arrays: Arrays, *, shards: Mapping[str, str] | None = None) -> Path:
    """Folders as the hub holds them: config.json and the weights, whole or in shards (tensor -> file)."""
    for index, step in enumerate(STEPS):
        place = folder / f"step{step}"
        place.mkdir(parents=True)
        (place / "config.json").write_text('{"model_type": "tiny"}')
        tensors = {name: torch.from_numpy(values[index]).float() for name, values in arrays.items()}
        for file in sorted(set(shards.values())) if shards else ["model.safetensors"]:
            held = {name: value for name, value in tensors.items() if not shards or shards[name] == file}
            save_file(held, place / file, metadata={"format": "pt"})
        if shards:
            total = sum(value.nbytes for value in tensors.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": shards})
            (place / "model.safetensors.index.json").write_text(text)
    return folder


SHARDS = {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors",
}


def _read_by_index(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor from the file that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    held = [name for file in set(index["weight_map"].values()) for name in load_file(folder / file)]
    assert sorted(held) == sorted(found)  # no shard holds a tensor that the index does not name
    return found


def test_a_sharded_checkpoint_becomes_one_with_the_same_files(tmp_path: Path) -> None:
    arrays = wander(13, num_snapshots=8, sizes={"a": 300, "b": 20, "c": 500})
    run = _hub_run(tmp_path / "run", arrays, shards=SHARDS)
    predict_run(fit_run(run), tmp_path / "out", horizons=[HORIZON])
    assert set(_published(tmp_path / "out")) == {*_published(run / "step800"), "farcast.json"}
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "step800" / name).read_bytes()
    whole = _hub_run(tmp_path / "whole", arrays)
    predict_run(fit_run(whole), tmp_path / "one", horizons=[HORIZON])
    expected, written = load_file(tmp_path / "one" / "model.safetensors"), _read_by_index(tmp_path / "out")
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shards", [None, SHARDS])
def test_new_shards_hold_every_tensor_once_and_the_index_leads_to_them(
    shards: Mapping[str, str] | None, tmp_path: Path
) -> None:
    arrays = wander(13, num_snapshots=8, sizes={"a": 300, "b": 20, "c": 500})
    run = _hub_run(tmp_path / "run", arrays, shards=shards)
    fitted = fit_run(run)
    predict_run(fitted, tmp_path / "plain", horizons=[HORIZON])
    predict_run(fitted, tmp_path / "out", horizons=[HORIZON], max_shard_bytes=1500)
    plain = _read_by_index(tmp_path / "plain") if shards else load_file(tmp_path / "plain" / "model.safetensors")
    written = _read_by_index(tmp_path / "out")
    assert {name: value.shape for name, value in written.items()} == {name: value.shape for name, value in plain.items()}
    assert all(torch.equal(written[name], value) for name, value in plain.items())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_shards_that_fit_into_one_file_become_one_without_an_index(tmp_path: Path) -> None:
    arrays = wander(13, num_snapshots=8, sizes={"a": 300, "b": 20, "c": 500})
    fitted = fit_run(_hub_run(tmp_path / "run", arrays, shards=SHARDS))
    predict_run(fitted, tmp_path / "out", horizons=[HORIZON], max_shard_bytes=10**6)
    assert _published(tmp_path / "out") == ["config.json", "farcast.json", "model.safetensors"]
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == ["a", "b", "c"]


def test_sharded_weights_in_another_type_need_new_shards(tmp_path: Path) -> None:
    arrays = wander(13, num_snapshots=8, sizes={"a": 300, "b": 20, "c": 500})
    fitted = fit_run(_hub_run(tmp_path / "run", arrays, shards=SHARDS))
    with pytest.raises(UsageError, match="bfloat16"):
        predict_run(fitted, tmp_path / "out", horizons=[HORIZON], dtype="bfloat16")
    predict_run(fitted, tmp_path / "out", horizons=[HORIZON], dtype="bfloat16", max_shard_bytes=1500)
    assert {value.dtype for value in _read_by_index(tmp_path / "out").values()} == {torch.bfloat16}


def test_transformers_loads_a_forecast_in_new_shards(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=11, max_position_embeddings=8, dim=8, n_layers=1, n_heads=2, hidden_dim=16)
    for step in STEPS:
        torch.manual_seed(step)
        DistilBertModel(config).save_pretrained(tmp_path / "run" / f"step{step}")
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out", horizons=[HORIZON], max_shard_bytes=1000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded: Any = DistilBertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = _read_by_index(tmp_path / "out")
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())


# --- torch files -----------------------------------------------------------------------------------------------------


def _torch_run(folder: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A run of .pt files with a tied weight and an integer; returns its values (T, N) as stored."""
    folder.mkdir(parents=True)
    arrays = wander(14, num_snapshots=8, sizes=sizes)
    for index, step in enumerate(STEPS):
        model = {name: torch.from_numpy(values[index]).float() for name, values in arrays.items()}
        torch.save({"model": {**model, "tied": model["a"], "ids": torch.arange(3)}, "step": step}, folder / f"step_{step}.pt")
    return arrays


def test_weights_in_a_folders_torch_file_are_forecast_there(tmp_path: Path) -> None:
    """pytorch_model.bin, as transformers wrote it for years."""
    arrays = wander(19, num_snapshots=8, sizes={"a": 300, "b": 3})
    for index, step in enumerate(STEPS):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        state = {name: torch.from_numpy(values[index]).float() for name, values in arrays.items()}
        torch.save(state, place / "pytorch_model.bin")
    write_run(tmp_path / "same", arrays, STEPS)
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out", horizons=[HORIZON])
    predict_run(fit_run(tmp_path / "same"), tmp_path / "same.safetensors", horizons=[HORIZON])
    assert _published(tmp_path / "out") == ["config.json", "farcast.json", "pytorch_model.bin"]
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    expected = load_file(tmp_path / "same.safetensors")
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_tied_weights_are_forecast_once_and_stay_tied(tmp_path: Path) -> None:
    arrays = _torch_run(tmp_path / "run", {"a": 300, "b": 3})
    fitted = fit_run(tmp_path / "run")
    (outcome,) = predict_run(fitted, tmp_path / "out.pt", horizons=[HORIZON], method="line")
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    model = saved["model"]
    assert list(model) == ["a", "b", "tied", "ids"]
    assert model["tied"].data_ptr() == model["a"].data_ptr()
    assert outcome.num_forecast == 2
    assert saved["step"] == 1000
    half = (arrays["a"][3] + arrays["a"][4]) / 2  # step 450, the middle of 100 .. 800
    expected = arrays["a"][-1] + (arrays["a"][-1] - half) * HORIZON / 350
    np.testing.assert_allclose(model["a"].numpy(), expected, rtol=0, atol=1e-5)  # float32


def test_transposed_and_sliced_tensors_of_a_torch_file_keep_shape_stride_and_values(tmp_path: Path) -> None:
    """A transposed tensor and slices of a common storage are forecast in place; a strided one is copied."""
    arrays = wander(15, num_snapshots=8, sizes={"flat": 24})
    (tmp_path / "run").mkdir()
    for index, step in enumerate(STEPS):
        flat = torch.from_numpy(arrays["flat"][index]).float()
        model = {"head": flat[:6], "tail": flat[6:12].view(2, 3), "turned": flat[12:].view(3, 4).T, "thin": flat.clone()[::2]}
        torch.save(model, tmp_path / "run" / f"step_{step}.pt")
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[HORIZON], method="line")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    last = torch.load(tmp_path / "run" / "step_800.pt", weights_only=True)
    values = arrays["flat"]
    moved = torch.from_numpy(values[-1] + (values[-1] - (values[3] + values[4]) / 2) * HORIZON / 350).float()
    expected = {"head": moved[:6], "tail": moved[6:12].view(2, 3), "turned": moved[12:].view(3, 4).T, "thin": last["thin"]}
    for name, value in expected.items():
        assert written[name].stride() == last[name].stride()
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-5)  # float32
    assert written["head"].untyped_storage().data_ptr() == written["tail"].untyped_storage().data_ptr()


def test_a_transposed_tensor_in_another_type_keeps_its_values(tmp_path: Path) -> None:
    arrays = wander(16, num_snapshots=8, sizes={"flat": 12})
    (tmp_path / "run").mkdir()
    for index, step in enumerate(STEPS):
        flat = torch.from_numpy(arrays["flat"][index]).float()
        torch.save({"turned": flat.view(3, 4).T, "row": flat[:4].clone()}, tmp_path / "run" / f"step_{step}.pt")
    fitted = fit_run(tmp_path / "run")
    predict_run(fitted, tmp_path / "source.pt", horizons=[HORIZON])
    predict_run(fitted, tmp_path / "out.pt", horizons=[HORIZON], dtype="bfloat16")
    source, written = (torch.load(tmp_path / name, weights_only=True) for name in ("source.pt", "out.pt"))
    for name in ("turned", "row"):
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], source[name].to(torch.bfloat16))


def test_an_excluded_tensor_keeps_its_bits_even_where_a_view_of_it_could_be_forecast(tmp_path: Path) -> None:
    arrays = wander(17, num_snapshots=8, sizes={"flat": 10})
    (tmp_path / "run").mkdir()
    for index, step in enumerate(STEPS):
        flat = torch.from_numpy(arrays["flat"][index]).float()
        torch.save({"all": flat, "middle": flat[3:6], "other": flat + 1}, tmp_path / "run" / f"step_{step}.pt")
    predict_run(fit_run(tmp_path / "run", exclude=["all"]), tmp_path / "out.pt", horizons=[HORIZON])
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    last = torch.load(tmp_path / "run" / "step_800.pt", weights_only=True)
    assert torch.equal(written["all"], last["all"])
    assert torch.equal(written["middle"], last["middle"])
    assert not torch.equal(written["other"], last["other"])


@pytest.mark.parametrize("dtype", ["source", "float32", "bfloat16"])
@pytest.mark.parametrize("part", [slice(0, 4), slice(3, 6), slice(6, 10), slice(0, 10)])
def test_a_tensor_and_a_view_of_part_of_it_are_forecast_as_the_one_memory_that_they_are(
    part: slice, dtype: str, tmp_path: Path
) -> None:
    """As a fused query, key and value weight that is saved under its parts' names too."""
    arrays = wander(18, num_snapshots=8, sizes={"flat": 10})
    (tmp_path / "run").mkdir()
    for index, step in enumerate(STEPS):
        flat = torch.from_numpy(arrays["flat"][index]).float()
        torch.save({"fused": flat, "part": flat[part], "other": flat + 1}, tmp_path / "run" / f"step_{step}.pt")
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[HORIZON], method="line", dtype=dtype)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    values = arrays["flat"]
    moved = torch.from_numpy(values[-1] + (values[-1] - (values[3] + values[4]) / 2) * HORIZON / 350).float()
    rounding = 0.05 if dtype == "bfloat16" else 1e-5  # half a unit in the last place of a weight up to 8; float32
    for name, expected in {"fused": moved, "part": moved[part], "other": moved + 1}.items():
        torch.testing.assert_close(written[name].float(), expected, rtol=0, atol=rounding)


def test_several_horizons_of_a_folder_of_torch_weights_in_another_type_equal_single_ones(tmp_path: Path) -> None:
    """Planning the first horizon must leave the snapshot as it was for the second."""
    for step in range(100, 900, 100):
        folder = tmp_path / "run" / f"step{step}"
        folder.mkdir(parents=True)
        torch.save(
            {"a": torch.linspace(0, 1, 50) * step**0.5, "b": torch.full((3, 4), step**0.5)}, folder / "pytorch_model.bin"
        )
    fitted = fit_run(tmp_path / "run")
    predict_run(fitted, f"{tmp_path / 'both'}/", horizons=[100, 200], dtype="bfloat16")
    for horizon in (100, 200):
        predict_run(fitted, tmp_path / f"alone{horizon}", horizons=[horizon], dtype="bfloat16")
        together = (tmp_path / "both" / f"step{800 + horizon}" / "pytorch_model.bin").read_bytes()
        assert together == (tmp_path / f"alone{horizon}" / "pytorch_model.bin").read_bytes()
