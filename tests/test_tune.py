"""`farcast tune`: what it reads and how often, what it writes in every layout, what it refuses, and when it writes nothing."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farcast_cli.errors import OutputError
from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tensors import DTYPES
from farcast_cli.tune.delta import GROUP_ELEMENTS, Delta, Rounded, maps_of, read_deltas
from farcast_cli.tune.gate import judge
from farcast_cli.tune.layers import Settings
from farcast_cli.tune.numbers import decode, round_stochastically, uniform
from farcast_cli.tune.request import TuneOutcome, TuneRequest
from farcast_cli.tune.run import tune_checkpoint
from farcast_cli.tune.weight import BLOCK_BYTES, find_weight
from farcast_cli.tune.write import ROUNDING_SHARE, check_kept
from tests.conftest import run_cli, tree_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.conftest import CallCli, Done

NUM_INPUTS, NUM_OUTPUTS, NUM_CLASSES, NUM_ROWS = 24, 96, 8, 160
LAYER = ("--layer", "fc.weight", "--bias", "fc.bias", "--activation", "relu", "--head", "out.weight", "--head-bias", "out.bias")
CALL = ("tune", "step_10.safetensors", *LAYER, "--data", "rows.npz", "--loss", "mse")
DESCENT = (*CALL, "-o", "t.safetensors", "--method", "gradient-descent")


def quiet(_phase: str, _total: int) -> Callable[[int], None]:
    return lambda _done: None


def make_weights(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(seed)
    arrays = {
        "fc.weight": random.normal(size=(NUM_OUTPUTS, NUM_INPUTS)) / np.sqrt(NUM_INPUTS),
        "fc.bias": random.normal(size=NUM_OUTPUTS) / 4,
        "out.weight": random.normal(size=(NUM_CLASSES, NUM_OUTPUTS)) / np.sqrt(NUM_OUTPUTS),
        "out.bias": random.normal(size=NUM_CLASSES) / 4,
    }
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def outputs_of(weights: Mapping[str, torch.Tensor], inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model in torch, in float64."""
    wide = {name: tensor.double() for name, tensor in weights.items()}
    hidden = torch.relu(torch.from_numpy(inputs).double() @ wide["fc.weight"].T + wide["fc.bias"])
    return np.asarray((hidden @ wide["out.weight"].T + wide["out.bias"]).numpy())


@dataclass(frozen=True)
class Rows:
    """What a file of rows holds."""

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]


def make_rows(weights: Mapping[str, torch.Tensor], *, num_rows: int = NUM_ROWS, shift: float = 1.0, noise: float = 0.0) -> Rows:
    """Inputs, and what a model whose first bias is shifted makes of them."""
    random = np.random.default_rng(1)
    inputs = random.normal(size=(num_rows, NUM_INPUTS)).astype(np.float32)
    moved = {**weights, "fc.bias": weights["fc.bias"] + shift}
    targets = outputs_of(moved, inputs) + noise * random.normal(size=(num_rows, NUM_CLASSES))
    return Rows(inputs, targets.astype(np.float32))


def save_work(folder: Path) -> Path:
    """A folder with a checkpoint and rows that it should be tuned to."""
    weights = make_weights()
    save_file(weights, folder / "step_10.safetensors", metadata={"format": "pt"})
    rows = make_rows(weights)
    np.savez(folder / "rows.npz", x=rows.x, y=rows.y)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return save_work(tmp_path)


def request_in(work: Path, **more: Any) -> TuneRequest:
    asked: dict[str, Any] = {
        "biases": ("fc.bias",),
        "activations": ("relu",),
        "head": "out.weight",
        "head_bias": "out.bias",
        "output": work / "tuned.safetensors",
        "data": work / "rows.npz",
        "loss": "mse",
    }
    return TuneRequest(work / "step_10.safetensors", ("fc.weight",), **(asked | more))


def tuned(work: Path, **more: Any) -> TuneOutcome:
    return tune_checkpoint(request_in(work, **more), quiet)


def loss_of(path: Path, rows: Rows) -> float:
    return float(((outputs_of(load_file(path), rows.x) - rows.y) ** 2).mean())


def load_rows(work: Path) -> Rows:
    with np.load(work / "rows.npz") as file:
        return Rows(file["x"], file["y"])


# --- what goes well --------------------------------------------------------------------------------------------------


def test_tune_prints_its_path_and_writes_a_checkpoint_that_is_better_on_rows_it_has_not_seen(
    work: Path, call_cli: CallCli
) -> None:
    done = call_cli(*CALL, "-o", "tuned.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (0, "tuned.safetensors\n"), done
    fresh = make_rows(make_weights(), num_rows=400)
    unseen = Rows(fresh.x[NUM_ROWS:], fresh.y[NUM_ROWS:])
    assert loss_of(work / "tuned.safetensors", unseen) < 0.3 * loss_of(work / "step_10.safetensors", unseen)


def test_all_but_the_layer_and_its_bias_is_as_it_was(work: Path) -> None:
    tuned(work)
    before, after = load_file(work / "step_10.safetensors"), load_file(work / "tuned.safetensors")
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_json_has_the_promised_keys(work: Path, call_cli: CallCli) -> None:
    done = call_cli(*CALL, "-o", "tuned.safetensors", "--json", cwd=work)
    content = json.loads(done.stdout)
    assert (content["path"], content["verdict"], content["method"]) == ("tuned.safetensors", "tuned", "gauss-newton")
    assert content["held_out_after"] < 0.3 * content["held_out_before"]
    assert content["z"] > 3
    assert (content["num_rows"], content["judged_by"]) == (160, "5 folds")
    assert content["passes"] == 1
    assert content["bytes_written"] == (work / "tuned.safetensors").stat().st_size


def test_the_sidecar_holds_the_provenance(work: Path) -> None:
    outcome = tuned(work)
    content = json.loads((work / "tuned.safetensors.farcast.json").read_text())
    assert content["command"] == "tune"
    assert content["input"] | {"digest": ""} == {
        "path": "step_10.safetensors",
        "bytes": (work / "step_10.safetensors").stat().st_size,
        "digest": "",
    }
    rows = (work / "rows.npz").read_bytes()
    assert content["data"] == {"path": "rows.npz", "bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()}
    assert content["layers"] == ["fc.weight"]
    assert outcome.verdict is not None
    assert content["held_out"]["z"] == outcome.verdict.z
    assert content["round"] == "nearest"


@pytest.mark.parametrize("method", ["gauss-newton", "gradient-descent"])
def test_the_same_request_gives_the_same_bytes(work: Path, method: Any) -> None:
    tuned(work, settings=Settings(method), output=work / "a.safetensors")
    tuned(work, settings=Settings(method), output=work / "b.safetensors", num_threads=3)
    assert (work / "a.safetensors").read_bytes() == (work / "b.safetensors").read_bytes()


def test_rows_may_come_from_safetensors_in_any_floating_type(work: Path) -> None:
    rows = load_rows(work)
    save_file({"x": torch.from_numpy(rows.x).bfloat16(), "y": torch.from_numpy(rows.y).half()}, work / "rows.safetensors")
    assert tuned(work, data=work / "rows.safetensors").path


def test_cross_entropy_takes_labels(work: Path) -> None:
    rows = load_rows(work)
    np.savez(work / "labels.npz", x=rows.x, y=rows.y.argmax(axis=1))
    outcome = tuned(work, data=work / "labels.npz", loss="cross-entropy", gate=0.0)
    assert outcome.path
    assert outcome.verdict is not None
    assert outcome.verdict.after < outcome.verdict.before


def test_a_layer_alone_has_its_own_outputs_as_targets(work: Path) -> None:
    rows = load_rows(work)
    weights = make_weights()
    wanted = rows.x @ (weights["fc.weight"].numpy() + 0.1).T
    np.savez(work / "layer.npz", x=rows.x, y=wanted)
    options: dict[str, Any] = {"biases": (), "activations": ("none",), "head": None, "head_bias": None}
    outcome = tuned(work, data=work / "layer.npz", **options)
    after = load_file(work / "tuned.safetensors")["fc.weight"].numpy()
    np.testing.assert_allclose(after, weights["fc.weight"].numpy() + 0.1, atol=1e-4)
    assert outcome.num_passes == 1


def test_anchors_keep_the_outputs_of_their_rows_in_what_is_written(work: Path) -> None:
    anchors = np.random.default_rng(5).normal(size=(10, NUM_INPUTS)).astype(np.float32)
    np.savez(work / "anchors.npz", x=anchors)
    before = outputs_of(load_file(work / "step_10.safetensors"), anchors)
    assert tuned(work, anchor=work / "anchors.npz").path
    after = outputs_of(load_file(work / "tuned.safetensors"), anchors)
    np.testing.assert_allclose(after, before, atol=1e-5)


# --- what is read ----------------------------------------------------------------------------------------------------


def bytes_that_this_process_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_the_bytes_read_do_not_depend_on_the_number_of_iterations(work: Path) -> None:
    """Counted by the system: a checkpoint of some 2 MB, tuned for 3 and for 200 iterations."""
    wide = {"wide.weight": torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)) / 16}
    save_file(wide, work / "step_10.safetensors", metadata={"format": "pt"})
    random = np.random.default_rng(0)
    inputs = random.normal(size=(NUM_ROWS, 4)) @ random.normal(size=(4, 256))  # what is learnt on some rows holds for all
    np.savez(work / "wide.npz", x=inputs, y=inputs @ wide["wide.weight"].double().numpy().T + 1)
    plain: dict[str, Any] = {"biases": (), "activations": ("tanh",), "head": None, "head_bias": None, "gate": 1e9}
    read, said, done = [], [], []
    for iterations in (3, 3, 200):  # the first one also reads what is imported
        request = request_in(
            work, data=work / "wide.npz", settings=Settings("gradient-descent", iterations, rate=1e-3), **plain
        )
        request = replace(request, layers=("wide.weight",))
        before = bytes_that_this_process_read()
        outcome = tune_checkpoint(request, quiet)
        read.append(bytes_that_this_process_read() - before)
        said.append(outcome.bytes_read)
        done.append(outcome.iterations)
    assert done[2] > 100
    assert said == [2048 * 256 * 4] * 3
    assert abs(read[1] - read[2]) < 10_000


def test_a_layer_of_several_blocks_is_multiplied_as_a_whole_one(tmp_path: Path) -> None:
    rows = 2 * BLOCK_BYTES // (8 * 4096) + 3
    weights = {"w": torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0)), "b": torch.randn(rows)}
    save_file(weights, tmp_path / "step_1.safetensors")
    weight = find_weight(open_snapshot(tmp_path / "step_1.safetensors"), "w", "b")
    inputs = weight.extended(np.random.default_rng(0).normal(size=(3, 4096)))
    expected = inputs @ np.hstack([weights["w"].double().numpy(), weights["b"].double().numpy()[:, None]]).T
    np.testing.assert_allclose(weight.forward(inputs), expected, atol=1e-11)
    back = np.random.default_rng(1).normal(size=(2, rows))
    np.testing.assert_allclose(weight.backward(back)[:, :-1], back @ weights["w"].double().numpy(), atol=1e-10)
    assert weight.bytes_read == 2 * (weights["w"].nbytes + weights["b"].nbytes)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_a_torch_file_keeps_its_optimizer_its_counters_and_its_other_tensors(work: Path) -> None:
    weights = make_weights(dtype=torch.float64)
    payload = {"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "step": 10}
    torch.save(payload, work / "ckpt_10.pt")
    request = replace(request_in(work), checkpoint=work / "ckpt_10.pt", output=work / "tuned.pt")
    tune_checkpoint(request, quiet)
    after = torch.load(work / "tuned.pt", weights_only=True)
    assert after["step"] == 10
    assert torch.equal(after["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    rows = load_rows(work)
    loss = ((outputs_of(after["model"], rows.x) - rows.y) ** 2).mean()
    assert loss < 0.3 * ((outputs_of(weights, rows.x) - rows.y) ** 2).mean()


def test_a_folder_of_shards_keeps_its_files(work: Path) -> None:
    weights = make_weights()
    folder = work / "checkpoint-10"
    folder.mkdir()
    parts = {
        "model-00001-of-00002.safetensors": ["fc.weight"],
        "model-00002-of-00002.safetensors": ["fc.bias", "out.weight", "out.bias"],
    }
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (folder / "config.json").write_text("{}")
    tune_checkpoint(replace(request_in(work), checkpoint=folder, output=work / "tuned"), quiet)
    assert {path.name for path in (work / "tuned").iterdir()} == {
        *parts,
        "model.safetensors.index.json",
        "config.json",
        "farcast.json",
    }
    merged = {name: tensor for file in parts for name, tensor in load_file(work / "tuned" / file).items()}
    rows = load_rows(work)
    assert ((outputs_of(merged, rows.x) - rows.y) ** 2).mean() < 0.3 * ((outputs_of(weights, rows.x) - rows.y) ** 2).mean()


def test_a_distributed_checkpoint_is_tuned_in_place_of_its_tensor(work: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    weights = make_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": weights, "step": 10}, checkpoint_id=str(work / "step-10"), no_dist=True)
    tune_checkpoint(replace(request_in(work), checkpoint=work / "step-10", output=work / "tuned"), quiet)
    into = {"model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(into, checkpoint_id=str(work / "tuned"), no_dist=True)
    rows = load_rows(work)
    assert ((outputs_of(into["model"], rows.x) - rows.y) ** 2).mean() < 0.3 * (
        (outputs_of(weights, rows.x) - rows.y) ** 2
    ).mean()


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def coarse(tmp_path: Path) -> Path:
    """A wide bfloat16 layer whose tuning moves every weight by less than half a unit of its last digit."""
    random = np.random.default_rng(0)
    weights = torch.from_numpy(1 + random.random(size=(64, 512))).bfloat16()
    inputs = random.normal(size=(NUM_ROWS, 512)) * 0.01 + 1.0
    targets = inputs @ (weights.double().numpy() + 0.002).T
    save_file({"fc.weight": weights}, tmp_path / "step_10.safetensors", metadata={"format": "pt"})
    np.savez(tmp_path / "rows.npz", x=inputs[:128], y=targets[:128])
    return tmp_path


COARSE = ("tune", "step_10.safetensors", "--layer", "fc.weight", "--data", "rows.npz", "--loss", "mse")


def test_a_change_that_bfloat16_rounds_away_is_not_published_and_the_hint_says_what_to_do(
    coarse: Path, call_cli: CallCli
) -> None:
    before = tree_digest(coarse)
    done = call_cli(*COARSE, "-o", "tuned.safetensors", cwd=coarse)
    assert done.returncode == 5, done
    assert "rows" in done.errors[0]
    assert done.hints == ["hint: --round stochastic keeps its mean; --delta-out FILE keeps the change in a separate file"]
    assert tree_digest(coarse) == before


def test_stochastic_rounding_keeps_what_the_nearest_loses(coarse: Path, call_cli: CallCli) -> None:
    done = call_cli(*COARSE, "-o", "tuned.safetensors", "--round", "stochastic", "--seed", 3, cwd=coarse)
    assert done.returncode == 0, done
    assert load_file(coarse / "tuned.safetensors")["fc.weight"].dtype == torch.bfloat16


def test_a_tuned_value_beyond_the_range_of_its_type_is_refused_with_a_hint_that_tune_knows(
    tmp_path: Path, call_cli: CallCli
) -> None:
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.uniform(50_000, 60_000, size=(64, 8))).half()
    inputs = random.normal(size=(128, 8))
    save_file({"fc.weight": weights}, tmp_path / "step_10.safetensors", metadata={"format": "pt"})
    np.savez(tmp_path / "rows.npz", x=inputs, y=inputs @ (2 * weights.double().numpy()).T)
    before = tree_digest(tmp_path)
    done = call_cli(*COARSE, "-o", "tuned.safetensors", cwd=tmp_path)
    assert done.returncode == 3, done
    assert "a tuned value of tensor 'fc.weight' leaves the range of its type (+-65504)" in done.errors[0]
    assert done.hints == ["hint: --ridge keeps the change small; --delta-out FILE keeps it in a separate file"]
    assert tree_digest(tmp_path) == before


def test_the_bytes_do_not_depend_on_the_threads_of_matrix_products(tmp_path: Path) -> None:
    """In float64, where no rounding hides a sum in another order."""
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.normal(size=(600, 1000)))
    inputs = 0.3 * random.normal(size=(400, 1000)) + 1.0  # with a direction in common, along which rows held out gain too
    save_file({"fc.weight": weights}, tmp_path / "step_10.safetensors", metadata={"format": "pt"})
    np.savez(tmp_path / "rows.npz", x=inputs, y=inputs @ (weights.numpy() + 0.1).T)
    written = []
    for threads in ("1", "2"):
        env = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = run_cli(*COARSE, "-o", f"tuned{threads}.safetensors", cwd=tmp_path, env=env)
        assert done.returncode == 0, done
        written.append((tmp_path / f"tuned{threads}.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_loss_that_comes_back_larger_than_it_should_be_is_an_error() -> None:
    before, expected, shares = np.full(8, 2.0), np.full(8, 1.0), np.full(8, 1 / 8)
    check_kept((before, expected, expected + 0.9 * ROUNDING_SHARE), shares, "tuned")
    for found in (expected + 1.1 * ROUNDING_SHARE, np.full(8, np.nan)):
        with pytest.raises(OutputError):
            check_kept((before, expected, found), shares, "tuned")


def test_a_loss_that_comes_back_counts_as_its_row_weighs() -> None:
    """Rounding costs one row all of its gain: 1 % of the gain or 60 %, as the row weighs."""
    before, expected, found = np.full(8, 2.0), np.full(8, 1.0), np.array([2.0, *[1.0] * 7])
    check_kept((before, expected, found), np.array([0.01, *[0.99 / 7] * 7]), "tuned")
    with pytest.raises(OutputError, match=r"loss of the tuned rows 2 -> 1, but 1\.6 as"):
        check_kept((before, expected, found), np.array([0.6, *[0.4 / 7] * 7]), "tuned")


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=50), st.integers(0, 2**40))
def test_stochastic_rounding_gives_one_of_the_two_neighbours(name: str, values: list[float], seed: int) -> None:
    exact = np.array(values)
    found = round_stochastically(exact, DTYPES[name], seed=seed, start=7)
    kind = getattr(torch, name)
    assert torch.equal(torch.from_numpy(found).to(kind).double(), torch.from_numpy(found))
    spacing = np.maximum(np.abs(exact), 1e-30) * 2.0 ** {"bfloat16": -7, "float16": -10, "float32": -23}[name]
    least = 2.0**-24 if name == "float16" else 0.0
    assert (np.abs(found - exact) <= spacing + least).all()


def test_stochastic_rounding_keeps_the_mean_and_leaves_the_grid_alone() -> None:
    values = np.full(200_000, 1 + 2.0**-10)
    found = round_stochastically(values, DTYPES["bfloat16"], seed=1, start=0)
    assert set(found) == {1.0, 1 + 2.0**-7}
    assert found.mean() == pytest.approx(1 + 2.0**-10, abs=3e-5)
    grid = torch.randn(1000).bfloat16().double().numpy()
    np.testing.assert_array_equal(round_stochastically(grid, DTYPES["bfloat16"], seed=1, start=0), grid)


@given(st.integers(0, 10**12), st.integers(1, 50), st.integers(0, 49))
def test_the_random_numbers_of_an_element_depend_on_its_index_alone(start: int, count: int, skip: int) -> None:
    whole = uniform(5, start, count)
    np.testing.assert_array_equal(
        whole[skip:], uniform(5, start + skip, max(0, count - skip)) if skip < count else whole[skip:]
    )
    assert ((whole >= 0) & (whole < 1)).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_numbers_are_read_as_torch_reads_them(name: str) -> None:
    tensor = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-8, 65504.0])]).to(getattr(torch, name))
    found = decode(tensor.view(torch.uint8).numpy().tobytes(), DTYPES[name])
    np.testing.assert_array_equal(found, tensor.double().numpy())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.data())
def test_no_split_into_stretches_changes_a_value_that_is_written(width: int, data: st.DataObject) -> None:
    random = np.random.default_rng(width)
    height = GROUP_ELEMENTS // width + 3  # so that groups of rows have a border inside
    delta = Delta("w", None, 0.9, random.normal(size=(2, height)), random.normal(size=(2, width)), 0)
    path = Path("unused")
    weight = find_weight_of(path, height, width)
    values = random.normal(size=height * width).astype(np.float32)
    for how in ("nearest", "stochastic"):
        rounded: Any = Rounded(how, 11)
        function = maps_of(delta, weight, rounded)["w"]
        cuts = sorted(data.draw(st.lists(st.integers(1, len(values) - 1), max_size=4, unique=True))) if len(values) > 1 else []
        edges = [0, *cuts, len(values)]
        parts = [function(values[a:b], a) for a, b in pairwise(edges)]
        np.testing.assert_array_equal(np.concatenate(parts), function(values, 0))
    expected = 0.9 * values.astype(np.float64) + (delta.factors.T @ delta.directions).reshape(-1)
    np.testing.assert_allclose(maps_of(delta, weight, Rounded())["w"](values, 0), expected, rtol=1e-6, atol=1e-6)


def find_weight_of(path: Path, height: int, width: int) -> Any:
    from farcast_cli.tensors import TensorEntry
    from farcast_cli.tune.weight import Shard, Weight

    return Weight("w", (Shard(TensorEntry("w", DTYPES["float32"], (height, width), path, 0), 0),))


# --- delta files -----------------------------------------------------------------------------------------------------


def test_a_delta_added_later_is_the_checkpoint_that_tuning_would_have_written(work: Path, call_cli: CallCli) -> None:
    tuned(work)
    done = call_cli(*CALL, "--delta-out", "delta.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (0, "delta.safetensors\n"), done
    done = call_cli("tune", "step_10.safetensors", "--apply", "delta.safetensors", "-o", "again.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (0, "again.safetensors\n"), done
    assert (work / "again.safetensors").read_bytes() == (work / "tuned.safetensors").read_bytes()


def test_a_delta_holds_factors_of_the_rank_of_the_rows_tuned_on(work: Path) -> None:
    tuned(work, output=None, delta_out=work / "delta.safetensors")
    (delta,) = read_deltas(work / "delta.safetensors")
    assert delta.factors.shape[1] == NUM_OUTPUTS
    assert delta.directions.shape[1] == NUM_INPUTS + 1
    assert len(delta.factors) == len(delta.directions) <= NUM_INPUTS + 1
    assert (delta.layer, delta.bias, delta.scale) == ("fc.weight", "fc.bias", 1.0)


# --- the gate --------------------------------------------------------------------------------------------------------


def test_where_nothing_is_gained_nothing_is_written_and_the_exit_code_says_so(work: Path, call_cli: CallCli) -> None:
    rows = make_rows(make_weights(), shift=0.0, noise=1.0)  # targets that the model already has, but for noise
    np.savez(work / "rows.npz", x=rows.x, y=rows.y)
    before = tree_digest(work)
    done = call_cli(*CALL, "-o", "tuned.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (10, "")
    assert "no significant gain" in done.stderr
    assert tree_digest(work) == before
    done = call_cli(*CALL, "-o", "tuned.safetensors", "--json", "-q", cwd=work)
    content = json.loads(done.stdout)
    assert (content["path"], content["verdict"]) == (None, "no significant gain")


def test_what_the_choice_took_for_a_gain_by_chance_is_not_written(work: Path) -> None:
    """Rows of the model itself, with noise: these few say that an iteration helped, and so do those held out, a little."""
    weights, random = make_weights(), np.random.default_rng(113)
    inputs = random.normal(size=(NUM_ROWS, NUM_INPUTS))
    own = outputs_of(weights, inputs)
    np.savez(work / "rows.npz", x=inputs, y=own + 0.5 * random.normal(size=own.shape))
    draw = Rounded("nearest", 7)
    lax = tuned(work, rounded=draw, gate=0.0)
    assert lax.iterations > 0
    fresh = np.random.default_rng(0).normal(size=(4000, NUM_INPUTS))
    truth = Rows(fresh, outputs_of(weights, fresh))
    assert loss_of(work / "tuned.safetensors", truth) > loss_of(work / "step_10.safetensors", truth) + 1e-3
    strict = tuned(work, rounded=draw, output=work / "again.safetensors")
    assert strict.iterations == lax.iterations
    assert strict.path is None
    assert not (work / "again.safetensors").exists()


def test_the_gate_counts_copies_of_a_row_once() -> None:
    gains = np.array([1.0, 0.5, -0.2, 0.4])
    once = judge(gains, np.zeros(4), np.arange(4), threshold=3)
    again = judge(np.tile(gains, 50), np.zeros(200), np.tile(np.arange(4), 50), threshold=3)
    assert again.z == pytest.approx(once.z)
    assert (again.num_groups, again.num_rows) == (4, 200)


def test_z_is_the_mean_gain_in_standard_errors() -> None:
    before, after = np.array([3.0, 2.0, 4.0, 1.0]), np.array([1.0, 1.0, 3.5, 0.5])
    gains = before - after
    expected = gains.mean() / (gains.std(ddof=1) / 2)
    verdict = judge(before, after, np.arange(4), threshold=1.0)
    assert verdict.z == pytest.approx(expected)
    assert verdict.is_accepted
    assert judge(before, before, np.arange(4), threshold=0.0).z == 0
    assert not judge(before, before, np.arange(4), threshold=0.0).is_accepted


def test_rows_that_repeat_are_allowed_and_said(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", x=np.concatenate([rows.x, rows.x[:20]]), y=np.concatenate([rows.y, rows.y[:20]]))
    done = call_cli(*CALL, "-o", "tuned.safetensors", cwd=work)
    assert done.returncode == 0
    assert "20 of 180 rows have the x of another row" in done.stderr


def test_the_gate_counts_copies_in_a_file_once(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", x=np.tile(rows.x[:96], (2, 1)), y=np.tile(rows.y[:96], (2, 1)))
    done = call_cli(*CALL, "-o", "tuned.safetensors", "--gate", 0, "--json", cwd=work)
    assert json.loads(done.stdout)["num_rows"] == 192
    sidecar = json.loads((work / "tuned.safetensors.farcast.json").read_text())
    assert sidecar["held_out"]["rows"] == 96


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(call_cli: CallCli, folder: Path, code: int, words: tuple[str, ...], *args: object) -> Done:
    """One error line that says why, at most one hint, the code, and no trace on disk."""
    before = tree_digest(folder)
    done = call_cli(*args, cwd=folder)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(done.errors) == 1, done
    assert "Traceback" not in done.stderr
    missing = [word for word in words if word not in done.errors[0] + "".join(done.hints)]
    assert not missing, done
    assert tree_digest(folder) == before
    return done


def with_option(name: str, *values: str) -> tuple[str, ...]:
    """The usual call with another value of an option, or without it."""
    call = [*CALL, "-o", "tuned.safetensors"]
    place = call.index(name)
    return tuple(call[:place] + ([name, *values] if values else []) + call[place + 2 :])


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (with_option("--layer", "fc.weigth"), 2, ("--layer fc.weigth", "no such tensor", "fc.weight")),
        (with_option("--layer", "fc.bias"), 2, ("expected a matrix", "[96]")),
        (with_option("--bias", "out.bias"), 2, ("--bias out.bias", "[96]", "[8]")),
        (with_option("--head", "fc.weight"), 2, ("--head fc.weight", "expected 96 inputs", "24")),
        (with_option("--head-bias", "fc.bias"), 2, ("--head-bias fc.bias", "[8]", "[96]")),
        (with_option("--layer"), 2, ("no --layer",)),
        (with_option("--data"), 2, ("no --data",)),
        (with_option("--data", "rows.csv"), 2, ("rows.csv", ".npz")),
        (with_option("--data", "nothing.npz"), 4, ("nothing.npz", "No such file")),
        (with_option("--loss", "l1"), 2, ("--loss l1", "mse, cross-entropy")),
        (with_option("--loss", "cross-entropy"), 3, ("labels", "float32")),
        (with_option("--activation", "swish"), 2, ("--activation swish", "silu")),
        (with_option("--activation"), 2, ("--activation with --head", "relu")),
        (with_option("-o"), 2, ("-o OUT", "--delta-out")),
        (with_option("-o", "step_10.safetensors"), 2, ("is the checkpoint itself", "never changes its input")),
        (with_option("-o", "rows.npz"), 5, ("rows.npz", "exists already")),
        (with_option("-o", "."), 5, ("-o .: expected the path of an output", "-o OUT")),
        (with_option("-o", "/"), 5, ("-o /: expected the path of an output", "-o OUT")),
        (with_option("-o", "tuned.pt"), 2, ("ends in .safetensors",)),
        ((*CALL, "-o", "t.safetensors", "--method", "adam"), 2, ("--method adam", "no low rank", "gauss-newton")),
        ((*CALL, "-o", "t.safetensors", "--method", "lbfgs"), 2, ("--method lbfgs", "gradient-descent")),
        ((*CALL, "-o", "t.safetensors", "--subsample", "30"), 3, ("30 rows", "at least 32")),
        ((*CALL, "-o", "t.safetensors", "--ridge", "-1"), 2, ("--ridge -1", "finite number of 0 or more")),
        ((*CALL, "-o", "t.safetensors", "--ridge", "nan"), 2, ("--ridge nan", "finite number of 0 or more")),
        ((*CALL, "-o", "t.safetensors", "--gate", "-99"), 2, ("--gate -99", "finite number of 0 or more")),
        ((*CALL, "-o", "t.safetensors", "--gate", "inf"), 2, ("--gate inf", "finite number")),
        ((*DESCENT, "--rate", "0"), 2, ("--rate 0", "finite number above 0")),
        ((*DESCENT, "--momentum", "1"), 2, ("--momentum 1", "below 1")),
        ((*DESCENT, "--weight-decay", "-1"), 2, ("--weight-decay -1",)),
        ((*CALL, "-o", "t.safetensors", "--rate", "1"), 2, ("--rate needs --method gradient-descent",)),
        ((*CALL, "-o", "t.safetensors", "--momentum", ".5"), 2, ("--momentum needs --method gradient-descent",)),
        ((*CALL, "--lora-out", "adapter", "-o", "t.safetensors"), 2, ("one of -o OUT, --delta-out FILE and --lora-out DIR",)),
        ((*CALL, "-o", "t.safetensors", "--weight-decay", ".1"), 2, ("--weight-decay", "--ridge")),
        ((*CALL, "-o", "t.safetensors", "--layer", "out.weight"), 2, ("one --bias for each",)),
        ((*CALL, "-o", "t.safetensors", "--anchor", "rows.npz"), 3, ("--anchor", "no input is left to tune")),
        ((*CALL, "-o", "t.safetensors", "--apply", "d.safetensors"), 2, ("--apply takes no --layer",)),
        (("tune", "nothing.safetensors", "--apply", "rows.npz", "-o", "t.safetensors"), 3, ("nothing.safetensors",)),
        (("tune", "step_10.safetensors", "--apply", "step_10.safetensors", "-o", "t.safetensors"), 4, ("not a delta file",)),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_in_one_line(
    work: Path, call_cli: CallCli, call: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(call_cli, work, code, words, *call)


def test_a_users_file_under_the_sidecars_name_is_refused_before_the_rows_are_read(work: Path, call_cli: CallCli) -> None:
    (work / "tuned.safetensors.farcast.json").write_text('{"mine": 1}')
    words = ("tuned.safetensors.farcast.json: exists and is not a forecast's sidecar",)
    refused(call_cli, work, 5, words, *with_option("--data", "nothing.npz"))


def spoil(work: Path, **arrays: np.ndarray[Any, Any]) -> None:
    rows = load_rows(work)
    whole: dict[str, Any] = {"x": rows.x, "y": rows.y} | arrays
    np.savez(work / "rows.npz", **whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: {"y": rows.y[:-1]}, ("as many rows", "[160, 24]", "[159, 8]")),
        (lambda rows: {"x": rows.x[:, :-1]}, ("x: expected 24 columns", "96 x 24", "found 23")),
        (lambda rows: {"x": np.repeat(rows.x, 4, axis=1)}, ("expected 24 columns", "found 96", "Conv1D", "--transposed")),
        (lambda rows: {"y": rows.y[:, :3]}, ("y: expected 8 columns", "found 3")),
        (lambda rows: {"x": np.where(rows.x == rows.x[5, 3], np.nan, rows.x)}, ("x holds nan", "row 5, column 3")),
        (lambda rows: {"y": np.where(rows.y == rows.y[7, 2], np.inf, rows.y)}, ("y holds inf", "row 7, column 2")),
        (lambda rows: {"x": np.ones_like(rows.x)}, ("x is constant", "160")),
        (lambda rows: {"x": rows.x[0]}, ("x: expected rows of numbers", "[24]")),
        (lambda rows: {"x": rows.x.astype(str)}, ("x: expected rows of numbers",)),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_what_where_expected_and_found(
    work: Path, call_cli: CallCli, change: Callable[[Rows], dict[str, Any]], words: tuple[str, ...]
) -> None:
    spoil(work, **change(load_rows(work)))
    refused(call_cli, work, 3, ("rows.npz", *words), *CALL, "-o", "tuned.safetensors")


def test_a_file_without_y_is_refused(work: Path, call_cli: CallCli) -> None:
    np.savez(work / "rows.npz", x=load_rows(work).x)
    refused(call_cli, work, 3, ("rows.npz", "no array 'y'"), *CALL, "-o", "tuned.safetensors")


def test_labels_outside_the_head_are_refused(work: Path, call_cli: CallCli) -> None:
    labels = np.zeros(NUM_ROWS, dtype=np.int64)
    labels[9] = NUM_CLASSES
    spoil(work, y=labels)
    call = with_option("--loss", "cross-entropy")
    refused(call_cli, work, 3, ("labels from 0 to 7", "found 8 in row 9"), *call)


def test_pickled_objects_among_the_rows_are_not_loaded(work: Path, call_cli: CallCli) -> None:
    spoil(work, x=np.array([{"a": 1}], dtype=object))
    refused(call_cli, work, 4, ("pickled objects",), *CALL, "-o", "tuned.safetensors")


def test_a_file_that_is_no_zip_is_refused(work: Path, call_cli: CallCli) -> None:
    (work / "rows.npz").write_bytes(b"nonsense")
    refused(call_cli, work, 4, ("rows.npz", "numpy"), *CALL, "-o", "tuned.safetensors")


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_an_integer_or_quantised_weight_is_refused(work: Path, call_cli: CallCli, kind: torch.dtype) -> None:
    weights = make_weights()
    weights["fc.weight"] = weights["fc.weight"].to(kind)
    save_file(weights, work / "step_10.safetensors", metadata={"format": "pt"})
    words = ("fc.weight", str(kind).removeprefix("torch."), "expected float64", "quantised from")
    refused(call_cli, work, 3, words, *CALL, "-o", "tuned.safetensors")


def test_a_weight_that_is_not_finite_is_refused(work: Path, call_cli: CallCli) -> None:
    weights = make_weights()
    weights["fc.weight"][3, 4] = torch.nan
    save_file(weights, work / "step_10.safetensors", metadata={"format": "pt"})
    refused(call_cli, work, 3, ("fc.weight", "holds nan"), *CALL, "-o", "tuned.safetensors")


def test_tied_weights_are_refused(work: Path, call_cli: CallCli) -> None:
    weights = make_weights()
    torch.save({**weights, "twin.weight": weights["fc.weight"]}, work / "ckpt_10.pt")
    call = [("ckpt_10.pt" if word == "step_10.safetensors" else word) for word in CALL]
    refused(call_cli, work, 3, ("tied to twin.weight",), *call, "-o", "tuned.pt")


@pytest.mark.parametrize(
    ("key", "config", "head"),
    [
        ("model.embed_tokens.weight", {"tie_word_embeddings": True}, None),
        ("lm_head.weight", {"text_config": {"tie_word_embeddings": True}}, None),
        ("transformer.wte.weight", {"model_type": "gpt2"}, None),  # tied by default
        ("model.embed_tokens.weight", {"tie_word_embeddings": False}, "not tied"),
        ("transformer.wte.weight", {"model_type": "gpt2"}, "lm_head.weight"),
        ("model.fc.weight", {"tie_word_embeddings": True}, "another layer"),
    ],
)
def test_a_weight_that_its_model_ties_is_refused(
    work: Path, call_cli: CallCli, key: str, config: dict[str, object], head: str | None
) -> None:
    """A safetensors file holds one of the two; only config.json says that it is used twice."""
    weights = make_weights()
    weights[key] = weights.pop("fc.weight")
    if head:
        weights[head] = torch.ones(3, 3)
    folder = work / "checkpoint-10"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    call = [{"step_10.safetensors": "checkpoint-10", "fc.weight": key}.get(word, word) for word in CALL]
    if head is None:
        refused(call_cli, work, 3, (key, "tie_word_embeddings", "without this tie"), *call, "-o", "tuned")
    else:
        assert call_cli(*call, "-o", "tuned", cwd=work).returncode in {0, 10}


def test_a_delta_whose_scale_has_no_dimension_is_damaged(work: Path, call_cli: CallCli) -> None:
    tuned(work, output=None, delta_out=work / "delta.safetensors")
    with safe_open(work / "delta.safetensors", "pt") as file:
        metadata = file.metadata()
    changed = load_file(work / "delta.safetensors") | {"0.scale": torch.tensor(1.0, dtype=torch.float64)}
    save_file(changed, work / "delta.safetensors", metadata=metadata)
    call = ("tune", "step_10.safetensors", "--apply", "delta.safetensors", "-o", "t.safetensors")
    refused(call_cli, work, 4, ("delta.safetensors", "layer 0 is described wrongly"), *call)


def test_a_delta_for_other_weights_is_not_applied(work: Path, call_cli: CallCli) -> None:
    tuned(work, output=None, delta_out=work / "delta.safetensors")
    save_file(make_weights(seed=9), work / "other.safetensors", metadata={"format": "pt"})
    words = ("other.safetensors", "not the layer that", "bytes differ")
    refused(call_cli, work, 3, words, "tune", "other.safetensors", "--apply", "delta.safetensors", "-o", "t.safetensors")


def test_an_output_inside_the_checkpoint_is_refused(work: Path, call_cli: CallCli) -> None:
    folder = work / "checkpoint-10"
    folder.mkdir()
    save_file(make_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    call = ["checkpoint-10" if word == "step_10.safetensors" else word for word in CALL]
    refused(call_cli, work, 2, ("lies inside the checkpoint",), *call, "-o", "checkpoint-10/tuned")
