"""Error rates: hand-worked cases, scikit-learn as oracle, intervals over speakers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from csc_model import metrics

Scored = tuple[NDArray[np.float64], NDArray[np.bool_]]


@st.composite
def scored(draw: st.DrawFn) -> Scored:
    """Trials with many ties."""
    count = draw(st.integers(2, 200))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    target = rng.random(count) < 0.4
    target[:2] = True, False
    score = np.round(rng.normal(size=count) + target, draw(st.integers(0, 3)))
    return score, target


def eer_of_sklearn(score: NDArray[np.float64], target: NDArray[np.bool_]) -> float:
    false_alarm, hit, _ = roc_curve(target, score, drop_intermediate=False)
    miss = 1 - hit
    after = int(np.argmax(false_alarm >= miss))
    before = after - 1
    gap = miss - false_alarm
    part = gap[before] / (gap[before] - gap[after])
    return float(miss[before] + part * (miss[after] - miss[before]))


@given(scored())
@settings(max_examples=200, deadline=None)
def test_eer_is_that_of_sklearns_roc(trials: Scored) -> None:
    assert metrics.eer(*trials) == pytest.approx(eer_of_sklearn(*trials), abs=1e-12)


@given(scored(), st.sampled_from([0.01, 0.05, 0.5]))
@settings(max_examples=200, deadline=None)
def test_min_dcf_is_that_of_sklearns_roc(trials: Scored, prior: float) -> None:
    score, target = trials
    false_alarm, hit, _ = roc_curve(target, score, drop_intermediate=False)
    cost = prior * (1 - hit) + (1 - prior) * false_alarm
    assert metrics.min_dcf(score, target, prior) == pytest.approx(
        cost.min() / min(prior, 1 - prior), abs=1e-12
    )


@given(scored())
@settings(max_examples=100, deadline=None)
def test_the_order_of_tied_scores_does_not_matter(trials: Scored) -> None:
    score, target = trials
    order = np.random.default_rng(len(score)).permutation(len(score))
    assert metrics.eer(score[order], target[order]) == metrics.eer(score, target)
    assert metrics.min_dcf(score[order], target[order], 0.05) == metrics.min_dcf(
        score, target, 0.05
    )


def test_hand_worked_cases() -> None:
    target = np.array([True, True, False, False])
    assert metrics.eer(np.array([3.0, 2.0, 1.0, 0.0]), target) == 0
    assert metrics.eer(np.array([0.0, 1.0, 2.0, 3.0]), target) == 1
    assert metrics.eer(np.array([1.0, 1.0, 1.0, 1.0]), target) == 0.5
    assert metrics.eer(np.array([3.0, 1.0, 2.0, 0.0]), target) == 0.5
    assert metrics.min_dcf(np.array([3.0, 2.0, 1.0, 0.0]), target, 0.05) == 0
    assert metrics.min_dcf(np.ones(4), target, 0.05) == 1


def test_unusable_scores_are_refused() -> None:
    target = np.array([True, False])
    with pytest.raises(ValueError, match="NaN"):
        metrics.eer(np.array([np.nan, 1.0]), target)
    with pytest.raises(ValueError, match="target and non-target"):
        metrics.eer(np.array([0.0, 1.0]), np.array([True, True]))


def some_trials(shift: float, seed: int = 0) -> metrics.Trials:
    rng = np.random.default_rng(seed)
    speakers, own = 20, 3
    identity = np.repeat(np.arange(speakers), own)
    pairs = [(a, b) for a in range(len(identity)) for b in range(len(identity)) if a != b]
    enrolment, test = (identity[list(side)] for side in zip(*pairs, strict=True))
    target = enrolment == test
    score = rng.normal(size=len(pairs)) + shift * target
    return metrics.Trials(score, target, enrolment, test)


def test_replicates_are_the_error_rates_of_repeated_trials() -> None:
    """Weights must say the same as writing each trial down as often as its speakers were drawn."""
    trials = some_trials(1.0)
    counts = metrics.draw_speakers(20, 5, seed=1)
    for replicate, drawn in zip(metrics.eer_replicates(trials, counts), counts, strict=True):
        once = drawn[trials.enrolment_speaker]
        times = np.where(trials.target, once, once * drawn[trials.test_speaker])
        score, target = np.repeat(trials.score, times), np.repeat(trials.target, times)
        assert replicate == pytest.approx(metrics.eer(score, target), abs=1e-12)


def test_a_paired_difference_is_told_from_chance() -> None:
    counts = metrics.draw_speakers(20, 400, seed=0)
    weak, strong = (some_trials(shift) for shift in (1.0, 2.0))
    replicates = [metrics.eer_replicates(trials, counts) for trials in (weak, strong)]
    gap = metrics.interval(0.0, replicates[1] - replicates[0])
    assert gap.high < 0
    same = metrics.eer_replicates(some_trials(1.0, seed=5), counts) - replicates[0]
    assert metrics.interval(0.0, same).low < 0 < metrics.interval(0.0, same).high


def test_too_few_speakers_give_no_interval() -> None:
    identity = np.array([0, 0, 1, 1])
    trials = metrics.Trials(
        np.arange(4.0), np.array([True, False, True, False]), identity, np.array([0, 1, 1, 0])
    )
    replicates = metrics.eer_replicates(trials, metrics.draw_speakers(2, 200, seed=0))
    with pytest.raises(ValueError, match="too few speakers"):
        metrics.interval(0.5, np.where(replicates > 9, replicates, np.nan))
    some = metrics.interval(0.5, np.append(replicates[np.isfinite(replicates)], np.nan))
    assert np.isfinite(some.low)
