"""What the callback costs a Trainer and what it gains: the same run with and without leaps, the same saves, the same seeds.

    python bench/callback.py                        # 50 leaps in 1,000 steps, a GPT of 2 million weights
    python bench/callback.py --steps 200 --width 64  # some minutes

The share is that of the time inside the callback. Both runs save every 2 % of their steps and keep one checkpoint.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tasks import _manual
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from farcast_cli.hf import LeapCallback

LEAPS = 50
HELD_OUT = 64  # windows


@dataclass
class Seen:
    """What a run showed: its losses by step, its time, and the part of it inside the callback."""

    losses: dict[int, float] = field(default_factory=dict)
    wall: float = 0.0
    cpu: float = 0.0
    wall_inside: float = 0.0
    cpu_inside: float = 0.0
    leaps: int = 0


class Losses(TrainerCallback):
    """Measures the loss on held-out text at every tenth of the run; the time that it takes counts for nobody."""

    def __init__(self, seen: Seen, held_out: torch.Tensor, steps: int) -> None:
        self.seen, self.held_out, self.steps = seen, held_out, steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        if state.global_step % (self.steps // 10) == 0:
            started = clocks()
            model.eval()
            self.seen.losses[state.global_step] = loss_of(self.held_out, model)
            model.train()
            wall, cpu = clocks()
            self.seen.wall -= wall - started[0]
            self.seen.cpu -= cpu - started[1]


class Timed(LeapCallback):
    """The callback with a watch on it."""

    seen: Seen

    def on_save(self, *arguments: Any, **about: Any) -> None:
        started = clocks()
        super().on_save(*arguments, **about)
        wall, cpu = clocks()
        self.seen.wall_inside += wall - started[0]
        self.seen.cpu_inside += cpu - started[1]


def clocks() -> tuple[float, float]:
    """Wall time and this process's CPU time."""
    return time.perf_counter(), time.process_time()


@torch.no_grad()
def loss_of(windows: torch.Tensor, model: Any) -> float:
    return sum(float(model(input_ids=part, labels=part).loss) for part in windows.split(16)) / len(windows.split(16))


def train(given: argparse.Namespace, mode: str) -> Seen:
    """One run in a folder of its own."""
    text, seen = _manual(), Seen()
    windows = text[: len(text) // given.length * given.length].view(-1, given.length)
    held_out, rows = windows[-HELD_OUT:], [{"input_ids": row, "labels": row} for row in windows[:-HELD_OUT]]
    torch.manual_seed(0)
    size = {"n_embd": given.width, "n_layer": given.layers, "n_head": 4, "n_positions": given.length}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=int(text.max()) + 1, bos_token_id=0, eos_token_id=0, **size))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trainer = Trainer(
            model=model, args=arguments(given), train_dataset=rows, callbacks=[Losses(seen, held_out, given.steps)]
        )
        trainer.remove_callback(PrinterCallback)
        if mode != "without":
            loss = partial(loss_of, held_out[:16]) if mode == "with a loss" else None
            callback = Timed(trainer, loss=loss, threads=given.threads)
            callback.seen = seen
            trainer.add_callback(callback)
        started = clocks()
        trainer.train()
        wall, cpu = clocks()
        seen.wall += wall - started[0]
        seen.cpu += cpu - started[1]
        seen.leaps = sum("farcast_leap_to" in entry for entry in trainer.state.log_history)
        os.chdir("/")
    return seen


def arguments(given: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir="run",
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=given.steps // LEAPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("steps", 1000), ("width", 192), ("layers", 4), ("batch", 16), ("length", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["FARCAST_STATE_DIR"] = ""
    modes = ("without", "with leaps", "with a loss")
    found = {mode: train(given, mode) for mode in modes}
    print("| step |", " | ".join(modes), "|\n|---|---|---|---|")
    for step in found["without"].losses:
        print(f"| {step} |", " | ".join(f"{found[mode].losses[step]:.3f}" for mode in modes), "|")
    print("| leaps |", " | ".join(str(found[mode].leaps) for mode in modes), "|")
    for name in ("wall", "wall_inside", "cpu", "cpu_inside"):
        print(f"| {name} s |", " | ".join(f"{getattr(found[mode], name):.1f}" for mode in modes), "|")


if __name__ == "__main__":
    main()
