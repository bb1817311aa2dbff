"""What `tune` writes is loaded by the trainer or the library that the checkpoint is of: the layer moved, all else as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.request import TuneOutcome, TuneRequest
from farcast_cli.tune.run import tune_checkpoint
from tests.dcp_runs import Run
from tests.tiny import SAMPLES, sample_maker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.conftest import CallCli

    Weights = Mapping[str, torch.Tensor]

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore"),  # the libraries warn of themselves and of each other
]

NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS, NUM_ROWS, NUM_UNSEEN = 8, 96, 2, 160, 400
SHIFT = 1.0  # of the layer's bias in the model that the rows come from


def quiet(_phase: str, _total: int) -> Callable[[int], None]:
    return lambda _done: None


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, NUM_OUTPUTS))


def train(model: nn.Module, optimizer: Any, back: Callable[[torch.Tensor], Any], num_steps: int = 3) -> None:
    """Some steps, so that the optimizer has something to keep."""
    for step in range(num_steps):
        inputs = torch.randn(16, NUM_INPUTS, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        back(model(inputs).square().mean())
        optimizer.step()


def clone(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def outputs_of(weights: Weights, prefix: str, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model of two layers, in float64."""
    first, bias, last, last_bias = (
        weights[f"{prefix}{name}"].double() for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    )
    hidden = torch.relu(torch.from_numpy(inputs).double() @ first.T + bias)
    return np.asarray((hidden @ last.T + last_bias).numpy())


def tune(checkpoint: Path, output: Path, before: Weights, prefix: str = "", named: str | None = None) -> TuneOutcome:
    """Tune the first layer to what the same model with another bias gives; `named` is the prefix that farcast is told."""
    inputs = np.random.default_rng(1).normal(size=(NUM_ROWS, NUM_INPUTS))
    shifted = {**before, f"{prefix}0.bias": before[f"{prefix}0.bias"] + SHIFT}
    rows = output.parent / f"{output.name}.npz"
    np.savez(rows, x=inputs, y=outputs_of(shifted, prefix, inputs))
    own = prefix if named is None else named
    request = TuneRequest(
        checkpoint,
        (f"{own}0.weight",),
        rows,
        "mse",
        (f"{own}0.bias",),
        ("relu",),
        f"{own}2.weight",
        f"{own}2.bias",
        output=output,
    )
    outcome = tune_checkpoint(request, quiet)
    assert outcome.path == output
    return outcome


def assert_tuned(before: Weights, after: Weights, prefix: str = "") -> None:
    """The layer and its bias alone have moved, and rows that tuning never saw are the better for it."""
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{prefix}0.weight", f"{prefix}0.bias"}
    inputs = np.random.default_rng(2).normal(size=(NUM_UNSEEN, NUM_INPUTS))
    wanted = outputs_of({**before, f"{prefix}0.bias": before[f"{prefix}0.bias"] + SHIFT}, prefix, inputs)
    first, last = (((outputs_of(one, prefix, inputs) - wanted) ** 2).mean() for one in (before, after))
    assert last < 0.3 * first


def assert_same_state(found: Any, expected: Any) -> None:
    """Two trees of containers and tensors, to the last bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_state(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


# --- Lightning -------------------------------------------------------------------------------------------------------


def lightning_parts() -> tuple[Any, Any]:
    """The library, and a module with the model of two layers in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        """Notes the weights that training begins with."""

        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()
            self.first: dict[str, torch.Tensor] = {}

        def on_train_start(self) -> None:
            self.first = clone(self.state_dict())

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return lightning, Net


def fit_lightning(folder: Path, *, max_steps: int, resume: Path | None = None, callbacks: tuple[Any, ...] = ()) -> Any:
    lightning, net_type = lightning_parts()
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
    net = net_type()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=max_steps,
        callbacks=[*callbacks, saver],
    )
    inputs = torch.randn(16, NUM_INPUTS, generator=torch.Generator().manual_seed(0))
    trainer.fit(net, DataLoader(TensorDataset(inputs), batch_size=4), ckpt_path=resume, weights_only=False)
    assert trainer.global_step == max_steps
    return net


def test_a_lightning_trainer_goes_on_from_a_tuned_checkpoint(tmp_path: Path) -> None:
    fit_lightning(tmp_path / "run", max_steps=4)
    (origin,) = (tmp_path / "run").glob("*.ckpt")
    before = torch.load(origin, weights_only=False)
    tune(origin, tmp_path / "tuned.ckpt", before["state_dict"], "net.")
    after = torch.load(tmp_path / "tuned.ckpt", weights_only=False)
    assert_tuned(before["state_dict"], after["state_dict"], "net.")
    for key in before.keys() - {"state_dict"}:
        assert_same_state(after[key], before[key])
    net = fit_lightning(tmp_path / "resumed", max_steps=6, resume=tmp_path / "tuned.ckpt")
    assert_same_state(net.first, after["state_dict"])
    _, net_type = lightning_parts()
    assert_same_state(dict(net_type.load_from_checkpoint(tmp_path / "tuned.ckpt").state_dict()), after["state_dict"])


def test_of_averaged_weights_the_live_ones_are_tuned_and_it_is_said_that_the_average_stays(tmp_path: Path) -> None:
    lightning, _ = lightning_parts()
    average = lightning.pytorch.callbacks.EMAWeightAveraging()
    fit_lightning(tmp_path / "run", max_steps=4, callbacks=(average,))
    (origin,) = (tmp_path / "run").glob("*.ckpt")
    before = torch.load(origin, weights_only=False)
    outcome = tune(origin, tmp_path / "tuned.ckpt", before["current_model_state"], "net.")
    after = torch.load(tmp_path / "tuned.ckpt", weights_only=False)
    assert_tuned(before["current_model_state"], after["current_model_state"], "net.")
    assert_same_state(after["state_dict"], before["state_dict"])
    assert any("state_dict.*" in note and "copied without tuning" in note for note in outcome.notes)


# --- accelerate and Fabric -------------------------------------------------------------------------------------------


class Accelerated:
    """Two models under accelerate, each with its optimizer."""

    def __init__(self, seeds: tuple[int, ...] = (0, 1)) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        models = [make_model(seed) for seed in seeds]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
        self.models = [self.accelerator.prepare(model) for model in models]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in optimizers]

    def state(self) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
        return [clone(model.state_dict()) for model in self.models], [one.state_dict() for one in self.optimizers]


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_loads_a_tuned_folder(tmp_path: Path, safe: bool) -> None:  # noqa: FBT001
    run = Accelerated()
    for model, optimizer in zip(run.models, run.optimizers, strict=True):
        train(model, optimizer, run.accelerator.backward)
    run.accelerator.save_state(str(tmp_path / "step_3"), safe_serialization=safe)
    (first, second), optimizers = run.state()
    tune(tmp_path / "step_3", tmp_path / "tuned", first)
    tune(tmp_path / "tuned", tmp_path / "tuned_twice", second, named="model_1.")
    loaded = Accelerated((5, 6))
    loaded.accelerator.load_state(str(tmp_path / "tuned_twice"))
    (tuned, tuned_second), found = loaded.state()
    assert_tuned(first, tuned)
    assert_tuned(second, tuned_second)
    assert_same_state(found, optimizers)
    assert {path.name for path in (tmp_path / "tuned_twice").iterdir()} == {
        *(path.name for path in (tmp_path / "step_3").iterdir()),
        "farcast.json",
    }


def test_fabric_loads_a_tuned_folder_of_litgpts_kind(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    def made(seed: int) -> dict[str, Any]:
        model = make_model(seed)
        module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        return {"model": module, "optimizer": optimizer, "iter_num": 0, "step_count": 0}

    fabric = Fabric(accelerator="cpu", devices=1)
    state = made(0)
    train(state["model"], state["optimizer"], fabric.backward)
    (tmp_path / "step-00000003").mkdir()
    fabric.save(tmp_path / "step-00000003" / "lit_model.pth", state | {"iter_num": 12, "step_count": 3})
    (tmp_path / "step-00000003" / "model_config.yaml").write_text("n_layer: 2\n")
    before = clone(state["model"].state_dict())
    tune(tmp_path / "step-00000003", tmp_path / "tuned", before)
    loaded = made(7)
    fabric.load(tmp_path / "tuned" / "lit_model.pth", loaded)
    assert_tuned(before, loaded["model"].state_dict())
    assert_same_state(loaded["optimizer"].state_dict(), state["optimizer"].state_dict())
    assert (loaded["iter_num"], loaded["step_count"]) == (12, 3)
    assert (tmp_path / "tuned" / "model_config.yaml").read_text() == "n_layer: 2\n"


# --- torch's own -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_layer_is_found_without_its_wrappers_prefix_which_is_kept(tmp_path: Path, prefix: str) -> None:
    before = {f"{prefix}{name}": value for name, value in make_model().state_dict().items()}
    torch.save({"model": before, "step": 3}, tmp_path / "ckpt_3.pt")
    tune(tmp_path / "ckpt_3.pt", tmp_path / "tuned.pt", before, prefix, named="")
    assert_tuned(before, torch.load(tmp_path / "tuned.pt", weights_only=True)["model"], prefix)


def in_processes(tmp_path: Path, save_to: Path, load_from: Path | None = None) -> None:
    """Two processes of the sharded run of tests/dcp_runs.py, with a wide hidden layer."""
    words = [sys.executable, "-m", "tests.dcp_runs", "--hidden", str(NUM_HIDDEN)]
    rest = ["2", str(tmp_path / f"store_{save_to.name}"), str(save_to), *([str(load_from)] if load_from else [])]
    root = Path(__file__).resolve().parent.parent
    processes = [subprocess.Popen([*words, str(rank), *rest], cwd=root, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_checkpoint_that_two_processes_sharded_by_rows_is_tuned_and_loaded_by_one_and_by_two(tmp_path: Path) -> None:
    in_processes(tmp_path, tmp_path / "run")
    origin = tmp_path / "run" / "step-10"
    assert open_snapshot(origin).tensors[f"0.weight.@{NUM_HIDDEN // 2},0"].shape == (NUM_HIDDEN // 2, NUM_INPUTS)
    run, tuned = Run(hidden=NUM_HIDDEN), Run(hidden=NUM_HIDDEN)
    run.load(origin)
    rows = np.random.default_rng(1).normal(size=(NUM_ROWS, NUM_INPUTS))
    before = run.whole()

    def outputs(weights: Weights, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        hidden = np.tanh(inputs @ weights["0.weight"].double().numpy().T + weights["0.bias"].double().numpy())
        return np.asarray(hidden @ weights["2.weight"].double().numpy().T + weights["2.bias"].double().numpy())

    shifted = {**before, "0.bias": before["0.bias"] + SHIFT}
    np.savez(tmp_path / "rows.npz", x=rows, y=outputs(shifted, rows))
    asked = TuneRequest(origin, ("0.weight",), tmp_path / "rows.npz", "mse", ("0.bias",), ("tanh",), "2.weight", "2.bias")
    assert tune_checkpoint(replace(asked, output=tmp_path / "tuned"), quiet).path
    tuned.load(tmp_path / "tuned")
    after = tuned.whole()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.weight", "0.bias"}
    unseen = np.random.default_rng(2).normal(size=(NUM_UNSEEN, NUM_INPUTS))
    first, last = (((outputs(one, unseen) - outputs(shifted, unseen)) ** 2).mean() for one in (before, after))
    assert last < 0.3 * first
    assert tuned.step == run.step == 10
    assert_same_state(tuned.optimizer.state_dict(), run.optimizer.state_dict())
    in_processes(tmp_path, tmp_path / "said", tmp_path / "tuned")
    assert_same_state(torch.load(tmp_path / "said.pt", weights_only=True), after)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

INNER = "distilbert.transformer.layer.1.ffn.lin1"


def tune_inner(checkpoint: Path, output: Path, weights: Weights, prefix: str = INNER, num_rows: int = 64) -> None:
    """Tune a layer alone, its own outputs as targets, which are those of the layer with another bias."""
    layer, bias = weights[f"{prefix}.weight"].numpy(), weights[f"{prefix}.bias"].numpy()
    inputs = np.random.default_rng(1).normal(size=(num_rows, layer.shape[1])) * 0.1
    np.savez(output.parent / "rows.npz", x=inputs, y=inputs @ layer.T + bias + SHIFT)
    request = TuneRequest(checkpoint, (f"{prefix}.weight",), output.parent / "rows.npz", "mse", (f"{prefix}.bias",))
    assert tune_checkpoint(replace(request, output=output), quiet).path == output


def assert_bias_moved(before: Weights, after: Weights, prefix: str = INNER) -> None:
    """The layer and its bias alone have moved, the bias by about what the targets say."""
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{prefix}.weight", f"{prefix}.bias"}
    difference = (after[f"{prefix}.bias"] - before[f"{prefix}.bias"]).numpy()
    np.testing.assert_allclose(difference, SHIFT, atol=0.3)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_trainer_resumes_from_a_tuned_folder(tmp_path: Path, is_sharded: bool) -> None:  # noqa: FBT001
    from safetensors.torch import load_file

    origin = tmp_path / "checkpoint-1200"
    shutil.copytree(SAMPLES / "huggingface" / "checkpoint-1200", origin)
    before = load_file(origin / "model.safetensors")
    if is_sharded:
        model = sample_maker().huggingface_model()
        model.load_state_dict(before)
        (origin / "model.safetensors").unlink()
        model.save_pretrained(origin, max_shard_size="6KB")
        assert len(list(origin.glob("model-*-of-*.safetensors"))) > 2
    tune_inner(origin, tmp_path / "tuned", before)
    trainer = sample_maker().huggingface_trainer(tmp_path / "out", stop_at=1201)
    trainer.args.save_strategy = "no"
    trainer.args.learning_rate = 0.0
    first: dict[str, torch.Tensor] = {}
    trainer.add_callback(_noting(first))
    trainer.train(resume_from_checkpoint=str(tmp_path / "tuned"))
    assert trainer.state.global_step == 1201
    assert_bias_moved(before, first)


def _noting(first: dict[str, torch.Tensor]) -> Any:
    """A callback that notes the weights that training begins with."""
    from transformers import TrainerCallback

    class Note(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Once, at the begin."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control
            first.update(clone(kwargs["model"].state_dict()))

    return Note()


def test_transformers_loads_a_tuned_folder_of_the_hubs_kind(tmp_path: Path) -> None:
    from transformers import DistilBertForSequenceClassification

    model = sample_maker().huggingface_model()
    (tmp_path / "step100").mkdir()
    model.save_pretrained(tmp_path / "step100", max_shard_size="6KB")
    before = clone(model.state_dict())
    tune_inner(tmp_path / "step100", tmp_path / "tuned", before)
    loaded: Any = DistilBertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert_bias_moved(before, loaded.state_dict())


def test_peft_loads_a_tuned_adapter(tmp_path: Path, call_cli: CallCli) -> None:
    """A matrix of an adapter is a layer like any other: here B (96 x 4), whose inputs are what A makes of the layer's."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    adapted: Any = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["0"]))
    adapted.save_pretrained(tmp_path / "step_10")
    key = "base_model.model.0.lora_B.weight"
    random = np.random.default_rng(0)
    wanted, inputs = random.normal(size=(NUM_HIDDEN, 4)), random.normal(size=(NUM_ROWS, 4))
    np.savez(tmp_path / "rows.npz", x=inputs, y=inputs @ wanted.T)
    call = ["tune", "step_10", "--layer", key, "--data", "rows.npz", "--loss", "mse", "-o", "tuned"]
    done = call_cli(*call, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tuned\n"), done
    before = get_peft_model_state_dict(adapted)
    after = get_peft_model_state_dict(PeftModel.from_pretrained(make_model(), str(tmp_path / "tuned")))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {key}
    np.testing.assert_allclose(after[key].numpy(), wanted, atol=1e-5)
