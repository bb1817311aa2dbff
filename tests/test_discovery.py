"""Real folders: several runs, copies, links, what was cut off or is being saved, and what changes while it is read."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
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
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster_file import load_fitted, newer_snapshots
from farcast_cli.prediction import predict
from farcast_cli.request import Request
from farcast_cli.run import entries, trajectory
from farcast_cli.run.steps import Findings, StepList, parse_steps
from farcast_cli.run.trajectory import discover, survey
from farcast_cli.trainers import hf_trainer
from farcast_cli.trainers.names import find_step_in_name
from tests.conftest import STEPS, fit_run, loose_name, make_loose_run, make_torch_run, tree_digest, weights_at

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.conftest import CallCli

NAMED = "{}.safetensors"


def reasons(directory: Path, pattern: str = "") -> dict[str, str]:
    return {ignored.path.name: ignored.reason for ignored in survey(directory, pattern=pattern).ignored}


def loose(directory: Path, name: str, step: int, *, seed: int = 0) -> Path:
    """A snapshot with the weights of a step under any name."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAMED.format(name)
    save_file(weights_at(step, seed=seed), path, metadata={"format": "pt"})
    return path


def hf_run(directory: Path, steps: Sequence[int] = STEPS) -> Path:
    for step in steps:
        folder = directory / f"checkpoint-{step}"
        loose(folder, "model", step)
        (folder / "config.json").write_text("{}")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def cut(path: Path, num_bytes: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


# --- names -----------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["step", "step_", "step-", "step=", "global_step", "iter_", "iteration_", "ba", "STEP_", "steps_"])
BEFORE = st.sampled_from(["", "stage2-", "llama-7b-", "branch_A_9.00B_", "epoch=3-", "ep0-", "run-2024-05-01-", "model_v2_"])
AFTER = st.sampled_from(["", "-tokens26B", "-2BT", "-epoch-2", "_universal", "_loss_2.31", "-rank0", "-v1", "-v12"])
ENDING = st.sampled_from(["", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pth.tar"])


@given(step=st.integers(0, 10**12), width=st.integers(0, 12), word=WORDS, before=BEFORE, after=AFTER, ending=ENDING)
def test_a_number_behind_a_word_for_step_is_the_step_whatever_stands_around_it(
    *, step: int, width: int, word: str, before: str, after: str, ending: str
) -> None:
    name = f"{before}{word}{step:0{width}d}{after}{ending}"
    found = find_step_in_name(name)
    assert found is not None
    assert int(found[1]) == step
    assert name[found.start(1) : found.end(1)] == found[1]


@given(number=st.integers(0, 10**6), stem=st.sampled_from(["1000", "checkpoint-1000", "last", "epoch=3", "step=5"]))
def test_the_number_of_a_version_is_never_a_step(number: int, stem: str) -> None:
    plain, found = find_step_in_name(f"{stem}.ckpt"), find_step_in_name(f"{stem}-v{number}.ckpt")
    assert (found and found[1]) == (plain and plain[1])


@example(digits="4558eababc212048c212c3166e0d7153ba67", word="")
@given(digits=st.text("0123456789abcdef", min_size=12, max_size=40), word=st.sampled_from(["", "model-", "checkpoint-"]))
def test_a_hash_is_no_step(digits: str, word: str) -> None:
    found = find_step_in_name(word + "f" + digits)
    assert found is None
    assert find_step_in_name(word + "1" + digits.replace("0", "1")) is None


# --- several runs in one folder --------------------------------------------------------------------------------------


def two_stages(directory: Path) -> Path:
    for step in STEPS:
        loose(directory, f"stage1-step{step}", step)
        loose(directory, f"stage2-step{step}", step, seed=1)
    return directory


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (("stage1-step{}", "stage2-step{}"), ("stage1-*", "stage2-*")),
        (("runA_step_{}", "runB_step_{}"), ("runA_*", "runB_*")),
        (("alpha_{}", "beta_{}"), ("alpha_*", "beta_*")),
        (("step_{}", "raw_step_{}"), ("step_*", "raw_step_*")),
        (("step{}-seedA", "step{}-seedB"), ("*[0-9]-seedA.safetensors", "*[0-9]-seedB.safetensors")),
    ],
)
def test_runs_whose_steps_collide_are_told_apart_by_their_names(
    tmp_path: Path, names: tuple[str, str], patterns: tuple[str, str]
) -> None:
    for step in STEPS:
        for seed, name in enumerate(names):
            loose(tmp_path, name.format(step), step, seed=seed)
    with pytest.raises(MixedRunsError, match=r"two snapshots of step 100: .* and two at 7 more steps") as caught:
        discover(tmp_path)
    assert all(f"{pattern!r} (8)" in str(caught.value) for pattern in patterns)
    assert f"--pattern {max(patterns)!r}" in caught.value.hint
    for name, pattern in zip(names, patterns, strict=True):
        found = discover(tmp_path, pattern=pattern)
        assert found.steps == STEPS
        assert {s.path.stem for s in found.snapshots} == {name.format(step) for step in STEPS}
        assert {ignored.reason for ignored in found.ignored} == {"does not match --pattern"}


def test_the_hint_of_colliding_steps_is_a_command_that_works(tmp_path: Path, call_cli: CallCli) -> None:
    two_stages(tmp_path / "run")
    refused = call_cli("fit", "run", cwd=tmp_path)
    assert refused.returncode == 3
    assert "--pattern 'stage2-*'" in refused.hints[0]
    done = call_cli("fit", "run", "--pattern", "stage2-*", cwd=tmp_path)
    assert done.returncode == 0
    assert "8 entries left out (farcast inspect run lists them)" in done.stderr
    assert [record.path for record in load_fitted(tmp_path / "forecaster.safetensors").provenance.snapshots] == [
        f"stage2-step{step}.safetensors" for step in STEPS
    ]
    shown = call_cli("inspect", "run", "--json", cwd=tmp_path, env={"FARCAST_PATTERN": "stage1-*"})
    assert {entry["path"] for entry in json.loads(shown.stdout)["ignored"]} == {
        f"run/stage2-step{step}.safetensors" for step in STEPS
    }


def test_backtest_reads_the_run_that_the_pattern_names(tmp_path: Path, call_cli: CallCli) -> None:
    two_stages(tmp_path / "run")
    assert call_cli("backtest", "run", "--horizon", 100, cwd=tmp_path).returncode == 3
    assert call_cli("backtest", "run", "--horizon", 100, "--pattern", "stage1-*", cwd=tmp_path).returncode == 0


def test_a_pattern_that_nothing_matches_is_named(tmp_path: Path) -> None:
    with pytest.raises(TooFewSnapshotsError, match=r"no snapshots found that match --pattern 'stage3-\*'"):
        discover(two_stages(tmp_path), pattern="stage3-*")


def test_stages_that_continue_each_other_are_one_trajectory(tmp_path: Path) -> None:
    for step in STEPS:
        loose(tmp_path, f"stage{1 if step < 500 else 2}-step{step}", step)
    assert discover(tmp_path).steps == STEPS


def test_newer_snapshots_are_those_of_the_fitted_run_only(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run")
    fitted = fit(discover(run, pattern="stage1-*"), num_samples=None)
    loose(run, "stage1-step900", 900)
    loose(run, "stage2-step950", 950)
    (run / "stage1-step990.safetensors.tmp").write_bytes(b"x")
    (run / "stage1-step999.json").write_text("{}")
    assert newer_snapshots(fitted) == ["stage1-step900.safetensors"]


# --- steps from a list -----------------------------------------------------------------------------------------------


def test_a_list_takes_exactly_its_steps_and_names_those_that_are_missing(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    assert discover(run, steps=parse_steps("200,300,800")).steps == (200, 300, 800)
    with pytest.raises(TooFewSnapshotsError, match="no snapshot of step 250, 900, which --steps lists"):
        discover(run, steps=parse_steps("200,250,900"))


@pytest.mark.parametrize("text", ["100,", ",", "1,a", "200,100", "100,100", "1:2,3", "-1,2", f"1,{10**16}"])
def test_a_list_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_steps(text)


def unnumbered(directory: Path, names: str, *, steps: Sequence[int] = STEPS) -> Path:
    """Snapshots whose names tell nothing, saved one minute after another."""
    for index, (name, step) in enumerate(zip(names, steps, strict=False)):
        path = loose(directory, name, step)
        os.utime(path, (1_000_000 + 60 * index, 1_000_000 + 60 * index))
    return directory


def test_where_nothing_tells_the_steps_a_list_gives_them_in_the_order_of_saving(tmp_path: Path) -> None:
    run = unnumbered(tmp_path / "run", "hgfedcba")
    with pytest.raises(StepConflictError, match=r"steps of its 8 snapshots; .* h\.safetensors, g\.safetensors, f") as caught:
        discover(run)
    assert "--steps S1,S2,...,S8 (8 numbers) assigns" in caught.value.hint
    with pytest.raises(StepConflictError, match="--steps lists 3 for 8 snapshots") as few:
        discover(run, steps=StepList((100, 200, 300)))
    assert "give one number for each: --steps S1,S2,...,S8 (8 numbers)" in few.value.hint
    found = discover(run, steps=StepList(STEPS))
    assert [(s.step, s.path.stem, s.step_source) for s in found.snapshots] == [
        (step, name, "order") for step, name in zip(STEPS, "hgfedcba", strict=True)
    ]
    assert found.notes[0].startswith("steps as --steps lists them, oldest file first: h.")


def test_steps_from_a_list_are_forecast_from_as_any_others(tmp_path: Path) -> None:
    run = unnumbered(tmp_path / "run", "hgfedcba")
    request = Request((100,), even_if_worse=True, method="persistence", output=str(tmp_path / "out.safetensors"))
    (outcome,) = predict(fit(discover(run, steps=StepList(STEPS)), num_samples=None), request, lambda _p, _t: lambda _d: None)
    assert (outcome.origin_step, outcome.valid_step) == (800, 900)
    written, origin = load_file(tmp_path / "out.safetensors"), load_file(run / "a.safetensors")
    assert all((written[name] == origin[name]).all() for name in origin)


def test_inspect_ends_with_the_command_that_fits_what_it_showed(tmp_path: Path, call_cli: CallCli) -> None:
    unnumbered(tmp_path / "run 1", "hgfedcba")
    shown = call_cli("inspect", "run 1", "--steps", ",".join(map(str, STEPS)), "--pattern", "?.*", cwd=tmp_path)
    command = shlex.split(shown.stdout.splitlines()[-1].removeprefix("next: farcast "))
    assert call_cli(*command, cwd=tmp_path).returncode == 0
    assert load_fitted(tmp_path / "forecaster.safetensors").steps == STEPS


def epochs_in_another_order_of_saving(directory: Path, in_file: Callable[[int], dict[str, int]]) -> Path:
    """Ten epochs in names (and files) whose times of change swap the last two."""
    directory.mkdir()
    for epoch in range(1, 11):
        path = directory / f"model_epoch_{epoch}.pth"
        torch.save({"state_dict": weights_at(100 * epoch), **in_file(epoch)}, path)
        os.utime(path, (1e9 + 60 * {9: 10, 10: 9}.get(epoch, epoch),) * 2)
    return directory


TENS = tuple(range(100, 1100, 100))


@pytest.mark.parametrize("in_file", [lambda _: {}, lambda epoch: {"epoch": epoch}, lambda epoch: {"epoch": epoch - 1}])
def test_a_list_of_steps_goes_by_the_epochs_and_not_by_the_times_of_copies(
    tmp_path: Path, in_file: Callable[[int], dict[str, int]]
) -> None:
    run = epochs_in_another_order_of_saving(tmp_path / "run", in_file)
    with pytest.raises(StepConflictError, match=r"first epoch first they are model_epoch_1\.pth, model_epoch_2\.pth"):
        discover(run)
    found = discover(run, steps=StepList(TENS))
    assert [snapshot.path.stem for snapshot in found.snapshots] == [f"model_epoch_{epoch}" for epoch in range(1, 11)]
    assert found.snapshots[0].evidence[0].where == "--steps, first epoch first"


def test_epochs_in_names_and_files_that_contradict_leave_the_times_of_change(tmp_path: Path) -> None:
    run = epochs_in_another_order_of_saving(tmp_path / "run", lambda epoch: {"epoch": 20 - epoch})
    assert discover(run, steps=StepList(TENS)).origin.path.stem == "model_epoch_9"


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("my_first_lora_v1_{:09d}", "my_first_lora_v1"),
        ("model{:06d}", "model_final"),
        ("ema_0.9999_{:06d}", "last"),
        ("a.b-c{}", "a.b-c"),
    ],
)
def test_the_one_number_that_differs_between_names_is_the_step(tmp_path: Path, name: str, last: str) -> None:
    for step in STEPS:
        loose(tmp_path, name.format(step), step)
    loose(tmp_path, last, 900)
    assert discover(tmp_path).steps == STEPS
    assert reasons(tmp_path) == {f"{last}.safetensors": "unknown step"}


@pytest.mark.parametrize("name", ["efficientdet-d0_{epoch}_{step}", "net_{step}_{epoch}", "a-epoch{epoch:02d}-{step}"])
def test_of_two_numbers_in_names_the_one_that_rises_each_time_is_the_step(tmp_path: Path, name: str) -> None:
    for step in reversed(STEPS):  # so that their times tell another order
        loose(tmp_path, name.format(epoch=step // 300, step=step), step)
    found = discover(tmp_path)
    assert found.steps == STEPS
    assert {snapshot.step_source for snapshot in found.snapshots} == {"name"}


@pytest.mark.parametrize(
    "name",
    [
        "x_{part}_{step}",
        "x_fold{epoch}_{step}",
        "x_{restarted}_{step}",
        "x_{epoch}_{again}",
        "x-{epoch}.{step}",
        "x_{day}_{step}",
    ],
)
def test_two_numbers_that_do_not_rise_as_step_and_epoch_tell_no_steps(tmp_path: Path, name: str) -> None:
    for step in STEPS:
        odd = {"part": step // 100, "restarted": (step // 300) % 2, "again": step % 300, "day": 20240101 + step // 300}
        loose(tmp_path, name.format(epoch=step // 300, step=step, **odd), step)
    with pytest.raises((StepConflictError, TooFewSnapshotsError)):
        discover(tmp_path)


@pytest.mark.parametrize(
    "name", ["x_y_seed{}", "a_0.{}", "b_c_{}k", "2024-05-{}", "q-{}-of-900", "my_run_epoch_{}", "u_v_1e{}"]
)
def test_a_number_that_counts_something_else_is_no_step(tmp_path: Path, name: str) -> None:
    for step in STEPS:
        loose(tmp_path, name.format(step // 100 + 10), step)
    with pytest.raises((StepConflictError, TooFewSnapshotsError)):
        discover(tmp_path)


def test_two_kinds_of_names_with_numbers_get_the_hint_of_a_pattern(tmp_path: Path) -> None:
    for step in STEPS:
        loose(tmp_path, f"model{step:06d}", step)
        loose(tmp_path, f"critic{step:06d}", step, seed=1)
    with pytest.raises(MixedRunsError) as caught:
        discover(tmp_path)
    assert "--pattern 'model*'" in caught.value.hint
    assert discover(tmp_path, pattern="model*").steps == STEPS


def test_a_list_of_another_length_gives_no_steps(tmp_path: Path) -> None:
    with pytest.raises(StepConflictError, match="--steps lists 3 for 4 snapshots: d"):
        discover(unnumbered(tmp_path, "dcba"), steps=StepList((1, 2, 3)))


def test_snapshots_that_were_saved_at_the_same_time_get_no_steps_from_a_list(tmp_path: Path) -> None:
    for path in unnumbered(tmp_path, "abc").iterdir():
        os.utime(path, (5, 5))
    with pytest.raises(StepConflictError, match="saved at the same time"):
        discover(tmp_path, steps=StepList((1, 2, 3)))


def test_a_best_without_evidence_is_left_out_where_the_list_is_as_long_as_the_others(tmp_path: Path) -> None:
    unnumbered(tmp_path, ("a", "best", "b"))  # type: ignore[arg-type]
    assert [s.path.stem for s in discover(tmp_path, steps=StepList((10, 20))).snapshots] == ["a", "b"]
    with pytest.raises(StepConflictError, match="--steps lists 3 for 2 snapshots"):
        discover(tmp_path, steps=StepList((10, 15, 20)))


OF_OTHERS = ("swa_model", "ckpt-avg-last5", "step_450_ema", "model.mean", "soup3", "best-step=350", "merged", "avg10")


@pytest.mark.parametrize("name", OF_OTHERS)
def test_what_was_made_of_other_snapshots_is_no_step_of_the_run(tmp_path: Path, name: str) -> None:
    make_loose_run(tmp_path, (100, 200, 300))
    loose(tmp_path, name, 250)
    assert discover(tmp_path).steps == (100, 200, 300)
    assert list(reasons(tmp_path)) == [f"{name}.safetensors"]
    assert "made of other snapshots" in reasons(tmp_path)[f"{name}.safetensors"]


@pytest.mark.parametrize("name", ["meanflow_step_{}", "bestiary-{}", "atop-{}"])
def test_a_word_that_only_contains_such_a_word_is_none(tmp_path: Path, name: str) -> None:
    for step in (100, 200):
        loose(tmp_path, f"step_{step}", step)
    loose(tmp_path, name.format(300), 300)
    assert discover(tmp_path).steps == (100, 200, 300)


@pytest.mark.parametrize("pattern", ["", "ema_*"])
def test_averages_are_the_run_where_they_are_all_that_there_is(tmp_path: Path, pattern: str) -> None:
    for step in (100, 200, 300):
        loose(tmp_path, f"ema_{step}", step)
        if pattern:
            loose(tmp_path, f"model_{step}", step, seed=1)
    loose(tmp_path, "last", 300)
    assert {s.path.name[:3] for s in discover(tmp_path, pattern=pattern).snapshots} == {"ema"}


# --- copies and links ------------------------------------------------------------------------------------------------


def test_a_link_to_a_sibling_is_left_out_under_any_name(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", (100, 200))
    for name, target in (("last", loose_name(200)), ("step_300", loose_name(200)), ("best", "last.safetensors")):
        (run / NAMED.format(name)).symlink_to(target)
    assert discover(run).steps == (100, 200)
    assert set(reasons(run).values()) == {f"a link to {loose_name(200)}"}
    assert len(reasons(run)) == 3


def test_a_second_link_to_the_same_place_elsewhere_is_left_out(tmp_path: Path) -> None:
    disk = make_loose_run(tmp_path / "disk", (100, 200))
    (tmp_path / "run").mkdir()
    for name, step in (("step_100", 100), ("step_200", 200), ("last", 200)):
        (tmp_path / "run" / NAMED.format(name)).symlink_to(disk / loose_name(step))
    assert discover(tmp_path / "run").steps == (100, 200)
    assert reasons(tmp_path / "run") == {"last.safetensors": "a link to step_200.safetensors"}


def test_links_that_choose_among_the_others_are_the_run_where_the_pattern_says_so(tmp_path: Path) -> None:
    run = two_stages(tmp_path)
    for step in STEPS:
        (run / f"ckpt-{step}.safetensors").symlink_to(f"stage{1 if step < 500 else 2}-step{step}.safetensors")
    assert discover(run, pattern="ckpt-*").steps == STEPS


def test_a_second_file_with_the_same_weights_is_left_out_whatever_its_number(tmp_path: Path) -> None:
    for step in (100, 200):
        loose(tmp_path, f"epoch=1-step={step}", step)
    loose(tmp_path, "epoch=1-step=200-v1", 200)
    assert discover(tmp_path).steps == (100, 200)
    assert reasons(tmp_path) == {"epoch=1-step=200-v1.safetensors": "the same step and weights as epoch=1-step=200.safetensors"}


def test_of_two_versions_with_different_weights_the_later_is_the_runs(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        loose(tmp_path, f"epoch=1-step={step}", step)
    for version in (1, 2, 10):
        loose(tmp_path, f"epoch=1-step=300-v{version}", 300 + version)
    found = discover(tmp_path)
    assert found.origin.path.name == "epoch=1-step=300-v10.safetensors"
    assert reasons(tmp_path)["epoch=1-step=300.safetensors"].startswith("the same step as epoch=1-step=300-v1.safetensors")
    assert "-v10" in reasons(tmp_path)["epoch=1-step=300-v2.safetensors"]


def test_a_later_version_of_the_early_steps_only_is_a_second_run(tmp_path: Path) -> None:
    for step in STEPS:
        loose(tmp_path, f"epoch=1-step={step}", step)
    for step in STEPS[:4]:
        loose(tmp_path, f"epoch=1-step={step}-v1", step, seed=1)
    with pytest.raises(
        MixedRunsError, match=r"two runs: epoch=1-step=400-v1\.safetensors was saved after epoch=1-step=500\.safet"
    ) as caught:
        discover(tmp_path)
    assert "--pattern '*-v1.*'" in caught.value.hint
    assert discover(tmp_path, pattern="*-v1.*").steps == STEPS[:4]


def saved_in_order(directory: Path, steps: Sequence[int], *, name: str = "step_{:04d}", apart: float = 60) -> Path:
    """Snapshots that were saved in this order, so many seconds apart."""
    for index, step in enumerate(steps):
        os.utime(loose(directory, name.format(step), step), (1e9 + apart * index,) * 2)
    return directory


@pytest.mark.parametrize(
    ("earlier", "later", "hint"),
    [
        ((900, 1000, 1100), (200, 300, 400), "--steps :400 reads the later run, --steps 900: the earlier one"),
        ((100, 200, 300), (50, 150, 250), "--steps 50,150,250 reads the later run, --steps 100,200,300 the earlier one"),
        ((100, 200, 300, 400), (220, 280), "--steps 220:280 reads the later run, --steps 100,200,300,400 the earlier one"),
    ],
)
def test_a_run_that_began_again_in_its_folder_is_told_by_the_order_of_saving(
    tmp_path: Path, earlier: tuple[int, ...], later: tuple[int, ...], hint: str
) -> None:
    run = saved_in_order(tmp_path, (*earlier, *later))
    message = rf"step_{later[0]:04d}\.safetensors was saved after step_{earlier[-1]:04d}\.safetensors"
    with pytest.raises(MixedRunsError, match=message) as caught:
        discover(run)
    assert caught.value.hint.startswith(hint)
    words = hint.split()
    assert discover(run, steps=parse_steps(words[1])).steps == later
    assert discover(run, steps=parse_steps(words[7])).steps == earlier
    whole = discover(run, steps=parse_steps(f"{min(*earlier, *later)}:{max(*earlier, *later)}"))
    assert whole.steps == tuple(sorted((*earlier, *later)))
    assert "was saved after" in whole.notes[-1]


@pytest.mark.parametrize(
    ("order", "name", "apart"),
    [
        ((100, 1000, 1100, 200, 300, 400), "step_{}", 60),  # the order of the names
        ((300, 400, 500, 100, 200), "step_{}", 0.01),  # all at once
        ((300, 400, 500, 100, 200), "step_{}", 0),
        ((300, 100, 500, 200, 400), "step_{}", 60),  # any order
        ((100, 200, 400, 500, 300), "step_{}", 60),  # one that was saved again
    ],
)
def test_the_times_of_copies_make_no_second_run(tmp_path: Path, order: tuple[int, ...], name: str, apart: float) -> None:
    assert discover(saved_in_order(tmp_path, order, name=name, apart=apart)).steps == tuple(sorted(order))


class Regression(lightning.LightningModule):
    """A linear model on random data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lightning_run(directory: Path, *, steps: int, seed: int, savers: Sequence[dict[str, Any]] = ({},)) -> Path:
    """A snapshot every second step from the real trainer; `savers` are the options of each callback that saves."""
    save: dict[str, Any] = {"dirpath": directory, "every_n_train_steps": 2, "save_top_k": -1}
    callbacks: list[Any] = [ModelCheckpoint(**save, **extra) for extra in savers]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        trainer = lightning.Trainer(max_steps=steps, callbacks=callbacks, default_root_dir=directory.parent, **quiet)
        trainer.fit(Regression(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 4))))
    return directory


def test_what_two_callbacks_of_lightning_save_at_one_step_is_one_snapshot(tmp_path: Path) -> None:
    run = lightning_run(tmp_path / "run", steps=16, seed=0, savers=[{"save_last": "link"}, {"mode": "max"}])
    assert discover(run).steps == tuple(range(2, 18, 2))
    told = reasons(run)
    assert told.pop("last.ckpt") == "a link to epoch=0-step=16.ckpt"
    assert told == {
        f"epoch=0-step={step}-v1.ckpt": f"the same step and weights as epoch=0-step={step}.ckpt" for step in range(2, 18, 2)
    }


def test_a_second_run_of_lightning_in_the_same_folder_is_told_from_the_first(tmp_path: Path) -> None:
    run = lightning_run(tmp_path / "run", steps=16, seed=0)
    lightning_run(run, steps=12, seed=1)
    with pytest.raises(MixedRunsError, match=r"two runs: epoch=0-step=12-v1\.ckpt was saved after") as caught:
        discover(run)
    assert "--pattern '*-v1.*'" in caught.value.hint
    assert discover(run, pattern="*-v1.*").steps == tuple(range(2, 14, 2))
    lightning_run(run, steps=16, seed=2)
    latest = [f"epoch=0-step={step}-v{2 if step < 14 else 1}.ckpt" for step in range(2, 18, 2)]
    assert [snapshot.path.name for snapshot in discover(run).snapshots] == latest


# --- half-written snapshots ------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_is_left_out_with_a_caution_and_the_rest_is_fitted(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    cut(run / loose_name(400))
    done = call_cli("fit", "run", cwd=tmp_path)
    assert done.returncode == 0
    assert f"caution: {loose_name(400)} left out: half-written: expected " in done.stderr
    assert load_fitted(tmp_path / "forecaster.safetensors").steps == (100, 200, 300, 500, 600, 700, 800)
    assert "caution" not in call_cli("fit", "run", "-q", cwd=tmp_path).stderr
    shown = call_cli("inspect", "run", cwd=tmp_path).stdout
    assert f"left out: {loose_name(400)} (half-written: expected " in shown


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("damage", [cut, emptied, zeroed, header_only])
def test_a_newest_snapshot_that_is_still_being_saved_leaves_the_one_before_as_the_origin(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = make_loose_run(tmp_path / "run")
    damage(run / loose_name(800))
    found = discover(run)
    assert found.steps == STEPS[:-1]
    assert [ignored.path.name for ignored in found.half_written] == [loose_name(800)]


@pytest.mark.parametrize("damage", [cut, emptied, zeroed])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_snapshot_whose_state_was_cut_off_is_left_out_with_a_caution(
    tmp_path: Path, name: str, damage: Callable[[Path], None], call_cli: CallCli
) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        make_loose_run(folder, (step,))
        (folder / loose_name(step)).rename(folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": {}, "param_groups": [], "noise": torch.randn(100)}, folder / file)
    damage(tmp_path / "run" / "checkpoint-800" / name)
    done = call_cli("fit", "run", cwd=tmp_path)
    assert done.returncode == 0
    assert f"caution: checkpoint-800 left out: half-written: {name}: " in done.stderr
    assert load_fitted(tmp_path / "forecaster.safetensors").steps == STEPS[:-1]
    assert f"left out: checkpoint-800 (half-written: {name}: " in call_cli("inspect", "run", cwd=tmp_path).stdout
    assert call_cli("predict", "--horizon", "100", "--even-if-worse", cwd=tmp_path).returncode == 0


def test_damage_that_is_no_half_written_file_still_stops(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    with (run / loose_name(400)).open("ab") as file:
        file.write(b"x")
    done = call_cli("fit", "run", cwd=tmp_path)
    assert done.returncode == 4
    assert loose_name(400) in done.errors[0]


def test_too_few_whole_snapshots_name_those_that_are_not(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    for step in STEPS:
        cut(run / loose_name(step))
    with pytest.raises(TooFewSnapshotsError, match=rf"found 0; left out: {loose_name(100)} \(half-written: .* and 4 more$"):
        discover(run)


@pytest.mark.parametrize("damage", [cut, emptied, header_only])
def test_a_torch_file_without_its_end_is_left_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = make_torch_run(tmp_path)
    damage(run / "ckpt_50.pt")
    found = discover(run)
    assert found.steps == (10, 20, 30, 40, 60, 70, 80)
    assert [ignored.path.name for ignored in found.half_written] == ["ckpt_50.pt"]


def test_a_snapshot_that_is_rotated_away_while_the_folder_is_read_is_left_out(tmp_path: Path) -> None:
    run, findings = hf_run(tmp_path), Findings()
    candidates = entries.candidates_in(run, "", None, findings)
    shutil.rmtree(run / "checkpoint-100")
    snapshots = trajectory._read_all(candidates, hf_trainer.LAYOUT, None, findings)
    assert [snapshot.path.name for snapshot in snapshots] == [f"checkpoint-{step}" for step in STEPS[1:]]
    assert [ignored.reason for ignored in findings.ignored] == ["removed while the folder was read"]


@pytest.mark.parametrize("content", ["", '{"global_step": 4', "\0" * 40])
def test_a_trainer_state_that_ends_early_makes_its_snapshot_half_written(tmp_path: Path, content: str) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-800" / "trainer_state.json").write_text(content)
    found = discover(run)
    assert found.steps == STEPS[:-1]
    assert "trainer_state.json: ends before its JSON does" in found.half_written[0].reason


def test_a_snapshot_without_the_trainers_state_among_ones_that_have_it_is_half_written(tmp_path: Path) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-800" / "trainer_state.json").unlink()
    loose(run / "final_model", "model", 800)
    found = discover(run)
    assert found.steps == STEPS[:-1]
    assert [(i.path.name, i.reason) for i in found.half_written] == [
        ("checkpoint-800", "half-written: no trainer_state.json, which the others have")
    ]
    assert reasons(run)["final_model"] == "a weights-folder checkpoint among huggingface-trainer ones"


def test_a_folder_named_like_the_snapshots_but_without_weights_is_half_written(tmp_path: Path) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-9000").mkdir()
    (run / "checkpoint-900-samples").mkdir()
    (run / "runs").mkdir()
    assert [i.path.name for i in discover(run).half_written] == ["checkpoint-9000"]
    assert discover(run, steps=parse_steps(":800")).half_written == ()
    unknown = "no checkpoint of a known layout"
    assert (reasons(run)["runs"], reasons(run)["checkpoint-900-samples"]) == (unknown, unknown)


@pytest.mark.parametrize(
    "name", ["tmp-checkpoint-900", "checkpoint-900.tmp", "checkpoint-900.partial", "checkpoint-900.incomplete"]
)
def test_a_temporary_name_is_never_opened_and_told(tmp_path: Path, name: str) -> None:
    run = hf_run(tmp_path)
    shutil.copytree(run / "checkpoint-800", run / name)
    (run / name / "model.safetensors").write_bytes(b"<!DOCTYPE html>")
    found = discover(run)
    assert found.steps == STEPS
    assert [(i.path.name, i.reason) for i in found.half_written] == [
        (name, "a temporary name: still being saved, or interrupted")
    ]


# --- files that change while they are read ---------------------------------------------------------------------------


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    """By a file of the same size and time, as an atomic save does."""
    found = path.stat()
    other = path.with_name(".new")
    shutil.copy(path, other)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.rename(path)


def removed(path: Path) -> None:
    path.unlink()


CHANGES = [appended, touched, replaced, removed]


@pytest.mark.parametrize("change", CHANGES)
def test_fit_notices_that_a_snapshot_changed_while_it_was_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    run = make_loose_run(tmp_path / "run")
    done: list[int] = []

    def progress(num_bytes: int) -> None:
        if not done:
            change(run / loose_name(300))
        done.append(num_bytes)

    with pytest.raises(SnapshotError, match=rf"{loose_name(300)}: changed while it was read"):
        fit(discover(run), num_samples=None, progress=progress)
    assert done


@pytest.mark.parametrize("change", CHANGES)
def test_predict_publishes_nothing_where_the_origin_changed_while_it_was_read(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = make_loose_run(tmp_path / "run")
    fitted = load_fitted(fit_run(run, tmp_path / "forecaster.safetensors"))
    done: list[int] = []

    def progress(num_bytes: int) -> None:
        if not done:
            change(run / loose_name(800))
        done.append(num_bytes)

    request = Request((100,), even_if_worse=True, output=str(tmp_path / "out" / "leap.safetensors"))
    with pytest.raises(SnapshotError, match=rf"{loose_name(800)}: changed while it was read"):
        predict(fitted, request, lambda _phase, _total: progress)
    assert done
    assert not (tmp_path / "out").exists()


def test_predict_publishes_nothing_where_an_older_snapshot_changed_while_it_was_read(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run")
    fitted = load_fitted(fit_run(run, tmp_path / "forecaster.safetensors"))
    request = Request((100,), even_if_worse=True, output=str(tmp_path / "out" / "leap.safetensors"))

    def progress(_: int) -> None:
        for step in STEPS[:-1]:
            touched(run / loose_name(step))

    with pytest.raises(SnapshotError, match="changed while it was read"):
        predict(fitted, request, lambda _phase, _total: progress)
    assert not (tmp_path / "out").exists()


def test_a_log_that_grows_in_an_older_snapshot_is_no_change_and_in_the_origin_it_is(tmp_path: Path) -> None:
    run = hf_run(tmp_path / "run")
    for step in STEPS:
        (run / f"checkpoint-{step}" / "log.txt").write_text("x")
    fitted = fit(discover(run), num_samples=None, progress=lambda _: appended(run / "checkpoint-800" / "log.txt"))

    def forecast(*growing: int) -> None:
        def progress(_done: int) -> None:
            for step in growing:
                appended(run / f"checkpoint-{step}" / "log.txt")

        request = Request((100,), even_if_worse=True, output=str(tmp_path / f"out-{growing[0]}"))
        predict(fitted, request, lambda _phase, _total: progress)

    forecast(*STEPS[:-1])
    with pytest.raises(SnapshotError, match=r"log\.txt: changed while it was read"):
        forecast(800)


# --- links inside a snapshot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "deep/secret"])
def test_a_link_out_of_the_runs_folder_is_refused(tmp_path: Path, call_cli: CallCli, name: str) -> None:
    secret = loose(tmp_path / "home", "id_rsa", 800)
    run = hf_run(tmp_path / "run")
    link = run / "checkpoint-800" / name
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    with pytest.raises(UnsafeFileError, match=rf"{name}: a link to .*id_rsa.*, outside the run's folder"):
        discover(run)
    assert call_cli("fit", run, cwd=tmp_path).returncode == 4


def test_a_link_to_a_folder_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    run = hf_run(tmp_path / "run")
    (run / "checkpoint-100" / "extra").symlink_to(tmp_path / "home")
    with pytest.raises(UnsafeFileError, match=r"extra: a link to .*, outside the run's folder"):
        discover(run)


def test_a_link_that_is_put_in_place_after_the_fit_is_refused_by_predict(tmp_path: Path, call_cli: CallCli) -> None:
    run = hf_run(tmp_path / "run")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    (tmp_path / "secret").write_text("secret")
    (run / "checkpoint-800" / "notes.txt").symlink_to(tmp_path / "secret")
    done = call_cli("predict", "--horizon", 100, "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 4
    assert not (tmp_path / "forecasts").exists()


def test_a_link_within_the_run_is_followed_and_its_content_is_copied(tmp_path: Path) -> None:
    run = hf_run(tmp_path / "run")
    (run / "shared").mkdir()
    (run / "shared" / "vocab.txt").write_text("a b c")
    for step in STEPS:
        (run / f"checkpoint-{step}" / "tokenizer").symlink_to("../shared")
    request = Request((100,), even_if_worse=True, output=str(tmp_path / "out"))
    predict(fit(discover(run), num_samples=None), request, lambda _phase, _total: lambda _done: None)
    assert tree_digest(tmp_path / "out").keys() >= {"tokenizer", "tokenizer/vocab.txt"}
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a b c"
    assert not (tmp_path / "out" / "tokenizer").is_symlink()


def test_snapshots_that_are_links_to_another_disk_work(tmp_path: Path) -> None:
    disk, run = hf_run(tmp_path / "disk"), tmp_path / "run"
    run.mkdir()
    for step in STEPS:
        (run / f"checkpoint-{step}").symlink_to(disk / f"checkpoint-{step}")
    assert discover(run).steps == STEPS
    (disk / "checkpoint-100" / "notes.txt").symlink_to("../checkpoint-200/config.json")
    with pytest.raises(UnsafeFileError, match="outside the run's folder"):
        discover(run)


def hub_cache(directory: Path) -> Path:
    """A repository as huggingface_hub keeps it, one revision per snapshot; the folder of the revisions."""
    repo = directory / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    for step in STEPS:
        revision = repo / "snapshots" / f"step{step}"
        revision.mkdir(parents=True)
        loose(repo / "blobs", str(step), step).rename(repo / "blobs" / f"{step:040x}")
        (revision / "model.safetensors").symlink_to(f"../../blobs/{step:040x}")
    return repo / "snapshots"


def test_a_hub_cache_works_though_its_files_are_links(tmp_path: Path) -> None:
    revisions = hub_cache(tmp_path)
    assert discover(revisions).steps == STEPS
    (tmp_path / "run").mkdir()
    for step in STEPS:
        (tmp_path / "run" / f"step{step}").symlink_to(revisions / f"step{step}")
    assert discover(tmp_path / "run").steps == STEPS


def test_a_blob_that_is_itself_a_link_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    revisions = hub_cache(tmp_path)
    secret = loose(tmp_path, "secret", 100)
    (revisions.parent / "blobs" / f"{100:040x}").unlink()
    (revisions.parent / "blobs" / f"{100:040x}").symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="outside the run's folder"):
        discover(revisions)


@pytest.mark.parametrize(("target", "where"), [("loop.txt", "in a circle"), (".", "in a circle"), ("gone", "nowhere")])
def test_links_inside_a_snapshot_that_never_end_are_named_in_one_line(tmp_path: Path, target: str, where: str) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-300" / "loop.txt").symlink_to(target)
    with pytest.raises(FileFormatError, match=rf"checkpoint-300/loop.txt: a link that leads {where}"):
        discover(run)


def test_a_link_to_the_runs_own_folder_is_a_circle(tmp_path: Path) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-300" / "up").symlink_to("..")
    with pytest.raises(FileFormatError, match="up: a link that leads in a circle"):
        discover(run)


def test_snapshots_that_are_links_to_nowhere_are_left_out_and_told(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path)
    (run / "step_900.safetensors").symlink_to("gone")
    (run / "step_950.safetensors").symlink_to("step_950.safetensors")
    (run / "notes").symlink_to("gone")
    assert {i.path.name: i.reason for i in discover(run).half_written} == dict.fromkeys(
        ("step_900.safetensors", "step_950.safetensors"), "a link that leads nowhere or in a circle"
    )


# --- thousands of entries --------------------------------------------------------------------------------------------


def test_thousands_of_snapshots_need_few_open_files(tmp_path: Path) -> None:
    one = loose(tmp_path, "step_0", 0).read_bytes()
    for step in range(1, 3000):
        (tmp_path / f"step_{step}.safetensors").write_bytes(one)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 16, hard))
    try:
        assert discover(tmp_path).steps == tuple(range(3000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_entries_outside_of_the_steps_are_never_opened(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path)
    for step in STEPS[:4]:
        (run / loose_name(step)).write_bytes(b"<!DOCTYPE html>")
    before = {path: path.stat().st_atime_ns for path in run.iterdir()}
    assert discover(run, steps=parse_steps("500:")).steps == STEPS[4:]
    assert discover(run, steps=parse_steps("500,700")).steps == (500, 700)
    assert all(path.stat().st_atime_ns == before[path] for path in run.iterdir() if path.name < loose_name(500))


def test_many_entries_that_are_no_snapshots_are_counted_and_listed_only_when_asked(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    for index in range(2000):
        (run / f"sample-{index:04d}.png").write_bytes(b"")
    short, long = (call_cli("inspect", "run", *more, cwd=tmp_path).stdout for more in ((), ("-v",)))
    assert "sample-0009.png and 1990 more (no checkpoint of a known layout)" in short
    assert "sample-0010.png" not in short
    assert "sample-1999.png" in long
    assert len(json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path).stdout)["ignored"]) == 2000


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_every_conflict_and_fit_the_first_with_their_number(tmp_path: Path, call_cli: CallCli) -> None:
    run = hf_run(tmp_path / "run")
    for step, wrong in ((200, 210), (500, 540), (700, 790)):
        (run / f"checkpoint-{step}").rename(run / f"checkpoint-{wrong}")
    done = call_cli("inspect", "run", cwd=tmp_path)
    assert done.returncode == 3
    for step, wrong in ((200, 210), (500, 540), (700, 790)):
        row = next(line for line in done.stdout.splitlines() if f" checkpoint-{wrong} " in line and "problem" not in line)
        assert row.split()[:3] == [str(step), "trainer", "state"]
        told = f"evidence for step {step} of checkpoint-{wrong}: trainer_state.json global_step, checkpoint-{wrong} = {wrong}"
        assert told in done.stdout.splitlines()
        assert f"checkpoint-{wrong}: trainer_state.json global_step says step {step}, but name" in done.stdout
    content = json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path).stdout)
    assert len(content["problems"]) == 3
    assert [(e["source"], e["step"]) for e in content["snapshots"][1]["evidence"]] == [("trainer state", 200), ("name", 210)]
    refused = call_cli("fit", "run", cwd=tmp_path)
    assert refused.returncode == 3
    assert "checkpoint-210" in refused.errors[0]
    assert "(and 2 more: farcast inspect run -v shows all)" in refused.errors[0]


def test_a_conflict_outside_of_the_chosen_steps_is_none(tmp_path: Path) -> None:
    run = hf_run(tmp_path)
    (run / "checkpoint-100").rename(run / "checkpoint-120")
    with pytest.raises(StepConflictError, match="checkpoint-120"):
        discover(run)
    assert discover(run, steps=parse_steps("200:")).steps == STEPS[1:]


def test_inspect_shows_a_snapshot_whose_step_nothing_tells(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    loose(run, "other[1]", 850)
    done = call_cli("inspect", "run", cwd=tmp_path)
    assert done.returncode == 3
    row = next(line for line in done.stdout.splitlines() if "other[1].safetensors" in line)
    assert row.split()[0] == "?"
    assert "evidence for step ? of other[1].safetensors: none" in done.stdout.splitlines()
    content = json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path).stdout)
    assert [s["step"] for s in content["snapshots"]] == [None, *STEPS]
    assert "unknown step" in content["problems"][0]


def test_inspect_lists_both_snapshots_of_a_step_that_is_there_twice(tmp_path: Path, call_cli: CallCli) -> None:
    two_stages(tmp_path / "run")
    done = call_cli("inspect", "run", "--json", cwd=tmp_path)
    content = json.loads(done.stdout)
    assert done.returncode == 3
    assert [s["step"] for s in content["snapshots"]] == [step for step in STEPS for _ in (1, 2)]
    assert "two snapshots of step 100" in content["problems"][0]
