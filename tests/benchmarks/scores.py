"""Error rates of many trials: time, memory and answers beside other definitions.

    python -m tests.benchmarks.scores [--trials 580000]

As many trials as VoxCeleb's largest list. Beside scikit-learn's ROC stand two definitions that
toolkits publish: one that compares every threshold with every score (SpeechBrain's, here on fewer
trials, as its memory is quadratic), and one that walks through the sorted scores trial by trial
(WeSpeaker's), whose answer changes with the order of tied scores.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from csc_model import metrics
from csc_model.calibration import act_dcf, calibrate, cllr

FEW, REPLICATES = 6000, 20
PRIOR = 0.05
Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]


def by_sklearn(score: Floats, target: Labels) -> float:
    """Find the crossing on scikit-learn's ROC."""
    false_alarm, hit, _ = roc_curve(target, score, drop_intermediate=False)
    after = int(np.argmax(false_alarm >= 1 - hit))
    gap = (1 - hit) - false_alarm
    part = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(1 - (hit[after - 1] + part * (hit[after] - hit[after - 1])))


def by_all_thresholds(score: Floats, target: Labels) -> float:
    """Compare every threshold with every score: time and memory grow with the square."""
    thresholds = np.unique(score)
    thresholds = np.concatenate([thresholds, (thresholds[1:] + thresholds[:-1]) / 2])
    miss = (score[target][None] <= thresholds[:, None]).mean(1)
    false_alarm = (score[~target][None] > thresholds[:, None]).mean(1)
    best = int(np.abs(miss - false_alarm).argmin())
    return float((miss[best] + false_alarm[best]) / 2)


def by_walking(score: Floats, target: Labels) -> float:
    """Walk through the sorted scores trial by trial, ties included."""
    order = np.argsort(score, kind="stable")
    miss = np.cumsum(target[order]) / target.sum()
    false_alarm = 1 - np.cumsum(~target[order]) / (~target).sum()
    after = int(np.argmax(miss >= false_alarm))
    return float((miss[after] + false_alarm[after]) / 2)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return an answer, the least seconds of three calls, and the peak of memory in MB."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return answer, min(seconds), peak / 1e6


def show(name: str, call: Callable[[], Any]) -> float:
    """Print a line of the table, and return the seconds."""
    answer, seconds, megabytes = timed(call)
    print(f"{name:42} {answer:9.5f} {1000 * seconds:9.1f} ms {megabytes:9.1f} MB")
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=580_000)
    told = parser.parse_args()
    rng = np.random.default_rng(0)
    target = rng.random(told.trials) < 0.5
    score = rng.normal(size=told.trials) + 2.5 * target
    ours = show("EER", lambda: metrics.eer(score, target))
    theirs = show("EER, scikit-learn's ROC", lambda: by_sklearn(score, target))
    show("EER, walking", lambda: by_walking(score, target))
    show("minDCF", lambda: metrics.min_dcf(score, target, PRIOR))
    calibration = calibrate(score, target)
    llr = calibration.llr(score)
    show("calibration (its slope)", lambda: calibrate(score, target).scale)
    show("actDCF", lambda: act_dcf(llr, target, PRIOR))
    show("Cllr", lambda: cllr(llr, target))
    print(f"scikit-learn's ROC takes {theirs / ours:.2f} of our time")
    speakers = rng.integers(40, size=(2, told.trials))
    draws = metrics.draw_speakers(40, REPLICATES, seed=0)
    trials = metrics.Trials(score, target, *speakers)
    show(f"{REPLICATES} bootstrap replicates", lambda: metrics.eer_replicates(trials, draws).std())
    few, labels = score[:FEW], target[:FEW]
    fast = show(f"EER of {FEW} trials", lambda: metrics.eer(few, labels))
    slow = show("EER, all thresholds", lambda: by_all_thresholds(few, labels))
    print(f"all thresholds take {slow / fast:.0f} of our time")
    tied = np.round(score, 1)
    orders = [rng.permutation(len(score)) for _ in range(3)]
    for name, rate in (("ours", metrics.eer), ("walking", by_walking)):
        found = [rate(tied[order], target[order]) for order in orders]
        worst = [rate(tied[np.argsort(sign * target)], np.sort(target)[::sign]) for sign in (1, -1)]
        print(f"tied scores, {name}: {min(found + worst):.5f} to {max(found + worst):.5f}")


if __name__ == "__main__":
    main()
