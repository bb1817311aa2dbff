"""litgpt's pretraining with litdata's streaming loader; two batches make a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.trainers_real.course import END, EVERY, ORIGIN, VALID, assert_same_counts, predicted

if TYPE_CHECKING:
    from pathlib import Path

pretrain = pytest.importorskip("litgpt.pretrain")
arguments = pytest.importorskip("litgpt.args")
modules = pytest.importorskip("litgpt.data")
configs = pytest.importorskip("litgpt.config")
litdata = pytest.importorskip("litdata")
streaming = pytest.importorskip("litdata.streaming")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own

BLOCK, BATCHES = 17, 2


def tokens(index: int) -> torch.Tensor:
    """A document of random tokens."""
    return torch.randint(0, 8, (BLOCK * 40,), generator=torch.Generator().manual_seed(index))


class Tokens(modules.DataModule):  # type: ignore[misc, name-defined]
    """Documents as litdata's chunks, shuffled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batch = folder, 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int = -1) -> None:  # noqa: ARG002 - its hook
        self.batch = batch_size

    def prepare_data(self) -> None:
        if not (self.folder / "index.json").exists():
            litdata.optimize(
                fn=tokens,
                inputs=list(range(10)),
                output_dir=str(self.folder),
                num_workers=1,
                chunk_bytes="1MB",
                item_loader=streaming.TokensLoader(block_size=BLOCK),
                start_method="fork",
            )

    def train_dataloader(self) -> Any:
        rows = streaming.StreamingDataset(
            input_dir=str(self.folder),
            item_loader=streaming.TokensLoader(block_size=BLOCK),
            shuffle=True,
            drop_last=True,
            seed=3,
        )
        return streaming.StreamingDataLoader(rows, batch_size=self.batch, num_workers=0, drop_last=True)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def _train(folder: Path, data: Path, rates: list[float], monkeypatch: pytest.MonkeyPatch, resume: Path | None = None) -> Any:
    """Train to the end; the last checkpoint's state. `rates` gets that of every batch."""
    rate_of = pretrain.get_lr

    def noted(*args: Any) -> float:
        rates.append(rate_of(*args))
        return rates[-1]

    config = configs.Config(
        name="small",
        block_size=BLOCK - 1,
        vocab_size=8,
        padded_vocab_size=8,
        n_layer=2,
        n_head=2,
        n_embd=16,
        rotary_percentage=1.0,
        intermediate_size=32,
    )
    train = arguments.TrainArgs(
        save_interval=EVERY,
        log_interval=1000,
        global_batch_size=4 * BATCHES,
        micro_batch_size=4,
        max_tokens=END * 4 * BATCHES * (BLOCK - 1),
        max_steps=END,
        max_norm=1.0,
        min_lr=1e-5,
        lr_warmup_steps=20,
        tie_embeddings=False,
    )
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "get_lr", noted)
        patched.setattr(pretrain, "save_hyperparameters", lambda *_: None)  # reads the arguments of its own command
        pretrain.setup(
            "small",
            model_config=config,
            out_dir=folder,
            precision="32-true",
            resume=resume or False,
            data=Tokens(data),
            devices=1,
            train=train,
            eval=arguments.EvalArgs(interval=10**6, max_iters=1, initial_validation=False, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            logger_name="csv",
        )
    return torch.load(folder / f"step-{END:08}" / "lit_model.pth", weights_only=False)


def test_litgpt_goes_on_from_a_forecast_as_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rates = list[float](), list[float]()
    monkeypatch.chdir(tmp_path)
    state = _train(tmp_path / "run", tmp_path / "data", whole, monkeypatch)
    (tmp_path / "history").mkdir()
    for step in range(EVERY, ORIGIN + 1, EVERY):
        (tmp_path / "run" / f"step-{step:08}").rename(tmp_path / "history" / f"step-{step:08}")
    forecast = predicted(tmp_path / "history", tmp_path / "out")
    resumed = _train(tmp_path / "resumed", tmp_path / "data", rates, monkeypatch, forecast / "lit_model.pth")
    assert len(rates) == BATCHES * (END - VALID)
    assert rates == whole[-len(rates) :]
    assert_same_counts(resumed, state)
