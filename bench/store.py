"""Where results are kept: one JSON file per cell, named by everything that determines what is in it.

A cell is one measurement of one training run. Its name holds a hash of the run, of its own settings, of the library
versions and of the code that it goes through (docstrings and comments apart), so that a result is never mistaken for
another, and a second start does only what is missing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import farcast_cli

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tasks import Spec

HERE = Path(__file__).resolve().parent
OUT = HERE / "out" / "quality"
FARCAST = Path(farcast_cli.__file__).parent
STATISTIC = ("forecast.accumulate", "forecast.gram", "forecast.products", "engine.reader", "forecast.forecaster_file")
_FORECASTERS = ("forecast.timeline", "forecast.forecaster", "forecast.methods", "forecast.lfd2")
FORECAST = (*STATISTIC, *_FORECASTERS, "engine.linear", "engine.arithmetic", "engine.write")
GATE = (*FORECAST, "forecast.backtest")
LEAPING = (
    "forecast.momentum",
    "forecast.memory",
    "forecast.accumulate",
    "leaps.*",
    "run.pace",
    "engine.linear",
    "engine.arithmetic",
)
CODE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of bench/ and of farcast (globs), by kind of cell
    "pretrain": (("tasks", "training"), ()),
    "plain": (("tasks", "training"), ()),
    "fit": (("tasks", "training"), STATISTIC),
    "ratio": (("tasks", "training", "cells"), GATE),
    "resume": (("tasks", "training", "cells"), FORECAST),
    "context": (("tasks", "training", "cells"), FORECAST),
    "evaluation": (("tasks", "training", "cells"), (*GATE, "forecast.choice", "prediction")),
    "regression": (("tasks", "training", "paper"), FORECAST),
    "distilbert": (("tasks", "training", "paper"), FORECAST),
    "whole": (("tasks", "training", "whole"), (*GATE, "forecast.choice", "prediction", "forecast.ledger")),
    "anneal": (("tasks", "training", "anneal"), ("forecast.*", "state.*", "engine.*", "prediction")),
    "memory": (("tasks", "training", "memory"), ()),
    "memory leaps": (("tasks", "training", "memory"), LEAPING),  # and `random`, which copies their norms
    "memory judged": (("tasks", "training", "memory", "judge"), LEAPING),
    "memory random": (("tasks", "training", "memory"), LEAPING),
}


@dataclass(frozen=True)
class Cell:
    """One measurement. `origin` is a share of the run, `lead` of the history, `method` a method or a way to leap."""

    kind: str
    spec: Spec
    origin: float = 0.0
    lead: float = 0.0
    method: str = ""

    @property
    def label(self) -> str:
        parts = [self.kind, self.spec.name, f"s{self.spec.seed}"]
        parts += [f"at{self.origin:g}"] if self.origin else []
        parts += [f"lead{self.lead:g}"] if self.lead else []
        return "-".join([*parts, self.method] if self.method else parts)

    @property
    def code(self) -> str:
        """The entry of CODE: of the kind, or of the kind and the way to leap where that has one of its own."""
        own = f"{self.kind} {self.method.partition('-')[0]}"
        return own if own in CODE else self.kind

    @property
    def name(self) -> str:
        return f"{self.label}-{_digest(self)}"

    @property
    def path(self) -> Path:
        return OUT / f"{self.name}.json"

    def read(self) -> dict[str, Any] | None:
        """The stored record: `result`, `cpu_s` and `machine`; None where there is none."""
        with suppress(FileNotFoundError):
            return dict(json.loads(self.path.read_text()))
        return None


@functools.cache
def _digest(cell: Cell) -> str:
    versions = [platform.python_version(), *map(version, ("torch", "transformers", "scikit-learn", "numpy"))]
    text = json.dumps([asdict(cell), versions, _code(cell.code)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _code(kind: str) -> str:
    ours, theirs = CODE[kind]
    return code_digest(ours, theirs)


def code_digest(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """A hash of what modules of bench/ and of farcast do; a farcast name may be a glob, which may match nothing."""
    files = [HERE / f"{name}.py" for name in ours]
    for name in theirs:
        path = name.replace(".", "/") + ".py"
        files += sorted(FARCAST.glob(path)) if "*" in name else [FARCAST / path]
    return hashlib.sha256("".join(map(_meaning, files)).encode()).hexdigest()


def _meaning(file: Path) -> str:
    """The code of a module without its comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def fill(cell: Any, measure: Callable[[Any], dict[str, Any]]) -> None:
    """Measure a cell, which is a dataclass with a `path`, and store the result there, whole or not at all."""
    started = time.process_time()
    result = measure(cell)
    used = round(time.process_time() - started, 1)
    record = {"cell": asdict(cell), "machine": machine(), "cpu_s": used, "result": result}
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cell.path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(record, file)
    Path(temporary).replace(cell.path)


@functools.cache
def machine() -> str:
    """What it ran on, in words."""
    libraries = f"torch {version('torch')}, Python {platform.python_version()}"
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {libraries}"


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return platform.machine()
