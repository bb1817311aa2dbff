"""What the runs are called in the report."""

from __future__ import annotations

TITLES = {
    "mlp-sgd": "MLP, SGD",
    "mlp-sgd-small": "MLP, SGD, rate 4x too small",
    "mlp-adamw": "MLP, AdamW",
    "mlp-sgd-long": "MLP, SGD, rate 4x too small, long",
    "conv": "convnet, AdamW",
    "conv-small": "convnet, AdamW, rate 4x too small",
    "gpt": "GPT, AdamW",
    "gpt-small": "GPT, AdamW, rate 20x too small",
    "bert": "DistilBERT, AdamW",
    "full": "GPT, fine-tuned",
    "lora": "GPT, LoRA",
    "reinforce": "GPT, REINFORCE",
    "gpt-m": "GPT of 7.5 million, AdamW, cosine",
}
SCHEDULES = {"cosine": "cosine decay", "linear": "linear decay", "wsd": "decay over the last 20 %"}


def title(name: str) -> str:
    """A run's name in words; the schedule's, where a run has one, ends its name."""
    run, _, schedule = name.rpartition("-")
    return f"{TITLES.get(run, run)}, {SCHEDULES[schedule]}" if schedule in SCHEDULES else TITLES.get(name, name)
