"""The tables as people see them, kept as text: `pytest tests/test_golden.py --update-golden` writes them anew.

Each is what a pipe of a fixed width gets. A change of words, columns or rounding shows as a difference of these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from farcast_cli.commands import render
from farcast_cli.forecast.forecaster_file import load_fitted
from tests.conftest import STEPS, edit_loose, fit_run, make_loose_run, weights_at
from tests.tiny import predict_run, wander, write_run

if TYPE_CHECKING:
    from tests.conftest import CallCli

GOLDEN = Path(__file__).resolve().parent / "golden"
WIDTH = 100

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
}


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
    many = {f"layers.{number:02d}.weight": (20 - number, 8) for number in range(15)}
    (top / "many").mkdir()
    for name, step in {"a": 100, "b": 190, "c": 200}.items():
        save_file(weights_at(step, shapes=many), top / "many" / f"{name}.safetensors")
    return top


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_as_it_was(
    name: str, shown: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(render, "WIDE", WIDTH)
    done = call_cli(*TABLES[name], cwd=shown)
    assert done.returncode == 0, done
    kept = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        kept.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == kept.read_text(encoding="utf-8")


def test_every_file_belongs_to_a_table() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.txt" for name in TABLES}
