"""What the system fails at while an input is read: exit code 4 and the name of that input, in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from farcast_cli.cli import _of_the_system
from farcast_cli.engine.reader import Reader
from farcast_cli.engine.workers import on_cores
from farcast_cli.errors import FileFormatError, MemoryUsedUpError, UsageError
from farcast_cli.files.reading import mark_of, open_input, read_bytes, reading
from tests.conftest import SHAPES, clean_environment, fit_run, make_loose_run, make_torch_run
from tests.corpus import make_hf_run

if TYPE_CHECKING:
    from tests.conftest import CallCli

ROOT = Path(__file__).resolve().parent.parent
SHIM = Path(__file__).with_name("read_fault_shim.c")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler for the library that lets reads fail")
    place = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", place, SHIM, "-ldl"], check=True)
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a forecaster of each of some layouts, a forecast of the first, and rows to tune on."""
    top = tmp_path_factory.mktemp("runs")
    fit_run(make_loose_run(top / "loose/run", shapes=SHAPES | {"wide.weight": (128, 16)}), top / "loose/forecaster.safetensors")
    fit_run(make_loose_run(top / "one/run", shapes={"w": (129, 128)}), top / "one/forecaster.safetensors")
    fit_run(make_torch_run(top / "torch/run"), top / "torch/forecaster.safetensors")
    fit_run(make_hf_run(top / "hf/run"), top / "hf/forecaster.safetensors")
    for path in (top / "torch/run").iterdir():
        target = top / "lightning/run" / f"step={path.stem.split('_')[1]}.ckpt"
        target.parent.mkdir(parents=True, exist_ok=True)
        payload = torch.load(path)
        torch.save({"pytorch-lightning_version": "2.4", "state_dict": payload["model"], "global_step": payload["step"]}, target)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((160, 16)).astype(np.float32)
    np.savez(top / "loose/rows.npz", x=rows, y=(rows @ generator.standard_normal((16, 128))).astype(np.float32))
    return top


TUNE = ("tune", "run/step_000800.safetensors", "--layer", "wide.weight", "--loss", "mse")
SWEPT: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "inspect": ("loose", errno.EIO, ("inspect", "run")),
    "inspect on a network": ("hf", errno.ESTALE, ("inspect", "run")),
    "inspect of Lightning's": ("lightning", errno.EIO, ("inspect", "run")),
    "fit": ("loose", errno.EIO, ("fit", "run", "-q", "-o", "out/f.safetensors", "--ledger", "leaps")),
    "fit in workers": ("torch", errno.EIO, ("fit", "run", "-q", "-o", "out/f.safetensors", "--threads", "2")),
    "fit of mapped files": ("loose", errno.ENOMEM, ("fit", "run", "-q", "-o", "out/f.safetensors", "--io", "mmap")),
    "backtest": ("loose", errno.EIO, ("backtest", "--horizon", "100")),
    "predict": ("loose", errno.EIO, ("predict", "--horizon", "100", "-q", "-o", "out/", "--ledger", "out/leaps")),
    "predict in the kernel": ("one", errno.EIO, ("predict", "--horizon", "100", "-q", "-o", "out/", "--ledger", "out/leaps")),
    "predict of the Trainer's": (
        "hf",
        errno.EIO,
        ("predict", "--horizon", "100", "-q", "-o", "out/", "--even-if-worse", "--ledger", "out/leaps"),
    ),
    "verify": ("loose", errno.EIO, ("verify", "forecast.safetensors", "--against", "run/step_000700.safetensors")),
    "tune": ("loose", errno.EIO, (*TUNE, "--data", "rows.npz", "-o", "out/tuned.safetensors")),
    "tune's delta": ("loose", errno.EIO, (TUNE[0], TUNE[1], "--apply", "delta.safetensors", "-o", "out/tuned.safetensors")),
}


@pytest.mark.parametrize("what", SWEPT)
def test_a_read_that_fails_names_the_file_and_never_the_output(
    tmp_path: Path, runs: Path, shim: Path, call_cli: CallCli, what: str
) -> None:
    layout, number, command = SWEPT[what]
    shutil.copytree(runs / layout, tmp_path, dirs_exist_ok=True)
    if what == "verify":
        assert call_cli("predict", "--horizon", 100, "-q", "-o", "forecast.safetensors", cwd=tmp_path).returncode == 0
    if what == "tune's delta":
        assert call_cli(*TUNE, "--data", "rows.npz", "--delta-out", "delta.safetensors", cwd=tmp_path).returncode == 0
    if what == "fit":
        (tmp_path / "leaps").write_text("\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.read_faults", tmp_path, str(number), *command],
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs_of_it: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs_of_it) >= 3
    for one in runs_of_it:
        name = Path(one["file"]).name
        is_output = "/out" in one["file"] or one["file"].endswith("/.")  # or the folder that is synced for it
        if one["file"] and not is_output:
            errors = [line for line in one["stderr"].splitlines() if line.startswith("error: ")]
            assert (one["code"], len(errors)) == (4, 1), one
            assert name in errors[0], one
            assert "cannot be read" in errors[0], one


LONG = "x" * 300
UNREADABLE: dict[str, tuple[int, tuple[str, ...]]] = {
    "a run": (4, ("inspect", LONG)),
    "a forecaster": (4, ("predict", "--horizon", "100", "--forecaster", LONG)),
    "a ledger": (4, ("fit", "run", "--ledger", LONG)),
    "a forecast": (4, ("verify", LONG, "--against", "run/step_000800.safetensors")),
    "a truth": (4, ("verify", "run/step_000700.safetensors", "--against", LONG, "--reference", "run/step_000800.safetensors")),
    "a checkpoint": (4, ("tune", LONG, "--layer", "w", "--loss", "mse", "--data", "rows.npz", "-o", "tuned.safetensors")),
    "rows": (4, (*TUNE, "--data", LONG + ".npz", "-o", "tuned.safetensors")),
    "a delta": (4, (TUNE[0], TUNE[1], "--apply", LONG, "-o", "tuned.safetensors")),
    "an output": (5, ("predict", "--horizon", "100", "-o", LONG + ".safetensors")),
    "a forecaster to write": (5, ("fit", "run", "-o", LONG)),
    "a config": (2, ("inspect", "run", "--config", LONG)),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_name_that_the_system_refuses_is_one_line_with_the_name(
    tmp_path: Path, runs: Path, call_cli: CallCli, what: str
) -> None:
    shutil.copytree(runs / "loose", tmp_path, dirs_exist_ok=True)
    code, command = UNREADABLE[what]
    done = call_cli(*command, cwd=tmp_path)
    assert (done.returncode, len(done.errors)) == (code, 1), done
    assert LONG in done.errors[0] or code == 5


def test_links_that_lead_in_a_circle_are_told_as_such(tmp_path: Path, runs: Path, call_cli: CallCli) -> None:
    shutil.copytree(runs / "loose", tmp_path, dirs_exist_ok=True)
    (tmp_path / "circle").symlink_to("circle")
    commands = (
        ("inspect", "circle"),
        ("predict", "--horizon", 100, "-o", "circle/x.safetensors"),
        ("fit", "run", "-o", "circle/f"),
    )
    for command in commands:
        done = call_cli(*command, cwd=tmp_path)
        assert done.returncode in {3, 4, 5}, done
        assert len(done.errors) == 1
        assert "circle" in done.errors[0]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_an_input_that_does_not_fit_the_memory_is_named_with_its_size(tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "loose", tmp_path, dirs_exist_ok=True)
    with (tmp_path / "leaps").open("wb") as file:
        file.truncate(1 << 36)
    script = 'ulimit -v 8000000 && exec "$0" -m farcast_cli fit run --ledger leaps'
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done
    assert done.stderr.startswith("error: leaps: cannot be read: not enough memory for its 68719476736 bytes")


class _Greedy:
    """A worker that asks for more memory than there is."""

    def fill(self, number: int, /) -> int:
        return len(np.empty(1 << 50, np.uint8)) + number

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num_workers", [1, 2])
def test_memory_that_a_worker_cannot_have_is_told_as_such(num_workers: int) -> None:
    with pytest.raises(MemoryError) as told:
        list(on_cores(4, _Greedy, num_workers))
    problem = _of_the_system(told.value)
    assert isinstance(problem, MemoryUsedUpError)
    assert problem.exit_code == 5


def test_what_no_module_foresaw_of_the_system_is_one_line_all_the_same() -> None:
    told = _of_the_system(OSError(errno.EIO, os.strerror(errno.EIO), "there"))
    assert isinstance(told, FileFormatError)
    assert str(told) == "there: cannot be read: Input/output error"
    assert isinstance(_of_the_system(UnicodeEncodeError("ascii", "ü", 0, 1, "no")), UsageError)
    assert _of_the_system(RuntimeError("a bug")) is None


# --- the guard -------------------------------------------------------------------------------------------------------


def test_a_descriptor_that_cannot_be_read_names_its_path(tmp_path: Path) -> None:
    memory = Path("/proc/self/mem")  # opens, and its first page cannot be read
    if not memory.exists():
        pytest.skip("no /proc here")
    with pytest.raises(FileFormatError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        read_bytes(memory, 0, 16)
    with pytest.raises(FileFormatError, match="/proc/self/mem"), open_input(memory) as file:
        file.read(16)
    (tmp_path / "empty").touch()
    with pytest.raises(FileFormatError, match="empty"):
        Reader("mmap").raw(tmp_path / "empty", 0, np.empty(4, np.uint8))


def test_the_guard_names_the_file_that_the_system_names_before_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="inner"), reading(tmp_path):
        (tmp_path / "inner").stat()
    with pytest.raises(FileFormatError, match="gone"):
        mark_of(tmp_path / "gone")
