"""The documentation says what the program does: the reference is current, links lead somewhere, commands parse, CI works."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer
from safetensors.torch import save_file

from farcast_cli.cli import app
from tests.conftest import clean_environment, make_loose_run, tree_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CI_SCRIPT = ROOT / "farcast_cli" / "scripts" / "forecast.sh"
NOT_SHELL = {"python", "toml", "json", "text", "yaml"}
LONG_RUN = tuple(range(100, 1100, 100))


def generator() -> Any:
    """The module docs/build_cli_reference.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("build_cli_reference", DOCS / "build_cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cli.md", "json.md"])
def test_the_reference_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == generator().PAGES[name](), "run: python docs/build_cli_reference.py"


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert generator().reference() == (DOCS / "cli.md").read_text()


def test_a_stale_reference_is_reported_in_one_line_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = generator()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    (tmp_path / "json.md").write_text("old")
    assert module.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/json.md is stale: python docs/build_cli_reference.py\n"


# --- links -----------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


# --- commands --------------------------------------------------------------------------------------------------------


def fenced_lines(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks, continued ones joined."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        if language not in NOT_SHELL:
            yield from body.replace("\\\n", " ").splitlines()


def farcast_commands(line: str) -> Iterator[list[str]]:
    """Every call of farcast in a line of shell, without what comes before or after it."""
    if not re.search(r"(^|[\s(;&|])farcast\s", line):
        return
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    command: list[str] = []
    for word in [*reader, ";"]:
        if not set(word) <= set("();<>|&"):
            command.append(word)
            continue
        while command and (command[0] == "$" or re.match(r"\w+=", command[0])):
            command.pop(0)
        if command and command[0] == "farcast":
            yield command[1:]
        command = []


def complaint(words: Sequence[str]) -> str:
    """What is wrong with a call of farcast by the parser's own list of commands and options; empty where nothing is."""
    group: Any = typer.main.get_command(app)
    command = group
    if words and not words[0].startswith("-"):
        command = group.commands.get(words[0])
        words = words[1:]
    if command is None:
        return "no such command"
    options = {name: p for p in command.params if p.param_type_name == "option" for name in p.opts}
    places = [p for p in command.params if p.param_type_name == "argument"]
    waiting, given, used = iter(words), 0, set()
    for word in waiting:
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            given += 1
        elif name in {"-h", "--help"}:
            return ""
        elif name not in options:
            return f"no option {name}"
        else:
            used.add(options[name].name)
            if not options[name].is_flag and not equals and next(waiting, None) is None:
                return f"{name} lacks its value"
    missing = [name for name, p in options.items() if p.required and p.name not in used]
    if missing:
        return f"{missing[0]} is missing"
    return "" if sum(p.required for p in places) <= given <= len(places) else f"{given} arguments"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_is_one_that_the_program_knows(page: Path) -> None:
    wrong = [
        f"farcast {shlex.join(words)}: {said}"
        for line in fenced_lines(page)
        for words in farcast_commands(line)
        if (said := complaint(words))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("$ farcast predict --horizon 5 -o out/  # write it", ""),
        ("X=1 farcast fit ckpts --steps 5: && farcast predict --horizon=5", ""),
        ('path=$(farcast predict --to-step 9 --eval-cmd "python eval.py {ckpt}")', ""),
        ("farcast forecast ckpts", "no such command"),
        ("farcast fit ckpts --horizont 5", "no option --horizont"),
        ("farcast fit", "0 arguments"),
        ("farcast fit a b", "2 arguments"),
        ("farcast predict --horizon", "--horizon lacks its value"),
        ("farcast verify out", "--against is missing"),
    ],
)
def test_the_check_of_commands_sees_what_is_wrong(line: str, said: str) -> None:
    assert next(complaint(words) for words in farcast_commands(line)) == said


# --- formulas --------------------------------------------------------------------------------------------------------


def one_spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def formulas(text: str) -> Iterator[str]:
    """The formulas of a page: those of its indented lines, each by itself, and those that its tables begin with Delta."""
    for line in re.findall(r"^    (.*)$", without_code(text), flags=re.MULTILINE):
        for piece in re.split(r"\s{3,}", re.sub(r"\s+(=|<=|->)\s+", r" \1 ", line)):
            if re.search(r"(^|\s)(=|<=|->)\s", piece):
                yield one_spaced(piece).rstrip(",")
    for cell in re.findall(r"\| (Delta .*) \|$", text, flags=re.MULTILINE):
        yield cell.replace("\\|", "|")


def docstrings(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield one_spaced(ast.get_docstring(node) or "")


def test_every_formula_of_the_method_stands_in_the_docstring_of_what_computes_it() -> None:
    known = list(docstrings([*(ROOT / "farcast_cli" / "forecast").glob("*.py"), ROOT / "bench" / "anneal.py"]))
    shown = list(formulas((DOCS / "method.md").read_text()))
    assert len(shown) > 60
    assert [formula for formula in shown if not any(formula in text for text in known)] == []


def test_the_check_of_formulas_sees_each_of_several_in_a_line_and_in_a_table() -> None:
    text = "Text = no formula.\n\n    x   = t_0 + L,   L = s - t_0   a remark\n    h -> h pace   in words\n\n| `clip` | Delta min(m / \\|d\\|, 1) |\n"
    assert list(formulas(text)) == ["x = t_0 + L", "L = s - t_0", "h -> h pace", "Delta min(m / |d|, 1)"]


# --- the CI script ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with this Python's farcast and python3."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in (("farcast", " -m farcast_cli"), ("python3", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def run_script(tools: Path, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run forecast.sh in the folder above `tools`."""
    environment = clean_environment() | {key: str(value) for key, value in variables.items()}
    environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", str(CI_SCRIPT), *map(str, arguments)],
        cwd=tools.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def make_random_walk(folder: Path) -> Path:
    """A run without any drift: its past says nothing of its future."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 64, generator=generator)
    for step in LONG_RUN:
        save_file({"layer.weight": weights}, folder / f"step_{step}.safetensors")
        weights = weights + 0.1 * torch.randn(64, 64, generator=generator)
    return folder


def results(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.json") if "farcast" not in path.name}


def test_the_ci_script_prints_the_path_of_a_forecast_that_it_wrote_and_keeps_the_results(tmp_path: Path, tools: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    done = run_script(tools, run, 200, "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/step_001000.safetensors\n"
    assert (tmp_path / "out/step_001000.safetensors").is_file()
    assert results(tmp_path / "out") == {"inspect.json", "fit.json", "predict.json"}
    told = {name: json.loads((tmp_path / "out" / name).read_text()) for name in results(tmp_path / "out")}
    assert [s["step"] for s in told["inspect.json"]["snapshots"]] == list(range(100, 900, 100))
    assert told["fit.json"]["num_snapshots"] == 8
    assert told["predict.json"]["verdict"] == "forecast"
    assert (tmp_path / "out/result.env").read_text() == "OUTCOME=forecast\nRESUME_FROM=out/step_001000.safetensors\n"


def test_the_ci_script_says_keep_training_where_the_verdict_is_against_a_forecast(tmp_path: Path, tools: Path) -> None:
    run = make_random_walk(tmp_path / "run")
    done = run_script(tools, RUN_DIR=run, HORIZON=250, OUT_DIR="out")
    assert (done.returncode, done.stdout) == (0, "")
    assert "keep training" in done.stderr
    told = json.loads((tmp_path / "out/predict.json").read_text())
    assert (told["verdict"], told["path"]) == ("abstain", None)
    assert (tmp_path / "out/result.env").read_text() == "OUTCOME=keep-training\n"
    assert list((tmp_path / "out").glob("step_*")) == []


def test_the_ci_script_fails_with_the_code_of_the_command_that_failed_and_leaves_no_old_result(
    tmp_path: Path, tools: Path
) -> None:
    run = make_loose_run(tmp_path / "run")
    last = run / "step_000800.safetensors"
    last.write_bytes(last.read_bytes() + b"damage")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.env").write_text("OUTCOME=forecast\n")
    done = run_script(tools, run, 200, "out")
    assert (done.returncode, done.stdout) == (4, "")
    assert "step_000800.safetensors" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inspect.json"]
    assert json.loads((tmp_path / "out/inspect.json").read_text())["error"]["code"] == 4


def test_the_ci_script_passes_on_the_code_of_a_prediction_that_failed(tmp_path: Path, tools: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "step_001000.safetensors").write_text("mine")
    done = run_script(tools, run, 200, "out")
    assert done.returncode == 5
    assert "failed with exit code 5" in done.stderr
    assert (tmp_path / "out" / "step_001000.safetensors").read_text() == "mine"


def test_the_ci_script_puts_no_path_that_a_shell_would_obey_where_jobs_read_it(tmp_path: Path, tools: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    for path in run.iterdir():
        path.rename(path.with_name(f"$(touch marker)_{path.name}"))
    done = run_script(tools, run, 200, "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "could obey" in done.stderr
    assert not (tmp_path / "out/result.env").exists()
    assert not (tmp_path / "marker").exists()
    told = json.loads((tmp_path / "out/predict.json").read_text())["path"]
    assert (tmp_path / told).is_file()


def test_the_ci_script_takes_a_folder_that_is_called_like_an_option_for_a_folder(tmp_path: Path, tools: Path) -> None:
    make_loose_run(tmp_path / "--version")
    done = run_script(tools, "--version", 200, "-o")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "-o/step_001000.safetensors").is_file()


@pytest.mark.parametrize("name", ["inspect.json", "predict.json", "result.env"])
def test_the_ci_script_removes_no_file_that_is_not_its_own(tmp_path: Path, tools: Path, name: str) -> None:
    run = make_loose_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    done = run_script(tools, run, 200, "out")
    assert (done.returncode, done.stdout) == (5, "")
    assert f"out/{name} is not from an earlier call" in done.stderr
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


def test_the_ci_script_writes_nothing_into_the_runs_folder(tmp_path: Path, tools: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    before = tree_digest(run)
    done = run_script(tools, run, 200, run / "deep" / "forecast")
    assert (done.returncode, done.stdout) == (5, "")
    assert "lies inside RUN" in done.stderr
    assert tree_digest(run) == before


def test_the_ci_script_resumes_from_no_forecast_that_is_not_there_or_is_for_evaluation(tmp_path: Path, tools: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    done = run_script(tools, run, 200, "out", FARCAST_DRY_RUN="true", FARCAST_FOR="evaluation")
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / done.stdout.strip()).is_file()
    assert json.loads((tmp_path / "out" / "step_001000.safetensors.farcast.json").read_text())["for"] == "resume"


@pytest.mark.parametrize("horizon", ["", "soon", "100,200", "-5"])
def test_the_ci_script_refuses_a_horizon_that_is_not_one_number(tmp_path: Path, tools: Path, horizon: str) -> None:
    done = run_script(tools, tmp_path, horizon)
    assert (done.returncode, done.stdout) == (2, "")


def test_the_ci_script_is_plain_posix_shell() -> None:
    done = subprocess.run(["sh", "-n", str(CI_SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
