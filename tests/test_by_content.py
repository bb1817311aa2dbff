"""Files known by their content, and the answer for a folder of what farcast does not read."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from farcast_cli.errors import FileFormatError, TooFewSnapshotsError
from farcast_cli.files import reading
from farcast_cli.formats import file_kind
from farcast_cli.run.trajectory import discover, survey
from tests.conftest import STEPS, make_torch_run, weights_at
from tests.tiny import fit_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import CallCli

PNG = b"\x89PNG\r\n\x1a\n" + bytes(99)
SQLITE = b"SQLite format 3\0" + bytes(99)


def run_of(folder: Path, name: str, *, container: str = "torch") -> Path:
    """A run whose snapshots have a name of this pattern, in a container that the name does not tell."""
    folder.mkdir(parents=True)
    for step in STEPS:
        path = folder / name.format(step)
        path.parent.mkdir(exist_ok=True)
        if container == "torch":
            torch.save({"model": weights_at(step)}, path)
        else:
            save_file(weights_at(step), path)
    return folder


@pytest.mark.parametrize(
    ("name", "container", "layout"),
    [
        ("checkpoint_{:04}.pth.tar", "torch", "torch"),
        ("finetune_{}.tar", "torch", "torch"),
        ("step_{}", "torch", "torch"),
        ("net_{}.model", "torch", "torch"),
        ("step_{}.ckpt", "safetensors", "safetensors"),
        ("step_{}.pt", "safetensors", "safetensors"),
        ("step_{}.safetensor", "safetensors", "safetensors"),
        ("step_{}/net.ckpt", "torch", "torch-folder"),
        ("step_{}/weights", "torch", "torch-folder"),
        ("step_{}/unet.ckpt", "safetensors", "weights-folder"),
    ],
)
def test_a_snapshot_is_known_by_its_content_whatever_its_ending(name: str, container: str, layout: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", name, container=container)
    found = discover(run)
    assert (found.layout, found.steps) == (layout, tuple(STEPS))
    assert found.origin.tensors.keys() == weights_at(1).keys()


def test_a_forecast_of_pth_tar_files_has_their_ending_and_torch_loads_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "checkpoint_{:04}.pth.tar")
    (done,) = predict_run(fit_run(run), f"{tmp_path}/out/", horizons=[100])
    forecast = tmp_path / "out" / f"checkpoint_{STEPS[-1] + 100:04}.pth.tar"
    assert done.path == forecast
    assert torch.load(forecast, weights_only=True)["model"].keys() == weights_at(1).keys()


def test_nothing_that_is_no_checkpoint_becomes_one(tmp_path: Path) -> None:
    run = make_torch_run(tmp_path / "run")
    names = {path.name for path in run.iterdir()}
    whole = next(iter(run.iterdir())).read_bytes()
    others = {
        "events.out.tfevents.1700000000.host": bytes(64),
        "samples_100.png": PNG,
        "log_100.txt": b"a" * 64,
        "study_1.db": SQLITE,
        "train_1.bin": b"GGUF" + bytes(64),
        "data_1.npz": b"PK\3\4" + bytes(22) + b"\5\0\0\0a.npy" + bytes(64),
        "._step_300.pt": b"\0\5\x16\7",
        "Thumbs.db": bytes(64),
        "step_300.pt.bak": whole,
        "step_99.pt.crdownload": whole[:900],
        "step_98.pt.part": whole[:900],
        "step_97.py": b"print()",
    }
    for name, data in others.items():
        (run / name).write_bytes(data)
    found = discover(run)
    assert {snapshot.path.name for snapshot in found.snapshots} == names
    assert {ignored.path.name for ignored in found.half_written} == {"step_99.pt.crdownload", "step_98.pt.part"}


def test_a_copy_of_a_browser_or_a_desktop_gives_way_to_the_file_it_was_made_of(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "step_{}.pt")
    last = run / f"step_{STEPS[-1]}.pt"
    shutil.copy(last, run / f"step_{STEPS[-1]} (1).pt")
    shutil.copy(last, run / f"Copy of step_{STEPS[-1]}.pt")
    assert discover(run).origin.path == last


def test_only_the_first_bytes_of_a_file_are_read_to_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step_1"
    torch.save({"model": {"w": torch.zeros(100_000)}}, path)
    asked: list[int] = []

    def read(path: Path, offset: int, num_bytes: int) -> bytes:
        asked.append(offset + num_bytes)
        return reading.read_bytes(path, offset, num_bytes)

    monkeypatch.setattr(file_kind, "read_bytes", read)
    assert [file_kind.kind_of(path) for _ in range(3)] == ["torch"] * 3
    assert asked == [512]


def test_an_optimizers_file_beside_each_snapshot_is_no_snapshot(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "model{:06}.pt")
    for step in STEPS:
        state = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(4)}}
        torch.save({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}, run / f"opt{step:06}.pt")
    found = discover(run)
    assert found.steps == tuple(STEPS)
    assert {ignored.reason for ignored in found.ignored} == {"it holds no weights"}


def test_a_torchscript_file_under_an_ending_of_its_own_is_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "step_{}.pt")
    zipped("step_100/data/0")(run / "step_100.torchscript")  # its first record; torch.save's is the pickle
    assert "step_100.torchscript" in {ignored.path.name for ignored in survey(run).ignored}


# --- what is not read ------------------------------------------------------------------------------------------------


def zipped(member: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"x")

    return make


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def orbax(path: Path) -> None:
    (path / "default").mkdir(parents=True)
    (path / "default" / "manifest.ocdbt").write_bytes(b"\x0c\xdb")


CASES = {
    "m_{}.h5": (holding(b"\x89HDF\r\n\x1a\n"), "2 .h5 files (HDF5, as Keras writes it)", "model.load_weights"),
    "m_{}.keras": (holding(b"PK\3\4"), "2 .keras files (Keras models)", "keras.models.load_model"),
    "checkpoint_{}": (holding(b"\x82\xa4step\1"), "2 files without an ending (msgpack, as Flax writes it)", "flax"),
    "{}": (orbax, "2 folders (orbax, JAX's checkpoints)", "orbax.checkpoint"),
    "ckpt-{}.index": (holding(b"\0"), "2 .index files (TensorFlow's checkpoints)", "tf.train.load_checkpoint"),
    "c-{}.tar.gz": (holding(b"\x1f\x8b"), "2 .tar.gz files (archives)", "tar -xf"),
    "c-{}.zip": (zipped("model.pt"), "2 .zip files (archives)", "unzip"),
    "step_{}.pt.zst": (holding(b"\x28\xb5\x2f\xfd"), "2 .zst files (compressed)", "unzstd"),
    "e_{}.pdparams": (holding(b"\x80\2"), "2 .pdparams files (Paddle's parameters)", "paddle.load"),
    "g_{}.gguf": (holding(b"GGUF"), "2 .gguf files (GGUF, for inference)", "trainer's own checkpoints"),
    "w_{}.npz": (zipped("a.npy"), "2 .npz files (numpy's arrays)", "numpy.load"),
    "p_{}.pkl": (holding(pickle.dumps({"w": 1})), "2 .pkl files (pickles, which may run code", "that you trust"),
    "m_{}.onnx": (holding(b"\x08\x07"), "2 .onnx files (ONNX, for inference)", "before the export"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_another_tools_files_is_told_with_their_number_their_kind_and_the_way_out(
    name: str, tmp_path: Path
) -> None:
    make, told, way = CASES[name]
    for step in (100, 200):
        make(tmp_path / name.format(step))
    with pytest.raises(TooFewSnapshotsError) as caught:
        discover(tmp_path)
    assert f"no snapshots that farcast reads, but {told}" in str(caught.value)
    assert way in caught.value.hint


def test_what_lies_in_the_folders_below_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m_1.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(TooFewSnapshotsError, match=r"but in its folders 1 \.h5 file \(HDF5"):
        discover(tmp_path)


def test_an_empty_folder_and_one_of_logs_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TooFewSnapshotsError, match="no snapshots found: an empty folder"):
        discover(tmp_path)
    (tmp_path / "a.log").write_text("x")
    (tmp_path / "b.png").write_bytes(PNG)
    with pytest.raises(TooFewSnapshotsError, match=r"but 1 \.log file, 1 \.png file"):
        discover(tmp_path)


def test_a_deepspeed_folder_of_a_pipeline_is_told_with_the_converters_command(tmp_path: Path) -> None:
    tag = tmp_path / "global_step500"
    tag.mkdir()
    for name in ("mp_rank_00_model_states.pt", "layer_01-model_00-model_states.pt"):
        torch.save({"w": torch.zeros(2)}, tag / name)
    (tmp_path / "latest").write_text(tag.name)
    with pytest.raises(FileFormatError, match="DeepSpeed") as caught:
        discover(tmp_path)
    assert f"zero_to_fp32.py {tmp_path} step_500 --tag global_step500" in caught.value.hint
    with pytest.raises(TooFewSnapshotsError, match="found one deepspeed checkpoint"):
        discover(tag)


@pytest.mark.parametrize(
    "command",
    ["fit", "inspect", "backtest", "predict", "leap", "keep", "report", "watch --once"],
)
def test_every_command_gives_the_same_answer_and_json_has_it_too(command: str, tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "m_1.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    first, *more = command.split()
    done = call_cli(first, "run", *more, "--json", cwd=tmp_path)
    assert done.returncode == 3
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["message"] == "run: no snapshots that farcast reads, but 1 .h5 file (HDF5, as Keras writes it)"
    assert "load_weights" in error["hint"]
