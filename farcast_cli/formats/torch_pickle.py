"""The pickle inside a torch file: read into inert stand-ins, and written back from them.

Nothing in it runs: an unpickler with a fixed list of harmless names makes plain data, and a `TensorRef` where a tensor
would be. The same tree, edited, is pickled again under torch's own names. Reading needs no torch.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from farcast_cli.errors import FarcastError, FileFormatError, UnsafeFileError
from farcast_cli.tensors import BY_STORAGE, DTYPES, DType, is_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


MAX_DEPTH = 64
MAX_OBJECTS = 4_000_000
_UNTYPED = DType("untyped", 1)
_PARAMETER_ARGS = 3


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One storage record: `size` counts elements of `dtype` (bytes where it is untyped)."""

    key: str
    dtype: DType
    location: str
    size: int

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a torch file, not loaded: a view of a storage; offset and stride count elements."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    is_parameter: bool = False


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle refers to and that stands for itself: a storage class or an element type."""

    module: str
    name: str
    dtype: DType


def iter_tensors(tree: object) -> Iterator[tuple[tuple[Any, ...], TensorRef]]:
    """Every tensor of a tree with the keys that lead to it, in order.

    Raises:
        UnsafeFileError: nested too deep, or one object held so often that a walk would not end.
    """
    waiting: list[tuple[tuple[Any, ...], object]] = [((), tree)]
    num_visits = 0
    while waiting:
        path, node = waiting.pop()
        num_visits += 1
        if len(path) > MAX_DEPTH or num_visits > MAX_OBJECTS:
            raise UnsafeFileError(f"its objects are nested more than {MAX_DEPTH} deep, or more than {MAX_OBJECTS}")
        if isinstance(node, TensorRef):
            yield path, node
        elif isinstance(node, dict):
            waiting.extend(((*path, key), value) for key, value in reversed(node.items()))
        elif isinstance(node, (list, tuple)):
            waiting.extend(((*path, index), node[index]) for index in reversed(range(len(node))))


def encode_pickle(tree: object) -> bytes:
    """The pickle of a tree, as torch.save would write it (protocol 2)."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_with_torch_names(tree))
    return buffer.getvalue()


def is_streamable(ref: TensorRef) -> bool:
    """Whether the tensor's elements are one gapless stretch of its storage."""
    return is_dense(ref.shape, ref.stride)


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        raise UnsafeFileError(f"a tensor's shape or stride is {value!r}")
    return value


def _rebuild_tensor_v2(*args: Any) -> TensorRef:
    storage, offset, shape, stride, requires_grad = args[:5]
    if not isinstance(storage, StorageRef) or not isinstance(offset, int):
        raise UnsafeFileError("a tensor without a storage")
    shape, stride = _counts(shape), _counts(stride)
    if len(shape) != len(stride):
        raise UnsafeFileError(f"a tensor of shape {shape} has stride {stride}")
    return TensorRef(storage, storage.dtype, offset, shape, stride, bool(requires_grad))


def _rebuild_tensor_v3(*args: Any) -> TensorRef:
    ref = _rebuild_tensor_v2(*args[:5])
    if len(args) <= 6 or not isinstance(args[6], Name):  # noqa: PLR2004 - storage, offset, 2 shapes, grad, hooks, dtype
        raise UnsafeFileError("a tensor without a dtype")
    return TensorRef(ref.storage, args[6].dtype, ref.offset, ref.shape, ref.stride, ref.requires_grad)


def _rebuild_parameter(*args: Any) -> TensorRef:
    if len(args) != _PARAMETER_ARGS or not isinstance(args[0], TensorRef):
        raise UnsafeFileError("a parameter without a tensor")
    ref = args[0]
    return TensorRef(ref.storage, ref.dtype, ref.offset, ref.shape, ref.stride, bool(args[1]), is_parameter=True)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Protocol 2 spells bytes as `_codecs.encode(text, 'latin1')`."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError(f"bytes encoded as {encoding!r}")
    return codecs.latin_1_encode(text)[0]


@dataclass(frozen=True, slots=True)
class Device:
    """A torch.device of a payload, by the arguments that make it."""

    args: tuple[str | int, ...]


def _device(*args: Any) -> Device:
    if not all(isinstance(arg, (str, int)) for arg in args):
        raise UnsafeFileError(f"a device made of {args!r}")
    return Device(args)


class Size(tuple):  # type: ignore[type-arg]
    """A torch.Size of a payload; kept apart from a tuple so that it is written back as what it was."""

    __slots__ = ()


def _size(*args: Any) -> Size:
    return Size(_counts(args[0] if args else ()))


_SAFE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "_codecs.encode": _encode,
    "builtins.set": set,
    "__builtin__.set": set,
}


_BANNED = {
    *(pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
}
"""Opcodes that torch.save never writes: other ways to make objects, and buffers of a size that is only claimed."""


class _Unpickler(pickle._Unpickler):  # noqa: SLF001
    """Python's own unpickler in Python: its memo is a dict, so a huge memo index allocates nothing.

    It makes nothing but plain data and stand-ins, sets attributes on nothing but an OrderedDict, and nests tuples no
    deeper than a hash of them can follow.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")
        self._storages: dict[str, StorageRef] = {}
        self._depths: dict[int, int] = {}

    def load_build(self) -> None:
        """Set the attributes of a state dict, such as its `_metadata`."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not OrderedDict or not isinstance(state, dict) or not state.keys() <= {"_metadata"}:
            raise UnsafeFileError("its pickle sets attributes of an object")
        target.__dict__.update(state)

    def load_any_tuple(self, load: Callable[[Any], None]) -> None:
        """Make a tuple, unless it is nested too deep."""
        load(self)
        made = self.stack[-1]
        depth = 1 + max((self._depths.get(id(item), 0) for item in made if isinstance(item, tuple)), default=0)
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"its pickle nests tuples more than {MAX_DEPTH} deep")
        self._depths[id(made)] = depth

    def find_class(self, module: str, name: str) -> object:
        found = _SAFE.get(f"{module}.{name}")
        if found is not None:
            return found
        if module == "torch" and name in BY_STORAGE:
            return Name(module, name, BY_STORAGE[name])
        if module == "torch" and name in DTYPES:
            return Name(module, name, DTYPES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return Name(module, name, _UNTYPED)
        raise UnsafeFileError(f"its pickle asks for {module}.{name}")

    def persistent_load(self, pid: object) -> StorageRef:
        match pid:
            case ("storage", Name(dtype=dtype), str(key), str(location), int(size)) if size >= 0:
                made = StorageRef(key, dtype, location, size)
                return self._storages.setdefault(key, made)
        raise UnsafeFileError("its pickle refers to something that is not a storage")


def _refuse_opcode(_: _Unpickler) -> None:
    raise UnsafeFileError("its pickle uses an opcode that torch.save never writes")


@dataclass(frozen=True, slots=True)
class _Call:
    """What a pickle should call: a stand-in that the pickler turns into `function(*args)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = field(default=())


class _Pickler(pickle.Pickler):
    """Writes stand-ins back as the torch calls that they were read from."""

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        import torch

        if not isinstance(obj, StorageRef):
            return None
        kind = torch.UntypedStorage if obj.dtype == _UNTYPED else getattr(torch, obj.dtype.storage)
        return ("storage", kind, obj.key, obj.location, obj.size)

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, TensorRef):
            call = _tensor_call(obj)
            return call.function, call.args
        if isinstance(obj, _Call):
            return obj.function, obj.args
        if isinstance(obj, Size):
            import torch

            return torch.Size, (tuple(obj),)
        return NotImplemented


def _with_torch_names(tree: Any) -> Any:
    """The tree with torch's own element types in place of their names; containers are edited in place."""
    if isinstance(tree, Name):
        import torch

        return getattr(torch, tree.name)
    if isinstance(tree, Device):
        import torch

        return torch.device(*tree.args)
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _with_torch_names(value)
    elif isinstance(tree, list):
        tree[:] = [_with_torch_names(value) for value in tree]
    elif type(tree) is tuple:
        return tuple(_with_torch_names(value) for value in tree)
    return tree


def _tensor_call(ref: TensorRef) -> _Call:
    import torch

    args = (ref.storage, ref.offset, ref.shape, ref.stride)
    grad = ref.requires_grad and not ref.is_parameter
    if ref.storage.dtype == _UNTYPED:
        tensor = _Call(
            torch._utils._rebuild_tensor_v3,  # noqa: SLF001 - the names that torch.save writes
            (*args, grad, OrderedDict(), getattr(torch, ref.dtype.name)),
        )
    else:
        tensor = _Call(torch._utils._rebuild_tensor_v2, (*args, grad, OrderedDict()))  # noqa: SLF001
    if not ref.is_parameter:
        return tensor
    return _Call(torch._utils._rebuild_parameter, (tensor, ref.requires_grad, OrderedDict()))  # noqa: SLF001


_Unpickler.dispatch.update(dict.fromkeys((code[0] for code in _BANNED), _refuse_opcode))
_Unpickler.dispatch[pickle.BUILD[0]] = _Unpickler.load_build
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = partial(_Unpickler.load_any_tuple, load=_Unpickler.dispatch[_code[0]])


def decode_pickle(path: Path, raw: bytes) -> object:
    """The tree of a pickle that was read from `path`.

    Raises:
        UnsafeFileError: it names something outside of the list, or is made to exhaust its reader.
        FileFormatError: it is damaged.
    """
    try:
        return _Unpickler(raw).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path}: {error}, which farcast does not run",
            hint="save plain data only (tensors, numbers, strings, lists, dicts), or keep the file out of this folder",
        ) from error
    except FarcastError:
        raise
    except Exception as error:  # a damaged pickle raises anything at all; none of it is ours
        raise FileFormatError(
            f"{path}: its pickle cannot be read: {type(error).__name__}: {error}",
            hint="the file is damaged or half-written: save or download it again",
        ) from error
