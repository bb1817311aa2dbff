"""LFD-2, the paper's forecaster: one linear layer on a run's first and last weights, trained on the L1 loss.

    w_hat_j = a_j0 w_first + a_j1 w_last + b_j,   j = 1..J,   directly for J steps ahead
    L_pred  = mean_ij | w_hat_ij - w_ij |
    L_grad  = mean_j max( mean_i |w_hat_{j+1} - w_hat_j| - mean_i |w_hat_j - w_hat_{j-1}|, 0 )
    loss    = L_pred + weight L_grad

Trained where the target is known, from x to s (ratio alignment), and applied from s. L_grad's second argument could
not be obtained from the paper; the hinge on the step before is our reading, and so is its weight (default 0: it
changes nothing on most runs).

Source: "Less is More: Efficient Weight Farcasting with 1-Layer Neural Network", Shou et al., arXiv 2505.02714.

Shapes: K tensors, M sampled elements, J targets, P = 3 parameters (drift, weight, constant), B = K or 1 fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.forecast.gram import Sample
    from farcast_cli.forecast.timeline import Timeline

NUM_TARGETS = 4  # J; the last one is the forecast
NUM_STEPS = 300
LEARNING_RATE = 0.02  # in units of each column's mean size; decays to zero on a cosine


def fit_lfd2(
    sample: Sample, timeline: Timeline, training_origin: float, *, grad_weight: float, per_tensor: bool, device: str = "cpu"
) -> NDArray[np.float64]:
    """Train the layer from x to s and apply it from s; the step's coefficients over the Gram basis, (K, R).

    Args:
        sample: weights (M, T) with bounds (K + 1,).
        training_origin: x, in steps.
        grad_weight: of L_grad.
        per_tensor: one layer for each tensor rather than one for all.
    """
    torch.set_num_threads(1)  # sums would depend on how many
    rows = _training_rows(sample, timeline, training_origin, per_tensor=per_tensor)
    layer = _train(_Rows(*(getattr(rows, name).to(device) for name in _Rows.__slots__)), grad_weight=grad_weight)
    along_drift, along_weight, constant = layer[:, -1].cpu().double().numpy().T  # each (B,)
    num_tensors = len(sample.sizes)
    to_origin = timeline.at(timeline.origin)
    step = np.zeros((num_tensors, len(timeline.steps) + 1))
    step += np.asarray(along_drift + along_weight)[:, None] * to_origin  # p_u (w_s - w_0) + p_v (w_s - w_0)
    step[:, -2] += along_weight  # ... + p_v w_0
    step[:, -1] += constant
    return step


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the layers are trained on, a row for each sampled element; all but `group` float64.

    Args:
        inputs: (M, P).
        targets: true steps from x, (M, J).
        last_move: the move before x, as long as from one target to the next, (M, 1).
        share: each row's part of the loss, (M, 1).
        group: the fit that a row belongs to, (M,).
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    last_move: torch.Tensor
    share: torch.Tensor
    group: torch.Tensor


def _training_rows(sample: Sample, timeline: Timeline, training_origin: float, *, per_tensor: bool) -> _Rows:
    """The layer is written as a step: w_hat - w_x = p_u (w_x - w_0) + p_v w_x + b, which spans the same functions."""
    values = sample.values.astype(np.float64)
    history = np.diff(values, axis=1)

    def at(step: float) -> NDArray[np.float64]:
        return np.asarray(history @ timeline.at(max(step, timeline.first))[:-2])

    stride = (timeline.origin - training_origin) / NUM_TARGETS
    moved = at(training_origin)
    targets = [at(min(training_origin + stride * j, timeline.origin)) - moved for j in range(1, NUM_TARGETS + 1)]
    inputs = np.stack([moved, values[:, 0] + moved, np.ones(len(values))], axis=1)
    counts = np.diff(sample.bounds)
    tensor = np.repeat(np.arange(len(counts)), counts)
    share = (1.0 / counts if per_tensor else sample.sizes / counts / sample.sizes.sum())[tensor]
    group = tensor if per_tensor else np.zeros_like(tensor)
    columns = (inputs, np.stack(targets, axis=1), (moved - at(training_origin - stride))[:, None], share[:, None], group)
    return _Rows(*map(torch.from_numpy, columns))


def _train(rows: _Rows, *, grad_weight: float) -> torch.Tensor:
    """Minimise L_pred + grad_weight L_grad by Adam from zero (persistence): the layers (B, J, P)."""
    inputs, targets, group, share = rows.inputs, rows.targets, rows.group, rows.share
    num_fits = int(group.max()) + 1

    def mean(each: torch.Tensor) -> torch.Tensor:
        """The weighted mean of rows (M, X) by fit: (B, X)."""
        zeros = torch.zeros(num_fits, each.shape[1], dtype=each.dtype, device=each.device)
        return zeros.index_add(0, group, each * share)

    input_size = mean(inputs.abs()).clamp_min(1e-30)  # (B, P)
    target_size = mean(targets.abs()).amax(dim=1).clamp_min(1e-30)  # (B,)
    scaled, goal = inputs / input_size[group], targets / target_size[group, None]
    before = torch.zeros_like(goal[:, :1])
    last_step = mean((rows.last_move / target_size[group, None]).abs())  # (B, 1)
    layer = torch.zeros(num_fits, targets.shape[1], inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    layer.requires_grad_()
    optimizer = torch.optim.Adam([layer], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    for _ in range(NUM_STEPS):
        predicted = (scaled[:, None, :] * layer[group]).sum(dim=2)  # (M, J)
        loss = mean((predicted - goal).abs()).mean(dim=1).sum()
        if grad_weight:
            steps = mean(torch.diff(torch.cat([before, predicted], dim=1)).abs())  # (B, J)
            growth = torch.diff(torch.cat([last_step, steps], dim=1)).clamp_min(0)
            loss = loss + grad_weight * growth.mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return (layer * target_size[:, None, None] / input_size[:, None, :]).detach()
