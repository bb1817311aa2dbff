"""The gate of `farcast tune` at its threshold: a little below nothing is written, a little above something is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import save_file

from farcast_cli.choices import DEFAULT_GATE
from farcast_cli.tune.gate import choose, judge
from farcast_cli.tune.request import TuneRequest
from farcast_cli.tune.run import tune_checkpoint
from tests.test_tune import CALL, make_rows, make_weights, quiet

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.tune.request import TuneOutcome
    from tests.conftest import CallCli


def tune(folder: Path, *, shift: float, gate: float = DEFAULT_GATE) -> TuneOutcome:
    """Tune to a first bias that is moved by `shift`, as seen through much noise."""
    folder.mkdir(exist_ok=True)
    weights = make_weights()
    save_file(weights, folder / "step_10.safetensors", metadata={"format": "pt"})
    rows = make_rows(weights, shift=shift, noise=0.5)
    np.savez(folder / "rows.npz", x=rows.x, y=rows.y)
    (folder / "tuned.safetensors").unlink(missing_ok=True)
    (folder / "tuned.farcast.json").unlink(missing_ok=True)
    asked = TuneRequest(
        folder / "step_10.safetensors",
        ("fc.weight",),
        folder / "rows.npz",
        "mse",
        ("fc.bias",),
        ("relu",),
        "out.weight",
        "out.bias",
        gate=gate,
        output=folder / "tuned.safetensors",
    )
    return tune_checkpoint(asked, quiet)


@pytest.mark.parametrize(("shift", "lowest", "highest"), [(0.395, 2.1, 2.3), (0.4, 2.5, 2.7)])
def test_a_gain_of_between_two_and_three_standard_errors_is_refused_by_default(
    shift: float, lowest: float, highest: float, tmp_path: Path, call_cli: CallCli
) -> None:
    outcome = tune(tmp_path, shift=shift)
    assert outcome.verdict is not None
    assert lowest < outcome.verdict.z < highest
    assert outcome.verdict.after < outcome.verdict.before
    assert outcome.path is None
    assert not (tmp_path / "tuned.safetensors").exists()
    done = call_cli(*CALL, "-o", "tuned.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert not (tmp_path / "tuned.safetensors").exists()


def test_a_gain_of_a_little_more_than_three_is_written_by_default(tmp_path: Path, call_cli: CallCli) -> None:
    outcome = tune(tmp_path, shift=0.41)
    assert outcome.verdict is not None
    assert 3.02 < outcome.verdict.z < 3.2
    assert outcome.path is not None
    assert outcome.path.exists()
    assert call_cli(*CALL, "-o", "again.safetensors", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("shift", [0.4, 0.45, 0.6])
def test_the_gate_that_is_asked_for_is_the_one_that_counts(shift: float, tmp_path: Path) -> None:
    """A thousandth above what was gained, and a thousandth below."""
    known = tune(tmp_path, shift=shift, gate=1e9).verdict
    assert known is not None
    assert tune(tmp_path, shift=shift, gate=1.001 * known.z).path is None
    assert not (tmp_path / "tuned.safetensors").exists()
    assert tune(tmp_path, shift=shift, gate=0.999 * known.z).path is not None
    assert (tmp_path / "tuned.safetensors").exists()


@pytest.mark.parametrize(("z", "is_accepted"), [(2.01, False), (2.5, False), (2.99, False), (3.01, True), (4.0, True)])
def test_the_default_threshold_is_three_standard_errors(z: float, is_accepted: bool) -> None:  # noqa: FBT001
    """Gains with a mean of z standard errors, by construction."""
    noise = np.random.default_rng(0).normal(size=64)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    verdict = judge(noise + z / 8 + 10, np.full(64, 10.0), np.arange(64), threshold=DEFAULT_GATE)
    assert verdict.z == pytest.approx(z)
    assert verdict.is_accepted is is_accepted


def test_the_place_that_judges_a_fold_is_chosen_by_the_other_folds() -> None:
    """Two folds, each of which would choose another place for itself."""
    table = np.array([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 3.0, 3.0], [3.0, 3.0, 1.0, 1.0]])
    folds = np.array([0, 0, 1, 1])
    found = choose(table, folds, np.full(4, 0.25))
    assert found.place == 1
    assert found.losses.tolist() == [3.0, 3.0, 3.0, 3.0]


def test_rows_of_one_group_are_one_piece_of_evidence_and_weights_count() -> None:
    """By hand: gains 1, 1, 4 in groups a, a, b with weights 1, 1, 2."""
    verdict = judge(np.array([2.0, 2.0, 5.0]), np.ones(3), np.array([0, 0, 1]), threshold=0, shares=np.array([1.0, 1.0, 2.0]))
    assert (verdict.before, verdict.after, verdict.num_rows, verdict.num_groups) == (3.5, 1.0, 3, 2)
    spread = np.array([0.5 - 2.5 * 0.5, 2.0 - 2.5 * 0.5])
    assert verdict.z == pytest.approx(2.5 / np.sqrt(2 * (spread @ spread)))


def test_no_loss_is_accepted_whatever_the_threshold() -> None:
    verdict = judge(np.ones(40), np.full(40, 1.0) + np.linspace(0, 1, 40), np.arange(40), threshold=-100.0)
    assert verdict.z < 0
    assert not verdict.is_accepted
    assert verdict.reason.endswith("no gain")
    assert "<=" not in verdict.reason
