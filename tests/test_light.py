"""What works without the optional packages, and the one line for what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint._traverse import set_element

from farcast_cli.formats.tree import grow
from tests.conftest import clean_environment, loose_name, make_loose_run, make_torch_run
from tests.forks import Said, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import CallCli

NO_FORECAST = 10

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample_checkpoints"
BLOCKED = ("torch", "huggingface_hub", "matplotlib")


class Without(Protocol):
    """Runs farcast where the optional packages cannot be imported."""

    def __call__(self, *arguments: object, cwd: Path) -> Said: ...


@pytest.fixture(scope="module")
def without() -> Iterator[Without]:
    server = Server("tests.forks", *BLOCKED, environment=clean_environment())
    yield server.call
    server.close()


def told(done: Said) -> str:
    """The error of a command, in one line of what was said."""
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("sample", ["huggingface", "safetensors", "plain"])
def test_every_command_of_the_main_job_works_without_torch(sample: str, tmp_path: Path, without: Without) -> None:
    run = SAMPLES / sample
    for arguments in (("inspect", run), ("fit", run), ("backtest",), ("leap", run, "-o", "leaps/")):
        assert without(*arguments, cwd=tmp_path).returncode in {0, NO_FORECAST}, arguments
    made = without("predict", "--for", "evaluation", cwd=tmp_path)
    assert made.returncode == 0, made
    truth = next((SAMPLES / "truth" / sample).iterdir())
    verified = without("verify", made.stdout.strip(), "--against", truth, "--json", cwd=tmp_path)
    assert json.loads(verified.stdout)["forecast_step"], verified


@pytest.mark.parametrize("run_name", ["huggingface", "plain", "of AdamW and a cosine"])
def test_a_forecast_to_resume_from_has_the_same_bytes_without_torch(
    run_name: str, tmp_path: Path, call_cli: CallCli, without: Without
) -> None:
    """Counters, schedule and optimiser state too."""
    arguments = ("--horizon", 100, "--even-if-worse")
    of_torch = run_name not in {"huggingface", "plain"}
    assert call_cli("fit", make_torch_run(tmp_path / "run") if of_torch else SAMPLES / run_name, cwd=tmp_path).returncode == 0
    one, other = (
        run("predict", *arguments, "-o", f"{name}/", cwd=tmp_path) for run, name in ((call_cli, "with"), (without, "no"))
    )
    assert (one.returncode, other.returncode) == (0, 0), other
    found = [contents(tmp_path / done.stdout.strip()) for done in (one, other)]
    assert found[0] == found[1]


def contents(checkpoint: Path) -> dict[str, bytes]:
    """All files but the sidecar, which names the path and the time."""
    files = [checkpoint] if checkpoint.is_file() else sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if "farcast" not in path.name}


def test_float16_has_the_same_bits_without_torch(tmp_path: Path, call_cli: CallCli, without: Without) -> None:
    make_loose_run(tmp_path / "run", dtype=torch.float16)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    arguments = ("predict", "--horizon", 100, "--even-if-worse", "-o")
    for run, name in ((call_cli, "with.safetensors"), (without, "no.safetensors")):
        assert run(*arguments, name, cwd=tmp_path).returncode == 0
    one, other = (load_file(tmp_path / name) for name in ("with.safetensors", "no.safetensors"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_torch_file_is_made_of_any_run_without_torch(tmp_path: Path, call_cli: CallCli, without: Without) -> None:
    make_loose_run(tmp_path / "run")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    done = without("predict", "--horizon", 100, "--even-if-worse", "--layout", "pt", "-o", "made.pt", cwd=tmp_path)
    assert done.returncode == 0, done
    assert torch.load(tmp_path / "made.pt", weights_only=True).keys() == load_file(tmp_path / "run" / loose_name(800)).keys()


def test_the_rates_of_a_schedule_of_torchs_own_are_known_without_torch(
    tmp_path: Path, call_cli: CallCli, without: Without
) -> None:
    make_torch_run(tmp_path / "run")
    assert without("fit", "run", cwd=tmp_path).returncode == 0
    one, other = (run("backtest", "--json", cwd=tmp_path) for run in (call_cli, without))
    assert json.loads(other.stdout)["clock"] == "rate"
    assert (other.returncode, other.stdout) == (one.returncode, one.stdout)


REFUSED = {
    "a GPU": (("fit", "run", "--device", "cuda"), "--device cuda", "torch"),
    "a DCP folder": (
        ("predict", "--horizon", 10, "--even-if-worse", "--counters", "keep", "--layout", "dcp"),
        "--layout dcp",
        "torch",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_torch_is_one_line_with_the_command_that_installs_it(what: str, tmp_path: Path, without: Without) -> None:
    arguments, words, extra = REFUSED[what]
    make_torch_run(tmp_path / "run")
    assert without("fit", "run", cwd=tmp_path).returncode == 0
    before = sorted(tmp_path.rglob("*"))
    done = without(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert words in told(done)
    assert f"pip install 'farcast[{extra}]'" in told(done)
    assert sorted(tmp_path.rglob("*")) == before


def test_sharding_anew_needs_the_hubs_package_and_says_so(tmp_path: Path, without: Without) -> None:
    assert without("fit", SAMPLES / "huggingface", cwd=tmp_path).returncode == 0
    done = without("predict", "--horizon", 100, "--even-if-worse", "--max-shard-size", "1MB", cwd=tmp_path)
    assert done.returncode == 2, done
    assert "--max-shard-size: expected the package huggingface_hub" in told(done)
    assert "pip install 'farcast[hub]'" in told(done)


def test_a_page_and_a_picture_need_matplotlib_and_say_so_and_text_does_not(tmp_path: Path, without: Without) -> None:
    for place in ("report.html", "report.png"):
        done = without("report", SAMPLES / "plain", "-o", place, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert f"a report in {Path(place).suffix}: expected the package matplotlib" in told(done)
        assert "pip install 'farcast[report]'" in told(done)
    assert list(tmp_path.iterdir()) == []
    for arguments in (("--text",), ("--format", "markdown"), ("--json",), ("-o", "report.md")):
        assert without("report", SAMPLES / "plain", *arguments, cwd=tmp_path).returncode == 0


@settings(max_examples=200)
@given(paths=st.lists(st.lists(st.sampled_from(["a", "b", 0, 1, 2]), min_size=1, max_size=4).map(tuple), max_size=6))
def test_a_tree_grows_as_torchs_own_function_grows_it(paths: list[tuple[str | int, ...]]) -> None:
    """Where that fails, on paths that contradict each other, ours need not agree."""
    ours: dict[Any, Any] = {}
    theirs: dict[Any, Any] = {}
    for number, path in enumerate(("root", *path) for path in paths):
        try:
            set_element(theirs, path, number)
        except (AttributeError, IndexError, KeyError, TypeError):
            return
        grow(ours, path, number)
        assert ours == theirs
