"""Files that are made to harm whoever reads them, each in a run of its own, and a process that reads them all.

Every payload tries to leave a marker, to end the process, to exhaust its memory or to make it wait for ever. The process
(`python -m tests.corpus FOLDER`) calls the real command on each run with a limited address space, and reports what it
said and how much memory it took.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import joblib  # type: ignore[import-untyped]
import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from tests.conftest import STEPS, make_loose_run, make_torch_run, weights_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Files = Callable[[Path, Path], None]
    """Puts the harmful files into a run's folder; the second path is the marker that they try to make."""

Base = Literal["loose", "torch", "hf", "hf-bin", "lightning", "accelerate", "dcp"]
SHAPES = {"w": (8, 4), "b": (4,)}
ROOM_BYTES = 1_500_000_000  # of address space beyond what the process has after its imports
WAIT_S = 30  # then SIGALRM ends the process: what loops in C hears no handler of Python's


@dataclass(frozen=True, slots=True)
class Case:
    """A harmful file: what it tries, and the first command that has to refuse it.

    `at` is that command; the ones before it succeed, because they do not read the file.
    """

    name: str
    base: Base
    files: Files
    at: Literal["inspect", "predict"] = "inspect"
    code: int = 4
    says: str = ""
    memory_mb: int = 64
    is_heavy: bool = False
    """Read by `inspect` alone, which reads it as `fit` does: it takes a second or so."""


# --- runs ------------------------------------------------------------------------------------------------------------


def make_hf_run(folder: Path, *, as_bin: bool = False) -> Path:
    """What a Trainer saves, as far as farcast reads or copies it."""
    for step in STEPS:
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        weights = weights_at(step, shapes=SHAPES)
        if as_bin:
            torch.save(weights, place / "pytorch_model.bin")
        else:
            save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        state = {i: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(4)} for i in range(2)}
        groups = [{"lr": 1e-3, "initial_lr": 1e-3, "params": [0, 1]}]
        torch.save({"state": state, "param_groups": groups}, place / "optimizer.pt")
        schedule = {"base_lrs": [1e-3], "last_epoch": step, "_step_count": step + 1, "_last_lr": [1e-3], "lr_lambdas": [{}]}
        torch.save(schedule, place / "scheduler.pt")
        torch.save({"cpu": torch.zeros(4, dtype=torch.uint8)}, place / "rng_state.pth")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 100, "max_steps": 9000}))
    return folder


def lightning_payload(step: int, **more: Any) -> dict[str, Any]:
    """What Lightning saves, as far as farcast reads it."""
    return {
        "epoch": step // 100,
        "global_step": step,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights_at(step, shapes=SHAPES),
        "hyper_parameters": {"lr": 1e-3},
        "callbacks": {},
        **more,
    }


def make_lightning_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for step in STEPS:
        torch.save(lightning_payload(step), folder / f"step={step}.ckpt")
    return folder


def make_accelerate_run(folder: Path) -> Path:
    for step in STEPS:
        place = folder / f"step_{step}"
        place.mkdir(parents=True)
        save_file(weights_at(step, shapes=SHAPES), place / "model.safetensors", metadata={"format": "pt"})
        state = {i: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(4)} for i in range(2)}
        torch.save({"state": state, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}, place / "optimizer.bin")
        torch.save({"random_state": 1, "step": step}, place / "random_states_0.pkl")
    return folder


def dcp_state(step: int, **more: Any) -> dict[str, Any]:
    state = {"w": {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(8, 4)}}
    return {"model": weights_at(step, shapes=SHAPES), "optimizer": {"state": state}, "train_state": {"step": step}, **more}


def save_dcp(state: Mapping[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(dict(state), checkpoint_id=str(folder))


def make_dcp_run(folder: Path) -> Path:
    for step in STEPS:
        save_dcp(dcp_state(step), folder / f"step-{step}")
    return folder


def make_bases(folder: Path) -> None:
    make_loose_run(folder / "loose", shapes=SHAPES)
    make_torch_run(folder / "torch")
    make_hf_run(folder / "hf")
    make_hf_run(folder / "hf-bin", as_bin=True)
    make_lightning_run(folder / "lightning")
    make_accelerate_run(folder / "accelerate")
    make_dcp_run(folder / "dcp")


def build(corpus: Path) -> None:
    """Every case in a folder of its own: `run/` among good snapshots, and beside it nothing."""
    bases = corpus / ".bases"
    make_bases(bases)
    for case in CASES:
        home = corpus / name_of(case)
        shutil.copytree(bases / case.base, home / "run", copy_function=os.link)
        case.files(home / "run", marker_of(home))
    for base in bases.iterdir():
        shutil.copytree(base, corpus / f"good_{base.name}" / "run", copy_function=os.link)


def name_of(case: Case) -> str:
    return case.name.replace(" ", "_").replace("/", "_")


def marker_of(home: Path) -> Path:
    return home / "marker"


# --- placing ---------------------------------------------------------------------------------------------------------


def each(name: str, content: Callable[[Path], bytes]) -> Files:
    """The same content in every snapshot's file of that name; in every snapshot itself where the name is empty."""

    def place(run: Path, marker: Path) -> None:
        data = content(marker)
        for snapshot in sorted(run.iterdir()):
            replace_file(snapshot / name if name else snapshot, data)

    return place


def last(name: str, content: Callable[[Path], bytes]) -> Files:
    """In the last snapshot alone."""

    def place(run: Path, marker: Path) -> None:
        snapshot = newest(run)
        replace_file(snapshot / name if name else snapshot, content(marker))

    return place


def replace_file(path: Path, data: bytes) -> None:
    """Write a file anew: the old one is linked to from other runs."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def newest(run: Path) -> Path:
    return max(run.iterdir(), key=lambda path: int("".join(filter(str.isdigit, path.stem))))


def torch_zip(pickled: bytes, records: Mapping[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as torch writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, data in (records or {}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def zipped(pickled: Callable[[Path], bytes], **options: Any) -> Callable[[Path], bytes]:
    return lambda marker: torch_zip(pickled(marker), **options)


def beside_weights(harmful: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """A payload of torch.save with good weights and a step, and something harmful in it."""

    def content(marker: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save({"model": weights_at(100, shapes=SHAPES), "step": 80, "extra": harmful(marker)}, buffer)
        return buffer.getvalue()

    return content


# --- pickles that run code -------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """A string, by the opcode that every protocol knows."""
    return b"V" + value.encode("raw-unicode-escape") + b"\n"


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def touch(marker: Path) -> str:
    return f"touch {marker}"


def reduces(module: str, name: str, *args: str) -> bytes:
    """GLOBAL and REDUCE, protocol 0."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, args)) + b"tR."


def stack_global(module: str, name: str, *args: str, protocol: int = 4) -> bytes:
    return bytes([0x80, protocol]) + short(module) + short(name) + b"\x93(" + b"".join(map(text, args)) + b"tR."


def frame(size: int) -> bytes:
    return b"\x95" + struct.pack("<Q", size)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def by_protocol(protocol: int) -> Callable[[Path], bytes]:
    return lambda marker: pickle.dumps({"w": 1, "x": Calls(os.system, touch(marker))}, protocol)


CODE: dict[str, Callable[[Path], bytes]] = {
    **{f"protocol {protocol}": by_protocol(protocol) for protocol in range(6)},
    "GLOBAL REDUCE": lambda m: reduces("posix", "system", touch(m)),
    "INST": lambda m: b"(" + text(touch(m)) + b"ios\nsystem\n.",
    "OBJ": lambda m: b"(cos\nsystem\n" + text(touch(m)) + b"o.",
    "STACK_GLOBAL": lambda m: stack_global("os", "system", touch(m)),
    "STACK_GLOBAL from the memo": lambda m: (
        b"\x80\x04" + short("system") + b"\x94" + short("os") + b"\x94" + b"h\x01h\x00\x93(" + text(touch(m)) + b"tR."
    ),
    "STACK_GLOBAL from texts worked out": lambda m: (
        b"\x80\x04" + b"cbuiltins\nstr\n(" + text("os") + b"tR" + short("system") + b"\x93(" + text(touch(m)) + b"tR."
    ),
    "NEWOBJ": lambda m: b"\x80\x02csubprocess\nPopen\n((" + text("touch") + text(str(m)) + b"lt\x81.",
    "NEWOBJ_EX": lambda m: b"\x80\x04csubprocess\nPopen\n((" + text("touch") + text(str(m)) + b"lt}\x92.",
    "NEWOBJ_EX that hides REDUCE": lambda m: b"\x80\x04ccollections\nOrderedDict\n)}\x920" + reduces("os", "system", touch(m)),
    "BUILD setstate": lambda m: (
        b"cargparse\nNamespace\n)R}(" + text("__setstate__") + b"cos\nsystem\nsb" + text(touch(m)) + b"b."
    ),
    "BUILD slots": lambda m: b"ccollections\nCounter\n(N}" + text("most_common") + b"cos\nsystem\nstb" + text(touch(m)) + b"b.",
    "dotted name of an innocent module": lambda m: stack_global("torch.serialization", "os.system", touch(m)),
    "dotted name of the user's module": lambda m: stack_global("accelerate.utils.other", "os.system", touch(m)),
    "name of Python 2": lambda m: b"\x80\x02" + reduces("commands", "getoutput", touch(m)),
    "cPickle": lambda m: b"\x80\x02" + reduces("cPickle", "loads", touch(m)),
    "class re-exported": lambda m: b"\x80\x02cjoblib.popen\nPopen\n((" + text("touch") + text(str(m)) + b"lt\x81.",
    "exit": lambda _m: b"cos\n_exit\n(I77\ntR.",
    "abort": lambda _m: b"cos\nabort\n(tR.",
    "eval": lambda m: reduces("builtins", "eval", f"open({str(m)!r}, 'w')"),
    "getattr": lambda m: b"cbuiltins\ngetattr\n(cargparse\nos\n" + text("system") + b"tR(" + text(touch(m)) + b"tR.",
    "torch.load": lambda m: reduces("torch", "load", str(m)),
    "torch's file writer": lambda m: reduces("torch._C", "PyTorchFileWriter", str(m)),
    "numpy's runstring": lambda m: reduces("numpy.testing._private.utils", "runstring", f"open({str(m)!r}, 'w')", ""),
    "spawn under another module's name": lambda m: b"c_testcapi\nspawn_shell\n(" + text(touch(m)) + b"tR.",
    "FRAME that ends within a name": lambda m: (
        b"\x80\x04" + frame(3) + b"cmyos\nspawnlp\n(K\x00" + b"".join(map(text, ("sh", "sh", "-c", touch(m)))) + b"tR."
    ),
    "FRAME within a FRAME": lambda m: b"\x80\x04" + frame(24) + b"N0" + frame(5) + reduces("os", "system", touch(m)),
    "extension code": lambda _m: b"\x80\x02\x82\x01.",
    "persistent id": lambda m: b"\x80\x02cos\nsystem\n(" + text(touch(m)) + b"tRQ.",
}
"""Pickles that run code or end the process where `pickle.load` reads them."""

BLANKS = {
    "dotted name of the user's module": "that module imports no os in every version",
    "cPickle": "what it loads is no pickle",
    "class re-exported": "the module is made up",
    "getattr": "argparse is asked for its os, which later versions may lack",
    "torch.load": "there is nothing to load",
    "torch's file writer": "torch would have to be imported",
    "numpy's runstring": "numpy need not have it",
    "dotted name of an innocent module": "torch would have to be imported",
    "spawn under another module's name": "the function is made up",
    "extension code": "nobody has registered it",
    "NEWOBJ": "it makes the object without its `__init__`",
    "NEWOBJ_EX": "it makes the object without its `__init__`",
    "BUILD slots": "it changes a class, and calls nothing",
    "BUILD setstate": "a namespace without a call of its own takes the state as data",
}
"""Those that need something that is not there."""


def injected(marker: Path) -> bytes:
    """A class whose name holds opcodes: harmless as it stands, and code once it is written out by GLOBAL."""
    name = f"Config\n0cos\nsystem\n(V{touch(marker)}\ntR0cargparse\nNamespace"
    raw = b"\x80\x04" + b"\x8c\x08argparse" + b"X" + struct.pack("<I", len(name)) + name.encode() + b"\x93)R."
    return raw.replace(b"\x8c\x08argparse", short("innocent"))


# --- bombs -----------------------------------------------------------------------------------------------------------


def doubling(pairs: int, make: bytes, *, key: bool = False) -> bytes:
    """An object that holds one thing twice, which holds one thing twice, ..."""
    raw = b"\x80\x02" + (b"}" if key else b"") + make.replace(b"@", b"K\x00K\x00")
    for _ in range(pairs):
        raw += b"q\x00" + make.replace(b"@", b"h\x00h\x00").replace(b"(", b"0(", 1)
    return raw + (b"K\x01s." if key else b".")


BOMBS: dict[str, tuple[Callable[[Path], bytes], int]] = {
    "lists that double": (lambda _: doubling(60, b"(@l"), 64),
    "tuples that double as a key": (lambda _: doubling(60, b"(@t", key=True), 64),
    "a million sets": (lambda _: b"\x80\x04(" + b"\x8f" * 1_000_000 + b"l.", 150),
    "three million lists": (lambda _: b"\x80\x02(" + b"]" * 3_000_000 + b"l.", 200),
    "a tuple nested deep": (lambda _: b"\x80\x02)" + b"\x85" * 200_000 + b".", 64),
    "a list nested deep": (lambda _: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", 64),
    "frozen sets nested deep": (lambda _: b"\x80\x04(\x91" + b"q\x000(h\x00\x91" * 100_000 + b".", 64),
    "memo index of four billion": (lambda _: b"\x80\x02]r\xff\xff\xff\xff.", 64),
    "bytes of an exabyte claimed": (lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", 64),
    "bytearray of an exabyte claimed": (lambda _: b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.", 64),
    "text of four gigabytes claimed": (lambda _: b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b"x.", 64),
    "number of two gigabytes claimed": (lambda _: b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.", 64),
    "number of a million digits": (lambda _: b"L" + b"9" * 1_000_000 + b"L\n.", 64),
    "keys that collide": (
        lambda _: b"\x80\x02}(" + b"".join(pickle.dumps(i * ((1 << 61) - 1), 2)[2:-1] + b"N" for i in range(40_000)) + b"u.",
        64,
    ),
}


def tensor(shape: str, stride: str, offset: int = 0, size: int = 1) -> Callable[[Path], bytes]:
    """A state dict with one tensor as claimed, whose storage has four bytes."""

    def content(_: Path) -> bytes:
        raw = (
            f"(dVw\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{size}\ntQI{offset}\n"
            f"{shape}{stride}I00\nccollections\nOrderedDict\n(tRtRs."
        )
        return torch_zip(raw.encode(), {"archive/data/0": bytes(4)})

    return content


def ints(*values: int) -> str:
    return "(" + "".join(f"L{value}L\n" for value in values) + "t"


# --- containers of pickles -------------------------------------------------------------------------------------------


def numpy_objects(marker: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Calls(os.system, touch(marker))], dtype=object))
    return buffer.getvalue()


def joblib_file(marker: Path, **options: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump([Calls(os.system, touch(marker))], buffer, **options)
    return buffer.getvalue()


GOOD = b"\x80\x02}."
HELD: dict[str, Callable[[Path], bytes]] = {
    "scaler.joblib": joblib_file,
    "zlib.joblib": lambda m: joblib_file(m, compress=3),
    "lzma.joblib": lambda m: joblib_file(m, compress=("lzma", 1)),
    "data.npy": numpy_objects,
    "data.npz": lambda m: torch_zip(GOOD, {"x.npy": numpy_objects(m)}),
    "small.npz": lambda m: torch_zip(b"", {"x.npy": numpy_objects(m)}, compression=zipfile.ZIP_DEFLATED).replace(
        b"data.pkl", b"data.npx"
    ),
    "as_storage.npz": lambda m: torch_zip(GOOD, {"archive/data/0": numpy_objects(m)}),
    "state.pkl.gz": lambda m: gzip.compress(CODE["protocol 4"](m)),
    "two.gz": lambda m: gzip.compress(GOOD) + gzip.compress(CODE["protocol 4"](m)),
    "state.bz2": lambda m: bz2.compress(CODE["protocol 2"](m)),
    "state.xz": lambda m: lzma.compress(CODE["protocol 5"](m)),
    "state_0": CODE["protocol 0"],
    "state_1": CODE["protocol 1"],
    "inner.pt": lambda m: torch_zip(GOOD, {"archive/inner.pickle": CODE["protocol 4"](m)}),
    "second.state": lambda m: GOOD + CODE["protocol 2"](m),
    "hparams.yaml": lambda m: b"lr: 1\nx: !!python/object/apply:os.system ['%b']\n" % touch(m).encode(),
    "escaped.yml": lambda m: b"!<tag:yaml.org,2002:pyth%%6fn/object/new:os.system> ['%b']" % touch(m).encode(),
}
"""Files that their usual loader runs code from, and that hold it somewhere else than a torch file does."""


# --- zips ------------------------------------------------------------------------------------------------------------


@cache
def compressed() -> bytes:
    """A data.pkl of 300 MB that takes 0.3 MB."""
    return torch_zip(b"\x80\x02" + bytes(300_000_000) + b".", compression=zipfile.ZIP_DEFLATED)


@cache
def packed() -> bytes:
    """A pickle of 300 MB of zeros, and a call behind them."""
    return gzip.compress(b"\x80\x04B" + struct.pack("<I", 300_000_000) + bytes(300_000_000) + reduces("os", "system"), 1)


def claims(declared: int) -> Callable[[Path], bytes]:
    """A compressed record whose directory declares any size."""

    def content(_: Path) -> bytes:
        raw = bytearray(torch_zip(zlib.compress(GOOD), compression=zipfile.ZIP_DEFLATED))
        at = raw.index(b"PK\x01\x02")
        raw[at + 24 : at + 28] = struct.pack("<I", declared)
        return bytes(raw)

    return content


def with_records(records: Callable[[Path], Mapping[str, bytes]]) -> Callable[[Path], bytes]:
    return lambda marker: torch_zip(GOOD, records(marker))


def two_directories(marker: Path) -> bytes:
    """A zip in whose end Python finds one directory and torch another, with other records."""
    evil, good = (bytearray(torch_zip(raw)) for raw in (CODE["GLOBAL REDUCE"](marker), GOOD))
    end = bytearray(good[-22:])
    evil_directory = evil.index(b"PK\x01\x02")
    good_directory = good.index(b"PK\x01\x02")
    size = len(good) - 22 - good_directory
    end[12:20] = struct.pack("<II", size, evil_directory)
    return bytes(evil[:-22] + good[:good_directory] + good[good_directory:-22] + end)


def long_directory(_: Path) -> bytes:
    """A zip of nothing but a list of 400,000 records."""
    head = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
    listed = b"".join(head + b"%07d" % number for number in range(400_000))
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 400_000, 400_000, len(listed), 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(listed), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(listed), 4, 0)
    return b"PK\x03\x04" + listed + end64 + locator + end


def overlapping(_: Path) -> bytes:
    raw = bytearray(torch_zip(GOOD, {"archive/data/0": bytes(64), "archive/data/1": bytes(64)}))
    at = raw.rindex(b"PK\x01\x02")
    first = raw.index(b"PK\x03\x04")
    raw[at + 42 : at + 46] = struct.pack("<I", first)
    return bytes(raw)


def beyond(_: Path) -> bytes:
    raw = bytearray(torch_zip(GOOD, {"archive/data/0": bytes(64)}))
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    return bytes(raw)


def legacy(marker: Path) -> bytes:
    """A torch file from before the zip format: five pickles, the fourth harmful."""
    plain = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(plain) + CODE["GLOBAL REDUCE"](marker) + pickle.dumps([], 2)


def tar(marker: Path) -> bytes:
    """A torch file from before torch 0.2."""
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name in ("storages", "tensors", "pickle"):
            raw = CODE["GLOBAL REDUCE"](marker)
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


# --- safetensors -----------------------------------------------------------------------------------------------------


def header(value: object, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], bytes]:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass")
    return lambda _: struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(name: str = "w", **changes: Any) -> Callable[[Path], bytes]:
    return header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}, bytes(4))


def entries(count: int) -> Callable[[Path], bytes]:
    spec = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return header(("{" + ",".join(f'"{i}":{spec}' for i in range(count)) + "}").encode())


SAFETENSORS: dict[str, tuple[Callable[[Path], bytes], int]] = {
    "header of 2^63": (header({}, length=1 << 63), 64),
    "header of nothing": (header(b"", b"data" * 9, length=0), 64),
    "header beyond the file": (header(b"{" + b" " * 64, length=1 << 40), 64),
    "header over the limit": (lambda _: struct.pack("<Q", 100_000_001) + b"{" + bytes(100_000_001), 64),
    "header of 90 MB of tiny entries": (entries(1_600_000), 200),
    "header nested deep": (header(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 64),
    "header of lists": (header(b'{"w":[' + b"[]," * 20_000_000 + b"[]]}"), 200),
    "header no JSON": (header(b"{w: 1}"), 64),
    "header twice the same": (header(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"w":1}'), 64),
    "number of a million digits in a header": (header(b'{"w":' + b"9" * 1_000_000 + b"}"), 64),
    "offsets that overlap": (
        header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        64,
    ),
    "offsets with a hole": (one(data_offsets=[4, 8]), 64),
    "offsets below zero": (one(data_offsets=[-4, 0]), 64),
    "offsets in fractions": (one(data_offsets=[0.0, 4.0]), 64),
    "offsets in words": (one(data_offsets=["0", "4"]), 64),
    "offsets true and false": (one(data_offsets=[False, 4]), 64),
    "offsets of 1e308": (one(data_offsets=[0, 1e308]), 64),
    "shape that overflows": (one(shape=[1 << 61, 1 << 61, 1 << 61]), 64),
    "shape of a million dimensions": (one(shape=[(1 << 61) - 1] * 200_000), 64),
    "shape beyond 2^62 with a zero": (one(shape=[1 << 63, 0], data_offsets=[0, 0]), 64),
    "dtype unknown": (one(dtype="F33"), 64),
    "dtype a list": (one(dtype=["F32"]), 64),
    "name that clears the screen": (one("\x1b[2J\x1b]0;owned\x07"), 64),
    "name that turns the text round": (one("w\u202egnirts"), 64),
    "name with half a character": (one("w\ud800"), 64),
    "name of 10 MB": (one("w" * 10_000_000), 128),
    "metadata that are no texts": (header({"__metadata__": {"format": ["pt"]}}), 64),
}


# --- JSON ------------------------------------------------------------------------------------------------------------

STATES: dict[str, tuple[bytes, int]] = {
    "a list": (b"[1, 2]", 64),
    "nested deep": (b'{"global_step": 800, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 64),
    "nested a little too deep": (b'{"global_step": 800, "x": ' + b"[" * 500 + b"]" * 500 + b"}", 64),
    "a step of infinity": (b'{"global_step": 1e999}', 64),
    "a step that is no number": (b'{"global_step": NaN}', 64),
    "a step of 400 digits": (b'{"global_step": 1' + b"0" * 400 + b"}", 64),
    "a step of a million digits": (b'{"global_step": ' + b"9" * 1_000_000 + b"}", 64),
    "a step with escapes": (json.dumps({"global_step": "\x1b[2J\x1b]0;owned\x07" * 9}).encode(), 64),
    "ten million lists": (b'{"global_step": 800, "x": [' + b"[]," * 10_000_000 + b"[]]}", 128),
}


def index(weight_map: object) -> Callable[[Path, Path], None]:
    def place(run: Path, _: Path) -> None:
        for snapshot in run.iterdir():
            (snapshot / "model.safetensors").unlink()
            raw = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
            (snapshot / "model.safetensors.index.json").write_bytes(raw)

    return place


# --- other kinds of files --------------------------------------------------------------------------------------------


def special(make: Callable[[Path], None], name: str = "optimizer.pt") -> Files:
    """Something that is no regular file, inside every snapshot."""

    def place(run: Path, _: Path) -> None:
        for snapshot in run.iterdir():
            (snapshot / name).unlink(missing_ok=True)
            make(snapshot / name)

    return place


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # an address has room for some 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def _loose_name(run: Path, _: Path) -> None:
    newest(run).rename(run / "step_\x1b[2J000900.safetensors")


def _long_index(run: Path, _: Path) -> None:
    raw = json.dumps({"weight_map": {f"w{i}": "../x.safetensors" for i in range(1_000_000)}})
    replace_file(newest(run) / "model.safetensors.index.json", raw.encode())
    (newest(run) / "model.safetensors").unlink()


def _shard_directory(run: Path, marker: Path) -> None:
    index({"w": "part.safetensors", "b": "part.safetensors"})(run, marker)
    for snapshot in run.iterdir():
        (snapshot / "part.safetensors").mkdir()


def _shard_fifo(run: Path, marker: Path) -> None:
    index({"w": "part.safetensors", "b": "part.safetensors"})(run, marker)
    for snapshot in run.iterdir():
        os.mkfifo(snapshot / "part.safetensors")


def _fifos(run: Path, _: Path) -> None:
    """The only snapshots are FIFOs: nobody will ever write to them."""
    for snapshot in sorted(run.iterdir()):
        snapshot.unlink()
        os.mkfifo(snapshot)


def _tied_up(run: Path, _: Path) -> None:
    for snapshot in run.iterdir():
        (snapshot / "again").symlink_to(".")


def lightning(**more: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """A Lightning checkpoint with something harmful in it."""

    def content(marker: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save(lightning_payload(800, **{key: make(marker) for key, make in more.items()}), buffer)
        return buffer.getvalue()

    return content


def _dcp_object(run: Path, marker: Path) -> None:
    """An object among the tensors that runs code where torch's own reader loads it."""
    shutil.rmtree(newest(run))
    save_dcp(dcp_state(800, extra=Calls(os.system, touch(marker))), run / "step-800")


def _dcp_large_object(run: Path, marker: Path) -> None:
    shutil.rmtree(newest(run))
    save_dcp(dcp_state(800, extra=[bytes(70_000_000), Calls(os.system, touch(marker))]), run / "step-800")


def _dcp_optimizer(run: Path, marker: Path) -> None:
    """The call in place of a tensor of the optimizer's, which is copied unread."""
    place = newest(run)
    metadata = pickle.loads((place / ".metadata").read_bytes())  # noqa: S301 - we made it
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.endswith("exp_avg"))
    raw = torch_zip(CODE["protocol 2"](marker))
    file = place / info.relative_path
    whole = file.read_bytes()
    replace_file(file, whole + raw)
    info.offset, info.length = len(whole), len(raw)
    replace_file(place / ".metadata", pickle.dumps(metadata))


def dcp_metadata(change: Callable[[Any], None]) -> Files:
    """Metadata that say something else."""

    def place(run: Path, _: Path) -> None:
        for snapshot in run.iterdir():
            metadata = pickle.loads((snapshot / ".metadata").read_bytes())  # noqa: S301 - we made it
            change(metadata)
            replace_file(snapshot / ".metadata", pickle.dumps(metadata))

    return place


def dcp_place(**changes: Any) -> Files:
    """The same of where items lie."""

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            for key, value in changes.items():
                setattr(info, key, value)

    return dcp_metadata(change)


DCP_METADATA: dict[str, Callable[[Any], None]] = {
    "paths that cannot be keys": lambda m: m.planner_data.update({key: ([], "x") for key in m.planner_data}),
    "paths of a thousand levels": lambda m: m.planner_data.update({key: (*["x"] * 1000, key) for key in m.planner_data}),
    "no chunks": lambda m: setattr(m.state_dict_metadata["model.w"], "chunks", None),
    "chunks of another size": lambda m: setattr(m.state_dict_metadata["model.w"].chunks[0], "sizes", torch.Size([1 << 40])),
    "a list of items": lambda m: setattr(m, "storage_data", []),
    "items of nobody": lambda m: m.state_dict_metadata.clear(),
}


# --- the cases -------------------------------------------------------------------------------------------------------

ZIPS: tuple[Base, ...] = ("torch", "lightning")
COPIED = ("rng_state.pth", "training_args.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "notes")

CASES: tuple[Case, ...] = (
    *(Case(f"weights {name}", "torch", each("", zipped(raw)), says="pickle") for name, raw in CODE.items()),
    *(
        Case(f"copied {name}", "hf", last("rng_state.pth", raw), "predict", says="pickle")
        for name, raw in CODE.items()
        if name != "persistent id"
    ),
    *(Case(f"copied as {name}", "hf", last(name, CODE["protocol 4"]), "predict", says="posix.system") for name in COPIED),
    *(
        Case(f"copied zip as {name}", "hf", last(name, zipped(CODE["protocol 2"])), "predict", says="posix.system")
        for name in COPIED
    ),
    Case("optimizer.pt with code", "hf", last("optimizer.pt", zipped(CODE["protocol 2"])), "predict", says="posix.system"),
    Case("scheduler.pt with code", "hf", each("scheduler.pt", zipped(CODE["protocol 2"])), "predict", says="posix.system"),
    Case("optimizer.pt as a raw pickle", "hf", last("optimizer.pt", CODE["protocol 2"]), "predict", says="old torch file"),
    Case("pytorch_model.bin with code", "hf-bin", each("pytorch_model.bin", zipped(CODE["protocol 2"])), says="posix.system"),
    Case(
        "code beside good weights", "torch", last("", beside_weights(lambda m: Calls(os.system, touch(m)))), says="posix.system"
    ),
    Case(
        "a whole program beside good weights",
        "torch",
        last("", beside_weights(lambda m: Calls(exec, f"open({str(m)!r}, 'w')"))),
        says="exec",
    ),
    Case("a name that holds opcodes", "torch", each("", zipped(injected)), says="innocent"),
    Case("a raw pickle", "torch", each("", CODE["protocol 2"]), says="old torch file"),
    Case("a raw pickle of protocol 0", "torch", each("", CODE["GLOBAL REDUCE"]), says="not a torch file"),
    Case("a legacy file", "torch", each("", legacy), says="old torch file"),
    Case("a legacy file that is copied", "hf", last("training_args.bin", legacy), "predict", says="posix.system"),
    Case("a tar that is copied", "hf", last("training_args.bin", tar), "predict", says="before torch 0.2"),
    Case(
        "a pickle behind 70 MB that is copied",
        "hf",
        last(
            "training_args.bin",
            lambda m: b"\x80\x02T" + struct.pack("<i", 70_000_000) + bytes(70_000_000) + b"0" + CODE["GLOBAL REDUCE"](m),
        ),
        "predict",
        says="posix.system",
    ),
    Case(
        "TorchScript",
        "torch",
        each("", with_records(lambda _: {"archive/code/x.py": b"", "archive/constants.pkl": GOOD})),
        says="TorchScript",
    ),
    Case(
        "TorchScript that is copied",
        "hf",
        last("rng_state.pth", lambda m: torch_zip(CODE["protocol 2"](m), {"archive/code/x.py": b""})),
        "predict",
        says="posix.system",
    ),
    Case("a compressed bomb", "torch", each("", lambda _: compressed()), says="compressed"),
    Case("a compressed bomb that claims 4 GB", "torch", each("", claims(0xFFFFFFF0)), says="compressed"),
    Case("a compressed bomb that is copied", "hf", last("rng_state.pth", lambda _: compressed()), "predict", says="compressed"),
    Case(
        "two pickles in a zip",
        "torch",
        each("", with_records(lambda m: {"other/data.pkl": CODE["protocol 2"](m)})),
        says="one data.pkl",
    ),
    Case(
        "two pickles in a zip that is copied",
        "hf",
        last("rng_state.pth", with_records(lambda m: {"other/data.pkl": CODE["protocol 2"](m)})),
        "predict",
        says="posix.system",
    ),
    Case(
        "a pickle in capitals",
        "torch",
        each("", with_records(lambda m: {"archive/DATA.PKL": CODE["protocol 2"](m)})),
        says="twice",
    ),
    Case(
        "a pickle in capitals that is copied",
        "hf",
        last("rng_state.pth", lambda m: torch_zip(CODE["protocol 2"](m)).replace(b"data.pkl", b"DATA.PKL")),
        "predict",
        says="posix.system",
    ),
    *(Case(f"held in {name}", "hf", last(name, raw), "predict", says="system") for name, raw in HELD.items()),
    Case("a zip with two directories under any name", "hf", last("notes", two_directories), "predict", says="directory"),
    Case("gzip that unpacks to 300 MB", "hf", last("state.gz", lambda _: packed()), "predict", says="unpacks"),
    *(Case(f"a directory of 400,000 records, {base}", base, each("", long_directory), says="zip directory") for base in ZIPS),
    Case("a zip with two directories", "torch", each("", two_directories), says="directory"),
    Case("a zip with two directories that is copied", "hf", last("rng_state.pth", two_directories), says="directory"),
    Case("records that overlap", "torch", each("", overlapping), says="overlap"),
    Case("a record beyond the file", "torch", each("", beyond), says="beyond the end"),
    Case("a record outside", "torch", each("", with_records(lambda _: {"../../evil": b"x"})), says="../../evil"),
    Case("a record from the root", "torch", each("", with_records(lambda _: {"/tmp/evil": b"x"})), says="/tmp/evil"),  # noqa: S108 - a name in a zip
    Case(
        "a record with escapes", "torch", each("", with_records(lambda _: {"archive/\x1b[2J": b"x"})), says="record is called"
    ),
    *(
        Case(f"bomb {name}", "torch", each("", zipped(raw)), memory_mb=memory, is_heavy=True)
        for name, (raw, memory) in BOMBS.items()
    ),
    Case("a tensor of 2^62", "torch", each("", tensor(ints(1 << 62), ints(1))), says="shape or stride"),
    Case("a tensor of 2^61", "torch", each("", tensor(ints(1 << 61), ints(1))), says="beyond its storage"),
    Case("a tensor with a stride below zero", "torch", each("", tensor(ints(1), ints(-1))), says="shape or stride"),
    Case(
        "a tensor with an offset beyond", "torch", each("", tensor(ints(1), ints(1), offset=1 << 40)), says="beyond its storage"
    ),
    Case(
        "a tensor with an offset below zero", "torch", each("", tensor(ints(1), ints(1), offset=-1)), says="beyond its storage"
    ),
    Case(
        "a tensor of 10,000 dimensions",
        "torch",
        each("", tensor(ints(*[2] * 10_000), ints(*[1] * 10_000))),
        says="shape or stride",
    ),
    Case("a storage shorter than claimed", "torch", each("", tensor(ints(1), ints(1), size=1 << 40)), says="shorter"),
    *(
        Case(name, "loose", last("", raw), memory_mb=memory, is_heavy=memory > 64)
        for name, (raw, memory) in SAFETENSORS.items()
    ),
    *(
        Case(f"trainer state {name}", "hf", last("trainer_state.json", lambda _, raw=raw: raw), memory_mb=memory)  # type: ignore[misc]
        for name, (raw, memory) in STATES.items()
    ),
    *(
        Case(
            f"lightning {name}",
            "lightning",
            last("", lightning(**{name: lambda m: {"x": Calls(os.system, touch(m))}})),
            says="system",
        )
        for name in ("hyper_parameters", "callbacks", "loops", "optimizer_states", "state_dict")
    ),
    Case("lightning compressed", "lightning", each("", lambda _: compressed()), says="compressed"),
    *(
        Case(f"accelerate {name}", "accelerate", last(name, zipped(CODE["protocol 2"])), "predict", says="posix.system")
        for name in ("custom_checkpoint_0.pkl", "sampler.bin", "scaler.pt", "optimizer.bin", "random_states_0.pkl")
    ),
    *(
        Case(f"dcp metadata {name}", "dcp", each(".metadata", CODE[name]), says="pickle")
        for name in ("protocol 2", "STACK_GLOBAL", "INST", "exit")
    ),
    Case("dcp metadata that double", "dcp", each(".metadata", BOMBS["lists that double"][0]), is_heavy=True),
    Case("dcp object with code", "dcp", _dcp_object, says="posix.system"),
    Case("dcp object of 70 MB with code", "dcp", _dcp_large_object, says="posix.system", memory_mb=300),
    Case("dcp tensor of the optimizer with code", "dcp", _dcp_optimizer, "predict", says="posix.system"),
    Case("dcp item that leads out", "dcp", dcp_place(relative_path="../../x"), says="outside"),
    Case("dcp item from the root", "dcp", dcp_place(relative_path="/etc/passwd"), says="outside"),
    Case("dcp item below zero", "dcp", dcp_place(offset=-1), says="-1"),
    Case("dcp item beyond", "dcp", dcp_place(offset=1 << 62), code=3, says="too short"),
    Case("dcp item in words", "dcp", dcp_place(length="1"), says="bytes"),
    Case("dcp item of nothing", "dcp", dcp_place(length=0), code=3, says="not a whole zip"),
    *(Case(f"dcp {name}", "dcp", dcp_metadata(change)) for name, change in DCP_METADATA.items()),
    Case("an index that leads out", "hf", index({"w": "../../x.safetensors"}), says="outside"),
    Case("an index from the root", "hf", index({"w": "/etc/passwd"}), says="outside"),
    Case("an index of a million entries", "hf", _long_index, says="outside", memory_mb=300, is_heavy=True),
    Case("an index nested deep", "hf", index(b'{"weight_map": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001)),
    Case("an index of numbers", "hf", index({"w": 1}), says="weight_map"),
    Case("a shard that is a folder", "hf", _shard_directory, code=3),
    Case("a shard that is a FIFO", "hf", _shard_fifo, says="neither a file nor a folder"),
    Case("a shard that is a device", "hf", special(lambda p: p.symlink_to("/dev/zero"), "model.safetensors"), code=3),
    Case("snapshots that are FIFOs", "loose", _fifos, code=3, says="no snapshots"),
    Case("a FIFO in the snapshots", "hf", special(os.mkfifo), says="neither a file nor a folder"),
    Case("a socket in the snapshots", "hf", special(make_socket, "wandb.sock"), says="neither a file nor a folder"),
    Case(
        "a device in the snapshots", "hf", special(lambda p: p.symlink_to("/dev/zero"), "rng_state.pth"), says="outside the run"
    ),
    Case(
        "a link out of the run", "hf", special(lambda p: p.symlink_to("/etc/passwd"), "rng_state.pth"), says="outside the run"
    ),
    Case("links in a circle", "hf", _tied_up, says="circle"),
    Case("a snapshot with escapes in its name", "loose", _loose_name, code=3, says="printable"),
)


# --- the process -----------------------------------------------------------------------------------------------------


def peak_kb() -> int:
    """The most memory since the last reset, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kb()


def limit_memory(room: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))


def command(*args: str) -> dict[str, Any]:
    """Call the command here; says how it ended, what it wrote, and how much memory it took."""
    from farcast_cli.cli import main

    out, err, code = io.StringIO(), io.StringIO(), -1
    before, started = reset_peak(), time.monotonic()
    sys.argv = ["farcast", *args]
    signal.alarm(WAIT_S)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        err.write(f"Traceback: {type(error).__name__}: {error}")
    signal.alarm(0)
    return {
        "args": args,
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "mb": (peak_kb() - before) / 1024,
        "s": time.monotonic() - started,
    }


def run(home: Path) -> list[dict[str, Any]]:
    os.chdir(home)
    done = [command("inspect", "run")]
    if home.name not in {name_of(case) for case in CASES if case.is_heavy}:
        done.append(command("fit", "run"))
    if done[-1]["code"] == 0:
        done.append(command("predict", "--horizon", "10", "--even-if-worse"))
    return done


def report(home: Path, done: list[dict[str, Any]]) -> None:
    sys.stdout.write(json.dumps({"home": home.name, "done": done}) + "\n")
    sys.stdout.flush()


def report_apart(home: Path) -> None:
    """The same in a process of its own, which a harmful file may end."""
    child = os.fork()
    if child == 0:
        report(home, run(home))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        told = f"the process was ended: {os.waitstatus_to_exitcode(status)}"
        report(home, [{"args": [], "code": -1, "out": "", "err": told, "mb": 0, "s": 0}])


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    for place in sorted(corpus.glob("good_*")):  # here, so that everything is imported before memory is measured
        report(place, run(place))
    limit_memory(ROOM_BYTES)
    for case in CASES:
        report_apart(corpus / name_of(case))
