"""The compiled kernel gives the bits of numpy's arithmetic, for every type, at every value, at any byte."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import farcast_cli.engine.reader
from farcast_cli import __version__
from farcast_cli.engine import native
from farcast_cli.engine.arithmetic import Coefficients, HostArithmetic, forecasts
from farcast_cli.engine.casts import MAX_FINITE, narrow, work_type
from farcast_cli.engine.reader import Reader
from farcast_cli.errors import HalfWrittenError, UnreadableError
from farcast_cli.files.reading import reading_in_kernel
from farcast_cli.tensors import DTYPES, FLOATING
from tests.conftest import run_cli

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.engine.native import Kernel
    from farcast_cli.files.reading import InFile
    from farcast_cli.tensors import DType

COUNTS = (3, 1_500, 1, 1_024, 70)
"""Elements of the segments of a batch; a block of the kernel holds 1,024."""
NUM_ELEMENTS = sum(COUNTS)
MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
"""Bits of it."""


@pytest.fixture
def kernel() -> Kernel:
    if native.KERNEL is None:
        pytest.skip("this installation has no compiled kernel")
    return native.KERNEL


def at_an_odd_byte(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([np.zeros(1, np.uint8), raw])[1:]


def numbers(random: np.random.Generator, dtype: DType) -> NDArray[np.uint8]:
    """Of each size down to the subnormal ones, and both zeros; none so large that a sum leaves the range of float16."""
    raw = np.empty(NUM_ELEMENTS * dtype.itemsize, np.uint8)
    narrow(random.normal(size=NUM_ELEMENTS) * 2.0 ** random.integers(-30, 5, NUM_ELEMENTS), dtype, raw)
    bits, sign = raw.view(f"u{dtype.itemsize}"), 1 << (8 * dtype.itemsize - 1)
    bits[::5] &= np.array(sign | (1 << MANTISSA[dtype.name]) - 1, bits.dtype)  # subnormal
    bits[1::7] &= np.array(sign, bits.dtype)
    return at_an_odd_byte(raw)


@dataclass
class Problem:
    """A batch as the kernel takes it: raw values of the others and the origin, types, and an update."""

    raws: list[NDArray[np.uint8]]
    types: list[DType]
    output: DType
    weights: NDArray[np.float64]
    gains: NDArray[np.float64] | None = None
    moves: tuple[bool, ...] = ()
    bare: tuple[bool, ...] = ()
    non_negative: bool = False

    @property
    def num_horizons(self) -> int:
        return int(self.weights.shape[1])


def by_kernel(kernel: Kernel, problem: Problem) -> tuple[list[bytes], list[int]] | None:
    """The outputs and how many elements are unchanged, by horizon; None where a result is not finite."""
    types = native.codes(problem.types[:-1], problem.types[-1], problem.output)
    assert types is not None
    outs = tuple(
        at_an_odd_byte(np.zeros(NUM_ELEMENTS * problem.output.itemsize, np.uint8)) for _ in range(problem.num_horizons)
    )
    unchanged = np.zeros(problem.num_horizons, np.int64)
    is_finite = kernel.combine(
        (problem.raws[-1],),
        tuple(problem.raws[:-1]),
        outs,
        types,
        bytes(problem.moves or len(problem.raws[:-1])),
        bytes(problem.bare or problem.num_horizons),
        np.array(COUNTS, np.int64),
        problem.weights,
        problem.gains,
        unchanged,
        problem.non_negative,
        work_type(problem.types[-1]) is np.float64,
    )
    return ([out.tobytes() for out in outs], unchanged.tolist()) if is_finite else None


def by_numpy(problem: Problem) -> tuple[list[bytes], list[int]] | None:
    """The same by whole arrays."""
    arithmetic, origin, work = HostArithmetic(), problem.types[-1], work_type(problem.types[-1])
    horizons, others = range(problem.num_horizons), range(len(problem.raws) - 1)

    def spread(numbers: NDArray[np.float64]) -> Any:
        return arithmetic.spread(numbers, COUNTS, work)

    gains, constants = (
        ([spread(problem.gains[:, h, part]) for h in horizons] if problem.gains is not None else None) for part in (0, 1)
    )
    weights = [[spread(problem.weights[:, h, t]) for t in others] for h in horizons]
    coefficients = Coefficients(weights, gains, constants, problem.moves, problem.bare)
    outputs, unchanged = [], []
    with arithmetic.context():
        last = arithmetic.load(problem.raws[-1], origin, "last", work)
        loaded = (
            arithmetic.load(raw, dtype, "other", work) for raw, dtype in zip(problem.raws[:-1], problem.types[:-1], strict=True)
        )
        own = np.zeros(NUM_ELEMENTS * problem.output.itemsize, np.uint8)
        arithmetic.store(last, problem.output, own)
        same = problem.raws[-1] if origin is problem.output else own
        for values in forecasts(arithmetic, last, loaded, coefficients, keep_zeros=True):
            kept = (
                np.where((values < 0) & (values > -np.inf), np.zeros_like(values), values) if problem.non_negative else values
            )
            out = np.zeros_like(own)
            if not arithmetic.store(kept, problem.output, out):
                return None
            outputs.append(out.tobytes())
            unchanged.append(int(np.all(out.reshape(NUM_ELEMENTS, -1) == same.reshape(NUM_ELEMENTS, -1), axis=1).sum()))
    return outputs, unchanged


def problem_of(seed: int, types: Sequence[str], output: str, *, num_horizons: int = 1, **more: Any) -> Problem:
    random = np.random.default_rng(seed)
    dtypes = [DTYPES[name] for name in types]
    raws = [numbers(random, dtype) for dtype in dtypes]
    still = NUM_ELEMENTS // 2 * dtypes[-1].itemsize
    for raw, dtype in zip(raws, dtypes, strict=True):
        if dtype is dtypes[-1]:
            raw[:still] = raws[-1][:still]
    weights = random.normal(size=(len(COUNTS), num_horizons, len(types) - 1)) / 8
    return Problem(raws, dtypes, DTYPES[output], weights, **more)


OUTPUTS = [
    (origin, output)
    for origin, output in itertools.product(FLOATING, FLOATING)
    if native.codes([], DTYPES[origin], DTYPES[output])
]


@pytest.mark.parametrize(("origin", "output"), OUTPUTS)
def test_a_forecast_has_numpys_bits(kernel: Kernel, origin: str, output: str) -> None:
    """Of snapshots of the same type and of others, at one horizon and at several, with and without other snapshots."""
    for seed, others in enumerate([[origin], [origin] * 4, [*FLOATING], []]):
        problem = problem_of(seed, [*others, origin], output, num_horizons=1 + seed % 3)
        expected = by_numpy(problem)
        assert expected is not None
        assert by_kernel(kernel, problem) == expected


@pytest.mark.parametrize("origin", FLOATING)
def test_a_gain_a_constant_moves_a_bare_update_and_a_variance_have_numpys_bits(kernel: Kernel, origin: str) -> None:
    random = np.random.default_rng(0)
    gains = random.normal(size=(len(COUNTS), 2, 2)) / 8
    for more in ({"gains": gains}, {"moves": (True, False)}, {"bare": (False, True)}, {"non_negative": True}):
        problem = problem_of(1, [origin] * 3, origin, num_horizons=2, **more)
        expected = by_numpy(problem)
        assert expected is not None
        assert by_kernel(kernel, problem) == expected


@pytest.mark.parametrize(("origin", "output"), OUTPUTS)
def test_each_value_that_is_not_finite_is_noticed(kernel: Kernel, origin: str, output: str) -> None:
    dtype = DTYPES[origin]
    kinds = (np.nan, np.inf, -np.inf, MAX_FINITE[origin], -MAX_FINITE[origin])
    for number, (value, place) in enumerate(itertools.product(kinds, (0, 1, 1_100, NUM_ELEMENTS - 1))):
        problem = problem_of(2, [origin] * 3, output)
        for raw in problem.raws:
            raw[:] = 0
        assert by_kernel(kernel, problem) is not None
        arithmetic, raw = HostArithmetic(), problem.raws[number % 3]
        with arithmetic.context():
            arithmetic.store(np.array([value]), dtype, raw[place * dtype.itemsize : (place + 1) * dtype.itemsize])
        found = by_kernel(kernel, problem)
        assert found == by_numpy(problem)
        assert np.isfinite(value) or found is None


# --- files -----------------------------------------------------------------------------------------------------------

WHERE_IT_READS = pytest.mark.skipif(not hasattr(os, "preadv"), reason="Python reads for the kernel on this system")
NUM_LONG = 70_001
"""Elements that are read in several windows."""


@dataclass
class Files:
    """Values of some types in memory, and in a file each from an odd byte on, as the kernel takes them."""

    raws: tuple[NDArray[np.uint8], ...]
    sources: tuple[InFile, ...]
    reader: Reader
    """Keeps them open."""

    @classmethod
    def of(cls, folder: Path, types: Sequence[DType]) -> Files:
        random, raws, stretches = np.random.default_rng(0), [], []
        for number, dtype in enumerate(types):
            raw = np.empty(NUM_LONG * dtype.itemsize, np.uint8)
            narrow(random.normal(size=NUM_LONG), dtype, raw)
            path = folder / str(number)
            path.write_bytes(bytes(2 * number + 1) + raw.tobytes())
            raws.append(raw)
            stretches.append((path, 2 * number + 1, len(raw)))
        reader = Reader()
        sources = reader.for_kernel(stretches)
        assert sources is not None
        return cls(tuple(raws), sources, reader)


def combined(kernel: Kernel, values: Sequence[native.Values], types: Sequence[DType]) -> tuple[bytes, int]:
    """A forecast from snapshots, the last of which is the origin, and how many elements are unchanged."""
    out, unchanged, num_others = np.zeros(NUM_LONG * types[-1].itemsize, np.uint8), np.zeros(1, np.int64), len(types) - 1
    codes = native.codes(types[:-1], types[-1], types[-1])
    assert codes is not None
    weights, counts = np.linspace(-0.2, 0.3, num_others).reshape(1, 1, -1), np.array([NUM_LONG])
    in_double = work_type(types[-1]) is np.float64
    moves, bare = bytes(num_others), bytes(1)
    last, others = tuple(values[-1:]), tuple(values[:-1])
    assert kernel.combine(last, others, (out,), codes, moves, bare, counts, weights, None, unchanged, False, in_double)
    return out.tobytes(), int(unchanged[0])


def multiplied(kernel: Kernel, values: Sequence[native.Values], types: Sequence[DType]) -> tuple[bytes, bytes, bytes]:
    codes = native.codes_of(types)
    assert codes is not None
    lower, totals, moved = np.zeros((len(types), len(types))), np.zeros(len(types)), np.zeros(len(types), np.uint8)
    kernel.products(tuple(values), codes, NUM_LONG, lower, totals, moved)
    return lower.tobytes(), totals.tobytes(), moved.tobytes()


@WHERE_IT_READS
@pytest.mark.parametrize("origin", FLOATING)
def test_values_that_the_kernel_reads_give_the_bits_of_those_in_memory(kernel: Kernel, origin: str, tmp_path: Path) -> None:
    types = [DTYPES[name] for name in ("float16", "float32", origin, "bfloat16", "float64", origin)]
    files = Files.of(tmp_path, types)
    mixed: tuple[native.Values, ...] = (*files.raws[:2], *files.sources[2:])
    for compute in (combined, multiplied):
        expected = compute(kernel, files.raws, types)
        assert compute(kernel, files.sources, types) == expected
        assert compute(kernel, mixed, types) == expected


@WHERE_IT_READS
@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_becomes_shorter_or_cannot_be_read_is_named(kernel: Kernel, number: int, tmp_path: Path) -> None:
    """The origin's and another's."""
    types = [DTYPES["bfloat16"]] * 2
    files = Files.of(tmp_path, types)
    os.truncate(tmp_path / str(number), 100_000)
    message = f"{number}: file ends early: expected at least {2 * NUM_LONG + 2 * number + 1} bytes, found 100000"
    for compute in (combined, multiplied):
        with pytest.raises(HalfWrittenError, match=message), reading_in_kernel():
            compute(kernel, files.sources, types)
    memory = Path("/proc/self/mem")  # opens, and its first page cannot be read
    if memory.exists():
        with memory.open("rb") as file:
            sources = [(file.fileno(), 0, memory) if index == number else raw for index, raw in enumerate(files.raws)]
            for compute in (combined, multiplied):
                with pytest.raises(UnreadableError, match="/proc/self/mem: cannot be read: Input"), reading_in_kernel():
                    compute(kernel, sources, types)


@WHERE_IT_READS
def test_files_that_the_kernel_was_given_last_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farcast_cli.engine.reader, "_MAX_OPEN", 3)
    for name in "abcd":
        (tmp_path / name).write_text(name)
    reader = Reader()

    def texts(names: str) -> str | None:
        sources = reader.for_kernel([(tmp_path / name, 0, 1) for name in names])
        return None if sources is None else "".join(os.pread(fd, 1, offset).decode() for fd, offset, _ in sources)

    assert [texts(names) for names in ("abc", "ad", "bad", "abcd")] == ["abc", "ad", "bad", None]
    assert Reader("mmap").for_kernel([(tmp_path / "a", 0, 1)]) is None


# --- what is refused -------------------------------------------------------------------------------------------------


def test_buffers_that_are_too_short_are_refused(kernel: Kernel) -> None:
    problem = problem_of(0, ["float32"] * 3, "float32")
    problem.raws[0] = problem.raws[0][:-1]
    with pytest.raises(ValueError, match="too short"):
        by_kernel(kernel, problem)
    problem.raws[0] = problem.raws[1]
    problem.weights = problem.weights[:-1]
    with pytest.raises(ValueError, match="sizes do not match"):
        by_kernel(kernel, problem)


@pytest.mark.parametrize("counts", [(100, -100), (-1,), (1 << 62,) * 4])
def test_counts_that_no_batch_has_are_refused(kernel: Kernel, counts: tuple[int, ...]) -> None:
    raw, zero = np.zeros(8, np.uint8), b"\0"
    weights, unchanged = np.zeros((len(counts), 1, 1)), np.zeros(1, np.int64)
    segments = np.array(counts, np.int64)
    with pytest.raises(ValueError, match="sizes do not match"):
        kernel.combine((raw,), (raw,), (raw.copy(),), bytes(3), zero, zero, segments, weights, None, unchanged, False, False)


@pytest.mark.parametrize("count", [1 << 60, 1 << 61, (1 << 63) - 1])
def test_more_values_than_a_file_can_hold_are_refused(kernel: Kernel, count: int) -> None:
    """Their bytes overflow 64 bits. The descriptor is no one's: nothing is read."""
    memory = np.zeros((2, 2)), np.zeros(1), np.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="too short"):
        kernel.products(((-1, 8, Path("file")),), bytes(1), count, *memory)


BUILT = "native" if find_spec("farcast_cli.engine._kernel") else "numpy"


@pytest.mark.parametrize(
    ("wanted", "code", "says"),
    [
        ("numpy", 0, f"farcast {__version__} (numpy)"),
        ("", 0, f"farcast {__version__} ({BUILT})"),
        ("fast", 2, "error: FARCAST_ENGINE=fast: expected native or numpy"),
    ],
)
def test_the_environment_chooses_the_engine_and_the_version_names_it(wanted: str, code: int, says: str, tmp_path: Path) -> None:
    done = run_cli("--version", "-v", cwd=tmp_path, env={native.VARIABLE: wanted})
    assert (done.returncode, (done.stdout + done.stderr).strip()) == (code, says)
