"""Where evidence for the steps disagrees the user says which is right, in which unit; every command holds to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from farcast_cli.errors import MixedRunsError, StepConflictError
from farcast_cli.forecast.forecaster_file import load_fitted
from farcast_cli.run.trajectory import discover
from farcast_cli.run.trust import StepRule
from tests.conftest import STEPS, weights_at
from tests.test_trust import payload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.conftest import CallCli

COUNTED = tuple(step + 40 for step in STEPS)
"""What Adam counts in `disagreeing`: a restart without its optimiser's state would count so too."""


def disagreeing(folder: Path) -> Path:
    """Counters that say the names' steps but for one, and Adam's count that says others: nothing has a majority."""
    for step, adam in zip(STEPS, COUNTED, strict=True):
        payload(folder, f"run_{step}", step, adam=adam, iteration=350 if step == 300 else step)
    return folder


def in_epochs(folder: Path, epochs: Sequence[int] = range(1, 11), **more: Any) -> Path:
    """Torch files of a run with SGD that knows its epochs only."""
    folder.mkdir()
    for epoch in epochs:
        content = {"model": weights_at(100 * epoch), "epoch": epoch, "samples_seen": 5000 * epoch, **more}
        torch.save(content, folder / f"model_epoch_{epoch}.pth")
    return folder


def test_the_hint_names_each_evidence_that_resolves_a_contradiction_and_the_steps_it_gives(tmp_path: Path) -> None:
    with pytest.raises(StepConflictError) as caught:
        discover(disagreeing(tmp_path))
    assert "--step-from payload if the counter in the files is right (steps 100 to 800)" in caught.value.hint
    assert "--step-from adam if Adam's count is right (steps 140 to 840)" in caught.value.hint
    assert "--step-from name if the number in the names is right (steps 100 to 800)" in caught.value.hint
    assert "metadata" not in caught.value.hint


def test_each_evidence_that_the_hint_names_tells_the_steps(tmp_path: Path) -> None:
    folder = disagreeing(tmp_path)
    assert discover(folder, rule=StepRule("adam")).steps == COUNTED
    assert discover(folder, rule=StepRule("name")).steps == STEPS
    assert discover(folder, rule=StepRule("payload")).steps == (100, 200, 350, *STEPS[3:])


def test_what_the_chosen_evidence_contradicts_is_noted_once_for_each_kind(tmp_path: Path) -> None:
    notes = discover(disagreeing(tmp_path), rule=StepRule("name")).notes
    assert notes == (
        "adam step (optimizer.state.*.step) counts something else, 840 at step 800: --step-from name",
        "payload (iteration) counts something else, 350 at step 300: --step-from name",
    )


def test_evidence_that_no_snapshot_has_is_a_conflict_that_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(StepConflictError, match="--step-from metadata: expected the metadata, found no snapshot") as caught:
        discover(disagreeing(tmp_path), rule=StepRule("metadata"))
    assert "payload, adam, name" in caught.value.hint


def test_a_snapshot_that_lacks_the_chosen_evidence_stops_and_is_named(tmp_path: Path) -> None:
    payload(disagreeing(tmp_path), "run_900", 900, iteration=900)
    with pytest.raises(StepConflictError, match=r"run_900\.pt: --step-from adam: expected Adam's count, found none"):
        discover(tmp_path, rule=StepRule("adam"))


def test_a_last_file_without_a_number_is_left_out_where_the_names_tell_the_steps(tmp_path: Path) -> None:
    for epoch in range(1, 7):
        name = f"lora-{epoch:06d}" if epoch < 6 else "lora"
        save_file(weights_at(120 * epoch), tmp_path / f"{name}.safetensors", metadata={"ss_steps": str(120 * epoch)})
    found = discover(tmp_path, rule=StepRule("name"))
    assert found.steps == (1, 2, 3, 4, 5)
    assert [(one.path.name, one.reason) for one in found.ignored] == [("lora.safetensors", "unknown step")]


def test_names_that_are_equal_but_for_a_number_tell_the_steps_if_the_user_says_so(tmp_path: Path) -> None:
    for step in STEPS:
        payload(tmp_path, f"model{step:06d}", step, step=step % 300)
    with pytest.raises(MixedRunsError) as caught:
        discover(tmp_path)
    assert caught.value.hint.endswith("--step-from name if the number in the names is right (steps 100 to 800)")
    assert discover(tmp_path, rule=StepRule("name")).steps == STEPS


@pytest.mark.parametrize("name", ["model{:06d}", "step_{}"])
def test_a_counter_that_never_counts_is_no_step(tmp_path: Path, name: str) -> None:
    for step in STEPS:
        payload(tmp_path, name.format(step), step, step=7)
    found = discover(tmp_path)
    assert (found.steps, found.notes) == (STEPS, ("payload (step) is 7 in every snapshot, and so no step",))


def test_the_note_on_an_outvoted_counter_names_the_option_that_takes_it(tmp_path: Path) -> None:
    for place, step in enumerate(STEPS):
        payload(tmp_path, f"G_{step}", step, adam=step, iteration=(place + 1) ** 2)
    (note,) = discover(tmp_path).notes
    assert note.endswith("adam step and name agree on the steps (--step-from payload takes it instead)")
    assert discover(tmp_path, rule=StepRule("payload")).steps == tuple((place + 1) ** 2 for place in range(8))


def test_steps_of_a_safetensors_run_are_those_of_its_metadata_and_not_the_numbers_in_its_names(tmp_path: Path) -> None:
    for epoch in range(1, 11):
        save_file(weights_at(epoch), tmp_path / f"lora-{epoch:06d}.safetensors", metadata={"ss_steps": str(120 * epoch)})
    (tmp_path / "lora-000010.safetensors").rename(tmp_path / "lora.safetensors")
    from farcast_cli.run.steps import StepRange

    assert discover(tmp_path, steps=StepRange(600)).steps == (600, 720, 840, 960, 1080, 1200)


def test_every_command_takes_the_evidence_and_says_so(tmp_path: Path, call_cli: CallCli) -> None:
    disagreeing(tmp_path / "run")
    chosen = ("run", "--step-from", "adam", "--json")
    for command in ("inspect", "fit", "backtest", "predict", "leap", "keep", "report"):
        done = call_cli(command, *chosen, cwd=tmp_path)
        answer = json.loads(done.stdout)
        told = answer["forecast"] if command == "report" else answer
        assert (done.returncode, told["step_from"]) == (0, "adam"), command
    watched = call_cli("watch", *chosen, "--once", "--interval", 0.05, cwd=tmp_path)
    (judged,) = [one for line in watched.stdout.splitlines() if (one := json.loads(line))["event"] == "judged"]
    assert (judged["step_from"], judged["origin_step"]) == ("adam", 840)


def test_the_forecaster_file_holds_the_choice_for_all_that_follows(tmp_path: Path, call_cli: CallCli) -> None:
    disagreeing(tmp_path / "run")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 3
    assert call_cli("fit", "run", "--step-from", "adam", cwd=tmp_path).returncode == 0
    assert load_fitted(tmp_path / "forecaster.safetensors").rule == StepRule("adam")
    done = call_cli("predict", "--horizon", 100, "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["step_from"], answer["origin_step"], answer["valid_step"]) == ("adam", 840, 940)
    sidecar = json.loads((tmp_path / f"{answer['path']}.farcast.json").read_text())
    assert sidecar["step_from"] == "adam"
    assert call_cli("predict", "--step-from", "name", cwd=tmp_path).returncode == 2


def test_a_memory_of_leaps_by_another_evidence_is_not_used(tmp_path: Path, call_cli: CallCli) -> None:
    disagreeing(tmp_path / "run")
    assert call_cli("leap", "run", "--step-from", "adam", cwd=tmp_path).returncode == 0
    payload(tmp_path / "run", "run_900", 900, adam=940, iteration=900)
    done = call_cli("leap", "run", "--step-from", "name", cwd=tmp_path)
    assert "counts its steps by --step-from adam: a new memory starts" in done.stderr


def test_epochs_are_the_unit_where_only_they_are_known(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run")
    refused = call_cli("fit", "run", cwd=tmp_path)
    assert refused.returncode == 3
    assert "--unit epoch counts in epochs" in refused.stderr
    fitted = call_cli("fit", "run", "--unit", "epoch", cwd=tmp_path)
    assert "the unit of this run is the epoch" in fitted.stderr
    assert "epochs 1 to 10" in fitted.stderr
    done = call_cli("predict", "--horizon", 3, cwd=tmp_path)
    assert "LEAP 3 EPOCHS" in done.stderr
    assert "a forecast of epoch 13" in done.stderr
    assert done.stdout == "forecasts/run/model_epoch_13.pth\n"
    written = torch.load(tmp_path / "forecasts/run/model_epoch_13.pth", weights_only=True)
    assert (written["epoch"], written["samples_seen"]) == (13, 65_000)


def test_an_epoch_beside_a_score_in_the_name_is_the_unit_too(tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "run").mkdir()
    for epoch in range(1, 11):
        torch.save(weights_at(100 * epoch), tmp_path / "run" / f"model_ep_{epoch}_sdr_{8 + epoch / 7:.4f}.ckpt")
    assert "--unit epoch counts in epochs" in call_cli("fit", "run", cwd=tmp_path).stderr
    done = call_cli("predict", "run", "--unit", "epoch", "--horizon", 2, cwd=tmp_path)
    assert done.stdout == "forecasts/run/model_ep_12_sdr_9.4286.ckpt\n"


def test_every_answer_tells_the_unit(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run")
    chosen = ("run", "--unit", "epoch")
    for command in ("inspect", "fit", "backtest", "predict", "leap", "keep", "report"):
        done = call_cli(command, *chosen, "--json", cwd=tmp_path)
        answer = json.loads(done.stdout)
        assert (answer["forecast"] if command == "report" else answer)["unit"] == "epoch", command
    for command, *more in (("inspect",), ("backtest",), ("report", "--text"), ("watch", "--once", "--interval", 0.05)):
        done = call_cli(command, *chosen, *more, cwd=tmp_path)
        assert "epoch" in done.stdout, command
    assert "epoch 10" in call_cli("leap", *chosen, cwd=tmp_path).stderr


def test_a_run_that_counts_its_steps_needs_no_epochs(tmp_path: Path) -> None:
    for epoch in range(1, 9):
        payload(tmp_path, f"model_epoch_{epoch}", epoch, adam=450 * epoch, epoch=epoch)
    with pytest.raises(StepConflictError, match=r"the snapshots contain their steps, .* = 450 to 3600") as caught:
        discover(tmp_path, rule=StepRule(unit="epoch"))
    assert "leave --unit out" in caught.value.hint


def test_a_counter_that_does_not_rise_does_not_stand_against_epochs(tmp_path: Path) -> None:
    in_epochs(tmp_path / "run", step=0)
    assert discover(tmp_path / "run", rule=StepRule(unit="epoch")).steps == tuple(range(1, 11))


def test_a_run_counted_in_epochs_ends_with_its_epochs(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run", args={"epochs": 12, "max_steps": 60})
    done = call_cli("predict", "run", "--unit", "epoch", "--horizon", 2, cwd=tmp_path)
    assert done.returncode == 2
    assert "expected a step before the end of the run" in done.stderr
    assert "args.epochs = 12" in done.stderr


def test_kept_snapshots_know_that_they_count_epochs(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run")
    assert call_cli("keep", "run", "--unit", "epoch", cwd=tmp_path).returncode == 0
    for epoch in range(1, 9):
        (tmp_path / "run" / f"model_epoch_{epoch}.pth").unlink()
    own = json.loads(call_cli("inspect", "run", "--unit", "epoch", "--json", cwd=tmp_path).stdout)
    assert [one["step"] for one in own["snapshots"]] == list(range(1, 11))
    alone = json.loads(call_cli("inspect", "kept/run", "--json", cwd=tmp_path).stdout)
    assert alone["unit"] == "epoch"


def test_fit_says_how_the_steps_were_told_and_which_averages_are_left_out(tmp_path: Path, call_cli: CallCli) -> None:
    steps = ",".join(map(str, range(100, 1100, 100)))
    torch.save({"model": weights_at(1)}, in_epochs(tmp_path / "run") / "model_epoch_5_ema.pth")
    told = call_cli("fit", "run", "--steps", steps, cwd=tmp_path).stderr
    assert "note: steps as --steps lists them, first epoch first: model_epoch_1.pth = 100," in told
    assert "model_epoch_9.pth = 900, model_epoch_10.pth = 1000" in told
    assert "note: model_epoch_5_ema.pth left out: 'ema' in its name" in told


def test_a_problem_that_all_snapshots_have_is_said_once_with_their_number(tmp_path: Path, call_cli: CallCli) -> None:
    for number, name in enumerate((300, 600, 917, 1200, 1500, 1817, 2100, 2417), 1):
        payload(tmp_path / "run", f"run_{name}", 100 * number, step=100 * number)
    done = call_cli("inspect", "run", cwd=tmp_path)
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert "payload (step) says step 100, but name (run_300.pt) says 300" in problem
    assert problem.endswith("(and 7 more like this: -v shows all)")
    assert call_cli("inspect", "run", "-v", cwd=tmp_path).stdout.count("problem: ") == 8


def test_epochs_are_called_so_and_another_unit_is_named_as_what_differs(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run")
    done = call_cli("predict", "run", "--unit", "epoch", "-v", cwd=tmp_path)
    assert "of the history of 9 epochs" in done.stderr
    assert "clock: epochs" in done.stderr
    for epoch in range(1, 11):
        payload(tmp_path / "sgd", f"checkpoint_{epoch:04d}", 100 * epoch, epoch=epoch)
    options = ("predict", "sgd", "--horizon", "2", "--even-if-worse", "-o", "out.pt")
    assert call_cli(*options, cwd=tmp_path).returncode == 0
    again = call_cli(*options, "--unit", "epoch", cwd=tmp_path)
    assert again.returncode == 5
    assert "exists already, made with --unit step" in again.stderr


def test_a_counter_that_the_chosen_evidence_leaves_behind_is_a_caution(tmp_path: Path, call_cli: CallCli) -> None:
    for number, name in enumerate((300, 600, 917, 1200, 1500, 1817, 2100, 2417), 1):
        payload(tmp_path / "run", f"run_{name}", 100 * number, iteration=100 * number)
    done = call_cli("predict", "run", "--step-from", "name", "--horizon", "300", "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 0
    assert "iteration stays at 800: it does not rise in proportion to the steps" in done.stderr
    caution = "caution: iteration stays at 800: a training that counts by it resumes at step 800, with the weights of step 2717"
    assert caution in done.stderr.splitlines()
    even = call_cli("predict", "run", "--step-from", "payload", "--horizon", "300", "--even-if-worse", cwd=tmp_path)
    assert (even.returncode, "caution: iteration" in even.stderr) == (0, False)


def test_the_end_of_a_run_is_told_in_its_unit(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run", config={"epochs": 11})
    told = call_cli("backtest", "run", "--unit", "epoch", "--horizon", 2, cwd=tmp_path).stdout
    assert "the run ends at epoch 11: a leap must end before that" in told
    assert (
        "the run ends at epoch 11: a leap must end before that"
        in call_cli("predict", "run", "--unit", "epoch", cwd=tmp_path).stderr
    )


def test_a_watch_tells_epochs(tmp_path: Path, call_cli: CallCli) -> None:
    in_epochs(tmp_path / "run")
    told = call_cli("watch", "run", "--unit", "epoch", "--until", 10, "--interval", 0.01, cwd=tmp_path).stderr
    assert "epoch 10 is reached" in told
    assert " step" not in told
