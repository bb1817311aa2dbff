"""A folder that can be uploaded to a model hub: which files of the origin belong in it beside the weights.

What is not known to belong stays behind: a hub is public, and a trainer's folder holds its arguments, its logs and its paths.

Source: transformers, `save_pretrained` of models, tokenizers and processors; peft, `PeftModel.save_pretrained`.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from farcast_cli.trainers.base import Part

CARD = "README.md"
"""The model card."""
_BELONGS = re.compile(
    r"(?!train|ds_|deepspeed|accelerate|fsdp)(?:"  # a trainer's own settings, whatever they are called
    r"[\w.-]*config[\w.-]*\.json|modules\.json"
    r"|[\w.-]*(?:tokenizer|tokens|vocab|merges|chat_template|spiece|sentencepiece|spm|bpe)[\w.-]*\.(?:json|txt|model|jinja)"
    r"|[\w.-]+\.(?:jinja|tiktoken|spm)"
    r"|(?:configuration|modeling|tokenization|processing|image_processing|feature_extraction)_\w+\.py"
    r"|(?:licen[sc]e|notice)[\w.-]*"
    r")",
    re.IGNORECASE,
)
"""Configuration, tokenizer, generation, the model's own code, and the licence."""


def files_for_hub(others: Sequence[Part]) -> tuple[Part, ...]:
    """The parts beside the weights that a library needs to load them."""
    names = {part.name for part in others}
    return tuple(part for part in others if part.role == "other" and _belongs(part.name, names))


def _belongs(name: str, names: Collection[str]) -> bool:
    """Whether a file belongs there; other weights do as a part of the model, in a folder with a configuration of its own."""
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return path.parent != PurePosixPath() and str(path.with_name("config.json")) in names
    return bool(_BELONGS.fullmatch(path.name))
