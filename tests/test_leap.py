"""`farcast leap` in a loop on real files: what it writes, what it remembers, and what it refuses."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farcast_cli.forecast.momentum import KEPT, SMOOTHED, SPEED
from tests.conftest import edit_loose, tree_digest
from tests.rounds import SAVE_EVERY, train_by_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from tests.conftest import CallCli, Done

    Tensors = Mapping[str, torch.Tensor]
    Vector = NDArray[np.float64]

SHAPES: dict[str, tuple[int, ...]] = {"embed": (31, 7), "layer.weight": (16, 16), "layer.bias": (5,), "scale": (1,)}
GAP = 100


def start(dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def trained(weights: Tensors, number: int, *, length: int = GAP) -> dict[str, torch.Tensor]:
    """A stretch of training: a steady drift, a pull to a place, and noise that depends on the stretch alone."""
    found = {}
    path, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + number)
    for name, value in sorted(weights.items()):
        if not (value.is_floating_point() or value.is_complex()):
            found[name] = value + length
            continue
        parts = torch.view_as_real(value.to(torch.complex128))
        drift, shake = (torch.randn(parts.shape, generator=g, dtype=torch.float64) for g in (path, noise))
        moved = torch.view_as_complex(parts + length / GAP * (drift / 10 + shake / 50 - parts / 100))
        found[name] = (moved if value.is_complex() else moved.real).to(value.dtype)
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def save_loose(run: Path, step: int, weights: Tensors) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, run / f"step_{step:05d}.safetensors")
    return run / f"step_{step:05d}.safetensors"


def save_payload(run: Path, step: int, weights: Tensors) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    torch.save({"model": dict(weights), "step": step, "note": "as it was"}, run / f"ckpt_{step}.pt")
    return run / f"ckpt_{step}.pt"


def save_folder(run: Path, step: int, weights: Tensors) -> Path:
    """What a Trainer leaves, as far as farcast reads or copies it."""
    place = run / f"checkpoint-{step}"
    place.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, place / "model.safetensors", {"format": "pt"})
    state = {i: {"step": torch.tensor(float(step)), "exp_avg": torch.full((4,), step / 7)} for i in range(2)}
    torch.save({"state": state, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}, place / "optimizer.pt")
    torch.save({"cpu": torch.zeros(4, dtype=torch.uint8)}, place / "rng_state.pth")
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 100, "max_steps": 9000}))
    return place


SAVES: dict[str, Callable[[Path, int, Tensors], Path]] = {
    "loose": save_loose,
    "payload": save_payload,
    "folder": save_folder,
}


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        return load_file(path / "model.safetensors")
    if path.suffix == ".safetensors":
        return load_file(path)
    return dict(torch.load(path, weights_only=True)["model"])


def memory_of(home: Path, forecasts: str = "forecasts/run") -> Path:
    return home / forecasts / "run.memory.safetensors"


def record_of(memory: Path) -> dict[str, Any]:
    with safe_open(memory, "np") as file:
        content: dict[str, Any] = json.loads(file.metadata()["farcast"])
    return content


def remove(path: Path) -> None:
    for inner in sorted(path.rglob("*"), reverse=True):
        inner.unlink() if inner.is_file() else inner.rmdir()
    path.unlink() if path.is_file() else path.rmdir()


@dataclass
class Loop:
    """A run that is trained stretch by stretch, each from where the last leap landed."""

    home: Path
    call: CallCli
    kind: str = "loose"
    rotates: bool = False
    step: int = 0
    number: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=start)
    told: dict[str, Any] = field(default_factory=dict)
    """What the last call said, as JSON."""

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def memory(self) -> Path:
        return memory_of(self.home)

    @property
    def forecast(self) -> Path:
        return self.home / str(self.told["path"])

    @property
    def newest(self) -> Path:
        return max(self.run.iterdir(), key=lambda path: int("".join(c for c in path.stem if c.isdigit())))

    def train(self, length: int = GAP, count: int = 1) -> Loop:
        """Save so many snapshots, from the landing on. A trainer that rotates keeps the newest."""
        for _ in range(count):
            self.step, self.number = self.step + length, self.number + 1
            self.weights = trained(self.weights, self.number, length=length)
            before = list(self.run.iterdir()) if self.rotates and self.run.exists() else []
            SAVES[self.kind](self.run, self.step, self.weights)
            for old in before:
                remove(old)
        return self

    def leap(self, *options: object, code: int = 0) -> Done:
        """Call the command, and resume from what it wrote."""
        done = self.call("leap", "run", "--json", *options, cwd=self.home)
        assert done.returncode == code, done
        self.told = json.loads(done.stdout) if done.stdout else {}
        if self.told.get("path"):
            self.weights = load(self.forecast)
            self.step = self.told["origin_step"]
        return done

    def begun(self, *options: object) -> Loop:
        """After two snapshots and a first call, the memory has one stretch."""
        self.train(count=2)
        self.leap(*options, code=10)
        return self


@pytest.fixture
def loop(tmp_path: Path, call_cli: CallCli) -> Loop:
    return Loop(tmp_path, call_cli)


# --- the values ------------------------------------------------------------------------------------------------------


def flat(tensors: Tensors) -> Vector:
    """All values in one vector, in the order of their names."""
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def moves_in(memory: Path) -> dict[str, torch.Tensor]:
    return {n.removeprefix("move."): v for n, v in load_file(memory).items() if n.startswith("move.")}


def assert_near(found: Tensors, origin: Tensors, step: Vector, dtype: torch.dtype) -> None:
    """The origin and a step, within one unit in the last place of the type, and what float32 loses of the step itself."""
    one = torch.finfo(dtype).eps
    expected = flat(origin) + step
    worst = one * np.maximum(np.abs(expected), np.abs(flat(origin))) + 4 * np.finfo(np.float32).eps * np.abs(step)
    np.testing.assert_array_less(np.abs(flat(found) - expected), worst + 1e-30)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("loose", torch.float32),
        ("loose", torch.bfloat16),
        ("loose", torch.float16),
        ("loose", torch.float64),
        ("payload", torch.float32),
        ("payload", torch.bfloat16),
        ("folder", torch.float32),
        ("folder", torch.bfloat16),
    ],
)
def test_a_leap_is_the_origin_and_gain_times_the_mean_move_and_the_memory_holds_that_mean(
    loop: Loop, kind: str, dtype: torch.dtype
) -> None:
    loop.kind, loop.weights = kind, start(dtype)
    loop.begun()
    known, landing = record_of(loop.memory), load(loop.newest)
    for length in (GAP, 30, 170, GAP):
        mean = flat(moves_in(loop.memory)) / known["length"]
        loop.train(length)
        origin = load(loop.newest)
        loop.leap()
        ahead = record_of(loop.memory)["length"]  # in steps, or in learning-rate time
        speed = (flat(origin) - flat(landing)) / ahead
        before, after = 1 - KEPT ** known["count"], 1 - KEPT ** (known["count"] + 1)
        made = SMOOTHED * known["made"] + speed @ mean
        foretold = SMOOTHED * known["foretold"] + mean @ mean
        mean = (KEPT * before * mean + (1 - KEPT) * speed) / after
        gain = min(known["gain"] * math.exp(SPEED * max(-1.0, min(1.0, made / foretold))), 1.0)
        assert loop.told["share"] == pytest.approx(made / foretold, rel=1e-4)
        assert loop.told["gain"] == pytest.approx(gain, rel=1e-4)
        assert_near(load(loop.forecast), origin, loop.told["gain"] * ahead * mean, dtype)
        known, landing = record_of(loop.memory), load(loop.forecast)
        assert (known["count"], known["gain"], known["length"]) == (loop.told["stretches"], loop.told["gain"], ahead)
        assert (known["made"], known["foretold"]) == pytest.approx((made, foretold), rel=1e-4)
        assert set(load_file(loop.memory)) == {f"move.{name}" for name in SHAPES}, "the landing is the forecast itself"
        written = flat(moves_in(loop.memory))
        np.testing.assert_allclose(written, mean * ahead, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-9)


def test_every_leaps_for_a_stretch_of_so_many_steps(loop: Loop) -> None:
    loop.begun()
    loop.train()
    origin = load(loop.newest)
    loop.leap("--every", 250, "--gain", 0.4)
    step = flat(load(loop.forecast)) - flat(origin)
    np.testing.assert_allclose(step, 0.4 * 2.5 * flat(moves_in(loop.memory)), rtol=0.01, atol=1e-6)
    assert (loop.told["every"], loop.told["horizon"]) == (250, 100)


def test_a_first_call_remembers_every_snapshot_that_is_there_and_leaps_at_once(loop: Loop) -> None:
    loop.train(count=5)
    snapshots = [flat(load(path)) for path in sorted(loop.run.iterdir())]
    speeds = np.diff(np.stack(snapshots), axis=0) / GAP
    weights = KEPT ** np.arange(len(speeds))[::-1]
    origin = load(loop.newest)
    loop.leap()
    assert loop.told["stretches"] == 4
    assert_near(load(loop.forecast), origin, loop.told["gain"] * GAP * (weights @ speeds / weights.sum()), torch.float32)


def test_complex_weights_leap_as_the_pairs_of_reals_that_they_are(tmp_path: Path, call_cli: CallCli) -> None:
    found = {}
    for pairs in (False, True):
        (tmp_path / str(pairs)).mkdir()
        loop = Loop(tmp_path / str(pairs), call_cli)
        weights = start(torch.complex64, {"w": (9, 5)})
        for number in range(1, 5):
            weights = trained(weights, number)
            save_loose(loop.run, number * GAP, {"w": torch.view_as_real(weights["w"]) if pairs else weights["w"]})
            loop.leap(code=10 if number < 3 else 0)
            if number > 2:
                weights = {"w": torch.view_as_complex(loop.weights["w"]) if pairs else loop.weights["w"]}
        found[pairs] = weights["w"]
    assert found[False].dtype == torch.complex64
    assert torch.equal(found[False], found[True])


def test_tied_weights_stay_tied(loop: Loop) -> None:
    """The head is the embedding: one storage, before and after."""
    loop.kind = "payload"
    for number in range(1, 5):
        weights = trained(loop.weights, number)
        loop.step = number * GAP
        save_payload(loop.run, loop.step, {**weights, "head": weights["embed"]})
        loop.leap(code=10 if number < 3 else 0)
        loop.weights.pop("head", None)
        loop.weights = loop.weights if number > 2 else weights
    written = load(loop.forecast)
    assert written["head"].untyped_storage().data_ptr() == written["embed"].untyped_storage().data_ptr()
    assert not torch.equal(written["embed"], load(loop.newest)["embed"])


def with_statistics(weights: Tensors, size: float, step: int) -> dict[str, torch.Tensor]:
    """Weights with a BatchNorm whose variance falls to nothing."""
    left = torch.full((6,), size * math.exp(-step / 60))
    count = torch.tensor(step)
    return {**weights, "bn.running_mean": left, "bn.running_var": left.square(), "bn.num_batches_tracked": count}


def test_statistics_of_batchnorm_leap_but_do_not_steer_and_no_variance_falls_below_zero(
    tmp_path: Path, call_cli: CallCli
) -> None:
    gains = []
    for size in (1.0, 1000.0):
        home = tmp_path / str(size)
        home.mkdir()
        loop, weights = Loop(home, call_cli), start()
        for number in range(1, 5):
            weights = trained(weights, number)
            save_loose(loop.run, number * GAP, with_statistics(weights, size, number * GAP))
            done = call_cli("leap", "run", "--json", cwd=home)
        loop.told = json.loads(done.stdout)
        written, origin = load(loop.forecast), load(loop.newest)
        assert float(written["bn.running_var"].min()) == 0.0
        assert not torch.equal(written["bn.running_mean"], origin["bn.running_mean"])
        assert int(written["bn.num_batches_tracked"]) == 4 * GAP
        gains.append(loop.told["gain"])
    assert gains[0] == gains[1]


# --- what never moved, and what is not finite ------------------------------------------------------------------------

ODD = {0: -0.0, 3: math.inf, 4: -math.inf, 7: 1.5, 8: 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_element_that_never_moved_keeps_its_bits(loop: Loop, dtype: torch.dtype) -> None:
    """Zeros of both signs, infinities and a number, among others that move; and a tensor in which nothing moves."""
    still = {**start(dtype)}
    for at, value in ODD.items():
        still["embed"].view(-1)[at] = value
    loop.weights = still
    for number in range(1, 6):
        weights = trained(loop.weights, number)
        for at, value in ODD.items():
            weights["embed"].view(-1)[at] = value
        weights["layer.bias"] = still["layer.bias"]
        loop.step = number * GAP
        loop.weights = weights
        save_loose(loop.run, loop.step, weights)
        loop.leap(code=10 if number < 3 else 0)
        if number > 2:
            bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
            written = load(loop.forecast)
            assert torch.equal(written["layer.bias"].view(bits), still["layer.bias"].view(bits))
            kept, was = (tensors["embed"].view(-1).view(bits) for tensors in (written, still))
            assert [int(kept[at]) for at in ODD] == [int(was[at]) for at in ODD]
            assert torch.isfinite(written["embed"].view(-1)[9:]).all()
            assert not torch.equal(written["embed"], weights["embed"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_number_that_is_not_finite_is_refused_and_the_memory_stays_as_it_was(loop: Loop, value: float, calls: int) -> None:
    loop.train(count=2)
    for number in range(calls):
        loop.leap(code=0 if number else 10)
        loop.train()
    bad = load(loop.newest)["embed"]
    bad[3, 2] = value
    edit_loose(loop.newest, {"embed": bad})
    before = tree_digest(loop.home)
    done = loop.leap(code=3)
    (said,) = done.errors
    assert f"{loop.newest.name}: tensor 'embed' holds {value}" in said
    assert tree_digest(loop.home) == before


# --- one snapshot is enough ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "counters"), [("loose", "keep"), ("payload", "keep"), ("folder", "keep"), ("loose", "advance")]
)
def test_a_trainer_that_keeps_its_newest_checkpoint_only_gets_the_same_leaps_byte_for_byte(
    tmp_path: Path, call_cli: CallCli, kind: str, counters: str
) -> None:
    trees = []
    for rotates in (False, True):
        home = tmp_path / str(rotates)
        home.mkdir()
        loop = Loop(home, call_cli, kind, rotates)
        codes = []
        for _ in range(6):
            loop.train()
            assert len(list(loop.run.iterdir())) == (1 if rotates else loop.number)
            done = call_cli("leap", "run", "--json", "--counters", counters, cwd=home)
            loop.told = json.loads(done.stdout)
            codes.append(done.returncode)
            if done.returncode == 0:
                loop.weights = load(loop.forecast)
                loop.step += loop.told["horizon"] if counters == "advance" else 0
        assert codes == [10, 10, 0, 0, 0, 0]
        trees.append(tree_digest(home / "forecasts"))
    assert trees[0] == trees[1]


def test_one_snapshot_is_remembered_and_the_second_call_has_a_stretch(loop: Loop) -> None:
    loop.rotates = True
    loop.train()
    done = loop.leap(code=10)
    assert "one snapshot so far: a leap needs a stretch of training" in done.stderr
    assert (loop.told["path"], loop.told["verdict"], loop.told["stretches"]) == (None, "abstain", 0)
    assert {name: value.tolist() for name, value in load_file(loop.memory).items()} == {
        f"landing.{name}": value.tolist() for name, value in load(loop.newest).items()
    }
    first = flat(load(loop.newest))
    loop.train()
    loop.leap(code=10)
    assert loop.told["stretches"] == 1
    np.testing.assert_allclose(flat(moves_in(loop.memory)), flat(load(loop.newest)) - first, rtol=0.004, atol=1e-6)


def test_the_advice_on_the_length_of_a_stretch_is_given_only_when_the_length_is_new(tmp_path: Path, call_cli: CallCli) -> None:
    loop, told = Loop(tmp_path, call_cli, "folder"), []
    for every in (None, None, None, None, 60, 60):
        loop.train()
        options = ("--every", every) if every else ()
        told.append(call_cli("leap", "run", *options, cwd=tmp_path).stderr)
    advice = "leaps gained most at every 2 % of a run, which is 180 steps here"
    assert ["every" in text and advice in text for text in told] == [False, False, False, False, True, False]


# --- asked again -----------------------------------------------------------------------------------------------------


def state_of(home: Path) -> dict[str, tuple[str, int]]:
    """Every file with its digest and the time of its last change."""
    return {path: (digest, (home / path).stat().st_mtime_ns) for path, digest in tree_digest(home).items()}


@pytest.mark.parametrize("options", [(), ("--every", "50"), ("--even-if-worse",), ("--gain", "0.3"), ("--dry-run",)])
def test_without_new_training_the_same_path_is_printed_and_nothing_is_written(loop: Loop, options: tuple[str, ...]) -> None:
    loop.begun().train()
    loop.leap()
    path, before = loop.told["path"], state_of(loop.home)
    done = loop.leap(*options)
    assert (loop.told["path"], loop.told["again"]) == (path, True)
    assert "no training since the last call" in done.stderr
    assert "train on for a new one" in done.stderr
    assert state_of(loop.home) == before
    plain = loop.call("leap", "run", cwd=loop.home)
    assert (plain.returncode, plain.stdout) == (0, f"{path}\n")
    assert state_of(loop.home) == before


def test_a_refusal_is_said_again_and_nothing_is_written(loop: Loop) -> None:
    loop.begun().train()
    loop.leap("--max-gain", 0.05, code=10)
    reason = loop.told["reason"]
    assert reason == "the largest gain is 0.05: under 0.1 a leap is not worth a restart"
    before = state_of(loop.home)
    done = loop.call("leap", "run", cwd=loop.home)
    assert (done.returncode, done.stdout) == (10, "")
    assert f"no leap: {reason}" in done.stderr
    assert state_of(loop.home) == before


@pytest.mark.parametrize("option", [("--even-if-worse",), ("--gain", 0.5)])
def test_a_leap_that_was_refused_can_be_had_by_asking_for_it(loop: Loop, option: tuple[object, ...]) -> None:
    loop.begun().train()
    loop.leap("--max-gain", 0.05, code=10)
    stretches, origin = loop.told["stretches"], load(loop.newest)
    held = moves_in(loop.memory)
    loop.leap("--max-gain", 0.05, *option)
    assert loop.told["stretches"] == stretches, "no training has happened, so nothing is learned"
    gain = 0.5 if "--gain" in option else 0.1
    step = flat(load(loop.forecast)) - flat(origin)
    np.testing.assert_allclose(step, gain * flat(held), rtol=0.01, atol=1e-6)
    loop.train()
    loop.leap("--gain", 0.5)
    assert loop.told["stretches"] == stretches + 1


def test_a_run_whose_largest_tensor_is_frozen_is_seen_to_train_on(loop: Loop) -> None:
    frozen = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    for number in range(1, 5):
        loop.weights = {**trained(loop.weights, number), "frozen": frozen}
        save_loose(loop.run, number * GAP, loop.weights)
        loop.leap(code=10 if number < 3 else 0)
        assert not loop.told["again"]
    assert loop.told["origin_step"] == 4 * GAP


# --- a memory that is of no use --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_memory_of_another_run_is_neither_used_nor_replaced(
    options: tuple[str, ...], tmp_path: Path, call_cli: CallCli
) -> None:
    for name in ("a", "b"):
        Loop(tmp_path / name, call_cli).train(count=2)
    assert call_cli("leap", "a/run", "-o", "out/", cwd=tmp_path).returncode == 10
    before = tree_digest(tmp_path)
    done = call_cli("leap", "b/run", "-o", "out/", *options, cwd=tmp_path)
    assert done.returncode == 5
    assert done.errors == [f"error: out/run.memory.safetensors: the memory of another run, {(tmp_path / 'a/run').resolve()}"]
    assert "-o OUT/" in done.hints[0]
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize("output", ["out/leap", "out/leap.pt", "/dev/null"])
def test_a_place_that_does_not_fit_the_run_is_refused_at_the_first_call_and_no_memory_begins(
    tmp_path: Path, call_cli: CallCli, output: str
) -> None:
    """Not hours later, at the first call that leaps."""
    loop = Loop(tmp_path, call_cli)
    loop.train(count=2)
    done = call_cli("leap", "run", "-o", output, cwd=tmp_path)
    assert done.returncode == 2
    assert f"-o {output}: expected a name that ends in .safetensors" in done.stderr
    assert not list(tmp_path.rglob("*.memory.safetensors"))


def test_a_run_whose_name_is_no_text_keeps_its_memory(tmp_path: Path, call_cli: CallCli) -> None:
    name = "run\udcff"
    run = tmp_path / name
    weights = start()
    for number in range(1, 4):
        weights = trained(weights, number)
        save_loose(run, number * GAP, weights)
        done = call_cli("leap", name, "--json", cwd=tmp_path)
        assert "starts again" not in done.stderr
    assert done.returncode == 0
    assert any((tmp_path / "forecasts" / name).iterdir())


@pytest.mark.parametrize("damage", ["cut", "no memory", "zeros"])
def test_a_damaged_memory_is_one_clear_line_and_stays_as_it_is(loop: Loop, damage: str) -> None:
    loop.begun().train()
    if damage == "cut":
        loop.memory.write_bytes(loop.memory.read_bytes()[:-9])
    elif damage == "zeros":
        loop.memory.write_bytes(bytes(500))
    else:
        save_file({"w": torch.ones(3)}, loop.memory)
    before = tree_digest(loop.home)
    done = loop.leap(code=4)
    (said,) = done.errors
    assert "run.memory.safetensors" in said
    assert tree_digest(loop.home) == before


def test_a_forecast_that_is_gone_is_missed_where_no_training_has_happened(loop: Loop) -> None:
    loop.begun().train()
    loop.leap()
    path = loop.told["path"]
    loop.forecast.unlink()
    done = loop.leap(code=2)
    assert f"{path}, the last leap, was removed, and there was no training since then" in done.errors[0]
    assert done.hints == [
        "hint: continue from step_00300.safetensors, or remove forecasts/run/run.memory.safetensors to start a new memory"
    ]


def test_a_forecast_that_was_changed_is_not_resumed_from(loop: Loop) -> None:
    loop.begun().train()
    loop.leap()
    edit_loose(loop.forecast, {"scale": torch.ones(1)})
    done = loop.leap(code=2)
    assert "was changed since then" in done.errors[0]


@pytest.mark.parametrize(("change", "said"), [("gone", "was removed"), ("changed", "was changed since then")])
def test_without_the_landing_the_memory_starts_again_and_says_so(loop: Loop, change: str, said: str) -> None:
    loop.begun().train()
    loop.leap()
    if change == "gone":
        loop.forecast.unlink()
    else:
        edit_loose(loop.forecast, {"scale": torch.ones(1)})
    loop.train()
    done = loop.call("leap", "run", "--json", cwd=loop.home)
    assert f"the last leap, {said}: a new memory starts" in done.stderr
    assert json.loads(done.stdout)["stretches"] <= 3


def test_a_run_that_went_back_starts_its_memory_again_and_says_so(loop: Loop) -> None:
    loop.begun().train()
    loop.leap()
    loop.newest.unlink()
    save_loose(loop.run, 300, trained(load(loop.newest), 77))
    done = loop.call("leap", "run", "--json", "--overwrite", cwd=loop.home)
    assert "the memory ends at step 300, and the newest snapshot is of step 300: a new memory starts" in done.stderr


def test_other_tensors_start_the_memory_again_and_say_so(loop: Loop) -> None:
    loop.begun().train()
    loop.leap("--max-gain", 0.05, code=10)
    loop.weights["more"] = torch.ones(3)
    loop.train()
    done = loop.leap(code=10)
    assert "its tensors are not those of step_00400.safetensors: a new memory starts" in done.stderr
    assert (loop.told["stretches"], loop.told["verdict"]) == (0, "abstain")


# --- where things lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_dry_run_writes_nothing_not_even_a_folder(loop: Loop, count: int) -> None:
    loop.train(count=count)
    before = state_of(loop.home)
    done = loop.leap("--dry-run", "-o", "deep/er/", code=0 if count > 2 else 10)
    assert loop.told["dry_run"] is True
    assert ("would leap" in done.stderr) == (count > 2)
    assert state_of(loop.home) == before


def test_with_a_file_named_the_leap_is_that_file_and_the_memory_lies_beside_it(loop: Loop) -> None:
    loop.train(count=3)
    loop.leap("-o", "out/a.safetensors")
    names = {"a.safetensors", "a.safetensors.farcast.json", "run.memory.safetensors"}
    assert {path.name for path in (loop.home / "out").iterdir()} == names
    loop.train()
    done = loop.leap("-o", "out/a.safetensors", code=5)
    assert "out/a.safetensors: exists already" in done.errors[0]
    loop.leap("-o", "out/b.safetensors")
    assert loop.told["stretches"] == 3


def test_a_forecast_may_take_the_place_of_the_last_one(loop: Loop) -> None:
    loop.train(count=3)
    loop.leap("-o", "out/a.safetensors", "--gain", 0.5)
    for _ in range(2):
        loop.train()
        origin = load(loop.newest)
        loop.leap("-o", "out/a.safetensors", "--overwrite", "--gain", 0.5)
        held = moves_in(loop.home / "out/run.memory.safetensors")
        np.testing.assert_allclose(flat(load(loop.forecast)) - flat(origin), 0.5 * flat(held), rtol=0.01, atol=1e-6)
    assert loop.told["stretches"] == 4


def test_a_folder_that_is_named_is_for_the_leaps_and_their_memory(loop: Loop) -> None:
    loop.train(count=3)
    loop.leap("-o", "out/")
    assert loop.told["path"].startswith("out/step_00300-leap")
    assert memory_of(loop.home, "out").exists()


@pytest.mark.parametrize("options", [("-o", "run/"), ("-o", "run/a.safetensors"), ("--ledger", "run/ledger.jsonl")])
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_written_into_the_runs_folder(loop: Loop, options: tuple[str, ...], count: int) -> None:
    loop.train(count=count)
    before = tree_digest(loop.home)
    done = loop.leap(*options, code=5)
    assert "lies inside the run's folder" in done.errors[0]
    assert tree_digest(loop.home) == before


@pytest.mark.parametrize("kind", SAVES)
def test_no_byte_of_the_run_is_changed(loop: Loop, kind: str) -> None:
    loop.kind = kind
    loop.begun()
    for _ in range(3):
        loop.train()
        before = state_of(loop.run)
        loop.leap()
        assert state_of(loop.run) == before


def test_the_memory_is_as_private_as_the_weights(loop: Loop) -> None:
    loop.train(count=2)
    for path in loop.run.iterdir():
        path.chmod(0o600)
    loop.leap(code=10)
    assert loop.memory.stat().st_mode & 0o777 == 0o600


# --- the ledger, counters, options -----------------------------------------------------------------------------------


def test_the_ledger_has_a_line_for_each_leap_and_fit_takes_only_what_came_after_the_last(loop: Loop) -> None:
    loop.begun()
    for _ in range(3):
        loop.train()
        loop.leap()
    lines = [json.loads(line) for line in (loop.home / "forecasts/ledger.jsonl").read_text().splitlines()]
    assert [(line["origin_step"], line["counters"]) for line in lines] == [(300, "keep"), (400, "keep"), (500, "keep")]
    assert loop.told["path"] == f"forecasts/{lines[-1]['forecast']}"
    assert lines[-1]["valid_step"] == 500 + loop.told["horizon"]
    loop.train(count=6)
    done = loop.call("fit", "run", "--json", cwd=loop.home)
    content = json.loads(done.stdout)
    assert (content["num_snapshots"], content["leap"], content["origin_step"]) == (6, 500, 1100)


def test_leaps_that_the_run_never_resumed_from_take_nothing_from_its_history(loop: Loop) -> None:
    loop.begun()
    for _ in range(4):
        loop.train()
        own = loop.weights
        loop.leap()
        loop.weights = own
    loop.train()
    content = json.loads(loop.call("fit", "run", "--json", cwd=loop.home).stdout)
    assert (content["num_snapshots"], content["leap"]) == (7, None)


def test_a_leap_may_be_written_in_another_container_and_says_what_that_leaves_out(loop: Loop) -> None:
    loop.kind = "payload"
    loop.train(count=3)
    origin = load(loop.newest)
    done = loop.call("leap", "run", "--layout", "safetensors", cwd=loop.home)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/ckpt_300-leap100.safetensors\n")
    assert "note: weights only: not in safetensors: step, note" in done.stderr.splitlines()
    assert load(loop.home / done.stdout.strip()).keys() == origin.keys()


@pytest.mark.parametrize("counters", ["keep", "advance"])
def test_counters_stay_or_move_as_asked(loop: Loop, counters: str) -> None:
    loop.kind = "folder"
    loop.train(count=3)
    origin = loop.newest
    done = loop.leap("--counters", counters)
    step = 300 + (loop.told["horizon"] if counters == "advance" else 0)
    assert loop.forecast.name == (
        f"checkpoint-{step}" if counters == "advance" else f"checkpoint-300-leap{loop.told['horizon']}"
    )
    assert json.loads((loop.forecast / "trainer_state.json").read_text())["global_step"] == step
    optimizer = torch.load(loop.forecast / "optimizer.pt", weights_only=True)
    assert float(optimizer["state"][0]["step"]) == step
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.full((4,), 300 / 7))
    same = (loop.forecast / "optimizer.pt").read_bytes() == (origin / "optimizer.pt").read_bytes()
    assert same == (counters == "keep")
    assert record_of(loop.memory)["landing_step"] == step
    assert ("the counters stay at step 300;" in done.stderr) == (counters == "keep")
    assert (f"the counters advance to step {step};" in done.stderr) == (counters == "advance")


def test_a_leap_that_advances_the_counters_leaves_half_of_the_steps_that_the_run_has_left(loop: Loop) -> None:
    loop.kind = "folder"
    loop.train(count=3)
    loop.leap("--counters", "advance", "--every", 10_000)
    assert loop.told["horizon"] == (9000 - 300) / 2


def test_near_the_end_of_a_run_there_is_no_leap(loop: Loop) -> None:
    loop.kind = "folder"
    loop.train(count=3)
    for path in loop.run.glob("*/trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_steps": 330}))
    done = loop.leap(code=10)
    assert "30 steps are left" in done.stderr


def test_what_is_excluded_is_copied_and_another_choice_starts_again(loop: Loop) -> None:
    loop.begun("--exclude", "embed")
    loop.train()
    origin = load(loop.newest)
    loop.leap("--exclude", "embed")
    assert torch.equal(load(loop.forecast)["embed"], origin["embed"])
    assert not torch.equal(load(loop.forecast)["layer.weight"], origin["layer.weight"])
    assert set(moves_in(loop.memory)) == set(SHAPES) - {"embed"}
    loop.train()
    done = loop.leap("--include", "layer.*", code=10)
    assert "its tensors are not those of" in done.stderr
    assert loop.told["stretches"] == 0, "the one snapshot since the last leap"


@pytest.mark.usefixtures("small_tasks")
def test_workers_and_the_way_of_reading_change_no_byte(tmp_path: Path, call_cli: CallCli) -> None:
    """In many small ranges, as large files are."""
    shapes = {"w": (10_001,), "even": (64, 128), **{f"{index}.bias": (3 + index,) for index in range(6)}}
    trees = []
    for index, options in enumerate([("1", "pread"), ("4", "pread"), ("1", "mmap"), ("4", "mmap")]):
        home = tmp_path / str(index)
        home.mkdir()
        loop = Loop(home, call_cli, weights=start(shapes=shapes))
        for number in range(4):
            loop.train()
            loop.leap("--threads", options[0], "--io", options[1], code=0 if number > 1 else 10)
        trees.append(tree_digest(home / "forecasts"))
    assert trees[1:] == trees[:1] * 3


# --- steered by a loss -----------------------------------------------------------------------------------------------

LOSS = """
import json, struct, sys
raw = open(sys.argv[1], "rb").read()
(size,) = struct.unpack("<Q", raw[:8])
first, last = json.loads(raw[8:8 + size])["w"]["data_offsets"]
values = struct.unpack(f"<{(last - first) // 4}f", raw[8 + size + first:8 + size + last])
print("loss", sum((value - float(sys.argv[2])) ** 2 for value in values) ** 0.5)
"""


class Line(Loop):
    """A run whose weights all move by one with each stretch."""

    def train(self, length: int = GAP, count: int = 1) -> Loop:
        for _ in range(count):
            self.step += length
            self.weights = {"w": self.weights["w"] + 1.0}
            save_loose(self.run, self.step, self.weights)
        return self


@pytest.fixture
def line(tmp_path: Path, call_cli: CallCli) -> Line:
    (tmp_path / "loss.py").write_text(LOSS)
    return Line(tmp_path, call_cli, weights={"w": torch.zeros(8)})


def distance_to(place: float) -> tuple[str, str]:
    """A command whose loss is the distance of the weights to a place."""
    return "--eval-cmd", f"{shlex.quote(sys.executable)} -I -S loss.py {{ckpt}} {place}"


def gains_of(loop: Loop, options: tuple[str, ...], calls: int) -> tuple[list[float], list[bool]]:
    gains, leapt = [], []
    loop.train(count=2)
    for number in range(calls):
        done = loop.call("leap", "run", "--json", *options, cwd=loop.home)
        assert done.returncode in {0, 10}, done
        loop.told = json.loads(done.stdout)
        if loop.told["path"]:
            loop.weights = load(loop.forecast)
        gains.append(loop.told["gain"])
        leapt.append(done.returncode == 0)
        assert len(loop.told["evaluations"]) == (3 if number else 0)
        loop.train()
    return gains, leapt


def test_where_going_ahead_lowers_the_loss_the_gain_rises(line: Line) -> None:
    gains, leapt = gains_of(line, distance_to(1000.0), 6)
    assert gains == sorted(gains)
    assert gains[-1] == 4.0
    assert leapt == [False] + [True] * 5
    assert line.told["loss_signal"] > 0.2


def test_where_going_ahead_raises_the_loss_the_gain_falls_until_there_is_no_leap(line: Line) -> None:
    """All directions agree, so without a loss the gain would rise."""
    gains, leapt = gains_of(line, distance_to(-1.0), 9)
    assert gains[2:] == sorted(gains[2:], reverse=True)
    assert line.told["loss_signal"] < -0.3
    assert gains[-1] < 0.1
    assert not leapt[1], "the loss need not have been seen to change"
    assert not leapt[-1]


def test_a_larger_number_may_be_the_better_one(line: Line) -> None:
    gains, leapt = gains_of(line, (*distance_to(-1.0), "--maximize"), 5)
    assert gains[-1] > 1.0
    assert leapt[-1]


def test_the_command_is_run_on_the_newest_weights_and_on_those_half_a_stretch_ahead_and_behind(line: Line) -> None:
    line.begun()
    line.train()
    (line.home / "seen").mkdir()
    line.leap("--eval-cmd", "cp {ckpt} seen/$FARCAST_STRENGTH.safetensors && echo $FARCAST_ORIGIN_STEP 2.5")
    seen = {path.stem: load(path)["w"].tolist() for path in (line.home / "seen").iterdir()}
    assert seen == {"0.5": [3.5] * 8, "-0.5": [2.5] * 8, "0": [3.0] * 8}
    assert [(e["strength"], e["value"]) for e in line.told["evaluations"]] == [(0.5, 2.5), (-0.5, 2.5), (0.0, 2.5)]
    logs = line.home / "forecasts/run/step_00300-leap.eval"
    assert {path.name for path in logs.iterdir()} == {"strength-0.5.log", "strength--0.5.log", "origin.log"}
    assert all("300 2.5" in path.read_text() for path in logs.iterdir())
    note = json.loads(line.forecast.with_name(f"{line.forecast.name}.farcast.json").read_text())
    assert [e["value"] for e in note["evaluations"]] == [2.5] * 3


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("true {ckpt}; exit 3", "exit code 3"),
        ("echo {ckpt} nan", "printed nan"),
        ("true {ckpt}", "printed no number"),
        ("test {ckpt} && test $FARCAST_STRENGTH = 0.5 && echo 1.0", "on strength -0.5"),
    ],
)
def test_a_command_that_fails_publishes_nothing_and_can_be_mended(line: Line, command: str, said: str) -> None:
    line.begun().train()
    before = tree_digest(line.home)
    done = line.leap("--eval-cmd", command, code=2)
    assert said in done.errors[0]
    after = {path: digest for path, digest in tree_digest(line.home).items() if ".eval" not in path}
    assert after == before
    line.leap("--eval-cmd", "echo {ckpt} 1.5")
    assert [e["value"] for e in line.told["evaluations"]] == [1.5] * 3


@pytest.mark.parametrize(("count", "code"), [(2, 10), (4, 0)], ids=["no leap yet", "a leap at once"])
def test_a_first_call_and_a_repeated_one_say_that_the_command_was_not_run(line: Line, count: int, code: int) -> None:
    done = line.train(count=count).leap("--eval-cmd", "touch {ckpt}.ran; exit 3", code=code)
    assert (
        "note: --eval-cmd was not run: it tests the direction of earlier calls, so it runs from the next call on" in done.stderr
    )
    assert ("no loss was measured, so farcast cannot know whether leaps lower it\n" in done.stderr) == (code == 0)
    again = line.leap("--eval-cmd", "touch {ckpt}.ran; exit 3", code=code)
    assert "note: --eval-cmd was not run: there was no training since the last call" in again.stderr
    assert not list(line.home.rglob("*.ran"))


def test_a_loss_as_large_as_a_number_can_be_is_a_loss(line: Line) -> None:
    line.begun()
    for number in range(3):
        line.train()
        line.leap("--eval-cmd", f"echo {{ckpt}} {'-' * (number % 2)}1.7e308")
    assert line.told["loss_signal"] == 0.0


def test_without_a_loss_a_leap_says_that_it_cannot_know_and_the_gain_stops_at_1(line: Line) -> None:
    gains, _ = [], line.begun()
    for _ in range(4):
        line.train()
        done = line.leap()
        assert ("no loss was measured" in done.stderr) == (line.told["stretches"] <= 3), "said at the first leaps"
        gains.append(line.told["gain"])
    assert gains[-1] == 1.0


def test_a_loss_that_never_changes_is_said_to_steer_nothing_and_the_gain_stops_at_1(line: Line) -> None:
    line.begun()
    for number in range(4):
        line.train()
        done = line.leap("--eval-cmd", "echo 1.0 {ckpt} 1.0")
        said = "the loss has not changed yet" if number else "only one loss was measured so far"
        assert f"{said}, so only the share changes the gain" in done.stderr
    assert (line.told["loss_signal"], line.told["gain"]) == (None, 1.0)


def test_a_loss_that_is_higher_ahead_stops_a_leap_though_it_has_not_been_seen_to_change(line: Line) -> None:
    line.begun()
    for _ in range(3):
        line.train()
        done = line.leap("--eval-cmd", "test $FARCAST_STRENGTH = 0.5 && echo 100 || echo 1 #{ckpt}", code=10)
    assert "the loss is higher ahead than behind" in done.stderr


def test_a_leap_is_no_longer_than_the_curvature_of_the_loss_allows(line: Line) -> None:
    """Half a stretch either way the loss is 5 higher, and from call to call it falls by 1: 20 g^2 = 1."""
    loss = "expr $(test $FARCAST_STRENGTH = 0 && echo 1000 || echo 1005) - $FARCAST_ORIGIN_STEP / 100 #{ckpt}"
    line.begun()
    for _ in range(4):
        line.train()
        done = line.leap("--eval-cmd", loss)
    assert line.told["gain"] == pytest.approx(math.sqrt(1 / 20))
    assert "gain 0.22, limited by the curvature of the loss" in done.stderr
    move = flat(load(line.forecast)) - flat(load(line.newest))
    np.testing.assert_allclose(move, line.told["gain"] * flat(moves_in(line.memory)), rtol=0.01)


# --- real trainers ---------------------------------------------------------------------------------------------------


def test_a_trainer_that_keeps_one_checkpoint_leaps_at_every_round_and_trains_its_full_number_of_steps(loop: Loop) -> None:
    """Each round resumes from the leap, at the origin's step, with the origin's optimiser."""
    began, steps, resume = [], 8 * SAVE_EVERY, ""
    landing = origin = np.zeros(0)
    for number in range(1, 9):
        began.append(train_by_trainer(loop.run, resume or None, 1, keep=1, max_steps=steps))
        (newest,) = loop.run.iterdir()
        assert newest.name == f"checkpoint-{number * SAVE_EVERY}"
        end = flat(load(newest))
        if resume:
            assert np.linalg.norm(end - landing) < np.linalg.norm(end - origin), "it went on from the leap's weights"
        if number < 8:
            loop.leap(code=10 if number < 3 else 0)
            resume = str(loop.forecast) if number > 2 else ""
        if number < 8 and resume:
            landing, origin = flat(load(loop.forecast)), end
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                assert (loop.forecast / name).read_bytes() == (newest / name).read_bytes(), name
            state, own = (json.loads((place / "trainer_state.json").read_text()) for place in (loop.forecast, newest))
            assert state["log_history"].pop()["farcast_leap_from"] == number * SAVE_EVERY
            assert state == own
    assert began == [number * SAVE_EVERY for number in range(8)]
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == steps


def test_a_plain_loop_resumes_from_every_leap_with_its_own_optimiser(loop: Loop) -> None:
    torch.manual_seed(0)
    inputs, resume, losses = torch.randn(64, 8), None, []
    targets = torch.sin(inputs.sum(dim=1, keepdim=True))
    for number in range(1, 7):
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        optimizer, begin = torch.optim.AdamW(model.parameters(), lr=1e-3), 0
        if resume:
            state = torch.load(resume, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            begin = state["step"]
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(float(loss.detach()))
        loop.run.mkdir(exist_ok=True)
        own = loop.run / f"ckpt_{begin + 20}.pt"
        for old in list(loop.run.iterdir()):
            old.unlink()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": begin + 20}, own)
        done = loop.call("leap", "run", cwd=loop.home)
        resume = loop.home / done.stdout.strip() if done.returncode == 0 else own
        if done.returncode == 0:
            leapt, was = (torch.load(path, weights_only=True) for path in (resume, own))
            assert leapt["step"] == was["step"] == 20 * number
            mark = leapt["optimizer"]["param_groups"][0]["farcast_leaps"].pop()
            assert mark[:2] == [20 * number] * 2
            if not leapt["optimizer"]["param_groups"][0]["farcast_leaps"]:
                del leapt["optimizer"]["param_groups"][0]["farcast_leaps"]
            assert leapt["optimizer"]["param_groups"] == was["optimizer"]["param_groups"]
            for key, moments in was["optimizer"]["state"].items():
                assert all(torch.equal(leapt["optimizer"]["state"][key][name], value) for name, value in moments.items())
            assert not torch.equal(leapt["model"]["0.weight"], was["model"]["0.weight"])
        assert (done.returncode == 0) == (number > 2)
    assert losses[-1] < losses[1] < losses[0]


# --- a memory from strangers -----------------------------------------------------------------------------------------


def rewritten(memory: Path, **said: Any) -> None:
    """The same memory with other words in its metadata."""
    tensors, record = load_file(memory), record_of(memory)
    save_file(tensors, memory, {"farcast": json.dumps(record | said)})


ODD_RECORDS: list[dict[str, Any]] = [
    {"run": "run\0"},
    {"run": "x" * 5000},
    {"run": "\ud800"},
    {"forecast": "\0.safetensors"},
    {"forecast": "x" * 5000},
    {"forecast": "\ud800"},
    {"forecast": "."},
    {"forecast": "../run/step_00200.safetensors"},
    {"forecast": "../secret.safetensors"},
    {"forecast": "/dev/zero"},
    {"length": 0.0},
    {"length": -5.0},
    {"length": 1e-320},
    {"count": -1},
    {"count": 10**400},
    {"count": 0},
    {"gain": 1e300},
    {"gain": -1.0},
    {"made": 1e300, "foretold": 1e-300},
    {"foretold": -1.0},
    {"falls": -1.0, "falls_weight": 1.0, "level": 1.0},
    {"falls": 1e308, "falls_weight": 1e-308, "level": -1e308},
    {"landing_step": 10**30},
    {"landing_step": -(10**30)},
    {"origin_step": 10**400},
    {"horizon": -1, "reason": "\x1b[31m\n$(touch made)"},
    {"files": [{"name": "../x"}] * 1000},
]


@pytest.mark.parametrize("odd", ODD_RECORDS, ids=lambda odd: " ".join(f"{k} {str(v)[:12]!r}" for k, v in odd.items()))
@pytest.mark.parametrize("is_again", [False, True], ids=["trained on", "asked again"])
def test_an_odd_memory_ends_in_one_clear_line_or_a_leap_like_any_and_touches_nothing_else(
    loop: Loop, odd: dict[str, Any], *, is_again: bool
) -> None:
    loop.begun().train()
    loop.leap("--max-gain", 0.05, code=10)
    rewritten(loop.memory, **odd)
    if not is_again:
        loop.train()
    save_loose(loop.home, 1, {"w": torch.ones(3)}).rename(loop.home / "secret.safetensors")
    before = tree_digest(loop.home)
    done = loop.call("leap", "run", "--json", "--eval-cmd", "echo {ckpt} 1", cwd=loop.home)
    assert done.returncode in {0, 2, 4, 10}, done
    assert len(done.errors) == (done.returncode in {2, 4})
    assert "Warning" not in done.stderr
    assert all(line.isprintable() and len(line) < 4000 for line in done.stderr.splitlines())
    after = tree_digest(loop.home)
    changed = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    assert all(path.startswith("forecasts/") for path in changed)
    if done.returncode in {2, 4}:
        assert changed == set()
    if done.returncode == 0:
        told = json.loads(done.stdout)
        assert Path(told["path"]).parent.parent == Path("forecasts")
        assert 0.0 < told["gain"] <= 2.0
        step = flat(load(loop.home / told["path"])) - flat(load(loop.newest))
        assert np.abs(step).max() < 10


def test_a_memory_that_names_another_checkpoint_does_not_have_it_resumed_from(loop: Loop) -> None:
    loop.begun().train()
    loop.leap()
    rewritten(loop.memory, forecast="../run/step_00200.safetensors")
    done = loop.leap(code=4)
    assert json.loads(done.stdout)["error"]["code"] == 4
    assert "run.memory.safetensors" in done.errors[0]


def test_a_link_in_the_place_of_the_memory_is_not_written_through(loop: Loop) -> None:
    loop.begun().train()
    loop.memory.rename(loop.home / "elsewhere.safetensors")
    loop.memory.symlink_to(loop.home / "elsewhere.safetensors")
    before = tree_digest(loop.home)
    done = loop.leap(code=5)
    assert "exists and is not a memory of leaps" in done.errors[0]
    assert tree_digest(loop.home) == before


# --- what no leap is made on -----------------------------------------------------------------------------------------


def rounds(loop: Loop, weights_at: Callable[[Tensors, int], Tensors], count: int) -> list[bool]:
    """Whether a leap was made after each of so many stretches; training goes on from where the last one landed."""
    made = []
    for number in range(1, count + 1):
        loop.step += GAP
        loop.weights = dict(weights_at(loop.weights, number))
        save_loose(loop.run, loop.step, loop.weights)
        done = loop.call("leap", "run", "--json", cwd=loop.home)
        assert done.returncode in {0, 10}, done
        path = json.loads(done.stdout)["path"]
        made.append(path is not None)
        loop.weights = load(loop.home / path) if path else loop.weights
    return made


def shaken(number: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def test_weights_that_only_diffuse_are_not_leapt_from(loop: Loop) -> None:
    made = rounds(loop, lambda weights, number: {n: w + shaken(number)[n] / 10 for n, w in weights.items()}, 12)
    assert sum(made) <= 1, "by chance one stretch may be like the mean of the others"


def test_weights_that_have_settled_into_noise_are_never_leapt_from(loop: Loop) -> None:
    place = start()
    made = rounds(loop, lambda _, number: {n: w + shaken(number)[n] / 10 for n, w in place.items()}, 12)
    assert made == [False] * 12


def test_weights_that_training_does_not_move_are_not_leapt_from(loop: Loop) -> None:
    made = rounds(loop, lambda weights, number: {n: w + shaken(7)[n] / 10 if number < 4 else w for n, w in weights.items()}, 9)
    assert made == [False, False, True, False, False, False, False, False, False]


@pytest.mark.parametrize("options", [("--gain", 0), ("--gain", "inf"), ("--max-gain", -1), ("--every", 10**22)])
def test_a_gain_or_a_stretch_that_makes_no_sense_is_one_clear_line(loop: Loop, options: tuple[object, ...]) -> None:
    loop.begun().train()
    done = loop.call("leap", "run", *options, cwd=loop.home)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_another_pattern_is_another_run(loop: Loop) -> None:
    loop.begun().train()
    mine = memory_of(loop.home).read_bytes()
    loop.leap("--pattern", "step_*", code=0)
    assert memory_of(loop.home).read_bytes() == mine
    assert len(list(memory_of(loop.home).parent.glob("*.memory.safetensors"))) == 2


def test_a_run_that_was_made_anew_in_the_same_folder_starts_again(loop: Loop) -> None:
    loop.begun()
    newest = loop.newest
    loop.train()
    save_loose(loop.run, int(newest.stem[-5:]), shaken(3))
    done = loop.call("leap", "run", cwd=loop.home)
    assert f"{newest.name} has changed since the last call: a new memory starts" in done.stderr
