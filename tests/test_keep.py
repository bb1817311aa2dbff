"""Kept snapshots: what is copied of a checkpoint, and that a forecast from the copies is the forecast from the whole run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import farcast_cli
from farcast_cli.errors import TooFewSnapshotsError
from farcast_cli.forecast.forecaster_file import load_fitted
from farcast_cli.run.kept import discover_all, kept_in
from farcast_cli.run.steps import parse_steps
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.trainers import trainer_of
from tests import dcp_runs
from tests.conftest import STEPS, loose_name, make_loose_run, make_torch_run, tree_digest, weights_at
from tests.corpus import make_accelerate_run
from tests.test_lightning import RHYTHMS
from tests.tiny import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import CallCli, Done


def make_channels_last_run(folder: Path) -> Path:
    """Torch files of a small convnet in channels_last, with BatchNorm, tied weights, a complex tensor and an int8 one."""
    folder.mkdir()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35, 200])
    inputs = torch.randn(16, 3, 8, 8)
    for step in range(1, 81):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            state = dict(model.state_dict())
            state |= {
                "tied": state["3.weight"],
                "codes": torch.ones(4, dtype=torch.int8),
                "phases": torch.view_as_complex(state["3.weight"].double().reshape(-1, 2).contiguous()),
            }
            payload = {"model": state, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "step": step}
            torch.save(payload, folder / f"ckpt_{step}.pt")
    return folder


def make_lightning_run(folder: Path) -> Path:
    RHYTHMS["with a schedule stepped per epoch"][0].go(folder, max_steps=40)
    return folder


def sample(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(SAMPLES / name, folder))


MAKERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "a Trainer's folders": (sample("huggingface"), 100),
    "Lightning's files": (make_lightning_run, 8),
    "torch files with BatchNorm": (sample("plain"), 100),
    "torch files with a schedule": (make_torch_run, 10),
    "torch files in channels_last": (make_channels_last_run, 10),
    "dcp folders": (dcp_runs.make_run, 10),
    "flat dcp folders": (lambda folder: dcp_runs.make_run(folder, flat=True), 10),
    "accelerate's folders": (make_accelerate_run, 50),
    "bfloat16 safetensors": (lambda folder: make_loose_run(folder, dtype=torch.bfloat16), 100),
}


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """A folder with a run of eight snapshots in `run/`."""
    make_loose_run(tmp_path / "run")
    return tmp_path


def kept_name(step: int) -> str:
    return loose_name(step).replace(".safetensors", ".kept.safetensors")


def rotate(run: Path, *, left: int = 1) -> None:
    """Delete all checkpoints but the newest few, as a trainer does."""
    for snapshot in discover(run).snapshots[:-left]:
        shutil.rmtree(snapshot.path) if snapshot.path.is_dir() else snapshot.path.unlink()


def ok(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def forecast(call_cli: CallCli, work: Path, horizon: int, *options: object) -> dict[str, str]:
    """The hashes of a forecast's files without its sidecar, which names the files that were read."""
    ok(call_cli("fit", "run", cwd=work))
    ok(call_cli("predict", "--horizon", horizon, "--even-if-worse", "-o", "out/", *options, cwd=work))
    found = {name: digest for name, digest in tree_digest(work / "out").items() if not name.endswith("farcast.json")}
    shutil.rmtree(work / "out")
    return found


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning")
@pytest.mark.parametrize("what", MAKERS)
def test_kept_snapshots_and_the_newest_checkpoint_give_the_forecast_of_the_whole_run(
    what: str, tmp_path: Path, call_cli: CallCli
) -> None:
    maker, horizon = MAKERS[what]
    (tmp_path / "whole").mkdir()
    maker(tmp_path / "whole" / "run")
    shutil.copytree(tmp_path / "whole", tmp_path / "thin")
    ok(call_cli("keep", "run", cwd=tmp_path / "thin"))
    rotate(tmp_path / "thin" / "run")
    methods = [("--method", name) for name in ("drift", "window-means")]
    expected, found = (
        [forecast(call_cli, tmp_path / name, horizon, *method) for method in methods] for name in ("whole", "thin")
    )
    assert all(files for files in expected)
    assert found == expected
    whole, thin = (load_fitted(tmp_path / name / "forecaster.safetensors") for name in ("whole", "thin"))
    assert (thin.gram.matrix == whole.gram.matrix).all()
    assert (thin.sample.values == whole.sample.values).all()
    assert thin.provenance.pace == whole.provenance.pace
    assert thin.provenance.copied == whole.provenance.copied
    assert [record.is_kept for record in thin.provenance.snapshots] == [True] * (len(thin.steps) - 1) + [False]


# --- what keep does --------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keep_copies_what_is_not_kept_yet_and_changes_nothing_else(loose: Path, call_cli: CallCli) -> None:
    before = tree_digest(loose / "run")
    done = ok(call_cli("keep", "run", cwd=loose))
    assert done.stdout.splitlines() == [str(Path("kept/run") / kept_name(step)) for step in STEPS]
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (loose / "kept" / "run").iterdir()}
    again = ok(call_cli("keep", "run", cwd=loose))
    assert again.stdout == ""
    assert "8 kept snapshots in kept/run (0 new)" in again.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (loose / "kept" / "run").iterdir()} == kept
    assert tree_digest(loose / "run") == before
    one = load_file(loose / "kept" / "run" / kept_name(300))
    assert all(torch.equal(one[name], value) for name, value in weights_at(300).items())


def test_keep_says_what_it_saves_on_disk(tmp_path: Path, call_cli: CallCli) -> None:
    run = sample("huggingface")(tmp_path / "run")
    sizes = [sum(path.stat().st_size for path in (run / name).rglob("*")) for name in names_in(run)]
    answer = json.loads(ok(call_cli("keep", "run", "--json", cwd=tmp_path)).stdout)
    kept = [path.stat().st_size for path in (tmp_path / "kept" / "run").iterdir()]
    assert answer["checkpoint_bytes"] == sum(sizes)
    assert answer["bytes"] == sum(kept) == sum(one["bytes"] for one in answer["snapshots"])
    assert len(answer["added"]) == len(kept) == len(sizes)
    assert (answer["removed"], answer["cautions"]) == ([], [])


def test_a_loop_that_saves_under_one_name_is_kept_step_by_step(tmp_path: Path, call_cli: CallCli) -> None:
    """Each save replaces the last one; the whole history is kept all the same."""
    make_torch_run(tmp_path / "all")
    (tmp_path / "run").mkdir()
    for step in range(10, 90, 10):
        shutil.copy(tmp_path / "all" / f"ckpt_{step}.pt", tmp_path / "run" / "newest.pt")
        ok(call_cli("keep", "run", cwd=tmp_path))
    assert names_in(tmp_path / "kept" / "run") == [f"newest.pt-step_{step}.kept.safetensors" for step in range(10, 90, 10)]
    done = ok(call_cli("fit", "run", cwd=tmp_path))
    assert "7 kept snapshots from kept/run: steps 10 to 70" in done.stderr
    assert load_fitted(tmp_path / "forecaster.safetensors").steps == tuple(range(10, 90, 10))


def test_last_removes_the_oldest_kept_snapshots_and_nothing_else(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", "--steps", ":400", cwd=loose))
    (loose / "kept" / "run" / "notes.txt").write_text("mine")
    save_file(weights_at(1), loose / "kept" / "run" / kept_name(1), metadata={"format": "pt"})
    answer = json.loads(ok(call_cli("keep", "run", "--last", 3, "--json", cwd=loose)).stdout)
    assert [one["step"] for one in answer["snapshots"]] == [600, 700, 800]
    assert sorted(Path(path).name for path in answer["removed"]) == [kept_name(step) for step in (100, 200, 300, 400)]
    assert sorted(Path(path).name for path in answer["added"]) == [kept_name(step) for step in (600, 700, 800)]
    assert names_in(loose / "kept" / "run") == ["notes.txt", kept_name(1), *map(kept_name, (600, 700, 800))]
    assert call_cli("keep", "run", "--last", 0, cwd=loose).returncode == 2


@pytest.mark.parametrize("folder", ["run", "run/kept", "link"])
def test_kept_snapshots_never_lie_in_the_run(folder: str, loose: Path, call_cli: CallCli) -> None:
    (loose / "link").symlink_to(loose / "run")
    before = tree_digest(loose / "run")
    done = call_cli("keep", "run", "--into", folder, cwd=loose)
    assert done.returncode == 5
    assert "lies inside the run's folder" in done.errors[0]
    assert tree_digest(loose / "run") == before


def test_a_checkpoint_that_is_half_written_is_left_out_with_a_caution(loose: Path, call_cli: CallCli) -> None:
    path = loose / "run" / loose_name(800)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = ok(call_cli("keep", "run", cwd=loose))
    assert f"caution: {loose_name(800)} left out: half-written" in done.stderr
    path.write_bytes(whole)
    assert ok(call_cli("keep", "run", cwd=loose)).stdout.split() == [str(Path("kept/run") / kept_name(800))]


def test_a_first_checkpoint_that_is_being_written_is_no_error(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_torch_run(tmp_path / "run", (10,))
    raw = (run / "ckpt_10.pt").read_bytes()
    (run / "ckpt_10.pt").write_bytes(raw[:1000])
    done = ok(call_cli("keep", "run", cwd=tmp_path))
    assert "caution: ckpt_10.pt left out: half-written" in done.stderr
    assert (done.stdout, (tmp_path / "kept").exists()) == ("", False)


@pytest.mark.parametrize("what", ["vanishes", "changes"])
def test_a_checkpoint_that_goes_away_while_it_is_copied_is_left_out_with_a_caution(
    what: str, loose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer is played by a hook on the progress: it acts when the first bytes of step 300 have been copied."""
    path, num_copied = loose / "run" / loose_name(300), 0
    each = sum(value.numel() * 4 for value in weights_at(100).values())

    def trainer(num_bytes: int) -> None:
        nonlocal num_copied
        num_copied += num_bytes
        if 2 * each < num_copied < 3 * each:
            path.unlink(missing_ok=True) if what == "vanishes" else os.utime(path, (1, 1))

    monkeypatch.chdir(loose)
    done = farcast_cli.keep("run", progress=lambda _phase, _total: trainer)
    assert done.cautions == (f"{loose_name(300)} left out: it changed or was deleted while it was copied",)
    assert names_in(loose / "kept" / "run") == [kept_name(step) for step in STEPS if step != 300]


def test_last_removes_no_kept_snapshot_whose_successor_was_not_copied(
    loose: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer deletes a checkpoint while it is copied: there are no three newer ones, so an older one stays."""
    ok(call_cli("keep", "run", "--steps", ":600", cwd=loose))
    monkeypatch.chdir(loose)
    done = farcast_cli.keep(
        "run", last=3, progress=lambda _phase, _total: lambda _bytes: _delete(loose / "run" / loose_name(800))
    )
    assert done.cautions == (f"{loose_name(800)} left out: it changed or was deleted while it was copied",)
    assert [one.step for one in done.snapshots] == [500, 600, 700]
    assert names_in(loose / "kept" / "run") == [kept_name(step) for step in (500, 600, 700)]


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)


def test_a_kept_snapshot_appears_whole_or_not_at_all(loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_num_bytes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(loose)
    with pytest.raises(KeyboardInterrupt):
        farcast_cli.keep("run", progress=lambda _phase, _total: interrupted)
    assert not (loose / "kept").exists()


def test_each_run_has_a_folder_of_its_own(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    make_loose_run(loose / "other" / "run", seed=1)
    fitted = ok(call_cli("fit", "other/run", cwd=loose))
    assert "kept/run has kept snapshots of another run: they are not used (--history kept/run uses them)" in fitted.stderr
    assert not load_fitted(loose / "forecaster.safetensors").kept
    done = call_cli("keep", "other/run", "--into", "kept/run", cwd=loose)
    assert done.returncode == 5
    assert "holds kept snapshots of another run" in done.errors[0]
    ok(call_cli("keep", "other/run", cwd=loose))
    rotate(loose / "other" / "run")
    assert "7 kept snapshots from kept/other-run: steps 100 to 700" in ok(call_cli("fit", "other/run", cwd=loose)).stderr


def test_a_run_keeps_its_folder_of_kept_snapshots_when_the_other_runs_is_gone(loose: Path, call_cli: CallCli) -> None:
    make_loose_run(loose / "other" / "run", seed=1)
    for run in ("run", "other/run"):
        ok(call_cli("keep", run, cwd=loose))
    shutil.rmtree(loose / "kept" / "run")
    rotate(loose / "other" / "run")
    assert "7 kept snapshots from kept/other-run: steps 100 to 700" in ok(call_cli("fit", "other/run", cwd=loose)).stderr


def test_kept_snapshots_of_another_run_among_this_runs_are_left_out_with_a_note(loose: Path, call_cli: CallCli) -> None:
    make_loose_run(loose / "other", (250,), seed=1)
    for run in ("run", "other"):
        ok(call_cli("keep", run, cwd=loose))
    shutil.copy(loose / "kept" / "other" / kept_name(250), loose / "kept" / "run")
    rotate(loose / "run")
    done = ok(call_cli("fit", "run", cwd=loose))
    assert f"kept snapshots in kept/run name another run, and are left out: {kept_name(250)}" in done.stderr
    assert load_fitted(loose / "forecaster.safetensors").steps == tuple(STEPS)
    named = call_cli("inspect", "run", "--history", "kept/run", cwd=loose)
    assert f"caution: kept/run has kept snapshots that name another run, and they are used: {kept_name(250)}" in (
        named.stdout + named.stderr
    )


@pytest.mark.parametrize("into", ["run/kept", "file/store"])
def test_a_hint_of_keep_names_its_own_option_and_no_invented_path(into: str, loose: Path, call_cli: CallCli) -> None:
    (loose / "file").write_text("")
    done = call_cli("keep", "run", "--into", into, cwd=loose)
    assert done.returncode == 5
    assert done.errors[0].split(": ")[1].startswith(into)
    assert "any" not in done.errors[0]
    assert "--into" in done.hints[0]
    assert "-o" not in done.hints[0].split()


def test_another_run_in_the_same_folder_is_refused(loose: Path, call_cli: CallCli) -> None:
    """A run that was started again: the steps are the same, and the weights are not."""
    ok(call_cli("keep", "run", cwd=loose))
    make_loose_run(loose / "run", seed=1)
    for command in ("keep", "fit"):
        done = call_cli(command, "run", cwd=loose)
        assert done.returncode == 3, done
        assert "its weights differ from those of kept/run" in done.errors[0]
        assert "two runs: move kept/run away" in done.hints[0]
    assert call_cli("inspect", "run", cwd=loose).returncode == 3


def test_what_keep_cannot_use_is_refused(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    assert "found kept snapshots" in call_cli("keep", "kept/run", "--into", "x", cwd=loose).errors[0]
    (loose / "file").write_text("")
    assert call_cli("keep", "run", "--into", "file", cwd=loose).returncode == 5
    assert call_cli("keep", "nowhere", cwd=loose).returncode == 3
    place = loose / "kept" / "run" / kept_name(100)
    place.write_bytes(place.read_bytes()[:-1])
    assert call_cli("keep", "run", cwd=loose).returncode == 4


# --- what reads kept snapshots ---------------------------------------------------------------------------------------


def test_history_names_a_folder_and_one_without_kept_snapshots_is_refused(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", "--into", "store", cwd=loose))
    rotate(loose / "run", left=2)
    missing = call_cli("fit", "run", cwd=loose)
    assert missing.returncode == 3
    assert "expected at least 6 snapshots, found 2" in missing.errors[0]
    for command in (("fit", "run"), ("backtest", "run"), ("predict", "run", "--horizon", 100), ("inspect", "run")):
        assert "6 kept snapshots from store: steps 100 to 600" in "".join(
            (done := ok(call_cli(*command, "--history", "store", cwd=loose))).stderr + done.stdout
        )
    nothing = call_cli("fit", "run", "--history", "run", cwd=loose)
    assert nothing.returncode == 3
    assert "expected kept snapshots, found none" in nothing.errors[0]
    assert "farcast keep run --into run" in nothing.hints[0]


def test_the_runs_own_snapshots_go_first_and_later_kept_ones_are_not_used(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    (loose / "run" / loose_name(800)).unlink()
    done = ok(call_cli("fit", "run", cwd=loose))
    assert f"kept snapshots after step 700, the newest of the run, are not used: {kept_name(800)}" in done.stderr
    fitted = load_fitted(loose / "forecaster.safetensors")
    assert [record.is_kept for record in fitted.provenance.snapshots] == [False] * 7


def test_steps_choose_among_kept_snapshots_too(loose: Path, call_cli: CallCli) -> None:

    ok(call_cli("keep", "run", "--into", "store", cwd=loose))
    rotate(loose / "run", left=2)
    for text, steps in (
        ("300:", (300, 400, 500, 600, 700, 800)),
        ("200,500,800", (200, 500, 800)),
        ("::200", (200, 400, 600, 800)),
    ):
        found = discover_all(loose / "run", steps=parse_steps(text), history=loose / "store")
        assert found.steps == steps
    with pytest.raises(TooFewSnapshotsError, match="no snapshot of step 250, which --steps lists"):
        discover_all(loose / "run", steps=parse_steps("200,250,800"), history=loose / "store")


def test_a_folder_of_kept_snapshots_is_a_run_by_itself(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    ok(call_cli("fit", "run", "-o", "whole.safetensors", cwd=loose))
    done = ok(call_cli("fit", "kept/run", cwd=loose))
    assert "another run" not in done.stderr
    whole, thin = (load_fitted(loose / name) for name in ("whole.safetensors", "forecaster.safetensors"))
    assert (thin.gram.matrix == whole.gram.matrix).all()
    path = loose / ok(call_cli("predict", "--horizon", 100, "-o", "out/", cwd=loose)).stdout.strip()
    assert path.name == loose_name(900)
    assert ok(call_cli("predict", "--forecaster", "whole.safetensors", "--horizon", 100, "-o", "w/", cwd=loose)).stdout
    made, expected = load_file(path), load_file(loose / "w" / loose_name(900))
    assert made.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    assert ok(call_cli("inspect", "out", "--json", cwd=loose)).stdout.startswith(
        '{"schema_version": 1, "layout": "safetensors"'
    )


def test_what_safetensors_cannot_hold_is_a_kept_snapshot_all_the_same(tmp_path: Path, call_cli: CallCli) -> None:
    make_channels_last_run(tmp_path / "run")
    ok(call_cli("keep", "run", cwd=tmp_path))
    ok(call_cli("fit", "kept/run", cwd=tmp_path))
    options = ("predict", "--horizon", 10, "--even-if-worse", "-o", "out/")
    refused = call_cli(*options, cwd=tmp_path)
    assert refused.returncode == 2
    assert "tensor 'phases' is complex128, which safetensors cannot hold" in refused.errors[0]
    path = tmp_path / ok(call_cli(*options, "--layout", "pt", cwd=tmp_path)).stdout.strip()
    ok(call_cli("fit", "run", cwd=tmp_path))
    whole = torch.load(tmp_path / ok(call_cli(*options, cwd=tmp_path)).stdout.strip())["model"]
    thin = torch.load(path)
    assert all(torch.equal(value, whole[name]) for name, value in thin.items())
    assert sorted(whole.keys() - thin.keys()) == ["codes", "tied"]


def test_a_kept_snapshot_that_changed_or_went_away_since_the_fit_is_refused(loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    rotate(loose / "run")
    ok(call_cli("fit", "run", cwd=loose))
    options = ("predict", "--horizon", 100, "--even-if-worse", "--method", "drift")
    for path in (loose / "kept" / "run").iterdir():
        raw = bytearray(path.read_bytes())
        raw[len(raw) - 40 * 16 * 2] ^= 1
        path.write_bytes(raw)
    changed = call_cli(*options, cwd=loose)
    assert changed.returncode == 3
    assert "changed since the forecaster was fitted" in changed.errors[0]
    assert changed.hints == ["hint: farcast fit run --history kept/run"]
    shutil.rmtree(loose / "kept")
    gone = call_cli(*options, cwd=loose)
    assert gone.returncode == 3
    assert "removed since the forecaster was fitted" in gone.errors[0]


def test_marks_and_fingerprints_are_those_of_the_checkpoint(tmp_path: Path) -> None:

    run = sample("huggingface")(tmp_path / "run")
    state = run / "checkpoint-1200" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"].append({"step": 900, "farcast_leap_from": 800, "farcast_leap_to": 900})
    state.write_text(json.dumps(content))
    farcast_cli.keep(run, into=tmp_path / "store")
    newest, whole = kept_in(tmp_path / "store")[-1], open_snapshot(run / "checkpoint-1200")
    assert newest.full_digest == whole.full_digest
    assert trainer_of(newest).marks(newest) == trainer_of(whole).marks(whole) != []


def rewritten(path: Path, **changes: object) -> None:
    """Change the record of a kept snapshot."""
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["farcast_kept"])
    save_file(load_file(path), path, metadata={"farcast_kept": json.dumps(record | changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"step": -1},
        {"run": "a\0b"},
        {"views": {"norm.weight": {"dtype": "float64", "shape": [16], "strides": []}}},
        {"views": {"norm.weight": {"dtype": "float32", "shape": [4, 4], "strides": [1, 1]}}},
        {"views": {"norm.weight": {"dtype": "float32", "shape": [400_000], "strides": [], "sample": 1000}}},
        {"states": [{"name": "", "role": "state", "is_read": True, "tree": {"": 5}}]},
    ],
)
def test_a_damaged_record_is_refused(changes: dict[str, object], loose: Path, call_cli: CallCli) -> None:
    ok(call_cli("keep", "run", cwd=loose))
    rewritten(loose / "kept" / "run" / kept_name(100), **changes)
    for command in (("fit", "run"), ("keep", "run"), ("inspect", "kept/run")):
        done = call_cli(*command, cwd=loose)
        assert done.returncode == 4, done
        assert f"kept/run/{kept_name(100)}: a kept snapshot whose" in done.errors[0]
        assert "run farcast keep again" in done.hints[0]


# --- samples ---------------------------------------------------------------------------------------------------------

LARGE = {"embed.weight": (400, 160), "layer.weight": (160, 160), "layer.bias": (160,)}


@pytest.fixture
def sampled(tmp_path: Path, call_cli: CallCli) -> Path:
    """A run of large tensors, of whose first six snapshots a sample is kept; `whole.safetensors` was fitted before."""
    make_loose_run(tmp_path / "run", shapes=LARGE)
    ok(call_cli("fit", "run", "-o", "whole.safetensors", cwd=tmp_path))
    ok(call_cli("keep", "run", "--sampled", cwd=tmp_path))
    rotate(tmp_path / "run", left=2)
    return tmp_path


def test_samples_are_all_that_fit_reads(sampled: Path, call_cli: CallCli) -> None:
    assert (sampled / "kept" / "run" / kept_name(100)).stat().st_size < 4 * (2 * 16_384 + 160) + 2_000
    ok(call_cli("fit", "run", cwd=sampled))
    whole, thin = (load_fitted(sampled / name) for name in ("whole.safetensors", "forecaster.safetensors"))
    assert (thin.gram.matrix == whole.gram.matrix).all()
    assert (thin.sample.values == whole.sample.values).all()
    ok(call_cli("backtest", cwd=sampled))


def test_predict_says_which_snapshots_are_samples(sampled: Path, call_cli: CallCli) -> None:
    ok(call_cli("fit", "run", cwd=sampled))
    options = ("predict", "--horizon", 100, "--even-if-worse", "-o", "out/", "--method")
    done = call_cli(*options, "window-means", cwd=sampled)
    assert done.returncode == 3
    assert "this forecast needs all weights, and only a sample was kept in step_" in done.errors[0]
    assert "--method" in done.hints[0]
    assert not (sampled / "out").exists()
    ok(call_cli(*options, "persistence", cwd=sampled))


@pytest.mark.parametrize("option", [("--full",), ("--sample", "2000")])
def test_other_values_than_the_sample_are_refused(option: tuple[str, ...], sampled: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "run", *option, cwd=sampled)
    assert done.returncode == 2
    assert "holds a sample of 16384 values" in done.errors[0]


def test_samples_of_another_run_are_found_out(sampled: Path, call_cli: CallCli) -> None:
    make_loose_run(sampled / "run", (700, 800), shapes=LARGE, seed=1)
    assert "its weights differ" in call_cli("fit", "run", cwd=sampled).errors[0]


def test_a_sample_is_no_checkpoint_to_compare_with(sampled: Path, call_cli: CallCli) -> None:
    ok(
        call_cli(
            "predict", "run", "--horizon", 100, "--even-if-worse", "--method", "persistence", "-o", "f.safetensors", cwd=sampled
        )
    )
    done = call_cli("verify", "f.safetensors", "--against", Path("kept/run") / kept_name(100), cwd=sampled)
    assert done.returncode == 3
    assert "found a kept sample" in done.errors[0]
