"""`farcast tune` called twice: the same path, exit code 0, and nothing is written; anything else in its place stays and is named."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.commands.tune import tune
from farcast_cli.errors import DataError
from farcast_cli.tune.run import tune_checkpoint
from tests.conftest import tree_digest
from tests.test_repeat import stamps
from tests.test_tune import CALL, NUM_INPUTS, bytes_that_this_process_read, load_rows, quiet, request_in, save_work, tuned

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import CallCli, Done

TUNED, DELTA, ADDED = "tuned.safetensors", "delta.safetensors", "added.safetensors"
APPLY = ("tune", "step_10.safetensors", "--apply", DELTA)
FOLDER = ("tune", "checkpoint-10", *CALL[2:])


def save_anchors(path: Path, seed: int) -> None:
    np.savez(path, x=np.random.default_rng(seed).normal(size=(10, NUM_INPUTS)).astype(np.float32))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint in three layouts, and a delta file."""
    work = save_work(tmp_path_factory.mktemp("once"))
    weights = load_file(work / "step_10.safetensors")
    torch.save(weights, work / "step_10.pt")
    (work / "checkpoint-10").mkdir()
    save_file(weights, work / "checkpoint-10" / "model.safetensors", metadata={"format": "pt"})
    (work / "checkpoint-10" / "config.json").write_text("{}")
    save_anchors(work / "anchors.npz", 5)
    tuned(work)
    tuned(work, output=None, delta_out=work / DELTA)
    return work


@pytest.fixture
def work(once: Path, tmp_path: Path) -> Path:
    """A copy of that folder, with its times."""
    return shutil.copytree(once, tmp_path / "work")


def differs(call_cli: CallCli, work: Path, *call: object) -> str:
    """What the error says of an output that is there already; nothing is written."""
    before = stamps(work)
    done: Done = call_cli(*call, cwd=work)
    assert (done.returncode, done.stdout, len(done.errors)) == (5, "", 1), done
    assert stamps(work) == before
    return done.errors[0]


@pytest.mark.parametrize(
    "call",
    [
        (*CALL, "-o", "new.safetensors"),
        (*CALL, "-o", "new.safetensors", "--anchor", "anchors.npz", "--iterations", "9", "--ridge", "1e-4"),
        (*CALL, "-o", "new.safetensors", "--method", "gradient-descent", "--rate", "0.3", "--weight-decay", "1e-5"),
        ("tune", "step_10.pt", *CALL[2:], "-o", "new.pt", "--round", "stochastic", "--seed", "7"),
        (*FOLDER, "-o", "new", "--subsample", "150", "--val", "rows.npz", "--gate", "2.5"),
        (*CALL, "--lora-out", "new"),
        (*CALL, "--delta-out", "new.safetensors"),
        (*APPLY, "-o", "new.safetensors"),
    ],
)
def test_the_same_command_twice_gives_the_same_path_and_writes_nothing(
    call: tuple[str, ...], work: Path, call_cli: CallCli
) -> None:
    first = json.loads(call_cli(*call, "--json", cwd=work).stdout)
    before = stamps(work)
    done = call_cli(*call, cwd=work)
    assert (done.returncode, done.stdout) == (0, f"{first['path']}\n"), done
    assert "already there, made from the same checkpoint in the same way: nothing was written" in done.stderr
    second = json.loads(call_cli(*call, "--json", cwd=work).stdout)
    assert "existed" not in first
    assert second == first | {"existed": True, "passes": 0, "bytes_read": 0, "bytes_written": 0, "seconds": 0.0}
    assert stamps(work) == before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_the_second_call_does_not_read_the_layer(tmp_path: Path) -> None:
    """Counted by the system: a layer of 2 MB, of which a fingerprint takes a few blocks."""
    wide = {"w": torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)) / 16}
    save_file(wide, tmp_path / "step_10.safetensors", metadata={"format": "pt"})
    random = np.random.default_rng(0)
    inputs = random.normal(size=(160, 4)) @ random.normal(size=(4, 256))
    np.savez(tmp_path / "rows.npz", x=inputs, y=np.zeros((160, 2048), np.int8))
    plain: dict[str, Any] = {"biases": (), "activations": ("none",), "head": None, "head_bias": None}
    read = []
    for _ in range(3):  # the first of two that are alike also reads what is imported
        before = bytes_that_this_process_read()
        request = request_in(tmp_path, **plain)
        outcome = tune_checkpoint(replace(request, layers=("w",)), quiet)
        read.append(bytes_that_this_process_read() - before)
    assert outcome.existed
    of_rows = 2 * (tmp_path / "rows.npz").stat().st_size
    assert read[2] - of_rows < 2048 * 256 * 4 / 2 < read[0] - of_rows


@pytest.mark.parametrize("where", [("-o", "tuned.safetensors"), ("--delta-out", "d.safetensors"), ("--lora-out", "adapter")])
def test_a_head_that_was_zero_is_tuned_again_with_the_same_answer_and_can_be_replaced(
    tmp_path: Path, call_cli: CallCli, where: tuple[str, str]
) -> None:
    """Its relative change is infinite, which JSON cannot say."""
    save_file({"out.weight": torch.zeros(4, 12)}, tmp_path / "head.safetensors")
    random = np.random.default_rng(0)
    labels = random.integers(4, size=160)
    np.savez(tmp_path / "rows.npz", x=random.normal(size=(4, 12))[labels] + random.normal(size=(160, 12)), y=labels)
    call = ("tune", "head.safetensors", "--layer", "out.weight", "--data", "rows.npz", "--loss", "mse", *where)
    first = json.loads(call_cli(*call, "--json", cwd=tmp_path).stdout)
    assert first["relative_change"] == [None]
    before = stamps(tmp_path)
    done = call_cli(*call, "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    again = {"existed": True, "passes": 0, "bytes_read": 0, "bytes_written": 0, "seconds": 0.0}
    assert json.loads(done.stdout) == first | again
    assert stamps(tmp_path) == before
    done = call_cli(*call, "--gate", "2", "--overwrite", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{where[1]}\n"), done


# --- another request -------------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[tuple[str, ...], str]] = {
    "layer": (("--layer", "out.weight"), "--layer fc.weight, now out.weight"),
    "bias": (("--bias", "out.bias"), "--bias fc.bias, now out.bias"),
    "loss": (("--loss", "cross-entropy"), "--loss mse, now cross-entropy"),
    "activation": (("--activation", "tanh"), "--activation relu, now tanh"),
    "head": (("--head", "other.weight"), "--head out.weight, now other.weight"),
    "head_bias": (("--head-bias", "other.bias"), "--head-bias out.bias, now other.bias"),
    "anchor": (("--anchor", "anchors.npz"), "--anchor none, now anchors.npz (SHA-256 "),
    "anchor_weight": (("--anchor", "anchors.npz", "--anchor-weight", "3"), "--anchor-weight none, now 3"),
    "covariance": (("--covariance", "anchors.npz"), "--covariance none, now anchors.npz (SHA-256 "),
    "tune_method": (("--method", "gradient-descent"), "--method gauss-newton, now gradient-descent"),
    "iterations": (("--iterations", "30"), "--iterations none, now 30"),
    **{
        key: (
            (f"--{key.replace('_', '-')}", "0.5", "--method", "gradient-descent"),
            f"--method gauss-newton, now gradient-descent; --{key.replace('_', '-')} none, now 0.5",
        )
        for key in ("rate", "momentum", "weight_decay")
    },
    "ridge": (("--ridge", "0.5"), "--ridge none, now 0.5"),
    "val": (("--val", "rows.npz"), "--val none, now rows.npz (SHA-256 "),
    "transposed": (("--transposed",), "--transposed False, now True"),
    "gate": (("--gate", "2"), "--gate 3.0, now 2.0"),
    "subsample": (("--subsample", "150"), "--subsample none, now 150"),
    "round_": (("--round", "stochastic"), "--round nearest, now stochastic"),
    "seed": (("--seed", "1"), "--seed 0, now 1"),
}
ELSEWHERE = {"checkpoint", "data", "output", "delta_out", "lora_out", "covariance_out", "apply", "overwrite"}
"""Arguments with tests of their own."""
SAME_RESULT = {"threads", "json_", "quiet", "verbose", "config"}


def changed_call(options: tuple[str, ...]) -> tuple[str, ...]:
    """The usual call with other values of some options."""
    call = list(CALL)
    for name, value in zip(options[::2], options[1::2], strict=False):
        if name in call:
            call[call.index(name) + 1] = value
        else:
            call += [name, value]
    return (*call, *options[len(options) // 2 * 2 :])


@pytest.mark.parametrize("where", [("-o", TUNED), ("--delta-out", DELTA)])
@pytest.mark.parametrize("option", OTHER)
def test_an_option_with_another_value_is_named_with_both_values(
    option: str, where: tuple[str, ...], once: Path, call_cli: CallCli
) -> None:
    options, words = OTHER[option]
    found = differs(call_cli, once, *changed_call(options), *where)
    assert found.startswith(f"error: {where[1]}: exists already, made with {words}")


def test_every_option_of_the_command_decides_or_is_known_not_to() -> None:
    assert set(inspect.signature(tune).parameters) == {*OTHER, *ELSEWHERE, *SAME_RESULT}


def test_other_rows_under_the_same_name_are_named_with_both_digests(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    recorded = json.loads((work / f"{TUNED}.farcast.json").read_text())["data"]["sha256"]
    rows.y[0, 0] += 1
    np.savez(work / "rows.npz", x=rows.x, y=rows.y)
    found = differs(call_cli, work, *CALL, "-o", TUNED)
    assert f"made with --data rows.npz (SHA-256 {recorded[:12]}), now rows.npz (SHA-256 " in found


def test_the_same_rows_under_another_name_are_the_same(work: Path, call_cli: CallCli) -> None:
    shutil.copy(work / "rows.npz", work / "copy.npz")
    assert call_cli(*changed_call(("--data", "copy.npz")), "-o", TUNED, cwd=work).returncode == 0


def test_other_anchors_under_the_same_name_are_named(work: Path, call_cli: CallCli) -> None:
    call = (*CALL, "--anchor", "anchors.npz", "-o", "new.safetensors")
    assert call_cli(*call, cwd=work).returncode == 0
    save_anchors(work / "anchors.npz", 6)
    assert "made with --anchor anchors.npz (SHA-256 " in differs(call_cli, work, *call)


def test_another_delta_and_another_checkpoint_are_named(work: Path, call_cli: CallCli) -> None:
    assert call_cli(*APPLY, "-o", ADDED, cwd=work).returncode == 0
    assert differs(call_cli, work, *CALL, "-o", ADDED).endswith("exists already, made with --apply")
    assert differs(call_cli, work, *APPLY, "-o", TUNED).endswith("exists already, made without --apply")
    assert "--seed 0, now 1" in differs(call_cli, work, *APPLY, "--seed", "1", "-o", ADDED)
    (work / DELTA).unlink()
    tuned(work, output=None, delta_out=work / DELTA, gate=2.0)
    assert f"made with --apply {DELTA} (SHA-256 " in differs(call_cli, work, *APPLY, "-o", ADDED)
    (work / "other").mkdir()
    shutil.copy2(work / "step_10.safetensors", work / "other")
    other = ("tune", "other/step_10.safetensors", *CALL[2:], "-o", TUNED)
    assert "made from another checkpoint, step_10.safetensors" in differs(call_cli, work, *other)


# --- what is not trusted ---------------------------------------------------------------------------------------------


def edit(record: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(record.read_text())
    change(content)
    record.write_text(json.dumps(content))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "another value": (lambda output, _: flip(output), "not as farcast tune wrote it"),
    "no sidecar": (lambda _, record: record.unlink(), "not written by farcast tune"),
    "half a sidecar": (lambda _, record: os.truncate(record, 200), "not written by farcast tune"),
    "a forecast's": (lambda _, record: edit(record, lambda told: told.pop("command")), "not written by farcast tune"),
    "another version": (lambda _, record: edit(record, lambda told: told.update(farcast_version="0.1")), "made by farcast 0.1"),
    "another name": (lambda _, record: edit(record, lambda told: told.update(name="x")), "not as farcast tune wrote it"),
    "no --iterations": (lambda _, record: edit(record, lambda told: told["options"].pop("iterations")), "does not tell"),
    "no digest": (lambda _, record: edit(record, lambda told: told["data"].pop("sha256")), "does not tell"),
    "a later checkpoint": (
        lambda output, _: os.utime(output.with_name("step_10.safetensors")),
        "step_10.safetensors has changed since",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_output_that_is_not_what_its_record_says_stays(damage: str, work: Path, call_cli: CallCli) -> None:
    spoil, words = DAMAGE[damage]
    spoil(work / TUNED, work / f"{TUNED}.farcast.json")
    found = differs(call_cli, work, *CALL, "-o", TUNED)
    assert f"{TUNED}: exists already, " in found
    assert words in found


def test_a_delta_file_with_another_value_stays_and_is_not_applied(work: Path, call_cli: CallCli) -> None:
    flip(work / DELTA)
    assert "exists already, not as farcast tune wrote it" in differs(call_cli, work, *CALL, "--delta-out", DELTA)
    done = call_cli(*APPLY, "-o", ADDED, cwd=work)
    assert (done.returncode, (work / ADDED).exists()) == (4, False)
    assert "a damaged delta file: its values are not those that were written" in done.errors[0]


def test_a_delta_file_of_an_earlier_version_stays_and_can_be_applied(work: Path, call_cli: CallCli) -> None:
    from safetensors import safe_open

    with safe_open(work / DELTA, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    del metadata["sha256"], about["options"]["iterations"], about["data"]["sha256"]
    wide = {name: value.double() for name, value in load_file(work / DELTA).items()}  # which they were then
    save_file(wide, work / DELTA, metadata=metadata | {"about": json.dumps(about)})
    assert "made in a way that its record does not tell" in differs(call_cli, work, *CALL, "--delta-out", DELTA)
    assert call_cli(*APPLY, "-o", ADDED, cwd=work).returncode == 0


def test_rows_that_change_during_the_tuning_are_refused(work: Path) -> None:
    """The record must name the rows that the layer was tuned on."""
    (work / TUNED).unlink()
    (work / f"{TUNED}.farcast.json").unlink()

    def progress(phase: str, _total: int) -> Callable[[int], None]:
        if phase == "tune":
            (work / "rows.npz").write_bytes(b"another file")
        return lambda _done: None

    with pytest.raises(DataError, match=r"rows\.npz: changed during the tuning"):
        tune_checkpoint(request_in(work), progress)
    assert not {TUNED, f"{TUNED}.farcast.json"} & tree_digest(work).keys()


def test_what_tune_wrote_is_replaced_even_if_its_record_does_not_tell_all(work: Path, call_cli: CallCli) -> None:
    """As the record of an earlier version may not; what tune did not write gets no hint that says it can be replaced."""
    sidecar = work / f"{TUNED}.farcast.json"
    record = json.loads(sidecar.read_text())
    del record["gate"], record["options"]["loss"]
    sidecar.write_text(json.dumps(record))
    error = call_cli(*CALL, "-o", TUNED, cwd=work)
    assert (error.returncode, "does not tell" in error.stderr, "--overwrite replaces it" in error.stderr) == (5, True, True)
    assert call_cli(*CALL, "-o", TUNED, "--overwrite", cwd=work).returncode == 0
    assert call_cli(*CALL, "-o", TUNED, cwd=work).returncode == 0
    (work / "other.safetensors").write_bytes((work / "step_10.safetensors").read_bytes())
    error = call_cli(*CALL, "-o", "other.safetensors", "--overwrite", cwd=work)
    assert (error.returncode, "--overwrite replaces it" in error.stderr) == (5, False)


# --- --overwrite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [("-o", TUNED), ("--delta-out", DELTA), ("--lora-out", "adapter")],
)
def test_overwrite_replaces_what_tune_wrote_and_nothing_else(where: tuple[str, ...], work: Path, call_cli: CallCli) -> None:
    call = (*CALL, "--iterations", "3", *where)
    if where[1] == "adapter":
        assert call_cli(*CALL, *where, cwd=work).returncode == 0
    before = tree_digest(work)
    assert call_cli(*call, cwd=work).returncode == 5
    done = call_cli(*call, "--overwrite", cwd=work)
    assert (done.returncode, done.stdout) == (0, f"{where[1]}\n"), done
    assert tree_digest(work) != before
    place = work / where[1] / "adapter_model.safetensors" if where[1] == "adapter" else work / where[1]
    flip(place)
    before = tree_digest(work)
    assert call_cli(*call, "--overwrite", cwd=work).returncode == 5
    assert tree_digest(work) == before
