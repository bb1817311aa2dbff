"""Write the rows for `farcast tune` from a transformers model: the inputs of a layer, the labels, and the model's outputs.

    python capture.py MODEL LAYER ROWS -o rows.npz

MODEL   a folder of transformers' save_pretrained
LAYER   the name of a weight in it, such as bert.pooler.dense.weight or classifier.weight
ROWS    a .jsonl file, one {"text": ..., "label": ...} a line; or an .npz or .safetensors file with the model's own arguments
        (input_ids, attention_mask, pixel_values, ...) and y: a label a row, or one for each token, below 0 where there is none

A label is a whole number, the class; or a number or a list of them, the targets of the logits. It runs the model, without training
it, finds the activation and the head that make the model's logits of the layer's outputs, and prints the command. Where none do, or
where there are no labels, it says so and writes the layer's own outputs as y, for you to change. It needs torch and transformers,
and no network.
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


class NoLabelsError(Exception):
    """Why labels cannot tune the layer."""


@dataclass
class Seen:
    """What went into the layer, what came out, and the logits, (rows, ...); None of a model that makes none."""

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
    seen, mask = run(model, layer, arguments), arguments.get("attention_mask")
    words = ["farcast", "tune", str(options.model), *named("--layer", "--bias", name, layer)]
    try:
        is_regression = getattr(model.config, "problem_type", None) == "regression"
        rows, arrays, loss = by_row(seen, labels, mask, is_regression=is_regression)
        activation, head = what_follows(model, rows, options.layer)
        arrays |= {"x": rows.inputs.numpy(), "out": rows.logits.numpy()}
        words += ["--activation", activation]
        words += named("--head", "--head-bias", head, model.get_submodule(head)) if head else []
    except NoLabelsError as why:
        arrays, loss = own_outputs(seen, mask, options.layer), "mse"
        note(
            f"{options.layer}: {why}. y in {options.output} holds the layer's own outputs: put those that you want in their place"
        )
    np.savez(options.output, **arrays)
    if type(layer).__name__ == "Conv1D":
        words.append("--transposed")
    if loss == "mse" and getattr(model.config, "problem_type", None) == "multi_label_classification":
        note("--loss mse brings the logits themselves near 0 and 1: what is above 0.5 is a 1, not what is above 0")
    print(shlex.join([*words, "--data", str(options.output), "--loss", loss, "-o", "TUNED"]))


def fail(why: str) -> NoReturn:
    print(f"capture.py: {why}", file=sys.stderr)
    sys.exit(1)


def note(what: str) -> None:
    print(f"note: {what}", file=sys.stderr)


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
    """The model's arguments as tensors, and the labels; None for none."""
    import torch

    if path.suffix == ".jsonl":
        from transformers import AutoTokenizer

        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        texts = [line["text"] for line in lines]
        found = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return dict(found), read_labels(path, lines)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    else:
        from safetensors.torch import load_file

        arrays = load_file(path)
    labels = arrays.pop("y", None)
    return arrays, labels.long() if labels is not None and labels.dtype == torch.bool else labels


def read_labels(path: Path, lines: list[dict[str, Any]]) -> Any:
    """Whole numbers (n,), or numbers (n,) or (n, k); None where no line has any."""
    import torch

    if not any("label" in line for line in lines):
        return None
    found = [line.get("label") for line in lines]
    lists = [one if isinstance(one, list) else [one] for one in found]
    for row, (one, numbers) in enumerate(zip(found, lists, strict=True)):
        is_alike = isinstance(one, list) == isinstance(found[0], list) and len(numbers) == len(lists[0])
        if not (numbers and is_alike and all(type(number) in {int, float} for number in numbers)):
            fail(
                f"{path}: label {json.dumps(one)} in row {row}: expected a whole number, a number, or a list of as many numbers in"
                " each row"
            )
    has_classes = all(type(one) is int for one in found)
    return torch.tensor(found, dtype=torch.int64 if has_classes else torch.float64)


def run(model: Any, layer: Any, arguments: dict[str, Any]) -> Seen:
    """Some rows at a time, without gradients."""
    import torch

    caught: list[tuple[Any, Any]] = []
    hook = layer.register_forward_hook(lambda _, given, made: caught.append((given[0].detach(), made.detach())))
    logits: list[Any] = []
    count = len(next(iter(arguments.values())))
    with torch.no_grad():
        for start in range(0, count, AT_ONCE):
            out = model(**{name: values[start : start + AT_ONCE] for name, values in arguments.items()})
            logits.append(getattr(out, "logits", None))
    hook.remove()
    if len(caught) != len(logits):
        fail(f"the layer is used {len(caught)} times for {len(logits)} batches: expected once each")
    inputs, outputs = zip(*caught, strict=True)
    return Seen(torch.cat(inputs), torch.cat(outputs), None if logits[0] is None else torch.cat(logits))


def by_row(seen: Seen, labels: Any, mask: Any, *, is_regression: bool) -> tuple[Seen, dict[str, Any], str]:
    """One row for each label: a text, or a token, which belongs to the group of its text; and the loss.

    Raises:
        NoLabelsError: there are none, or one label is made of several rows.
    """
    import torch

    if labels is None:
        raise NoLabelsError("no labels")
    if seen.logits is None:
        raise NoLabelsError("the model makes no logits, so labels cannot tune it")
    shapes = f"inputs {list(seen.inputs.shape)}, logits {list(seen.logits.shape)}, labels {list(labels.shape)}"
    leading = seen.logits.ndim - 1  # dimensions that number the rows: of texts, or of texts and tokens
    if leading not in {1, 2} or seen.inputs.ndim != seen.logits.ndim or labels.ndim < leading:
        raise NoLabelsError(f"{shapes}: several of its rows make one label, so labels cannot tune it")
    width = seen.logits.shape[-1]
    is_target = labels.ndim > leading or labels.is_floating_point() or is_regression or width == 1
    if is_target and (labels.shape[leading:] or (1,)) != (width,):
        fail(
            f"{shapes}: labels that are no whole numbers are targets of the logits: expected {width} for each row, or whole numbers"
            f" from 0 to {width - 1}"
        )
    y, loss = (labels.double(), "mse") if is_target else (labels.long(), "cross-entropy")
    if leading == 1:
        return seen, {"y": y.numpy()}, loss
    kept = labels.isfinite().reshape(*labels.shape[:2], -1).all(dim=-1) if is_target else labels >= 0
    kept &= torch.ones_like(kept) if mask is None else mask.bool()
    rows = Seen(seen.inputs[kept], seen.outputs[kept], seen.logits[kept])
    return rows, {"y": y[kept].numpy(), "groups": groups_of(kept)}, loss


def groups_of(kept: Any) -> Any:
    """The number of its text for each row that is kept, of (texts, ...)."""
    import torch

    numbers = torch.arange(len(kept)).reshape(-1, *(1 for _ in kept.shape[1:]))
    return numbers.expand_as(kept)[kept].numpy()


def own_outputs(seen: Seen, mask: Any, layer: str) -> dict[str, Any]:
    """What goes into the layer as rows, and what comes out, as targets and to check the description by."""
    import torch

    shape = seen.inputs.shape[:-1]
    if mask is not None and shape not in {mask.shape, mask.shape[:1]}:
        fail(
            f"{layer}: inputs {list(seen.inputs.shape)}, attention_mask {list(mask.shape)}: cannot tell which rows are padding"
        )
    kept = torch.ones(shape, dtype=torch.bool) if mask is None or shape != mask.shape else mask.bool()
    outputs = seen.outputs[kept].numpy()
    groups = {} if len(shape) == 1 else {"groups": groups_of(kept)}
    return {"x": seen.inputs[kept].numpy(), "y": outputs, "out": outputs, **groups}


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
    raise NoLabelsError(
        f"no activation ({', '.join(activations)}) and no linear head make the model's logits of its outputs: other layers follow,"
        " so labels cannot tune it"
    )


if __name__ == "__main__":
    main()
