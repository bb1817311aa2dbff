"""Write the rows for `farcast tune` from a transformers model: the inputs of a layer, the labels, and the model's outputs.

    python capture.py MODEL LAYER ROWS -o rows.npz

MODEL   a folder of transformers' save_pretrained
LAYER   the name of a weight in it, such as bert.pooler.dense.weight or classifier.weight
ROWS    a .jsonl file, one {"text": ..., "label": ...} a line; or an .npz or .safetensors file with the model's own arguments
        (input_ids, attention_mask, pixel_values, ...) and y: a label a row, or one for each token, below 0 where there is none

It runs the model, without training it, finds the activation and the head that make the model's logits of the layer's outputs, and
prints the command. Where none do, it says why, and ends with 1. It needs torch and transformers, and no network.
"""
# ruff: noqa: INP001, T201 - a script that farcast prints

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

AGREES = 1e-4  # of the length of the logits
AT_ONCE = 32  # rows


@dataclass
class Seen:
    """What went into the layer, what came out, and the logits, (rows, ...)."""

    inputs: Any
    outputs: Any
    logits: Any


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("layer")
    parser.add_argument("rows", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text; the rest is cut off")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    model = load(options.model)
    name, layer = module_of(model, options.layer, options.model)
    arguments, labels = read_rows(options.rows, options.model, options.max_length)
    seen = run(model, layer, arguments)
    rows, labels = by_row(seen, labels, arguments.get("attention_mask"), options.layer)
    activation, head = what_follows(model, rows, options.layer)
    np.savez(options.output, x=rows.inputs.numpy(), out=rows.logits.numpy(), **labels)
    words = ["farcast", "tune", str(options.model), *named("--layer", "--bias", name, layer), "--activation", activation]
    if head:
        words += named("--head", "--head-bias", head, model.get_submodule(head))
    if type(layer).__name__ == "Conv1D":
        words.append("--transposed")
    print(shlex.join([*words, "--data", str(options.output), "--loss", "cross-entropy", "-o", "TUNED"]))


def fail(why: str) -> NoReturn:
    print(f"capture.py: {why}", file=sys.stderr)
    sys.exit(1)


def load(folder: Path) -> Any:
    """The model as its config.json names it, ready to be used and not trained."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    if kind is None:
        fail(f"{folder}: transformers has no {config.architectures[0]}")
    model, about = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if about["missing_keys"]:
        names = ", ".join(sorted(about["missing_keys"])[:3])
        fail(f"{folder}: {names} not in the file: transformers would begin them at random; save the model with them first")
    return model.eval().float()


def module_of(model: Any, weight: str, folder: Path) -> tuple[str, Any]:
    """The linear module of a weight."""
    name = weight.removesuffix(".weight")
    module = dict(model.named_modules()).get(name)
    if module is None or type(module).__name__ not in {"Linear", "Conv1D"}:
        known = [f"{one}.weight" for one, module in model.named_modules() if type(module).__name__ in {"Linear", "Conv1D"}]
        fail(f"{folder}: {weight}: expected the weight of a linear layer, such as {', '.join(known[-3:])}")
    return name, module


def named(weight: str, bias: str, name: str, module: Any) -> list[str]:
    """The options that name a module's parameters."""
    return [weight, f"{name}.weight", *([bias, f"{name}.bias"] if module.bias is not None else [])]


def read_rows(path: Path, folder: Path, max_length: int) -> tuple[dict[str, Any], Any]:
    """The model's arguments as tensors, and the labels."""
    import torch

    if path.suffix == ".jsonl":
        from transformers import AutoTokenizer

        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = [line["text"] for line in lines]
        found = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return dict(found), torch.tensor([int(line["label"]) for line in lines])
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    else:
        from safetensors.torch import load_file

        arrays = load_file(path)
    if "y" not in arrays:
        fail(f"{path}: no array 'y': expected labels")
    return arrays, arrays.pop("y")


def run(model: Any, layer: Any, arguments: dict[str, Any]) -> Seen:
    """Some rows at a time, without gradients."""
    import torch

    caught: list[tuple[Any, Any]] = []
    hook = layer.register_forward_hook(lambda _, given, made: caught.append((given[0].detach(), made.detach())))
    logits, count = [], len(next(iter(arguments.values())))
    with torch.no_grad():
        for start in range(0, count, AT_ONCE):
            out = model(**{name: values[start : start + AT_ONCE] for name, values in arguments.items()})
            if getattr(out, "logits", None) is None:
                fail(
                    f"{type(model).__name__} makes no logits: give a model with a head, such as one for sequence classification"
                )
            logits.append(out.logits)
    hook.remove()
    if len(caught) != len(logits):
        fail(f"the layer is used {len(caught)} times for {len(logits)} batches: expected once each")
    inputs, outputs = zip(*caught, strict=True)
    return Seen(torch.cat(inputs), torch.cat(outputs), torch.cat(logits))


def by_row(seen: Seen, labels: Any, mask: Any, layer: str) -> tuple[Seen, dict[str, Any]]:
    """One row for each label: a text, or a token, which belongs to the group of its text."""
    import torch

    dimensions = seen.inputs.ndim, seen.logits.ndim, labels.ndim
    if dimensions == (2, 2, 1):
        return seen, {"y": labels.numpy()}
    if dimensions == (3, 3, 2):
        kept = (labels >= 0) & (mask.bool() if mask is not None else torch.ones_like(labels, dtype=torch.bool))
        groups = torch.arange(len(labels))[:, None].expand_as(labels)[kept]
        rows = Seen(seen.inputs[kept], seen.outputs[kept], seen.logits[kept])
        return rows, {"y": labels[kept].numpy(), "groups": groups.numpy()}
    shapes = f"inputs {list(seen.inputs.shape)}, logits {list(seen.logits.shape)}, labels {list(labels.shape)}"
    fail(
        f"{layer}: {shapes}: several of its rows make one label, so what follows is no function of one row."
        " It can be tuned to targets of its own outputs only: --loss mse, with them as y"
    )


def what_follows(model: Any, rows: Seen, layer: str) -> tuple[str, str]:
    """The activation, by farcast's name, and the name of the head, "" for none, that make the logits of the layer's outputs."""
    import torch
    from torch.nn import functional

    activations: dict[str, Any] = {
        "none": lambda values: values,
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu-tanh": lambda values: functional.gelu(values, approximate="tanh"),
        "silu": functional.silu,
        "tanh": torch.tanh,
    }
    width = rows.outputs.shape[-1]
    linear = {name: one for name, one in model.named_modules() if type(one).__name__ in {"Linear", "Conv1D"}}
    sizes = {
        name: one.weight.shape if type(one).__name__ == "Linear" else one.weight.shape[::-1] for name, one in linear.items()
    }
    wanted = rows.logits.shape[-1], width
    heads = ["", *(name for name, size in sizes.items() if tuple(size) == wanted)]
    fits = []
    with torch.no_grad():
        for activation, act in activations.items():
            for head in heads:
                hidden = act(rows.outputs)
                made = linear[head](hidden) if head else hidden
                if made.shape == rows.logits.shape and (made - rows.logits).norm() <= AGREES * rows.logits.norm():
                    fits.append((activation, head))
    if ("none", "") in fits:  # the layer makes the logits itself
        return "none", ""
    if len(fits) == 1:
        return fits[0]
    if fits:
        told = " or ".join(f"{activation}, head {head or 'none'}" for activation, head in fits)
        fail(f"{layer}: {told}: these rows do not tell which; if the head is new, and so all zero, tune the head first")
    fail(
        f"{layer}: no activation ({', '.join(activations)}) and no linear head make the model's logits of its outputs: other"
        " layers follow. It can be tuned to targets of its own outputs only: --loss mse, with them as y"
    )


if __name__ == "__main__":
    main()
