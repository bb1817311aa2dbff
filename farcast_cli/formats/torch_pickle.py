"""The pickle inside a torch file: read into inert stand-ins, and written back from them.

Nothing in it runs: an unpickler makes plain data, a `TensorRef` where a tensor would be, and a `Made` for every other
object, which holds the name of its class and what it was to be made of. pickle_names.py says which names are carried.
The same tree, edited, is pickled again under the same names. Needs no torch.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from farcast_cli.errors import FarcastError, FileFormatError, UnsafeFileError
from farcast_cli.formats.pickle_names import is_data, runs_code
from farcast_cli.tensors import BY_STORAGE, DTYPES, DType, is_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path


MAX_DEPTH = 64
MAX_OBJECTS = 4_000_000
_UNTYPED = DType("untyped", 1)
_QUANTISED = {"QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
_STORAGES = BY_STORAGE | {
    name: DType(name.removesuffix("Storage").lower(), size, "", name) for name, size in _QUANTISED.items()
}
_PARAMETER_ARGS = 3
_MAX_PICKLES = 8  # one behind the other in a file, as torch before 1.6 wrote them
_TENSOR_ARGS = 6  # storage, offset, shape, stride, requires_grad, hooks; a seventh says that the values are conjugated


# --- stand-ins -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle refers to: a class, a function, an element type. It stands for itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


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


@dataclass(eq=False, slots=True)
class Made:
    """An object that is carried and never made: what its pickle says of it, to be said again."""

    maker: Name
    args: tuple[Any, ...]
    how: Literal["call", "new"] = "call"
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    def append(self, item: object) -> None:
        self.items.append(item)

    add = append

    def extend(self, items: Iterable[object]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.pairs.append((key, value))

    def __iter__(self) -> Iterator[object]:
        """All that it holds."""
        yield from self.args
        yield from self.items
        for pair in self.pairs:
            yield from pair
        yield from self.states


class Size(tuple):  # type: ignore[type-arg]
    """A torch.Size of a payload; kept apart from a tuple so that it is written back as what it was."""

    __slots__ = ()


class DefaultDict(dict[Any, Any]):
    """A collections.defaultdict of a payload, which makes nothing by default."""

    factory: Any = None


@cache
def _name(module: str, name: str) -> Name:
    """One object for all uses of a name, which a pickle then spells out only once."""
    return Name(module, name)


# --- walking ---------------------------------------------------------------------------------------------------------


def iter_tensors(tree: object) -> Iterator[tuple[tuple[Any, ...], TensorRef]]:
    """Every tensor of a tree's dicts, lists and tuples with the keys that lead to it, in order.

    Raises:
        UnsafeFileError: nested too deep, or one object held so often that a walk would not end.
    """
    for path, node in _walk(tree, opaque=True):
        if isinstance(node, TensorRef):
            yield path, node


def iter_storages(tree: object) -> Iterator[TensorRef | StorageRef]:
    """Every tensor and every bare storage of a tree, those that carried objects hold among them."""
    for _, node in _walk(tree, opaque=False):
        if isinstance(node, (TensorRef, StorageRef)):
            yield node


def iter_carried(tree: object) -> Iterator[tuple[tuple[Any, ...], Made]]:
    """The objects that are carried unread, with the keys that lead to them."""
    for path, node in _walk(tree, opaque=True):
        if isinstance(node, Made):
            yield path, node


def _walk(tree: object, *, opaque: bool) -> Iterator[tuple[tuple[Any, ...], object]]:
    """Every node of a tree; not into carried objects where those are opaque."""
    waiting: list[tuple[tuple[Any, ...], object]] = [((), tree)]
    num_visits = 0
    while waiting:
        path, node = waiting.pop()
        num_visits += 1
        if len(path) > MAX_DEPTH or num_visits > MAX_OBJECTS:
            raise UnsafeFileError(f"its objects are nested more than {MAX_DEPTH} deep, or more than {MAX_OBJECTS}")
        yield path, node
        if isinstance(node, dict):
            waiting.extend(((*path, key), value) for key, value in reversed(node.items()))
            if not opaque and getattr(node, "__dict__", None):
                waiting.append(((*path, "__dict__"), node.__dict__))
        elif isinstance(node, (list, tuple)):
            waiting.extend(((*path, index), node[index]) for index in reversed(range(len(node))))
        elif isinstance(node, Made) and not opaque:
            waiting.extend(((*path, index), child) for index, child in enumerate(node))


def is_streamable(ref: TensorRef) -> bool:
    """Whether the tensor's elements are one gapless stretch of its storage."""
    return is_dense(ref.shape, ref.stride)


# --- reading ---------------------------------------------------------------------------------------------------------


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        raise UnsafeFileError(f"a tensor's shape or stride is {value!r}")
    return value


def _rebuild_tensor(*args: Any) -> TensorRef:
    storage, offset, shape, stride, requires_grad = args[:5]
    if not isinstance(storage, StorageRef) or not isinstance(offset, int):
        raise UnsafeFileError("a tensor without a storage")
    shape, stride = _counts(shape), _counts(stride)
    if len(shape) != len(stride):
        raise UnsafeFileError(f"a tensor of shape {shape} has stride {stride}")
    return TensorRef(storage, storage.dtype, offset, shape, stride, bool(requires_grad))


def _rebuild_tensor_v2(*args: Any) -> TensorRef | Made:
    if len(args) > _TENSOR_ARGS:
        return Made(Name("torch._utils", "_rebuild_tensor_v2"), args)
    return _rebuild_tensor(*args)


def _rebuild_tensor_v3(*args: Any) -> TensorRef | Made:
    if len(args) <= _TENSOR_ARGS or not isinstance(args[_TENSOR_ARGS], Name) or args[_TENSOR_ARGS].name not in DTYPES:
        raise UnsafeFileError("a tensor without a dtype")
    if len(args) > _TENSOR_ARGS + 1:
        return Made(Name("torch._utils", "_rebuild_tensor_v3"), args)
    ref = _rebuild_tensor(*args[:5])
    return TensorRef(ref.storage, DTYPES[args[_TENSOR_ARGS].name], ref.offset, ref.shape, ref.stride, ref.requires_grad)


def _rebuild_parameter(*args: Any) -> TensorRef | Made:
    if len(args) != _PARAMETER_ARGS or not isinstance(args[0], TensorRef):
        return Made(Name("torch._utils", "_rebuild_parameter"), args)
    ref = args[0]
    return TensorRef(ref.storage, ref.dtype, ref.offset, ref.shape, ref.stride, bool(args[1]), is_parameter=True)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Protocol 2 spells bytes as `_codecs.encode(text, 'latin1')`."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError(f"bytes encoded as {encoding!r}")
    return codecs.latin_1_encode(text)[0]


def _size(*args: Any) -> Size:
    return Size(_counts(args[0] if args else ()))


def _default_dict(*args: Any) -> DefaultDict:
    made = DefaultDict()
    made.factory = args[0] if args else None
    return made


_SAFE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
}
"""Calls that make plain data, or a stand-in of ours, from checked arguments."""

_BANNED = {
    *(pickle.OBJ, pickle.INST, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
}
"""Opcodes that torch.save never writes: other ways to make objects, and buffers that are not in the file."""


class _Unpickler(pickle._Unpickler):  # noqa: SLF001
    """Python's own unpickler in Python: its memo is a dict, so a huge memo index allocates nothing.

    It makes nothing but plain data and stand-ins, and nests tuples no deeper than a hash of them can follow.
    """

    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, stream: io.BytesIO, *, refuses: Callable[[str, str], bool]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._refuses = refuses
        self._storages: dict[str, StorageRef] = {}
        self._depths: dict[int, int] = {}

    def find_class(self, module: str, name: str) -> Name:
        if self._refuses(module, name):
            raise UnsafeFileError(f"its pickle asks for {module}.{name}")
        return Name(module, name)

    def load_reduce(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Name) or not isinstance(args, tuple):
            raise UnsafeFileError("its pickle calls what is no name")
        known = _SAFE.get(str(maker))
        self.stack.append(known(*args) if known else Made(maker, args))

    def load_newobj(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Name) or not isinstance(args, tuple):
            raise UnsafeFileError("its pickle makes an object of what is no class")
        self.stack.append(Made(maker, args, "new"))

    def load_build(self) -> None:
        """Set the attributes of a carried object, or of a state dict (its `_metadata`)."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Made):
            target.states.append(state)
        elif type(target) is OrderedDict and isinstance(state, dict) and state.keys() <= {"_metadata"}:
            target.__dict__.update(state)
        else:
            raise UnsafeFileError("its pickle sets attributes of an object")

    def load_bytearray8(self) -> None:
        """Read bytes that are there; Python's own takes the memory that is claimed before it looks."""
        size = int.from_bytes(self.read(8), "little")
        data = bytearray(self.read(size))
        if len(data) != size:
            raise UnsafeFileError("its pickle claims more bytes than it has")
        self.append(data)

    def load_any_tuple(self, load: Callable[[Any], None]) -> None:
        """Make a tuple, unless it is nested too deep."""
        load(self)
        made = self.stack[-1]
        depth = 1 + max((self._depths.get(id(item), 0) for item in made if isinstance(item, tuple)), default=0)
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"its pickle nests tuples more than {MAX_DEPTH} deep")
        self._depths[id(made)] = depth

    def persistent_load(self, pid: object) -> StorageRef:
        match pid:
            case ("storage", Name() as kind, str(key), str(location), int(size)) if size >= 0:
                untyped = str(kind) == "torch.storage.UntypedStorage"
                dtype = _UNTYPED if untyped else _STORAGES.get(kind.name)
                if dtype is not None and kind.module in {"torch", "torch.storage"}:
                    return self._storages.setdefault(key, StorageRef(key, dtype, location, size))
        raise UnsafeFileError("its pickle refers to something that is not a storage")


def _refuse_opcode(unpickler: _Unpickler, *, named: bool = False) -> None:
    if named:  # say what it asks for, where that is the worse of the two
        unpickler.find_class(*(unpickler.readline()[:-1].decode("ascii", "replace") for _ in range(2)))  # type: ignore[attr-defined]
    raise UnsafeFileError("its pickle uses an opcode that torch.save never writes")


_Unpickler.dispatch.update(dict.fromkeys((code[0] for code in _BANNED), _refuse_opcode))
_Unpickler.dispatch[pickle.INST[0]] = partial(_refuse_opcode, named=True)
_Unpickler.dispatch[pickle.REDUCE[0]] = _Unpickler.load_reduce
_Unpickler.dispatch[pickle.NEWOBJ[0]] = _Unpickler.load_newobj
_Unpickler.dispatch[pickle.BYTEARRAY8[0]] = _Unpickler.load_bytearray8
_Unpickler.dispatch[pickle.BUILD[0]] = _Unpickler.load_build
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = partial(_Unpickler.load_any_tuple, load=_Unpickler.dispatch[_code[0]])


def decode_pickle(path: Path, raw: bytes) -> object:
    """The tree of a pickle that was read from `path`.

    Raises:
        UnsafeFileError: it names something that is no data, or is made to exhaust its reader.
        FileFormatError: it is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(raw), refuses=lambda module, name: not is_data(module, name)).load()
    except UnsafeFileError as error:
        raise unsafe(path, error) from error
    except FarcastError:
        raise
    except Exception as error:  # a damaged pickle raises anything at all; none of it is ours
        raise FileFormatError(
            f"{path}: its pickle cannot be read: {type(error).__name__}: {error}",
            hint="the file is damaged or half-written: save or download it again",
        ) from error


def refuse_code(path: Path, raw: bytes) -> None:
    """Refuse a pickle that would run code where it is loaded; one that cannot be followed is no concern of ours.

    Raises:
        UnsafeFileError: it names a function of the system's or of torch's.
    """
    stream = io.BytesIO(raw)
    try:
        for _ in range(_MAX_PICKLES):
            _Unpickler(stream, refuses=runs_code).load()
    except UnsafeFileError as error:
        if "asks for" in str(error):
            raise unsafe(path, error) from error
    except Exception:  # noqa: BLE001, S110 - not ours to read: it is copied as it is
        pass


def unsafe(path: Path, error: UnsafeFileError) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path}: {error}, which farcast does not run",
        hint="save plain data only (tensors, numbers, strings, lists, dicts), or keep the file out of this folder",
    )


# --- writing ---------------------------------------------------------------------------------------------------------


class _Pickler(pickle._Pickler):  # noqa: SLF001
    """Python's own pickler in Python: it can write names of what is not here to be imported."""

    dispatch: ClassVar[dict[type, Callable[[Any, Any], None]]] = dict(pickle._Pickler.dispatch)  # noqa: SLF001
    write: Callable[[bytes], int]
    save: Callable[[object], None]
    memoize: Callable[[object], None]

    def __init__(self, file: io.BytesIO, storages: Mapping[str, StorageRef]) -> None:
        super().__init__(file, protocol=2)
        self._storages = storages

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        if not isinstance(obj, StorageRef):
            return None
        storage = self._storages.get(obj.key, obj)
        name = _name("torch.storage", "UntypedStorage") if storage.dtype == _UNTYPED else _name("torch", storage.dtype.storage)
        return ("storage", name, storage.key, storage.location, storage.size)

    def save_name(self, name: Name) -> None:
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())
        self.memoize(name)

    def save_made(self, made: Made) -> None:
        self._save_call(made, made.maker, made.args, pickle.REDUCE if made.how == "call" else pickle.NEWOBJ)
        for item in made.items:
            self.save(item)
            self.write(pickle.APPEND)
        self._save_pairs(made.pairs)
        for state in made.states:
            self.save(state)
            self.write(pickle.BUILD)

    def save_tensor(self, ref: TensorRef) -> None:
        grad = ref.requires_grad and not ref.is_parameter
        args: tuple[Any, ...] = (ref.storage, ref.offset, ref.shape, ref.stride, grad, OrderedDict())
        kind = "_rebuild_tensor_v2"
        if ref.storage.dtype == _UNTYPED:
            kind, args = "_rebuild_tensor_v3", (*args, _name("torch", ref.dtype.name))
        if ref.is_parameter:
            args = (Made(_name("torch._utils", kind), args), ref.requires_grad, OrderedDict())
            kind = "_rebuild_parameter"
        self._save_call(ref, _name("torch._utils", kind), args, pickle.REDUCE)

    def save_size(self, size: Size) -> None:
        self._save_call(size, _name("torch", "Size"), (tuple(size),), pickle.REDUCE)

    def save_default_dict(self, made: DefaultDict) -> None:
        self._save_call(made, _name("collections", "defaultdict"), (made.factory,), pickle.REDUCE)
        self._save_pairs(made.items())

    def _save_call(self, obj: object, maker: Name, args: tuple[Any, ...], opcode: bytes) -> None:
        self.save(maker)
        self.save(args)
        self.write(opcode)
        self.memoize(obj)

    def _save_pairs(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            self.save(key)
            self.save(value)
            self.write(pickle.SETITEM)


_Pickler.dispatch.update(
    {
        Name: _Pickler.save_name,
        Made: _Pickler.save_made,
        TensorRef: _Pickler.save_tensor,
        Size: _Pickler.save_size,
        DefaultDict: _Pickler.save_default_dict,
    }
)


def encode_pickle(tree: object, storages: Mapping[str, StorageRef] | None = None) -> bytes:
    """The pickle of a tree, as torch.save would write it (protocol 2).

    Args:
        storages: by key, what storages have become (another element type) where they are not as the tree has them.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, storages or {}).dump(tree)
    return buffer.getvalue()
