"""Every kind of tensor that a checkpoint holds: what is forecast, what is copied, and what is said of it."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file

from farcast_cli.errors import FileFormatError, MixedRunsError
from farcast_cli.formats.safetensors_file import encode_header, read_safetensors
from farcast_cli.run.alignment import align, since_last_change
from farcast_cli.run.quantised import quantised_owner
from farcast_cli.run.trajectory import discover
from farcast_cli.tensors import BY_CODE, DTYPES, FLOATING
from tests.tiny import fit_run, predict_run, save_safetensors, wander, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.conftest import CallCli

    Tensors = Mapping[str, torch.Tensor]

STEPS = tuple(range(100, 1400, 100))
SIZES = {"a": 60, "b": 7}
HORIZON = 200


def run_of(folder: Path, at: Callable[[int], Tensors], steps: Sequence[int] = STEPS, *, ending: str = "safetensors") -> Path:
    """One file per step with two wandering tensors, `a` and `b`, and what `at` adds, replaces or (empty dict) leaves."""
    arrays = wander(1, num_snapshots=len(STEPS), sizes=SIZES)
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        index = STEPS.index(step)
        tensors = {name: torch.from_numpy(values[index]).float() for name, values in arrays.items()} | dict(at(step))
        if ending == "safetensors":
            save_safetensors(folder / f"step_{step}.safetensors", tensors)
        else:
            torch.save({"model": tensors, "step": step}, folder / f"step_{step}.pt")
    return folder


def path_of(seed: int, shape: Sequence[int], step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Where a tensor of any shape is at a step: a seeded curve that bends a little."""
    generator = torch.Generator().manual_seed(seed)
    start, speed, bend = (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for _ in range(3))
    share = step / STEPS[-1]
    return (start + speed * share + bend * share**2).to(dtype)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def forecast_of(run: Path, output: Path, **request: Any) -> dict[str, torch.Tensor]:
    """The tensors that a forecast of a run's last snapshot holds."""
    predict_run(fit_run(run), output, horizons=[HORIZON], **request)
    if output.suffix == ".safetensors":
        return load_file(output)
    model = torch.load(output, weights_only=True)["model"]
    assert isinstance(model, dict)
    return model


def reasons(run: Path) -> dict[str, str]:
    return {copied.name: copied.reason for copied in align(discover(run).snapshots).copied}


# --- tensors that appear, vanish or change their shape ---------------------------------------------------------------


def resized(step: int) -> Tensors:
    """A vocabulary that grows from 5 to 6 words at step 600."""
    return {"embed": path_of(1, (6, 3), step)[: 5 if step < 600 else 6]}


def with_head(step: int) -> Tensors:
    return {"head": path_of(2, (4,), step)} if step >= 600 else {}


def without_head(step: int) -> Tensors:
    return {"head": path_of(2, (4,), step)} if step < 600 else {}


def resized_twice(step: int) -> Tensors:
    return {"embed": path_of(1, (6, 3), step)[: 4 if step < 300 else 5 if step < 600 else 6]}


def no_longer_fp8(step: int) -> Tensors:
    return {"w": path_of(3, (4,), step).to(torch.float8_e4m3fn if step < 600 else torch.bfloat16)}


CHANGES: dict[str, tuple[Callable[[int], Tensors], str]] = {
    "a vocabulary that grows": (resized, "embed changed its shape from [5, 3] to [6, 3]"),
    "a head that is added": (with_head, "head appeared"),
    "a head that is removed": (without_head, "head vanished"),
    "a vocabulary that grows twice": (resized_twice, "embed changed its shape from [5, 3] to [6, 3]"),
    "a weight that was quantised": (no_longer_fp8, "w changed its type from float8_e4m3fn to bfloat16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_history_begins_where_the_tensors_last_changed_and_the_forecast_is_that_of_the_snapshots_since(
    tmp_path: Path, call_cli: CallCli, what: str
) -> None:
    at, told = CHANGES[what]
    run_of(tmp_path / "run", at)
    run_of(tmp_path / "later", at, STEPS[5:])
    line = f"history begins at step 600, where {told}; 5 snapshots before it are left out"
    for name in ("run", "later"):
        done = call_cli("fit", name, "-o", f"{name}.safetensors", cwd=tmp_path)
        assert (done.returncode, line in done.stderr.splitlines()) == (0, name == "run")
        assert "fitted 8 snapshots, steps 600 to 1300" in done.stderr
        options = ("--forecaster", f"{name}.safetensors", "--horizon", HORIZON, "--even-if-worse")
        assert call_cli("predict", *options, "-o", f"{name}-out.safetensors", cwd=tmp_path).returncode == 0
    written = [(tmp_path / f"{name}-out.safetensors").read_bytes() for name in ("run", "later")]
    assert written[0] == written[1]
    assert load_file(tmp_path / "run-out.safetensors").keys() == {"a", "b", *at(1300)}


def test_inspect_backtest_and_json_say_where_the_history_begins(tmp_path: Path, call_cli: CallCli) -> None:
    run_of(tmp_path / "run", resized)
    line = "history begins at step 600, where embed changed its shape from [5, 3] to [6, 3]; 5 snapshots before it are left out"
    shown = call_cli("inspect", "run", cwd=tmp_path)
    assert f"note: {line}" in shown.stdout.splitlines()
    assert "forecast: 3 tensors, 85 parameters" in shown.stdout
    assert line in json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path).stdout)["notes"]
    assert line in call_cli("backtest", "run", "--horizon", 100, cwd=tmp_path).stderr.splitlines()
    told = json.loads(call_cli("fit", "run", "--json", cwd=tmp_path).stdout)
    assert (told["notes"], told["num_snapshots"]) == ([line], 8)


def test_too_few_snapshots_since_a_change_are_counted_and_excluding_the_tensor_keeps_the_whole_history(
    tmp_path: Path, call_cli: CallCli
) -> None:
    def at(step: int) -> Tensors:
        return {"embed": path_of(1, (6, 3), step)[: 5 if step < 900 else 6]}

    run = run_of(tmp_path / "run", at)
    for command in ("fit", "inspect"):
        done = call_cli(command, "run", cwd=tmp_path)
        said = done.stdout + done.stderr
        assert done.returncode == 3
        assert "step_800.safetensors to step_900.safetensors: tensor 'embed' changed its shape from [5, 3] to [6, 3]" in said
        assert "5 snapshots since, and fit needs 6" in said
        assert "--exclude 'embed' copies it from the last snapshot and uses the whole history; --steps" in said
    done = call_cli("fit", "run", "--exclude", "embed", cwd=tmp_path)
    assert "fitted 13 snapshots" in done.stderr
    assert "1 tensor copied: excluded (1, as embed)" in done.stderr.splitlines()
    assert call_cli("predict", "--horizon", 200, "--even-if-worse", "-o", "out.safetensors", cwd=tmp_path).returncode == 0
    written, last = load_file(tmp_path / "out.safetensors"), load_file(run / "step_1300.safetensors")
    assert torch.equal(written["embed"], last["embed"])
    assert not torch.equal(written["a"], last["a"])


def test_several_tensors_that_changed_are_counted_and_the_first_ones_named_in_the_hint(tmp_path: Path) -> None:
    def at(step: int, *, num_late: int) -> Tensors:
        return {f"late{i}": path_of(i, (3,), step) for i in range(num_late if step == STEPS[-1] else 0)}

    for num_late, more in ((1, ""), (2, ", and 1 more tensor changed"), (5, ", and 4 more tensors changed")):
        run = run_of(tmp_path / str(num_late), lambda step, num_late=num_late: at(step, num_late=num_late))  # type: ignore[misc]
        snapshots = discover(run).snapshots
        with pytest.raises(MixedRunsError) as caught:
            since_last_change(snapshots, minimum=6)
        assert f"tensor 'late0' appeared{more}; 1 snapshot since, and fit needs 6" in str(caught.value)
        named = " ".join(f"--exclude 'late{i}'" for i in range(min(num_late, 3))) + " ..." * (num_late > 3)
        copies = "copies it" if num_late == 1 else "copies them"
        assert caught.value.hint.startswith(f"{named} {copies} from the last snapshot")
        assert since_last_change(snapshots, exclude=["late*"], minimum=6) == (snapshots, "")


def test_a_removed_tensor_that_is_excluded_keeps_the_whole_history(tmp_path: Path) -> None:
    snapshots = discover(run_of(tmp_path / "run", without_head)).snapshots
    kept, note = since_last_change(snapshots, exclude=["head"], minimum=6)
    assert (len(kept), note) == (13, "")
    assert {tensor.name for tensor in align(kept, exclude=["head"]).tensors} == {"a", "b"}


@pytest.mark.parametrize(
    "at",
    [
        lambda step: {"x" if step < 600 else "y": path_of(4, (90,), step)},
        lambda step: {"x": path_of(4, (9, 10) if step < 600 else (9, 12), step)},
    ],
    ids=["other names", "another width"],
)
def test_a_change_that_leaves_less_than_half_of_the_parameters_is_two_models(
    tmp_path: Path, call_cli: CallCli, at: Callable[[int], Tensors]
) -> None:
    run_of(tmp_path / "run", at)
    done = call_cli("fit", "run", cwd=tmp_path)
    assert done.returncode == 3
    assert "step_500.safetensors to step_600.safetensors: two models" in done.stderr
    assert "hint: keep one run in the folder, or choose its steps with --steps FROM:TO" in done.stderr


def test_tensors_that_are_copied_anyway_may_come_go_and_change_without_touching_the_history(tmp_path: Path) -> None:
    def at(step: int) -> Tensors:
        late = {"new_ids": torch.arange(3), "new_empty": torch.empty(0, 2)} if step >= 1200 else {"old_mask": torch.ones(2) > 0}
        return late | {"position_ids": torch.arange(step // 100)[None], "num": torch.tensor([step, 7])}

    run = run_of(tmp_path / "run", at)
    kept, note = since_last_change(discover(run).snapshots, minimum=6)
    assert (len(kept), note) == (13, "")
    assert reasons(run) == {
        "new_ids": "not in every snapshot",
        "new_empty": "not in every snapshot",
        "position_ids": "changed its shape at step 1300",
        "num": "int64 is not forecast",
    }
    written = forecast_of(run, tmp_path / "out.safetensors")
    assert written.keys() == {"a", "b", *at(1300)}
    assert all(torch.equal(written[name], value) for name, value in at(1300).items())


# --- element types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_type_that_changes_along_the_way_is_no_break_and_is_said(tmp_path: Path, call_cli: CallCli, ending: str) -> None:
    """The oracle is the same run stored in float32 throughout, written in bfloat16."""

    def at(step: int, *, stored: torch.dtype) -> Tensors:
        rounded = {name: path_of(seed, (30,), step) for seed, name in enumerate("vw")}
        if step < 600:
            return rounded
        return {name: value.to(torch.bfloat16).to(stored) for name, value in rounded.items()}

    for name, stored in (("mixed", torch.bfloat16), ("same", torch.float32)):
        run_of(tmp_path / name, lambda step, stored=stored: at(step, stored=stored), ending=ending)  # type: ignore[misc]
    done = call_cli("fit", "mixed", cwd=tmp_path)
    line = "forecast: v, w (float32, bfloat16 from step 600 on)"
    assert line in done.stderr.splitlines()
    assert "history begins" not in done.stderr
    assert line in call_cli("inspect", "mixed", cwd=tmp_path).stdout.splitlines()
    mixed = forecast_of(tmp_path / "mixed", tmp_path / f"mixed.{ending}")
    same = forecast_of(tmp_path / "same", tmp_path / f"same.{ending}", dtype="bfloat16")
    for name in "wv":
        assert mixed[name].dtype == torch.bfloat16
        assert torch.equal(mixed[name], same[name])


NOT_FLOATING = sorted(set(DTYPES) - {*FLOATING, "complex64", "complex128", "complex32"})


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_tensors_of_every_other_type_keep_their_bytes_and_are_listed(tmp_path: Path, ending: str) -> None:
    def at(step: int) -> dict[str, torch.Tensor]:
        raw = torch.arange(48, dtype=torch.uint8) + step % 70
        return {name: (raw % 2 if name == "bool" else raw.clone()).view(getattr(torch, name)) for name in NOT_FLOATING}

    run = run_of(tmp_path / "run", at, ending=ending)
    written = forecast_of(run, tmp_path / f"out.{ending}", dtype="bfloat16")
    last = at(1300)
    assert {name for name, value in written.items() if name in last and value.dtype == last[name].dtype} == last.keys()
    assert all(bytes_of(written[name]) == bytes_of(value) for name, value in last.items())
    listed = reasons(run)
    packed = {"float4_e2m1fn_x2": "float4_e2m1fn"} if ending == "safetensors" else {}
    assert listed == {name: f"{packed.get(name, name)} is not forecast" for name in last}
    assert written["a"].dtype == torch.bfloat16


def write_packed(path: Path, code: str, data: bytes, others: Tensors) -> None:
    """A file with a tensor (4, 32) of a type that the library reads, but neither it nor torch writes."""
    header: dict[str, Any] = {"packed": {"dtype": code, "shape": [4, 32], "data_offsets": [0, len(data)]}}
    body = data
    for name, value in others.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(body), len(body) + value.nbytes]}
        body += bytes_of(value)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def packed_in(path: Path) -> dict[str, Any]:
    """The tensor as the safetensors library finds it, by its code, shape and bytes."""
    return dict(deserialize(path.read_bytes()))["packed"]  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(("code", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_elements_of_less_than_a_byte_are_copied_and_sharded_by_their_true_size(tmp_path: Path, code: str, bits: int) -> None:
    num_bytes = 4 * 32 * bits // 8
    for step in STEPS:
        folder = tmp_path / "run" / f"step{step}"
        others = {name: path_of(seed, (40,), step) for seed, name in enumerate("ab")}
        write_packed(folder / "model.safetensors", code, bytes(i * step % 251 for i in range(num_bytes)), others)
        (folder / "config.json").write_text("{}")
    last = packed_in(tmp_path / "run/step1300/model.safetensors")
    fitted = fit_run(tmp_path / "run")
    assert {copied.name: copied.reason for copied in fitted.copied} == {"packed": f"{BY_CODE[code].name} is not forecast"}
    predict_run(fitted, tmp_path / "whole", horizons=[HORIZON])
    predict_run(fitted, tmp_path / "out", horizons=[HORIZON], max_shard_bytes=200)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 160 + num_bytes
    assert packed_in(tmp_path / "whole/model.safetensors") == last
    assert packed_in(tmp_path / "out" / index["weight_map"]["packed"]) == last


def test_packed_elements_that_fill_no_whole_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_1.safetensors"
    path.write_bytes(encode_header([("w", BY_CODE["F4"], (3,))], {}) + bytes(1))
    with pytest.raises(FileFormatError, match="'w': 3 elements of 4 bits fill no whole bytes"):
        read_safetensors(path)


# --- complex numbers -------------------------------------------------------------------------------------------------

COMPLEX = [
    ("safetensors", torch.complex64),
    ("pt", torch.complex64),
    ("pt", torch.complex128),
]


@pytest.mark.parametrize(("ending", "dtype"), COMPLEX)
@pytest.mark.parametrize("asked", ["source", "bfloat16"])
def test_a_complex_tensor_is_forecast_as_the_pairs_of_reals_that_it_is(
    tmp_path: Path, call_cli: CallCli, ending: str, dtype: torch.dtype, asked: str
) -> None:
    def at(step: int, *, pairs: bool) -> Tensors:
        turned = torch.view_as_complex(path_of(6, (5, 3, 2), step, torch.float64)).to(dtype).T
        values = {"w": torch.view_as_complex(path_of(5, (4, 6, 2), step, torch.float64)).to(dtype), "turned": turned}
        return {name: torch.view_as_real(value) if pairs else value for name, value in values.items()}

    written = {}
    for pairs in (True, False):
        run_of(tmp_path / f"run{pairs}", lambda step, pairs=pairs: at(step, pairs=pairs), ending=ending)  # type: ignore[misc]
        done = call_cli("fit", f"run{pairs}", "-o", "f", cwd=tmp_path)
        output = tmp_path / f"out{pairs}.{ending}"
        options = ("--forecaster", "f", "--horizon", HORIZON, "--even-if-worse", "--dtype", "source" if pairs else asked)
        assert call_cli("predict", *options, "-o", output, cwd=tmp_path).returncode == 0
        loaded = load_file(output) if ending == "safetensors" else torch.load(output, weights_only=True)["model"]
        written[pairs] = loaded
    part = "float32" if dtype == torch.complex64 else "float64"
    assert f"(complex{'64' if part == 'float32' else '128'}, as pairs of {part})" in done.stderr
    for name in ("w", "turned"):
        assert written[False][name].dtype == dtype
        assert torch.equal(written[False][name], torch.view_as_complex(written[True][name].contiguous()))
        assert not torch.equal(written[False][name], at(1300, pairs=False)[name])
    assert written[False]["a"].dtype == (torch.float32 if asked == "source" else torch.bfloat16)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_half_precision_complex_numbers_are_copied(tmp_path: Path) -> None:
    def at(step: int) -> Tensors:
        return {"w": path_of(5, (4, 4), step, torch.float16).view(torch.complex32)}

    run = run_of(tmp_path / "run", at, ending="pt")
    assert reasons(run) == {"w": "complex32 is not forecast"}
    assert bytes_of(forecast_of(run, tmp_path / "out.pt")["w"].view(torch.float16)) == bytes_of(
        at(1300)["w"].view(torch.float16)
    )


# --- quantised weights -----------------------------------------------------------------------------------------------

INT, FP8 = torch.int32, torch.float8_e4m3fn
QUANTISED: dict[str, tuple[str, dict[str, torch.dtype], tuple[str, ...]]] = {
    "bitsandbytes 4 bit": (
        "l.weight",
        {"l.weight": torch.uint8, "l.weight.absmax": torch.uint8, "l.weight.quant_state.bitsandbytes__nf4": torch.uint8},
        ("l.weight.quant_map", "l.weight.nested_absmax", "l.weight.nested_quant_map"),
    ),
    "bitsandbytes 8 bit": ("l.weight", {"l.weight": torch.int8, "l.weight_format": torch.uint8}, ("l.SCB",)),
    "bitsandbytes, older": ("l.weight", {"l.weight": torch.int8}, ("l.weight.SCB",)),
    "GPTQ and AWQ": ("l.qweight", {"l.qweight": INT, "l.qzeros": INT, "l.g_idx": INT}, ("l.scales",)),
    "fp8 by block": ("l.weight", {"l.weight": FP8}, ("l.weight_scale_inv",)),
    "fp8 by tensor": ("l.weight", {"l.weight": FP8}, ("l.weight_scale", "l.input_scale", "l.output_scale")),
    "experts in fp8": ("l.gate_up_proj", {"l.gate_up_proj": FP8}, ("l.gate_up_proj_scale",)),
    "compressed-tensors": (
        "l.weight_packed",
        {"l.weight_packed": INT, "l.weight_shape": torch.int64},
        ("l.weight_scale", "l.weight_zero_point"),
    ),
    "HQQ": ("l.W_q", {"l.W_q": torch.uint8}, ("l.scale", "l.zero")),
    "quanto": ("l.weight._data", {"l.weight._data": torch.int8}, ("l.weight._scale", "l.weight._shift")),
    "a module by itself": ("qweight", {"qweight": INT}, ("scales",)),
}


@pytest.mark.parametrize("what", QUANTISED)
def test_the_scales_of_a_quantised_weight_are_copied_with_it_and_an_adapter_on_it_is_forecast(
    tmp_path: Path, what: str
) -> None:
    owner, integers, floats = QUANTISED[what]

    def at(step: int) -> Tensors:
        found = {name: torch.full((8,), step % 100 + 3).to(dtype) for name, dtype in integers.items()}
        found |= {name: path_of(seed, (5,), step) for seed, name in enumerate(floats)}
        return found | {"l.lora_A.default.weight": path_of(9, (5,), step), "l.bias": path_of(8, (5,), step)}

    run = run_of(tmp_path / "run", at)
    written, last = forecast_of(run, tmp_path / "out.safetensors"), at(1300)
    for name in (*integers, *floats):
        assert bytes_of(written[name]) == bytes_of(last[name]), name
    assert {name: why for name, why in reasons(run).items() if name in floats} == dict.fromkeys(
        floats, f"belongs to {owner}, which is quantised"
    )
    for name in ("l.lora_A.default.weight", "l.bias", "a"):
        assert name not in reasons(run)
    assert not torch.equal(written["l.lora_A.default.weight"], last["l.lora_A.default.weight"])


@pytest.mark.parametrize("name", ["norm.scale", "logit_scale", "k_scale", "weight_scale", "attn.scales", "weight.absmax"])
def test_a_scale_without_a_quantised_weight_beside_it_belongs_to_nothing(name: str) -> None:
    assert quantised_owner(name, {"position_ids", "other.weight", "attn.mask"}) == ""


# --- shapes and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_number_by_itself_is_forecast_and_stays_one(tmp_path: Path, ending: str) -> None:
    """On a straight path the line's forecast is the path itself."""

    def at(step: int) -> Tensors:
        return {"logit_scale": torch.tensor(2.5 + step / 1000), "temperature": torch.tensor([1.0 - step / 4000])}

    written = forecast_of(run_of(tmp_path / "run", at, ending=ending), tmp_path / f"out.{ending}", method="line")
    for name, expected in at(1300 + HORIZON).items():
        assert written[name].shape == expected.shape
        torch.testing.assert_close(written[name], expected, rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_constant_buffers_keep_their_bits_and_empty_ones_their_shape(tmp_path: Path, ending: str) -> None:
    buffers = {
        "rotary.inv_freq": 1 / 10000 ** (torch.arange(0, 8, 2) / 8),
        "rotary.cos_cached": torch.cos(torch.arange(12.0)).view(3, 4),
        "attn.masked_bias": torch.tensor(-1e4),
        "attn.bias": torch.ones(4, 4).tril().bool(),
        "position_ids": torch.arange(9)[None],
        "causal": torch.full((3, 3), float("-inf")).triu(1),
        "none": torch.empty(0, 3),
        "negative_zero": torch.tensor([-0.0, 0.0]),
    }
    written = forecast_of(run_of(tmp_path / "run", lambda _: buffers, ending=ending), tmp_path / f"out.{ending}")
    for name, value in buffers.items():
        assert (written[name].shape, written[name].dtype) == (value.shape, value.dtype)
        assert bytes_of(written[name]) == bytes_of(value), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch warns of its own quantised tensors
def test_tensors_that_are_no_plain_memory_are_copied_as_they_are(tmp_path: Path) -> None:
    def at(step: int) -> dict[str, torch.Tensor]:
        pairs = path_of(3, (4, 2), step)
        return {
            "sparse": torch.eye(3).to_sparse() * step,
            "quantised": torch.quantize_per_tensor(pairs, 0.1, 0, torch.qint8),
            "conjugated": torch.view_as_complex(pairs).conj(),
        }

    run = run_of(tmp_path / "run", lambda step: at(step) if step >= 1000 else {}, ending="pt")
    assert reasons(run).keys() == at(1300).keys()
    assert all("not forecast" in why for why in reasons(run).values())
    written, last = forecast_of(run, tmp_path / "out.pt"), at(1300)
    assert torch.equal(written["sparse"].to_dense(), last["sparse"].to_dense())
    assert torch.equal(written["quantised"].int_repr(), last["quantised"].int_repr())
    assert torch.equal(written["conjugated"], last["conjugated"])
    assert not torch.equal(written["a"], torch.load(run / "step_1300.pt", weights_only=True)["model"]["a"])


# --- tied weights ----------------------------------------------------------------------------------------------------


def test_a_transformers_model_with_tied_weights_gets_exactly_its_own_keys_and_loads_tied(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    for step in STEPS[:7]:
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(path_of(seed, parameter.shape, step))
        model.save_pretrained(tmp_path / "run" / f"step{step}")
    predict_run(fit_run(tmp_path / "run"), tmp_path / "out", horizons=[HORIZON])
    keys = load_file(tmp_path / "run/step700/model.safetensors").keys()
    assert "lm_head.weight" not in keys
    assert load_file(tmp_path / "out/model.safetensors").keys() == keys
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert not torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_an_untied_duplicate_is_forecast_by_itself(tmp_path: Path, ending: str) -> None:
    def at(step: int) -> Tensors:
        return {"embed": path_of(1, (6, 3), step), "head": path_of(2, (6, 3), step)}

    def alone(step: int, name: str) -> Tensors:
        return {name: at(step)[name]}

    both = forecast_of(run_of(tmp_path / "both", at, ending=ending), tmp_path / f"both.{ending}", method="line")
    for name in ("embed", "head"):
        run = run_of(tmp_path / name, lambda step, name=name: alone(step, name), ending=ending)  # type: ignore[misc]
        assert torch.equal(both[name], forecast_of(run, tmp_path / f"{name}.{ending}", method="line")[name])


def test_weights_that_are_tied_from_some_step_on_stay_tied_and_are_no_break(tmp_path: Path) -> None:
    def at(step: int) -> Tensors:
        embed = path_of(1, (6, 3), step)
        return {"embed": embed, "head": embed if step >= 600 else path_of(2, (6, 3), step)}

    run = run_of(tmp_path / "run", at, ending="pt")
    assert since_last_change(discover(run).snapshots, minimum=6)[1] == ""
    assert reasons(run) == {"head": "tied to embed"}
    written = forecast_of(run, tmp_path / "out.pt")
    assert written["head"].data_ptr() == written["embed"].data_ptr()


# --- wrappers' prefixes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [1300, 1000])
def test_prefixes_that_come_and_go_change_no_value_and_the_output_has_the_origins_own_names(
    tmp_path: Path, call_cli: CallCli, origin: int
) -> None:
    plain = run_of(tmp_path / "plain", lambda _: {}, ending="pt")
    (tmp_path / "run").mkdir()
    prefix = dict(zip(STEPS, itertools.cycle(["module.", "", "_orig_mod."]), strict=False))
    for step in STEPS:
        model = torch.load(plain / f"step_{step}.pt", weights_only=True)["model"]
        renamed = {prefix[step] + name: value for name, value in model.items()}
        torch.save({"model": renamed, "step": step}, tmp_path / "run" / f"step_{step}.pt")
    found = []
    for name in ("plain", "run"):
        assert call_cli("fit", name, "-o", "f", cwd=tmp_path).returncode == 0
        options = ("--forecaster", "f", "--horizon", HORIZON, "--origin", origin, "--even-if-worse")
        assert call_cli("predict", *options, "-o", f"{name}.pt", cwd=tmp_path).returncode == 0
        found.append(torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"])
    assert list(found[1]) == [prefix[origin] + name for name in found[0]]
    assert all(torch.equal(found[1][prefix[origin] + name], value) for name, value in found[0].items())


# --- what is said ----------------------------------------------------------------------------------------------------


def test_fit_and_predict_say_in_one_line_what_is_copied_and_why(tmp_path: Path, call_cli: CallCli) -> None:
    def at(step: int) -> Tensors:
        ids = {f"ids{i}": torch.arange(3) for i in range(3)}
        layers = {f"{i}.weight": torch.zeros(4, dtype=torch.int8) for i in range(2)}
        scales = {f"{i}.weight_scale": path_of(i, (3,), step) for i in range(2)}
        return ids | layers | scales | {"bn.num_batches_tracked": torch.tensor(step)}

    run_of(tmp_path / "run", at)
    kinds = [
        "int64 is not forecast (3, as ids0)",
        "int8 is not forecast (2, as 0.weight)",
        "belongs to another, which is quantised (2, as 0.weight_scale)",
    ]
    fitted = call_cli("fit", "run", cwd=tmp_path).stderr
    counter = "a counter, advanced with the trainer's own (1, as bn.num_batches_tracked)"
    assert lines_about_copies(fitted, "8 tensors copied: ") == {*kinds, counter}
    done = call_cli("predict", "--horizon", 200, "--even-if-worse", "-o", "out.safetensors", cwd=tmp_path)
    assert lines_about_copies(done.stderr, "7 tensors copied: ") == {*kinds}
    told = call_cli("predict", "--horizon", 200, "--even-if-worse", "--json", "-o", "b.safetensors", cwd=tmp_path)
    assert json.loads(told.stdout)["num_copied"] == 7
    loud = call_cli("predict", "--horizon", 200, "--even-if-worse", "-v", "-o", "c.safetensors", cwd=tmp_path).stderr
    assert "  copied 1.weight_scale: belongs to 1.weight, which is quantised" in loud.splitlines()
    assert "  bn.num_batches_tracked: 1300 -> 1500" in loud.splitlines()


def lines_about_copies(text: str, start: str) -> set[str]:
    """The kinds in the one line that says what is copied."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return set(line.removeprefix(start).split("; "))


def test_more_kinds_than_fit_in_a_line_are_counted(tmp_path: Path, call_cli: CallCli) -> None:
    names = ("uint8", "int8", "int16", "int32", "int64", "bool", "uint16", "uint32")
    run_of(tmp_path / "run", lambda _: {name: torch.zeros(4).to(getattr(torch, name)) for name in names})
    said = call_cli("fit", "run", cwd=tmp_path).stderr
    (line,) = [line for line in said.splitlines() if line.startswith("8 tensors copied: ")]
    assert line.count("is not forecast (1, as ") == 6
    assert line.endswith(", and 2 more reasons (-v lists all)")


def test_a_run_of_one_type_and_shape_throughout_has_nothing_to_say(tmp_path: Path, call_cli: CallCli) -> None:
    write_run(tmp_path / "run", wander(1, num_snapshots=8, sizes=SIZES), STEPS[:8])
    said = call_cli("fit", "run", cwd=tmp_path).stderr
    assert "copied:" not in said
    assert "history begins" not in said
    assert np.isfinite(fit_run(tmp_path / "run").gram.matrix).all()
