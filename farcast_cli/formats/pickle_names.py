"""Which names a pickle may ask for. Nothing it names is ever called; this says what may be carried on to the output.

A checkpoint holds more than tensors: argparse namespaces, paths, numpy states, the user's own configuration classes.
Those are data, and are carried as they are. A function, or a class of the standard library that does things
(subprocess.Popen), is how a pickle runs code when somebody loads it: a file that names one is refused.
"""

from __future__ import annotations

import sys

from farcast_cli.tensors import DTYPES

_PLAIN = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "random": "Random",
    "array": "array _array_reconstructor",
    "functools": "partial",
    "re": "_compile",
    "collections": "OrderedDict Counter defaultdict deque ChainMap UserDict UserList",
    "builtins": "set frozenset bytearray complex range slice object int float str bool list dict tuple bytes",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "typing": "Any Union Optional List Dict Tuple",
    "numpy": "ndarray dtype matrix bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
    " longdouble complex64 complex128 str_ bytes_ void generic",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
    "torch": "strided sparse_coo sparse_csr per_tensor_affine per_channel_affine per_channel_affine_float_qparams"
    " per_tensor_symmetric per_channel_symmetric contiguous_format channels_last channels_last_3d preserve_format"
    " device Size quint8 qint8 qint32 quint4x2 quint2x4 complex32",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.serialization": "_get_layout",
}
_NAMES = {f"{module}.{name}" for module, names in _PLAIN.items() for name in names.split()}
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""How protocol 2 and older spell the names of Python 3's modules."""

_ACTIVE = (
    *("torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension", "torch._inductor", "torch._dynamo"),
    *("torch.multiprocessing", "torch.distributed.rpc", "torch.distributed.elastic", "torch.testing", "torch.utils.data"),
    *("numpy.testing", "numpy.distutils", "numpy.f2py"),
)
_SYSTEM = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands", "nt", "posix", "pip", "setuptools", "pkg_resources"}
_LIBRARIES = {"torch", "numpy"}


def is_data(module: str, name: str) -> bool:
    """Whether a name stands for data: on the list, one of torch's rebuilders, or a class that is not the system's."""
    module = _OLD_MODULES.get(module, module)
    if f"{module}.{name}" in _NAMES or (module == "torch" and name in DTYPES):
        return True
    if module == "torch._utils" and name.startswith("_rebuild_") and name.isidentifier():
        return True
    return not _is_active(module) and _is_class(name)


def runs_code(module: str, name: str) -> bool:
    """Whether a name has no business in any checkpoint; functions of the user's own modules are not told apart."""
    module = _OLD_MODULES.get(module, module)
    return not is_data(module, name) and (_is_active(module) or module.partition(".")[0] in _LIBRARIES)


def _is_active(module: str) -> bool:
    return module.partition(".")[0] in _SYSTEM or any(module == one or module.startswith(f"{one}.") for one in _ACTIVE)


def _is_class(name: str) -> bool:
    """Whether a (nested) name is written like classes are: `Config`, `_Mode`, `Outer.Inner`."""
    return all(part.lstrip("_")[:1].isupper() for part in name.split("."))
