"""CPU seconds to a target loss where inputs are ill-conditioned: tune against full training and LoRA, each at its best.

    python bench/tune_target.py [WIDTH]

One layer, ReLU, a head of one output, squared loss; rows in clusters, whose differences must be learnt. The rivals run in
float32, by torch; tune in float64, its first and last pass over W included. Every rival gets the best of a grid of rates and
momenta, whose search is not counted; tune takes its defaults. Where the search can be done without W it is: full
descent in tune's own coordinates, which are exact, and LoRA from a kept X W_0^T. One thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farcast_cli.tune.layers import Layer, Settings, Stack, largest_curvature
from farcast_cli.tune.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_ROWS, NUM_CLUSTERS, SPREAD = 64, 8, 0.1
GOAL = 1e-4  # of the first loss
RANK = 16
MOST_STEPS = {"SGD": 2000, "Adam": 250}
FACTORS, MOMENTA = (0.1, 0.3, 1.0, 3.0), (0.0, 0.9, 0.99)  # of 1 / the largest curvature; for plain and heavy-ball descent
LORA_FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = {"full": (1e-3, 3e-3, 1e-2, 3e-2), "LoRA": (1e-3, 1e-2, 3e-2, 1e-1)}


@dataclass(frozen=True)
class Task:
    """A layer in memory, and rows."""

    weights: Any
    inputs: Any
    targets: Any
    head: Any

    @classmethod
    def make(cls, width: int) -> Task:
        random = np.random.default_rng(0)
        centers = random.normal(size=(NUM_CLUSTERS, width))
        inputs = centers[np.arange(NUM_ROWS) % NUM_CLUSTERS] + SPREAD * random.normal(size=(NUM_ROWS, width))
        head = random.normal(size=(1, width)) / np.sqrt(width)
        weights = np.random.default_rng(2).standard_normal((width, width), dtype=np.float32)
        return cls(weights, inputs / np.sqrt(width), random.normal(size=(NUM_ROWS, 1)), head)

    def stack(self) -> Stack:
        """In tune's coordinates, by one pass over W in blocks."""
        blocks = (self.weights[i : i + 256].astype(np.float64) for i in range(0, len(self.weights), 256))
        base = np.concatenate([self.inputs @ rows.T for rows in blocks], axis=1)
        layer, shares = Layer.first(base, self.inputs @ self.inputs.T), np.full(NUM_ROWS, 1 / NUM_ROWS)
        return Stack([layer], Objective("mse", "relu", self.head), self.targets, shares)

    def write(self, factors: Any) -> None:
        """The last pass: every row of W with its change."""
        for i in range(0, len(self.weights), 256):
            self.weights[i : i + 256] + (factors[:, i : i + 256].T @ self.inputs).astype(np.float32)


def ours(task: Task, settings: Settings) -> dict[str, float]:
    started, first = time.process_time(), None
    stack = task.stack()
    for step, losses in enumerate(stack.walk(settings)):  # noqa: B007 - the last one is used
        loss = stack.loss(losses)
        first = first or loss
        if loss <= GOAL * first:
            break
    task.write(stack.layers[0].factors)
    return {"seconds": time.process_time() - started, "steps": step, "left": loss / first}


def steps_of(losses: Iterator[float], most: int) -> tuple[int, float]:
    """Steps until the goal, and the share of the loss that was left; ends where it runs away or has had enough."""
    first, left = 0.0, 1.0
    for step, loss in enumerate(losses):
        first = first or loss
        left = loss / first
        if left <= GOAL or step >= most or not left < 1e3:
            break
    return step, left


class Full:
    """Full-batch training of the whole layer by a torch optimizer, the gradient in memory that is made once."""

    def __init__(self, task: Task, optimizer: str, rate: float, momentum: float) -> None:
        self.layer = torch.from_numpy(task.weights.copy())
        self.x, self.y, self.head = (torch.from_numpy(one).float() for one in (task.inputs, task.targets, task.head))
        self.optimizer = made(optimizer, self.parameters(), rate, momentum)

    def parameters(self) -> list[Any]:
        self.layer.grad = torch.empty_like(self.layer)
        return [self.layer]

    def pre(self) -> Any:
        return self.x @ self.layer.T

    def set_gradients(self, by_pre: Any) -> None:
        torch.mm(by_pre.T, self.x, out=self.layer.grad)

    @torch.no_grad()
    def losses(self) -> Iterator[float]:
        """The loss before each step."""
        while True:
            pre = self.pre()
            error = torch.relu(pre) @ self.head.T - self.y
            yield error.square().mean().item()
            self.set_gradients((error * (2 / error.numel())) @ self.head * (pre > 0))
            self.optimizer.step()


class LoRA(Full):
    """The same of B A beside it; `kept` computes X W_0^T once, which inputs that stay allow and usual code does not do."""

    def __init__(self, task: Task, optimizer: str, rate: float, momentum: float, *, kept: bool) -> None:
        width = len(task.weights)
        self.a = torch.randn(RANK, width, generator=torch.Generator().manual_seed(1)) / width**0.5
        self.b = torch.zeros(width, RANK)
        super().__init__(task, optimizer, rate, momentum)
        self.base = self.x @ self.layer.T if kept else None

    def parameters(self) -> list[Any]:
        return [self.a, self.b]

    def pre(self) -> Any:
        base = self.x @ self.layer.T if self.base is None else self.base
        return base + self.x @ self.a.T @ self.b.T

    def set_gradients(self, by_pre: Any) -> None:
        self.a.grad, self.b.grad = (by_pre @ self.b).T @ self.x, by_pre.T @ (self.x @ self.a.T)


def check_gradients() -> None:
    """The gradients above are those that torch finds by itself."""
    task = Task.make(64)
    for run in (Full(task, "SGD", 0.0, 0.0), LoRA(task, "SGD", 0.0, 0.0, kept=True)):
        if isinstance(run, LoRA):
            run.b.normal_(generator=torch.Generator().manual_seed(2))
        losses = run.losses()
        next(losses), next(losses)
        found = [one.grad.clone() for one in run.optimizer.param_groups[0]["params"]]
        for one in run.optimizer.param_groups[0]["params"]:
            one.grad = None
            one.requires_grad_()
        torch.nn.functional.mse_loss(torch.relu(run.pre()) @ run.head.T, run.y).backward()  # type: ignore[no-untyped-call]
        for mine, one in zip(found, run.optimizer.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(mine, one.grad, rtol=1e-4, atol=1e-7)


def made(optimizer: str, parameters: list[Any], rate: float, momentum: float) -> Any:
    if optimizer == "SGD":
        return torch.optim.SGD(parameters, rate, momentum, foreach=False)
    return torch.optim.Adam(parameters, rate, fused=True)


def searched(task: Task, kind: str, optimizer: str, curvature: float) -> tuple[int, float, float, float]:
    """(steps, share left, rate, momentum) of the best of the grid: first who gets there, then who is nearest."""
    if optimizer == "Adam":
        grid = list(product(ADAM_RATES[kind], (0.0,)))
    else:
        grid = [(f / curvature, m) for f, m in product(FACTORS if kind == "full" else LORA_FACTORS, MOMENTA)]
    found = []
    for rate, momentum in grid:
        if kind == "LoRA":
            path = LoRA(task, optimizer, rate, momentum, kept=True).losses()
        elif optimizer == "Adam":
            path = Full(task, optimizer, rate, momentum).losses()
        else:
            settings = Settings("gradient-descent", MOST_STEPS["SGD"], rate=rate, momentum=momentum)
            path = (float(losses.mean()) for losses in task.stack().walk(settings))
        steps, left = steps_of(path, MOST_STEPS[optimizer])
        left = left if np.isfinite(left) else np.inf
        found.append((left > GOAL, steps if left <= GOAL else left, steps, left, rate, momentum))
    return min(found)[2:]


def timed(make: Any, most: int) -> dict[str, float]:
    started = time.process_time()
    steps, left = steps_of(make().losses(), most)
    return {"seconds": time.process_time() - started, "steps": steps, "left": left}


def to_target(width: int) -> dict[str, Any]:
    """For each way its CPU seconds, steps, the share of the first loss that was left, and what its grid chose."""
    torch.set_num_threads(1)
    check_gradients()
    task = Task.make(width)
    stack = task.stack()
    curvature = largest_curvature(stack)
    values = np.linalg.eigvalsh(stack.layers[0].overlap)
    found: dict[str, Any] = {"m": width, "condition of K": float(values[-1] / values[0])}
    for name in ("gauss-newton", "gradient-descent"):
        found[f"tune, {name}"] = ours(task, Settings(name, 20 * MOST_STEPS["SGD"]))  # type: ignore[arg-type]
        print(name, found[f"tune, {name}"], flush=True)
    for kind, optimizer in product(("full", "LoRA"), ("SGD", "Adam")):
        steps, left, rate, momentum = searched(task, kind, optimizer, curvature)
        best = {"rate": rate, "momentum": momentum, "missed": left > GOAL}
        ways: dict[str, Any] = {"": lambda: Full(task, optimizer, rate, momentum)}  # noqa: B023 - called at once
        if kind == "LoRA":
            ways = {
                way: lambda kept=kept: LoRA(task, optimizer, rate, momentum, kept=kept)  # noqa: B023 - called at once
                for way, kept in (("", False), (", X W_0^T kept", True))
            }
        for way, make in ways.items():
            found[f"{kind}, {optimizer}{way}"] = timed(make, steps) | best
            print(f"{kind}, {optimizer}{way}", found[f"{kind}, {optimizer}{way}"], flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(to_target(int([*sys.argv, "4096"][1])), indent=2))
