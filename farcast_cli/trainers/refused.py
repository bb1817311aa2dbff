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
from farcast_cli.trainers.dcp_parts import is_dcp, is_snapshot_name
from farcast_cli.trainers.names import find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MEGATRON = {"model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt"}
_FSDP = re.compile(r"pytorch_model_fsdp(?:_\d+)?_rank\d+\.bin")


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout that is not read: what its folders look like, what it is, and the way out."""

    name: str
    recognises: Callable[[Path], bool]
    what: str
    hint: str


def _is_universal(path: Path) -> bool:
    return any(path.glob("zero/*/fp32.pt"))


def _is_megatron(path: Path) -> bool:
    ranks = (file for rank in path.glob("mp_rank_*") for file in _two_levels(rank, "*.pt"))
    is_distributed = (path / "common.pt").is_file() and ((path / ".metadata").is_file() or (path / "metadata.json").is_file())
    return is_distributed or any(file.name in _MEGATRON for file in ranks)


def _is_fsdp(path: Path) -> bool:
    """Weights in one torch file for each process."""
    return any(_FSDP.fullmatch(entry.name) for entry in path.glob("pytorch_model_fsdp*"))


def _holds_dcp(path: Path) -> bool:
    """A folder of distributed checkpoints that are snapshots by their names; other folders of a snapshot's are read with it."""
    return any(is_snapshot_name(file.parent.name) and is_dcp(file.parent) for file in path.glob("*/*.distcp"))


def _two_levels(path: Path, pattern: str) -> Iterator[Path]:
    yield from path.glob(pattern)
    yield from path.glob(f"*/{pattern}")


KINDS = (
    Refused(
        "deepspeed-universal",
        _is_universal,
        "a universal checkpoint of DeepSpeed's",
        "give the folder that it was made from: farcast reads global_stepN/ itself",
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
        "an FSDP checkpoint with one torch file for each process, which resumes from these alone",
        "save with SHARDED_STATE_DICT and use_dcp=True, or with FULL_STATE_DICT: farcast reads both",
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
    found = find_step_in_name(path.name)
    names = {"path": shell_word(path), "step": found[1] if found else "N"}
    raise FileFormatError(f"{path}: {kind.what}: not read yet", hint=kind.hint.format(**names))


def _is_folder_of(kind: Refused, path: Path) -> bool:
    return path.is_dir() and kind.recognises(path)


LAYOUTS = tuple(Layout(kind.name, partial(_is_folder_of, kind), partial(_raise, kind)) for kind in KINDS)
