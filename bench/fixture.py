"""Generated runs in the layout of the Hugging Face hub, and an oracle for one forecast of them.

    python bench/fixture.py make DIR KIND PARAMETERS DTYPE SNAPSHOTS
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

CHUNK = 1 << 24
FIRST, EVERY = 1000, 1000
CHECKED = 4096
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def steps_of(num_snapshots: int) -> list[int]:
    """An odd number: a snapshot then lies in the middle, and `--method line` reads two."""
    return [FIRST + EVERY * index for index in range(num_snapshots)]


def shapes(kind: str, num_parameters: int) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors, as many tiny ones as make up the parameters, or one."""
    if kind == "one":
        return {"w": (num_parameters // 4096, 4096)}
    if kind == "tiny":
        return {f"layer.{index:06d}.bias": (num_parameters // 20_000,) for index in range(20_000)}
    width, kept = (2048, 512) if num_parameters > 200_000_000 else (768, 192)
    rows = 62 * width if num_parameters > 200_000_000 else 8 * width
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(max(1, round((num_parameters - rows * width) / (14.5 * width * width)))):
        for name, shape in (("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (kept, width)),
                            ("self_attn.v_proj", (kept, width)), ("self_attn.o_proj", (width, width)),
                            ("mlp.gate_proj", (4 * width, width)), ("mlp.up_proj", (4 * width, width)),
                            ("mlp.down_proj", (width, 4 * width)), ("input_layernorm", (width,)),
                            ("post_attention_layernorm", (width,))):  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return {**found, "model.norm.weight": (width,)}


def config(layout: dict[str, tuple[int, ...]]) -> str:
    """What a tool needs to know of a Llama, so that it merges these files too."""
    rows, width = layout.get("model.embed_tokens.weight", (8, 8))
    num_layers = sum(name.endswith("q_proj.weight") for name in layout)
    fixed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": rows, "num_hidden_layers": num_layers}
    return json.dumps({**fixed, **sizes, "num_attention_heads": width // 64, "num_key_value_heads": width // 256})


def snapshot(layout: dict[str, tuple[int, ...]], step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights at a step: a base, a drift that slows down, and jitter; the same numbers over and over from other offsets."""
    base, drift = (torch.randn(CHUNK, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    jitter = torch.randn(CHUNK, generator=torch.Generator().manual_seed(step))
    whole = (0.02 * base + 0.01 * step / (step + 4000) * drift + 0.0005 * jitter).to(dtype)
    whole = torch.cat([whole, whole])
    state, place = {}, 0
    for name, shape in layout.items():
        count = torch.Size(shape).numel()
        rows = [whole[place : place + min(count, CHUNK)]] * -(-count // CHUNK)
        state[name] = torch.cat(rows)[:count].view(shape) if len(rows) > 1 else rows[0].clone().view(shape)
        place = (place + count + 977) % CHUNK
    return state


def make_run(folder: Path, kind: str, num_parameters: int, dtype: torch.dtype, num_snapshots: int) -> None:
    """Snapshots in shards of 1 GB."""
    layout = shapes(kind, num_parameters)
    for step in steps_of(num_snapshots):
        target = folder / f"step{step}"
        target.mkdir(parents=True)
        (target / "config.json").write_text(config(layout))
        state = snapshot(layout, step, dtype)
        split = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name] for name in names}, target / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (target / "model.safetensors.index.json").write_text(json.dumps(index))


def ends(folder: Path, name: str) -> torch.Tensor:
    """The first and the last elements of a tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118 - not a dict
                flat = opened.get_tensor(name).flatten()
                return torch.cat([flat[:CHECKED], flat[-CHECKED:]]).double()
    raise SystemExit(f"{folder}: no tensor {name}")


def check(run: Path, forecast: Path, horizon: int) -> None:
    """The straight line of --method line on some elements, from whole tensors."""
    steps = sorted(int(path.name.removeprefix("step")) for path in run.iterdir())
    middle, last = steps[len(steps) // 2], steps[-1]
    with safe_open(next(iter(sorted((run / f"step{last}").glob("*.safetensors")))), "pt") as opened:
        names = list(opened.keys())
    for name in (names[0], names[-1]):
        now, then = ends(run / f"step{last}", name), ends(run / f"step{middle}", name)
        expected = now + horizon / (last - middle) * (now - then)
        found = ends(forecast, name)
        tolerance = 2.0**-8 * expected.abs() + 1e-6
        if not bool(((found - expected).abs() <= tolerance).all()):
            raise SystemExit(f"{name}: the forecast is wrong by up to {float((found - expected).abs().max())}")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_run(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), DTYPES[sys.argv[5]], int(sys.argv[6]))
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
