"""DeepSpeed's own checkpoints: `global_step500/` with one file of model states and one of optimiser states for each process.

Under ZeRO every process holds a piece of the weights in float32, flattened and joined, in its optimiser states; a resumed
training takes its weights from these pieces. The model states have the weights once more, whole and rounded (stages 1, 2), or
only their shapes (stage 3). So both are forecast: the pieces as tensors of their own.

Inside a Hugging Face Trainer's folder, or accelerate's, the folder of the files lies beside `latest`, which names it.

Source: deepspeed/runtime/engine.py, `save_checkpoint` and `_get_zero_ckpt_name`; deepspeed/runtime/zero/stage_1_and_2.py and
stage3.py, `state_dict`.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, shell_word
from farcast_cli.files.reading import open_input
from farcast_cli.formats.torch_file import TorchFile, read_torch_file
from farcast_cli.formats.torch_pickle import TensorRef, iter_tensors
from farcast_cli.formats.tree import find
from farcast_cli.trainers.base import Evidence, Layout, Network, Part, Snapshot, Trainer, is_step, name_evidence, weights_of
from farcast_cli.trainers.run_end import end_by_schedules
from farcast_cli.trainers.side_files import beside, side_parts
from farcast_cli.trainers.torch_payload import adam_evidence
from farcast_cli.trainers.weights_folder import Weights, as_one

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

_STATES = re.compile(r"(?:.*_)?mp_rank_\d+_(?:model|optim)_states\.pt|layer_\d+-model_\d+-model_states\.pt")
"""Every file of states that DeepSpeed writes, those of experts and of a pipeline among them."""
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_PIECES = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Where the pieces are, by ZeRO stage: 1 and 2, 3."""
_MAX_TAG = 4096  # bytes of the text in `latest`
_STATE = "optimizer_state_dict"
_FLAT = re.compile(r"fp32.*group|group.*fp32")


def states_in(path: Path) -> Path | None:
    """The folder of a snapshot's states: itself, or the one in it that `latest` names, or the only one."""
    if _states(path):
        return path
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _states(folder)]
    named = [folder for folder in found if folder.name == _latest(path)]
    return (named or found)[0] if len(named or found) == 1 else None


def _states(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*_states.pt") if _STATES.fullmatch(file.name))


def _latest(path: Path) -> str:
    try:
        with open_input(path / "latest") as file:
            return file.read(_MAX_TAG).decode("utf-8", "replace").strip()
    except FileFormatError:
        return ""


def read_states(path: Path) -> Weights:
    """The weights of a snapshot in all their forms, with the files that hold them.

    Raises:
        FileFormatError: files that do not hold the weights in a form that is known, with the command that converts them.
    """
    folder = states_in(path)
    assert folder is not None  # noqa: S101 - the caller has looked
    files = _states(folder)
    unknown = [file.name for file in files if not (_MODEL.fullmatch(file.name) or _OPTIMIZER.fullmatch(file.name))]
    if unknown:
        raise refusal(folder, f"{unknown[0]} is of a pipeline or of experts")
    read = [(file, read_torch_file(file)) for file in files]
    whole = as_one(path, (_weights(file, content, path) for file, content in read))
    if not whole.tensors:
        raise refusal(folder, "no file has weights")
    return whole


def _weights(file: Path, content: TorchFile, path: Path) -> Weights:
    tree = content.tree if isinstance(content.tree, dict) else {}
    name = file.relative_to(path).as_posix()
    optimizer = _OPTIMIZER.fullmatch(file.name)
    if optimizer:
        key = _pieces_key(tree, file)
        prefix = f"zero_pp_rank_{optimizer[1]}_mp_rank_{optimizer[2]}."
        part = Part(file, name, "state", content, networks=(Network(key),), known_as=file.name, is_shard=True)
        return Weights((part,), *weights_of(content, find(tree, key))).under(prefix, path)
    if any(_FLAT.search(str(key)) for key in tree.get("optimizer") or ()):
        raise refusal(file.parent, f"{file.name} has weights in float32 that are no piece of ZeRO's")
    model = tree.get("module")
    if not any(prod(ref.shape) for _, ref in iter_tensors(model)):
        return Weights(
            (Part(file, name, "side-state", content, known_as=file.name, is_shard=True),), {}
        )  # stage 3: all is in the pieces
    found = _MODEL.fullmatch(file.name)
    prefix = f"mp_rank_{found[2]}." if found and int(found[2]) else ""
    part = Part(file, name, "state", content, networks=(Network(("module",)),), known_as=file.name)
    return Weights((part,), *weights_of(content, model)).under(prefix, path)


def _pieces_key(tree: dict[Any, Any], file: Path) -> TreePath:
    for name in _PIECES:
        pieces = find(tree, (_STATE, name))
        if isinstance(pieces, list) and pieces and all(isinstance(one, TensorRef) for one in pieces):
            return _STATE, name
    raise refusal(
        file.parent, f"{file.name} has no pieces of the weights under {' or '.join(_PIECES)} (an older version, or NVMe?)"
    )


def refusal(folder: Path, why: str) -> FileFormatError:
    """The error for a checkpoint that is not read, with the command that makes weights of it."""
    home = folder.parent if (folder.parent / "latest").is_file() or folder.name.startswith("global_step") else folder
    tag = f" --tag {shell_word(folder.name)}" if home != folder else ""
    number = re.search(r"\d+$", folder.name)
    out = f"step_{number[0] if number else 'N'}"
    return FileFormatError(
        f"{folder}: a DeepSpeed checkpoint of a kind that is not read yet: {why}",
        hint=f"python {shell_word(home)}/zero_to_fp32.py {shell_word(home)} {out}{tag} makes weights that farcast reads;"
        " a forecast of them has no optimizer and no counters",
    )


def counted(parts: Iterable[Part]) -> Iterator[Evidence]:
    """The step as the engine counted it, then as Adam did."""
    files = [(part.path, part.content) for part in parts if isinstance(part.content, TorchFile)]
    for path, file in files:
        step = find(file.tree, ("global_steps",))
        if is_step(step):
            yield Evidence("trainer state", f"{path.name} global_steps", step)
            break
    for _, file in files:
        adam = adam_evidence(file, find(file.tree, (_STATE,)))
        if adam:
            yield from adam
            break


def _read(path: Path) -> Snapshot:
    weights = read_states(path)
    others, notes = side_parts(path, weights.parts)
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        (*counted(weights.parts), *name_evidence(path)),
        not_streamable=weights.rough,
        beside=tuple(beside(others)),
        notes=notes,
    )


def _recognises(path: Path) -> bool:
    return path.is_dir() and states_in(path) is not None


TRAINER = Trainer(
    end=end_by_schedules, needs_optimizer="DeepSpeed cannot load a checkpoint with a missing file", loads_shards=False
)
LAYOUT = Layout("deepspeed", _recognises, _read, trainer=TRAINER)
