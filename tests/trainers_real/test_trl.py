"""trl's supervised fine-tuning and preference tuning of a small causal model: both are a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.trainers_real.course import END, EVERY, ORIGIN, VALID, Course, assert_goes_on, predicted

if TYPE_CHECKING:
    from pathlib import Path

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own

WORDS = [f"w{number}" for number in range(60)]


class Rates(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Notes the rate that each step used, and the epoch as its place in the data."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_step_begin(self, _: Any, state: Any, __: Any, **kwargs: Any) -> None:
        self.course.rates[state.global_step + 1] = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
        self.course.places[state.global_step] = state.epoch


def _tokenizer() -> Any:
    known = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))  # noqa: S106 - a word
    whole.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **special)


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def _sentence(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[number] for number in torch.randint(0, len(WORDS), (8,), generator=generator).tolist())


def _rows(kind: str) -> Any:
    if kind == "SFT":
        return datasets.Dataset.from_list([{"text": _sentence(number)} for number in range(256)])
    names = ("prompt", "chosen", "rejected")
    rows = [{name: f" {_sentence(3 * number + place)}" for place, name in enumerate(names)} for number in range(256)]
    return datasets.Dataset.from_list(rows)


def _train(kind: str, folder: Path, course: Course, resume: Path | None = None) -> Any:
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        max_steps=END,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_steps=EVERY,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=1,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=_model(),
        args=arguments,
        train_dataset=_rows(kind),
        processing_class=_tokenizer(),
        callbacks=[Rates(course)],
        **({"ref_model": _model()} if kind == "DPO" else {}),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_goes_on_from_a_forecast_as_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    whole, course = Course(), Course()
    _train(kind, tmp_path / "run", whole)
    (tmp_path / "history").mkdir()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / "history" / f"checkpoint-{step}")
    forecast = predicted(tmp_path / "history", tmp_path / "out" / f"checkpoint-{VALID}")
    resumed = _train(kind, tmp_path / "resumed", course, forecast)
    assert resumed.state.global_step == END
    steps = {float(state["step"]) for state in resumed.optimizer.state.values()}
    assert steps == {float(END)}
    assert_goes_on(course, whole)
