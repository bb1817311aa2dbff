"""A forecast for a trainer that resumes from a folder in which a file has a fixed name, as nanoGPT does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from tests.conftest import CallCli

EVERY, NUM_SAVES = 20, 8
CONFIG = {"learning_rate": 3e-2, "min_lr": 3e-3, "warmup_iters": 10, "lr_decay_iters": 400, "max_iters": 400, "block_size": 8}


def rate(iteration: int) -> float:
    """Warm-up, then a cosine: computed from the count of iterations, in no scheduler object."""
    if iteration < CONFIG["warmup_iters"]:
        return CONFIG["learning_rate"] * (iteration + 1) / (CONFIG["warmup_iters"] + 1)
    share = (iteration - CONFIG["warmup_iters"]) / (CONFIG["lr_decay_iters"] - CONFIG["warmup_iters"])
    return CONFIG["min_lr"] + 0.5 * (1 + math.cos(math.pi * share)) * (CONFIG["learning_rate"] - CONFIG["min_lr"])


def model_of(model_args: dict[str, int]) -> nn.Sequential:
    torch.manual_seed(1337)
    width, vocabulary = model_args["n_embd"], model_args["vocab_size"]
    return nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, vocabulary))


def batch(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 16, (64,), generator=torch.Generator().manual_seed(iteration))
    return x, (5 * x + 3) % 16


def train(out_dir: Path, until: int, *, init_from: str, saved: Path | None = None) -> dict[int, float]:
    """A loop with the parts that matter here: resumes from `out_dir/ckpt.pt`, saves there, and sets the rate itself.

    Returns:
        the learning rate of every step that it took.
    """
    iter_num, best_val_loss, model_args = 0, 1e9, {"n_embd": 16, "vocab_size": 16}
    checkpoint: dict[str, Any] = {}
    if init_from == "resume":
        checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
        model_args = checkpoint["model_args"]
    model = model_of(model_args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG["learning_rate"], betas=(0.9, 0.95))
    if init_from == "resume":
        model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()})
        optimizer.load_state_dict(checkpoint["optimizer"])
        iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
    rates = {}
    while True:
        rates[iter_num] = rate(iter_num)
        for group in optimizer.param_groups:
            group["lr"] = rates[iter_num]
        x, y = batch(iter_num)
        loss = nn.functional.cross_entropy(model(x), y)
        if iter_num % EVERY == 0 and iter_num > 0:
            best_val_loss = min(best_val_loss, loss.item())
            out_dir.mkdir(exist_ok=True)
            state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
            content = {"model": state, "optimizer": optimizer.state_dict(), "model_args": model_args}
            torch.save(content | {"iter_num": iter_num, "best_val_loss": best_val_loss, "config": CONFIG}, out_dir / "ckpt.pt")
            if saved is not None:
                shutil.copy(out_dir / "ckpt.pt", saved / f"ckpt_{iter_num}.pt")
        if iter_num >= until:
            return rates
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        iter_num += 1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "ckpts").mkdir()
    train(tmp_path / "out", EVERY * NUM_SAVES, init_from="scratch", saved=tmp_path / "ckpts")
    return tmp_path


def test_a_loop_that_takes_a_folder_resumes_from_the_printed_path_at_the_runs_own_rates(run: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "ckpts", "--horizon", 40, "--place", "ckpt.pt", "--even-if-worse", cwd=run)
    assert done.stdout == "forecasts/ckpts/ckpt_200\n"
    place = run / "forecasts/ckpts/ckpt_200"
    assert sorted(path.name for path in place.iterdir()) == ["ckpt.pt", "farcast.json"]
    resumed = train(place, 260, init_from="resume")
    uninterrupted = train(run / "other", 260, init_from="scratch")
    assert resumed == {step: uninterrupted[step] for step in range(200, 261)}
    again = torch.load(place / "ckpt.pt", weights_only=True)
    assert (again["iter_num"], again["optimizer"]["state"][0]["step"]) == (260, 260)


def test_the_file_in_the_folder_is_the_one_that_would_lie_by_itself(run: Path, call_cli: CallCli) -> None:
    call_cli("predict", "ckpts", "--horizon", 40, "--even-if-worse", "-o", "alone.pt", cwd=run)
    call_cli("predict", "ckpts", "--horizon", 40, "--even-if-worse", "--place", "latest.pt", "-o", "folder", cwd=run)
    assert (run / "folder/latest.pt").read_bytes() == (run / "alone.pt").read_bytes()
    compared = call_cli("verify", "folder", "--against", "alone.pt", "--json", cwd=run)
    assert json.loads(compared.stdout)["ratio"] == 0


def test_the_same_call_finds_the_folder_and_overwrite_replaces_it(run: Path, call_cli: CallCli) -> None:
    words = ("predict", "ckpts", "--horizon", 40, "--even-if-worse", "--place", "ckpt.pt")
    first, second = call_cli(*words, cwd=run), call_cli(*words, cwd=run)
    assert first.stdout == second.stdout
    assert "already there" in second.stderr
    assert call_cli(*words[:-1], "newest.pt", cwd=run).returncode == 5
    assert call_cli(*words[:-1], "newest.pt", "--overwrite", cwd=run).returncode == 0


def test_leap_lands_in_a_folder_and_its_next_call_finds_the_landing(run: Path, call_cli: CallCli) -> None:
    words = ("leap", "ckpts", "--place", "ckpt.pt", "--gain", 1, "--json")
    first = json.loads(call_cli(*words, cwd=run).stdout)
    train(run / first["path"], 180, init_from="resume")
    assert call_cli(*words, cwd=run).returncode == 2  # the trainer wrote over the landing, which the memory needs
    shutil.rmtree(run / "forecasts")
    first = json.loads(call_cli(*words, cwd=run).stdout)
    assert Path(first["path"]).name == "ckpt_160-leap20"
    shutil.copytree(run / first["path"], run / "resumed")
    train(run / "resumed", 180, init_from="resume")
    shutil.copy(run / "resumed/ckpt.pt", run / "ckpts/ckpt_180.pt")
    second = json.loads(call_cli(*words, cwd=run).stdout)
    assert (second["origin_step"], second["verdict"], second["again"]) == (180, "forecast", False)


def test_the_users_command_gets_folders_for_the_origin_and_for_the_forecasts(run: Path, call_cli: CallCli) -> None:
    (run / "score.py").write_text("import pathlib, sys\nprint(len(list(pathlib.Path(sys.argv[1]).glob('ckpt.pt'))))\n")
    words = ("predict", "ckpts", "--horizon", 40, "--even-if-worse", "--place", "ckpt.pt")
    done = call_cli(*words, "--eval-cmd", "python3 score.py {ckpt}", "--json", cwd=run)
    assert [one["value"] for one in json.loads(done.stdout)["evaluations"]] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["", "sub/ckpt.pt", "..", ".hidden.pt", "farcast.json", "ckpt.safetensors", "a\nb.pt", "\x1bckpt.pt"]
)
def test_a_name_that_is_none_for_the_file_is_a_usage_error(run: Path, call_cli: CallCli, name: str) -> None:
    for command in ("predict", "leap"):
        done = call_cli(command, "ckpts", "--place", name, "--even-if-worse", cwd=run)
        assert (done.returncode, "--place" in done.stderr) == (2, True)
    assert not (run / "forecasts").exists()


def test_a_checkpoint_that_is_a_folder_needs_no_other(run: Path, call_cli: CallCli) -> None:
    words = ("predict", "ckpts", "--horizon", 40, "--even-if-worse", "--place", "ckpt.pt", "--layout", "dcp")
    done = call_cli(*words, cwd=run)
    assert done.returncode == 2
    assert "expected checkpoints that are one file" in done.stderr
