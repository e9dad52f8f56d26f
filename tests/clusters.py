"""Clusters of several nodes on this machine that lose some, and the plain loop they agree with."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster

from jobs.config import Config
from jobs.loop import STEPS_PER_LINE
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.train import SNAPSHOT
from pipeline.datasets import read_dataset
from pipeline.loader import EpisodeLoader
from pipeline.storage import Folder
from tests.test_run_server import BIN, free_port
from tests.whole_run import CSC

PATIENCE_S = 300


class Nodes:
    """A head with a job server and no CPUs, and nodes of one CPU, as processes of this machine."""

    def __init__(self, root: Path, **system: Any) -> None:
        self.root, self._port, self._system = root, free_port(), system
        self.url = f"http://127.0.0.1:{self._port}"
        self.cluster = Cluster()

    def begin(self, count: int) -> None:
        """Start a head, always at the same address, and nodes."""
        self.cluster.add_node(
            num_cpus=0,
            include_dashboard=True,
            dashboard_port=self._port,
            _system_config=self._system or None,
        )
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """Add a node with a folder of its own: nodes unpack what is submitted there."""
        self.cluster.add_node(num_cpus=1, temp_dir=tempfile.mkdtemp(dir=self.root))

    def others(self) -> list[Any]:
        """Return the nodes but for the head."""
        return [node for node in self.cluster.list_all_nodes() if not node.head]

    def alive(self) -> int:
        """Return how many nodes the head believes in, itself among them."""
        return len(self.cluster.global_state._live_node_ids())

    def lose_one(self) -> None:
        """Kill a node, and let another come in its place."""
        self.cluster.remove_node(self.others()[0], allow_graceful=False)
        self.add()

    def lose_head(self) -> None:
        """Kill the head and the command that runs on it; other nodes do not learn of it."""
        head = self.cluster.head_node
        running = processes(head)
        self.cluster.remove_node(head, allow_graceful=False)
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def held(node: Any) -> Iterator[None]:
    """Have a node stand still, as one that no packet reaches, and then go on where it was."""
    stopped = processes(node)
    send(signal.SIGSTOP, stopped)
    try:
        yield
    finally:
        send(signal.SIGCONT, stopped)


def processes(node: Any) -> list[psutil.Process]:
    """Return all processes of a node: services of Ray, workers, and what these have started."""
    found = []
    for info in (info for infos in node.all_processes.values() for info in infos):
        with suppress(psutil.NoSuchProcess):
            service = psutil.Process(info.process.pid)
            found += [service, *service.children(recursive=True)]
    return found


def send(number: signal.Signals, to: list[psutil.Process]) -> None:
    for process in to:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextmanager
def nodes_up(count: int, **system: Any) -> Iterator[Nodes]:
    """Have a cluster for a while; `system` is what Ray is to do otherwise than by default."""
    root = Path(tempfile.mkdtemp(prefix="csc-", dir="/tmp"))  # Ray's sockets need a short path
    with pytest.MonkeyPatch.context() as patch:
        # where the head finds the Python of what is submitted
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        nodes = Nodes(root, **system)
        try:
            nodes.begin(count)
            yield nodes
        finally:
            nodes.cluster.shutdown()
            shutil.rmtree(root, ignore_errors=True)


def submission(stage: str, url: str, settings: list[str]) -> list[str]:
    """Return the command that has a stage run on a cluster."""
    words = [word for text in settings for word in ("--set", text)]
    return [CSC, "submit", stage, "--cluster", url, *words]


def wait_for(holds: Callable[[], bool], job: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until something holds, and assert that a command, which says what it does, runs on."""
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.1)


def written(mark: str, folder: Folder) -> bool:
    """Say whether a stage has written a file whose name ends so."""
    return any(file.name.endswith(mark) for file in folder.list())


def checkpointed(models: Folder) -> bool:
    """Say whether a training has a checkpoint that counts."""
    return any(
        b'"checkpoint_dir_name"' in models.read(file.name)
        for file in models.list()
        if file.name.endswith(SNAPSHOT)
    )


def plain_curve(config: Config, dataset: Folder) -> list[float]:
    """Train in this process, without Ray, and return the losses as they are logged."""
    torch.set_num_threads(config.train.threads)
    objective = new_objective(config, len(read_dataset(dataset).about["speakers"]))
    train, stepper, curve = config.train, Stepper(config, objective), []
    loader = EpisodeLoader(
        dataset, "train", batch_size=train.batch_size, seed=config.seed, remix=train.remix
    )
    meter = Meter()
    for step, batch in enumerate(islice(loader.endless(), train.steps)):
        losses, grad_norm = stepper.take(step, batch, meter)
        meter.stepped(losses, grad_norm, stepper.learning_rate, 1.0)
        if (step + 1) % STEPS_PER_LINE == 0:
            curve.append(meter.line()["total"])
            meter = Meter()
    return curve
