"""What a command line may hold by mistake: more paths than a command takes, an address in place of a path, a misspelt variable."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import UsageError, listed, shell_word
from farcast_cli.settings import LOCAL_ONLY, here

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "FARCAST_"
_WITHOUT_OPTION = {
    f"{PREFIX}{name}" for name in ("ORIGIN_STEP", "VALID_STEP", "STRENGTH", "JOB", "STATE_DIR", "CACHE_DIR", "ENGINE")
}
"""The variables that --eval-cmd gets, which may call farcast itself; the places of the second ledgers and of remote files; and the engine."""
_ADDRESS = re.compile(r"(s3|gs|gcs|hf|az|abfs|memory|https?):/{1,2}(?=[^/])(.+)", re.DOTALL)
"""pathlib makes one slash of two."""
REMOTE: dict[str, set[str]] = {
    **{command: {"directory"} for command in ("inspect", "fit")},
    **{command: {"directory", "forecaster"} for command in ("backtest", "report")},
    "predict": {"directory", "forecaster", "output"},
    "verify": {"forecast", "against", "reference"},
}
"""The parameters that may be an address; the library opens it."""
_PLACES = {
    *("directory", "checkpoint", "forecast", "against", "reference", "forecaster"),
    *("data", "anchor", "covariance", "apply", "output", "delta_out", "covariance_out", "ledger"),
}
_WRITTEN = {"output", "delta_out", "covariance_out", "ledger"}
_COPIES = {
    "s3": "aws s3 sync {address} {name}",
    "gs": "gsutil -m cp -r {address} .",
    "hf": "huggingface-cli download {repository} --local-dir {name}",
}

_UPLOADS = {"s3": "aws s3 cp --recursive OUT", "gs": "gsutil -m cp -r OUT"}


def refuse_more(context: Any) -> None:
    """Refuse arguments that are too many; those that a shell made of a pattern lead to their folder.

    Raises:
        UsageError: there are any.
    """
    if not context.args:
        return
    taken = [parameter for parameter in context.command.params if parameter.param_type_name == "argument"]
    if not taken:
        raise UsageError(f"unexpected argument {context.args[0]}", hint=f"farcast {context.info_name} --help")
    name, more = taken[-1].name, context.args
    found = [Path(str(context.params[name])), *map(Path, more)]
    kind, folders = taken[-1].metavar.strip("[]"), {path.parent for path in found}
    if name == "directory" and len(folders) == 1 and all(os.path.lexists(path) for path in found):
        (folder,) = folders
        raise UsageError(
            f"expected one folder, found {len(found)} paths in {folder}",
            hint=f"farcast {context.info_name} {shell_word(folder)}",
        )
    raise UsageError(
        f"expected one {kind}, found {len(found)}: {listed(found, most=3)}", hint=f"farcast {context.info_name} --help"
    )


def resolve_addresses(context: Any) -> None:
    """Open the run at an address, for a command that reads one; refuse any other address where a path is expected.

    Raises:
        UsageError: with the command that copies it here.
        FarcastError: what `settings.here` raises.
    """
    taken = REMOTE.get(context.info_name, set())
    if "directory" in taken and context.params.get("directory") is not None:
        context.params["directory"] = here(context.params["directory"])
    if "forecaster" in taken:
        context.params["forecaster"] = here(context.params["forecaster"])
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        is_read = parameter.name not in _WRITTEN
        found = _ADDRESS.fullmatch(str(value)) if isinstance(value, (str, Path)) and parameter.name in _PLACES else None
        is_taken = parameter.name in taken and found is not None and not found[1].startswith("http")
        if found and not is_taken and not os.path.lexists(str(value)):
            address = f"{found[1]}://{found[2]}"
            hint = _copy_of(found[1], found[2].rstrip("/")) if is_read else _upload_of(found[1], address)
            reads = LOCAL_ONLY.get(context.info_name, "reads local files only")
            writes = "farcast writes this to local paths only"
            what = f"farcast {context.info_name} {reads}" if is_read else writes
            raise UsageError(f"{address}: {what}", hint=hint)


def _copy_of(scheme: str, rest: str) -> str:
    """The command that copies what an address names into the working directory."""
    name, address = shell_word(rest.rsplit("/", 1)[-1]), shell_word(f"{scheme}://{rest}")
    repository = shell_word("/".join(rest.removeprefix("datasets/").split("/")[:2]))
    return _COPIES.get(scheme, "curl -LO {address}").format(address=address, name=name, repository=repository)


def _upload_of(scheme: str, address: str) -> str:
    command = f": {_UPLOADS[scheme]} {shell_word(address)}" if scheme in _UPLOADS else ""
    return f"write to a local path, then copy it{command}"


def unknown_variables(context: Any) -> list[str]:
    """Variables of the environment that are named like an option's, and belong to none, in words."""
    strangers = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in _WITHOUT_OPTION)
    if not strangers:
        return []
    group = context.parent.command if context.parent else None
    commands = group.commands.values() if group is not None else [context.command]
    known = {str(parameter.envvar) for command in commands for parameter in command.params if parameter.envvar}
    return [
        f"caution: {name} is set, but no option has this variable{nearest(name, known)}"
        for name in strangers
        if name not in known
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, probably, in words; "" where none is like it.

    >>> nearest("methd", ["method", "scale"]), nearest("x", ["method"])
    ('; did you mean method?', '')
    """
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
