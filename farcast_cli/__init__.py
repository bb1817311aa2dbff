"""farcast: forecast the weights of a training run from the snapshots that it left on disk.

The commands as functions, see `farcast_cli.api`; each name is imported when it is first used:

    open_run    find the snapshots of a run
    keep        copy the weights of checkpoints before the trainer deletes them
    fit         measure how the weights move
    backtest    test the methods inside the run's history
    report      tell the verdict on a run and its evidence, as a page, a picture or text
    predict     write a checkpoint for a later step
    leap        the same with a memory, for a loop
    watch       follow a run while it trains
    verify      compare a forecast with the real snapshot

Whatever a caller can cause is a `FarcastError`; `farcast_cli.errors` has its subclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farcast_cli.api import backtest, fit, keep, leap, open_run, predict, report, verify, watch
    from farcast_cli.errors import (
        FarcastError,
        FileFormatError,
        NoForecastError,
        OutputError,
        SnapshotError,
        UsageError,
    )
    from farcast_cli.returned import Prediction, Report

__version__ = "0.2.0"
__all__ = [
    "FarcastError",
    "FileFormatError",
    "NoForecastError",
    "OutputError",
    "Prediction",
    "Report",
    "SnapshotError",
    "UsageError",
    "backtest",
    "fit",
    "keep",
    "leap",
    "open_run",
    "predict",
    "report",
    "verify",
    "watch",
]

if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first used (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = "errors" if name.endswith("Error") else "returned" if name.istitle() else "api"
        return getattr(import_module(f"{__name__}.{home}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
