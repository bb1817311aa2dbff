"""The command's contract: what stands on stdout, which exit code, and that whatever fails changes nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from farcast_cli import choices
from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.cli import app
from farcast_cli.commands.options import FROM_ANY_FILE, PANELS
from farcast_cli.forecast.methods import METHODS
from farcast_cli.tensors import sample_stretches
from tests.conftest import (
    STEPS,
    edit_loose,
    fit_run,
    loose_name,
    make_loose_run,
    make_torch_run,
    run_cli,
    tree_digest,
    weights_at,
)
from tests.tiny import wander, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.conftest import CallCli, Done

WIDE = {"wide.weight": (200, 200), "bias": (16,)}  # the first is larger than the sample


def refused(
    call_cli: CallCli, folder: Path, code: int, words: tuple[str, ...], *args: object, env: Mapping[str, str] | None = None
) -> Done:
    """Call the command and check that it fails as promised: one error line that says why, its code, and no trace on disk."""
    before = tree_digest(folder)
    done = call_cli(*args, cwd=folder, env=env)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(done.errors) == 1, done
    assert len(done.hints) <= 1
    assert "Traceback" not in done.stderr
    missing = [word for word in words if word not in done.errors[0] + "".join(done.hints)]
    assert not missing, done
    assert tree_digest(folder) == before
    return done


def as_json(done: Done) -> dict[str, Any]:
    """The one JSON object on stdout of a call that went well."""
    assert done.returncode == 0, done
    content: dict[str, Any] = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert content["schema_version"] == 1
    return content


def no_constant(name: str) -> float:
    pytest.fail(f"{name} is not JSON")


# --- what goes well --------------------------------------------------------------------------------------------------


def test_inspect_reports_the_promised_keys(work: Path, call_cli: CallCli) -> None:
    edit_loose(work / "run" / loose_name(800), {"embed.weight": weights_at(800)["embed.weight"]})
    content = as_json(call_cli("inspect", "run", "--json", "--exclude", "norm*", cwd=work))
    assert content["layout"] == "safetensors"
    assert [s["step"] for s in content["snapshots"]] == list(STEPS)
    first = content["snapshots"][0]
    assert (first["path"], first["step_source"]) == (f"run/{loose_name(100)}", "name")
    assert first["bytes"] == (work / "run" / loose_name(100)).stat().st_size
    assert (content["num_tensors"], content["num_parameters"]) == (3, 40 * 16 + 16 * 16 + 16)
    assert content["copied"] == [{"name": "norm.weight", "reason": "excluded"}]
    assert content["problems"] == []


def test_inspect_says_when_there_are_too_few_snapshots_to_fit(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", STEPS[:3])
    assert as_json(call_cli("inspect", "run", "--json", cwd=tmp_path))["problems"] == ["3 snapshots: fit needs 6"]


def test_fit_reports_the_promised_keys_and_writes_the_forecaster(work: Path, call_cli: CallCli) -> None:
    (work / "forecaster.safetensors").unlink()
    content = as_json(call_cli("fit", "run", "--json", cwd=work))
    assert content["seconds"] >= 0
    assert 0.9 < content["coherence"] <= 1
    assert content | {"seconds": 0, "coherence": 1} == {
        "schema_version": 1,
        "forecaster": "forecaster.safetensors",
        "origin_step": 800,
        "num_snapshots": 8,
        "leap": None,
        "notes": [],
        "num_tensors": 4,
        "sampled": 16384,
        "coherence": 1,
        "recent_coherence": None,  # eight snapshots are too few to tell
        "significance": 1 / 32,  # the smallest that eight can give
        "bytes_read": 8 * 4 * (40 * 16 + 16 * 16 + 16 + 16),
        "seconds": 0,
    }
    assert (work / "forecaster.safetensors").is_file()


def test_fit_judges_the_direction_as_the_verdict_on_a_forecast_does(work: Path, call_cli: CallCli) -> None:
    """Eight snapshots are too few for the recent half; the whole history decides, in both commands."""
    said = call_cli("fit", "run", "-v", cwd=work).stderr
    assert "recent half: too few snapshots to tell; steady enough to resume from a forecast 175 steps ahead" in said
    assert "both S must exceed" not in said
    assert "farcast predict would say: LEAP 350 STEPS: The run keeps its direction." in said
    assert "LEAP 350 STEPS" in call_cli("predict", cwd=work).stderr
    assert "recent half: too few snapshots to tell" in call_cli("predict", "--horizon", 175, "-v", cwd=work).stderr


def test_fit_says_what_speaks_against_the_direction_in_the_words_of_the_verdict(turning: Path, call_cli: CallCli) -> None:
    said = call_cli("fit", "run", "-v", cwd=turning).stderr
    verdict = as_json(call_cli("backtest", "--horizon", 175, "--json", cwd=turning))["decisions"][0]["reason"]
    assert f"not steady enough to resume from a forecast 175 steps ahead ({verdict})" in said
    assert "farcast predict would say: KEEP TRAINING: The run's direction is too weak for a leap" in said


def test_fit_prints_the_forecasters_path_and_nothing_else_on_stdout(work: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "run", "-o", "deep/forecaster-b.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (0, "deep/forecaster-b.safetensors\n")


def test_fitting_the_same_run_twice_gives_the_same_bytes(work: Path, call_cli: CallCli) -> None:
    before = (work / "forecaster.safetensors").read_bytes()
    assert call_cli("fit", "run", cwd=work).returncode == 0
    assert (work / "forecaster.safetensors").read_bytes() == before


def test_backtest_reports_the_promised_keys(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("backtest", "--horizon", "100,200", "--json", cwd=work))
    assert content["origin_step"] == 800
    assert 0.9 < content["coherence"] <= 1
    found = {(s["method"], s["horizon"]): s["ratio"] for s in content["scores"]}
    assert found.keys() == {(method, horizon) for method in METHODS for horizon in (100, 200)}
    assert found["persistence", 100] == 1
    assert found["k5", 100] < 0.5
    assert content["best"]["ratio"] == min(found.values())
    assert content["verdict"] == {"100": "forecast", "200": "forecast"}
    decisions = [(d["horizon"], d["method"], d["verdict"]) for d in content["decisions"]]
    assert decisions == [(100, "blend", "forecast"), (200, "blend", "forecast")]
    for decision in content["decisions"]:
        assert decision["ratio"] == found["blend", decision["horizon"]]
        assert decision["reason"].startswith("coherence S = ")


def test_the_p_of_the_coherence_stands_beside_it_everywhere_and_is_said_to_be_weak_with_few_snapshots(
    work: Path, call_cli: CallCli
) -> None:
    done = call_cli("predict", "--horizon", 100, "--json", "-v", cwd=work)
    sidecar = json.loads((work / "forecasts" / "run" / "step_000900.safetensors.farcast.json").read_text())
    backtest = as_json(call_cli("backtest", "--horizon", 100, "--json", cwd=work))
    assert as_json(done)["significance"] == sidecar["significance"] == backtest["significance"] == 1 / 32
    for text in (done.stderr, call_cli("fit", "run", cwd=work).stderr, call_cli("backtest", "--horizon", 100, cwd=work).stdout):
        assert "p = 0.031 (weak: with so few snapshots p is at least 0.031)" in text


def test_backtest_of_one_horizon_gives_one_verdict(work: Path, call_cli: CallCli) -> None:
    assert as_json(call_cli("backtest", "run", "--horizon", 100, "--json", cwd=work))["verdict"] == "forecast"
    assert as_json(call_cli("backtest", "--horizon", 5000, "--json", cwd=work))["verdict"] == "untestable"


def test_predict_prints_its_path_and_nothing_else_on_stdout(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step_000900.safetensors\n")
    forecast = load_file(work / "forecasts" / "run" / "step_000900.safetensors")
    origin, truth = weights_at(800), weights_at(900)
    assert forecast.keys() == truth.keys()
    for name in truth:
        assert (forecast[name] - truth[name]).norm() < 0.4 * (origin[name] - truth[name]).norm()


def test_predict_reports_the_promised_keys(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--to-step", 1000, "--json", cwd=work))
    path = work / "forecasts" / "run" / "step_001000.safetensors"
    assert content["path"] == "forecasts/run/step_001000.safetensors"
    assert (content["origin_step"], content["valid_step"], content["horizon"]) == (800, 1000, 200)
    assert (content["method"], content["verdict"]) == ("blend", "forecast")
    assert 0 < content["ratio"] < 0.5
    assert 0.9 < content["coherence"] <= 1
    assert content["recent_coherence"] is None  # eight snapshots are too few to tell
    assert content["chosen"] == []  # step and method are as asked for, or the default
    assert (content["num_forecast"], content["num_copied"]) == (4, 0)
    assert 0 <= content["unchanged_share"] < 0.1
    assert content["bytes_read"] == 8 * 4 * (40 * 16 + 16 * 16 + 16 + 16)
    assert content["bytes_written"] == path.stat().st_size
    assert content["seconds"] >= 0


def test_the_recent_coherence_is_told_and_kept_where_there_are_enough_snapshots(tmp_path: Path, call_cli: CallCli) -> None:
    fit_run(make_loose_run(tmp_path / "run", range(50, 900, 50)), tmp_path / "forecaster.safetensors")
    content = as_json(call_cli("predict", "--horizon", 100, "--json", cwd=tmp_path))
    assert 0.5 < content["recent_coherence"] < content["coherence"]
    sidecar = json.loads((tmp_path / "forecasts" / "run" / "step_000950.safetensors.farcast.json").read_text())
    assert sidecar["recent_coherence"] == pytest.approx(content["recent_coherence"], rel=1e-9)


def test_with_many_snapshots_the_p_is_given_without_a_remark(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", range(50, 900, 50))
    done = call_cli("fit", "run", "--json", cwd=tmp_path)
    assert as_json(done)["significance"] == 1 / 512
    assert ", p = 0.002; " in done.stderr


def test_predict_says_step_verdict_and_path_first_and_what_several_horizons_share_once(
    tmp_path: Path, call_cli: CallCli
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rough = wander(2, num_snapshots=12, sizes={"a": 400}, roughness=1.0)
    for number in range(12):
        weights = {name: torch.tensor(path[number]) for name, path in rough.items()}
        torch.save({"model": weights, "step": 100 * (number + 1), "seen": 7.5}, run / f"ckpt_{number + 1}.pt")
    fit_run(run, tmp_path / "forecaster.safetensors")
    lines = call_cli("predict", "--horizon", "100,200", cwd=tmp_path).stderr.splitlines()
    starts = [f"step 1200 + {h}: forecast: wrote forecasts/run/ckpt_{12 + h // 100}.pt, " for h in (100, 200)]
    assert [lines[index].startswith(start) for index, start in zip((1, 3), starts, strict=True)] == [True, True]
    said = "The run keeps its direction. farcast supports resuming from a forecast of step"
    assert [line.partition(". Chance")[0] for line in lines[:3:2]] == [f"LEAP {h} STEPS: {said} {1200 + h}" for h in (100, 200)]
    assert len(lines) == len(set(lines))
    assert sum("the loss will probably rise at first" in line for line in lines) == 1
    assert "expected error" not in str(lines)
    once_more = call_cli("predict", "--horizon", "100,200", "--overwrite", "-v", cwd=tmp_path).stderr.splitlines()
    assert sum(line.startswith("clock: ") for line in once_more) == 1


def test_predict_without_a_horizon_goes_as_far_as_the_evidence_supports_and_says_so(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--json", cwd=work)
    content = as_json(done)
    assert (content["horizon"], content["path"]) == (350, "forecasts/run/step_001150.safetensors")  # half of 700 steps
    assert content["chosen"] == ["horizon 350: 50% of the history of 700 steps"]
    assert content["chosen"][0] in done.stderr.splitlines()


def test_predict_without_a_horizon_counts_from_the_origin_that_was_asked_for(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--origin", 700, "--json", cwd=work))
    assert (content["origin_step"], content["horizon"]) == (700, 300)


def test_predict_by_an_average_to_resume_from_is_turned_away_with_the_reason(work: Path, call_cli: CallCli) -> None:
    for name in ("average", "trend", "accelerate"):
        done = call_cli("predict", "--method", name, cwd=work)
        assert (done.returncode, done.stdout) == (10, "")
        assert (
            "KEEP TRAINING: The run's history does not support this leap: resuming from an average puts a run back"
            in done.stderr
        )


def test_backtest_without_a_horizon_shows_some_shares_of_the_history(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("backtest", "--json", cwd=work))
    assert [decision["horizon"] for decision in content["decisions"]] == [70, 175, 350, 700]
    assert content["verdict"].keys() == {"70", "175", "350", "700"}


def test_the_method_may_be_left_to_the_evidence_and_the_reason_is_told(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--method", "auto", "--for", "evaluation", "--horizon", 100, "--json", cwd=work))
    scores = as_json(call_cli("backtest", "--horizon", 100, "--json", cwd=work))["scores"]
    able = {s["method"]: s["ratio"] for s in scores if not METHODS[s["method"]].averages and s["ratio_as_written"] < 1}
    assert content["method"] == min(able, key=lambda name: able[name])
    assert content["chosen"] == [f"method {content['method']}: smallest back-test ratio, b = {able[content['method']]:.2f}"]
    done = call_cli("backtest", "--method", "auto", "--for", "evaluation", "--horizon", 100, cwd=work)
    assert f"auto: smallest back-test ratio, b = {content['ratio']:.2f}" in done.stderr.splitlines()
    assert f"horizon 100, {content['method']}: forecast" in done.stdout


def test_auto_to_resume_says_why_it_stays_or_changes(work: Path, call_cli: CallCli) -> None:
    horizon, method = as_json(call_cli("predict", "--method", "auto", "--json", cwd=work))["chosen"]
    assert horizon == "horizon 350: 50% of the history of 700 steps"
    assert method.startswith("method ")
    assert "along the drift" in method


def test_predict_to_evaluate_without_a_horizon_writes_the_run_as_it_is_to_be_evaluated_and_not_resumed_from(
    turning: Path, call_cli: CallCli
) -> None:
    """At the origin's own step, though the run's history would be against any leap; and no leap is recorded."""
    done = call_cli("predict", "--for", "evaluation", "--json", cwd=turning)
    content = as_json(done)
    assert (content["path"], content["method"]) == ("forecasts/run/step_000800-eval.safetensors", "trend")
    assert (content["origin_step"], content["valid_step"], content["horizon"]) == (800, 800, 0)
    assert (content["verdict"], content["expected_ratio"]) == ("forecast", None)
    assert content["chosen"] == ["horizon 0: the run at the origin, without its noise"]
    assert (
        "note: forecasts/run/step_000800-eval.safetensors: evaluate or ship it; do not resume from it"
        in done.stderr.splitlines()
    )
    output = "step_000800-eval.safetensors"
    assert tree_digest(turning / "forecasts" / "run").keys() == {output, f"{output}.farcast.json"}
    snapshots = [load_file(turning / "run" / loose_name(step)) for step in STEPS[4:]]  # from 450 on
    written = load_file(turning / "forecasts" / "run" / output)
    for name, values in written.items():
        path = torch.stack([snapshot[name] for snapshot in snapshots]).double()
        times = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.double)
        slope = torch.tensordot(times, path, dims=1) / 5
        torch.testing.assert_close(values, (path.mean(dim=0) + 1.5 * slope).float(), rtol=1e-5, atol=1e-5)


def test_predict_to_evaluate_without_a_horizon_carries_a_clear_trend_on_by_a_tenth_of_the_history(
    work: Path, call_cli: CallCli
) -> None:
    content = as_json(call_cli("predict", "--for", "evaluation", "--json", cwd=work))
    assert (content["path"], content["method"]) == ("forecasts/run/step_000870-eval.safetensors", "trend")
    assert content["chosen"] == ["horizon 70: 10% of the history of 700 steps"]
    assert not (work / "forecasts" / "ledger.jsonl").exists()


def test_a_step_to_evaluate_may_be_the_origins_own(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--for", "evaluation", "--to-step", 800, "--json", cwd=work))
    assert (content["method"], content["horizon"], content["verdict"]) == ("trend", 0, "forecast")


def test_predict_of_several_horizons_reports_each(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--horizon", "100,200", "--json", cwd=work))
    assert [(f["horizon"], f["path"]) for f in content["forecasts"]] == [
        (100, "forecasts/run/step_000900.safetensors"),
        (200, "forecasts/run/step_001000.safetensors"),
    ]


def test_a_forecast_has_its_provenance_beside_it(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, "-o", "out/", cwd=work).returncode == 0
    assert tree_digest(work / "out").keys() == {"step_000900.safetensors", "step_000900.safetensors.farcast.json"}
    content = json.loads((work / "out" / "step_000900.safetensors.farcast.json").read_text(), parse_constant=no_constant)
    assert (content["origin_step"], content["valid_step"], content["method"]) == (800, 900, "blend")
    assert content["origin"] == f"../run/{loose_name(800)}"
    assert [entry["step"] for entry in content["inputs"]] == list(STEPS)


FIGURES = ("ratio", "expected_ratio", "coherence", "recent_coherence", "significance", "pace_ahead", "length_factor")


def test_the_sidecar_has_the_numbers_of_the_answer(tmp_path: Path, call_cli: CallCli) -> None:
    make_torch_run(tmp_path / "run", range(10, 210, 10))
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    answer = as_json(call_cli("predict", "--horizon", 50, "--method", "line", "--even-if-worse", "--json", cwd=tmp_path))
    sidecar = json.loads((tmp_path / f"{answer['path']}.farcast.json").read_text(), parse_constant=no_constant)
    shared = sorted((answer.keys() & sidecar.keys()) - {"schema_version"})
    figures = [key for key in shared if isinstance(answer[key], float)]
    assert figures == sorted(FIGURES)
    assert len({round(answer[key], 9) for key in figures}) == len(figures), "no two are alike, so none can stand for another"
    assert {key: sidecar[key] for key in figures} == pytest.approx({key: answer[key] for key in figures}, rel=1e-9)
    assert {key: sidecar[key] for key in set(shared) - {*figures}} == {key: answer[key] for key in set(shared) - {*figures}}


def test_verify_reports_the_promised_keys(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 200, cwd=work).returncode == 0
    make_loose_run(work / "run", [1000])
    content = as_json(
        call_cli("verify", "forecasts/run/step_001000.safetensors", "--against", f"run/{loose_name(1000)}", "--json", cwd=work)
    )
    origin, truth = weights_at(800), weights_at(1000)
    forecast = load_file(work / "forecasts" / "run" / "step_001000.safetensors")
    errors = torch.cat([(forecast[name] - truth[name]).double().flatten() for name in truth])
    nothing = torch.cat([(origin[name] - truth[name]).double().flatten() for name in truth])
    assert content["ratio"] == pytest.approx(float(errors.norm() / nothing.norm()), rel=1e-6)
    assert content["mean_absolute_error"] == pytest.approx(float(errors.abs().mean()), rel=1e-6)
    assert {entry["name"] for entry in content["per_tensor"]} == set(truth)
    assert all(0 < entry["ratio"] < 1 for entry in content["per_tensor"])


def test_verify_takes_any_reference(work: Path, call_cli: CallCli) -> None:
    origin = f"run/{loose_name(800)}"
    content = as_json(
        call_cli("verify", origin, "--against", f"run/{loose_name(700)}", "--reference", origin, "--json", cwd=work)
    )
    assert content["ratio"] == 1


def test_several_horizons_in_one_pass_equal_single_ones_byte_for_byte(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", "50,100,350", "-o", "many/", "--threads", 3, cwd=work)
    assert done.stdout.splitlines() == [f"many/step_{step:06d}.safetensors" for step in (850, 900, 1150)]
    for horizon in (50, 100, 350):
        assert call_cli("predict", "--horizon", horizon, "-o", "one/", "--threads", 1, cwd=work).returncode == 0
    many, one = tree_digest(work / "many"), tree_digest(work / "one")
    assert len(many) == 6
    assert many == one


def test_a_dry_run_writes_nothing_and_foretells_the_bytes(work: Path, call_cli: CallCli) -> None:
    before = tree_digest(work)
    told = as_json(call_cli("predict", "--horizon", 100, "--dry-run", "--json", cwd=work))
    assert tree_digest(work) == before
    done = as_json(call_cli("predict", "--horizon", 100, "--json", cwd=work))
    assert told["dry_run"] is True
    for key in ("path", "bytes_read", "bytes_written", "num_forecast", "num_copied", "ratio", "verdict", "changes"):
        assert told[key] == done[key]


def test_a_dry_run_of_several_horizons_foretells_the_bytes_of_each(tmp_path: Path, call_cli: CallCli) -> None:
    fit_run(make_torch_run(tmp_path / "run"), tmp_path / "forecaster.safetensors")
    told = as_json(call_cli("predict", "--horizon", "5,20", "--dry-run", "--json", cwd=tmp_path))["forecasts"]
    done = as_json(call_cli("predict", "--horizon", "5,20", "--json", cwd=tmp_path))["forecasts"]
    assert [f["bytes_written"] for f in told] == [f["bytes_written"] for f in done]
    assert [f["path"] for f in told] == [f["path"] for f in done]


def test_a_dry_run_prints_no_path(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "--dry-run", cwd=work)
    assert (done.returncode, done.stdout) == (0, "")
    assert "would write" in done.stderr


def test_quiet_leaves_only_the_result(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "-q", cwd=work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "forecasts/run/step_000900.safetensors\n", "")


def test_a_run_with_newer_snapshots_is_noted_with_the_command_to_fit_again(work: Path, call_cli: CallCli) -> None:
    make_loose_run(work / "run", [900, 1000])
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step_000900.safetensors\n")
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("note: the run")]
    assert "newer snapshots than the forecaster, up to step_001000.safetensors" in note
    assert note.endswith("farcast fit run")


def test_of_newer_snapshots_nothing_is_said_where_the_origin_is_asked_for(work: Path, call_cli: CallCli) -> None:
    make_loose_run(work / "run", [900])
    assert "newer snapshots" in call_cli("predict", "--horizon", 100, cwd=work).stderr
    assert "newer snapshots" not in call_cli("predict", "--horizon", 100, "--origin", 700, cwd=work).stderr


def test_a_forecaster_and_its_run_may_move_together(work: Path, tmp_path: Path, call_cli: CallCli) -> None:
    work.rename(tmp_path / "moved")
    (tmp_path / "else").mkdir()
    done = call_cli("predict", "--forecaster", "../moved/forecaster.safetensors", "--horizon", 100, cwd=tmp_path / "else")
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step_000900.safetensors\n")


def test_overwrite_replaces_an_earlier_forecast(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, cwd=work).returncode == 0
    first = tree_digest(work / "forecasts")
    assert call_cli("predict", "--horizon", 100, "--scale", 0.5, "--overwrite", cwd=work).returncode == 0
    second = tree_digest(work / "forecasts")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] == second[name]} == {"ledger.jsonl", "run"}  # it tells of that leap already


def test_the_origin_may_be_an_earlier_snapshot(work: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--origin", 600, "--horizon", 100, "--json", cwd=work))
    assert (content["origin_step"], content["path"]) == (600, "forecasts/run/step_000700.safetensors")


def test_a_forecast_does_not_depend_on_snapshots_after_its_origin(work: Path, call_cli: CallCli) -> None:
    arguments = ("predict", "--origin", 600, "--horizon", 100, "-q", "-o")
    assert call_cli(*arguments, "all.safetensors", cwd=work).returncode == 0
    assert call_cli("fit", "run", "--steps", ":600", cwd=work).returncode == 0
    assert call_cli(*arguments, "early.safetensors", cwd=work).returncode == 0
    all_of_them, early = load_file(work / "all.safetensors"), load_file(work / "early.safetensors")
    for name, values in early.items():
        torch.testing.assert_close(all_of_them[name], values, rtol=1e-5, atol=1e-6)


# --- settings --------------------------------------------------------------------------------------------------------


def test_options_come_from_the_command_line_before_the_environment_before_the_config_file(
    work: Path, call_cli: CallCli
) -> None:
    (work / "farcast.toml").write_text("quiet = true\n[predict]\nhorizon = 100\ngrad-weight = 0.0\n")
    predict = partial(call_cli, "predict", "--dry-run", "--json", cwd=work)
    assert as_json(predict())["horizon"] == 100
    assert as_json(predict(env={"FARCAST_HORIZON": "200"}))["horizon"] == 200
    assert (
        as_json(call_cli("predict", "--dry-run", "--json", "--horizon", 300, cwd=work, env={"FARCAST_HORIZON": "200"}))[
            "horizon"
        ]
        == 300
    )


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], object], object]] = {
    "several horizons": ("[predict]\nhorizon = [100, 200]\n", lambda c: [f["horizon"] for f in c["forecasts"]], [100, 200]),
    "an option for all commands": ("method = 'drift'\nhorizon = 100\n", lambda c: c["method"], "drift"),
    "its own table wins": ("method = 'drift'\n[predict]\nhorizon = 100\nmethod = 'k5'\n", lambda c: c["method"], "k5"),
    "another command's table": ("[fit]\nsample = 2000\n[predict]\nhorizon = 100\n", lambda c: c["horizon"], 100),
    "the option called for": ("[predict]\nhorizon = 100\nfor = 'evaluation'\n", lambda c: c["method"], "k5"),
    "the option called for, for all": ("for = 'evaluation'\nhorizon = 100\n", lambda c: c["method"], "k5"),
    "the option called round": ("[tune]\nround = 'stochastic'\n[predict]\nhorizon = 100\n", lambda c: c["horizon"], 100),
    "the option called json": ("[predict]\nhorizon = 100\njson = true\n", lambda c: c["horizon"], 100),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_file_sets_options(work: Path, call_cli: CallCli, what: str) -> None:
    text, read, expected = CONFIGS[what]
    (work / "own.toml").write_text(text)
    assert read(as_json(call_cli("predict", "--dry-run", "--json", "--config", "own.toml", cwd=work))) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[predict]\nhorizn = 100\n", ("own.toml", "horizn")),
        ("[predict\n", ("own.toml", "TOML")),
        ("predict = 100\n", ("own.toml", "predict")),
    ],
)
def test_a_config_file_that_makes_no_sense_is_a_usage_error(
    work: Path, call_cli: CallCli, text: str, words: tuple[str, ...]
) -> None:
    (work / "own.toml").write_text(text)
    refused(call_cli, work, 2, words, "predict", "--horizon", 100, "--config", "own.toml")


NAMED_ONLY = {
    "a place to read": {
        "forecaster",
        "ledger",
        "losses",
        "data",
        "anchor",
        "covariance",
        "apply",
        "against",
        "reference",
        "config",
        "history",
    },
    "an argument, which is a place to read": {"directory", "checkpoint", "forecast", "target"},
    "an argument that is nobody else's to give": {"command"},
    "a place to write": {"output", "place", "delta_out", "lora_out", "covariance_out", "log_to", "into"},
    "what is removed": {"last"},
    "a program": {"eval_cmd", "on_leap"},
    "what is written": {"leap"},
    "who writes": {"ranks", "ranks_timeout"},
    "a check": {"even_if_worse", "overwrite", "gate", "val", "subsample", "seed", "anchor_weight", "maximize", "io"},
    "a check on the way": {"steps", "step_from", "purpose", "counters", "scale", "step_norm", "gain", "max_gain", "every"},
}


def test_a_table_for_no_command_is_an_error(work: Path, call_cli: CallCli) -> None:
    (work / "farcast.toml").write_text("[predikt]\nhorizon = 100\n")
    refused(call_cli, work, 2, ("farcast.toml", "expected the name of a command as table, found 'predikt'"), "fit", "run")


def test_one_pattern_in_the_file_needs_no_list(work: Path, call_cli: CallCli) -> None:
    (work / "farcast.toml").write_text("[fit]\nexclude = 'layers.0.*'\n")
    assert call_cli("fit", "run", "-q", cwd=work).returncode == 0
    done = call_cli("predict", "--horizon", 100, "--json", cwd=work)
    assert as_json(done)["num_copied"] > 0


def test_an_empty_place_is_a_usage_error_and_no_hint_leads_to_the_root(work: Path, call_cli: CallCli) -> None:
    done = refused(call_cli, work, 2, ("-o", "empty"), "predict", "--horizon", 100, "-o", "")
    assert "/ " not in done.hints[0].replace("forecasts/ ", "")


"""What a farcast.toml that nobody named may not set, and why. A new option belongs here or into FROM_ANY_FILE."""


def test_every_option_is_either_harmless_in_a_file_that_nobody_named_or_listed_with_the_reason_why_not() -> None:
    group: Any = typer.main.get_command(app)
    names = [{parameter.name for parameter in command.params} for command in group.commands.values()]
    found = set[str]().union(*(each for each in names if "config" in each))
    refused = set[str]().union(*NAMED_ONLY.values())
    assert found == FROM_ANY_FILE | refused
    assert set() == FROM_ANY_FILE & refused


def test_every_option_has_its_group_in_the_help_of_its_command(call_cli: CallCli, tmp_path: Path) -> None:
    group: Any = typer.main.get_command(app)
    options = {p.name: p for command in group.commands.values() for p in command.params if p.param_type_name == "option"}
    assert sorted(options) == sorted(name for names in PANELS.values() for name in names)
    shown = call_cli("predict", "--help", cwd=tmp_path).stdout
    places = [shown.find(f" {panel} ─") for panel in ("Horizon", "Method", "Trainer state", "Evaluation", "Output", "Machine")]
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[2] < shown.find("--optimizer") < places[3]


BOX = set("─│╭╮╰╯")
"""What frames the groups of options."""
HELPED = ("inspect", "fit", "backtest", "predict", "verify", "leap", "tune", "schema")


@pytest.mark.parametrize("command", ["", *HELPED])
def test_help_is_ascii_in_frames_and_no_word_between_colons_becomes_a_picture(
    call_cli: CallCli, tmp_path: Path, command: str
) -> None:
    shown = call_cli(*filter(None, [command]), "--help", cwd=tmp_path).stdout
    assert {character for character in shown if not character.isascii()} <= BOX


@pytest.mark.parametrize("key", sorted(set[str]().union(*NAMED_ONLY.values()) - {"config"}))
def test_a_file_that_nobody_named_sets_no_place_no_program_and_no_check(work: Path, call_cli: CallCli, key: str) -> None:
    group: Any = typer.main.get_command(app)
    name = next(name for name, command in group.commands.items() if key in {p.name for p in command.params})
    arguments = {"verify": ("x", "--against", "y"), "tune": ("x",), "inspect": ("run",), "fit": ("run",), "leap": ("run",)}.get(
        name, ()
    )
    spelled = {"purpose": "for"}.get(key, key.replace("_", "-"))
    for text in (f"{spelled} = 1\n", f"[{name}]\n{spelled} = 1\n"):
        (work / "farcast.toml").write_text(text)
        done = refused(call_cli, work, 2, ("farcast.toml", repr(spelled)), name, *arguments)
        assert done.hints == ["hint: --config farcast.toml"]


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_file_that_the_user_names_sets_every_option(work: Path, call_cli: CallCli, by: str) -> None:
    (work / "farcast.toml").write_text("[predict]\nhorizon = 100\noutput = 'there/'\nledger = 'leaps'\nquiet = true\n")
    named = {"args": ("--config", "farcast.toml")} if by == "option" else {"env": {"FARCAST_CONFIG": "farcast.toml"}}
    done = call_cli("predict", *named.get("args", ()), cwd=work, env=named.get("env"))  # type: ignore[arg-type]
    assert (done.returncode, done.stdout) == (0, "there/step_000900.safetensors\n")
    assert (work / "leaps").is_file()


def test_a_table_of_another_command_does_not_stop_this_one(work: Path, call_cli: CallCli) -> None:
    (work / "farcast.toml").write_text("[predict]\noutput = 'there/'\n")
    assert call_cli("inspect", "run", cwd=work).returncode == 0


def test_a_config_file_without_end_is_refused(work: Path, call_cli: CallCli) -> None:
    (work / "large.toml").write_text("# " + "x" * (2 << 20))
    refused(call_cli, work, 2, ("large.toml", "larger"), "inspect", "run", "--config", "large.toml")


def test_a_config_file_that_is_not_there_is_a_usage_error(work: Path, call_cli: CallCli) -> None:
    refused(call_cli, work, 2, ("none.toml",), "inspect", "run", "--config", "none.toml")


@pytest.mark.parametrize("source", ["the command line", "the environment", "a file"])
def test_a_wrong_choice_is_one_line_that_names_the_right_ones_wherever_it_comes_from(
    work: Path, call_cli: CallCli, source: str
) -> None:
    (work / "own.toml").write_text("[predict]\nlayout = 'gguf'\n")
    arguments = {"the command line": ("--layout", "gguf"), "a file": ("--config", "own.toml")}.get(source, ())
    environment = {"FARCAST_LAYOUT": "gguf"} if source == "the environment" else None
    done = call_cli("predict", "--horizon", 100, *arguments, cwd=work, env=environment)
    assert (done.returncode, done.errors) == (2, ["error: --layout gguf: expected one of same, safetensors, pt, dcp, hub"])


def test_the_choices_that_help_shows_are_those_that_the_library_knows() -> None:
    known = {"|".join(get_args(value)) for value in vars(choices).values() if get_origin(value) is Literal}
    group: Any = typer.main.get_command(app)
    shown = {str(p.metavar) for command in group.commands.values() for p in command.params if p.metavar and "|" in p.metavar}
    others = {"FROM:TO:EVERY|N,N", "auto|cpu|cuda[:N]", "[RUN|FORECASTER]", "FILE.html|.png|.md"}
    assert shown - others <= known
    assert known - shown == {"|".join(get_args(choices.Verdict))}  # an answer, and no option


# --- usage errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("predict", "--horizon"), "farcast predict --help"),
        (("predict", "--nothing"), "farcast predict --help"),
        (("nothing",), "farcast --help"),
        (("--nothing",), "farcast --help"),
    ],
)
def test_a_line_that_cannot_be_parsed_names_the_help_of_its_command(
    work: Path, call_cli: CallCli, arguments: tuple[str, ...], hint: str
) -> None:
    done = call_cli(*arguments, cwd=work)
    assert (done.returncode, done.hints) == (2, [f"hint: {hint}"])


def test_the_help_of_tune_names_the_arrays_that_a_file_of_rows_may_hold(call_cli: CallCli, tmp_path: Path) -> None:
    shown = call_cli("tune", "--help", cwd=tmp_path, env={"COLUMNS": "200"}).stdout
    assert "out (the model's outputs for these rows" in " ".join(shown.replace("│", " ").split())


def test_one_counter_that_advances_is_one(call_cli: CallCli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for number in range(1, 9):
        torch.save({"model": {"w": torch.full((50,), float(number))}, "step": 100 * number}, tmp_path / f"run/ckpt_{number}.pt")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    done = call_cli("predict", "--horizon", 100, "--even-if-worse", cwd=tmp_path)
    assert "\n1 counter or rate advanced (-v lists them)\n" in done.stderr


USAGE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "both horizon and step": (("predict", "--horizon", 1, "--to-step", 900), ("--horizon", "--to-step", "both")),
    "a horizon of no steps for a back-test": (("backtest", "--horizon", 0), ("--horizon 0", "positive")),
    "a horizon of no steps": (("predict", "--horizon", 0), ("--horizon 0", "positive")),
    "a negative horizon": (("predict", "--horizon", "-5"), ("-5",)),
    "a horizon that is no number": (("predict", "--horizon", "soon"), ("--horizon soon",)),
    "an empty horizon": (("predict", "--horizon", "100,,200"), ("100,,200",)),
    "a horizon twice": (("predict", "--horizon", "100,200,100"), ("twice",)),
    "a horizon twice in other digits": (("predict", "--horizon", "100,0100"), ("twice",)),
    "a step that is past": (("predict", "--to-step", 800), ("--to-step 800: expected a step after 800, the origin",)),
    "a step that is past to evaluate": (
        ("predict", "--to-step", 799, "--for", "evaluation"),
        ("--to-step 799: expected a step of 800, the origin, or later",),
    ),
    "an unknown method": (("predict", "--horizon", 100, "--method", "magic"), ("--method magic", "blend")),
    "an unknown method to test": (("backtest", "--horizon", 100, "--method", "magic"), ("--method magic", "blend")),
    "an unknown purpose": (("predict", "--horizon", 100, "--for", "fun"), ("--for fun", "resume, evaluation")),
    "an unknown norm": (("predict", "--horizon", 100, "--step-norm", "big"), ("--step-norm big", "clip")),
    "an unknown scope": (("predict", "--horizon", 100, "--scope", "x"), ("--scope x", "global")),
    "an unknown element type": (("predict", "--horizon", 100, "--dtype", "int8"), ("--dtype int8", "bfloat16")),
    "an unknown optimizer mode": (("predict", "--horizon", 100, "--optimizer", "x"), ("--optimizer x", "reset")),
    "unknown counters": (("predict", "--horizon", 100, "--counters", "x"), ("--counters x", "keep")),
    "an unknown device": (("predict", "--horizon", 100, "--device", "tpu"), ("--device tpu", "cpu")),
    "a scale that is no number": (("predict", "--horizon", 100, "--scale", "nan"), ("scale",)),
    "an endless scale": (("predict", "--horizon", 100, "--scale", "inf"), ("scale",)),
    "shards of a single file": (("predict", "--horizon", 100, "--max-shard-size", "5GB"), ("--max-shard-size",)),
    "a size without a unit": (("predict", "--horizon", 100, "--max-shard-size", "5"), ("--max-shard-size 5", "5GB")),
    "the first snapshot as origin": (("predict", "--horizon", 100, "--origin", 100), ("--origin 100",)),
    "a command without its place": (("predict", "--horizon", 100, "--eval-cmd", "true"), ("{ckpt}",)),
    "steps that are no range": (("fit", "run", "--steps", "5"), ("--steps 5", "FROM:TO:EVERY")),
    "steps that are no numbers": (("fit", "run", "--steps", "a:b"), ("--steps a:b", "FROM:TO:EVERY")),
    "steps in words that are pictures elsewhere": (("fit", "run", "--steps", "5:100:x"), ("--steps 5:100:x", "FROM:TO:EVERY")),
    "an unknown option": (("predict", "--horizn", 100), ("--horizn",)),
    "an unknown command": (("forecast",), ("forecast",)),
    "a missing argument": (("inspect",), ("DIR",)),
    "a number that is none": (("predict", "--horizon", 100, "--threads", "x"), ("--threads",)),
    "a negative number of threads": (("predict", "--horizon", 100, "--threads", "-1"), ("--threads",)),
    "a sample that is too small": (("fit", "run", "--sample", 10), ("--sample",)),
    "a forecast without a reference": (("verify", f"run/{loose_name(800)}", "--against", "run"), ("--reference",)),
}


@pytest.mark.parametrize("what", USAGE)
def test_options_that_make_no_sense_are_usage_errors(work: Path, call_cli: CallCli, what: str) -> None:
    arguments, words = USAGE[what]
    refused(call_cli, work, 2, words, *arguments)


# --- snapshots that cannot be used -----------------------------------------------------------------------------------


def two_interleaved(folder: Path) -> None:
    make_loose_run(folder, STEPS[::2], seed=0)
    make_loose_run(folder, STEPS[1::2], seed=1)


def two_in_a_row(folder: Path) -> None:
    """Close snapshots: a run moves far less between two of them than two runs lie apart."""
    make_loose_run(folder, range(10, 50, 10), seed=0)
    make_loose_run(folder, range(50, 90, 10), seed=1)


def with_change(folder: Path, step: int, changes: Mapping[str, torch.Tensor | None]) -> None:
    make_loose_run(folder)
    edit_loose(folder / loose_name(step), changes)


def cut_short(folder: Path) -> None:
    """Three of eight, so that five are left."""
    make_loose_run(folder)
    for step in (300, 400, 800):
        path = folder / loose_name(step)
        path.write_bytes(path.read_bytes()[:-100])


def lfs_pointer(folder: Path) -> None:
    (make_loose_run(folder) / loose_name(400)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def with_number(value: float) -> torch.Tensor:
    bias = weights_at(500)["layers.0.bias"]
    bias[3] = value
    return bias


def asks_for_code(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder.parent / "harm"),)

    make_torch_run(folder)
    payload = torch.load(folder / "ckpt_40.pt", weights_only=True)
    torch.save(payload | {"config": Harm()}, folder / "ckpt_40.pt")


BAD_RUNS: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "no folder": (lambda _: None, 3, ("run", "nothing")),
    "a file in the folder's place": (lambda run: run.write_text("x"), 3, ("run", "a file")),
    "an empty folder": (lambda run: run.mkdir(), 3, ("run", "no snapshots")),
    "five snapshots": (
        *(lambda run: make_loose_run(run, STEPS[:5]), 3),
        ("expected at least 6 snapshots, found 5", "save_steps", "farcast leap needs three snapshots only"),
    ),
    "two runs interleaved": (two_interleaved, 3, ("two runs", "alternate", "--steps")),
    "two runs one after the other": (two_in_a_row, 3, ("two runs", loose_name(40), loose_name(50), "--steps")),
    "a changed shape": (
        lambda run: with_change(run, 300, {"norm.weight": torch.ones(17)}),
        3,
        (loose_name(300), "'norm.weight'", "[17]", "[16]", "--exclude"),
    ),
    "a tensor that is missing": (
        lambda run: with_change(run, 300, {"norm.weight": None}),
        3,
        (loose_name(300), "'norm.weight'", "--steps"),
    ),
    "a tensor more": (lambda run: with_change(run, 300, {"new": torch.ones(1)}), 3, (loose_name(400), "'new'", "5 snapshots")),
    "not a number": (
        lambda run: with_change(run, 500, {"layers.0.bias": with_number(math.nan)}),
        3,
        (loose_name(500), "'layers.0.bias'", "nan", "--steps"),
    ),
    "infinity": (
        lambda run: with_change(run, 500, {"layers.0.bias": with_number(math.inf)}),
        3,
        (loose_name(500), "'layers.0.bias'", "inf"),
    ),
    "files that are cut short": (
        cut_short,
        3,
        ("at least 6 snapshots, found 5", loose_name(400), "half-written: expected", "save or download them again"),
    ),
    "a git-LFS pointer": (lfs_pointer, 4, (loose_name(400), "git-LFS pointer", "lfs pull")),
    "a pickle with code": (asks_for_code, 4, ("ckpt_40.pt", "mkdir", "plain data")),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_run_that_cannot_be_used_is_refused_by_fit(tmp_path: Path, call_cli: CallCli, what: str) -> None:
    make, code, words = BAD_RUNS[what]
    make(tmp_path / "run")
    refused(call_cli, tmp_path, code, words, "fit", "run")


@pytest.mark.parametrize("step", [800, 500])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_outside_of_the_sample_is_found_by_predict(
    tmp_path: Path, call_cli: CallCli, step: int, value: float
) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    sampled = {i for s in sample_stretches(40_000, DEFAULT_SAMPLE) for i in range(s.start, s.start + s.count)}
    unseen = min(set(range(40_000)) - sampled)
    wide = weights_at(step, shapes=WIDE)["wide.weight"]
    wide.view(-1)[unseen] = value
    edit_loose(run / loose_name(step), {"wide.weight": wide})
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    for horizon in ("100", "100,200"):
        words = (loose_name(step), "'wide.weight'", str(value))
        refused(call_cli, tmp_path, 3, words, "predict", "--horizon", horizon)


def test_a_snapshot_that_is_gone_since_the_fit_is_named_with_the_command_to_fit_again(work: Path, call_cli: CallCli) -> None:
    (work / "run" / loose_name(500)).unlink()
    refused(call_cli, work, 3, (loose_name(500), "removed", "farcast fit run"), "predict", "--horizon", 100)


def test_a_snapshot_that_changed_since_the_fit_is_named_with_the_command_to_fit_again(work: Path, call_cli: CallCli) -> None:
    edit_loose(work / "run" / loose_name(500), {"norm.weight": torch.ones(16, dtype=torch.float16)})
    refused(call_cli, work, 3, (loose_name(500), "changed", "farcast fit run"), "predict", "--horizon", 100)


def test_a_snapshot_that_was_trained_anew_since_the_fit_is_named(work: Path, call_cli: CallCli) -> None:
    make_loose_run(work / "run", seed=5)
    refused(call_cli, work, 3, ("changed", "farcast fit run"), "predict", "--horizon", 100)


def test_an_origin_that_is_no_snapshot_is_refused_with_those_there_are(work: Path, call_cli: CallCli) -> None:
    refused(call_cli, work, 3, ("150", "100, 200, 300"), "predict", "--horizon", 100, "--origin", 150)


def test_checkpoints_of_two_models_cannot_be_verified_against_each_other(work: Path, call_cli: CallCli) -> None:
    save_file({"other": torch.ones(3)}, work / "other.safetensors")
    origin = f"run/{loose_name(800)}"
    words = ("two models",)
    refused(call_cli, work, 3, words, "verify", origin, "--against", "other.safetensors", "--reference", origin)


# --- forecasters and outputs -----------------------------------------------------------------------------------------


def test_a_missing_forecaster_is_named_with_the_command_that_writes_one(work: Path, call_cli: CallCli) -> None:
    words = ("none.safetensors", "no forecaster", "farcast fit")
    refused(call_cli, work, 4, words, "predict", "--horizon", 100, "--forecaster", "none.safetensors")
    refused(call_cli, work, 4, words, "backtest", "--horizon", 100, "--forecaster", "none.safetensors")


def test_something_else_is_no_forecaster(work: Path, call_cli: CallCli) -> None:
    weights = f"run/{loose_name(800)}"
    refused(call_cli, work, 4, (loose_name(800), "not a forecaster"), "predict", "--horizon", 100, "--forecaster", weights)


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_damaged_forecaster_is_refused_with_the_command_that_writes_it_again(
    work: Path, call_cli: CallCli, keep: int
) -> None:
    path = work / "forecaster.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(call_cli, work, 4, ("damaged", "farcast fit"), "predict", "--horizon", 100)


def test_a_forecaster_of_a_layout_that_is_not_known_is_refused(work: Path, call_cli: CallCli) -> None:
    path = work / "forecaster.safetensors"
    path.write_bytes(path.read_bytes().replace(b'layout\\":\\"safetensors', b'layout\\":\\"safetensorz'))
    refused(call_cli, work, 4, ("forecaster.safetensors",), "predict", "--horizon", 100)


@pytest.mark.parametrize("kind", ["text", "weights", "folder"])
def test_fit_does_not_write_over_what_is_no_forecaster(work: Path, call_cli: CallCli, kind: str) -> None:
    path = work / "mine.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("mine")
    else:
        save_file({"w": torch.ones(3)}, path)
    refused(call_cli, work, 5, ("mine.safetensors", "is not a forecaster", "-o"), "fit", "run", "-o", "mine.safetensors")


@pytest.mark.parametrize("arguments", [("fit", "run"), ("predict", "--horizon", 100), ("predict", "--horizon", "100,200")])
@pytest.mark.parametrize("place", ["file/deep/out.safetensors", "/proc/farcast/out.safetensors"])
def test_a_place_that_cannot_be_written_is_an_output_error(
    work: Path, call_cli: CallCli, arguments: tuple[object, ...], place: str
) -> None:
    (work / "file").write_text("x")
    refused(call_cli, work, 5, ("cannot be written", "-o"), *arguments, "-o", place)


@pytest.mark.parametrize("horizon", ["100", "100,200"])
def test_an_output_that_exists_is_left_alone(work: Path, call_cli: CallCli, horizon: str) -> None:
    (work / "forecasts" / "run").mkdir(parents=True)
    (work / "forecasts" / "run" / "step_000900.safetensors").write_text("mine")
    refused(call_cli, work, 5, ("step_000900.safetensors: exists already", "--overwrite"), "predict", "--horizon", horizon)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_overwrite_replaces_nothing_that_farcast_did_not_write(work: Path, call_cli: CallCli, kind: str) -> None:
    path = work / "mine.safetensors"
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("mine")
    else:
        path.write_text("mine")
    words = ("mine.safetensors", "is not a forecast", "-o OUT")
    refused(call_cli, work, 5, words, "predict", "--horizon", 100, "-o", "mine.safetensors", "--overwrite")


@pytest.mark.parametrize("place", ["run/step_000900.safetensors", "run/deep/", "link/x.safetensors", f"run/{loose_name(800)}"])
def test_a_forecast_inside_the_runs_folder_is_refused(work: Path, call_cli: CallCli, place: str) -> None:
    (work / "link").symlink_to("run")
    words = ("inside the run's folder", "-o")
    refused(call_cli, work, 5, words, "predict", "--horizon", 100, "-o", place, "--overwrite")


def test_the_default_place_is_refused_where_it_lies_inside_the_run(work: Path, call_cli: CallCli) -> None:
    arguments = ("predict", "--horizon", 100, "--forecaster", "../forecaster.safetensors")
    refused(call_cli, work / "run", 5, ("inside the run's folder", "-o"), *arguments)


def test_a_single_file_under_a_name_without_its_ending_is_written_or_refused_with_the_ending(
    work: Path, call_cli: CallCli
) -> None:
    refused(call_cli, work, 2, ("ahead", ".safetensors"), "predict", "--horizon", 100, "-o", "ahead")


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_control_is_told_as_one_and_not_as_a_leap(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "--method", "persistence", cwd=work)
    assert done.stderr.startswith("WRITE A CONTROL FOR STEP 900: It has the origin's weights: no weight moves.\n"), done
    assert "LEAP" not in done.stderr


def test_of_several_horizons_the_line_against_one_names_it(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", "100,5000,6000", "--dry-run", cwd=work)
    heads = [line.split(":")[0] for line in done.stderr.splitlines() if line[:4].isupper()]
    assert heads == ["LEAP 100 STEPS", "KEEP TRAINING, HORIZON 5000", "KEEP TRAINING, HORIZON 6000"], done


def test_a_horizon_beyond_the_history_writes_nothing_and_ends_with_10(work: Path, call_cli: CallCli) -> None:
    before = tree_digest(work)
    done = call_cli("predict", "--horizon", 5000, cwd=work)
    assert (done.returncode, done.stdout) == (10, "")
    assert "KEEP TRAINING: It is too early to tell: a horizon of 5000 is more than 1.5 times the history" in done.stderr
    assert "--even-if-worse" in done.hints[0]
    assert tree_digest(work) == before


def test_a_backtest_says_the_verdicts_first_and_shows_the_best_methods_and_the_marked_one(
    tmp_path: Path, call_cli: CallCli
) -> None:
    rough = wander(2, num_snapshots=12, sizes={"a": 400, "b": 60}, roughness=2.5)
    fit_run(write_run(tmp_path / "run", rough, range(100, 1300, 100)), tmp_path / "forecaster.safetensors")
    arguments = ("backtest", "--horizon", "100,275")
    scores = as_json(call_cli(*arguments, "--json", cwd=tmp_path))["scores"]
    lines = call_cli(*arguments, cwd=tmp_path).stdout.splitlines()
    assert [line.split(" (")[0] for line in lines[1:3]] == ["horizon 100, blend: forecast", "horizon 275, blend: forecast"]
    for horizon in (100, 275):
        rows = [line.split() for line in lines if line.split()[:1] == [str(horizon)]]
        best = sorted((s for s in scores if s["horizon"] == horizon), key=lambda score: float(score["ratio"]))[:3]
        assert [row[1] for row in rows] == [*(score["method"] for score in best), "blend"]
        assert [row[-4:] for row in rows if "<-" in row] == [["<-", "predict", "writes", "this"]]
    everything = call_cli(*arguments, "-v", cwd=tmp_path).stdout.splitlines()
    assert sum(line.split()[:1] in (["100"], ["275"]) for line in everything) == len(scores)


def test_a_number_above_1_says_what_decides_to_resume(tmp_path: Path, call_cli: CallCli) -> None:
    """A rough run: the weights are farther away at first, and the direction is steady enough."""
    rough = wander(2, num_snapshots=12, sizes={"a": 400, "b": 60}, roughness=2.5)
    fit_run(write_run(tmp_path / "run", rough, range(100, 1300, 100)), tmp_path / "forecaster.safetensors")
    said = {horizon: call_cli("predict", "--horizon", horizon, "-v", cwd=tmp_path).stderr for horizon in (100, 275)}
    why = "of the error without a forecast (the weights are farther from the real ones at first; S and p decide whether to resume)"
    assert f"expected error: 1.12 {why}" in said[100]
    assert f"expected error: 1.02 {why}" in said[275]
    other = call_cli(
        "predict", "--horizon", 100, "--for", "evaluation", "--even-if-worse", "-o", "w/", "-v", cwd=tmp_path
    ).stderr
    assert "of the error without a forecast;" in other


def test_a_run_that_turned_back_is_not_forecast(turning: Path, call_cli: CallCli) -> None:
    before = tree_digest(turning)
    done = call_cli("predict", "--horizon", 100, cwd=turning)
    assert (done.returncode, done.stdout) == (10, "")
    assert "KEEP TRAINING: The run's direction is too weak for a leap: coherence S = -" in done.stderr
    assert "--even-if-worse" in done.hints[0]
    assert tree_digest(turning) == before


def test_an_abstention_needs_no_file_of_the_run(turning: Path, call_cli: CallCli) -> None:
    shutil.rmtree(turning / "run")
    assert call_cli("predict", "--horizon", 100, cwd=turning).returncode == 10
    assert call_cli("predict", "--horizon", 100, "--even-if-worse", cwd=turning).returncode == 3


def test_an_abstention_in_json_has_no_path_and_says_why(turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "--json", cwd=turning)
    assert done.returncode == 10
    content = json.loads(done.stdout, parse_constant=no_constant)
    assert (content["path"], content["verdict"], content["bytes_written"]) == (None, "abstain", 0)
    assert content["coherence"] < 0
    assert "coherence" in content["reason"]


def test_an_untestable_forecast_in_json_has_null_for_its_numbers(work: Path, call_cli: CallCli) -> None:
    content = json.loads(call_cli("predict", "--horizon", 5000, "--json", cwd=work).stdout, parse_constant=no_constant)
    assert (content["path"], content["verdict"]) == (None, "untestable")
    assert (content["ratio"], content["coherence"]) == (None, None)


def test_even_if_worse_writes_it_and_says_the_verdict(turning: Path, call_cli: CallCli) -> None:
    content = as_json(call_cli("predict", "--horizon", 100, "--even-if-worse", "--json", cwd=turning))
    assert (content["path"], content["verdict"]) == ("forecasts/run/step_000900.safetensors", "abstain")
    assert (turning / "forecasts" / "run" / "step_000900.safetensors").is_file()
    assert (
        json.loads((turning / "forecasts" / "run" / "step_000900.safetensors.farcast.json").read_text())["verdict"] == "abstain"
    )


def test_of_several_horizons_those_with_a_verdict_for_them_are_written(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", "100,5000", "-o", "out/", cwd=work)
    assert (done.returncode, done.stdout) == (0, "out/step_000900.safetensors\n")
    assert tree_digest(work / "out").keys() == {"step_000900.safetensors", "step_000900.safetensors.farcast.json"}
    assert "step 800 + 5000: untestable" in done.stderr


# --- tensors that share memory ---------------------------------------------------------------------------------------


def test_views_of_one_storage_that_overlap_are_forecast_or_copied_but_never_half_of_each(
    tmp_path: Path, call_cli: CallCli
) -> None:
    def model(step: int) -> dict[str, torch.Tensor]:
        whole = weights_at(step, shapes={"w": (60,), "free": (30,)})
        return {"first": whole["w"][:40], "second": whole["w"][20:], "free": whole["free"]}

    (tmp_path / "run").mkdir()
    for step in STEPS:
        torch.save({"model": model(step), "step": step}, tmp_path / "run" / f"s_{step}.pt")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    assert call_cli("predict", "--horizon", 100, "-q", cwd=tmp_path).stdout == "forecasts/run/s_900.pt\n"
    loaded = torch.load(tmp_path / "forecasts" / "run" / "s_900.pt", weights_only=True)["model"]
    told = json.loads((tmp_path / "forecasts" / "run" / "s_900.pt.farcast.json").read_text())
    copied = {entry["name"] for entry in told["copied"]}
    assert "free" not in copied
    origin, truth = model(800), model(900)
    for name, values in loaded.items():
        if name in copied:
            assert torch.equal(values, origin[name])
        else:
            assert (values - truth[name]).norm() < 0.5 * (origin[name] - truth[name]).norm()


# --- start-up and terminals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("--help",), ("predict", "--help"), ("--version",), ("inspect", "run"), ("inspect", "run", "--json")]
)
def test_what_needs_no_numbers_does_not_import_torch(work: Path, arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv[0] = 'farcast'\nfrom farcast_cli.cli import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "0 False\n"
    assert done.stdout


def test_the_command_is_a_module_that_can_be_run(work: Path) -> None:
    done = run_cli("predict", "--horizon", 100, cwd=work)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step_000900.safetensors\n")
    assert "\x1b" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error(work: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "farcast_cli", "inspect", "run", "--json"],
            cwd=work,
            env=environment,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_inspect_shows_names_as_they_are(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "a:100:b [red]")
    for step in STEPS:
        (run / loose_name(step)).rename(run / f"[bold]:smile:_step_{step}.safetensors")
    done = call_cli("inspect", run.name, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("a:100:b [red]: 8 safetensors snapshots\n")
    assert "[bold]:smile:_step_800.safetensors" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("farcast fit 'a:100:b [red]'")


def test_inspect_cuts_no_name_short_where_it_does_not_write_to_a_terminal(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    for step in STEPS:
        (run / loose_name(step)).rename(run / f"an_experiment_with_{'many_' * 20}settings_step_{step}.safetensors")
    lines = call_cli("inspect", "run", cwd=tmp_path).stdout.splitlines()
    assert sum(f"an_experiment_with_{'many_' * 20}settings_step_800.safetensors" in line for line in lines) == 1


# --- found by trying it ----------------------------------------------------------------------------------------------


def _passed_plainly(folder: Path, call_cli: CallCli) -> Path:
    """A run that was forecast for step 800 at step 700, and went on without it."""
    run = make_loose_run(folder / "run", STEPS[:-1])
    fit_run(run, folder / "forecaster.safetensors")
    assert call_cli("predict", "--horizon", 100, cwd=folder).returncode == 0
    return make_loose_run(folder / "run", (800, 900))


def test_a_run_that_has_passed_a_forecast_and_did_not_resume_from_it_is_fitted_as_a_whole(
    tmp_path: Path, call_cli: CallCli
) -> None:
    """Even though its next snapshot comes nearer to the forecast, which was a little ahead, than to the one before."""
    _passed_plainly(tmp_path, call_cli)
    done = call_cli("fit", "run", "--json", cwd=tmp_path)
    assert (as_json(done)["num_snapshots"], as_json(done)["leap"]) == (9, None)
    assert "resumed" not in done.stderr
    assert "is a forecast of this run" not in done.stderr


def test_a_forecast_that_the_run_has_passed_since_is_mentioned_when_the_steps_are_chosen_by_hand(
    tmp_path: Path, call_cli: CallCli
) -> None:
    """Training may have resumed from it, and then a leap lies in the history."""
    _passed_plainly(tmp_path, call_cli)
    said = "note: step_000800.safetensors is a forecast of this run: if training resumed from it, the chosen steps contain the leap at step 800"
    assert said in call_cli("fit", "run", "--steps", "0:", cwd=tmp_path).stderr
    assert said not in call_cli("fit", "run", "--steps", ":800", cwd=tmp_path).stderr  # it does not lie within
    assert said not in call_cli("fit", "run", "--steps", "0:", "-q", cwd=tmp_path).stderr


def test_a_forecaster_file_with_a_changed_number_is_refused(work: Path, call_cli: CallCli) -> None:
    path = work / "forecaster.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert done.returncode == 4
    assert "do not match their checksum" in done.stderr


def test_a_forecaster_under_a_link_finds_its_run(work: Path, tmp_path: Path, call_cli: CallCli) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work / "forecaster.safetensors").rename(elsewhere / "real.safetensors")
    (work / "forecaster.safetensors").symlink_to(elsewhere / "real.safetensors")
    assert call_cli("fit", "run", "-q", cwd=work).returncode == 0
    assert call_cli("predict", "--horizon", 100, "-q", cwd=work).stdout == "forecasts/run/step_000900.safetensors\n"


def test_two_snapshots_close_together_are_no_second_run(tmp_path: Path, call_cli: CallCli) -> None:
    """A preempted job saves at once: its noise over one step is far more a step than over a hundred."""
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "run").mkdir()
    weights, last = torch.zeros(2000), 0
    for step in (100, 200, 300, 400, 401, 500, 600, 700):
        weights = weights + torch.randn(2000, generator=generator) * (step - last) ** 0.5 + 0.01 * (step - last)
        last = step
        save_file({"w": weights.clone()}, tmp_path / "run" / f"step_{step}.safetensors")
    assert call_cli("fit", "run", "-q", cwd=tmp_path).returncode == 0


def test_a_file_without_weights_is_left_out_with_the_reason(tmp_path: Path, call_cli: CallCli) -> None:
    """Some loops save the optimizer's state in a separate file."""
    run = make_torch_run(tmp_path / "run", (100, 200, 300, 400, 500, 600))
    torch.save({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}, run / "opt_600.pt")
    done = call_cli("inspect", "run", "--json", cwd=tmp_path)
    assert [Path(entry["path"]).name for entry in json.loads(done.stdout)["ignored"]] == ["opt_600.pt"]
    assert json.loads(done.stdout)["ignored"][0]["reason"] == "it holds no weights"


def test_the_statistics_of_the_data_do_not_decide_what_is_published(tmp_path: Path, call_cli: CallCli) -> None:
    """A BatchNorm's running variance has the scale of the data, and drifts where weights only walk at random."""
    generator = torch.Generator().manual_seed(1)
    (tmp_path / "run").mkdir()
    weights = torch.zeros(5000)
    for step in range(100, 1300, 100):
        weights = weights + torch.randn(5000, generator=generator)
        state = {"bn.weight": weights.clone(), "bn.running_var": torch.full((64,), 1e5 + 1e3 * step)}
        save_file(state, tmp_path / "run" / f"step_{step}.safetensors")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    assert call_cli("predict", "--horizon", 200, cwd=tmp_path).returncode == 10
