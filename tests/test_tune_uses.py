"""`farcast tune` for the uses that people have: new heads, wrong descriptions, rows of all kinds, adapters."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.tune.layers import Settings
from farcast_cli.tune.request import TuneRequest
from farcast_cli.tune.run import tune_checkpoint
from tests.conftest import tree_digest
from tests.test_tune import (
    CALL,
    NUM_CLASSES,
    NUM_INPUTS,
    load_rows,
    loss_of,
    make_rows,
    make_weights,
    outputs_of,
    quiet,
    refused,
    request_in,
    save_work,
    tuned,
    with_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli

HEAD = ("tune", "head.safetensors", "--layer", "w", "--bias", "b", "--data", "rows.npz", "-o", "tuned.safetensors")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return save_work(tmp_path)


def save_head(folder: Path, *, num_rows: int = 240, num_classes: int = 4) -> np.ndarray[Any, Any]:
    """A new head of zeros, and rows whose classes lie apart, with some overlap; returns the inputs and labels of others."""
    save_file({"w": torch.zeros(num_classes, 12), "b": torch.zeros(num_classes)}, folder / "head.safetensors")
    random = np.random.default_rng(0)
    centres = random.normal(size=(num_classes, 12))
    labels = random.integers(num_classes, size=num_rows + 1000)
    inputs = centres[labels] + 1.2 * random.normal(size=(len(labels), 12))
    np.savez(folder / "rows.npz", x=inputs[:num_rows], y=labels[:num_rows])
    return np.column_stack([inputs[num_rows:], labels[num_rows:]])


def save_transposed(path: Path) -> None:
    """The model of the usual rows, its matrices stored as inputs x outputs."""
    turned = {name: value.T.contiguous() if value.ndim > 1 else value for name, value in make_weights().items()}
    save_file(turned, path, metadata={"format": "pt"})


def accuracy(path: Path, others: np.ndarray[Any, Any]) -> float:
    weights = load_file(path)
    outputs = others[:, :-1] @ weights["w"].double().numpy().T + weights["b"].double().numpy()
    return float((outputs.argmax(axis=1) == others[:, -1]).mean())


# --- rows of any number ----------------------------------------------------------------------------------------------


def test_a_head_of_few_outputs_takes_many_rows(tmp_path: Path, call_cli: CallCli) -> None:
    """240 rows beside 4 outputs and 13 inputs, as labels with squared loss: each row is left out once, and all are tuned on."""
    others = save_head(tmp_path)
    done = call_cli(*HEAD, "--loss", "mse", "--json", cwd=tmp_path)
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert (told["num_rows"], told["judged_by"], told["passes"]) == (240, "leave-one-out", 1)
    from sklearn.linear_model import RidgeClassifierCV

    with np.load(tmp_path / "rows.npz") as rows:
        rival = RidgeClassifierCV(alphas=np.logspace(-3, 3, 13)).fit(rows["x"], rows["y"])
    expected = float((rival.predict(others[:, :-1]) == others[:, -1]).mean())
    assert accuracy(tmp_path / "tuned.safetensors", others) >= expected - 0.01 > 0.7


def test_a_head_of_labels_begins_at_the_closed_form_and_beats_a_logistic_regression(tmp_path: Path, call_cli: CallCli) -> None:
    """By its loss on other rows, against the best of six strengths; features of length 1, as of an embedding model."""
    random = np.random.default_rng(0)
    save_file({"w": torch.zeros(12, 64), "b": torch.zeros(12)}, tmp_path / "head.safetensors")
    labels = random.integers(12, size=240 + 2000)
    inputs = (0.5 * random.normal(size=(12, 64))[labels] + random.normal(size=(2240, 64))) * np.arange(1, 65) ** -0.5
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    np.savez(tmp_path / "rows.npz", x=inputs[:240], y=labels[:240])
    assert call_cli(*HEAD, "--loss", "cross-entropy", cwd=tmp_path).returncode == 0
    from sklearn.linear_model import LogisticRegression

    rivals: list[Any] = [
        LogisticRegression(C=c, max_iter=300).fit(inputs[:240], labels[:240]) for c in 10.0 ** np.arange(-3, 3)
    ]
    expected = min(-np.log(one.predict_proba(inputs[240:])[np.arange(2000), labels[240:]]).mean() for one in rivals)
    weights = load_file(tmp_path / "tuned.safetensors")
    outputs = torch.from_numpy(inputs[240:]) @ weights["w"].double().T + weights["b"].double()
    found = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(labels[240:])).item()
    assert found < 0.85 * expected, (found, expected)


def test_the_same_head_by_gradient_descent_says_what_an_iteration_costs(tmp_path: Path, call_cli: CallCli) -> None:
    others = save_head(tmp_path)
    done = call_cli(*HEAD, "--loss", "cross-entropy", "--method", "gradient-descent", cwd=tmp_path)
    assert done.returncode == 0, done
    assert "240 rows, more than twice the 12 inputs of w: an iteration costs as much" in done.stderr
    assert accuracy(tmp_path / "tuned.safetensors", others) > 0.7


def test_a_wide_head_is_tuned_in_blocks_of_outputs(tmp_path: Path) -> None:
    """400 rows and 20,000 outputs: an array of both would take 61 MiB, and some ten were held."""
    random = np.random.default_rng(0)
    save_file({"w": torch.zeros(20_000, 24)}, tmp_path / "head.safetensors")
    labels = random.integers(20, size=400)
    np.savez(tmp_path / "rows.npz", x=random.normal(size=(20, 24))[labels] + 0.1 * random.normal(size=(400, 24)), y=labels)
    asked = TuneRequest(
        tmp_path / "head.safetensors", ("w",), tmp_path / "rows.npz", "mse", delta_out=tmp_path / "delta.safetensors"
    )
    tracemalloc.start()
    assert tune_checkpoint(asked, quiet).path
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110 << 20


def test_what_would_not_fit_into_memory_is_refused_with_its_size(tmp_path: Path, call_cli: CallCli) -> None:
    save_file({"w": torch.zeros(100_000, 4)}, tmp_path / "head.safetensors")
    random = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=random.normal(size=(1000, 4)), y=random.integers(100_000, size=1000))
    call = [word for word in HEAD if word not in {"--bias", "b"}]
    refused(call_cli, tmp_path, 2, ("7.5 GiB", "at most 2 GiB", "--subsample", "--loss mse"), *call, "--loss", "cross-entropy")
    call += ["--subsample", "400", "--loss", "cross-entropy"]
    refused(call_cli, tmp_path, 2, ("3.0 GiB", "--method gradient-descent takes some 1.0 GiB"), *call)


def test_gradient_descent_of_a_wide_head_holds_a_few_arrays_of_its_outputs(tmp_path: Path) -> None:
    """Gauss-Newton would hold ten of 300 x 10,000 numbers, 229 MiB, and more with what the loss of each row takes."""
    num_outputs, num_rows = 10_000, 300
    save_file({"w": torch.zeros(num_outputs, 4)}, tmp_path / "head.safetensors")
    random = np.random.default_rng(0)
    labels = random.integers(20, size=num_rows)
    np.savez(tmp_path / "rows.npz", x=random.normal(size=(20, 4))[labels] + 0.1 * random.normal(size=(num_rows, 4)), y=labels)
    settings = Settings("gradient-descent", 1)
    place = tmp_path / "delta.safetensors"
    asked = TuneRequest(
        tmp_path / "head.safetensors", ("w",), tmp_path / "rows.npz", "cross-entropy", settings=settings, delta_out=place
    )
    tracemalloc.start()
    assert tune_checkpoint(asked, quiet).num_rows == num_rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 130 << 20


# --- a wrong description ---------------------------------------------------------------------------------------------


def save_out(work: Path, **more: Any) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", x=rows.x, y=rows.y, out=outputs_of(make_weights(), rows.x), **more)


def test_rows_with_the_models_outputs_are_tuned_where_the_description_gives_them(work: Path, call_cli: CallCli) -> None:
    save_out(work)
    assert call_cli(*CALL, "-o", "tuned.safetensors", cwd=work).returncode == 0


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        (with_option("--activation", "gelu"), "--activation relu"),
        (with_option("--activation", "none"), "--activation relu"),
        (with_option("--bias"), "--bias fc.bias"),
    ],
)
def test_a_description_that_gives_other_outputs_is_refused_and_the_one_that_fits_is_named(
    work: Path, call_cli: CallCli, call: tuple[str, ...], fits: str
) -> None:
    save_out(work)
    done = refused(call_cli, work, 3, ("rows.npz: out:", "differ from the model's outputs", "at most 0.001"), *call)
    assert done.hints == [f"hint: what fits is {fits}"]


def test_a_square_layer_that_is_stored_transposed_is_found_out(tmp_path: Path, call_cli: CallCli) -> None:
    random = np.random.default_rng(0)
    stored, inputs = random.normal(size=(8, 8)), random.normal(size=(64, 8))
    save_file({"w": torch.from_numpy(stored)}, tmp_path / "model.safetensors")
    np.savez(tmp_path / "rows.npz", x=inputs, y=inputs @ (stored + 0.1), out=inputs @ stored)
    call = ("tune", "model.safetensors", "--layer", "w", "--data", "rows.npz", "--loss", "mse", "-o", "tuned.safetensors")
    done = refused(call_cli, tmp_path, 3, ("out:",), *call)
    assert done.hints == ["hint: what fits is --transposed"]
    assert call_cli(*call, "--transposed", cwd=tmp_path).returncode == 0


def test_outputs_that_no_description_near_by_gives_are_refused(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", x=rows.x, y=rows.y, out=rows.y + 1)
    refused(call_cli, work, 3, ("out:", "other layers may follow"), *CALL, "-o", "tuned.safetensors")


def test_a_loss_no_better_than_a_constants_is_said(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", x=rows.x, y=-rows.y)
    done = call_cli(*CALL, "-o", "tuned.safetensors", cwd=work)
    assert "no better than that of the mean of y" in done.stderr
    assert "after tuning" not in done.stderr
    few = ("--method", "gradient-descent", "--iterations", "1", "--rate", "1e-4", "--gate", "0", "-o", "few.safetensors")
    assert "after tuning, the loss of rows not seen" in call_cli(*CALL, *few, cwd=work).stderr
    np.savez(work / "rows.npz", x=rows.x, y=rows.y)
    assert "no better" not in call_cli(*CALL, "-o", "again.safetensors", cwd=work).stderr


def test_what_is_zero_already_is_not_to_be_started_at_zero(work: Path, call_cli: CallCli) -> None:
    save_head(work)
    with np.load(work / "rows.npz") as rows:
        x, y = rows["x"], rows["y"]
    np.savez(work / "rows.npz", x=x, y=np.random.default_rng(1).permutation(y))
    done = call_cli(*HEAD, "--loss", "cross-entropy", cwd=work)
    assert (done.returncode, "has learnt nothing of use" in done.stderr) == (10, True), done
    assert "zero" not in done.stderr
    assert "before tuning" not in done.stderr
    save_work(work)
    weights = load_file(work / "step_10.safetensors")
    save_file(weights | {"out.weight": torch.zeros_like(weights["out.weight"])}, work / "step_10.safetensors")
    done = call_cli(*CALL, "-o", "other.safetensors", cwd=work)
    assert (done.returncode, "the head is zero" in done.stderr, "from zero" in done.stderr) == (10, True, False), done


def test_rows_of_one_class_are_refused_but_for_an_edit_beside_rows_that_stay(tmp_path: Path, call_cli: CallCli) -> None:
    save_head(tmp_path)
    with np.load(tmp_path / "rows.npz") as rows:
        x, y = rows["x"], rows["y"]
    np.savez(tmp_path / "rows.npz", x=x[y == 2], y=y[y == 2])
    np.savez(tmp_path / "others.npz", x=x[y != 2])
    for loss in ("cross-entropy", "mse"):
        refused(call_cli, tmp_path, 3, ("all rows are of one class, 2", "rows of other classes"), *HEAD, "--loss", loss)
    edit = (*HEAD, "--loss", "cross-entropy", "--anchor", "others.npz", "--anchor-weight", "10")
    done = call_cli(*edit, cwd=tmp_path)
    assert (done.returncode, "no better" in done.stderr) == (0, False), done


# --- all rows train --------------------------------------------------------------------------------------------------


def test_other_rows_may_judge(work: Path, call_cli: CallCli) -> None:
    weights = make_weights()
    fresh, wrong = make_rows(weights, num_rows=400), make_rows(weights, num_rows=400, shift=0.0)
    np.savez(work / "val.npz", x=fresh.x[200:], y=fresh.y[200:])
    np.savez(work / "other.npz", x=wrong.x[200:], y=wrong.y[200:])  # of the model as it is
    done = call_cli(*CALL, "--val", "val.npz", "-o", "tuned.safetensors", "--json", cwd=work)
    told = json.loads(done.stdout)
    assert (told["judged_by"], told["num_rows"]) == ("--val", 160)
    after = loss_of(work / "tuned.safetensors", replace(fresh, x=fresh.x[200:], y=fresh.y[200:]))
    assert told["held_out_after"] == pytest.approx(after, rel=1e-3)
    done = call_cli(*CALL, "--val", "other.npz", "-o", "again.safetensors", cwd=work)
    assert (done.returncode, "(--val)" in done.stderr) == (10, True)


def test_an_edit_of_a_few_rows_is_judged_by_others_and_refused_without_them(work: Path, call_cli: CallCli) -> None:
    """For one x, a layer's outputs are moved by 1; its variants are near it."""
    random = np.random.default_rng(0)
    fact = random.normal(size=NUM_INPUTS)
    x = fact + 0.05 * random.normal(size=(52, NUM_INPUTS))
    weights = load_file(work / "step_10.safetensors")
    y = x @ weights["fc.weight"].double().numpy().T + weights["fc.bias"].double().numpy() + 1
    np.savez(work / "rows.npz", x=x[:12], y=y[:12])
    np.savez(work / "val.npz", x=x[12:], y=y[12:])
    call = ("tune", "step_10.safetensors", "--layer", "fc.weight", "--bias", "fc.bias", "--data", "rows.npz", "--loss", "mse")
    refused(call_cli, work, 3, ("12 rows", "at least 32", "--val FILE"), *call, "-o", "tuned.safetensors")
    done = call_cli(*call, "--val", "val.npz", "-o", "tuned.safetensors", cwd=work)
    assert done.returncode == 0, done
    assert "closed form on all 12 rows" in done.stderr
    np.savez(work / "rows.npz", x=x[:2], y=y[:2])
    assert call_cli(*call, "--val", "val.npz", "-o", "two.safetensors", cwd=work).returncode == 0
    np.savez(work / "rows.npz", x=x[:1], y=y[:1])
    refused(call_cli, work, 3, ("x is constant", "variants of its text"), *call, "--val", "val.npz", "-o", "one.safetensors")


def test_rows_of_a_group_are_left_out_together(tmp_path: Path, call_cli: CallCli) -> None:
    """The noise of y is one for each group, and x nearly tells the group: by itself, a row is foretold by its neighbours."""
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(24), 8)
    inputs = random.normal(size=(24, 40))[group] + 0.05 * random.normal(size=(192, 40))
    targets = random.normal(size=(24, 2))[group]
    save_file({"w": torch.zeros(2, 40), "b": torch.zeros(2)}, tmp_path / "head.safetensors")
    np.savez(tmp_path / "rows.npz", x=inputs, y=targets)
    alone = call_cli(*HEAD, "--loss", "mse", cwd=tmp_path)
    assert alone.returncode == 0, alone
    np.savez(tmp_path / "rows.npz", x=inputs, y=targets, groups=group)
    together = call_cli(*[{"tuned.safetensors": "other.safetensors"}.get(w, w) for w in HEAD], "--loss", "mse", cwd=tmp_path)
    assert together.returncode == 10, together
    assert "192 rows not seen in 24 groups (5 folds)" in together.stderr
    assert "w: closed form on all 192 rows, 1 pass" in alone.stderr
    assert "192 rows not seen (leave-one-out)" in alone.stderr


def test_a_row_of_weight_two_is_a_row_twice(tmp_path: Path) -> None:
    save_head(tmp_path, num_rows=100)
    with np.load(tmp_path / "rows.npz") as rows:
        x, y = rows["x"], rows["y"]
    weights = np.where(np.arange(100) < 30, 2.0, 1.0)
    np.savez(tmp_path / "weighted.npz", x=x, y=y, w=weights)
    np.savez(tmp_path / "twice.npz", x=np.concatenate([x, x[:30]]), y=np.concatenate([y, y[:30]]))
    found = []
    for name in ("weighted", "twice"):
        asked = TuneRequest(
            tmp_path / "head.safetensors",
            ("w",),
            tmp_path / f"{name}.npz",
            "mse",
            ("b",),
            output=tmp_path / f"{name}.safetensors",
        )
        settings = replace(asked.settings, ridge=0.01)
        assert tune_checkpoint(replace(asked, settings=settings), quiet).path
        found.append(load_file(tmp_path / f"{name}.safetensors")["w"].numpy())
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


# --- kinds of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "loss", "words"),
    [
        (
            {"x": np.ones((20, 8, NUM_INPUTS))},
            "mse",
            ("x: expected rows of numbers", "[20, 8, 24]", "x.reshape(-1, 24)", "groups"),
        ),
        ({"y": np.ones(160)}, "cross-entropy", ("whole-numbered labels", "float64", "y.astype('int64')")),
        ({"y": np.ones(160, bool)}, "cross-entropy", ("whole-numbered labels", "bool", "y.astype('int64')")),
        ({"y": np.ones((160, NUM_CLASSES), int)}, "cross-entropy", ("whole-numbered labels", "y.argmax(axis=1)")),
        ({"w": np.zeros(160)}, "mse", ("w: expected weights above 0, found 0 in row 0",)),
        ({"groups": np.ones(160)}, "mse", ("groups: expected one whole number a row", "numpy.unique")),
        ({"groups": np.ones(100, int)}, "mse", ("as many rows of groups as of x", "[100]")),
        ({"out": np.ones((160, 3))}, "mse", ("out: expected 8 columns", "found 3", "outputs of the layer")),
    ],
)
def test_an_array_of_the_wrong_kind_is_refused_with_what_mends_it(
    work: Path, call_cli: CallCli, arrays: dict[str, Any], loss: str, words: tuple[str, ...]
) -> None:
    rows = load_rows(work)
    np.savez(work / "rows.npz", **({"x": rows.x, "y": rows.y} | arrays))
    refused(call_cli, work, 3, words, *with_option("--loss", loss))


def test_rows_may_come_from_a_torch_file_of_which_nothing_runs(work: Path, call_cli: CallCli) -> None:
    rows = load_rows(work)
    torch.save({"x": torch.from_numpy(rows.x), "y": torch.from_numpy(rows.y), "note": "of today"}, work / "rows.pt")
    assert call_cli(*with_option("--data", "rows.pt"), cwd=work).returncode == 0
    (work / "tuned.safetensors").unlink()
    (work / "tuned.safetensors.farcast.json").unlink()
    torch.save({"x": torch.from_numpy(rows.x), "y": print}, work / "bad.pt")
    refused(call_cli, work, 4, ("bad.pt", "print"), *with_option("--data", "bad.pt"))
    torch.save({"x": torch.from_numpy(rows.x).T, "y": torch.from_numpy(rows.y)}, work / "turned.pt")
    refused(call_cli, work, 3, ("not stored row by row", "x.contiguous()"), *with_option("--data", "turned.pt"))


def test_a_descent_that_diverges_is_said_to_diverge_without_a_warning_of_numpys(work: Path, call_cli: CallCli) -> None:
    done = call_cli(*CALL, "-o", "t.safetensors", "--method", "gradient-descent", "--rate", "1e8", cwd=work)
    assert done.returncode == 10, done
    assert "gradient-descent diverged" in done.stderr
    assert "Warning" not in done.stderr
    assert "no gain" in done.stderr


# --- stored as inputs x outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_layer_and_head_are_tuned_as_those_of_a_linear_layer_are(work: Path, bias: bool) -> None:  # noqa: FBT001
    (work / "other").mkdir()
    save_transposed(work / "other" / "turned_10.safetensors")
    more: dict[str, Any] = {} if bias else {"biases": ()}
    assert tuned(work, **more).path
    asked = replace(
        request_in(work, **more), checkpoint=work / "other" / "turned_10.safetensors", output=work / "turned.safetensors"
    )
    assert tune_checkpoint(replace(asked, is_transposed=True), quiet).path
    plain, found = load_file(work / "tuned.safetensors"), load_file(work / "turned.safetensors")
    np.testing.assert_allclose(found["fc.weight"].T, plain["fc.weight"], atol=1e-5)
    np.testing.assert_allclose(found["fc.bias"], plain["fc.bias"], atol=1e-5)


@pytest.mark.parametrize("is_turned", [True, False])
def test_a_shape_that_fits_the_other_way_round_gets_the_hint(work: Path, call_cli: CallCli, is_turned: bool) -> None:  # noqa: FBT001
    """A bias, a head, a next layer or rows: whichever is looked at first."""
    if is_turned:
        save_transposed(work / "step_10.safetensors")
    call = ("tune", "step_10.safetensors", *(() if is_turned else ("--transposed",)), "--loss", "mse", "-o", "t.safetensors")
    act, layer, bias = ("--activation", "relu"), ("--layer", "fc.weight"), ("--bias", "fc.bias")
    for more in (
        (*layer, *bias, "--data", "rows.npz"),
        (*layer, *act, "--head", "out.weight", "--data", "rows.npz"),
        (*layer, "--layer", "out.weight", *act, "--data", "rows.npz"),
        (*layer, "--data", "rows.npz"),
    ):
        done = call_cli(*call, *more, cwd=work)
        assert done.returncode in {2, 3}, done
        assert f"as inputs x outputs, as GPT-2's Conv1D is: {'add' if is_turned else 'leave out'} --transposed" in done.hints[0]


def test_a_delta_of_a_transposed_layer_can_be_applied(work: Path, call_cli: CallCli) -> None:
    save_transposed(work / "step_10.safetensors")
    assert call_cli(*CALL, "--transposed", "-o", "tuned.safetensors", cwd=work).returncode == 0
    assert call_cli(*CALL, "--transposed", "--delta-out", "delta.safetensors", cwd=work).returncode == 0
    call = ("tune", "step_10.safetensors", "--apply", "delta.safetensors", "-o", "added.safetensors")
    assert call_cli(*call, cwd=work).returncode == 0
    assert (work / "added.safetensors").read_bytes() == (work / "tuned.safetensors").read_bytes()


# --- the change alone ------------------------------------------------------------------------------------------------


def test_a_delta_file_is_smaller_than_the_layer_where_the_change_has_a_low_rank(tmp_path: Path) -> None:
    """A change of rank 3 of a layer of 128 x 128, from 160 rows."""
    random = np.random.default_rng(0)
    save_file({"w": torch.from_numpy(random.normal(size=(128, 128))).float()}, tmp_path / "model.safetensors")
    inputs = random.normal(size=(160, 128)).astype(np.float32)
    change = random.normal(size=(128, 3)) @ random.normal(size=(3, 128))
    weights = load_file(tmp_path / "model.safetensors")["w"].double().numpy()
    np.savez(tmp_path / "rows.npz", x=inputs, y=inputs @ (weights + change).T)
    asked = TuneRequest(
        tmp_path / "model.safetensors", ("w",), tmp_path / "rows.npz", "mse", delta_out=tmp_path / "delta.safetensors"
    )
    assert tune_checkpoint(asked, quiet).path
    assert load_file(tmp_path / "delta.safetensors")["0.factors"].shape == (3, 128)
    assert (tmp_path / "delta.safetensors").stat().st_size < 128 * 128 * 4 / 8


@pytest.mark.parametrize("is_transposed", [False, True])
def test_peft_loads_the_adapter_and_gives_what_the_tuned_checkpoint_gives(
    work: Path,
    call_cli: CallCli,
    is_transposed: bool,  # noqa: FBT001
) -> None:
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    class Model(torch.nn.Module):
        """The layer, ReLU and the head."""

        def __init__(self) -> None:
            super().__init__()
            kind: Any = Conv1D if is_transposed else lambda outputs, inputs: torch.nn.Linear(inputs, outputs)
            self.fc, self.out = kind(96, NUM_INPUTS), kind(NUM_CLASSES, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.fc(x)))  # type: ignore[no-any-return]

    def model_of(path: Path) -> Model:
        model = Model()
        model.load_state_dict(load_file(path))
        return model

    call: tuple[str, ...] = CALL
    if is_transposed:
        save_transposed(work / "step_10.safetensors")
        call = (*CALL, "--transposed")
    assert call_cli(*call, "-o", "tuned.safetensors", cwd=work).returncode == 0
    done = call_cli(*call, "--lora-out", "adapter", cwd=work)
    assert (done.returncode, done.stdout) == (0, "adapter\n"), done
    assert (
        json.loads((work / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "step_10.safetensors"
    )
    before = tree_digest(work)
    adapted: Any = PeftModel.from_pretrained(model_of(work / "step_10.safetensors"), str(work / "adapter")).eval()
    rows = torch.from_numpy(load_rows(work).x)
    with torch.no_grad():
        found, expected = adapted(rows), model_of(work / "tuned.safetensors")(rows)
        base = model_of(work / "step_10.safetensors")(rows)
    assert (found - expected).abs().max() < 1e-4
    assert (expected - base).abs().max() > 0.1
    assert tree_digest(work) == before


def test_an_adapter_of_a_model_from_the_hub_bears_its_name_there(work: Path, call_cli: CallCli) -> None:
    place = work / "hub" / "models--some-one--a--model" / "snapshots" / "0a1b"
    place.mkdir(parents=True)
    (work / "step_10.safetensors").rename(place / "model.safetensors")
    (place / "config.json").write_text("{}")
    assert call_cli("tune", str(place), *CALL[2:], "--lora-out", "adapter", cwd=work).returncode == 0
    told = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "some-one/a--model"


def test_weight_decay_is_no_change_that_an_adapter_can_hold(work: Path, call_cli: CallCli) -> None:
    call = (*CALL, "--lora-out", "adapter", "--method", "gradient-descent", "--weight-decay", ".1")
    refused(call_cli, work, 2, ("--lora-out", "--weight-decay"), *call)
