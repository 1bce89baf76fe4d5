"""Schedules: end points and shapes; their values over a whole run are compared in tests/parity.py."""

import pytest

from ijepa_fast.config import Optim
from ijepa_fast.engine.schedules import Schedule


def schedule_of(**changes):
    return Schedule(Optim(epochs=20, warmup_epochs=4, **changes), steps_per_epoch=10)


@pytest.fixture
def schedule():
    return schedule_of()


def test_learning_rate_rises_to_its_peak_and_falls(schedule):
    rates = [schedule.learning_rate(i) for i in range(200)]
    assert rates[39] == pytest.approx(1e-3)
    assert rates[:40] == sorted(rates[:40])
    assert rates[39:] == sorted(rates[39:], reverse=True)
    assert rates[-1] == pytest.approx(1e-6)


def test_weight_decay_shapes():
    cosine = schedule_of()
    linear = schedule_of(weight_decay_shape="linear")
    assert cosine.decay(199) == pytest.approx(0.4)
    assert linear.decay(199) == pytest.approx(0.4)
    assert linear.decay(99) == pytest.approx(0.22)
    assert cosine.decay(49) < linear.decay(49)


def test_momentum_is_linear_and_not_advanced(schedule):
    assert schedule.ema_momentum(0) == 0.996
    assert schedule.ema_momentum(100) == pytest.approx(0.998)


def test_momentum_may_rise_along_a_cosine():
    cosine = schedule_of(ema_shape="cosine")
    assert cosine.ema_momentum(0) == pytest.approx(0.996)
    assert cosine.ema_momentum(50) < 0.997
    assert cosine.ema_momentum(100) == pytest.approx(0.998)
    assert cosine.ema_momentum(200) == pytest.approx(1.0)


def test_a_longer_horizon_stops_short_of_the_end():
    stretched = schedule_of(horizon=1.25)
    assert stretched.learning_rate(199) > 1e-5
    assert stretched.ema_momentum(199) < 0.9995


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_shorter_horizon_holds_what_it_ended_with(shape):
    short = schedule_of(horizon=0.5, ema_shape=shape, weight_decay_shape=shape)
    assert short.ema_momentum(199) == pytest.approx(1.0)
    assert short.learning_rate(199) == pytest.approx(1e-6)
    assert short.decay(199) == pytest.approx(0.4)
