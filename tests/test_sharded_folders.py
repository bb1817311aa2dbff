"""Folders of sharded trainings: FSDP inside a Trainer and accelerate, DeepSpeed's pieces, checkpoints in subfolders."""

from __future__ import annotations

import json
import math
import sys
import types
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from farcast_cli.errors import FileFormatError, UsageError
from farcast_cli.formats.dcp_file import read_dcp
from farcast_cli.run.trajectory import discover
from tests.conftest import STEPS, run_by_two
from tests.tiny import fit_run, forecast_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from farcast_cli.request import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _forecast(run: Path, out: Path, **request: Any) -> tuple[Path, Outcome]:
    """Of step 900."""
    return forecast_run(run, f"{out}/", 100, **request)


def _moved(step: int, *shape: int) -> torch.Tensor:
    """Weights that move on a line: 1 per 100 steps."""
    return torch.linspace(0, 1, math.prod(shape)).reshape(shape) + step / 100


# --- FSDP ------------------------------------------------------------------------------------------------------------


def test_a_trainer_under_fsdp_resumes_from_the_forecast_of_its_shards_and_of_its_whole_files(tmp_path: Path) -> None:
    """The Trainer's own run by two processes; it loads weights, Adam's step, the schedule and the rate of the valid step."""
    run_by_two("tests.fsdp_runs", tmp_path, patience_s=240)
    written = tmp_path / "full-forecast" / "checkpoint-35"
    whole = torch.load(written / "pytorch_model_fsdp.bin", weights_only=True)
    again = load_file(written / "model.safetensors")
    origin = load_file(tmp_path / "full" / "checkpoint-30" / "model.safetensors")
    assert again.keys() <= whole.keys()
    assert all(torch.equal(again[name], whole[name]) and not torch.equal(origin[name], again[name]) for name in again)
    rate = 3e-3 * (1 + math.cos(math.pi * 35 / 400)) / 2
    for kind in ("sharded", "full"):
        seen = json.loads((tmp_path / f"{kind}.json").read_text())
        assert (seen["step"], seen["adam"]) == (35, [35.0])
        assert seen["rates"] == pytest.approx([rate, rate])
        for name, values in seen["weights"].items():
            assert values == pytest.approx(whole[name].flatten()[:8].tolist(), abs=0 if kind == "full" else 3e-3)


def _adam(step: int, *names: str) -> dict[str, Any]:
    entries = {name: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(4, 2)} for name in names}
    return {"state": entries, "param_groups": [{"lr": 0.1, "params": list(names)}]}


def _accelerate(folder: Path, step: int) -> None:
    """What accelerate saves of two models, one sharded and one whole."""
    save_dcp({"model": {"w": _moved(step, 4, 2)}}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    torch.save({"w": _moved(step, 3, 2)}, folder / "pytorch_model_fsdp_1.bin")
    save_dcp({"optimizer": _adam(step, "w")}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    torch.save(_adam(step, "w"), folder / "optimizer_1.bin")


def _run(tmp_path: Path, write: Callable[[Path, int], None], name: str = "step_{}") -> Path:
    for step in STEPS:
        folder = tmp_path / "run" / name.format(step)
        folder.mkdir(parents=True)
        write(folder, step)
    return tmp_path / "run"


def test_every_model_and_optimizer_of_accelerates_is_advanced_whatever_its_form(tmp_path: Path) -> None:
    run = _run(tmp_path, _accelerate)
    assert discover(run).layout == "accelerate"
    written, outcome = _forecast(run, tmp_path / "out")
    assert outcome.notes == ()
    found = read_dcp(written / "pytorch_model_fsdp_0").as_torch
    assert set(found.tree["model"]) == {"w"}
    state: dict[str, Any] = {"model": {"w": torch.zeros(4, 2)}}
    load_dcp(state, checkpoint_id=written / "pytorch_model_fsdp_0", no_dist=True)
    torch.testing.assert_close(state["model"]["w"], _moved(900, 4, 2))
    torch.testing.assert_close(torch.load(written / "pytorch_model_fsdp_1.bin", weights_only=True)["w"], _moved(900, 3, 2))
    optimizer: dict[str, Any] = {"optimizer": _adam(0, "w")}
    load_dcp(optimizer, checkpoint_id=written / "optimizer_0", no_dist=True)
    assert float(optimizer["optimizer"]["state"]["w"]["step"]) == 900
    assert float(torch.load(written / "optimizer_1.bin", weights_only=True)["state"]["w"]["step"]) == 900


def test_a_sharded_optimizer_is_copied_whole_with_counters_that_are_kept(tmp_path: Path) -> None:
    written, _ = _forecast(_run(tmp_path, _accelerate), tmp_path / "out", counters="keep")
    optimizer: dict[str, Any] = {"optimizer": _adam(0, "w")}
    load_dcp(optimizer, checkpoint_id=written / "optimizer_0", no_dist=True)
    assert float(optimizer["optimizer"]["state"]["w"]["step"]) == 800


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_sharded_weights_become_one_file_without_another_tool(layout: str, tmp_path: Path) -> None:
    def write(folder: Path, step: int) -> None:
        save_dcp({"model": {"w": _moved(step, 4, 2)}}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)

    written, _ = _forecast(_run(tmp_path, write), tmp_path / "out", layout=layout)
    found = load_file(written / "model.safetensors") if layout == "safetensors" else torch.load(written)["model"]
    torch.testing.assert_close(found["w"], _moved(900, 4, 2))


def test_checkpoints_in_subfolders_and_the_files_beside_them_are_one_snapshot(tmp_path: Path) -> None:
    """OLMo's folders, and those of loops that save the model and the optimizer apart."""

    def write(folder: Path, step: int) -> None:
        save_dcp({"model": {"w": _moved(step, 4, 2)}}, checkpoint_id=folder / "model", no_dist=True)
        save_dcp({"optim": _adam(step, "w")}, checkpoint_id=folder / "optim", no_dist=True)
        (folder / "train").mkdir()
        torch.save({"global_step": step, "tokens": 4096 * step}, folder / "train" / "rank0.pt")

    written, _ = _forecast(_run(tmp_path, write), tmp_path / "out")
    assert torch.load(written / "train" / "rank0.pt") == {"global_step": 900, "tokens": 4096 * 900}
    optimizer: dict[str, Any] = {"optim": _adam(0, "w")}
    load_dcp(optimizer, checkpoint_id=written / "optim", no_dist=True)
    assert float(optimizer["optim"]["state"]["w"]["step"]) == 900


# --- DeepSpeed -------------------------------------------------------------------------------------------------------

RANKS = 2


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The classes whose objects DeepSpeed pickles into its files."""

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale = 1.0

    class fragment_address:  # noqa: N801 - its own name
        def __init__(self, numel: int) -> None:
            self.numel = numel

    class ZeroStageEnum(IntEnum):
        STAGE = 2

    homes = {
        "deepspeed.runtime.fp16.loss_scaler": LossScaler,
        "deepspeed.utils.tensor_fragment": fragment_address,
        "deepspeed.runtime.zero.config": ZeroStageEnum,
    }
    for home, kind in homes.items():
        kind.__module__, kind.__qualname__ = home, kind.__name__
        parts = home.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
        setattr(sys.modules[home], kind.__name__, kind)
    return types.SimpleNamespace(scaler=LossScaler, address=fragment_address, stage=ZeroStageEnum)


def _states(folder: Path, step: int, classes: types.SimpleNamespace, stage: int, *, with_schedule: bool = True) -> None:
    """The files that DeepSpeed saves of one model with 12 weights in bfloat16, by two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 850, gamma=0.5)
    schedule.last_epoch = step
    whole = _moved(step, 12)
    inside = stage < 3
    model = {"w": whole.bfloat16().reshape(4, 3) if inside else torch.zeros(0)}
    states = {
        "module": model,
        "lr_scheduler": schedule.state_dict() if with_schedule else None,
        "global_steps": step,
        "global_samples": 64 * step,
        "optimizer": None,
    }
    for rank in range(RANKS):
        piece = whole.reshape(RANKS, 6)[rank].clone()
        if not inside:
            piece.ds_id = "0_1"  # type: ignore[attr-defined]
        adam = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(6)}}}
        adam["param_groups"] = [{"lr": 0.1, "initial_lr": 0.1, "params": [0]}]  # type: ignore[assignment]
        kept = {"loss_scaler": classes.scaler(), "zero_stage": classes.stage.STAGE}
        kept["param_slice_mappings"] = [{"w": classes.address(6)}]
        kept |= {"base_optimizer_state": adam, "single_partition_of_fp32_groups": [piece]} if inside else {}
        kept |= {} if inside else {"optimizer_state_dict": adam, "fp32_flat_groups": [piece]}
        torch.save({"optimizer_state_dict": kept}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if not inside:
            torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if inside:
        torch.save(states, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_pieces_of_the_weights_are_forecast_with_all_its_counters(
    stage: int, classes: types.SimpleNamespace, tmp_path: Path
) -> None:
    run = _run(tmp_path, lambda folder, step: _states(folder, step, classes, stage), "global_step{}")
    (run / "latest").write_text("global_step800")
    assert discover(run).layout == "deepspeed"
    written, outcome = _forecast(run, tmp_path / "out")
    assert written.name == "global_step900"
    assert outcome.notes == ()
    pieces = []
    for rank in range(RANKS):
        file = torch.load(written / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        kept = file["optimizer_state_dict"]
        adam = kept["base_optimizer_state" if stage < 3 else "optimizer_state_dict"]
        assert (float(adam["state"][0]["step"]), adam["param_groups"][0]["lr"]) == (900, 0.05)
        assert (kept["loss_scaler"].cur_scale, kept["zero_stage"]) == (1.0, classes.stage.STAGE)
        assert kept["param_slice_mappings"][0]["w"].numel == 6
        (piece,) = kept["single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"]
        assert getattr(piece, "ds_id", "") == ("" if stage < 3 else "0_1")
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces), _moved(900, 12))
    for file in written.glob("*model_states.pt"):
        states = torch.load(file, weights_only=False)
        assert (states["global_steps"], states["global_samples"]) == (900, 64 * 900)
        assert states["lr_scheduler"]["last_epoch"] == 900
        if stage < 3:
            assert torch.allclose(states["module"]["w"].float().flatten(), _moved(900, 12), rtol=2**-7)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_with_deepspeed_has_its_pieces_its_whole_weights_and_its_state_advanced(
    stage: int, classes: types.SimpleNamespace, tmp_path: Path
) -> None:
    def write(folder: Path, step: int) -> None:
        _states(folder / f"global_step{step}", step, classes, stage, with_schedule=False)
        (folder / "latest").write_text(f"global_step{step}")
        save_file({"w": _moved(step, 4, 3).bfloat16()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 5000, "log_history": []}))
        schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 850, gamma=0.5)
        torch.save(schedule.state_dict() | {"last_epoch": step}, folder / "scheduler.pt")

    run = _run(tmp_path, write, "checkpoint-{}")
    assert discover(run).layout == "huggingface-trainer"
    written, outcome = _forecast(run, tmp_path / "out")
    assert outcome.notes == ()
    states = written / "global_step800"  # as `latest` has it
    assert (written / "latest").read_text() == "global_step800"
    for rank in range(RANKS):
        kept = torch.load(states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        kept = kept["optimizer_state_dict"]
        adam = kept["base_optimizer_state" if stage < 3 else "optimizer_state_dict"]
        assert (float(adam["state"][0]["step"]), adam["param_groups"][0]["lr"]) == (900, 0.05)
        (piece,) = kept["single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"]
        torch.testing.assert_close(piece, _moved(900, 12).reshape(RANKS, 6)[rank])
    for file in states.glob("*model_states.pt"):
        told = torch.load(file, weights_only=False)
        assert (told["global_steps"], told["global_samples"]) == (900, 64 * 900)
        if stage < 3:
            assert torch.equal(told["module"]["w"], load_file(written / "model.safetensors")["w"])
    assert torch.allclose(load_file(written / "model.safetensors")["w"].float().flatten(), _moved(900, 12), rtol=2**-7)


def test_what_takes_pieces_apart_is_refused_before_anything_is_written(classes: types.SimpleNamespace, tmp_path: Path) -> None:
    run = _run(tmp_path, lambda folder, step: _states(folder, step, classes, 2), "global_step{}")
    with pytest.raises(UsageError, match=r"--layout safetensors: .* is one process's piece of the weights"):
        _forecast(run, tmp_path / "out", layout="safetensors")
    with pytest.raises(UsageError, match=r"--exclude: .* has the weights of several layers joined"):
        fit_run(run, exclude=("w",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["layer_01-model_00-model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"])
def test_a_pipeline_and_experts_are_refused_with_the_command_that_converts_them(
    kind: str, classes: types.SimpleNamespace, tmp_path: Path
) -> None:
    def write(folder: Path, step: int) -> None:
        _states(folder, step, classes, 2)
        torch.save({}, folder / kind)

    run = _run(tmp_path, write, "global_step{}")
    with pytest.raises(FileFormatError, match="of a pipeline or of experts") as caught:
        discover(run)
    assert f"python {run}/zero_to_fp32.py {run} step_100 --tag global_step100" in caught.value.hint


def test_states_without_pieces_are_refused(classes: types.SimpleNamespace, tmp_path: Path) -> None:
    """As NVMe offload leaves them: weights in float32 would stay at the origin, and the trainer resumes from these."""

    def write(folder: Path, step: int) -> None:
        _states(folder, step, classes, 2)
        for file in folder.glob("*optim_states.pt"):
            tree = torch.load(file, weights_only=False)
            tree["optimizer_state_dict"]["single_partition_of_fp32_groups"] = []
            torch.save(tree, file)

    with pytest.raises(FileFormatError, match="has no pieces of the weights"):
        discover(_run(tmp_path, write, "global_step{}"))
