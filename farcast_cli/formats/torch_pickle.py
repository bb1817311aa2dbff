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
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from farcast_cli.errors import FarcastError, FileFormatError, UnsafeFileError
from farcast_cli.formats.pickle_names import GETATTR, check_key, is_data, is_member, may_be_class
from farcast_cli.formats.tree import MAX_NODES, children, walk
from farcast_cli.tensors import BY_STORAGE, DTYPES, DType, is_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath


MAX_DIMS = 64  # torch's own
MAX_COST = 8_000_000  # see _Budget
COST_PER_RECORD = 128  # a tensor in an optimiser's state takes some 90
UNTYPED = DType("untyped", 1)
_QUANTISED = {"QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
_STORAGES = BY_STORAGE | {
    name: DType(name.removesuffix("Storage").lower(), size, "", name) for name, size in _QUANTISED.items()
}
_PARAMETER_ARGS = 3
_COSTS = {code[0]: 16 for code in (pickle.EMPTY_SET, pickle.FROZENSET, pickle.REDUCE, pickle.NEWOBJ)} | {
    code[0]: 4
    for code in (
        *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.LIST, pickle.DICT, pickle.MARK),
        *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    )
}
"""What opcodes take beside one object's 16 to 60 bytes."""
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
    attributes: dict[str, Any] | None = field(default=None, compare=False)
    """Python attributes that somebody gave it: plain values."""


@dataclass(eq=False, repr=False, slots=True)
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

    def __repr__(self) -> str:
        """Short, whatever it holds."""
        return f"<{self.maker}>"

    def __iter__(self) -> Iterator[object]:
        """All that it holds."""
        yield from self.args
        yield from self.items
        for pair in self.pairs:
            yield from pair
        yield from self.states


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an enum by its name, as Python 3.11.0 to 3.11.3 pickle it: `getattr(Speed, "FAST")`, never called."""

    maker: Name
    args: tuple[Name, str]


@dataclass(frozen=True, slots=True)
class _Getattr:
    """`getattr` itself, which no tree may hold."""

    name: Name


@dataclass(frozen=True, slots=True)
class _Unproven:
    """A name that may be a class, which only making an object of it shows; no tree may hold it."""

    name: Name


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


def iter_tensors(tree: object) -> Iterator[tuple[TreePath, TensorRef]]:
    """Every tensor of a tree's dicts, lists and tuples with the keys that lead to it, in order.

    Raises:
        UnsafeFileError: nested too deep, or one object held so often that a walk would not end.
    """
    for path, node in walk(tree, below=in_collection):
        if isinstance(node, TensorRef):
            yield path, node


def iter_storages(tree: object) -> Iterator[TensorRef | StorageRef]:
    """Every tensor and every bare storage of a tree, those that carried objects hold among them."""
    for _, node in walk(tree, below=_inside):
        if isinstance(node, (TensorRef, StorageRef)):
            yield node


def iter_carried(tree: object) -> Iterator[tuple[TreePath, Made]]:
    """The objects that are carried unread, with the keys that lead to them."""
    for path, node in walk(tree, below=in_collection):
        if isinstance(node, Made):
            yield path, node


def in_collection(node: object) -> Iterable[tuple[Any, Any]] | None:
    """What a dict, a list or a tuple holds."""
    return enumerate(node) if isinstance(node, tuple) else children(node)


def _inside(node: object) -> Iterable[tuple[Any, Any]] | None:
    """What anything holds: carried objects too, sets, the keys of a dict and its attributes."""
    if isinstance(node, dict):
        return _in_dict(node)
    return enumerate(node) if isinstance(node, (list, tuple, set, frozenset, Made)) else None


def _in_dict(node: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    yield from node.items()
    yield from ((key, key) for key in node if not isinstance(key, (str, int)))
    yield from (("__dict__", value) for value in getattr(node, "__dict__", {}).values())


def is_streamable(ref: TensorRef) -> bool:
    """Whether the tensor's elements are one gapless stretch of its storage."""
    return is_dense(ref.shape, ref.stride)


# --- reading ---------------------------------------------------------------------------------------------------------


def _member(maker: Name, args: object) -> Member:
    match args:
        case (Name() as kind, str(name)) if isinstance(args, tuple) and is_member(kind.module, kind.name, name):
            return Member(maker, args)
    raise UnsafeFileError(f"its pickle asks for {maker}")


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        raise UnsafeFileError(f"a tensor's shape or stride is not of at most {MAX_DIMS} whole numbers")
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


def _rebuild_from_type(*args: Any) -> TensorRef | Made:
    """A tensor with attributes is that tensor; one of a subclass is carried."""
    match args:
        case (Name(name="_rebuild_tensor_v2"), Name(module="torch", name="Tensor"), tuple(inner), dict(state)):
            ref = _rebuild_tensor_v2(*inner)
            if isinstance(ref, TensorRef) and all(isinstance(value, (str, int, float)) for value in state.values()):
                return replace(ref, attributes=state)
    return Made(_name("torch._tensor", "_rebuild_from_type_v2"), args)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Protocol 2 spells bytes as `_codecs.encode(text, 'latin1')`."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError("bytes in an encoding other than latin1")
    return codecs.latin_1_encode(text)[0]


def _size(*args: Any) -> Size:
    return Size(_counts(args[0] if args else ()))


def _default_dict(factory: object = None) -> DefaultDict:
    made = DefaultDict()
    made.factory = factory
    return made


def _ordered_dict(pairs: object = ()) -> OrderedDict[Any, Any]:
    for pair in _listed(pairs):
        check_key(pair[0] if isinstance(pair, (list, tuple)) and pair else pair)
    return OrderedDict(pairs)  # type: ignore[call-overload, no-any-return]


def _counter(counts: object = ()) -> Counter[Any]:
    return Counter(counts if isinstance(counts, dict) else _with_checked_keys(counts))


def _set(items: object = ()) -> set[Any]:
    return set(_with_checked_keys(items))


def _frozen_set(items: object = ()) -> frozenset[Any]:
    return frozenset(_with_checked_keys(items))


def _listed(items: object) -> Iterable[Any]:
    if not isinstance(items, (list, tuple, dict, set, frozenset)):
        raise UnsafeFileError("a collection that is made of no list")
    return items


def _with_checked_keys(items: object) -> Iterable[Any]:
    for item in _listed(items):
        check_key(item)
        yield item


_SAFE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _frozen_set,
    "__builtin__.frozenset": _frozen_set,
}
"""Calls that make plain data, or a stand-in of ours, from checked arguments."""
_BANNED = {
    *(pickle.OBJ, pickle.INST, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
}
"""Opcodes that torch.save never writes: other ways to make objects, and buffers that are not in the file."""


class _Budget(dict[int, "Callable[[Any], None]"]):
    """The opcodes of one unpickler. Each look-up is one that is run, and is paid for.

    A pickle of a few MB could else ask for GBs: an empty set is one byte of it, and takes 216 of memory.
    """

    def __init__(self, table: dict[int, Callable[[Any], None]], budget: int) -> None:
        super().__init__(table)
        self._left = budget

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= _COSTS.get(code, 1)
        if self._left < 0:
            raise UnsafeFileError("its pickle makes far more objects than its tensors need")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):  # noqa: SLF001
    """Python's own unpickler in Python: its memo is a dict, so a huge memo index allocates nothing.

    It makes nothing but plain data and stand-ins.
    """

    stack: list[Any]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    def __init__(self, stream: io.BytesIO, *, num_records: int) -> None:
        super().__init__(stream, encoding="utf-8")
        self.dispatch = _Budget(type(self).dispatch, MAX_COST + COST_PER_RECORD * num_records)  # type: ignore[misc]
        self._storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Name | _Getattr | _Unproven:
        if (module, name) in GETATTR:
            return _Getattr(Name(module, name))
        if not is_data(module, name) and may_be_class(module, name):
            return _Unproven(Name(module, name))
        if not is_data(module, name):
            raise UnsafeFileError(f"its pickle asks for {module}.{name}")
        return Name(module, name)

    def load_reduce(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if isinstance(maker, _Getattr):
            self.stack.append(_member(maker.name, args))
            return
        if isinstance(maker, _Unproven):
            raise UnsafeFileError(f"its pickle asks for {maker.name}")
        if not isinstance(maker, Name) or not isinstance(args, tuple):
            raise UnsafeFileError("its pickle calls what is no name")
        known = _SAFE.get(str(maker))
        self.stack.append(known(*args) if known else Made(maker, args))

    def load_newobj(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if isinstance(maker, _Unproven) and args == ():
            maker = maker.name
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

    def load_keyed(self, load: Callable[[Any], None], *, step: int) -> None:
        """Put keys, or keys and values, into what hashes them."""
        keys = self.stack[-2:-1] if load is _SET_ITEM else self.stack[::step]
        for key in keys:
            if type(key) is not str:
                check_key(key)
        load(self)

    def persistent_load(self, pid: object) -> StorageRef:
        match pid:
            case ("storage", Name() as kind, str(key), str(location), int(size)) if size >= 0:
                untyped = str(kind) == "torch.storage.UntypedStorage"
                dtype = UNTYPED if untyped else _STORAGES.get(kind.name)
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
_SET_ITEM = _Unpickler.dispatch[pickle.SETITEM[0]]
for _code, _step in (
    *((code, 2) for code in (pickle.SETITEM, pickle.SETITEMS, pickle.DICT)),
    *((code, 1) for code in (pickle.ADDITEMS, pickle.FROZENSET)),
):
    _Unpickler.dispatch[_code[0]] = partial(_Unpickler.load_keyed, load=_Unpickler.dispatch[_code[0]], step=_step)


def decode_pickle(path: Path, raw: bytes, *, num_records: int = 0) -> object:
    """The tree of a pickle that was read from `path`; `num_records` tensors may belong to it.

    The tree is small enough to be walked, shown and copied.

    Raises:
        UnsafeFileError: it names something that is no data, or is made to exhaust its reader.
        FileFormatError: it is damaged.
    """
    try:
        tree: object = _Unpickler(io.BytesIO(raw), num_records=num_records).load()
        _check(tree, most=MAX_NODES + COST_PER_RECORD * num_records)
    except UnsafeFileError as error:
        raise unsafe(path, error) from error
    except FarcastError:
        raise
    except Exception as error:  # a damaged pickle raises anything at all; none of it is ours
        raise FileFormatError(
            f"{path}: its pickle cannot be read: {type(error).__name__}: {error}",
            hint="the file is damaged or incomplete: save or download it again",
        ) from error
    return tree


def _check(tree: object, *, most: int) -> None:
    for _, node in walk(tree, below=_inside, most=most):
        if isinstance(node, (_Getattr, _Unproven)):
            raise UnsafeFileError(f"its pickle asks for {node.name}")


def unsafe(path: Path, error: UnsafeFileError) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path}: {error}, which farcast does not run",
        hint="save plain data only (tensors, numbers, strings, lists, dicts), or move the file out of this folder",
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
        name = _name("torch.storage", "UntypedStorage") if storage.dtype == UNTYPED else _name("torch", storage.dtype.storage)
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

    def save_member(self, member: Member) -> None:
        self._save_call(member, member.maker, member.args, pickle.REDUCE)

    def save_tensor(self, ref: TensorRef) -> None:
        grad = ref.requires_grad and not ref.is_parameter
        args: tuple[Any, ...] = (ref.storage, ref.offset, ref.shape, ref.stride, grad, OrderedDict())
        kind = "_rebuild_tensor_v2"
        if ref.storage.dtype == UNTYPED:
            kind, args = "_rebuild_tensor_v3", (*args, _name("torch", ref.dtype.name))
        if ref.is_parameter:
            args = (Made(_name("torch._utils", kind), args), ref.requires_grad, OrderedDict())
            kind = "_rebuild_parameter"
        maker = _name("torch._utils", kind)
        if ref.attributes is not None:
            args = (maker, _name("torch", "Tensor"), args, ref.attributes)
            maker = _name("torch._tensor", "_rebuild_from_type_v2")
        self._save_call(ref, maker, args, pickle.REDUCE)

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
        Member: _Pickler.save_member,
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
