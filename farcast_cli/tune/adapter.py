"""A change as a peft adapter of LoRA's form: a folder that `PeftModel.from_pretrained` loads on top of the checkpoint.

W = W_0 + B A,    B = U^T (m_out, r),    A = D (r, m_in);    a change of the bias is lora_B's own
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.errors import UsageError
from farcast_cli.files.place import open_new
from farcast_cli.formats.safetensors_file import write_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.tune.delta import Delta

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_adaptable(layers: Sequence[str], *, weight_decay: float | None) -> None:
    """See that a change of these layers can be an adapter.

    Raises:
        UsageError: it cannot.
    """
    if weight_decay:
        raise UsageError(
            "--lora-out: --weight-decay changes all of the layer", hint="--ridge pulls towards the checkpoint instead"
        )
    wrong = [layer for layer in layers if not layer.endswith(".weight")]
    if wrong:
        raise UsageError(
            f"--lora-out: {wrong[0]}: expected the name of a module's weight, which ends in .weight", hint="--delta-out FILE"
        )


def write_adapter(folder: Path, deltas: Sequence[Delta], base: Path) -> None:
    """Write the adapter's two files into a new folder. All deltas get the rank of the largest.

    Args:
        base: the checkpoint that it belongs to.
    """
    rank = max(1, *(len(delta.factors) for delta in deltas))
    has_bias = any(delta.bias for delta in deltas)
    modules = [delta.layer.removesuffix(".weight") for delta in deltas]
    arrays: dict[str, Any] = {}
    for module, delta in zip(modules, deltas, strict=True):
        width = delta.directions.shape[1] - bool(delta.bias)
        arrays[f"{PREFIX}{module}.lora_A.weight"] = _padded(delta.directions[:, :width], rank)
        arrays[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(_padded(delta.factors, rank).T)
        if has_bias:
            change = delta.factors.T @ delta.directions[:, -1] if delta.bias else np.zeros(delta.factors.shape[1])
            arrays[f"{PREFIX}{module}.lora_B.bias"] = change.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": _public_name(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "lora_bias": has_bias,
        "fan_in_fan_out": any(delta.is_transposed for delta in deltas),
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    with open_new(folder / WEIGHTS, like=base) as file:
        write_arrays(file, arrays, {"format": "pt"})
    with open_new(folder / CONFIG, like=base) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def _public_name(base: Path) -> str:
    """The hub's name of a model in its cache, else the folder's: a path would tell of the machine where it is published."""
    owner = base.parent.parent.name
    return owner.removeprefix("models--").replace("--", "/", 1) if owner.startswith("models--") else base.name


def _padded(rows: Any, rank: int) -> Any:
    """(r, ...) with rows of zeros up to the rank, in float32."""
    found = np.zeros((rank, rows.shape[1]), np.float32)
    found[: len(rows)] = rows
    return found
