"""Which tensors belong to a quantised one: forecast by themselves, they would change what its integers stand for.

Knows how bitsandbytes, GPTQ, AWQ, HQQ, quanto, compressed-tensors and the fp8 formats name scales and zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

NAMED_AFTER = (
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB"),
    *("_scale", "_scale_inv", "_scales", "_zero_point"),
)
"""What a weight's name is followed by: `layers.0.weight` and `layers.0.weight.absmax`."""
BESIDE = {
    *("scale", "scales", "zero", "zeros", "qzeros", "zero_point", "g_idx", "SCB", "codebooks", "_scale", "_shift"),
    *("weight_scale", "weight_scale_inv", "weight_scales", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
}
"""What stands beside a weight in its module: `layers.0.qweight` and `layers.0.scales`."""
WEIGHTS = ("weight", "qweight", "weight_packed", "W_q", "codes", "_data")


def quantised_owner(name: str, quantised: Collection[str]) -> str:
    """The quantised tensor that a tensor belongs to by its name, "" where there is none.

    Args:
        quantised: the names of the tensors that are not of a floating type.
    """
    if not quantised:
        return ""
    for ending in NAMED_AFTER:
        if name.endswith(ending) and name.removesuffix(ending) in quantised:
            return name.removesuffix(ending)
    stem, state, _ = name.rpartition(".quant_state.")
    if state and stem in quantised:
        return stem
    module, dot, leaf = name.rpartition(".")
    beside = (f"{module}{dot}{weight}" for weight in WEIGHTS) if leaf in BESIDE else ()
    return next((weight for weight in beside if weight in quantised), "")
