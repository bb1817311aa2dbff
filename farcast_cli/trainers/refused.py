"""Layouts that are recognised and refused, each with the tool that converts it: state cut into one piece per process.

A piece holds a stretch of the flattened weights, not a tensor, and the trainer resumes from the pieces alone.
Source: deepspeed/runtime/engine.py, `_get_ckpt_name` and `_get_zero_ckpt_name`; Megatron-LM, megatron/training/
checkpointing.py, `get_checkpoint_name`; accelerate/utils/fsdp_utils.py; torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, shell_word
from farcast_cli.trainers.base import Layout, Snapshot
from farcast_cli.trainers.names import find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_ZERO = re.compile(r"(?:.*zero_pp_rank_\d+_)?(?:mp_rank_\d+_(?:model|optim)|layer_\d+-model_\d+-model)_states\.pt")
_MEGATRON = {"model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt"}
_FSDP = re.compile(r"pytorch_model_fsdp(?:_\d+)?(?:_rank\d+)?(?:\.bin)?")


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout that is not read: what its folders look like, what it is, and the way out."""

    name: str
    recognises: Callable[[Path], bool]
    what: str
    hint: str


def _is_zero(path: Path) -> bool:
    """A tag's folder, the folder that holds tags and `latest`, or a universal checkpoint."""
    is_universal = path.name.endswith("_universal") and (path / "zero").is_dir()
    return is_universal or any(_ZERO.fullmatch(file.name) for file in _two_levels(path, "*_states.pt"))


def _is_megatron(path: Path) -> bool:
    ranks = (file for rank in path.glob("mp_rank_*") for file in _two_levels(rank, "*.pt"))
    is_distributed = (path / "common.pt").is_file() and ((path / ".metadata").is_file() or (path / "metadata.json").is_file())
    return is_distributed or any(file.name in _MEGATRON for file in ranks)


def _is_fsdp(path: Path) -> bool:
    return any(_FSDP.fullmatch(entry.name) for entry in path.glob("pytorch_model_fsdp*"))


def _holds_dcp(path: Path) -> bool:
    """A folder with a distributed checkpoint in a folder of its own; one by itself is read."""
    return any((file.parent / ".metadata").is_file() for file in path.glob("*/*.distcp"))


def _two_levels(path: Path, pattern: str) -> Iterator[Path]:
    yield from path.glob(pattern)
    yield from path.glob(f"*/{pattern}")


KINDS = (
    Refused(
        "deepspeed",
        _is_zero,
        "a DeepSpeed checkpoint, which resumes from its own partitions",
        "DeepSpeed's zero_to_fp32.py (it lies beside the checkpoint) makes weights that farcast reads: python"
        " {home}/zero_to_fp32.py {home} step_{step}{tag}; ds_to_universal.py makes a universal checkpoint, which is not read either",
    ),
    Refused(
        "megatron",
        _is_megatron,
        "a Megatron checkpoint, which resumes from its own partitions",
        "Megatron-LM's tools/checkpoint/convert.py, or Megatron Bridge's export_ckpt, makes weights that farcast reads:"
        " a folder step_{step}/ for this snapshot",
    ),
    Refused(
        "fsdp",
        _is_fsdp,
        "an FSDP checkpoint of accelerate's, which resumes from its own shards",
        "accelerate merge-weights {path}/pytorch_model_fsdp_0 step_{step} makes weights that farcast reads; where there is a"
        " pytorch_model_fsdp.bin, copy it to step_{step}.bin",
    ),
    Refused(
        "torch-dcp",
        _holds_dcp,
        "a folder around a distributed checkpoint of torch's",
        "give the folder that directly contains the checkpoints; python -m torch.distributed.checkpoint.format_utils"
        " dcp_to_torch makes a single file of one",
    ),
)


def refuse(path: Path) -> None:
    """Refuse a folder of one of these layouts, whatever else lies in it.

    Raises:
        FileFormatError: with the tool that converts it.
    """
    for kind in KINDS:
        if kind.recognises(path):
            _raise(kind, path)


def _raise(kind: Refused, path: Path) -> Snapshot:
    is_tag = (path.parent / "latest").is_file() or path.name.startswith("global_step")
    home, tag = (path.parent, f" --tag {shell_word(path.name)}") if is_tag else (path, "")
    found = find_step_in_name(path.name)
    names = {"path": shell_word(path), "home": shell_word(home), "tag": tag, "step": found[1] if found else "N"}
    raise FileFormatError(f"{path}: {kind.what}: not read yet", hint=kind.hint.format(**names))


def _is_folder_of(kind: Refused, path: Path) -> bool:
    return path.is_dir() and kind.recognises(path)


LAYOUTS = tuple(Layout(kind.name, partial(_is_folder_of, kind), partial(_raise, kind)) for kind in KINDS)
