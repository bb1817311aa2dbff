"""What the values of options mean, to the commands and to the Python API alike: texts become the library's own objects."""

from __future__ import annotations

import math
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from farcast_cli import system
from farcast_cli.choices import (
    DEFAULT_FORECASTER,
    DEFAULT_SAMPLE,
    ClockName,
    CountersMode,
    Io,
    KeepForm,
    OptimizerMode,
    OutputLayout,
    Ranks,
    StepFrom,
    StepUnit,
)
from farcast_cli.engine.ranks import LAUNCHED, Seat, Team, seat_in
from farcast_cli.errors import UnreadableError, UploadError, UsageError, shell_word
from farcast_cli.files.place import SIDECAR, check_outside
from farcast_cli.horizons import MAX_DIGITS, parse_horizons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.choices import Purpose
    from farcast_cli.engine.reader import Resources
    from farcast_cli.evaluation.judge import Evaluator
    from farcast_cli.forecast.fitting import FitRequest
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.state_ledger import Ledgers
    from farcast_cli.horizons import Horizon
    from farcast_cli.run.selection import Selection
    from farcast_cli.watching import WatchRequest

MAX_GAIN = 100
MIN_SAMPLE = 1000
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")


def env(name: str) -> str:
    return f"FARCAST_{name}"


def parse_size(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    if len(number) > MAX_DIGITS or unit not in units or not number.replace(".", "", 1).isdecimal() or float(number) <= 0:
        raise UsageError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(number) * units[unit])


LOCAL_ONLY = {
    "keep": "copies checkpoints before the trainer deletes them: run it where the trainer writes",
    "watch": "follows the trainer's folder: run it where the trainer writes",
    "leap": "works between two parts of a training: run it where the trainer writes",
    "tune": "reads its checkpoint and its rows many times: copy them here",
}
"""Why a command reads no store."""


def selection_of(
    directory: Path,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    steps: str | None,
    pattern: str | None,
    *,
    history: Path | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
) -> Selection:
    """The part of a run that the options name."""
    check_choice("--step-from", step_from, StepFrom)
    check_choice("--unit", unit, StepUnit)
    from farcast_cli.run.selection import Selection
    from farcast_cli.run.steps import parse_steps
    from farcast_cli.run.trust import StepRule

    keys = () if weights is None else tuple(key.strip() for key in weights.split(","))
    if not all(keys):
        raise UsageError(f"--weights {weights}: expected keys with commas between them, such as --weights g,d")
    globs = tuple(include or ()), tuple(exclude or ())
    rule = StepRule(step_from, unit)
    return Selection(here(directory), parse_steps(steps), pattern or "", *globs, history, rule=rule, weights=keys)


def here(place: str | os.PathLike[str]) -> Path:
    """A place of files: an address on a remote store becomes the folder on this machine that stands for it.

    Raises:
        UsageError: an address with a password, or a package for its store is missing.
        SnapshotError, FileFormatError, OutputError: nothing is there, it cannot be asked, or there is no place for the folder.
    """
    path = Path(place)
    if os.path.lexists(path):
        from farcast_cli.remote.mirror import revived

        return revived(path)  # a killed command may have left files that are holes
    from farcast_cli.remote.store import address_of

    address = address_of(os.fspath(place))
    if address is None:
        return Path("/" + os.fspath(place)[len("file:") :].lstrip("/")) if os.fspath(place).startswith("file:/") else path
    from farcast_cli.remote.mirror import mirrored

    return mirrored(address)


def output_of(output: str | os.PathLike[str] | None, *, eval_cmd: str | None, ranks: Ranks) -> str | None:
    """The place of an output as a text; for an address, the path here that stands for it until the output is uploaded.

    Raises:
        UsageError: what cannot be done there.
        UploadError: the store cannot be asked.
    """
    text = None if output is None else os.fspath(output)
    if not text or os.path.lexists(text):
        return text
    from farcast_cli.remote.store import address_of, check_takes_files

    address = address_of(text)
    if address is None:
        return text
    check_takes_files(address)
    for option, is_given in (("--eval-cmd", eval_cmd is not None), ("--ranks env", ranks != "off")):
        if is_given:
            raise UsageError(f"{option}: expected a local output, found {address}", hint="-o OUT, then copy it")
    from farcast_cli.remote.mirror import mirrored

    try:
        place = mirrored(address, is_output=True)
    except UnreadableError as error:
        raise UploadError(f"{error}, and so nothing is uploaded", hint=error.hint) from error
    return f"{place}{os.sep if text.endswith('/') else ''}"


def check_here(place: str | os.PathLike[str], command: str) -> None:
    """Refuse an address, for a command that works where the trainer does.

    Raises:
        UsageError: it is one.
    """
    from farcast_cli.remote.store import address_of

    if not os.path.lexists(place) and (address := address_of(os.fspath(place))):
        raise UsageError(f"{address}: farcast {command} {LOCAL_ONLY[command]}")


def ledgers_of(ledger: Path) -> Ledgers:
    """Where leaps are recorded: the ledger that the options name, and the user's state folder, which an empty variable switches off."""
    from farcast_cli.forecast.state_ledger import Ledgers

    chosen = os.environ.get(env("STATE_DIR"))
    if chosen is not None:
        return Ledgers(ledger, Path(chosen) if chosen else None)
    home = os.environ.get("XDG_STATE_HOME", "")
    try:  # the standard has relative paths ignored
        state = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"  # noqa: PTH117 - of a text
    except RuntimeError:  # a user without a home
        return Ledgers(ledger)
    return Ledgers(ledger, state / "farcast")


def evaluator_of(command: str | None, *, maximize: bool, jobs: int, timeout_s: float | None) -> Evaluator | None:
    """The user's command that judges weights, where there is one."""
    from farcast_cli.evaluation.judge import Evaluator

    return Evaluator(command, maximize, jobs, timeout_s) if command else None


def resources_of(device: str, io: Io, threads: int) -> Resources:
    """What the command may compute with; called before anything that imports numpy."""
    num_workers = prepare(device, threads)
    from farcast_cli.engine.reader import Resources

    return Resources(device_name(device), io, num_workers)


def seat_of(ranks: Ranks) -> Seat:
    """Which of the processes that share the work this one is.

    Raises:
        UsageError: no launcher says so.
    """
    check_choice("--ranks", ranks, Ranks)
    found = seat_in(os.environ) if ranks == "env" else Seat()
    if found is None:
        raise UsageError(
            f"--ranks env: found no launcher's variables: {', '.join(' and '.join(names) for names in LAUNCHED)}",
            hint="torchrun --nproc-per-node 4 -m farcast_cli predict --ranks env ..., or srun, or mpirun",
        )
    return found


def team_of(ranks: Ranks, timeout_s: float, *, eval_cmd: str | None = None) -> Team:
    """The processes that share the work of a fit or a prediction.

    Raises:
        UsageError: no launcher says which they are, or they cannot share it.
    """
    seat = seat_of(ranks)
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise UsageError(f"--ranks-timeout {timeout_s}: expected a positive number of seconds")
    if seat.count > 1 and eval_cmd is not None:
        raise UsageError("--eval-cmd: one process runs it, found --ranks env", hint="--ranks off, or no --eval-cmd")
    return Team(seat, timeout_s)


def unshared_hint(ranks: Ranks) -> str:
    """What to do where a launcher's processes write the same output, each by itself; "" where none was launched."""
    try:
        seat = seat_in(os.environ) if ranks == "off" else None
    except UsageError:
        return ""
    return f"--ranks env lets the {seat.count} processes of this launcher write it together" if seat and seat.count > 1 else ""


def prepare(device: str, threads: int = 0) -> int:
    """Check the device; returns the number of workers. Each works on one core, so that no result depends on how many."""
    if threads < 0:
        raise UsageError(f"--threads {threads}: expected 0 or more")
    kind, _, number = device.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (number and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    _import_numpy()
    if kind == "cuda":
        from farcast_cli.optional import need

        need("torch", f"--device {device}")
        import torch

        if int(number or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: expected a CUDA device, found {torch.cuda.device_count()}", hint="--device cpu"
            )
    return threads or min(8, system.num_cores())


def _import_numpy() -> None:
    """Import numpy with one thread for its matrix products, which it asks the environment for at import, and only then."""
    known = {name: os.environ.get(name) for name in _BLAS_THREADS}
    os.environ.update(dict.fromkeys(_BLAS_THREADS, "1"))
    import numpy as np  # noqa: F401

    for name, value in known.items():  # the user's own --eval-cmd has the environment as it was
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def device_name(device: str) -> str:
    """The device by torch's name. The CPU keeps up with most storage, and needs no torch: a GPU is used on request."""
    return "cpu" if device == "auto" else device


def horizons_of(horizon: str | None, to_step: int | None) -> tuple[Horizon, ...]:
    """The horizons of an option; none where it is not given.

    Raises:
        UsageError: they cannot be, or a step is given too.
    """
    if to_step is not None and to_step >= 10**MAX_DIGITS:
        raise UsageError(f"--to-step {to_step}: expected fewer than {10**MAX_DIGITS} steps")
    if horizon is not None and to_step is not None:
        raise UsageError(
            "expected --horizon N (steps ahead) or --to-step N, found both", hint="farcast predict proposes a horizon itself"
        )
    return parse_horizons(horizon)


def check_choice(name: str, value: str | None, allowed: Any, *, hint: str = "") -> None:
    """That a value, if there is one, is one of a Literal type.

    Args:
        hint: what may be meant by another.

    Raises:
        UsageError: it is another.
    """
    names = get_args(allowed)
    if value is not None and value not in names:
        raise UsageError(f"{name} {value}: expected one of {', '.join(names)}", hint=hint)


def check_choices(
    *, clock: ClockName | None, optimizer: OptimizerMode, counters: CountersMode, layout: OutputLayout, io: Io
) -> None:
    """The choices that `predict` and `leap` share.

    Raises:
        UsageError: one is another.
    """
    check_choice("--clock", clock, ClockName)
    check_choice("--optimizer", optimizer, OptimizerMode)
    check_choice("--counters", counters, CountersMode)
    check_choice("--layout", layout, OutputLayout)
    check_choice("--io", io, Io)


_UNPRINTED = frozenset({"Cc", "Zl", "Zp"})  # categories of Unicode: control characters, and separators of lines


def place_in_folder(name: str | None) -> str:
    """The name of a checkpoint's file in a folder of its own; "" for none.

    Raises:
        UsageError: it is no plain name.
    """
    if name is None:
        return ""
    if any(unicodedata.category(character) in _UNPRINTED for character in name):
        raise UsageError(f"--place {name!r}: expected the plain name of a file, found a control character")
    if not name or name != Path(name).name or name in {".", "..", SIDECAR} or name.startswith("."):
        raise UsageError(
            f"--place {name}: expected the plain name of a file, such as ckpt.pt", hint="-o OUT names the folder around it"
        )
    return name


def check_layout(layout: OutputLayout, purpose: Purpose) -> None:
    """That an output to resume from can hold a trainer's state.

    Raises:
        UsageError: it cannot.
    """
    if layout == "hub" and purpose == "resume":
        raise UsageError(
            "--layout hub: expected --for evaluation: the folder has no trainer state, so training cannot resume from it",
            hint="farcast predict --for evaluation --layout hub",
        )


def check_leap_options(*, every: int | None, gain: float | None, max_gain: float | None, output: str | None) -> None:
    """The numbers of a leap and its place, before anything is read.

    Raises:
        UsageError: one of them cannot be.
    """
    from farcast_cli.planning import refuse_no_place

    for option, number in (("gain", gain), ("max-gain", max_gain)):
        if number is not None and not 0 < number <= MAX_GAIN:
            raise UsageError(f"--{option} {number:g}: expected more than 0 and at most {MAX_GAIN}")
    if every is not None and not 1 <= every < 10**MAX_DIGITS:
        raise UsageError(f"--every {every}: expected a number of steps from 1 to {10**MAX_DIGITS - 1}")
    if output is not None:
        refuse_no_place(output)


def fit_request(
    directory: Path,
    *,
    output: Path | None = None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    steps: str | None,
    pattern: str | None,
    sample: int,
    full: bool,
    ledger: Path,
    device: str,
    io: Io,
    threads: int,
    team: Team | None = None,
    losses: Path | None = None,
    history: Path | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
) -> FitRequest:
    """What is read of a run's folder; no forecaster file is written if `output` is None."""
    if sample < MIN_SAMPLE:
        raise UsageError(f"--sample {sample}: expected {MIN_SAMPLE} or more")
    team = team or Team()
    if output is None and not team.is_alone:
        raise UsageError(
            "--ranks env: the ranks meet where the forecaster file is written, and none is asked for", hint="-o FILE"
        )
    resources = resources_of(device, io, threads)
    from farcast_cli.forecast.fitting import FitRequest

    selection = selection_of(
        directory, include, exclude, steps, pattern, history=history, step_from=step_from, unit=unit, weights=weights
    )
    return FitRequest(selection, None if full else sample, ledgers_of(ledger), resources, output, team, losses)


def watch_request(
    directory: Path,
    into: Path | None,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    pattern: str | None,
    weights: str | None,
    ledger: Path,
    device: str,
    io: Io,
    threads: int,
    keep: KeepForm,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
) -> WatchRequest:
    """What is kept and judged of a run that is watched.

    Raises:
        OutputError: the folder for kept snapshots lies in the run's.
    """
    check_choice("--keep", keep, KeepForm)
    check_choice("--io", io, Io)
    if into is not None:
        check_outside(into / "any", directory, option="--into")
    options: Any = {"include": include, "exclude": exclude, "pattern": pattern, "weights": weights, "steps": None}
    options |= {"step_from": step_from, "unit": unit}
    machine: Any = {"ledger": ledger, "device": device, "io": io, "threads": threads}
    fit = fit_request(directory, **options, **machine, sample=DEFAULT_SAMPLE, full=False, history=into)
    from farcast_cli.request import Request
    from farcast_cli.watching import WatchRequest

    judge = Request(ledgers=fit.ledgers, resources=fit.resources, source=f" {shell_word(directory)}")
    return WatchRequest(fit, judge, is_sampled=keep == "sampled")


def check_watch_options(interval: float, *, is_leaping: bool, on_leap: str | None) -> None:
    """The options of a watch that are not of the run.

    Raises:
        UsageError: one makes no sense.
    """
    if not 0 < interval < math.inf:
        raise UsageError(f"--interval {interval:g}: expected a positive number of seconds")
    if on_leap is not None and not is_leaping:
        raise UsageError("--on-leap: expected --leap too: without it nothing is written", hint="--leap --on-leap 'CMD {ckpt}'")


def source_of(run: object, fitted: Fitted) -> str:
    """What a command to paste needs to read the same run, with a blank before it; `run` is a place, or what was fitted."""
    if isinstance(run, (str, os.PathLike)) and not here(run).is_dir():
        return "" if Path(run) == DEFAULT_FORECASTER else f" --forecaster {shell_word(Path(run))}"
    return f" {fitted.selected}"
