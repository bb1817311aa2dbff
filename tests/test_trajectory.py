"""From a folder to a trajectory: whose step is believed, what is left out and why, and what can be forecast together."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.errors import (
    FileFormatError,
    MixedRunsError,
    SnapshotError,
    StepConflictError,
    TooFewSnapshotsError,
    UnsafeFileError,
    UsageError,
)
from farcast_cli.run.alignment import align
from farcast_cli.run.steps import StepRange
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.trainers.names import find_step_in_name
from tests.conftest import STEPS, edit_loose, fit_run, loose_name, make_loose_run, make_torch_run, weights_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NAMES = {
    "stage2-ingredient3-step12000-tokens26B": 12000,
    "step-001000-2BT": 1000,
    "branch_A_9.00B_step4578.pt": 4578,
    "branch_A_9.00B_step4578": 4578,
    "checkpoint-5000-epoch-2": 5000,
    "global_step262772_universal": 262772,
    "global_step500": 500,
    "iter_0000500": 500,
    "iteration-7.pt": 7,
    "epoch=3-step=1000.ckpt": 1000,
    "epoch=3-step=1000-v1.ckpt": 1000,
    "ep1-ba500-rank0.pt": 500,
    "ckpt_10.pt": 10,
    "checkpoint-500": 500,
    "step1000": 1000,
    "STEP_20.safetensors": 20,
    "000300.safetensors": 300,
    "model_300.safetensors": 300,
    "lr1e-4_step100.pt": 100,
    "model.ckpt-1000": 1000,
    "run.step1000": 1000,
    "last": None,
    "best": None,
    "final": None,
    "last.safetensors": None,
    "model-00001-of-00004": None,
    "model-00001-of-00004.safetensors": None,
    "epoch_3": None,
    "epoch3.pt": None,
    "checkpoint-best": None,
    "timestep100.pt": None,
    "step1000-tokens4B": 1000,
    "ep0-ba500": 500,
    "model_step_1000_loss_2.31.pt": 1000,
    "ckpt_iter_2000": 2000,
    "checkpoint_1000_steps": 1000,
    "100steps.pt": 100,
    "1000.pt": 1000,
    "1000-v1.pt": 1000,
    "llama-7b-step500": 500,
    "checkpoint_1000.pth.tar": 1000,
    "tmp-checkpoint-500": 500,
    "checkpoint-500.tmp": 500,
    "step_000000000000000100": 100,
    "step20240501": 20240501,
    "global-step=7": 7,
    "checkpoint_2_1000.pt": None,  # an epoch and a step, which one cannot tell
    "step_1e5": None,
    "step1k": None,
    "5k_steps": None,
    "checkpoint-3f2a9c": None,
    "step_1234567890123456": None,
    "1714521600": None,
    "2024-05-01": None,
    "20240501.pt": None,
    "run_20240501": None,
    "model-00001-of-4.safetensors": None,
    "model_best.pth.tar": None,
    "best-checkpoint": None,
    "last-v1.ckpt": None,
    "epoch=3.ckpt": None,
    "checkpoint-epoch-2": None,
    "ep_3": None,
    "version_0": None,
    "stage_2": None,
    "llama-7b": None,
    "checkpoint-1.5": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_step_in_a_name_is_the_number_that_counts_steps(name: str) -> None:
    found = find_step_in_name(name)
    assert (int(found[1]) if found else None) == NAMES[name]


# --- ranges of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("200:400", {200, 300, 400}),
        (":300", {100, 200, 300}),
        ("700:", {700, 800}),
        ("::400", {400, 800}),
        ("300:700:200", {400, 600}),
        (":", set(STEPS)),
    ],
)
def test_a_range_of_steps_holds_both_ends_and_the_multiples_between(tmp_path: Path, text: str, inside: set[int]) -> None:
    trajectory = discover(make_loose_run(tmp_path / "run"), steps=StepRange.parse(text))
    assert set(trajectory.steps) == inside
    assert {ignored.reason for ignored in trajectory.ignored} <= {"outside --steps"}
    assert len(trajectory.ignored) == len(STEPS) - len(inside)


@pytest.mark.parametrize("text", ["5", "a:b", "1:2:3:4", "::0", "-1:5", "1.5:2", "", "1:2:x", "40:4"])
def test_a_range_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected FROM:TO:EVERY"):
        StepRange.parse(text)


def test_a_damaged_snapshot_outside_of_the_range_is_not_opened(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    (run / loose_name(100)).write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(FileFormatError, match="no safetensors header"):
        discover(run)
    assert discover(run, steps=StepRange.parse("200:")).steps == STEPS[1:]


# --- evidence for the step -------------------------------------------------------------------------------------------


def torch_snapshot(path: Path, at: int, /, **payload: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights_at(at), **payload}, path)


def adam(step: int) -> dict[str, Any]:
    state = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(2)}}
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def hf_snapshot(folder: Path, step: int, *, state: bool = True, dtype: torch.dtype = torch.float32) -> None:
    folder.mkdir(parents=True)
    save_file(weights_at(step, dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    if state:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 100}))


def test_snapshots_come_in_the_order_of_their_steps_and_not_of_their_names(tmp_path: Path) -> None:
    steps = (5, 40, 300, 1000)
    for step in steps:
        save_file(weights_at(step), tmp_path / f"step{step}.safetensors")
    trajectory = discover(tmp_path)
    assert trajectory.steps == steps
    assert [snapshot.path.name for snapshot in trajectory.snapshots] == [f"step{step}.safetensors" for step in steps]
    assert trajectory.origin.step == 1000
    assert trajectory.layout == "safetensors"


def test_every_kind_of_evidence_is_kept_in_the_order_of_trust(tmp_path: Path) -> None:
    snapshot = discover(make_torch_run(tmp_path / "run", (10, 20))).origin
    assert [(e.source, e.where, e.step) for e in snapshot.evidence] == [
        ("payload", "step", 20),
        ("adam step", "optimizer.state.*.step", 20),
        ("name", "ckpt_20.pt", 20),
    ]
    assert (snapshot.step, snapshot.step_source) == (20, "payload")


def test_the_trainers_own_counter_comes_before_the_name(tmp_path: Path) -> None:
    hf_snapshot(tmp_path / "checkpoint-500", 500)
    snapshot = discover(tmp_path).origin
    assert snapshot.layout == "huggingface-trainer"
    assert [(e.source, e.step) for e in snapshot.evidence] == [("trainer state", 500), ("name", 500)]
    assert snapshot.step_source == "trainer state"


@pytest.mark.parametrize("key", ["global_step", "step", "iteration", "iter_num", "step_count"])
def test_a_payloads_counter_tells_the_step_under_any_of_its_usual_names(tmp_path: Path, key: str) -> None:
    torch_snapshot(tmp_path / "run.pt", 70, **{key: 70})
    snapshot = discover(tmp_path).origin
    assert (snapshot.step, snapshot.step_source, snapshot.evidence[0].where) == (70, "payload", key)


def test_adams_own_count_tells_the_step_where_nothing_better_does(tmp_path: Path) -> None:
    torch_snapshot(tmp_path / "run.pt", 70, optimizer=adam(70))
    snapshot = discover(tmp_path).origin
    assert (snapshot.step, snapshot.step_source) == (70, "adam step")


@pytest.mark.parametrize("key", ["step", "ss_steps", "global_step"])
def test_metadata_tell_the_step_where_the_name_does_not(tmp_path: Path, key: str) -> None:
    save_file(weights_at(70), tmp_path / "lora.safetensors", metadata={key: "70"})
    snapshot = discover(tmp_path).origin
    assert (snapshot.step, snapshot.step_source) == (70, "metadata")


def test_a_name_and_a_counter_that_contradict_each_other_are_a_conflict_that_quotes_both(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        torch_snapshot(tmp_path / f"step_{step if step != 20 else 25}.pt", step, step=step)
    with pytest.raises(
        StepConflictError, match=r"step_25\.pt: payload \(step\) says step 20, but name \(step_25\.pt\) says 25"
    ) as caught:
        discover(tmp_path)
    assert "rename" in caught.value.hint


def test_a_trainer_state_that_contradicts_its_folder_is_a_conflict(tmp_path: Path) -> None:
    hf_snapshot(tmp_path / "checkpoint-100", 100)
    hf_snapshot(tmp_path / "checkpoint-300", 200)
    with pytest.raises(StepConflictError, match=r"checkpoint-300: .*global_step says step 200, but name .* says 300"):
        discover(tmp_path)


def test_a_second_counter_in_a_unit_of_its_own_is_fine_and_reported(tmp_path: Path) -> None:
    for index, step in enumerate((100, 200, 300, 400)):
        torch_snapshot(tmp_path / f"checkpoint_{index}.pt", step, step=step)
    trajectory = discover(tmp_path)
    assert trajectory.steps == (100, 200, 300, 400)
    assert trajectory.notes == ("checkpoint_0.pt counts in another unit: 0 at step 100",)


def test_a_range_of_steps_means_steps_where_the_names_count_something_else(tmp_path: Path) -> None:
    for index, step in enumerate((100, 200, 300, 400)):
        torch_snapshot(tmp_path / f"checkpoint_{index}.pt", step, step=step)
    assert discover(tmp_path, steps=StepRange.parse("200:300")).steps == (200, 300)


def test_a_second_counter_that_rises_unevenly_is_a_conflict(tmp_path: Path) -> None:
    for index, step in ((0, 100), (1, 200), (2, 350), (3, 400)):
        torch_snapshot(tmp_path / f"checkpoint_{index}.pt", step, step=step)
    with pytest.raises(StepConflictError, match="says step"):
        discover(tmp_path)


def test_adam_may_lag_behind_where_steps_were_skipped_but_never_fall(tmp_path: Path) -> None:
    for step, count in ((10, 10), (20, 19), (30, 29)):
        torch_snapshot(tmp_path / f"step_{step}.pt", step, step=step, optimizer=adam(count))
    assert discover(tmp_path).steps == (10, 20, 30)
    torch_snapshot(tmp_path / "step_30.pt", 30, step=30, optimizer=adam(3))
    with pytest.raises(StepConflictError, match=r"step_20\.pt|step_30\.pt"):
        discover(tmp_path)


@pytest.mark.parametrize("name", ["last", "best", "final", "other"])
def test_a_lone_snapshot_whose_step_nothing_tells_is_refused(tmp_path: Path, name: str) -> None:
    save_file(weights_at(1), tmp_path / f"{name}.safetensors")
    with pytest.raises(StepConflictError, match=rf"{name}\.safetensors: unknown step") as caught:
        discover(tmp_path)
    assert "add its step to its name" in caught.value.hint


@pytest.mark.parametrize("name", ["last", "latest", "final"])
def test_an_alias_without_a_step_beside_numbered_snapshots_is_left_out_with_a_reason(tmp_path: Path, name: str) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    save_file(weights_at(200), run / f"{name}.safetensors")
    assert discover(run).steps == (100, 200)
    assert reasons(run) == {f"{name}.safetensors": "unknown step"}


def test_any_other_snapshot_without_a_step_beside_numbered_ones_is_refused(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    save_file(weights_at(200), run / "other.safetensors")
    with pytest.raises(StepConflictError, match=r"other\.safetensors: unknown step"):
        discover(run)


def test_one_checkpoint_opened_by_itself_has_its_own_step_or_none(tmp_path: Path) -> None:
    make_loose_run(tmp_path, [300])
    assert open_snapshot(tmp_path / loose_name(300)).step == 300
    save_file(weights_at(1), tmp_path / "final.safetensors")
    assert open_snapshot(tmp_path / "final.safetensors").step == -1
    with pytest.raises(SnapshotError, match="no such file"):
        open_snapshot(tmp_path / "none.safetensors")


# --- what else lies in a folder --------------------------------------------------------------------------------------


def reasons(directory: Path) -> dict[str, str]:
    return {ignored.path.name: ignored.reason for ignored in discover(directory).ignored}


def test_a_copy_of_the_last_snapshot_is_left_out_with_a_reason(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    save_file(weights_at(200), run / "last.safetensors", metadata={"step": "200"})
    assert discover(run).steps == (100, 200)
    assert reasons(run) == {"last.safetensors": f"the same step as {loose_name(200)}"}


def test_a_link_to_a_snapshot_is_left_out_with_a_reason(tmp_path: Path) -> None:
    for step in (100, 200):
        hf_snapshot(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "best").symlink_to("checkpoint-100")
    assert discover(tmp_path).steps == (100, 200)
    assert reasons(tmp_path) == {"best": "a link to checkpoint-100"}


def test_two_numbered_snapshots_of_one_step_are_two_runs(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    save_file(weights_at(200, seed=1), run / "step_200.safetensors")
    with pytest.raises(MixedRunsError, match=r"two snapshots of step 200: step_000200\.safetensors and step_200\.safetensors"):
        discover(run)


@pytest.mark.parametrize("name", ["forecaster.safetensors", "own.safetensors", "step_000900.safetensors"])
def test_a_forecaster_among_the_snapshots_is_not_taken_for_one_whatever_its_name(tmp_path: Path, name: str) -> None:
    run = make_loose_run(tmp_path / "run")
    fit_run(run, tmp_path / "elsewhere.safetensors").rename(run / name)
    assert discover(run).steps == STEPS
    assert reasons(run) == {name: "farcast's own file"}


def test_a_snapshot_may_be_called_forecaster(tmp_path: Path) -> None:
    save_file(weights_at(100), tmp_path / "forecaster_step_100.safetensors")
    assert discover(tmp_path).steps == (100,)


def test_hidden_entries_and_others_are_no_snapshots(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    shutil.copy(run / loose_name(100), run / ".step_000300.safetensors")
    (run / ".step_000300.partial").mkdir()
    (run / "log.txt").write_text("x")
    (run / "wandb").mkdir()
    assert discover(run).steps == (100, 200)
    unknown = "no checkpoint of a known layout"
    assert reasons(run) == {"log.txt": unknown, "wandb": unknown}


def test_the_layout_of_most_snapshots_is_the_runs_and_the_others_are_left_out_with_a_reason(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    torch_snapshot(run / "step_300.pt", 300)
    trajectory = discover(run)
    assert (trajectory.layout, trajectory.steps) == ("safetensors", (100, 200))
    assert reasons(run) == {"step_300.pt": "a torch checkpoint among safetensors ones"}


def test_a_folder_that_is_itself_a_checkpoint_is_refused_with_the_folder_above(tmp_path: Path) -> None:
    hf_snapshot(tmp_path / "checkpoint-500", 500)
    with pytest.raises(
        TooFewSnapshotsError, match="expected a folder of checkpoints, found one huggingface-trainer checkpoint"
    ) as caught:
        discover(tmp_path / "checkpoint-500")
    assert caught.value.hint == f"name the folder above it: {tmp_path}"


def test_too_few_snapshots_are_counted(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    assert discover(run, minimum=2).steps == (100, 200)
    with pytest.raises(TooFewSnapshotsError, match="expected at least 1 snapshot, found 0"):
        discover(run, steps=StepRange(300))
    with pytest.raises(TooFewSnapshotsError, match="expected at least 3 snapshots, found 2"):
        discover(run, minimum=3)


# --- folders of weights ----------------------------------------------------------------------------------------------


def sharded(folder: Path, step: int, *, change: Mapping[str, Any] | None = None) -> Path:
    """Two shards and their index, as transformers writes them; `change` overrides entries of the weight map."""
    folder.mkdir(parents=True)
    weights = weights_at(step)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    places = {name: first if name.startswith("embed") else second for name in weights}
    for shard in (first, second):
        save_file({name: value for name, value in weights.items() if places[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 3712}, "weight_map": places | dict(change or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_folders_of_weights_without_a_trainer_are_snapshots_by_their_names(tmp_path: Path) -> None:
    for step in (1000, 2000):
        hf_snapshot(tmp_path / f"step{step}-tokens2B", step, state=False)
    trajectory = discover(tmp_path)
    assert (trajectory.layout, trajectory.steps) == ("weights-folder", (1000, 2000))
    assert {part.name for part in trajectory.origin.parts} == {"model.safetensors", "config.json"}


def test_tensors_in_shards_are_found_in_the_shard_that_the_index_names(tmp_path: Path) -> None:
    sharded(tmp_path / "step1000", 1000)
    snapshot = discover(tmp_path).origin
    assert snapshot.tensors.keys() == weights_at(0).keys()
    assert snapshot.tensors["embed.weight"].path.name == "model-00001-of-00002.safetensors"
    assert snapshot.tensors["norm.weight"].path.name == "model-00002-of-00002.safetensors"


def test_shards_by_themselves_are_no_snapshots(tmp_path: Path) -> None:
    (sharded(tmp_path / "step1000", 1000) / "model.safetensors.index.json").unlink()
    with pytest.raises(TooFewSnapshotsError, match="found one weights-folder checkpoint"):
        discover(tmp_path / "step1000")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_their_index_are_one_snapshot_if_all_that_their_names_count_are_there(
    tmp_path: Path, ending: str
) -> None:
    for step in (1000, 2000):
        folder = sharded(tmp_path / f"step{step}", step)
        (folder / "model.safetensors.index.json").unlink()
        for shard in folder.glob("*.safetensors") if ending == "bin" else ():
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
    (tmp_path / "step2000" / f"model-00002-of-00002.{ending}").unlink()
    found = discover(tmp_path)
    assert found.steps == (1000,)
    assert found.origin.tensors.keys() == weights_at(1000).keys()
    assert found.ignored[0].reason == f"half-written: shard model-00002-of-00002.{ending} is missing"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path / "step1000", 1000) / "model-00002-of-00002.safetensors").unlink()
    message = r"found 0; left out: step1000 \(half-written: shard model-00002-of-00002\.safetensors is missing\)"
    with pytest.raises(TooFewSnapshotsError, match=message):
        discover(tmp_path)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/outside.safetensors", "deep/x.safetensors", "..", ""])
def test_an_index_that_points_outside_of_its_folder_is_unsafe(tmp_path: Path, place: str) -> None:
    save_file(weights_at(1), tmp_path / "outside.safetensors")
    sharded(tmp_path / "run" / "step1000", 1000, change={"embed.weight": place})
    with pytest.raises(UnsafeFileError, match="lies outside the folder"):
        discover(tmp_path / "run")


def test_an_index_that_names_a_tensor_its_shard_does_not_hold_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "step1000", 1000, change={"ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(FileFormatError, match=r"tensor 'ghost' is not in model-00001-of-00002\.safetensors"):
        discover(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    shard = sharded(tmp_path / "step1000", 1000) / "model-00001-of-00002.safetensors"
    edit_loose(shard, {"extra": torch.ones(2)})
    with pytest.raises(FileFormatError, match="tensor 'extra' is in a shard but not in the index"):
        discover(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "{]}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_an_index_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    index = sharded(tmp_path / "step1000", 1000) / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin1"))
    with pytest.raises(FileFormatError, match=r"index\.json: "):
        discover(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"global_step": "5"}', '{"global_step": null}'])
def test_a_trainer_state_without_a_step_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    hf_snapshot(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"trainer_state\.json: "):
        discover(tmp_path)


# --- alignment -------------------------------------------------------------------------------------------------------


def aligned(directory: Path, **options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names that are forecast, and those that are copied with the reasons."""
    alignment = align(discover(directory).snapshots, **options)
    return [tensor.name for tensor in alignment.tensors], {copied.name: copied.reason for copied in alignment.copied}


def test_every_tensor_is_found_at_every_snapshot_under_its_own_bytes(tmp_path: Path) -> None:
    alignment = align(discover(make_loose_run(tmp_path / "run", (100, 200, 300))).snapshots)
    assert {tensor.name for tensor in alignment.tensors} == weights_at(0).keys()
    assert alignment.num_parameters == 928
    for tensor in alignment.tensors:
        for entry, step in zip(tensor.entries, (100, 200, 300), strict=True):
            raw = entry.path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
            assert torch.equal(
                torch.frombuffer(bytearray(raw), dtype=torch.float32).view(entry.shape), weights_at(step)[tensor.name]
            )


def test_tied_weights_of_a_torch_file_are_forecast_once(tmp_path: Path) -> None:
    for step in (10, 20):
        shared = torch.full((4, 2), float(step))
        model = {"embed": shared, "norm": torch.ones(2), "head": shared}
        torch.save({"model": model, "step": step}, tmp_path / f"step_{step}.pt")
    assert aligned(tmp_path) == (["embed", "norm"], {"head": "tied to embed"})


def test_the_prefixes_of_wrappers_do_not_tell_tensors_apart(tmp_path: Path) -> None:
    for step, prefix in ((10, ""), (20, "module."), (30, "_orig_mod."), (40, "module._orig_mod.")):
        model = {f"{prefix}layer.weight": torch.ones(2), f"{prefix}head.weight": torch.ones(3)}
        torch.save({"model": model, "step": step}, tmp_path / f"step_{step}.pt")
    alignment = align(discover(tmp_path).snapshots)
    assert [tensor.name for tensor in alignment.tensors] == ["module._orig_mod.layer.weight", "module._orig_mod.head.weight"]
    assert [entry.name for entry in alignment.tensors[0].entries] == [
        "layer.weight",
        "module.layer.weight",
        "_orig_mod.layer.weight",
        "module._orig_mod.layer.weight",
    ]


def test_names_that_differ_only_by_a_wrappers_prefix_are_both_accounted_for(tmp_path: Path) -> None:
    for step in (10, 20):
        model = {"layer.module.weight": torch.full((2,), float(step)), "layer.weight": torch.full((3,), float(step))}
        torch.save({"model": model, "step": step}, tmp_path / f"step_{step}.pt")
    forecast, copied = aligned(tmp_path)
    assert {*forecast, *copied} == {"layer.module.weight", "layer.weight"}


def test_names_that_are_one_when_joined_are_both_accounted_for(tmp_path: Path) -> None:
    for step in (10, 20):
        model = {"a": {"b": torch.full((2,), float(step))}, "a.b": torch.full((3,), float(step)), "c": torch.ones(1)}
        torch.save({"model": model, "step": step}, tmp_path / f"step_{step}.pt")
    with pytest.raises(SnapshotError, match=r"a\.b"):
        aligned(tmp_path)


def test_what_does_not_move_along_a_path_is_copied_with_its_reason(tmp_path: Path) -> None:
    for step in (10, 20):
        tensors = {
            "w": torch.full((4,), float(step)),
            "half": torch.full((4,), float(step), dtype=torch.bfloat16),
            "ids": torch.arange(4),
            "mask": torch.tensor([True, False]),
            "small": torch.ones(4, dtype=torch.float8_e4m3fn),
            "none": torch.empty(0, 3),
        }
        save_file(tensors, tmp_path / f"step_{step}.safetensors")
    forecast, copied = aligned(tmp_path)
    assert sorted(forecast) == ["half", "w"]
    assert copied == {
        "ids": "int64 is not forecast",
        "mask": "bool is not forecast",
        "small": "float8_e4m3fn is not forecast",
        "none": "empty",
    }


def test_a_transposed_tensor_is_forecast_and_one_with_gaps_is_copied(tmp_path: Path) -> None:
    for step in (10, 20):
        base = torch.arange(24.0) + step
        model = {"turned": base.reshape(4, 6).T, "gaps": base.clone()[::2], "spread": torch.ones(1).expand(5)}
        torch.save({"model": model, "step": step}, tmp_path / f"step_{step}.pt")
    forecast, copied = aligned(tmp_path)
    assert forecast == ["turned"]
    assert copied.keys() == {"gaps", "spread"}


def test_include_and_exclude_choose_by_globs_and_exclude_wins(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    forecast, copied = aligned(run, include=["layers.*", "embed.*"], exclude=["*.bias"])
    assert sorted(forecast) == ["embed.weight", "layers.0.weight"]
    assert copied == {"layers.0.bias": "excluded", "norm.weight": "not included"}


def test_excluding_everything_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no tensor to forecast: all 4 are copied \(excluded\)") as caught:
        aligned(make_loose_run(tmp_path / "run", (100, 200)), exclude=["*"])
    assert caught.value.hint == "change --include and --exclude"


def test_a_changed_shape_is_refused_with_both_shapes_and_the_way_out(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200, 300))
    edit_loose(run / loose_name(100), {"embed.weight": torch.ones(32, 16)})
    message = r"step_000100\S+ to step_000300\S+: tensor 'embed\.weight' changed its shape from \[32, 16\] to \[40, 16\]"
    with pytest.raises(MixedRunsError, match=message) as caught:
        aligned(run)
    assert caught.value.hint.startswith("--exclude 'embed.weight'")
    forecast, copied = aligned(run, exclude=["embed.weight"])
    assert "embed.weight" not in forecast
    assert copied == {"embed.weight": "excluded"}
    assert len(align(discover(run, steps=StepRange.parse("200:")).snapshots).tensors) == 4


@pytest.mark.parametrize("step", [100, 300])
def test_a_missing_tensor_is_refused_with_the_snapshots_that_differ(tmp_path: Path, step: int) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200, 300))
    edit_loose(run / loose_name(step), {"norm.weight": None})
    what = "appeared" if step == 100 else "vanished"
    with pytest.raises(MixedRunsError, match=rf"{loose_name(100)} to {loose_name(300)}: tensor 'norm\.weight' {what}"):
        aligned(run)


def test_only_files_that_look_like_weights_are_called_a_second_file_of_weights(tmp_path: Path) -> None:
    for step in (100, 200):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        save_file({"w": torch.full((3,), float(step))}, folder / "model.safetensors")
        for name in ("rng_state.pth", "training_args.bin", "tokenizer.json", "pytorch_model.bin", "consolidated.00.pth"):
            (folder / name).write_bytes(b"x")
    copied = align(discover(tmp_path).snapshots).copied
    assert [entry.name for entry in copied] == ["consolidated.00.pth", "pytorch_model.bin"]
    assert all("second file of weights" in entry.reason for entry in copied)
