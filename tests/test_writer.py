"""Nothing half-written bears its final name: not after an exception, a signal, a kill or a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import farcast_cli
from farcast_cli.engine.output_files import _write_all
from farcast_cli.errors import OutputError
from farcast_cli.files.staged import staged
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_zip import frame
from tests.conftest import clean_environment, fit_run, make_loose_run, make_torch_run, run_cli, tree_digest

if TYPE_CHECKING:
    from collections.abc import Callable


def anything(_: Path) -> None:
    """Whatever has the final name may be replaced."""


def hidden_of(final: Path) -> list[Path]:
    """The hidden folders of an output."""
    return sorted(final.parent.glob(f".{final.name}.{'[0-9a-f]' * 8}.partial"))


# --- staged ----------------------------------------------------------------------------------------------------------


def test_a_staged_file_appears_under_its_name_when_the_block_ends_and_nothing_else_is_left(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "a.bin") as temporary:
        temporary.write_bytes(b"whole")
        assert not (tmp_path / "deep" / "a.bin").exists()
    assert tree_digest(tmp_path).keys() == {"deep", "deep/a.bin"}
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"whole"


def test_a_staged_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "x").write_text("1")
    assert tree_digest(tmp_path).keys() == {"a", "a/sub", "a/sub/x"}


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_in_the_block_publishes_nothing_and_leaves_nothing(tmp_path: Path, problem: BaseException) -> None:
    def write() -> None:
        with staged(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise problem

    with pytest.raises(type(problem)) as caught:
        write()
    assert caught.value is problem
    assert tree_digest(tmp_path) == {}


def test_a_failing_disk_in_the_block_is_an_output_error_that_names_the_output_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.bin: cannot be written: No space left") as caught:
        write()
    assert caught.value.hint.startswith("free some space")
    assert tree_digest(tmp_path) == {}


@pytest.mark.parametrize("kind", ["file", "folder", "dead link"])
def test_something_under_the_final_name_is_refused_and_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "a"
    make: dict[str, Callable[[], object]] = {
        "file": lambda: final.write_text("mine"),
        "folder": final.mkdir,
        "dead link": lambda: final.symlink_to("nowhere"),
    }
    make[kind]()
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match="exists already"), staged(final):
        pytest.fail("the block must not start")
    assert tree_digest(tmp_path) == before
    assert final.is_symlink() == (kind == "dead link")


def test_something_that_takes_the_final_name_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "a.bin"

    def write() -> None:
        with staged(final) as temporary:
            temporary.write_bytes(b"forecast")
            final.write_text("mine")

    with pytest.raises(OutputError, match="exists already"):
        write()
    assert tree_digest(tmp_path).keys() == {"a.bin"}
    assert final.read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_overwriting_replaces_the_old_output_whole(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "a"

    def write(path: Path, name: str) -> None:
        if kind == "folder":
            path.mkdir()
        (path / name if kind == "folder" else path).write_text(name)

    write(final, "old")
    with staged(final, check=anything) as temporary:
        write(temporary, "new")
        assert (final / "old" if kind == "folder" else final).read_text() == "old"
    assert tree_digest(tmp_path).keys() == ({"a", "a/new"} if kind == "folder" else {"a"})
    assert (final / "new" if kind == "folder" else final).read_text() == "new"


def test_a_failed_overwrite_leaves_the_old_output(tmp_path: Path) -> None:
    final = tmp_path / "a"
    final.mkdir()
    (final / "old").write_text("1")
    before = tree_digest(tmp_path)

    def write() -> None:
        with staged(final, check=anything) as temporary:
            temporary.mkdir()
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OutputError, match="Input/output error"):
        write()
    assert tree_digest(tmp_path) == before


def test_a_block_that_may_stay_empty_publishes_nothing_when_it_does(tmp_path: Path) -> None:
    with staged(tmp_path / "a", may_stay_empty=True):
        pass
    assert tree_digest(tmp_path) == {}


def test_a_block_that_writes_nothing_without_leave_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "a"):
        pass
    assert tree_digest(tmp_path) == {}


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with staged(tmp_path / "a.bin") as temporary:
            temporary.mkdir()
            (temporary / "half").write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = hidden_of(tmp_path / "a.bin")
    with staged(tmp_path / "a.bin") as temporary:
        assert not left.exists()
        temporary.write_bytes(b"whole")
    assert tree_digest(tmp_path).keys() == {"a.bin"}


def test_a_second_writer_of_an_output_is_refused_and_the_first_one_goes_on(tmp_path: Path) -> None:
    with staged(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"first")
        with pytest.raises(OutputError, match="another farcast is writing this output"), staged(tmp_path / "a.bin"):
            pytest.fail("the block must not start")
        assert temporary.read_bytes() == b"first"
    assert (tmp_path / "a.bin").read_bytes() == b"first"


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written") as caught, staged(tmp_path / "file" / "a.bin"):
        pytest.fail("the block must not start")
    assert caught.value.hint == "choose another place with -o"
    assert tree_digest(tmp_path).keys() == {"file"}


def test_a_disk_that_takes_only_a_part_of_a_write_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    """Where no space could be reserved: the first call writes less than it is given, the next one nothing."""

    def run() -> None:
        _limit_files(2000)
        signal.alarm(10)
        fd = os.open(tmp_path / "a.bin", os.O_WRONLY | os.O_CREAT)
        try:
            _write_all(fd, np.zeros(10_000, np.uint8), 0)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)

    child = os.fork()
    if not child:
        run()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errno.EFBIG


# --- torch files -----------------------------------------------------------------------------------------------------


def test_a_zip_that_farcast_writes_is_one_that_torch_and_farcast_read(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(100.0)}, tmp_path / "a.pt")
    file = read_torch_file(tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    data = {name: raw[record.offset : record.offset + record.num_bytes] for name, record in file.records.items()}
    framed = frame([(name, len(content)) for name, content in data.items()])
    written = bytearray(b"".join(part for pair in zip(framed.heads, data.values(), strict=True) for part in pair) + framed.tail)
    for content, places in zip(data.values(), framed.checksums_at, strict=True):
        for place in places:
            written[place : place + 4] = zlib.crc32(content).to_bytes(4, "little")
    (tmp_path / "b.pt").write_bytes(written)
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None  # every checksum is right
    assert torch.load(tmp_path / "b.pt", weights_only=True)["w"].tolist() == list(range(100))
    assert torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)["w"].tolist() == list(range(100))
    again = read_torch_file(tmp_path / "b.pt").records
    assert {name: record.num_bytes for name, record in again.items()} == {n: r.num_bytes for n, r in file.records.items()}
    assert all(record.offset % 64 == 0 for record in again.values())


# --- the command -----------------------------------------------------------------------------------------------------


STOPS = """
import os, signal, sys
from farcast_cli.cli import main
write = os.pwrite

def pwrite(fd, data, offset):
    os.pwrite = write
    done = write(fd, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGSTOP)
    return done

os.pwrite = pwrite
main()
"""
"""The command, which stops itself in the middle of the first write to its output; whoever continues it lets it go on."""


def stopped_in_a_write(work: Path, out: Path) -> subprocess.Popen[str]:
    """A `farcast predict` whose hidden folder holds a part of the output."""
    command = [sys.executable, "-c", STOPS, "predict", "--horizon", "100", "-o", str(out), "--threads", "1"]
    environment = clean_environment() | {"PYTHONPATH": str(Path(farcast_cli.__file__).parent.parent)}
    process = subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_code == os.CLD_STOPPED, process.communicate()
    (hidden,) = hidden_of(out)
    assert (hidden / out.name).exists()
    return process


def test_a_killed_forecast_leaves_no_output_and_the_next_one_succeeds(work: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out" / "step_000900.safetensors", tree_digest(work / "run")
    process = stopped_in_a_write(work, out)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [(hidden / out.name).exists() for hidden in hidden_of(out)] == [True]
    done = run_cli("predict", "--horizon", 100, "-o", out, cwd=work)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert tree_digest(out.parent).keys() == {out.name, "step_000900.safetensors.farcast.json"}
    assert tree_digest(work / "run") == before


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_forecast_ends_with_130_and_leaves_nothing(work: Path, tmp_path: Path, sent: signal.Signals) -> None:
    process = stopped_in_a_write(work, tmp_path / "out" / "step_000900.safetensors")
    process.send_signal(sent)
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_second_forecast_to_the_same_place_is_refused_while_the_first_one_completes(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "step_000900.safetensors"
    process = stopped_in_a_write(work, out)
    try:
        second = run_cli("predict", "--horizon", 100, "-o", out, cwd=work)
    finally:
        process.send_signal(signal.SIGCONT)
    stdout, _ = process.communicate()
    assert (second.returncode, second.stdout) == (5, "")
    assert "another farcast is writing this output" in second.errors[0]
    assert (process.returncode, stdout) == (0, f"{out}\n")
    assert tree_digest(out.parent).keys() == {out.name, "step_000900.safetensors.farcast.json"}


def _limit_files(num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_that_may_not_grow_ends_the_forecast_with_5_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    work, places = tmp_path / "work", tmp_path / "places"
    work.mkdir()
    places.mkdir()
    if kind == "torch":
        make_torch_run(work / "run")
    else:
        make_loose_run(work / "run")
    fit_run(work / "run", work / "forecaster.safetensors")
    before = tree_digest(tmp_path)
    done = run_cli("predict", "--horizon", 20, "-o", f"{places}/", cwd=work, preexec_fn=partial(_limit_files, 2000))
    assert (done.returncode, done.stdout) == (5, "")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert "cannot be written: File too large" in done.errors[0]
    assert tree_digest(tmp_path) == before


def test_a_forecaster_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    before = tree_digest(tmp_path)
    done = run_cli("fit", "run", "--full", cwd=tmp_path, preexec_fn=partial(_limit_files, 2000))
    assert (done.returncode, done.stdout) == (5, "")
    assert "forecaster.safetensors: cannot be written" in done.errors[0]
    assert tree_digest(tmp_path) == before
