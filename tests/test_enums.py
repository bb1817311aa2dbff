"""Enums as Python 3.11.0 to 3.11.3 pickle them, by `getattr`: read as data, written back the same, and nothing else is."""

from __future__ import annotations

import enum
import importlib
import io
import pickle
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.errors import FarcastError, UnsafeFileError
from farcast_cli.formats.copied_file import refuse_code_in
from farcast_cli.formats.pickle_names import ENUMS, is_data, is_member
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import Member, Name, encode_pickle
from farcast_cli.trainers.transformers_rates import FORMULAS
from tests.conftest import CallCli, make_torch_run
from tests.corpus import make_dcp_run, make_hf_run, short, text, torch_zip

if TYPE_CHECKING:
    from pathlib import Path


class _Speed(enum.Enum):
    FAST = "fast"
    slow = 2


class _Pickler(pickle.Pickler):
    """As those versions have it."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


_AS_THEN = SimpleNamespace(Pickler=_Pickler, __name__="pickle")


def _dumps(value: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


# --- read, written back, copied --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_member_is_read_as_data_and_copied(tmp_path: Path, protocol: int) -> None:
    raw = _dumps({"a": _Speed.FAST, "b": [_Speed.slow, _Speed.FAST], _Speed.slow: 1}, protocol)
    assert b"getattr" in raw
    (tmp_path / "a.pt").write_bytes(torch_zip(raw))
    refuse_code_in(tmp_path / "a.pt")
    tree = read_torch_file(tmp_path / "a.pt").tree
    fast = tree["a"]
    assert isinstance(fast, Member)
    assert fast.args == (Name(__name__, "_Speed"), "FAST")
    assert tree["b"][1] is fast
    assert pickle.loads(encode_pickle(tree)) == {"a": _Speed.FAST, "b": [_Speed.slow, _Speed.FAST], _Speed.slow: 1}  # noqa: S301 - ours


@pytest.mark.parametrize("value", [_Speed.FAST, [_Speed.FAST, _Speed.slow, _Speed.FAST]])
def test_a_member_is_written_by_the_opcodes_that_it_was_read_from(tmp_path: Path, value: object) -> None:
    raw = _dumps(value, 2)
    (tmp_path / "a.pt").write_bytes(torch_zip(raw))
    assert encode_pickle(read_torch_file(tmp_path / "a.pt").tree) == raw


@pytest.mark.parametrize("protocol", range(2))
def test_a_member_in_an_old_protocol_is_copied(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "state").write_bytes(_dumps([_Speed.FAST, _Speed.slow, _Speed.FAST], protocol))
    refuse_code_in(tmp_path / "state")


def test_a_great_many_members_are_copied(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(_dumps([[_Speed.FAST, f"{number}", _Speed.slow] for number in range(5_000)], 4))
    refuse_code_in(tmp_path / "state")


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_payload_with_members_goes_through_a_forecast(tmp_path: Path, call_cli: CallCli, protocol: int) -> None:
    run = make_torch_run(tmp_path / "run")
    for path in run.iterdir():
        payload = {**torch.load(path), "speed": _Speed.FAST}
        torch.save(payload, path, pickle_module=_AS_THEN, pickle_protocol=protocol)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    made = torch.load(tmp_path / "forecasts" / "run" / "ckpt_90.pt", weights_only=False)
    assert (made["step"], made["speed"]) == (90, _Speed.FAST)


def test_a_distributed_checkpoint_with_members_is_forecast(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_dcp_run(tmp_path / "run")
    for snapshot in run.iterdir():
        metadata = pickle.loads((snapshot / ".metadata").read_bytes())  # noqa: S301 - ours
        (snapshot / ".metadata").write_bytes(_dumps(metadata, 4))
        assert b"getattr" in (snapshot / ".metadata").read_bytes()
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "100", "--even-if-worse", cwd=tmp_path).returncode == 0
    (made,) = (tmp_path / "forecasts" / "run").glob("step-*")
    properties = [
        pickle.loads((place / ".metadata").read_bytes()).state_dict_metadata["model.w"].properties  # noqa: S301 - ours
        for place in (run / "step-800", made)
    ]
    assert properties[0] == properties[1]
    assert b"getattr" in (made / ".metadata").read_bytes()


def test_a_trainers_arguments_with_members_are_copied_byte_for_byte(tmp_path: Path, call_cli: CallCli) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, lr_scheduler_type="cosine")
    torch.save(arguments, tmp_path / "training_args.bin", pickle_module=_AS_THEN)
    run = make_hf_run(tmp_path / "run")
    for snapshot in run.iterdir():
        shutil.copy(tmp_path / "training_args.bin", snapshot)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", "10", "--even-if-worse", cwd=tmp_path).returncode == 0
    copied = (tmp_path / "forecasts" / "run" / "checkpoint-810" / "training_args.bin").read_bytes()
    assert copied == (tmp_path / "training_args.bin").read_bytes()
    (state,) = read_torch_file(tmp_path / "training_args.bin").tree.states
    assert state["lr_scheduler_type"].args[1] == "COSINE"


def test_a_schedules_value_is_its_members_name_in_small_letters() -> None:
    from transformers.trainer_utils import SchedulerType

    assert FORMULAS.keys() <= {kind.value for kind in SchedulerType}
    assert [kind for kind in SchedulerType if kind.value in FORMULAS and kind.name.lower() != kind.value] == []


@pytest.mark.parametrize(("module", "name"), sorted(ENUMS))
def test_the_enums_on_the_list_are_enums(module: str, name: str) -> None:
    made = getattr(importlib.import_module(module), name)
    assert issubclass(made, enum.Enum)
    assert is_data(module, name)
    assert all(is_member(module, name, member) for member in made.__members__ if not member.startswith("_"))


# --- refused ---------------------------------------------------------------------------------------------------------

_GETATTR = b"cbuiltins\ngetattr\n"
_MEMBER = _GETATTR + b"cmylib\nSpeed\nVFAST\n\x86R"


def _of(module: str, name: str, member: str) -> bytes:
    return _GETATTR + f"c{module}\n{name}\n".encode() + text(member) + b"\x86R."


REFUSED: dict[str, bytes] = {
    "a module": _of("os", "path", "join"),
    "a function": _of("mylib", "warm_up", "FAST"),
    "a function of torch": _of("torch.nn.functional", "relu", "FAST"),
    "a class of torch that is no enum": _of("torch.nn.modules.linear", "Linear", "FAST"),
    "a storage": _of("torch", "FloatStorage", "from_file"),
    "a class of numpy": _of("numpy", "ndarray", "FAST"),
    "a class of Python's": _of("argparse", "Namespace", "FAST"),
    "a class of Python's under its old name": _of("__builtin__", "unicode", "FAST"),
    "a class of a package that compiles texts": _of("sympy.core.symbol", "Symbol", "FAST"),
    "a private name": _of("mylib", "Speed", "_missing_"),
    "a name in underscores": _of("mylib", "Speed", "__subclasses__"),
    "a name in dots": _of("mylib", "Speed", "FAST.value"),
    "no name": _of("mylib", "Speed", ""),
    "a name that does things": _of("mylib", "Speed", "from_pretrained"),
    "a class of the system's": _of("subprocess", "Popen", "FAST"),
    "a member of a member": _GETATTR + _MEMBER + b"Vname\n\x86R.",
    "getattr of getattr": _GETATTR + _GETATTR + b"V__self__\n\x86R.",
    "a text for a class": _GETATTR + b"Vmylib\nVFAST\n\x86R.",
    "an object for a class": _GETATTR + b"cmylib\nSpeed\n)RVFAST\n\x86R.",
    "bytes for a name": _GETATTR + b"cmylib\nSpeed\nC\x04FAST\x86R.",
    "a name worked out": _GETATTR + b"cmylib\nSpeed\ncbuiltins\nstr\n(VFAST\ntR\x86R.",
    "a default": _GETATTR + b"cmylib\nSpeed\nVFAST\nN\x87R.",
    "a list of arguments": _GETATTR + b"(cmylib\nSpeed\nVFAST\nlR.",
    "a member that is called": _MEMBER + b"(Vx\ntR.",
    "a member that is called from the memo": _MEMBER + b"q\x000h\x00(Vx\ntR.",
    "a member that makes an object": _MEMBER + b")\x81.",
    "a member that makes an object with names": b"\x80\x04" + _MEMBER + b")}\x92.",
    "a member that is changed": _MEMBER + b"}Vx\nK\x01sb.",
    "a member that is appended to": _MEMBER + b"K\x01a.",
    "a member that is extended": _MEMBER + b"(K\x01K\x02e.",
    "a member with an item": _MEMBER + b"VFAST\nK\x01s.",
    "a member with items": _MEMBER + b"(VFAST\nK\x01u.",
    "a member that is added to": b"\x80\x04" + _MEMBER + b"(K\x01\x90.",
    "a member that is called as the old class": b"(" + _MEMBER + b"Vx\no.",
    "a member that is doubled and called": _MEMBER + b"2Vx\n\x85R.",
    "arguments that are a member": b"cmylib\nSpeed\n" + _MEMBER + b"R.",
    "getattr itself": b"\x80\x02" + _GETATTR + b".",
    "getattr in a list": b"\x80\x02]" + _GETATTR + b"a.",
    "getattr as a key": b"\x80\x02}" + _GETATTR + b"K\x01s.",
    "getattr as an attribute": b"\x80\x02cmylib\nConfig\n)R}Vget\n" + _GETATTR + b"sb.",
    "getattr as an argument": b"cfunctools\npartial\n(" + _GETATTR + b"cmylib\nSpeed\nVFAST\ntR.",
    "getattr as a default": b"ccollections\ndefaultdict\n" + _GETATTR + b"\x85R.",
    "getattr as a default from the memo": b"ccollections\ndefaultdict\n" + _GETATTR + b"q\x00cmylib\nSpeed\nVFAST\n\x86R0h\x00\x85R.",
    "getattr that is made": _GETATTR + b"cmylib\nSpeed\nVFAST\n\x86\x81.",
    "getattr that is changed": b"\x80\x02" + _GETATTR + b"}b.",
    "getattr by the old opcode": b"(cmylib\nSpeed\nVFAST\nibuiltins\ngetattr\n.",
    "getattr as a class": b"(" + _GETATTR + b"cmylib\nSpeed\nVFAST\no.",
    "another number for a class": (
        b"cos\npath\nq\x000cmylib\nSpeed\nq\x010" + _GETATTR + b"h\x00VFAST\n\x86R."
    ),
    "a number that was given anew": (
        b"cmylib\nSpeed\nq\x000cos\npath\nq\x000" + _GETATTR + b"h\x00VFAST\n\x86R."
    ),
    "two flags together": b"c_operator\nor_\n" + _MEMBER + _MEMBER + b"\x86R.",
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("told", [b"", b"\x80\x02", b"\x80\x04"], ids=["untold", "protocol 2", "protocol 4"])
def test_any_other_use_of_getattr_is_refused_read_or_copied(tmp_path: Path, what: str, told: bytes) -> None:
    raw = REFUSED[what]
    raw = raw if raw.startswith(b"\x80") else told + raw
    (tmp_path / "a.pt").write_bytes(torch_zip(raw))
    for read, error in ((read_torch_file, FarcastError), (refuse_code_in, UnsafeFileError)):
        with pytest.raises(error):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_among_good_members_too(tmp_path: Path, what: str) -> None:
    raw = b"\x80\x04]" + _MEMBER + b"a" + short("mylib") + short("Speed") + b"\x930" + REFUSED[what].removeprefix(b"\x80\x02")
    (tmp_path / "a.pt").write_bytes(torch_zip(raw))
    for read, error in ((read_torch_file, FarcastError), (refuse_code_in, UnsafeFileError)):
        with pytest.raises(error):
            read(tmp_path / "a.pt")


def test_a_member_by_every_spelling_of_its_opcodes_passes(tmp_path: Path) -> None:
    spellings = (
        _MEMBER + b".",
        b"c__builtin__\ngetattr\n(cmylib\nSpeed\nVFAST\ntR.",
        b"\x80\x04" + short("builtins") + short("getattr") + b"\x93" + short("mylib") + short("Speed") + b"\x93VFAST\n\x86R.",
        b"\x80\x02" + _GETATTR + b"q\x00cmylib\nOuter.Speed\nq\x01VFAST\nq\x02\x86q\x03Rq\x040h\x00h\x01h\x02\x86R.",
    )
    for raw in spellings:
        (tmp_path / "a.pt").write_bytes(torch_zip(raw))
        refuse_code_in(tmp_path / "a.pt")
        assert isinstance(read_torch_file(tmp_path / "a.pt").tree, Member)
