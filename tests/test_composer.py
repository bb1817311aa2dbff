"""MosaicML Composer's checkpoints: read, moved on as Composer would have, and resumed by Composer itself where it is installed."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.forecast.fitting import fit
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.state.advance import advance
from farcast_cli.trainers import recognise
from tests.tiny import predict_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.state.advance import Advanced
    from farcast_cli.trainers.base import Snapshot
    from tests.conftest import CallCli

BATCHES, SIZE, SAMPLES = 20, 8, 157  # of an epoch, whose last batch is smaller
TOKENS = 32  # of a sample
TOTAL = 100


def timestamp(step: int, *, at_end: bool = False) -> dict[str, Any]:
    """What `Timestamp.state_dict` holds after so many batches; at an epoch's end, saved behind its last batch or the epoch."""
    epoch, batch = divmod(step, BATCHES) if at_end else ((step - 1) // BATCHES, (step - 1) % BATCHES + 1)
    within = min(batch * SIZE, SAMPLES)
    sample = epoch * SAMPLES + within
    return {
        "iteration": 0,
        "epoch": epoch,
        "batch": step,
        "sample": sample,
        "token": sample * TOKENS,
        "epoch_in_iteration": epoch,
        "token_in_iteration": sample * TOKENS,
        "batch_in_epoch": batch,
        "sample_in_epoch": within,
        "token_in_epoch": within * TOKENS,
        "total_wct": dt.timedelta(seconds=step, microseconds=7),
        "iteration_wct": dt.timedelta(seconds=step, microseconds=7),
        "epoch_wct": dt.timedelta(seconds=batch),
        "batch_wct": dt.timedelta(microseconds=235),
    }


def payload(
    step: int, net: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, *, at_end: bool
) -> dict[str, Any]:
    """A checkpoint as Composer 0.32 lays it out: optimizers and schedules by their classes, the optimizer's state by name."""
    names = [name for name, _ in net.named_parameters()]
    saved = optimizer.state_dict()
    groups = [{**group, "params": names} for group in saved["param_groups"]]
    stamp = timestamp(step, at_end=at_end)
    state = {
        "model": net.state_dict(),
        "optimizers": {"AdamW": {"state": {names[i]: value for i, value in saved["state"].items()}, "param_groups": groups}},
        "schedulers": {"LambdaLR": schedule.state_dict()},
        "algorithms": [],
        "callbacks": {"CheckpointSaver": {"all_saved_checkpoints_to_timestamp": [(f"ckpts/ba{step}.pt", stamp)]}},
        "scaler": {"ClosureGradScaler": {}},
        "timestamp": {"Timestamp": stamp},
        "rank_zero_seed": 1,
        "run_name": "1795920139-fervent-lizard",
        "dataset_state": {"train": None, "eval": {}},
        "integrations": {},
        "metadata": {"composer_env_info": {"composer_version": "0.32.1", "cpu_count": 2}, "world_size": 1},
    }
    return {"state": state, "rng": [{"python": (3, tuple(range(625)), None), "torch": torch.get_rng_state()}]}


def write_run(folder: Path, steps: Sequence[int], *, at_end: bool = False) -> None:
    """Files of a run under a linear schedule, and the link to the latest that Composer keeps."""
    folder.mkdir()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 - count / TOTAL)
    inputs = torch.randn(16, 6)
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        (net(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if step in steps:
            stamp = timestamp(step, at_end=at_end)
            name = f"ep{stamp['epoch']}-ba{step}-rank0.pt"
            torch.save(payload(step, net, optimizer, schedule, at_end=at_end), folder / name)
            link = folder / "latest-rank0.pt"
            link.unlink(missing_ok=True)
            link.symlink_to(name)


def snapshots(folder: Path, steps: Sequence[int], *, at_end: bool = False) -> tuple[Snapshot, ...]:
    write_run(folder, steps, at_end=at_end)
    return discover(folder).snapshots


def moved(found: Advanced) -> dict[str, Any]:
    stamp: dict[str, Any] = found.trees[""].tree["state"]["timestamp"]["Timestamp"]
    return {key: value for key, value in stamp.items() if not key.endswith("_wct")}


def counts(step: int, *, at_end: bool = False) -> dict[str, Any]:
    return {key: value for key, value in timestamp(step, at_end=at_end).items() if not key.endswith("_wct")}


def test_a_composer_checkpoint_is_known_by_its_content_and_its_step_is_the_batch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [8, 16])
    (tmp_path / "run" / "ep0-ba16-rank0.pt").rename(tmp_path / "run" / "mine.pt")
    layout = recognise(tmp_path / "run" / "mine.pt")
    assert layout is not None
    assert layout.name == "composer"
    assert [(e.source, e.step) for e in layout.read(tmp_path / "run" / "mine.pt").evidence] == [
        ("trainer state", 16),
        ("adam step", 16),
    ]


def test_a_pt_file_of_a_loop_of_ones_own_is_no_composer_checkpoint(tmp_path: Path) -> None:
    torch.save({"state": {"model": {"w": torch.ones(3)}}}, tmp_path / "ba8.pt")
    layout = recognise(tmp_path / "ba8.pt")
    assert layout is not None
    assert layout.name == "torch"


@pytest.mark.parametrize("horizon", [1, 4, 12, 16, 20, 32, 33])
def test_every_count_is_that_which_composer_has_at_the_later_batch(horizon: int, tmp_path: Path) -> None:
    found = advance(snapshots(tmp_path / "run", [8, 16, 24, 32, 40, 48]), horizon)
    assert moved(found) == counts(48 + horizon)
    assert not [note for note in found.notes if "timestamp" in note]


@pytest.mark.parametrize(("horizon", "at_end"), [(20, True), (40, True), (7, False)])
def test_a_run_saved_behind_its_epochs_ends_behind_an_epoch_or_within_one(
    horizon: int, *, at_end: bool, tmp_path: Path
) -> None:
    found = advance(snapshots(tmp_path / "run", [20, 40, 60], at_end=True), horizon)
    assert moved(found) == counts(60 + horizon, at_end=at_end)


def test_the_times_on_the_wall_and_the_random_state_stay(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(8, 73, 8))
    new, old = (
        torch.load(path, weights_only=False) for path in (forecast(tmp_path / "run", 16), *(tmp_path / "run").glob("*ba72*"))
    )
    stamps = [one["state"]["timestamp"]["Timestamp"] for one in (new, old)]
    assert all(stamps[0][key] == value for key, value in stamps[1].items() if key.endswith("_wct"))
    assert torch.equal(new["rng"][0]["torch"], old["rng"][0]["torch"])


def test_the_schedule_and_adam_move_with_the_batches(tmp_path: Path) -> None:
    found = advance(snapshots(tmp_path / "run", [8, 16, 24, 32, 40, 48]), 16)
    state = found.trees[""].tree["state"]
    assert state["schedulers"]["LambdaLR"]["last_epoch"] == 64
    assert state["optimizers"]["AdamW"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * (1 - 64 / TOTAL))
    assert any(change.new == 64 and "optimizers.AdamW" in change.where for change in found.changes)


def test_before_an_epoch_has_ended_the_present_one_counts_as_not_ended(tmp_path: Path) -> None:
    found = advance(snapshots(tmp_path / "run", [4, 8, 12]), 12)
    assert moved(found)["batch_in_epoch"] == 24
    assert any("no snapshot tells how many batches an epoch has" in note for note in found.notes)


def test_samples_that_no_timestamp_explains_stay_and_are_named(tmp_path: Path) -> None:
    one_epoch = snapshots(tmp_path / "run", [100], at_end=True)  # 157 samples in 20 batches: of 8, by the number of them
    assert moved(advance(one_epoch, 7)) == counts(107)
    trees = [snapshot.parts[0].content.tree for snapshot in one_epoch]  # type: ignore[union-attr]
    trees[0]["state"]["timestamp"]["Timestamp"] |= {"sample": 5 * 1999}  # 20 batches of 100 to 105
    found = advance(one_epoch, 7)
    assert moved(found)["batch_in_epoch"] == 7
    assert moved(found)["sample"] == 5 * 1999
    assert any("sample" in note and "stay at the origin's values" in note for note in found.notes)


def test_the_optimizer_is_emptied_and_never_left_out(tmp_path: Path) -> None:
    found = advance(snapshots(tmp_path / "run", [8, 16, 24]), 16, optimizer="drop")
    assert found.trees[""].tree["state"]["optimizers"]["AdamW"]["state"] == {}
    assert found.trees[""].tree["state"]["model"]
    assert "optimizer state emptied instead of left out: Composer cannot load a checkpoint without optimizers" in found.notes


def forecast(folder: Path, horizon: int, **request: Any) -> Path:
    fitted = fit(discover(folder), num_samples=DEFAULT_SAMPLE)
    (outcome,) = predict_run(fitted, f"{folder.parent}/forecast/", horizons=(horizon,), **request)
    assert outcome.path is not None
    return outcome.path


def test_a_folder_as_composer_leaves_it_works_from_end_to_end(tmp_path: Path, call_cli: CallCli) -> None:
    write_run(tmp_path / "run", range(8, 73, 8))
    path = forecast(tmp_path / "run", 16)
    assert path.name == "ep4-ba88-rank0.pt"
    saved = torch.load(path, weights_only=False)["state"]
    assert {k: v for k, v in saved["timestamp"]["Timestamp"].items() if not k.endswith("_wct")} == counts(88)
    assert saved["model"]["1.num_batches_tracked"] == 88
    shown = call_cli("inspect", tmp_path / "run")
    assert shown.returncode == 0
    assert "9 composer snapshots" in shown.stdout


def test_other_containers_hold_the_weights_alone_or_everything(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(8, 73, 8))
    same = torch.load(forecast(tmp_path / "run", 16), weights_only=False)["state"]["model"]
    alone = load_file(forecast(tmp_path / "run", 16, layout="safetensors"))
    assert alone.keys() == same.keys()
    assert all(torch.equal(alone[name], same[name]) for name in same)
    whole = open_snapshot(forecast(tmp_path / "run", 16, layout="dcp"))
    assert whole.evidence[0].step == 88


# --- Composer itself -------------------------------------------------------------------------------------------------


def trainer(composer: Any, seen: list[float], **options: Any) -> Any:
    """A Trainer of a small network on shuffled rows, which notes the rows of every batch that it trains on."""

    class Net(composer.ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(8, 4)

        def forward(self, batch: Any) -> torch.Tensor:
            seen.append(float(batch[0][0, 0]))
            found: torch.Tensor = self.net(batch[0])
            return found

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(outputs, batch[1])

    torch.manual_seed(0)
    inputs = torch.randn(77, 8)
    model = Net()
    rows = torch.utils.data.TensorDataset(inputs, inputs[:, :4] + 0.1)
    return composer.Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        schedulers=composer.optim.LinearScheduler(),
        device="cpu",
        progress_bar=False,
        seed=1,
        **{"max_duration": "4ep", **options},
    )


@pytest.mark.filterwarnings("ignore")
def test_composer_resumes_a_forecast_at_its_batch_rate_and_data(tmp_path: Path) -> None:
    composer = pytest.importorskip("composer", exc_type=ImportError)
    real: list[float] = []
    trainer(composer, real, save_folder=str(tmp_path / "run"), save_interval="4ba").fit()
    there = torch.load(tmp_path / "run" / "ep3-ba36-rank0.pt", weights_only=False)["state"]
    for path in (tmp_path / "run").iterdir():
        if path.is_symlink() or int(path.name.split("ba")[1].split("-")[0]) > 28:
            path.unlink()
    path = forecast(tmp_path / "run", 8)
    assert path.name == "ep3-ba36-rank0.pt"
    saved = torch.load(path, weights_only=False)["state"]
    stamps = [one["timestamp"]["Timestamp"] for one in (saved, there)]
    assert [stamps[0][key] for key in counts(36)] == [stamps[1][key] for key in counts(36)]
    assert saved["schedulers"]["LambdaLR"]["last_epoch"] == there["schedulers"]["LambdaLR"]["last_epoch"]
    rates = [one["optimizers"]["AdamW"]["param_groups"][0]["lr"] for one in (saved, there)]
    assert rates[0] == pytest.approx(rates[1])
    again: list[float] = []
    resumed = trainer(composer, again, load_path=str(path))
    assert resumed.state.timestamp.batch.value == 36
    resumed.fit()
    assert again == real[36:]
    assert resumed.state.timestamp.batch.value == 40
