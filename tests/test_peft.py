"""Adapters that PEFT saved, with a Trainer and without one: they alone are forecast, and training resumes from them."""

from __future__ import annotations

import functools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.errors import UsageError
from farcast_cli.run.trajectory import discover
from tests.tiny import fit_run, forecast_run, sample_maker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # the base model is not on the hub
]

EVERY, ORIGIN, VALID, END = 10, 80, 90, 110  # the run goes on to END, so that the truth of the valid step is on disk


def _adapted(*names: str) -> Any:
    """The sample run's classifier with adapters on its queries; its last layer is trained and saved whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_lin"], modules_to_save=["classifier"])
    model = sample_maker().huggingface_model()
    torch.manual_seed(1)
    first, *more = names or ("default",)
    adapted = get_peft_model(model, config, adapter_name=first)
    for name in more:
        adapted.add_adapter(name, config)
    return adapted


@functools.cache
def _rows() -> list[dict[str, Any]]:
    data = sample_maker().digits()
    words = sample_maker().blocks(data.train_inputs)
    return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(words, data.train_targets, strict=True)]


def _trainer(output: Path, *names: str, stop_at: int) -> tuple[Any, list[float]]:
    """A real Trainer, and the learning rates that its steps use."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rates: list[float] = []

    class Watch(TrainerCallback):
        """Notes the learning rate of each step, and ends the training."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control
            rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, kwargs
            control.should_training_stop = state.global_step == stop_at

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=400,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        save_steps=EVERY,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(model=_adapted(*names), args=arguments, train_dataset=_rows(), callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    return trainer, rates


class Trained:
    """A run on disk, its later snapshots held back, with the rates of all its steps and its last weights."""

    def __init__(self, root: Path, *names: str, end: int = END) -> None:
        self.run, self.truth = root / "run", root / "truth" / f"checkpoint-{VALID}"
        trainer, self.rates = _trainer(self.run, *names, stop_at=end)
        trainer.train()
        self.weights = _trained_weights(trainer)
        self.truth.parent.mkdir()
        for folder in self.run.iterdir():
            if int(folder.name.partition("-")[2]) > ORIGIN:
                folder.rename(self.truth.parent / folder.name)
        self.origin = self.run / f"checkpoint-{ORIGIN}"


def _trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("lora"))


def _predicted(run: Path, output: Path, **request: Any) -> Path:
    return forecast_run(run, f"{output}/", VALID - ORIGIN, **request)[0]


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_trainer_resumes_an_adapter_with_the_learning_rates_of_the_uninterrupted_run(
    trained: Trained, tmp_path: Path
) -> None:
    """Equal to the last bit at every later step; counters and Adam's steps with them."""
    forecast = _predicted(trained.run, tmp_path / "out")
    assert forecast.name == "checkpoint-90"
    trainer, rates = _trainer(tmp_path / "resumed", stop_at=END)
    trainer.train(resume_from_checkpoint=str(forecast))
    assert rates == trained.rates[VALID:]
    assert trainer.state.global_step == END
    assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {float(END)}


def test_with_the_true_adapter_and_moments_put_in_the_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    trained: Trained, tmp_path: Path
) -> None:
    forecast = _predicted(trained.run, tmp_path / "out")
    shutil.copyfile(trained.truth / "adapter_model.safetensors", forecast / "adapter_model.safetensors")
    optimizer, truth = _load(forecast / "optimizer.pt"), _load(trained.truth / "optimizer.pt")
    for key, entry in optimizer["state"].items():
        entry |= {name: truth["state"][key][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.save(optimizer, forecast / "optimizer.pt")
    trainer, _ = _trainer(tmp_path / "resumed", stop_at=END)
    trainer.train(resume_from_checkpoint=str(forecast))
    found = _trained_weights(trainer)
    assert found.keys() == trained.weights.keys()
    assert all(torch.equal(value, found[name]) for name, value in trained.weights.items())


def test_the_share_of_the_first_epoch_is_moved_on(trained: Trained, tmp_path: Path) -> None:
    forecast = _predicted(trained.run, tmp_path / "out")
    found, truth = (json.loads((folder / "trainer_state.json").read_text()) for folder in (forecast, trained.truth))
    assert 0 < truth["epoch"] < 1
    assert found["epoch"] == pytest.approx(truth["epoch"], rel=1e-11)


def test_the_adapter_alone_is_forecast_and_all_else_is_copied(trained: Trained, tmp_path: Path) -> None:
    """The layer that is trained whole is part of the adapter's file."""
    snapshot = discover(trained.run).origin
    assert {entry.path.name for entry in snapshot.tensors.values()} == {"adapter_model.safetensors"}
    assert any("classifier" in name for name in snapshot.tensors)
    forecast = _predicted(trained.run, tmp_path / "out")
    for name in ("adapter_config.json", "README.md", "rng_state.pth", "training_args.bin"):
        assert (forecast / name).read_bytes() == (trained.origin / name).read_bytes()
    moved, before = (load_file(folder / "adapter_model.safetensors") for folder in (forecast, trained.origin))
    assert list(moved) == list(before)
    assert not any(torch.equal(moved[name], value) for name, value in before.items())


def test_an_adapter_folder_without_a_trainer_is_forecast_and_peft_loads_it(trained: Trained, tmp_path: Path) -> None:
    for folder in trained.run.iterdir():
        target = tmp_path / "run" / f"step_{folder.name.partition('-')[2]}"
        target.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(folder / name, target / name)
    assert discover(tmp_path / "run").layout == "weights-folder"
    forecast = _predicted(tmp_path / "run", tmp_path / "out")
    whole = _predicted(trained.run, tmp_path / "whole")
    assert (forecast / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    model = _adapted()
    result = model.load_adapter(str(forecast), "default")
    assert not result.unexpected_keys


def test_an_adapter_in_a_torch_file_is_forecast_like_one_in_safetensors(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    for folder in (tmp_path / "run").iterdir():
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    found = _load(_predicted(tmp_path / "run", tmp_path / "out") / "adapter_model.bin")
    expected = load_file(_predicted(trained.run, tmp_path / "whole") / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapters_with_names_are_all_forecast_and_the_trainer_resumes_the_active_one(tmp_path: Path) -> None:
    """PEFT saves each into a subfolder of its name; the tensors' names are the same in both."""
    trained = Trained(tmp_path, "first", "second", end=VALID)
    forecast = _predicted(trained.run, tmp_path / "out")
    moved, before = (
        {name: load_file(folder / name / "adapter_model.safetensors") for name in ("first", "second")}
        for folder in (forecast, trained.origin)
    )
    assert not any(torch.equal(moved["first"][name], value) for name, value in before["first"].items())
    assert all(torch.equal(moved["second"][name], value) for name, value in before["second"].items())  # it never moved
    assert (forecast / "first" / "adapter_config.json").is_file()
    trainer, _ = _trainer(tmp_path / "resumed", "first", "second", stop_at=VALID + 1)
    trainer._load_from_checkpoint(str(forecast))
    loaded = {name: value for name, value in trainer.model.state_dict().items() if ".first." in name}
    queries = {name: value for name, value in moved["first"].items() if ".lora_" in name}
    assert len(queries) == 4  # two layers, two factors
    assert all(torch.equal(loaded[name.replace(".weight", ".first.weight")], value) for name, value in queries.items())


def test_an_adapter_is_never_cut_into_shards(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whose trainer cannot read shards"):
        _predicted(trained.run, tmp_path / "out", max_shard_bytes=100)


# --- whole weights and an adapter side by side -----------------------------------------------------------------------


def _with_whole_weights(trained: Trained, run: Path, *, sharded: bool) -> Path:
    """The run's snapshots with whole weights added to the adapters."""
    shutil.copytree(trained.run, run)
    for folder in run.iterdir():
        step = float(folder.name.partition("-")[2])
        shard = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
        save_file({"w": torch.full((5,), step)}, folder / shard)
        if sharded:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    return run


def test_whole_weights_in_one_file_are_what_a_trainer_loads_and_the_adapter_is_copied_and_said(
    trained: Trained, tmp_path: Path
) -> None:
    fitted = fit_run(_with_whole_weights(trained, tmp_path / "run", sharded=False))
    assert [record.name for record in fitted.provenance.tensors] == ["w"]
    (copied,) = fitted.provenance.copied
    assert (copied.name, copied.reason.split(",")[0]) == ("adapter_model.safetensors", "an adapter next to the full weights")


def test_an_adapter_is_what_a_trainer_loads_beside_whole_weights_in_shards(trained: Trained, tmp_path: Path) -> None:
    run = _with_whole_weights(trained, tmp_path / "run", sharded=True)
    snapshot = discover(run).origin
    assert {entry.path.name for entry in snapshot.tensors.values()} == {"adapter_model.safetensors"}
    assert [name for name, _ in snapshot.beside] == ["model-00001-of-00001.safetensors"]
