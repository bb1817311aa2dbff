"""What an option of the command line may be, and its default: each is written here once.

Imports nothing heavy, so that the command line can show its help before anything is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Purpose = Literal["resume", "evaluation"]
ClockName = Literal["steps", "rate"]
StepNorm = Literal["match", "match-plain", "clip", "free"]
Scope = Literal["auto", "tensor", "global"]
OptimizerMode = Literal["copy", "zero-momentum", "reset", "drop"]
CountersMode = Literal["advance", "keep"]
OutputDType = Literal["source", "float32", "bfloat16", "float16"]
OutputLayout = Literal["same", "safetensors", "pt", "dcp", "hub"]
PrintedForm = Literal["markdown", "text"]
Verdict = Literal["forecast", "abstain", "untestable"]
StepFrom = Literal["name", "adam", "payload", "metadata", "trainer"]
"""Which evidence for the steps is right, if the user says so."""
StepUnit = Literal["step", "epoch"]
"""What the steps of a run count."""

Io = Literal["auto", "pread", "mmap"]
"""How files are read and written.

`pread` reads into memory of our own and writes through the page cache; `auto` reads likewise and writes past the page
cache where the system allows it; `mmap` writes as `auto` does and reads the page cache in place, which
saves a copy, but a file that is cut short while it is read, or a disk that fails, then ends the process (SIGBUS).
"""

Ranks = Literal["off", "env"]
"""Whether a launcher's processes share the work: `env` reads its variables, which say which process this is."""

SolverName = Literal["gauss-newton", "gradient-descent"]
LossName = Literal["mse", "cross-entropy"]
ActivationName = Literal["none", "relu", "gelu", "gelu-tanh", "silu", "tanh"]
Rounding = Literal["nearest", "stochastic"]

KeepForm = Literal["sampled", "weights"]
"""What `watch` keeps of a snapshot: the values that `fit` reads, or all weights."""

DEFAULT_RANKS_TIMEOUT = 600.0  # seconds that a rank waits for another that says nothing
DEFAULT_INTERVAL = 10.0  # seconds between two looks at a run: a snapshot counts at the second look
DEFAULT_SAMPLE = 16_384  # elements per tensor; 10,000 agree with the full pass within .001 of the ratio
MOMENTUM = 0.9
DEFAULT_WEIGHT = 100.0  # of soft anchors
FOLDS = 5  # of the rows to tune on, each left out once
DEFAULT_GATE = 3.0  # standard errors
DEFAULT_FORECASTER = Path("forecaster.safetensors")
DEFAULT_FOLDER = Path("forecasts")
DEFAULT_KEPT = Path("kept")
DEFAULT_REPORT = Path("report.html")
DEFAULT_LEDGER = DEFAULT_FOLDER / "ledger.jsonl"
