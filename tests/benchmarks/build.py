"""How fast mixtures are built: beside a plain loop and other tools, by corpus size; its memory.

    python -m tests.benchmarks.build [--only plain peers cost memory] [--hours 10] [--repeats 5]

Peers: pip install lhotse pyloudnorm. One that is missing is said to be, and passed over.

plain: `build` through Ray Data on one worker, from the call to the index, beside a loop in this
process that draws the same recipes and writes shards of the same bytes, which is asserted. Both
force each shard to disk before it counts. Ray is started, and has built a little, before.

peers: lhotse mixes two cuts at an SNR and loads the audio, in memory only or written with Shar;
dynamic mixing as in SpeechBrain's LibriMix recipe, with the loudness it measures and with plain
power instead; both decode FLAC files of the same utterances. Each of their mixtures counts as 4 s,
also where what they mix is shorter. Ours are the build, and a loader with float mixtures.

cost: what an hour of mixtures takes, in tasks and around them, from stores of 1, 4 and 16 times the
sample, each copy with speakers of its own. Without Ray.

memory: the largest task at the default sizes, in a process of its own. Parts of the store that are
mapped count as resident; `anonymous` is what the task itself has asked for.

All in mixture-seconds (episodes x conditions x seconds) on one thread; medians. Results are written
below TMPDIR, up to 6 GB.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.build import build
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.loader import EpisodeLoader
from pipeline.render import mix
from pipeline.schema import Task, Work
from pipeline.storage import Folder
from tests.benchmarks.peers import (
    CONDITIONS,
    SECONDS,
    built,
    dynamic_mixtures,
    flac_files,
    grown,
    lhotse_in_memory,
    lhotse_written,
    sample_store,
    spent,
    store_hours,
    versions,
)
from tests.benchmarks.plain import plain_build

SEED = 1
VALID = 16
BATCH = 16
SIZES = (1, 4, 16)
PARTS = ("plain", "peers", "cost", "memory")


def config_of(hours: float) -> BuildConfig:
    """Return the defaults, for as many hours of mixtures."""
    episodes = round(hours * 3600 / (CONDITIONS * SECONDS))
    mixing = MixingConfig(seconds=SECONDS, conditions=CONDITIONS)
    return BuildConfig(train_episodes=episodes - VALID, valid_episodes=VALID, mixing=mixing)


def seconds_of(config: BuildConfig) -> float:
    return (config.train_episodes + config.valid_episodes) * CONDITIONS * SECONDS


def on_ray(tasks: Sequence[Task], work: Work) -> None:
    from pipeline.tasks import run_tasks

    run_tasks(tasks, work, lambda *_: None)


def beside_plain(store: Folder, root: Path, hours: float, repeats: int) -> float:
    """Compare `build` on one worker with the plain loop; return its mixture-seconds per second."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config, found = config_of(hours), []
    build(Folder.at(root / "warm"), store, config_of(0.1), SEED, on_ray)
    for _ in range(repeats):
        start = time.perf_counter()
        index = build(Folder.at(root / "ours"), store, config, SEED, on_ray)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        written = plain_build(root / "plain", store, config, SEED)
        found.append((ours, time.perf_counter() - start))
        assert {shard["name"]: shard["sha256"] for shard in index["shards"]} == written
        for name in ("ours", "plain"):
            shutil.rmtree(root / name)
    ray.shutdown()
    ours, plain = (
        seconds_of(config) / float(np.median(times)) for times in zip(*found, strict=True)
    )
    print(f"\nbuild of {hours:g} h            mixture-s per s")
    print(f"ours, one Ray worker  {ours:14.0f}\nplain loop            {plain:14.0f}")
    print(f"ratio                 {ours / plain:14.2f}  (same bytes; target 0.8)", flush=True)
    return ours


def loaded(dataset: Folder, epoch: int) -> None:
    """Read an epoch as training on a CPU does."""
    loader = EpisodeLoader(dataset, "train", batch_size=BATCH, seed=SEED, pin=False)
    for batch in loader.batches(epoch):
        mix(batch.lines, batch.pick, batch.gains_db)


def beside_peers(store: Folder, root: Path, ours: float, hours: float, repeats: int) -> None:
    """Compare with what others mix from files."""
    config = config_of(hours)
    count = round(hours * 3600 / SECONDS)
    dataset = built(store, root / "hour", config, SEED)
    files = flac_files(store, root / "flac")
    ways: dict[str, Callable[[], Any]] = {
        "ours, loader + float mix": lambda: loaded(dataset, 1),
        "lhotse, in memory": lambda: lhotse_in_memory(files, count),
        "lhotse, Shar": lambda: lhotse_written(files, count, root / "shar"),
        "dynamic mixing, BS.1770": lambda: dynamic_mixtures(files, count, "bs1770"),
        "dynamic mixing, power": lambda: dynamic_mixtures(files, count, "power"),
    }
    print(f"\n{versions('lhotse', 'pyloudnorm', 'soundfile', 'torch')}")
    print("                           mixture-s per s and core   build is   loader + mix is")
    print(f"{'ours, build':26} {ours:24.0f}")
    reading = 0.0
    for name, way in ways.items():
        try:
            times = [spent(way).core for _ in range(repeats)]
        except ImportError as error:
            print(f"{name:26} {error}: passed over")
            continue
        speed = count * SECONDS / float(np.median(times))
        reading = reading or speed
        row = f"{name:26} {speed:24.0f}"
        print(row if speed == reading else f"{row} {ours / speed:9.1f} x {reading / speed:15.1f} x")
        sys.stdout.flush()


class Cost(NamedTuple):
    """Seconds that an hour of mixtures takes."""

    tasks: float  # on the clock
    tasks_cpu: float
    around: float  # what is planned and listed before and after tasks


def cost(store: Folder, root: Path, config: BuildConfig) -> Cost:
    """Measure a build in this process, without Ray."""
    inside = spent(lambda: None)

    def run(tasks: Sequence[Task], work: Work) -> None:
        nonlocal inside
        inside = spent(lambda: [work(task) for task in tasks])

    whole = spent(lambda: build(Folder.at(root), store, config, SEED, run))
    shutil.rmtree(root)
    hours = seconds_of(config) / 3600
    return Cost(inside.wall / hours, inside.cpu / hours, (whole.wall - inside.wall) / hours)


def by_size(store: Folder, root: Path, hours: float, repeats: int) -> None:
    """Print what an hour of mixtures costs from stores of several sizes."""
    config = config_of(hours)
    stores = {size: grown(store, root / f"grown-{size}", size) for size in SIZES}
    found = [
        {size: cost(stores[size], root / "cost", config) for size in SIZES} for _ in range(repeats)
    ]
    print(
        f"\nseconds by hour of {hours:g} h of mixtures, and times those of 1x (target 0.9 to 1.1)"
    )
    print("store   hours      tasks, clock        tasks, CPU            around")
    medians = {size: np.median([run[size] for run in found], axis=0) for size in SIZES}
    for size, row in medians.items():
        pairs = zip(row, row / medians[SIZES[0]], strict=True)
        cells = "".join(f"{value:12.3f}{ratio:6.2f}" for value, ratio in pairs)
        print(f"{size:4}x {store_hours(stores[size]):8.1f}{cells}", flush=True)


class _Measured(Exception):  # noqa: N818
    """The one task is done."""


def largest_task(store: Folder, root: Path) -> None:
    """Do the largest task of a build at its defaults, and print what memory it took, as JSON."""
    peak = {"VmRSS": 0, "RssAnon": 0}

    def watch() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name = line.partition(":")[0]
                if name in peak:
                    peak[name] = max(peak[name], int(line.split()[1]))
            time.sleep(0.005)

    def one(tasks: Sequence[Task], work: Work) -> None:
        work(max(tasks, key=lambda task: sum(s["stop"] - s["first"] for s in task["shards"])))
        raise _Measured

    threading.Thread(target=watch, daemon=True).start()
    try:
        build(Folder.at(root), store, BuildConfig(), SEED, one)
    except _Measured:
        peak["max"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(peak))


def memory(store: Folder, root: Path) -> None:
    """Print the memory of one task."""
    larger = root / f"grown-{SIZES[-1]}" / "generation-00001"
    if not larger.exists():
        grown(store, larger.parent, SIZES[-1])
    command = [sys.executable, "-m", "tests.benchmarks.build", "--task", str(larger)]
    answer = subprocess.run([*command, str(root / "task")], capture_output=True, check=True)
    peak = json.loads(answer.stdout.splitlines()[-1])
    print(
        f"\npeak memory of one task: {peak['max'] / 1024:.0f} MB resident (target 1000), ", end=""
    )
    print(f"of which anonymous at most {peak['RssAnon'] / 1024:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--hours", type=float, default=10.0, help="that are built for `plain`")
    parser.add_argument("--peer-hours", type=float, default=1.0)
    parser.add_argument("--cost-hours", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", help="a generation of a store; without it, one is made")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.task:
        largest_task(Folder.at(options.task[0]), Path(options.task[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        store = sample_store(root / "store", options.store)
        ours = 0.0
        if "plain" in options.only:
            ours = beside_plain(store, root, options.hours, options.repeats)
        if "peers" in options.only:
            if not ours:
                took = cost(store, root / "serial", config_of(options.hours))
                ours = 3600 / (took.tasks + took.around)
            beside_peers(store, root, ours, options.peer_hours, options.repeats)
        if "cost" in options.only:
            by_size(store, root, options.cost_hours, options.repeats)
        if "memory" in options.only:
            memory(store, root)


if __name__ == "__main__":
    main()
