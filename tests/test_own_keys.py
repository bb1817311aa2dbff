"""Torch files whose weights lie under keys of the user's own: every network is found and forecast, and its averages move with it."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections import OrderedDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import farcast_cli
from farcast_cli.errors import NoWeightsError, OutputError, UnsafeFileError, UsageError
from farcast_cli.formats.torch_file import read_raw_pickle, read_torch_file
from farcast_cli.formats.tree import dotted
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.trainers.networks import find_networks
from tests.conftest import make_loose_run
from tests.corpus import Calls
from tests.tiny import forecast_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import CallCli

    Payload = dict[str, Any]

EVERY, LAST, HORIZON, DECAY = 10, 100, 20, 0.9


class _Loop:
    """Two networks with an optimizer each, and an average of the first."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
        self.average = copy.deepcopy(self.first)
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=3e-3) for net in (self.first, self.second)]
        self.batches = torch.Generator().manual_seed(1)

    def step(self) -> None:
        x = torch.randn(32, 8, generator=self.batches)
        for net, optimizer in zip((self.first, self.second), self.optimizers, strict=True):
            optimizer.zero_grad()
            (net(x) - x[:, : net.out_features].flip(1)).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            for mine, its in zip(self.average.parameters(), self.first.parameters(), strict=True):
                mine.lerp_(its, 1 - DECAY)


def _gan(loop: _Loop, _: int) -> Payload:
    first, second = loop.optimizers
    return {
        "g": loop.first.state_dict(),
        "d": loop.second.state_dict(),
        "g_ema": loop.average.state_dict(),
        "g_optim": first.state_dict(),
        "d_optim": second.state_dict(),
        "mean_path": torch.tensor(0.0),
    }


def _self_distilled(loop: _Loop, step: int) -> Payload:
    student = {f"module.{name}": value for name, value in loop.first.state_dict().items()}
    loss = {"center": torch.full((1, 8), float(step))}
    optimizer = loop.optimizers[0].state_dict()
    return {"student": student, "teacher": loop.average.state_dict(), "optimizer": optimizer, "epoch": step // 10, "loss": loss}


def _actor_critic(loop: _Loop, step: int) -> Payload:
    optimizers = {"actor": loop.optimizers[0].state_dict(), "critic": loop.optimizers[1].state_dict()}
    networks = {"actor": loop.first.state_dict(), "critic": loop.second.state_dict()}
    return {"networks": networks, "optimizers": optimizers, "total_steps": step}


def _nested(loop: _Loop, step: int) -> Payload:
    return {"state": {"model": loop.first.state_dict(), "optimizers": loop.optimizers[0].state_dict(), "step": step}}


def _listed_average(loop: _Loop, step: int) -> Payload:
    shadow = {"decay": DECAY, "num_updates": step, "shadow_params": [value.clone() for value in loop.average.parameters()]}
    return {"model": loop.first.state_dict(), "ema": shadow, "optimizer": loop.optimizers[0].state_dict(), "step": step}


FIRST = {"weight", "bias"}
LOOPS: dict[str, tuple[Callable[[_Loop, int], Payload], set[str], list[str]]] = {
    "gan": (_gan, {f"{key}.{name}" for key in "gd" for name in FIRST}, ["g_ema"]),
    "self-distilled": (_self_distilled, {f"module.{name}" for name in FIRST}, ["teacher"]),
    "actor and critic": (_actor_critic, {f"{key}.{name}" for key in ("actor", "critic") for name in FIRST}, []),
    "nested": (_nested, FIRST, []),
    "a listed average": (_listed_average, FIRST, ["ema.shadow_params"]),
}


def _saved(kind: Callable[[_Loop, int], Payload], folder: Path, *, until: int = LAST) -> Path:
    folder.mkdir()
    loop = _Loop()
    for step in range(1, until + 1):
        loop.step()
        if step % EVERY == 0:
            torch.save(kind(loop, step), folder / f"step_{step}.pt")
    return folder


def _load(path: Path, *, whole: bool = False) -> Any:
    return torch.load(path, weights_only=not whole)


def _tensors(tree: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree under its keys."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, torch.Tensor):
            yield str(key), value
        elif isinstance(value, (dict, list)):
            yield from ((f"{key}.{name}", inner) for name, inner in _tensors(value))


def _floats(tree: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in _tensors(tree) if "optim" not in name}


# --- what is found, and what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOOPS)
def test_every_network_of_a_loop_is_forecast_and_the_rest_is_as_it_was(kind: str, tmp_path: Path) -> None:
    make, names, averages = LOOPS[kind]
    run = _saved(make, tmp_path / "run")
    snapshot = discover(run).origin
    assert set(snapshot.tensors) == names
    assert [dotted(one.path) for one in snapshot.parts[0].averages] == averages
    written, _ = forecast_run(run, tmp_path / f"step_{LAST + HORIZON}.pt", HORIZON, method="line")
    origin, found = _floats(_load(run / f"step_{LAST}.pt")), _floats(_load(written))
    assert origin.keys() == found.keys()
    moved = {name for name in origin if not torch.equal(origin[name], found[name])}
    own = {name for name in origin if name.rpartition(".")[2] in FIRST or "shadow" in name}
    assert moved == own


def test_each_optimizer_keeps_its_state_and_counts_on(tmp_path: Path) -> None:
    run = _saved(_gan, tmp_path / "run")
    written, _ = forecast_run(run, tmp_path / "step_120.pt", HORIZON)
    origin, found = _load(run / f"step_{LAST}.pt"), _load(written)
    for name, shape in (("g_optim", (8, 8)), ("d_optim", (2, 8))):
        before, after = origin[name]["state"][0], found[name]["state"][0]
        assert after["exp_avg"].shape == shape
        assert torch.equal(before["exp_avg"], after["exp_avg"])
        assert float(after["step"]) == LAST + HORIZON
    resumed = torch.optim.Adam([torch.nn.Parameter(value) for value in found["g"].values()])
    resumed.load_state_dict(found["g_optim"])


@pytest.mark.parametrize("kind", ["gan", "self-distilled", "a listed average"])
def test_an_average_moves_to_where_training_would_have_moved_it(kind: str, tmp_path: Path) -> None:
    make, _, (average,) = LOOPS[kind]
    whole = _saved(make, tmp_path / "whole", until=LAST + HORIZON)
    run = _saved(make, tmp_path / "run")
    written, outcome = forecast_run(run, tmp_path / "out.pt", HORIZON, method="line")
    assert any(note.startswith(f"averages of the weights, moved with them: {average} (2") for note in outcome.notes)
    origin, found, truth = (
        torch.cat([value.flatten() for name, value in _floats(_load(path)).items() if name.startswith(average)])
        for path in (run / f"step_{LAST}.pt", written, whole / f"step_{LAST + HORIZON}.pt")
    )
    assert (found - truth).norm() < 0.5 * (origin - truth).norm()


def test_to_evaluate_the_forecast_takes_the_place_of_an_average_in_its_own_type(tmp_path: Path) -> None:
    def half(loop: _Loop, step: int) -> Payload:
        return {"model": loop.first.state_dict(), "ema": copy.deepcopy(loop.average).half().state_dict(), "step": step}

    run = _saved(half, tmp_path / "run")
    written, _ = forecast_run(run, tmp_path / "out.pt", HORIZON, method="line", purpose="evaluation")
    found = _load(written)
    assert torch.equal(found["ema"]["weight"], found["model"]["weight"].half())


def test_averages_are_said_to_move_and_the_tensors_of_another_network_are_counted(tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_gan, tmp_path / "run")
    options = ("predict", run, "--horizon", HORIZON, "--even-if-worse", "--dry-run")
    whole = call_cli(*options, cwd=tmp_path).stderr
    assert "tensors forecast, 0 copied" in whole
    assert " copied: " not in whole
    assert "g_ema.*: an average of the weights: it moves with them for resuming" in whole
    one = call_cli(*options, "--weights", "g", cwd=tmp_path).stderr
    count = len(_load(run / f"step_{LAST}.pt")["d"])
    assert f"tensors forecast, {count} copied" in one
    assert f"{count} tensors copied: {count} tensors outside the weights" in one


def test_several_networks_are_one_file_of_safetensors(tmp_path: Path) -> None:
    run = _saved(_gan, tmp_path / "run")
    written, outcome = forecast_run(run, tmp_path / "out.safetensors", HORIZON, layout="safetensors")
    torch_file, _ = forecast_run(run, tmp_path / "out.pt", HORIZON)
    found, same = load_file(written), _load(torch_file)
    assert set(found) == LOOPS["gan"][1]
    assert torch.equal(found["d.weight"], same["d"]["weight"])
    assert any("g_ema" in note and "d_optim" in note for note in outcome.notes)


# --- which dicts are networks ----------------------------------------------------------------------------------------


def _net(*shape: int) -> Payload:
    return {"w": torch.zeros(shape or (4, 4)), "b": torch.zeros(4)}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(4, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
TREES: dict[str, tuple[Payload, dict[str, str], dict[str, set[str]]]] = {
    "a usual key alone": ({"model": _net(), "optimizer": OPTIMIZER}, {"model": ""}, {}),
    "a second network beside a usual key": ({"model": _net(), "disc": _net(3, 4)}, {"model": "", "disc": "disc"}, {}),
    "a copy of an earlier time": ({"model": _net(), "best_model": _net()}, {"model": ""}, {}),
    "the average alone is the weights": ({"ema": _net(), "optimizer": OPTIMIZER}, {"ema": ""}, {}),
    "an average by a library": (
        {"model": _net(), "ema": {"initted": torch.tensor(1), "ema_model.w": torch.zeros(4, 4), "ema_model.b": torch.zeros(4)}},
        {"model": ""},
        {"ema": {"w", "b"}},
    ),
    "a teacher that is another model": ({"student": _net(), "teacher": _net(9, 4)}, {"student": ""}, {}),
    "targets of networks that look the same": (
        {"critic_1": _net(), "critic_2": _net(), "critic_1_target": _net(), "critic_2_target": _net()},
        {"critic_1": "critic_1", "critic_2": "critic_2"},
        {"critic_1_target": {"critic_1.w", "critic_1.b"}, "critic_2_target": {"critic_2.w", "critic_2.b"}},
    ),
    "with capitals": ({"netG": _net(), "netG_EMA": _net()}, {"netG": ""}, {"netG_EMA": {"w", "b"}}),
    "each with its optimizer": (
        {"gen": {"net": _net(), "opt": OPTIMIZER}, "disc": {"net": _net(3, 4), "opt": OPTIMIZER}},
        {"gen.net": "", "disc.net": "disc.net"},
        {},
    ),
    "a log and a statistic": ({"net": _net(), "losses": _net(), "mean_std": {"mean": torch.zeros(4)}}, {"net": ""}, {}),
    "a replay buffer": ({"policy": _net(), "replay_buffer": _net(9, 9)}, {"policy": ""}, {}),
    "a bare state dict": ({"w": torch.zeros(2, 2), "_extra_state": {"amax": torch.zeros(4)}}, {"": ""}, {}),
    "a bare state dict of dicts": ({"encoder": _net(), "scale": torch.zeros(4)}, {"": ""}, {}),
}


@pytest.mark.parametrize("case", TREES)
def test_networks_and_averages_are_told_by_what_the_dicts_hold_and_their_keys(case: str, tmp_path: Path) -> None:
    tree, networks, averages = TREES[case]
    torch.save(tree, tmp_path / "a.pt")
    found = find_networks(tmp_path / "a.pt", read_torch_file(tmp_path / "a.pt").tree)
    assert {dotted(one.path): dotted(one.prefix) for one in found.networks} == networks
    assert {dotted(one.path): {name for _, name in one.pairs} for one in found.averages} == averages


def test_what_is_no_network_is_listed_as_copied(tmp_path: Path) -> None:
    tree = {"student": _net(), "teacher": _net(9, 4), "latent": torch.zeros(3), "step": 5}
    torch.save(tree, tmp_path / "a.pt")
    told = dict(open_snapshot(tmp_path / "a.pt").beside)
    assert told.keys() == {"teacher.*", "latent"}
    assert "2 tensors outside the weights are not forecast" in told["teacher.*"]


def test_names_of_two_networks_that_would_be_the_same_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"disc": _net(), "w": torch.zeros(4, 4)}, "disc": _net(3, 4)}, tmp_path / "a.pt")
    with pytest.raises(farcast_cli.SnapshotError, match="two networks are called 'disc'") as caught:
        open_snapshot(tmp_path / "a.pt")
    assert "--weights" in caught.value.hint
    assert set(open_snapshot(tmp_path / "a.pt", ("disc",)).tensors) == {"w", "b"}


# --- --weights -------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_under_the_keys_that_are_named(tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_actor_critic, tmp_path / "run")
    listed = call_cli("inspect", run, "--weights", "networks.critic", "--json")
    assert '"networks.actor.*"' in listed.stdout
    assert call_cli("fit", run, "--weights", "networks.critic", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", HORIZON, "--even-if-worse", "-o", "out.pt", "--method", "line", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    origin, found = _load(run / f"step_{LAST}.pt")["networks"], _load(tmp_path / "out.pt")["networks"]
    assert torch.equal(found["actor"]["weight"], origin["actor"]["weight"])
    assert not torch.equal(found["critic"]["weight"], origin["critic"]["weight"])


def test_kept_and_watched_snapshots_and_a_leap_are_of_the_weights_that_are_named(tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_gan, tmp_path / "run")
    assert call_cli("keep", run, "--weights", "d", "--into", "kept", cwd=tmp_path).returncode == 0
    assert set(load_file(tmp_path / "kept" / "step_100.pt.kept.safetensors")) == FIRST
    leapt = call_cli("leap", run, "--weights", "d", "--gain", "1", "--even-if-worse", cwd=tmp_path)
    assert leapt.returncode == 0, leapt.stderr
    origin, found = _load(run / f"step_{LAST}.pt"), _load(tmp_path / leapt.stdout.strip())
    assert torch.equal(found["g"]["weight"], origin["g"]["weight"])
    assert not torch.equal(found["d"]["weight"], origin["d"]["weight"])
    watched = call_cli("watch", run, "--weights", "d", "--once", "--into", "watched", cwd=tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert set(load_file(tmp_path / "watched" / "step_100.pt.kept.safetensors")) == FIRST


def test_a_module_whose_list_of_unsaved_buffers_is_none_is_read_all_the_same(tmp_path: Path) -> None:
    net = torch.nn.BatchNorm1d(4)
    net._non_persistent_buffers_set = 5  # type: ignore[assignment]
    torch.save({"model": net}, tmp_path / "a.pt")
    assert "running_mean" in open_snapshot(tmp_path / "a.pt").tensors


def test_a_name_of_very_many_words_in_an_average_takes_no_time(tmp_path: Path) -> None:
    """Each of its ends was looked for: 200,000 words took minutes."""
    torch.save({"model": _net(), "ema": _net() | {f"{'.' * 200_000}x": torch.zeros(4)}}, tmp_path / "a.pt")
    assert [dotted(one.path) for one in open_snapshot(tmp_path / "a.pt").parts[0].averages] == ["ema"]


@pytest.mark.parametrize("is_remembered", [True, False])
def test_a_teacher_that_is_not_trained_stays_as_it_is(tmp_path: Path, *, is_remembered: bool) -> None:
    """A leap may see the newest snapshot alone, so its memory has to tell a teacher from an average of the weights."""
    run, loop = tmp_path / "run", _Loop()
    run.mkdir()
    teacher = {name: value.clone() for name, value in loop.first.state_dict().items()}
    for step in range(1, LAST + 1):
        loop.step()
        if step % EVERY == 0:
            for path in run.iterdir() if is_remembered else ():
                path.unlink()
            payload = {"student": loop.first.state_dict(), "teacher": teacher, "ema": loop.average.state_dict(), "step": step}
            torch.save(payload, run / f"step_{step}.pt")
            leapt = farcast_cli.leap(run, output=f"{tmp_path / 'leaps'}/", gain=1.0) if is_remembered or step == LAST else None
    assert leapt is not None
    assert leapt.outcome.path is not None
    found, origin = _load(leapt.outcome.path), _load(run / f"step_{LAST}.pt")
    assert torch.equal(found["teacher"]["weight"], teacher["weight"])
    assert not torch.equal(found["ema"]["weight"], origin["ema"]["weight"])
    assert any(note.endswith("they stay as they are: teacher") for note in leapt.outcome.notes)


def test_kept_snapshots_tell_a_teacher_that_is_not_trained(tmp_path: Path, call_cli: CallCli) -> None:
    """The trainer's older checkpoints are gone, and kept ones have the student alone."""
    teacher = {"weight": torch.ones(8, 8), "bias": torch.ones(8)}
    run = _saved(lambda loop, step: {"student": loop.first.state_dict(), "teacher": teacher, "step": step}, tmp_path / "run")
    assert call_cli("keep", run, cwd=tmp_path).returncode == 0
    for step in range(EVERY, LAST, EVERY):
        (run / f"step_{step}.pt").unlink()
    done = call_cli("predict", run, "--horizon", HORIZON, "--even-if-worse", "-o", "out.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(_load(tmp_path / "out.pt")["teacher"]["weight"], torch.ones(8, 8))
    assert not torch.equal(_load(tmp_path / "out.pt")["student"]["weight"], _load(run / f"step_{LAST}.pt")["student"]["weight"])


def test_kept_snapshots_of_other_weights_are_no_second_run(tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_gan, tmp_path / "run")
    for keys in (("--weights", "d"), ("--weights", "g"), ()):
        done = call_cli("keep", run, *keys, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "kept").iterdir())) == 3
    refused = call_cli("keep", run, "--weights", "g", "--into", "kept/run", cwd=tmp_path)
    assert refused.returncode == OutputError.exit_code
    assert "holds kept snapshots of --weights d, expected those of --weights g" in refused.errors[0]
    for step in range(EVERY, LAST, EVERY):
        (run / f"step_{step}.pt").unlink()
    for keys in (("--weights", "d"), ("--weights", "g"), ()):
        found = call_cli("inspect", run, *keys, "--json", cwd=tmp_path)
        assert len(json.loads(found.stdout)["snapshots"]) == LAST // EVERY, found.stderr
    other = call_cli("fit", run, "--weights", "g", "--history", "kept/run", cwd=tmp_path)
    assert "expected kept snapshots of --weights g, found those of --weights d" in other.errors[0]


@pytest.mark.parametrize("layout", ["same", "safetensors"])
def test_a_forecast_is_verified_by_the_weights_that_were_chosen(layout: str, tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_gan, tmp_path / "run")
    assert call_cli("fit", run, "--weights", "d", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", HORIZON, "--even-if-worse", "--layout", layout, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    truth = _saved(_gan, tmp_path / "longer", until=LAST + HORIZON) / f"step_{LAST + HORIZON}.pt"
    told = json.loads(call_cli("verify", done.stdout.strip(), "--against", truth, "--json", cwd=tmp_path).stdout)
    assert {one["name"] for one in told["per_tensor"]} == FIRST
    assert told["ratio"] != 1.0


def test_a_run_that_resumed_is_known_by_the_weights_that_were_chosen(tmp_path: Path, call_cli: CallCli) -> None:
    def hidden(loop: _Loop, step: int) -> Payload:
        return {"deep": {"er": {"and": {"down": loop.first.state_dict()}}}, "step": step}

    run, longer = _saved(hidden, tmp_path / "run"), _saved(hidden, tmp_path / "longer", until=LAST + 3 * EVERY)
    assert call_cli("fit", run, "--weights", "deep.er.and.down", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", HORIZON, "--even-if-worse", cwd=tmp_path)
    last = (longer / f"step_{LAST + 3 * EVERY}.pt").rename(run / f"step_{LAST + 3 * EVERY}.pt")
    told = json.loads(call_cli("verify", done.stdout.strip(), "--against", last, "--json", cwd=tmp_path).stdout)
    assert told["descends"]


@pytest.mark.parametrize("keys", ["critic", "networks.critic.weight", "total_steps"])
def test_a_key_without_tensors_is_refused_with_those_that_have_some(keys: str, tmp_path: Path, call_cli: CallCli) -> None:
    run = _saved(_actor_critic, tmp_path / "run")
    done = call_cli("fit", run, "--weights", keys, cwd=tmp_path)
    assert done.returncode == NoWeightsError.exit_code
    assert f"--weights {keys}: expected a dict of tensors under that key" in done.errors[0]
    assert "networks.actor, networks.critic" in done.hints[0]
    assert not (tmp_path / "forecaster.safetensors").exists()


def test_a_file_without_any_network_names_the_option_and_the_keys(tmp_path: Path) -> None:
    torch.save({"deep": {"er": {"and": {"down": _net()}}}}, tmp_path / "a.pt")
    with pytest.raises(NoWeightsError, match="no weights found") as caught:
        open_snapshot(tmp_path / "a.pt")
    assert "--weights" in caught.value.hint
    assert "deep.er.and.down" in caught.value.hint
    assert set(open_snapshot(tmp_path / "a.pt", ("deep.er.and.down",)).tensors) == {"w", "b"}


def test_keys_make_no_sense_where_a_layout_has_its_weights_in_one_place(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", (10, 20))
    done = call_cli("inspect", tmp_path / "run", "--weights", "model")
    assert done.returncode == UsageError.exit_code
    assert "--weights: a safetensors snapshot has its weights in one place" in done.errors[0]
    assert call_cli("inspect", tmp_path / "run", "--weights", "a,,b").returncode == UsageError.exit_code


# --- pickled modules -------------------------------------------------------------------------------------------------


class v8Loss:  # noqa: N801 - as ultralytics calls it: a class that is not written like one
    """A criterion that a model holds once it has been evaluated."""

    def __init__(self) -> None:
        self.hyp = SimpleNamespace(box=7.5)
        self.proj = torch.arange(4.0)


class Block(torch.nn.Module):
    """A module with children, buffers that are saved and that are not, and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.act = torch.nn.SiLU()
        self.register_buffer("grid", torch.zeros(3), persistent=False)
        self.names, self.stride, self.criterion = {0: "cat"}, torch.tensor([8.0]), v8Loss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 2, H, W) to (N, 4, H, W)."""
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


def _train(save: Callable[[torch.nn.Module, torch.optim.Optimizer, int], Payload | torch.nn.Module], folder: Path) -> Path:
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Block()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    batches = torch.Generator().manual_seed(1)
    for step in range(1, LAST + 1):
        x = torch.randn(4, 2, 3, 3, generator=batches)
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        if step % EVERY == 0:
            torch.save(save(net, optimizer, step), folder / f"epoch{step // EVERY}.pt")
    return folder


def _as_ultralytics(net: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Payload:
    """As ultralytics 8.4 has it: the weights are a module in half precision, under `ema` alone."""
    average = copy.deepcopy(net).half()
    average.conv.bias.scale_lr = 2.0  # type: ignore[union-attr]
    return {
        "epoch": step // EVERY - 1,
        "best_fitness": None,
        "model": None,
        "ema": average,
        "updates": step,
        "optimizer": optimizer.state_dict(),
        "train_args": {"epochs": 100, "name": "train"},
        "date": "2026-01-01T00:00:00",
    }


def test_a_module_that_was_pickled_whole_is_forecast_and_loads_as_the_module_again(tmp_path: Path) -> None:
    run = _train(_as_ultralytics, tmp_path / "run")
    snapshot = discover(run).origin
    state = _load(run / "epoch10.pt", whole=True)["ema"].state_dict()
    assert list(snapshot.tensors) == list(state)
    assert snapshot.step == LAST
    assert snapshot.tensors["conv.weight"].dtype.name == "float16"
    written, _ = forecast_run(run, tmp_path / "out.pt", HORIZON, method="line")
    origin, found = _load(run / "epoch10.pt", whole=True), _load(written, whole=True)
    assert (found["epoch"], found["updates"]) == (origin["epoch"] + HORIZON // EVERY, LAST + HORIZON)
    assert int(found["ema"].norm.num_batches_tracked) == LAST + HORIZON
    assert found["ema"].names == {0: "cat"}
    assert vars(found["ema"].criterion.hyp) == {"box": 7.5}
    assert found["ema"].conv.bias.scale_lr == 2.0
    flat, _ = forecast_run(run, tmp_path / "flat.safetensors", HORIZON, method="line", layout="safetensors")
    twin = Block().half()
    twin.load_state_dict(load_file(flat))
    x = torch.ones(1, 2, 3, 3, dtype=torch.float16)
    assert torch.equal(found["ema"].eval()(x), twin.eval()(x))
    assert not torch.equal(found["ema"].eval()(x), origin["ema"].eval()(x))


def test_a_module_by_itself_keeps_every_byte_of_its_pickle(tmp_path: Path) -> None:
    run = _train(lambda net, _, __: net, tmp_path / "run")
    for path in run.iterdir():
        path.rename(run / f"step_{int(path.stem.removeprefix('epoch')) * EVERY}.pt")
    written, _ = forecast_run(run, tmp_path / "step_120.pt", HORIZON, method="line")
    assert read_raw_pickle(written) == read_raw_pickle(run / "step_100.pt")
    origin, found = _load(run / "step_100.pt", whole=True), _load(written, whole=True)
    assert not torch.equal(found.conv.weight, origin.conv.weight)
    assert int(found.norm.num_batches_tracked) == LAST + HORIZON
    found(torch.ones(1, 2, 3, 3)).sum().backward()


def test_the_modules_class_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _train(_as_ultralytics, tmp_path / "run")
    monkeypatch.setitem(sys.modules, __name__, None)  # whoever imports it now fails
    assert len(discover(run).snapshots) == LAST // EVERY


def quiet(*_: object) -> OrderedDict[str, Any]:
    """A function of the user's own."""
    return OrderedDict()


@pytest.mark.parametrize("what", [Calls(quiet), quiet, {quiet: 1}, (quiet,)])
def test_a_function_is_no_class_for_being_written_like_one(what: Any, tmp_path: Path) -> None:
    torch.save({"model": _net(), "what": what}, tmp_path / "a.pt")
    with pytest.raises(UnsafeFileError, match=r"asks for tests\.test_own_keys\.quiet"):
        read_torch_file(tmp_path / "a.pt")


def test_a_teacher_that_does_not_move_stays_where_an_old_memory_has_no_mark_of_it(tmp_path: Path) -> None:
    def frozen(loop: _Loop, step: int) -> Payload:
        return {"student": loop.first.state_dict(), "teacher": _Loop().first.state_dict(), "step": step}

    run, out = _saved(frozen, tmp_path / "whole"), tmp_path / "out"
    late = sorted(run.iterdir(), key=lambda path: int(path.stem.partition("_")[2]))[-3:]
    (tmp_path / "run").mkdir()
    for path in late[:2]:
        shutil.copy(path, tmp_path / "run")
    farcast_cli.leap(tmp_path / "run", output=f"{out}/")
    (memory,) = out.glob("*.memory.safetensors")
    with safe_open(memory, "pt") as file:
        tensors, record = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["farcast"])  # noqa: SIM118
    assert record.pop("averages")
    save_file(tensors, memory, {"farcast": json.dumps(record)})
    shutil.copy(late[2], tmp_path / "run")
    made = farcast_cli.leap(tmp_path / "run", output=f"{out}/", gain=1.0)
    written = next(path for path in out.glob("*.pt"))
    assert all(torch.equal(value, _load(late[2])["teacher"][name]) for name, value in _load(written)["teacher"].items()), made
