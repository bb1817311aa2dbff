"""`farcast help` and `farcast ci`: every installation explains itself, without the folder of the documentation."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from farcast_cli import errors
from farcast_cli.checkpoint.hub import CARD
from farcast_cli.cli import EPILOG, INTERRUPTED
from farcast_cli.commands import render
from farcast_cli.commands.help import help as help_command
from farcast_cli.folder import folder_of
from farcast_cli.forecast.memory import memory_of
from farcast_cli.texts import names_of, read_text, title_of
from farcast_cli.trainers import LAYOUTS
from farcast_cli.trainers.refused import KINDS
from tests.test_docs import complaint, farcast_commands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import CallCli

PACKAGE = Path(errors.__file__).parent
RESUMING = PACKAGE.parent / "docs" / "resume.md"
TOPICS = names_of("topics")
WIDTH = 80


def test_help_lists_every_topic_with_its_title(call_cli: CallCli) -> None:
    lines = call_cli("help").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["farcast", "help", topic] for topic in TOPICS]
    assert all(line.endswith(title_of(topic)) for line, topic in zip(lines, TOPICS, strict=True))
    assert {"resume", "leaps", "formats", "convert", "ci", "exit-codes", "evaluation", "watch"} == set(TOPICS)
    assert all(topic in str(help_command.__doc__) for topic in TOPICS)


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_is_one_screen_of_plain_text_with_commands_that_the_program_knows(topic: str, call_cli: CallCli) -> None:
    done = call_cli("help", topic)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", read_text("topics", topic))
    lines = done.stdout.splitlines()
    assert len(lines) <= 32
    assert [line for line in lines if len(line) > WIDTH] == []
    shown = [line for line in lines if line.startswith("    ")] + re.findall(r"`(farcast [^`]+)`", " ".join(lines))
    asked = [re.sub(r"  +or .*", "", line) for line in shown if "COMMAND" not in line]
    wrong = [(words, said) for line in asked for words in farcast_commands(line) if (said := complaint(words))]
    assert [one for one in wrong if "is missing" not in one[1] and "0 arguments" not in one[1]] == []


@pytest.mark.parametrize("topic", TOPICS)
def test_a_narrow_terminal_gets_the_prose_of_a_topic_wrapped_between_words_and_its_code_as_it_is(
    topic: str, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "WIDE", 44)
    told, whole = call_cli("help", topic).stdout, read_text("topics", topic)
    assert told.split() == whole.split()
    code = [line for line in whole.splitlines() if line.startswith("    ")]
    assert [line for line in told.splitlines() if line.startswith("    ")] == code
    assert [line for line in told.splitlines() if len(line) > 44 and line not in code] == []


def test_a_topic_that_is_not_there_is_a_usage_error_with_those_that_are(call_cli: CallCli) -> None:
    done = call_cli("help", "resuming")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"resuming: expected one of {', '.join(TOPICS)}" in done.stderr
    assert "hint: farcast predict --help" in call_cli("help", "predict").stderr


def kinds(kind: type[errors.FarcastError]) -> Iterator[type[errors.FarcastError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from kinds(inner)


def test_the_topic_of_exit_codes_has_every_code() -> None:
    told = {int(code) for code in re.findall(r"^ +(\d+)  ", read_text("topics", "exit-codes"), flags=re.MULTILINE)}
    assert told == {0, INTERRUPTED, *(kind.exit_code for kind in kinds(errors.FarcastError))}
    assert {int(code) for code in re.findall(r"\d+", EPILOG)} == told


def test_the_topic_of_formats_has_every_layout_and_that_of_conversion_every_refused_one() -> None:
    refused = {kind.name for kind in KINDS}
    told = set(re.findall(r"^    ([\w-]+)  ", read_text("topics", "formats"), flags=re.MULTILINE))
    assert told == {layout.name for layout in LAYOUTS} - refused
    assert [name for name in refused if name not in read_text("topics", "convert").lower()] == []


def test_the_topic_of_leaps_names_the_place_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("RUN")
    assert f"`{memory_of(folder_of(run), run).as_posix()}`" in read_text("topics", "leaps")


def test_the_topic_of_leaps_and_the_documentation_agree_on_fit_after_leaps() -> None:
    told = [" ".join(text.split()) for text in (read_text("topics", "leaps"), RESUMING.read_text(encoding="utf-8"))]
    for text in told:
        assert "only the snapshots after the last one, and says so" in text
        assert "prints a caution" in text
        assert "o not use `fit`" not in text


def texts_of_messages(module: Path) -> Iterator[str]:
    """All texts in the code of a module but its docstrings; those of commands are their help."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and module.parent.name != "commands"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def test_no_message_or_topic_names_a_file_of_the_documentation() -> None:
    pages = re.compile(r"docs/|\b[a-z-]+\.md\b|README")
    found = {str(path): text for path in PACKAGE.rglob("*.py") for text in texts_of_messages(path) if pages.search(text)}
    assert {path: text for path, text in found.items() if text not in {".md", CARD}} == {}
    assert [name for name in TOPICS if pages.search(read_text("topics", name))] == []


@pytest.mark.parametrize("command", ["help", "ci"])
def test_a_wrong_file_of_defaults_stops_no_explanation(command: str, tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "farcast.toml").write_text("not TOML")
    assert call_cli(command, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", names_of("scripts"))
def test_ci_prints_a_script_byte_for_byte(name: str, call_cli: CallCli) -> None:
    done = call_cli("ci", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.encode() == (PACKAGE / "scripts" / name).read_bytes()
    assert done.stdout.startswith("#!/bin/sh\n" if name.endswith(".sh") else '"""Write the rows')


def test_ci_names_its_scripts_and_refuses_another(call_cli: CallCli) -> None:
    assert call_cli("ci").stdout.split() == ["capture.py", "forecast.sh", "periodic.sh"]
    done = call_cli("ci", "../results.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected one of capture.py, forecast.sh, periodic.sh" in done.stderr
