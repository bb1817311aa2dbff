"""On three real runs the forecast lies nearer to what training did next than the last snapshot does, and scores better."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import pytest

from farcast_cli.verification import find_reference, verify
from tests.tiny import SAMPLES, fit_run, predict_run, sample_maker

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted


class _Sample(NamedTuple):
    """A sample run's last visible snapshot, and how its snapshots are named."""

    origin: int
    pattern: str


RUNS = {
    "huggingface": _Sample(1200, "checkpoint-{}"),
    "safetensors": _Sample(1600, "step_{:06d}.safetensors"),
    "plain": _Sample(1600, "step_{}.pt"),
}


@cache
def fitted(run: str) -> Fitted:
    return fit_run(SAMPLES / run)


@cache
def loss_at_origin(run: str) -> float:
    return float(sample_maker().evaluate(run, SAMPLES / run / RUNS[run].pattern.format(RUNS[run].origin)))


@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
@pytest.mark.parametrize("horizon", [100, 200, 300])
@pytest.mark.parametrize("run", RUNS)
def test_a_forecast_of_a_sample_run_is_better_than_its_last_snapshot(
    run: str, horizon: int, purpose: str, tmp_path: Path
) -> None:
    """With the default method for each purpose, and with the gate on: nearer to the truth, at a lower validation loss."""
    sample = RUNS[run]
    name = sample.pattern.format(sample.origin + horizon)
    (outcome,) = predict_run(fitted(run), tmp_path / name, horizons=[horizon], purpose=purpose, even_if_worse=False)
    assert outcome.decision.verdict == "forecast"
    assert outcome.path is not None
    reference = find_reference(outcome.path)
    assert reference.resolve() == SAMPLES / run / sample.pattern.format(sample.origin)
    truth = SAMPLES / "truth" / run / name
    result = verify(outcome.path, truth, reference, progress=lambda _phase, _total: lambda _done: None)
    assert result.ratio is not None
    assert result.ratio < 1
    assert sample_maker().evaluate(run, outcome.path) < loss_at_origin(run)
