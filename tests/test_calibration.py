"""Calibration, what decisions cost, and scores relative to a cohort: oracles and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from csc_model import metrics
from csc_model.calibration import (
    Cohort,
    act_dcf,
    as_norm,
    calibrate,
    cllr,
    log_odds,
)
from tests.test_metrics import Scored, scored


def normal_trials(count: int = 40_000, apart: float = 2.0) -> Scored:
    """Scores of two normal distributions: their log-likelihood ratio is `apart` times the score."""
    rng = np.random.default_rng(3)
    target = rng.random(count) < 0.3
    return rng.normal(size=count) + apart * (target - 0.5), target


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_calibration_is_that_of_sklearn(prior: float) -> None:
    score, target = normal_trials(2000)
    score = 0.1 * score + 0.6
    found = calibrate(score, target, prior)
    weight = np.where(target, prior / target.sum(), (1 - prior) / (~target).sum()) * len(target)
    oracle = LogisticRegression(C=1e9, tol=1e-12, max_iter=10_000)
    oracle.fit(10 * score[:, None], target, weight)
    offset = float(oracle.intercept_[0]) - log_odds(prior)
    assert found.scale == pytest.approx(10 * float(oracle.coef_[0, 0]), rel=1e-3)
    assert found.offset == pytest.approx(offset, rel=1e-3, abs=1e-2)


def test_of_normal_scores_the_ratio_is_known() -> None:
    score, target = normal_trials()
    found = calibrate(7 * score - 3, target)
    np.testing.assert_allclose(found.llr(7 * score - 3), 2 * score, rtol=0.03, atol=0.05)
    assert found.probability(np.array([-3.0]), 0.2)[0] == pytest.approx(0.2, abs=0.01)


@given(scored(), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_scores_on_another_scale_mean_the_same(trials: Scored, scale: float, shift: float) -> None:
    score, target = trials
    one = calibrate(score, target).llr(score)
    other = calibrate(scale * score + shift, target).llr(scale * score + shift)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@given(scored(), st.sampled_from([0.01, 0.05, 0.5]))
@settings(max_examples=100, deadline=None)
def test_decisions_cost_no_less_than_the_best(trials: Scored, prior: float) -> None:
    score, target = trials
    llr = calibrate(score, target).llr(score)
    assert act_dcf(llr, target, prior) >= metrics.min_dcf(llr, target, prior) - 1e-12
    assert cllr(llr, target) <= 1 + 1e-4  # fitted here, so never worse than knowing nothing


def test_hand_worked_costs() -> None:
    target = np.array([True, True, False, False])
    assert cllr(np.zeros(4), target) == pytest.approx(1)
    assert cllr(np.array([50.0, 50.0, -50.0, -50.0]), target) == pytest.approx(0)
    ratio = np.log(3)  # right by 3 to 1, in all four: log2(4 / 3) bits
    assert cllr(ratio * np.array([1, 1, -1, -1]), target) == pytest.approx(np.log2(4 / 3))
    llr = np.array([5.0, -5.0, 5.0, -5.0])  # half is missed, half a false alarm
    assert act_dcf(llr, target, 0.5) == pytest.approx(1)
    assert act_dcf(llr, target, 0.05) == pytest.approx((0.05 * 0.5 + 0.95 * 0.5) / 0.05)
    assert act_dcf(np.full(4, -9.0), target, 0.05) == pytest.approx(1)


def test_scores_that_tell_all_apart_are_calibrated_all_the_same() -> None:
    target = np.arange(10) >= 5
    found = calibrate(np.arange(10.0), target)
    assert np.isfinite(found.llr(np.arange(10.0))).all()
    assert cllr(found.llr(np.arange(10.0)), target) < 0.05


def test_scores_that_tell_nothing_are_worth_nothing() -> None:
    target = np.arange(10) % 2 == 0
    found = calibrate(np.ones(10), target)
    assert cllr(found.llr(np.ones(10)), target) == pytest.approx(1)


@pytest.mark.parametrize("fails", [calibrate, cllr, lambda *given: act_dcf(*given, 0.05)])
def test_unusable_scores_are_refused(fails: object) -> None:
    assert callable(fails)
    with pytest.raises(ValueError, match="NaN"):
        fails(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ValueError, match="target and non-target"):
        fails(np.array([0.0, 1.0]), np.array([True, True]))


def test_as_norm_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    enrolled, tested = rng.normal(size=(5, 40)), rng.normal(size=(7, 40))
    score = rng.normal(size=30)
    enrolment_of, test_of = rng.integers(5, size=30), rng.integers(7, size=30)
    found = as_norm(score, Cohort.of(enrolled, 10), Cohort.of(tested, 10), enrolment_of, test_of)
    for trial in range(30):
        terms = []
        for row in (enrolled[enrolment_of[trial]], tested[test_of[trial]]):
            nearest = sorted(row, reverse=True)[:10]
            terms.append((score[trial] - np.mean(nearest)) / np.std(nearest))
        assert found[trial] == pytest.approx(np.mean(terms))


def test_a_cohort_may_be_smaller_than_asked_but_not_one_stranger() -> None:
    assert Cohort.of(np.array([[0.0, 2.0]]), 100).mean[0] == 1
    with pytest.raises(ValueError, match="two strangers"):
        Cohort.of(np.array([[0.0]]), 100)
