"""What a stored tensor is: its element type, its shape, and where its bytes lie in a file.

Knows the element types of every supported file format under one name, torch's own (`float32`), and which of them
can be forecast. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

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
DTYPES = {dtype.name: dtype for dtype in _TABLE}
BY_CODE = {dtype.code: dtype for dtype in (*_TABLE, *_PACKED) if dtype.code}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Types that `--dtype` turns into one another."""
_PARTS = {"complex64": "float32", "complex128": "float64"}
FORECASTABLE = (*FLOATING, *_PARTS)
"""Types whose values move along a path; every other type is copied from the last snapshot."""


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

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.dtype.bytes_of(self.num_elements)

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
