"""Which names a pickle may ask for, and which keys it may have. Nothing it names is ever called; this says what may be carried on to the output.

A checkpoint holds more than tensors: argparse namespaces, paths, numpy states, the user's own configuration classes.
Those are data, and are carried as they are. A function, or a class of the standard library that does things
(subprocess.Popen), is how a pickle runs code when somebody loads it: a file that names one is refused.
"""

from __future__ import annotations

import builtins
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import TYPE_CHECKING

from farcast_cli.errors import UnsafeFileError
from farcast_cli.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_KEY = 1_000  # objects that one key of a dict is made of

_PLAIN = {
    "argparse": "Namespace",
    "types": "SimpleNamespace GenericAlias",
    "_io": "BytesIO StringIO",
    "ipaddress": "IPv4Address IPv6Address IPv4Network IPv6Network",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "random": "Random",
    "array": "array _array_reconstructor",
    "functools": "partial",
    "re": "_compile RegexFlag",
    "time": "struct_time",
    "platform": "uname_result",
    "http": "HTTPStatus",
    "signal": "Signals",
    "itertools": "count",
    "collections": "OrderedDict Counter defaultdict deque ChainMap UserDict UserList UserString",
    "builtins": "set frozenset bytearray complex range slice object int float str bool list dict tuple bytes"
    " Ellipsis NotImplemented",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "typing": "Any Union Optional List Dict Tuple",
    "numpy": "ndarray dtype matrix bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
    " longdouble clongdouble intc uintc longlong ulonglong complex64 complex128 str_ bytes_ void generic datetime64"
    " timedelta64 recarray record",
    "numpy.rec": "recarray record",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
    "torch": "strided sparse_coo sparse_csr per_tensor_affine per_channel_affine per_channel_affine_float_qparams"
    " per_tensor_symmetric per_channel_symmetric contiguous_format channels_last channels_last_3d preserve_format"
    " device Size Tensor Generator quint8 qint8 qint32 quint4x2 quint2x4 complex32",
    "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
    "numpy.ma.core": "_mareconstruct",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.torch_version": "TorchVersion",
    "torch.jit._pickle": "build_intlist build_tensorlist build_doublelist build_boollist build_tensor_from_id restore_type_tag",
    "torch._C": "Generator",
    "torch._C._nn": "gelu",
    "torch.nn.functional": "relu relu6 elu selu celu leaky_relu gelu silu mish hardswish hardtanh sigmoid tanh softplus"
    " softmax log_softmax glu",
    "torch.serialization": "_get_layout",
    "deepspeed.utils.tensor_fragment": "fragment_address",
}
_NAMES = {f"{module}.{name}" for module, names in _PLAIN.items() for name in names.split()} | {
    f"builtins.{name}" for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}

_SYSTEM = sys.stdlib_module_names | {
    *("distutils", "imp", "asyncore", "asynchat", "smtpd", "binhex"),  # until Python 3.11
    *("commands", "popen2", "nt", "posix", "ntpath", "posixpath", "pip", "setuptools", "pkg_resources"),
}
_FAMILIES = re.compile(
    r"(?:posix_)?spawn\w*|exec(?:[lv]p?e?|_\w+|file)?|v?fork(?:pty|_exec)?|[pP]open\w*|run(?:_\w+)?|import_\w+"
)
_ACTIVE = {
    "starts programs": "system os_system startfile shell call check_call check_output getoutput getstatusoutput ProxyCommand",
    "runs a text": "eval eval_expr eval_str eval_repr compile runcode runsource runstring runctx runeval breakpoint",
    "imports by name": "import reload subimport dynamic_subimport load_module load_source load_dynamic SourceFileLoader",
    "unpickles": "load loads full_load unsafe_load read_pickle unpickle Unpickler from_pretrained load_from_checkpoint",
    "reaches by name": "getattr setattr delattr attrgetter methodcaller globals locals builtin_type load_type",
    "makes code": "make_function create_function fill_function make_skel_func make_skeleton_class make_skeleton_enum"
    " create_code create_type FunctionType CodeType CDLL PyDLL WinDLL InteractiveInterpreter InteractiveConsole",
    "opens, fetches or removes files": "open FileIO ZipFile TarFile NamedTemporaryFile TemporaryDirectory urlopen urlretrieve"
    " rmtree rmdir removedirs unlink copytree copyfile",
}
"""What does things under whatever module's name it can be reached: modules hand on what they import.

Underscores around a name do not count. `_FAMILIES` are the names of the first two kinds that begin alike.
"""
_RUNNERS = {name for names in _ACTIVE.values() for name in names.split()}
_QUIET = {
    "torch": (
        *("nn", "optim", "amp", "cuda.amp", "storage", "_tensor", "_subclasses", "masked", "distributions"),
        *("ao.nn", "ao.pruning.scheduler", "ao.pruning.sparsifier", "ao.quantization.fake_quantize"),
        *("ao.quantization.observer", "ao.quantization.qconfig", "ao.quantization.qconfig_mapping", "ao.quantization.stubs"),
        *("distributed.tensor", "distributed._tensor", "distributed._shard", "distributed.device_mesh"),
        *("distributed.checkpoint", "distributed.fsdp"),
        *("utils.data.dataset", "utils.data.distributed", "utils.data.sampler"),
    ),
    "numpy": ("random", "ma", "dtypes", "matrixlib"),
    **dict.fromkeys(("sympy", "jinja2", "click", "mako", "numexpr"), ()),
}
"""Where torch and numpy keep classes that are data; elsewhere they have compilers, loaders and writers of files.

The others turn a text into code, or start an editor, under names that say nothing of it.
"""
_HANDED_ON = {
    *("GraphModule", "Graph", "Node", "Tracer", "Library", "ExportedProgram", "PassBase", "Scope", "Stats", "LazyString"),
    *("ThreadPoolExecutor", "Future", "Connection", "RRef", "TCPStore", "PrefixStore", "FakeProcessGroup", "ProcessGroup"),
}
"""Classes of others that the quiet modules import: they run a text, connect to addresses, start threads or read files."""
_MODULE = re.compile(r"[\w-]+(?:\.[\w-]+)*")
GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}
"""What Python 3.11.0 to 3.11.3 pickle a member of an enum by: `getattr(Speed, "FAST")`, where others have `Speed(1)`."""
_ENUM_MODULES = {
    "uuid": "SafeUUID",
    "torch.amp.grad_scaler": "OptState",
    "torch.ao.quantization.observer": "MappingType TorchAODType ZeroPointDomain",
    "torch.distributed._shard.sharded_tensor.metadata": "MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "SerializationFormat",
    "torch.distributed.checkpoint.metadata": "_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "LoadItemType WriteItemType",
    "torch.distributed.fsdp.api": "BackwardPrefetch ShardingStrategy StateDictType",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "OptimStateKeyType",
    "torch.distributed.tensor.placement_types": "_StridedShardOffsetMode",
    "torch.nn.attention.bias": "CausalVariant",
    "torch.nn.parallel.distributed": "_BufferCommHookLocation",
    "torch.nn.utils.parametrizations": "_OrthMaps",
}
ENUMS = {(module, name) for module, names in _ENUM_MODULES.items() for name in names.split()}
"""The enums of Python and torch that a checkpoint holds; numpy has none."""


def is_data(module: str, name: str) -> bool:
    """Whether a name stands for data: on the list, one of torch's rebuilders, or a class that is not the system's."""
    module, name = _today(module, name)
    if not _MODULE.fullmatch(module) or not all(part.isidentifier() for part in name.split(".")):
        return False
    if f"{module}.{name}" in _NAMES or (module == "torch" and (name in DTYPES or name.endswith("Storage"))):
        return True
    if module == "torch._utils" and name.startswith("_rebuild_") and name.isidentifier():
        return True
    return _is_class(name) and not _is_active(module, name)


def may_be_class(module: str, name: str) -> bool:
    """Whether a name that is not written like a class's may be one of the user's own, as `v8Loss` is.

    Only what makes an object of it without arguments and without a call proves that: a function has no instances.
    """
    today, last = _today(module, name)
    is_own = not _is_known(module) and bool(_MODULE.fullmatch(today)) and last.isidentifier()
    return is_own and not _is_active(today, last)


def is_member(module: str, name: str, member: str) -> bool:
    """Whether `getattr` of a class by that name may stand for a member of an enum.

    Of Python's, torch's and numpy's own classes only those on the list are enums. Others are not told apart: any class
    that may be carried is one for all we know.
    """
    if not member.isidentifier() or member.startswith("_") or _does_things(member):
        return False
    if _is_known(module):
        return (module, name) in ENUMS
    return _is_class(name) and is_data(module, name)


def _is_known(module: str) -> bool:
    root = module.partition(".")[0]
    return root in _SYSTEM or root in _QUIET or _today(module, "")[0] != module


def runs_code(module: str, name: str) -> bool:
    """Whether a name has no business in any checkpoint; functions of the user's own modules are not told apart.

    A name in dots that leads through anything but classes (`os.system` of a module that imports os) has none either.
    What is no module's name at all cannot be loaded: the file is no pickle.
    """
    if is_data(module, name) or not _MODULE.fullmatch(module):
        return False
    module, name = _today(module, name)
    *way, last = name.split(".")
    reaches = not all(map(_is_class, way)) or (bool(way) and last.startswith("__"))
    return reaches or _is_active(module, name)


def _today(module: str, name: str) -> tuple[str, str]:
    """A name as Python 3 has it: pickle itself translates those of Python 2 (`commands`, `cPickle`, `__builtin__`)."""
    if (module, name) in NAME_MAPPING:
        return NAME_MAPPING[module, name]
    return IMPORT_MAPPING.get(module, module), name


def _is_active(module: str, name: str) -> bool:
    root, _, inner = module.partition(".")
    if root in _SYSTEM or module.startswith(("test.support", "test.libregrtest")) or any(map(_does_things, name.split("."))):
        return True
    if root not in _QUIET:
        return False
    is_quiet = any(inner == one or inner.startswith(f"{one}.") for one in _QUIET[root])
    return not is_quiet or not _is_class(name) or bool(_HANDED_ON.intersection(name.split(".")))


def _does_things(part: str) -> bool:
    bare = part.strip("_")
    return bare in _RUNNERS or bool(_FAMILIES.fullmatch(bare))


def _is_class(name: str) -> bool:
    """Whether a (nested) name is written like classes are: `Config`, `_Mode`, `Outer.Inner`."""
    return all(part.lstrip("_")[:1].isupper() for part in name.split("."))


def check_key(key: object) -> None:
    """Refuse a key whose hash takes long, or that is made to collide with others: a key is hashed time and again.

    Texts and bytes collide by chance alone, whole numbers of more than 64 bits at will.
    """
    waiting, num_objects = [key], 0
    while waiting:
        node = waiting.pop()
        inner: Iterable[object] = node if isinstance(node, (tuple, frozenset)) else ()
        num_objects += 1 + len(inner)  # type: ignore[arg-type]
        if num_objects > MAX_KEY or (isinstance(node, int) and node.bit_length() > 64):  # noqa: PLR2004
            raise UnsafeFileError("its pickle has keys that are made to take long")
        waiting.extend(inner)
