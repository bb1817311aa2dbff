"""What each command answers: the keys of `--json` and of the sidecar, what they mean, and how their values are spelled.

The models are the only source: what is printed, what is written, the JSON schema and docs/json.md all come from them. A key
with a default is absent where it has that value. JSON has no NaN: a number that cannot be computed is null.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from farcast_cli.answer import (
    CLOCK,
    COHERENCE,
    DRY_RUN,
    LENGTH_FACTOR,
    PACE_AHEAD,
    RECENT,
    SIGNIFICANCE,
    UNCHANGED,
    Answer,
    AnswerPart,
    AsGiven,
    CountedSteps,
    Figure,
    KnownStep,
    PortablePath,
    Seconds,
)
from farcast_cli.choices import ClockName, CountersMode, Verdict  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.records import CopiedEntry, EvaluationEntry, ForecastSidecar, TuneSidecar

# --- inspect ---------------------------------------------------------------------------------------------------------


class EvidenceEntry(AnswerPart):
    """A place that names a snapshot's step."""

    source: str = Field(description="kind of evidence")
    where: str = Field(description="file or key")
    step: int = Field(description="the step that it states")


class SnapshotEntry(AnswerPart):
    """A snapshot of the run."""

    path: PortablePath = Field(description="the file or folder")
    step: KnownStep = Field(description="the step of the snapshot; `null` if it is unknown")
    step_source: str = Field(
        description="the evidence that decided the step: `trainer state`, `payload`, `adam step`, `name`, `metadata`, or `order` if"
        " `--steps` assigned the steps"
    )
    bytes: int = Field(description="size of all its files")
    evidence: tuple[EvidenceEntry, ...] = Field(description="every place that states a step, the most trusted first")


class IgnoredEntry(AnswerPart):
    """An entry of the folder that is no part of the run."""

    path: PortablePath = Field(description="the file or folder")
    reason: str = Field(description="why it is left out")


class LeapEntry(AnswerPart):
    """A forecast of the run to resume from, as a ledger records it."""

    origin_step: int = Field(description="step of the snapshot that the forecast was made from")
    valid_step: int = Field(description="step that the forecast is for")
    counters: CountersMode = Field(description="`advance` or `keep`: whether the trainer's counters moved with the weights")
    forecast: PortablePath | None = Field(
        description="the checkpoint that was written; `null` if only the newest snapshot tells of the leap"
    )


class WorthEntry(AnswerPart):
    """What the run's own losses say of its last leap."""

    origin_step: int = Field(description="step of the snapshot that the leap began at")
    kind: Literal["training", "evaluation"] = Field(description="which losses")
    resumes_after: int = Field(description="the trainer's step when it resumed")
    trained: int = Field(description="steps of training since the leap at which the losses are compared")
    loss_before: Figure = Field(description="mean of the last losses before the leap")
    loss_after: Figure = Field(description="mean of as many losses, the last ones up to there")
    loss_of_curve: Figure | None = Field(
        description="the losses before the leap, continued as a + b ln(step) to as many steps after it; `null` if they are too few"
    )
    standard_error: Figure = Field(description="of the difference between `loss_after` and `loss_of_curve`")
    steps_sooner: Figure | None = Field(
        description="steps by which training reached `loss_after` before the curve does; `null` if the curve does not fall clearly"
    )
    is_limit: bool = Field(description="`true` if the curve is too short to tell more steps than `steps_sooner`")


class InspectAnswer(CountedSteps, Answer):
    """`farcast inspect --json`."""

    layout: str = Field(description="name of the layout, see `farcast help formats`")
    snapshots: tuple[SnapshotEntry, ...] = Field(description="one entry per snapshot, in the order of their steps")
    num_tensors: int = Field(description="tensors that would be forecast")
    num_parameters: int = Field(description="values in them")
    copied: tuple[CopiedEntry, ...] = Field(description="tensors that would be copied")
    ignored: tuple[IgnoredEntry, ...] = Field(description="entries of the folder that are not part of the run")
    notes: tuple[str, ...] = Field(description="unusual facts that are no problem, such as names that count in another unit")
    problems: tuple[str, ...] = Field(description="problems to look at; empty if there are none")
    leaps: tuple[LeapEntry, ...] = Field(
        default=(), description="leaps of this run, by the ledgers and its newest snapshot; absent if there are none"
    )
    leap: int | None = Field(
        default=None, description="the step of the leap after which `fit` begins; absent if the run resumed from none"
    )
    worth: WorthEntry | None = Field(
        default=None, description="what the run's losses say of its last leap; absent if it made none or logged none"
    )


# --- fit and backtest ------------------------------------------------------------------------------------------------


class FitAnswer(CountedSteps, Answer):
    """`farcast fit --json`."""

    forecaster: PortablePath | None = Field(
        description="the file that was written; `null` if the Python function `fit` wrote none"
    )
    origin_step: int = Field(description="step of the last snapshot")
    num_snapshots: int = Field(description="snapshots that were read")
    leap: int | None = Field(description="the step of the leap after which the history begins; `null` if there was no leap")
    notes: tuple[str, ...] = Field(
        description="notes on the run, such as the step at which its history begins because its tensors changed"
    )
    num_tensors: int = Field(description="tensors that can be forecast")
    sampled: int | None = Field(description="maximum number of values read from each tensor; `null` with `--full`")
    coherence: Figure = Field(description=COHERENCE)
    recent_coherence: Figure = Field(description=RECENT)
    significance: Figure = Field(description=SIGNIFICANCE)
    bytes_read: int = Field(description="bytes read")
    seconds: Seconds = Field(description="seconds it took")
    worth: WorthEntry | None = Field(
        default=None, description="what the run's losses say of its last leap; absent if it made none or logged none"
    )


class KeptEntry(AnswerPart):
    """A kept snapshot."""

    path: PortablePath = Field(description="the file")
    step: int = Field(description="its step")
    bytes: int = Field(description="its size")
    checkpoint_bytes: int = Field(description="size of the checkpoint that it was copied from")


class KeepAnswer(CountedSteps, Answer):
    """`farcast keep --json`."""

    folder: PortablePath = Field(description="the folder of the kept snapshots")
    added: tuple[PortablePath, ...] = Field(description="the files that were written now")
    removed: tuple[PortablePath, ...] = Field(description="the files that `--last` removed now")
    snapshots: tuple[KeptEntry, ...] = Field(description="every kept snapshot in the folder, in the order of their steps")
    bytes: int = Field(description="size of all kept snapshots")
    checkpoint_bytes: int = Field(description="size of all the checkpoints that they were copied from")
    cautions: tuple[str, ...] = Field(description="checkpoints that were left out, and why")


class ScoreEntry(AnswerPart):
    """A method at a horizon."""

    method: str = Field(description="name of the method")
    horizon: int = Field(description="steps ahead")
    ratio: Figure = Field(description="back-test ratio b, with the clipped update")
    ratio_as_written: Figure = Field(description="the same for the update as the method writes it by default")


class BestEntry(AnswerPart):
    """The method and horizon with the smallest ratio."""

    method: str = Field(description="name of the method")
    horizon: int = Field(description="steps ahead")
    ratio: Figure = Field(description="back-test ratio b")


class DecisionEntry(AnswerPart):
    """The verdict on one horizon."""

    horizon: int = Field(description="steps ahead")
    method: str = Field(description="the method that was asked for, or chosen")
    verdict: Verdict = Field(description="`forecast`, `abstain` or `untestable`")
    ratio: Figure = Field(description="its back-test ratio b")
    recent_coherence: Figure = Field(description="coherence of the recent half of the history")
    reason: str = Field(description="why")


class BacktestAnswer(CountedSteps, Answer):
    """`farcast backtest --json`."""

    origin_step: int = Field(description="step of the last snapshot")
    coherence: Figure = Field(description=COHERENCE)
    significance: Figure = Field(description=SIGNIFICANCE)
    clock: ClockName = Field(description=CLOCK)
    scores: tuple[ScoreEntry, ...] = Field(description="one entry per method and horizon that the history can test")
    best: BestEntry | None = Field(description="the score with the smallest b; `null` if nothing could be tested")
    verdict: Verdict | dict[str, Verdict] = Field(
        description="`forecast`, `abstain` or `untestable`; with several horizons, an object from horizon to verdict"
    )
    decisions: tuple[DecisionEntry, ...] = Field(description="one entry per horizon")


# --- predict and leap ------------------------------------------------------------------------------------------------


class TrialEntry(AnswerPart):
    """A run of the evaluation command within `leap`."""

    strength: AsGiven = Field(description="how far ahead the weights were, in stretches; below 0 it is behind")
    value: Figure = Field(description="the number that the command printed last")
    seconds: Seconds = Field(description="seconds that the command took")


class Forecast(CountedSteps):
    """One horizon's forecast."""

    path: PortablePath | None = Field(description="path of the forecast; `null` if none was written")
    origin_step: int = Field(description="step of the last snapshot that the forecast uses")
    valid_step: int = Field(description="step that the forecast is for: origin step + horizon")
    horizon: int = Field(description="steps from the origin to the forecast")
    method: str = Field(description="name of the method")
    ratio: Figure = Field(description="back-test ratio b; `null` if it cannot be computed")
    expected_ratio: Figure = Field(description="the same back-test of the update as written, not clipped")
    coherence: Figure = Field(description=COHERENCE)
    recent_coherence: Figure = Field(description=RECENT)
    clock: ClockName = Field(description=CLOCK)
    pace_ahead: Figure = Field(description=PACE_AHEAD)
    length_factor: Figure = Field(description=LENGTH_FACTOR)
    significance: Figure = Field(description=SIGNIFICANCE)
    verdict: Verdict = Field(description="`forecast`, `abstain` or `untestable`")
    reason: str = Field(description="the verdict's reason, for people")
    chosen: tuple[str, ...] = Field(
        description="choices that farcast made (horizon, method) and their reasons; empty if there were none"
    )
    num_forecast: int = Field(description="tensors that were forecast")
    num_copied: int = Field(description="tensors that were copied from the origin")
    unchanged_share: float | None = Field(description=UNCHANGED)
    bytes_read: int = Field(description="bytes read from the snapshots")
    bytes_written: int = Field(description="bytes written, for this horizon")
    seconds: Seconds = Field(description="seconds the pass took")
    changes: tuple[str, ...] = Field(description="values that were rewritten for resuming, as `where: old -> new`")
    notes: tuple[str, ...] = Field(description="values that could not be advanced exactly, and parts that were left out")
    evaluations: tuple[EvaluationEntry, ...] = Field(
        default=(), description="with `--eval-cmd`: one entry per trial; absent without"
    )
    existed: bool = Field(
        default=False,
        description="`true` if the same forecast was there already, so that nothing was written; absent otherwise",
    )


class PredictAnswer(Forecast, Answer):
    """`farcast predict --json` for one horizon."""

    dry_run: bool = Field(default=False, description=DRY_RUN)


class PredictManyAnswer(Answer):
    """`farcast predict --json` for several horizons."""

    forecasts: tuple[Forecast, ...] = Field(description="one entry per horizon")
    dry_run: bool = Field(default=False, description=DRY_RUN)


class LeapAnswer(CountedSteps, Answer):
    """`farcast leap --json`."""

    path: PortablePath | None = Field(description="the checkpoint to resume from; `null` if there is no leap")
    origin: PortablePath = Field(description="the newest snapshot; continue from it if there is no leap")
    origin_step: int = Field(description="step of the newest snapshot, from which the leap begins")
    horizon: int = Field(description="length of the leap in steps of the run: gain times `every`; 0 without a leap")
    verdict: Verdict = Field(description="`forecast` or `abstain`")
    reason: str = Field(description="the verdict's reason, for people")
    gain: Figure = Field(description="stretches that a leap goes ahead, after this call")
    share: Figure = Field(
        description="part of the predicted move that the last stretches made; `null` if nothing was predicted yet"
    )
    cosine: Figure = Field(
        description="cosine between the last stretch's move and the predicted move; `null` if nothing was predicted"
    )
    loss_signal: Figure = Field(
        description="with `--eval-cmd`: the fall of the loss over one more stretch, relative to its usual change from call to call,"
        " from -1 to 1; `null` if it is not known yet"
    )
    stretches: int = Field(description="number of stretches in the memory")
    clock: ClockName = Field(description="unit of the lengths of stretches: `rate` or `steps`")
    every: int = Field(description="assumed number of steps until the next leap")
    again: bool = Field(description="`true` if there was no training since the last call; its answer is repeated")
    unchanged_share: Figure | None = Field(description="share of the values that equal the origin's after rounding")
    changes: tuple[str, ...] = Field(description="values that were rewritten for resuming, as `where: old -> new`")
    notes: tuple[str, ...] = Field(description="notes, such as the reason for a new memory")
    evaluations: tuple[TrialEntry, ...] = Field(description="with `--eval-cmd`: one entry per run of the command")
    worth: WorthEntry | None = Field(
        default=None, description="what the run's losses say of its last leap; absent if it made none or logged none"
    )
    dry_run: bool = Field(default=False, description=DRY_RUN)


# --- watch -----------------------------------------------------------------------------------------------------------


class WatchAnswer(CountedSteps, Answer):
    """`farcast watch --json`: one object on each line, for each event. A key that does not belong to the event is absent."""

    event: Literal["judged", "leap", "command", "problem", "waiting", "end"] = Field(
        description="`judged`: a new snapshot and the verdict; `leap`: a forecast was written; `command`: the command of `--on-leap` has"
        " ended; `problem`: the watch goes on; `waiting`: once in ten minutes; `end`: the watch has ended"
    )
    time: str = Field(description="when, in UTC")
    run: PortablePath = Field(description="the run's folder")
    origin_step: int | None = Field(default=None, description="step of the newest snapshot; absent before the first")
    num_snapshots: int | None = Field(default=None, description="`judged`: snapshots in the history")
    since_leap: int | None = Field(
        default=None, description="`judged`: the step of the leap after which the history begins; absent if there was no leap"
    )
    verdict: Verdict | None = Field(default=None, description="`judged`: `forecast`, `abstain` or `untestable`")
    words: str | None = Field(default=None, description="`judged`: the verdict for people")
    reason: str | None = Field(default=None, description="`judged`: why; `end`: why the watch ended")
    horizon: int | None = Field(default=None, description="`judged`: steps that a leap would skip; 0 if it was not judged")
    coherence: Figure | None = Field(default=None, description=f"`judged`: {COHERENCE}")
    significance: Figure | None = Field(default=None, description=f"`judged`: {SIGNIFICANCE}")
    ratio: Figure | None = Field(default=None, description="`judged`: back-test ratio b; `null` if it cannot be computed")
    path: PortablePath | None = Field(
        default=None, description="`leap`: the checkpoint to resume from; `command`: that it ran for"
    )
    valid_step: int | None = Field(default=None, description="`leap`: step that the forecast is for")
    existed: bool = Field(default=False, description="`leap`: `true` if it was there already; absent otherwise")
    failed: str | None = Field(default=None, description="`command`: what went wrong; absent if nothing did")
    log: PortablePath | None = Field(default=None, description="`command`: the file with its output")
    seconds: Seconds | None = Field(
        default=None, description="`command`: how long it ran; `waiting`: age of the newest snapshot"
    )
    message: str | None = Field(default=None, description="`problem`: what is wrong, in one line; `waiting`: what for")
    hint: str | None = Field(default=None, description="`problem`: what to do about it; absent if nothing is known")


# --- report ----------------------------------------------------------------------------------------------------------


class MovesEntry(AnswerPart):
    """The moves between neighbouring snapshots."""

    steps: tuple[int, ...] = Field(description="the snapshots' steps; of a long history every second or third, and so on")
    cosines: tuple[tuple[Figure, ...], ...] = Field(description="cosines between the moves, row by row")


class DirectionEntry(AnswerPart):
    """What the direction of the run allowed at one snapshot, by the snapshots up to it."""

    step: int = Field(description="step of the snapshot")
    horizon: int = Field(description="steps ahead of the short leap that is judged")
    coherence: Figure = Field(description=COHERENCE)
    needed: Figure = Field(description="what S must exceed")
    recent_coherence: Figure = Field(description=RECENT)
    needed_recent: Figure = Field(description="what it must exceed, if it can be computed")
    significance: Figure = Field(description=SIGNIFICANCE)
    highest_significance: Figure = Field(description="the highest p that passes")
    is_steady: bool = Field(description="whether S and p allowed a leap")


class TensorErrorEntry(AnswerPart):
    """A tensor in the back-test."""

    name: str = Field(description="tensor name")
    num_elements: int = Field(description="values in it")
    ratio: Figure = Field(description="its own back-test ratio b; `null` if it did not move")


class TensorsEntry(AnswerPart):
    """The back-test tensor by tensor."""

    horizon: int = Field(description="steps ahead")
    method: str = Field(description="name of the method")
    errors: tuple[TensorErrorEntry, ...] = Field(description="one entry per tensor, the most exact first")


class LossEntry(AnswerPart):
    """A loss that the run logged."""

    kind: str = Field(description="`training` or `evaluation`")
    step: int = Field(description="step")
    loss: Figure = Field(description="the loss")


class MadeLeapEntry(AnswerPart):
    """A leap that the run made."""

    step: int = Field(description="step of the trainer's counters when training resumed from it")
    horizon: int = Field(description="its length in steps")


class ReportAnswer(Answer):
    """`farcast report --json`."""

    path: PortablePath | None = Field(description="path of the report; `null` if none was written")
    title: str = Field(description="the verdict, for people")
    why: str = Field(description="its reason, for people")
    sure: str = Field(description="how sure it is, for people; empty if there is no p")
    next: str = Field(description="what to do, for people")
    forecast: Forecast = Field(description="what `predict` would do without `--horizon`; nothing was written")
    moves: MovesEntry = Field(description="the heat map")
    directions: tuple[DirectionEntry, ...] = Field(description="one entry per snapshot from the sixth on")
    scores: tuple[ScoreEntry, ...] = Field(description="the back-test, as in `backtest --json`")
    tensors: TensorsEntry = Field(description="the back-test tensor by tensor, at the tested horizon nearest to the forecast's")
    losses: tuple[LossEntry, ...] = Field(
        description="the losses that the run logged, at most 2000 of each kind, spread evenly; empty if none were found"
    )
    leaps: tuple[MadeLeapEntry, ...] = Field(description="the leaps that the run resumed from")
    facts: dict[str, str] = Field(description="the run in facts, for people")


# --- verify ----------------------------------------------------------------------------------------------------------


class TensorRatio(AnswerPart):
    """One tensor against the truth."""

    name: str = Field(description="tensor name")
    num_elements: int = Field(description="values in it")
    ratio: Figure | None = Field(description="its ratio; `null` if the tensor did not move")


class VerifyAnswer(Answer):
    """`farcast verify --json`: a forecast against the truth."""

    ratio: Figure | None = Field(
        description="error of the forecast divided by that of the reference: 0 perfect, 1 no better; `null` if nothing moved"
    )
    mean_absolute_error: Figure = Field(description="of the forecast, over all compared values")
    reference: PortablePath = Field(description="the checkpoint that the forecast was compared with")
    forecast_step: KnownStep = Field(description="step of the forecast; `null` if it is unknown")
    truth_step: KnownStep = Field(description="step of the run's own snapshot; `null` if it is unknown")
    clock: ClockName = Field(description="unit of `trained`: `rate` (learning rate summed over the steps) or `steps`")
    trained: Figure | None = Field(
        description="part of the horizon that training has covered; 1 if both have the same step, `null` if a step is unknown"
    )
    per_tensor: tuple[TensorRatio, ...] = Field(description="one entry per tensor")
    descends: bool = Field(
        default=False,
        description="`true` if the snapshot seems to come from a run that resumed from this forecast, which makes the comparison"
        " unfair; absent otherwise",
    )


# --- tune ------------------------------------------------------------------------------------------------------------


class TuneAnswer(Answer):
    """`farcast tune --json`."""

    path: PortablePath | None = Field(description="the written file; `null` if the gate rejected the tuning")
    layers: tuple[str, ...] = Field(description="the layers that were tuned")
    method: str = Field(description="name of the method, `apply` or `covariance`")
    verdict: Literal["tuned", "no significant gain", "applied", "covariance"] = Field(
        description="`tuned`, `no significant gain`, `applied`, or `covariance` with `--covariance-out`"
    )
    held_out_before: Figure | None = Field(description="mean loss of rows not seen, before; `null` with `--apply`")
    held_out_after: Figure | None = Field(description="the same, after")
    z: Figure | None = Field(description="gain on the rows not seen, in standard errors")
    tuned_before: Figure | None = Field(description="mean loss of the rows tuned on, before")
    tuned_after: Figure | None = Field(description="the same, after")
    judged_by: str | None = Field(description="what judged: `leave-one-out`, `5 folds` or `--val`; `null` with `--apply`")
    num_rows: int = Field(description="number of rows, which are all tuned on")
    iterations: int = Field(description="iterations, or ridges, until the lowest loss of rows left out")
    relative_change: tuple[Figure | None, ...] = Field(
        description="norm of each layer's change, divided by the layer's norm; `null` if the layer was zero"
    )
    passes: int = Field(description="passes over the weights during tuning")
    bytes_read: int = Field(description="bytes of weights read: to tune, to write, to check")
    bytes_written: int = Field(description="bytes written")
    seconds: Seconds = Field(description="seconds it took")
    notes: tuple[str, ...] = Field(description="unusual facts, such as repeated rows, or a cache that did not save time")
    existed: bool = Field(
        default=False,
        description="`true` if the same output was there already, so that nothing was written; absent otherwise",
    )


# --- errors ----------------------------------------------------------------------------------------------------------


class ErrorEntry(AnswerPart):
    """What went wrong."""

    code: int = Field(description="the exit code of the command, see `farcast help exit-codes`")
    message: str = Field(description="what went wrong, in one line")
    hint: str | None = Field(description="what to do about it; `null` if nothing is known")
    path: PortablePath | None = Field(description="the file or folder that the message is about; `null` if it is about none")


class ErrorAnswer(Answer):
    """With `--json`, every command that ends without its own answer."""

    error: ErrorEntry = Field(description="what went wrong")


# --- the schema ------------------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[type[Answer], ...]] = {
    "inspect": (InspectAnswer,),
    "keep": (KeepAnswer,),
    "fit": (FitAnswer,),
    "backtest": (BacktestAnswer,),
    "report": (ReportAnswer,),
    "predict": (PredictAnswer, PredictManyAnswer),
    "verify": (VerifyAnswer,),
    "leap": (LeapAnswer,),
    "watch": (WatchAnswer,),
    "tune": (TuneAnswer,),
    "sidecar": (ForecastSidecar, TuneSidecar),
    "error": (ErrorAnswer,),
}
"""The forms of each answer, by the command; `sidecar` is the file, `error` what any command prints that fails."""


class _Plain(GenerateJsonSchema):
    """A schema without titles that only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def schema(command: str) -> dict[str, Any]:
    """The JSON schema of an answer, by a name of `ANSWERS`."""
    first, *others = ANSWERS[command]
    forms: Any = first
    for other in others:
        forms |= other
    content = TypeAdapter(forms).json_schema(mode="serialization", schema_generator=_Plain)
    return {"$schema": GenerateJsonSchema.schema_dialect, **content}
