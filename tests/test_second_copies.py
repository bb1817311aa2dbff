"""The optimizer's second copies of the weights are forecast with them, so that the first step after a leap keeps the leap."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import farcast_cli
from farcast_cli.engine.linear import LinearMap
from tests.tiny import fit_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from farcast_cli.request import Outcome

EVERY, LAST, HORIZON = 50, 400, 100


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 16, generator=generator) * 0.3
    while True:
        x = torch.randn(64, 16, generator=generator)
        yield x, x @ truth


def _new_net(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(16, 16).to(dtype)


def _backward(net: torch.nn.Linear, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch
    net.zero_grad()
    (net(x.to(net.weight.dtype)).float() - y).square().mean().backward()


def _state_copies(optimizer: dict[str, Any], masters: list[torch.Tensor]) -> dict[str, Any]:
    """As fused optimizers keep them: beside the moments of each parameter."""
    return {**optimizer, "state": {i: {**s, "master_param": masters[i].clone()} for i, s in optimizer["state"].items()}}


def _listed_copies(optimizer: dict[str, Any], masters: list[torch.Tensor]) -> dict[str, Any]:
    """As apex keeps them: lists beside the optimizer's own state."""
    return {"optimizer_state_dict": optimizer, "fp32_from_fp16": [[m.clone() for m in masters]]}


SHAPES = {"state": _state_copies, "list": _listed_copies}


def _read_copies(optimizer: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    if "fp32_from_fp16" in optimizer:
        return optimizer["optimizer_state_dict"], optimizer["fp32_from_fp16"][0]
    return optimizer, [state["master_param"] for state in optimizer["state"].values()]


def _mixed_loop(kind: str, resumed: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """A bfloat16 model that float32 masters train: the model's weights are overwritten with the masters at each step."""
    net = _new_net(torch.bfloat16)
    masters = [p.detach().float().clone() for p in net.parameters()]
    adam = torch.optim.AdamW(masters, lr=1e-3)
    step = 0
    if resumed:
        inner, saved = _read_copies(resumed["optimizer"])
        net.load_state_dict(resumed["model"])
        for mine, its in zip(masters, saved, strict=True):
            mine.copy_(its)
        adam.load_state_dict({**inner, "state": {i: _moments(s) for i, s in inner["state"].items()}})
        step = resumed["step"]
    for batch in _batches():
        _backward(net, batch)
        for master, p in zip(masters, net.parameters(), strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        adam.step()
        with torch.no_grad():
            for master, p in zip(masters, net.parameters(), strict=True):
                p.copy_(master)
        step += 1
        yield {"step": step, "model": net.state_dict(), "optimizer": SHAPES[kind](adam.state_dict(), masters)}


def _moments(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "master_param"}


def _lookahead_loop(resumed: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Lookahead around Adam: every sixth step, slow weights pull the weights back by half."""
    net = _new_net()
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
    slow = {i: p.detach().clone() for i, p in enumerate(net.parameters())}
    step = 0
    if resumed:
        net.load_state_dict(resumed["model"])
        adam.load_state_dict(resumed["optimizer"]["base_optimizer"])
        slow = {i: state["slow_params"].clone() for i, state in resumed["optimizer"]["lookahead_state"].items()}
        step = resumed["step"]
    for batch in _batches():
        _backward(net, batch)
        adam.step()
        step += 1
        with torch.no_grad():
            for i, p in enumerate(net.parameters() if step % 6 == 0 else ()):
                slow[i] += 0.5 * (p - slow[i])
                p.copy_(slow[i])
        kept = {i: {"slow_params": value.clone()} for i, value in slow.items()}
        yield {
            "step": step,
            "model": net.state_dict(),
            "optimizer": {"lookahead_state": kept, "base_optimizer": adam.state_dict()},
        }


def _schedule_free_loop() -> Iterator[dict[str, Any]]:
    """Schedule-free SGD, saved with the mean x as the weights: gradients move z, and x is the mean of all z.

    Source: Defazio et al., The Road Less Scheduled, 2024, equations (2) to (4), with beta = 0.9.
    """
    net, rate, total = _new_net(), 0.05, 0.0
    z = [p.detach().clone() for p in net.parameters()]
    x = [p.detach().clone() for p in net.parameters()]
    for step, batch in enumerate(_batches(), 1):
        with torch.no_grad():
            for p, its_z, its_x in zip(net.parameters(), z, x, strict=True):
                p.copy_(0.1 * its_z + 0.9 * its_x)
        _backward(net, batch)
        total += rate**2
        for p, its_z, its_x in zip(net.parameters(), z, x, strict=True):
            assert p.grad is not None
            its_z.sub_(rate * p.grad)
            its_x.add_((its_z - its_x) * rate**2 / total)
        state = {i: {"z": one.clone()} for i, one in enumerate(z)}
        groups = [{"lr": rate, "k": step, "weight_sum": total, "params": list(state)}]
        weights = dict(zip(net.state_dict(), (one.clone() for one in x), strict=True))
        yield {"step": step, "model": weights, "optimizer": {"state": state, "param_groups": groups}}


def _saved(loop: Iterator[dict[str, Any]], run: Path) -> Path:
    run.mkdir(parents=True)
    for payload in loop:
        if payload["step"] % EVERY == 0:
            torch.save(payload, run / f"step_{payload['step']}.pt")
        if payload["step"] == LAST:
            return run
    raise AssertionError("the loop ended")


def _forecast(run: Path, output: Path, **options: Any) -> tuple[dict[str, Any], Outcome]:
    (outcome,) = predict_run(fit_run(run), output, horizons=[HORIZON], even_if_worse=True, **options)
    return torch.load(output, weights_only=True), outcome


def _origin(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / f"step_{LAST}.pt", weights_only=True)
    return found


def _gap(first: dict[str, Any], second: dict[str, Any]) -> float:
    return float((first["model"]["weight"].float() - second["model"]["weight"].float()).norm())


@pytest.mark.parametrize("kind", SHAPES)
def test_master_weights_are_forecast_and_the_next_step_keeps_the_leap(kind: str, tmp_path: Path) -> None:
    run = _saved(_mixed_loop(kind), tmp_path / "run")
    forecast, outcome = _forecast(run, tmp_path / "out.pt")
    origin = _origin(run)
    after = next(_mixed_loop(kind, forecast))
    assert _gap(after, forecast) < 0.2 * _gap(forecast, origin)
    assert any(note.startswith("second copies of the weights, forecast with them: ") for note in outcome.notes)
    assert all(copied.name != "optimizer.*" for copied in outcome.copied)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_weights_are_the_masters_rounded_and_the_masters_keep_their_precision(kind: str, tmp_path: Path) -> None:
    forecast, _ = _forecast(_saved(_mixed_loop(kind), tmp_path / "run"), tmp_path / "out.pt")
    _, masters = _read_copies(forecast["optimizer"])
    for master, weight in zip(masters, forecast["model"].values(), strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), weight)
        assert not torch.equal(master, weight.float())


def _trainer_folders(run: Path) -> Path:
    """The same run as the folders of a Hugging Face Trainer: weights in bfloat16, masters in optimizer.pt."""
    for payload in itertools.islice(_mixed_loop("state"), LAST):
        step = payload["step"]
        if step % EVERY == 0:
            folder = run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            save_file(payload["model"], folder / "model.safetensors", metadata={"format": "pt"})
            torch.save(payload["optimizer"], folder / "optimizer.pt")
            torch.save({"last_epoch": step, "_last_lr": [1e-3], "_step_count": step + 1}, folder / "scheduler.pt")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9000, "log_history": []}))
    return run


@pytest.mark.parametrize("counters", ["advance", "keep"])
def test_masters_of_a_trainer_s_folder_move_with_its_weights(counters: Any, tmp_path: Path) -> None:
    run = _trainer_folders(tmp_path / "run")
    output = tmp_path / "out"
    predict_run(fit_run(run), output, horizons=[HORIZON], even_if_worse=True, counters=counters)
    weights = load_file(output / "model.safetensors")
    optimizer = torch.load(output / "optimizer.pt", weights_only=True)
    _, masters = _read_copies(optimizer)
    assert torch.equal(masters[0].bfloat16(), weights["weight"])
    after = next(_mixed_loop("state", {"step": LAST, "model": weights, "optimizer": optimizer}))
    origin = {"model": load_file(run / f"checkpoint-{LAST}" / "model.safetensors")}
    assert _gap(after, {"model": weights}) < 0.2 * _gap({"model": weights}, origin)


def test_farcast_leap_moves_the_masters_too(tmp_path: Path) -> None:
    run = _saved(_mixed_loop("state"), tmp_path / "run")
    leapt = farcast_cli.leap(run, output=f"{tmp_path / 'leaps'}/", gain=1.0)
    assert leapt.outcome.path is not None
    landed = torch.load(leapt.outcome.path, weights_only=True)
    _, masters = _read_copies(landed["optimizer"])
    assert torch.equal(masters[0].bfloat16(), landed["model"]["weight"])
    assert _gap(landed, _origin(run)) > 0


def test_masters_move_with_the_counters_kept_too(tmp_path: Path) -> None:
    run = _saved(_mixed_loop("state"), tmp_path / "run")
    kept, _ = _forecast(run, tmp_path / "out.pt", counters="keep")
    _, masters = _read_copies(kept["optimizer"])
    assert kept["step"] == LAST
    assert torch.equal(masters[0].bfloat16(), kept["model"]["weight"])
    assert _gap(kept, _origin(run)) > 0


def test_slow_weights_move_by_the_same_step_as_the_weights(tmp_path: Path) -> None:
    run = _saved(_lookahead_loop(), tmp_path / "run")
    forecast, outcome = _forecast(run, tmp_path / "out.pt")
    origin = _origin(run)
    slow, was = (one["optimizer"]["lookahead_state"][0]["slow_params"] for one in (forecast, origin))
    assert not torch.equal(was, origin["model"]["weight"]), "the slow weights lag"
    torch.testing.assert_close(slow - was, forecast["model"]["weight"] - origin["model"]["weight"], rtol=0, atol=1e-6)
    assert any(note.startswith("second copies of the weights, near them, moved by the same step: ") for note in outcome.notes)


def test_a_leap_outlives_the_synchronisation_with_the_slow_weights(tmp_path: Path) -> None:
    run = _saved(_lookahead_loop(), tmp_path / "run")
    forecast, _ = _forecast(run, tmp_path / "out.pt")
    later = [payload for payload, _ in zip(_lookahead_loop(forecast), range(7), strict=False)][-1]
    assert _gap(later, forecast) < 0.2 * _gap(forecast, _origin(run))


def test_schedule_free_z_moves_with_the_mean_and_so_does_its_sum_of_weights(tmp_path: Path) -> None:
    run = _saved(_schedule_free_loop(), tmp_path / "run")
    forecast, _ = _forecast(run, tmp_path / "out.pt")
    origin = _origin(run)
    for i, name in enumerate(origin["model"]):
        z, was = (one["optimizer"]["state"][i]["z"] for one in (forecast, origin))
        torch.testing.assert_close(z - was, forecast["model"][name] - origin["model"][name], rtol=0, atol=1e-5)
    (group,) = forecast["optimizer"]["param_groups"]
    assert group["k"] == LAST + HORIZON
    assert group["weight_sum"] == pytest.approx(0.05**2 * (LAST + HORIZON))


def test_moments_stay_whatever_they_are_called(tmp_path: Path) -> None:
    """A tensor of a weight's shape that is no copy: under a name that nobody knows it stays, byte by byte."""

    def renamed(loop: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for payload in loop:
            state = payload["optimizer"]["base_optimizer"]["state"]
            state = {i: {"m": s["exp_avg"], "v": s["exp_avg_sq"], "step": s["step"]} for i, s in state.items()}
            yield {**payload, "optimizer": {**payload["optimizer"]["base_optimizer"], "state": state}}

    run = _saved(renamed(_lookahead_loop()), tmp_path / "run")
    forecast, outcome = _forecast(run, tmp_path / "out.pt")
    for i, state in _origin(run)["optimizer"]["state"].items():
        assert torch.equal(forecast["optimizer"]["state"][i]["m"], state["m"])
        assert torch.equal(forecast["optimizer"]["state"][i]["v"], state["v"])
    assert not any("second copies" in note for note in outcome.notes)


def test_a_copy_by_its_name_that_is_unlike_all_weights_gets_a_caution(tmp_path: Path) -> None:
    def scrambled(loop: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for payload in loop:
            for state in payload["optimizer"]["state"].values():
                state["master_param"] = 3 - state["master_param"]
            yield payload

    run = _saved(scrambled(_mixed_loop("state")), tmp_path / "run")
    _, outcome = _forecast(run, tmp_path / "out.pt")
    assert any(note.startswith("caution: optimizer.state.0.master_param and 1 more: second copies") for note in outcome.notes)


def test_a_copy_that_older_snapshots_lack_is_forecast_from_the_weights(tmp_path: Path) -> None:
    """As kept snapshots lack it, which hold the weights alone."""
    run = _saved(_mixed_loop("state"), tmp_path / "run")
    for step in range(EVERY, LAST, EVERY):
        payload = torch.load(run / f"step_{step}.pt", weights_only=True)
        torch.save({"step": step, "model": payload["model"]}, run / f"step_{step}.pt")
    forecast, _ = _forecast(run, tmp_path / "out.pt")
    _, masters = _read_copies(forecast["optimizer"])
    assert torch.equal(masters[0].bfloat16(), forecast["model"]["weight"])
    assert _gap(forecast, _origin(run)) > 0


def test_a_trailing_copy_makes_the_update_of_its_weight() -> None:
    """By plain numpy: K = 2 weights, T = 4 snapshots, one equal copy of the first and a trailing one of the second."""
    random = np.random.default_rng(0)
    weights, gain, constant = random.normal(size=(3, 2, 4)), random.normal(size=(3, 2)), random.normal(size=(3, 2))
    linear = LinearMap(weights, gain, constant, origin=3, moves=frozenset({0})).with_copies([0, 1], [False, True])
    w, c = random.normal(size=4), random.normal()

    def update(row: int, own: float, files: list[float]) -> float:
        moves = [files[t] - (own if t not in linear.moves else 0) for t in range(len(files))]
        used = [t for t in range(len(files)) if t != linear.origin]
        return float(
            sum(linear.weights[1, row, t] * moves[t] for t in used) + linear.gain[1, row] * own + linear.constant[1, row]
        )

    of_weight = update(1, w[3], [*w, w[3]])
    assert update(3, c, [*w, w[3]]) == pytest.approx(of_weight)
    assert (linear.weights[1, 2] == linear.weights[1, 0]).all()
