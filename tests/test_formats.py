"""Files as other libraries wrote them are read to the byte; damaged ones are refused and harmful ones do nothing."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import http
import io
import ipaddress
import itertools
import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from farcast_cli.errors import FarcastError, FileFormatError, UnsafeFileError
from farcast_cli.files.json_text import UnreadList, encode_json, parse_json, with_entry
from farcast_cli.formats.safetensors_file import StoredEntries, encode_header, read_safetensors
from farcast_cli.formats.torch_file import TorchFile, read_torch_file
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, encode_pickle, iter_tensors
from farcast_cli.tensors import BY_CODE, DTYPES
from farcast_cli.trainers.weights_folder import MAX_JSON_BYTES, read_json
from tests.conftest import PATIENCE_S

SAFETENSORS_NAMES = sorted(dtype.name for dtype in BY_CODE.values() if not dtype.bits)  # of whole bytes, as torch has them
TORCH_NAMES = sorted(DTYPES)
# Before 3.11.4, Python pickled these by getattr, which no file may ask for.
ENUMS = (http.HTTPStatus.OK, signal.Signals.SIGTERM, re.IGNORECASE) if sys.version_info >= (3, 11, 4) else ()


def bytes_of(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any type with known, varied bytes (0 and 1 where only those are values)."""
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    raw = torch.arange(count, dtype=torch.uint8) % (2 if dtype == "bool" else 120)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


# --- JSON ------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("log"), inner, max_size=4),
    max_leaves=12,
)


def written(tree: dict[str, Any]) -> bytes:
    """The text of an object whose log lies in its file."""
    parts = (
        part.path.read_bytes()[part.offset : part.offset + part.num_bytes] if isinstance(part, UnreadList) else part
        for part in encode_json(tree)
    )
    return b"".join(parts)


@settings(max_examples=200)
@given(
    tree=st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    log=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 2]),
)
def test_a_log_that_is_left_in_its_file_is_written_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], log: list[Any], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("json") / "state.json"
    whole = tree | {"log": log}
    path.write_text(json.dumps(whole, indent=indent, sort_keys=True))
    read = read_json(path, log="log")
    assert {key: value for key, value in read.items() if key != "log"} == {key: v for key, v in whole.items() if key != "log"}
    again = written(read | {"step": 7})
    assert json.loads(again) == whole | {"step": 7}
    if indent:
        assert again.decode() == json.dumps(whole | {"step": 7}, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("log", [[], [7], ["a]  "], [{"loss": 1.5, "step": 1}, {"loss": 0.5, "step": 2}], ["y" * 9000, []]])
def test_an_entry_is_added_to_a_log_that_is_left_in_its_file(tmp_path: Path, log: list[Any], indent: int | None) -> None:
    tree, entry = {"a": 1, "log": log, "z": {"log": []}}, {"step": 3, "other": 4}
    (tmp_path / "state.json").write_text(json.dumps(tree, indent=indent))
    read = read_json(tmp_path / "state.json", log="log")
    longer = with_entry(read["log"], entry)
    again = b"".join(
        part.path.read_bytes()[part.offset : part.offset + part.num_bytes] if isinstance(part, UnreadList) else part
        for part in encode_json(read | {"log": longer})
    )
    expected = tree | {"log": [*log, entry]}
    assert json.loads(again) == expected
    if indent:
        assert again.decode() == json.dumps(expected, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("entry", [7, None, "a},b", [1, [2]], {"a": [1, {"b": "},"}]}, "y" * 70_000])
@pytest.mark.parametrize("separator", [",", ",\n  "])
def test_a_log_of_any_entries_is_left_in_its_file(tmp_path: Path, entry: object, separator: str) -> None:
    """Batches of entries are cut at what looks like the end of one."""
    log = f"[{separator.join([json.dumps(entry)] * (20_000 if len(str(entry)) < 100 else 5))}]"
    (tmp_path / "state.json").write_text(f'{{"global_step": 9, "log": {log}}}')
    left = read_json(tmp_path / "state.json", log="log")["log"]
    assert isinstance(left, UnreadList)
    assert (tmp_path / "state.json").read_text()[left.offset : left.offset + left.num_bytes] == log


def test_a_long_log_takes_little_memory_and_is_not_kept(tmp_path: Path) -> None:
    entries = [
        {"epoch": n / 100, "grad_norm": n * 1.37, "learning_rate": 5e-05, "loss": 2 + n * 1e-7, "step": n}
        for n in range(70_000)
    ]
    (tmp_path / "state.json").write_text(json.dumps({"global_step": 9, "log_history": entries}, indent=2))
    size = (tmp_path / "state.json").stat().st_size
    assert size > 9_000_000
    tracemalloc.start()
    read = read_json(tmp_path / "state.json", log="log_history")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read["global_step"] == 9
    assert peak < 2.2 * size
    assert kept < 100_000
    assert json.loads(written(read))["log_history"] == entries


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"log": [{"a": 1}, {"a": 2', "ends before its JSON does"),
        ('{"log": [{"a": 1} {"a": 2}]}', "does not end"),
        ('{"log": [{"a": 1}, {"a": nul}]}', "no JSON"),
        ('{"log": [' + "[" * 500 + "]" * 500 + "]}", "nested deep"),
        ('{"log": [[' + "1," * 600_000 + "1]]}", "longer than a megabyte"),
        ('{"log": [' + "9" * 5000 + "]}", "digits"),
    ],
)
def test_a_log_that_is_damaged_or_made_to_exhaust_its_reader_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(FileFormatError, match=says):
        read_json(tmp_path / "state.json", log="log")


@pytest.mark.parametrize("letter", ["a", "\u20ac"])
def test_json_over_the_limit_is_not_read_into_memory(tmp_path: Path, letter: str) -> None:
    """Other letters than ASCII's take four bytes each once they are read."""
    room = MAX_JSON_BYTES // (1 if letter == "a" else 4)
    with (tmp_path / "state.json").open("wb") as file:
        file.write(b'{"x": "' + letter.encode() * 2)
        file.truncate(room + 1)
    with pytest.raises(FileFormatError, match="bytes of JSON, expected at most"):
        read_json(tmp_path / "state.json")


@pytest.mark.parametrize("mark", [b"{},", b"0,", b'"a":1,'])
def test_json_of_more_objects_items_or_keys_than_any_checkpoint_has_is_refused(mark: bytes) -> None:
    with pytest.raises(ValueError, match="more than"):
        parse_json(b"[" + mark * 4_100_000 + b"0]")


# --- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES)
def test_a_safetensors_tensor_of_every_type_and_shape_is_found_where_the_library_put_it(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "a.safetensors"
    tensor = bytes_of(dtype, shape)
    save_file({"before": torch.ones(3), "it": tensor}, path)
    (entry,) = [entry for entry in read_safetensors(path).entries if entry.name == "it"]
    assert (entry.dtype.name, entry.shape) == (dtype, shape)
    assert path.read_bytes()[entry.offset : entry.offset + entry.num_bytes] == raw_bytes(tensor)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES)
def test_a_header_that_farcast_encodes_is_read_by_the_safetensors_library(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    tensors = {"a.b": bytes_of(dtype, shape), "ünï/'\"\\": torch.tensor([1.5, -2.0])}
    header = encode_header(
        [(name, DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in tensors.items()], {"format": "pt"}
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + b"".join(raw_bytes(tensor) for tensor in tensors.values()))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(loaded[name]) == raw_bytes(tensor)
    assert len(header) % 8 == 0


def test_metadata_of_a_safetensors_file_are_read_and_written_in_one_order(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"step": "12", "format": "pt"})
    assert read_safetensors(path).metadata == {"step": "12", "format": "pt"}
    one = encode_header([("a", DTYPES["float32"], (2,))], {"b": "2", "a": "1"})
    assert one == encode_header([("a", DTYPES["float32"], (2,))], {"a": "1", "b": "2"})


GOOD = save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def read_raw_safetensors(folder: Path, raw: bytes) -> Any:
    path = folder / "x.safetensors"
    path.write_bytes(raw)
    return read_safetensors(path)


def with_header(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@settings(max_examples=300)
@given(position=st.integers(0, HEADER_END - 1), value=st.integers(0, 255))
def test_a_changed_byte_in_a_safetensors_header_is_read_or_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    raw = GOOD[:position] + bytes([value]) + GOOD[position + 1 :]
    folder = tmp_path_factory.mktemp("flip")
    try:
        file = read_raw_safetensors(folder, raw)
    except FileFormatError:
        return
    assert sum(entry.num_bytes for entry in file.entries) == len(GOOD) - HEADER_END
    assert all(entry.offset + entry.num_bytes <= len(GOOD) for entry in file.entries)


def test_a_safetensors_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(FileFormatError, match=r"x\.safetensors: "):
            read_raw_safetensors(tmp_path, GOOD[:length])


@settings(max_examples=200)
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_no_safetensors_file(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    with pytest.raises(FileFormatError):
        read_raw_safetensors(tmp_path_factory.mktemp("random"), b"\x01" + raw)


REST = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def test_files_of_the_same_header_share_it_whatever_their_metadata(tmp_path: Path) -> None:
    found = []
    for index, text in enumerate(("x", 'y "}, {\\"', "z" * 100, "é")):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(with_header({"__metadata__": {"k": text}, "a": SPEC}, b"x" * 8))
        found.append(read_safetensors(path))
        assert found[-1].metadata == {"k": text}
    assert [(one.entries[0].path, one.entries[0].offset) for one in found] == [(one.path, one.data_start) for one in found]
    headers = [one.entries.header for one in found if isinstance(one.entries, StoredEntries)]
    assert len(headers) == 4
    assert all(header is headers[0] for header in headers)


@pytest.mark.parametrize(
    ("metadata", "size", "message"),
    [
        (b'{"k":"v","k":"v"}', 8, "twice"),
        (b'{"k":5}', 8, "__metadata__"),
        (b'{"k":["v"]}', 8, "__metadata__"),
        (b'{"k":"v",}', 8, r"not JSON.*char 25\)"),
        (b'{"k":"\xff"}', 8, "not JSON"),
        (b'{"k":"\\ud800"}', 8, "surrogate"),
        (b'{"k":"v"},"__metadata__":{}', 8, "twice"),
        (b'{"k":"v"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', 8, "starts at byte"),
        (b'{"k":"v"}', 9, "expected .* bytes, found"),
        (b'{"k":"v"}', 7, "expected .* bytes, found"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_although_another_has_the_same_header(
    tmp_path: Path, metadata: bytes, size: int, message: str
) -> None:
    (tmp_path / "good.safetensors").write_bytes(with_header(b'{"__metadata__":{"k":"v"},' + REST, b"x" * 8))
    good = read_safetensors(tmp_path / "good.safetensors")
    assert len(good.entries) == 1
    (tmp_path / "bad.safetensors").write_bytes(with_header(b'{"__metadata__":' + metadata + b"," + REST, b"x" * size))
    with pytest.raises(FileFormatError, match=message):
        read_safetensors(tmp_path / "bad.safetensors")


def test_metadata_that_stand_last_are_read_from_each_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(with_header({"a": SPEC, "__metadata__": {"k": "v"}}, b"x" * 8))
    assert [read_safetensors(tmp_path / name).metadata for name in ("one", "two")] == [{"k": "v"}] * 2
    kept = [read_safetensors(tmp_path / name) for name in ("one", "two")]
    assert [one.metadata for one in kept] == [{"k": "v"}] * 2


SPEC = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "bytes behind the data": (with_header({"a": SPEC}, b"x" * 9), "expected .* bytes, found"),
    "a hole": (with_header({"a": SPEC, "b": {**SPEC, "data_offsets": [12, 20]}}, b"x" * 20), "'b' starts at byte"),
    "a hole in front": (with_header({"a": {**SPEC, "data_offsets": [4, 12]}}, b"x" * 12), "'a' starts at byte"),
    "an overlap": (with_header({"a": SPEC, "b": {**SPEC, "data_offsets": [4, 12]}}, b"x" * 12), "'b' starts at byte"),
    "one place for two": (with_header({"a": SPEC, "b": SPEC}, b"x" * 8), "starts at byte"),
    "a name twice": (with_header(b'{"a":%b,"a":%b}' % ((json.dumps(SPEC).encode(),) * 2), b"x" * 8), "twice"),
    "a key twice": (with_header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8), "twice"),
    "offsets in reverse": (with_header({"a": {**SPEC, "data_offsets": [8, 0]}}, b"x" * 8), "expected 8 bytes"),
    "a negative offset": (with_header({"a": {**SPEC, "data_offsets": [-8, 0]}}, b"x" * 8), "data_offsets"),
    "a shape that is too large": (with_header({"a": {**SPEC, "shape": [3]}}, b"x" * 8), "expected 12 bytes"),
    "a shape whose product overflows": (with_header({"a": {**SPEC, "shape": [1 << 61, 8]}}, b"x" * 8), "expected .* bytes"),
    "a negative shape": (with_header({"a": {**SPEC, "shape": [-1, -2]}}, b"x" * 8), "shape"),
    "a float in the shape": (with_header({"a": {**SPEC, "shape": [2.0]}}, b"x" * 8), "shape"),
    "true in the shape": (with_header({"a": {**SPEC, "shape": [2, True]}}, b"x" * 8), "shape"),
    "three offsets": (with_header({"a": {**SPEC, "data_offsets": [0, 8, 8]}}, b"x" * 8), "data_offsets"),
    "an unknown type": (with_header({"a": {**SPEC, "dtype": "F31"}}, b"x" * 8), "unknown dtype 'F31'"),
    "a list for a type": (with_header({"a": {**SPEC, "dtype": []}}, b"x" * 8), "unknown dtype"),
    "no type": (with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8), "lacks dtype"),
    "a number for a tensor": (with_header({"a": 5}), "lacks dtype"),
    "metadata of numbers": (with_header({"__metadata__": {"step": 5}}), "__metadata__"),
    "metadata that are a list": (with_header({"__metadata__": []}), "__metadata__"),
    "a list for a header": (with_header([SPEC]), "header"),
    "broken JSON": (with_header(b'{"a":'), "not JSON"),
    "broken text": (with_header(b'{"a\xff":5}'), "not JSON"),
    "JSON without an end": (with_header(b'{"a":' * 20_000), "not JSON|JSON"),
    "half a character as a name": (with_header(b'{"\\ud800":%b}' % json.dumps(SPEC).encode(), b"x" * 8), "ud800|name|JSON"),
    "a header of 2^63 bytes": (with_header({"a": SPEC}, b"x" * 8, length=1 << 63), "a header of 9223372036854775808 bytes"),
    "a header of all ones": (b"\xff" * 64, "header"),
    "a header longer than the file": (with_header({"a": SPEC}, length=200), "a header of 200 bytes"),
    "no bytes": (b"", "0 bytes in all"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes in all"),
    "a page of the web": (b"<!DOCTYPE html><html><body>404</body></html>", "header"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_refused_with_its_name_and_a_reason(tmp_path: Path, what: str) -> None:
    raw, reason = DAMAGED[what]
    with pytest.raises(FileFormatError, match=reason) as caught:
        read_raw_safetensors(tmp_path, raw)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_safetensors_header_over_the_limit_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(300_000_000)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="a header of 200000000 bytes"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_git_lfs_pointer_is_named_as_one_with_the_command_that_fetches_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(LFS + b"size 12345\n")
    with pytest.raises(FileFormatError, match="git-LFS pointer") as caught:
        (read_safetensors if ending == "safetensors" else read_torch_file)(path)
    assert caught.value.hint == f"git -C {tmp_path} lfs pull"


# --- torch files -----------------------------------------------------------------------------------------------------


class _Mode(enum.Enum):
    """A choice, as trainers keep them in their settings."""

    FAST = "fast"


@dataclass
class _Config:
    """Settings of one's own."""

    name: str
    value: Any
    mode: _Mode | None


def rewritten(source: Path, target: Path) -> TorchFile:
    """Write a file anew from what was read of it: the encoded tree and the records' bytes."""
    file = read_torch_file(source)
    raw = source.read_bytes()
    with zipfile.ZipFile(target, "w") as archive:
        for name, record in file.records.items():
            own = name == f"{file.prefix}/data.pkl"
            archive.writestr(name, encode_pickle(file.tree) if own else raw[record.offset : record.offset + record.num_bytes])
    return file


def equal(a: Any, b: Any) -> bool:
    """Whether two loaded trees are the same: types, order of keys, element types, strides and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        return same and raw_bytes(a.detach()) == raw_bytes(b.detach())
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def trained() -> tuple[torch.nn.Module, torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)],
        milestones=[2],
    )
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


def payloads() -> dict[str, Any]:
    model, optimizer, scheduler = trained()
    base = torch.arange(24.0)
    shared = torch.randn(3, 3)
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    return {
        "a state dict": model.state_dict(),
        "an optimizer": optimizer.state_dict(),
        "a schedule": scheduler.state_dict(),
        "all together": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "args": {"lr": 1e-3}},
        "parameters": {"w": parameter, "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False), "again": parameter},
        "a tensor with a gradient": {"w": torch.ones(2, requires_grad=True)},
        "views": {"a": base[2:10], "b": base[10:].reshape(2, 7), "t": base.reshape(4, 6).T, "e": torch.ones(1).expand(3)},
        "tied storages": {"embed": shared, "head": shared, "part": shared[1]},
        "sizes and bytes": {"size": torch.Size([2, 3]), "raw": b"\x00\xff\x80abc", "sizes": [torch.Size([])]},
        "element types": {"dtype": torch.bfloat16, "in a list": [torch.float32, torch.int64], "in a tuple": (torch.uint16,)},
        "plain data": {"none": None, "bools": [True, False], "big": 1 << 70, "f": -0.0, "text": "ünï", 3: {"set": {1, 2}}},
        "counters": {"c": Counter("abca"), "o": OrderedDict(b=1, a=2), "nested": [[{"w": torch.ones(1)}]]},
        "a lone tensor": torch.arange(5, dtype=torch.int16),
        "empty and single": {"empty": torch.empty(0, 3), "single": torch.tensor(3.5)},
    }


@pytest.mark.parametrize("what", payloads())
def test_a_torch_file_written_back_loads_as_the_same_objects(tmp_path: Path, what: str) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(payloads()[what], source)
    rewritten(source, target)
    before, after = (torch.load(path, weights_only=True) for path in (source, target))
    assert equal(before, after)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_a_torch_tensor_of_every_type_is_found_where_torch_put_it_and_written_back(tmp_path: Path, dtype: str) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    tensor = bytes_of(dtype, (2, 3))
    torch.save({"x": torch.ones(3), "it": tensor}, source)
    file = rewritten(source, target)
    entry = file.entry("it", file.tree["it"])
    assert (entry.dtype.name, entry.shape) == (dtype, (2, 3))
    assert source.read_bytes()[entry.offset : entry.offset + entry.num_bytes] == raw_bytes(tensor)
    loaded = torch.load(target, weights_only=True)["it"]
    assert loaded.dtype == tensor.dtype
    assert raw_bytes(loaded) == raw_bytes(tensor)


def test_tied_tensors_still_share_their_storage_after_being_written_back(tmp_path: Path) -> None:
    torch.save(payloads()["tied storages"], tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    loaded["embed"].zero_()
    assert loaded["head"].abs().sum() == 0
    assert loaded["part"].abs().sum() == 0


def test_the_attributes_of_a_state_dict_are_kept(tmp_path: Path) -> None:
    torch.save(trained()[0].state_dict(), tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", tmp_path / "b.pt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert before._metadata["1"] == {"version": 2}
    assert after._metadata == before._metadata


def test_reading_a_torch_file_costs_its_pickle_and_not_its_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10_000_000)}, tmp_path / "a.pt")
    tracemalloc.start()
    try:
        file = read_torch_file(tmp_path / "a.pt")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert file.tree["w"].shape == (10_000_000,)


# --- harmful torch files ---------------------------------------------------------------------------------------------


class _Reduces:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def torch_zip(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, *, compression: int = 0) -> Path:
    """A zip as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, data in (records or {"archive/version": b"3\n"}).items():
            archive.writestr(name, data)
    return path


def harmful(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    return {
        "os.system": _Reduces(os.system, touch),
        "subprocess.run": _Reduces(subprocess.run, ["touch", str(marker)]),
        "builtins.eval": _Reduces(eval, f"__import__('os').system({touch!r})"),
        "builtins.exec": _Reduces(exec, f"import os; os.system({touch!r})"),
        "builtins.getattr": _Reduces(getattr, 1, "real"),
        "builtins.open": _Reduces(open, str(marker), "w"),
        "os.mkdir": _Reduces(os.mkdir, str(marker)),
        "torch.load": _Reduces(torch.load, "x.pt"),
        "deep inside": {"model": {"w": torch.ones(2)}, "extra": [{"x": (1, _Reduces(os.system, touch))}]},
    }


@pytest.mark.parametrize("what", harmful(Path("unused")))
def test_a_torch_file_that_asks_for_code_is_refused_and_runs_none_of_it(tmp_path: Path, what: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    torch.save(harmful(marker)[what], path)
    with pytest.raises(UnsafeFileError, match=r"a\.pt: its pickle asks for ") as caught:
        read_torch_file(path)
    assert not marker.exists()
    assert "plain data" in caught.value.hint
    assert caught.value.exit_code == 4


def _written(data: bytes) -> io.BytesIO:
    stream = io.BytesIO()
    stream.write(data)
    return stream


def carried() -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {
        "a namespace": {"w": torch.ones(2), "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(a=[1, 2]))},
        "a path": {"w": torch.ones(2), "dir": Path("x/y")},
        "classes of one's own": {"own": _Config("a", 3, _Mode.FAST), "mode": _Mode.FAST, "w": torch.ones(2)},
        "numpy": {
            "state": np.random.RandomState(1).get_state(),
            "number": np.float32(1.5),
            "array": np.arange(6).reshape(2, 3),
        },
        "a numpy generator": {"bits": generator.bit_generator.state, "w": torch.ones(2)},
        "python's random state": {"random": random.Random(1).getstate()},  # noqa: S311 - no secret
        "collections": {
            "d": collections.defaultdict(list, a=[1]),
            "q": collections.deque([1, 2], maxlen=3),
            "f": frozenset("ab"),
        },
        "dates": {"at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "took": dt.timedelta(seconds=3)},
        "a tensor inside": {"own": _Config("a", torch.arange(3.0), None), "w": torch.ones(2)},
        "a device": {"device": torch.device("cuda", 1), "w": torch.ones(2)},
        "bytes in memory, as a module's extra state": {"w": torch.ones(2), "_extra_state": _written(b"amax")},
        "plain objects of the standard library": {
            "w": torch.ones(2),
            "ids": (ipaddress.ip_address("10.0.0.1"), *ENUMS),
            "kinds": (list[int], collections.UserString("a"), itertools.count(3), Ellipsis),
            "errors": [ValueError("diverged"), KeyError("lr")],
            "rows": np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        },
        "a whole module": {"net": torch.nn.Linear(2, 2), "w": torch.ones(2)},
        "sparse": {"s": torch.eye(3).to_sparse(), "w": torch.ones(2)},
        "conjugated": {"c": torch.tensor([1 + 2j]).conj()},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("what", carried())
def test_what_is_data_though_no_plain_data_is_carried_and_written_back_as_it_was(
    tmp_path: Path, what: str, protocol: int
) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(carried()[what], source, pickle_protocol=protocol)
    rewritten(source, target)
    before, after = (torch.load(path, weights_only=False) for path in (source, target))
    assert same(before, after)


def same(a: Any, b: Any) -> bool:  # noqa: PLR0911 - a kind a line
    """Whether two objects of any class hold the same."""
    if isinstance(a, torch.nn.Module):
        return type(a) is type(b) and equal(a.state_dict(), b.state_dict())
    if isinstance(a, torch.Tensor):
        return a.is_sparse == b.is_sparse and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (tuple, list, collections.deque)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, io.BytesIO):
        return type(a) is type(b) and (a.getvalue(), a.tell()) == (b.getvalue(), b.tell())
    if isinstance(a, (Exception, itertools.count)):
        return type(a) is type(b) and repr(a) == repr(b)
    if isinstance(a, (_Config, argparse.Namespace)):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and bool(a == b)


GLOBALS = (
    b"cos\nsystem\n(S'touch %b'\ntR.",  # GLOBAL and REDUCE
    b"(S'touch %b'\nios\nsystem\n.",  # INST
    b"(cos\nsystem\nS'touch %b'\no.",  # OBJ
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x00S'touch %b'\n\x85R.",  # STACK_GLOBAL
)


@pytest.mark.parametrize("pickled", GLOBALS)
def test_no_opcode_reaches_a_function_that_is_not_on_the_list(tmp_path: Path, pickled: bytes) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(UnsafeFileError, match=r"os\.system"):
        read_torch_file(torch_zip(tmp_path / "a.pt", pickled % str(marker).encode()))
    assert not marker.exists()


def test_a_pickle_cannot_change_the_classes_of_the_reading_process(tmp_path: Path) -> None:
    before = Counter.most_common
    pickled = b"ccollections\nCounter\n(N}S'most_common'\nccollections\nOrderedDict\nstb."  # BUILD with slots on the class
    try:
        with pytest.raises(FarcastError):
            read_torch_file(torch_zip(tmp_path / "a.pt", pickled))
        assert Counter.most_common is before
    finally:
        Counter.most_common = before  # type: ignore[method-assign]


BOMBS = {
    "LONG_BINPUT": b"\x80\x02}r\xff\xff\xff\xff.",
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 300_000_000) + b".",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 300_000_000) + b".",
    "BINUNICODE": b"\x80\x02X" + struct.pack("<I", 300_000_000) + b".",
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", 300_000_000) + b".",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 300_000_000) + b".",
}


@pytest.mark.parametrize("opcode", BOMBS)
def test_a_size_that_a_pickle_merely_claims_takes_no_memory(tmp_path: Path, opcode: str) -> None:
    path = torch_zip(tmp_path / "a.pt", BOMBS[opcode])
    tracemalloc.start()
    try:
        tree = read_torch_file(path).tree
    except FileFormatError:
        tree = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not tree
    assert peak < 2_000_000


def test_lists_that_hold_each_other_a_quintillion_times_over_are_refused_or_read_at_once(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "nested": nested}, path)
    code = (
        "import sys; from pathlib import Path; from farcast_cli.formats.torch_file import read_torch_file;"
        "from farcast_cli.errors import FarcastError\n"
        "try: read_torch_file(Path(sys.argv[1]))\nexcept FarcastError: pass\nprint('ended')"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "ended\n"


def test_a_tuple_nested_a_million_deep_is_refused_and_does_not_end_the_process(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pt", b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")
    code = (
        "import sys; from pathlib import Path; from farcast_cli.formats.torch_file import read_torch_file;"
        "from farcast_cli.errors import FarcastError\n"
        "try: read_torch_file(Path(sys.argv[1]))\nexcept FarcastError: print('refused')"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n")


# --- damaged torch files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer, _ = trained()
    path = tmp_path_factory.mktemp("saved") / "good.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "size": torch.Size([2])}, path)
    return path


def read_or_refuse(path: Path) -> TorchFile | None:
    """The file, or None where it is refused; any other exception ends the test."""
    try:
        return read_torch_file(path)
    except FileFormatError:
        return None


@settings(max_examples=300)
@given(data=st.data())
def test_a_changed_byte_in_a_torch_pickle_gives_a_tree_or_farcasts_own_error(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = read_torch_file(saved)
    record = file.records[f"{file.prefix}/data.pkl"]
    raw = bytearray(saved.read_bytes())
    raw[record.offset + data.draw(st.integers(0, record.num_bytes - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "x.pt"
    path.write_bytes(raw)
    found = read_or_refuse(path)
    entries = [found.entry("x", ref) for _, ref in iter_tensors(found.tree)] if found else []
    assert all(entry.offset + entry.num_bytes <= len(raw) for entry in entries)


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_byte_anywhere_in_a_torch_file_gives_a_tree_or_farcasts_own_error(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(saved.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "x.pt"
    path.write_bytes(raw)
    found = read_or_refuse(path)
    records = found.records.values() if found else ()
    assert all(record.offset + record.num_bytes <= len(raw) for record in records)


def test_a_torch_file_cut_short_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    raw, path = saved.read_bytes(), tmp_path / "x.pt"
    for length in range(0, len(raw), 61):
        path.write_bytes(raw[:length])
        with pytest.raises(FileFormatError, match=r"x\.pt: ") as caught:
            read_torch_file(path)
        assert caught.value.hint


def test_a_compressed_torch_file_is_refused(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match="compressed"):
        read_torch_file(path)


def patched_directory(path: Path, name: str, field: int, value: int) -> None:
    """Overwrite a four-byte field of a record in the zip's directory."""
    raw = bytearray(path.read_bytes())
    position = raw.rfind(name.encode()) - 46
    assert raw[position : position + 4] == b"PK\x01\x02"
    raw[position + field : position + field + 4] = value.to_bytes(4, "little")
    path.write_bytes(raw)


def test_zip_records_that_overlap_are_refused(tmp_path: Path) -> None:
    storages = {"archive/data/0": b"x" * 400, "archive/data/1": b"y" * 400}
    path = torch_zip(tmp_path / "a.pt", pickle.dumps({}, 2), storages)
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/0").header_offset
    patched_directory(path, "archive/data/1", 42, first)  # both now lie in one place
    with pytest.raises(FileFormatError, match="overlap"):
        read_torch_file(path)


def test_a_zip_record_that_reaches_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pt", pickle.dumps({}, 2), {"archive/data/0": b"x" * 400})
    for field in (20, 24):  # compressed and plain size
        patched_directory(path, "archive/data/0", field, 1 << 30)
    with pytest.raises(FileFormatError, match="reaches beyond the end"):
        read_torch_file(path)


def test_a_zip_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", pickle.dumps({"other": 1}, 2))
    with pytest.raises(FileFormatError, match="twice"):
        read_torch_file(path)


def test_a_zip_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(FileFormatError, match=r"expected one data\.pkl, found 0"):
        read_torch_file(tmp_path / "a.pt")


def test_a_big_endian_torch_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/byteorder", "big")
    with pytest.raises(FileFormatError, match="big-endian"):
        read_torch_file(tmp_path / "a.pt")


def tensor_pickle(*, size: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one float tensor with any claims about its storage."""
    float32 = DTYPES["float32"]
    return encode_pickle({"w": TensorRef(StorageRef("0", float32, "cpu", size), float32, offset, shape, stride)})


CLAIMS: dict[str, dict[str, Any]] = {
    "a storage longer than its record": {"size": 100, "offset": 0, "shape": (4,), "stride": (1,)},
    "a tensor longer than its storage": {"size": 4, "offset": 0, "shape": (5,), "stride": (1,)},
    "an offset beyond the storage": {"size": 4, "offset": 4, "shape": (1,), "stride": (1,)},
    "a negative offset": {"size": 4, "offset": -1, "shape": (1,), "stride": (1,)},
    "a stride beyond the storage": {"size": 4, "offset": 0, "shape": (2,), "stride": (4,)},
    "a negative stride": {"size": 4, "offset": 3, "shape": (2,), "stride": (-1,)},
    "a negative size": {"size": 4, "offset": 0, "shape": (-1,), "stride": (1,)},
    "a shape and a stride that differ in length": {"size": 4, "offset": 0, "shape": (2, 2), "stride": (1,)},
    "a negative storage": {"size": -4, "offset": 0, "shape": (0,), "stride": (1,)},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_tensor_that_does_not_lie_in_its_storage_is_refused(tmp_path: Path, what: str) -> None:
    path = torch_zip(tmp_path / "a.pt", tensor_pickle(**CLAIMS[what]), {"archive/data/0": b"\0" * 16})
    with pytest.raises(FileFormatError, match=r"a\.pt: "):
        read_torch_file(path)


def test_the_same_tensor_with_true_claims_is_read(tmp_path: Path) -> None:
    pickled = tensor_pickle(size=4, offset=1, shape=(3,), stride=(1,))
    tree = read_torch_file(torch_zip(tmp_path / "a.pt", pickled, {"archive/data/0": b"\0" * 16})).tree
    assert isinstance(tree["w"], TensorRef)
    assert (tree["w"].offset, tree["w"].shape) == (1, (3,))


def test_a_torch_file_from_before_the_zip_format_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"w": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"old torch file \(before torch 1\.6\)") as caught:
        read_torch_file(path)
    subprocess.run(caught.value.hint.replace("python", sys.executable, 1), shell=True, check=True)  # noqa: S602 - the hint is a command
    assert read_torch_file(tmp_path / "old.pt.new.pt").tree["w"].shape == (3,)


def test_something_else_under_a_torch_files_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("hello")
    with pytest.raises(FileFormatError, match="not a torch file: expected a zip, found b'hello'"):
        read_torch_file(path)


@pytest.mark.parametrize("text", [r'"half \ud83d of a pair"', r'"\udc00\ud800"'])
@pytest.mark.parametrize("place", ["name", "metadata"])
def test_half_of_a_surrogate_pair_in_a_safetensors_header_is_refused_as_safetensors_does(
    tmp_path: Path, text: str, place: str
) -> None:
    spec = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = {"name": f"{{{text}:{spec}}}", "metadata": f'{{"__metadata__":{{"a":{text}}},"w":{spec}}}'}[place].encode()
    path = tmp_path / "step_1.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(FileFormatError, match="half of a surrogate pair"):
        read_safetensors(path)
