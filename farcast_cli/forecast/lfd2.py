"""LFD-2, the paper's forecaster: one linear layer on a run's first and last weights, trained on the L1 loss.

    w_hat_j = a_j0 w_first + a_j1 w_last + b_j,   j = 1..J,   directly for J steps ahead
    L_pred  = mean_ij | w_hat_ij - w_ij |
    L_grad  = mean_j max( mean_i |w_hat_{j+1} - w_hat_j| - mean_i |w_hat_j - w_hat_{j-1}|, 0 )
    loss    = L_pred + weight L_grad

Trained where the target is known, from x to s (ratio alignment), and applied from s. L_grad's second argument could
not be obtained from the paper; the hinge on the step before is our reading, and so is its weight (default 0: it
changes nothing on most runs).

Without L_grad the J layers do not touch each other, and only the last one is applied. It is the least-absolute-deviations
fit of three numbers, and reweighted least squares finds it in a few dozen passes over the sample. L_grad ties the layers
together and is not convex: there Adam trains all of them, from persistence.

Source: "Less is More: Efficient Weight Farcasting with 1-Layer Neural Network", Shou et al., arXiv 2505.02714.

Shapes: K tensors, M sampled elements, J targets, P = 3 parameters (drift, weight, constant), B = K or 1 fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.forecast.gram import Sample
    from farcast_cli.forecast.timeline import Timeline

    Floats = NDArray[np.float64]

NUM_TARGETS = 4  # J; the last one is the forecast
NUM_PASSES = 60  # of reweighted least squares, at most: more lower the loss by less than 1e-4 of the mean target
SMALLEST_RESIDUAL = 1e-6  # of the mean target: smaller ones count as this, which moves the loss by less
SETTLED = 1e-7  # change of the layer in a pass, in units of each column's mean size
RIDGE = 1e-13  # of the mean diagonal: columns that are the same (a tensor of equal weights) share their part
NUM_STEPS = 300  # of Adam, with L_grad
LEARNING_RATE = 0.02  # in units of each column's mean size; decays to zero on a cosine
BETAS = 0.9, 0.999
TINY = 1e-30


def fit_lfd2(sample: Sample, timeline: Timeline, training_origin: float, *, grad_weight: float, per_tensor: bool) -> Floats:
    """Train the layer from x to s and apply it from s; the update's coefficients over the Gram basis, (K, R).

    Args:
        sample: weights (M, T) with bounds (K + 1,).
        training_origin: x, in steps.
        grad_weight: of L_grad.
        per_tensor: one layer for each tensor rather than one for all.
    """
    rows = training_rows(sample, timeline, training_origin, per_tensor=per_tensor)
    layer = train(rows, grad_weight) if grad_weight else least_absolute(rows)
    along_drift, along_weight, constant = layer  # each (B,)
    to_origin = timeline.at(timeline.origin)
    update = np.zeros((len(sample.sizes), len(timeline.steps) + 1))
    update += np.asarray(along_drift + along_weight)[:, None] * to_origin  # p_u (w_s - w_0) + p_v (w_s - w_0)
    update[:, -2] += along_weight  # ... + p_v w_0
    update[:, -1] += constant
    return update


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What the layers are trained on: a column for each sampled element, in units of its fit's mean sizes.

    Args:
        inputs: (P, M), and their mean absolute values `input_size` (P, B).
        targets: true updates from x, (J, M), and the largest of their mean absolute values `target_size` (B,).
        last_move: the mean size of the move before x, which is as long as from one target to the next, (B,).
        share: each element's part of the loss, (M,); they add up to 1 in each fit.
        group: the fit that an element belongs to, (M,).
        starts: the first element of each fit, (B,).
    """

    inputs: Floats
    targets: Floats
    last_move: Floats
    share: Floats
    group: NDArray[np.intp]
    starts: NDArray[np.intp]
    input_size: Floats
    target_size: Floats

    def total(self, each: Floats) -> Floats:
        """The sum over the elements of each fit: (..., M) to (..., B)."""
        return np.add.reduceat(each, self.starts, axis=-1)

    def predicted(self, layer: Floats) -> Floats:
        """What a layer (P, B) makes of the inputs, (M,)."""
        return np.asarray((self.inputs * layer[:, self.group]).sum(axis=0))

    def in_weights(self, layer: Floats) -> Floats:
        """A layer (P, B) in the weights' own units."""
        return layer * self.target_size / self.input_size


def training_rows(sample: Sample, timeline: Timeline, training_origin: float, *, per_tensor: bool) -> TrainingRows:
    """The layer is written as an update: w_hat - w_x = p_u (w_x - w_0) + p_v w_x + b, which spans the same functions."""
    values = sample.values.astype(np.float64)
    history = np.diff(values, axis=1)

    def at(step: float) -> Floats:
        return np.asarray(history @ timeline.at(max(step, timeline.first))[:-2])

    stride = (timeline.origin - training_origin) / NUM_TARGETS
    moved = at(training_origin)
    targets = np.stack([at(min(training_origin + stride * j, timeline.origin)) - moved for j in range(1, NUM_TARGETS + 1)])
    inputs = np.stack([moved, values[:, 0] + moved, np.ones(len(values))])
    counts = np.diff(sample.bounds)
    tensor = np.repeat(np.arange(len(counts)), counts)
    share = (1.0 / counts if per_tensor else sample.sizes / counts / sample.sizes.sum())[tensor]
    group = tensor if per_tensor else np.zeros_like(tensor)
    starts = np.asarray(sample.bounds[:-1] if per_tensor else sample.bounds[:1], dtype=np.intp)

    def mean_size(each: Floats) -> Floats:
        return np.maximum(np.add.reduceat(np.abs(each) * share, starts, axis=-1), TINY)

    input_size, target_size = mean_size(inputs), mean_size(targets).max(axis=0)
    last_move = mean_size(moved - at(training_origin - stride)) / target_size
    scaled = inputs / input_size[:, group], targets / target_size[group]
    return TrainingRows(*scaled, last_move, share, group, starts, input_size, target_size)


def least_absolute(rows: TrainingRows) -> Floats:
    """Minimise mean_i |w_hat_iJ - w_iJ|: the layer (P, B) of the last target.

        a <- argmin sum_i share_i r_i(a)^2 / max(|r_i|, e),   e from 1 down to SMALLEST_RESIDUAL

    The loss ends within 1e-4 of the mean target of the exact minimum; on a handful of elements, within 1e-3.

    Source: iteratively reweighted least squares (Schlossmacher, "An Iterative Technique for Absolute Deviations Curve
    Fitting", 1973), with the smallest residual lowered pass by pass.
    """
    goal, num_parameters = rows.targets[-1], len(rows.inputs)
    layer = np.zeros((num_parameters, len(rows.starts)))
    pairs = np.triu_indices(num_parameters)
    outer = rows.inputs[pairs[0]] * rows.inputs[pairs[1]]  # (P (P + 1) / 2, M)
    right = rows.inputs * goal
    for number in range(NUM_PASSES):
        smallest = max(SMALLEST_RESIDUAL, 0.5**number)
        weight = rows.share / np.maximum(np.abs(goal - rows.predicted(layer)), smallest)
        normal = np.empty((len(rows.starts), num_parameters, num_parameters))
        normal[:, pairs[0], pairs[1]] = normal[:, pairs[1], pairs[0]] = rows.total(outer * weight).T
        ridge = RIDGE * np.trace(normal, axis1=1, axis2=2)
        normal += ridge[:, None, None] * np.eye(num_parameters)
        found = np.linalg.solve(normal, rows.total(right * weight).T[..., None])[..., 0].T
        change, layer = float(np.abs(found - layer).max()), np.asarray(found)
        if smallest == SMALLEST_RESIDUAL and change < SETTLED:
            break
    return rows.in_weights(layer)


def train(rows: TrainingRows, grad_weight: float) -> Floats:
    """Minimise L_pred + grad_weight L_grad by Adam from zero (persistence): the layer (P, B) of the last target.

    Source: Adam (Kingma and Ba, arXiv 1412.6980), with the rate on a cosine.
    """
    num_targets = len(rows.targets)
    layers = np.zeros((num_targets, len(rows.inputs), len(rows.starts)))
    mean, square = np.zeros_like(layers), np.zeros_like(layers)
    for number in range(NUM_STEPS):
        gradient = _gradient(rows, layers, grad_weight)
        mean += (1 - BETAS[0]) * (gradient - mean)
        square += (1 - BETAS[1]) * (gradient**2 - square)
        unbiased = mean / (1 - BETAS[0] ** (number + 1)), square / (1 - BETAS[1] ** (number + 1))
        rate = LEARNING_RATE * (1 + np.cos(np.pi * number / NUM_STEPS)) / 2
        layers -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return rows.in_weights(layers[-1])


def _gradient(rows: TrainingRows, layers: Floats, grad_weight: float) -> Floats:
    """Of each fit's L_pred + grad_weight L_grad by its layers (J, P, B)."""
    predicted = np.stack([rows.predicted(layer) for layer in layers])  # (J, M)
    moves = np.diff(predicted, axis=0, prepend=0.0)
    sizes = rows.total(np.abs(moves) * rows.share)  # (J, B)
    grows = np.diff(sizes, axis=0, prepend=rows.last_move[None]) > 0  # the hinge is active
    # a move is what grows in its own term, and what the next one is compared with
    slope = grows.astype(np.float64)
    slope[:-1] -= grows[1:]
    by_move = np.sign(moves) * slope[:, rows.group] * grad_weight
    by_predicted = np.sign(predicted - rows.targets) + by_move
    by_predicted[:-1] -= by_move[1:]
    return np.stack([rows.total(each * rows.share * rows.inputs) for each in by_predicted]) / len(layers)
