"""What other tools do for the same work: the sum of two snapshots, each by its usual way.

    python bench/rivals.py save_file EARLY LAST OUT
    python bench/rivals.py transformers EARLY LAST OUT
    python bench/rivals.py mergekit EARLY LAST OUT      (prints the configuration that mergekit-yaml is given)

Programs of their own, so that their memory is theirs.
"""

from __future__ import annotations

import sys
from pathlib import Path

EARLY, LAST = -1 / 3, 4 / 3  # a line through the steps 4000 and 7000, to 8000


def by_save_file(early: Path, last: Path, out: Path) -> None:
    """Safetensors' load_file and save_file, shard by shard, as a script of one's own would do it."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in sorted(last.glob("*.safetensors")):
        then, now = load_file(early / path.name), load_file(path)
        save_file({name: (EARLY * then[name].float() + LAST * value.float()).to(value.dtype) for name, value in now.items()},
                  out / path.name, metadata={"format": "pt"})  # fmt: skip


def by_transformers(early: Path, last: Path, out: Path) -> None:
    """Two models, one moved along the line between them, and saved."""
    import torch
    from transformers import AutoModelForCausalLM

    then, now = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (early, last))
    with torch.no_grad():
        for was, value in zip(then.parameters(), now.parameters(), strict=True):
            value.copy_(EARLY * was.float() + LAST * value.float())
    now.save_pretrained(out)


def mergekit_config(early: Path, last: Path) -> str:
    """Mergekit's linear merge; the transformer is not one of its architectures, so the names are taken from the files."""
    return (
        f"merge_method: linear\nmodels:\n  - model: {early}\n    parameters: {{weight: {EARLY}}}\n"
        f"  - model: {last}\n    parameters: {{weight: {LAST}}}\nparameters: {{normalize: false}}\ndtype: bfloat16\n"
    )


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[2:]]
    if sys.argv[1] == "save_file":
        by_save_file(*paths)
    elif sys.argv[1] == "transformers":
        by_transformers(*paths)
    else:
        paths[2].write_text(mergekit_config(paths[0], paths[1]))
