"""A few damaged files for every reader; `make fuzz` tries them at length."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from farcast_cli.errors import FarcastError, FileFormatError
from tests.conftest import PATIENCE_S
from tests.fuzz import mutate
from tests.fuzz.harness import Harness, Target, Watch
from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_CASES = 25
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as Linux tells it")


@pytest.fixture(scope="module")
def tallies() -> dict[str, dict[str, Any]]:
    """All targets in a process of its own, whose memory is limited."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(NUM_CASES), "--json"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return {tally["name"]: tally for tally in json.loads(done.stdout)}


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_or_read_as_its_own_reader_reads_it(tallies: dict[str, dict[str, Any]], name: str) -> None:
    assert sum(tallies[name]["ended"].values()) == NUM_CASES
    assert tallies[name]["findings"] == {}


# --- the tool itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def tried(tmp_path: Path, watch: Watch, read: Callable[[], Any], check: Callable[[Any], str] = lambda _: "") -> list[str]:
    target = Target("x", tmp_path / "x", lambda random: random.randbytes(3), read, check)
    return list(Harness(watch, 0).run(target, cases=2).findings)


def fail(error: BaseException) -> NoReturn:
    raise error


def test_a_refusal_is_no_finding(tmp_path: Path, watch: Watch) -> None:
    assert tried(tmp_path, watch, lambda: fail(FileFormatError("x: damaged"))) == []


@dataclass
class Calls:
    """Pickles as a call."""

    path: Path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), RecursionError(), FarcastError("a bug")])
def test_another_exception_or_the_code_of_a_bug_is_a_finding(tmp_path: Path, watch: Watch, error: BaseException) -> None:
    (found,) = tried(tmp_path, watch, lambda: fail(error))
    assert type(error).__name__ in found


def test_code_that_runs_is_a_finding(tmp_path: Path, watch: Watch) -> None:
    raw = pickle.dumps(Calls(tmp_path / "made"))
    found = tried(tmp_path, watch, lambda: pickle.loads(raw))  # noqa: S301 - that is what must be seen
    assert "asked the system for pickle.find_class" in found
    assert "asked the system for os.mkdir" in found


def test_a_file_that_is_written_is_a_finding(tmp_path: Path, watch: Watch) -> None:
    assert tried(tmp_path, watch, lambda: (tmp_path / "y").write_text("")) == ["asked the system for open"]


def test_another_value_than_the_formats_own_reader_gives_is_a_finding(tmp_path: Path, watch: Watch) -> None:
    assert tried(tmp_path, watch, lambda: 1, lambda value: "" if value == 2 else "another") == ["another"]


def test_a_file_that_the_formats_own_reader_refuses_is_a_finding(tmp_path: Path, watch: Watch) -> None:
    (found,) = tried(tmp_path, watch, lambda: 1, lambda _: fail(KeyError("x")))
    assert "its format's own reader refuses it: KeyError" in found


def test_a_case_is_the_same_by_its_seed_and_number(tmp_path: Path, watch: Watch) -> None:
    target = Target("x", tmp_path / "x", lambda random: random.randbytes(8), lambda: None)
    assert Harness(watch, 1).content(target, 5) == Harness(watch, 1).content(target, 5)
    assert len({Harness(watch, seed).content(target, case) for seed in (1, 2) for case in (1, 2)}) == 4


@pytest.mark.parametrize("raw", mutate.pickles_that_call()[:3])
def test_a_pickle_is_its_opcodes_in_a_row(raw: bytes) -> None:
    assert b"".join(mutate.opcodes_of(raw)) == raw


def test_damage_changes_most_files() -> None:
    raw = bytes(range(200))
    changed = [mutate.some_bytes(Random(seed), raw) for seed in range(100)]  # noqa: S311 - no secret
    assert sum(one != raw for one in changed) > 70
