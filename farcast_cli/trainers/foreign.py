"""What other tools write, and what farcast does not read: how it looks, what it is, and the way to something that is read.

Told by the first bytes where they tell, else by the name. Nothing here is opened beyond its first bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.formats.file_kind import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.formats.file_kind import FileKind

_AS_SAFETENSORS = "save each as step_N.safetensors with safetensors.numpy.save_file, a flat dict of arrays by name"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file or folder that is not read, and the way out."""

    what: str
    hint: str
    is_it: Callable[[Path], bool]
    is_model: bool = True
    """Whether it holds a model's weights, or may hold one, so that a person who finds nothing else should hear of it."""


def foreign_at(path: Path) -> Foreign | None:
    """What lies at a path that is no checkpoint for farcast; None where nothing tells."""
    return next((one for one in _KINDS if one.is_it(path)), None)


def _file(*, kind: FileKind | None = None, ending: str = "", name: str = "") -> Callable[[Path], bool]:
    """Files of a kind by their first bytes, or by their ending or name (regular expressions)."""
    named = re.compile(rf".*\.(?:{ending})$" if ending else f"(?:{name})$", re.IGNORECASE) if ending or name else None

    def is_it(path: Path) -> bool:
        by_name = named is not None and named.match(path.name) is not None
        return path.is_file() and (by_name or (kind is not None and kind_of(path) == kind))

    return is_it


def _folder(*names: str) -> Callable[[Path], bool]:
    """Folders that hold one of these, at their top or one level below."""
    return lambda path: path.is_dir() and any(any(path.glob(name)) or any(path.glob(f"*/{name}")) for name in names)


_KINDS = (
    Foreign(
        "orbax, JAX's checkpoints",
        f"in Python, restore each with orbax.checkpoint; {_AS_SAFETENSORS}",
        _folder("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"),
    ),
    Foreign(
        "a TensorFlow SavedModel",
        f"in Python, tf.saved_model.load each; {_AS_SAFETENSORS}",
        _folder("saved_model.pb"),
    ),
    Foreign(
        "TensorFlow's checkpoints",
        f"in Python, read each with tf.train.load_checkpoint; {_AS_SAFETENSORS}",
        _file(ending=r"index|data-\d+-of-\d+|meta"),
    ),
    Foreign(
        "Keras models",
        'in that folder: python -c "import glob, keras, safetensors.numpy as st; [st.save_file({v.path: v.numpy() for v in'
        " keras.models.load_model(f).variables}, f + '.safetensors') for f in glob.glob('*.keras')]\"",
        _file(kind="keras", ending="keras"),
    ),
    Foreign(
        "HDF5, as Keras writes it",
        "in Python, build the model; for each, model.load_weights(FILE) and safetensors.numpy.save_file({v.path: v.numpy() for v in"
        " model.variables}, 'step_N.safetensors')",
        _file(kind="hdf5", ending="h5|hdf5"),
    ),
    Foreign(
        "msgpack, as Flax writes it",
        "in Python, save each as step_N.safetensors:"
        " safetensors.flax.save_file(flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data), sep='.'), name)",
        _file(kind="msgpack", ending="msgpack"),
    ),
    Foreign("Paddle's parameters", f"in Python, paddle.load each; {_AS_SAFETENSORS}", _file(ending="pdparams|pdopt|pdmodel")),
    Foreign(
        "GGUF, for inference",
        "give the trainer's own checkpoints: these are converted, often quantised, and no trainer resumes from them",
        _file(kind="gguf", ending="gguf"),
    ),
    Foreign(
        "ONNX, for inference",
        "give the trainer's own checkpoints, or save the state_dict before the export",
        _file(ending="onnx"),
    ),
    Foreign(
        "TensorFlow Lite, for inference",
        "give the trainer's own checkpoints: no trainer resumes from these",
        _file(kind="tflite", ending="tflite"),
    ),
    Foreign("numpy's arrays", f"in Python, numpy.load each; {_AS_SAFETENSORS}", _file(kind="numpy", ending="npz|npy")),
    Foreign(
        "compressed",
        "uncompress them in place: gunzip, unzstd, unxz or bunzip2 FILE",
        _file(name=r"(?!.*\.tar\.\w+$).*\.(?:gz|zst|xz|bz2)"),
    ),
    Foreign(
        "archives",
        "unpack them, each into a folder of its own: tar -xf FILE -C FOLDER, or unzip FILE -d FOLDER; then name the folder above",
        lambda path: (
            path.is_file()
            and (kind_of(path) in {"zip", "tar", "packed"} or re.search(r"\.(?:t[gx]z|zip|zst|gz)$", path.name) is not None)
        ),
    ),
    Foreign(
        "pickles, which may run code when they are read",
        f"in Python, load those that you trust; {_AS_SAFETENSORS}",
        _file(kind="pickle", ending="pkl|pickle|joblib"),
    ),
    Foreign("pictures, sounds or documents", "", _file(kind="media"), is_model=False),
    Foreign("a database", "", _file(kind="database"), is_model=False),
)
