"""The commands that write, each in a folder of its own with a small run, and the runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

EVEN = "--even-if-worse"
FIT = ("fit", "run")
TUNE = ("--layer", "fc.weight", "--data", "rows.npz", "--loss", "mse")
REFUSED = 10
BEGINNING = ("--steps", ":700")
TUNE_DELTA = ("tune", "run/step_10.safetensors", *TUNE, "--delta-out", "delta.safetensors")


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and what was called before it in the same folder."""

    name: str
    base: str
    args: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    code: int = 0
    """With which it ends where nothing strikes it."""


def _predict(name: str, base: str, *args: str, horizon: str = "20") -> Command:
    return Command(name, base, ("predict", "--horizon", horizon, EVEN, *args), (FIT,))


def _again(name: str, base: str, *, horizon: str) -> Command:
    """With --overwrite, over another forecast of the same steps."""
    first = ("predict", "--horizon", horizon, EVEN, "--scale", "0.5")
    return Command(name, base, ("predict", "--horizon", horizon, EVEN, "--overwrite"), (FIT, first))


def _leap(name: str, base: str, *args: str, before: tuple[str, ...] = (), code: int = 0) -> Command:
    """With a memory, if anything was called before."""
    return Command(name, base, ("leap", "run", *args), (("leap", "run", *before),) if before else (), code)


COMMANDS = (
    Command("fit", "loose", FIT),
    Command("fit, replacing", "loose", FIT, (("fit", "run", "--steps", ":600"),)),
    _predict("predict, safetensors", "loose"),
    _predict("predict, torch", "torch"),
    _predict("predict, Trainer", "hf"),
    _predict("predict, Lightning", "lightning"),
    _predict("predict, accelerate", "accelerate"),
    _predict("predict, distributed", "dcp"),
    _predict("predict, shards", "sharded"),
    _predict("several, files", "loose", horizon="50,100,150"),
    _predict("several, torch", "torch", horizon="10,20,30"),
    _predict("several, folders", "hf", horizon="50,100,150"),
    _again("overwrite, file", "loose", horizon="100"),
    _again("overwrite, folder", "hf", horizon="100"),
    _again("overwrite, several", "hf", horizon="50,100"),
    _predict("convert to pt", "hf", "--layout", "pt"),
    _predict("convert to dcp", "torch", "--layout", "dcp"),
    _predict("convert to safetensors", "torch", "--layout", "safetensors"),
    _predict("--eval-cmd, file", "loose", "--eval-cmd", "echo {ckpt} 1.0"),
    _predict("--eval-cmd, folder", "hf", "--eval-cmd", "echo {ckpt} 1.0"),
    Command("tune -o", "tune", ("tune", "run/step_10.safetensors", *TUNE, "-o", "tuned.safetensors")),
    Command("tune -o, torch", "tune", ("tune", "run/step_10.pt", *TUNE, "-o", "tuned.pt")),
    Command("tune --delta-out", "tune", TUNE_DELTA),
    Command(
        "tune --apply",
        "tune",
        ("tune", "run/step_10.safetensors", "--apply", "delta.safetensors", "-o", "tuned.safetensors"),
        (TUNE_DELTA,),
    ),
    _leap("leap, first", "hf"),
    _leap("leap, one snapshot", "loose", "--steps", ":100", code=REFUSED),
    _leap("leap, later", "loose", before=BEGINNING),
    _leap("leap, later, folder", "hf", before=BEGINNING),
    _leap(
        "leap, replacing",
        "loose",
        "-o",
        "forecasts/next.safetensors",
        "--overwrite",
        before=(*BEGINNING, "-o", "forecasts/next.safetensors"),
    ),
    _leap("leap, refused", "torch", "--max-gain", "0.01", before=("--steps", ":70"), code=REFUSED),
    _leap("leap --eval-cmd", "loose", "--eval-cmd", "echo {ckpt} 1.0", before=BEGINNING),
)


def make_bases(folder: Path) -> None:
    """The runs that the commands work on, each below a folder of its name."""
    from tests import corpus
    from tests.conftest import make_loose_run, make_torch_run

    make_loose_run(folder / "loose/run", shapes=corpus.SHAPES)
    make_torch_run(folder / "torch/run")
    corpus.make_hf_run(folder / "hf/run")
    corpus.make_lightning_run(folder / "lightning/run")
    corpus.make_accelerate_run(folder / "accelerate/run")
    corpus.make_dcp_run(folder / "dcp/run")
    make_sharded_run(folder / "sharded/run")
    _make_tune_base(folder / "tune")


def make_sharded_run(folder: Path) -> None:
    """Folders as on the hub, their weights in two files with an index."""
    from safetensors.torch import save_file

    from tests.conftest import STEPS, weights_at
    from tests.corpus import SHAPES

    for step in STEPS:
        place = folder / f"step_{step}"
        place.mkdir(parents=True)
        names = {}
        for number, (name, value) in enumerate(weights_at(step, shapes=SHAPES).items(), 1):
            names[name] = f"model-{number:05d}-of-{len(SHAPES):05d}.safetensors"
            save_file({name: value}, place / names[name], metadata={"format": "pt"})
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

        (place / "config.json").write_text("{}")


def _make_tune_base(folder: Path) -> None:
    """A linear layer, in both kinds of file, and rows that another layer made."""
    import torch
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    weight, other = random.normal(size=(2, 64, 16))
    inputs = random.normal(size=(128, 16))
    (folder / "run").mkdir(parents=True)
    arrays = {"fc.weight": weight.astype(np.float32), "other": np.ones(4, np.float32)}
    save_file(arrays, folder / "run/step_10.safetensors")
    payload = {"model": {name: torch.from_numpy(value) for name, value in arrays.items()}, "step": 10}
    torch.save(payload, folder / "run/step_10.pt")
    np.savez(folder / "rows.npz", x=inputs, y=inputs @ other.T)
