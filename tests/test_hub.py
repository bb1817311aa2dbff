"""A folder for a model hub: loaded by the real libraries, without the trainer's state, with a card that tells how it was made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from farcast_cli.card import _added
from tests.conftest import STEPS, make_loose_run, make_torch_run
from tests.tiny import SAMPLES, sample_maker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import CallCli, Done

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own internals

HUB = ("--for", "evaluation", "--layout", "hub")
BEGIN, END = "<!-- farcast: begin -->", "<!-- farcast: end -->"


def written(call_cli: CallCli, run: Path, out: Path, *more: object) -> Path:
    """The folder that `predict` writes for a hub."""
    done = call_cli("predict", run, *HUB, "-o", f"{out}/", *more)
    assert done.returncode == 0, done
    return Path(done.stdout.strip())


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a card, as a hub reads it, and the text below."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def sidecar_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "farcast.json").read_text()))


@pytest.fixture
def trainer_run(tmp_path: Path) -> Path:
    """A run of a Hugging Face Trainer with a tokenizer, the limits of generation, and files that are nobody's business."""
    run = Path(shutil.copytree(SAMPLES / "huggingface", tmp_path / "run"))
    for folder in run.glob("checkpoint-*"):
        (folder / "generation_config.json").write_text('{"max_length": 20}')
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (folder / "vocab.txt").write_text("[UNK]\n[PAD]\n")
        (folder / "train_config.json").write_text('{"output_dir": "/home/somebody"}')
    return run


def lora_run(folder: Path, *, base: str = "someone/tiny-base") -> Path:
    """Adapters that PEFT saved, each a little farther on its way; its card and its configuration with them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_lin"])
    model = get_peft_model(sample_maker().huggingface_model(), config)
    generator = torch.Generator().manual_seed(0)
    moves = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if p.requires_grad}
    for step in STEPS:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in moves:
                    value.add_(moves[name] / 100 + torch.randn(value.shape, generator=generator) / 1000)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(str(folder / f"step-{step}"))
    return folder


# --- the files -------------------------------------------------------------------------------------------------------


def test_transformers_loads_the_folder_and_the_trainers_state_is_left_out_and_named(
    trainer_run: Path, tmp_path: Path, call_cli: CallCli
) -> None:
    from transformers import AutoModelForSequenceClassification

    done = call_cli("predict", trainer_run, *HUB, "-o", f"{tmp_path}/out/")
    folder = Path(done.stdout.strip())
    told = {"README.md", "farcast.json", "config.json", "model.safetensors"}
    assert names_in(folder) == told | {"generation_config.json", "tokenizer_config.json", "vocab.txt"}
    assert (
        "note: left out of the folder for a hub: optimizer.pt, rng_state.pth, scheduler.pt, train_config.json,"
        " trainer_state.json, training_args.bin" in done.stderr
    )
    model = AutoModelForSequenceClassification.from_pretrained(str(folder))
    (same,) = call_cli("predict", trainer_run, "--for", "evaluation", "-o", f"{tmp_path}/same/").stdout.split()
    expected = load_file(Path(same) / "model.safetensors")
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert card_of(folder)[0] == {"library_name": "transformers", "tags": ["farcast", "weight-averaging"]}


def test_transformers_loads_shards(trainer_run: Path, tmp_path: Path, call_cli: CallCli) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = written(call_cli, trainer_run, tmp_path / "out", "--max-shard-size", "10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole = load_file(written(call_cli, trainer_run, tmp_path / "whole") / "model.safetensors")
    found = AutoModelForSequenceClassification.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize("named", [False, True])
def test_peft_loads_adapters(named: bool, tmp_path: Path, call_cli: CallCli) -> None:  # noqa: FBT001
    from peft import PeftModel

    run = lora_run(tmp_path / "run")
    if named:  # as PEFT saves an adapter that has a name
        for folder in run.iterdir():
            (folder / "mine").mkdir()
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (folder / name).rename(folder / "mine" / name)
    folder = written(call_cli, run, tmp_path / "out")
    home = folder / "mine" if named else folder
    assert names_in(home) - {"README.md", "farcast.json"} == {"adapter_model.safetensors", "adapter_config.json"}
    model: Any = PeftModel.from_pretrained(sample_maker().huggingface_model(), str(home))
    expected = load_file(home / "adapter_model.safetensors")
    found = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_shards_of_adapters_are_refused(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", lora_run(tmp_path / "run"), *HUB, "-o", f"{tmp_path}/out/", "--max-shard-size", "1KB")
    assert (done.returncode, len(done.errors), (tmp_path / "out").exists()) == (2, 1, False)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_single_file_becomes_a_folder_with_the_weights_and_a_card(kind: str, tmp_path: Path, call_cli: CallCli) -> None:
    run = (make_loose_run if kind == "safetensors" else make_torch_run)(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out")
    assert names_in(folder) == {"model.safetensors", "README.md", "farcast.json"}
    (same,) = call_cli(
        "predict", run, "--for", "evaluation", "--layout", "safetensors", "-o", f"{tmp_path}/same/"
    ).stdout.split()
    found, expected = load_file(folder / "model.safetensors"), load_file(same)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    sharded = written(call_cli, run, tmp_path / "shards", "--max-shard-size", "0.2KB")
    assert "model.safetensors.index.json" in names_in(sharded)


def test_torch_weights_in_a_folder_become_safetensors(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "files")
    for path in run.iterdir():
        folder = tmp_path / "run" / path.stem
        folder.mkdir(parents=True)
        torch.save(load_file(path), folder / "pytorch_model.bin")
        torch.save({"exp_avg": torch.ones(3)}, folder / "ema_weights.bin")
        (folder / "config.json").write_text('{"model_type": "bert", "_name_or_path": "someone/base"}')
    folder = written(call_cli, tmp_path / "run", tmp_path / "out")
    assert names_in(folder) == {"model.safetensors", "config.json", "README.md", "farcast.json"}
    assert card_of(folder)[0]["base_model"] == "someone/base"


def test_a_folder_for_a_hub_lies_beside_the_forecast_to_evaluate(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    evaluated = call_cli("predict", "run", "--for", "evaluation", cwd=tmp_path)
    uploaded = call_cli("predict", "run", *HUB, cwd=tmp_path)
    assert (evaluated.returncode, uploaded.returncode) == (0, 0), uploaded
    assert evaluated.stdout.endswith("-eval.safetensors\n")
    assert uploaded.stdout == evaluated.stdout.replace("-eval.safetensors", "-hub")


def test_training_cannot_resume_from_it_so_that_is_refused_before_anything_is_read(tmp_path: Path, call_cli: CallCli) -> None:
    for command in (("predict", tmp_path / "nowhere"), ("leap", tmp_path / "nowhere")):
        done = call_cli(*command, "--layout", "hub", cwd=tmp_path)
        assert (done.returncode, len(done.errors), len(done.hints)) == (2, 1, 1)
        assert "--layout hub: expected --for evaluation" in done.errors[0]


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_has_the_numbers_of_the_sidecar_and_no_place_of_the_machine(tmp_path: Path, call_cli: CallCli) -> None:
    folder = written(call_cli, make_loose_run(tmp_path / "run"), tmp_path / "out", "--method", "average")
    front, body = card_of(folder)
    inputs = sidecar_of(folder)["inputs"]
    assert front == {"tags": ["farcast", "weight-averaging"]}
    assert [one["mean_weight"] for one in inputs] == pytest.approx([1 / len(inputs)] * len(inputs))
    for one in inputs:
        assert f"| {one['step']} | {json.dumps(one['mean_weight'])} |" in body
    assert f"an average of {len(inputs)} snapshots, by the method `average`" in body
    assert "does not judge averages" in body
    assert "not evaluated by farcast" in body
    assert "Do not resume training" in body
    assert str(tmp_path) not in body
    assert tmp_path.name not in body


def test_a_forecast_ahead_is_no_average_and_has_its_ratio(tmp_path: Path, call_cli: CallCli) -> None:
    folder = written(call_cli, make_loose_run(tmp_path / "run"), tmp_path / "out", "--horizon", "100")
    front, body = card_of(folder)
    assert front == {"tags": ["farcast"]}
    assert "a forecast 100 steps ahead, by the method `k5`" in body
    assert f"back-test ratio b = {json.dumps(sidecar_of(folder)['ratio'])}" in body


@pytest.mark.parametrize(
    "more",
    [(), ("--horizon", "100", "--origin", "700", "--exclude", "*bias*", "--dtype", "bfloat16", "--max-shard-size", "1.5KB")],
)
def test_the_command_of_the_card_repeats_the_forecast_also_when_the_run_has_gone_on(
    more: Sequence[str], tmp_path: Path, call_cli: CallCli
) -> None:
    run = make_loose_run(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out", *more)
    (command,) = re.findall(r"^    farcast (.*)$", card_of(folder)[1], re.MULTILINE)
    make_loose_run(run, (900, 1000))
    done = call_cli(*[str(run) if word == "RUN" else word for word in shlex.split(command)], "-o", f"{tmp_path}/out/")
    assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done
    assert "already there" in done.stderr


def test_the_card_tells_the_strength_that_the_evaluation_chose(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    script = "case {ckpt} in *strength-0.5/*) echo 1.25;; *strength-0/*) echo 2;; *) echo 3;; esac"
    folder = written(call_cli, run, tmp_path / "out", "--eval-cmd", script)
    body = card_of(folder)[1]
    assert "| the origin | 2.0 |" in body
    assert "| strength 0.5 of the update, these weights | 1.25 |" in body
    assert "| strength 1 of the update | 3.0 |" in body
    assert body.count("these weights |") == 1
    assert "--eval-cmd 'CMD {ckpt}'" in body
    assert script not in body
    weights = {one["step"]: one["mean_weight"] for one in sidecar_of(folder)["inputs"]}
    full = {one["step"]: one["mean_weight"] for one in sidecar_of(written(call_cli, run, tmp_path / "full"))["inputs"]}
    assert weights == pytest.approx({step: (full[step] + (step == STEPS[-1])) / 2 for step in full})


@pytest.mark.parametrize("front", ["---\nlicense: mit\ntags:\n- mine\n---\n", ""])
def test_the_origins_card_stays_and_an_earlier_section_is_replaced(front: str, tmp_path: Path, call_cli: CallCli) -> None:
    run = tmp_path / "run"
    for path in make_loose_run(tmp_path / "files").iterdir():
        (run / path.stem).mkdir(parents=True)
        path.rename(run / path.stem / "model.safetensors")
        section = f"{BEGIN}\nan earlier forecast\n{END}\n"
        (run / path.stem / "README.md").write_bytes(f"{front}# My model\n\nIts words.\n\n{section}\nIts end.\n".encode())
    folder = written(call_cli, run, tmp_path / "out")
    text = (folder / "README.md").read_text()
    expected = {"license": "mit", "tags": ["mine"]} if front else {"tags": ["farcast", "weight-averaging"]}
    assert card_of(folder)[0] == expected
    assert "# My model\n\nIts words.\n\nIts end.\n\n" + BEGIN in text
    assert "an earlier forecast" not in text
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


@pytest.mark.parametrize("text", [BEGIN * 10_000, "\n" * 100_000 + "x"], ids=["marks", "empty lines"])
def test_a_card_of_thousands_of_marks_or_lines_keeps_them_all(text: str) -> None:
    """How long it takes: bench/limits.py."""
    card = _added(f"# Mine\n{text}", "the section", "")
    assert card.startswith(f"\n# Mine\n{text}")
    assert card.endswith(f"{BEGIN}\nthe section\n{END}\n")


def test_a_card_of_pefts_keeps_what_it_says(tmp_path: Path, call_cli: CallCli) -> None:
    run = lora_run(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out")
    own = (run / f"step-{STEPS[-1]}" / "README.md").read_text().rstrip()
    assert (folder / "README.md").read_text().startswith(own)
    assert card_of(folder)[0]["library_name"] == "peft"


@pytest.mark.parametrize(
    ("base", "is_named"), [("someone/tiny-base", True), ("/home/somebody/base", False), ("../base", False)]
)
def test_only_a_base_model_with_a_name_on_a_hub_is_named(base: str, is_named: bool, tmp_path: Path, call_cli: CallCli) -> None:  # noqa: FBT001
    run = lora_run(tmp_path / "run", base=base)
    for path in run.glob("*/README.md"):
        path.unlink()
    done = call_cli("predict", run, *HUB, "-o", f"{tmp_path}/out/")
    front, body = card_of(Path(done.stdout.strip()))
    told = {"library_name": "peft", "tags": ["farcast", "weight-averaging"]}
    assert front == told | ({"base_model": base} if is_named else {})
    assert ("adapter_config.json: base_model_name_or_path" in done.stderr) is not is_named
    assert base not in body


# --- together with the other commands --------------------------------------------------------------------------------


def test_the_same_command_again_writes_nothing_and_a_card_that_was_edited_is_kept(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out")

    def again(*more: str) -> Done:
        return call_cli("predict", run, *HUB, "-o", f"{tmp_path}/out/", *more)

    before = (folder / "README.md").stat().st_mtime_ns
    assert again().returncode == 0
    assert (folder / "README.md").stat().st_mtime_ns == before
    assert again("--overwrite").returncode == 0
    assert (folder / "README.md").stat().st_mtime_ns > before
    (folder / "README.md").write_text("mine")
    assert (again().returncode, again("--overwrite").returncode) == (5, 5)
    assert (folder / "README.md").read_text() == "mine"


def test_the_sidecar_lists_the_card_and_a_dry_run_knows_the_size(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out")
    listed = {file["name"]: file["bytes"] for file in sidecar_of(folder)["files"]}
    assert listed == {name: (folder / name).stat().st_size for name in ("README.md", "model.safetensors")}
    dry = json.loads(call_cli("predict", run, *HUB, "-o", f"{tmp_path}/dry/", "--dry-run", "--json").stdout)
    assert dry["bytes_written"] == listed["model.safetensors"]
    assert not (tmp_path / "dry").exists()


def test_verify_compares_the_folder_with_the_later_snapshot(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    folder = written(call_cli, run, tmp_path / "out", "--horizon", "100")
    make_loose_run(tmp_path / "later", (900,))
    done = call_cli("verify", folder, "--against", tmp_path / "later" / "step_000900.safetensors", "--json")
    assert done.returncode == 0
    assert 0 < json.loads(done.stdout)["ratio"] < 1


def test_the_command_that_uploads_the_folder_is_printed_and_leaves_the_sidecar_out(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run")
    done = call_cli("predict", run, *HUB, "-o", "my out/", cwd=tmp_path)
    folder = done.stdout.strip()
    assert f"note: nothing is uploaded; to upload it: hf upload NAME '{folder}' . --exclude farcast.json" in done.stderr


def test_the_cards_command_runs_where_a_list_alone_tells_the_steps(tmp_path: Path, call_cli: CallCli) -> None:
    for number, path in enumerate(sorted(make_loose_run(tmp_path / "files").iterdir())):
        (tmp_path / "run").mkdir(exist_ok=True)
        save_file(load_file(path), tmp_path / "run" / f"{chr(ord('a') + number)}.safetensors")
    steps = ",".join(map(str, STEPS))
    folder = written(call_cli, tmp_path / "run", tmp_path / "out", "--steps", steps)
    command = re.findall(r"^    farcast (predict .*)$", card_of(folder)[1], re.MULTILINE)[0]
    assert f"--steps {steps}" in command
    again = call_cli(*(str(tmp_path / "run") if word == "RUN" else word for word in shlex.split(command)), cwd=tmp_path)
    assert again.returncode == 0, again
    expected, found = load_file(folder / "model.safetensors"), load_file(tmp_path / again.stdout.strip() / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
