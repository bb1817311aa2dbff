"""The model card of a folder for a hub: what its readers should know of weights that no training step wrote.

The origin's own card stays, and the section on the forecast is added to it. Nothing in the section tells of the machine: no
path, and no command of the user's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.hub import CARD
from farcast_cli.errors import FarcastError, FileFormatError, shell_word
from farcast_cli.evaluation.judge import best_trial
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import SIDECAR, open_new
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.forecast.forecaster import Options
from farcast_cli.forecast.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from farcast_cli.records import ForecastSidecar
    from farcast_cli.request import Outcome, Prepared, Request

MAX_BYTES = 1 << 24  # of a card, or of a configuration
_BEGIN, _END = "<!-- farcast: begin -->", "<!-- farcast: end -->"
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n")
_HUB_NAME = re.compile(r"(?!checkpoint-\d+$)(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def upload_command(folder: str) -> str:
    """What uploads a folder; the sidecar stays behind, because it names the run's folders."""
    return f"hf upload NAME {shell_word(folder)} . --exclude {SIDECAR}"


def write_card(place: Path, content: ForecastSidecar, outcome: Outcome, prepared: Prepared, request: Request) -> list[str]:
    """Write the card of a forecast; returns what a person should change before uploading the folder.

    Args:
        place: the forecast's folder, where it is now.
        content: of the sidecar; the card has its numbers.
    """
    numbers = json.loads(content.as_json())
    section, model = "\n".join(_section(numbers, outcome, request)), _model_of(prepared)
    text = _added(_text_of(prepared), section, _front_matter(model, is_average=_is_average(numbers, outcome)))
    with open_new(place / CARD, like=place) as file:
        file.write(text.encode(errors="surrogateescape"))
    return [] if model.is_on_hub else [f"{model.where} = {model.base!r} is no name on a hub: change it before you upload"]


# --- the card around the section -------------------------------------------------------------------------------------


def _text_of(prepared: Prepared) -> str:
    """The origin's own card; "" where it has none. What is no UTF-8 in it stays as it is."""
    own = next((part.path for part in prepared.origin.parts if part.name == CARD), None)
    return "" if own is None else _read(own).decode(errors="surrogateescape")


def _read(path: Path) -> bytes:
    size = file_size(path)
    if size > MAX_BYTES:
        raise FileFormatError(f"{path}: {size} bytes, expected at most {MAX_BYTES}", hint="move the file out of the snapshot")
    return read_bytes(path, 0, size)


def _added(card: str, section: str, front_matter: str) -> str:
    """A card with the section at its end, and without one of an earlier forecast."""
    body = _without_sections(card).rstrip()
    if not body:
        body = f"{front_matter}\n# Model card"
    elif not _FRONT_MATTER.match(body):
        body = f"{front_matter}\n{body}"
    return f"{body}\n\n{_BEGIN}\n{section}\n{_END}\n"


def _without_sections(card: str) -> str:
    """A card without what lies between the marks; one pass, however many marks it has."""
    kept, start = list[str](), 0
    while (begin := card.find(_BEGIN, start)) >= 0 and (end := card.find(_END, begin)) >= 0:
        kept.append(card[start:begin])
        start = end + len(_END)
    kept.append(card[start:])
    if len(kept) == 1:
        return card
    return "\n\n".join([kept[0].rstrip("\n"), *(one.strip("\n") for one in kept[1:-1]), kept[-1].lstrip("\n")])


def _front_matter(model: _Model, *, is_average: bool) -> str:
    lines = [f"library_name: {model.library}"] if model.library else []
    lines += [f"base_model: {json.dumps(model.base)}"] if model.base and model.is_on_hub else []
    tags = ["farcast", *(["weight-averaging"] if is_average else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


@dataclass(frozen=True, slots=True)
class _Model:
    """What the configuration tells of the model: the library that loads it, and the model that it was made from."""

    library: str = ""
    base: str = ""
    where: str = ""
    """The file and the key that name the base."""

    @property
    def is_on_hub(self) -> bool:
        """Whether the base may be a name on a hub: no path, and nothing in the working directory has this name."""
        return not self.base or (bool(_HUB_NAME.fullmatch(self.base)) and not os.path.lexists(self.base))


def _model_of(prepared: Prepared) -> _Model:
    adapter, config = _config(prepared, "adapter_config.json"), _config(prepared, "config.json")
    if adapter is not None:
        return _based("peft", adapter, "adapter_config.json", "base_model_name_or_path")
    if config and config.keys() & {"model_type", "architectures", "transformers_version"}:
        return _based("transformers", config, "config.json", "_name_or_path")
    return _Model()


def _based(library: str, config: dict[str, Any], name: str, key: str) -> _Model:
    base = config.get(key)
    return _Model(library, base if isinstance(base, str) else "", f"{name}: {key}")


def _config(prepared: Prepared, name: str) -> dict[str, Any] | None:
    """A configuration file of the origin; None where there is none. One that cannot be read tells nothing."""
    found = [part for part in prepared.container.beside if part.path.name == name]
    if not found:
        return None
    try:
        content = parse_json(_read(min(found, key=lambda part: len(part.name)).path))
    except (FarcastError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- the section -----------------------------------------------------------------------------------------------------


def _section(numbers: dict[str, Any], outcome: Outcome, request: Request) -> Iterator[str]:
    method = METHODS[numbers["method"]]
    what = _what(numbers, is_average=_is_average(numbers, outcome))
    yield from (
        "## How these weights were made",
        "",
        f"farcast {numbers['farcast_version']} computed these weights from the snapshots of one training run.",
        f"They are {what}, by the method `{method.name}` ({method.summary}).",
        "",
        f"The origin, the last snapshot that was used, is of step {numbers['origin_step']}.",
        f"The weights are for step {numbers['valid_step']}.",
        *(["Every step on this card is an epoch."] if numbers.get("unit") == "epoch" else []),
        "",
        "| step of the snapshot | mean weight |",
        "| --- | --- |",
        *(f"| {one['step']} | {_number(one['mean_weight'])} |" for one in numbers["inputs"]),
        "",
        "The mean weight is the factor on the snapshot, as the mean over all values.",
        "",
        _tested(numbers, outcome),
        "",
        *_evaluated(numbers, outcome, request),
        "",
        "Do not resume training from these weights. The folder has no trainer state, and training from such weights falls behind.",
        "",
        "This command repeats it; RUN is the folder with the run's checkpoints, and KEPT, if the command has it, that of its kept ones:",
        "",
        f"    {_command(numbers, request)}",
    )


def _is_average(numbers: dict[str, Any], outcome: Outcome) -> bool:
    """Whether the weights are where the run is rather than where it will be; the back-test knows, unless it could not test."""
    method = METHODS[numbers["method"]]
    if numbers["ratio"] is not None:
        return method.averages and math.isnan(outcome.decision.expected)
    return method.averages and not (method.extrapolates and numbers["horizon"])


def _what(numbers: dict[str, Any], *, is_average: bool) -> str:
    """What was done, in words."""
    ahead = numbers["horizon"]
    if not is_average:
        return f"a forecast {ahead} steps ahead"
    if METHODS[numbers["method"]].extrapolates:
        return f"the end of the run's trend, carried on {ahead} steps" if ahead else "the end of the run's trend"
    return f"an average of {len(numbers['inputs'])} snapshots"


def _tested(numbers: dict[str, Any], outcome: Outcome) -> str:
    """What the run's own history says."""
    against = "" if numbers["verdict"] == "forecast" else f" The verdict was `{numbers['verdict']}`: {outcome.decision.reason}."
    if numbers["ratio"] is None:
        return f"The run's own history could not test it.{against}"
    if _is_average(numbers, outcome):
        return f"The run's own test, the back-test ratio b, does not judge averages.{against}"
    b = _number(numbers["ratio"])
    return f"The run's own test: back-test ratio b = {b} (0 is perfect, 1 is no better than the origin).{against}"


def _evaluated(numbers: dict[str, Any], outcome: Outcome, request: Request) -> Iterator[str]:
    """What the user's command said of each strength."""
    if request.evaluator is None or not outcome.trials:
        yield "These weights were not evaluated by farcast."
        return
    best = best_trial(outcome.trials, maximize=request.evaluator.maximize).strength
    written = best or max(trial.strength for trial in outcome.trials)
    better = "larger" if request.evaluator.maximize else "smaller"
    yield from (
        f"The user's own command evaluated these weights; a {better} number is better:",
        "",
        "| weights | number |",
        "| --- | --- |",
    )
    for one in sorted(numbers["evaluations"], key=lambda one: float(one["strength"])):
        name = f"strength {one['strength']:g} of the update" if one["strength"] else "the origin"
        chosen = ", these weights" if one["strength"] == written else ""
        yield f"| {name}{chosen} | {_number(one['value'])} |"


def _command(numbers: dict[str, Any], request: Request) -> str:
    """What repeats the forecast from the run's folder."""
    on, options, usual = numbers["fitted_on"], request.options, Options()
    words = [f"farcast predict RUN{request.narrowed}{request.origin_option}"]
    words += [f"--to-step {numbers['valid_step']} --for evaluation --method {numbers['method']} --layout hub"]
    words += ["--full"] if on["samples_per_tensor"] is None else [f"--sample {on['samples_per_tensor']}"]
    words += [f"--clock {request.clock}"] if request.clock else []
    words += [f"--dtype {request.dtype}"] if request.dtype != "source" else []
    words += [f"--max-shard-size {request.max_shard_bytes / 1000:.16g}KB"] if request.max_shard_bytes is not None else []
    words += [f"--counters {request.counters}"] if request.counters != "advance" else []
    words += [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in ("step_norm", "scale", "scope", "grad_weight")
        if getattr(options, name) != getattr(usual, name)
    ]
    words += [f"--eval-cmd {shlex.quote('CMD {ckpt}')}"] if request.evaluator else []
    words += ["--maximize"] if request.evaluator and request.evaluator.maximize else []
    return " ".join([*words, *(["--even-if-worse"] if numbers["verdict"] != "forecast" else [])])


def _number(value: float | None) -> str:
    return "unknown" if value is None else json.dumps(value)
