"""How fast batches are read: beside other loaders and what the machine can do; the first batch.

    python -m tests.benchmarks.loader [--only speed stages first] [--hours 1] [--s3]

Peers: pip install mosaicml-streaming webdataset (the former imports torchvision, which must be of
the same build as torch). One that is missing is said to be, and passed over.

The dataset has mixtures of 4 s, two to an episode, each of two voices; batches have 16 episodes. It
lies on local disk and in the page cache. Speeds are mixture-seconds (episodes x conditions x
seconds) by second of a core, which is the longer of time on the clock and CPU time of this process
on all its threads. Ray Data has a worker besides, whose time is only seen on the clock. Medians of
epochs after a first one, which for ours has its own row: it checks all audio.

speed: batches as they go to a device, and float mixtures on the CPU. Each
peer stores the episodes of our shards. limits: the same bytes copied into memory that has
been used before and into fresh memory, hashed, and read as a column of Parquet.

stages: what the CPU time of a batch is made of, with each stage timed in its thread.

first: time to the first batch of a new loader, constructor included; with --s3 also from a server
on loopback (moto, in a process of its own).
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import boto3
import numpy as np
import torch

import pipeline.loader
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.episodes import EpisodeShard
from pipeline.loader import Batch, EpisodeLoader
from pipeline.remix import Remix
from pipeline.render import mix, render
from pipeline.storage import Folder
from tests.benchmarks.loading import BATCH, PEERS, added, limits
from tests.benchmarks.peers import CONDITIONS, SECONDS, built, sample_store, spent, versions

SEED = 3
BATCH_SECONDS = BATCH * CONDITIONS * SECONDS
PARTS = ("speed", "stages", "first")
TARGETS = {"int16": 10, "float": 3}


def make_dataset(root: Path, given: str | None, hours: float) -> Folder:
    """Build mixtures of two voices each."""
    mixing = MixingConfig(
        seconds=SECONDS, conditions=CONDITIONS, interferer_shares=[0.0, 1.0], noise_share=0.0
    )
    episodes = round(hours * 3600 / (CONDITIONS * SECONDS))
    config = BuildConfig(train_episodes=episodes, valid_episodes=BATCH, mixing=mixing)
    return built(sample_store(root / "store", given), root / "dataset", config)


def loader_of(dataset: Folder, *, remix: bool = False) -> EpisodeLoader:
    return EpisodeLoader(dataset, "train", batch_size=BATCH, seed=SEED, remix=remix, pin=False)


# Speed.


def speed(epoch: Callable[[], Iterator[Any]], use: Callable[[Any], Any]) -> float:
    """Return the mixture-seconds by second of a core in one epoch."""
    count = 0

    def read() -> None:
        nonlocal count
        for batch in epoch():
            use(batch)
            count += 1

    took = spent(read).core
    return count * BATCH_SECONDS / took


def nothing(batch: Any) -> None:
    """Use a batch as one does that only hands it on."""


def speeds(
    epoch: Callable[[int], Iterator[Any]], use: Callable[[Any], Any], repeats: int
) -> tuple[float, float]:
    """Return the speed of the first epoch, and the median of those after it."""
    first, *others = (speed(functools.partial(epoch, n), use) for n in range(repeats + 1))
    return first, float(np.median(others))


def ours(dataset: Folder, repeats: int) -> dict[str, float]:
    """Print our speeds; return those that peers are compared with."""
    ways: dict[str, tuple[bool, Callable[[Batch], Any]]] = {
        "int16": (False, nothing),
        "int16, remix": (True, nothing),
        "float": (False, lambda b: mix(b.lines, b.pick, b.gains_db)),
        "with references": (False, lambda b: render(b.sources, b.gains_db)),
    }
    found = {}
    for name, (remix, use) in ways.items():
        first, found[name] = speeds(loader_of(dataset, remix=remix).batches, use, repeats)
        print(f"ours, {name:24} {first:12.0f} {found[name]:12.0f}", flush=True)
    return found


def theirs(dataset: Folder, root: Path, mine: dict[str, float], repeats: int) -> None:
    """Print the speeds of peers, and how many times the best of them ours are."""
    best: dict[str, float] = defaultdict(float)
    for name, peer in PEERS.items():
        try:
            peer.write(dataset, root / peer.package)
            epoch = peer.read(dataset, root / peer.package)
        except (ImportError, RuntimeError) as error:
            print(f"{name}: {error}: passed over")
            continue
        for kind, use in (("int16", nothing), ("float", added)):
            first, now = speeds(epoch, use, repeats)
            best[kind] = max(best[kind], now)
            times = mine[kind] / now
            print(f"{f'{name}, {kind}':30} {first:12.0f} {now:12.0f} {times:10.1f}", flush=True)
    for kind, other in best.items():
        target = TARGETS[kind]
        print(f"{kind}: {mine[kind] / other:.1f} times the best peer (target {target})")


# Stages.


class Stopwatch:
    """Adds up the CPU time that threads spend in functions, whatever these call included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = Lock()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[name] += time.thread_time() - start

        return timed


STAGES = (
    ("whole", EpisodeLoader, "_read"),
    ("read and check", EpisodeShard, "read"),
    ("check", EpisodeShard, "_check"),
    ("copy", EpisodeLoader, "_lines"),
    ("layout", pipeline.loader, "cast"),
    ("remix", Remix, "__call__"),
)


def stages(dataset: Folder) -> None:
    """Print what the time of a batch goes to, in a first epoch and in the next."""
    loader = loader_of(dataset, remix=True)
    print(f"\nCPU time of a batch, ms   {'first epoch':>12} {'next epoch':>12}")
    rows = []
    for epoch in (0, 1):
        watch = Stopwatch()
        patches = [
            patch.object(owner, attribute, watch.around(name, getattr(owner, attribute)))
            for name, owner, attribute in STAGES
            if hasattr(owner, attribute)
        ]
        for each in patches:
            each.start()
        took = spent(lambda epoch=epoch: [nothing(b) for b in loader.batches(epoch)])
        for each in patches:
            each.stop()
        rows.append(_parts(watch.seconds, took.cpu))
    for name in rows[0]:
        both = [1000 * row[name] / loader.steps_per_epoch for row in rows]
        print(f"{name:25} {both[0]:12.3f} {both[1]:12.3f}", flush=True)


def _parts(seconds: dict[str, float], cpu: float) -> dict[str, float]:
    """Turn times that include each other into times that add up."""
    reading = seconds["read and check"] - seconds["check"]
    named = {name: seconds[name] for name in ("check", "copy", "layout", "remix")}
    rest = seconds["whole"] - reading - sum(named.values())
    around = cpu - seconds["whole"]
    return {"read": reading} | named | {"the rest": rest, "threads, waiting": around, "all": cpu}


# The first batch.


def first_batch(dataset: Folder, repeats: int) -> None:
    """Print how long a new loader takes to its first batch, wherever in the epoch."""
    steps = loader_of(dataset).steps_per_epoch
    where = "s3" if dataset.uri.startswith("s3") else "local"
    for name, step in (("at step 0", 0), ("in mid-epoch", steps // 2), ("at its end", steps - 1)):
        took = np.median([_first_batch_s(dataset, step) for _ in range(repeats)])
        print(f"first batch, {where:6} {name:14} {took:8.3f} s  (target 2)", flush=True)


def _first_batch_s(dataset: Folder, step: int) -> float:
    start = time.perf_counter()
    batches = loader_of(dataset).batches(1, step)
    next(batches)
    took = time.perf_counter() - start
    batches.close()
    return took


@contextmanager
def on_s3(dataset: Folder) -> Iterator[Folder]:
    """Have a copy of a dataset on an S3 server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:  # type: ignore[call-overload]
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            boto3.client("s3").create_bucket(Bucket="lake")
            remote = Folder.at("s3://lake/dataset")
            for file in dataset.list():
                remote.put(file.name, Path(dataset.path(file.name)))
            yield remote
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--s3", action="store_true", help="read the first batch from S3 too")
    parser.add_argument("--store", help="a generation of a store; without it, one is made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        dataset = make_dataset(root, options.store, options.hours)
        if "speed" in options.only:
            print(versions("mosaicml-streaming", "webdataset", "ray", "torch", "pyarrow", "numpy"))
            print(f"mixture-s per s and core  {'first epoch':>16} {'then':>12}   ours is (times)")
            mine = ours(dataset, options.repeats)
            limits(dataset, options.repeats)
            theirs(dataset, root, mine, options.repeats)
        if "stages" in options.only:
            stages(dataset)
        if "first" in options.only:
            print()
            first_batch(dataset, options.repeats)
            if options.s3:
                with on_s3(dataset) as remote:
                    first_batch(remote, options.repeats)


if __name__ == "__main__":
    main()
