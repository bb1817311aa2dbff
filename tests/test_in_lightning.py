"""Leaps in a real PyTorch Lightning training: the live module gets the forecast's weights, and everything else stays."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.errors import UsageError
from farcast_cli.forecast.memory import read_memory
from farcast_cli.live.leaps import Leaps
from tests.test_in_trainer import equal, same_tree, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    from farcast_cli.lightning import LeapCallback

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EVERY = 10


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARCAST_STATE_DIR", "")


class Tied(lightning.LightningModule):
    """A convolution stored channels last, BatchNorm, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = torch.nn.BatchNorm2d(4)
        self.one, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        found = torch.tanh(self.norm(self.first(batch[0]))).mean((2, 3))
        return torch.nn.functional.mse_loss(self.other(torch.tanh(self.one(found))), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1000), "interval": "step"}]


class Look(Callback):
    """Copies what the live training has, at the start of each batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        state = [{key: one.clone() if torch.is_tensor(one) else one for key, one in s.items()} for s in self._moments(trainer)]
        self.seen.append((trainer.global_step, weights(pl_module), state, torch.get_rng_state()))

    @staticmethod
    def _moments(trainer: Any) -> list[dict[str, Any]]:
        return list(trainer.optimizers[0].state.values())


class Compare(Look):
    """The same after the leap, and the forecast that lies on disk then."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        (found, *more) = sorted(path for path in (trainer.forecasts).glob("*.pt")) or [None]
        assert not more
        assert len(list(trainer.runs.glob("*.ckpt"))) <= 1
        self.seen[-1] += (torch.load(found, weights_only=True) if found else None,)


def data() -> torch.utils.data.DataLoader[Any]:
    """Five batches: each save ends an epoch, from which Lightning resumes its data exactly."""
    inputs = torch.randn(80, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.utils.data.TensorDataset(inputs, inputs.mean((2, 3)).repeat(1, 2) * 2)
    return torch.utils.data.DataLoader(rows, batch_size=16)


def fit(
    tmp_path: Path,
    *callbacks: Callback,
    steps: int = 100,
    epochs: int | None = None,
    resume: Path | None = None,
    logger: Any = False,
    module: lightning.LightningModule | None = None,
) -> tuple[Any, Any]:
    """Train some of 100 steps, a save at every tenth; the trainer and the module."""
    torch.manual_seed(0)
    module = module or Tied()
    trainer: Any = lightning.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        max_epochs=epochs,
        callbacks=[*callbacks, ModelCheckpoint(tmp_path / "run", every_n_train_steps=EVERY, save_top_k=1)],
    )
    trainer.runs, trainer.forecasts = tmp_path / "run", tmp_path / "forecasts" / "run"
    trainer.fit(module, data(), ckpt_path=resume, weights_only=False)
    return trainer, module


def marks(trainer: Any) -> list[tuple[int, ...]]:
    """What the live optimizer carries on."""
    return [tuple(row) for row in trainer.optimizers[0].param_groups[0].get("farcast_leaps", ())]


def newest(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "run").glob("*.ckpt")
    return found


def test_the_live_module_has_the_forecasts_weights_and_everything_else_is_as_before(tmp_path: Path) -> None:
    before, after = Look(), Compare()
    trainer, module = fit(tmp_path, before, LeapCallback(), after)
    steps = [step for step, _, _ in marks(trainer)]
    assert steps == [30, 40, 50, 60, 70, 80, 90]
    for (step, *one), (_, *other, forecast) in zip(before.seen, after.seen, strict=True):
        assert same_tree(one[1:], other[1:])
        assert equal(one[0], other[0]) == (step not in steps)
        if step in steps:
            assert equal(other[0], forecast)
    assert module.one.weight.data_ptr() == module.other.weight.data_ptr()
    assert module.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert trainer.global_step == 100


def test_every_reader_knows_the_leaps_from_a_later_checkpoint(tmp_path: Path, call_cli: CallCli) -> None:
    trainer, _ = fit(tmp_path, LeapCallback(), Stop(75))
    fit(tmp_path, resume=newest(tmp_path))  # the callback need not be there
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
    told = json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path / "elsewhere", env={"FARCAST_STATE_DIR": ""}).stdout)
    found = [(one["origin_step"], one["origin_step"], one["valid_step"]) for one in told["leaps"]]
    assert found == marks(trainer)[:-1]  # the run went on from a checkpoint before the last one


class Players(Tied):
    """Manual optimization, of which Lightning counts the steps of each optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.first.parameters(), lr=1e-3), torch.optim.AdamW(self.one.parameters(), lr=1e-3)]


def test_of_two_optimizers_the_steps_of_both_count(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, LeapCallback(), module=Players(), steps=-1, epochs=10)
    assert [step for step, _, _ in marks(trainer)] == [30, 40, 50, 60, 70, 80, 90]


def test_every_logger_gets_the_figures(tmp_path: Path) -> None:
    fit(tmp_path, LeapCallback(), logger=CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1))
    (table,) = (tmp_path / "logs").rglob("metrics.csv")
    header, *lines = table.read_text().splitlines()
    assert {"farcast_horizon", "farcast_gain", "farcast_share", "farcast_cosine"} <= set(header.split(","))
    place = header.split(",").index("farcast_horizon")
    assert [float(line.split(",")[place]) > 0 for line in lines] == [False, False] + [True] * 7


def test_a_run_that_crashed_right_after_a_leap_makes_the_same_leap_again_and_goes_on_alike(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, LeapCallback(), Stop(65))
    for folder in ("run", "forecasts"):
        shutil.rmtree(tmp_path / folder)
    fit(tmp_path, LeapCallback(), Stop(57))
    trainer, module = fit(tmp_path, LeapCallback(), Stop(65), resume=newest(tmp_path))
    assert [step for step, _, _ in marks(trainer)] == [30, 40, 50, 60]
    torch.testing.assert_close(weights(module), weights(whole), rtol=0, atol=0)


class Stop(Callback):
    """Ends the training at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_resumed_run_goes_on_with_the_memory(tmp_path: Path) -> None:
    fit(tmp_path, LeapCallback(every=20), Stop(75))
    fit(tmp_path, LeapCallback(every=20), resume=newest(tmp_path))
    memory = read_memory(tmp_path / "forecasts" / "run" / "run.memory.safetensors")
    assert memory is not None
    assert memory.record.count == 3


def test_of_a_run_with_an_average_the_live_weights_leap_and_the_average_stays(tmp_path: Path) -> None:
    class Average(EMAWeightAveraging):  # type: ignore[misc, unused-ignore]
        """Says what the average is before a leap and after it."""

        def copied(self) -> dict[str, torch.Tensor]:
            assert self._average_model is not None
            return weights(self._average_model)

    average = Average(decay=0.9)
    seen: list[dict[str, torch.Tensor]] = []

    class Note(Callback):
        """Copies the average at the start of each batch."""

        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(average.copied())

    after = Compare()
    trainer, _ = fit(tmp_path, average, Note(), LeapCallback(), Note(), after)
    steps = [step for step, _, _ in marks(trainer)]
    assert steps == [30, 40, 50, 60, 70, 80, 90]
    assert all(map(equal, seen[::2], seen[1::2]))
    assert all(equal(live, forecast) for step, live, *_, forecast in after.seen if step in steps)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_weights_in_shards_are_refused_at_the_start_with_the_way_by_files(strategy: Any) -> None:
    trainer: Any = lightning.Trainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(UsageError, match=rf"found {strategy.__name__}: call `farcast leap RUN`"):
        LeapCallback().setup(trainer, Tied(), "fit")


def test_a_run_that_saves_nothing_is_refused() -> None:
    trainer: Any = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match="expected a ModelCheckpoint"):
        LeapCallback().setup(trainer, Tied(), "fit")


def test_the_options_are_those_of_every_loop() -> None:
    assert LeapCallback(every=3, max_gain=2)._leaps == Leaps(every=3, max_gain=2, layout="pt")
