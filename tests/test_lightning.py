"""PyTorch Lightning's checkpoints: read, forecast, and resumed as if the run had never stopped."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.utils.data import DataLoader, TensorDataset

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.errors import UsageError
from farcast_cli.forecast.fitting import fit
from farcast_cli.prediction import _whole_epochs
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.state.advance import advance
from farcast_cli.state.rates import read_pace
from farcast_cli.trainers import recognise
from farcast_cli.trainers.names import find_step_in_name
from tests.tiny import predict_run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.request import Outcome
    from tests.conftest import CallCli

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BATCH_SIZE = 4


def loader(num_batches: int, seed: int, *, same: bool = False) -> DataLoader[Any]:
    """Batches in a fixed order, or the same batch over and over, where no data can be repeated or left out."""
    generator = torch.Generator().manual_seed(seed)
    rows = BATCH_SIZE if same else num_batches * BATCH_SIZE
    inputs, outputs = torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)
    if same:
        inputs, outputs = inputs.repeat(num_batches, 1), outputs.repeat(num_batches, 1)
    return DataLoader(TensorDataset(inputs, outputs), batch_size=BATCH_SIZE)


@dataclass(frozen=True)
class Schedule:
    """A schedule as `configure_optimizers` returns it."""

    kind: str = "step"
    interval: str = "step"
    frequency: int = 1

    def build(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        made: Any
        if self.kind == "step":
            made = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        elif self.kind == "plateau":
            made = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        elif self.kind == "one cycle":
            made = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=60)
        else:
            made = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
        monitor = {"monitor": "loss"} if self.kind == "plateau" else {}
        return {"scheduler": made, "interval": self.interval, "frequency": self.frequency, **monitor}


class Net(lightning.LightningModule):
    """A small network with BatchNorm; hyper-parameters are saved."""

    def __init__(self, schedules: Sequence[Schedule], hyper: Mapping[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(dict(hyper))
        self.schedules = schedules
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [schedule.build(optimizer) for schedule in self.schedules]


class TwoPlayers(Net):
    """Manual optimization with two optimizers and a schedule each, as a GAN has."""

    def __init__(self, schedules: Sequence[Schedule], hyper: Mapping[str, Any]) -> None:
        super().__init__(schedules, hyper)
        self.automatic_optimization = False

    def training_step(self, batch: Any, _index: int) -> None:  # type: ignore[override]
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            schedule.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(self.net[index].parameters(), lr=lr) for index, lr in ((0, 1e-2), (3, 2e-2))]
        schedules = zip(self.schedules, optimizers, strict=True)
        return optimizers, [schedule.build(optimizer) for schedule, optimizer in schedules]


@dataclass(frozen=True)
class Run:
    """A training run and how it saves."""

    save: Mapping[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 4})
    num_batches: int = 7
    trainer: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[Schedule, ...] = (Schedule(),)
    model: type[Net] = Net
    hyper: Mapping[str, Any] = field(default_factory=lambda: {"width": 8})
    callbacks: tuple[type[Callback], ...] = ()
    validates: bool = True
    same_batches: bool = False

    def go(self, folder: Path, *, resume: Path | None = None, watch: Callback | None = None, **limits: Any) -> Net:
        """Train to a limit, saving into `folder`."""
        torch.manual_seed(0)
        saver = ModelCheckpoint(folder, save_top_k=-1, **self.save)
        net = self.model(self.schedules, self.hyper)
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*(make() for make in self.callbacks), saver, *([watch] if watch else [])],
            **self.trainer,
            **limits,
        )
        trainer.fit(
            net,
            loader(self.num_batches, 1, same=self.same_batches),
            loader(2, 2) if self.validates else None,
            ckpt_path=resume,
            weights_only=False,
        )
        return net


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AFTER_VALIDATION = {"every_n_epochs": 1}
PER_EPOCH = Schedule("cosine", "epoch")

RHYTHMS = {
    "in mid-epoch": (Run(), 28, 48),
    "in mid-epoch, each optimizer step two batches": (Run(trainer={"accumulate_grad_batches": 2}), 24, 44),
    "in mid-epoch, three batches a step and a shorter last step": (
        Run({"every_n_train_steps": 3}, 11, {"accumulate_grad_batches": 3}, (PER_EPOCH,)),
        24,
        45,
    ),
    "in mid-epoch, four batches a step where three would step as often": (
        Run({"every_n_train_steps": 5}, 6, {"accumulate_grad_batches": 4}, (PER_EPOCH,)),
        40,
        45,
    ),
    "at the end of epochs": (Run(EPOCH_END), 42, 63),
    "at the end of every second epoch": (Run(EPOCH_END | {"every_n_epochs": 2}), 84, 126),
    "after validation": (Run(AFTER_VALIDATION), 42, 63),
    "after validation in mid-epoch": (
        Run(AFTER_VALIDATION | {"every_n_epochs": 1}, 8, {"val_check_interval": 0.25}),
        40,
        62,
    ),
    "with validation three times an epoch": (Run({"every_n_train_steps": 5}, 9, {"val_check_interval": 3}), 40, 65),
    "with validation every second epoch": (
        Run({"every_n_train_steps": 5}, 7, {"check_val_every_n_epoch": 2}, (PER_EPOCH,)),
        50,
        85,
    ),
    "with validation every ten batches, across epochs": (
        Run({"every_n_train_steps": 6}, 7, {"check_val_every_n_epoch": None, "val_check_interval": 10}),
        48,
        78,
    ),
    "without validation": (Run({"every_n_train_steps": 6}, 5, validates=False), 48, 72),
    "with a schedule stepped per epoch": (Run({"every_n_train_steps": 4}, 7, schedules=(PER_EPOCH,)), 40, 64),
    "with a schedule stepped every third step": (
        Run({"every_n_train_steps": 4}, 7, schedules=(Schedule("cosine", "step", 3),)),
        48,
        76,
    ),
    "with a schedule stepped every second epoch": (
        Run({"every_n_train_steps": 7}, 7, schedules=(Schedule("cosine", "epoch", 2),)),
        56,
        84,
    ),
    "with a schedule that follows a metric": (Run(EPOCH_END, 7, schedules=(Schedule("plateau", "epoch"),)), 42, 63),
    "with no schedule": (Run(EPOCH_END, 7, schedules=()), 42, 63),
    "with two optimizers, stepped by hand": (
        Run({"every_n_train_steps": 8}, 7, model=TwoPlayers, schedules=(Schedule(), Schedule("cosine"))),
        56,
        88,
    ),
}


@pytest.mark.parametrize("what", RHYTHMS)
def test_the_loops_and_schedules_move_as_training_moves_them(what: str, tmp_path: Path) -> None:
    run, origin, target = RHYTHMS[what]
    run.go(tmp_path, max_steps=target)
    snapshots = [snapshot for snapshot in discover(tmp_path).snapshots if snapshot.step <= origin]
    assert snapshots[-1].step == origin
    moved = advance(snapshots, target - origin)
    (state,) = moved.trees.values()
    truth = load(true_checkpoint(tmp_path, target))
    assert state.tree["loops"] == truth["loops"]
    assert [state.tree[key] for key in ("epoch", "global_step")] == [truth[key] for key in ("epoch", "global_step")]
    if "metric" not in what:
        assert state.tree["lr_schedulers"] == truth["lr_schedulers"]
        for ours, theirs in zip(state.tree["optimizer_states"], truth["optimizer_states"], strict=True):
            assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]


@pytest.mark.parametrize(
    ("run", "stop", "origin", "target"), [(Run(), 24, 44, 64), (Run({"every_n_train_steps": 7}, validates=False), 28, 56, 77)]
)
def test_the_loops_of_a_run_that_was_resumed_before_move_as_they_would(
    run: Run, stop: int, origin: int, target: int, tmp_path: Path
) -> None:
    """Lightning loses an epoch's beginning when it resumes at an epoch's end: what it has lost stays lost."""
    run.go(tmp_path, max_steps=stop)
    run.go(tmp_path, max_steps=target, resume=true_checkpoint(tmp_path, stop))
    snapshots = [snapshot for snapshot in discover(tmp_path).snapshots if snapshot.step <= origin]
    (state,) = advance(snapshots, target - origin).trees.values()
    truth = load(true_checkpoint(tmp_path, target))
    for key in ("loops", "epoch", "global_step", "lr_schedulers"):
        assert state.tree[key] == truth[key], key


# --- resumed ---------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What a run does at each optimizer step: epoch, learning rates, weights after it, and the first input of its batch."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, list[float], torch.Tensor]] = {}
        self.inputs: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del outputs, batch_idx
        weights = torch.cat([value.detach().flatten().double() for value in pl_module.state_dict().values()])
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.seen[trainer.global_step] = trainer.current_epoch, rates, weights
        self.inputs[trainer.global_step] = float(batch[0][0, 0])


def fitted(folder: Path, last: int) -> Fitted:
    """A forecaster on the snapshots up to a step; later ones lie elsewhere from then on."""
    later = folder.parent / "later"
    later.mkdir()
    for snapshot in discover(folder).snapshots:
        if snapshot.step > last:
            snapshot.path.rename(later / snapshot.path.name)
    return fit(discover(folder), num_samples=DEFAULT_SAMPLE)


def forecast(folder: Path, origin: int, target: int, **request: Any) -> Path:
    """The checkpoint that farcast writes for `target`."""
    (outcome,) = predict_run(fitted(folder, origin), f"{folder.parent}/forecast/", horizons=(target - origin,), **request)
    assert outcome.path is not None
    return outcome.path


def with_true_values(ours: Path, truth: Path, path: Path) -> Path:
    """The forecast's checkpoint with the weights, averages and moments that the run came to have."""
    found, true = load(ours), load(truth)
    for key in ("state_dict", "current_model_state", "averaging_state"):
        if key in true:
            assert found[key].keys() == true[key].keys()
            found[key] = true[key]
    for optimizer, true_one in zip(found["optimizer_states"], true["optimizer_states"], strict=True):
        for name, entry in optimizer["state"].items():
            entry |= {key: true_one["state"][name][key] for key in ("exp_avg", "exp_avg_sq")}
    torch.save(found, path)
    return path


def true_checkpoint(folder: Path, step: int) -> Path:
    (path,) = (path for path in folder.iterdir() if f"step={step}." in path.name)
    return path


def assert_goes_on_alike(resumed: Watch, whole: Watch, target: int) -> None:
    """Every step after `target`, to the last bit."""
    later = [step for step in whole.seen if step > target]
    assert [step for step in resumed.seen if step > target] == later
    assert len(later) >= 25
    for step in later:
        epoch, rates, weights = resumed.seen[step]
        assert (step, epoch, rates) == (step, *whole.seen[step][:2])
        assert torch.equal(weights, whole.seen[step][2]), step


RESUMED = {
    "at the end of an epoch": (Run({"every_n_train_steps": 7}), 42, 56),
    "after an epoch": (Run(EPOCH_END, schedules=(PER_EPOCH,)), 42, 56),
    "after validation": (Run(AFTER_VALIDATION), 42, 56),
    "in mid-epoch": (Run(same_batches=True), 28, 40),
    "in mid-epoch, two batches a step": (Run(trainer={"accumulate_grad_batches": 2}, same_batches=True), 24, 36),
    "by hand, with two optimizers": (
        Run({"every_n_train_steps": 14}, model=TwoPlayers, schedules=(Schedule(), Schedule("cosine"))),
        84,
        126,
    ),
    "with an average of the weights": (Run({"every_n_train_steps": 7}, callbacks=(EMAWeightAveraging,)), 42, 56),
}
BY_EPOCHS = ("at the end of an epoch", "after an epoch", "in mid-epoch")
"""Also with a limit of epochs in place of steps: Lightning then restores its loops in another way."""


@pytest.mark.parametrize(
    ("what", "limit"), [*((what, "max_steps") for what in RESUMED), *((what, "max_epochs") for what in BY_EPOCHS)]
)
def test_with_the_true_values_a_forecast_resumes_as_the_run_went_on(what: str, limit: str, tmp_path: Path) -> None:
    """All that farcast does not forecast is then compared to the last bit: counters, schedules, places in the data."""
    run, origin, target = RESUMED[what]
    whole, resumed = Watch(), Watch()
    end: dict[str, Any] = {limit: target + 50 if limit == "max_steps" else 16}
    run.go(tmp_path / "run", watch=whole, **end)
    ours = forecast(tmp_path / "run", origin, target)
    merged = with_true_values(ours, true_checkpoint(tmp_path / "later", target), tmp_path / "merged.ckpt")
    run.go(tmp_path / "resumed", resume=merged, watch=resumed, **end)
    assert_goes_on_alike(resumed, whole, target)


def test_in_mid_epoch_lightning_begins_the_data_anew_and_farcast_says_so(tmp_path: Path) -> None:
    """Seven batches an epoch: step 38 is the third of its epoch, and the step after it the fourth."""
    run, whole, resumed = Run(), Watch(), Watch()
    run.go(tmp_path / "run", watch=whole, max_steps=60)
    (outcome,) = predict_run(fitted(tmp_path / "run", 28), f"{tmp_path}/forecast/", horizons=(10,))
    assert outcome.path is not None
    run.go(tmp_path / "resumed", resume=outcome.path, watch=resumed, max_steps=42)
    assert resumed.inputs[39] == whole.inputs[36] != whole.inputs[39]
    (note,) = (note for note in outcome.notes if "DataLoader" in note)
    assert "step 38 lies within epoch 5, at batch 3 of 7" in note
    assert "--horizon 7 or --horizon 14" in note


def test_at_an_epochs_end_nothing_is_said_of_the_data(tmp_path: Path) -> None:
    Run().go(tmp_path / "run", max_steps=28)
    (outcome,) = predict_run(fitted(tmp_path / "run", 28), f"{tmp_path}/forecast/", horizons=(14,))
    assert [note for note in outcome.notes if "DataLoader" in note] == []


def test_within_the_first_epoch_the_epoch_counts_as_not_ended(tmp_path: Path) -> None:
    Run(num_batches=100, schedules=(Schedule(),)).go(tmp_path / "run", max_steps=32)
    (outcome,) = predict_run(fitted(tmp_path / "run", 32), f"{tmp_path}/forecast/", horizons=(500,))
    assert outcome.path is not None
    found = load(outcome.path)
    loop = found["loops"]["fit_loop"]
    assert (found["epoch"], found["global_step"]) == (0, 532)
    assert loop["epoch_loop.batch_progress"]["current"] == {"ready": 532, "started": 532, "processed": 532, "completed": 531}
    assert any("do not tell how long an epoch is" in note for note in outcome.notes)


def test_without_a_horizon_the_proposal_ends_with_an_epoch(tmp_path: Path, call_cli: CallCli) -> None:
    Run({"every_n_train_steps": 5}).go(tmp_path / "run", max_steps=75)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "forecasts").glob("*/*.ckpt")
    assert load(path)["global_step"] % 7 == 0
    assert load(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]


def test_a_proposal_is_not_cut_to_less_than_half_for_an_epochs_end(tmp_path: Path) -> None:
    """Forty batches an epoch: five steps after step 75 the second one ends."""
    Run({"every_n_train_steps": 25}, num_batches=40).go(tmp_path / "run", max_steps=75)
    origin = open_snapshot(tmp_path / "run" / "epoch=1-step=75.ckpt")
    assert [_whole_epochs(origin, horizon) for horizon in (4, 5, 10, 11, 44, 45, 89)] == [4, 5, 5, 11, 44, 45, 85]


# --- the end of the run, dropped state, averages ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["max_steps", "total_steps", "num_training_steps"])
def test_a_step_past_the_end_that_the_hyper_parameters_name_is_refused(key: str, tmp_path: Path) -> None:
    Run(hyper={"optim": {key: 60}}).go(tmp_path / "run", max_steps=40)
    forecaster = fitted(tmp_path / "run", 40)
    with pytest.raises(
        UsageError, match=rf"valid step 60: expected a step before the end .* hyper_parameters\.optim\.{key} = 60"
    ) as caught:
        predict_run(forecaster, f"{tmp_path}/forecast/", horizons=(20,))
    assert "--horizon 19 or less" in caught.value.hint
    (outcome,) = predict_run(forecaster, f"{tmp_path}/forecast/", horizons=(19,))
    assert outcome.path is not None


def test_a_step_past_the_last_epoch_that_the_hyper_parameters_name_is_refused(tmp_path: Path) -> None:
    """Seven steps an epoch, nine epochs: the run ends at step 63, and a checkpoint there trains nothing."""
    run, resumed = Run(hyper={"max_epochs": 9}), Watch()
    run.go(tmp_path / "run", max_epochs=6)
    forecaster = fitted(tmp_path / "run", 40)
    with pytest.raises(UsageError, match=r"valid step 63: expected a step before the end .*max_epochs = 9, in steps = 63"):
        predict_run(forecaster, f"{tmp_path}/forecast/", horizons=(23,))
    (outcome,) = predict_run(forecaster, f"{tmp_path}/forecast/", horizons=(16,))
    run.go(tmp_path / "resumed", resume=outcome.path, watch=resumed, max_epochs=9)
    assert list(resumed.seen) == list(range(57, 64))


def test_a_length_that_the_run_has_passed_already_is_that_of_something_else(tmp_path: Path) -> None:
    Run(hyper={"max_steps": 12}).go(tmp_path / "run", max_steps=40)
    (outcome,) = predict_run(fitted(tmp_path / "run", 40), f"{tmp_path}/forecast/", horizons=(20,))
    assert outcome.path is not None


def test_a_step_past_the_end_of_a_one_cycle_schedule_is_refused(tmp_path: Path) -> None:
    Run(schedules=(Schedule("one cycle"),)).go(tmp_path / "run", max_steps=40)
    with pytest.raises(UsageError, match="schedule ends before the valid step"):
        predict_run(fitted(tmp_path / "run", 40), f"{tmp_path}/forecast/", horizons=(30,))


@pytest.mark.parametrize("mode", ["drop", "reset"])
def test_without_moments_lightning_still_resumes_at_the_right_rate(mode: str, tmp_path: Path) -> None:
    run, whole, resumed = Run(), Watch(), Watch()
    run.go(tmp_path / "run", watch=whole, max_steps=50)
    ours = forecast(tmp_path / "run", 28, 42, optimizer=mode)
    assert [one["state"] for one in load(ours)["optimizer_states"]] == [{}]
    run.go(tmp_path / "resumed", resume=ours, watch=resumed, max_steps=50)
    assert {step: seen[1] for step, seen in resumed.seen.items()} == {step: whole.seen[step][1] for step in range(43, 51)}


AVERAGED = Run({"every_n_train_steps": 7}, callbacks=(EMAWeightAveraging,))


def test_of_averaged_weights_the_live_ones_are_forecast_and_the_average_moves_with_them(tmp_path: Path) -> None:
    AVERAGED.go(tmp_path / "run", max_steps=56)
    (outcome,) = predict_run(fitted(tmp_path / "run", 42), f"{tmp_path}/forecast/", horizons=(14,), method="line")
    assert outcome.path is not None
    found, origin = load(outcome.path), load(true_checkpoint(tmp_path / "run", 42))
    name = "net.0.weight"
    assert not torch.equal(found["current_model_state"][name], origin["current_model_state"][name])
    truth = load(true_checkpoint(tmp_path / "later", 56))
    error, move = (
        torch.cat(
            [(a["state_dict"][key] - truth["state_dict"][key]).flatten() for key in truth["state_dict"] if "net.0" in key]
        )
        for a in (found, origin)
    )
    assert error.norm() < 0.75 * move.norm()
    assert any(name == "state_dict.*" and "average" in reason for name, reason in beside(tmp_path / "run"))


def beside(folder: Path) -> tuple[tuple[str, str], ...]:
    return discover(folder).origin.beside


@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
def test_to_evaluate_averaged_weights_the_forecast_is_where_users_load_it_from(dtype: str, tmp_path: Path) -> None:
    AVERAGED.go(tmp_path / "run", max_steps=42)
    (outcome,) = predict_run(
        fitted(tmp_path / "run", 42), f"{tmp_path}/forecast/", horizons=(14,), method="line", purpose="evaluation", dtype=dtype
    )
    assert outcome.path is not None
    found = load(outcome.path)
    origin = load(true_checkpoint(tmp_path / "run", 42))
    floating = [name for name, value in found["state_dict"].items() if value.is_floating_point()]
    assert len(floating) > 4
    for name in floating:
        assert torch.equal(found["state_dict"][name], found["current_model_state"][name])
        assert found["state_dict"][name].dtype == (torch.float32 if dtype == "source" else torch.bfloat16)
    assert not torch.equal(found["state_dict"]["net.0.weight"], origin["state_dict"]["net.0.weight"].to(dtype_of(dtype)))


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float32


class Impatient(EarlyStopping):
    """Early stopping that has always waited for a while."""

    def __init__(self) -> None:
        super().__init__("val_loss", patience=1000, mode="max")


def test_early_stopping_keeps_its_patience_and_callbacks_that_count_steps_move(tmp_path: Path) -> None:
    run = Run(EPOCH_END, callbacks=(Impatient, EMAWeightAveraging))
    run.go(tmp_path / "run", max_steps=70)
    origin, found = load(true_checkpoint(tmp_path / "run", 70)), load(forecast(tmp_path / "run", 70, 84))
    (waited,) = ((key, state) for key, state in origin["callbacks"].items() if "wait_count" in state)
    assert waited[1]["wait_count"] > 2
    assert found["callbacks"][waited[0]] == waited[1]
    assert found["callbacks"]["EMAWeightAveraging"] == {"latest_update_step": 84}
    assert str(found["callbacks"][saver_key(found)]) == str(origin["callbacks"][saver_key(origin)])


def saver_key(found: Mapping[str, Any]) -> str:
    (key,) = (key for key in found["callbacks"] if key.startswith("ModelCheckpoint"))
    return str(key)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("epoch=3-step=1000.ckpt", "1000"),
        ("epoch=3-step=1000-v1.ckpt", "1000"),
        ("epoch=3.ckpt", None),
        ("last.ckpt", None),
        ("last-v1.ckpt", None),
        ("model-epoch=02-val_loss=0.32.ckpt", None),
    ],
)
def test_the_names_that_model_checkpoint_gives_tell_the_step_or_nothing(name: str, step: str | None) -> None:
    found = find_step_in_name(name)
    assert (found and found[1]) == step


def test_a_ckpt_file_of_a_loop_without_lightning_is_a_torch_payload(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.randn(4, 4)}, "global_step": 5}, tmp_path / "sd.ckpt")
    layout = recognise(tmp_path / "sd.ckpt")
    assert layout is not None
    assert (layout.name, [item.step for item in layout.read(tmp_path / "sd.ckpt").evidence]) == ("torch", [5])


def test_the_step_is_what_the_trainer_will_resume_at(tmp_path: Path) -> None:
    for number, (run, steps) in enumerate(((Run(), [4, 8]), (RESUMED["by hand, with two optimizers"][0], [14, 28]))):
        folder = tmp_path / str(number)
        run.go(folder, max_steps=steps[-1])
        snapshots = discover(folder).snapshots
        assert [(one.step, one.step_source, one.layout) for one in snapshots] == [
            (step, "trainer state", "lightning") for step in steps
        ]


def test_weights_alone_are_forecast_with_a_word_on_resuming(tmp_path: Path) -> None:
    Run({"every_n_train_steps": 4, "save_weights_only": True}).go(tmp_path / "run", max_steps=28)
    (outcome,) = predict_run(fitted(tmp_path / "run", 28), f"{tmp_path}/forecast/", horizons=(7,))
    assert outcome.path is not None
    assert any("cannot resume" in note for note in outcome.notes)
    net = Net((), {})
    net.load_state_dict(load(outcome.path)["state_dict"])
    assert load(outcome.path)["global_step"] == 35


def test_a_folder_as_model_checkpoint_leaves_it_works_from_end_to_end(tmp_path: Path, call_cli: CallCli) -> None:
    folder = tmp_path / "checkpoints"
    Run({"every_n_train_steps": 7, "save_last": True}).go(folder, max_steps=56)
    shutil.copy(folder / "epoch=6-step=49.ckpt", folder / "epoch=6-step=49-v1.ckpt")
    (folder / "last-v1.ckpt").symlink_to("last.ckpt")
    (folder / "hparams.yaml").write_text("width: 8\n")
    looked = call_cli("inspect", folder)
    assert looked.returncode == 0, looked.stderr
    assert "lightning" in looked.stdout
    assert call_cli("fit", folder, cwd=tmp_path).returncode == 0
    assert discover(folder).steps == tuple(range(7, 57, 7))
    done = call_cli("predict", "--horizon", "14,21", "--even-if-worse", "-o", "out/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {load(path)["global_step"]: path.name for path in (tmp_path / "out").glob("*.ckpt")}
    assert found == {70: "epoch=9-step=70.ckpt", 77: "epoch=10-step=77.ckpt"}


def test_counters_that_are_kept_leave_the_loops_at_the_origin(tmp_path: Path) -> None:
    Run().go(tmp_path / "run", max_steps=28)
    found = load(forecast(tmp_path / "run", 28, 42, counters="keep"))
    origin = load(true_checkpoint(tmp_path / "run", 28))
    for key in ("loops", "epoch", "global_step", "lr_schedulers"):
        assert found[key] == origin[key]


def test_a_horizon_that_ends_within_a_batch_of_two_steps_is_refused(tmp_path: Path) -> None:
    RESUMED["by hand, with two optimizers"][0].go(tmp_path / "run", max_steps=84)
    with pytest.raises(UsageError, match="2 optimizer steps a batch") as caught:
        predict_run(fitted(tmp_path / "run", 84), f"{tmp_path}/forecast/", horizons=(7,))
    assert caught.value.hint == "--horizon 6 or --horizon 8"


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_clock_adds_up_the_rates_that_lightning_used_and_will_use(interval: str, tmp_path: Path) -> None:
    """Within a step, or an epoch where the schedule is stepped once in each, since a save may come before the schedule's own."""
    used = []

    class Rates(Callback):
        """Notes the rate that every batch is trained at."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            used.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = Run(schedules=(Schedule("step", interval),))
    run.go(tmp_path / "whole", watch=Rates(), max_steps=63)
    run.go(tmp_path / "run", max_steps=42)
    pace = read_pace(discover(tmp_path / "run").snapshots, ahead=20)
    assert pace.clock == "rate"
    for first, last in ((4, 40), (12, 60)):
        assert pace.total(first, last) == pytest.approx(sum(used[first:last]), rel=0.02)


# --- folders of a distributed strategy -------------------------------------------------------------------------------


def _as_folder(checkpoint: Path, folder: Path) -> None:
    """A checkpoint as FSDP's strategy saves it: weights and optimizers distributed, and all else in meta.pt.

    Source: lightning/fabric/strategies/fsdp.py, save_checkpoint; lightning/pytorch/strategies/fsdp.py.
    """
    tree = load(checkpoint)
    weights, (optimizer,) = tree.pop("state_dict"), tree.pop("optimizer_states")
    names = [name for name in weights if name.rpartition(".")[2] in {"weight", "bias"}]
    state = {names[index]: entry for index, entry in optimizer["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in optimizer["param_groups"]]
    place = folder / checkpoint.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_dcp({"model": weights, "optimizer_0": {"state": state, "param_groups": groups}}, checkpoint_id=place, no_dist=True)
    torch.save(tree, place / "meta.pt")


def test_a_folder_with_its_trainer_s_state_in_meta_pt_advances_as_the_one_file_does(tmp_path: Path) -> None:
    Run().go(tmp_path / "file", max_steps=40)
    for checkpoint in sorted((tmp_path / "file").iterdir()):
        _as_folder(checkpoint, tmp_path / "folder")
    made: dict[str, tuple[Path, Outcome]] = {}
    for kind in ("file", "folder"):
        fitted = fit(discover(tmp_path / kind), num_samples=DEFAULT_SAMPLE)
        (outcome,) = predict_run(fitted, f"{tmp_path / 'out' / kind}/", horizons=[16], even_if_worse=True)
        assert outcome.path is not None
        assert not any("no schedule is saved" in note for note in outcome.notes)
        made[kind] = outcome.path, outcome
    (file, _), (folder, outcome) = made["file"], made["folder"]
    assert folder.name == file.name
    expected, found = load(file), load(folder / "meta.pt")
    for key in ("global_step", "epoch", "loops", "lr_schedulers"):
        assert found[key] == expected[key], key
    rate = expected["optimizer_states"][0]["param_groups"][0]["lr"]
    assert any("lr: " in change and change.endswith(f"{rate}") for change in outcome.changes)
