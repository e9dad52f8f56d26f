"""A build on a cluster of two nodes: killed workers and a lost node change no byte."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.build import build
from pipeline.schema import Task, Work
from pipeline.storage import Folder
from pipeline.tasks import run_tasks
from tests.conftest import BUILD, serially, shard_hashes

pytestmark = pytest.mark.cluster
LONG = BUILD.model_copy(update={"train_episodes": 480, "shards_per_window": 1})


def committed(folder: Folder) -> int:
    return len(list(Path(folder.uri).glob("*.done.json")))


def busy_workers() -> list[int]:
    """Return the processes that are at work on tasks of Ray Data."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Map"):
                found.append(int(path.parent.name))
    return found


def kill_a_worker() -> None:
    deadline = time.monotonic() + 10
    while not (workers := busy_workers()):
        assert time.monotonic() < deadline, "no worker to kill"
    os.kill(random.choice(workers), signal.SIGKILL)


def on_ray(tasks: Sequence[Task], work: Work) -> None:
    def slowly(task: Task) -> None:
        time.sleep(0.05)
        work(task)

    run_tasks(tasks, slowly, lambda *_: None)


def test_killed_workers_and_a_lost_node_change_no_byte(store: Folder, tmp_path: Path) -> None:
    calm, stormy = Folder.at(tmp_path / "calm"), Folder.at(tmp_path / "stormy")
    build(calm, store, LONG, 3, serially)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    blows: list[Callable[[], None]] = [
        kill_a_worker,
        kill_a_worker,
        lambda: cluster.remove_node(second, allow_graceful=False),
        kill_a_worker,
    ]
    struck = 0

    def storm() -> None:
        nonlocal struck
        for number, blow in enumerate(blows):
            while committed(stormy) < 8 + 14 * number:
                time.sleep(0.01)
            blow()
            struck += 1

    try:
        thread = threading.Thread(target=storm, daemon=True)
        thread.start()
        build(stormy, store, LONG, 3, on_ray)
        thread.join(10)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert struck == len(blows)
    assert shard_hashes(stormy) == shard_hashes(calm)
