"""Schedules are the published curves; a refined one follows what gradients were like."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobs.ema import Average
from jobs.schedules import SHAPES, factor, refine, resampled


@given(st.integers(1, 5000), st.integers(0, 200), st.sampled_from(SHAPES[:-1]), st.data())
def test_a_factor_is_between_zero_and_one(
    steps: int, warmup: int, shape: str, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    rate = factor(step, steps=steps, warmup_steps=warmup, shape=shape)
    assert 0 <= rate <= 1
    later = factor(min(step + 1, steps), steps=steps, warmup_steps=warmup, shape=shape)
    assert step < warmup or later <= rate


@pytest.mark.parametrize(
    ("shape", "at_half", "at_end"),
    [("linear", 0.5, 0.0), ("rex", 2 / 3, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)],
)
def test_curves_pass_their_published_points(shape: str, at_half: float, at_end: float) -> None:
    rate = [factor(t, steps=100, warmup_steps=0, shape=shape) for t in (0, 50, 100)]
    assert rate == pytest.approx([1.0, at_half, at_end])


def test_warm_up_is_linear() -> None:
    rates = [factor(t, steps=10**9, warmup_steps=4, shape="constant") for t in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_equal_gradients_refine_to_linear_decay() -> None:
    refined = refine([3.0] * 100)
    assert refined == pytest.approx(np.linspace(1, 0, 100), abs=1e-9)
    rate = factor(50, steps=100, warmup_steps=50, shape="refined", refined=refined.tolist())
    assert rate == pytest.approx(0.5, abs=0.01), "it brings its own warm-up"


def test_large_gradients_at_the_beginning_refine_to_a_warm_up() -> None:
    norms = 1 + 20 * np.exp(-np.arange(200) / 20)
    refined = refine(norms.tolist())
    assert refined[0] < 0.2
    assert 20 < refined.argmax() < 120
    assert refined[-1] == 0


def test_a_beginning_shorter_than_the_median_counts() -> None:
    norms = 1 + 20 * np.exp(-np.arange(200) / 10)
    assert refine(norms.tolist())[0] < 0.1


@given(st.lists(st.floats(0.01, 100), min_size=10, max_size=60))
def test_a_refined_schedule_is_that_of_a_plain_loop(norms: list[float]) -> None:
    reach = max(1, round(0.1 * len(norms) / 2))
    longer = [norms[0]] * reach + norms + norms[-reach - 1 : -1][::-1]
    smooth = [float(np.median(longer[t : t + 2 * reach + 1])) for t in range(len(norms))]
    rates = [sum(1 / g for g in smooth[t + 1 :]) / smooth[t] for t in range(len(norms))]
    assert refine(norms) == pytest.approx(np.array(rates) / max(rates))


def test_norms_that_are_logged_more_often_in_one_place_refine_to_the_same() -> None:
    even = [*range(20, 2001, 20)]
    uneven = sorted({*even, *range(1000, 1500, 3)})
    plain, dense = (
        refine([1 + 20 * math.exp(-step / 300) for step in steps], steps)
        for steps in (even, uneven)
    )
    assert resampled(dense, 20) == pytest.approx(resampled(plain, 20), abs=0.03)
    assert refine([*range(1, 101)], even) == pytest.approx(refine([*range(1, 101)]))


@pytest.mark.parametrize("norms", [[1.0] * 9, [1.0] * 20 + [0.0], [1.0] * 20 + [math.nan]])
def test_what_cannot_be_refined_is_refused(norms: list[float]) -> None:
    with pytest.raises(ValueError, match="at least ten positive"):
        refine(norms)


def test_a_schedule_by_fewer_points_keeps_its_course() -> None:
    rates = refine((1 + 20 * np.exp(-np.arange(500) / 20)).tolist())
    few = resampled(rates, 50)
    assert len(few) == 50
    for z in np.linspace(0, 1, 40):
        rate = factor(round(z * 500), steps=500, warmup_steps=0, shape="refined", refined=few)
        assert rate == pytest.approx(rates[min(499, round(z * 499))], abs=0.05)


def test_the_average_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = Average(module, decay=0.9)
    expected = module.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        average.update(module)
        kept = min(0.9, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * module.weight.detach()
    assert torch.allclose(average.state["weight"], expected, atol=1e-6)
    again = Average(module, decay=0.9)
    again.load(average.state, average.updates)
    for one in (average, again):
        one.update(module)
    assert torch.equal(again.state["weight"], average.state["weight"])
