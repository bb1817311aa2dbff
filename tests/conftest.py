"""Small real runs to test on, and two ways to call the command: as a process, and (without its start-up) in this one."""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest
import torch
from safetensors.torch import load_file, save_file

import farcast_cli.engine.output_files
from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.cli import app, main
from farcast_cli.engine import write as engine
from farcast_cli.engine.native import VARIABLE
from farcast_cli.forecast import accumulate as accumulation
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster_file import save_fitted
from farcast_cli.run.trajectory import MIN_SNAPSHOTS, discover
from tests.forks import build_commands_once
from tests.tiny import torch_settings_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

STEPS = tuple(range(100, 900, 100))
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (40, 16),
    "layers.0.weight": (16, 16),
    "layers.0.bias": (16,),
    "norm.weight": (16,),
}
TIME_CONSTANT = 600.0  # steps; slow against the run, so that its second half still moves like its first
NOISE = 1e-3  # of a weight, per snapshot
LONGEST = (
    *("test_crash.py", "test_leap.py", "test_marks.py", "test_systems.py", "test_non_finite.py", "test_in_trainer.py"),
    *("test_periodic.py", "test_loop.py", "test_two_processes.py", "test_security.py", "test_engine.py", "test_lightning.py"),
)
PATIENCE_S = 300.0  # for what ends within a second or two, but for a machine that is very busy

hypothesis.settings.register_profile(
    "farcast", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine is no failure
hypothesis.settings.load_profile("farcast")
build_commands_once(app)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the tables of tests/golden anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker that began one of them last would work alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure() -> None:
    """No test writes into the user's own state folder, nor does what is set up before any test.

    A shell's background job ignores interrupts, and so would every command that a test interrupts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.mkdtemp(prefix="farcast-state-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # pytest-xdist's workers end without pytest's own clean-up
    os.environ["XDG_STATE_HOME"] = home


def weights_at(
    step: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, torch.Tensor]:
    """A model's weights on their way from a start to a target: exponential decay plus a little noise, all seeded."""
    path = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(1_000_003 * seed + step)
    left = float(torch.exp(torch.tensor(-step / TIME_CONSTANT)))
    found = {}
    for name, shape in (shapes or SHAPES).items():
        start, target = torch.randn(shape, generator=path), torch.randn(shape, generator=path)
        found[name] = (target + (start - target) * left + NOISE * torch.randn(shape, generator=noise)).to(dtype)
    return found


def loose_name(step: int) -> str:
    return f"step_{step:06d}.safetensors"


def make_loose_run(
    folder: Path,
    steps: Sequence[int] = STEPS,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """One safetensors file per step, `step_000100.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        save_file(weights_at(step, dtype=dtype, seed=seed, shapes=shapes), folder / loose_name(step), metadata={"format": "pt"})
    return folder


def make_turning_run(folder: Path) -> Path:
    """Files as in `make_loose_run`, of a run that turns back halfway, so that a forecast would not help."""
    folder.mkdir(parents=True, exist_ok=True)
    base, away = (weights_at(0, seed=seed) for seed in (0, 1))
    for step in STEPS:
        share = 0.1 * math.sin(math.pi * (step - 100) / 700)
        moved = {name: base[name] + share * away[name] for name in base}
        save_file(moved, folder / loose_name(step), metadata={"format": "pt"})
    return folder


def edit_loose(path: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replace (or, with None, remove) tensors of a safetensors file."""
    tensors = load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def make_torch_run(folder: Path, steps: Sequence[int] = tuple(range(10, 90, 10)), *, seed: int = 0) -> Path:
    """One `ckpt_10.pt` per step from a real training loop: model, AdamW, a cosine schedule and the step."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 * max(steps))
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), outputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if step in steps:
            payload = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step,
            }
            torch.save(payload, folder / f"ckpt_{step}.pt")
    return folder


def fit_run(run: Path, forecaster: Path) -> Path:
    """What `farcast fit RUN -o FORECASTER` does, without the command."""
    trajectory = discover(run, minimum=MIN_SNAPSHOTS)
    save_fitted(fit(trajectory, num_samples=DEFAULT_SAMPLE), forecaster)
    return forecaster


def tree_digest(top: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes, and every folder; to see that nothing changed."""
    return {
        path.relative_to(top).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(top.rglob("*"))
    }


def wait_until(done: Callable[[], object], what: str) -> None:
    """Wait for an event, however slow the machine is; `what` says what did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Done:
    """What a call of the command left: both streams and the exit code."""

    stdout: str
    stderr: str
    returncode: int

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    @property
    def hints(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("hint: ")]


class CallCli(Protocol):
    """Calls the command in this process, from a folder and with more environment variables."""

    def __call__(self, *args: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done: ...


def clean_environment() -> dict[str, str]:
    """This process's environment without what would change the command's defaults or colours.

    It keeps the tests' state folder, and the engine that is tested.
    """
    unwanted = {"FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TTY_COMPATIBLE"}
    unwanted |= {key for key in os.environ if key.startswith("FARCAST_")} - {VARIABLE}
    return {key: value for key, value in os.environ.items() if key not in unwanted}


def popen_cli(*args: object, cwd: Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the real command as a process, with both streams piped."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = clean_environment() | {"PYTHONPATH": root} | dict(env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "farcast_cli", *map(str, args)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_cli(*args: object, cwd: Path, env: Mapping[str, str] | None = None, **options: Any) -> Done:
    """Run the real command as a process."""
    with popen_cli(*args, cwd=cwd, env=env, **options) as process:
        stdout, stderr = process.communicate()
    return Done(stdout, stderr, process.returncode)


def run_by_two(module: str, *args: object, env: Mapping[str, str] | None = None, patience_s: float = PATIENCE_S) -> None:
    """Run a module of the tests in two processes that torch.distributed joins, with more variables; both must end well."""
    root = str(Path(__file__).resolve().parent.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | dict(env or {})
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=root,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=patience_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.fixture
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little said by Lightning, and one thread, as the command has it: the networks are tiny."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    with torch_settings_kept():
        yield


@pytest.fixture(autouse=True, scope="module")
def _torch_settings() -> Iterator[None]:
    """One thread, as the command has it; whatever a module sets is put back after it."""
    with torch_settings_kept():
        yield


@pytest.fixture
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's state folder, each test's own; not in `tmp_path`, whose files tests list. farcast makes it."""
    return tmp_path_factory.getbasetemp() / "state" / uuid.uuid4().hex


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    fit_run(make_loose_run(folder / "run"), folder / "forecaster.safetensors")
    return folder


@pytest.fixture
def work(fitted_once: Path, tmp_path: Path) -> Path:
    """A working directory with a run of eight snapshots in `run/` and a forecaster fitted on it."""
    return Path(shutil.copytree(fitted_once, tmp_path / "work"))


@pytest.fixture
def turning(tmp_path: Path) -> Path:
    """A run that turns back halfway, so that a forecast would not help, and a forecaster fitted on it."""
    fit_run(make_turning_run(tmp_path / "run"), tmp_path / "forecaster.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(state_home))
    kept = clean_environment()
    for key in set(os.environ) - set(kept):
        monkeypatch.delenv(key)


@pytest.fixture
def call_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[CallCli]:
    """The command, called in this process: faster than `run_cli` by the time that importing torch takes."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*args: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["farcast", *map(str, args)])
            if cwd is not None:
                patch.chdir(cwd)
            for key, value in (env or {}).items():
                patch.setenv(key, value)
            with pytest.raises(SystemExit) as stopped:
                main()
        said = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return Done(said.out, said.err, code)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small outputs in many ranges and batches, by several processes, as large ones are."""
    monkeypatch.setattr(engine, "RANGE_BYTES", 8192)
    monkeypatch.setattr(engine, "MIN_RANGE_BYTES", 4096)
    monkeypatch.setattr(engine, "DEVICE_RANGE_BYTES", 8192)
    monkeypatch.setattr(engine, "BLOCK", 1000)
    monkeypatch.setattr(engine, "FORK_BYTES", 0)
    monkeypatch.setattr(farcast_cli.engine.output_files, "DIRECT_BYTES", 0)
    monkeypatch.setattr(accumulation, "FORK_BYTES", 0)
    monkeypatch.setattr(accumulation, "SPAN", 4096)
    monkeypatch.setattr("farcast_cli.engine.reader.MAX_STRETCH", 4096)
