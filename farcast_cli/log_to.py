"""Where the numbers of an answer are logged: JSON lines, TensorBoard, Weights & Biases, MLflow.

Each kind has one function here. They run after the work is done, and what they fail at is one line for people: a log that
cannot be written never costs a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import closing, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from farcast_cli.errors import OutputError, UsageError, as_addresses, printable
from farcast_cli.files.place import SIDECAR, check_outside
from farcast_cli.files.reading import named_for_good, portable
from farcast_cli.optional import expect
from farcast_cli.system import NO_WAIT, lock, open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from farcast_cli.answer import Answer
    from farcast_cli.watching import Event

NUMBERS = (
    *("coherence", "recent_coherence", "significance", "ratio", "expected_ratio"),
    *("gain", "share", "loss_signal", "horizon"),
)
"""The keys of an answer that are logged as numbers, beside the verdict, which is 1 or 0."""
_HINT = "--log-to jsonl:PATH, tensorboard:DIR, wandb[:PROJECT] or mlflow[:URI]"
_FIRST_KEY = b'{"time": '
_MAX_REASON = 300  # characters of a library's message
_NAME = "farcast"  # of the experiment, of the numbers' group


@dataclass(frozen=True, slots=True)
class LogTarget:
    """One place to log to: the kind, and what stands after the colon."""

    kind: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" if self.target else self.kind

    @property
    def place(self) -> Path | None:
        """What is written on this machine, as far as that is known."""
        if self.kind == "wandb":
            return Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
        if self.kind != "mlflow":
            return Path(self.target)
        address = urlsplit(self.target or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns")
        path = address.path[1:] if address.scheme == "sqlite" else address.path
        return Path(path) if address.scheme in {"", "file", "sqlite"} and path else None


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is logged of one call."""

    run: Path
    step: int
    numbers: dict[str, float]
    line: dict[str, Any]

    @property
    def run_id(self) -> str:
        """The same for every call on a run, so that its numbers come together."""
        return f"{_NAME}-{hashlib.sha256(os.fsencode(named_for_good(self.run))).hexdigest()[:12]}"


def parse_targets(texts: Sequence[str] | None, run: Path | None = None) -> tuple[LogTarget, ...]:
    """The places that `--log-to` names; nothing is imported or written.

    Args:
        run: the run's folder, if it is known yet; see `check_apart`.

    Raises:
        UsageError: one cannot be logged to, or its package is not installed.
        OutputError: one lies where no log may lie.
    """
    found = tuple(LogTarget(*text.split(":", 1)) for text in texts or ())
    for one in found:
        _check(one)
    if run is not None:
        check_apart(found, run)
    return found


def _check(one: LogTarget) -> None:
    if one.kind not in _WRITERS:
        raise UsageError(f"--log-to {one}: expected one of {', '.join(_WRITERS)}", hint=_HINT)
    package = _PACKAGES.get(one.kind)
    if package:
        expect(package, f"--log-to {one}")
    if one.kind in {"wandb", "mlflow"}:
        return
    if not one.target:
        what = "folder" if one.kind == "tensorboard" else "file"
        raise UsageError(f"--log-to {one}: expected a {what} after the colon", hint=_HINT)
    path = Path(one.target)
    if one.kind == "tensorboard" and path.exists() and not path.is_dir():
        raise UsageError(f"--log-to {one}: expected a folder, found a file", hint=_HINT)
    if one.kind == "jsonl" and (one.target.endswith(("/", os.sep)) or not _is_log(path)):
        raise UsageError(f"--log-to {one}: expected a new file, or a log that farcast wrote", hint=_HINT)


def _is_log(path: Path) -> bool:
    """Whether lines may be appended to what has a name: nothing, an empty file, or lines of ours."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(_FIRST_KEY))
    return start in {b"", _FIRST_KEY}


def check_apart(targets: Sequence[LogTarget], run: Path) -> None:
    """See that no log would lie in the run's folder, or in a checkpoint that farcast wrote.

    Raises:
        OutputError: one would.
    """
    for one in targets:
        if one.place is not None:
            check_outside(one.place, run, option="--log-to")
            _check_no_output(one.place)


def _check_no_output(place: Path) -> None:
    holder = next((folder for folder in place.resolve().parents if (folder / SIDECAR).exists()), None)
    if holder is not None:
        raise OutputError(
            f"--log-to {place}: lies in {holder}, which farcast wrote", hint="choose a place outside with --log-to"
        )


def places_of(targets: Sequence[LogTarget]) -> tuple[Path, ...]:
    """What will be written on this machine, as far as that is known."""
    return tuple(one.place for one in targets if one.place is not None)


def log_answer(targets: Sequence[LogTarget], command: str, answer: Answer, run: Path) -> tuple[str, ...]:
    """Log an answer at its origin's step.

    Returns:
        What could not be logged, one line for each place; nothing is raised.
    """
    return tuple(_failures(targets, _entry(command, answer, run))) if targets else ()


def logged_events(
    events: Generator[Event, None, None], targets: Sequence[LogTarget], run: Path
) -> Generator[Event, None, None]:
    """The events of a watch. Each verdict is logged, and what cannot be logged is told once."""
    from farcast_cli.answers import of_watch
    from farcast_cli.watching import NewVerdict, Trouble

    told = set[str]()
    with closing(events):
        for event in events:
            yield event
            failures = log_answer(targets, "watch", of_watch(event, run), run) if isinstance(event, NewVerdict) else ()
            yield from (Trouble(text) for text in failures if text not in told)
            told.update(failures)


def _failures(targets: Sequence[LogTarget], entry: _Entry) -> Iterator[str]:
    for one in targets:
        try:
            with redirect_stdout(io.StringIO()):  # stdout has the result alone, whatever a library prints
                _WRITERS[one.kind](one.target, entry)
        except Exception as error:  # noqa: BLE001 - any error of any library: the result is there, and must be told
            reason = " ".join(str(error).split())[:_MAX_REASON]
            yield printable(f"not logged to {one}: {type(error).__name__}: {reason}")


def _entry(command: str, answer: Answer, run: Path) -> _Entry:
    told = json.loads(answer.as_json())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    several = told.get("forecasts")
    numbers = dict(_numbers(told)) if several is None else {}
    for one in several or ():
        numbers |= {f"{name}/{one['horizon']}": value for name, value in _numbers(one)}
    step = (several[0] if several else told)["origin_step"]
    return _Entry(run, step, numbers, {"time": now, "command": command, "run": portable(run)} | told)


def _numbers(told: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((f"{_NAME}/{key}", float(told[key])) for key in NUMBERS if told.get(key) is not None)
    if "verdict" in told:
        yield f"{_NAME}/verdict", float(told["verdict"] == "forecast")


# --- one function for each kind --------------------------------------------------------------------------------------


def _to_jsonl(target: str, entry: _Entry) -> None:
    """Append one line, under a lock, so that nobody takes the line that another process is writing for a half one.

    What lies there may be an output that was written since the place was checked.
    """
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_WAIT, 0o666)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        with suppress(OSError):  # a filesystem without locks
            lock(fd)
        file.seek(0)
        if file.read(len(_FIRST_KEY)) not in {b"", _FIRST_KEY}:
            raise OSError(f"{path}: expected a log that farcast wrote")
        is_cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        line = (
            (b"\n" if is_cut else b"") + as_addresses(json.dumps(entry.line)).encode() + b"\n"
        )  # after half a line, on a new one
        if file.write(line) != len(line):
            raise OSError(f"{path}: only a part of the line was written")


def _to_tensorboard(target: str, entry: _Entry) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.numbers.items()]
    now = datetime.now(UTC).timestamp()
    writer = EventFileWriter(target, filename_suffix=f".{_NAME}")
    try:
        writer.add_event(Event(wall_time=now, step=entry.step, summary=Summary(value=values)))
    finally:
        writer.close()


def _to_wandb(target: str, entry: _Entry) -> None:
    """Into the run of WANDB_RUN_ID, or one run for all calls; wandb's own counter may be farther than the origin's step."""
    import wandb

    own = os.environ.get("WANDB_RUN_ID") or entry.run_id
    quiet = wandb.Settings(silent=True, console="off")
    with wandb.init(project=target or None, id=own, resume="allow", settings=quiet) as run:
        run.define_metric(f"{_NAME}/step")
        run.define_metric(f"{_NAME}/*", step_metric=f"{_NAME}/step")
        run.log({f"{_NAME}/step": entry.step, **entry.numbers})


def _to_mlflow(target: str, entry: _Entry) -> None:
    """Into the run of MLFLOW_RUN_ID, or one run for all calls, of the experiment `farcast`."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=target or None)
    run = os.environ.get("MLFLOW_RUN_ID") or _mlflow_run(client, entry)
    now = int(datetime.now(UTC).timestamp() * 1000)
    client.log_batch(run, metrics=[Metric(name, value, now, entry.step) for name, value in entry.numbers.items()])


def _mlflow_run(client: Any, entry: _Entry) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _NAME
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    found = client.search_runs([experiment], f"tags.{_NAME}_run = '{entry.run_id}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, tags={f"{_NAME}_run": entry.run_id}, run_name=entry.run.name)
    return str(run.info.run_id)


_WRITERS: dict[str, Callable[[str, _Entry], None]] = {
    "jsonl": _to_jsonl,
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
