"""Some system calls of every writing command, struck by every fault; and the order of its syncs. All: `make crash`."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.crash.__main__ import place_for_work, prepare, run_sweep
from tests.crash.commands import COMMANDS
from tests.crash.judge import LEDGER, Judge, State
from tests.crash.order import Disk, played, renames_into
from tests.crash.shim import FAULTS, Call, Fault, why_not
from tests.crash.sweep import Swept, file_name, from_json, points, summary, table

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
each_command = pytest.mark.parametrize("name", [command.name for command in COMMANDS])


@pytest.fixture(scope="module")
def swept() -> Iterator[dict[str, Swept]]:
    """One call of each fault in every command, in two processes; the last rename too, every other time."""
    home = Path(tempfile.mkdtemp(prefix="farcast-crash-", dir=place_for_work()))
    try:
        prepare(home)
        names = [command.name for command in COMMANDS]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda half: run_sweep(half, home, home, "--few", "1"), (names[::2], names[1::2])))
        yield {command.name: from_json((home / file_name(command)).read_text()) for command in COMMANDS}
    finally:
        shutil.rmtree(home)


def found(result: Swept, column: str) -> list[str]:
    cases = [example for example in result.examples if example["column"] == column]
    return [f"{case['fault']} at {case['kind']} {case['at']}: {case['what']}" for case in cases]


# --- the promises ----------------------------------------------------------------------------------------------------


@each_command
def test_every_fault_strikes_every_command(swept: dict[str, Swept], name: str) -> None:
    assert [fault.name for fault in FAULTS if not swept[name].tallies[fault.name].cases] == []


@each_command
def test_no_fault_changes_the_run_or_loses_what_was_there(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "lost") == []


@each_command
def test_no_fault_leaves_half_a_file_under_a_final_name(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "half-written") == []


@each_command
def test_outputs_are_published_together_or_not_at_all(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "in part") == []


@each_command
def test_what_is_left_over_is_hidden_and_a_rerun_removes_it(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "leftovers") == []


@each_command
def test_the_exit_code_and_one_line_say_what_happened(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "wrong code") == []


@each_command
def test_the_ledger_has_one_line_for_each_forecast_that_was_published(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "ledger") == []


@each_command
def test_a_rerun_ends_where_an_undisturbed_run_ends(swept: dict[str, Swept], name: str) -> None:
    assert found(swept[name], "rerun unlike") == []


# --- the order of syncs ----------------------------------------------------------------------------------------------


@each_command
def test_every_file_and_folder_is_synced_after_its_last_change_and_before_it_is_published(
    swept: dict[str, Swept], name: str
) -> None:
    assert played(swept[name]).early == []


@each_command
def test_what_was_published_is_under_its_name_on_the_disk_when_the_command_ends(swept: dict[str, Swept], name: str) -> None:
    assert all(renames_into(swept[name], unit) for unit in swept[name].made)
    assert played(swept[name]).unsynced - {"."} == set()


@each_command
def test_a_folder_that_was_made_for_the_output_is_on_the_disk_too(swept: dict[str, Swept], name: str) -> None:
    assert "." not in played(swept[name]).unsynced


# --- the tool itself -------------------------------------------------------------------------------------------------


def play(known: set[str], *calls: tuple[str, ...]) -> Disk:
    disk = Disk(known)
    for kind, path, *second in calls:
        disk.apply(Call(kind, path), path, *(second or [""]))
    return disk


GOOD = (
    *(("mkdir", ".h"), ("create", ".h/a"), ("pwrite", ".h/a"), ("fsync", ".h/a"), ("fsync", ".h")),
    *(("rename", ".h/a", "a"), ("fsync", "."), ("rmdir", ".h")),
)


def test_the_right_order_of_syncs_is_seen_as_right() -> None:
    disk = play(set(), *GOOD)
    assert (disk.early, disk.unsynced) == ([], set())


@pytest.mark.parametrize(
    ("left_out", "early", "unsynced"), [(3, [".h/a"], {"a"}), (6, [], {"."})], ids=["the file", "its folder"]
)
def test_a_sync_that_is_missing_is_seen(left_out: int, early: list[str], unsynced: set[str]) -> None:
    disk = play(set(), *GOOD[:left_out], *GOOD[left_out + 1 :])
    assert (disk.early, disk.unsynced) == (early, unsynced)


def test_a_write_after_the_sync_is_seen() -> None:
    assert play(set(), *GOOD[:4], ("pwrite", ".h/a"), *GOOD[4:]).early == [".h/a"]


def test_folders_that_change_places_keep_what_is_unsynced_in_them() -> None:
    disk = play({"a", "a/x", ".h", ".h/a"}, ("create", ".h/a/y"), ("write", "a/x"), ("exchange", ".h/a", "a"))
    assert disk.early == [".h/a", ".h/a/y"]
    assert {"a/y", ".h/a/x"} <= disk.unsynced


def state(tree: dict[str, str], ledger: tuple[str, ...] = ()) -> State:
    return State({"run": "folder", "run/s": "1", "forecasts": "folder", LEDGER: str(ledger)} | tree, ledger)


BEFORE = state({"forecasts/a": "old", "forecasts/a.farcast.json": "old"})
AFTER = state({"forecasts/a": "new", "forecasts/a.farcast.json": "new"}, ("line",))


def verdict_on(now: State, *, fault: Fault = FAULTS[3], code: int = 5, err: str = "error: forecasts/a: no\n") -> set[str]:
    from tests.crash.child import Done

    done = Done(code, "", err, Call("rename", "/w/forecasts/.a.partial/a"))
    judged = Judge(Path("/w"), BEFORE, AFTER).judge(fault, done, now)
    return {column for column, _ in judged.faults}


def test_what_an_error_should_leave_is_seen_as_right() -> None:
    assert verdict_on(BEFORE) == set()
    assert verdict_on(BEFORE, fault=FAULTS[1], code=130, err="interrupted\n") == set()


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"run/s": "2"}, "lost"),
        ({"forecasts/a": "half"}, "half-written"),
        ({"forecasts/a.farcast.json": "new"}, "in part"),
        ({"forecasts/x": "1"}, "leftovers"),
        ({"forecasts/.a.partial": "folder"}, "leftovers"),
    ],
)
def test_what_an_error_must_not_leave_is_seen(change: dict[str, str], column: str) -> None:
    assert verdict_on(State(BEFORE.tree | change, ())) == {column}


def test_a_forecast_that_is_gone_is_seen() -> None:
    tree = {path: digest for path, digest in BEFORE.tree.items() if not path.startswith("forecasts/a")}
    assert verdict_on(State(tree, ()), fault=FAULTS[0], code=-9) == {"lost"}


@pytest.mark.parametrize(
    ("code", "err"),
    [
        (0, ""),
        (1, "Traceback (most recent call last):\nOSError: no\n"),
        (4, "error: forecasts/a: no\n"),
        (5, "error: run/s: no\n"),
        (5, ""),
    ],
)
def test_an_exit_code_or_a_message_that_says_something_else_is_seen(code: int, err: str) -> None:
    assert verdict_on(BEFORE, code=code, err=err) == {"wrong code"}


def test_a_line_of_the_ledger_without_its_forecast_is_seen() -> None:
    assert verdict_on(State(BEFORE.tree, ("line",))) == {"ledger"}


def test_a_rerun_that_is_refused_is_right_only_where_all_was_published() -> None:
    from tests.crash.child import Done

    refused, judge = Done(5, "", "error: forecasts/a: exists already\n"), Judge(Path("/w"), BEFORE, AFTER)
    assert judge.judge_rerun(refused, AFTER) == []
    assert {column for column, _ in judge.judge_rerun(refused, BEFORE)} == {"rerun unlike", "ledger"}


def test_of_many_equal_calls_in_a_row_three_are_struck() -> None:
    calls = [Call("create", "/w/a"), *[Call("pwrite", "/w/a")] * 9, Call("fsync", "/w/a")]
    judge = Judge(Path("/w"), BEFORE, AFTER)
    assert points(calls, FAULTS[0], judge, every=False) == [1, 2, 6, 10, 11]
    assert points(calls, FAULTS[0], judge, every=True) == list(range(1, 12))


def test_the_tables_have_a_row_for_each_command_and_fault_and_their_sums(swept: dict[str, Swept]) -> None:
    rows = [line.split(" | ") for line in table(list(swept.values()))][2:]
    sums = [line.split(" | ") for line in summary(list(swept.values()))][2:]
    assert (len(rows), len(sums)) == (len(COMMANDS) * len(FAULTS), len(FAULTS) + 1)
    assert sum(int(row[2]) for row in rows) == sum(int(row[1]) for row in sums[:-1]) == int(sums[-1][1])
