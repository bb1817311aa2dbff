"""The training runs that forecasts are measured on: real models on real data, trained here from nothing.

Every batch is a function of (seed, step) alone, so a resumed run sees exactly the batches that the plain run saw, and
the two can be compared step by step. The data come with the Python packages that the tests need: scikit-learn's digits,
and as text the manual and the source code of Python's own standard library.
"""

from __future__ import annotations

import functools
import math
import os
import pydoc_data.topics
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT = 64  # characters that the GPT reads
JUDGED = 96  # held-out windows of that length
BERT_CONTEXT = 32
NUM_KINDS = 6  # what DistilBERT tells apart: the kind of the next character
CHARS = "\n" + "".join(map(chr, range(32, 127)))
HELD_OUT = 0.1
GUIDING = 100  # added to the seed of a draw of held-out data
DECAYING = 0.2  # of a run: the end over which `wsd` lowers the rate


@dataclass(frozen=True)
class Spec:
    """One run: task, seed and optimiser; `rate_factor` multiplies the tuned learning rate `lr`."""

    name: str
    task: str
    optimizer: str
    lr: float
    steps: int
    batch: int
    seed: int = 0
    rate_factor: float = 1.0
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    start: Spec | None = None
    """Fine-tuning: the run whose last weights this one starts from."""
    schedule: str = "constant"
    """How the rate falls after the warm-up: constant, linear or cosine to zero, or wsd: linear over the last fifth."""

    def rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup if self.warmup else 1.0)
        return self.lr * self.rate_factor * warm * decay(self.schedule, step, warmup=self.warmup, steps=self.steps)


def decay(schedule: str, step: int, *, warmup: int, steps: int) -> float:
    """The factor on the full rate, from 1 after the warm-up down to 0 at the end of the run."""
    share = max(0, step - warmup) / (steps - warmup)
    factors = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
        "wsd": min(1.0, (steps - step) / (DECAYING * steps)),
    }
    return factors[schedule]


class Task(ABC):
    """A model with its data. Training needs `batch_loss`, judging needs `val_loss`.

    `start` holds all weights at the end of the run `spec.start`, where the spec names one.
    """

    def __init__(self, spec: Spec, start: dict[str, torch.Tensor] | None = None) -> None:
        self.spec, self.start = spec, start
        self.draw = 0  # of the held-out data: what is reported is of draw 0
        torch.manual_seed(spec.seed)
        self.load_data()
        self.model = self.build()
        self.optimizer = self._optimizer()

    @abstractmethod
    def load_data(self) -> None: ...

    @abstractmethod
    def build(self) -> nn.Module: ...

    @abstractmethod
    def batch_loss(self, step: int) -> torch.Tensor: ...

    @abstractmethod
    def val_loss(self) -> torch.Tensor: ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, and hence saved."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters().values())
        if self.spec.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.spec.rate(0))
        return torch.optim.AdamW(parameters, lr=self.spec.rate(0), weight_decay=self.spec.weight_decay)

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.batch_loss(step).backward()
        if self.spec.clip:
            nn.utils.clip_grad_norm_(self.parameters().values(), self.spec.clip)
        self.optimizer.step()

    @torch.no_grad()
    def val(self) -> float:
        self.model.eval()
        loss = float(self.val_loss())
        self.model.train()
        return loss

    def guide(self) -> float:
        """A loss to steer by: as `val`, on another draw of the held-out data, which no figure is taken of."""
        self.draw = GUIDING
        loss = self.val()
        self.draw = 0
        return loss

    def rng(self, step: int) -> np.random.RandomState:
        return np.random.RandomState((1_000_003 * self.spec.seed + step) % 2**32)

    @torch.no_grad()
    def get(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(weights[name])


class Digits(Task):
    """scikit-learn's 8 x 8 digits, each draw moved by up to a pixel and with noise; judged on 3,594 other draws.

    Both are draws of one population, so that a run that gets on faster is not one that learns by heart sooner: what is
    measured is the speed of training.
    """

    def load_data(self) -> None:
        self.x, self.y = _digits()
        self.judged = {draw: _drawn(self.x.repeat(2, 1), np.random.RandomState(11 + draw)) for draw in (0, GUIDING)}
        self.yv = self.y.repeat(2)

    def batch_loss(self, step: int) -> torch.Tensor:
        rng = self.rng(step)
        index = torch.from_numpy(rng.randint(0, len(self.y), self.spec.batch))
        return cross_entropy(self.model(_drawn(self.x[index], rng)), self.y[index])

    def val_loss(self) -> torch.Tensor:
        return cross_entropy(self.model(self.judged[self.draw]), self.yv)


def _drawn(images: torch.Tensor, rng: np.random.RandomState) -> torch.Tensor:
    """Each image (N, 64) moved by -1, 0 or 1 pixels up and sideways, with Gaussian noise of .3 standard deviations."""
    padded = pad(images.view(-1, 8, 8), (1, 1, 1, 1), value=float(images.min()))
    top, left = torch.from_numpy(rng.randint(0, 3, (2, len(images))))
    rows, columns = top[:, None] + torch.arange(8), left[:, None] + torch.arange(8)
    moved = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
    return moved + 0.3 * torch.from_numpy(rng.standard_normal(moved.shape)).float()


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return (x - x.mean()) / x.std(), y


class Mlp(Digits):
    """64-128-64-10, ReLU: 17,226 parameters."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


class Conv(Digits):
    """Three 3 x 3 convolutions: 15,338 parameters."""

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )


@functools.cache
def _manual() -> torch.Tensor:
    """Python's manual as it comes with every interpreter: English prose and some code."""
    return _encode("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


@functools.cache
def _source() -> torch.Tensor:
    """The source code of some standard modules: the domain that is moved to when fine-tuning."""
    import argparse
    import asyncio.base_events
    import datetime as dt
    import decimal
    import subprocess
    import typing
    import unittest.mock

    modules = (argparse, asyncio.base_events, dt, decimal, subprocess, typing, unittest.mock)
    return _encode("\n".join(Path(module.__file__).read_text() for module in modules if module.__file__))


@functools.cache
def _library() -> torch.Tensor:
    """The source code of all modules of one file in the standard library, about four million characters."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    return _encode("\n".join(module.read_text(encoding="utf-8", errors="ignore") for module in modules))


def _encode(text: str) -> torch.Tensor:
    index = {char: i for i, char in enumerate(CHARS)}
    return torch.tensor([index[char] for char in text if char in index])


class Text(Task):
    """Characters; the last tenth is held out."""

    def load_data(self) -> None:
        ids = _source() if self.spec.start else _manual()
        split = int(len(ids) * (1 - HELD_OUT))
        self.ids, self.held_out = ids[:split], ids[split:]

    def windows(self, ids: torch.Tensor, rng: np.random.RandomState, count: int, length: int) -> torch.Tensor:
        starts = torch.from_numpy(rng.randint(0, len(ids) - length, count))
        return ids[starts[:, None] + torch.arange(length)]

    def build(self) -> nn.Module:
        model = self.network()
        if self.start:
            model.load_state_dict(self.start, strict=False)  # tied weights are there once
        return model

    @abstractmethod
    def network(self) -> nn.Module: ...


class Gpt(Text):
    """A GPT-2 of 3 layers, 64 wide, over characters: 160,384 parameters."""

    context = CONTEXT
    size: ClassVar = {"n_embd": 64, "n_layer": 3, "n_head": 4}

    def network(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        given = {"vocab_size": len(CHARS), "n_positions": self.context, **self.size}
        none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False}
        return GPT2LMHeadModel(GPT2Config(**given, **none, bos_token_id=0, eos_token_id=0))

    def loss_on(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self.model(windows[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def batch_loss(self, step: int) -> torch.Tensor:
        return self.loss_on(self.windows(self.ids, self.rng(step), self.spec.batch, self.context + 1))

    def val_loss(self) -> torch.Tensor:
        return self.loss_on(self.windows(self.held_out, np.random.RandomState(7 + self.draw), JUDGED, self.context + 1))


class LargeGpt(Gpt):
    """A GPT-2 of 6 layers, 320 wide, over 128 characters of Python's manual and sources: 7.5 million parameters."""

    context = 128
    size: ClassVar = {"n_embd": 320, "n_layer": 6, "n_head": 5}

    def load_data(self) -> None:
        texts = [_manual(), _library()]
        splits = [int(len(ids) * (1 - HELD_OUT)) for ids in texts]
        self.ids = torch.cat([ids[:split] for ids, split in zip(texts, splits, strict=True)])
        self.held_out = torch.cat([ids[split:] for ids, split in zip(texts, splits, strict=True)])


class Lora(Gpt):
    """The GPT with its weights frozen and low-rank adapters of rank 4 on every projection."""

    rank = 4

    def build(self) -> nn.Module:
        model = super().build().requires_grad_(requires_grad=False)
        for block in model.transformer.h:
            for owner, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
                setattr(owner, name, _Adapter(getattr(owner, name), self.rank))
        return model


class _Adapter(nn.Module):
    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        wide, out = base.weight.shape  # transformers' Conv1D holds (in, out)
        self.lora_a = nn.Parameter(torch.randn(wide, rank) / wide**0.5)
        self.lora_b = nn.Parameter(torch.zeros(rank, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 4.0 * (x @ self.lora_a @ self.lora_b)


class Reinforce(Gpt):
    """Policy gradient from the pre-trained GPT: it writes the next character and is rewarded where that is the text's own.

    The loss to judge by is one minus the expected reward on held-out text.
    """

    def batch_loss(self, step: int) -> torch.Tensor:
        rng = self.rng(step)
        windows = self.windows(self.ids, rng, self.spec.batch, CONTEXT + 1)
        log_p = self.model(windows[:, :-1]).logits.log_softmax(-1)
        uniform = torch.from_numpy(rng.rand(*log_p.shape)).float().clamp(1e-9, 1 - 1e-9)
        action = (log_p.detach() - (-uniform.log()).log()).argmax(-1)  # Gumbel: a draw from the policy
        reward = (action == windows[:, 1:]).float()
        chosen = log_p.gather(-1, action[..., None])[..., 0]
        return -((reward - reward.mean()) * chosen).mean()

    def val_loss(self) -> torch.Tensor:
        windows = self.windows(self.held_out, np.random.RandomState(7 + self.draw), JUDGED, CONTEXT + 1)
        p = self.model(windows[:, :-1]).logits.softmax(-1)
        return 1 - p.gather(-1, windows[:, 1:, None]).mean()


def _kind(char: str) -> int:
    """Space, new line, vowel, other small letter, capital, anything else: 0 to 5."""
    tests = (char == " ", char == "\n", char in "aeiou", char.islower(), char.isupper(), True)
    return tests.index(True)


class Bert(Text):
    """A DistilBERT of 3 layers, 64 wide, that reads 32 characters and names the kind of the next: 161,000 parameters."""

    def load_data(self) -> None:
        super().load_data()
        self.kinds = torch.tensor([_kind(char) for char in CHARS])

    def network(self) -> nn.Module:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        size = {"vocab_size": len(CHARS), "max_position_embeddings": BERT_CONTEXT, "n_layers": 3, "n_heads": 4, "dim": 64}
        none = {"hidden_dim": 256, "dropout": 0, "attention_dropout": 0, "seq_classif_dropout": 0, "num_labels": NUM_KINDS}
        return DistilBertForSequenceClassification(DistilBertConfig(**size, **none))

    def loss_on(self, windows: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.model(windows[:, :-1]).logits, self.kinds[windows[:, -1]])

    def batch_loss(self, step: int) -> torch.Tensor:
        return self.loss_on(self.windows(self.ids, self.rng(step), self.spec.batch, BERT_CONTEXT + 1))

    def val_loss(self) -> torch.Tensor:
        return self.loss_on(self.windows(self.held_out, np.random.RandomState(5 + self.draw), 512, BERT_CONTEXT + 1))


KINDS: dict[str, Callable[[Spec, dict[str, torch.Tensor] | None], Task]] = {
    "mlp": Mlp,
    "conv": Conv,
    "gpt": Gpt,
    "gpt-m": LargeGpt,
    "bert": Bert,
    "lora": Lora,
    "reinforce": Reinforce,
}


def make(spec: Spec, start: dict[str, torch.Tensor] | None = None) -> Task:
    if (spec.start is None) != (start is None):
        raise ValueError(f"{spec.name}: expected start weights exactly where the spec names a run to start from")
    return KINDS[spec.task](spec, start)
