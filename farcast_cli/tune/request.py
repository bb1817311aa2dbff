"""What `tune` is asked for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farcast_cli.choices import DEFAULT_GATE
from farcast_cli.tune.delta import Rounded
from farcast_cli.tune.layers import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.choices import ActivationName, LossName
    from farcast_cli.tune.gate import GateResult


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What the user asked `tune` for."""

    checkpoint: Path
    layers: tuple[str, ...]
    data: Path
    loss: LossName
    biases: tuple[str, ...] = ()
    activations: tuple[ActivationName, ...] = ()
    head: str | None = None
    head_bias: str | None = None
    is_transposed: bool = False
    anchor: Path | None = None
    anchor_weight: float | None = None
    """Of soft anchors, or of the covariance; without it anchors are hard."""
    covariance: Path | None = None
    val: Path | None = None
    settings: Settings = field(default_factory=Settings)
    gate: float = DEFAULT_GATE
    subsample: int | None = None
    rounded: Rounded = field(default_factory=Rounded)
    output: Path | None = None
    delta_out: Path | None = None
    lora_out: Path | None = None
    overwrite: bool = False
    num_threads: int = 1


@dataclass(frozen=True, slots=True)
class TuneOutcome:
    """What came of it; `path` is None where the gate was against it."""

    layers: tuple[str, ...]
    method: str
    verdict: GateResult | None = None
    path: Path | None = None
    num_rows: int = 0
    iterations: int = 0
    tuned_loss: tuple[float, float] = (0.0, 0.0)
    """Of the rows tuned on, before and after."""
    sizes: tuple[float, ...] = ()
    num_passes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    has_closed_form: bool = False
    """Whether `iterations` counts ridges that were tried."""
    existed: bool = False
    """Whether the same output was there already."""
