"""torch.distributed.checkpoint folders: read without running anything, forecast, and loaded by torch itself."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.formats.dcp_file import read_dcp
from farcast_cli.run.trajectory import discover, open_snapshot
from tests.dcp_runs import STEPS, TOTAL, Run, make_run
from tests.tiny import fit_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import CallCli

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's checkpoint reader warns of its own internals

KINDS = {"nested": False, "flat": True}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A run's folder, and whether its keys are torchtitan's."""
    flat = KINDS[request.param]
    return make_run(tmp_path_factory.mktemp(request.param) / "run", flat=flat), flat


def in_processes(count: int, tmp_path: Path, save_to: Path, load_from: Path | None = None) -> None:
    """The sharded run of tests/dcp_runs.py in `count` processes."""
    root = Path(__file__).resolve().parent.parent
    more = [str(load_from)] if load_from else []
    base = [sys.executable, "-m", "tests.dcp_runs"]
    processes = [
        subprocess.Popen(
            [*base, str(rank), str(count), str(tmp_path / "store"), str(save_to), *more], cwd=root, stderr=subprocess.PIPE
        )
        for rank in range(count)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors


def forecast(folder: Path, output: Path, horizon: int = 20, **request: Any) -> Path:
    (outcome,) = predict_run(fit_run(folder), output, horizons=[horizon], **request)
    assert outcome.path == output
    return output


def in_one_file(folder: Path, tmp_path: Path) -> Any:
    """A checkpoint as torch's own converter unites it."""
    dcp_to_torch_save(folder, tmp_path / f"{folder.name}.pt")
    return torch.load(tmp_path / f"{folder.name}.pt", weights_only=False)


def test_every_item_is_found_with_the_values_that_torch_reads(run: tuple[Path, bool], tmp_path: Path) -> None:
    folder, flat = run
    snapshot = open_snapshot(folder / "step-100")
    whole = in_one_file(folder / "step-100", tmp_path)
    weights = {key: value for key, value in whole.items() if isinstance(value, torch.Tensor)} if flat else whole["model"]
    assert snapshot.tensors.keys() == weights.keys()
    for name, entry in snapshot.tensors.items():
        raw = entry.path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(entry.shape), weights[name])


def test_the_step_is_the_trainers_own_and_adam_confirms_it(run: tuple[Path, bool]) -> None:
    trajectory = discover(run[0])
    assert trajectory.steps == STEPS
    assert trajectory.layout == "dcp"
    assert [(item.source, item.step) for item in trajectory.origin.evidence] == [
        ("payload", 100),
        ("adam step", 100),
        ("name", 100),
    ]


def test_a_forecast_is_loaded_by_torch_with_every_counter_moved_on(run: tuple[Path, bool], tmp_path: Path) -> None:
    folder, flat = run
    resumed, control = Run(flat=flat), Run(flat=flat)
    resumed.load(forecast(folder, tmp_path / "step-120"))
    control.train(120)
    assert resumed.step == 120
    assert {float(entry["step"]) for entry in resumed.optimizer.state_dict()["state"].values()} == {120.0}
    assert resumed.optimizer.param_groups[0]["lr"] == control.optimizer.param_groups[0]["lr"]
    assert resumed.train(TOTAL) == control.train(TOTAL)  # the learning rate of every later step


def test_with_the_true_weights_and_moments_the_resumed_run_is_the_uninterrupted_one(
    run: tuple[Path, bool], tmp_path: Path
) -> None:
    folder, flat = run
    resumed, control = Run(flat=flat), Run(flat=flat)
    resumed.load(forecast(folder, tmp_path / "step-120"))
    control.train(120)
    resumed.model.load_state_dict(control.model.state_dict())
    for mine, true in zip(resumed.optimizer.state.values(), control.optimizer.state.values(), strict=True):
        mine["exp_avg"].copy_(true["exp_avg"])
        mine["exp_avg_sq"].copy_(true["exp_avg_sq"])
    resumed.train(150)
    control.train(150)
    for name, value in control.whole().items():
        assert torch.equal(resumed.whole()[name], value)


def test_the_forecast_weights_are_those_of_the_same_run_in_one_file(run: tuple[Path, bool], tmp_path: Path) -> None:
    folder, flat = run
    plain = Run(flat=flat)
    (tmp_path / "plain").mkdir()
    for step in STEPS:
        plain.train(step)
        torch.save({"model": plain.model.state_dict(), "step": step}, tmp_path / "plain" / f"step_{step}.pt")
    forecast(tmp_path / "plain", tmp_path / "step_120.pt")
    expected = torch.load(tmp_path / "step_120.pt", weights_only=True)["model"]
    resumed = Run(flat=flat)
    resumed.load(forecast(folder, tmp_path / "step-120"))
    for name, value in resumed.whole().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_what_one_process_wrote_two_processes_resume_from(tmp_path: Path) -> None:
    forecast(make_run(tmp_path / "run"), tmp_path / "step-120")
    alone = Run()
    alone.load(tmp_path / "step-120")
    in_processes(2, tmp_path, tmp_path / "said", tmp_path / "step-120")
    said = json.loads((tmp_path / "said.json").read_text())
    control = Run()
    control.train(120)
    assert (said["step"], said["adam"], said["lr"]) == (120, 120.0, control.optimizer.param_groups[0]["lr"])
    assert said["rates"] == control.train(125)
    loaded = torch.load(tmp_path / "said.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in alone.whole().items())


def test_shards_that_two_processes_wrote_are_forecast_shard_by_shard(tmp_path: Path) -> None:
    in_processes(2, tmp_path, tmp_path / "run")
    snapshot = open_snapshot(tmp_path / "run" / "step-100")
    assert {entry.path.name for entry in snapshot.tensors.values()} == {"__0_0.distcp", "__1_0.distcp"}
    assert snapshot.tensors["0.weight.@8,0"].shape == (8, 8)
    alone = Run()
    alone.load(forecast(tmp_path / "run", tmp_path / "step-120"))
    assert alone.step == 120
    truth = Run()
    truth.train(120)
    origin = Run()
    origin.train(100)
    error, nothing = (sum(float((a - b).square().sum()) for a, b in _pairs(run, truth)) for run in (alone, origin))
    assert error < 0.5 * nothing


def _pairs(a: Run, b: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    others = b.whole()
    return [(value, others[name]) for name, value in a.whole().items()]


@pytest.mark.parametrize("mode", ["drop", "reset"])
def test_an_optimizer_that_is_left_out_is_new_and_still_has_every_key(
    run: tuple[Path, bool], tmp_path: Path, mode: str
) -> None:
    folder, flat = run
    resumed = Run(flat=flat)
    resumed.load(forecast(folder, tmp_path / "step-120", optimizer=mode))
    entries = resumed.optimizer.state_dict()["state"].values()
    assert {float(entry["step"]) for entry in entries} == {0.0}
    assert not any(entry[name].any() for entry in entries for name in ("exp_avg", "exp_avg_sq"))


def test_first_moments_alone_can_be_set_to_zero(run: tuple[Path, bool], tmp_path: Path) -> None:
    folder, flat = run
    resumed = Run(flat=flat)
    resumed.load(forecast(folder, tmp_path / "step-120", optimizer="zero-momentum"))
    entries = resumed.optimizer.state_dict()["state"].values()
    assert not any(entry["exp_avg"].any() for entry in entries)
    assert all(entry["exp_avg_sq"].any() for entry in entries)


def test_another_element_type_is_written_and_said_in_the_metadata(run: tuple[Path, bool], tmp_path: Path) -> None:
    folder, flat = run
    forecast(folder, tmp_path / "step-120", dtype="bfloat16")
    whole = in_one_file(tmp_path / "step-120", tmp_path)
    weights = [value for value in whole.values() if isinstance(value, torch.Tensor)] if flat else [*whole["model"].values()]
    assert {value.dtype for value in weights} == {torch.bfloat16}
    metadata = FileSystemReader(tmp_path / "step-120").read_metadata()
    name = "0.weight" if flat else "model.0.weight"
    assert metadata.state_dict_metadata[name].properties.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_several_horizons_are_written_in_one_pass(run: tuple[Path, bool], tmp_path: Path) -> None:
    outcomes = predict_run(fit_run(run[0]), f"{tmp_path}/", horizons=[10, 20])
    steps = []
    for outcome in outcomes:
        resumed = Run(flat=run[1])
        assert outcome.path
        resumed.load(outcome.path)
        steps.append(resumed.step)
    assert steps == [110, 120]


def test_the_command_reads_a_folder_and_torch_loads_what_it_wrote(
    run: tuple[Path, bool], tmp_path: Path, call_cli: CallCli
) -> None:
    folder, flat = run
    assert call_cli("fit", folder, cwd=tmp_path).returncode == 0
    done = call_cli("predict", "--horizon", 20, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step-120\n")
    resumed = Run(flat=flat)
    resumed.load(tmp_path / "forecasts" / "run" / "step-120")
    assert resumed.step == 120


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run = Run()
    run.train(3)
    run.save(tmp_path / "step-3")
    return tmp_path / "step-3"


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def edited(checkpoint: Path, edit: Callable[[Any], None]) -> Path:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301 - our own
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return checkpoint


def test_metadata_that_run_code_are_refused_and_run_nothing(checkpoint: Path) -> None:
    marker = checkpoint.parent / "marker"
    edited(checkpoint, lambda metadata: metadata.planner_data.update(extra=_Runs(f"touch {marker}")))
    with pytest.raises(UnsafeFileError, match=r"asks for posix\.system"):
        read_dcp(checkpoint)
    assert not marker.exists()


def test_an_item_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    save({"model": {"w": torch.ones(3)}, "extra": _Runs(f"touch {marker}")}, checkpoint_id=str(tmp_path / "step-3"))
    with pytest.raises(UnsafeFileError, match=r"asks for posix\.system"):
        read_dcp(tmp_path / "step-3")
    assert not marker.exists()


def test_a_file_outside_of_the_folder_is_refused(checkpoint: Path) -> None:
    def outside(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            object.__setattr__(info, "relative_path", "../other.distcp")

    with pytest.raises(UnsafeFileError, match="lies outside the folder"):
        read_dcp(edited(checkpoint, outside))


def test_a_checkpoint_without_its_metadata_is_half_written(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    with pytest.raises(HalfWrittenError, match=r"no \.metadata, which is written last"):
        open_snapshot(checkpoint)


def test_a_file_of_tensors_that_is_cut_short_is_half_written(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HalfWrittenError, match="missing or too short"):
        open_snapshot(checkpoint)


def test_a_tensor_of_another_shape_than_the_metadata_say_is_refused(checkpoint: Path) -> None:
    def reshape(metadata: Any) -> None:
        (chunk,) = metadata.state_dict_metadata["model.0.weight"].chunks
        object.__setattr__(chunk, "sizes", torch.Size([8, 16]))

    with pytest.raises(FileFormatError, match=r"'model\.0\.weight' is float32 \[16, 8\], expected float32 \[8, 16\]"):
        open_snapshot(edited(checkpoint, reshape))
