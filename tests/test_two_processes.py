"""Leaps of a training by two processes: the first one decides and writes, and both have its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import run_by_two

if TYPE_CHECKING:
    from pathlib import Path


def trained_by_two(kind: str, out: Path) -> list[dict[str, Any]]:
    env = {"FARCAST_STATE_DIR": "", "NODE_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "two"}
    run_by_two("tests.two_processes", kind, out, env=env)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["trainer", "lightning"])
def test_both_processes_have_the_weights_of_each_leap(kind: str, tmp_path: Path) -> None:
    first, second = trained_by_two(kind, tmp_path)
    assert [leap[0] for leap in first["leaps"]] == [30, 40, 50, 60, 70, 80, 90]
    assert first["leaps"] == second["leaps"]
    assert first["weights"] == second["weights"]
    assert len((tmp_path / "forecasts" / "ledger.jsonl").read_text().splitlines()) == 7


def test_a_leap_that_fails_in_the_first_process_stops_neither(tmp_path: Path) -> None:
    (tmp_path / "forecasts" / "run").mkdir(parents=True)
    (tmp_path / "forecasts" / "run" / "run.memory.safetensors").write_text("no memory")
    first, second = trained_by_two("trainer", tmp_path)
    assert first["leaps"] == second["leaps"] == []
    assert first["weights"] == second["weights"]
    assert len(first["warned"]) == 10
    assert second["warned"] == []
