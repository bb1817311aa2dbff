"""Make the sample checkpoints: three small training runs on the handwritten digits that ship with scikit-learn.

    python sample_checkpoints/make.py                      make all three runs
    python sample_checkpoints/make.py evaluate RUN CKPT    print the validation loss of one checkpoint
    python sample_checkpoints/make.py resume RUN CKPT N    resume training from a checkpoint for N steps

Every run is deterministic (fixed seeds, one thread). The later snapshots of each run are held back under `truth/`, so
that a forecast made from the visible ones can be compared with what training did next. The runs with a learning-rate
schedule stop well before its end, like a job that was interrupted: they can be resumed past their last snapshot.
"""

# The heavy imports sit inside the functions, so that importing this file costs nothing.
from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    import transformers

HERE = Path(__file__).resolve().parent
SEED = 0


class Run(NamedTuple):
    """Sizes of one run, in optimiser steps."""

    save_every: int
    last_visible: int
    last_step: int
    planned_steps: int
    batch_size: int
    learning_rate: float


HUGGINGFACE = Run(save_every=100, last_visible=1200, last_step=1500, planned_steps=6000, batch_size=128, learning_rate=2.5e-4)
SAFETENSORS = Run(save_every=100, last_visible=1600, last_step=2000, planned_steps=2000, batch_size=256, learning_rate=6e-3)
PLAIN = Run(save_every=100, last_visible=1600, last_step=2000, planned_steps=8000, batch_size=512, learning_rate=2e-4)

WARMUP_STEPS = 50
VOCABULARY = 17
CONTEXT = 9
"""Words that the plain run's model sees before the one it predicts: back to the grey level above and to the left."""


class Split(NamedTuple):
    """Inputs and targets, for training and for validation."""

    train_inputs: torch.Tensor
    train_targets: torch.Tensor
    val_inputs: torch.Tensor
    val_targets: torch.Tensor


def make_deterministic(seed: int = SEED) -> None:
    """Seed torch and fix what would otherwise make two runs differ."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(seed)


def batch_indices(step: int, size: int, batch_size: int) -> torch.Tensor:
    """Pick the examples of one step; they depend on the step alone, so a resumed loop sees the same batches."""
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * SEED + step)
    return torch.randint(size, (batch_size,), generator=generator)


def digits() -> Split:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth of them validates."""
    import torch
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    held, kept = order[: len(labels) // 5], order[len(labels) // 5 :]
    return Split(images[kept], labels[kept], images[held], labels[held])


def sentences() -> Split:
    """Write every digit out as a sentence of 64 words, its grey levels 0 to 16, and cut it into windows of words."""
    data = digits()

    def cut(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        words = ((images + 1) * 8).long().flatten(1)
        windows = words.unfold(1, CONTEXT + 1, 1).flatten(0, 1)
        return windows[:, :CONTEXT], windows[:, CONTEXT]

    return Split(*cut(data.train_inputs), *cut(data.val_inputs))


# ---------------------------------------------------------------------------------------------- huggingface


def blocks(images: torch.Tensor) -> torch.Tensor:
    """Write digits out as sentences of 16 words, the mean grey levels 0 to 16 of their blocks of 2 x 2 pixels."""
    from torch.nn.functional import avg_pool2d

    return avg_pool2d((images + 1) * 8, 2).round().long().flatten(1)


def huggingface_model() -> transformers.DistilBertForSequenceClassification:
    """Build the classifier, freshly initialised."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.2,
        num_labels=10,  # type: ignore[call-arg, unused-ignore]
    )
    make_deterministic()
    return DistilBertForSequenceClassification(config)


def huggingface_trainer(
    output_dir: Path,
    *,
    max_steps: int = HUGGINGFACE.planned_steps,
    logging_steps: int = 50,
    stop_at: int | None = None,
) -> transformers.Trainer:
    """Make a `Trainer` for the run, ready to train or to resume.

    `max_steps` is the length of the learning-rate schedule; the sample run was interrupted before it, which `stop_at`
    repeats. The log is in `trainer.state.log_history`: with `logging_steps=1`, one entry a step.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Flow(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """End the training after `stop_at` steps, and log as often as asked: a resumed trainer would not."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            state.logging_steps = args.logging_steps

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == stop_at:
                control.should_training_stop = True

    data = digits()
    rows = [
        {"input_ids": words, "labels": int(label)}
        for words, label in zip(blocks(data.train_inputs), data.train_targets, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=HUGGINGFACE.batch_size,
        learning_rate=HUGGINGFACE.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_STEPS,
        save_strategy="steps",
        save_steps=HUGGINGFACE.save_every,
        save_total_limit=None,
        logging_steps=logging_steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=SEED,
        data_seed=SEED,
    )
    trainer = Trainer(model=huggingface_model(), args=arguments, train_dataset=rows, callbacks=[Flow()])  # type: ignore[arg-type, unused-ignore]
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_huggingface(out: Path) -> None:
    """Train the run `huggingface` into `out/huggingface` and `out/truth/huggingface`."""
    name = "huggingface"
    clear(out, name)
    # A relative path, for the trainer stores its output folder in every checkpoint.
    with contextlib.chdir(out):
        huggingface_trainer(Path(name), stop_at=HUGGINGFACE.last_step).train()
    hold_back(out, name, [f"checkpoint-{step}" for step in held_back_steps(HUGGINGFACE)])


def huggingface_loss(checkpoint: Path) -> float:
    """Compute the validation loss of a checkpoint folder, or of a lone file like its `model.safetensors`."""
    import torch
    from safetensors.torch import load_file

    model = huggingface_model()
    model.load_state_dict(load_file(checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint))
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    data = digits()
    with torch.inference_mode():
        logits = model(input_ids=blocks(data.val_inputs)).logits
    return cross_entropy(logits, data.val_targets)


# ---------------------------------------------------------------------------------------------- safetensors


def safetensors_model() -> torch.nn.Module:
    """Build the perceptron with a batch normalisation (and so with buffers, one of them an integer)."""
    from torch import nn

    make_deterministic()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def train_safetensors(out: Path) -> None:
    """Train the run `safetensors` into `out/safetensors` and `out/truth/safetensors`."""
    import torch
    from safetensors.torch import save_file

    name = "safetensors"
    clear(out, name)
    data, model = digits(), safetensors_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=SAFETENSORS.learning_rate)
    for step in range(SAFETENSORS.last_step + 1):
        if step % SAFETENSORS.save_every == 0:
            save_file(model.state_dict(), out / name / safetensors_file(step), metadata={"format": "pt"})
        rows = batch_indices(step, len(data.train_targets), SAFETENSORS.batch_size)
        train_step(model, optimizer, data.train_inputs[rows], data.train_targets[rows])
    hold_back(out, name, [safetensors_file(step) for step in held_back_steps(SAFETENSORS)])


def safetensors_file(step: int) -> str:
    """Name the snapshot of a step."""
    return f"step_{step:06d}.safetensors"


def safetensors_loss(checkpoint: Path) -> float:
    """Compute the validation loss of a `.safetensors` snapshot."""
    import torch
    from safetensors.torch import load_file

    model = safetensors_model()
    model.load_state_dict(load_file(checkpoint))
    model.eval()
    data = digits()
    with torch.inference_mode():
        return cross_entropy(model(data.val_inputs), data.val_targets)


# ---------------------------------------------------------------------------------------------- plain


def plain_model(width: int = 16, hidden: int = 32) -> torch.nn.Module:
    """Build the language model; its embedding and its output layer are one tensor under two names."""
    import torch
    from torch import nn

    class LanguageModel(nn.Module):
        """Predict a word from the `CONTEXT` words before it."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.mixer = nn.Linear(CONTEXT * width, hidden)
            self.project = nn.Linear(hidden, width)
            self.head = nn.Linear(width, VOCABULARY)
            nn.init.normal_(self.embedding.weight, std=0.3)
            self.head.weight = self.embedding.weight

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            hidden_units = torch.tanh(self.mixer(self.embedding(windows).flatten(1)))
            logits: torch.Tensor = self.head(self.project(hidden_units))
            return logits

    make_deterministic()
    return LanguageModel()


class PlainLoop:
    """The hand-written training loop: a model, an optimiser, a scheduler and the number of steps done."""

    def __init__(self) -> None:
        """Start at step 0."""
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import CosineAnnealingLR

        self.data = sentences()
        self.model = plain_model()
        self.optimizer = AdamW(self.model.parameters(), lr=PLAIN.learning_rate)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=PLAIN.planned_steps)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        import torch

        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Read a checkpoint back, strictly."""
        import torch

        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def advance(self) -> tuple[int, float, float]:
        """Do one step; return how many are done now, the learning rate that this one used, and its loss."""
        (rate,) = self.scheduler.get_last_lr()
        rows = batch_indices(self.step, len(self.data.train_targets), PLAIN.batch_size)
        inputs, targets = self.data.train_inputs[rows], self.data.train_targets[rows]
        loss = train_step(self.model, self.optimizer, inputs, targets)
        self.scheduler.step()
        self.step += 1
        return self.step, float(rate), loss


def train_plain(out: Path) -> None:
    """Train the run `plain` into `out/plain` and `out/truth/plain`."""
    name = "plain"
    clear(out, name)
    loop = PlainLoop()
    while loop.step < PLAIN.last_step:
        loop.advance()
        if loop.step % PLAIN.save_every == 0:
            loop.save(out / name / f"step_{loop.step}.pt")
    hold_back(out, name, [f"step_{step}.pt" for step in held_back_steps(PLAIN)])


def resume_plain(checkpoint: Path, *, num_steps: int, save_to: Path | None = None) -> list[tuple[int, float, float]]:
    """Continue the run `plain` from a checkpoint, for `num_steps` steps.

    Return for each step how many are done after it, the learning rate it used and its training loss before its
    update. With `save_to`, write the last state there.
    """
    loop = PlainLoop()
    loop.load(checkpoint)
    log = [loop.advance() for _ in range(num_steps)]
    if save_to is not None:
        loop.save(save_to)
    return log


def plain_loss(checkpoint: Path) -> float:
    """Compute the validation loss of a `.pt` checkpoint."""
    import torch

    data = sentences()
    model = plain_model()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    model.eval()
    with torch.inference_mode():
        return cross_entropy(model(data.val_inputs), data.val_targets)


# ---------------------------------------------------------------------------------------------- all runs


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Do one optimiser step and return the loss before it."""
    from torch.nn.functional import cross_entropy as torch_cross_entropy

    model.train()
    optimizer.zero_grad()
    loss = torch_cross_entropy(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    optimizer.step()
    return loss.item()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Compute the mean cross-entropy in nats, in float64."""
    from torch.nn.functional import cross_entropy as torch_cross_entropy

    return torch_cross_entropy(logits.double(), targets).item()


def held_back_steps(run: Run) -> range:
    """List the steps whose snapshots are held back."""
    return range(run.last_visible + run.save_every, run.last_step + 1, run.save_every)


def clear(out: Path, name: str) -> None:
    """Remove what an earlier call made of one run, and make its folders anew."""
    for folder in (out / name, out / "truth" / name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def hold_back(out: Path, name: str, entries: list[str]) -> None:
    """Move the snapshots to be forecast out of the run's folder."""
    for entry in entries:
        (out / name / entry).rename(out / "truth" / name / entry)


TRAIN: dict[str, Callable[[Path], None]] = {
    "huggingface": train_huggingface,
    "safetensors": train_safetensors,
    "plain": train_plain,
}
LOSS: dict[str, Callable[[Path], float]] = {
    "huggingface": huggingface_loss,
    "safetensors": safetensors_loss,
    "plain": plain_loss,
}


def evaluate(run: str, checkpoint: Path) -> float:
    """Compute the validation loss of a checkpoint of the run `huggingface`, `safetensors` or `plain`."""
    make_deterministic()
    return LOSS[run](checkpoint)


def resume_huggingface(checkpoint: Path, *, num_steps: int) -> list[tuple[int, float, float]]:
    """Continue the run `huggingface` from a checkpoint by the Trainer's own resume option, as `resume_plain` does."""
    import tempfile

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    start = int(state["global_step"])
    with tempfile.TemporaryDirectory() as output:
        trainer = huggingface_trainer(Path(output), logging_steps=1, stop_at=start + num_steps)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    log = [entry for entry in trainer.state.log_history if "learning_rate" in entry and entry["step"] > start]
    return [(entry["step"], entry["learning_rate"], entry["loss"]) for entry in log]


RESUME: dict[str, Callable[..., list[tuple[int, float, float]]]] = {
    "huggingface": resume_huggingface,
    "plain": resume_plain,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the sample checkpoints, or evaluate one of them.")
    commands = parser.add_subparsers(dest="command")
    evaluator = commands.add_parser("evaluate", help="print the validation loss of one checkpoint")
    evaluator.add_argument("run", choices=sorted(LOSS))
    evaluator.add_argument("checkpoint", type=Path)
    resumer = commands.add_parser("resume", help="resume a run from a checkpoint; print each step, its rate and loss")
    resumer.add_argument("run", choices=sorted(RESUME))
    resumer.add_argument("checkpoint", type=Path)
    resumer.add_argument("num_steps", type=int)
    options = parser.parse_args(arguments)
    if options.command == "resume":
        for step, rate, loss in RESUME[options.run](options.checkpoint, num_steps=options.num_steps):
            sys.stdout.write(f"step {step}  learning rate {rate:.6e}  training loss {loss:.4f}\n")
        return 0
    if options.command == "evaluate":
        loss = evaluate(options.run, options.checkpoint)
        sys.stdout.write(f"{loss!r}\n")
        return 0 if math.isfinite(loss) else 1
    for name, train in TRAIN.items():
        sys.stderr.write(f"training {name}\n")
        train(HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
