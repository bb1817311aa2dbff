"""What commands answer: every key is described, every answer is of its schema, and no figure is what JSON has no word for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from farcast_cli.records import InputEntry
from farcast_cli.results import ANSWERS, FitAnswer, schema
from tests.conftest import make_loose_run
from tests.test_tune import CALL, save_work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import CallCli

KEYWORDS = {
    *("$ref", "$defs", "$schema", "anyOf", "type", "const", "enum", "properties", "required", "additionalProperties"),
    *("items", "prefixItems", "minItems", "maxItems", "description", "title", "default", "format"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
RUNS = "printf '%s\\n' \"$(($(cat count 2>/dev/null || echo 9) - 1))\" > count; cat count; : {ckpt}"  # better every time
CASES = {
    "inspect": (("run",), ("odd",), ("run", "--exclude", "norm*")),
    "fit": (("run",), ("run", "--full")),
    "backtest": (("--horizon", 100), ("--horizon", "100,5000"), ("--horizon", 5000)),
    "predict": (
        ("--horizon", 100, "--dry-run"),
        ("--horizon", 100),
        ("--horizon", "100,200", "-o", "several/"),
        ("--horizon", 5000, "-o", "never/"),
        ("--horizon", 100, "-o", "judged/", "--eval-cmd", RUNS),
    ),
    "verify": (("forecasts/run/step_000900.safetensors", "--against", "run/step_000800.safetensors"),),
    "leap": (("run", "--dry-run"), ("run",), ("run",), ("run", "-o", "leaps/", "--eval-cmd", RUNS)),
    "tune": (
        (*CALL[1:], "-o", "tuned.safetensors"),
        (*CALL[1:], "-o", "not/tuned.safetensors", "--gate", "1e9"),
        (*CALL[1:], "--delta-out", "delta.safetensors"),
        ("step_10.safetensors", "--apply", "delta.safetensors", "-o", "applied.safetensors"),
    ),
}


def resolved(node: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = top["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node
    assert set(found) <= KEYWORDS, "a word that these checks do not know"
    return found


def problems(value: Any, node: dict[str, Any], top: dict[str, Any], where: str = "$") -> list[str]:
    """What is wrong with a value by its schema, and which of its keys have no description; a validator of a page."""
    node = resolved(node, top)
    if "anyOf" in node:
        found = [problems(value, form, top, where) for form in node["anyOf"]]
        return min(found, key=len)
    kind = node.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{where}: {value!r} is no {kind}"]
    if value != node.get("const", value) or value not in node.get("enum", [value]):
        return [f"{where}: {value!r} is not one of the values"]
    return list(problems_within(value, node, top, where))


def problems_within(value: Any, node: dict[str, Any], top: dict[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{where}: no {key}" for key in node.get("required", []) if key not in value)
        for key, item in value.items():
            inner = node.get("properties", {}).get(key) or node.get("additionalProperties")
            if not inner:
                yield f"{where}.{key}: not in the schema"
            else:
                if "additionalProperties" not in node and not inner.get("description"):
                    yield f"{where}.{key}: not described"
                yield from problems(item, inner, top, f"{where}.{key}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            first = node.get("prefixItems", [])
            yield from problems(item, first[index] if index < len(first) else node["items"], top, f"{where}[{index}]")


def no_constant(name: str) -> float:
    pytest.fail(f"{name} is not JSON")


def read_json(text: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text, parse_constant=no_constant)
    return content


@pytest.fixture(scope="module")
def answers_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_loose_run(folder / "run")
    make_loose_run(folder / "odd", (100, 200))
    (folder / "odd" / "notes.txt").write_text("no snapshot")
    return save_work(folder)


@pytest.mark.parametrize("command", CASES)
def test_every_answer_is_of_the_printed_schema_and_has_no_key_without_a_description(
    answers_home: Path, call_cli: CallCli, command: str
) -> None:
    printed = json.loads(call_cli("schema", command, cwd=answers_home).stdout)
    if not (answers_home / "forecaster.safetensors").exists():
        assert call_cli("fit", "run", "-q", cwd=answers_home).returncode == 0
    if command == "verify" and not (answers_home / "forecasts").exists():
        assert call_cli("predict", "--horizon", 100, "-q", cwd=answers_home).returncode == 0
    for arguments in CASES[command]:
        done = call_cli(command, *arguments, "--json", "-q", cwd=answers_home)
        assert problems(read_json(done.stdout), printed, printed) == [], done
        assert done.stdout.count("\n") == 1


def test_every_sidecar_is_of_its_schema_and_has_no_key_without_a_description(answers_home: Path, call_cli: CallCli) -> None:
    if not (answers_home / "forecaster.safetensors").exists():
        assert call_cli("fit", "run", "-q", cwd=answers_home).returncode == 0
    for number, arguments in enumerate(CASES["predict"][1:]):
        call_cli("predict", *arguments, "-o", f"sidecars-{number}/", "--even-if-worse", "-q", cwd=answers_home)
    call_cli("leap", "run", "-o", "sidecars-leap/", "--gain", 1, "-q", cwd=answers_home)
    call_cli("leap", "odd", "-o", "sidecars-one-stretch/", "--even-if-worse", "-q", cwd=answers_home)  # its share is NaN
    for arguments in CASES["tune"]:
        call_cli("tune", *arguments, "-q", cwd=answers_home)
    printed = json.loads(call_cli("schema", "sidecar", cwd=answers_home).stdout)
    found = sorted(answers_home.rglob("*farcast.json"))
    contents = [read_json(path.read_text()) for path in found]
    assert {"evaluations", "momentum", "held_out", "delta"} <= set().union(*contents)
    assert {None} < {content["momentum"]["share"] for content in contents if "momentum" in content}
    for path, content in zip(found, contents, strict=True):
        assert problems(content, printed, printed) == [], path


@pytest.mark.parametrize("command", ANSWERS)
def test_every_key_of_every_schema_says_what_it_means(command: str) -> None:
    top = schema(command)
    objects = [top, *top.get("$defs", {}).values()]
    said = {key: value.get("description", "") for node in objects for key, value in node.get("properties", {}).items()}
    assert said
    assert [key for key, text in said.items() if not text.strip()] == []


def test_an_answer_that_is_not_of_the_schema_is_seen() -> None:
    top = schema("verify")
    good: dict[str, Any] = {
        "schema_version": 1,
        "ratio": None,
        "mean_absolute_error": 0.5,
        "reference": "a",
        "forecast_step": 1,
        "truth_step": 1,
        "clock": "steps",
        "trained": 1.0,
        "per_tensor": [{"name": "w", "num_elements": 3, "ratio": 0.5}],
    }
    assert problems(good, top, top) == []
    for wrong in (
        {"clock": "weeks"},
        {"schema_version": 2},
        {"ratio": "0.5"},
        {"more": 1},
        {"per_tensor": [{"name": "w", "ratio": 0.5}]},
    ):
        assert len(problems(good | wrong, top, top)) == 1, wrong


# --- how values are spelled ------------------------------------------------------------------------------------------


def fit_answer(**more: Any) -> FitAnswer:
    figures = {"coherence": math.nan, "recent_coherence": math.inf, "significance": np.float64(0.1) + 0.2}
    counts = {"origin_step": 8, "num_snapshots": 2, "num_tensors": 1, "bytes_read": 5, "sampled": None, "leap": None}
    asked: dict[str, Any] = (
        {"schema_version": 1, "forecaster": Path("f"), "notes": (), "seconds": 1.23456} | figures | counts | more
    )
    return FitAnswer(**asked)


def test_a_number_that_cannot_be_had_is_null_seconds_are_rounded_and_others_are_not() -> None:
    assert fit_answer().as_json() == (
        '{"schema_version": 1, "forecaster": "f", "origin_step": 8, "num_snapshots": 2, "leap": null, "notes": [],'
        ' "num_tensors": 1, "sampled": null, "coherence": null, "recent_coherence": null,'
        ' "significance": 0.30000000000000004, "bytes_read": 5, "seconds": 1.235}'
    )


def test_a_name_that_is_no_text_is_spelled_as_python_spells_it() -> None:
    assert read_json(fit_answer(forecaster=Path("r\udcffun"), notes=("r\udcffun",)).as_json())["notes"] == ["r\udcffun"]
    assert '"forecaster": "r\\udcffun"' in fit_answer(forecaster=Path("r\udcffun")).as_json()


@pytest.mark.parametrize(("value", "written"), [(math.nan, None), (math.inf, None), (1 / 3, 0.3333333333)])
def test_a_figure_of_a_sidecar_has_ten_digits(value: float, written: float | None) -> None:
    entry = InputEntry(path="a", step=1, bytes=1, digest="", mean_weight=value)
    assert entry.model_dump()["mean_weight"] == written


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_command_the_schemas_of_all_are_printed(call_cli: CallCli, tmp_path: Path) -> None:
    content = read_json(call_cli("schema", cwd=tmp_path).stdout)
    assert content == {name: schema(name) for name in ANSWERS}
    assert content["fit"]["$schema"].startswith("https://json-schema.org/")


def test_a_schema_of_no_command_is_a_usage_error(call_cli: CallCli, tmp_path: Path) -> None:
    done = call_cli("schema", "sidecars", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.errors == [f"error: sidecars: expected one of {', '.join(ANSWERS)}"]


def test_the_command_line_alone_imports_nothing_that_answers_need() -> None:
    code = "import sys, farcast_cli.cli; print(sorted({'pydantic', 'numpy', 'farcast_cli.results'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
