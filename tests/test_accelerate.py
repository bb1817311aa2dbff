"""What `Accelerator.save_state` wrote is forecast, and `Accelerator.load_state` resumes from it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.errors import UsageError
from farcast_cli.run.trajectory import discover
from farcast_cli.state.rates import read_pace
from farcast_cli.trainers import trainer_of
from tests.tiny import fit_run, forecast_run, predict_run

if TYPE_CHECKING:
    from pathlib import Path

EVERY, ORIGIN, VALID, END = 10, 80, 90, 120  # the runs go on to END, so that the truth of the valid step is known


class Progress:
    """A loop's own count, as one registers it for checkpointing."""

    def __init__(self) -> None:
        self.seen = {"examples": 0, "epoch_length": 7}

    def state_dict(self) -> dict[str, int]:
        return dict(self.seen)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = dict(state)


class Loop:
    """A small regression under accelerate; the batch of a step depends on the step alone."""

    def __init__(self, project: Path | None = None, *, schedule_per_step: int = 1, adam: bool = True) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        naming = ProjectConfiguration(project_dir=str(project), automatic_checkpoint_naming=True) if project else None
        self.accelerator = Accelerator(cpu=True, project_config=naming)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        optimizer: Any = (
            torch.optim.AdamW(model.parameters(), lr=1e-3) if adam else torch.optim.SGD(model.parameters(), lr=1e-3)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.schedule_per_step = schedule_per_step
        self.step = 0

    def advance(self, num_steps: int) -> list[float]:
        """Train; the learning rate that each step used."""
        rates = []
        for _ in range(num_steps):
            batch = torch.Generator().manual_seed(self.step)
            inputs, targets = torch.randn(4, 8, generator=batch), torch.randn(4, 2, generator=batch)
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.accelerator.backward(torch.nn.functional.mse_loss(self.model(inputs), targets))
            self.optimizer.step()
            for _ in range(self.schedule_per_step):
                self.schedule.step()
            self.optimizer.zero_grad()
            self.progress.seen["examples"] += 4
            self.step += 1
        return rates

    def save(self, folder: Path | None = None, **options: Any) -> None:
        self.accelerator.save_state(str(folder) if folder else None, **options)

    def resume(self, folder: Path, step: int) -> Loop:
        self.accelerator.load_state(str(folder))
        self.step = step
        return self

    def adam_steps(self) -> set[float]:
        return {float(entry["step"]) for entry in self.optimizer.optimizer.state.values()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def _train(run: Path, truth: Path, loop: Loop | None = None, **options: Any) -> tuple[Loop, list[float]]:
    """A whole run: its snapshots up to the origin in `run`, that of the valid step in `truth`; and every rate."""
    loop = loop or Loop()
    rates = []
    for step in range(EVERY, END + 1, EVERY):
        rates += loop.advance(EVERY)
        if step <= VALID:
            loop.save((run if step <= ORIGIN else truth) / f"step_{step}", **options)
    return loop, rates


def _predicted(run: Path, output: Path | str, horizon: int = VALID - ORIGIN, **request: Any) -> Path:
    return forecast_run(run, output, horizon, **request)[0]


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_a_schedule_that_has_ended_ends_the_run(tmp_path: Path) -> None:
    """It is stepped ten times a step, and ends at its 400th."""
    loop = Loop(schedule_per_step=10)
    for step in range(EVERY, 41, EVERY):
        loop.advance(EVERY)
        loop.save(tmp_path / f"step_{step}")
    ends = {snapshot.step: trainer_of(snapshot).end(snapshot) for snapshot in discover(tmp_path).snapshots}
    file = tmp_path / "step_40" / "scheduler.bin"
    assert ends == {10: None, 20: None, 30: None, 40: (f"{file} says CosineAnnealingLR.T_max = 400, in steps", 40)}


@pytest.mark.parametrize("schedule_per_step", [1, 2])
def test_a_run_resumed_by_accelerate_has_the_step_and_the_learning_rates_of_the_uninterrupted_one(
    schedule_per_step: int, tmp_path: Path
) -> None:
    """Equal to the last bit at every later step, also where the schedule moves once for each of two processes."""
    _, rates = _train(tmp_path / "run", tmp_path / "truth", Loop(schedule_per_step=schedule_per_step))
    forecast = _predicted(tmp_path / "run", tmp_path / "out" / "step_90")
    resumed = Loop(schedule_per_step=schedule_per_step).resume(forecast, VALID)
    assert resumed.adam_steps() == {float(VALID)}
    assert resumed.progress.seen == {"examples": 4 * VALID, "epoch_length": 7}
    assert resumed.advance(END - VALID) == rates[VALID:]
    assert resumed.adam_steps() == {float(END)}


def test_with_the_true_weights_and_moments_put_in_the_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    tmp_path: Path,
) -> None:
    uninterrupted, _ = _train(tmp_path / "run", tmp_path / "truth")
    forecast, truth = _predicted(tmp_path / "run", tmp_path / "out" / "step_90"), tmp_path / "truth" / "step_90"
    shutil.copyfile(truth / "model.safetensors", forecast / "model.safetensors")
    optimizer, true_optimizer = _load(forecast / "optimizer.bin"), _load(truth / "optimizer.bin")
    for key, entry in optimizer["state"].items():
        entry |= {name: true_optimizer["state"][key][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.save(optimizer, forecast / "optimizer.bin")
    resumed = Loop().resume(forecast, VALID)
    resumed.advance(END - VALID)
    expected = uninterrupted.weights()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.weights().items())


def test_schedule_and_counters_are_what_the_uninterrupted_run_saved_and_no_file_is_missing(tmp_path: Path) -> None:
    _train(tmp_path / "run", tmp_path / "truth")
    forecast = _predicted(tmp_path / "run", tmp_path / "out" / "step_90")
    truth, origin = tmp_path / "truth" / "step_90", tmp_path / "run" / "step_80"
    assert _load(forecast / "scheduler.bin") == _load(truth / "scheduler.bin")
    assert _load(forecast / "custom_checkpoint_0.pkl") == _load(truth / "custom_checkpoint_0.pkl")
    assert _load(forecast / "optimizer.bin")["param_groups"] == _load(truth / "optimizer.bin")["param_groups"]
    assert (forecast / "random_states_0.pkl").read_bytes() == (origin / "random_states_0.pkl").read_bytes()
    assert {path.name for path in forecast.iterdir()} == {path.name for path in truth.iterdir()} | {"farcast.json"}


def test_numbered_saves_have_adams_steps_and_the_forecast_the_number_that_the_save_would_have(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "project")
    for _ in range(8):
        loop.advance(EVERY)
        loop.save()
    run = tmp_path / "project" / "checkpoints"
    assert sorted(path.name for path in run.iterdir()) == [f"checkpoint_{index}" for index in range(8)]
    trajectory = discover(run)
    assert (trajectory.layout, trajectory.steps) == ("accelerate", tuple(range(10, 90, 10)))
    assert {snapshot.step_source for snapshot in trajectory.snapshots} == {"adam step"}
    assert _predicted(run, f"{tmp_path}/out/", 20).name == "checkpoint_9"


def test_numbered_saves_at_uneven_steps_are_no_conflict(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "project")
    for num_steps in (3, 4, 10, 2, 1, 7):
        loop.advance(num_steps)
        loop.save()
    assert discover(tmp_path / "project" / "checkpoints").steps == (3, 7, 17, 19, 20, 27)


def test_without_adam_the_schedules_count_tells_the_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "project", adam=False)
    for _ in range(3):
        loop.advance(EVERY)
        loop.save()
    trajectory = discover(tmp_path / "project" / "checkpoints")
    assert trajectory.steps == (10, 20, 30)
    assert {snapshot.step_source for snapshot in trajectory.snapshots} == {"scheduler"}


def test_a_name_that_says_its_step_is_believed_where_adam_missed_a_few(tmp_path: Path) -> None:
    """As with a loss scaler, which skips a step now and then."""
    loop = Loop()
    for step in (100, 200, 300):
        loop.advance(100 if step == 100 else 99)
        loop.save(tmp_path / "run" / f"step_{step}")
    assert discover(tmp_path / "run").steps == (100, 200, 300)


def test_a_dropped_optimizer_is_emptied_and_accelerate_still_loads_the_folder(tmp_path: Path) -> None:
    """A missing file would be a FileNotFoundError."""
    _, rates = _train(tmp_path / "run", tmp_path / "truth")
    (outcome,) = predict_run(fit_run(tmp_path / "run"), tmp_path / "step_90", horizons=[10], optimizer="drop")
    assert any("emptied instead of left out" in note for note in outcome.notes)
    resumed = Loop().resume(tmp_path / "step_90", VALID)
    assert resumed.adam_steps() == set()
    assert resumed.advance(END - VALID) == rates[VALID:]


def test_what_accelerate_loads_whole_is_not_sharded(tmp_path: Path) -> None:
    _train(tmp_path / "run", tmp_path / "truth")
    with pytest.raises(UsageError, match="whose trainer cannot read shards"):
        _predicted(tmp_path / "run", tmp_path / "out" / "step_90", max_shard_bytes=100)


# --- several models --------------------------------------------------------------------------------------------------


class Pair:
    """A generator and a critic with tensors of the same names, each on a straight path of its own."""

    def __init__(self, *, scheduled: bool = False) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(1)
        models = [torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(models, (0.01, 0.3), strict=True)]
        self.models = [self.accelerator.prepare(model) for model in models]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]
        made = [torch.optim.lr_scheduler.StepLR(one, size, 0.5) for one, size in zip(optimizers, (20, 25), strict=True)]
        self.schedules = [self.accelerator.prepare(schedule) for schedule in made] if scheduled else []

    def rates(self) -> list[float]:
        return [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for seed, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                direction = torch.Generator().manual_seed(seed)
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=direction)
                optimizer.step()
            for schedule in self.schedules:
                schedule.step()


def test_every_schedule_moves_on_with_its_own_optimizer(tmp_path: Path) -> None:
    pair = Pair(scheduled=True)
    for step in range(EVERY, ORIGIN + 1, EVERY):
        pair.advance(EVERY)
        pair.accelerator.save_state(str(tmp_path / "run" / f"step_{step}"))
    resumed = Pair(scheduled=True)
    resumed.accelerator.load_state(str(_predicted(tmp_path / "run", tmp_path / "out" / "step_110", 30)))
    pair.advance(30)
    assert resumed.rates() == pair.rates() == [0.01 * 0.5**5, 0.3 * 0.5**4]
    for _ in range(40):
        resumed.advance(1)
        pair.advance(1)
        assert resumed.rates() == pair.rates()


@pytest.mark.parametrize("safe", [True, False])
def test_every_model_of_a_run_is_forecast_along_its_own_path(safe: bool, tmp_path: Path) -> None:  # noqa: FBT001
    pair = Pair()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        pair.advance(EVERY)
        pair.accelerator.save_state(str(tmp_path / "run" / f"step_{step}"), safe_serialization=safe)
    forecast = _predicted(tmp_path / "run", tmp_path / "out" / "step_90")
    pair.advance(VALID - ORIGIN)
    expected = [dict(model.state_dict()) for model in pair.models]
    names = ("model.safetensors", "model_1.safetensors") if safe else ("pytorch_model.bin", "pytorch_model_1.bin")
    for name, wanted in zip(names, expected, strict=True):
        found = load_file(forecast / name) if safe else _load(forecast / name)
        assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)  # moves of up to 6
    loaded = Pair()
    loaded.accelerator.load_state(str(forecast))
    first = load_file(forecast / "model.safetensors") if safe else _load(forecast / "pytorch_model.bin")
    assert torch.equal(loaded.models[0].state_dict()["weight"], first["weight"])


def test_the_second_models_tensors_are_chosen_by_their_prefix(tmp_path: Path) -> None:
    pair = Pair()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        pair.advance(EVERY)
        pair.accelerator.save_state(str(tmp_path / "run" / f"step_{step}"))
    (outcome,) = predict_run(fit_run(tmp_path / "run", exclude=["model_1.*"]), tmp_path / "out", horizons=[10])
    assert outcome.num_forecast == 2
    origin = tmp_path / "run" / "step_80"
    assert (tmp_path / "out" / "model_1.safetensors").read_bytes() == (origin / "model_1.safetensors").read_bytes()
    assert not torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["weight"], load_file(origin / "model.safetensors")["weight"]
    )


def test_what_a_save_hook_wrote_in_place_of_the_model_is_forecast(tmp_path: Path) -> None:
    """As in diffusers' training scripts: `unet/diffusion_pytorch_model.safetensors` beside optimizer.bin."""
    _train(tmp_path / "plain", tmp_path / "truth")
    shutil.copytree(tmp_path / "plain", tmp_path / "hooked")
    for folder in (tmp_path / "hooked").iterdir():
        (folder / "unet").mkdir()
        (folder / "model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
        (folder / "unet" / "config.json").write_text(json.dumps({"layers": 2}))
    plain = _predicted(tmp_path / "plain", tmp_path / "out" / "plain")
    hooked = _predicted(tmp_path / "hooked", tmp_path / "out" / "hooked")
    expected = load_file(plain / "model.safetensors")
    found = load_file(hooked / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((hooked / "unet" / "config.json").read_text()) == {"layers": 2}


EMA_WEIGHTS = {True: "diffusion_pytorch_model.safetensors", False: "diffusion_pytorch_model.bin"}


def _averaged(folder: Path, until: int, *, safe: bool = True) -> Path:
    """A run as diffusers' scripts save it: `unet/`, and `unet_ema/` with EMAModel's settings in its config.json."""
    loop = Loop()
    average = loop.weights()
    for step in range(1, until + 1):
        loop.advance(1)
        for name, value in loop.weights().items():
            average[name] = average[name].lerp(value, 0.02)
        if step % EVERY == 0:
            loop.save(place := folder / f"step_{step}")
            (place / "model.safetensors").unlink()
            for part, weights in (("unet", loop.weights()), ("unet_ema", average)):
                (place / part).mkdir()
                (save_file if safe else torch.save)(weights, place / part / EMA_WEIGHTS[safe])
            (place / "unet" / "config.json").write_text(json.dumps({"layers": 2}))
            ema = {"layers": 2, "decay": 0.98, "min_decay": 0.0, "optimization_step": step, "update_after_step": 0}
            (place / "unet_ema" / "config.json").write_text(json.dumps(ema))
    return folder


def _weights(folder: Path, part: str, *, safe: bool = True) -> torch.Tensor:
    path = folder / part / EMA_WEIGHTS[safe]
    return torch.cat([value.flatten() for _, value in sorted((load_file(path) if safe else _load(path)).items())])


@pytest.mark.parametrize("safe", [True, False])
def test_an_average_in_a_folder_of_its_own_is_not_judged_and_moves_with_its_count(safe: bool, tmp_path: Path) -> None:  # noqa: FBT001
    run = _averaged(tmp_path / "run", ORIGIN, safe=safe)
    truth = _averaged(tmp_path / "whole", VALID, safe=safe) / f"step_{VALID}"
    assert {name.split(".")[0] for name in discover(run).origin.tensors} == {"unet"}
    written, outcome = forecast_run(run, tmp_path / "step_90", VALID - ORIGIN, method="line")
    assert any(note.startswith("averages of the weights, moved with them: unet_ema") for note in outcome.notes)
    assert json.loads((written / "unet_ema" / "config.json").read_text())["optimization_step"] == VALID
    origin, found, true = (_weights(at, "unet_ema", safe=safe) for at in (run / f"step_{ORIGIN}", written, truth))
    assert (found - true).norm() < 0.75 * (origin - true).norm()  # the batches are noise


def test_to_evaluate_the_forecast_takes_the_place_of_an_average_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = _averaged(tmp_path / "run", ORIGIN)
    written, _ = forecast_run(run, tmp_path / "out", 10, method="line", purpose="evaluation")
    assert torch.equal(_weights(written, "unet_ema"), _weights(written, "unet"))
    assert not torch.equal(_weights(written, "unet"), _weights(run / f"step_{ORIGIN}", "unet"))


def test_an_average_of_another_model_is_copied_with_a_note(tmp_path: Path) -> None:
    run = _averaged(tmp_path / "run", ORIGIN)
    for folder in run.iterdir():
        save_file({"other": torch.ones(3)}, folder / "unet_ema" / EMA_WEIGHTS[True])
    written, outcome = forecast_run(run, tmp_path / "out", 10)
    assert load_file(written / "unet_ema" / EMA_WEIGHTS[True])["other"].tolist() == [1, 1, 1]
    assert any(note.startswith("unet_ema: an average of no model in the folder") for note in outcome.notes)


def test_the_clock_adds_up_the_rates_that_accelerate_used_and_will_use(tmp_path: Path) -> None:
    loop, used = Loop(), []
    for step in range(1, 101):
        used.append(loop.optimizer.param_groups[0]["lr"])
        loop.advance(1)
        if step <= ORIGIN and step % 10 == 0:
            loop.save(tmp_path / f"step_{step}")
    pace = read_pace(discover(tmp_path).snapshots, ahead=100 - ORIGIN)
    for first, last in ((10, ORIGIN), (20, 40), (30, 100)):
        assert pace.total(first, last) == pytest.approx(sum(used[first:last]), rel=1e-9)
