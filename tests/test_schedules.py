import itertools
import math

import pytest

from hf_robustq.schedules import LR_SCHEDULES, SCHEDULES, cosine_steps, step_decay


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_in_range_and_rise_to_one_or_fall_from_it(name):
    values = [SCHEDULES[name](i / 100) for i in range(101)]
    if name.endswith("_decay"):
        values.reverse()
        assert values[0] == 0.0
    assert all(0 <= value <= 1 for value in values) and values[-1] == pytest.approx(1.0)
    assert values == sorted(values)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rates_start_at_one_and_never_rise(name):
    values = [LR_SCHEDULES[name](epoch / 10, 90.0) for epoch in range(901)]
    assert values[0] == 1.0 and all(a >= b for a, b in itertools.pairwise(values)) and values[-1] >= 0


def test_decay_falls_exactly_at_the_epoch_even_when_the_quotient_is_inexact():
    assert [step_decay(1.1 * k, 99, every=1) for k in (10,)] == [pytest.approx(1e-11)]
    assert step_decay(29.999999999, 90) == pytest.approx(0.1)
    assert step_decay(29.9, 90) == 1.0
    assert cosine_steps(50, 200) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)
