"""A new head on a real model: `farcast tune` against logistic regression, LoRA by peft and full fine-tuning.

    python bench/tune_real.py FOLDER [heads] [pooler] [lora] [full]

FOLDER is that of docs/tune-real-model.md after its commands: start, train.jsonl, test.jsonl. Accuracy and cross-entropy are of the
test texts. CPU seconds are those of one thread: of the whole command for farcast, of fitting alone for the others. Rates and
epochs of the rivals are chosen on a fifth of the texts to tune on; then they train on all of them, once a seed. "lora=2e-3,7" trains
at this rate for 7 epochs, without a search. Each result is printed as JSON.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from farcast_cli.errors import NoForecastError

HEAD = ["--layer", "classifier.weight", "--bias", "classifier.bias"]
POOLER = ["--layer", "bert.pooler.dense.weight", "--bias", "bert.pooler.dense.bias", "--activation", "tanh"]
POOLER += ["--head", "classifier.weight", "--head-bias", "classifier.bias", "--loss", "cross-entropy"]
SEEDS, TRAINING_SEEDS = range(3), range(2)  # of farcast's folds; of order, dropout and the adapter's start
RATES = {"lora": (1e-3, 2e-3, 5e-3), "full": (5e-5, 1e-4, 2e-4)}
MOST_EPOCHS = {"lora": 8, "full": 4}
HEAD_RATE = 5e-2
RANK, BATCH, MAX_LENGTH, WARM_UP = 8, 16, 48, 0.1


class Texts:
    """Tokens and labels of a .jsonl file."""

    def __init__(self, folder: Path, name: str) -> None:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(folder / "start")
        texts = [row["text"] for row in rows]
        self.tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        self.labels = torch.tensor([row["label"] for row in rows])

    def some(self, rows: Any) -> dict[str, Any]:
        """The model's arguments, without columns that are padding for all of these rows."""
        length = int(self.tokens["attention_mask"][rows].sum(dim=1).max())
        return {name: values[rows, :length] for name, values in self.tokens.items()}


def started(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).float()


@torch.no_grad()
def logits_of(model: Any, texts: Texts, rows: Any) -> Any:
    """Of some rows, shortest first, so that little is padding."""
    model.eval()
    order = rows[texts.tokens["attention_mask"][rows].sum(dim=1).argsort()]
    found = torch.cat([model(**texts.some(part)).logits for part in order.split(64)])
    made = torch.empty(len(texts.labels), found.shape[1])
    made[order] = found
    return made[rows]


def score(logits: Any, labels: Any) -> dict[str, float]:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return {"accuracy": (logits.argmax(1) == labels).float().mean().item(), "loss": cross_entropy(logits, labels).item()}


def features(folder: Path, texts: Texts, keep: str) -> dict[str, Any]:
    """What goes into the pooler and into the classifier, for all rows, and the CPU seconds that it took; kept in a file."""
    kept = folder / f"features_{keep}.pt"
    if kept.exists():
        return dict(torch.load(kept))
    model, caught = started(folder / "start"), {"pooler": [], "head": []}
    model.bert.pooler.dense.register_forward_hook(lambda _, given, __: caught["pooler"].append(given[0]))
    model.classifier.register_forward_hook(lambda _, given, __: caught["head"].append(given[0]))
    model.eval()
    begun = time.process_time()
    with torch.no_grad():
        for part in torch.arange(len(texts.labels)).split(64):
            model(**texts.some(part))
    found = {name: torch.cat(values) for name, values in caught.items()} | {"cpu_s": time.process_time() - begun}
    torch.save(found, kept)
    return found


def tune(folder: Path, *words: Any, out: str) -> float:
    """CPU seconds of `farcast tune`, user and system. If the gate refuses, there is no `out`."""
    shutil.rmtree(folder / out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "farcast_cli", "tune", *map(str, words), "-o", out, "-q"]
    done = subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL)
    if done.returncode not in (0, NoForecastError.exit_code):
        done.check_returncode()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def head_logits(folder: Path, name: str, test: dict[str, Any]) -> Any:
    """The test texts' logits by the classifier, and the pooler, of a checkpoint."""
    model = started(folder / name)
    with torch.no_grad():
        return model.classifier(torch.tanh(model.bert.pooler.dense(test["pooler"])))


def show(name: str, found: dict[str, Any]) -> None:
    print(json.dumps({"way": name} | found), flush=True)


def heads(folder: Path, train: Texts, test: Texts) -> None:
    """The classifier alone: farcast's ways, and logistic regression."""
    from sklearn.linear_model import LogisticRegressionCV

    rows, unseen = features(folder, train, "train"), features(folder, test, "test")
    show("features of the texts to tune on", {"cpu_s": rows["cpu_s"]})
    show("new head", score(head_logits(folder, "start", unseen), test.labels))
    np.savez(folder / "head.npz", x=rows["head"].numpy(), y=train.labels.numpy())
    begun = time.process_time()
    fit = LogisticRegressionCV(cv=5, scoring="neg_log_loss", max_iter=1000, use_legacy_attributes=False)
    fit.fit(rows["head"], train.labels)
    spent = time.process_time() - begun
    show("LogisticRegressionCV", score(fit.decision_function(unseen["head"]), test.labels) | {"cpu_s": spent})
    for seed in SEEDS:
        for loss in ("cross-entropy", "mse"):
            name = f"tuned_{loss}_{seed}"
            spent = tune(folder, "start", *HEAD, "--data", "head.npz", "--loss", loss, "--seed", seed, out=name)
            show(f"tune, head, {loss}, {seed}", score(head_logits(folder, name, unseen), test.labels) | {"cpu_s": spent})


def pooler(folder: Path, train: Texts, test: Texts) -> None:
    """The pooler behind a head that half of the texts have tuned; the other half, or all, tune the pooler."""
    rows, unseen, half = features(folder, train, "train"), features(folder, test, "test"), len(train.labels) // 2
    for name, layer, part in (
        ("half_head", "head", slice(half)),
        ("half_pooler", "pooler", slice(half, None)),
        ("pooler", "pooler", slice(None)),
    ):
        np.savez(folder / f"{name}.npz", x=rows[layer][part].numpy(), y=train.labels[part].numpy())
    spent = tune(folder, "start", *HEAD, "--data", "half_head.npz", "--loss", "cross-entropy", out="tuned_half")
    show("tune, head, half of the rows", score(head_logits(folder, "tuned_half", unseen), test.labels) | {"cpu_s": spent})
    for name in ("half_pooler", "pooler"):
        spent = tune(folder, "tuned_half", *POOLER, "--data", f"{name}.npz", out=f"tuned_{name}")
        refused = not (folder / f"tuned_{name}").exists()
        found = {"refused": True} if refused else score(head_logits(folder, f"tuned_{name}", unseen), test.labels)
        show(f"tune, pooler behind that head, {name}", found | {"cpu_s": spent})


def trainable(folder: Path, kind: str) -> Any:
    model = started(folder / "start")
    if kind == "full":
        return model
    from peft import LoraConfig, get_peft_model

    about = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
    return get_peft_model(model, about)


def batches(texts: Texts, rows: Any) -> list[Any]:
    """At random, but of similar length, so that little is padding."""
    found = []
    for some in rows[torch.randperm(len(rows))].split(8 * BATCH):
        found += some[texts.tokens["attention_mask"][some].sum(dim=1).argsort()].split(BATCH)
    return [found[i] for i in torch.randperm(len(found))]


def epochs(model: Any, texts: Texts, rows: Any, rates: tuple[float, float], most: int) -> Any:
    """Train by AdamW; yields after each epoch. The rates, of encoder and head, rise for a tenth of `most` epochs, then fall to zero."""
    parts: list[dict[str, Any]] = [{"params": [], "lr": rate} for rate in rates]
    for name, values in model.named_parameters():
        if values.requires_grad:
            parts["classifier" in name]["params"].append(values)
    optimizer = torch.optim.AdamW(parts)
    total = most * len(batches(texts, rows))
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * total), total)
    for _ in range(most):
        model.train()
        for part in batches(texts, rows):
            optimizer.zero_grad()
            cross_entropy(model(**texts.some(part)).logits, texts.labels[part]).backward()
            optimizer.step()
            schedule.step()
        yield


def training(folder: Path, kind: str, texts: Texts, rows: Any, *, rate: float, seed: int) -> tuple[Any, Any]:
    """A model, and what trains it one epoch further."""
    torch.manual_seed(seed)
    model = trainable(folder, kind)
    return model, epochs(model, texts, rows, (rate, HEAD_RATE), MOST_EPOCHS[kind])


def search(folder: Path, kind: str, train: Texts) -> dict[str, float]:
    """A rate, and how many epochs: trained on four fifths of the texts, judged by the others.

    A rate ends when two epochs in turn are no better, or when it is behind another at half of the epochs.
    """
    all_rows, half = torch.arange(len(train.labels)), MOST_EPOCHS[kind] // 2
    judged, learnt = all_rows[: len(all_rows) // 5], all_rows[len(all_rows) // 5 :]
    tried, least_at_half, begun = [], np.inf, time.process_time()
    for rate in RATES[kind]:
        losses: list[float] = []
        model, walk = training(folder, kind, train, learnt, rate=rate, seed=0)
        for _ in walk:
            losses.append(score(logits_of(model, train, judged), train.labels[judged])["loss"])
            print(f"{kind}, rate {rate:g}, epoch {len(losses)}: {losses[-1]:.3f}", file=sys.stderr, flush=True)
            if len(losses) - int(np.argmin(losses)) > 2 or (len(losses) == half and losses[-1] > least_at_half):
                break
            if len(losses) == half:
                least_at_half = losses[-1]
        tried.append((min(losses), int(np.argmin(losses)) + 1, rate))
    loss, count, rate = min(tried)
    return {"rate": rate, "epochs": count, "judged_loss": loss, "search_cpu_s": time.process_time() - begun}


def gradients(folder: Path, kind: str, train: Texts, test: Texts, setting: str) -> None:
    """LoRA or full fine-tuning on all texts, at a rate and for a number of epochs that are given or searched."""
    chosen = (
        dict(zip(("rate", "epochs"), map(float, setting.split(",")), strict=True)) if setting else search(folder, kind, train)
    )
    for seed in TRAINING_SEEDS:
        model, walk = training(folder, kind, train, torch.arange(len(train.labels)), rate=chosen["rate"], seed=seed)
        begun = time.process_time()
        for _ in range(int(chosen["epochs"])):
            next(walk)
        spent = {"cpu_s": time.process_time() - begun}
        show(f"{kind}, {seed}", score(logits_of(model, test, torch.arange(len(test.labels))), test.labels) | spent | chosen)


def main(folder: Path, parts: list[str]) -> None:
    torch.set_num_threads(1)
    train, test = Texts(folder, "train"), Texts(folder, "test")
    for part in parts or ["heads", "pooler", "lora", "full"]:
        kind, _, setting = part.partition("=")
        if kind in RATES:
            gradients(folder, kind, train, test, setting)
        else:
            {"heads": heads, "pooler": pooler}[kind](folder, train, test)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
