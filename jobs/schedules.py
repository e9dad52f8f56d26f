"""Learning rates over a run, as factors of the base rate: pure functions of the step."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SMOOTHED_SHARE = 0.1  # of a run: how long the median over gradient norms is
SHAPES = ("linear", "rex", "cosine", "constant", "refined")


def factor(
    step: int, *, steps: int, warmup_steps: int, shape: str, refined: Sequence[float] = ()
) -> float:
    """Return the rate of a step over the base rate, in [0, 1].

    A linear warm-up times what is left of the run: `linear` 1 - z (Defazio et al., arXiv
    2310.07831, the default), `rex` (1 - z) / (1 - z / 2) (Chen et al., arXiv 2107.04197), `cosine`,
    `constant`, or `refined`, a curve over the whole run that brings a warm-up of its own.
    """
    z = step / steps
    if shape == "refined":
        return float(np.interp(z, np.linspace(0, 1, len(refined)), refined))
    left = {
        "linear": 1 - z,
        "rex": (1 - z) / (1 - z / 2),
        "cosine": (1 + math.cos(math.pi * z)) / 2,
        "constant": 1.0,
    }[shape]
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * left


def refine(grad_norms: Sequence[float], steps: Sequence[int] | None = None) -> NDArray[np.float64]:
    """Return the schedule, with a peak of 1, that gradient norms of an earlier run speak for.

    `steps` are those of the norms, rising: between them it is interpolated, as norms are logged at
    validations as well. None is as many from each to the next.

    The refined linear decay of Defazio et al. (arXiv 2310.07831, algorithm for Adam): weights are
    inverse smoothed norms, and the rate is the weight times the sum of all that follow. Norms here
    are l2 norms before clipping; theirs for Adam are l1 norms.

    Smoothing is theirs: a median over a tenth of the run, that repeats the first norm and reflects
    the last ones, so that the large norms of a beginning count and become a warm-up.

    Raises:
        ValueError: there are fewer than ten norms, or one that is not a positive number.
    """
    norms = np.asarray(grad_norms, np.float64)
    if len(norms) < 10 or not np.isfinite(norms).all() or norms.min() <= 0:
        raise ValueError("a schedule is refined from at least ten positive gradient norms")
    if steps is not None:
        norms = np.interp(np.linspace(steps[0], steps[-1], len(steps)), steps, norms)
    weights = 1 / _median(norms, max(1, round(SMOOTHED_SHARE * len(norms) / 2)))
    later = np.cumsum(weights[::-1])[::-1] - weights
    rates = weights * later
    return rates / rates.max()


def resampled(rates: NDArray[np.float64], points: int) -> list[float]:
    """Return a schedule by fewer points, as a configuration can hold it."""
    places = np.linspace(0, 1, min(points, len(rates)))
    found = np.interp(places, np.linspace(0, 1, len(rates)), rates)
    return [round(float(rate), 4) for rate in found]


def _median(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Smooth by the median of `reach` neighbours on either side."""
    padded = np.pad(np.pad(values, (0, reach), mode="reflect"), (reach, 0), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=-1)
