"""What a stored tensor is: its element type, its shape, and where its bytes lie in a file.

Knows the element types of every supported file format under one name, torch's own (`float32`), and which of them
can be forecast. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from farcast_cli.errors import SnapshotError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: torch's name, the safetensors code and torch's storage class (empty where there is none)."""

    name: str
    itemsize: int
    code: str = ""
    storage: str = ""
    bits: int = 0
    """Of one element, where that is less than a byte; safetensors packs those."""

    def bytes_of(self, num_elements: int) -> int:
        """What so many elements take."""
        return num_elements * (self.bits or 8 * self.itemsize) // 8


_TABLE = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    DType("uint16", 2, "U16"),
    DType("uint32", 4, "U32"),
    DType("uint64", 8, "U64"),
    DType("complex64", 8, "C64", "ComplexFloatStorage"),
    DType("complex128", 16, "", "ComplexDoubleStorage"),
    DType("complex32", 4),
    DType("float8_e4m3fn", 1, "F8_E4M3"),
    DType("float8_e5m2", 1, "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1),  # two values, and one element to torch
)
_PACKED = (
    DType("float4_e2m1fn", 1, "F4", bits=4),
    DType("float6_e2m3fn", 1, "F6_E2M3", bits=6),
    DType("float6_e3m2fn", 1, "F6_E3M2", bits=6),
)
"""Types of safetensors whose single elements torch cannot name."""
SAMPLE_BLOCK = 512  # elements that lie side by side; short, so that a sample of an embedding sees many of its rows
DTYPES = {dtype.name: dtype for dtype in _TABLE}
BY_CODE = {dtype.code: dtype for dtype in (*_TABLE, *_PACKED) if dtype.code}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Types that `--dtype` turns into one another."""
_PARTS = {"complex64": "float32", "complex128": "float64"}
FORECASTABLE = (*FLOATING, *_PARTS)
"""Types whose values move along a path; every other type is copied from the last snapshot."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, start + count) of a tensor."""

    start: int
    count: int


@lru_cache(maxsize=4096)
def sample_stretches(num_elements: int, num_samples: int) -> tuple[Stretch, ...]:
    """Blocks spread evenly over a tensor; the whole tensor where it is no larger than the sample.

    Depends on the size alone, so that equal tensors are sampled alike.
    """
    if num_elements <= num_samples:
        return (Stretch(0, num_elements),)
    num_blocks = max(2, num_samples // SAMPLE_BLOCK)
    count = min(SAMPLE_BLOCK, num_samples // num_blocks)
    last_start = num_elements - count
    return tuple(Stretch(last_start * i // (num_blocks - 1), count) for i in range(num_blocks))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as it lies in a file: `num_elements` values from byte `offset` on, in storage order.

    `strides` is empty for the usual row-major order. Elementwise work does not care about the order, as long as all
    snapshots of a tensor share it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] = ()
    sample: int = 0
    """If the file holds only a sample of the values: how many at most, as `sample_stretches` places them."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """What it takes in its file."""
        if self.sample:
            real = self.as_real()
            return real.dtype.itemsize * sum(stretch.count for stretch in sample_stretches(real.num_elements, self.sample))
        return self.dtype.bytes_of(self.num_elements)

    def offset_of(self, stretch: Stretch) -> int:
        """The byte of the file where some neighbouring values begin.

        Raises:
            SnapshotError: the file holds a sample of the values, and these are not in it.
        """
        if not self.sample:
            return self.offset + stretch.start * self.dtype.itemsize
        begin = 0
        for held in sample_stretches(self.num_elements, self.sample):
            if held.start <= stretch.start and stretch.start + stretch.count <= held.start + held.count:
                return self.offset + (begin + stretch.start - held.start) * self.dtype.itemsize
            begin += held.count
        raise SnapshotError(
            f"{self.path}: holds a sample of {self.name!r}, and not the values that are to be read",
            hint="farcast keep without --sampled keeps all values",
        )

    def as_real(self) -> TensorEntry:
        """The same bytes as real numbers: a complex tensor as one of pairs, with a last dimension of 2."""
        part = _PARTS.get(self.dtype.name)
        if part is None:
            return self
        strides = (*(2 * stride for stride in self.strides), 1) if self.strides else ()
        return replace(self, dtype=DTYPES[part], shape=(*self.shape, 2), strides=strides)


def is_batch_norm_statistic(name: str) -> bool:
    """Whether a tensor is one of BatchNorm's running statistics, whose scale is the data's and not the weights'."""
    return name.rpartition(".")[2] in {"running_mean", "running_var"}


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A contiguous tensor's strides, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides (in elements) are those of a contiguous tensor; dimensions of size 1 do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill one gapless stretch without overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def canonical_name(name: str) -> str:
    """A tensor's name without the wrappers that DistributedDataParallel and torch.compile put into it."""
    if "module" not in name and "_orig_mod" not in name:
        return name
    parts = name.split(".")
    return ".".join(part for part in parts if part not in {"module", "_orig_mod"}) or name
