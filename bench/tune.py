"""What `farcast tune` costs and what it is worth: time per iteration by width, memory, and the gate's record.

    python bench/tune.py            some minutes; 1 GiB of disk in a temporary folder
    python bench/tune.py --quick    widths up to 4096, no memory run

Dense training runs in float32, as people train; tune runs in float64, as it ships. One thread.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from farcast_cli.formats.safetensors_file import encode_header
from farcast_cli.tensors import DTYPES
from farcast_cli.tune.gate import judge
from farcast_cli.tune.objective import Objective
from farcast_cli.tune.one_layer import Problem, Rows, Settings, descend, newton, tune

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ROWS = 64
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
OUT = Path(__file__).resolve().parent / "out" / "tune.json"


def per_call(action: Callable[[], object], *, at_least_s: float = 0.3) -> float:
    """The smallest of three mean CPU times, in ms."""
    action()
    times = []
    for _ in range(3):
        count, started = 0, time.process_time()
        while time.process_time() - started < at_least_s / 3 or not count:
            action()
            count += 1
        times.append((time.process_time() - started) / count)
    return 1000 * min(times)


def make_rows(width: int, num_rows: int) -> tuple[Any, Any, Objective]:
    """Inputs, targets and a scalar head behind ReLU."""
    random = np.random.default_rng(0)
    head = random.normal(size=(1, width)) / np.sqrt(width)
    inputs = random.normal(size=(num_rows, width)) / np.sqrt(width)
    return inputs, random.normal(size=(num_rows, 1)), Objective("mse", "relu", head)


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
        problem = Problem(objective, Rows(base, inputs @ inputs.T, targets))
        gd, gn = descend(problem, Settings("gradient-descent", rate=1e-3)), newton(problem, Settings(ridge=1e-6))
        row: dict[str, float] = {"m": width}
        row["gd"] = per_call(lambda gd=gd: next(gd))  # type: ignore[misc]
        started = time.process_time()
        count = sum(1 for _, _ in zip(gn, range(4), strict=False))
        row["gn"] = 1000 * (time.process_time() - started) / max(1, count)
        row["dense"] = per_call(lambda dense=dense: dense.full(1e-3))  # type: ignore[misc]
        row["lora"] = per_call(lambda dense=dense: dense.lora(1e-3))  # type: ignore[misc]
        found.append(row)
        print("  ".join(f"{key} {value:9.3f}" for key, value in row.items()), flush=True)
    return found


def exponent(rows: list[dict[str, float]], key: str) -> float:
    logs = np.log([[row["m"], row[key]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def to_target(width: int) -> dict[str, float]:
    """CPU seconds until the loss is 1e-3 of the first, first and last pass over W included; nan where 300 do not do."""
    inputs, targets, objective = make_rows(width, NUM_ROWS)
    weights = np.random.default_rng(2).standard_normal((width, width), dtype=np.float32)
    goal = 1e-3
    started = time.process_time()
    base = np.concatenate([inputs @ weights[i : i + 256].astype(np.float64).T for i in range(0, width, 256)], axis=1)
    problem = Problem(objective, Rows(base, inputs @ inputs.T, targets))
    point = problem.start
    first = None
    for point, loss in newton(problem, Settings()):  # noqa: B007 - the last one is used
        first = first or loss
        if loss <= goal * first:
            break
    for i in range(0, width, 256):
        weights[i : i + 256] + (point.factors[:, i : i + 256].T @ inputs).astype(np.float32)
    found = {"m": width, "tune": time.process_time() - started}
    from farcast_cli.tune.one_layer import largest_curvature

    rate = 1 / largest_curvature(problem, problem.start)
    for name in ("full", "lora"):
        runs = []
        for factor in (0.1, 1.0) if name == "full" else (0.1, 1.0, 10.0, 100.0):  # the best rate of some
            dense = Dense(weights.copy(), inputs, targets, objective.head)
            started, first = time.process_time(), None
            for step in range(300):  # noqa: B007 - the last one is told
                loss = getattr(dense, name)(rate * factor)
                first = first or loss
                if loss <= goal * first or not loss < 100 * first:
                    break
            runs.append(
                (loss / first > goal or not np.isfinite(loss), loss / first, time.process_time() - started, step, factor)
            )
        missed, left, spent, step, factor = min(runs)
        found |= {
            f"{name}_s": spent,
            f"{name}_left": left,
            f"{name}_steps": step,
            f"{name}_rate": factor,
            f"{name}_missed": missed,
        }
    print(found, flush=True)
    return found


def break_even(width: int) -> list[dict[str, float]]:
    """Dense time over ours per iteration, by the number of rows."""
    found = []
    weights = np.random.default_rng(2).standard_normal((width, width), dtype=np.float32)
    for share in (1 / 16, 1 / 4, 1 / 2, 1, 2):
        inputs, targets, objective = make_rows(width, int(width * share))
        base = inputs @ weights.astype(np.float64).T
        gd = descend(Problem(objective, Rows(base, inputs @ inputs.T, targets)), Settings("gradient-descent", rate=1e-3))
        dense = Dense(weights.copy(), inputs, targets, objective.head)
        ours, theirs = per_call(lambda gd=gd: next(gd)), per_call(lambda dense=dense: dense.full(1e-3))  # type: ignore[misc]
        found.append({"n/m": share, "speed-up": theirs / ours})
        print(found[-1], flush=True)
    return found


def memory(width: int = 16384) -> dict[str, float]:
    """Peak resident memory of a process that tunes a 1 GiB layer, up to the written delta."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_1.safetensors"
        random = np.random.default_rng(0)
        with path.open("wb") as file:
            file.write(encode_header([("w", DTYPES["float32"], (width, width))], {}))
            for _ in range(0, width, 256):
                file.write(random.standard_normal((256, width), dtype=np.float32).data)
        inputs = random.standard_normal((128, width), dtype=np.float32) / np.sqrt(np.float32(width))
        np.savez(Path(folder) / "rows.npz", x=inputs, y=np.tanh(inputs @ random.standard_normal((width, 8))))
        done = subprocess.run([sys.executable, __file__, "--child", folder], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    print(found, flush=True)
    return found


def child(folder: Path) -> None:
    from farcast_cli.trajectory import open_snapshot
    from farcast_cli.tune.data import read_data, split
    from farcast_cli.tune.solve import Model, solve
    from farcast_cli.tune.weight import find_weight

    started = time.monotonic()
    weight = find_weight(open_snapshot(folder / "step_1.safetensors"), "w")
    head = np.random.default_rng(1).normal(size=(8, weight.num_outputs)) / np.sqrt(weight.num_outputs)
    data = read_data(folder / "rows.npz", "mse")
    model = Model((weight,), (), Objective("mse", "relu", head))
    solved = solve(model, data, split(data, holdout=0.25, seed=0), Settings())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({"peak_mib": peak, "seconds": time.monotonic() - started, "losses": solved.losses[:1] + solved.losses[-1:]})
    )


def gate_record(count: int = 24) -> dict[str, Any]:
    """Tunings that should help (a shifted model's targets) and that should not (the model's own, with noise)."""
    width, record = 256, {}
    for name, shift in (("should help", 1.0), ("should not", 0.0)):
        accepted = harmful = would_harm = 0
        for seed in range(count):
            random = np.random.default_rng(seed)
            weights, change = random.normal(size=(2, width, width)) / np.sqrt(width)
            head = random.normal(size=(4, width)) / np.sqrt(width)
            objective = Objective("mse", "relu", head)
            inputs = random.normal(size=(2256, width)) @ random.normal(size=(width, width)) * np.linspace(1, 0, width) ** 4 / 8
            truth = objective.outputs(inputs @ (weights + shift * change).T)
            targets = truth + 0.3 * truth.std() * random.normal(size=truth.shape)
            base, overlap = inputs @ weights.T, inputs @ inputs[:160].T
            rows = Rows(base, overlap, targets)
            early = Rows(base[160:192], overlap[160:192], targets[160:192])
            found = tune(Problem(objective, Rows(base[:160], overlap[:160], targets[:160]), early), Settings())
            before, after = objective.row_losses(base, targets), objective.row_losses(rows.pre(found.point), targets)
            verdict = judge(before[192:256], after[192:256], np.arange(64), threshold=3)
            is_harm = bool(after[256:].mean() > before[256:].mean())
            accepted, harmful = accepted + verdict.is_accepted, harmful + (verdict.is_accepted and is_harm)
            would_harm += is_harm
        record[name] = {
            "tunings": count,
            "accepted": accepted,
            "accepted and harmful": harmful,
            "harmful if all were": would_harm,
        }
        print(name, record[name], flush=True)
    return record


def main(*, quick: bool) -> None:
    widths = WIDTHS[:4] if quick else WIDTHS
    apart = {} if quick else {"memory": memory()}  # first: a child's peak counts what its parent holds at the fork
    rows = scaling(widths)
    found: dict[str, Any] = {
        **apart,
        "scaling": rows,
        "exponents": {key: exponent(rows, key) for key in ("gd", "gn", "dense", "lora")},
    }
    print(found["exponents"], flush=True)
    found["gate"] = gate_record()
    found["target"] = to_target(2048)
    found["break_even"] = break_even(1024)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(Path(sys.argv[-1]))
    else:
        main(quick="--quick" in sys.argv)
