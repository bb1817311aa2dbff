"""The Python API: each function does what its command does, by the same names; the page docs/api.md runs as it stands."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import farcast_cli
from farcast_cli import api
from farcast_cli.commands import backtest, fit, keep, leap, predict, report, verify, watch
from farcast_cli.forecast.fitting import FitOutcome
from tests.conftest import loose_name, make_loose_run, weights_at
from tests.tiny import save_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import CallCli

ROOT = Path(__file__).resolve().parent.parent
OF_THE_TERMINAL = {"context", "json_", "quiet", "verbose", "config"}
OF_FIT = {"include", "exclude", "steps", "pattern", "step_from", "unit", "weights", "history", "sample", "full"}
"""The options that choose from a folder: `fit` has them, and what it returns is passed on."""


class Pair(NamedTuple):
    """A function and its command, with the options that the function has no use for."""

    function: Callable[..., Any]
    command: Callable[..., Any]
    left_out: set[str]


PAIRS = {
    "keep": Pair(api.keep, keep.keep, set()),
    "fit": Pair(api.fit, fit.fit, set()),
    "backtest": Pair(api.backtest, backtest.backtest, {"directory", "forecaster", *OF_FIT, "ledger", "io", "threads"}),
    "report": Pair(api.report, report.report, {"target", "forecaster", *OF_FIT, "form", "text"}),
    "predict": Pair(api.predict, predict.predict, {"directory", "forecaster", *OF_FIT}),
    "leap": Pair(api.leap, leap.leap, set()),
    "watch": Pair(api.watch, watch.watch, set()),
    "verify": Pair(api.verify, verify.verify, set()),
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_a_function_has_the_options_of_its_command_with_their_defaults(name: str) -> None:
    function, command, left_out = PAIRS[name]
    found, expected = defaults(function), defaults(command)
    for own in ("progress", "run"):
        found.pop(own, None)
    if name == "fit":
        assert found.pop("output") is None
        assert expected.pop("output")
    assert found == {option: default for option, default in expected.items() if option not in OF_THE_TERMINAL | left_out}


def test_the_import_is_light_and_a_name_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, farcast_cli\n"
        "assert not {'numpy', 'typer', 'rich', 'pydantic', 'torch', 'farcast_cli.api'} & set(sys.modules)\n"
        "farcast_cli.predict\n"
        "assert not {'numpy', 'typer', 'rich', 'torch'} & set(sys.modules)\n"
        "import farcast_cli.prediction, farcast_cli.verification, farcast_cli.leaps.call\n"
        "assert all(callable(getattr(farcast_cli, name)) for name in farcast_cli.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_module_hides_a_public_name() -> None:
    names = {path.stem for path in (ROOT / "farcast_cli").iterdir()}
    assert names & set(farcast_cli.__all__) == set()
    assert set(farcast_cli.__all__) <= set(dir(farcast_cli))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'predikt'"):
        _ = farcast_cli.predikt  # type: ignore[attr-defined]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run, and its snapshot of 100 steps later."""
    make_loose_run(tmp_path / "ckpts")
    save_safetensors(tmp_path / "later" / loose_name(900), weights_at(900))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_opened_with_its_steps(here: Path) -> None:
    run = farcast_cli.open_run(here / "ckpts", steps="300:")
    assert (run.layout, run.steps) == ("safetensors", (300, 400, 500, 600, 700, 800))


def test_a_forecast_has_the_bytes_of_the_commands_forecast_and_the_same_answer(here: Path, call_cli: CallCli) -> None:
    answered = json.loads(call_cli("predict", "ckpts", "--horizon", 100, "-o", "by_command/", "--json", cwd=here).stdout)
    done = farcast_cli.predict(farcast_cli.fit("ckpts"), horizon=100, output="by_function/")
    assert done.path is not None
    assert done.path.read_bytes() == (here / answered["path"]).read_bytes()
    (outcome,) = done.outcomes
    assert (outcome.valid_step, done.reason) == (900, answered["reason"])


@pytest.mark.parametrize("kind", ["folder", "forecaster file", "outcome", "fitted"])
def test_a_run_is_named_by_its_folder_its_file_or_what_fit_returned(kind: str, here: Path) -> None:
    fitted = farcast_cli.fit(here / "ckpts", output="run.safetensors")
    run: Any = {"folder": "ckpts", "forecaster file": "run.safetensors", "outcome": fitted, "fitted": fitted.fitted}[kind]
    report = farcast_cli.backtest(run, horizon="100")
    assert report.decisions[100][1].verdict == "forecast"
    assert farcast_cli.predict(run, horizon=100, dry_run=True).outcomes[0].method == report.decisions[100][0]


def test_fit_writes_a_file_only_where_one_is_named(here: Path) -> None:
    assert isinstance(farcast_cli.fit("ckpts"), FitOutcome)
    assert sorted(path.name for path in here.iterdir()) == ["ckpts", "later"]


def test_no_forecast_is_an_answer_with_its_reason_and_the_ways_on(here: Path) -> None:
    done = farcast_cli.predict("ckpts", horizon=5000)
    assert (done.path, done.paths) == (None, ())
    assert done.outcomes[0].decision.verdict == "untestable"
    assert "farcast predict ckpts --horizon" in done.advice()
    assert not (here / "forecasts").exists()


def test_a_leap_gives_the_path_to_resume_from(here: Path) -> None:
    assert farcast_cli.leap("ckpts", every=100).outcome.path is not None
    assert (here / "forecasts" / "ckpts" / "ckpts.memory.safetensors").is_file()


def test_progress_is_told_every_byte_that_was_announced(here: Path) -> None:
    announced, done = list[int](), list[int]()

    def progress(_phase: str, total: int) -> Callable[[int], None]:
        announced.append(total)
        return done.append

    farcast_cli.fit(here / "ckpts", progress=progress)
    assert sum(done) == sum(announced) > 0


WRONG: dict[str, tuple[Callable[[], object], int, str]] = {
    "a method": (lambda: farcast_cli.backtest("ckpts", method="oracle"), 2, "oracle"),
    "a choice": (lambda: farcast_cli.predict("ckpts", optimizer="keep"), 2, "--optimizer keep: expected one of copy"),  # type: ignore[arg-type]
    "a purpose": (lambda: farcast_cli.predict("ckpts", purpose="use"), 2, "--for use: expected one of resume"),  # type: ignore[arg-type]
    "a horizon": (lambda: farcast_cli.predict("ckpts", horizon=0), 2, "--horizon 0"),
    "two horizons": (lambda: farcast_cli.predict("ckpts", horizon=5, to_step=900), 2, "--to-step"),
    "a sample": (lambda: farcast_cli.fit("ckpts", sample=10), 2, "--sample 10: expected 1000 or more"),
    "threads": (lambda: farcast_cli.fit("ckpts", threads=-1), 2, "--threads -1"),
    "a gain": (lambda: farcast_cli.leap("ckpts", gain=0), 2, "--gain 0"),
    "no run": (lambda: farcast_cli.open_run("nowhere"), 3, "nowhere"),
    "few snapshots": (lambda: farcast_cli.fit("later"), 3, "snapshots"),
    "no forecaster": (farcast_cli.predict, 4, "forecaster.safetensors"),
    "no sidecar": (lambda: farcast_cli.verify("ckpts/step_000800.safetensors", against="later"), 2, "origin is unknown"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_error_with_its_exit_code(what: str, here: Path) -> None:
    call, code, text = WRONG[what]
    before = sorted(here.rglob("*"))
    with pytest.raises(farcast_cli.FarcastError) as caught:
        call()
    assert (caught.value.exit_code, text in str(caught.value)) == (code, True), caught.value
    assert sorted(here.rglob("*")) == before


def test_the_example_of_the_page_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), names)  # noqa: S102 - our own page
    assert "8 snapshots, the last at step 800" in capsys.readouterr().out
    assert names["done"].path == Path("forecasts") / loose_name(900)
    assert names["answer"].ratio < 1
    assert (here / names["resume_from"]).exists()
