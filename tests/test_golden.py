"""The tables as people see them, kept as text: `pytest tests/test_golden.py --update-golden` writes them anew.

Each is what a pipe of a fixed width gets. A change of words, columns or rounding shows as a difference of these files.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from safetensors.torch import save_file

from farcast_cli.commands import render
from farcast_cli.commands.progress_line import columns_for
from farcast_cli.commands.tables import Column, bar, cut_in_the_middle, fitted_table
from farcast_cli.forecast.forecaster_file import load_fitted
from tests.conftest import STEPS, edit_loose, fit_run, make_loose_run, weights_at
from tests.tiny import predict_run, wander, write_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import CallCli

GOLDEN = Path(__file__).resolve().parent / "golden"
WIDTH = 100
NARROW = 44  # columns of half a small screen

MANY = ("verify", "many/b.safetensors", "--against", "many/c.safetensors", "--reference", "many/a.safetensors")

TABLES = {
    "inspect": ("inspect", "run", "--exclude", "norm*"),
    "inspect-verbose": ("inspect", "run", "-v"),
    "inspect-few": ("inspect", "few"),
    "backtest": ("backtest", "--horizon", "100,550", "--forecaster", "rough.safetensors"),
    "backtest-verbose": ("backtest", "--horizon", "100,550", "--forecaster", "rough.safetensors", "-v"),
    "backtest-untestable": ("backtest", "--horizon", "5000"),
    "verify": ("verify", "forecast.safetensors", "--against", "truth.safetensors"),
    "verify-still": ("verify", "forecast.safetensors", "--against", "truth.safetensors", "--reference", "truth.safetensors"),
    "verify-many": MANY,
    "verify-many-verbose": (*MANY, "-v"),
    "inspect-disagreeing": ("inspect", "disagreeing"),
}


WIDTHS = dict.fromkeys(TABLES, WIDTH) | {f"{name}-narrow": NARROW for name in TABLES}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, a forecaster, a forecast and what became true, and models of many tensors."""
    top = tmp_path_factory.mktemp("shown")
    run = make_loose_run(top / "run")
    fit_run(run, top / "forecaster.safetensors")
    predict_run(load_fitted(top / "forecaster.safetensors"), top / "forecast.safetensors", horizons=[100])
    rough = wander(1, num_snapshots=12, sizes={"a": 400, "b": 60}, roughness=0.5)
    fit_run(write_run(top / "rough", rough, range(100, 1300, 100)), top / "rough.safetensors")
    save_file(weights_at(900), top / "truth.safetensors")
    edit_loose(top / "truth.safetensors", {"norm.weight": weights_at(800)["norm.weight"]})
    make_loose_run(top / "few", STEPS[:3])
    (top / "few" / "notes.txt").write_text("not a checkpoint")
    renamed = make_loose_run(top / "disagreeing", STEPS[:6]) / "step_000600.safetensors"
    save_file(weights_at(600), renamed.with_name("checkpoint-of-the-run-step_000900.safetensors"), metadata={"step": "600"})
    renamed.unlink()
    many = {f"layers.{number:02d}.weight": (20 - number, 8) for number in range(15)}
    (top / "many").mkdir()
    for name, step in {"a": 100, "b": 190, "c": 200}.items():
        save_file(weights_at(step, shapes=many), top / "many" / f"{name}.safetensors")
    return top


@pytest.mark.parametrize("name", WIDTHS)
def test_a_table_is_as_it_was(
    name: str, shown: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(render, "WIDE", WIDTHS[name])
    done = call_cli(*TABLES[name.removesuffix("-narrow")], cwd=shown)
    assert done.returncode == (3 if "disagreeing" in name else 0), done
    kept = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        kept.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == kept.read_text(encoding="utf-8")


def test_every_file_belongs_to_a_table() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.txt" for name in WIDTHS}


@pytest.mark.parametrize("name", [name for name in WIDTHS if name.endswith("-narrow")])
def test_a_narrow_terminal_cuts_no_table_at_its_end(name: str) -> None:
    """Where names differ; a note is one long line, which a terminal folds."""
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert not any("…" in line for line in lines)
    table = [line for line in lines if line.startswith((" ", "step", "layers", "embed", "norm"))]
    assert [line for line in table if len(line) > NARROW] == []


def column(heading: str, *cells: str, **options: Any) -> Column:
    return Column(heading, tuple(Text(cell) for cell in cells), **options)


def headings(columns: Sequence[Column], width: int) -> list[object]:
    return [shown.header for shown in fitted_table(columns, width).columns]


def test_columns_give_way_by_their_rank_and_names_are_cut_no_shorter_than_they_may() -> None:
    columns = (
        column("name", "model.layers.0.weight", least=10),
        column("bar", "######", rank=1),
        column("as written", "0.43", rank=2, instead=(column("written", "0.43"),)),
    )
    assert headings(columns, 41) == ["name", "bar", "as written"]
    assert headings(columns, 30) == ["name", "bar", "as written"]
    assert headings(columns, 29) == ["name", "as written"]
    assert headings(columns, 21) == ["name", "written"]
    assert [str(cell) for cell in fitted_table(columns, 29).columns[0].cells] == ["model.l....weight"]
    assert [str(cell) for cell in fitted_table(columns, 22).columns[0].cells] == ["mode...ght"]


def rows(*names: str) -> list[str]:
    """The rows of a table of two tensors on a terminal of 24 columns."""
    console = Console(width=24, file=io.StringIO())
    console.print(fitted_table([column("tensor", *names, least=10), column("ratio", "0.10", "0.20", justify="right")], 24))
    return [line.rstrip() for line in console.file.getvalue().splitlines()[1:]]  # type: ignore[attr-defined]


def test_names_that_would_look_the_same_are_cut_where_they_stay_different() -> None:
    assert rows(*(f"model.transformer.layers.{number}.mlp.weight" for number in (1, 2))) == [
        "mo...1.mlp.weight   0.10",
        "mo...2.mlp.weight   0.20",
    ]


def test_names_that_no_cut_leaves_different_are_folded_at_their_dots_and_never_inside_a_word() -> None:
    names = (
        "model.layers.1.attention.query.weight",
        "model.layers.2.attention.query.weight",
        "model.layers.1.attention.value.weight",
    )
    console = Console(width=24, file=io.StringIO())
    console.print(fitted_table([column("tensor", *names, least=10), column("ratio", "0", "0", "0")], 24))
    words = {word for line in console.file.getvalue().splitlines()[1:] for word in line.split()[:1]}  # type: ignore[attr-defined]
    assert words == {"model.layers.1.", "model.layers.2.", "attention.query.", "attention.value.", "weight"}


@pytest.mark.parametrize(("width", "columns"), [(44, 3), (66, 4), (80, 5), (200, 5)])
def test_progress_takes_one_line_and_a_narrow_terminal_has_fewer_of_its_columns(width: int, columns: int) -> None:
    console, now = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None), iter(range(1000))
    bars = Progress(*columns_for(width), console=console, get_time=lambda: float(next(now)))
    task = bars.add_task("predict strength-0.25", total=300_000_000)
    for _ in range(3):
        bars.advance(task, 65_700_000)
    bars.add_task("evaluate strength 0.25", total=None)
    console.print(bars.get_renderable())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert "predict strength-0.25" in lines[0]
    assert "197.1/300.0 MB" in lines[0]
    assert [("MB/s" in lines[0]), ("━" in lines[0])] == [columns > 3, columns > 4]
    assert re.search(r"\d:\d\d:\d\d", lines[0])


@given(text=st.text(st.sampled_from("abc層重")), width=st.integers(5, 30))
def test_a_cut_name_is_never_wider_and_keeps_both_its_ends(text: str, width: int) -> None:
    cut = cut_in_the_middle(text, width)
    assert cell_len(cut) <= width
    assert cut == text or (
        cell_len(text) > width and text.startswith(cut.split("...")[0]) and text.endswith(cut.split("...")[-1])
    )


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (-1.0, ".............|......"),
        (0.0, ".............|......"),
        (0.5, "######.......|......"),
        (1.0, "#############|......"),
        (1.01, "#############|#....."),
        (1.4, "#############|#####>"),
        (99.0, "#############|#####>"),
        (float("nan"), ".............|......"),
        (float("inf"), "#############|#####>"),
    ],
)
def test_a_bar_has_a_mark_at_one_and_shows_what_is_above_it(ratio: float, shown: str) -> None:
    assert bar(ratio, is_utf=False) == shown
