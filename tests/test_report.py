"""The report: its numbers are those of fit, backtest and predict; its page is whole by itself; its file replaces nothing."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster_file import load_fitted
from farcast_cli.forecast.significance import Significance
from farcast_cli.headline import sureness
from farcast_cli.reports.figures import poster
from farcast_cli.reports.page import page
from farcast_cli.reports.panels import headline, panels
from farcast_cli.reports.story import Course, Story, course_of, tell
from farcast_cli.reports.text import COLUMNS
from farcast_cli.request import Request
from farcast_cli.run.losses import LossLog
from farcast_cli.run.trajectory import discover
from tests.conftest import PATIENCE_S, STEPS, loose_name, make_loose_run, tree_digest, weights_at

if TYPE_CHECKING:
    from tests.conftest import CallCli

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample_checkpoints" / "huggingface"
LONG = tuple(range(100, 2100, 100))
VOID = {"meta", "link", "br", "img", "input", "hr"}
HEADINGS = [
    "Cosines between the run's moves",
    "S and p, had you asked earlier",
    "Back-test: error by steps ahead",
    "Tensors by error",
    "Loss and leaps",
    "The run in facts",
]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_loose_run(tmp_path_factory.mktemp("long") / "run", LONG)


@pytest.fixture(scope="module")
def sample_story() -> Story:
    fitted = fit(discover(SAMPLE), num_samples=None)
    return tell(fitted, Request(), course_of(fitted, losses=None, ledgers=None))


def answer(call_cli: CallCli, *arguments: object, cwd: Path) -> Any:
    done = call_cli(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_the_back_test_of_a_report_is_that_of_the_command_backtest(work: Path, call_cli: CallCli) -> None:
    told, tested = (answer(call_cli, command, cwd=work) for command in ("report", "backtest"))
    assert told["scores"] == tested["scores"] != []
    assert [one["step"] for one in told["directions"]] == list(STEPS[5:])
    assert told["directions"][-1]["coherence"] == tested["coherence"]


def test_a_report_proposes_what_predict_writes(work: Path, call_cli: CallCli) -> None:
    told = answer(call_cli, "report", cwd=work)["forecast"]
    written = answer(call_cli, "predict", cwd=work)
    assert written["path"]
    alike = ("horizon", "method", "verdict", "reason", "ratio", "expected_ratio", "coherence", "significance", "valid_step")
    assert {key: told[key] for key in alike} == {key: written[key] for key in alike}


@pytest.mark.parametrize("name", ["of weights alone", "with a schedule"])
def test_s_and_p_at_an_earlier_step_are_those_of_a_fit_up_to_it(
    name: str, long_run: Path, tmp_path: Path, call_cli: CallCli
) -> None:
    run = {"of weights alone": long_run, "with a schedule": SAMPLE}[name]
    told = answer(call_cli, "report", run, cwd=tmp_path)["directions"]
    for found in told:
        fitted = answer(call_cli, "fit", run, "--steps", f":{found['step']}", cwd=tmp_path)
        for key in ("coherence", "recent_coherence", "significance"):
            assert found[key] == pytest.approx(fitted[key], abs=1e-9), (found["step"], key)
    assert any(found["recent_coherence"] for found in told) or run == SAMPLE


def test_an_earlier_step_is_in_the_zone_exactly_where_fit_up_to_it_says_that_it_is_not_steady_enough(
    tmp_path: Path, call_cli: CallCli
) -> None:
    base, away = (weights_at(0, seed=seed) for seed in (0, 1))
    (tmp_path / "run").mkdir()
    for step in LONG:  # half the way there, and back
        share = 0.1 * math.sin(math.pi * step / LONG[-1])
        save_file({name: base[name] + share * away[name] for name in base}, tmp_path / "run" / loose_name(step))
    told = answer(call_cli, "report", "run", cwd=tmp_path)["directions"]
    said = [call_cli("fit", "run", "--steps", f":{found['step']}", "-v", cwd=tmp_path).stderr for found in told]
    assert [found["is_steady"] for found in told] == ["; steady enough" in text for text in said]
    assert len({found["is_steady"] for found in told}) == 2


def test_the_cosines_are_those_of_the_weights_themselves(work: Path, call_cli: CallCli) -> None:
    moves = answer(call_cli, "report", cwd=work)["moves"]
    weights = [load_file(work / "run" / loose_name(step)) for step in STEPS]
    flat = np.stack([np.concatenate([w.double().numpy().ravel() for _, w in sorted(one.items())]) for one in weights])
    steps = np.diff(flat, axis=0)
    units = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    assert moves["steps"] == list(STEPS)
    np.testing.assert_allclose(moves["cosines"], units @ units.T, atol=1e-5)


def test_a_tensors_error_is_that_of_a_back_test_of_this_tensor_alone(work: Path, call_cli: CallCli) -> None:
    told = answer(call_cli, "report", cwd=work)["tensors"]
    for found in told["errors"]:
        arguments = ("backtest", "run", "--include", found["name"], "--horizon", told["horizon"])
        (alone,) = [s for s in answer(call_cli, *arguments, cwd=work)["scores"] if s["method"] == told["method"]]
        assert found["ratio"] == pytest.approx(alone["ratio"], rel=1e-6)
    ratios = [found["ratio"] for found in told["errors"]]
    assert len(ratios) == 4
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(("last", "steps"), [(330, range(10, 340, 10)), (340, range(20, 350, 20)), (650, range(10, 660, 20))])
def test_of_a_long_history_every_second_snapshot_is_drawn_up_to_the_last(
    last: int, steps: range, tmp_path: Path, call_cli: CallCli
) -> None:
    make_loose_run(tmp_path / "run", range(10, last + 10, 10), shapes={"w": (8, 8)})
    assert answer(call_cli, "report", "run", cwd=tmp_path)["moves"]["steps"] == list(steps)
    told = call_cli("report", "run", "--format", "markdown", cwd=tmp_path).stdout
    assert ("Each move spans 2 distances" in told) == (steps.step == 20)


def test_the_losses_are_those_of_the_trainers_log(sample_story: Story) -> None:
    log = json.loads((SAMPLE / "checkpoint-1200" / "trainer_state.json").read_text())["log_history"]
    assert list(sample_story.course.points("training")) == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert sample_story.course.points("evaluation") == ()


def test_an_entry_of_the_log_that_is_no_number_is_no_loss(tmp_path: Path, call_cli: CallCli) -> None:
    run = shutil.copytree(SAMPLE, tmp_path / "run")
    state = run / "checkpoint-1200" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"] = [{"step": 50, "loss": "low"}, {"step": 100, "loss": None}, {"step": 150, "loss": 0.5}]
    state.write_text(json.dumps(content))
    assert answer(call_cli, "report", "run", cwd=tmp_path)["losses"] == [{"kind": "training", "step": 150, "loss": 0.5}]


def test_a_report_shows_the_losses_of_a_log_that_the_user_names(work: Path, call_cli: CallCli) -> None:
    (work / "log.csv").write_text("step,loss,val_loss\n100,2.0,\n200,1.5,1.6\n300,1.0,\n")
    told = answer(call_cli, "report", "--losses", "log.csv", cwd=work)
    assert [tuple(one.values()) for one in told["losses"]] == [
        ("training", 100, 2.0),
        ("training", 200, 1.5),
        ("training", 300, 1.0),
        ("evaluation", 200, 1.6),
    ]
    text = call_cli("report", "--losses", "log.csv", "--format", "markdown", cwd=work).stdout
    assert "The training loss goes from 2 at step 100 to 1 at step 300. The evaluation loss" in text


def test_a_report_shows_the_leaps_that_the_run_resumed_from(work: Path) -> None:
    course = Course(LossLog(Path("log.csv"), ((100, 2.0), (200, 1.5), (300, 1.0))), ((200, 70),))
    told = tell(load_fitted(work / "forecaster.safetensors"), Request(), course)
    (panel,) = [panel for panel in panels(told) if panel.name == "course"]
    assert panel.message.endswith("The run made 1 leap, at step 200.")
    assert [row[-1] for row in panel.table.rows] == ["", "70 steps", ""]
    assert 'aria-labelledby="course-title course-text"' in page(told)


def test_the_leaps_of_a_report_are_those_of_the_ledger_that_the_run_resumed_from(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", STEPS)
    for horizon in (200, 400):  # the run resumes from the second one only
        done = call_cli("predict", "run", "--horizon", horizon, "--even-if-worse", "--overwrite", cwd=tmp_path)
        assert done.returncode == 0, done
    make_loose_run(tmp_path / "run", range(1300, 2000, 100))
    told = answer(call_cli, "report", "run", cwd=tmp_path)
    assert told["facts"]["leap before"] == "the history begins after the leap to step 1200"
    assert told["leaps"] == [{"step": 1200, "horizon": 400}]


def test_a_report_says_why_it_has_no_losses(work: Path, call_cli: CallCli) -> None:
    assert "No losses are known" in call_cli("report", "--format", "markdown", cwd=work).stdout


# --- the headline ----------------------------------------------------------------------------------------------------


def test_a_run_that_keeps_its_direction_is_told_to_leap(work: Path, call_cli: CallCli) -> None:
    told = answer(call_cli, "report", cwd=work)
    assert told["title"] == f"Leap {told['forecast']['horizon']} steps"
    assert told["next"] == "farcast predict"


def test_a_run_that_turns_back_is_told_to_keep_training(turning: Path, call_cli: CallCli) -> None:
    told = answer(call_cli, "report", cwd=turning)
    assert told["title"] == "Keep training"
    assert told["forecast"]["reason"] in told["why"]
    assert told["next"].startswith("keep training and fit again")


def test_weights_that_do_not_move_are_said_and_drawn(tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "run").mkdir()
    for step in STEPS:
        save_file(weights_at(0), tmp_path / "run" / loose_name(step))
    told = answer(call_cli, "report", "run", cwd=tmp_path)
    assert told["title"] == "Keep training"
    assert told["why"] == "There is no direction to follow: the weights have not moved since the snapshot before."
    for form in (".html", ".png", ".md"):
        assert call_cli("report", "run", "-o", f"out{form}", cwd=tmp_path).returncode == 0
    assert "No tensor moved." in (tmp_path / "out.md").read_text()


def test_a_run_that_is_over_is_not_told_to_keep_training(tmp_path: Path, call_cli: CallCli) -> None:
    run = shutil.copytree(SAMPLE, tmp_path / "run")
    state = run / "checkpoint-1200" / "trainer_state.json"
    state.write_text(state.read_text().replace('"max_steps": 6000', '"max_steps": 1200'))
    told = answer(call_cli, "report", "run", cwd=tmp_path)
    assert told["title"] == "Do not leap"
    assert "the run ended at step 1200" in told["why"]


def test_a_report_for_evaluation_names_the_step_to_evaluate(work: Path, call_cli: CallCli) -> None:
    told = answer(call_cli, "report", "--for", "evaluation", cwd=work)
    assert told["title"] == f"Evaluate the trend at step {told['forecast']['valid_step']}"
    assert told["next"] == "farcast predict --for evaluation"


def test_a_report_of_a_forecaster_whose_run_is_gone_says_that_its_end_is_not_known(work: Path, call_cli: CallCli) -> None:
    before = answer(call_cli, "report", cwd=work)
    shutil.rmtree(work / "run")
    told = answer(call_cli, "report", cwd=work)
    assert "removed since the forecaster was fitted" in told["facts"]["not known"]
    assert (told["title"], told["scores"], told["moves"]) == (before["title"], before["scores"], before["moves"])


@pytest.mark.parametrize(
    ("significance", "text"),
    [
        (Significance(0.002, 0.002), "Chance alone gives such a direction in fewer than 1 of 100 cases."),
        (Significance(0.344, 0.002), "Chance alone gives such a direction in 34 of 100 cases."),
        (
            Significance(0.125, 0.125),
            "Chance alone gives such a direction in 13 of 100 cases. With so few snapshots the number cannot be smaller.",
        ),
        (Significance(float("nan"), float("nan")), ""),
    ],
)
def test_a_p_is_told_in_cases_of_100(significance: Significance, text: str) -> None:
    assert sureness(significance) == text


# --- the page --------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The elements of a page, having seen that each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_is_well_formed_and_has_its_headings_in_the_order_that_decides(sample_story: Story) -> None:
    parsed = Parsed(page(sample_story))
    assert parsed.open == []
    assert parsed.texts["h1"] == [headline(sample_story).title]
    assert parsed.texts["h2"] == HEADINGS
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_figure_has_its_message_as_text_and_a_table_of_its_numbers(sample_story: Story) -> None:
    parsed = Parsed(page(sample_story))
    pictures = [one for one in parsed.named("svg") if one.get("role") == "img"]
    assert [one["aria-labelledby"] for one in pictures] == [
        f"{panel.name}-title {panel.name}-text" for panel in panels(sample_story)
    ]
    assert parsed.texts["desc"] == [panel.message for panel in panels(sample_story)]
    assert len(parsed.named("table")) == len(parsed.named("details")) == len(pictures) == 5
    cells = sum(len(panel.table.rows) * len(panel.table.headings) for panel in panels(sample_story))
    assert len(parsed.named("td")) == cells


def test_every_reference_of_a_page_is_to_a_part_of_itself(sample_story: Story) -> None:
    text = page(sample_story)
    parsed = Parsed(text)
    ids = {attributes.get("id") for _, attributes in parsed.elements}
    links = [
        value for _, attributes in parsed.elements for key, value in attributes.items() if key in {"href", "src", "action"}
    ]
    inside = [*re.findall(r"url\(#([^)]+)\)", text), *(str(link).removeprefix("#") for link in links)]
    assert inside
    assert set(inside) <= ids
    assert "://" not in text
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.elements}


def test_a_page_is_light_or_dark_as_the_reader_has_it(sample_story: Story) -> None:
    text = page(sample_story)
    assert text.count("prefers-color-scheme: dark") == 1
    drawn = text[text.index("<body>") :]
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []  # every colour is one of the page's variables
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= set(re.findall(r"--(\w+): #", text))


NAME = "<script>alert(1)<\\script>|`*x*&"


def test_names_from_files_are_text_and_never_markup(tmp_path: Path, call_cli: CallCli) -> None:
    shapes: dict[str, tuple[int, ...]] = {"<img src=x onerror=alert(2)>": (8, 8), "b|a`": (8,)}
    run = make_loose_run(tmp_path / NAME, shapes=shapes)
    assert call_cli("report", run.name, "-o", "out.html", cwd=tmp_path).returncode == 0
    parsed = Parsed((tmp_path / "out.html").read_text())
    assert not {"script", "img"} & {tag for tag, _ in parsed.elements}
    assert any(NAME in text for text in parsed.texts["dd"])
    written = call_cli("report", run.name, "--format", "markdown", cwd=tmp_path).stdout
    assert not re.search(r"(?<!\\)<(script|img)", written)
    rows = [line for line in written.splitlines() if line.startswith("|") and "onerror" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4]


def test_a_name_that_would_turn_the_text_around_is_shown_escaped(work: Path, call_cli: CallCli) -> None:
    (work / "run").rename(work / "a\u202eb")
    assert call_cli("report", "a\u202eb", "-o", "out.html", cwd=work).returncode == 0
    assert "\u202e" not in (work / "out.html").read_text()
    assert "a\\u202eb" in (work / "out.html").read_text()


def test_a_page_has_no_absolute_path_that_the_user_did_not_type(work: Path, call_cli: CallCli) -> None:
    for arguments in ((), ("run",)):
        assert call_cli("report", *arguments, cwd=work).returncode == 0
        assert str(work) not in (work / "report.html").read_text()


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_for_a_terminal_is_longer_than_44_columns(
    encoding: str, call_cli: CallCli, tmp_path: Path, long_run: Path
) -> None:
    for run in (SAMPLE, long_run):
        done = call_cli("report", run, "--text", cwd=tmp_path, env={"PYTHONIOENCODING": encoding})
        assert max(map(len, done.stdout.splitlines())) <= COLUMNS == 44
        assert [line for line in done.stdout.splitlines() if line.isupper()][1:] != []


def test_every_row_of_a_terminals_table_ends_with_its_last_number(call_cli: CallCli, tmp_path: Path) -> None:
    lines = call_cli("report", SAMPLE, "--text", cwd=tmp_path).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tensor ") and line.endswith("b"))
    assert all(re.search(r" \d\.\d\d$", line) for line in lines[start + 1 : start + 13])


def test_text_and_markdown_need_no_optional_package_and_write_no_file(work: Path, call_cli: CallCli) -> None:
    before = tree_digest(work)
    for arguments in (("--text",), ("--format", "text"), ("--format", "markdown"), ("--json",)):
        assert call_cli("report", *arguments, cwd=work).returncode == 0
    assert tree_digest(work) == before


def test_markdown_has_the_headline_the_tables_and_no_picture(call_cli: CallCli, tmp_path: Path, sample_story: Story) -> None:
    text = call_cli("report", SAMPLE, "--format", "markdown", cwd=tmp_path).stdout
    assert text.startswith(f"# {headline(sample_story).title}\n")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    assert "![" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_report_lies_in_the_working_directory_and_its_path_is_printed(work: Path, call_cli: CallCli) -> None:
    done = call_cli("report", cwd=work)
    assert (done.stdout, done.returncode) == ("report.html\n", 0)
    assert (work / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("ending", [".html", ".md", ".png"])
def test_a_report_is_the_same_each_time_and_replaces_an_older_one(ending: str, work: Path, call_cli: CallCli) -> None:
    place = work / f"out{ending}"
    assert call_cli("report", "-o", place, cwd=work).returncode == 0
    first = place.read_bytes()
    assert call_cli("report", "-o", place, cwd=work).returncode == 0
    assert place.read_bytes() == first


def test_a_picture_shows_every_panel(work: Path, call_cli: CallCli) -> None:
    assert call_cli("report", "-o", "out.png", cwd=work).returncode == 0
    with Image.open(work / "out.png") as image:
        assert image.info["Software"].startswith("farcast report")
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 8


def test_of_a_long_log_losses_spread_evenly_are_shown_and_the_report_says_so(work: Path, call_cli: CallCli) -> None:
    """And a second report may replace the first, which is not too long to be looked at."""
    count = 100_000
    with (work / "run" / "log.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": {1 + step / count}}}\n' for step in range(count))
    assert [call_cli("report", "run", cwd=work).returncode for _ in range(2)] == [0, 0]
    assert (work / "report.html").stat().st_size < 2 << 20
    assert (
        "100,000 losses are too many to show: of each kind, 2,000 spread evenly are here" in (work / "report.html").read_text()
    )
    steps = [one["step"] for one in answer(call_cli, "report", "run", cwd=work)["losses"]]
    assert (len(steps), steps[0], steps[-1]) == (2000, 0, count - 1)
    assert set(np.diff(steps)) == {50, 51}


@pytest.fixture
def leaping(work: Path) -> Story:
    """A run with two logged losses and many leaps."""
    points = tuple((step, 2.0 - step / 1000) for step in range(100, 900, 50))
    course = Course(LossLog(Path("log.csv"), points, points), tuple((step, 20) for step in range(100, 900, 50)))
    return tell(load_fitted(work / "forecaster.safetensors"), Request(), course)


def test_the_picture_has_every_word_of_a_long_message_above_its_panel(leaping: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farcast_cli.reports.figures.MAX_LINE", 24)
    figure = poster(leaping)
    words = "".join(text.get_text() for text in figure.texts).replace(" ", "")
    assert [panel.message for panel in panels(leaping) if panel.message.replace(" ", "") not in words] == []
    boxes = [axes.get_position() for axes in figure.axes]
    places = [text.get_position() for text in figure.texts]
    assert [place for place in places for box in boxes if box.contains(place[0] + 0.1, place[1])] == []


def test_the_legend_of_the_losses_names_the_zone_of_a_leap_where_there_is_one(leaping: Story) -> None:
    without = replace(leaping, course=replace(leaping.course, leaps=()))
    for story, zone in ((leaping, {"length of a leap"}), (without, set())):
        legends = [legend for axes in poster(story).axes if (legend := axes.get_legend())]
        told = [{text.get_text() for text in legend.get_texts()} for legend in legends]
        assert {"training loss", "evaluation loss"} | zone in told


@pytest.mark.parametrize("ending", [".html", ".md", ".png"])
def test_a_file_that_is_not_a_report_stays(ending: str, work: Path, call_cli: CallCli) -> None:
    place = work / f"mine{ending}"
    place.write_bytes(b"mine")
    done = call_cli("report", "-o", place, cwd=work)
    assert (done.returncode, place.read_bytes()) == (5, b"mine")
    assert done.hints == ["hint: --overwrite replaces it; -o OUT writes elsewhere"]
    assert call_cli("report", "-o", place, "--overwrite", cwd=work).returncode == 0
    assert len(place.read_bytes()) > 1000


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_a_report_that_somebody_has_edited_stays(ending: str, work: Path, call_cli: CallCli) -> None:
    place = work / f"out{ending}"
    call_cli("report", "-o", place, cwd=work)
    place.write_text(place.read_text().replace("Leap", "We leap", 1))
    edited = place.read_bytes()
    assert call_cli("report", "-o", place, cwd=work).returncode == 5
    assert place.read_bytes() == edited


def test_a_picture_that_somebody_has_edited_stays(work: Path, call_cli: CallCli) -> None:
    """Saved again by another program, which keeps the text of who wrote it; or with a byte more."""
    place = work / "out.png"
    call_cli("report", "-o", place, cwd=work)
    ours = place.read_bytes()
    with Image.open(place) as image:
        texts = PngInfo()
        for name, text in image.info.items():
            if isinstance(text, str):
                texts.add_text(str(name), text)
        image.rotate(180).save(place, pnginfo=texts)
    for edited in (place.read_bytes(), ours + b"x", ours[:500] + bytes([ours[500] ^ 1]) + ours[501:]):
        place.write_bytes(edited)
        assert call_cli("report", "-o", place, cwd=work).returncode == 5
        assert place.read_bytes() == edited


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-o", "run/report.html"), 5, "lies inside the run's folder"),
        (("-o", "report.pdf"), 2, "expected a name that ends in .html, .png, .md"),
        (("-o", "report.md", "--format", "markdown"), 2, "found both"),
        (("-o", "report.md", "--text"), 2, "found both"),
        (("forecaster.safetensors", "--forecaster", "other.safetensors"), 2, "expected one forecaster file"),
        (("missing",), 3, "missing"),
        (("--steps", ":500"), 2, "chooses from a folder"),
        (("forecaster.safetensors", "--steps", ":500"), 2, "chooses from a folder"),
        (("--format", "pdf"), 2, "expected one of markdown, text"),
    ],
)
def test_what_cannot_be_a_report_is_refused_in_one_line_and_leaves_no_file(
    arguments: tuple[str, ...], code: int, words: str, work: Path, call_cli: CallCli
) -> None:
    before = tree_digest(work)
    done = call_cli("report", *arguments, cwd=work)
    assert done.returncode == code, done
    assert len(done.errors) == 1
    assert words in done.errors[0]
    assert tree_digest(work) == before


def test_who_asks_for_a_picture_on_stdout_is_told_how_to_write_one(work: Path, call_cli: CallCli) -> None:
    done = call_cli("report", "--format", "png", cwd=work)
    assert done.errors == ["error: --format png: expected one of markdown, text"]
    assert done.hints == ["hint: -o report.png writes a picture, -o report.html a page"]


def test_a_forecaster_file_and_its_run_tell_the_same(work: Path, call_cli: CallCli) -> None:
    by_default = answer(call_cli, "report", cwd=work)
    assert answer(call_cli, "report", "forecaster.safetensors", cwd=work) == by_default
    of_run = answer(call_cli, "report", "run", cwd=work)
    assert of_run["scores"] == by_default["scores"]
    assert of_run["next"] == "farcast predict run"


# --- a browser -------------------------------------------------------------------------------------------------------

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1600,1200"),
)
MEASURE = """<!doctype html><iframe id="page" width="{width}" height="900" srcdoc="{page}"></iframe><script>
onload = () => {{
  const inside = document.getElementById("page").contentDocument, root = inside.documentElement;
  inside.querySelectorAll("details").forEach(one => one.open = true);
  const texts = [...inside.querySelectorAll("figure > svg text")].filter(one => one.textContent.trim());
  const scale = one => Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b);
  const sizes = texts.map(one => parseFloat(getComputedStyle(one).fontSize) * scale(one));
  const outside = [...inside.querySelectorAll("h1, h2, p, dd, svg text")].filter(one => one.getBoundingClientRect().right > {width});
  document.title = [root.scrollWidth, root.clientWidth, Math.min(...sizes).toFixed(2), outside.length].join(" ");
}};
</script>"""


def in_a_long_folder(story: Story) -> Story:
    record = story.fitted.provenance.model_copy(update={"directory": f"{'a-folder/' * 30}{'run' * 30}"})
    return replace(story, fitted=replace(story.fitted, provenance=record))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: no chromium on PATH")
@pytest.mark.parametrize("width", [380, 1400])
def test_a_browser_shows_a_page_without_overflow_and_with_text_that_can_be_read(
    width: int, tmp_path: Path, sample_story: Story
) -> None:
    framed = tmp_path / "framed.html"
    framed.write_text(MEASURE.format(width=width, page=html.escape(page(in_a_long_folder(sample_story)))))
    command = ["chromium", *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", framed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    found = re.search(r"<title>(\d+) (\d+) ([\d.]+) (\d+)</title>", done.stdout)
    assert found, done.stderr
    assert int(found[1]) <= int(found[2]) == width
    assert float(found[3]) >= 10  # pixels of the smallest text of a figure
    assert int(found[4]) == 0
