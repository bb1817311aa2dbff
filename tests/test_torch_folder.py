"""Folders whose weights are a torch file are forecast with the state beside them: litgpt and Fabric, OLMo, one's own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from farcast_cli.errors import NoWeightsError, TooFewSnapshotsError
from farcast_cli.run.trajectory import discover
from tests.tiny import fit_run, forecast_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVERY, ORIGIN, VALID, END = 10, 80, 90, 120
ACCUMULATION = 4  # batches to a step, as litgpt counts them


class Loop:
    """A small regression under Fabric with litgpt's counters; the batch of a step depends on the step alone."""

    def __init__(self) -> None:
        from lightning.fabric import Fabric

        self.fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "iter_num": 0, "step_count": 0}

    def advance(self, num_steps: int) -> list[float]:
        """Train; the learning rate that each step used."""
        rates = []
        for _ in range(num_steps):
            batch = torch.Generator().manual_seed(self.state["step_count"])
            inputs, targets = torch.randn(4, 8, generator=batch), torch.randn(4, 2, generator=batch)
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.fabric.backward(torch.nn.functional.mse_loss(self.model(inputs), targets))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.state["step_count"] += 1
            self.state["iter_num"] += ACCUMULATION
        return rates

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.fabric.save(folder / "lit_model.pth", self.state | {"schedule": self.schedule})
        (folder / "hyperparameters.yaml").write_text("train:\n  save_interval: 10\n")
        (folder / "model_config.yaml").write_text("n_layer: 2\n")
        (folder / "tokenizer.json").write_text("{}")

    def resume(self, folder: Path) -> Loop:
        asked = self.state | {"schedule": self.schedule}
        self.fabric.load(folder / "lit_model.pth", asked)
        self.state = {key: asked[key] for key in self.state}
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def _train(run: Path, truth: Path) -> tuple[Loop, list[float]]:
    """A whole run: its snapshots up to the origin in `run`, that of the valid step in `truth`; and every rate."""
    loop, rates = Loop(), []
    for step in range(EVERY, END + 1, EVERY):
        rates += loop.advance(EVERY)
        if step <= VALID:
            loop.save((run if step <= ORIGIN else truth) / f"step-{step:08d}")
    return loop, rates


def _predicted(run: Path, output: Path, **request: Any) -> Path:
    return forecast_run(run, f"{output}/", VALID - ORIGIN, **request)[0]


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_fabric_resumes_at_the_valid_step_with_the_learning_rates_of_the_uninterrupted_run(tmp_path: Path) -> None:
    """Equal to the last bit at every later step."""
    _, rates = _train(tmp_path / "run", tmp_path / "truth")
    assert {snapshot.layout for snapshot in discover(tmp_path / "run").snapshots} == {"torch-folder"}
    forecast = _predicted(tmp_path / "run", tmp_path / "out")
    assert forecast.name == "step-00000090"
    resumed = Loop().resume(forecast)
    assert (resumed.state["step_count"], resumed.state["iter_num"]) == (VALID, VALID * ACCUMULATION)
    assert {float(entry["step"]) for entry in resumed.optimizer.state.values()} == {float(VALID)}
    assert resumed.advance(END - VALID) == rates[VALID:]


def test_with_the_true_weights_and_moments_put_in_fabric_repeats_the_uninterrupted_run_bit_by_bit(tmp_path: Path) -> None:
    uninterrupted, _ = _train(tmp_path / "run", tmp_path / "truth")
    forecast = _predicted(tmp_path / "run", tmp_path / "out")
    state, truth = _load(forecast / "lit_model.pth"), _load(tmp_path / "truth" / "step-00000090" / "lit_model.pth")
    assert list(state) == list(truth)
    assert state["schedule"] == truth["schedule"]
    state["model"] = truth["model"]
    for key, entry in state["optimizer"]["state"].items():
        entry |= {name: truth["optimizer"]["state"][key][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.save(state, forecast / "lit_model.pth")
    resumed = Loop().resume(forecast)
    resumed.advance(END - VALID)
    expected = uninterrupted.weights()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.weights().items())


def test_what_lies_beside_the_weights_is_copied_byte_by_byte(tmp_path: Path) -> None:
    _train(tmp_path / "run", tmp_path / "truth")
    forecast, origin = _predicted(tmp_path / "run", tmp_path / "out"), tmp_path / "run" / "step-00000080"
    for name in ("hyperparameters.yaml", "model_config.yaml", "tokenizer.json"):
        assert (forecast / name).read_bytes() == (origin / name).read_bytes()
    assert {path.name for path in forecast.iterdir()} == {path.name for path in origin.iterdir()} | {"farcast.json"}


# --- state in files of their own -------------------------------------------------------------------------------------


class PlainLoop:
    """A regression without any framework; saved as weights, optimiser and counters in one file each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 15, 0.5)
        self.step = 0

    def advance(self, num_steps: int) -> list[float]:
        rates = []
        for _ in range(num_steps):
            batch = torch.Generator().manual_seed(self.step)
            inputs, targets = torch.randn(4, 8, generator=batch), torch.randn(4, 2, generator=batch)
            rates.append(self.optimizer.param_groups[0]["lr"])
            loss: Any = torch.nn.functional.mse_loss(self.model(inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
        return rates

    def save_side_files(self, folder: Path) -> None:
        torch.save(self.optimizer.state_dict(), folder / "optim.pt")
        rng = {"torch": torch.get_rng_state()}
        train = {"global_step": self.step, "tokens_seen": 2048 * self.step, "schedule": self.schedule.state_dict(), "rng": rng}
        torch.save(train, folder / "train.pt")
        torch.save({"cpu": torch.get_rng_state()}, folder / "rng.pt")

    def resume(self, folder: Path) -> PlainLoop:
        train = _load(folder / "train.pt")
        self.step = train["global_step"]
        self.optimizer.load_state_dict(_load(folder / "optim.pt"))
        self.schedule.load_state_dict(train["schedule"])
        return self


def _save_as_torch(loop: PlainLoop, folder: Path) -> None:
    torch.save(loop.model.state_dict(), folder / "model.pt")


def _save_as_safetensors(loop: PlainLoop, folder: Path) -> None:
    save_file(loop.model.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize(("save", "layout"), [(_save_as_torch, "torch-folder"), (_save_as_safetensors, "weights-folder")])
def test_optimizer_schedule_and_counters_in_files_beside_the_weights_are_moved_on(
    save: Callable[[PlainLoop, Path], None], layout: str, tmp_path: Path
) -> None:
    loop = PlainLoop()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        loop.advance(EVERY)
        folder = tmp_path / "run" / f"step{step}-unsharded"
        folder.mkdir(parents=True)
        save(loop, folder)
        loop.save_side_files(folder)
    trajectory = discover(tmp_path / "run")
    assert (trajectory.layout, trajectory.origin.step, trajectory.origin.step_source) == (layout, ORIGIN, "payload")
    forecast = _predicted(tmp_path / "run", tmp_path / "out")
    assert forecast.name == "step90-unsharded"
    assert _load(forecast / "train.pt")["tokens_seen"] == 2048 * VALID
    assert (forecast / "rng.pt").read_bytes() == (trajectory.origin.path / "rng.pt").read_bytes()
    resumed = PlainLoop().resume(forecast)
    assert {float(entry["step"]) for entry in resumed.optimizer.state.values()} == {float(VALID)}
    loop.advance(VALID - ORIGIN)
    assert resumed.advance(30) == loop.advance(30)


def test_a_side_files_counter_of_something_else_does_not_contradict_the_folders_name(tmp_path: Path) -> None:
    """Such as the batch within the epoch."""
    for step in (100, 200, 300):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        torch.save({"w": torch.full((3,), float(step))}, folder / "model.pt")
        torch.save({"epoch": step // 150, "step": step % 150, "rng": torch.get_rng_state()}, folder / "train.pt")
    assert discover(tmp_path).steps == (100, 200, 300)


def test_kept_counters_leave_every_file_of_state_byte_by_byte(tmp_path: Path) -> None:
    loop = PlainLoop()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        loop.advance(EVERY)
        folder = tmp_path / "run" / f"step{step}"
        folder.mkdir(parents=True)
        _save_as_torch(loop, folder)
        loop.save_side_files(folder)
    forecast = _predicted(tmp_path / "run", tmp_path / "out", counters="keep")
    for name in ("optim.pt", "train.pt", "rng.pt"):
        assert (forecast / name).read_bytes() == (tmp_path / "run" / "step80" / name).read_bytes()


def test_an_average_beside_the_weights_is_copied_and_said(tmp_path: Path) -> None:
    for step in range(EVERY, 70, EVERY):
        folder = tmp_path / "run" / f"step{step}"
        folder.mkdir(parents=True)
        torch.save({"w": torch.full((5,), float(step))}, folder / "model.pt")
        torch.save({"shadow_params": [torch.full((5,), step - 1.0)], "optimization_step": step}, folder / "ema_state.pt")
        torch.save({"w": torch.full((5,), step - 2.0)}, folder / "ema.pt")
    fitted = fit_run(tmp_path / "run")
    assert [(record.name, record.reason.split(":")[0]) for record in fitted.provenance.copied] == [
        ("ema_state.pt", "1 tensors outside the weights are not forecast; they are copied from the last snapshot")
    ]
    (outcome,) = predict_run(fitted, tmp_path / "out", horizons=[10])
    assert any(note.startswith("ema.pt is copied: it contains other weights") for note in outcome.notes)
    assert _load(tmp_path / "out" / "ema_state.pt")["optimization_step"] == 70
    assert torch.equal(_load(tmp_path / "out" / "ema_state.pt")["shadow_params"][0], torch.full((5,), 59.0))


def test_the_slices_of_a_model_in_numbered_files_are_all_forecast(tmp_path: Path) -> None:
    """As Llama's consolidated.00.pth and consolidated.01.pth: tensors of the same names, each a part of the whole."""
    for step in range(EVERY, 70, EVERY):
        folder = tmp_path / "run" / f"step{step}"
        folder.mkdir(parents=True)
        for rank, speed in enumerate((1.0, -3.0)):
            torch.save({"w": torch.arange(40.0) + speed * step}, folder / f"consolidated.{rank:02d}.pth")
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out", horizons=[10])
    for rank, speed in enumerate((1.0, -3.0)):
        found = _load(tmp_path / "out" / f"consolidated.{rank:02d}.pth")["w"]
        torch.testing.assert_close(found, torch.arange(40.0) + speed * 70, rtol=1e-5, atol=1e-3)


def test_a_folder_of_loras_by_litgpt_is_read(tmp_path: Path) -> None:
    for step in range(EVERY, 70, EVERY):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        torch.save({"model": {"lora_A": torch.full((3,), float(step))}}, folder / "lit_model.pth.lora")
    trajectory = discover(tmp_path)
    assert trajectory.steps == tuple(range(EVERY, 70, EVERY))
    assert trajectory.origin.tensors.keys() == {"lora_A"}


def test_the_first_usual_name_that_holds_weights_is_taken(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        torch.save({"step": step, "done": False}, folder / "checkpoint.pt")
        torch.save({"w": torch.full((3,), float(step))}, folder / "model.pt")
    origin = discover(tmp_path).origin
    assert origin.tensors["w"].path.name == "model.pt"
    assert origin.step_source == "payload"


def test_a_folder_whose_files_hold_no_weights_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "step10").mkdir()
    torch.save({"step": 10}, tmp_path / "step10" / "checkpoint.pt")
    with pytest.raises(NoWeightsError, match="no weights found: expected a state dict"):
        discover(tmp_path)


def test_one_checkpoint_that_is_written_over_leads_to_a_history_and_one_of_several_to_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    torch.save({"model": {"w": torch.ones(3)}, "iter_num": 100}, tmp_path / "out" / "ckpt.pt")
    (tmp_path / "train.py").write_text("")
    with pytest.raises(TooFewSnapshotsError, match="found one torch-folder checkpoint") as caught:
        discover(tmp_path / "out")
    assert f"cp {tmp_path / 'out' / 'ckpt.pt'} ckpts/ckpt_STEP.pt" in caught.value.hint
    assert "folder above" not in caught.value.hint
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    with pytest.raises(TooFewSnapshotsError) as caught:
        discover(tmp_path / "out")
    assert caught.value.hint == f"name the folder above it: {tmp_path}"


def test_one_folder_given_for_the_run_is_refused_with_the_folder_above(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "step10"
    folder.mkdir(parents=True)
    torch.save({"w": torch.ones(3)}, folder / "model.pt")
    shutil.copyfile(folder / "model.pt", folder / "optim.pt")
    with pytest.raises(TooFewSnapshotsError, match="found one torch-folder checkpoint") as caught:
        discover(folder)
    assert str(tmp_path / "run") in caught.value.hint
