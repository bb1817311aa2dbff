"""The commands work on this system, and on Linux without what macOS or Windows lacks they give the same bytes."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from farcast_cli import system
from farcast_cli.engine import native
from farcast_cli.files.hidden import MARK
from farcast_cli.files.reading import seen_from
from tests.conftest import clean_environment, make_loose_run, run_cli, tree_digest
from tests.crash.commands import COMMANDS, EVEN, make_bases
from tests.forks import Said, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

imitated = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="other systems are imitated on Linux")
LARGE = {"embed.weight": (200, 64), "head.weight": (64, 64)}  # some ranges of a file, for as many workers
CHOSEN = {
    *("fit, replacing", "predict, safetensors", "predict, torch", "predict, Trainer", "predict, Lightning"),
    *(
        "predict, accelerate",
        "predict, distributed",
        "predict, shards",
        "several, files",
        "overwrite, file",
        "overwrite, folder",
    ),
    *("convert to dcp", "tune -o", "leap, first", "leap, later", "leap, replacing", "leap, refused"),
}
LOOKS = (
    ("inspect", "run"),
    ("fit", "run", "--threads", "3"),
    ("backtest", "--threads", "3"),
    ("predict", "--horizon", "100", EVEN, "--threads", "3"),
    ("predict", "--horizon", "200", EVEN, "--threads", "3", "--io", "mmap"),
    ("predict", "--horizon", "100", EVEN),  # it is there already
    ("verify", "forecasts/run/step_000900.safetensors", "--against", "run/step_000800.safetensors"),
)
Calls = list[tuple[Path, tuple[str, ...]]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_bases(folder)
    make_loose_run(folder / "large/run", shapes=LARGE)
    return folder


class Imitations:
    """A process for each system, started when it is first asked for, and what came of the calls of all commands on it."""

    def __init__(self, bases: Path, home: Path) -> None:
        self._bases, self._home = bases, home
        self._systems: dict[str, Server] = {}
        self._said: dict[str, list[Said]] = {}

    def call(self, name: str, folder: Path, arguments: tuple[str, ...]) -> Said:
        """What comes of a call on a system."""
        if name not in self._systems:
            environment = clean_environment() | {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.folder(name) / "state")}
            self._systems[name] = Server("tests.other_systems", name, environment=environment)
        return self._systems[name].call(*arguments, cwd=folder)

    def close(self) -> None:
        for server in self._systems.values():
            server.close()

    def folder(self, name: str) -> Path:
        return self._home / name

    def calls(self, name: str) -> Calls:
        chosen = [command for command in COMMANDS if command.name in CHOSEN]
        home = self.folder(name)
        found = [(home / one.name, arguments) for one in chosen for arguments in (*one.before, one.args)]
        return [*found, *((home / "large", arguments) for arguments in LOOKS)]

    def said(self, name: str) -> list[Said]:
        if name not in self._said:
            for command in COMMANDS:
                if command.name in CHOSEN:
                    shutil.copytree(self._bases / command.base, self.folder(name) / command.name)
            shutil.copytree(self._bases / "large", self.folder(name) / "large")
            self._said[name] = [self.call(name, folder, arguments) for folder, arguments in self.calls(name)]
        return self._said[name]


@pytest.fixture(scope="module")
def imitations(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imitations]:
    found = Imitations(bases, tmp_path_factory.mktemp("systems"))
    yield found
    found.close()


def test_every_command_works_on_this_system(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run", shapes=LARGE)
    for arguments in (*LOOKS, ("leap", "run", "--steps", ":700"), ("leap", "run")):
        done = run_cli(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done
    assert not list(tmp_path.rglob(".*"))


@imitated
def test_all_chosen_commands_exist() -> None:
    assert {command.name for command in COMMANDS} >= CHOSEN


OWN_CALLS = {"macos": {"F_FULLFSYNC", "F_NOCACHE", "in_threads", "renamex_np"}, "windows": {"in_threads", "locking"}}


@imitated
@pytest.mark.parametrize("name", OWN_CALLS)
def test_another_system_gives_the_same_answers_and_bytes_by_its_own_calls(name: str, imitations: Imitations) -> None:
    plain, others = imitations.said("linux"), imitations.said(name)
    for (folder, arguments), one, other in zip(imitations.calls(name), plain, others, strict=True):
        assert (one.returncode, one.stdout) == (other.returncode, other.stdout), (folder.name, arguments, other.stderr)
    assert {said.returncode for said in others} == {0, 10}
    for folder in sorted(path for path in imitations.folder("linux").iterdir() if path.name != "state"):
        assert tree_digest(imitations.folder(name) / folder.name) == tree_digest(folder), folder.name
    assert {one for said in plain for one in said.used} == {"in_threads" if native.KERNEL else "in_processes"}
    assert {one for said in others for one in said.used} == OWN_CALLS[name]


@imitated
def test_without_process_groups_an_evaluation_command_is_refused_in_one_line(
    bases: Path, imitations: Imitations, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(bases / "loose", tmp_path / "work"))
    arguments = ("predict", "run", "--horizon", "20", "--eval-cmd", "echo {ckpt} 1.0")
    said = imitations.call("windows", work, arguments)
    assert said.returncode == 2
    assert [line for line in said.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --eval-cmd: expected a system that can end a command with all that it started (Linux, macOS), found another one"
    ]
    assert tree_digest(work) == tree_digest(bases / "loose")


# --- locks of Windows ------------------------------------------------------------------------------------------------


@contextmanager
def left(final: Path, *, is_locked: bool) -> Iterator[Path]:
    """A hidden folder of an output as a process on Windows has it, or as a killed one leaves it."""
    hidden = final.with_name(f".{final.name}.0123abcd.partial")
    hidden.mkdir(parents=True)
    (hidden / MARK).write_bytes(os.fsencode(final.name))
    fd = system.open_file(hidden / ".farcast-lock", os.O_RDWR | os.O_CREAT)
    try:
        if is_locked:
            system.lock(fd)
        yield hidden
    finally:
        os.close(fd)


@imitated
@pytest.mark.parametrize("is_locked", [False, True])
def test_on_windows_a_hidden_folder_is_cleared_unless_its_process_lives(
    bases: Path,
    imitations: Imitations,
    tmp_path: Path,
    is_locked: bool,  # noqa: FBT001
) -> None:
    work = Path(shutil.copytree(bases / "loose", tmp_path / "work"))
    with left(work / "out/a.safetensors", is_locked=is_locked) as hidden:
        arguments = ("predict", "run", "--horizon", "20", EVEN, "-o", "out/a.safetensors")
        said = imitations.call("windows", work, arguments)
        assert said.returncode == (5 if is_locked else 0), said
        assert ("another farcast is writing this output" in said.stderr) == is_locked
        assert hidden.exists() == is_locked
        assert (work / "out/a.safetensors").exists() != is_locked


# --- what other systems do, in this process --------------------------------------------------------------------------


@imitated
def test_where_no_space_can_be_reserved_a_full_disk_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_libc", lambda _: None)
    with (tmp_path / "a").open("wb") as file:
        system.reserve(file.fileno(), tmp_path / "a", 1)
        with pytest.raises(OSError, match="No space left on device"):
            system.reserve(file.fileno(), tmp_path / "a", 1 << 60)


@imitated
def test_without_a_flag_for_it_a_link_is_not_opened_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(system, "_NO_LINK", 0)
    with pytest.raises(OSError, match="symbolic links"):
        system.open_file(tmp_path / "link", os.O_RDONLY, follows=False)
    os.close(system.open_file(tmp_path / "link", os.O_RDONLY))


@imitated
def test_where_folders_cannot_be_opened_a_link_to_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.setattr(system, "_OPENS_FOLDERS", False)
    system.Folder(tmp_path / "folder").close()
    for name in ("link", "nothing"):
        with pytest.raises(NotADirectoryError):
            system.Folder(tmp_path / name)


def test_a_path_on_another_drive_stays_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ntpath` is what `os.path` is on Windows."""
    import ntpath

    monkeypatch.setattr(os, "path", ntpath)
    assert seen_from("C:\\runs\\a", Path("C:\\work")) == "..\\runs\\a"
    assert seen_from("D:\\runs\\a", Path("C:\\work")) == "D:\\runs\\a"


@imitated
def test_memory_is_counted_in_bytes() -> None:
    peak: Any = system.peak_bytes()
    assert 10 << 20 < peak < 1 << 40
