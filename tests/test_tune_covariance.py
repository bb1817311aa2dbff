"""Soft anchors and covariances, by the command line: what they keep, what they refuse, and what is written of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli

NUM_INPUTS, NUM_OUTPUTS = 12, 5
CALL = ("tune", "step_1.safetensors", "--layer", "weight", "--bias", "bias", "--data", "rows.npz", "--loss", "mse")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A layer, rows of another task, and 400 rows whose outputs should stay, which lie in six dimensions but for noise."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    layer = nn.Linear(NUM_INPUTS, NUM_OUTPUTS)
    save_file({name: value.numpy() for name, value in layer.state_dict().items()}, tmp_path / "step_1.safetensors")
    kept = random.normal(size=(400, 6)) @ random.normal(size=(6, NUM_INPUTS)) + 0.1 * random.normal(size=(400, NUM_INPUTS))
    inputs = random.normal(size=(64, NUM_INPUTS))
    targets = inputs @ random.normal(size=(NUM_INPUTS, NUM_OUTPUTS))
    np.savez(tmp_path / "rows.npz", x=inputs.astype(np.float32), y=targets)
    np.savez(tmp_path / "kept.npz", x=kept.astype(np.float32))
    return tmp_path


def change(work: Path, name: str) -> float:
    """The mean square of what the outputs of the rows to keep change."""
    before, after = load_file(work / "step_1.safetensors"), load_file(work / name)
    rows = np.load(work / "kept.npz")["x"]
    moved = rows @ (after["weight"] - before["weight"]).T + after["bias"] - before["bias"]
    return float((moved**2).mean())


def test_a_covariance_is_the_mean_of_the_rows_and_keeps_as_much_as_the_rows_themselves(work: Path, call_cli: CallCli) -> None:
    done = call_cli(
        *(
            "tune",
            "step_1.safetensors",
            "--layer",
            "weight",
            "--data",
            "kept.npz",
            "--covariance-out",
            "c.safetensors",
            "--json",
        ),
        cwd=work,
    )
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["verdict"] == "covariance"
    rows = np.load(work / "kept.npz")["x"].astype(np.float64)
    found = load_file(work / "c.safetensors")
    np.testing.assert_allclose(found["moment"], rows.T @ rows / len(rows), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["mean"], rows.mean(axis=0), atol=1e-12)
    for name, more in (
        ("free", ()),
        ("light", ("--anchor", "kept.npz", "--anchor-weight", "1")),
        ("rows", ("--anchor", "kept.npz", "--anchor-weight", "100")),
        ("moment", ("--covariance", "c.safetensors")),
    ):
        done = call_cli(*CALL, *more, "--ridge", "0.3", "-o", f"{name}.safetensors", cwd=work)
        assert done.returncode == 0, done
    changes = [change(work, f"{name}.safetensors") for name in ("free", "light", "rows", "moment")]
    assert changes[1] < 0.5 * changes[0]
    assert changes[2] < 0.5 * changes[1]
    assert changes[3] == pytest.approx(changes[2], rel=1e-4)  # what float32 leaves
    record = json.loads((work / "moment.safetensors.farcast.json").read_text())
    assert record["options"]["covariance"] == "c.safetensors"
    again = call_cli(
        *CALL, "--covariance", "c.safetensors", "--ridge", "0.01", "--anchor-weight", "7", "-o", "moment.safetensors", cwd=work
    )
    assert again.returncode == 5
    assert "--anchor-weight none, now 7" in again.errors[0]


def test_a_covariance_is_no_anchor_that_forbids_all(work: Path, call_cli: CallCli) -> None:
    """400 rows span all inputs: hard anchors leave nothing, and the hint says what does."""
    done = call_cli(*CALL, "--anchor", "kept.npz", "-o", "t.safetensors", cwd=work)
    assert done.returncode == 3
    assert "no input is left to tune" in done.errors[0]
    assert "--anchor-weight 100" in done.hints[0]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--anchor-weight", "3"), 2, "--anchor-weight needs --anchor or --covariance"),
        (
            ("--covariance", "narrow.npz"),
            3,
            "expected numbers of shape [12, 12], for 12 inputs of weight, found float64 of shape [4, 4]",
        ),
        (("--covariance", "wrong.npz"), 3, "found a matrix that no rows have"),
        (("--covariance", "uncentred.npz"), 3, "no array 'mean'"),
        (("--covariance", "rows.npz"), 3, "no array 'moment'"),
        (("--covariance", "c.npz", "--method", "gradient-descent", "--weight-decay", ".1"), 2, "rows that --covariance keeps"),
        (("--covariance-out", "c.safetensors"), 2, "--covariance-out takes no -o"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    work: Path, call_cli: CallCli, more: tuple[str, ...], code: int, words: str
) -> None:
    mean = np.zeros(NUM_INPUTS)
    np.savez(work / "narrow.npz", moment=np.eye(4), mean=np.zeros(4))
    np.savez(work / "wrong.npz", moment=-np.eye(NUM_INPUTS), mean=mean)
    np.savez(work / "uncentred.npz", moment=np.eye(NUM_INPUTS))
    done = call_cli(*CALL, *more, "-o", "t.safetensors", cwd=work)
    assert (done.returncode, len(done.errors)) == (code, 1), done
    assert words in done.errors[0]
    assert not (work / "t.safetensors").exists()
    assert not (work / "c.safetensors").exists()


def test_a_covariance_is_replaced_by_another_only_when_asked_and_nothing_else_is(work: Path, call_cli: CallCli) -> None:
    call = ("tune", "step_1.safetensors", "--layer", "weight", "--data", "kept.npz", "--covariance-out")
    assert call_cli(*call, "c.safetensors", cwd=work).returncode == 0
    assert call_cli(*call, "c.safetensors", cwd=work).returncode == 5
    assert call_cli(*call, "c.safetensors", "--overwrite", cwd=work).returncode == 0
    save_file({"a": np.zeros(3)}, work / "mine.safetensors")
    done = call_cli(*call, "mine.safetensors", "--overwrite", cwd=work)
    assert done.returncode == 5
    assert "is no covariance" in done.errors[0]
