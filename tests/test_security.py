"""Files from strangers: read by the real command, they run nothing, write nothing, exhaust nothing and are named."""

from __future__ import annotations

import argparse
import bz2
import collections
import contextlib
import datetime as dt
import enum
import gzip
import io
import json
import lzma
import os
import pickle
import pickletools
import random
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays

from farcast_cli.errors import FarcastError, UnsafeFileError, UsageError, shell_word
from farcast_cli.forecast.ledger import read_leaps
from farcast_cli.formats.copied_file import refuse_code_in
from farcast_cli.formats.pickle_names import is_data, runs_code
from farcast_cli.formats.pickle_scan import iter_names
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import encode_pickle
from tests import corpus
from tests.conftest import PATIENCE_S, STEPS, CallCli, clean_environment, fit_run, make_loose_run, make_torch_run, tree_digest
from tests.corpus import CASES, Calls, Case, make_hf_run, name_of, newest, torch_zip

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")


# --- the corpus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """A run of the corpus after the command has read it: what each call said, and the files before and after."""

    home: Path
    calls: list[dict[str, Any]]
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Read]:
    """The whole corpus, read by the real command in one process (and its children) with a limited address space."""
    top = tmp_path_factory.mktemp("corpus")
    corpus.build(top)
    homes = [path for path in top.iterdir() if (path / "run").is_dir()]
    before = {home.name: tree_digest(home) for home in homes}
    outside = tree_digest(top / ".bases")
    done = subprocess.run(
        [sys.executable, "-m", "tests.corpus", str(top)],
        cwd=top,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tree_digest(top / ".bases") == outside
    assert {path for path in top.iterdir() if path.name != ".bases"} == set(homes)
    calls = {line["home"]: line["done"] for line in map(json.loads, done.stdout.splitlines())}
    return {home.name: Read(home, calls[home.name], before[home.name], tree_digest(home)) for home in homes}


def test_the_corpus_is_large() -> None:
    assert len({name_of(case) for case in CASES}) == len(CASES) >= 45


@pytest.mark.parametrize("base", get_args(corpus.Base))
def test_without_a_harmful_file_the_same_runs_are_forecast(readings: dict[str, Read], base: str) -> None:
    calls = readings[f"good_{base}"].calls
    assert [(call["args"][0], call["code"]) for call in calls] == [("inspect", 0), ("fit", 0), ("predict", 0)]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_harmful_file_is_refused_in_one_clear_line(readings: dict[str, Read], case: Case) -> None:
    calls = readings[name_of(case)].calls
    read_first = 2 if case.at == "predict" else 0
    assert [call["code"] for call in calls] == [0] * read_first + [case.code] * (len(calls) - read_first)
    for call in calls[read_first:]:
        lines = call["err"].splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert case.says in errors[0]
        assert all(line.isprintable() and len(line) < 3000 for line in lines)
        assert call["out"] == ""


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_harmful_file_runs_nothing_and_nothing_is_written_but_what_was_asked_for(
    readings: dict[str, Read], case: Case
) -> None:
    read = readings[name_of(case)]
    made = {"forecaster.safetensors"} if case.at == "predict" else set()
    assert not corpus.marker_of(read.home).exists()
    assert read.after.keys() - read.before.keys() == made
    assert {name: digest for name, digest in read.after.items() if name not in made} == read.before


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_harmful_file_takes_little_memory(readings: dict[str, Read], case: Case) -> None:
    assert max(call["mb"] for call in readings[name_of(case)].calls) < case.memory_mb


@pytest.mark.parametrize("name", corpus.CODE)
def test_the_payloads_are_no_blanks(tmp_path: Path, name: str) -> None:
    """Python's own `pickle.load` runs them (in a process of its own), so that refusing them is worth something."""
    if name in corpus.BLANKS:
        pytest.skip(corpus.BLANKS[name])
    (tmp_path / "x").write_bytes(corpus.CODE[name](tmp_path / "marker"))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb', 0))"  # without a buffer, as torch reads from a zip
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, check=False)
    assert (tmp_path / "marker").exists() or done.returncode in {77, -6}


# --- names -----------------------------------------------------------------------------------------------------------

FUNCTIONS = (
    *("os.system", "posix.system", "nt.system", "os.popen", "os.execv", "os._exit", "os.abort", "os.remove", "os.spawnl"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.open", "builtins.getattr"),
    *("__builtin__.eval", "__builtin__.execfile", "builtins.breakpoint", "builtins.input", "builtins.type", "builtins.vars"),
    *("subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output", "commands.getoutput"),
    *("runpy.run_path", "runpy._run_code", "pty.spawn", "ctypes.CDLL", "ctypes.WinDLL", "importlib.import_module"),
    *("shutil.rmtree", "webbrowser.open", "code.InteractiveConsole", "code.interact", "timeit.timeit", "cProfile.run"),
    *("pickle.loads", "cPickle.loads", "_pickle.Unpickler", "marshal.loads", "types.FunctionType", "types.CodeType"),
    *("operator.attrgetter", "operator.methodcaller", "functools.reduce", "pdb.Pdb", "bdb.Bdb", "trace.Trace"),
    *("multiprocessing.Process", "threading.Thread", "asyncio.run", "logging.FileHandler", "zipfile.ZipFile"),
    *("tempfile.NamedTemporaryFile", "socket.socket", "urllib.request.urlopen", "http.server.HTTPServer", "smtplib.SMTP"),
    *("sys.exit", "signal.raise_signal", "gc.get_objects", "distutils.file_util.write_file", "imp.load_source"),
    *("pip.main", "setuptools.setup", "test.support.script_helper.assert_python_ok", "sqlite3.connect"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("torch._inductor.codecache.PyCodeCache", "torch.utils.cpp_extension.load_inline", "torch._C.PyTorchFileWriter"),
    *("torch.utils.tensorboard.SummaryWriter", "torch.distributed.FileStore", "torch.multiprocessing.Process"),
    *("torch!UntypedStorage.from_file", "torch.fx.graph_module.reduce_graph_module", "torch.classes.load_library"),
    *("torch._utils!_rebuild_tensor.__globals__", "torch.serialization!os.system", "torch.nn.modules.module!warnings.warn"),
    *("numpy.load", "numpy.testing._private.utils.runstring", "numpy.f2py.compile", "numpy.DataSource", "numpy.memmap"),
    *("accelerate.utils.other!os.system", "pandas.eval", "pandas.read_pickle", "pandas.io.common!os.system"),
    *("_io.open", "_io.FileIO", "io.open_code", "signal.raise_signal", "itertools.starmap", "builtins.type"),
    *("six.exec_", "sympy.core.Popen", "dill.loads", "cloudpickle.loads", "joblib.popen.Popen", "mylib!Config.__subclasses__"),
    *("myos.spawnlp", "mylib.execvp", "mylib.posix_spawn", "mylib.forkpty", "mylib.fork_exec", "mylib.system", "mylib.popen2"),
    *("pexpect.run", "invoke.run", "pexpect.pty_spawn.spawn", "ptyprocess!PtyProcess.spawn", "anyio.run_process"),
    *("_posixsubprocess.fork_exec", "mylib.getattr", "mylib.attrgetter", "mylib.import_string", "mylib.__import__"),
    *("cloudpickle.cloudpickle._make_function", "cloudpickle.cloudpickle._builtin_type", "dill._dill._create_code"),
    *("torch.ao.ns._numeric_suite_fx.GraphModule", "torch.ao.ns.fx.graph_matcher.Graph", "torch.ao.quantization.observer.Node"),
    *("torch.distributed._shard.checkpoint.utils.Stats", "torch.distributed._tensor._utils.LazyString"),
    *("torch.distributed._shard.checkpoint._async_process_executor.TCPStore", "sympy.S", "sympy.core.add.Add", "click.edit"),
    *("torch.distributed._shard.checkpoint._experimental.checkpoint_process.Connection", "jinja2!Template.render"),
    *("joblib.load", "yaml.unsafe_load", "transformers!AutoModel.from_pretrained", "mylib.urlretrieve", "mylib.rmtree"),
)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_runs_code_is_refused_read_or_copied(tmp_path: Path, name: str, protocol: int) -> None:
    module, _, last = name.rpartition("!" if "!" in name else ".")
    make = corpus.reduces if protocol == 2 else corpus.stack_global
    (tmp_path / "a.pt").write_bytes(torch_zip(make(module, last, "x")))
    for read in (read_torch_file, refuse_code_in):
        with pytest.raises(UnsafeFileError, match="asks for"):
            read(tmp_path / "a.pt")


DATA = (
    *("argparse.Namespace", "pathlib.PosixPath", "collections.OrderedDict", "collections.deque", "datetime.datetime"),
    *("numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.float64"),
    *("numpy.random._pickle.__generator_ctor", "numpy.dtypes.Float64DType", "torch.FloatStorage", "torch.bfloat16"),
    *("torch._utils._rebuild_qtensor", "torch.nn.modules.linear.Linear", "torch.optim.adamw.AdamW", "torch.device"),
    *("torch.ao.quantization.observer.MinMaxObserver", "torch.ao.nn.quantized.modules.linear.Linear"),
    *("torch.distributed.tensor.DTensor", "transformers.training_args.TrainingArguments", "omegaconf.dictconfig.DictConfig"),
    *("torch.torch_version.TorchVersion", "torch.utils.data.sampler.RandomSampler", "platform.uname_result"),
    *("time.struct_time", "mylib.RunConfig", "mylib.SystemPrompt", "mylib.Executor", "mylib.Loader"),
    *("_io.BytesIO", "_io.StringIO", "types.GenericAlias", "http.HTTPStatus", "builtins.ValueError", "ipaddress.IPv4Address"),
    *("transformers_modules.org.name-0a1b.configuration.Config", "__main__.Config", "mylib!Outer.Inner", "mylib._Mode"),
)


@pytest.mark.parametrize("name", DATA)
def test_what_is_data_is_carried(name: str) -> None:
    module, _, last = name.rpartition("!" if "!" in name else ".")
    assert is_data(module, last)
    assert not runs_code(module, last)


def test_a_function_of_the_users_own_is_copied_and_never_rewritten() -> None:
    assert not runs_code("mylib.schedules", "warm_up")
    assert not is_data("mylib.schedules", "warm_up")


@pytest.mark.parametrize("name", ["Config\ncos\nsystem", "Config R.", "", "A..B", "Config\u2028"])
def test_a_name_that_would_end_its_line_is_no_name(name: str) -> None:
    assert not is_data("mylib", name)
    assert not is_data(f"mylib\n{name}", "Config")


# --- what is carried may be odd ----------------------------------------------------------------------------------------


def test_tensors_in_sets_and_as_keys_are_written_with_their_storages(tmp_path: Path) -> None:
    key = torch.nn.Parameter(torch.arange(3.0))
    torch.save(
        {"w": torch.ones(2), "seen": {torch.arange(5.0)}, "state": {key: {"exp_avg": torch.zeros(3)}}}, tmp_path / "a.pt"
    )
    file = read_torch_file(tmp_path / "a.pt")
    records = {name.partition("/")[2]: record for name, record in file.records.items() if "/data/" in name}
    stored = {name: (tmp_path / "a.pt").read_bytes()[r.offset : r.offset + r.num_bytes] for name, r in records.items()}
    pickled = encode_pickle(file.tree)
    (tmp_path / "b.pt").write_bytes(torch_zip(pickled, {f"archive/{name}": data for name, data in stored.items()}))
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert torch.equal(next(iter(again["seen"])), torch.arange(5.0))
    assert torch.equal(next(iter(again["state"])), key)
    assert len(stored) == 4


def test_an_expanded_tensor_among_the_weights_is_copied(tmp_path: Path, call_cli: CallCli) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for step in range(10, 90, 10):
        mask = torch.zeros(1).expand(100_000)
        torch.save({"model": {"w": torch.arange(6.0) * step, "mask": mask}, "step": step}, run / f"ckpt_{step}.pt")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    made = torch.load(tmp_path / "forecasts" / "run" / "ckpt_90.pt")["model"]
    assert made["mask"].shape == (100_000,)
    assert made["mask"].untyped_storage().nbytes() == 4


class _Speed(enum.Enum):
    FAST = "fast"


@dataclass
class _Settings:
    name: str
    speed: _Speed
    rates: list[float]


class _Node(dict[str, Any]):
    """As configuration libraries have them: a dict with attributes."""

    parent: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getstate__(self) -> dict[str, Any]:
        return {"parent": self.parent}


def _third_party() -> dict[str, Any]:
    node = _Node(lr=1e-3)
    node.parent = "top"
    return {
        "namespace": argparse.Namespace(lr=1e-3, inner=argparse.Namespace(a=[1])),
        "path": Path("a/b"),
        "numpy state": np.random.RandomState(1).get_state(),
        "numpy number": np.float32(1.5),
        "numpy date": np.datetime64("2026-01-02"),
        "settings": _Settings("x", _Speed.FAST, [0.1]),
        "node": node,
        "date": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        "default": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1, 2], maxlen=3),
        "random": random.Random(1).getstate(),  # noqa: S311 - no secret
        "many": frozenset({1, 2}),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    inner = vars(a) == vars(b) if isinstance(a, _Node) else True
    return type(a) is type(b) and bool(a == b) and inner


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_payload_of_any_data_is_carried_through_a_forecast(tmp_path: Path, call_cli: CallCli, protocol: int) -> None:
    run = make_torch_run(tmp_path / "run")
    for path in run.iterdir():
        torch.save({**torch.load(path), "config": _third_party()}, path, pickle_protocol=protocol)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    before = torch.load(run / "ckpt_80.pt", weights_only=False)
    after = torch.load(tmp_path / "forecasts" / "run" / "ckpt_90.pt", weights_only=False)
    assert (before["step"], after["step"]) == (80, 90)
    assert list(after["config"]) == list(before["config"])
    assert [name for name in before["config"] if not _same(before["config"][name], after["config"][name])] == []


def test_torchs_version_in_a_payload_is_carried_and_loads_as_the_same_object(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_torch_run(tmp_path / "run")
    for path in run.iterdir():
        torch.save({**torch.load(path), "torch": torch.__version__}, path)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    with torch.serialization.safe_globals([torch.torch_version.TorchVersion]):
        loaded = [torch.load(tmp_path / "forecasts" / "run" / "ckpt_90.pt", weights_only=only) for only in (False, True)]
    for made in loaded:
        assert made["step"] == 90
        assert type(made["torch"]) is type(torch.__version__)
        assert str(made["torch"]) == str(torch.__version__)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real Trainer's arguments and random states are on disk."""
    from transformers import TrainingArguments

    folder = tmp_path_factory.mktemp("files")
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), report_to=[], use_cpu=True, lr_scheduler_type="cosine", logging_strategy="steps"
    )
    _ = arguments.device  # sets up its distributed state
    torch.save(arguments, folder / "training_args.bin")
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}  # noqa: NPY002
    torch.save(states, folder / "rng_state.pth")
    return folder


@pytest.mark.parametrize("name", ["training_args.bin", "rng_state.pth"])
def test_real_files_that_weights_only_refuses_are_copied_byte_for_byte(
    tmp_path: Path, real_files: Path, call_cli: CallCli, name: str
) -> None:
    run = make_hf_run(tmp_path / "run")
    for snapshot in run.iterdir():
        shutil.copy(real_files / name, snapshot / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(real_files / name, weights_only=True)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    assert (tmp_path / "forecasts" / "run" / "checkpoint-810" / name).read_bytes() == (real_files / name).read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.TransformerEncoderLayer(8, 2),
        lambda: torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()),
        lambda: torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1), 3),
        lambda: np.random.default_rng(1),
        lambda: np.ma.array([1, 2], mask=[True, False]),
    ],
    ids=["module", "optimizer", "schedule", "numpy generator", "masked array"],
)
def test_whole_objects_of_torch_and_numpy_are_data(tmp_path: Path, make: Callable[[], object]) -> None:
    torch.save({"w": torch.ones(2), "it": make()}, tmp_path / "a.pt")
    refuse_code_in(tmp_path / "a.pt")
    assert "it" in read_torch_file(tmp_path / "a.pt").tree


def _by(writer: str, value: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    if writer == "in C, to a file":
        pickle.Pickler(buffer, protocol).dump(value)
    elif writer == "in Python":
        pickle._Pickler(buffer, protocol).dump(value)
    else:
        raw = pickle.dumps(value, protocol)
        buffer.write(pickletools.optimize(raw) if writer == "optimised" else raw)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("writer", ["in C", "in C, to a file", "in Python", "optimised"])
def test_what_real_picklers_write_passes(tmp_path: Path, writer: str, protocol: int) -> None:
    """With several frames, what is too large for a frame, and pickles one behind the other."""
    sizes = (0, 3, 255, 256, 65_535, 65_536, 65_537, 200_000)
    large = [[b"x" * size, "y" * size, bytearray(size), np.zeros(1 + size // 8)] for size in sizes]
    many = [argparse.Namespace(number=number, name=f"the {number}th") for number in range(5_000)]
    raw = _by(writer, [large, many], protocol) + _by(writer, many, protocol)
    assert protocol < 4 or raw.count(b"\x95") > 4
    for name in ("state.pkl", "state"):
        (tmp_path / name).write_bytes(raw)
        refuse_code_in(tmp_path / name)


NOISE = random.Random(1).randbytes(20_000)  # noqa: S311 - no secret


def _packed(how: str) -> Callable[[Path], object]:
    return lambda p: joblib.dump({"a": NOISE, "b": ["x"]}, p, compress=(how, 3))


HARMLESS: dict[str, Callable[[Path], object]] = {
    "a numpy file": lambda p: np.save(p, np.arange(9.0)),
    "numpy objects": lambda p: np.save(p, np.array([1, "x", None], dtype=object), allow_pickle=True),
    "a numpy archive": lambda p: np.savez_compressed(p, a=np.arange(9.0), b=np.array([{"x": 1}], dtype=object)),
    "a numpy archive of zeros": lambda p: np.savez_compressed(p, a=np.zeros(100_000)),
    "gzip in two parts": lambda p: p.write_bytes(gzip.compress(b"x") + gzip.compress(pickle.dumps([1])) + bytes(512)),
    **{f"joblib, {how}": _packed(how) for how in ("zlib", "bz2", "lzma", "xz")},
    "tokens in 8 bytes each": lambda p: p.write_bytes(np.arange(1, 3_000).tobytes()),
    "tokens in 4 bytes each": lambda p: p.write_bytes(np.array([5, 1000, 7, 0] * 999, "<i4").tobytes()),
    "zeros": lambda p: p.write_bytes(bytes(100)),
    "notes on bzip2": lambda p: p.write_text("BZh is how bzip2 begins"),
    "joblib": lambda p: joblib.dump({"a": np.arange(9.0), "b": ["x"]}, p),
    "joblib, packed": lambda p: joblib.dump({"a": np.arange(9.0), "b": ["x"]}, p, compress=("gzip", 3)),
    "yaml": lambda p: p.write_text("a: !!python/tuple [1, 2]\nb: !!python/object:argparse.Namespace {x: 1}\n"),
    "a log, packed": lambda p: p.write_bytes(gzip.compress(b"system\n" * 9)),
    "damaged gzip": lambda p: p.write_bytes(gzip.compress(pickle.dumps([1] * 999))[:-20]),
    "an old torch file": lambda p: torch.save({"w": torch.ones(3)}, p, _use_new_zipfile_serialization=False),
    "a sampler": lambda p: torch.save(torch.utils.data.RandomSampler(range(5)), p),
    "a list of words": lambda p: p.write_text("cos\nsin\ntan\n"),
    "a list of systems": lambda p: p.write_text("ios\nandroid\n"),
    "bytes like opcodes": lambda p: p.write_bytes(b"\x93\x82\x95" + bytes(range(256)) * 9),
}


@pytest.mark.parametrize("ending", [".npz", ".bin", ".yaml", ""])
@pytest.mark.parametrize("what", HARMLESS)
def test_a_copied_file_without_code_passes_under_any_name(tmp_path: Path, what: str, ending: str) -> None:
    HARMLESS[what](tmp_path / "x")
    (made,) = tmp_path.iterdir()
    refuse_code_in(made.rename(tmp_path / f"x{ending}"))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02" + corpus.frame(2) + b"N.",
        b"\x80\x04" + corpus.frame(3) + b"N.N",
        b"\x80\x04" + corpus.frame(12) + b"N0" + corpus.frame(1) + b"N.",
        b"\x80\x04" + corpus.frame(2) + b"X\x01\0\0\0a.",
        corpus.frame(4) + b"(cmyos\nspawn\n)R.",
        b"\x80\x04" + corpus.frame(4) + b"X\x09\0\0\0\xffcos\nsystem\n)R.",
    ],
    ids=["protocol 2", "more behind the end", "one within another", "cut argument", "no protocol", "cut text that is none"],
)
def test_a_frame_that_no_pickler_writes_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "state").write_bytes(raw)
    with pytest.raises(UnsafeFileError, match="frames that no pickler writes"):
        refuse_code_in(tmp_path / "state")


def _changed(data: bytes, place: int) -> bytes:
    raw = bytearray(data)
    raw[place] ^= 0x80
    return bytes(raw)


def _lzma(raw: bytes, **settings: int) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, **settings}])


def _npy(raw: bytes, header_bytes: int = 118) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(header_bytes - 1) + b"\n"
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + raw


def _zipped(raw: bytes, name: str = "x.npy") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, raw)
    return buffer.getvalue()


HIDDEN: dict[str, Callable[[bytes], bytes]] = {
    "gzip with a flag that there is not": lambda raw: _changed(gzip.compress(raw), 3),
    "gzip with a wrong checksum": lambda raw: _changed(gzip.compress(raw), -5),
    "gzip with a wrong checksum of its header": lambda raw: (
        (packed := gzip.compress(raw))[:3] + b"\x02" + packed[4:10] + b"\0\0" + packed[10:]
    ),
    "gzip in two parts, zeros between": lambda raw: gzip.compress(raw[:5]) + bytes(8) + gzip.compress(raw[5:]),
    "bzip2 with a wrong checksum": lambda raw: _changed(bz2.compress(raw + NOISE), 10),
    "xz with a damaged end": lambda raw: _changed(lzma.compress(raw + NOISE), -60),
    "lzma with another dictionary": lambda raw: _lzma(raw, dict_size=0x10100),
    "lzma with other settings": lambda raw: _lzma(raw, dict_size=1 << 20, lc=0, lp=0, pb=0),
    "lzma with other settings and a damaged end": lambda raw: _lzma(raw + NOISE, dict_size=1 << 20, pb=0)[:-9000] + bytes(99),
    "joblib's own format from long ago": lambda raw: b"ZF" + hex(len(raw)).encode().ljust(19) + zlib.compress(raw),
    "a list that hands on what is appended": lambda _: b"cposixpath\n__dict__\nS'append'\ncos\nsystem\nscos\npath\nS'x'\na.",
    "a dict of the system's": lambda _: b"cos\nenviron\nS'A'\nS'1'\ns.",
    "a long numpy header": lambda raw: _npy(raw, 1 << 20),
    "a zip behind the mark of an empty one": lambda raw: b"PK\x05\x06" + _zipped(_npy(raw)),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_a_call_that_only_its_own_loader_would_see_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "x").write_bytes(HIDDEN[what](corpus.reduces("os", "system", "x")))
    with pytest.raises(FarcastError):
        refuse_code_in(tmp_path / "x")


def test_a_zip_whose_records_share_their_bytes_is_refused(tmp_path: Path) -> None:
    once = _zipped(b"\x80\x02" + b"N0" * 1_000, "a")
    begin, end = once.index(b"PK\x01\x02"), once.index(b"PK\x05\x06")
    many = once[begin:end] + once[begin:end].replace(b"a", b"b")
    tail = once[end : end + 8] + b"\2\0\2\0" + len(many).to_bytes(4, "little") + once[end + 16 :]
    (tmp_path / "x.zip").write_bytes(once[:begin] + many + tail)
    with pytest.raises(FarcastError, match="overlap"):
        refuse_code_in(tmp_path / "x.zip")


def test_the_pickles_of_a_zip_share_one_count_of_opcodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = np.array([None] * 60)
    np.savez(tmp_path / "x.npz", a=objects, b=objects, c=objects)
    refuse_code_in(tmp_path / "x.npz")
    monkeypatch.setattr("farcast_cli.formats.copied_file.MAX_OPCODES", 150)
    with pytest.raises(UnsafeFileError, match="opcodes"):
        refuse_code_in(tmp_path / "x.npz")


def test_a_pickle_of_a_great_many_long_names_is_refused(tmp_path: Path) -> None:
    names = b"".join(b"c" + b"\xff" * 900 + b"%08d\nb\n0" % number for number in range(20_000))
    (tmp_path / "x.gz").write_bytes(gzip.compress(names + b"N."))
    with pytest.raises(UnsafeFileError, match="hides what it asks for"):
        refuse_code_in(tmp_path / "x.gz")


@pytest.mark.parametrize(
    "text",
    [
        b"# c\r%TAG !p! tag:yaml.org,2002:pyth\r--- !p!on/object/apply:os.system [x]\r",
        "# c\u2028%TAG !p! tag:yaml.org,2002:pyth\n--- !p!on/object/apply:os.system [x]\n".encode(),
        b"\n" * 60_000 + b"%TAG !p! tag:yaml.org,2002:pyth\n--- !p!on/object/apply:os.system [x]\n",
    ],
    ids=["a carriage return", "a line separator", "many lines"],
)
def test_yaml_with_tags_of_its_own_is_refused_after_any_end_of_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(UnsafeFileError, match="tags of its own"):
        refuse_code_in(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["vocab.bin", "notes.pkl", "empty.pt"])
def test_a_copied_file_that_is_no_pickle_passes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"" if name == "empty.pt" else b"config = 1\nsystem\n" + bytes(range(256)))
    refuse_code_in(tmp_path / name)


@pytest.mark.parametrize("seed", range(20))
def test_a_harmful_call_after_any_harmless_data_is_found(tmp_path: Path, seed: int) -> None:
    """The walk over a copied pickle keeps its place, whatever a pickler writes before the call."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    leaves: list[Any] = [
        1,
        -(2**70),
        0.5,
        None,
        True,
        "x" * 300,
        b"y" * 300,
        b"z",
        "\u20ac",
        (),
        frozenset({1}),
        {3},
        bytearray(b"q"),
    ]
    value: Any = draw.choice(leaves)
    for _ in range(30):
        more = draw.choice(leaves)
        value = draw.choice([[value, more], (value, more, value), {"k": value, 1: more}, (value,)])
    raw = pickle.dumps([value, argparse.Namespace(a=value), Calls(os.getpid)], seed % 6)
    (tmp_path / "a.pkl").write_bytes(raw)
    with pytest.raises(UnsafeFileError, match="getpid"):
        refuse_code_in(tmp_path / "a.pkl")


# --- farcast's own files, tampered with --------------------------------------------------------------------------------


def assert_refused(done: Any, *codes: int) -> str:
    """One printable line that says what is wrong."""
    assert done.returncode in codes
    (line,) = done.errors
    assert all(each.isprintable() for each in done.stderr.splitlines())
    return str(line)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("fitted")
    fit_run(make_loose_run(top / "run"), top / "forecaster.safetensors")
    return top


def tampered(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """A forecaster with other contents and a checksum that is right for them."""
    import hashlib

    with safe_open(source, framework="np") as file:
        record = json.loads(file.metadata()["farcast"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(record, arrays)
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    record["checksum"] = whole.hexdigest()
    save_arrays(arrays, target, metadata={"farcast": json.dumps(record)})


def _path(text: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(record: dict[str, Any], _: dict[str, Any]) -> None:
        record["snapshots"][-1]["path"] = text

    return change


TAMPERED: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "a path up": _path("../../../etc/passwd"),
    "a path up in the middle": _path("step_000800.safetensors/../../x"),
    "a path from the root": _path("/etc/passwd"),
    "no path": _path(""),
    "a path with a NUL": _path("a\0b"),
    "a path with escapes": _path("\x1b[2Jx"),
    "a layout with escapes": lambda record, _: record.update(layout="\x1b[2J"),
    "a folder with a NUL": lambda record, _: record.update(directory="a\0b"),
    "no snapshots": lambda record, _: record.update(snapshots=[]),
    "no tensors": lambda record, _: record.update(tensors=[]),
    "steps of 400 digits": lambda record, _: record["snapshots"][0].update(step=10**400),
    "other steps": lambda _, arrays: arrays.update(steps=arrays["steps"][::-1].copy()),
    "no steps": lambda _, arrays: arrays.pop("steps"),
    "a smaller statistic": lambda _, arrays: arrays.update(gram=arrays["gram"][:1]),
    "a flat sample": lambda _, arrays: arrays.update({"sample.values": arrays["sample.values"].ravel()}),
    "bounds beyond": lambda _, arrays: arrays.update({"sample.bounds": arrays["sample.bounds"] + 1}),
    "steps in words": lambda record, _: record["snapshots"][0].update(step="\x1b[2J"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_forecaster_that_was_tampered_with_is_refused(tmp_path: Path, fitted: Path, call_cli: CallCli, what: str) -> None:
    shutil.copytree(fitted / "run", tmp_path / "run")
    tampered(fitted / "forecaster.safetensors", tmp_path / "forecaster.safetensors", TAMPERED[what])
    before = tree_digest(tmp_path)
    assert_refused(call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path), 3, 4)
    assert_refused(call_cli("fit", "run", "-o", "forecaster.safetensors", cwd=tmp_path), 5) if what == "no steps" else None
    assert tree_digest(tmp_path) == before


def test_the_same_forecaster_untouched_is_read(tmp_path: Path, fitted: Path, call_cli: CallCli) -> None:
    shutil.copytree(fitted / "run", tmp_path / "run")
    tampered(fitted / "forecaster.safetensors", tmp_path / "forecaster.safetensors", lambda *_: None)
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("content", [pickle.dumps(Calls(os.getpid)), b"\xff" * 64, b"", (1 << 62).to_bytes(8, "little") + b"{"])
def test_something_else_in_the_forecasters_place_is_refused(tmp_path: Path, call_cli: CallCli, content: bytes) -> None:
    (tmp_path / "forecaster.safetensors").write_bytes(content)
    assert_refused(call_cli("predict", cwd=tmp_path), 4)


LEDGERS = {
    "a NUL": '{"run":"run\\u0000","origin_step":1,"valid_step":2,"counters":"keep","forecast":"x"}',
    "escapes": '\x1b[2J\x1b]0;owned\x07{"run": 1}',
    "a long line": '{"run":"' + "x" * 5_000_000 + '"}',
    "nested deep": "[" * 100_000 + "]" * 100_000,
    "half a character": '{"run":"\\ud800","origin_step":1,"valid_step":2,"counters":"keep","forecast":"x"}',
    "a step of a million digits": '{"run":"run","origin_step":'
    + "9" * 1_000_000
    + ',"valid_step":2,"counters":"keep","forecast":"x"}',
}


@pytest.mark.parametrize("what", LEDGERS)
def test_a_ledger_that_was_tampered_with_is_refused(tmp_path: Path, fitted: Path, call_cli: CallCli, what: str) -> None:
    shutil.copytree(fitted / "run", tmp_path / "run")
    (tmp_path / "ledger").write_text(LEDGERS[what] + "\n", errors="surrogatepass")
    assert_refused(call_cli("fit", "run", "--ledger", "ledger", cwd=tmp_path), 4)


def test_a_ledger_that_is_a_fifo_is_not_waited_for(tmp_path: Path, fitted: Path, call_cli: CallCli) -> None:
    shutil.copytree(fitted / "run", tmp_path / "run")
    os.mkfifo(tmp_path / "ledger")
    assert_refused(call_cli("fit", "run", "--ledger", "ledger", cwd=tmp_path), 4)


def test_a_copied_pickle_with_an_argument_beyond_the_end_of_any_file_runs_nothing_and_ends_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"cos\nsystem\n")
    refuse_code_in(path)  # no unpickler gets beyond it either


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"origin": 1}', '{"origin": "a\\u0000b"}', '{"origin": "../\\u001b[2J"}', "\x1b[2J"]
)
def test_a_sidecar_that_was_tampered_with_is_refused(tmp_path: Path, fitted: Path, call_cli: CallCli, text: str) -> None:
    shutil.copy(fitted / "run" / "step_000800.safetensors", tmp_path / "step_000900.safetensors")
    (tmp_path / "step_000900.safetensors.farcast.json").write_text(text)
    truth = fitted / "run" / "step_000700.safetensors"
    assert_refused(call_cli("verify", "step_000900.safetensors", "--against", truth, cwd=tmp_path), 3, 4)


SETTINGS = {
    "a command to run": '[predict]\neval_cmd = "touch marker"\n',
    "a command to run, at the top": 'eval_cmd = "touch marker"\n',
    "a command to run, spelled otherwise": '[predict]\neval-cmd = "touch marker"\n',
    "nested deep": "threads = " + "[" * 50_000,
    "escapes": '"\\u001b[2J" = 1\n',
    "a table for an option": "[predict.horizon]\na = 1\n",
    "a number for a path": "[predict]\nforecaster = 5\n",
    "a date for a number": "[predict]\nscale = 2026-01-02\n",
    "a number of 400 digits": f"[predict]\nhorizon = 1{'0' * 400}\n",
    "half a file": "[predict\n",
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_lie_in_the_folder_run_nothing(tmp_path: Path, fitted: Path, call_cli: CallCli, what: str) -> None:
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "farcast.toml").write_text(SETTINGS[what])
    assert_refused(call_cli("predict", "--even-if-worse", cwd=tmp_path), 2, 4)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "forecasts").exists()


COMMAND = "run$(touch marker)`touch marker`;touch marker"


def test_a_runs_name_is_no_command_where_a_shell_reads_the_ledger(tmp_path: Path, fitted: Path, call_cli: CallCli) -> None:
    shutil.copytree(fitted / "run", tmp_path / COMMAND)
    assert call_cli("fit", COMMAND, cwd=tmp_path).returncode == 0
    place = ("-o", tmp_path / "out" / "step_000900.safetensors", "--ledger", "profile")
    assert call_cli("predict", "--horizon", 100, *place, cwd=tmp_path).returncode == 0
    for shell in ("sh", "bash"):
        if shutil.which(shell):
            subprocess.run(
                [shell, "-c", ". ./profile; . out/step_000900.farcast.json"], cwd=tmp_path, capture_output=True, check=False
            )
    assert not (tmp_path / "marker").exists()
    again = call_cli("fit", COMMAND, "--ledger", "profile", cwd=tmp_path)
    assert (again.returncode, read_leaps(tmp_path / "profile", tmp_path / COMMAND)[0].valid_step) == (0, 900)


HINTS: dict[str, tuple[str, ...]] = {
    "an output without its ending": ("predict", "--horizon", "100", "-o", "$(touch marker)"),
    "a run that changed": ("predict", "--horizon", "100"),
    "the run's notes": ("fit", COMMAND),
    "what to do next": ("inspect", COMMAND),
    "an output of tune's": (
        "tune",
        f"{COMMAND}/step_000100.safetensors",
        "--layer",
        "norm.weight",
        "--loss",
        "mse",
        "-o",
        "$(touch marker)",
    ),
}


@pytest.mark.parametrize("what", HINTS)
def test_no_line_that_is_printed_runs_a_name_where_it_is_pasted(
    tmp_path: Path, fitted: Path, call_cli: CallCli, what: str
) -> None:
    run = Path(shutil.copytree(fitted / "run", tmp_path / COMMAND))
    (run / "notes0").write_text("x")
    assert call_cli("fit", COMMAND, cwd=tmp_path).returncode == 0
    if what == "a run that changed":
        save_arrays({"a": np.ones(2)}, run / "step_000800.safetensors")
    arguments = HINTS[what] if "tune" not in HINTS[what] else (*HINTS[what], "--data", str(run / "step_000800.safetensors"))
    done = call_cli(*arguments, cwd=tmp_path)
    commands = [line[line.index("farcast ") :] for line in (done.stdout + done.stderr).splitlines() if "farcast " in line]
    commands += ["farcast x " + line.removeprefix("hint: ") for line in done.hints]
    for command in commands:
        subprocess.run(["sh", "-c", f"farcast() {{ :; }}; {command}"], cwd=tmp_path, capture_output=True, check=False)
    assert commands
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("path", "word"),
    [("a/b", "a/b"), ("-o", "./-o"), ("--config=x y", "'./--config=x y'"), ("$(x)", "'$(x)'"), ("it's", "'it'\"'\"'s'")],
)
def test_a_path_in_a_hint_is_one_word_and_no_option(path: str, word: str) -> None:
    assert shell_word(path) == word
    assert shlex.split(word)[0].removeprefix("./") == path


def test_a_hint_that_is_too_long_is_left_out_rather_than_cut_within_its_quotes() -> None:
    assert UsageError("x", hint=shell_word("'" * 1500)).hint == ""


# --- trainer's state that is odd ---------------------------------------------------------------------------------------

ODD: dict[str, Callable[[int], dict[str, Any]]] = {
    "numbers of 400 digits": lambda step: {"iteration_total": 10**400 + step},
    "numbers of 5,000 digits": lambda step: {"iteration_total": 10**5000 + step},
    "not a number": lambda step: {"epoch": float("nan"), "total_flos": float("inf") if step > 40 else 1.0},
    "a schedule of texts": lambda step: {
        "scheduler": {"last_epoch": step, "_last_lr": ["x"], "base_lrs": "abc", "T_max": {}, "eta_min": []}
    },
    "a schedule that counts a trillion": lambda step: {
        "scheduler": {
            "last_epoch": step * 10**12,
            "_step_count": 1,
            "_last_lr": [0.1],
            "base_lrs": [0.1],
            "T_max": 5,
            "eta_min": 0,
        }
    },
    "a schedule with a step of its own": lambda step: {
        "scheduler": {"last_epoch": step, "step": "x", "get_lr": 1, "_last_lr": [0.1], "base_lrs": [0.1], "gamma": 0.5}
    },
    "a schedule in itself": lambda step: {
        "scheduler": {"_schedulers": [{"_schedulers": [7], "last_epoch": step}], "last_epoch": step}
    },
    "an optimizer of nothing": lambda step: {"optimizer": {"state": {0: step}, "param_groups": [{"lr": "x", "params": step}]}},
    "keys of every kind": lambda step: {"odd": {(1, 2): {None: step, 1.5: [step], b"x": {frozenset({1}): step}}}},
}


@pytest.mark.parametrize("what", ODD)
def test_a_trainers_state_that_is_odd_is_carried_or_refused(tmp_path: Path, call_cli: CallCli, what: str) -> None:
    run = make_torch_run(tmp_path / "run")
    for path in run.iterdir():
        payload = torch.load(path)
        torch.save({**payload, **ODD[what](payload["step"])}, path)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path)
    if done.returncode:
        assert_refused(done, 2, 4)
        assert not (tmp_path / "forecasts").exists()
    else:
        assert torch.load(tmp_path / "forecasts" / "run" / "ckpt_90.pt", weights_only=False)["step"] == 90


# --- names on the screen -----------------------------------------------------------------------------------------------


def test_names_from_the_folder_are_shown_without_what_a_terminal_would_obey(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    for name in ("\x1b[2Jnotes", "[bold]x", "line\nbreak", b"\xff\xfe".decode(errors="surrogateescape")):
        (run / name).write_text("x")
    done = call_cli("inspect", "run", cwd=tmp_path)
    assert done.returncode == 0
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert "\\x1b[2Jnotes" in done.stdout
    assert "[bold]x" in done.stdout


def test_a_step_with_a_lot_of_digits_is_no_step(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_hf_run(tmp_path / "run")
    (newest(run) / "trainer_state.json").write_text(json.dumps({"global_step": 10**4000}))
    assert "global_step" in assert_refused(call_cli("inspect", "run", cwd=tmp_path), 4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    newest(run).chmod(0)
    assert "step_000800" in assert_refused(call_cli("inspect", "run", cwd=tmp_path), 4)


def test_a_hint_is_safe_to_paste(tmp_path: Path, call_cli: CallCli) -> None:
    run = tmp_path / "$(touch marker)"
    run.mkdir()
    for step in STEPS:
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
        (run / f"step_{step}.pt").write_bytes(buffer.getvalue())
    done = call_cli("inspect", run.name, cwd=tmp_path)
    assert_refused(done, 4)
    (hint,) = done.hints
    subprocess.run(["sh", "-c", hint.removeprefix("hint: ")], cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "marker").exists()


# --- the walk beside real unpicklers -----------------------------------------------------------------------------------


class _Inert:
    """What a pickle gets for whatever it asks for: it takes all arguments, and notes that it was called."""

    asked: ClassVar[list[str]] = []

    def __init__(self, *_: object) -> None:
        self.asked.append("call")

    def __setstate__(self, _: object) -> None:
        self.asked.append("call")


class _InC(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        _Inert.asked.append(f"{module}.{name}")
        return _Inert


class _InPython(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        _Inert.asked.append(f"{module}.{name}")
        return _Inert


def _any_pickle(draw: random.Random) -> bytes:
    words = ["os", "myos", "my", "system", "x"]
    ops: list[bytes] = [bytes([code]) for code in b"(N0)R}]t\x93\x85\x86\x94obs12ae.\x81\x8f\x90"]
    for _ in range(12):
        word, other = draw.choice(words), draw.choice(words)
        ops += [f"c{word}\n{other}\n".encode(), corpus.short(word), corpus.text(word), corpus.frame(draw.randrange(40))]
        ops += [b"q" + bytes([draw.randrange(3)]), b"h" + bytes([draw.randrange(3)]), f"i{word}\n{other}\n".encode()]
        ops += [b"X" + bytes([draw.choice([len(word), 3, 30]), 0, 0, 0]) + word.encode(), b"cos\nsystem\n"]
    body = b"".join(draw.choices(ops, k=draw.randrange(2, 14))) + b"."
    framed = corpus.frame(draw.randrange(1, len(body) + 3)) + body if draw.random() < 0.5 else body
    return framed if draw.random() < 0.3 else bytes([0x80, draw.choice([2, 4, 5])]) + framed


def _asks_for(unpickler: Any, *, is_told: bool) -> set[str]:
    """What an unpickler asks for, up to its last call where the file does not say that it is a pickle."""
    _Inert.asked.clear()
    with contextlib.suppress(Exception):
        unpickler.load()
    asked = _Inert.asked
    num_used = len(asked) if is_told else max((n for n, what in enumerate(asked) if what == "call"), default=0)
    return set(asked[:num_used]) - {"call"}


@pytest.mark.parametrize("seed", range(8))
def test_the_walk_meets_every_name_that_an_unpickler_asks_for_or_refuses_the_pickle(tmp_path: Path, seed: int) -> None:
    """Some 4,000 pickles of random opcodes, read in C and in Python, from memory and from a file."""
    draw, num_asking = random.Random(seed), 0  # noqa: S311 - no secret
    for _ in range(500):
        raw = _any_pickle(draw)
        (tmp_path / "x").write_bytes(raw)
        with (tmp_path / "x").open("rb", buffering=0) as file:
            readers = [_InC(io.BytesIO(raw)), _InC(file), _InPython(io.BytesIO(raw))]
            asked = set().union(*(_asks_for(reader, is_told=raw.startswith(pickle.PROTO)) for reader in readers))
        met: set[str] = set()
        try:
            met.update(f"{module}.{name}" for module, name in iter_names(io.BufferedReader(io.BytesIO(raw))))
        except UnsafeFileError:
            met |= asked
        except EOFError:
            pass
        assert asked <= met, raw
        num_asking += bool(asked)
    assert num_asking > 15
