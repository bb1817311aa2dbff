"""What `farcast tune` costs and what it is worth: time per iteration by width, memory, and the gate's record.

    python bench/tune.py            ten minutes; 3 GiB of disk in a temporary folder
    python bench/tune.py --quick    small widths, a few minutes
    python bench/tune.py gate relu      only these parts: memory, scaling, target, break_even, gate, several, relu, sketch

Dense training runs in float32, as people train; tune runs in float64, as it ships. One thread. Saved in bench/out/tune.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from tune_gate import NUM_SEEDS, gate_record
from tune_memory import memory
from tune_relu import shifted_relu
from tune_several import several_layers
from tune_sketch import CASES, sketching
from tune_target import to_target
from tune_timing import per_call

from farcast_cli.tune.layers import Layer, Settings, Stack
from farcast_cli.tune.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ROWS = 64
FOREVER = 1 << 30  # iterations
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
OUT = Path(__file__).resolve().parent / "out" / "tune.json"


def make_rows(width: int, num_rows: int) -> tuple[Any, Any, Objective]:
    """Inputs, targets and a scalar head behind ReLU."""
    random = np.random.default_rng(0)
    head = random.normal(size=(1, width)) / np.sqrt(width)
    inputs = random.normal(size=(num_rows, width)) / np.sqrt(width)
    return inputs, random.normal(size=(num_rows, 1)), Objective("mse", "relu", head)


def stack(base: Any, inputs: Any, targets: Any, objective: Objective) -> Stack:
    """One layer in its dual form, of its Z_0."""
    return Stack([Layer.first(base, inputs @ inputs.T)], objective, targets, np.full(len(inputs), 1 / len(inputs)))


class Dense:
    """Full-batch training of the whole layer, or of a rank-16 LoRA of it, in float32."""

    def __init__(self, weights: Any, inputs: Any, targets: Any, head: Any) -> None:
        self.w, self.x, self.y, self.h = weights, inputs.astype(np.float32), targets.astype(np.float32), head.astype(np.float32)
        random = np.random.default_rng(1)
        self.a = random.normal(size=(16, weights.shape[1])).astype(np.float32) / np.sqrt(np.float32(weights.shape[1]))
        self.b = np.zeros((weights.shape[0], 16), dtype=np.float32)

    def _back(self, pre: Any) -> tuple[float, Any]:
        error = np.maximum(pre, 0) @ self.h.T - self.y
        return float((error**2).mean()), (error * np.float32(2 / error.size)) @ self.h * (pre > 0)

    def full(self, rate: float) -> float:
        loss, gradient = self._back(self.x @ self.w.T)
        change = gradient.T @ self.x
        change *= np.float32(rate)
        self.w -= change
        return loss

    def lora(self, rate: float) -> float:
        low = self.x @ self.a.T
        loss, gradient = self._back(self.x @ self.w.T + low @ self.b.T)  # W itself is read in every iteration
        to_b, to_a = gradient.T @ low, (gradient @ self.b).T @ self.x
        self.b -= np.float32(rate) * to_b
        self.a -= np.float32(rate) * to_a
        return loss


def scaling(widths: tuple[int, ...]) -> list[dict[str, float]]:
    """Time per iteration, in ms, for each width."""
    found = []
    for width in widths:
        inputs, targets, objective = make_rows(width, NUM_ROWS)
        weights = np.random.default_rng(2).standard_normal((width, width), dtype=np.float32)
        dense = Dense(weights, inputs, targets, objective.head)
        base = np.concatenate([inputs @ weights[i : i + 256].astype(np.float64).T for i in range(0, width, 256)], axis=1)
        gd = stack(base, inputs, targets, objective).walk(Settings("gradient-descent", FOREVER, rate=1e-3))
        gn = stack(base, inputs, targets, objective).walk(Settings(ridge=1e-6))
        row: dict[str, float] = {"m": width}
        row["gd"] = per_call(lambda gd=gd: next(gd))  # type: ignore[misc]
        started = time.process_time()
        count = sum(1 for _ in islice(gn, 4))
        row["gn"] = 1000 * (time.process_time() - started) / max(1, count)
        row["dense"] = per_call(lambda dense=dense: dense.full(1e-3))  # type: ignore[misc]
        row["lora"] = per_call(lambda dense=dense: dense.lora(1e-3))  # type: ignore[misc]
        found.append(row)
        print("  ".join(f"{key} {value:9.3f}" for key, value in row.items()), flush=True)
    return found


def exponent(rows: list[dict[str, float]], key: str) -> float:
    logs = np.log([[row["m"], row[key]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def break_even(width: int) -> list[dict[str, float]]:
    """Dense time over ours per iteration, by the number of rows."""
    found = []
    weights = np.random.default_rng(2).standard_normal((width, width), dtype=np.float32)
    for share in (1 / 16, 1 / 4, 1 / 2, 1, 2):
        inputs, targets, objective = make_rows(width, int(width * share))
        base = inputs @ weights.astype(np.float64).T
        gd = stack(base, inputs, targets, objective).walk(Settings("gradient-descent", FOREVER, rate=1e-3))
        dense = Dense(weights.copy(), inputs, targets, objective.head)
        ours, theirs = per_call(lambda gd=gd: next(gd)), per_call(lambda dense=dense: dense.full(1e-3))  # type: ignore[misc]
        found.append({"n/m": share, "speed-up": theirs / ours})
        print(found[-1], flush=True)
    return found


PARTS: dict[str, Callable[[bool], Any]] = {
    "memory": lambda quick: memory(4096 if quick else 16384),
    "scaling": lambda quick: scaling(WIDTHS[:4] if quick else WIDTHS),
    "target": lambda quick: [to_target(width) for width in ((1024,) if quick else (1024, 4096))],
    "break_even": lambda _: break_even(1024),
    "gate": lambda quick: gate_record(10 if quick else NUM_SEEDS),
    "several": lambda quick: several_layers(256 if quick else 1024),
    "relu": lambda quick: shifted_relu(quick=quick),
    "sketch": lambda quick: sketching(((1024, 512, 1024),) if quick else CASES),
}


def main(names: list[str], *, quick: bool) -> None:
    """Measure the parts named, or all; what was measured is saved part by part, beside what an earlier run saved."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(OUT.read_text()) if names and OUT.exists() else {}
    for name in names or PARTS:
        print(f"--- {name}", flush=True)
        found[name] = PARTS[name](quick)
        if name == "scaling":
            found["exponents"] = {key: exponent(found[name], key) for key in ("gd", "gn", "dense", "lora")}
            print(found["exponents"], flush=True)
        OUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word in PARTS], quick="--quick" in sys.argv)
