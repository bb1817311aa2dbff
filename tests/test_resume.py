"""A trainer that resumes from a forecast is where an uninterrupted run would be, but for the weights."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from farcast_cli.errors import UsageError
from farcast_cli.run.trajectory import discover
from farcast_cli.state.advance import advance, advance_batch_counts
from farcast_cli.state.counters import epoch_at, extrapolate, in_epochs, is_steady
from tests.tiny import SAMPLES, fit_run, predict_run, sample_maker

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted
    from tests.conftest import CallCli

HORIZON = 100  # the runs' own distance between snapshots, so that the truth of the valid step is on disk
RESUMED = 20  # steps trained after the leap
HF_ORIGIN, HF_TRUTH = SAMPLES / "huggingface" / "checkpoint-1200", SAMPLES / "truth" / "huggingface" / "checkpoint-1300"
PLAIN_ORIGIN, PLAIN_TRUTH = SAMPLES / "plain" / "step_1600.pt", SAMPLES / "truth" / "plain" / "step_1700.pt"


@pytest.fixture(scope="module")
def plain() -> Fitted:
    return fit_run(SAMPLES / "plain")


@pytest.fixture(scope="module")
def huggingface() -> Fitted:
    return fit_run(SAMPLES / "huggingface")


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _predicted(fitted: Fitted, output: Path, **request: Any) -> Path:
    (outcome,) = predict_run(fitted, output, horizons=[HORIZON], **request)
    assert outcome.path == output
    return output


def _same(first: Any, second: Any) -> bool:
    """Deep equality of object trees, tensors by type and bits."""
    if isinstance(first, torch.Tensor):
        return bool(isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and list(first) == list(second)
            and all(_same(item, second[key]) for key, item in first.items())
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and bool(first == second)


# --- counters --------------------------------------------------------------------------------------------------------


@given(rate=st.integers(1, 10**7), first=st.integers(0, 10**6), every=st.integers(1, 10**4), horizon=st.integers(1, 10**6))
def test_a_counter_in_whole_units_per_step_is_extrapolated_exactly(rate: int, first: int, every: int, horizon: int) -> None:
    series = [(first + i * every, rate * (first + i * every)) for i in range(4)]
    assert extrapolate(series, series[-1][0] + horizon) == rate * (series[-1][0] + horizon)


def test_a_counter_beyond_the_precision_of_floats_keeps_its_last_digit() -> None:
    tokens = 2**60 + 1
    series = [(100, tokens), (200, tokens + 100 * 524_289)]
    assert extrapolate(series, 1200) == tokens + 1100 * 524_289


@given(length=st.integers(1, 500), every=st.integers(1, 300), horizon=st.integers(1, 5000))
def test_an_epoch_is_the_number_of_whole_epochs_done_or_is_left_alone(length: int, every: int, horizon: int) -> None:
    """Whatever the epoch's length in steps: the answer is right or it is withheld."""
    steps = [every * i for i in range(1, 7)]
    answer = epoch_at([(step, step // length) for step in steps], steps[-1] + horizon)
    assert answer in {None, (steps[-1] + horizon) // length}


def test_an_epoch_counter_that_tells_its_length_is_moved() -> None:
    """Epochs of 25 steps: 24 < E <= 25 follows from the values alone."""
    assert epoch_at([(24, 0), (25, 1), (49, 1), (100, 4)], 130) == 5


def _batches_done(step: int, *, per_epoch: int, accumulated: int) -> int:
    """A training loop's own count: so many batches make a step, and fewer at an epoch's end."""
    batches = 0
    for _ in range(step):
        batches += min(accumulated, per_epoch - batches % per_epoch)
    return batches


@given(
    per_epoch=st.integers(2, 40),
    accumulated=st.integers(2, 6),
    every=st.integers(1, 12),
    horizon=st.integers(1, 100),
    before=st.integers(0, 50),
)
def test_a_count_of_batches_knows_the_shorter_step_at_an_epochs_end_or_is_withheld(
    per_epoch: int, accumulated: int, every: int, horizon: int, before: int
) -> None:
    def count(step: int) -> int:
        return before + _batches_done(step, per_epoch=per_epoch, accumulated=accumulated)

    series = [(step, count(step)) for step in range(every * 3, every * 11, every)]
    if not is_steady(series):  # or it would not be asked
        target = series[-1][0] + horizon
        assert in_epochs(series, target) in {None, count(target)}


@pytest.mark.parametrize("horizon", [1, 2, 8, 30])
def test_a_share_of_an_epoch_knows_the_shorter_step_at_its_end(horizon: int) -> None:
    """Ten batches an epoch, four of them a step, as a Trainer counts: 0.4, 0.8, 1.0, 1.4, ..."""
    series = [(step, _batches_done(step, per_epoch=10, accumulated=4) / 10) for step in range(12, 44, 4)]
    found = in_epochs(series, 40 + horizon)
    assert found is not None
    assert float(found) == pytest.approx(_batches_done(40 + horizon, per_epoch=10, accumulated=4) / 10, rel=1e-12)


def test_a_step_at_an_epochs_end_that_is_shorter_moves_all_counts_of_a_loop_exactly(tmp_path: Path) -> None:
    def counts(step: int) -> dict[str, Any]:
        batches = _batches_done(step, per_epoch=10, accumulated=4)
        return {"step": step, "epoch": batches / 10, "batches": batches, "examples": 16 * batches}

    def model(step: int) -> dict[str, torch.Tensor]:
        batches = torch.tensor(_batches_done(step, per_epoch=10, accumulated=4))
        return {"w": torch.full((3,), float(step)), "bn.num_batches_tracked": batches}

    _payload_run(tmp_path, {step: {**counts(step), "model": model(step)} for step in range(5, 45, 5)})
    snapshots = discover(tmp_path).snapshots
    tree = advance(snapshots, 7).trees[""].tree
    assert {key: value for key, value in tree.items() if key != "model"} == counts(47)
    assert advance_batch_counts(snapshots, 7)["bn.num_batches_tracked"].new == counts(47)["batches"]


def test_a_count_kept_as_a_float_moves_and_a_measured_float_stays(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 2.0, 30: 4.0, 40: 1.0}
    _payload_run(
        tmp_path,
        {
            step: {"model": {"w": torch.full((3,), float(step))}, "step": step, "tokens": 512.0 * step, "loss": losses[step]}
            for step in losses
        },
    )
    result = advance(discover(tmp_path).snapshots, 5)
    tree = result.trees[""].tree
    assert (tree["step"], tree["tokens"], tree["loss"]) == (45, 23040.0, 1.0)
    assert isinstance(tree["tokens"], float)
    assert result.notes == []  # a loss is not a counter that was left behind


def _payload_run(folder: Path, payloads: dict[int, dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for step, payload in payloads.items():
        torch.save({"model": {"w": torch.full((3,), float(step))}, **payload}, folder / f"step_{step}.pt")
    return folder


def test_counters_move_and_settings_measurements_and_best_values_stay(tmp_path: Path) -> None:
    run = _payload_run(
        tmp_path,
        {
            step: {
                "step": step,
                "epoch": step // 25,
                "tokens_seen": step * 8192,
                "micro_batches": step * 4,
                "train_loss": 2.0 / step,
                "best_loss": 1.0 / step,
                "best_step": step - 10,
                "patience_left": {100: 3, 120: 2, 140: 1, 160: 3}[step],
                "done": False,
                "config": {"layers": 4, "warmup": 100, "name": "tiny", "epochs": 12},
            }
            for step in (100, 120, 140, 160)
        },
    )
    result = advance(discover(run).snapshots, 40)
    tree = {key: value for key, value in result.trees[""].tree.items() if key != "model"}
    assert tree == {
        "step": 200,
        "epoch": 8,
        "tokens_seen": 200 * 8192,
        "micro_batches": 800,
        "train_loss": 2.0 / 160,
        "best_loss": 1.0 / 160,
        "best_step": 150,
        "patience_left": 3,
        "done": False,
        "config": {"layers": 4, "warmup": 100, "name": "tiny", "epochs": 12},
    }
    assert any("patience_left stays at 3" in note for note in result.notes)
    assert {change.where for change in result.changes} == {
        f"step_160.pt: {key}" for key in ("step", "epoch", "tokens_seen", "micro_batches")
    }


def test_a_counter_kept_as_a_tensor_is_moved_like_a_number(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        payload = {"iteration": torch.tensor(step), "tokens": torch.tensor([step * 512]), "ids": torch.arange(3)}
        _payload_run(tmp_path / "run", {step: payload})
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[20])
    saved = _load(tmp_path / "out.pt")
    assert torch.equal(saved["iteration"], torch.tensor(80))
    assert torch.equal(saved["tokens"], torch.tensor([80 * 512]))
    assert torch.equal(saved["ids"], torch.arange(3))


def test_a_loss_scalers_count_of_good_steps_stays_below_the_number_at_which_it_starts_over(tmp_path: Path) -> None:
    """The scaler compares for equality: past its interval it would never grow again."""
    settings = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    payloads = {step: {"step": step, "scaler": {**settings, "_growth_tracker": step}} for step in (400, 600, 800, 1000)}
    result = advance(discover(_payload_run(tmp_path, payloads)).snapshots, 1500)
    scaler = result.trees[""].tree["scaler"]
    assert 0 <= scaler.pop("_growth_tracker") < 2000
    assert scaler == settings


def test_the_snapshots_themselves_are_not_changed(tmp_path: Path) -> None:
    snapshots = discover(_payload_run(tmp_path, {step: {"step": step} for step in (10, 20, 30)})).snapshots
    advance(snapshots, 10)
    assert snapshots[-1].parts[0].content.tree["step"] == 30  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({10: 10, 20: 20, 30: 30, 40: 40}, 70),
        ({10: 10, 20: 18, 30: 28, 40: 38}, 68),  # a loss scaler skipped two steps, early
        ({10: 10, 20: 20, 30: 30, 40: 38}, 62),  # ... and late: the last interval's rate of .8 holds
    ],
)
def test_adams_own_step_moves_on_from_where_it_is(counts: dict[int, int], expected: int, tmp_path: Path) -> None:
    payloads: dict[int, dict[str, Any]] = {}
    for step, count in counts.items():
        state = {i: {"step": torch.tensor(float(count)), "exp_avg": torch.ones(3)} for i in range(2)}
        payloads[step] = {"step": step, "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}}
    _payload_run(tmp_path / "run", payloads)
    for step in (50, 60):  # six snapshots make a run to fit; the origin is step 40
        _payload_run(tmp_path / "run", {step: payloads[40] | {"step": step}})
    fitted = fit_run(tmp_path / "run")
    predict_run(fitted, tmp_path / "out.pt", horizons=[30], origin_step=40)
    entries = _load(tmp_path / "out.pt")["optimizer"]["state"]
    assert {key: entry["step"].item() for key, entry in entries.items()} == {0: float(expected), 1: float(expected)}
    assert entries[0]["step"].dtype == torch.float32


def test_batch_counts_move_by_their_own_rate(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        state = {"bn.running_mean": torch.ones(2) * step, "bn.num_batches_tracked": torch.tensor(4 * step)}
        torch.save(state, tmp_path / f"step_{step}.pt")
    (change,) = advance_batch_counts(discover(tmp_path).snapshots, 15).values()
    assert (change.where, change.old, change.new) == ("bn.num_batches_tracked", 120, 180)


def test_a_counter_among_the_weights_moves_and_other_whole_numbers_stay(tmp_path: Path) -> None:
    """As `n_averaged` of torch's AveragedModel, or a module's own count of its calls."""
    for step in range(10, 70, 10):
        state = {
            "w": torch.ones(2) * step,
            "n_averaged": torch.tensor(step // 5),
            "layers": torch.tensor(4),
            "last_label": torch.tensor(step * step % 7),
            "ids": torch.tensor([step, step]),
        }
        torch.save(state, tmp_path / f"step_{step}.pt")
    moved = advance_batch_counts(discover(tmp_path).snapshots, 15)
    assert {name: (change.old, change.new) for name, change in moved.items()} == {"n_averaged": (12, 15)}


def test_what_a_data_loader_pickled_for_itself_is_copied_and_said_where_it_changes(tmp_path: Path) -> None:
    def loader(step: int) -> dict[str, bytes]:
        return {"dp_rank_0": pickle.dumps({"index": step, "order": [step % 7, step % 11]}), "format": b"v1"}

    _payload_run(tmp_path, {step: {"step": step, "dataloader": loader(step)} for step in (10, 20, 30)})
    result = advance(discover(tmp_path).snapshots, 10)
    assert result.trees[""].tree["dataloader"] == loader(30)
    (note,) = result.notes
    assert note.startswith("step_30.pt: dataloader.dp_rank_0 is copied as the origin has it")


@pytest.mark.parametrize(
    ("horizon", "epoch", "samples"), [(10, 3, 80), (5, 3, 40), (30, 4, 80), (40, 4, 160), (41, 5, 8)], ids=str
)
def test_a_loaders_samples_start_again_with_its_epochs(horizon: int, epoch: int, samples: int, tmp_path: Path) -> None:
    """As litdata's in litgpt: 160 samples an epoch, 8 a step; at its end the epoch has all of them."""

    def loader(step: int) -> dict[str, Any]:
        seen = {"current_epoch": (8 * step - 1) // 160 + 1, "num_samples_yielded": (8 * step - 1) % 160 + 1}
        return {"dataset": {**seen, "batch_size": 4}, **seen, "latest_worker_idx": 0}

    _payload_run(tmp_path, {step: {"step_count": step, "train_dataloader": loader(step)} for step in range(5, 41, 5)})
    result = advance(discover(tmp_path).snapshots, horizon)
    assert result.trees[""].tree["train_dataloader"] == loader(40 + horizon)
    assert loader(40 + horizon)["dataset"] == {"current_epoch": epoch, "num_samples_yielded": samples, "batch_size": 4}
    assert result.notes == []


def test_a_loader_whose_epochs_differ_in_length_stays(tmp_path: Path) -> None:
    seen = {10: (1, 80), 20: (1, 160), 30: (2, 80), 40: (3, 0), 50: (3, 80), 60: (4, 40)}
    states = {step: {"step": step, "loader": {"epoch": epoch, "samples": samples}} for step, (epoch, samples) in seen.items()}
    _payload_run(tmp_path, states)
    result = advance(discover(tmp_path).snapshots, 10)
    assert result.trees[""].tree["loader"]["samples"] == 40
    assert any("loader.samples stays at 40" in note for note in result.notes)


@pytest.mark.parametrize("falls", [True, False])
def test_a_rate_that_moves_without_a_schedule_in_the_file_is_left_and_said(falls: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """As nanoGPT, which sets it at each step; a loop that does not would resume at the old one."""
    for step in range(10, 50, 10):
        group = {"lr": 1e-3 / step if falls else 1e-3, "params": [0]}
        _payload_run(tmp_path, {step: {"step": step, "optimizer": {"state": {}, "param_groups": [group]}}})
    result = advance(discover(tmp_path).snapshots, 10)
    assert result.trees[""].tree["optimizer"]["param_groups"] == [group]
    expected = "step_40.pt: the learning rate stays at 2.5e-05: no schedule is saved; a loop that sets the rate at each step corrects it"
    assert result.notes == ([expected] if falls else [])


def test_a_rate_without_a_schedule_is_found_where_the_groups_say_what_they_began_with(tmp_path: Path) -> None:
    """As mmengine's, whose schedules compute each rate from the one before: one that stayed would stay wrong to the end."""

    def state(step: int) -> dict[str, Any]:
        rate = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step - 20) / 180)) / 2
        return {"state": {}, "param_groups": [{"lr": rate, "initial_lr": 1e-3, "params": [0]}]}

    schedule = {"last_step": 0, "begin": 20, "end": 200, "_last_value": [1e-3]}
    payloads = {step: {"iter": step, "optimizer": state(step), "param_schedulers": [schedule]} for step in range(30, 101, 10)}
    _payload_run(tmp_path, payloads)
    result = advance(discover(tmp_path).snapshots, 50)
    (group,) = result.trees[""].tree["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(state(150)["param_groups"][0]["lr"], rel=1e-9)
    assert result.notes == [
        "optimizer: its rate at the valid step is computed from the rates of the last snapshots: check the first resumed step"
    ]


def test_a_learning_rate_that_is_a_tensor_is_moved_like_a_number(tmp_path: Path) -> None:
    """Optimisers that are compiled keep their rate in a tensor."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
    for step in range(1, 61):
        weight.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            payload = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "step": step}
            _payload_run(tmp_path / "run", {step: payload})
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[30])
    saved = _load(tmp_path / "out.pt")
    assert float(saved["optimizer"]["param_groups"][0]["lr"]) == pytest.approx(0.1 * 0.5**4, rel=1e-7)  # float32
    assert saved["scheduler"]["last_epoch"] == 90


# --- a hand-written loop ---------------------------------------------------------------------------------------------


def test_a_plain_loop_resumes_at_the_valid_step_with_the_learning_rates_of_the_uninterrupted_run(
    tmp_path: Path, call_cli: CallCli
) -> None:
    """With the real commands; equal to the last bit at every later step."""
    assert call_cli("fit", SAMPLES / "plain", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", HORIZON, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "forecasts/plain/step_1700.pt\n")
    log = sample_maker().resume_plain(tmp_path / "forecasts" / "plain" / "step_1700.pt", num_steps=RESUMED)
    original = sample_maker().resume_plain(PLAIN_ORIGIN, num_steps=HORIZON + RESUMED)[HORIZON:]
    assert [(step, rate) for step, rate, _ in log] == [(step, rate) for step, rate, _ in original]


def test_all_but_weights_moments_and_the_mark_is_what_the_uninterrupted_loop_saved(plain: Fitted, tmp_path: Path) -> None:
    forecast, truth = _load(_predicted(plain, tmp_path / "out.pt")), _load(PLAIN_TRUTH)
    assert forecast["optimizer"]["param_groups"][0].pop("farcast_leaps") == [[1700, 1600, 1700]]
    assert _same(forecast["scheduler"], truth["scheduler"])
    assert _same(forecast["optimizer"]["param_groups"], truth["optimizer"]["param_groups"])
    assert forecast["step"] == truth["step"]
    for key, entry in truth["optimizer"]["state"].items():
        assert _same(forecast["optimizer"]["state"][key]["step"], entry["step"])
    assert list(forecast) == list(truth)
    assert list(forecast["model"]) == list(truth["model"])
    assert type(forecast["model"]) is type(truth["model"])
    assert forecast["model"]._metadata == truth["model"]._metadata  # versions of modules, on an attribute of the dict


def test_with_the_true_weights_and_moments_put_in_a_resumed_loop_repeats_the_run_bit_by_bit(
    plain: Fitted, tmp_path: Path
) -> None:
    forecast, truth = _load(_predicted(plain, tmp_path / "out.pt", method="persistence")), _load(PLAIN_TRUTH)
    del forecast["optimizer"]["param_groups"][0]["farcast_leaps"]
    forecast["model"] = truth["model"]
    for key, entry in forecast["optimizer"]["state"].items():
        entry |= {name: truth["optimizer"]["state"][key][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.save(forecast, tmp_path / "oracle.pt")
    log = sample_maker().resume_plain(tmp_path / "oracle.pt", num_steps=100, save_to=tmp_path / "end.pt")
    # the run's own next snapshot was trained on another processor, whose last bits differ
    assert log == sample_maker().resume_plain(PLAIN_TRUTH, num_steps=100, save_to=tmp_path / "true_end.pt")
    assert _same(_load(tmp_path / "end.pt"), _load(tmp_path / "true_end.pt"))


@pytest.mark.parametrize("mode", ["copy", "zero-momentum", "reset"])
def test_whatever_becomes_of_the_moments_a_plain_loop_keeps_its_learning_rates(
    mode: str, plain: Fitted, tmp_path: Path
) -> None:
    log = sample_maker().resume_plain(_predicted(plain, tmp_path / "out.pt", optimizer=mode), num_steps=3)
    original = sample_maker().resume_plain(PLAIN_TRUTH, num_steps=3)
    assert [(step, rate) for step, rate, _ in log] == [(step, rate) for step, rate, _ in original]


def test_a_plain_payload_can_be_written_without_its_optimizer(plain: Fitted, tmp_path: Path) -> None:
    forecast = _load(_predicted(plain, tmp_path / "out.pt", optimizer="drop"))
    assert list(forecast) == ["model", "scheduler", "step"]
    assert forecast["step"] == 1700


def test_a_plain_payload_whose_counters_are_kept_differs_from_the_origin_in_weights_and_the_mark_alone(
    plain: Fitted, tmp_path: Path
) -> None:
    forecast, origin = _load(_predicted(plain, tmp_path / "out.pt", counters="keep")), _load(PLAIN_ORIGIN)
    weights = forecast.pop("model"), origin.pop("model")
    ((kept, began, _),) = forecast["optimizer"]["param_groups"][0].pop("farcast_leaps")
    assert kept == began == origin["step"]
    assert _same(forecast, origin)
    assert not _same(*weights)


# --- the Hugging Face Trainer ----------------------------------------------------------------------------------------


def _resume(checkpoint: Path, output: Path, *, num_steps: int) -> tuple[Any, list[float]]:
    """A real Trainer, resumed for so many steps; it, and the learning rate that every step used."""
    from transformers import TrainerCallback

    rates: list[float] = []

    class Rates(TrainerCallback):
        """Notes the learning rate that a step is about to use."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control
            rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    trainer = sample_maker().huggingface_trainer(output, logging_steps=1, stop_at=step + num_steps)
    trainer.args.save_strategy = "no"
    trainer.add_callback(Rates())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer, rates


def _log(trainer: Any, after: int) -> list[dict[str, float]]:
    """The log of the steps trained here, without the summary at the end."""
    return [entry for entry in trainer.state.log_history if entry["step"] > after and "loss" in entry]


def test_a_trainer_resumes_at_the_valid_step_with_the_learning_rates_of_the_uninterrupted_run(
    huggingface: Fitted, tmp_path: Path
) -> None:
    """Equal to the last bit at every later step, the first one included."""
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300")
    original, expected = _resume(HF_ORIGIN, tmp_path / "original", num_steps=HORIZON + RESUMED)
    resumed, rates = _resume(forecast, tmp_path / "resumed", num_steps=RESUMED)
    assert rates == expected[HORIZON:]
    found, wanted = _log(resumed, 1300), _log(original, 1300)
    assert [entry["step"] for entry in found] == list(range(1301, 1301 + RESUMED))
    assert [entry["learning_rate"] for entry in found] == [entry["learning_rate"] for entry in wanted]
    assert [entry["epoch"] for entry in found] == [entry["epoch"] for entry in wanted]
    assert resumed.state.global_step == 1300 + RESUMED
    counts = {float(entry["step"]) for entry in resumed.optimizer.state.values()}
    assert counts == {1300.0 + RESUMED}
    earlier = json.loads((HF_ORIGIN / "trainer_state.json").read_text())["log_history"]
    assert resumed.state.log_history[: len(earlier)] == earlier


def test_all_of_a_trainers_state_but_its_log_is_what_the_uninterrupted_run_saved(huggingface: Fitted, tmp_path: Path) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300")
    state, truth = (json.loads((path / "trainer_state.json").read_text()) for path in (forecast, HF_TRUTH))
    origin = json.loads((HF_ORIGIN / "trainer_state.json").read_text())
    mark = {"step": 1300, "farcast_leap_from": 1200, "farcast_leap_to": 1300}
    assert state.pop("log_history") == [*origin["log_history"], mark]
    assert truth.pop("log_history")
    assert state.pop("epoch") == pytest.approx(truth.pop("epoch"), rel=1e-11)  # extrapolated to 12 digits
    assert state.pop("total_flos") == pytest.approx(truth.pop("total_flos"), rel=1e-3)  # an epoch's last batch is smaller
    assert state == truth
    assert _same(_load(forecast / "scheduler.pt"), _load(HF_TRUTH / "scheduler.pt"))
    optimizer, expected = _load(forecast / "optimizer.pt"), _load(HF_TRUTH / "optimizer.pt")
    assert _same(optimizer["param_groups"], expected["param_groups"])
    assert {float(entry["step"]) for entry in optimizer["state"].values()} == {1300.0}


def test_with_the_true_weights_and_moments_put_in_a_resumed_trainer_repeats_the_run_bit_by_bit(
    huggingface: Fitted, tmp_path: Path
) -> None:
    """So the data that the Trainer skips to are the right ones as well."""
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300", method="persistence")
    shutil.copyfile(HF_TRUTH / "model.safetensors", forecast / "model.safetensors")
    optimizer, truth = _load(forecast / "optimizer.pt"), _load(HF_TRUTH / "optimizer.pt")
    for key, entry in optimizer["state"].items():
        entry |= {name: truth["state"][key][name] for name in ("exp_avg", "exp_avg_sq")}
    torch.save(optimizer, forecast / "optimizer.pt")
    original, _ = _resume(HF_TRUTH, tmp_path / "original", num_steps=RESUMED)
    resumed, _ = _resume(forecast, tmp_path / "resumed", num_steps=RESUMED)
    assert [entry["loss"] for entry in _log(resumed, 1300)] == [entry["loss"] for entry in _log(original, 1300)]
    assert _same(dict(resumed.model.state_dict()), dict(original.model.state_dict()))


def test_files_that_hold_no_step_are_taken_over_byte_by_byte(huggingface: Fitted, tmp_path: Path) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300")
    for name in ("rng_state.pth", "training_args.bin", "config.json"):
        assert (forecast / name).read_bytes() == (HF_ORIGIN / name).read_bytes()
    assert {path.name for path in forecast.iterdir()} == {path.name for path in HF_ORIGIN.iterdir()} | {"farcast.json"}


def test_kept_counters_leave_every_number_of_the_trainer_and_the_leap_is_marked_in_its_log(
    huggingface: Fitted, tmp_path: Path
) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300", counters="keep")
    for name in ("optimizer.pt", "scheduler.pt"):
        assert _same(_load(forecast / name), _load(HF_ORIGIN / name))
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (forecast, HF_ORIGIN)]
    assert states[0]["log_history"].pop() == {"step": 1200, "farcast_leap_from": 1200, "farcast_leap_to": 1300}
    assert states[0] == states[1]
    assert not _same(load_file(forecast / "model.safetensors"), load_file(HF_ORIGIN / "model.safetensors"))


def _moments(folder: Path, name: str) -> dict[Any, torch.Tensor]:
    return {key: entry[name] for key, entry in _load(folder / "optimizer.pt")["state"].items()}


def test_copied_moments_are_the_origins_bit_by_bit(huggingface: Fitted, tmp_path: Path) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300")
    for name in ("exp_avg", "exp_avg_sq"):
        assert _same(_moments(forecast, name), _moments(HF_ORIGIN, name))


def test_zero_momentum_empties_the_first_moments_alone(huggingface: Fitted, tmp_path: Path) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300", optimizer="zero-momentum")
    assert all(not moment.any() for moment in _moments(forecast, "exp_avg").values())
    assert {key: moment.shape for key, moment in _moments(forecast, "exp_avg").items()} == {
        key: moment.shape for key, moment in _moments(HF_ORIGIN, "exp_avg").items()
    }
    assert _same(_moments(forecast, "exp_avg_sq"), _moments(HF_ORIGIN, "exp_avg_sq"))


def test_zero_momentum_empties_the_momentum_of_sgd(tmp_path: Path) -> None:
    weights = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    for step in range(1, 61):
        weights.grad = torch.arange(1.0, 5.0)
        optimizer.step()
        if step % 10 == 0:
            _payload_run(tmp_path / "run", {step: {"optimizer": optimizer.state_dict(), "step": step}})
    fitted = fit_run(tmp_path / "run")
    for mode, is_kept in (("copy", True), ("zero-momentum", False)):
        predict_run(fitted, tmp_path / f"{mode}.pt", horizons=[20], optimizer=mode)
        (entry,) = _load(tmp_path / f"{mode}.pt")["optimizer"]["state"].values()
        assert torch.equal(entry["momentum_buffer"], optimizer.state[weights]["momentum_buffer"] * is_kept)


def test_a_reset_optimizer_starts_afresh_at_the_right_learning_rate(huggingface: Fitted, tmp_path: Path) -> None:
    forecast = _predicted(huggingface, tmp_path / "checkpoint-1300", optimizer="reset")
    saved = _load(forecast / "optimizer.pt")
    assert saved["state"] == {}
    assert _same(saved["param_groups"], _load(HF_TRUTH / "optimizer.pt")["param_groups"])
    trainer, rates = _resume(forecast, tmp_path / "resumed", num_steps=3)
    assert rates == _resume(HF_TRUTH, tmp_path / "original", num_steps=3)[1]
    assert {float(entry["step"]) for entry in trainer.optimizer.state.values()} == {3.0}


def test_a_dropped_optimizer_leaves_no_file_and_says_what_that_does(huggingface: Fitted, tmp_path: Path) -> None:
    (outcome,) = predict_run(huggingface, tmp_path / "checkpoint-1300", horizons=[HORIZON], optimizer="drop")
    assert not (tmp_path / "checkpoint-1300" / "optimizer.pt").exists()
    assert (tmp_path / "checkpoint-1300" / "scheduler.pt").is_file()
    assert any("restarts the learning rate" in note for note in outcome.notes)


@pytest.fixture
def nearly_done(tmp_path: Path) -> Path:
    """The sample run as if it were planned to end at step 1300."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "huggingface", run)
    for path in run.glob("*/trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_steps": 1300}))
    return run


@pytest.mark.parametrize("horizon", [100, 101])
def test_a_leap_to_the_end_of_the_run_or_past_it_is_refused_with_the_number(
    horizon: int, nearly_done: Path, tmp_path: Path, call_cli: CallCli
) -> None:
    """A Trainer would train nothing and exit happily."""
    assert call_cli("fit", nearly_done, cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", horizon, cwd=tmp_path)
    assert done.returncode == 2
    assert f"step {1200 + horizon}" in done.errors[0]
    assert "max_steps = 1300" in done.errors[0]
    assert "--horizon 99 " in done.hints[0]
    assert done.stdout == ""
    assert not (tmp_path / "forecasts").exists()


def test_the_last_step_but_one_of_a_run_can_be_leapt_to(nearly_done: Path, tmp_path: Path) -> None:
    (outcome,) = predict_run(fit_run(nearly_done), tmp_path / "checkpoint-1299", horizons=[99])
    assert outcome.valid_step == 1299


def test_a_horizon_that_is_proposed_leaves_half_of_the_steps_that_the_run_has_left(nearly_done: Path, tmp_path: Path) -> None:
    fitted = fit_run(nearly_done)
    (outcome,) = predict_run(fitted, tmp_path / "checkpoint-1250", horizons=[])
    assert (outcome.horizon, outcome.valid_step) == (50, 1250)
    (kept,) = predict_run(fitted, tmp_path / "kept", horizons=[], counters="keep")
    assert kept.horizon > 100  # the trainer's counters stay, and so do the steps that are left


@pytest.mark.parametrize("request_", [{"counters": "keep"}, {"purpose": "evaluation"}])
def test_a_leap_of_the_weights_alone_may_reach_past_the_end(
    request_: dict[str, Any], nearly_done: Path, tmp_path: Path
) -> None:
    (outcome,) = predict_run(fit_run(nearly_done), tmp_path / "checkpoint-1400", horizons=[200], **request_)
    assert outcome.path is not None


def test_several_horizons_are_refused_together_when_one_is_past_the_end(nearly_done: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_steps = 1300"):
        predict_run(fit_run(nearly_done), tmp_path / "out", horizons=[50, 150])
    assert not (tmp_path / "out").exists()


# --- found by trying it ----------------------------------------------------------------------------------------------


def test_a_counter_that_is_an_element_of_a_larger_tensor_moves_and_leaves_the_others(tmp_path: Path) -> None:
    """torch.save writes a view's whole storage; two counters and a history may share one."""
    for step in range(10, 70, 10):
        shared = torch.arange(10) * 0 + 7
        shared[2], shared[3] = step * 512, step * 3
        _payload_run(tmp_path / "run", {step: {"tokens_seen": shared[2], "docs": shared[3], "all": shared, "step": step}})
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.pt", horizons=[20])
    saved = _load(tmp_path / "out.pt")
    assert (int(saved["tokens_seen"]), int(saved["docs"])) == (80 * 512, 80 * 3)
    assert saved["all"].tolist() == [7, 7, 80 * 512, 80 * 3, 7, 7, 7, 7, 7, 7]


def _scheduled_run(folder: Path, counts: dict[int, int]) -> Path:
    """A linear decay by a LambdaLR-free schedule, stepped `counts[step]` times by each step."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 3000)
    done = 0
    for step, count in counts.items():
        for _ in range(count - done):
            optimizer.step()
            schedule.step()
        done = count
        payload = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "step": step}
        _payload_run(folder, {step: payload})
    return folder


def test_a_schedule_that_missed_a_step_where_the_loss_scaler_skipped_one_is_moved_on_all_the_same(tmp_path: Path) -> None:
    run = _scheduled_run(tmp_path, {500: 500, 600: 600, 700: 700, 800: 800, 900: 899, 1000: 999})
    result = advance(discover(run).snapshots, 500)
    tree = result.trees[""].tree
    assert tree["scheduler"]["last_epoch"] == 1499
    assert tree["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * (1 - 0.9 * 1499 / 3000), rel=1e-9)


def test_a_schedule_stepped_once_an_epoch_that_does_not_end_at_a_snapshot_is_moved_on_by_whole_epochs(tmp_path: Path) -> None:
    run = _scheduled_run(tmp_path, {step: step // 150 for step in range(100, 1100, 100)})
    result = advance(discover(run).snapshots, 500)
    assert result.trees[""].tree["scheduler"]["last_epoch"] == 10


def test_a_leap_past_the_end_of_a_one_cycle_schedule_is_refused_with_the_reason(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 130)
    for step in range(1, 101):
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            payload = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "step": step}
            _payload_run(tmp_path, {step: payload})
    with pytest.raises(UsageError, match="schedule ends before the valid step"):
        advance(discover(tmp_path).snapshots, 40)


@pytest.mark.parametrize("key", ["early_stopping_patience_counter", "batch_in_epoch", "steps_since_eval", "num_bad_epochs"])
def test_what_starts_again_from_zero_is_left_and_said(key: str, tmp_path: Path) -> None:
    run = _payload_run(tmp_path, {step: {"step": step, key: step // 10} for step in (10, 20, 30, 40)})
    result = advance(discover(run).snapshots, 20)
    assert result.trees[""].tree[key] == 4
    assert any(f"{key} stays at 4" in note for note in result.notes)


def test_a_second_network_and_an_average_of_the_weights_are_listed_as_copied(tmp_path: Path) -> None:
    payloads = {
        step: {"step": step, "disc": {"w": torch.full((4,), float(step))}, "ema": {"w": torch.full((3,), float(step))}}
        for step in range(10, 70, 10)
    }
    fitted = fit_run(_payload_run(tmp_path / "run", payloads))
    listed = {record.name: record.reason for record in fitted.provenance.copied}
    assert {"disc.*", "ema.*"} <= listed.keys()
    assert "not forecast" in listed["disc.*"]
    assert "moves with them" in listed["ema.*"]


def test_a_device_in_a_payload_comes_back_as_one(tmp_path: Path) -> None:
    payloads = {step: {"step": step, "device": torch.device("cpu")} for step in range(10, 70, 10)}
    predict_run(fit_run(_payload_run(tmp_path / "run", payloads)), tmp_path / "out.pt", horizons=[20])
    assert _load(tmp_path / "out.pt")["device"] == torch.device("cpu")
