"""NaN and infinity are never published: in every floating type, by every path from a file to a file.

Each test puts one value that is not finite into real files, at a place that the code treats in its own way: at an odd or an even
element, at the last one, in a small tensor that is computed together with its neighbours, where a range cuts through.
"""

from __future__ import annotations

import itertools
import json
import math
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farcast_cli.engine.reader import Resources
from farcast_cli.errors import DataError, NonFiniteError, SnapshotError
from farcast_cli.forecast.accumulate import accumulate
from farcast_cli.run.alignment import align
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.tune.data import read_data
from farcast_cli.tune.layers import Settings
from farcast_cli.tune.request import TuneRequest
from farcast_cli.tune.run import tune_checkpoint
from farcast_cli.verification import verify
from tests.tiny import fit_run, predict_run, wander, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from farcast_cli.choices import SolverName
    from farcast_cli.forecast.forecaster_file import Fitted

STEPS = tuple(range(100, 700, 100))
SIZES = {"w": 30_001, **{f"{index}.bias": 3 + index for index in range(8)}, "even": 8_192}
PLACES = (("w", 0), ("w", 30_000), ("w", 4_321), ("3.bias", 2), ("even", 0), ("even", 4_099), ("even", 8_191))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BAD = (math.nan, math.inf, -math.inf)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def quiet(_phase: str, _total: int) -> Any:
    return lambda _done: None


def bytes_of(value: float, dtype: torch.dtype) -> bytes:
    return bytes(torch.tensor([value], dtype=dtype).view(torch.uint8).tolist())


@contextmanager
def spoilt(path: Path, name: str, index: int, value: float) -> Iterator[None]:
    """A checkpoint with one element of a tensor changed, which is put back."""
    entry = open_snapshot(path).tensors[name]
    changed = bytes_of(value, getattr(torch, entry.dtype.name))
    whole = entry.path.read_bytes()
    start = entry.offset + index * entry.dtype.itemsize
    entry.path.write_bytes(whole[:start] + changed + whole[start + len(changed) :])
    yield
    entry.path.write_bytes(whole)


def snapshot(run: Path, step: int) -> Path:
    return next(path for path in run.iterdir() if path.stem == f"step_{step}")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one type: a tensor of odd and one of even length, and small ones between."""
    arrays = {name: values / 10 for name, values in wander(1, num_snapshots=len(STEPS), sizes=SIZES).items()}
    return write_run(tmp_path_factory.mktemp("run"), arrays, STEPS, dtype=request.param)


@pytest.fixture(scope="module")
def fitted(run: Path) -> Fitted:
    return fit_run(run)


# --- predict ---------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "one horizon": {},
    "several horizons": {"horizons": (100, 200, 300)},
    "read in place": {"io": "mmap"},
    "by the device's code": {"device": "cpu:0"},
    "in float32": {"dtype": "float32"},
    "in bfloat16": {"dtype": "bfloat16"},
    "in float16, as a torch file": {"dtype": "float16", "layout": "pt"},
    "in a distributed checkpoint": {"layout": "dcp"},
}
CUT_WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "alone, in numpy": {"kernel": False},
    "by two processes": {"num_threads": 2, "io": "pread"},
    "several horizons by three processes": {"num_threads": 3, "horizons": (100, 200)},
    "read in place": {"io": "mmap"},
    "by the device's code": {"device": "cpu:0", "io": "mmap"},
}


def refused_by_predict(fitted: Fitted, run: Path, output: Path, way: Mapping[str, Any], value: float) -> None:
    """Each place in turn, in the last snapshot and in the first, both of which every method reads."""
    request = {"horizons": (200,), **way}
    for number, (name, index) in enumerate(PLACES):
        step = STEPS[-1] if number % 2 else STEPS[0]
        with (
            spoilt(snapshot(run, step), name, index, value),
            pytest.raises(NonFiniteError, match=rf"step_{step}\.safetensors: tensor '{name}' holds {value}"),
        ):
            predict_run(fitted, f"{output}/", **request)
        assert files_in(output) == []


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_predict_publishes_no_value_that_is_not_finite(
    fitted: Fitted, run: Path, way: str, value: float, tmp_path: Path
) -> None:
    refused_by_predict(fitted, run, tmp_path / "out", WAYS[way], value)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("way", CUT_WAYS)
def test_predict_publishes_none_where_ranges_cut_elements_and_tensors(
    fitted: Fitted, run: Path, way: str, tmp_path: Path
) -> None:
    for value in BAD if way == "alone" else BAD[:1]:
        refused_by_predict(fitted, run, tmp_path / "out", CUT_WAYS[way], value)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_run_without_such_values_is_forecast_in_every_way(fitted: Fitted, way: str, tmp_path: Path) -> None:
    """So that the tests above are refused for their values."""
    request = {"horizons": (200,), **WAYS[way]}
    assert all(outcome.path for outcome in predict_run(fitted, f"{tmp_path / 'out'}/", **request))


def test_a_forecast_with_a_gain_and_a_constant_publishes_none_either(fitted: Fitted, run: Path, tmp_path: Path) -> None:
    """As lfd2 makes them, where what never moved is told apart."""
    for step, value in ((STEPS[0], math.nan), (STEPS[-1], -math.inf)):
        expected = pytest.raises(NonFiniteError, match=rf"step_{step}\.safetensors: tensor '3\.bias' holds {value}")
        with spoilt(snapshot(run, step), "3.bias", 2, value), expected:
            predict_run(fitted, tmp_path / "out" / "out.safetensors", horizons=(200,), method="lfd2")
    assert files_in(tmp_path / "out") == []


RANGES = {
    torch.float64: (torch.finfo(torch.float64).max, "1.79769e+308"),
    torch.float32: (torch.finfo(torch.float32).max, "3.40282e+38"),
    torch.float16: (torch.finfo(torch.float16).max, "65504"),
    torch.bfloat16: (torch.finfo(torch.bfloat16).max, "3.38953e+38"),
}


@pytest.mark.parametrize("way", ["one horizon", "several horizons", "by the device's code", "in a distributed checkpoint"])
@pytest.mark.parametrize("name", ["even", "w", "3.bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forecast_that_leaves_its_types_range_is_refused(dtype: torch.dtype, name: str, way: str, tmp_path: Path) -> None:
    """One element on its way to the largest number of its type; a straight line goes on beyond it."""
    largest, told = RANGES[dtype]
    arrays = {key: np.zeros((len(STEPS), size)) for key, size in SIZES.items()}
    arrays["even"][:, 1] = arrays["w"][:, 1] = np.linspace(0, 1, len(STEPS))  # so that something moves everywhere
    arrays[name][:, -2] = np.linspace(0, 0.999 * largest, len(STEPS))
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS, dtype=dtype), num_samples=2)
    request = {"horizons": (200,), **WAYS[way], "method": "line"}
    with pytest.raises(SnapshotError, match=rf"tensor '{name}' leaves the range of its type \(\+-{told.replace('+', '.')}"):
        predict_run(fitted, f"{tmp_path / 'out'}/", **request)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["even", "w"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_forecast_in_which_infinities_cancel_to_nan_is_refused(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """Finite in every snapshot; two moves overflow, and their weights have opposite signs."""
    arrays = {key: np.zeros((len(STEPS), size)) for key, size in SIZES.items()}
    arrays["even"][:, 1] = arrays["w"][:, 1] = np.linspace(0, 1, len(STEPS)) ** 2
    arrays[name][:, -2] = 0.9 * RANGES[dtype][0] * np.array([-1] * (len(STEPS) - 1) + [1])
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS, dtype=dtype), num_samples=2)
    with pytest.raises(SnapshotError, match=f"tensor '{name}' leaves the range of its type"):
        predict_run(fitted, tmp_path / "out" / "out.safetensors", horizons=(200,), method="average-extrapolate")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["even", "w"])
@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 3.397e38), ("float16", 65_520.0), ("float16", 1e38)])
def test_a_number_that_only_rounding_makes_infinite_is_refused(dtype: str, value: float, name: str, tmp_path: Path) -> None:
    """Finite in float32, and beyond the middle between the largest number of the asked-for type and the next."""
    arrays = {key: np.zeros((len(STEPS), size)) for key, size in SIZES.items()}
    arrays["even"][:, 1] = np.linspace(0, 1, len(STEPS))
    run = write_run(tmp_path / "run", arrays, STEPS, extra=lambda _: {"copied": torch.tensor([1])})
    for step in STEPS:
        tensors = load_file(snapshot(run, step))
        tensors[name][7] = value
        save_file(tensors, snapshot(run, step), metadata={"format": "pt"})
    assert math.isinf(float(torch.tensor(value).to(getattr(torch, dtype))))
    with pytest.raises(SnapshotError, match=f"tensor '{name}' leaves the range of its type"):
        predict_run(fit_run(run), f"{tmp_path / 'out'}/", horizons=(200,), dtype=dtype)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("way", [*WAYS, *CUT_WAYS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_that_every_snapshot_has_stay_and_nothing_else_becomes_one(
    dtype: torch.dtype, way: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if way in CUT_WAYS:
        request.getfixturevalue("small_tasks")
    arrays = {name: values / 10 for name, values in wander(1, num_snapshots=len(STEPS), sizes=SIZES).items()}
    for name, index in PLACES:
        arrays[name][:, index] = -math.inf if index else math.inf
    fitted = fit_run(write_run(tmp_path / "run", arrays, STEPS, dtype=dtype))
    asked = {"horizons": (200,), **WAYS.get(way, {}), **CUT_WAYS.get(way, {})}
    for outcome in predict_run(fitted, f"{tmp_path / 'out'}/", **asked):
        assert outcome.path is not None
        found = {name: read(outcome.path, name) for name in SIZES}
        for name, values in found.items():
            places = {index: -math.inf if index else math.inf for known, index in PLACES if known == name}
            assert {int(i): float(values[i]) for i in torch.nonzero(~torch.isfinite(values))[:, 0]} == places


def with_variance(run: Path, arrays: Mapping[str, np.ndarray[Any, Any]], dtype: torch.dtype) -> Path:
    """A run with a BatchNorm's variance beside the weights, which falls below zero on a straight line."""
    falling = np.linspace(1.0, 0.1, len(STEPS))[:, None] * np.ones((1, 8_192))
    return write_run(run, {**arrays, "bn.running_var": falling}, STEPS, dtype=dtype)


@pytest.mark.parametrize("way", ["one horizon", "by the device's code"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_variance_is_refused_and_not_taken_for_one_below_zero(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    run = with_variance(tmp_path / "run", wander(1, num_snapshots=len(STEPS), sizes={"w": 50}), dtype)
    fitted = fit_run(run)
    for value, step in itertools.product(BAD, (STEPS[0], STEPS[-1])):
        refused = pytest.raises(NonFiniteError, match=rf"step_{step}\.safetensors: tensor 'bn.running_var' holds {value}")
        with spoilt(snapshot(run, step), "bn.running_var", 1_025, value), refused:
            predict_run(fitted, f"{tmp_path / 'out'}/", horizons=(200,), **WAYS[way])
        assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_a_constant_infinity_no_variance_falls_below_zero_either(dtype: torch.dtype, tmp_path: Path) -> None:
    run = with_variance(tmp_path / "run", wander(1, num_snapshots=len(STEPS), sizes={"w": 50}), dtype)
    with ExitStack() as stack:
        for step in STEPS:
            stack.enter_context(spoilt(snapshot(run, step), "bn.running_var", 1_025, -math.inf))
        (outcome,) = predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=(200,), method="line")
    assert outcome.path is not None
    expected = torch.zeros(8_192, dtype=torch.float64)
    expected[1_025] = -math.inf
    assert torch.equal(read(outcome.path, "bn.running_var"), expected)


def read(path: Path, name: str) -> torch.Tensor:
    entry = open_snapshot(path).tensors[name]
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        raw = bytearray(file.read(entry.num_bytes))
    return torch.frombuffer(raw, dtype=getattr(torch, entry.dtype.name)).double()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_copied_bit_by_bit_whatever_it_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    """It is not forecast, so every one of its bytes is the last snapshot's, NaN among them."""
    every = torch.arange(256, dtype=torch.uint8)
    run = write_run(
        tmp_path / "run",
        wander(1, num_snapshots=len(STEPS), sizes={"w": 50}),
        STEPS,
        extra=lambda step: {"q": every.roll(step // 100).view(dtype)},
    )
    predict_run(fit_run(run), tmp_path / "out.safetensors", horizons=(200,))
    written = load_file(tmp_path / "out.safetensors")["q"]
    assert written.dtype == dtype
    assert torch.equal(written.view(torch.uint8), every.roll(6))


# --- fit -------------------------------------------------------------------------------------------------------------

FITS: dict[str, tuple[int | None, Resources]] = {
    "a sample": (16_384, Resources()),
    "a sample, by two processes": (16_384, Resources(num_workers=2)),
    "a sample, read in place": (16_384, Resources(io="mmap")),
    "a sample, by the device's code": (16_384, Resources(device="cpu:0")),
    "all": (None, Resources()),
    "all, by two processes": (None, Resources(num_workers=2, io="pread")),
    "all, read in place": (None, Resources(io="mmap")),
    "all, by the device's code": (None, Resources(device="cpu:0")),
}


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("fit", FITS)
def test_fit_refuses_a_value_that_is_not_finite_wherever_it_reads_one(run: Path, fit: str, value: float) -> None:
    num_samples, resources = FITS[fit]
    for number, (name, index) in enumerate(PLACES):
        if num_samples is not None and (name, index) == ("w", 4_321):
            continue  # not in the sample
        step = STEPS[number % len(STEPS)]
        with spoilt(snapshot(run, step), name, index, value):
            trajectory = discover(run)
            with pytest.raises(NonFiniteError, match=rf"step_{step}\.safetensors: tensor '{name}' holds {value}"):
                accumulate(align(trajectory.snapshots), trajectory.steps, num_samples=num_samples, resources=resources)


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_that_never_move_leave_no_trace_in_the_statistic(dtype: torch.dtype, fit: str, tmp_path: Path) -> None:
    arrays = {name: values / 10 for name, values in wander(1, num_snapshots=len(STEPS), sizes=SIZES).items()}
    num_samples, resources = FITS[fit]
    found = []
    for value in (0.0, -math.inf):
        for name, index in PLACES:
            arrays[name][:, index] = value
        trajectory = discover(write_run(tmp_path / str(value), arrays, STEPS, dtype=dtype))
        gram, _ = accumulate(align(trajectory.snapshots), trajectory.steps, num_samples=num_samples, resources=resources)
        found.append(gram.matrix)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6 * np.abs(found[0]).max())


# --- verify and tune -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_verify_refuses_a_value_that_is_not_finite_in_each_of_its_three_checkpoints(run: Path, value: float) -> None:
    paths = [snapshot(run, step) for step in (200, 500, 600)]
    for path in paths:
        for name, index in PLACES:
            expected = pytest.raises(NonFiniteError, match=rf"{path.name}: tensor '{name}' holds {value}")
            with spoilt(path, name, index, value), expected:
                verify(paths[1], paths[2], paths[0], progress=quiet)


def save_layer(path: Path, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    weights = {"fc.weight": random.normal(size=(64, 6)), "fc.bias": random.normal(size=64), "other": random.normal(size=9)}
    save_file({name: torch.from_numpy(array).to(dtype) for name, array in weights.items()}, path, metadata={"format": "pt"})
    return np.asarray(load_file(path)["fc.weight"].double().numpy())


def save_rows(path: Path, layer: np.ndarray[Any, Any]) -> None:
    inputs = np.random.default_rng(1).normal(size=(128, 6))
    np.savez(path, x=inputs, y=inputs @ layer.T + 0.5)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("method", ["gauss-newton", "gradient-descent"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tune_refuses_a_layer_with_a_value_that_is_not_finite(
    dtype: torch.dtype, method: SolverName, value: float, tmp_path: Path
) -> None:
    path = tmp_path / "step_10.safetensors"
    save_rows(tmp_path / "rows.npz", save_layer(path, dtype))
    request = partial(TuneRequest, path, ("fc.weight",), tmp_path / "rows.npz", "mse", ("fc.bias",))
    for name, index in (("fc.weight", 0), ("fc.weight", 64 * 6 - 1), ("fc.bias", 63)):
        with spoilt(path, name, index, value), pytest.raises(SnapshotError, match=rf"{name}.* holds {value}"):
            tune_checkpoint(request(settings=Settings(method), output=tmp_path / "tuned.safetensors"), quiet)
        assert not (tmp_path / "tuned.safetensors").exists()
    with spoilt(path, "other", 3, value):  # not tuned, so it stays what it is
        assert tune_checkpoint(request(output=tmp_path / "tuned.safetensors"), quiet).path
    assert float(load_file(tmp_path / "tuned.safetensors")["other"][3]) == pytest.approx(value, nan_ok=True)
    assert all(bool(torch.isfinite(load_file(tmp_path / "tuned.safetensors")[name]).all()) for name in ("fc.weight", "fc.bias"))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("array", ["x", "y"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_refused_in_every_type(
    dtype: torch.dtype, array: str, value: float, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(40, 6, generator=generator).to(dtype) for name in ("x", "y")}
    rows[array][17, 5] = value
    save_file(rows, tmp_path / "rows.safetensors")
    with pytest.raises(DataError, match=f"{array} holds {value} in row 17, column 5"):
        read_data(tmp_path / "rows.safetensors", "mse")
    if dtype is not torch.bfloat16:  # of which numpy knows nothing
        np.savez(tmp_path / "rows.npz", x=rows["x"].numpy(), y=rows["y"].numpy())
        with pytest.raises(DataError, match=f"{array} holds {value} in row 17, column 5"):
            read_data(tmp_path / "rows.npz", "mse")


# --- a file that a person put the step into ---------------------------------------------------------------------------


def test_the_steps_in_a_safetensors_files_metadata_are_moved_on_with_the_weights(tmp_path: Path) -> None:
    arrays = wander(1, num_snapshots=len(STEPS), sizes={"w": 500})
    kept = {"format": "pt", "ss_epoch": "4", "steps_per_epoch": "100"}
    for index, step in enumerate(STEPS):
        told = {"step": str(step), "ss_steps": str(step), "global_step": str(step)}
        (tmp_path / "run").mkdir(exist_ok=True)
        save_file(
            {"w": torch.from_numpy(arrays["w"][index])},
            tmp_path / "run" / f"step_{step}.safetensors",
            metadata=kept | told | {"note": f"step {step}"},
        )
    fitted = fit_run(tmp_path / "run")
    for horizon in (200, 1200):
        (outcome,) = predict_run(fitted, f"{tmp_path / str(horizon)}/", horizons=(horizon,))
        assert outcome.path is not None
        told = {key: str(600 + horizon) for key in ("step", "ss_steps", "global_step")}
        with safe_open(outcome.path, framework="np") as file:
            assert file.metadata() == kept | told | {"note": "step 600"}
        assert open_snapshot(outcome.path).step == 600 + horizon
    (outcome,) = predict_run(fitted, f"{tmp_path / 'keep'}/", horizons=(200,), counters="keep")
    assert outcome.path is not None
    with safe_open(outcome.path, framework="np") as file:
        assert file.metadata() == kept | dict.fromkeys(("step", "ss_steps", "global_step"), "600") | {"note": "step 600"}


def told_run(folder: Path, metadata: Callable[[int, int], dict[str, str]]) -> Path:
    """A run whose names count epochs and whose metadata say more."""
    arrays = wander(1, num_snapshots=len(STEPS), sizes={"w": 500})
    folder.mkdir()
    for index in range(len(STEPS)):
        told = metadata(index, index + 1)
        save_file({"w": torch.from_numpy(arrays["w"][index])}, folder / f"lora-{index + 1:06d}.safetensors", metadata=told)
    return folder


def metadata_after(run: Path, out: Path, horizon: int) -> dict[str, str]:
    (outcome,) = predict_run(fit_run(run), f"{out}/", horizons=(horizon,))
    assert outcome.path is not None
    with safe_open(outcome.path, framework="np") as file:
        return dict(file.metadata())


def test_each_counter_in_the_metadata_moves_by_its_own_rate(tmp_path: Path) -> None:
    run = told_run(
        tmp_path / "run",
        lambda index, epoch: {
            "ss_steps": str(120 * epoch),
            "ss_epoch": str(epoch),
            "info": json.dumps({"step": 120 * epoch, "name": "a"}),
            "ss_num_epochs": "10",
            "ss_seed": str(epoch),
            "random": str([5, 3, 9, 1, 2, 8, 4, 7, 11, 6][index]),
        },
    )
    last = len(STEPS)
    found = metadata_after(run, tmp_path / "out", 2)
    assert (found["ss_steps"], found["ss_epoch"]) == (str(120 * (last + 2)), str(last + 2))
    assert json.loads(found["info"]) == {"step": 120 * (last + 2), "name": "a"}
    assert (found["ss_num_epochs"], found["ss_seed"]) == ("10", str(last))
    with safe_open(run / f"lora-{last:06d}.safetensors", framework="np") as file:
        assert found["random"] == file.metadata()["random"]
