"""The sidecar of a forecast: of what it was made, and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli import __version__
from farcast_cli.files.place import SIDECAR, list_files, open_new
from farcast_cli.files.reading import portable, relative
from farcast_cli.records import (
    CopiedEntry,
    EvaluationEntry,
    FileEntry,
    ForecastOptions,
    ForecastSidecar,
    InputEntry,
    ResumeEntry,
)

if TYPE_CHECKING:
    from farcast_cli.evaluation.judge import Trial
    from farcast_cli.records import FittedOn, LeaptOn, MomentumEntry, TuneSidecar
    from farcast_cli.request import Outcome, Prepared, Request


def write_sidecar(written: Path, beside: Path | None, content: ForecastSidecar | TuneSidecar) -> None:
    """Write a sidecar.

    Args:
        written: the output, where it is now.
        beside: where the sidecar of a single file is written; inside the folder if None.
    """
    place = beside or written / SIDECAR
    place.unlink(missing_ok=True)  # the origin's own, copied with its folder
    with open_new(place, like=written) as file:
        file.write((content.as_json(indent=2) + "\n").encode())


def files_of(written: Path) -> tuple[FileEntry, ...]:
    """The files of an output, as its sidecar lists them."""
    return tuple(FileEntry(**file) for file in list_files(written))


def compose(
    prepared: Prepared,
    outcome: Outcome,
    request: Request,
    *,
    written: Path,
    fitted_on: FittedOn | LeaptOn,
    momentum: MomentumEntry | None = None,
) -> ForecastSidecar:
    """The content of a forecast's sidecar.

    Args:
        written: the forecast, where it is now.
    """
    assert outcome.path is not None  # noqa: S101 - only written forecasts have one
    home, decision = outcome.path.resolve().parent, outcome.decision
    return ForecastSidecar(
        schema_version=1,
        step_from=outcome.rule.source,
        unit=outcome.rule.unit,
        name=portable(outcome.path.name),
        farcast_version=__version__,
        origin_step=outcome.origin_step,
        valid_step=outcome.valid_step,
        horizon=outcome.horizon,
        purpose=request.purpose,
        method=outcome.method,
        options=_options(request, prepared.origin.weights),
        clock=outcome.pace.clock,
        pace_ahead=outcome.pace_ahead,
        length_factor=outcome.length_factor,
        verdict=decision.verdict,
        ratio=decision.ratio,
        expected_ratio=decision.expected,
        coherence=decision.coherence,
        recent_coherence=decision.recent,
        significance=decision.significance.p,
        run=relative(prepared.run, home),
        origin=relative(prepared.origin.path, home),
        inputs=_inputs(prepared, prepared.paths.index(outcome.path), home),
        fitted_on=fitted_on,
        copied=tuple(CopiedEntry(name=c.name, reason=c.reason) for c in prepared.engine.inputs.alignment.copied),
        resume=ResumeEntry(changes=outcome.changes, notes=outcome.notes),
        evaluations=tuple(_evaluation(trial, home) for trial in outcome.trials),
        momentum=momentum,
        files=files_of(written),
    )


def _options(request: Request, weights: tuple[str, ...]) -> ForecastOptions:
    return ForecastOptions(
        step_norm=request.options.step_norm,
        scale=request.options.scale,
        scope=request.options.scope,
        grad_weight=request.options.grad_weight,
        optimizer=request.optimizer,
        counters=request.counters,
        dtype=request.dtype,
        layout=request.layout,
        weights=weights,
    )


def _inputs(prepared: Prepared, index: int, home: Path) -> tuple[InputEntry, ...]:
    """The snapshots, with the mean of their coefficients in one of the forecasts; the origin's update is added to itself."""
    source = prepared.engine.inputs
    sizes = np.array([tensor.num_elements for tensor in source.alignment.tensors], dtype=float)
    num_files = len(source.alignment.tensors[0].entries)
    mean = sizes @ source.linear.weights[index, : len(sizes), :num_files] / sizes.sum()
    mean[source.linear.origin] += 1
    mean = mean[-len(prepared.snapshots) :]  # a memory is no snapshot
    return tuple(
        InputEntry(path=relative(s.path, home), step=s.step, bytes=s.num_bytes, digest=s.digest, mean_weight=float(weight))
        for s, weight in zip(prepared.snapshots, mean, strict=True)
    )


def _evaluation(trial: Trial, home: Path) -> EvaluationEntry:
    log = trial.log and Path(os.path.relpath(trial.log.resolve(), home))
    return EvaluationEntry(strength=trial.strength, value=trial.value, seconds=trial.seconds, log=log)
