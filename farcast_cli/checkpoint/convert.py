"""A forecast in another container than the run's own: safetensors, a torch file, a dcp folder, a folder for a model hub.

Knows which parts of a checkpoint each container has a place for, and what its files are called. A conversion is a plan
like any other: several horizons are written in one pass, and nothing is loaded.

Source: transformers/utils/__init__.py and accelerate/utils/constants.py for the names of weights in folders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.contents import Leaf, keys_beside_weights, tree_in, weights_in
from farcast_cli.checkpoint.dcp_output import new_folder
from farcast_cli.checkpoint.hub import CARD, files_for_hub
from farcast_cli.checkpoint.pieces import Fixed, OutputFile, Piece, Planned, Rewrite
from farcast_cli.checkpoint.plan import (
    held_by_safetensors,
    is_read_whole,
    json_output,
    never_in_shards,
    plan_outputs,
    plan_part,
    safetensors_output,
    shards,
)
from farcast_cli.checkpoint.torch_output import new_torch_file, ref_of, torch_output
from farcast_cli.errors import UsageError, listed
from farcast_cli.formats.dcp_file import DcpFile
from farcast_cli.formats.safetensors_file import SafetensorsFile
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import encode_pickle
from farcast_cli.formats.tree import grow
from farcast_cli.trainers import named
from farcast_cli.trainers.base import ADAPTER_FILES, Network
from farcast_cli.trainers.names import split_ending

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from farcast_cli.choices import OutputLayout
    from farcast_cli.state.advance import Advanced
    from farcast_cli.trainers.base import Part, Snapshot


_ENDINGS = {"safetensors": ".safetensors", "pt": ".pt"}
_SWAPPED = {"safetensors": (".bin", ".safetensors"), "pt": (".safetensors", ".bin")}
"""Endings of files of weights in a folder, before and after."""
_CONTAINERS = {"safetensors": "safetensors", "pt": "a torch file", "dcp": "a dcp folder"}
_ASIDE = {"other", "side-state"}  # the roles of files that are no state of the trainer's own
_FORMAT = {"format": "pt"}  # transformers insists on it


# --- the target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Container:
    """What is written: the container (`same` where the run has it already), and whether that is one file."""

    layout: OutputLayout
    is_file: bool
    ending: str = ""
    """Of the name, where it is a file."""
    is_weights_only: bool = False
    beside: tuple[Part, ...] = ()
    """The origin's parts that are written beside the weights."""
    left_out: tuple[str, ...] = ()
    """The keys and files that are not."""
    inner: str = ""
    """The name of the file in a folder of its own, for a trainer that resumes from a folder with a file of that name."""

    @property
    def is_one_file(self) -> bool:
        """Whether the output itself is a file."""
        return self.is_file and not self.inner

    @property
    def name_ending(self) -> str:
        """What the output's name ends in."""
        return self.ending if self.is_one_file else ""

    @property
    def form(self) -> str:
        """The file format of the weights."""
        return "safetensors" if self.layout == "hub" else self.layout

    @property
    def card(self) -> str:
        """The file that is written after the weights, because it tells of them; "" where there is none."""
        return CARD if self.layout == "hub" else ""

    @property
    def mark(self) -> str:
        """What the name of weights to evaluate has after the origin's: a folder for a hub can lie beside another forecast."""
        return "-hub" if self.layout == "hub" else "-eval"

    def renamed(self, name: str, origin: Snapshot, *, mark: str = "") -> str:
        """A name of the origin's kind, with a mark, and with the container's ending."""
        return (split_ending(name)[0] if origin.path.is_file() else name) + mark + self.name_ending

    @property
    def notes(self) -> list[str]:
        if not self.left_out:
            return []
        if self.layout == "hub":
            return [f"left out of the folder for a hub: {listed(self.left_out)}"]
        what = "weights only: not" if self.is_weights_only else "not"
        return [f"{what} in {_CONTAINERS[self.layout]}: {listed(self.left_out)}"]


def settle(origin: Snapshot, asked: OutputLayout, *, inner: str = "") -> Container:
    """What a forecast from this origin becomes; `same` where the origin is in the container that is asked for.

    Args:
        inner: the name of the file in a folder of its own; "" for a forecast that lies as the origin does.

    Raises:
        UsageError: that name does not fit the output.
    """
    found = _settle(origin, asked)
    if inner and not found.is_file:
        raise UsageError(
            f"--place {inner}: expected checkpoints that are one file, found {origin.path.name}, which is written as a folder",
            hint="leave --place out: the printed path is the folder",
        )
    if inner and not inner.endswith(found.ending):
        raise UsageError(f"--place {inner}: expected a name that ends in {found.ending}, as the file's own does")
    return replace(found, inner=inner)


def _settle(origin: Snapshot, asked: OutputLayout) -> Container:
    if asked == "hub":
        return _for_hub(origin)
    is_file = origin.path.is_file()
    held = {_container(part, origin) for part in _weight_parts(origin)}
    if asked == "same" or held == {asked}:
        return Container("same", is_file, split_ending(origin.path.name)[1] if is_file else "")
    _refuse_pieces(origin, asked)
    with_state = any(part.role == "state" for part in _weight_parts(origin))
    is_one = asked != "dcp" and (is_file or (asked == "pt" and "dcp" in held))
    only = {"safetensors": with_state, "dcp": not with_state, "pt": "pt of its own" in held}[asked]
    others = _beside_weights(origin)
    kept = [part for part in others if asked != "dcp" and not is_one and (part.role == "other" or not only)]
    lost = sorted((part for part in others if part not in kept), key=lambda part: (part.role in _ASIDE, part.name))
    left_out = (*(_state_keys(origin) if only else ()), *(part.name for part in lost))
    return Container(asked, is_one, _ENDINGS[asked] if is_one else "", only, tuple(kept), left_out)


def _refuse_pieces(origin: Snapshot, asked: OutputLayout) -> None:
    """Refuse weights that are joined and cut into one piece for each process.

    Raises:
        UsageError: only the trainer's own tools take them apart.
    """
    piece = next((part.name for part in origin.parts if part.is_shard), "")
    if piece:
        raise UsageError(
            f"--layout {asked}: {piece} is one process's piece of the weights",
            hint="--layout same, then the converter of the trainer: farcast help formats",
        )


def _for_hub(origin: Snapshot) -> Container:
    """A folder with the weights and what a library needs to load them; the trainer's state stays behind."""
    _refuse_pieces(origin, "hub")
    others = [part for part in _beside_weights(origin) if part.name != CARD]
    kept = files_for_hub(others)
    left_out = (*_state_keys(origin), *sorted(part.name for part in others if part not in kept))
    return Container("hub", is_file=False, is_weights_only=True, beside=kept, left_out=left_out)


def _beside_weights(origin: Snapshot) -> list[Part]:
    return [part for part in origin.parts if part.role not in {"weights", "weights-index", "state", "data"}]


def _state_keys(origin: Snapshot) -> Iterator[str]:
    return (key for part in origin.parts if part.role == "state" for key in keys_beside_weights(part))


def _weight_parts(origin: Snapshot) -> list[Part]:
    kinds = (SafetensorsFile, TorchFile, DcpFile)
    return [part for part in origin.parts if part.role in {"weights", "state"} and isinstance(part.content, kinds)]


def _container(part: Part, origin: Snapshot) -> str:
    if isinstance(part.content, DcpFile):
        return "dcp"
    if isinstance(part.content, SafetensorsFile):
        return "safetensors"
    return "pt of its own" if named(origin.layout).trainer.has_own_files else "pt"


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_converted(origin: Snapshot, advanced: Advanced, rewrite: Rewrite, target: Container) -> list[OutputFile]:
    """The files of the forecast checkpoint in the target's container; what is odd about them goes to the notes.

    Raises:
        UsageError: a tensor that the container cannot hold, or shards of what is never read in shards.
    """
    found = _plan_converted(origin, advanced, rewrite, target)
    return [replace(output, name=output.name or target.inner) for output in found]


def _plan_converted(origin: Snapshot, advanced: Advanced, rewrite: Rewrite, target: Container) -> list[OutputFile]:
    if target.layout == "same":
        return plan_outputs(origin, advanced, rewrite)
    advanced.notes += target.notes
    if rewrite.max_shard_bytes is not None and target.form != "safetensors":
        raise UsageError(f"--max-shard-size: --layout {target.layout} cannot be sharded", hint="leave the option out")
    if target.layout == "dcp":
        return new_folder(list(_dcp_leaves(_weight_parts(origin), advanced, rewrite)))
    if target.layout == "pt" and target.is_file:
        return [_one_torch_file(*_weight_parts(origin), advanced=advanced, rewrite=rewrite)]
    written = (_in_shards if rewrite.max_shard_bytes is not None else _in_files)(origin, advanced, rewrite, target)
    return written + _beside(target, advanced, rewrite, {output.name for output in written})


def _beside(target: Container, advanced: Advanced, rewrite: Rewrite, written: set[str]) -> list[OutputFile]:
    """The other files of a folder; one that the converted weights take the name of gives way."""
    advanced.notes += [f"{part.name} of the origin replaced" for part in target.beside if part.name in written]
    kept = [part for part in target.beside if part.name not in written]
    return [output for part in kept for output in plan_part(part, advanced, rewrite)]


def _in_files(origin: Snapshot, advanced: Advanced, rewrite: Rewrite, target: Container) -> list[OutputFile]:
    """Each file of weights as one of the other container, and each index with the new names."""
    parts = _weight_parts(origin)
    outputs, sizes = [], {}
    for part in parts:
        if _container(part, origin) == target.form and (part.name or target.is_file):
            outputs += plan_part(part, advanced, rewrite)
            continue
        tensors = weights_in(part, advanced, rewrite)
        name = _file_name(part, target, alone=len(parts) == 1)
        sizes[name] = sum(tensor.num_bytes for tensor in tensors)
        outputs.append(_safetensors_file(name, tensors) if target.form == "safetensors" else _torch_file(name, tensors))
    for part in origin.parts:
        if part.role == "weights-index":
            is_new = _renamed(part.name, target.form) != part.name
            outputs += [_index(part, target, sizes)] if is_new else plan_part(part, advanced, rewrite)
    return outputs


def _in_shards(origin: Snapshot, advanced: Advanced, rewrite: Rewrite, target: Container) -> list[OutputFile]:
    parts = _weight_parts(origin)
    is_adapter = any(part.prefix or part.path.name in ADAPTER_FILES for part in parts)
    if is_adapter or (target.layout != "hub" and (target.is_file or is_read_whole(origin))):
        raise never_in_shards(origin)
    tensors = [tensor for part in parts for tensor in weights_in(part, advanced, rewrite)]
    index = next((part.content for part in origin.parts if part.role == "weights-index"), None)
    stem = _file_name(parts[0], target, alone=True).partition("-")[0].removesuffix(".safetensors")
    return shards(stem, held_by_safetensors(tensors), rewrite.max_shard_bytes or 0, _FORMAT, index)


def _file_name(part: Part, target: Container, *, alone: bool) -> str:
    if target.is_file:
        return ""
    if part.name and part.role != "state":
        return _renamed(part.name, target.form)
    return "model.safetensors" if alone else str(PurePosixPath(part.name).with_suffix(".safetensors"))


def _renamed(name: str, layout: str) -> str:
    """A file of weights by the name that transformers and accelerate look for: `model_1.safetensors`, `pytorch_model_1.bin`."""
    path = PurePosixPath(name)
    stems = (r"^pytorch_model(?=[._-])", "model") if layout == "safetensors" else (r"^model(?=[._-])", "pytorch_model")
    return str(path.with_name(re.sub(*stems, path.name).replace(*_SWAPPED[layout])))


def _index(part: Part, target: Container, sizes: Mapping[str, int]) -> OutputFile:
    content = part.content
    assert isinstance(content, dict)  # noqa: S101 - as the layout read it
    names = {tensor: _renamed(file, target.form) for tensor, file in content["weight_map"].items()}
    total = sum(sizes[str(PurePosixPath(part.name).with_name(name))] for name in set(names.values()))
    metadata = dict(content.get("metadata") or {}) | {"total_size": total}
    return json_output(_renamed(part.name, target.form), {"metadata": metadata, "weight_map": names})


def _one_torch_file(part: Part, *, advanced: Advanced, rewrite: Rewrite) -> OutputFile:
    """A file by itself: of a dcp folder all that is in it, else the weights under their names."""
    if isinstance(part.content, DcpFile):
        return _torch_file("", tree_in(part, advanced, rewrite))
    if isinstance(part.content, TorchFile) and not part.content.members:
        state = advanced.trees[part.name]
        alone = replace(part, networks=(Network(),), averages=())
        return torch_output(replace(state, part=alone, tree=part.weights_in(state.tree)), rewrite)
    return _torch_file("", weights_in(part, advanced, rewrite))


# --- what is written -------------------------------------------------------------------------------------------------


def _safetensors_file(name: str, tensors: Sequence[Planned]) -> OutputFile:
    return safetensors_output(name, held_by_safetensors(tensors), _FORMAT)


def _torch_file(name: str, found: Iterable[Planned | Leaf]) -> OutputFile:
    """A torch file of a tree, or of tensors under their names."""
    tree: dict[Any, Any] = {}
    named: dict[str, tuple[Piece, ...]] = {}
    for one in found:
        leaf = one if isinstance(one, Leaf) else Leaf((one.name,), one)
        key = str(len(named))
        if isinstance(leaf.value, Planned):
            named[f"data/{key}"] = leaf.value.pieces
        grow(tree, leaf.path, ref_of(leaf.value, key) if isinstance(leaf.value, Planned) else leaf.value)
    return OutputFile(name, tuple(new_torch_file({"data.pkl": (Fixed(encode_pickle(tree)),), **named})))


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def _dcp_leaves(parts: Sequence[Part], advanced: Advanced, rewrite: Rewrite) -> Iterator[Leaf]:
    """The whole tree of a torch file with a trainer's state; of files of weights, `model` (and `model_1`, ...)."""
    if any(part.role == "state" for part in parts):
        if len(parts) > 1:
            raise UsageError(f"--layout dcp: the weights are in {len(parts)} torch files", hint="--layout safetensors")
        yield from tree_in(parts[0], advanced, rewrite)
        return
    for part in parts:
        for tensor in weights_in(part, advanced, rewrite):
            yield Leaf((part.prefix.rstrip(".") or "model", tensor.name), tensor)
