"""A forecast in another container: loaded by the libraries that own it, with the values that it has in the run's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from farcast_cli.errors import FarcastError, UsageError
from farcast_cli.evaluation.judge import Evaluator
from farcast_cli.run.trajectory import open_snapshot
from tests.dcp_runs import make_run
from tests.test_dcp import in_processes
from tests.tiny import SAMPLES, fit_run, predict_run, sample_maker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.request import Outcome
    from tests.conftest import CallCli

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's checkpoint reader, lightning and peft warn of their own internals

STEPS = (100, 200, 300, 400, 500, 600)


@pytest.fixture(scope="module")
def plain() -> Fitted:
    """A run of torch files: model, optimizer, scheduler and step."""
    return fit_run(SAMPLES / "plain")


@pytest.fixture(scope="module")
def loose() -> Fitted:
    """A run of safetensors files."""
    return fit_run(SAMPLES / "safetensors")


@pytest.fixture(scope="module")
def trainer() -> Fitted:
    """A run of a Hugging Face Trainer."""
    return fit_run(SAMPLES / "huggingface")


@pytest.fixture(scope="module", params=["nested", "flat"])
def distributed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run of torch.distributed.checkpoint folders; flat ones have torchtitan's keys."""
    return fit_run(make_run(tmp_path_factory.mktemp(request.param) / "run", flat=request.param == "flat"))


def forecast(fitted: Fitted, into: Path, layout: str = "same", horizon: int = 100, **request: Any) -> Path:
    return outcome_of(fitted, into, layout, horizon, **request).path or Path()


def outcome_of(fitted: Fitted, into: Path, layout: str, horizon: int = 100, **request: Any) -> Outcome:
    (outcome,) = predict_run(fitted, f"{into}/", horizons=[horizon], layout=layout, **request)
    assert outcome.path is not None
    return outcome


def load(path: Path, *, weights_only: bool = True) -> Any:
    return torch.load(path, weights_only=weights_only)


def united(folder: Path, into: Path) -> Any:
    """A dcp folder as torch's own converter unites it."""
    into.mkdir(exist_ok=True)
    format_utils.dcp_to_torch_save(folder, into / "united.pt")
    return load(into / "united.pt", weights_only=False)


def assert_same(found: Any, expected: Any) -> None:
    """Equal trees: the same keys, tensors of the same type and bits, the same of everything else."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, value in zip(found, expected, strict=True):
            assert_same(one, value)
    else:
        assert found == expected


def save_run(folder: Path, payload: Callable[[int], Any], steps: Sequence[int] = STEPS) -> Fitted:
    """A torch file for each step."""
    folder.mkdir(parents=True)
    for step in steps:
        torch.save(payload(step), folder / f"step_{step}.pt")
    return fit_run(folder)


def moving(step: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Values on their way along a straight line."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) + step / 1000 * torch.randn(shape, generator=generator)


def files_below(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("farcast.json")}


# --- the container that the run has ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "layout"), [("plain", "pt"), ("loose", "safetensors"), ("trainer", "safetensors")])
def test_the_container_that_the_run_has_already_is_written_as_ever(
    run: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fitted = request.getfixturevalue(run)
    same, asked = forecast(fitted, tmp_path / "a"), forecast(fitted, tmp_path / "b", layout)
    assert asked.name == same.name
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


def test_a_dcp_run_stays_as_it_is(distributed: Fitted, tmp_path: Path) -> None:
    forecast(distributed, tmp_path / "a", horizon=20)
    forecast(distributed, tmp_path / "b", "dcp", horizon=20)
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


# --- from one file ---------------------------------------------------------------------------------------------------


def test_the_weights_of_a_torch_file_become_a_safetensors_file(plain: Fitted, tmp_path: Path) -> None:
    expected = load(forecast(plain, tmp_path / "same"))["model"]
    outcome = outcome_of(plain, tmp_path, "safetensors")
    assert outcome.path == tmp_path / "step_1700.safetensors"
    assert_same(load_file(outcome.path), expected)
    with safe_open(outcome.path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert outcome.notes == (
        "weights only: not in safetensors: optimizer, scheduler, step",
        "tied weights are written separately, each with its own values: head.weight",
    )
    assert outcome.changes == ()
    assert json.loads((tmp_path / "step_1700.safetensors.farcast.json").read_text())["options"]["layout"] == "safetensors"


def test_a_torch_file_becomes_a_dcp_folder_as_torch_converts_it(plain: Fitted, tmp_path: Path) -> None:
    same = forecast(plain, tmp_path / "same")
    folder = forecast(plain, tmp_path, "dcp")
    assert folder == tmp_path / "step_1700"
    assert {path.name for path in folder.iterdir()} == {".metadata", "__0_0.distcp", "farcast.json"}
    format_utils.torch_save_to_dcp(same, tmp_path / "oracle")
    assert_same(united(folder, tmp_path / "x"), united(tmp_path / "oracle", tmp_path / "y"))
    ours, oracle = (FileSystemReader(path).read_metadata() for path in (folder, tmp_path / "oracle"))
    assert ours.state_dict_metadata == oracle.state_dict_metadata
    assert ours.planner_data == oracle.planner_data
    assert ours.storage_data.keys() == oracle.storage_data.keys()


def test_what_became_a_dcp_folder_is_loaded_into_a_model_and_read_by_farcast(plain: Fitted, tmp_path: Path) -> None:
    expected = load(forecast(plain, tmp_path / "same"))
    folder = forecast(plain, tmp_path, "dcp")
    state = {"model": sample_maker().plain_model().state_dict()}
    load_into(state, checkpoint_id=str(folder))
    assert_same(dict(state["model"]), dict(expected["model"]))
    assert open_snapshot(folder).tensors.keys() == expected["model"].keys()
    assert [item.step for item in open_snapshot(folder).evidence] == [1700, 1700, 1700]


def test_a_safetensors_file_becomes_a_bare_state_dict_in_a_torch_file(loose: Fitted, tmp_path: Path) -> None:
    expected = load_file(forecast(loose, tmp_path / "same"))
    outcome = outcome_of(loose, tmp_path, "pt")
    assert outcome.path == tmp_path / "step_001700.pt"
    found = load(outcome.path)
    assert_same(found, expected)
    assert outcome.notes == ()  # nothing is left out


def test_a_safetensors_file_becomes_a_dcp_folder_with_the_weights_under_model(loose: Fitted, tmp_path: Path) -> None:
    expected = load_file(forecast(loose, tmp_path / "same"))
    state = {"model": {name: torch.zeros_like(value) for name, value in expected.items()}}
    load_into(state, checkpoint_id=str(forecast(loose, tmp_path, "dcp")))
    assert_same(state["model"], expected)


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_another_element_type_goes_with_another_container(plain: Fitted, layout: str, tmp_path: Path) -> None:
    expected = load(forecast(plain, tmp_path / "same", dtype="bfloat16"))["model"]
    found = forecast(plain, tmp_path, layout, dtype="bfloat16")
    weights = load_file(found) if layout == "safetensors" else united(found, tmp_path / "x")["model"]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert_same(weights, expected)


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_several_horizons_in_one_pass_equal_single_ones(plain: Fitted, layout: str, tmp_path: Path) -> None:
    predict_run(plain, f"{tmp_path}/all/", horizons=[100, 300], layout=layout)
    for horizon in (100, 300):
        forecast(plain, tmp_path / "single", layout, horizon)
    assert files_below(tmp_path / "all") == files_below(tmp_path / "single")


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_a_dry_run_counts_the_bytes_of_the_container(plain: Fitted, layout: str, tmp_path: Path) -> None:
    (dry,) = predict_run(plain, f"{tmp_path}/", horizons=[100], layout=layout, dry_run=True)
    done = outcome_of(plain, tmp_path, layout)
    assert dry.bytes_written == done.bytes_written == sum(map(len, files_below(tmp_path).values()))


# --- from folders ----------------------------------------------------------------------------------------------------


def with_bin(into: Path) -> Path:
    """The sample run of the Trainer as older versions saved it, with pytorch_model.bin."""
    shutil.copytree(SAMPLES / "huggingface", into)
    for folder in into.iterdir():
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return into


def resumed(checkpoint: Path, output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights of a real Trainer that goes on from step 1300 for five steps."""
    trainer = sample_maker().huggingface_trainer(output, logging_steps=1, stop_at=1305)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 1305
    losses = [entry["loss"] for entry in trainer.state.log_history if entry["step"] > 1300 and "loss" in entry]
    return losses, trainer.model.state_dict()


def test_a_trainer_resumes_from_the_other_format_of_weights_as_from_its_own(trainer: Fitted, tmp_path: Path) -> None:
    same = forecast(trainer, tmp_path / "same")
    as_bin = outcome_of(trainer, tmp_path / "bin", "pt")
    fitted = fit_run(with_bin(tmp_path / "run"))
    as_safetensors = outcome_of(fitted, tmp_path / "safe", "safetensors")
    assert as_bin.path is not None
    assert as_safetensors.path is not None
    expected = files_below(same)
    weights = expected.pop("model.safetensors")
    for outcome, name in ((as_bin, "pytorch_model.bin"), (as_safetensors, "model.safetensors")):
        found = files_below(outcome.path or Path())
        assert found.pop(name)
        assert found == expected
        assert not any("weights only" in note for note in outcome.notes)
    assert_same(load_file(as_safetensors.path / "model.safetensors"), load_file(same / "model.safetensors"))
    assert len((as_safetensors.path / "model.safetensors").read_bytes()) == len(weights)
    losses, state = resumed(same, tmp_path / "a")
    for number, path in enumerate((as_bin.path, as_safetensors.path)):
        found_losses, found_state = resumed(path, tmp_path / f"b{number}")
        assert found_losses == losses
        assert_same(dict(found_state), dict(state))


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
def test_transformers_loads_shards_of_the_other_format(layout: str, tmp_path: Path) -> None:
    """Shards stay shards, under the names that transformers looks for; `--max-shard-size` makes new ones."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "huggingface", run)
    model = sample_maker().huggingface_model()
    for folder in run.iterdir():
        model.load_state_dict(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="8KB")
        if layout == "safetensors":
            _shards_to_bin(folder)
    fitted = fit_run(run)
    path = forecast(fitted, tmp_path / "out", layout)
    stem, ending = ("pytorch_model", "bin") if layout == "pt" else ("model", "safetensors")
    shards = sorted(path.glob(f"{stem}-*.{ending}"))
    assert len(shards) > 2
    index = json.loads((path / f"{stem}.{ending}.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    origin = load_whole(run / "checkpoint-1200")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in origin.values())
    expected = load_whole(forecast(fitted, tmp_path / "same"))
    found = type(model).from_pretrained(path).state_dict()
    assert_same(found, expected)
    if layout == "safetensors":
        new = forecast(fitted, tmp_path / "new", layout, max_shard_bytes=4000)
        assert len(list(new.glob("model-*.safetensors"))) > len(shards)
        again = type(model).from_pretrained(new).state_dict()
        assert_same(again, expected)


def _shards_to_bin(folder: Path) -> None:
    """What `save_pretrained(safe_serialization=False)` wrote, when it still could."""
    for shard in folder.glob("model-*.safetensors"):
        torch.save(load_file(shard), folder / f"pytorch_{shard.stem}.bin")
        shard.unlink()
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*model*")):
        if path.suffix in {".safetensors", ".bin"}:
            found |= load_file(path) if path.suffix == ".safetensors" else load(path)
    return found


def test_accelerate_resumes_from_the_other_format_of_weights(tmp_path: Path) -> None:
    from tests.test_accelerate import Loop

    loop = Loop()
    for step in range(10, 81, 10):
        loop.advance(10)
        loop.save(tmp_path / "safe" / f"step_{step}")
        loop.save(tmp_path / "bin" / f"step_{step}", safe_serialization=False)
    assert (tmp_path / "bin" / "step_80" / "pytorch_model.bin").is_file()
    expected = Loop().resume(forecast(fit_run(tmp_path / "safe"), tmp_path / "same", horizon=10), 90)
    rates = expected.advance(5)
    for run, layout in (("bin", "safetensors"), ("safe", "pt")):
        path = forecast(fit_run(tmp_path / run), tmp_path / layout, layout, 10)
        assert (path / "model.safetensors").is_file() == (layout == "safetensors")
        found = Loop().resume(path, 90)
        assert found.advance(5) == rates
        assert_same(found.weights(), expected.weights())


def test_peft_loads_an_adapter_in_the_other_format(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.utils import load_peft_weights

    adapted: Any = get_peft_model(
        sample_maker().huggingface_model(), LoraConfig(r=2, target_modules=["q_lin"], init_lora_weights=False)
    )
    for step in STEPS:
        for number, (name, value) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                value.data = moving(step, *value.shape, seed=number)
        adapted.save_pretrained(tmp_path / "run" / f"step_{step}")
    fitted = fit_run(tmp_path / "run")
    expected = load_file(forecast(fitted, tmp_path / "same") / "adapter_model.safetensors")
    path = forecast(fitted, tmp_path / "out", "pt")
    assert not (path / "adapter_model.safetensors").exists()
    assert_same(load_peft_weights(str(path), device="cpu"), expected)


def test_a_trainers_folder_becomes_a_dcp_folder_of_its_weights_alone(trainer: Fitted, tmp_path: Path) -> None:
    expected = load_file(forecast(trainer, tmp_path / "same") / "model.safetensors")
    outcome = outcome_of(trainer, tmp_path, "dcp")
    (note,) = outcome.notes
    assert note.startswith("weights only: not in a dcp folder: optimizer.pt, scheduler.pt, trainer_state.json")
    assert_same(united(outcome.path or Path(), tmp_path / "x"), {"model": expected})


def test_a_folder_with_a_torch_file_becomes_one_with_safetensors_and_the_files_of_the_model(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        torch.save({"model": {"w": moving(step, 8, 4)}, "step_count": step}, folder / "lit_model.pth")
        torch.save({"seen": 3 * step}, folder / "train.pt")
        (folder / "model_config.yaml").write_text("name: tiny\n")
    outcome = outcome_of(fitted := fit_run(tmp_path / "run"), tmp_path / "out", "safetensors")
    assert outcome.path is not None
    assert files_below(outcome.path).keys() == {"model.safetensors", "model_config.yaml"}
    assert outcome.notes == ("weights only: not in safetensors: step_count, train.pt",)
    expected = load(forecast(fitted, tmp_path / "same") / "lit_model.pth")["model"]
    assert_same(load_file(outcome.path / "model.safetensors"), expected)


def test_an_old_file_of_the_converted_weights_name_gives_way(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        save_file({"w": moving(step, 8)}, folder / "model.safetensors")
        torch.save({"w": moving(step, 8)}, folder / "pytorch_model.bin")
    outcome = outcome_of(fitted := fit_run(tmp_path / "run"), tmp_path / "out", "pt")
    assert outcome.path is not None
    assert outcome.notes == ("pytorch_model.bin of the origin replaced",)
    assert files_below(outcome.path).keys() == {"pytorch_model.bin"}
    expected = load_file(forecast(fitted, tmp_path / "same") / "model.safetensors")
    assert_same(load(outcome.path / "pytorch_model.bin"), expected)


def test_the_files_of_several_ranks_stay_several(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        for rank in range(2):
            torch.save({"w": moving(step, 8, seed=rank)}, folder / f"consolidated.{rank:02}.pth")
    fitted = fit_run(tmp_path / "run")
    same, path = forecast(fitted, tmp_path / "same"), forecast(fitted, tmp_path / "out", "safetensors")
    for rank in range(2):
        expected = load(same / f"consolidated.{rank:02}.pth")
        assert_same(load_file(path / f"consolidated.{rank:02}.safetensors"), expected)
    with pytest.raises(UsageError, match="the weights are in 2 torch files"):
        forecast(fitted, tmp_path / "dcp", "dcp")


# --- from torch.distributed.checkpoint -------------------------------------------------------------------------------


def weights_of(whole: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a united dcp folder: under `model`, or flat at the top."""
    return dict(whole.get("model") or {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)})


@pytest.mark.parametrize("options", [{}, {"optimizer": "zero-momentum"}, {"optimizer": "reset"}, {"dtype": "float16"}])
def test_a_dcp_folder_becomes_the_torch_file_that_torchs_converter_makes(
    distributed: Fitted, options: dict[str, str], tmp_path: Path
) -> None:
    same = forecast(distributed, tmp_path / "same", horizon=20, **options)
    path = forecast(distributed, tmp_path, "pt", 20, **options)
    assert path == tmp_path / "step-120.pt"
    assert_same(load(path), united(same, tmp_path / "x"))


def test_the_weights_of_a_dcp_folder_become_safetensors(distributed: Fitted, tmp_path: Path) -> None:
    expected = weights_of(united(forecast(distributed, tmp_path / "same", horizon=20), tmp_path / "x"))
    outcome = outcome_of(distributed, tmp_path, "safetensors", 20)
    assert outcome.path == tmp_path / "step-120"
    assert_same(load_file(outcome.path / "model.safetensors"), expected)
    assert outcome.notes == ("weights only: not in safetensors: optimizer, lr_scheduler, train_state",)


def test_shards_that_two_processes_wrote_are_joined(tmp_path: Path) -> None:
    in_processes(2, tmp_path, tmp_path / "run")
    fitted = fit_run(tmp_path / "run")
    whole = united(forecast(fitted, tmp_path / "same", horizon=20), tmp_path / "x")
    assert_same(load(forecast(fitted, tmp_path, "pt", 20)), whole)
    found = load_file(forecast(fitted, tmp_path, "safetensors", 20) / "model.safetensors")
    assert found["0.weight"].shape == (16, 8)
    assert_same(found, whole["model"])


class Sharded(torch.Tensor):
    """A tensor that saves itself in pieces, by torch's own protocol for such."""

    sizes: tuple[int, ...]
    axis: int

    @classmethod
    def of(cls, whole: torch.Tensor, sizes: tuple[int, ...], axis: int) -> Sharded:
        made = whole.as_subclass(cls)
        made.sizes, made.axis = sizes, axis
        return made

    def _chunks(self) -> dict[torch.Size, torch.Tensor]:
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        offsets = [torch.Size(start if axis == self.axis else 0 for axis in range(self.ndim)) for start in starts]
        return dict(zip(offsets, torch.split(self.as_subclass(torch.Tensor), list(self.sizes), self.axis), strict=True))

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        items = []
        for offset, chunk in self._chunks().items():
            bounds = ChunkStorageMetadata(offset, chunk.shape)
            data = TensorWriteData(bounds, TensorProperties(dtype=chunk.dtype), self.shape)
            items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._chunks()[index.offset]


def save_sharded(folder: Path, sizes: tuple[int, ...], axis: int) -> Fitted:
    for step in STEPS:
        state = {"model": {"w": Sharded.of(moving(step, 7, 5), sizes, axis), "b": moving(step, 3, seed=1)}}
        save_dcp(state, checkpoint_id=str(folder / f"step-{step}"))
    return fit_run(folder)


def test_shards_of_uneven_heights_are_joined_in_their_order(tmp_path: Path) -> None:
    fitted = save_sharded(tmp_path / "run", (3, 1, 2, 1), 0)
    whole = united(forecast(fitted, tmp_path / "same"), tmp_path / "x")["model"]
    found = load_file(forecast(fitted, tmp_path, "safetensors") / "model.safetensors")
    assert_same(found, whole)
    torch.testing.assert_close(found["w"], moving(700, 7, 5), rtol=0, atol=0.05)


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_columns_cannot_be_joined_in_a_stream_and_torch_is_named_for_it(layout: str, tmp_path: Path) -> None:
    fitted = save_sharded(tmp_path / "run", (2, 3), 1)
    with pytest.raises(UsageError, match=r"'model\.w' is not sharded along its first axis") as error:
        forecast(fitted, tmp_path / "out", layout)
    assert "dcp_to_torch" in error.value.hint
    assert not (tmp_path / "out").exists()


# --- from Lightning --------------------------------------------------------------------------------------------------


def test_a_lightning_checkpoint_becomes_weights_alone_or_a_dcp_folder_of_all(tmp_path: Path) -> None:
    from tests.test_lightning import Run

    Run(validates=False).go(tmp_path / "run", max_steps=32)
    fitted = fit_run(tmp_path / "run")
    whole = load(forecast(fitted, tmp_path / "same", horizon=4))
    outcome = outcome_of(fitted, tmp_path, "safetensors", 4)
    assert outcome.path is not None
    assert (outcome.path.suffix, outcome.path.stem[-7:]) == (".safetensors", "step=36")
    assert_same(load_file(outcome.path), whole["state_dict"])
    assert any(note.startswith("weights only: not in safetensors: epoch, global_step") for note in outcome.notes)
    alone = load(forecast(fitted, tmp_path, "pt", 4))
    assert_same(dict(alone), dict(whole["state_dict"]))
    folder = forecast(fitted, tmp_path, "dcp", 4)
    torch.save(whole, tmp_path / "whole.pt")
    format_utils.torch_save_to_dcp(tmp_path / "whole.pt", tmp_path / "oracle")
    assert_same(united(folder, tmp_path / "x"), united(tmp_path / "oracle", tmp_path / "y"))


# --- what tensors may be ---------------------------------------------------------------------------------------------


def tied(step: int) -> dict[str, torch.Tensor]:
    """A model whose head is its embedding, a view of part of a tensor, numbers of many types."""
    table = moving(step, 12, 4)
    wide = moving(step, 20, seed=3)
    return {
        "embed": table,
        "lm_head": table,
        "wide": wide,
        "part": wide[5:15],
        "pairs": torch.complex(moving(step, 6, seed=4), moving(step, 6, seed=5)),
        "eight": torch.arange(6.0).to(torch.float8_e4m3fn),
        "short": torch.arange(5).to(torch.uint16),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_tied_weights_and_views_are_written_one_by_one_with_the_values_that_they_share(layout: str, tmp_path: Path) -> None:
    fitted = save_run(tmp_path / "run", tied)
    expected = load(forecast(fitted, tmp_path / "same"))
    outcome = outcome_of(fitted, tmp_path, layout)
    assert outcome.path is not None
    found = load_file(outcome.path) if layout == "safetensors" else united(outcome.path, tmp_path / "x")
    assert_same(found, expected)
    assert not torch.equal(found["part"], tied(600)["part"])  # it moved
    assert outcome.notes == ("tied weights are written separately, each with its own values: lm_head",)


def test_types_without_a_storage_class_of_their_own_come_into_a_torch_file(tmp_path: Path) -> None:
    for step in STEPS:
        (tmp_path / "run").mkdir(exist_ok=True)
        save_file({name: value.clone() for name, value in tied(step).items()}, tmp_path / "run" / f"step_{step}.safetensors")
    fitted = fit_run(tmp_path / "run")
    expected = load_file(forecast(fitted, tmp_path / "same"))
    found = load(forecast(fitted, tmp_path, "pt"))
    assert_same(found, expected)
    assert_same(united(forecast(fitted, tmp_path, "dcp"), tmp_path / "x")["model"], expected)


def test_tied_weights_of_a_lightning_checkpoint_share_one_storage_in_a_torch_file(tmp_path: Path) -> None:
    from tests.test_lightning import Run

    Run(validates=False).go(tmp_path / "lightning", max_steps=4)
    (sample,) = (tmp_path / "lightning").iterdir()
    (tmp_path / "run").mkdir()
    for step in STEPS:
        whole = load(sample, weights_only=False)
        whole["state_dict"] = tied(step)
        whole["global_step"] = step
        progress = whole["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        progress["optimizer"]["step"]["total"]["completed"] = step
        torch.save(whole, tmp_path / "run" / f"step={step}.ckpt")
    fitted = fit_run(tmp_path / "run")
    found = load(forecast(fitted, tmp_path, "pt"))
    assert found["lm_head"].data_ptr() == found["embed"].data_ptr()
    assert_same(found, load(forecast(fitted, tmp_path / "same"), weights_only=False)["state_dict"])


def test_several_models_of_one_run_are_kept_apart(tmp_path: Path) -> None:
    """As `Accelerator.save_state` writes them: files of their own, and keys of their own in a dcp folder."""
    from accelerate import Accelerator

    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(*models, torch.optim.AdamW([*models[0].parameters(), *models[1].parameters()]))
    for step in STEPS:
        prepared[-1].zero_grad()
        sum(model(torch.ones(1, 3)).square().sum() for model in prepared[:2]).backward()
        prepared[-1].step()
        accelerator.save_state(str(tmp_path / "run" / f"step_{step}"))
    fitted = fit_run(tmp_path / "run")
    same, folder = forecast(fitted, tmp_path / "same"), forecast(fitted, tmp_path, "pt")
    first, second = (load_file(same / f"model{number}.safetensors") for number in ("", "_1"))
    assert_same(load(folder / "pytorch_model.bin"), first)
    assert_same(load(folder / "pytorch_model_1.bin"), second)
    whole = united(forecast(fitted, tmp_path / "dcp", "dcp"), tmp_path / "x")
    assert_same(whole, {"model": first, "model_1": second})


def test_objects_among_the_state_come_into_a_dcp_folder_as_torch_writes_them(tmp_path: Path) -> None:
    """Lists and tuples with tensors inside, numbers, text, an empty dict, keys that are numbers."""

    def payload(step: int) -> dict[str, Any]:
        return {
            "model": {"w": moving(step, 6, 2)},
            "pair": (moving(step, 3, seed=1), "x"),
            "list": [moving(step, 2, seed=2), {"deep": [1, 2]}],
            "plain": [1, [2, 3]],
            "numbers": {0: 1.5, "empty": {}},
            "step": step,
        }

    fitted = save_run(tmp_path / "run", payload)
    same = forecast(fitted, tmp_path / "same")
    format_utils.torch_save_to_dcp(same, tmp_path / "oracle")
    found, expected = (
        united(path, tmp_path / name) for path, name in ((forecast(fitted, tmp_path, "dcp"), "x"), (tmp_path / "oracle", "y"))
    )
    (first, text), (wanted, wanted_text) = found.pop("pair"), expected.pop("pair")
    assert text == wanted_text
    assert torch.equal(first, wanted)
    assert_same(found, expected)


def channels_last(step: int) -> dict[str, torch.Tensor]:
    return {"conv": moving(step, 4, 3, 2, 2).to(memory_format=torch.channels_last), "b": moving(step, 4, seed=1)}


def test_the_order_of_dimensions_is_kept_where_the_container_can(tmp_path: Path) -> None:
    fitted = save_run(tmp_path / "run", channels_last)
    expected = load(forecast(fitted, tmp_path / "same"))
    folder = forecast(fitted, tmp_path, "dcp")
    assert_same(united(folder, tmp_path / "x"), dict(expected))
    again = tmp_path / "again"
    for step in STEPS:
        save_dcp({"model": channels_last(step)}, checkpoint_id=str(again / f"step-{step}"))
    found = load(forecast(fit_run(again), tmp_path, "pt"))["model"]["conv"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected["conv"])


REFUSED: dict[str, tuple[Callable[[int], torch.Tensor], str, str]] = {
    "channels_last": (lambda step: channels_last(step)["conv"], "safetensors", "is not stored row by row"),
    "complex128": (lambda step: moving(step, 4).to(torch.complex128), "safetensors", "complex128, which safetensors cannot"),
    "quantised": (
        lambda step: torch.quantize_per_tensor(moving(step, 4), 0.1, 0, torch.qint8),
        "safetensors",
        "has a type that only torch files can hold",
    ),
    "sparse": (lambda step: moving(step, 4, 4).to_sparse(), "dcp", "has a type that only torch files can hold"),
    "gaps": (lambda step: moving(step, 6, 4)[:, :2], "dcp", "a view that is not contiguous"),
    "gaps in safetensors": (lambda step: moving(step, 6, 4)[:, :2], "safetensors", "a view that is not contiguous"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_container_cannot_hold_is_refused_by_name_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    make, layout, why = REFUSED[kind]
    fitted = save_run(tmp_path / "run", lambda step: {"model": {"odd.one": make(step), "w": moving(step, 9)}, "step": step})
    with pytest.raises(UsageError, match=f"'(model.)?odd.one' is .*{why}|'(model.)?odd.one' .*{why}"):
        forecast(fitted, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_what_is_no_tensor_among_the_weights_is_named(tmp_path: Path) -> None:
    fitted = save_run(tmp_path / "run", lambda step: {"w": moving(step, 9), "layer._extra_state": None})
    assert outcome_of(fitted, tmp_path, "safetensors").notes == ("left out because they are not tensors: layer._extra_state",)


def test_values_of_half_a_byte_stay_in_safetensors(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in STEPS:
        halves = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        save_file({"w": moving(step, 9), "halves": halves}, tmp_path / "run" / f"step_{step}.safetensors")
    with pytest.raises(UsageError, match="'halves' is float4_e2m1fn, which torch cannot hold"):
        forecast(fit_run(tmp_path / "run"), tmp_path / "out", "pt")
    assert not (tmp_path / "out").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_name_must_have_the_ending_of_the_container(plain: Fitted, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a name that ends in \.safetensors$"):
        predict_run(plain, tmp_path / "ahead.pt", horizons=[100], layout="safetensors")
    (outcome,) = predict_run(plain, tmp_path / "ahead.safetensors", horizons=[100], layout="safetensors")
    assert outcome.path == tmp_path / "ahead.safetensors"


@pytest.mark.parametrize(("run", "layout"), [("trainer", "pt"), ("trainer", "dcp"), ("plain", "safetensors")])
def test_shards_are_refused_where_nothing_would_read_them(
    run: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UsageError, match="--max-shard-size"):
        forecast(request.getfixturevalue(run), tmp_path / "out", layout, max_shard_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_an_earlier_forecast_in_another_container_is_replaced_only_on_request(plain: Fitted, tmp_path: Path) -> None:
    first = forecast(plain, tmp_path, "dcp")
    assert forecast(plain, tmp_path, "dcp") == first
    with pytest.raises(FarcastError, match="exists already, made with --dtype source"):
        forecast(plain, tmp_path, "dcp", dtype="bfloat16")
    assert forecast(plain, tmp_path, "dcp", overwrite=True) == first


def test_an_evaluation_command_gets_the_origin_in_the_container_of_the_forecasts(plain: Fitted, tmp_path: Path) -> None:
    """It reads safetensors only, and likes the origin best if that is there; its weights are the origin's own."""
    script = tmp_path / "judge.py"
    script.write_text(
        "import os, shutil, sys\n"
        "from safetensors import safe_open\n"
        "safe_open(sys.argv[1], 'np')\n"
        f"shutil.copy(sys.argv[1], {str(tmp_path)!r} + '/judged-' + os.environ['FARCAST_STRENGTH'])\n"
        "print(1 - float(os.environ['FARCAST_STRENGTH']))\n"
    )
    evaluator = Evaluator(f"{sys.executable} {script} {{ckpt}}")
    outcome = outcome_of(plain, tmp_path / "out", "safetensors", evaluator=evaluator)
    assert [trial.value for trial in outcome.trials] == [1.0, 0.0, 0.5, 0.75]
    assert_same(load_file(tmp_path / "judged-0"), load(SAMPLES / "plain" / "step_1600.pt")["model"])
    assert outcome.path is not None
    assert outcome.path.read_bytes() == (tmp_path / "judged-1").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "step_1700.safetensors",
        "step_1700.safetensors.farcast.json",
        "step_1700.safetensors.eval",
    }


def test_the_option_and_its_variable_choose_the_container(tmp_path: Path, call_cli: CallCli) -> None:
    assert call_cli("fit", SAMPLES / "plain", cwd=tmp_path).returncode == 0
    wanted = ["predict", "--horizon", 100, "--even-if-worse"]
    done = call_cli(*wanted, "--layout", "safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "forecasts/plain/step_1700.safetensors\n")
    assert "weights only: not in safetensors: optimizer" in done.stderr
    done = call_cli(*wanted, cwd=tmp_path, env={"FARCAST_LAYOUT": "dcp"})
    assert (done.returncode, done.stdout) == (0, "forecasts/plain/step_1700\n")
    refused = call_cli(*wanted, "--layout", "gguf", cwd=tmp_path)
    assert refused.errors == ["error: --layout gguf: expected one of same, safetensors, pt, dcp, hub"]
