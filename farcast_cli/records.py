"""What a sidecar holds: how a forecast or a tuned checkpoint was made, from what, and by which options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from farcast_cli.answer import (
    CLOCK,
    COHERENCE,
    LENGTH_FACTOR,
    PACE_AHEAD,
    RECENT,
    SIGNIFICANCE,
    Answer,
    AnswerPart,
    AsGiven,
    CountedSteps,
    Figure,
    PortablePath,
    Seconds,
    TenDigits,
)
from farcast_cli.choices import ClockName, Verdict  # noqa: TC001 - pydantic reads the annotations


class CopiedEntry(AnswerPart):
    """A tensor that is copied."""

    name: str = Field(description="tensor name")
    reason: str = Field(description="why it is copied")


class EvaluationEntry(AnswerPart):
    """A run of the evaluation command within `predict`."""

    strength: AsGiven = Field(description="factor on the update; 0 is the origin itself")
    value: Figure = Field(description="the number that the command printed last")
    seconds: Seconds = Field(description="seconds that the command took")
    log: PortablePath | None = Field(description="the file with its output")


class FileEntry(AnswerPart):
    """A file of an output."""

    name: str = Field(description="its path within the output; the output's own name if it is one file")
    bytes: int = Field(description="its size")
    fingerprint: str = Field(description="SHA-256 of its start, middle and end, 32 digits; empty for an empty folder")


class InputEntry(AnswerPart):
    """A snapshot that a forecast is made of."""

    path: str = Field(description="the file or folder, relative to the sidecar's output")
    step: int = Field(description="its step")
    bytes: int = Field(description="size of all its files")
    digest: str = Field(description="of its tensors' names, shapes, types and places")
    mean_weight: TenDigits = Field(description="its mean coefficient in the forecast, over all values")


class FittedOn(AnswerPart):
    """What the method learned from."""

    snapshots: int = Field(description="snapshots that `fit` read")
    first_step: int = Field(description="step of the first")
    last_step: int = Field(description="step of the last")
    samples_per_tensor: int | None = Field(description="maximum number of values read from each tensor; `null` with `--full`")


class LeaptOn(AnswerPart):
    """What a leap learned from."""

    stretches: int = Field(description="of a leap: number of stretches in the memory, in place of the keys above")


class ForecastOptions(AnswerPart):
    """The options of a forecast."""

    step_norm: str | None = Field(description="`--step-norm`; `null` for the method's own")
    scale: float = Field(description="`--scale`")
    scope: str = Field(description="`--scope`")
    grad_weight: float = Field(description="`--grad-weight`")
    optimizer: str = Field(description="`--optimizer`")
    counters: str = Field(description="`--counters`")
    dtype: str = Field(description="`--dtype`")
    layout: str = Field(description="`--layout`")
    weights: tuple[str, ...] = Field(default=(), description="`--weights`; absent if all networks were forecast")


class ResumeEntry(AnswerPart):
    """What was moved on."""

    changes: tuple[str, ...] = Field(description="values that were rewritten for resuming, as `where: old -> new`")
    notes: tuple[str, ...] = Field(description="values that could not be advanced exactly, and parts that were left out")


class MomentumEntry(AnswerPart):
    """The memory that a leap is made by."""

    gain: Figure = Field(description="stretches that the leap goes ahead")
    share: Figure = Field(description="part of the predicted move that the last stretches made")
    stretches: int = Field(description="number of stretches in the memory")


class ForecastSidecar(CountedSteps, Answer):
    """The sidecar of what `predict` or `leap` wrote."""

    name: str = Field(description="the output's name")
    farcast_version: str = Field(description="version of farcast that wrote it")
    origin_step: int = Field(description="step of the last snapshot that the forecast uses")
    valid_step: int = Field(description="step that the forecast is for: origin step + horizon")
    horizon: int = Field(description="steps from the origin to the forecast")
    purpose: str = Field(serialization_alias="for", description="`resume` or `evaluation`")
    method: str = Field(description="name of the method; `momentum` for a leap")
    options: ForecastOptions = Field(description="what the command was asked for")
    clock: ClockName = Field(description=CLOCK)
    pace_ahead: TenDigits = Field(description=PACE_AHEAD)
    length_factor: TenDigits = Field(description=LENGTH_FACTOR)
    verdict: Verdict = Field(description="`forecast`; another with `--even-if-worse`")
    ratio: TenDigits = Field(description="back-test ratio b; `null` if it cannot be computed")
    expected_ratio: TenDigits = Field(description="the same back-test of the update as written, not clipped")
    coherence: TenDigits = Field(description=COHERENCE)
    recent_coherence: TenDigits = Field(description=RECENT)
    significance: TenDigits = Field(description=SIGNIFICANCE)
    run: str = Field(description="the run's folder, relative to the output's folder")
    origin: str = Field(description="the origin of the forecast, relative to the output's folder")
    inputs: tuple[InputEntry, ...] = Field(description="the snapshots from which the forecast was computed")
    fitted_on: FittedOn | LeaptOn = Field(description="the data that the method was fitted on")
    copied: tuple[CopiedEntry, ...] = Field(description="tensors that were copied")
    resume: ResumeEntry = Field(description="the changes for resuming")
    evaluations: tuple[EvaluationEntry, ...] = Field(
        default=(), description="with `--eval-cmd`: one entry per trial; absent without"
    )
    momentum: MomentumEntry | None = Field(default=None, description="of a leap: the memory that it used; absent otherwise")
    files: tuple[FileEntry, ...] = Field(description="every file of the output")


class CheckpointFile(AnswerPart):
    """The checkpoint that was tuned."""

    path: str = Field(description="the file or folder, relative to the output's folder")
    bytes: int = Field(description="size of all its files")
    digest: str = Field(description="of its tensors' names, shapes, types and places")


class RowsFile(AnswerPart):
    """The file of labelled rows."""

    path: str = Field(description="the file, relative to the output's folder")
    bytes: int = Field(description="its size")
    sha256: str = Field(description="SHA-256 of the whole file")


class HeldOut(AnswerPart):
    """The rows that judge."""

    before: Figure = Field(description="their mean loss, before")
    after: Figure = Field(description="the same, after")
    z: Figure | None = Field(description="gain, in standard errors; `null` if it is infinite")
    rows: int = Field(description="how many they are; copies, and rows of one group, count once")
    judged_by: str = Field(description="`leave-one-out`, `5 folds` or `--val`")


class TunedOn(AnswerPart):
    """The rows that a layer is tuned on."""

    before: Figure = Field(description="their mean loss, before")
    after: Figure = Field(description="the same, after")
    rows: int = Field(description="how many they are")


class TuneOptions(AnswerPart):
    """The options of a tuning."""

    loss: str = Field(description="`--loss`")
    activation: tuple[str, ...] = Field(description="`--activation`")
    bias: tuple[str, ...] = Field(description="`--bias`")
    head: str | None = Field(description="`--head`")
    head_bias: str | None = Field(description="`--head-bias`")
    anchor: str | None = Field(description="`--anchor`, relative to the output's folder")
    anchor_sha256: str | None = Field(description="SHA-256 of that whole file")
    anchor_weight: Figure | None = Field(description="`--anchor-weight`; `null` for the default")
    covariance: str | None = Field(description="`--covariance`, relative to the output's folder")
    covariance_sha256: str | None = Field(description="SHA-256 of that whole file")
    transposed: bool = Field(description="`--transposed`")
    val: str | None = Field(description="`--val`, relative to the output's folder")
    val_sha256: str | None = Field(description="SHA-256 of that whole file")
    iterations: int | None = Field(description="`--iterations`; `null` for the method's own")
    rate: Figure | None = Field(description="`--rate`; `null` if it was computed from the curvature")
    momentum: Figure | None = Field(description="`--momentum`; `null` for the default")
    weight_decay: Figure | None = Field(description="`--weight-decay`; `null` for none")
    ridge: Figure | None = Field(description="`--ridge`; `null` if rows left out choose it, or for none")
    subsample: int | None = Field(description="`--subsample`")


class TuneSidecar(Answer):
    """The sidecar of what `tune` wrote; without `files`, it is in the metadata of a delta file."""

    command: Literal["tune"] = Field(description="always `tune`")
    name: str = Field(description="the output's name")
    farcast_version: str = Field(description="version of farcast that wrote it")
    layers: tuple[str, ...] = Field(description="the layers that were tuned")
    method: str = Field(description="name of the method, or `apply`")
    input: CheckpointFile = Field(description="the checkpoint that was tuned")
    held_out: HeldOut | None = Field(default=None, description="the rows that judge; absent with `--apply`")
    gate: Figure | None = Field(default=None, description="`--gate`; absent with `--apply`")
    tuned: TunedOn | None = Field(default=None, description="the rows tuned on; absent with `--apply`")
    iterations: int | None = Field(
        default=None, description="iterations, or ridges, until the lowest loss of rows left out; absent with `--apply`"
    )
    relative_change: tuple[Figure | None, ...] = Field(
        default=(),
        description="norm of each layer's change, divided by the layer's norm; `null` if the layer was zero; absent with `--apply`",
    )
    round: str = Field(description="`--round`")
    seed: int = Field(description="`--seed`")
    notes: tuple[str, ...] = Field(description="unusual facts, such as repeated rows, or a cache that did not save time")
    data: RowsFile | None = Field(default=None, description="the file of labelled rows; absent with `--apply`")
    options: TuneOptions | None = Field(default=None, description="what the command was asked for; absent with `--apply`")
    delta: str | None = Field(
        default=None, description="with `--apply`: the delta file, relative to the output's folder; else absent"
    )
    delta_sha256: str | None = Field(default=None, description="with `--apply`: SHA-256 of the delta file; else absent")
    files: tuple[FileEntry, ...] = Field(default=(), description="every file of the output")
