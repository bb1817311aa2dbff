"""What the forecast checkpoint's files will hold: the origin's own files with stretches of bytes replaced.

A plan is made from headers alone and says for every output file, section by section, where its bytes come from. The
same tensors under the same names, in the same files, in the same order: whatever read the origin reads the forecast.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.bundle_output import bundle_output
from farcast_cli.checkpoint.dcp_output import rewritten_folder
from farcast_cli.checkpoint.pieces import Copy, Fixed, OutputFile, Planned, Rewrite, Section
from farcast_cli.checkpoint.torch_output import WITH_WEIGHTS, torch_output
from farcast_cli.errors import UsageError
from farcast_cli.files.json_text import UnreadList, encode_json
from farcast_cli.files.reading import file_size, mode_of
from farcast_cli.formats.copied_file import refuse_code_in
from farcast_cli.formats.dcp_file import DcpFile
from farcast_cli.formats.pickle_file import PickleFile
from farcast_cli.formats.safetensors_file import SafetensorsFile, encode_header
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import encode_pickle
from farcast_cli.optional import need
from farcast_cli.state.advance import Advanced, StateTree
from farcast_cli.trainers import named
from farcast_cli.trainers.base import ADAPTER_FILES, KEPT_KEY, Part, Snapshot
from farcast_cli.trainers.names import find_number_in_name, split_ending

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def forecast_name(origin: Snapshot, horizon: int, *, unit: Fraction = Fraction(1), keep_step: bool = False) -> str:
    """The origin's own name with its step replaced, as wide as before: `step_001000.pt` becomes `step_001250.pt`.

    Args:
        unit: what the number in the name counts per step.
        keep_step: the counters inside stay at the origin, and so does the name, marked as a leap.
    """
    name, found = origin.path.name, find_number_in_name(origin.path.name, origin.unit)
    moved = unit * horizon
    stem, ending = split_ending(name) if origin.path.is_file() else (name, "")
    if keep_step:
        return f"{stem}-leap{horizon}{ending}"
    if found is None or moved.denominator != 1:
        return f"{stem}-{origin.unit}{origin.step + horizon}{ending}"
    digits = str(int(found[1]) + int(moved)).zfill(len(found[1]))
    return name[: found.start(1)] + digits + name[found.end(1) :]


def plan_outputs(origin: Snapshot, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    """The files of the forecast checkpoint, planned from the origin's headers.

    Raises:
        UsageError: sharding asked of a checkpoint that is one file.
    """
    if rewrite.max_shard_bytes is not None:
        return _resharded(origin, advanced, rewrite)
    return [output for part in origin.parts for output in plan_part(part, advanced, rewrite)]


def with_modes(outputs: Iterable[OutputFile], origin: Snapshot) -> list[OutputFile]:
    """The same with the permissions of the origin's files; a file that the origin lacks gets what all of them allow."""
    modes = {part.name: mode_of(part.path) for part in origin.parts}
    shared = reduce(and_, modes.values(), 0o666)
    folder_mode = mode_of(origin.path) | 0o700 if origin.path.is_dir() else 0o777
    return [replace(output, mode=modes.get(output.name, shared) & 0o666 | 0o600, folder_mode=folder_mode) for output in outputs]


def plan_part(part: Part, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    if part.name in advanced.dropped or part.role == "data":
        return []
    if isinstance(part.content, DcpFile):
        return rewritten_folder(part.content, advanced.trees[part.name], rewrite.within(part.prefix))
    return [_plan_file(part, advanced, rewrite)]


def _plan_file(part: Part, advanced: Advanced, rewrite: Rewrite) -> OutputFile:
    rewrite = rewrite.of_average(part.name) if part.role == "average" else rewrite.within(part.prefix)
    if part.name in advanced.trees:
        state = advanced.trees[part.name]
        return _state_output(state, rewrite)
    if isinstance(part.content, SafetensorsFile):
        planned = [rewrite.planned(entry) for entry in part.content.entries]
        return safetensors_output(part.name, held_by_safetensors(planned), _metadata(part.content, rewrite))
    if isinstance(part.content, TorchFile) and part.role in WITH_WEIGHTS:
        return torch_output(StateTree(part, copy.deepcopy(part.content.tree), part.content), rewrite)
    if part.role == "weights-index" and rewrite.dtype != "source":
        raise UsageError(f"--dtype {rewrite.dtype} changes the shards' sizes", hint="add --max-shard-size 5GB")
    refuse_code_in(part.path)
    return OutputFile(part.name, (Section((Copy(part.path, 0, file_size(part.path)),)),))


def _state_output(state: StateTree, rewrite: Rewrite) -> OutputFile:
    if isinstance(state.part.content, PickleFile):
        return OutputFile(state.part.name, (Section((Fixed(encode_pickle(state.tree)),)),))
    if state.file is None:
        return json_output(state.part.name, state.tree)
    return bundle_output(state.file, state, rewrite) if state.file.members else torch_output(state, rewrite)


def json_output(name: str, tree: Any) -> OutputFile:
    pieces = (
        Copy(piece.path, piece.offset, piece.num_bytes) if isinstance(piece, UnreadList) else Fixed(piece)
        for piece in encode_json(tree)
    )
    return OutputFile(name, (Section(tuple(pieces)),))


def _metadata(file: SafetensorsFile, rewrite: Rewrite) -> dict[str, str]:
    metadata = {key: text for key, text in file.metadata.items() if key != KEPT_KEY}
    return metadata | {key: text for key, text in rewrite.metadata.items() if key in metadata}


def safetensors_output(name: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> OutputFile:
    header = encode_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), metadata)
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    return OutputFile(name, (Section((Fixed(header), *pieces)),))


def held_by_safetensors(tensors: Sequence[Planned]) -> Sequence[Planned]:
    """The tensors, having seen that safetensors can hold each."""
    for tensor in tensors:
        if not tensor.dtype.code:
            raise UsageError(
                f"tensor {tensor.name!r} is {tensor.dtype.name}, which safetensors cannot hold", hint="--layout pt"
            )
        if tensor.strides:
            raise UsageError(
                f"tensor {tensor.name!r} is not stored row by row (channels_last?), which safetensors cannot hold",
                hint="--layout pt keeps the order",
            )
    return tensors


# --- sharding --------------------------------------------------------------------------------------------------------


def is_read_whole(origin: Snapshot) -> bool:
    """Whether what loads the checkpoint knows no shards: its trainer, or PEFT, which loads adapters."""
    weights = [part for part in origin.parts if part.role == "weights"]
    loads_shards = named(origin.layout).trainer.loads_shards
    return not loads_shards or any(part.path.name in ADAPTER_FILES or part.prefix for part in weights)


def _resharded(origin: Snapshot, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    """The weights in shards of a new size; everything else as it was."""
    files = [part.content for part in origin.parts if isinstance(part.content, SafetensorsFile)]
    if not files or origin.path.is_file() or is_read_whole(origin):
        raise never_in_shards(origin)
    stem = files[0].path.name.partition("-")[0].removesuffix(".safetensors")
    index = next((part.content for part in origin.parts if part.role == "weights-index"), None)
    tensors = [rewrite.planned(entry) for file in files for entry in file.entries]
    outputs = shards(stem, tensors, rewrite.max_shard_bytes or 0, _metadata(files[0], rewrite), index)
    others = [part for part in origin.parts if part.role not in {"weights", "weights-index"}]
    return outputs + [output for part in others for output in plan_part(part, advanced, rewrite)]


def never_in_shards(origin: Snapshot) -> UsageError:
    return UsageError(
        f"--max-shard-size: {origin.path.name} is a {origin.layout} checkpoint, whose trainer cannot read shards",
        hint="leave the option out",
    )


def shards(
    stem: str, tensors: Sequence[Planned], max_bytes: int, metadata: Mapping[str, str], index: object = None
) -> list[OutputFile]:
    """Safetensors files of at most so many bytes, named as transformers names them, and the index of several.

    Args:
        index: the index that they had before.
    """
    need("huggingface_hub", "--max-shard-size")
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.num_bytes,
        get_storage_id=lambda _: None,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    outputs = [
        safetensors_output(name, [named[tensor] for tensor in inside], metadata)
        for name, inside in split.filename_to_tensors.items()
    ]
    if split.is_sharded:
        known = dict(index.get("metadata") or {}) if isinstance(index, dict) else {}
        whole = {"metadata": known | {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": split.tensor_to_filename}
        outputs.append(json_output(f"{stem}.safetensors.index.json", whole))
    return outputs
