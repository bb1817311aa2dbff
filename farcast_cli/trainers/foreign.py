"""What other tools write, and what farcast does not read: how it looks, what it is, and the way to something that is read.

Told by the first bytes where they tell, else by the name. Nothing here is opened beyond its first bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.formats.file_kind import kind_of

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.formats.file_kind import FileKind

_AS_SAFETENSORS = "save each as step_N.safetensors with safetensors.numpy.save_file, a flat dict of arrays by name"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file or folder that is not read, how it is told, and the way out."""

    what: str
    hint: str
    named: re.Pattern[str] | None = None
    """The names of its files."""
    kinds: tuple[FileKind, ...] = ()
    """What its files are by their first bytes, whatever they are called."""
    holds: tuple[str, ...] = ()
    """What its folders hold, one of these, at their top or one level below."""
    is_model: bool = True
    """Whether it holds a model's weights, or may hold one, so that a person who finds nothing else should hear of it."""


def foreign_at(path: Path) -> Foreign | None:
    """What lies at a path that is no checkpoint for farcast; None where nothing tells."""
    if not path.is_file():
        return next((one for one in _KINDS if _holds(path, one.holds)), None) if path.is_dir() else None
    kind: FileKind | None = None  # of a file that a name tells, nothing is read
    for one in _KINDS:
        if one.named and one.named.match(path.name):
            return one
        if one.kinds:
            kind = kind or kind_of(path)
            if kind in one.kinds:
                return one
    return None


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return any(any(folder.glob(name)) or any(folder.glob(f"*/{name}")) for name in names)


def _ending(endings: str) -> re.Pattern[str]:
    """The names that have one of these endings, a regular expression."""
    return re.compile(rf".*\.(?:{endings})$", re.IGNORECASE)


_KINDS = (
    Foreign(
        "orbax, JAX's checkpoints",
        f"in Python, restore each with orbax.checkpoint; {_AS_SAFETENSORS}",
        holds=("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"),
    ),
    Foreign(
        "a TensorFlow SavedModel",
        f"in Python, tf.saved_model.load each; {_AS_SAFETENSORS}",
        holds=("saved_model.pb",),
    ),
    Foreign(
        "TensorFlow's checkpoints",
        f"in Python, read each with tf.train.load_checkpoint; {_AS_SAFETENSORS}",
        _ending(r"index|data-\d+-of-\d+|meta"),
    ),
    Foreign(
        "Keras models",
        'in that folder: python -c "import glob, keras, safetensors.numpy as st; [st.save_file({v.path: v.numpy() for v in'
        " keras.models.load_model(f).variables}, f + '.safetensors') for f in glob.glob('*.keras')]\"",
        _ending("keras"),
        ("keras",),
    ),
    Foreign(
        "HDF5, as Keras writes it",
        "in Python, build the model; for each, model.load_weights(FILE) and safetensors.numpy.save_file({v.path: v.numpy() for v in"
        " model.variables}, 'step_N.safetensors')",
        _ending("h5|hdf5"),
        ("hdf5",),
    ),
    Foreign(
        "msgpack, as Flax writes it",
        "in Python, save each as step_N.safetensors:"
        " safetensors.flax.save_file(flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data), sep='.'), name)",
        _ending("msgpack"),
        ("msgpack",),
    ),
    Foreign("Paddle's parameters", f"in Python, paddle.load each; {_AS_SAFETENSORS}", _ending("pdparams|pdopt|pdmodel")),
    Foreign(
        "GGUF, for inference",
        "give the trainer's own checkpoints: these are converted, often quantised, and no trainer resumes from them",
        _ending("gguf"),
        ("gguf",),
    ),
    Foreign(
        "ONNX, for inference",
        "give the trainer's own checkpoints, or save the state_dict before the export",
        _ending("onnx"),
    ),
    Foreign(
        "TensorFlow Lite, for inference",
        "give the trainer's own checkpoints: no trainer resumes from these",
        _ending("tflite"),
        ("tflite",),
    ),
    Foreign("numpy's arrays", f"in Python, numpy.load each; {_AS_SAFETENSORS}", _ending("npz|npy"), ("numpy",)),
    Foreign(
        "compressed",
        "uncompress them in place: gunzip, unzstd, unxz or bunzip2 FILE",
        re.compile(r"(?!.*\.tar\.\w+$).*\.(?:gz|zst|xz|bz2)$", re.IGNORECASE),
    ),
    Foreign(
        "archives",
        "unpack them, each into a folder of its own: tar -xf FILE -C FOLDER, or unzip FILE -d FOLDER; then name the folder above",
        re.compile(r".*\.(?:t[gx]z|zip|zst|gz)$", re.DOTALL),
        ("zip", "tar", "packed"),
    ),
    Foreign(
        "pickles, which may run code when they are read",
        f"in Python, load those that you trust; {_AS_SAFETENSORS}",
        _ending("pkl|pickle|joblib"),
        ("pickle",),
    ),
    Foreign("pictures, sounds or documents", "", kinds=("media",), is_model=False),
    Foreign("a database", "", kinds=("database",), is_model=False),
)
