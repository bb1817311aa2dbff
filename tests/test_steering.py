"""What losses tell of leaps: the signal and the limit against losses whose slope and curvature are known."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest

from farcast_cli.forecast.momentum import SMOOTHED
from farcast_cli.forecast.steering import LARGEST, PROBE, Losses, heard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def told_by(
    loss: Callable[[float], float], origins: Sequence[float], known: Losses | None = None
) -> tuple[Losses, list[float]]:
    """Calls at some places on a line; a stretch is one long."""
    losses, said = known or Losses(), []
    for at in origins:
        losses, told = heard(losses, ahead=loss(at + PROBE), behind=loss(at - PROBE), origin=loss(at))
        said.append(told)
    return losses, said


def bowl(curvature: float) -> Callable[[float], float]:
    return lambda x: 10 - x + curvature * (x - 4) ** 2 / 2


def mean(values: Sequence[float]) -> float:
    """Weighted by SMOOTHED to the power of their age."""
    weights = [SMOOTHED**age for age in range(len(values))][::-1]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def test_the_signal_is_the_slope_over_the_usual_change_of_the_loss_whatever_the_curvature() -> None:
    origins = [0.0, 1.0, 2.5, 3.0]
    for curvature in (0.0, 0.3):
        losses, said = told_by(bowl(curvature), origins)
        levels = [bowl(curvature)(x) for x in origins]
        changes = [(after - before) ** 2 for before, after in itertools.pairwise(levels)]
        assert math.isnan(said[0])
        assert losses.usual == pytest.approx(math.sqrt(mean(changes)))
        assert said[-1] == pytest.approx((1 - curvature * (3.0 - 4)) / losses.usual if losses.usual > 1 else 1.0)


def test_the_limit_is_where_curvature_alone_lifts_the_loss_by_its_usual_change() -> None:
    losses, _ = told_by(lambda x: 10 - x + 0.6 * x**2, [0.0, 0.2, 0.3, 0.5])
    assert 0.6 * losses.limit**2 == pytest.approx(losses.usual)


@pytest.mark.parametrize("loss", [lambda x: -x, lambda x: -(x**2), lambda _: 3.0])
def test_without_curvature_upwards_there_is_no_limit(loss: Callable[[float], float]) -> None:
    assert told_by(loss, [0.0, 1.0, 3.0])[0].limit == math.inf


@pytest.mark.parametrize(("sign", "trust"), [(-1.0, 1.0), (1.0, 0.0)])
def test_a_loss_that_always_speaks_against_leaps_takes_all_trust_from_the_share(sign: float, trust: float) -> None:
    losses, said = told_by(lambda x: sign * x, [0.0, 2.0, 4.0, 6.0])
    assert said[1:] == [pytest.approx(-sign / 2)] * 3
    assert losses.trust == pytest.approx(trust)


def test_a_loss_that_speaks_for_and_against_in_turn_leaves_most_of_the_trust() -> None:
    """Its mean is small beside its size: that is noise."""
    losses = Losses()
    for number in range(12):
        against = 0.3 * (-1) ** number
        losses, _ = heard(losses, ahead=1 + against, behind=1 - against, origin=1 + 0.1 * number)
        assert number < 2 or losses.trust > 0.6


def test_nothing_is_told_until_the_loss_has_changed() -> None:
    losses, said = told_by(lambda _: 2.0, [0.0, 1.0, 2.0])
    assert all(map(math.isnan, said))
    assert (losses.usual, losses.trust) == (0.0, 1.0)


def test_losses_as_large_as_numbers_can_be_stay_within_arithmetic() -> None:
    losses = Losses()
    for number in range(6):
        huge = math.copysign(1.7e308, (-1) ** number)
        losses, told = heard(losses, ahead=huge, behind=-huge, origin=huge)
        assert number == 0 or -1 <= told <= 1 or math.isnan(told)
        assert losses.limit >= 0
        assert abs(losses.bend) <= 16 * LARGEST
        assert 0 <= losses.trust <= 1


def test_a_loss_that_speaks_against_a_leap_at_once_all_along_or_with_the_share_does_not_allow_it() -> None:
    losses, _ = told_by(lambda x: -x, [0.0, 2.0, 4.0])
    assert losses.objection(-0.4, 0.5) == ""
    assert losses.objection(math.nan, -1.0) == ""
    assert "much higher ahead" in losses.objection(-0.5, 0.5)
    assert "share -0.1" in losses.objection(-0.01, -0.1)
    assert losses.objection(0.01, -0.1) == ""
    shrinking, said = told_by(lambda x: 0.1**x, [0.0, 1.0, 2.0, 3.0])
    growing, _ = told_by(lambda x: 10.0**x, [0.0, -1.0, -2.0, -3.0])
    assert shrinking.objection(said[-1], 0.5) == ""
    assert growing.trust == 0.0, "always against, though less and less"
    assert "at every recent call" in growing.objection(-0.01, 0.5)


def test_a_loss_that_speaks_against_a_leap_takes_the_share_with_it() -> None:
    losses, _ = told_by(lambda x: -x, [0.0, 2.0, 4.0])
    assert losses.signal(0.5, 0.4) == pytest.approx(0.9)
    assert losses.signal(-0.25, 0.4) == pytest.approx(-0.25 + 0.75 * 0.4)
    assert losses.signal(-1.0, 1.0) == -1.0
