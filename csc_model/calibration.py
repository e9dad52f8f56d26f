"""Scores as log-likelihood ratios, what decisions by them cost, and scores relative to a cohort."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from csc_model.metrics import Floats, check_trials

NEWTON_STEPS, CONVERGED = 50, 1e-10
RIDGE = 1e-6
"""Of the slope: scores that tell all trials apart would ask for an infinite one."""


class Calibration(NamedTuple):
    """A score times `scale` plus `offset` is a log-likelihood ratio, in nats."""

    scale: float
    offset: float

    def llr(self, score: Floats) -> Floats:
        """Return log-likelihood ratios of scores, in nats."""
        return self.scale * score + self.offset

    def probability(self, score: Floats, target_prior: float) -> Floats:
        """Return the probability that each trial is a target trial."""
        return 1 / (1 + np.exp(-(self.llr(score) + log_odds(target_prior))))


def log_odds(probability: float) -> float:
    """Return the natural logarithm of the odds."""
    return float(np.log(probability) - np.log1p(-probability))


def calibrate(score: Floats, target: NDArray[np.bool_], target_prior: float = 0.5) -> Calibration:
    """Fit an affine calibration by logistic regression, target trials weighted to `target_prior`.

    (Brummer & du Preez, "Application-independent evaluation of speaker detection", 2006.) Newton's
    method on standardised scores; the loss is convex, and a few steps suffice.

    Raises:
        ValueError: there is no target or no non-target trial, or a score is not finite.
    """
    check_trials(score, target)
    centre, spread = float(score.mean()), float(score.std()) or 1.0
    x = (score - centre) / spread
    prior = np.where(target, target_prior / target.sum(), (1 - target_prior) / (~target).sum())
    odds, weights = log_odds(target_prior), _of_normal_scores(x, target)
    for _ in range(NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-(weights[0] * x + weights[1] + odds)))
        slope, curve = prior * (probability - target), prior * probability * (1 - probability)
        gradient = np.array([slope @ x + RIDGE * weights[0], slope.sum()])
        mixed = curve @ x
        hessian = np.array([[curve @ (x * x) + RIDGE, mixed], [mixed, curve.sum() + 1e-12]])
        step = np.linalg.solve(hessian, gradient)
        weights -= step * min(1.0, 10 / float(np.abs(step).max() or 1.0))
        if np.abs(gradient).max() < CONVERGED:
            break
    scale = float(weights[0]) / spread
    return Calibration(scale, float(weights[1]) - scale * centre)


def _of_normal_scores(x: Floats, target: NDArray[np.bool_]) -> Floats:
    """Return slope and offset that are right for normal scores of equal variance: a beginning."""
    kinds = x[target], x[~target]
    high, low = (float(kind.mean()) for kind in kinds)
    variance = float(np.mean([kind.var() for kind in kinds]))
    slope = (high - low) / max(variance, 0.01)
    return np.array([slope, -slope * (high + low) / 2])


def cllr(llr: Floats, target: NDArray[np.bool_]) -> float:
    """Return the cost of log-likelihood ratios, in bits: 1 is what knowing nothing costs.

    The mean over target and non-target trials of what surprises (Brummer & du Preez, 2006).

    Raises:
        ValueError: there is no target or no non-target trial, or a ratio is not finite.
    """
    check_trials(llr, target)
    surprise = np.logaddexp(0.0, -llr[target]).mean() + np.logaddexp(0.0, llr[~target]).mean()
    return float(surprise) / (2 * np.log(2))


def act_dcf(llr: Floats, target: NDArray[np.bool_], target_prior: float) -> float:
    """Return the cost of deciding by log-likelihood ratios as Bayes does, at equal costs.

    Normalised as `metrics.min_dcf`, which it is never below: the difference is the calibration's.

    Raises:
        ValueError: there is no target or no non-target trial, or a ratio is not finite.
    """
    check_trials(llr, target)
    accepted = llr >= -log_odds(target_prior)
    miss, false_alarm = (~accepted[target]).mean(), accepted[~target].mean()
    cost = target_prior * miss + (1 - target_prior) * false_alarm
    return float(cost / min(target_prior, 1 - target_prior))


class Cohort(NamedTuple):
    """What the nearest strangers score with each vector, both `(..., vector)`."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, scores: NDArray[np.floating[Any]], nearest: int) -> "Cohort":
        """Describe the `nearest` highest of the scores with strangers, `(..., vector, stranger)`.

        Raises:
            ValueError: there are fewer than two strangers.
        """
        count = min(nearest, scores.shape[-1])
        if count < 2:
            raise ValueError("a cohort needs two strangers at least")
        highest = np.partition(scores, -count, -1)[..., -count:]
        return cls(highest.mean(-1), highest.std(-1).clip(1e-6))

    def normed(self, score: Floats, of: NDArray[np.int64]) -> Floats:
        """Return scores `(..., trial)` in deviations above the cohort's mean of their vectors."""
        return (score - self.mean[..., of]) / self.deviation[..., of]


def as_norm(
    score: Floats,
    enrolment: Cohort,
    test: Cohort,
    enrolment_of: NDArray[np.int64],
    test_of: NDArray[np.int64],
) -> Floats:
    """Return scores `(..., trial)` relative to what strangers score with either side of a trial.

    Adaptive symmetric normalisation, the cohort of each side being the strangers nearest to it
    (Matejka et al., Interspeech 2017, "AS-Norm1").
    """
    return (enrolment.normed(score, enrolment_of) + test.normed(score, test_of)) / 2
