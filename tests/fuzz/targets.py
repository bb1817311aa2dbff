"""The readers: a small good file for each, how it is damaged, and what the format's own reader makes of it."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import deserialize as _deserialize
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from farcast_cli.checkpoint.pieces import Rewrite
from farcast_cli.checkpoint.plan import plan_outputs
from farcast_cli.cli import main as call_main
from farcast_cli.engine.reader import Reader
from farcast_cli.errors import FarcastError
from farcast_cli.evaluation.judge import last_number
from farcast_cli.files.place import sidecar_of
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster_file import load_fitted, save_fitted
from farcast_cli.forecast.ledger import read_leaps
from farcast_cli.forecast.memory import read_memory
from farcast_cli.formats.copied_file import refuse_code_in
from farcast_cli.formats.pickle_names import runs_code
from farcast_cli.formats.pickle_scan import iter_names
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.state.advance import advance, told_as_damage
from farcast_cli.tune.data import read_data
from farcast_cli.tune.delta import Delta, read_deltas, write_deltas
from farcast_cli.verification import find_reference
from tests import corpus
from tests.conftest import make_loose_run
from tests.crash.commands import make_sharded_run
from tests.fuzz import mutate
from tests.fuzz.harness import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

    Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # a name -> type, shape, bytes

ST_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


deserialize: Any = _deserialize  # it has no types


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of(path: Path) -> Tensors:
    """A snapshot's tensors as farcast reads them."""
    snapshot, reader, found = open_snapshot(path), Reader("pread"), {}
    for name, entry in snapshot.tensors.items():
        if name not in snapshot.not_streamable:
            data = np.empty(entry.num_bytes, np.uint8)
            if entry.num_bytes:
                reader.fill(entry.path, entry.offset, data)
            found[name] = (entry.dtype.name, tuple(entry.shape), data.tobytes())
    return found


def as_tuple(value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    plain = value.detach().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), data


def differing(found: Tensors, expected: Tensors) -> str:
    """Of tensors that farcast read: what another reader has otherwise."""
    for name, mine in found.items():
        if name not in expected:
            return "a tensor that the format's own reader does not have"
        for what, one, other in zip(("type", "shape", "bytes"), mine, expected[name], strict=True):
            if one != other:
                return f"another {what} than the format's own reader has"
    return ""


def same_as(path: Path) -> Callable[[Tensors], str]:
    """The weights as they are before anything beside them is damaged."""
    expected = tensors_of(path)
    return lambda found: differing(found, expected)


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors_header(folder: Path) -> Target:
    tensors = {"a": torch.arange(4.0).reshape(2, 2), "b.c": torch.tensor([1, 2, 3]), "z": torch.zeros(0, 3)}
    raw, file = save_safetensors(tensors, metadata={"format": "pt"}), folder / "step_100.safetensors"

    def check(found: Tensors) -> str:
        read = deserialize(file.read_bytes())
        names = {name: (ST_TYPES.get(d["dtype"], d["dtype"]), tuple(d["shape"]), bytes(d["data"])) for name, d in read}
        return differing(found, names) or ("" if len(found) == len(names) else "fewer tensors than safetensors has")

    return Target("safetensors header", file, partial(mutate.safetensors_file, raw=raw), lambda: tensors_of(file), check)


# --- torch -----------------------------------------------------------------------------------------------------------


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def payload() -> dict[str, Any]:
    state = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2, 3)}}
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "step": 7,
    }


def flat(tree: Any, place: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {".".join(place): tree}
    found = {}
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found.update(flat(value, (*place, str(key))))
    return found


def as_torch_reads(file: Path, key: str) -> Callable[[Tensors], str]:
    """The dict under a key, or the whole, by torch's own careful reader. What it refuses cannot be compared."""

    def check(found: Tensors) -> str:
        wrong = _torch_differs(file, key, found, mmap=False)
        return wrong and _torch_differs(file, key, found, mmap=True)  # a damaged directory lets torch read memory as it lies

    return check


def _torch_differs(file: Path, key: str, found: Tensors, *, mmap: bool) -> str:
    try:
        tree = torch.load(file, weights_only=True, mmap=mmap)
    except Exception:  # noqa: BLE001 - whatever torch raises
        return ""
    inner = tree.get(key) if isinstance(tree, dict) else None
    return differing(found, {name: as_tuple(value) for name, value in flat(tree if inner is None else inner).items()})


def torch_zip(folder: Path) -> Target:
    raw, file = saved(payload()), folder / "ckpt_7.pt"
    words = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff\xff\xff\xff", b"data.pkl", b"\x08\x00")
    case = partial(mutate.some_bytes, data=raw, words=words)
    return Target("torch zip file", file, case, lambda: tensors_of(file), as_torch_reads(file, "model"))


def torch_legacy(folder: Path) -> Target:
    """Refused as a snapshot; looked through where it is copied."""
    file = folder / "ckpt_7.pt"
    raw = saved({**payload(), "call": argparse.Namespace(a=1)}, _use_new_zipfile_serialization=False)

    def read() -> bytes:
        try:
            open_snapshot(file)
        except FarcastError:
            refuse_code_in(file)
            return file.read_bytes()
        raise AssertionError("an old torch file was read")

    def check(content: bytes) -> str:
        stream, asked = io.BytesIO(content), list[tuple[str, str]]()
        for _ in range(5):  # pickles, of which a reader goes on behind whole ones alone
            start = stream.tell()
            names = names_asked_for(pickle.Unpickler, stream)
            asked += names if content[start : start + 1] == pickle.PROTO else []  # else a name without a call passes
            if content[stream.tell() - 1 : stream.tell()] != pickle.STOP or stream.tell() == start:
                break
        return "passed, and it asks for what runs code" if any(runs_code(*pair) for pair in asked) else ""

    return Target("torch legacy file", file, partial(mutate.some_bytes, data=raw, words=mutate.FRAGMENTS), read, check)


def pickle_opcodes(folder: Path) -> Target:
    raw, file = saved(payload()), folder / "ckpt_8.pt"
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

    def case(random: Random) -> bytes:
        return mutate.zip_again(raw, "/data.pkl", mutate.pickle_opcodes(random, pickled))

    return Target("pickle opcodes", file, case, lambda: tensors_of(file), as_torch_reads(file, "model"))


def lightning(folder: Path) -> Target:
    optim = {"optimizer": {"step": {"total": {"completed": 100}}}}
    loops = {"fit_loop": {"epoch_loop.automatic_optimization.optim_progress": optim}}
    raw = saved(corpus.lightning_payload(100, loops=loops, optimizer_states=[], lr_schedulers=[]))
    file = folder / "step=100.ckpt"
    case = partial(mutate.some_bytes, data=raw)
    return Target("Lightning .ckpt", file, case, lambda: tensors_of(file), as_torch_reads(file, "state_dict"))


# --- the scan of pickles that are copied -----------------------------------------------------------------------------


def names_asked_for(kind: Any, stream: io.BytesIO) -> list[tuple[str, str]]:
    """What one of Python's own unpicklers asks for, up to where it stops; it gets stand-ins and runs nothing."""
    asked = []

    class Asking(kind):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            if kind is pickle.Unpickler or stream.tell() < len(
                stream.getbuffer()
            ):  # else a line cut off, and nothing behind it
                asked.append((module, name))
            return lambda *_args, **_options: argparse.Namespace()

        def persistent_load(self, _: object) -> None:
            return None

    with suppress(BaseException):  # most of them cannot be loaded
        Asking(stream).load()
    return asked


def pickle_scan(folder: Path) -> Target:
    """The scan must have met whatever a real unpickler asks for, or refuse the file."""
    file, seeds = folder / "x.pkl", mutate.pickles_that_call()

    def read() -> set[tuple[str, str]]:
        refuse_code_in(file)
        return _names_met(file.read_bytes())

    def check(met: set[tuple[str, str]]) -> str:
        if file.read_bytes()[:1] != pickle.PROTO:
            return ""  # asked for below
        for kind in (pickle.Unpickler, pickle._Unpickler):
            if set(names_asked_for(kind, io.BytesIO(file.read_bytes()))) - met:
                return f"passed, and {kind.__name__} asks for a name that the scan did not meet"
        return ""

    return Target("pickle scan", file, lambda random: mutate.loose_pickle(random, random.choice(seeds)), read, check)


def _names_met(raw: bytes) -> set[tuple[str, str]]:
    """By the scan, up to where nobody can go on."""
    found = set[tuple[str, str]]()
    with suppress(EOFError):
        for name in iter_names(io.BufferedReader(io.BytesIO(raw))):
            found.add(name)
    return found


# --- distributed checkpoints -----------------------------------------------------------------------------------------


def dcp_metadata(folder: Path) -> Target:
    place = folder / "step-100"
    corpus.save_dcp(corpus.dcp_state(100), place)
    raw = (place / ".metadata").read_bytes()
    names = set(iter_names(io.BufferedReader(io.BytesIO(raw))))

    def case(random: Random) -> bytes:
        if random.random() < 0.5:
            return mutate.some_bytes(random, raw, (b"\xff\xff\xff\x7f", b"../x", b"__0_1.distcp"))
        return mutate.pickle_opcodes(random, raw)

    check = partial(_as_dcp_says, place, names)
    return Target("dcp metadata", place / ".metadata", case, lambda: _entries_of(place), check)


def dcp_data(folder: Path) -> Target:
    place = folder / "step-100"
    corpus.save_dcp(corpus.dcp_state(100), place)
    file, names = place / "__0_0.distcp", set(iter_names(io.BufferedReader(io.BytesIO((place / ".metadata").read_bytes()))))
    case = partial(mutate.some_bytes, data=file.read_bytes())
    return Target("dcp data", file, case, lambda: _entries_of(place), partial(_as_dcp_says, place, names))


def _entries_of(place: Path) -> dict[tuple[str, int], tuple[str, tuple[int, ...], bytes]]:
    """Tensors by the file and the position that they are read from."""
    entries, tensors = open_snapshot(place).tensors, tensors_of(place)
    return {(str(entries[name].path), entries[name].offset): tensor for name, tensor in tensors.items()}


def _as_dcp_says(place: Path, names: set[tuple[str, str]], found: Mapping[tuple[str, int], Any]) -> str:
    """By the metadata as Python reads them (nothing but the good file's names), and the items as torch reads them."""

    class Careful(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in names:
                raise pickle.UnpicklingError(name)
            return super().find_class(module, name)

    try:
        metadata = Careful(io.BytesIO((place / ".metadata").read_bytes())).load()
        items = [(str(place / i.relative_path), i.offset, i.length) for i in metadata.storage_data.values()]
    except Exception:  # noqa: BLE001 - what Python cannot read cannot be compared
        return ""
    for (path, position), mine in found.items():
        inside = [item for item in items if item[0] == path and item[1] <= position < item[1] + item[2]]
        theirs = [_item(*item) for item in inside]
        if mine[2] and None not in theirs and mine not in theirs:
            return "another tensor than torch reads from that item"
    return ""


def _item(path: str, offset: int, length: int) -> object:
    with Path(path).open("rb") as file:
        file.seek(offset)
        try:
            return as_tuple(torch.load(io.BytesIO(file.read(length)), weights_only=True))
        except Exception:  # noqa: BLE001 - whatever torch raises
            return None


# --- what lies beside the weights ------------------------------------------------------------------------------------

WORDS = (b"PK\x01\x02", b"PK\x05\x06", b"\xff\xff\xff\xff", b"NaN", b"1e999", b"9" * 400, b"[" * 300, b'"\\ud800"')


def _as_predict_reads(place: Path) -> Tensors:
    """With all that moves on with the weights, and a look through what is copied."""
    snapshot = open_snapshot(place)
    with told_as_damage(snapshot):
        moved = advance([snapshot], 20, optimizer="copy", counters="advance")
    plan_outputs(snapshot, moved, Rewrite({}))
    return tensors_of(place)


def side_file(name: str, make: Callable[[Path], Path], snapshot: str, file: str, folder: Path) -> Target:
    place = make(folder / "run") / snapshot
    raw = (place / file).read_bytes()
    change: Callable[..., bytes] = mutate.json_text if file.endswith(".json") else partial(mutate.some_bytes, words=WORDS)
    return Target(name, place / file, lambda random: change(random, raw), lambda: _as_predict_reads(place), same_as(place))


def index_json(folder: Path) -> Target:
    make_sharded_run(folder / "run")
    return side_file("index JSON", lambda run: run, "step_100", "model.safetensors.index.json", folder)


# --- farcast's own files ---------------------------------------------------------------------------------------------


def forecaster(folder: Path) -> Target:
    make_loose_run(folder / "run", shapes=corpus.SHAPES)
    file = folder / "forecaster.safetensors"
    save_fitted(fit(discover(folder / "run"), num_samples=1000), file)
    raw, good = file.read_bytes(), load_fitted(file)

    def check(found: Any) -> str:
        same = np.array_equal(found.gram.matrix, good.gram.matrix) and np.array_equal(found.sample.values, good.sample.values)
        return "" if same else "other numbers than the file was written with"

    def case(random: Random) -> bytes:
        return mutate.safetensors_file(random, raw) if random.random() < 0.7 else mutate.some_bytes(random, raw)

    return Target("forecaster file", file, case, lambda: load_fitted(file), check)


def ledger(folder: Path) -> Target:
    file = folder / "ledger.jsonl"
    line = {"run": "run", "origin_step": 800, "valid_step": 900, "counters": "advance", "forecast": "forecasts/step_900"}
    raw = json.dumps(line).encode() + b"\n"

    def case(random: Random) -> bytes:
        return b"".join(random.choice((raw, mutate.json_text(random, raw.strip()) + b"\n")) for _ in range(2))

    def check(leaps: Any) -> str:
        steps = {(leap.origin_step, leap.valid_step) for leap in leaps}
        lines = file.read_text(errors="replace").split("\n")
        said = {(int(d["origin_step"]), int(d["valid_step"])) for d in map(_dict_of, lines) if "origin_step" in d}
        return "" if steps <= said else "a leap that the ledger does not tell of"

    return Target("ledger", file, case, lambda: read_leaps(file, folder / "run"), check)


def _dict_of(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        int(value["origin_step"]), int(value["valid_step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}
    return dict(value)


def sidecar(folder: Path) -> Target:
    forecast = folder / "step_900.safetensors"
    forecast.write_bytes(b"")
    file = sidecar_of(forecast, is_file=True)
    said = {"schema_version": 1, "name": forecast.name, "origin": "../run/step_800.safetensors", "valid_step": 900}

    def check(found: Path) -> str:
        return "" if found == forecast.parent / json.loads(file.read_bytes())["origin"] else "another origin than it says"

    case = partial(mutate.json_text, raw=json.dumps(said).encode())
    return Target("sidecar", file, case, lambda: find_reference(forecast), check)


def memory(folder: Path) -> Target:
    """Read by the command itself, which writes nothing: a later step has been trained since."""
    make_loose_run(folder / "run", shapes=corpus.SHAPES)
    last = max((folder / "run").iterdir())
    last.rename(folder / last.name)
    assert _code_of(folder, "leap", "run", "--max-gain", "0.01") == NO_LEAP
    (folder / last.name).rename(last)
    file = folder / "forecasts/run/run.memory.safetensors"
    raw, tensors = file.read_bytes(), load_safetensors(file.read_bytes())
    record = read_memory(file)
    assert record is not None
    text = record.record.model_dump_json().encode()

    def case(random: Random) -> bytes:
        if random.random() < 0.4:
            return mutate.safetensors_file(random, raw)
        said = mutate.json_text(random, text).decode(errors="replace")
        return save_safetensors(tensors, metadata={"farcast": said})

    def read() -> Any:
        found = read_memory(file)
        code = _code_of(folder, "leap", "run", "--dry-run", "--json")
        if code not in {0, 2, 3, 4, 5, NO_LEAP}:
            raise AssertionError(f"exit code {code}")
        return found

    def check(found: Any) -> str:
        names = {name for name, _ in deserialize(file.read_bytes())}
        mine = {f"move.{name}" for name in found.moves} | {f"landing.{name}" for name in found.landing}
        return "" if mine <= names else "a tensor that the format's own reader does not have"

    return Target("memory of leaps", file, case, read, check)


NO_LEAP = 10


def _code_of(folder: Path, *args: str) -> int:
    """The command's exit code, called in a folder; what it says is lost."""
    kept = sys.argv, Path.cwd()
    sys.argv = ["farcast", *args]
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            call_main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = kept[0]
        os.chdir(kept[1])
    raise AssertionError("the command came to no end")


TOML = b"""include = ["*.weight"]
steps = "100:800"
quiet = true

[inspect]
pattern = "*"
verbose = false

[predict]
horizon = [50, 100]
scale = 0.5
"""


def settings(folder: Path, *, is_named: bool) -> Target:
    make_loose_run(folder / "run", shapes=corpus.SHAPES)
    words = (
        b"eval_cmd = 'x'\n",
        b"ledger = '../x'\n",
        b"[inspect]\n",
        b"\x00",
        b"[[[",
        b"= ",
        b"1" * 400,
        b"'\\ud800'",
        b"-1",
        b"{}",
    )
    options = ("--config", "farcast.toml") if is_named else ()

    def read() -> int:
        """The command, which says by its code how it ended."""
        code = _code_of(folder, "inspect", "run", *options)
        if code not in {0, 2, 3, 4}:
            raise AssertionError(f"exit code {code}")
        return code

    name = "farcast.toml, --config" if is_named else "farcast.toml"
    return Target(name, folder / "farcast.toml", partial(mutate.some_bytes, data=TOML, words=words), read)


def delta(folder: Path) -> Target:
    random, file = np.random.default_rng(0), folder / "delta.safetensors"
    write_deltas(
        file, [Delta("w", None, 0.5, random.normal(size=(3, 4)), random.normal(size=(3, 5)), 7)], '{"rows": 9}', like=folder
    )
    raw = file.read_bytes()

    def check(found: list[Delta]) -> str:
        read = {name: np.frombuffer(d["data"], "<f8").reshape(d["shape"]) for name, d in deserialize(file.read_bytes())}
        for number, one in enumerate(found):
            if not np.array_equal(one.factors, read[f"{number}.factors"]):
                return "other factors than safetensors reads"
            if not np.array_equal(one.directions, read[f"{number}.directions"]):
                return "other directions than safetensors reads"
        return ""

    return Target("delta file", file, partial(mutate.safetensors_file, raw=raw), lambda: read_deltas(file), check)


# --- rows and numbers ------------------------------------------------------------------------------------------------


def npz(folder: Path, *, is_header: bool) -> Target:
    buffer, file = io.BytesIO(), folder / "rows.npz"
    np.savez(buffer, x=np.arange(12.0).reshape(4, 3), y=np.ones((4, 2)))
    raw = buffer.getvalue()
    with zipfile.ZipFile(buffer) as archive:
        array = archive.read("x.npy")

    def case(random: Random) -> bytes:
        return mutate.zip_again(raw, "x.npy", mutate.npy_header(random, array)) if is_header else mutate.some_bytes(random, raw)

    def check(found: Any) -> str:
        with np.load(file, allow_pickle=False) as read:
            same = np.array_equal(found.inputs, np.asarray(read["x"], np.float64).reshape(found.inputs.shape))
        return "" if same else "other rows than numpy reads"

    return Target("npz header" if is_header else "npz rows", file, case, lambda: read_data(file, "mse"), check)


LONG = (
    "1",
    "1e9",
    ".",
    "-",
    "1.",
    "e1",
    "1e1",
    "\x1b[",
    "\x1b[1;",
    "nan",
    "+1",
    "1 ",
    "1..2",
    "\u0663",
    "1_000 ",
    "0x",
    "1,5 ",
    "inf",
)


def numbers(folder: Path) -> Target:
    """Whatever comes before it, the number in the last line is found."""
    file = folder / "said"

    def case(random: Random) -> bytes:
        value = random.choice((random.random(), random.gauss(0, 1e9), random.randint(-9, 10**12), float("inf"), 1e-300))
        piece = random.choice(LONG) * random.choice((1, 3, 60_000 // 4))
        noise = "".join(
            random.choice((piece, "step 5 ", "\x1b[31m", "v2 ", "\n", "3.5s ", "\x00")) for _ in range(random.randint(0, 4))
        )
        return mutate.some_bytes(random, noise.encode()) + f"\nloss {value!r}\n".encode()

    def check(found: float | None) -> str:
        expected = float(file.read_bytes().split()[-1])
        return "" if found is not None and (found == expected or math.isnan(expected)) else "another number than the last"

    return Target("evaluation output", file, case, lambda: last_number(file.read_text(errors="replace")), check)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors header": safetensors_header,
    "torch zip file": torch_zip,
    "torch legacy file": torch_legacy,
    "pickle opcodes": pickle_opcodes,
    "pickle scan": pickle_scan,
    "dcp metadata": dcp_metadata,
    "dcp data": dcp_data,
    **{
        f"Trainer {file}": partial(side_file, f"Trainer {file}", corpus.make_hf_run, "checkpoint-100", file)
        for file in ("trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth")
    },
    "Lightning .ckpt": lightning,
    **{
        f"accelerate {file}": partial(side_file, f"accelerate {file}", corpus.make_accelerate_run, "step_100", file)
        for file in ("optimizer.bin", "random_states_0.pkl")
    },
    "forecaster file": forecaster,
    "memory of leaps": memory,
    "ledger": ledger,
    "sidecar": sidecar,
    "farcast.toml": partial(settings, is_named=False),
    "farcast.toml, --config": partial(settings, is_named=True),
    "delta file": delta,
    "npz rows": partial(npz, is_header=False),
    "npz header": partial(npz, is_header=True),
    "evaluation output": numbers,
    "index JSON": index_json,
}


def make(name: str, folder: Path) -> Target:
    """A target with its files in a folder of its own; its good file has been read."""
    place = folder / "".join(c if c.isalnum() else "-" for c in name)
    place.mkdir(parents=True)
    return TARGETS[name](place)
