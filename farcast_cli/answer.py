"""What all answers share: how their values are spelled, and that they are JSON.

A key with a default is absent where it has that value. JSON has no NaN: a number that cannot be computed is null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SkipValidation

from farcast_cli.choices import StepFrom, StepUnit  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.files.reading import portable

DIGITS = 10  # of a figure in a sidecar; the same sums on other processors differ in the fourteenth or later


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ten_digits(value: float) -> float | None:
    """A figure to ten digits: the last ones of a float64 depend on the processor, by whose type numpy's products are summed."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _milliseconds(value: float) -> float:
    return round(value, 3)


def _known(step: int) -> int | None:
    return step if step >= 0 else None


Figure = Annotated[float, PlainSerializer(_finite, return_type=float | None)]
AsGiven = SkipValidation[Figure]  # a whole number stays one: 0 is not written as 0.0
TenDigits = Annotated[float, PlainSerializer(_ten_digits, return_type=float | None)]
Seconds = Annotated[float, PlainSerializer(_milliseconds, return_type=float)]
KnownStep = Annotated[int, PlainSerializer(_known, return_type=int | None)]
PortablePath = Annotated[Path, PlainSerializer(portable, return_type=str)]

SIGNIFICANCE = "p of S: how often chance alone would give so large an S; `null` if S cannot be computed"
COHERENCE = "coherence S of the run's drift; `null` if it cannot be computed"
RECENT = "coherence of the recent half of the history; `null` if it has too few snapshots"
CLOCK = "unit of b: `rate` (learning rate summed over the steps) or `steps`"
PACE_AHEAD = "mean learning rate over the horizon, divided by the mean over the period before it; 1 if steps are counted"
LENGTH_FACTOR = "factor on the update's length: `pace_ahead`, or 1 if it keeps its full length"
UNCHANGED = "share of the forecast values that equal the origin's after rounding (not measured by `--dry-run`, nor if nothing was written)"
STEP_FROM = "`--step-from`: the evidence that tells the steps; absent without"
UNIT = "what every step and horizon counts: `epoch` with `--unit epoch`; absent for steps"
DRY_RUN = "`true` with `--dry-run`; absent otherwise"


class AnswerPart(BaseModel):
    """An object within an answer."""

    model_config = ConfigDict(defer_build=True, frozen=True)


class CountedSteps(AnswerPart):
    """How the steps of a run were counted, if the user said so."""

    step_from: StepFrom | None = Field(default=None, description=STEP_FROM)
    unit: StepUnit = Field(default="step", description=UNIT)


class Answer(AnswerPart):
    """One JSON object: what a command prints, or what a sidecar holds."""

    schema_version: Literal[1] = Field(description="version of this schema; keys may be added without a new version")

    def as_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.model_dump(by_alias=True, exclude_defaults=True), indent=indent)
