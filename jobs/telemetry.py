"""Metrics that Ray exports for Prometheus while a command has Ray: names are a contract.

Ray puts `ray_` before each name and `_total` after that of a counter: `ray_csc_shards_total`. A
node's endpoint shows a value within ten seconds, and at the end of the command. From then on,
counters stay for as long as the node is up; gauges go after about twenty seconds.
"""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from jobs.summary import eer_by_condition


class Metric(NamedTuple):
    """What a metric is, and what tells its series apart."""

    kind: Literal["counter", "gauge"]
    description: str
    tags: tuple[str, ...] = ("run",)  # run: the id of what is made, as `csc status` shows it


METRICS: Mapping[str, Metric] = {
    "csc_shards": Metric("counter", "Tasks of shards done.", ("run", "stage")),
    "csc_ingested_hours": Metric("counter", "Hours of audio that a finished generation was cut of"),
    "csc_kept_utterances": Metric("counter", "Utterances that a finished generation holds."),
    "csc_rejected_sources": Metric(
        "counter", "Recordings or parts that it does not hold.", ("run", "reason")
    ),
    "csc_train_loss": Metric("gauge", "Loss of training, mean since the line before."),
    "csc_train_step_seconds": Metric("gauge", "Seconds that a training step takes."),
    "csc_train_data_wait_share": Metric("gauge", "Share of the time spent on waiting for data."),
    "csc_train_audio_seconds_per_second": Metric("gauge", "Audio trained on, by all workers."),
    "csc_valid_eer": Metric("gauge", "Equal error rate on validation trials, a share of 1."),
    "csc_test_eer": Metric("gauge", "Equal error rate on test trials.", ("run", "condition")),
}
LINES = {  # what a line of training calls them
    "total": "csc_train_loss",
    "step_s": "csc_train_step_seconds",
    "data_wait_share": "csc_train_data_wait_share",
    "audio_seconds_per_s": "csc_train_audio_seconds_per_second",
    "valid_eer": "csc_valid_eer",
}


def emit(name: str, value: float, **tags: str) -> None:
    """Add to a counter, or set a gauge, where Ray is up; elsewhere nobody could read it."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    if METRICS[name].kind == "gauge":
        _made(name).set(value, tags)
    elif value > 0:  # nothing is what a counter begins with, and Ray refuses to add
        _made(name).inc(value, tags)


@cache
def _made(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    kinds = {"counter": Counter, "gauge": Gauge}
    about = METRICS[name]
    return kinds[about.kind](name, description=about.description, tag_keys=about.tags)


def shard_done(stage: str, run: str) -> None:
    emit("csc_shards", 1, stage=stage, run=run)


def ingested(run: str, index: Mapping[str, Any]) -> None:
    """Tell what a generation came to, given its index."""
    emit("csc_ingested_hours", index["seconds_in"] / 3600, run=run)
    emit("csc_kept_utterances", index["kept"], run=run)
    for reason, count in index["rejected"].items():
        emit("csc_rejected_sources", count, run=run, reason=reason)


def trained(run: str, line: Mapping[str, float]) -> None:
    """Tell what training, or validation, reports."""
    for key, name in LINES.items():
        if key in line:
            emit(name, line[key], run=run)


def evaluated(run: str, index: Mapping[str, Any]) -> None:
    """Tell a model's error rates on the test trials, given the index of its evaluation."""
    for condition, rate in eer_by_condition(index["results"]).items():
        emit("csc_test_eer", rate, run=run, condition=condition)
