"""How good files become bad ones: bytes, JSON, pickle opcodes and array headers changed at random, by a seed."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

ODD_BYTES = (0, 9, 10, 13, 34, 44, 46, 48, 57, 58, 91, 92, 93, 123, 125, 127, 128, 255)
ODD_NUMBERS = (0, 1, -1, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300)
ODD_VALUES: tuple[Any, ...] = (
    *ODD_NUMBERS,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "1",
    "\0",
    "../x",
    "x" * 3000,
    [],
    {},
    [1],
    [[[]]],
)

ODD_KEYS = ("", "a", "\0", "\u202e", "__metadata__", "x" * 2000, "\ud800", "../x")


def some_bytes(random: Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """A few changes anywhere: bits, bytes, pieces that are gone, doubled or cut off, and words of the format put in."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        at = random.randrange(len(changed) or 1)
        kind = random.randrange(8)
        if kind <= 1 and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif kind <= 3 and changed:
            changed[at] = random.choice((*ODD_BYTES, random.randrange(256)))
        elif kind == 4:
            del changed[at : at + random.choice((1, 1, 2, 8, 100))]
        elif kind == 5:
            changed[at:at] = changed[at : at + random.randint(1, 40)]
        elif kind == 6:
            changed[at:at] = random.choice(words) if words else random.randbytes(random.randint(1, 8))
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def json_value(random: Random, value: Any) -> Any:
    """Some value of a JSON tree replaced, renamed, removed or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        return _json_object(random, value)
    if isinstance(value, list) and value and random.random() < 0.8:
        return _json_list(random, value)
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice((-1, 1, 4, 8, -value, value))
    return random.choice(ODD_VALUES)


def _json_object(random: Random, value: dict[str, Any]) -> dict[str, Any]:
    key, other = random.choice(list(value)), random.choice((*ODD_KEYS, random.choice(list(value))))
    kind = random.randrange(6)
    if kind == 0:
        return {name: item for name, item in value.items() if name != key}
    if kind == 1:
        return {other if name == key else name: item for name, item in value.items()}
    return {**value, key: json_value(random, value[key])}


def _json_list(random: Random, value: list[Any]) -> list[Any]:
    at, kind = random.randrange(len(value)), random.randrange(10)
    if kind == 0:
        return value[:at] + value[at + 1 :]
    if kind == 1:
        return [*value, value[at]]
    return [json_value(random, item) if n == at else item for n, item in enumerate(value)]


def json_text(random: Random, raw: bytes) -> bytes:
    """A JSON text whose values are odd, or whose bytes are damaged."""
    if random.random() < 0.3:
        return some_bytes(random, raw, (b"NaN", b"1e999", b"[" * 300, b'"\\ud800"', b"9" * 5000, b"\xef\xbb\xbf", b"null"))
    value = json.loads(raw)
    for _ in range(random.randint(1, 3)):
        value = json_value(random, value)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def safetensors_file(random: Random, raw: bytes) -> bytes:
    """A changed header, its length told rightly or not, before the same data."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    if random.random() < 0.5:
        return some_bytes(random, raw[:end], (b"F64", b"BF16", b"F8_E4M3", b"18446744073709551616", b"[", b"}")) + raw[end:]
    text = json_text(random, raw[8:end]) + b" " * random.choice((0, 0, 0, 1, 7))
    length = random.choice((len(text),) * 9 + (random.choice((0, 1, 2**31, 2**63, len(text) + 1)),))
    data = random.choice((raw[end:],) * 6 + (raw[end:-1], raw[end:] + b"\0", b""))
    return struct.pack("<Q", length % 2**64) + text + data


OPCODES = tuple(code.code.encode("latin-1") for code in pickletools.opcodes)
NAMES = (
    *("collections OrderedDict", "torch Size", "collections defaultdict", "collections Counter", "builtins set", "os system"),
    *("_codecs encode", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch DoubleStorage"),
    *("torch._utils _rebuild_parameter", "torch.storage UntypedStorage", "torch bfloat16", "torch float64"),
    *("argparse Namespace", "numpy dtype", "builtins getattr", "posix system", "builtins eval", "subprocess Popen"),
)
FRAGMENTS = (
    *OPCODES,
    *(b"c" + name.replace(" ", "\n").encode() + b"\n" for name in NAMES),
    *(b"\x8c" + bytes([len(part)]) + part for name in NAMES[:6] for part in name.encode().split()),
    *(
        b"\x8c\x02os\x8c\x06system\x93",
        b"\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93",
        b"(S'os'\nS'system'\n",
        b"ios\nsystem\n",
    ),
    *(b"X\x02\0\0\0os\x8d" + struct.pack("<Q", 6) + b"system\x93", b"Vos\nVsystem\n\x93", b"U\x02osU\x06system\x93"),
    *(
        b"Vo\\u0073\n",
        b"S'o\\x73'\n",
        b'S"os"\n',
        b"V\\ud800\n",
        b"X\x00\x00\x00\x00",
        b"X\x01\x00\x00\x00w",
        b"X\xff\xff\xff\xff",
    ),
    *(
        b"K\x00",
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\x0a" + b"\xff" * 9 + b"\x7f",
        b"I5\n",
        b"L99999999999999999999L\n",
        b"F1e999\n",
    ),
    *(
        b"h\x00",
        b"h\x05",
        b"q\x00",
        b"r\xff\xff\xff\x7f",
        b"j\0\0\0\0",
        b"p0\n",
        b"g0\n",
        b"g 0\n",
        b"g00\n",
        b"p+0\n",
        b"g0_0\n",
    ),
    *(b"\x80\x04", b"\x80\x05", b"\x80\x09", b"\x95" + b"\0" * 8, b"\x95" + struct.pack("<Q", 5), b"\x82\x01", b"\x83\x01\x00"),
    *(b"\x96" + struct.pack("<Q", 3) + b"abc", b"\x8e" + struct.pack("<Q", 3) + b"abc", b"T\x03\0\0\0abc", b"B\x02\0\0\0ab"),
    *(b"G" + struct.pack(">d", float("nan")), b"C\x02ab", b"\x8b\x01\0\0\0a", b"\x8b\xff\xff\xff\xff", b"P1\n", b"\n"),
)
"""Opcodes with and without their arguments, names that run code among them, and spellings that readers may take differently."""


def opcodes_of(raw: bytes) -> list[bytes]:
    """A pickle, opcode by opcode."""
    starts = [position for _, _, position in pickletools.genops(raw) if position is not None]
    return [raw[start:end] for start, end in zip(starts, [*starts[1:], len(raw)], strict=True)]


def pickle_opcodes(random: Random, raw: bytes) -> bytes:
    """Opcodes changed, put in, left out, exchanged, doubled, or with another argument."""
    codes = opcodes_of(raw)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        kind, at, to = random.randrange(7), random.randrange(1, len(codes)), random.randrange(1, len(codes))
        if kind == 0:
            codes[at] = random.choice(FRAGMENTS)
        elif kind == 1:
            codes.insert(at, random.choice(FRAGMENTS))
        elif kind == 2:
            del codes[at]
        elif kind == 3:
            codes[at], codes[to] = codes[to], codes[at]
        elif kind == 4:
            codes[at:at] = codes[min(at, to) : min(max(at, to), min(at, to) + 30)]
        elif kind == 5 and len(codes[at]) > 1:
            changed = bytearray(codes[at])
            changed[random.randrange(1, len(changed))] = random.choice((0, 1, 2, 127, 128, 255, random.randrange(256)))
            codes[at] = bytes(changed)
        elif kind == 6:
            codes[at : min(len(codes), at + random.randint(1, 10))] = []
        if len(codes) < 2:
            break
    return b"".join(codes)


def loose_pickle(random: Random, raw: bytes) -> bytes:
    """A pickle in which bytes and fragments lie anywhere, in the middle of an argument too."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 3, 5, 8))):
        at = random.randrange(len(changed) or 1)
        kind = random.randrange(4)
        if kind == 0 and changed:
            changed[at] = random.randrange(256)
        elif kind == 1:
            del changed[at : at + random.randint(1, 4)]
        else:
            changed[at:at] = random.choice(FRAGMENTS)
    return bytes(changed)


class _Called:
    """Pickles as a call that does nothing."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    pass


def pickles_that_call() -> list[bytes]:
    """Small objects with a call among them, in every protocol."""
    values = ([1, "a", {"k": _Called()}], {"x": (1, 2, _Called()), "y": "z" * 300, "b": b"q" * 10}, [{1}, _Called(), "t" * 5])
    return [pickle.dumps(value, protocol) for value in values for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


def zip_again(raw: bytes, name_ends: str, data: bytes) -> bytes:
    """The same zip with other bytes in one record, and sums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(name_ends) else old.read(name))
    return buffer.getvalue()


TYPES = ("<f8", "<f4", "<i8", "|b1", "|O", "<U5", "|S3", "<f16", "<c16", "|V8", "<M8[s]", ">f8", "<q", "f8,f8", "", "<f8" * 50)


def npy_header(random: Random, raw: bytes) -> bytes:
    """The header of an array, its values odd or its bytes damaged, its length told rightly or not."""
    end = 10 + struct.unpack("<H", raw[8:10])[0]
    shape = tuple(random.choice((0, 1, 2, 3, 4, 8, 2**31, 2**40, 2**62, -1, 10**30)) for _ in range(random.randint(0, 4)))
    fields = {
        "descr": random.choice(TYPES) if random.random() < 0.4 else "<f8",
        "fortran_order": random.choice((True, False, 0, None)),
        "shape": shape if random.random() < 0.6 else (4, 3),
    }
    if random.random() < 0.1:
        del fields[random.choice(list(fields))]
    text = repr(fields).encode() if random.random() < 0.7 else some_bytes(random, raw[10:end])
    text = random.choice((text, text, text + b"(" * 300, b"__import__('os')", text.replace(b"}", b", 'x': 1}"))) + b"\n"
    version = random.choice((b"\x01\x00",) * 6 + (b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = struct.pack("<H", len(text) % 65536) if version == b"\x01\x00" else struct.pack("<I", len(text))
    return b"\x93NUMPY" + version + length + text + random.choice((raw[end:],) * 4 + (b"", raw[end:] * 3))
