"""Agents of stable-baselines3: read, moved on as the trainer counts, and resumed by the trainer itself where it is installed."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.run.trajectory import discover
from farcast_cli.state.advance import advance
from tests.corpus import Calls
from tests.tiny import fit_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.conftest import CallCli

ROLLOUT, EPOCHS, BATCHES, TOTAL = 128, 4, 2, 4096
NAME = "rl_model_{}_steps.zip"


DANGER = Calls(print, "read")
"""A pickle that says so when it is read."""


def rollouts(step: int, *, is_behind: bool) -> int:
    return (step - (not is_behind)) // ROLLOUT


def saved(tree: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def agent(step: int, *, is_behind: bool = False, **more: Any) -> dict[str, Any]:
    """The attributes of an agent as `data_to_json` writes them: texts hold pickles."""
    pickled = base64.b64encode(pickle.dumps(DANGER)).decode()
    done = rollouts(step, is_behind=is_behind)
    return {
        "policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": pickled},
        "num_timesteps": step,
        "_total_timesteps": TOTAL,
        "_num_timesteps_at_start": 0,
        "start_time": 1796007091087120053,
        "_episode_num": 0,
        "_current_progress_remaining": 1.0 - done * ROLLOUT / TOTAL,
        "_n_updates": done * EPOCHS,
        "n_envs": 2,
        "n_steps": ROLLOUT // 2,
        "n_epochs": EPOCHS,
        "gae_lambda": 0.95,
        "target_kl": None,
        **more,
    }


def write_agent(path: Path, step: int, *, is_behind: bool = False, compression: int = zipfile.ZIP_STORED, **more: Any) -> None:
    """A zip as `save_to_zip_file` writes it, after so many steps of a run that moves straight on."""
    torch.manual_seed(0)
    start, move = torch.randn(6, 4), torch.randn(6, 4) * 1e-3
    weights = {"mlp.weight": start + move * step / 100, "mlp.bias": torch.zeros(6)}
    done = rollouts(step, is_behind=is_behind)
    count = torch.tensor(float(done * EPOCHS * BATCHES))
    state = {i: {"step": count.clone(), "exp_avg": torch.full((6,), float(i)), "exp_avg_sq": torch.ones(6)} for i in range(2)}
    groups = [{"lr": 1e-3 * (1 - done * ROLLOUT / TOTAL), "betas": (0.9, 0.999), "params": [0, 1]}]
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("data", json.dumps(agent(step, is_behind=is_behind, **more), indent=4))
        for name, tree in (
            ("pytorch_variables", {"log_ent_coef": torch.full((1,), -0.5)}),
            ("policy", weights),
            ("policy.optimizer", {"state": state, "param_groups": groups}),
        ):
            with archive.open(f"{name}.pth", "w", force_zip64=True) as member:
                member.write(saved(tree))
        archive.writestr("_stable_baselines3_version", "2.9.2")
        archive.writestr("system_info.txt", "- OS: Linux\n")


def write_run(folder: Path, steps: Sequence[int], **more: Any) -> Path:
    folder.mkdir()
    for step in steps:
        write_agent(folder / NAME.format(step), step, **more)
    return folder


def member(path: Path, name: str) -> Any:
    """What the trainer's reader gets of a record: it checks the zip's checksums, and torch its own."""
    with zipfile.ZipFile(path) as archive:
        raw = archive.read(name)
        return torch.load(io.BytesIO(raw), weights_only=True) if name.endswith(".pth") else raw


def test_an_agent_is_known_by_its_content_and_its_step_is_num_timesteps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256))
    for step in range(256, 2049, 256):
        (run / NAME.format(step)).rename(run / f"agent-{step // 256}.pkl")  # as people call it, and the trainer takes it
    found = discover(run)
    assert (found.layout, found.steps) == ("stable-baselines3", tuple(range(256, 2049, 256)))
    assert found.origin.evidence[0].where == "data.num_timesteps"


@pytest.mark.parametrize("is_behind", [True, False])
@pytest.mark.parametrize(("every", "horizon"), [(256, 512), (256, 100), (300, 600), (300, 37)])
def test_every_count_is_that_which_the_trainer_has_at_the_later_step(
    every: int, horizon: int, *, is_behind: bool, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", range(every, 9 * every, every), is_behind=is_behind)
    snapshots = discover(run).snapshots
    found = advance(snapshots, horizon)
    state = found.trees[""]
    step = snapshots[-1].step + horizon
    expected = agent(step, is_behind=is_behind)
    counts = ("num_timesteps", "_n_updates", "_current_progress_remaining", "_total_timesteps", "start_time", "_episode_num")
    assert {key: state.tree["data"][key] for key in counts} == {key: expected[key] for key in counts}
    done = expected["_n_updates"] * BATCHES
    assert set(state.literals.values()) <= {torch.tensor(float(done)).numpy().tobytes()}
    assert any(f"learn({TOTAL - step}, reset_num_timesteps=False)" in note for note in found.notes)


def test_the_forecast_has_the_origins_records_in_order_each_of_which_its_reader_takes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256))
    origin, output = run / NAME.format(2048), tmp_path / "out.zip"
    predict_run(fit_run(run), output, horizons=[512])
    with zipfile.ZipFile(origin) as before, zipfile.ZipFile(output) as after:
        assert after.testzip() is None
        assert after.namelist() == before.namelist()
        assert {info.compress_type for info in after.infolist()} == {zipfile.ZIP_STORED}
        for name in before.namelist():  # torch's own zips inside have checksums of their own
            if name.endswith(".pth"):
                assert zipfile.ZipFile(io.BytesIO(after.read(name))).testzip() is None
    assert all(member(output, name) == member(origin, name) for name in ("_stable_baselines3_version", "system_info.txt"))
    old, new = (member(path, "policy.pth")["mlp.weight"] for path in (origin, output))
    write_agent(tmp_path / "later.zip", 2560)
    torch.testing.assert_close(new, member(tmp_path / "later.zip", "policy.pth")["mlp.weight"], rtol=0, atol=2e-3)
    assert not torch.equal(old, new)
    moved = member(output, "policy.optimizer.pth")["state"][1]
    assert (moved["step"], moved["exp_avg"].tolist()) == (19 * EPOCHS * BATCHES, [1.0] * 6)
    assert member(output, "pytorch_variables.pth") == {"log_ent_coef": torch.full((1,), -0.5)}
    old_data, data = (json.loads(member(path, "data")) for path in (origin, output))
    assert {key for key in data if data[key] != old_data[key]} == {
        "num_timesteps",
        "_n_updates",
        "_current_progress_remaining",
    }


def test_a_file_as_it_was_is_written_byte_for_byte_where_nothing_moves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256))
    output = tmp_path / "out.zip"
    predict_run(fit_run(run), output, horizons=[512], counters="keep")
    assert member(output, "data") == member(run / NAME.format(2048), "data")


def test_texts_of_pickles_are_carried_and_never_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256))
    predict_run(fit_run(run), tmp_path / "out.zip", horizons=[512])
    assert "read" not in capfd.readouterr().out
    text = json.loads(member(tmp_path / "out.zip", "data"))["policy_class"][":serialized:"]
    pickle.loads(base64.b64decode(text))  # noqa: S301 - made above
    assert "read" in capfd.readouterr().out


@pytest.mark.parametrize(("name", "says"), [("safetensors", "mlp.weight"), ("pt", "mlp.weight")])
def test_the_weights_alone_are_written_in_other_containers(name: str, says: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256))
    output = tmp_path / f"out.{name}"
    predict_run(fit_run(run), output, horizons=[512], layout=name)
    if name == "pt":
        assert says in torch.load(output, weights_only=True)
    assert says.encode() in output.read_bytes()


def test_rates_in_proportion_to_what_remains_are_known_ahead(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", range(256, 2049, 256), is_behind=True)
    (done,) = predict_run(fit_run(run), tmp_path / "out.zip", horizons=[512])
    assert done.pace.clock == "rate"
    assert done.pace_ahead == pytest.approx((1 - 2304 / TOTAL) / (1 - 1792 / TOTAL), rel=0.35)


def test_a_run_that_has_reached_its_total_is_over_and_no_leap_passes_the_total(tmp_path: Path, call_cli: CallCli) -> None:
    run = write_run(tmp_path / "run", range(512, TOTAL + 1, 512))
    done = call_cli("predict", run, "--horizon", "1024", cwd=tmp_path)
    assert done.returncode == 2
    assert f"valid step {TOTAL + 1024}: expected a step before the end of the run" in done.stderr
    assert f"{NAME.format(TOTAL)} says data._total_timesteps = {TOTAL}" in done.stderr
    assert f"the run ended at step {TOTAL}" in call_cli("inspect", run, cwd=tmp_path).stdout
    assert f"DO NOT LEAP: Nothing is left to skip: the run ended at step {TOTAL}" in call_cli("fit", run, cwd=tmp_path).stderr
    (run / NAME.format(TOTAL)).unlink()
    late = call_cli("predict", run, "--horizon", "512", cwd=tmp_path)
    assert (late.returncode, "--horizon 511 or less" in late.stderr) == (2, True)
    assert "the run ended" not in call_cli("inspect", run, cwd=tmp_path).stdout


def test_an_agent_with_compressed_records_or_a_harmful_pickle_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_agent(run / NAME.format(256), 256, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match="compressed") as caught:
        discover(run)
    assert "save it again" in caught.value.hint
    with zipfile.ZipFile(run / NAME.format(256), "w") as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", saved({"w": torch.ones(2), "x": DANGER}))
    with pytest.raises(FileFormatError, match="print"):
        discover(run)


def test_the_trainer_resumes_with_the_counts_and_rates_of_the_uninterrupted_run(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    gym = pytest.importorskip("gymnasium")
    callbacks = pytest.importorskip("stable_baselines3.common.callbacks")

    rows: list[tuple[int, int, float, float]] = []

    class Watch(callbacks.BaseCallback):  # type: ignore[misc, name-defined, unused-ignore]
        def _on_rollout_start(self) -> None:
            optimizer = self.model.policy.optimizer
            state = optimizer.state_dict()["state"]
            count = float(state[0]["step"]) if state else 0.0
            step = self.model.num_timesteps
            rows.append((step, self.model._n_updates, optimizer.param_groups[0]["lr"], count))
            if save and step:
                self.model.save(tmp_path / "run" / NAME.format(step))

        def _on_step(self) -> bool:
            return True

    save = True
    (tmp_path / "run").mkdir()
    options: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}
    model = sb3.PPO(
        "MlpPolicy", gym.make("CartPole-v1"), seed=0, learning_rate=lambda left: 1e-3 * left, device="cpu", **options
    )
    model.learn(64 * 12, callback=Watch())
    whole = {row[0]: row for row in rows}
    for step in (640, 704):
        (tmp_path / "run" / NAME.format(step)).unlink()
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out.zip", horizons=[64])
    save = False
    rows.clear()
    resumed = sb3.PPO.load(tmp_path / "out.zip", env=gym.make("CartPole-v1"), device="cpu")
    resumed.learn(64 * 12 - resumed.num_timesteps, callback=Watch(), reset_num_timesteps=False)
    assert [row[0] for row in rows] == [640, 704]
    assert rows[0][1] == whole[640][1]
    assert rows[0][3] == whole[640][3]
    assert rows[1] == whole[704]  # the rate too: the trainer sets it before each update
