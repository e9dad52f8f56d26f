"""The figures of target-speaker extraction, by condition and output, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_model import metrics
from jobs.config import Config
from jobs.extraction import Measured, Pairs
from jobs.scoring import scored
from pipeline.trials import Condition, Trials

NEAREST, EXTRACTED = OUTPUTS = ("nearest slot", "extracted")
NOTHING_DB = 0.1  # a mask that lets all through gains less, and by rounding not always nothing
Floats = NDArray[np.float64]


def summarise_extraction(
    measured: Mapping[str, Measured],
    scores: Mapping[str, Floats],
    pairs: Pairs,
    trials: Trials,
    config: Config,
) -> dict[str, Any]:
    """Return a row for each condition and output; what cannot be told has no key in it.

    `scores` of all trials by condition are those of the mixtures, by the rule of all trials.
    """
    _, speaker = np.unique(trials.speakers, return_inverse=True)
    draws = metrics.draw_speakers(
        int(speaker.max()) + 1, config.evaluate.bootstrap_replicates, config.seed
    )
    tested, asked = speaker[trials.test[pairs.target]], np.concatenate(pairs)
    compared = trials._replace(
        enrolment=trials.enrolment[asked], test=trials.test[asked], target=trials.target[asked]
    )
    results: list[dict[str, Any]] = []
    for condition, found in measured.items():
        for number, output in enumerate(OUTPUTS):
            of_sides = outcomes(found, number, trials.conditions[condition])
            means = {
                name: mean_over_speakers(values.astype(np.float64), tested, draws)._asdict()
                for name, values in of_sides.items()
            }
            means |= dict(_word_error_rates(found, number, tested, draws))
            median = {"left_median_db": float(np.median(of_sides["left_db"]))}
            results.append({"condition": condition, "output": output} | means | median)
        both = scores[condition][asked], found.cosine.T.ravel().astype(np.float64)
        results[-1] |= dict(_error_rates(compared, both, draws))
    return {"sides": len(tested), "speakers": len(np.unique(tested)), "results": results}


def outcomes(found: Measured, output: int, condition: Condition) -> dict[str, NDArray[Any]]:
    """Return what came of each side by one of OUTPUTS, `(side,)`, as far as it can be told.

    What is gained over the mixture, where the target is not alone in it; and whether the output is
    nearer to a rival than to the target, where there are rivals.
    """
    before, after = (found.si_snr_db[:, signal] for signal in (0, 1 + output))
    told: dict[str, NDArray[Any]] = {
        "si_snr_db": after[:, 0],
        "kept_db": found.kept_db[:, output],
        "left_db": found.left_db[:, output],
    }
    if condition.interferers or condition.snr_db is not None:
        gain_db = after[:, 0] - before[:, 0]
        told |= {"improvement_db": gain_db, "no_gain": gain_db < NOTHING_DB}
    if condition.interferers:
        told["wrong_speaker"] = after[:, 1:].max(-1) > after[:, 0]
    return told


def mean_over_speakers(
    values: Floats,
    speaker: NDArray[np.int64],
    draws: NDArray[np.int64],
    among: Floats | None = None,
) -> metrics.Interval:
    """Return the mean of values `(side,)`, with an interval by how often speakers were drawn.

    `draws` are `(replicate, speaker)`; a value counts as often as its speaker was drawn. With
    `among`, `(side,)`, it is the sum of the values over the sum of those.
    """
    weights = draws[:, speaker].astype(np.float64)
    among = np.ones_like(values) if among is None else among
    with np.errstate(divide="ignore", invalid="ignore"):  # where nobody of them was drawn
        replicates = weights @ values / (weights @ among)
    return metrics.interval(float(values.sum() / among.sum()), replicates)


def _word_error_rates(
    found: Measured, output: int, speaker: NDArray[np.int64], draws: NDArray[np.int64]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Give the word error rates of mixtures and of an output, if a recogniser heard any words."""
    words = found.words.astype(np.float64)
    if np.isnan(words).any() or not words[:, 0].any():
        return
    for name, signal in (("wer_of_mixture", 1), ("wer", 2 + output)):
        rate = mean_over_speakers(words[:, signal], speaker, draws, words[:, 0])
        yield name, rate._asdict()


def _error_rates(
    trials: Trials, both: Sequence[Floats], draws: NDArray[np.int64]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Give the error rates by mixtures and by what was extracted, and by how much they differ."""
    before, after = (metrics.eer(values, trials.target) for values in both)
    first, second = (metrics.eer_replicates(scored(trials, values), draws) for values in both)
    for name, value, replicates in (
        ("eer_of_mixture", before, first),
        ("eer", after, second),
        ("eer_difference", after - before, second - first),
    ):
        try:
            yield name, metrics.interval(value, replicates)._asdict()
        except ValueError:  # most draws of so few speakers have no non-target trial
            return


def extraction_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures, without their intervals, by `condition.output.figure`."""
    flat: dict[str, float] = {}
    for row in found["results"]:
        name = f"{row['condition']}.{row['output'].replace(' ', '_')}"
        for key, figure in row.items():
            if isinstance(figure, Mapping):
                flat[f"{name}.{key}"] = figure["value"]
            elif isinstance(figure, float):
                flat[f"{name}.{key}"] = figure
    return flat
