"""Where the usual order of trust is wrong for a whole run, the evidence itself says so; one odd snapshot still stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from farcast_cli.errors import MixedRunsError, StepConflictError
from farcast_cli.run.trajectory import discover
from tests.conftest import STEPS, weights_at

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def payload(folder: Path, name: str, at: int, *, adam: int | None = None, seed: int = 0, **counters: int) -> None:
    """A torch file with the weights of a step, Adam's count and counters at its top."""
    folder.mkdir(exist_ok=True)
    whole: dict[str, Any] = {"model": weights_at(at, seed=seed), **counters}
    if adam is not None:
        whole["optimizer"] = {"state": {0: {"step": torch.tensor(float(adam))}}, "param_groups": [{"params": [0]}]}
    torch.save(whole, folder / f"{name}.pt")


def epochs_as_iterations(folder: Path, steps: Sequence[int] = STEPS) -> Path:
    for step in steps:
        payload(folder, f"G_{step}", step, adam=step, iteration=step // 130 + 1)
    return folder


def test_a_name_and_adam_that_agree_outvote_a_counter_of_something_else(tmp_path: Path) -> None:
    found = discover(epochs_as_iterations(tmp_path))
    assert found.steps == STEPS
    assert {snapshot.step_source for snapshot in found.snapshots} == {"adam step"}
    assert found.notes == ("payload (iteration) counts something else, 7 at step 800: adam step and name agree on the steps",)


def test_one_snapshot_whose_counter_is_odd_still_stops(tmp_path: Path) -> None:
    for step in STEPS:
        payload(tmp_path, f"G_{step}", step, adam=step, iteration=350 if step == 300 else step)
    with pytest.raises(StepConflictError, match="iteration says step 350"):
        discover(tmp_path)


def test_two_networks_in_a_folder_are_told_apart_though_their_counter_is_none_of_steps(tmp_path: Path) -> None:
    for step in STEPS:
        payload(epochs_as_iterations(tmp_path, (step,)), f"D_{step}", step, adam=step, seed=1, iteration=step // 130 + 1)
    with pytest.raises(MixedRunsError) as caught:
        discover(tmp_path)
    assert "--pattern 'G_*'" in caught.value.hint
    assert discover(tmp_path, pattern="G_*").steps == STEPS


def test_a_step_that_counts_within_an_epoch_gives_way_to_adams_count(tmp_path: Path) -> None:
    for step in range(100, 1300, 100):
        epoch, within = divmod(step - 1, 400)
        payload(tmp_path, f"epoch{epoch}_step{within + 1}", step, adam=step, epoch=epoch, step=within + 1)
    found = discover(tmp_path)
    assert found.steps == tuple(range(100, 1300, 100))
    assert [note.partition(" ")[0] for note in found.notes] == ["name", "payload"]
    assert all("starts anew with each epoch" in note for note in found.notes)


def test_two_runs_of_the_same_steps_are_no_epochs_though_adam_counts_on(tmp_path: Path) -> None:
    for run, begin in (("a", 0), ("b", 5000)):
        for step in (100, 200, 300):
            payload(tmp_path, f"{run}_step{step}", step, adam=begin + step, step=step)
    with pytest.raises((MixedRunsError, StepConflictError)):
        discover(tmp_path)


def test_metadata_in_every_file_come_before_names_that_lack_a_number_once(tmp_path: Path) -> None:
    for epoch in range(1, 7):
        name = f"lora-{epoch:06d}" if epoch < 6 else "lora"
        save_file(weights_at(120 * epoch), tmp_path / f"{name}.safetensors", metadata={"ss_steps": str(120 * epoch)})
    found = discover(tmp_path)
    assert found.steps == tuple(range(120, 840, 120))
    assert found.notes == ("lora-000001.safetensors counts in another unit: 1 at step 120",)


def test_a_step_in_the_json_of_the_metadata_is_evidence(tmp_path: Path) -> None:
    for step in (250, 500, 750):
        told = {"training_info": f'{{"step": {step}, "epoch": 0}}'}
        save_file(weights_at(step), tmp_path / f"my_first_lora_{'x' * (step // 250)}.safetensors", metadata=told)
    assert discover(tmp_path).steps == (250, 500, 750)
