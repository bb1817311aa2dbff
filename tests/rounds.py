"""Two training commands for farcast ci periodic.sh: each trains one stretch of a run and notes how it was called.

python -m tests.rounds trainer RUN [--resume PATH]         a real Trainer
python -m tests.rounds decay|walk RUN [--resume PATH]      files alone: weights that decay smoothly, or that only diffuse
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

LOG = Path("rounds.jsonl")
SAVE_EVERY = 20
DRIFT_STEPS = 600.0


def digests(run: Path) -> dict[str, str]:
    """Every file of the run with the hash of its bytes."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.rglob("*")) if path.is_file()}


def step_of(path: Path) -> int:
    """Of `checkpoint-160`, and of a leap from it, `checkpoint-160-leap20`."""
    return int(re.findall(r"\d+", path.name)[0])


def train_by_trainer(
    run: Path, resume: str | None, num_saves: int, *, keep: int | None = None, max_steps: int = 100_000, log_every: int = 0
) -> int:
    """A small regression with AdamW at a constant rate, stopped after some saves; the step that it began at.

    Args:
        keep: how many checkpoints the trainer leaves in the folder.
        log_every: how many steps lie between two logged losses; 0 logs none.
    """
    from transformers.trainer_utils import get_last_checkpoint

    trainer, began = regression_trainer(run, num_saves, keep=keep, max_steps=max_steps, log_every=log_every)
    own_last = get_last_checkpoint(str(run)) if run.exists() else None  # type: ignore[no-untyped-call, unused-ignore]
    trainer.train(resume_from_checkpoint=resume or own_last)
    return began[0]


def regression_trainer(
    run: Path, num_saves: int, *, keep: int | None = None, max_steps: int = 100_000, log_every: int = 0
) -> tuple[Any, list[int]]:
    """A Trainer that stops after some saves, and a list to which it adds the step that it begins at."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    began: list[int] = []

    class Stretch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Notes where training begins and stops it after the last save of the stretch."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            began.append(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop = state.global_step - began[0] > (num_saves - 1) * SAVE_EVERY

    class Regression(torch.nn.Module):
        """Two layers and the loss, as the Trainer wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = self.layers(inputs)
            return {"loss": torch.nn.functional.mse_loss(outputs, targets), "logits": outputs}

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(256, 16)
    targets = torch.sin(inputs @ torch.randn(16, 4) / 4)
    rows: Any = [{"inputs": one, "targets": other} for one, other in zip(inputs, targets, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=max_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        save_total_limit=keep,
        logging_strategy="steps" if log_every else "no",
        logging_steps=log_every or 500,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=Regression(), args=arguments, train_dataset=rows, callbacks=[Stretch()])
    trainer.remove_callback(PrinterCallback)
    return trainer, began


def write_snapshots(run: Path, resume: str | None, num_saves: int, *, drifts: bool, pause_s: float = 0.0) -> int:
    """One safetensors file per save; the step before the first.

    Args:
        pause_s: between the two halves of a file, and after it.
    """
    from safetensors.numpy import load_file, save

    run.mkdir(exist_ok=True)
    begin = step_of(Path(resume)) if resume else max(map(step_of, run.iterdir()), default=0)
    start, target = np.random.default_rng(0).normal(size=(2, 64, 64))
    weights = start if drifts or not begin else load_file(run / f"step_{begin}.safetensors")["layer.weight"]
    for step in range(begin + SAVE_EVERY, begin + (num_saves + 1) * SAVE_EVERY, SAVE_EVERY):
        noise = np.random.default_rng(step).normal(size=(64, 64))
        weights = target + (start - target) * np.exp(-step / DRIFT_STEPS) + noise / 1000 if drifts else weights + noise / 10
        data = save({"layer.weight": weights.astype(np.float32)})
        with (run / f"step_{step}.safetensors").open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(pause_s)
            file.write(data[len(data) // 2 :])
        time.sleep(pause_s)
    return begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["trainer", "decay", "walk"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--resume", "--from")
    given = parser.parse_args()
    before = digests(given.run)
    if given.kind == "trainer":
        begin = train_by_trainer(given.run, given.resume, given.saves, keep=given.keep)
    else:
        begin = write_snapshots(given.run, given.resume, given.saves, drifts=given.kind == "decay", pause_s=given.pause)
    note = {"resume": given.resume, "variable": os.environ["RESUME_FROM"], "begin": begin}
    with LOG.open("a") as file:
        file.write(json.dumps(note | {"before": before, "after": digests(given.run)}) + "\n")


if __name__ == "__main__":
    main()
