"""What ingest and build cost through Ray: a fixed part and one by the hour, on one core and on two.

    python -m tests.benchmarks.scaling [--rounds 3] [--set KEY=VALUE]

Each stage is run on a third of the shipped speech and on all of it, in a workspace of its own, with
a Ray of one CPU and one of two. A straight line through the two sizes splits what a run takes to
begin from what an hour of audio takes. From these come days and dollars for 1,000 to 100,000 hours
of speech, whose assumptions are printed with them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ray

from jobs.config import load_config
from jobs.run import Run
from tests.whole_run import CORPORA, toml

EPISODES = {"third": 1200, "whole": 4800}
HOURS = (1_000, 10_000, 100_000)
CORES_PER_NODE, NODES, DOLLARS_PER_NODE_HOUR = 8, 16, 0.21  # m7i.2xlarge, spot, with Auto Mode
MIXED_HOURS_PER_HOUR = 4.0  # of mixtures built, for each hour of speech
VCPUS_PER_CORE = 2  # of a vCPU that shares a core with another, half counts


class Measured(NamedTuple):
    """A run of a stage."""

    hours: float  # of audio: read by ingest, made by build
    took_s: float


class Line(NamedTuple):
    """What a stage takes on so many CPUs."""

    begin_s: float
    core_hours_per_hour: float  # of audio

    @classmethod
    def through(cls, small: Measured, large: Measured, cpus: int) -> "Line":
        """Draw it through two runs."""
        by_hour_s = (large.took_s - small.took_s) / (large.hours - small.hours)
        return cls(small.took_s - by_hour_s * small.hours, by_hour_s * cpus / 3600)


def measure(size: str, given: Sequence[str]) -> dict[str, Measured]:
    """Ingest and build in a new workspace on the Ray that is up."""
    with tempfile.TemporaryDirectory(prefix="csc-scaling-") as workspace:
        changes = [f"workspace='{workspace}'", f"build.train_episodes={EPISODES[size]}"]
        speech, noise = CORPORA
        every = {**speech, "ignore": ["manifest.csv"]}
        corpora = [speech if size == "third" else every, noise]
        changes.append(f"ingest.corpora={toml(corpora)}")
        changes.append("ingest.splits={valid_share=0.25,test_share=0.25}")
        config = load_config("demo", [*given, *changes])
        with Run(config) as run:
            taken_s = timed(lambda: run.ingest)
            read_h = run.ingest[1]["seconds_in"] / 3600
            built_s = timed(lambda: run.build)
        mixing = config.build.mixing
        episodes = config.build.train_episodes + config.build.valid_episodes
        made_h = episodes * mixing.conditions * mixing.seconds / 3600
    return {"ingest": Measured(read_h, taken_s), "build": Measured(made_h, built_s)}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def lines(cpus: int, rounds: int, given: Sequence[str]) -> dict[str, Line]:
    """Measure both sizes several times on so many CPUs; the first round warms up."""
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    found = [{size: measure(size, given) for size in EPISODES} for _ in range(rounds + 1)][1:]
    ray.shutdown()

    def middle(size: str, stage: str) -> Measured:
        several = [one[size][stage] for one in found]
        return Measured(several[0].hours, statistics.median(one.took_s for one in several))

    return {
        stage: Line.through(middle("third", stage), middle("whole", stage), cpus)
        for stage in ("ingest", "build")
    }


def cost_table(ingest: Line, build: Line) -> str:
    """Return days and dollars of ingest and build by hours of speech."""
    by_hour = ingest.core_hours_per_hour + MIXED_HOURS_PER_HOUR * build.core_hours_per_hour
    rows = ["| hours of speech | core hours | wall time | cost |", "|---|---|---|---|"]
    for hours in HOURS:
        cores_h = hours * by_hour
        nodes_h = cores_h * VCPUS_PER_CORE / CORES_PER_NODE
        wall_h = nodes_h / NODES + (ingest.begin_s + build.begin_s) / 3600
        dollars = nodes_h * DOLLARS_PER_NODE_HOUR
        rows.append(f"| {hours:,} | {cores_h:.1f} | {wall_h:.2f} h | ${dollars:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, and print the lines and what follows from them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="given")
    told = parser.parse_args()
    found = {cpus: lines(cpus, told.rounds, told.given) for cpus in (1, 2)}
    for stage in ("ingest", "build"):
        for cpus, line in ((cpus, found[cpus][stage]) for cpus in found):
            speed = 1 / line.core_hours_per_hour
            print(f"{stage}, {cpus} CPU: begins in {line.begin_s:.1f} s, {speed:.0f} h per core-h")
        ratio = found[2][stage].core_hours_per_hour / found[1][stage].core_hours_per_hour
        print(f"{stage}: two CPUs take {ratio:.2f} of the core hours of one")
    print(
        f"\n{NODES} nodes of {CORES_PER_NODE} vCPUs at ${DOLLARS_PER_NODE_HOUR} an hour, two vCPUs "
        f"as one core, {MIXED_HOURS_PER_HOUR:g} h of mixtures for an hour of speech:\n"
    )
    print(cost_table(found[2]["ingest"], found[2]["build"]))


if __name__ == "__main__":
    main()
