"""Error rates of verification, tie-safe, with intervals over speakers.

A trial is rejected when its score is below the threshold. Equal scores are one point of the curve,
so that the order of trials never matters.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WEIGHTS_AT_ONCE = 1 << 22  # of replicates times trials: memory stays the same


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class Trials(NamedTuple):
    """Scored trials; all `(trial,)`. Speakers are numbers from 0."""

    score: Floats
    target: NDArray[np.bool_]
    enrolment_speaker: NDArray[np.int64]
    test_speaker: NDArray[np.int64]


def error_rates(score: Floats, target: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return miss and false-alarm rate at every threshold, from accept-all to reject-all.

    Raises:
        ValueError: there is no target or no non-target trial, or a score is not finite.
    """
    check_trials(score, target)
    order, ends = _thresholds(score)
    targets = target[order].astype(np.float64)
    return _curves(targets, 1 - targets, ends)


def check_trials(score: Floats, target: NDArray[np.bool_]) -> None:
    """Assert that error rates of scores `(trial,)` can be told.

    Raises:
        ValueError: there is no target or no non-target trial, or a score is not finite.
    """
    if not np.isfinite(score).all():
        raise ValueError("a score is NaN or infinite")
    if target.all() or not target.any():
        raise ValueError("error rates need target and non-target trials")


def _thresholds(score: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ascending order and the last place of each run of equal scores."""
    order = np.argsort(score)  # ties are one point, in whatever order
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    return order, ends


def _curves(target: Floats, nontarget: Floats, ends: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return miss and false-alarm rates of weights in ascending order of score, `(..., point)`."""
    rejected = [np.cumsum(weight, -1)[..., ends] for weight in (target, nontarget)]
    start = np.zeros((*rejected[0].shape[:-1], 1))
    with np.errstate(invalid="ignore"):  # a replicate without trials of a kind has no rate
        miss, correct = (np.concatenate([start, r / r[..., -1:]], -1) for r in rejected)
    return miss, 1 - correct


def eer(score: Floats, target: NDArray[np.bool_]) -> float:
    """Return the equal error rate, between the points of the ROC by straight lines."""
    return float(_crossing(*error_rates(score, target)))


def _crossing(miss: Floats, false_alarm: Floats) -> Floats:
    gap = miss - false_alarm  # rises from -1 to 1
    after = np.argmax(gap >= 0, -1)[..., None]
    above = np.take_along_axis(gap, after, -1)
    below = np.take_along_axis(gap, after - 1, -1)
    with np.errstate(invalid="ignore"):
        part = -below / (above - below)
    first = np.take_along_axis(miss, after - 1, -1)
    return (first + part * (np.take_along_axis(miss, after, -1) - first))[..., 0]


def min_dcf(score: Floats, target: NDArray[np.bool_], target_prior: float) -> float:
    """Return the least detection cost at equal costs, over that of the better constant answer.

    Normalised as in the NIST evaluations: 1 means no better than always answering the same.
    """
    miss, false_alarm = error_rates(score, target)
    cost = target_prior * miss + (1 - target_prior) * false_alarm
    return float(cost.min() / min(target_prior, 1 - target_prior))


def draw_speakers(num_speakers: int, replicates: int, seed: int) -> NDArray[np.int64]:
    """Draw speakers with replacement: how often each occurs, `(replicate, speaker)`."""
    drawn = np.random.default_rng(seed).integers(num_speakers, size=(replicates, num_speakers))
    return np.stack([np.bincount(row, minlength=num_speakers) for row in drawn])


def eer_replicates(trials: Trials, counts: NDArray[np.int64]) -> Floats:
    """Return the EER of each bootstrap replicate over speakers, `(replicate,)`.

    A target trial counts as often as its speaker was drawn, a non-target trial as often as both of
    its were (the two are drawn independently). The same counts for two systems make a paired test.
    """
    order, ends = _thresholds(trials.score)
    target = trials.target[order]
    enrolment, test = trials.enrolment_speaker[order], trials.test_speaker[order]
    rates, together = [], max(1, WEIGHTS_AT_ONCE // len(order))
    for first in range(0, len(counts), together):
        drawn = counts[first : first + together].astype(np.float64)
        once = drawn[:, enrolment]
        weights = np.where(target, once, 0.0), np.where(target, 0.0, once * drawn[:, test])
        rates.append(_crossing(*_curves(*weights, ends)))
    return np.concatenate(rates)


def interval(value: float, replicates: Floats) -> Interval:
    """Return a value with the central 95 % of its bootstrap replicates.

    Replicates in which no target or no non-target trial was drawn say nothing and are left out.

    Raises:
        ValueError: fewer than half of the replicates are left: there are too few speakers.
    """
    told = replicates[np.isfinite(replicates)]
    if 2 * len(told) < len(replicates):
        raise ValueError("too few speakers for an interval")
    low, high = np.percentile(told, [2.5, 97.5])
    return Interval(value, float(low), float(high))
