"""What a forecast's sidecar says: of what it was made, and how."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli import __version__
from farcast_cli.formats.files import portable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from farcast_cli.job import Outcome, Prepared, Request

DIGITS = 10  # of a figure; the same sums on other processors differ in the fourteenth or later


def compose(prepared: Prepared, outcome: Outcome, request: Request, fitted_on: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a forecast's sidecar; `write_sidecar` adds the files.

    Args:
        fitted_on: of what the method learned.
    """
    assert outcome.path is not None  # noqa: S101 - only written forecasts have one
    home = outcome.path.resolve().parent
    linear = prepared.engine.source.linear
    index = prepared.targets.index(outcome.path)
    sizes = np.array([tensor.num_elements for tensor in prepared.engine.source.alignment.tensors], dtype=float)
    mean = (sizes @ linear.weights[index] / sizes.sum())[-len(prepared.snapshots) :]  # a memory is no snapshot
    content: dict[str, Any] = {
        "schema_version": 1,
        "name": portable(outcome.path.name),
        "farcast_version": __version__,
        "origin_step": outcome.origin_step,
        "valid_step": outcome.valid_step,
        "horizon": outcome.horizon,
        "for": request.purpose,
        "method": outcome.method,
        "options": {
            "step_norm": request.options.step_norm,
            "scale": request.options.scale,
            "scope": request.options.scope,
            "grad_weight": request.options.grad_weight,
            "optimizer": request.optimizer,
            "counters": request.counters,
            "dtype": request.dtype,
            "layout": request.layout,
        },
        "clock": outcome.pace.clock,
        "pace_ahead": _number(outcome.pace_ahead),
        "length_factor": _number(outcome.length_factor),
        "verdict": outcome.decision.verdict,
        "ratio": _number(outcome.decision.ratio),
        "expected_ratio": _number(outcome.decision.expected),
        "coherence": _number(outcome.decision.coherence),
        "recent_coherence": _number(outcome.decision.recent),
        "significance": _number(outcome.decision.significance.p),
        "origin": portable(os.path.relpath(prepared.origin.path.resolve(), home)),
        "inputs": [
            {
                "path": portable(os.path.relpath(s.path.resolve(), home)),
                "step": s.step,
                "bytes": s.num_bytes,
                "digest": s.digest,
                "mean_weight": _number(float(mean[t])),
            }
            for t, s in enumerate(prepared.snapshots)
        ],
        "fitted_on": dict(fitted_on),
        "copied": [{"name": c.name, "reason": c.reason} for c in prepared.engine.source.alignment.copied],
        "resume": {"changes": list(outcome.changes), "notes": list(outcome.notes)},
    }
    if outcome.trials:
        content["evaluations"] = [
            {
                "strength": trial.strength,
                "value": trial.value,
                "seconds": round(trial.seconds, 3),
                "log": trial.log and portable(os.path.relpath(trial.log.resolve(), home)),
            }
            for trial in outcome.trials
        ]
    return content


def _number(value: float) -> float | None:
    """A figure to ten digits: the last ones of a float64 depend on the processor, by whose type numpy's products are summed."""
    return None if np.isnan(value) else float(f"{value:.{DIGITS}g}")
