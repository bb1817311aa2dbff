"""A generated run in the layout of the Hugging Face hub, and an oracle for one forecast of it.

    python bench/fixture.py make DIR PARAMETERS DTYPE
    python bench/fixture.py check DIR FORECAST

A program of its own, so that the memory of making a run is not charged to what is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from speed import HORIZON, STEPS

CHUNK = 1 << 22
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def shapes(num_parameters: int) -> dict[str, tuple[int, ...]]:
    """A transformer's tensors: an embedding and blocks of four square-ish matrices and two norms."""
    width = 2048 if num_parameters > 200_000_000 else 512
    found: dict[str, tuple[int, ...]] = {"embed.weight": (16 * width, width)}
    per_block = 12 * width * width
    for block in range(max(1, (num_parameters - 16 * width * width) // per_block)):
        for name, shape in (("attn.qkv", (3 * width, width)), ("attn.out", (width, width)),
                            ("mlp.up", (4 * width, width)), ("mlp.down", (width, 4 * width))):  # fmt: skip
            found[f"blocks.{block}.{name}.weight"] = shape
        found[f"blocks.{block}.norm.weight"] = (width,)
    return found


def values(name_index: int, count: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights at a step: a base, a drift that slows down, and jitter; from a generator, in chunks."""
    out = torch.empty(count, dtype=dtype)
    phase = step / (step + 4000)
    base = torch.randn(CHUNK, generator=torch.Generator().manual_seed(name_index))
    drift = torch.randn(CHUNK, generator=torch.Generator().manual_seed(name_index + 10_000))
    jitter = torch.randn(CHUNK, generator=torch.Generator().manual_seed(name_index + 20_000 + step))
    whole = (0.02 * base + 0.01 * phase * drift + 0.0005 * jitter).to(dtype)
    for start in range(0, count, CHUNK):
        out[start : start + CHUNK] = whole[: min(CHUNK, count - start)]
    return out


def make_run(folder: Path, num_parameters: int, dtype: torch.dtype) -> None:
    """Snapshots in the layout of the Hugging Face hub, in shards of 500 MB."""
    layout = shapes(num_parameters)
    for step in STEPS:
        target = folder / f"step{step}"
        target.mkdir(parents=True)
        state = {}
        for index, (name, shape) in enumerate(layout.items()):
            count = int(torch.Size(shape).numel())
            state[name] = values(index, count, step, dtype).view(shape)
        split = split_torch_state_dict_into_shards(state, max_shard_size="500MB")
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, target / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (target / "model.safetensors.index.json").write_text(json.dumps(index))


def read(folder: Path, name: str) -> torch.Tensor:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118 - not a dict
                return opened.get_tensor(name).flatten()[:4096].double()
    raise SystemExit(f"{folder}: no tensor {name}")


def check(run: Path, forecast: Path) -> None:
    """The straight line of --method line on some elements, from whole tensors."""
    half = (STEPS[0] + STEPS[-1]) / 2
    before = max(step for step in STEPS if step <= half)
    after = min(step for step in STEPS if step > half)
    share = (half - before) / (after - before)
    for name in ("embed.weight", "blocks.0.mlp.up.weight"):
        last = read(run / f"step{STEPS[-1]}", name)
        middle = read(run / f"step{before}", name) * (1 - share) + read(run / f"step{after}", name) * share
        expected = last + HORIZON / (STEPS[-1] - half) * (last - middle)
        found = read(forecast, name)
        tolerance = 2.0**-8 * expected.abs() + 1e-6
        if not bool(((found - expected).abs() <= tolerance).all()):
            raise SystemExit(f"{name}: the forecast is wrong by up to {float((found - expected).abs().max())}")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_run(Path(sys.argv[2]), int(sys.argv[3]), DTYPES[sys.argv[4]])
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
