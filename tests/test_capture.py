"""The script that writes rows for `tune` from a transformers model, on tiny models that nobody has trained."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2ForTokenClassification,
)

from farcast_cli.texts import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.conftest import CallCli

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]
SIZES: dict[str, Any] = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 3,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `farcast ci` prints it."""
    path = tmp_path_factory.mktemp("script") / "capture.py"
    path.write_text(read_text("scripts", "capture.py"))
    spec = importlib.util.spec_from_file_location("capture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "capture", module)  # where its dataclass looks
        spec.loader.exec_module(module)
    return module


def save_model(folder: Path, kind: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(BertConfig(**(SIZES | config))).eval()
    model.save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return model


def save_texts(path: Path) -> list[str]:
    """Texts of four words; the label says which of three words begins it."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 4)) for _ in range(160)]
    lines = [{"text": text, "label": WORDS.index(text.split()[0]) % 3} for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return texts


def save_labels(path: Path, labels: Sequence[object]) -> None:
    """Other labels for the same texts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"label": label}) + "\n" for line, label in zip(lines, labels, strict=True)))


@pytest.mark.parametrize(
    "layer_and_words",
    [
        ("bert.pooler.dense", "--activation tanh --head classifier.weight --head-bias classifier.bias"),
        ("classifier", "--activation none --data"),
    ],
)
def test_a_bert_is_captured_tuned_and_loaded_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    call_cli: CallCli,
    script: Any,
    layer_and_words: tuple[str, str],
) -> None:
    layer, words = layer_and_words
    save_model(tmp_path / "model", BertForSequenceClassification)
    save_texts(tmp_path / "texts.jsonl")
    script.main([str(tmp_path / "model"), f"{layer}.weight", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "rows.npz")])
    command = capsys.readouterr().out
    assert f"--layer {layer}.weight --bias {layer}.bias {words}" in command
    done = call_cli(*shlex.split(command)[1:], "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    kind: Any = BertForSequenceClassification
    before, after = (kind.from_pretrained(tmp_path / name).eval() for name in ("model", "TUNED"))
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "model")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    given = tokenizer([line["text"] for line in lines], padding=True, return_tensors="pt")
    labels = torch.tensor([line["label"] for line in lines])
    losses = [torch.nn.functional.cross_entropy(model(**given).logits, labels).item() for model in (before, after)]
    answer = json.loads(done.stdout)
    assert losses == pytest.approx([answer["tuned_before"], answer["tuned_after"]], rel=1e-4)
    assert losses[1] < losses[0]


def test_tokens_are_rows_in_the_group_of_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model", BertForTokenClassification)
    tokens = torch.randint(5, SIZES["vocab_size"], (6, 7), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(tokens), tokens % 3
    mask[0, 5:], labels[:, 0] = 0, -100
    np.savez(tmp_path / "given.npz", input_ids=tokens, attention_mask=mask, y=labels)
    script.main(["model", "classifier.weight", "given.npz", "-o", "rows.npz"])
    assert "--layer classifier.weight --bias classifier.bias --activation none --data rows.npz" in capsys.readouterr().out
    rows = dict(np.load(tmp_path / "rows.npz"))
    np.testing.assert_array_equal(np.bincount(rows["groups"]), [4, 6, 6, 6, 6, 6])
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits[(labels >= 0) & mask.bool()]
    np.testing.assert_allclose(rows["out"], expected, atol=1e-6)
    targets = np.where(labels[..., None] < 0, np.nan, np.arange(3.0))
    np.savez(tmp_path / "given.npz", input_ids=tokens, attention_mask=mask, y=targets)
    script.main(["model", "classifier.weight", "given.npz", "-o", "rows.npz"])
    assert "--loss mse" in capsys.readouterr().out
    found = np.load(tmp_path / "rows.npz")
    np.testing.assert_array_equal(found["y"], np.broadcast_to(np.arange(3.0), rows["out"].shape))
    np.testing.assert_array_equal(found["groups"], rows["groups"])


@pytest.mark.parametrize(
    "case",
    [
        ({"num_labels": 1}, lambda number: number + 0.6, (1,)),
        ({"num_labels": 1}, int, (1,)),
        ({"num_labels": 2, "problem_type": "regression"}, lambda number: [number, 0.5 * number], (2,)),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, lambda number: [number % 2, 1], (2,)),
    ],
)
def test_numbers_are_targets_of_the_logits_and_none_is_cut(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    call_cli: CallCli,
    script: Any,
    case: tuple[dict[str, Any], Callable[[int], Any], tuple[int]],
) -> None:
    config, label_of, shape = case
    save_model(tmp_path / "model", BertForSequenceClassification, **config)
    labels = [label_of(WORDS.index(text.split()[0])) for text in save_texts(tmp_path / "texts.jsonl")]
    save_labels(tmp_path / "texts.jsonl", labels)
    script.main([str(tmp_path / "model"), "classifier.weight", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "rows.npz")])
    told = capsys.readouterr()
    assert "--loss mse" in told.out
    assert ("near 0 and 1" in told.err) is ("multi" in config.get("problem_type", ""))
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npz")["y"].reshape(-1, *shape), np.reshape(labels, (-1, *shape)))
    done = call_cli(*shlex.split(told.out)[1:], "--gate", "0", cwd=tmp_path)
    assert done.returncode == 0, done


@pytest.mark.parametrize("label", ["three", None, [], [1.0], {"a": 1}, 1.5])
def test_another_label_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any, label: object
) -> None:
    """Of a model with classes: a number that is not whole names none."""
    save_model(tmp_path / "model", BertForSequenceClassification)
    save_labels(tmp_path / "texts.jsonl", [0, 1, label, *[2] * len(save_texts(tmp_path / "texts.jsonl"))][:160])
    with pytest.raises(SystemExit) as ended:
        script.main(
            [str(tmp_path / "model"), "classifier.weight", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "r.npz")]
        )
    line = capsys.readouterr().err.splitlines()[-1]  # above it, transformers shows its progress
    assert (ended.value.code, "expected" in line) == (1, True)
    assert f"label {json.dumps(label)} in row 2" in line or (label == 1.5 and "labels that are no whole numbers" in line)
    assert not (tmp_path / "r.npz").exists()


@pytest.mark.parametrize(
    "case",
    [
        (BertForSequenceClassification, "bert.encoder.layer.0.output.dense", True, "several of its rows make one label"),
        (BertForSequenceClassification, "bert.pooler.dense", False, "no labels"),
        (BertModel, "pooler.dense", True, "makes no logits"),
    ],
)
def test_a_layer_that_labels_cannot_tune_gets_its_own_outputs_as_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], call_cli: CallCli, script: Any, case: tuple[Any, str, bool, str]
) -> None:
    """The user puts others in their place; here those that a bias of one more makes."""
    kind, layer, has_labels, why = case
    model = save_model(tmp_path / "model", kind)
    texts = save_texts(tmp_path / "texts.jsonl")
    if not has_labels:
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    script.main([str(tmp_path / "model"), f"{layer}.weight", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "rows.npz")])
    told = capsys.readouterr()
    assert why in told.err
    assert "holds the layer's own outputs" in told.err
    rows = dict(np.load(tmp_path / "rows.npz"))
    with torch.no_grad():
        expected = model.get_submodule(layer)(torch.from_numpy(rows["x"]))
    np.testing.assert_allclose(rows["y"], expected, atol=1e-5)
    call = shlex.split(told.out)[1:]
    assert call_cli(*call, cwd=tmp_path).returncode == 10  # nothing is to be gained yet
    np.savez(tmp_path / "rows.npz", **(rows | {"y": rows["y"] + 1}))
    done = call_cli(*call, cwd=tmp_path)
    assert done.returncode == 0, done


def test_tokens_of_a_layer_between_are_rows_in_groups_without_padding(tmp_path: Path, script: Any) -> None:
    save_model(tmp_path / "model", BertForSequenceClassification)
    tokens, mask = torch.full((6, 7), 5), torch.ones(6, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    np.savez(tmp_path / "given.npz", input_ids=tokens, attention_mask=mask, y=np.arange(6) % 3)
    layer = "bert.encoder.layer.0.intermediate.dense.weight"
    script.main([str(tmp_path / "model"), layer, str(tmp_path / "given.npz"), "-o", str(tmp_path / "rows.npz")])
    np.testing.assert_array_equal(np.bincount(np.load(tmp_path / "rows.npz")["groups"]), [5, 7, 7, 7, 7, 7])


def test_a_weight_of_no_linear_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any) -> None:
    save_model(tmp_path / "model", BertForSequenceClassification)
    save_texts(tmp_path / "texts.jsonl")
    with pytest.raises(SystemExit):
        script.main(
            [str(tmp_path / "model"), "bert.pooler.weight", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "r.npz")]
        )
    assert "such as bert.encoder.layer.0.output.dense.weight" in capsys.readouterr().err


def test_layers_between_are_said_and_a_head_that_is_not_saved_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any
) -> None:
    torch.manual_seed(0)
    model = GPT2ForTokenClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.arange(40).reshape(5, 8) % 20
    np.savez(tmp_path / "given.npz", input_ids=tokens, y=tokens % 2)
    call = [
        str(tmp_path / "model"),
        "transformer.h.0.mlp.c_proj.weight",
        str(tmp_path / "given.npz"),
        "-o",
        str(tmp_path / "r.npz"),
    ]
    script.main(call)
    told = capsys.readouterr()
    assert "no linear head make the model's logits" in told.err
    assert "--transposed --data" in told.out
    model.transformer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"architectures": ["GPT2ForTokenClassification"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        script.main(call)
    assert "classifier.bias, classifier.weight not in the file" in capsys.readouterr().err


def test_a_new_head_does_not_tell_the_activation_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any
) -> None:
    model = save_model(tmp_path / "model", BertForSequenceClassification)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path / "model")
    save_texts(tmp_path / "texts.jsonl")
    files = [str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "rows.npz")]
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "model"), "bert.pooler.dense.weight", *files])
    assert "these rows do not tell which" in capsys.readouterr().err
    script.main([str(tmp_path / "model"), "classifier.weight", *files])
    assert "--activation none --data" in capsys.readouterr().out
