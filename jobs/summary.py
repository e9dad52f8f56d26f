"""The figures of an evaluation: error rates with intervals, costs, and paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_model import metrics
from csc_model.calibration import Calibration, act_dcf, cllr
from jobs.config import Config
from jobs.scoring import scored
from pipeline.errors import CscError
from pipeline.trials import Trials

TARGET_PRIORS = (0.01, 0.05)
Floats = NDArray[np.float64]


def summarise(
    scores: Mapping[str, Mapping[str, Floats]],
    calibrations: Mapping[str, Calibration],
    trials: Trials,
    config: Config,
) -> dict[str, Any]:
    """Return a row for each system and condition, and the first system's differences to others."""
    count = len(set(trials.speakers))
    draws = metrics.draw_speakers(count, config.evaluate.bootstrap_replicates, config.seed)
    first, *others = scores
    results, differences = [], []
    for condition in scores[first]:
        rates, replicates = {}, {}
        for system, by_condition in scores.items():
            values = by_condition[condition]
            rates[system] = metrics.eer(values, trials.target)
            replicates[system] = metrics.eer_replicates(scored(trials, values), draws)
            known = _interval(rates[system], replicates[system])
            row = {"system": system, "condition": condition, "eer": known._asdict()}
            results.append(row | dict(_costs(values, calibrations[system], trials)))
        for other in others:
            gap = _interval(rates[first] - rates[other], replicates[first] - replicates[other])
            differences.append({"against": other, "condition": condition, "eer": gap._asdict()})
    return {"results": results, "differences": differences}


def eer_by_condition(
    results: Sequence[Mapping[str, Any]], system: str | None = None
) -> dict[str, float]:
    """Pick a system's equal error rates out of the rows of an evaluation.

    Where none is named, the first one's: those of the model that was evaluated.
    """
    chosen = system or results[0]["system"]
    return {row["condition"]: row["eer"]["value"] for row in results if row["system"] == chosen}


def _interval(value: float, replicates: Floats) -> metrics.Interval:
    try:
        return metrics.interval(value, replicates)
    except ValueError as error:
        raise CscError(
            f"{error}: most draws of speakers have no target or no non-target trial; evaluate on "
            "trials between more speakers"
        ) from error


def _costs(
    score: Floats, calibration: Calibration, trials: Trials
) -> Iterator[tuple[str, float | None]]:
    """Give the figures beside the error rate, None where trials are too few to tell."""
    llr = calibration.llr(score)
    yield "cllr", cllr(llr, trials.target)
    for prior in TARGET_PRIORS:
        yield f"min_dcf_{prior:g}", metrics.min_dcf(score, trials.target, prior)
        yield f"act_dcf_{prior:g}", act_dcf(llr, trials.target, prior)
    pairs = gender_pairs(trials)
    for name in ("same", "cross"):
        kept = trials.target | (pairs == name)
        told = not trials.target[kept].all()
        yield f"eer_{name}_gender", metrics.eer(score[kept], trials.target[kept]) if told else None


def gender_pairs(trials: Trials) -> NDArray[np.str_]:
    """Return of each trial whether both genders are the `same`, `cross`, or `unknown`."""
    gender = np.asarray(trials.utterances["gender"].to_pylist(), dtype=str)
    one, other = gender[trials.enrolled[trials.enrolment, 0]], gender[trials.test]
    known = (one != "") & (other != "")
    return np.where(known, np.where(one == other, "same", "cross"), "unknown")
