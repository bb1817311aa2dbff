"""Leaps of a training by two processes: the first one decides and writes, and both have its weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent


def trained_by_two(kind: str, out: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    shared |= {"FARCAST_STATE_DIR": "", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "GROUP_RANK": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "two"}
    command = [sys.executable, "-m", "tests.two_processes", kind, str(out)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
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
