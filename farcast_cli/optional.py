"""Packages that only some requests use: they are imported then, and a missing one is one clear line.

Everything else works without them, so that an installation stays small.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from farcast_cli.errors import UsageError

EXTRAS = {
    "torch": "torch",
    "huggingface_hub": "hub",
    "tensorboard": "logs",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "matplotlib": "report",
    "fsspec": "remote",
}
"""The optional packages, and the extra of farcast that installs each."""


def need(package: str, what: str) -> None:
    """See that an optional package can be imported.

    Args:
        what: the option, or the thing in the input, that asks for it.

    Raises:
        UsageError: it cannot.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise _missing(package, what, f"that it cannot be imported ({error})") from error


def expect(package: str, what: str) -> None:
    """See that an optional package is installed; it is imported later, when the work is done.

    Raises:
        UsageError: it is not.
    """
    if find_spec(package) is None:
        raise _missing(package, what, "none")


def _missing(package: str, what: str, found: str) -> UsageError:
    hint = f"pip install 'farcast[{EXTRAS[package]}]'"
    return UsageError(f"{what}: expected the package {package}, found {found}", hint=hint)
