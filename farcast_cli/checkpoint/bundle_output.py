"""A zip of torch files as an output: each torch file is written anew inside it, in the order of the origin's records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.checkpoint.pieces import Copy, Fixed, Joined, OutputFile, Section
from farcast_cli.checkpoint.torch_output import plan_storages, torch_records, zip_records
from farcast_cli.formats.torch_bundle import with_storages
from farcast_cli.formats.torch_pickle import StorageRef, encode_pickle
from farcast_cli.formats.torch_zip import frame
from farcast_cli.state.advance import storages_of

if TYPE_CHECKING:
    from farcast_cli.checkpoint.pieces import Piece, Rewrite
    from farcast_cli.checkpoint.torch_output import Storages
    from farcast_cli.formats.torch_file import TorchFile, ZippedFile
    from farcast_cli.state.advance import StateTree

    Records = dict[str, tuple[Piece, ...]]


def bundle_output(file: TorchFile, state: StateTree, rewrite: Rewrite) -> OutputFile:
    """The origin's zip with its torch files and its object as they are after the leap; the other records are copied."""
    storages = plan_storages(state, rewrite)
    contents = [_content(member, state, storages) for member in file.members]
    names = [member.record.name for member in file.members]
    framed = frame([(name, _num_bytes(content)) for name, content in zip(names, contents, strict=True)])
    sections: list[Section] = []
    joined = []
    position = 0
    for head, content, places in zip(framed.heads, contents, framed.checksums_at, strict=True):
        sections.append(Section((Fixed(head),)))
        position += len(head)
        if isinstance(content, dict):
            inner = list(zip_records(content, start=position))
            joined.append(Joined(len(sections), len(sections) + len(inner), places))
            sections += inner
        else:
            sections.append(Section((content,), places))
        position += _num_bytes(content)
    return OutputFile(state.part.name, (*sections, Section((Fixed(framed.tail),))), joined=tuple(joined))


def _content(member: ZippedFile, state: StateTree, storages: Storages) -> Records | Piece:
    """The records of a torch file; of any other record, its bytes."""
    name, record = member.record.name, member.record
    if member.inner is None:
        if name in state.tree:
            return Fixed(json.dumps(state.tree[name], indent=4).encode())
        return Copy(record.path, record.offset, record.num_bytes)
    whole = storages_of(state.tree[name])

    def own(storage: StorageRef) -> StorageRef:
        return replace(storage, key=storage.key.removeprefix(f"{name}/"))

    retyped = {own(one).key: own(one) for one in storages.retyped.values() if one.key.startswith(f"{name}/")}
    pickled = encode_pickle(with_storages(state.tree[name], own), retyped)
    return torch_records(member.inner, Fixed(pickled), {own(one).key: storages.pieces(state, one) for one in whole})


def _num_bytes(content: Records | Piece) -> int:
    return sum(section.num_bytes for section in zip_records(content)) if isinstance(content, dict) else content.num_bytes
