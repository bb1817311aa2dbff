"""Folders of the Hugging Face kind beyond the usual one: shards, prefixes, missing state, mixtures, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.errors import NonFiniteError
from farcast_cli.run.trajectory import discover
from tests.tiny import SAMPLES, fit_run, forecast_run, predict_run, sample_maker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import CallCli

STEPS = (100, 200, 300, 400, 500, 600)
TRUTH = SAMPLES / "truth" / "huggingface" / "checkpoint-1300"


def _edited(tmp_path: Path, edit: Callable[[Path], None]) -> Path:
    """The sample run of the Trainer, every snapshot edited."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "huggingface", run)
    for folder in run.iterdir():
        edit(folder)
    return run


def _predicted(run: Path, output: Path, **request: Any) -> Path:
    return forecast_run(run, f"{output}/", 100, **request)[0]


# --- the Trainer -----------------------------------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    """The same weights as transformers saves them with a small `max_shard_size`."""
    model = sample_maker().huggingface_model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="6KB")


def _resume(checkpoint: Path, output: Path, *, stop_at: int) -> tuple[Any, list[float]]:
    """A real Trainer, and the losses of the steps that it trained."""
    trainer = sample_maker().huggingface_trainer(output, logging_steps=1, stop_at=stop_at)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    new = [entry for entry in trainer.state.log_history if entry["step"] > 1300 and "loss" in entry]
    return trainer, [entry["loss"] for entry in new]


def test_a_trainer_resumes_from_a_forecast_in_shards_as_from_one_in_a_file(tmp_path: Path) -> None:
    sharded = _predicted(_edited(tmp_path, _shard), tmp_path / "out")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    whole = _predicted(SAMPLES / "huggingface", tmp_path / "whole")
    assert not (sharded / "model.safetensors").exists()
    trainer, losses = _resume(sharded, tmp_path / "a", stop_at=1305)
    expected, expected_losses = _resume(whole, tmp_path / "b", stop_at=1305)
    assert trainer.state.global_step == 1305
    assert losses == expected_losses
    wanted = expected.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("missing", [("optimizer.pt",), ("scheduler.pt",), ("optimizer.pt", "scheduler.pt")])
def test_a_trainers_folder_without_its_state_is_forecast_with_a_warning(missing: tuple[str, ...], tmp_path: Path) -> None:
    """The Trainer skips both when one is missing, silently, and the learning rate starts again at warm-up."""

    def remove(folder: Path) -> None:
        for name in missing:
            (folder / name).unlink()

    (outcome,) = predict_run(fit_run(_edited(tmp_path, remove)), tmp_path / "out", horizons=[100])
    (note,) = [note for note in outcome.notes if "warm-up" in note]
    assert note.startswith(f"{' and '.join(missing)} is missing")
    whole = fit_run(SAMPLES / "huggingface")
    (outcome,) = predict_run(whole, tmp_path / "whole", horizons=[100])
    assert not any("warm-up" in note for note in outcome.notes)


def test_what_a_trainer_needs_to_read_its_state_is_kept(tmp_path: Path) -> None:
    """Without trainer_state.json or its `train_batch_size` resuming is an error."""
    state = json.loads((_predicted(SAMPLES / "huggingface", tmp_path / "out") / "trainer_state.json").read_text())
    truth = json.loads((TRUTH / "trainer_state.json").read_text())
    assert state["train_batch_size"] == truth["train_batch_size"]
    assert state.keys() == truth.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrappers_prefix_is_written_back_and_may_come_and_go(prefix: str, tmp_path: Path) -> None:
    """A run that was compiled, or spread over devices, for a while: keys as the origin has them."""

    def wrap(folder: Path) -> None:
        if int(folder.name.partition("-")[2]) > 500:
            weights = load_file(folder / "model.safetensors")
            wrapped = {prefix + name: value for name, value in weights.items()}
            save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})

    wrapped = load_file(_predicted(_edited(tmp_path, wrap), tmp_path / "out") / "model.safetensors")
    plain = load_file(_predicted(SAMPLES / "huggingface", tmp_path / "whole") / "model.safetensors")
    assert wrapped.keys() == {prefix + name for name in plain}
    assert all(torch.equal(wrapped[prefix + name], value) for name, value in plain.items())


def test_nan_among_a_trainers_weights_is_refused(tmp_path: Path) -> None:
    """The Trainer itself would log a loss of 0.0 and train on."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["classifier.bias"][3] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(NonFiniteError, match=r"classifier\.bias"):
        _predicted(_edited(tmp_path, spoil), tmp_path / "out")


# --- revisions of the hub --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forecast"),
    [
        ("step{}", "step700"),
        ("step{}-tokens4B", "step700-tokens4B"),
        ("stage1-step{}-tokens5B", "stage1-step700-tokens5B"),
        ("stage2-ingredient3-step{}-tokens26B", "stage2-ingredient3-step700-tokens26B"),
        ("checkpoint-{}-epoch-2", "checkpoint-700-epoch-2"),
    ],
)
def test_a_revision_folder_is_named_by_its_step_and_so_is_the_forecast(name: str, forecast: str, tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / name.format(step)
        folder.mkdir(parents=True)
        save_file({"w": torch.full((5,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    assert discover(tmp_path / "run").steps == STEPS
    written = _predicted(tmp_path / "run", tmp_path / "out")
    assert written.name == forecast
    assert load_file(written / "model.safetensors")["w"].tolist() == pytest.approx([700.0] * 5, rel=1e-5)


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_of_a_mixture_the_layout_of_most_is_taken_and_all_else_is_listed_with_the_reason(tmp_path: Path) -> None:
    run = _edited(tmp_path, lambda folder: torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"))
    shutil.copyfile(run / "checkpoint-1200" / "model.safetensors", run / "model.safetensors")
    (run / "adapter").mkdir()
    save_file({"w": torch.ones(3)}, run / "adapter" / "adapter_model.safetensors")
    (run / "export").mkdir()
    torch.save({"w": torch.ones(3)}, run / "export" / "model.pt")
    (run / "logs.txt").write_text("")
    trajectory = discover(run)
    assert (trajectory.layout, trajectory.origin.step, len(trajectory.snapshots)) == ("huggingface-trainer", 1200, 12)
    assert {item.path.name: item.reason for item in trajectory.ignored} == {
        "model.safetensors": "a safetensors checkpoint among huggingface-trainer ones",
        "adapter": "a weights-folder checkpoint among huggingface-trainer ones",
        "export": "a torch-folder checkpoint among huggingface-trainer ones",
        "logs.txt": "no checkpoint of a known layout",
    }
    assert dict(trajectory.origin.beside).keys() == {"pytorch_model.bin"}
    assert {entry.path.name for entry in trajectory.origin.tensors.values()} == {"model.safetensors"}


# --- refused ---------------------------------------------------------------------------------------------------------


REFUSED = {
    "zero-universal": ("global_step{}_universal", ("zero/layer.weight/fp32.pt",), "global_stepN/"),
    "megatron": ("iter_{:07d}", ("mp_rank_00/model_optim_rng.pt",), "tools/checkpoint/convert.py"),
    "megatron-pipeline": ("iter_{:07d}", ("mp_rank_00_000/model_optim_rng.pt",), "tools/checkpoint/convert.py"),
    "megatron-dist": ("iter_{:07d}", (".metadata", "common.pt", "__0_0.distcp"), "tools/checkpoint/convert.py"),
    "fsdp-ranks": ("step_{}", ("pytorch_model_fsdp_0_rank0.bin", "random_states_0.pkl"), "SHARDED_STATE_DICT"),
    "around": ("epochs-{}", ("epoch1/.metadata", "epoch1/__0_0.distcp"), "dcp_to_torch"),
}


def _make_refused(run: Path, kind: str) -> Path:
    name, files, _ = REFUSED[kind]
    for step in STEPS:
        for file in files:
            path = run / name.format(step) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (run / "latest").write_text(name.format(STEPS[-1]))
    (run / "zero_to_fp32.py").write_text("")
    return run


@pytest.mark.parametrize("kind", REFUSED)
def test_state_in_one_piece_per_process_is_refused_with_the_tool_that_converts_it(
    kind: str, tmp_path: Path, call_cli: CallCli
) -> None:
    done = call_cli("fit", _make_refused(tmp_path / "run", kind), cwd=tmp_path)
    assert done.returncode == 4
    assert len(done.errors) == 1
    assert "not read yet" in done.errors[0]
    assert REFUSED[kind][2] in done.hints[0]
    assert call_cli("inspect", tmp_path / "run", cwd=tmp_path).returncode == 4


def test_files_of_a_loop_of_ones_own_are_not_taken_for_partitions(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        save_file({"w": torch.full((5,), float(step))}, folder / "model.safetensors")
        torch.save({"step": step}, folder / "training_states.pt")
    assert discover(tmp_path).layout == "weights-folder"
