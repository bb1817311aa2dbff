"""Leaps in a real Hugging Face Trainer: the live model gets the forecast's weights, and everything else stays."""

from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from farcast_cli.errors import FarcastError, UsageError
from farcast_cli.forecast.memory import read_memory
from farcast_cli.hf import LeapCallback
from tests.rounds import regression_trainer, train_by_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import CallCli

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # the base model is not on the hub
]
EVERY = 10
NOWHERE = {"FARCAST_STATE_DIR": ""}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARCAST_STATE_DIR", "")


def language_model() -> torch.nn.Module:
    """A transformer whose embedding is tied to its head, with dropout."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def texts() -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards: easy to learn."""
    rows = (torch.arange(start, start + 12) % 32 for start in range(64))
    return [{"input_ids": row, "labels": row} for row in rows]


class Normed(torch.nn.Module):
    """A layer with BatchNorm, and the loss as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.layers(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


def normed() -> torch.nn.Module:
    torch.manual_seed(0)
    return Normed()


def vectors() -> list[dict[str, torch.Tensor]]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return [{"inputs": one, "labels": one[:1] * 2} for one in inputs]


class Stop(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends the training at a step, as a crash does: without a save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_training_stop = state.global_step == self.step
        if control.should_training_stop:
            control.should_save = False


def trainer_of(
    model: torch.nn.Module, rows: Any, *callbacks: Any, stop_at: int = 100, max_steps: int = 100, **arguments: Any
) -> Any:
    """A Trainer of `max_steps` steps that keeps one checkpoint in `run`."""
    chosen: dict[str, Any] = {"save_strategy": "no", "learning_rate": 1e-3, "lr_scheduler_type": "constant"} | arguments
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="run",
            max_steps=max_steps,
            per_device_train_batch_size=16,
            save_total_limit=1,
            logging_steps=EVERY,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **chosen,
        ),
        train_dataset=rows,
        callbacks=[*callbacks, Stop(stop_at)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(
    model: torch.nn.Module,
    rows: Any,
    *,
    resume: bool | str | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A Trainer that has trained with leaps, or without any if there are no options."""
    trainer = trainer_of(model, rows, **arguments)
    if options is not None:
        trainer.add_callback(LeapCallback(trainer, **{"every": EVERY} | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@functools.cache
def weights_without_leaps() -> dict[str, torch.Tensor]:
    """Of the language model at the end of its training, for all tests that compare with them."""
    return weights(trained(language_model(), texts()).model)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def marks(log: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(entry["step"], entry["farcast_leap_to"]) for entry in log if "farcast_leap_from" in entry]


def state_on_disk(step: int) -> dict[str, Any]:
    from pathlib import Path

    found: dict[str, Any] = json.loads(Path(f"run/checkpoint-{step}/trainer_state.json").read_text())
    return found


def stretches(tmp_path: Path) -> int:
    memory = read_memory(tmp_path / "forecasts" / "run" / "run.memory.safetensors")
    assert memory is not None
    return memory.record.count


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Looks at the live model, the optimizer and the files, before and after each call of the callback between two of these."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_save(self, args: Any, state: Any, control: Any, **about: Any) -> None:  # noqa: ARG002
        optimizer = copy.deepcopy(about["optimizer"].state_dict())
        schedule = copy.deepcopy(about["lr_scheduler"].state_dict())
        self.seen.append((state.global_step, weights(about["model"]), optimizer, schedule, torch.get_rng_state()))


def same_tree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("make", "rows"), [(language_model, texts), (normed, vectors)])
def test_the_live_model_has_the_forecasts_weights_and_everything_else_is_as_before(
    make: Callable[[], torch.nn.Module], rows: Callable[[], Any], tmp_path: Path
) -> None:
    before: list[Any] = []
    after: list[Any] = []
    checked = []

    class Compare(Watch):
        """Compares with the files while they are there."""

        def on_save(self, args: Any, state: Any, control: Any, **about: Any) -> None:
            super().on_save(args, state, control, **about)
            forecasts = sorted((tmp_path / "forecasts" / "run").glob("checkpoint-*"))
            assert len(forecasts) <= 1
            assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
            if state.global_step in dict(marks(state.log_history)):
                live, stored = self.seen[-1][1], load_file(forecasts[0] / "model.safetensors")
                assert all(torch.equal(live[name], stored[name]) for name in stored)
                assert {name for name in live if name not in stored} <= {"lm_head.weight"}
                checked.append(forecasts[0].name)

    model = make()
    trainer = trainer_of(model, rows(), Watch(before))
    trainer.add_callback(LeapCallback(trainer, every=EVERY))
    trainer.add_callback(Compare(after))
    trainer.train()
    leaps = marks(trainer.state.log_history)
    assert [step for step, _ in leaps] == list(range(30, 100, 10))
    assert checked == [f"checkpoint-{step}-leap{to - step}" for step, to in leaps]
    for one, other in zip(before, after, strict=True):
        assert one[0] == other[0]
        assert same_tree(one[2:], other[2:])  # moments, rates, schedule, torch's random state
        assert equal(one[1], other[1]) == (one[0] not in dict(leaps))
    if isinstance(model, GPT2LMHeadModel):
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert trainer.state.global_step == 100
    assert marks(state_on_disk(100)["log_history"]) == leaps


def test_the_figures_and_the_reason_are_in_the_trainers_log_and_reach_its_other_callbacks() -> None:
    told = []

    class Listen(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Reads what loggers such as TensorBoard's get."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            told.append(dict(logs))

    trainer = trainer_of(normed(), vectors(), Listen())
    trainer.add_callback(LeapCallback(trainer, every=EVERY))
    trainer.train()
    figures = [logs for logs in told if "farcast_horizon" in logs]
    assert len(figures) == 10
    assert {"farcast_gain", "farcast_share", "farcast_cosine", "farcast_leap_to"} <= figures[4].keys()
    assert all(isinstance(value, (int, float)) for logs in figures for value in logs.values())
    reasons = [entry["farcast_reason"] for entry in trainer.state.log_history if "farcast_reason" in entry]
    assert "one snapshot so far" in reasons[0]
    assert reasons[4].startswith("gain ")
    assert "for training only" in reasons[-1]


def test_leaps_in_the_process_are_those_of_the_command_in_a_loop(tmp_path: Path, call_cli: CallCli) -> None:
    """The same weights at the end as of a Trainer that stops for each leap and resumes from its file."""
    resume = None
    for _ in range(6):
        train_by_trainer(tmp_path / "run", resume, 1, keep=1)
        done = call_cli("leap", "run", cwd=tmp_path, env=NOWHERE)
        resume = str(tmp_path / done.stdout.strip()) if done.returncode == 0 else None
    assert resume
    by_files = load_file(f"{resume}/model.safetensors")
    for folder in ("run", "forecasts"):
        shutil.rmtree(tmp_path / folder)
    trainer, _ = regression_trainer(tmp_path / "run", 6, keep=1)
    trainer.add_callback(LeapCallback(trainer))
    trainer.train()
    live = weights(trainer.model)
    assert len(marks(trainer.state.log_history)) == 4
    for name, tensor in by_files.items():
        torch.testing.assert_close(live[name], tensor, rtol=1e-5, atol=1e-7)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_that_crashed_right_after_a_leap_makes_the_same_leap_again_and_goes_on_alike(tmp_path: Path) -> None:
    """The checkpoint is the one from before the leap, and does not know of it."""
    whole = trained(language_model(), texts(), options={})
    for folder in ("run", "forecasts"):
        shutil.rmtree(tmp_path / folder)
    trained(language_model(), texts(), options={}, stop_at=57)
    assert marks(state_on_disk(50)["log_history"])[-1][0] == 40
    resumed = trained(language_model(), texts(), options={}, resume=True)
    assert marks(resumed.state.log_history) == marks(whole.state.log_history)
    assert "made again after an interruption" in [entry.get("farcast_reason") for entry in resumed.state.log_history]
    assert equal(weights(resumed.model), weights(whole.model))


OFTEN: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}


def test_a_resumed_run_goes_on_with_the_memory_though_it_had_no_callback_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(language_model(), texts(), options={}, stop_at=57, **OFTEN)
    assert stretches(tmp_path) == 4
    trained(language_model(), texts(), stop_at=62, resume=True, **OFTEN)
    assert marks(state_on_disk(60)["log_history"])[-1][0] == 50
    with caplog.at_level(logging.INFO, "farcast"):
        trained(language_model(), texts(), options={}, stop_at=71, resume=True, **OFTEN)
    assert stretches(tmp_path) == 5
    assert "new memory" not in caplog.text


def test_a_run_that_goes_on_without_its_last_leap_starts_a_new_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(language_model(), texts(), options={}, stop_at=52, **OFTEN)
    trained(language_model(), texts(), stop_at=62, resume=True, **OFTEN)
    assert stretches(tmp_path) == 4
    with caplog.at_level(logging.INFO, "farcast"):
        trained(language_model(), texts(), options={}, stop_at=81, resume=True, **OFTEN)
    assert "left the path of its last leap: a new memory starts" in caplog.text
    assert stretches(tmp_path) == 1
    assert list((tmp_path / "forecasts" / "run").glob("checkpoint-*")) == []


def test_every_reader_knows_the_leaps_from_any_later_checkpoint(tmp_path: Path, call_cli: CallCli) -> None:
    leaps = marks(trained(language_model(), texts(), options={}).state.log_history)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run", elsewhere / "run")
    told = json.loads(call_cli("inspect", "run", "--json", cwd=elsewhere, env=NOWHERE).stdout)
    assert [(one["origin_step"], one["valid_step"], one["counters"]) for one in told["leaps"]] == [
        (step, to, "keep") for step, to in leaps
    ]
    assert len((tmp_path / "forecasts" / "ledger.jsonl").read_text().splitlines()) == len(leaps)


# --- a loss ----------------------------------------------------------------------------------------------------------


def loss_of(model: Any) -> torch.Tensor:
    assert not model.training
    torch.rand(3)
    ids = torch.stack([row["input_ids"] for row in texts()[:16]])
    found: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return found


def test_a_loss_that_is_measured_leaves_no_trace_where_there_is_no_leap() -> None:
    """Not in the weights, nor in the random state that dropout draws from."""
    plain = weights_without_leaps()
    calls = []

    def loss(model: Any) -> torch.Tensor:
        calls.append(1)
        return loss_of(model)

    asked = trained(language_model(), texts(), options={"loss": loss, "max_gain": 0.01})
    assert len(calls) == 3 * 7
    assert marks(asked.state.log_history) == []
    assert equal(plain, weights(asked.model))


def test_a_loss_lets_the_gain_rise_above_one() -> None:
    log = trained(language_model(), texts(), options={"loss": loss_of}).state.log_history
    assert max(entry.get("farcast_gain", 0) for entry in log) > 1
    assert len(marks(log)) > 4


@pytest.mark.parametrize(("returned", "words"), [(float("nan"), "returned nan"), (None, "failed: TypeError")])
def test_a_loss_that_is_none_leaves_the_run_as_it_was(
    returned: float | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = weights_without_leaps()
    asked = trained(language_model(), texts(), options={"loss": lambda _: returned})
    assert words in caplog.text
    assert equal(plain, weights(asked.model))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_leap_that_fails_is_a_warning_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "forecasts" / "run").mkdir(parents=True)
    place = tmp_path / "forecasts" / "run" / "run.memory.safetensors"
    place.write_text("no memory")
    trainer = trained(normed(), vectors(), options={})
    assert trainer.state.global_step == 100
    warned = [record.getMessage() for record in caplog.records if record.name == "farcast"]
    assert "step 10: no leap, and training goes on" in warned[1]
    assert "run.memory.safetensors" in warned[1]
    assert place.read_text() == "no memory"
    with pytest.raises(FarcastError, match="memory"):
        trained(normed(), vectors(), options={"strict": True})


def test_weights_on_disk_that_are_not_the_models_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """As of a trainer that saves an average of the weights."""

    class Average(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Puts the live weights back after a save."""

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            with torch.no_grad():
                model.layers[0].weight.add_(0.1)

    trainer = trainer_of(normed(), vectors(), Average())
    trainer.add_callback(LeapCallback(trainer, every=EVERY))
    trainer.train()
    assert marks(trainer.state.log_history) == []
    assert "'layers.0.weight' is not the model's: is the checkpoint one of averaged weights?" in caplog.text


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_weights_in_shards_are_refused_at_the_start_with_the_way_by_files(name: str) -> None:
    trainer = trainer_of(normed(), vectors())
    trainer.add_callback(LeapCallback(trainer, every=EVERY))
    setattr(trainer, name, True)
    with pytest.raises(UsageError, match=r"expected whole weights in each process, found .*call `farcast leap RUN`") as error:
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"every": 0}, {"gain": 0}, {"max_gain": 1000}])
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        LeapCallback(trainer_of(normed(), vectors()), **options)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_of_an_adapted_model_the_adapter_alone_leaps(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    model: Any = get_peft_model(language_model(), config)  # type: ignore[arg-type, unused-ignore]
    start = weights(model)
    trainer = trained(model, texts(), options={}, stop_at=50)
    assert marks(trainer.state.log_history)[-1][0] == 50
    (forecast,) = (tmp_path / "forecasts" / "run").glob("checkpoint-*")
    stored = load_file(forecast / "adapter_model.safetensors")
    live = weights(trainer.model)
    assert stored.keys() == {
        name.replace(".default", "").replace(".modules_to_save", "")
        for name, one in live.items()
        if not torch.equal(one, start[name])
    }
    for name, one in live.items():
        key = name.replace(".default", "").replace(".modules_to_save", "")
        assert torch.equal(one, stored[key] if not torch.equal(one, start[name]) else start[name]), name
