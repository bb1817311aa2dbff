"""Each key of an answer holds its own number: results in which no two figures are alike, and the JSON that comes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.answers import of_backtest, of_leap, of_predict, of_tune
from farcast_cli.evaluation.judge import Trial
from farcast_cli.forecast.backtest import Decision, Score, Steadiness
from farcast_cli.forecast.judgement import BacktestReport
from farcast_cli.forecast.momentum import Momentum
from farcast_cli.forecast.significance import Significance
from farcast_cli.leaps.ask import Leapt
from farcast_cli.request import Outcome
from farcast_cli.run.alignment import Copied
from farcast_cli.run.pace import Pace
from farcast_cli.tune.gate import GateResult
from farcast_cli.tune.request import TuneOutcome

if TYPE_CHECKING:
    from farcast_cli.answer import Answer

RATES = Pace((0, 900), (0.25,))
CHANCE = Significance(0.0301, 0.0302)
DECISION = Decision("forecast", 0.11, 0.12, "the reason", expected=0.13, recent=0.14, significance=CHANCE)
OUTCOME = Outcome(
    horizon=70,
    origin_step=800,
    method="blend",
    decision=DECISION,
    pace=RATES,
    pace_ahead=0.21,
    length_factor=0.22,
    chosen=("what was chosen",),
    path=Path("out/step_870.pt"),
    num_forecast=31,
    copied=(Copied("mask", "an integer", "integers"),) * 3,
    unchanged_share=0.23,
    bytes_read=1_001,
    bytes_written=1_002,
    seconds=0.24,
    peak_bytes=1_003,
    changes=("step: 800 -> 870",),
    notes=("a note of the outcome",),
    trials=(Trial(0.5, 0.31, 0.32, Path("out/logs/0.5.txt")),),
)


def told(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(answer.as_json())
    return content


def test_a_prediction_in_json_has_each_number_under_its_own_key() -> None:
    assert told(of_predict([OUTCOME], dry_run=False)) == {
        "schema_version": 1,
        "path": "out/step_870.pt",
        "origin_step": 800,
        "valid_step": 870,
        "horizon": 70,
        "method": "blend",
        "ratio": 0.11,
        "expected_ratio": 0.13,
        "coherence": 0.12,
        "recent_coherence": 0.14,
        "clock": "rate",
        "pace_ahead": 0.21,
        "length_factor": 0.22,
        "significance": 0.0301,
        "verdict": "forecast",
        "reason": "the reason",
        "chosen": ["what was chosen"],
        "num_forecast": 31,
        "num_copied": 3,
        "unchanged_share": 0.23,
        "bytes_read": 1_001,
        "bytes_written": 1_002,
        "seconds": 0.24,
        "changes": ["step: 800 -> 870"],
        "notes": ["a note of the outcome"],
        "evaluations": [{"strength": 0.5, "value": 0.31, "seconds": 0.32, "log": "out/logs/0.5.txt"}],
    }


def test_a_leap_in_json_has_each_number_under_its_own_key() -> None:
    momentum = Momentum(count=5, gain=0.41, made=0.42, foretold=0.84)
    done = Leapt(
        OUTCOME,
        momentum,
        cosine=0.43,
        is_again=True,
        every=90,
        clock="steps",
        origin=Path("run/step_800.pt"),
        notes=("a note of the call",),
        signal=0.44,
    )
    assert told(of_leap(done, dry_run=True)) == {
        "schema_version": 1,
        "path": "out/step_870.pt",
        "origin": "run/step_800.pt",
        "origin_step": 800,
        "horizon": 70,
        "verdict": "forecast",
        "reason": "the reason",
        "gain": 0.41,
        "share": 0.5,
        "cosine": 0.43,
        "loss_signal": 0.44,
        "stretches": 5,
        "clock": "steps",
        "every": 90,
        "again": True,
        "unchanged_share": 0.23,
        "changes": ["step: 800 -> 870"],
        "notes": ["a note of the call", "a note of the outcome"],
        "evaluations": [{"strength": 0.5, "value": 0.31, "seconds": 0.32}],
        "dry_run": True,
    }


def test_a_tuning_in_json_has_each_number_under_its_own_key() -> None:
    tuned = TuneOutcome(
        ("fc.weight",),
        "gauss-newton",
        GateResult(before=0.51, after=0.52, z=3.5, threshold=3.0, num_rows=40, num_groups=40, judged_by="5 folds"),
        Path("tuned.pt"),
        num_rows=101,
        iterations=7,
        tuned_loss=(0.53, 0.54),
        sizes=(0.55,),
        num_passes=9,
        bytes_read=1_001,
        bytes_written=1_002,
        seconds=0.56,
        notes=("a note",),
    )
    assert told(of_tune(tuned)) == {
        "schema_version": 1,
        "path": "tuned.pt",
        "layers": ["fc.weight"],
        "method": "gauss-newton",
        "verdict": "no significant gain",
        "held_out_before": 0.51,
        "held_out_after": 0.52,
        "z": 3.5,
        "tuned_before": 0.53,
        "tuned_after": 0.54,
        "judged_by": "5 folds",
        "num_rows": 101,
        "iterations": 7,
        "relative_change": [0.55],
        "passes": 9,
        "bytes_read": 1_001,
        "bytes_written": 1_002,
        "seconds": 0.56,
        "notes": ["a note"],
    }


def test_a_back_test_in_json_has_each_number_under_its_own_key() -> None:
    scores = (Score("blend", 70, 0.62, 0.63), Score("linear", 70, 0.61, 0.64))
    steady = Steadiness(0.65, 0.66, CHANCE)
    assert told(of_backtest(BacktestReport(800, steady, scores, {70: ("blend", DECISION)}, RATES, ()))) == {
        "schema_version": 1,
        "origin_step": 800,
        "coherence": 0.65,
        "significance": 0.0301,
        "clock": "rate",
        "scores": [
            {"method": "blend", "horizon": 70, "ratio": 0.62, "ratio_as_written": 0.63},
            {"method": "linear", "horizon": 70, "ratio": 0.61, "ratio_as_written": 0.64},
        ],
        "best": {"method": "linear", "horizon": 70, "ratio": 0.61},
        "verdict": "forecast",
        "decisions": [
            {
                "horizon": 70,
                "method": "blend",
                "verdict": "forecast",
                "ratio": 0.11,
                "recent_coherence": 0.14,
                "reason": "the reason",
            }
        ],
    }
