"""What a forecast was worth equals what whole tensors say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import farcast_cli.engine.reader
from farcast_cli.errors import FarcastError, FileFormatError, MixedRunsError, UsageError
from farcast_cli.verification import find_reference, verify
from tests.tiny import fit_run, predict_run, save_safetensors, wander, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.results import VerifyAnswer
    from tests.conftest import CallCli

STEPS = tuple(range(100, 900, 100))
SIZES = {"a": 3000, "b": 7}


def _verify(forecast: Path, truth: Path, reference: Path) -> VerifyAnswer:
    return verify(forecast, truth, reference, progress=lambda _phase, _total: lambda _done: None)


def _random(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in SIZES.items()}
    save_safetensors(path, {**tensors, "ids": torch.arange(3)})
    return path


def _values(path: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    return {name: value.double().numpy() for name, value in load_file(path).items() if name != "ids"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ratio_and_the_error_are_those_of_whole_tensors(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, summed up in another order: to 1e-9."""
    monkeypatch.setattr(farcast_cli.engine.reader, "STRETCH_BYTES", 1)  # the smallest stretches
    monkeypatch.setattr(farcast_cli.engine.reader, "MAX_STRETCH", 1)
    paths = [_random(tmp_path / f"{name}.safetensors", seed, dtype) for seed, name in enumerate(("f", "t", "r"))]
    forecast, truth, reference = map(_values, paths)
    result = _verify(*paths)
    wrong = np.concatenate([forecast[name] - truth[name] for name in SIZES])
    nothing = np.concatenate([reference[name] - truth[name] for name in SIZES])
    assert result.ratio == pytest.approx(np.linalg.norm(wrong) / np.linalg.norm(nothing), rel=1e-9)
    assert result.mean_absolute_error == pytest.approx(np.abs(wrong).mean(), rel=1e-9)
    for one in result.per_tensor:
        expected = np.linalg.norm(forecast[one.name] - truth[one.name]) / np.linalg.norm(reference[one.name] - truth[one.name])
        assert one.ratio == pytest.approx(expected, rel=1e-9)
        assert one.num_elements == SIZES[one.name]
    assert {one.name for one in result.per_tensor} == set(SIZES)


def test_the_truth_itself_has_the_ratio_zero_and_the_reference_one(tmp_path: Path) -> None:
    truth, reference = (_random(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    assert _verify(truth, truth, reference).ratio == 0.0
    assert _verify(truth, truth, reference).mean_absolute_error == 0.0
    assert _verify(reference, truth, reference).ratio == 1.0


def test_where_nothing_moved_there_is_no_ratio(tmp_path: Path) -> None:
    forecast, truth = (_random(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    result = _verify(forecast, truth, truth)
    assert result.ratio is None
    assert [one.ratio for one in result.per_tensor] == [None, None]
    assert result.mean_absolute_error > 0


def test_a_tensor_that_did_not_move_has_no_ratio_among_others_that_have(tmp_path: Path) -> None:
    for index, name in enumerate(("f", "t", "r")):
        save_safetensors(tmp_path / f"{name}.safetensors", {"still": torch.ones(4), "w": torch.full((4,), float(index))})
    result = _verify(*(tmp_path / f"{name}.safetensors" for name in ("f", "t", "r")))
    assert {one.name: one.ratio for one in result.per_tensor} == {"still": None, "w": 1.0}


def test_a_forecasts_sidecar_leads_to_its_origin(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", wander(1, num_snapshots=8, sizes=SIZES), STEPS)
    forecast = tmp_path / "elsewhere" / "step_1000.safetensors"
    predict_run(fit_run(run), forecast, horizons=[200])
    assert find_reference(forecast).resolve() == run / "step_800.safetensors"
    found = _verify(forecast, run / "step_700.safetensors", find_reference(forecast))
    assert found == _verify(forecast, run / "step_700.safetensors", found.reference)


@pytest.mark.parametrize("folder", [False, True])
def test_a_checkpoint_without_sidecar_needs_to_be_told_its_reference(folder: bool, tmp_path: Path) -> None:  # noqa: FBT001
    path = tmp_path / "some" / "step_5" if folder else tmp_path / "some" / "step_5.safetensors"
    _random(path / "model.safetensors" if folder else path, 1)
    with pytest.raises(UsageError, match=r"its origin is unknown") as caught:
        find_reference(path)
    assert "--reference" in caught.value.hint


def test_a_forecast_that_is_not_there_is_said_to_be_missing(tmp_path: Path, call_cli: CallCli) -> None:
    truth = _random(tmp_path / "b.safetensors", 1)
    done = call_cli("verify", "a", "--against", truth.name, cwd=tmp_path)
    assert (done.returncode, done.errors) == (3, ["error: a: no such file or folder"])
    assert "the path that farcast predict printed" in done.hints[0]


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"origin": 3}', '{"origin": null}', "\ud800"])
def test_a_damaged_sidecar_is_an_error_and_no_crash(content: str, tmp_path: Path) -> None:
    path = _random(tmp_path / "step_5.safetensors", 1)
    (tmp_path / "step_5.safetensors.farcast.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileFormatError):
        find_reference(path)


def test_checkpoints_of_two_models_are_not_compared(tmp_path: Path) -> None:
    first = _random(tmp_path / "a.safetensors", 1)
    save_safetensors(tmp_path / "b.safetensors", {"other": torch.ones(3)})
    with pytest.raises(MixedRunsError):
        _verify(first, tmp_path / "b.safetensors", first)


def test_a_missing_checkpoint_is_an_error_with_its_path(tmp_path: Path) -> None:
    first = _random(tmp_path / "a.safetensors", 1)
    with pytest.raises(FarcastError, match=r"nowhere\.safetensors"):
        _verify(first, tmp_path / "nowhere.safetensors", first)


def test_the_command_prints_the_same_numbers(tmp_path: Path, call_cli: CallCli) -> None:
    paths = [_random(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("f", "t", "r"))]
    done = call_cli("verify", paths[0], "--against", paths[1], "--reference", paths[2], "--json")
    told, result = json.loads(done.stdout), _verify(*paths)
    assert done.returncode == 0
    assert told["ratio"] == result.ratio
    assert told["mean_absolute_error"] == result.mean_absolute_error
    assert {one["name"]: one["ratio"] for one in told["per_tensor"]} == {one.name: one.ratio for one in result.per_tensor}
