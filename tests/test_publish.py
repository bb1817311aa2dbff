"""Nothing of the user's is lost: what may be replaced, what appears together, what is undone, who may read it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from farcast_cli import system as system_calls
from farcast_cli.errors import OutputError
from farcast_cli.files import renames
from farcast_cli.files.hidden import MARK, make_hidden
from farcast_cli.files.staged import staged, staging
from farcast_cli.forecast.ledger import Leap, read_leaps, recorded
from tests.conftest import fit_run, make_loose_run, make_torch_run, tree_digest
from tests.test_tune import CALL, save_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import CallCli

FORECAST = "forecasts/run/step_000900.safetensors"


def anything(_: Path) -> None:
    """Whatever has the final name may be replaced."""


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A folder with a run and its forecaster."""
    make_loose_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    return tmp_path


# --- hidden names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".a.bin.partial", ".a.bin.0123abcd.partial"])
@pytest.mark.parametrize("kind", ["link", "plain folder", "marked link", "marked for another", "file"])
def test_what_somebody_else_put_under_a_hidden_name_is_neither_followed_nor_emptied(
    tmp_path: Path, name: str, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    hidden = tmp_path / "out" / name
    hidden.parent.mkdir()
    if "link" in kind:
        (victim / MARK).write_text("a.bin" if kind == "marked link" else "")
        hidden.symlink_to(victim)
    elif kind == "file":
        hidden.write_text("mine")
    else:
        shutil.copytree(victim, hidden)
        if kind == "marked for another":
            (hidden / MARK).write_text("b.bin")
    before = tree_digest(tmp_path)
    with staged(hidden.parent / "a.bin") as temporary:
        temporary.write_text("forecast")
    after = tree_digest(tmp_path)
    assert after.pop("out/a.bin")
    assert after == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_marked_folder_of_another_user_is_left_alone(tmp_path: Path) -> None:
    hidden = tmp_path / ".a.bin.0123abcd.partial"
    hidden.mkdir()
    (hidden / MARK).write_text("a.bin")
    os.chown(hidden, 12345, -1)
    with staged(tmp_path / "a.bin") as temporary:
        temporary.write_text("forecast")
    assert (hidden / MARK).exists()


def test_an_empty_folder_that_a_process_left_which_was_killed_before_it_made_the_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.0123abcd.partial").mkdir()
    with staged(tmp_path / "a.bin") as temporary:
        temporary.write_text("forecast")
    assert tree_digest(tmp_path).keys() == {"a.bin"}


def test_a_dry_run_leaves_what_a_killed_process_left(fitted: Path, call_cli: CallCli) -> None:
    left = fitted / "forecasts" / "run" / ".step_000900.safetensors.0123abcd.partial"
    left.mkdir(parents=True)
    assert call_cli("predict", "--horizon", 100, "--dry-run", cwd=fitted).returncode == 0
    assert left.is_dir()
    assert call_cli("predict", "--horizon", 100, cwd=fitted).returncode == 0
    assert not left.exists()


def test_a_hidden_folder_is_closed_to_other_users(tmp_path: Path) -> None:
    with staged(tmp_path / "a.bin") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        temporary.write_text("forecast")


def test_an_output_with_the_longest_name_that_there_may_be_is_written(tmp_path: Path) -> None:
    final = tmp_path / ("a" * 255)
    for content in ("old", "new"):
        with staged(final, check=anything) as temporary:
            temporary.write_text(content)
    assert tree_digest(tmp_path).keys() == {final.name}
    assert final.read_text() == "new"


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_link_that_came_with_a_download_does_not_lead_a_command_to_the_users_files(
    fitted: Path, call_cli: CallCli, command: str
) -> None:
    (fitted / "forecasts" / "run").mkdir(parents=True)
    for place in (fitted / "forecaster.safetensors", fitted / FORECAST):
        (place.parent / f".{place.name}.partial").symlink_to(fitted / "run")
        (place.parent / f".{place.name}.0123abcd.partial").symlink_to(fitted / "run")
    before = tree_digest(fitted / "run")
    done = call_cli(command, *(["run"] if command == "fit" else ["--horizon", 100]), cwd=fitted)
    assert done.returncode == 0, done
    assert tree_digest(fitted / "run") == before


def test_a_ledger_that_is_a_link_is_not_written_through(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "profile").write_text("")
    (fitted / "forecasts" / "run").mkdir(parents=True)
    (fitted / "forecasts" / "ledger.jsonl").symlink_to(fitted / "profile")
    done = call_cli("predict", "--horizon", 100, cwd=fitted)
    assert (done.returncode, done.stdout) == (5, "")
    assert "ledger.jsonl: the ledger of leaps cannot be written: it is a link" in done.errors[0]
    assert (fitted / "profile").read_text() == ""
    assert not (fitted / FORECAST).exists()


# --- several at once -------------------------------------------------------------------------------------------------


def write_again(folder: Path, number: int, times: int, done: Any) -> None:
    for turn in range(times):
        tag = f"{number}-{turn};".encode() * 5000
        try:
            with staged(folder / "out.bin", check=anything) as temporary, temporary.open("wb") as file:
                file.write(tag[: len(tag) // 2])
                file.flush()
                file.write(tag[len(tag) // 2 :])
            done.put("published")
        except OutputError as error:
            met = "another farcast is writing", "changed during its replacement"  # at the start, or at the end
            done.put("refused" if any(words in str(error) for words in met) else str(error))
    done.put(None)


def test_a_reader_sees_only_whole_files_while_several_processes_write_to_one_place(tmp_path: Path) -> None:
    context, num = multiprocessing.get_context("fork"), 4
    done = context.Queue()
    writers = [context.Process(target=write_again, args=(tmp_path, number, 40, done)) for number in range(num)]
    for writer in writers:
        writer.start()
    outcomes: list[str] = []
    torn, ended = [], 0
    while ended < num:
        if (tmp_path / "out.bin").exists():
            content = (tmp_path / "out.bin").read_bytes()
            if content != (content.partition(b";")[0] + b";") * 5000:
                torn.append(len(content))
        while not done.empty():
            outcome = done.get()
            ended += outcome is None
            outcomes += [outcome] if outcome else []
    for writer in writers:
        writer.join()
    assert torn == []
    assert set(outcomes) <= {"published", "refused"}
    assert "published" in outcomes
    assert tree_digest(tmp_path).keys() == {"out.bin"}


def test_of_two_that_write_one_new_output_side_by_side_the_first_one_keeps_it(tmp_path: Path) -> None:
    """The second is made to start as on a filesystem without locks, where it cannot know of the first."""
    final = tmp_path / "a.bin"
    with pytest.raises(OutputError, match="exists already"), staged(final) as slow:  # noqa: PT012 - the end of the block raises
        slow.write_text("second")
        final.write_text("first")
    assert final.read_text() == "first"


# --- together or not at all ------------------------------------------------------------------------------------------


@pytest.fixture(params=["one call", "two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A filesystem that can exchange two names in one call, and one that cannot (as NFS)."""
    if request.param == "two renames":
        monkeypatch.setattr(system_calls, "rename_at_once", lambda *_, **__: False)
    return str(request.param)


def make(path: Path, kind: str, content: str) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "file").write_text(content)
    else:
        path.write_text(content)


def content_of(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("was_there", [False, True])
def test_if_one_output_cannot_take_its_name_the_others_are_as_before(tmp_path: Path, kind: str, was_there: bool) -> None:  # noqa: FBT001
    first, second = tmp_path / "first", tmp_path / "else" / "second"
    second.parent.mkdir()
    if was_there:
        make(first, kind, "old")

    def write() -> None:
        with staging() as outputs:
            lost = outputs.add(second)
            make(lost, kind, "new")
            make(outputs.add(first, check=anything), kind, "new")
            second.symlink_to("nowhere")  # what was added last is renamed first, and `second` is taken by then

    with pytest.raises(OutputError, match="second: exists already"):
        write()
    second.unlink()
    assert content_of(first) == "old" if was_there else not first.exists()
    assert tree_digest(tmp_path).keys() - {"first/file"} == {"else", *(["first"] if was_there else [])}


@contextmanager
def breaking(folder: Path) -> Iterator[None]:
    """Something goes wrong between the checks and the renames: a folder goes away."""
    shutil.rmtree(folder)
    yield


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("was_there", [False, True])
def test_a_rename_that_fails_undoes_those_before_it(tmp_path: Path, kind: str, was_there: bool) -> None:  # noqa: FBT001
    first, second = tmp_path / "first", tmp_path / "else" / "second"
    second.parent.mkdir()
    if was_there:
        make(first, kind, "old")

    def write() -> None:
        with staging() as outputs:
            make(outputs.add(second), kind, "new")
            make(outputs.add(first, check=anything), kind, "new")
            outputs.alongside(breaking(second.parent))

    with pytest.raises(OutputError, match="second: cannot be written: No such file"):
        write()
    assert tree_digest(tmp_path).keys() - {"first/file"} == ({"first"} if was_there else set())
    if was_there:
        assert content_of(first) == "old"


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("old", ["file", "folder", "link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_an_old_output_of_any_kind_is_replaced(tmp_path: Path, old: str, new: str) -> None:
    final = tmp_path / "a"
    (tmp_path / "linked").write_text("old")
    if old == "link":
        final.symlink_to("linked")
    else:
        make(final, old, "old")
    with staged(final, check=anything) as temporary:
        make(temporary, new, "new")
    assert content_of(final) == "new"
    assert not final.is_symlink()
    assert (tmp_path / "linked").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "linked"}


def killed_in(write: Callable[[], object]) -> None:
    """The block is run in a process that it kills."""
    child = os.fork()
    if not child:
        write()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def killing(rename: Callable[..., Any], *, at: int = 1) -> Callable[..., Any]:
    """The process is killed right after its n-th rename."""
    count = itertools.count(1)

    def counted(*arguments: Any, **options: Any) -> Any:
        done = rename(*arguments, **options)
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return counted


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_between_two_renames_loses_nothing_and_the_next_start_gives_the_new_output_its_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the filesystem cannot exchange names in one call, nor make links."""
    final = tmp_path / "a"
    make(final, kind, "old")

    def write() -> None:
        monkeypatch.setattr(system_calls, "rename_at_once", lambda *_, **__: False)
        monkeypatch.setattr(renames, "_link", lambda *_: False)
        monkeypatch.setattr(type(final), "rename", killing(type(final).rename))
        with staged(final, check=anything) as temporary:
            make(temporary, kind, "new")

    killed_in(write)
    assert not final.exists()
    with pytest.raises(OutputError, match="exists already"), staged(final):
        pytest.fail("the block must not start")
    assert content_of(final) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_a_kill_left_of_several_outputs_is_completed_by_the_next_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    was_there: bool,  # noqa: FBT001
) -> None:
    names = ("first", "second", "third")
    for name in names if was_there else ():
        (tmp_path / name).write_text("old")

    def write() -> None:
        monkeypatch.setattr(system_calls, "rename_at_once", killing(system_calls.rename_at_once, at=at))
        with staging() as outputs:
            for name in names:
                outputs.add(tmp_path / name, check=anything).write_text("new")

    killed_in(write)
    found = [(tmp_path / name).read_text() for name in names if (tmp_path / name).exists()]
    assert sorted(found) == ["new"] * at + ["old"] * ((3 - at) * was_there)
    for name in names:
        with pytest.raises(OutputError, match="exists already"), staged(tmp_path / name):
            pytest.fail("the block must not start")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "new")


def test_a_file_that_the_user_put_there_after_a_kill_is_not_replaced_by_what_was_to_be_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        monkeypatch.setattr(system_calls, "rename_at_once", killing(system_calls.rename_at_once))
        with staging() as outputs:
            for name in ("first", "second"):
                outputs.add(tmp_path / name).write_text("forecast")

    killed_in(write)
    (tmp_path / "first").write_text("mine")
    with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "first"):
        pytest.fail("the block must not start")
    assert (tmp_path / "first").read_text() == "mine"


def test_a_kill_before_anything_was_decided_publishes_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with staging() as outputs:
            outputs.add(tmp_path / "a").write_text("whole")
            outputs.alongside(interrupting(signal.SIGKILL))

    killed_in(write)
    with staged(tmp_path / "a", may_stay_empty=True):
        assert not (tmp_path / "a").exists()
    assert tree_digest(tmp_path) == {}


def test_a_kill_while_a_mark_is_made_leaves_what_the_next_start_removes(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.0123abcd.partial").mkdir()
    (tmp_path / ".a.bin.0123abcd.partial" / MARK).touch()
    with staged(tmp_path / "a.bin") as temporary:
        temporary.write_text("forecast")
    assert tree_digest(tmp_path).keys() == {"a.bin"}


@contextmanager
def interrupting(number: signal.Signals) -> Iterator[None]:
    os.kill(os.getpid(), number)
    yield
    os.kill(os.getpid(), number)


def test_an_interrupt_while_outputs_take_their_names_comes_too_late(tmp_path: Path) -> None:
    with staging() as outputs:
        for name in ("first", "second"):
            outputs.add(tmp_path / name).write_text("new")
        outputs.alongside(interrupting(signal.SIGINT))
    assert tree_digest(tmp_path).keys() == {"first", "second"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the ledger ------------------------------------------------------------------------------------------------------


def leap(folder: Path, step: int) -> Leap:
    return Leap(run=str(folder / "run"), origin_step=800, valid_step=step, counters="advance", forecast=str(folder / "f"))


def lines(ledger: Path) -> list[int]:
    return [json.loads(line)["valid_step"] for line in ledger.read_text().splitlines()]


def fails(ledger: Path, leaps: Sequence[Leap], meanwhile: Callable[[], object] = lambda: None) -> None:
    with pytest.raises(ValueError, match="no"), recorded(ledger, leaps):  # noqa: PT012 - the block is what fails
        meanwhile()
        raise ValueError("no")


def test_lines_of_forecasts_that_were_not_published_are_taken_back(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with recorded(ledger, [leap(tmp_path, 900)]):
        assert lines(ledger) == [900]
    fails(ledger, [leap(tmp_path, 1000), leap(tmp_path, 1100)], lambda: lines(ledger) == [900, 1000, 1100])
    assert lines(ledger) == [900]


def test_a_ledger_that_was_made_for_a_forecast_that_was_not_published_is_removed(tmp_path: Path) -> None:
    fails(tmp_path / "ledger.jsonl", [leap(tmp_path, 900)])
    assert tree_digest(tmp_path) == {}


def test_a_line_that_another_process_added_meanwhile_is_kept(tmp_path: Path) -> None:
    """On a filesystem without locks."""
    ledger = tmp_path / "ledger.jsonl"

    def add() -> None:
        with ledger.open("a") as file:
            file.write(leap(tmp_path, 1000).as_line() + "\n")

    fails(ledger, [leap(tmp_path, 900)], add)
    assert lines(ledger) == [900, 1000]


def test_a_leap_that_is_recorded_again_after_a_kill_stands_there_once(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    for _ in range(2):
        with recorded(ledger, [leap(tmp_path, 900), leap(tmp_path, 1000)]):
            pass
    assert lines(ledger) == [900, 1000]


def test_a_forecast_that_cannot_be_published_leaves_no_line_in_the_ledger(fitted: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, cwd=fitted).returncode == 0
    before = tree_digest(fitted)
    (fitted / "forecasts" / "run" / "step_001000.safetensors.farcast.json").write_text("mine")
    done = call_cli("predict", "--horizon", "150,200", cwd=fitted)
    assert (done.returncode, done.stdout) == (5, "")
    (fitted / "forecasts" / "run" / "step_001000.safetensors.farcast.json").unlink()
    assert tree_digest(fitted) == before


# --- what may be replaced --------------------------------------------------------------------------------------------


def predict_to(call_cli: CallCli, folder: Path, out: str, *arguments: object) -> tuple[int, str]:
    done = call_cli("predict", "--horizon", 100, "-o", out, *arguments, cwd=folder)
    return done.returncode, "".join(done.errors)


def test_a_users_file_is_not_replaced_because_a_forecast_with_another_ending_lies_beside_it(
    fitted: Path, call_cli: CallCli
) -> None:
    assert predict_to(call_cli, fitted, "out/a.safetensors") == (0, "")
    (fitted / "out" / "a.pt").write_text("my own precious file")
    code, error = predict_to(call_cli, fitted, "out/a.pt", "--layout", "pt", "--overwrite")
    assert code == 5
    assert "out/a.pt: exists and is not a forecast" in error
    assert (fitted / "out" / "a.pt").read_text() == "my own precious file"


def test_two_forecasts_with_one_stem_have_each_its_own_sidecar(fitted: Path, call_cli: CallCli) -> None:
    for ending, layout, scale in (("safetensors", "same", 1.0), ("pt", "pt", 0.25)):
        assert predict_to(call_cli, fitted, f"out/a.{ending}", "--layout", layout, "--scale", scale) == (0, "")
    told = {ending: json.loads((fitted / "out" / f"a.{ending}.farcast.json").read_text()) for ending in ("safetensors", "pt")}
    assert {ending: (one["name"], one["options"]["scale"]) for ending, one in told.items()} == {
        "safetensors": ("a.safetensors", 1.0),
        "pt": ("a.pt", 0.25),
    }


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("content", ['{"mine": 1}', '{"farcast_version": "0.1.0", "name": "b.safetensors"}', "[" * 1000])
def test_a_users_file_under_a_sidecars_name_is_not_replaced(
    fitted: Path, call_cli: CallCli, content: str, overwrite: tuple[str, ...]
) -> None:
    (fitted / "out").mkdir()
    mine = fitted / "out" / "a.safetensors.farcast.json"
    mine.write_text(content)
    code, error = predict_to(call_cli, fitted, "out/a.safetensors", *overwrite)
    assert code == 5
    assert "a.safetensors.farcast.json: exists and is not a forecast's sidecar" in error
    assert tree_digest(fitted / "out").keys() == {mine.name}
    assert mine.read_text() == content


def test_a_place_inside_the_run_is_refused_before_anything_there_is_cleared_away(fitted: Path, call_cli: CallCli) -> None:
    make_hidden(fitted / "run" / "a.safetensors").folder.close()
    before = tree_digest(fitted)
    code, error = predict_to(call_cli, fitted, "run/a.safetensors")
    assert code == 5
    assert "lies inside the run's folder" in error
    assert tree_digest(fitted) == before


def test_fit_refuses_to_replace_a_users_file_before_it_reads_the_run(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "mine").write_text("mine")
    (fitted / "run" / "step_000700.safetensors").write_bytes(b"damage" * 20)
    done = call_cli("fit", "run", "-o", "mine", cwd=fitted)
    assert done.returncode == 5
    assert "mine: exists and is not a forecaster" in done.errors[0]


def test_a_sidecar_that_a_killed_process_left_without_its_forecast_is_replaced(fitted: Path, call_cli: CallCli) -> None:
    assert predict_to(call_cli, fitted, "out/a.safetensors", "--scale", 0.5) == (0, "")
    (fitted / "out" / "a.safetensors").unlink()
    assert predict_to(call_cli, fitted, "out/a.safetensors") == (0, "")
    assert json.loads((fitted / "out" / "a.safetensors.farcast.json").read_text())["options"]["scale"] == 1.0


def test_a_forecast_that_a_trainer_has_saved_over_is_the_users_and_is_not_replaced(fitted: Path, call_cli: CallCli) -> None:
    assert predict_to(call_cli, fitted, "out/a.safetensors") == (0, "")
    shutil.copy(fitted / "run" / "step_000700.safetensors", fitted / "out" / "a.safetensors")
    before = tree_digest(fitted)
    code, error = predict_to(call_cli, fitted, "out/a.safetensors", "--overwrite")
    assert code == 5
    assert "out/a.safetensors: has changed since farcast wrote it" in error
    assert tree_digest(fitted) == before


def test_a_folder_in_which_the_user_has_put_a_file_is_not_replaced(tmp_path: Path, call_cli: CallCli) -> None:
    make_torch_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    arguments = ["predict", "--horizon", 10, "--layout", "dcp", "--even-if-worse", "-o", "out"]
    assert call_cli(*arguments, cwd=tmp_path).returncode == 0
    assert call_cli(*arguments, "--overwrite", cwd=tmp_path).returncode == 0
    (tmp_path / "out" / "mine").mkdir()
    done = call_cli(*arguments, "--overwrite", cwd=tmp_path)
    assert "out: holds 'mine', which farcast did not write" in done.errors[0]
    (tmp_path / "out" / "mine").rmdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = call_cli(*arguments, "--overwrite", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "out: holds 'notes.txt', which farcast did not write" in done.errors[0]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_link_that_leads_to_a_forecast_is_not_replaced(tmp_path: Path, call_cli: CallCli) -> None:
    make_torch_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    arguments = ["predict", "--horizon", 10, "--layout", "dcp", "--even-if-worse", "-o"]
    assert call_cli(*arguments, "kept", cwd=tmp_path).returncode == 0
    (tmp_path / "latest").symlink_to("kept")
    done = call_cli(*arguments, "latest", "--overwrite", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "latest: exists and is not a forecast" in done.errors[0]
    assert (tmp_path / "latest").readlink().name == "kept"


def test_the_sidecar_lists_every_file_with_its_size(fitted: Path, call_cli: CallCli) -> None:
    assert predict_to(call_cli, fitted, "out/a.safetensors") == (0, "")
    (told,) = json.loads((fitted / "out" / "a.safetensors.farcast.json").read_text())["files"]
    assert (told["name"], told["bytes"]) == ("a.safetensors", (fitted / "out" / "a.safetensors").stat().st_size)


@pytest.mark.parametrize("mine", ["origin.log", "strength-1.log"])
def test_a_users_file_under_the_name_of_a_log_is_not_replaced(fitted: Path, call_cli: CallCli, mine: str) -> None:
    logs = fitted / "forecasts" / "run" / "step_000900.safetensors.eval"
    logs.mkdir(parents=True)
    (logs / mine).write_text("mine")
    done = call_cli("predict", "--horizon", 100, "--eval-cmd", "echo 1 {ckpt}", cwd=fitted)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"{mine} was not written by farcast" in done.errors[0]
    assert (logs / mine).read_text() == "mine"


# --- never in the run's folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run/checkpoint", "run/step_000800.safetensors", "run/forecaster.safetensors"])
def test_fit_writes_nothing_into_the_runs_folder(tmp_path: Path, call_cli: CallCli, place: str) -> None:
    make_loose_run(tmp_path / "run")
    before = tree_digest(tmp_path)
    done = call_cli("fit", "run", "-o", place, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"{place}: lies inside the run's folder" in done.errors[0]
    assert "-o" in done.hints[0]
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("option", ["-o", "--delta-out"])
def test_tune_writes_nothing_into_the_folder_of_a_run(tmp_path: Path, call_cli: CallCli, option: str) -> None:
    save_work(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for step in (10, 20):
        shutil.copy(tmp_path / "step_10.safetensors", run / f"step_{step}.safetensors")
    before = tree_digest(tmp_path)
    call = ["run/step_10.safetensors" if word == "step_10.safetensors" else word for word in CALL]
    done = call_cli(*call, option, "run/step_900.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "run/step_900.safetensors: lies inside the run's folder" in done.errors[0]
    assert tree_digest(tmp_path) == before


# --- permissions -----------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_of_a_private_run_is_private(tmp_path: Path, call_cli: CallCli) -> None:
    for path in make_loose_run(tmp_path / "run").iterdir():
        path.chmod(0o600)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 100, cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 100, "--layout", "pt", cwd=tmp_path).returncode == 0
    assert {path.name: mode(path) for path in (tmp_path / "forecasts" / "run").iterdir()} == {
        "step_000900.safetensors": 0o600,
        "step_000900.safetensors.farcast.json": 0o600,
        "step_000900.pt": 0o600,
        "step_000900.pt.farcast.json": 0o600,
    }
    assert mode(tmp_path / "forecaster.safetensors") == 0o600


def test_each_file_of_a_folder_keeps_the_permissions_of_the_origins(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "loose")
    for path in run.iterdir():
        folder = tmp_path / "run" / f"checkpoint-{int(path.stem[5:])}"
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o640)
        (folder / "model.safetensors").chmod(0o400)
        folder.chmod(0o750)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 100, cwd=tmp_path).returncode == 0
    forecast = tmp_path / "forecasts" / "run" / "checkpoint-900"
    assert {path.name: mode(path) for path in (forecast, *forecast.iterdir())} == {
        "checkpoint-900": 0o750,
        "config.json": 0o640,
        "model.safetensors": 0o600,
        "farcast.json": 0o600,
    }


def test_a_file_that_the_origin_lacks_is_as_private_as_all_of_its_files(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "loose")
    for path in run.iterdir():
        folder = tmp_path / "run" / f"checkpoint-{int(path.stem[5:])}"
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").chmod(0o640)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 100, "--layout", "pt", cwd=tmp_path).returncode == 0
    forecast = tmp_path / "forecasts" / "run" / "checkpoint-900"
    assert {path.name: mode(path) for path in forecast.iterdir()} == {
        "config.json": 0o644,
        "pytorch_model.bin": 0o640,
        "farcast.json": 0o640,
    }


def test_the_umask_takes_its_part(tmp_path: Path, call_cli: CallCli) -> None:
    for path in make_loose_run(tmp_path / "run").iterdir():
        path.chmod(0o666)
    former = os.umask(0o027)
    try:
        assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
        assert call_cli("predict", "--horizon", 100, cwd=tmp_path).returncode == 0
    finally:
        os.umask(former)
    assert mode(tmp_path / FORECAST) == mode(tmp_path / "forecaster.safetensors") == 0o640
    assert load_file(tmp_path / FORECAST)


def test_a_delta_of_a_private_checkpoint_is_private(tmp_path: Path, call_cli: CallCli) -> None:
    save_work(tmp_path)
    (tmp_path / "step_10.safetensors").chmod(0o600)
    assert call_cli(*CALL, "--delta-out", "delta.safetensors", cwd=tmp_path).returncode == 0
    assert mode(tmp_path / "delta.safetensors") == 0o600


# --- what an attack found --------------------------------------------------------------------------------------------


def test_a_file_that_was_saved_in_place_after_a_kill_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "a"
    final.write_text("old forecast")

    def write() -> None:
        monkeypatch.setattr("farcast_cli.files.staged.swap", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with staged(final, check=anything) as temporary:
            temporary.write_text("new forecast")

    killed_in(write)
    with final.open("r+") as file:  # the same inode, as many trainers save
        file.write("my own work!")
    with pytest.raises(OutputError, match="exists already"), staged(final):
        pytest.fail("the block must not start")
    assert final.read_text() == "my own work!"


@pytest.mark.usefixtures("system")
def test_a_file_that_was_saved_between_the_check_and_the_rename_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "a"
    final.write_text("old")

    def write() -> None:
        with staging() as outputs:
            outputs.add(final, check=anything).write_text("new")

    former = renames.swap

    def swapped(new: Path, place: Path) -> None:
        (tmp_path / "saved").write_text("mine")
        (tmp_path / "saved").replace(place)
        former(new, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farcast_cli.files.staged.swap", swapped)
        with pytest.raises(OutputError, match="changed during its replacement"):
            write()
    assert final.read_text() == "mine"
    assert tree_digest(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("ready", [None, "5", "[" * 4000, "[[1]]", '[["a", "b", null, null]]', '[[".", "a", [1], [2]]]'])
def test_a_shipped_hidden_folder_publishes_nothing(tmp_path: Path, ready: str | None) -> None:
    hidden = tmp_path / ".a.deadbeef.partial"
    hidden.mkdir()
    (hidden / MARK).write_text("a")
    (hidden / renames.ASIDE).write_text("theirs")
    (hidden / "a").write_text("theirs")
    if ready is not None:
        (hidden / ".farcast-ready").write_text(ready)
    with staged(tmp_path / "a", may_stay_empty=True):
        assert not (tmp_path / "a").exists()
    assert tree_digest(tmp_path) == {}


def test_an_edit_between_the_blocks_that_a_fingerprint_sees_is_seen(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", shapes={"w": (300, 400)})
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    assert predict_to(call_cli, tmp_path, "out/a.safetensors") == (0, "")
    with (tmp_path / "out" / "a.safetensors").open("r+b") as file:
        file.seek(150_000)
        file.write(b"my own edit")
    before = tree_digest(tmp_path / "out")
    code, error = predict_to(call_cli, tmp_path, "out/a.safetensors", "--overwrite")
    assert code == 5
    assert "has changed since farcast wrote it" in error
    assert tree_digest(tmp_path / "out") == before


@pytest.mark.parametrize("files", ["5", '[{"name": []}]', "[5]", "null"])
def test_a_sidecar_that_lies_about_its_files_lets_nothing_be_replaced(fitted: Path, call_cli: CallCli, files: str) -> None:
    assert predict_to(call_cli, fitted, "out/a.safetensors") == (0, "")
    sidecar = fitted / "out" / "a.safetensors.farcast.json"
    sidecar.write_text(f'{{"farcast_version": "0.1.0", "name": "a.safetensors", "files": {files}}}')
    assert predict_to(call_cli, fitted, "out/a.safetensors", "--overwrite")[0] == 5


def test_a_log_of_the_users_own_name_is_kept(fitted: Path, call_cli: CallCli) -> None:
    logs = fitted / "forecasts" / "run" / "step_000900.safetensors.eval"
    logs.mkdir(parents=True)
    (logs / "strength-mine.log").write_text("$ my own notes\n")
    assert call_cli("predict", "--horizon", 100, "--eval-cmd", "echo $FARCAST_STRENGTH {ckpt}", "--maximize", cwd=fitted)
    assert (logs / "strength-mine.log").read_text() == "$ my own notes\n"


def test_a_pipe_under_the_name_of_a_log_is_not_waited_for(fitted: Path, call_cli: CallCli) -> None:
    logs = fitted / "forecasts" / "run" / "step_000900.safetensors.eval"
    logs.mkdir(parents=True)
    os.mkfifo(logs / "origin.log")
    done = call_cli("predict", "--horizon", 100, "--eval-cmd", "echo 1 {ckpt}", cwd=fitted)
    assert (done.returncode, done.stdout) == (5, "")


def test_an_evaluation_that_changes_an_earlier_candidate_publishes_nothing(fitted: Path, call_cli: CallCli) -> None:
    """Strength 1 is the best, and the run for 0.5 writes into its file."""
    command = (
        'test $FARCAST_STRENGTH = 1 && echo {ckpt} > first; test $FARCAST_STRENGTH = 0.5 && echo x >> "$(cat first)";'
        " echo $FARCAST_STRENGTH"
    )
    done = call_cli("predict", "--horizon", 100, "--eval-cmd", command, "--maximize", cwd=fitted)
    assert (done.returncode, done.stdout) == (2, "")
    assert "changed the checkpoint at strength 1" in done.errors[0]
    assert not (fitted / FORECAST).exists()


def test_the_folders_that_a_runs_links_lead_to_are_the_runs_too(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "run").rename(fitted / "real")
    (fitted / "run").mkdir()
    for path in (fitted / "real").iterdir():
        (fitted / "run" / path.name).symlink_to(path)
    assert call_cli("fit", "run", cwd=fitted).returncode == 0
    code, error = predict_to(call_cli, fitted, "real/step_000900.safetensors")
    assert code == 5
    assert "lies inside the run's folder" in error


@pytest.mark.parametrize("end", ["\r\n", " \n"])
def test_a_ledger_that_an_editor_has_saved_with_other_line_ends_tells_its_leaps(tmp_path: Path, end: str) -> None:
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes((leap(tmp_path, 900).as_line() + end).encode())
    assert [one.valid_step for one in read_leaps(ledger, tmp_path / "run")] == [900]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "run", "--steps", f"{'9' * 5000}:"),
        ("predict", "--horizon", "9" * 5000),
        ("predict", "--to-step", "9" * 30, "--even-if-worse"),
        ("predict", "--horizon", "100", "--max-shard-size", "9" * 400 + "GB"),
    ],
    ids=["steps", "horizon", "to-step", "shard size"],
)
def test_a_number_of_very_many_digits_is_a_usage_error(fitted: Path, call_cli: CallCli, arguments: tuple[str, ...]) -> None:
    done = call_cli(*arguments, cwd=fitted)
    assert (done.returncode, done.stdout, len(done.errors)) == (2, "", 1), done
