"""The whole way on a cluster that loses a node in every stage, and MLflow while it trains."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ray.cluster_utils import Cluster

from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.registry import CHAMPION
from jobs.run import Run
from jobs.stepper import Stepper, new_objective
from pipeline.build import build
from pipeline.datasets import read_dataset
from pipeline.loader import EpisodeLoader
from pipeline.storage import Folder
from tests.conftest import make_store, serially, shard_hashes
from tests.test_run_server import BIN, Site, free_port, stop
from tests.whole_run import CSC, SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NODES, LINE_STEPS, STEPS, AWAY_S = 3, 20, 120, 10
MORE = [
    "ingest.source_mb_per_shard=0.25",
    "build.train_episodes=192",
    "build.shard_mb=0.8",
    f"train.steps={STEPS}",
    f"train.validate_every={LINE_STEPS}",
    "train.validate_on=['clean']",
    "train.workers=3",  # as many as nodes: whichever is lost, training loses a worker
    "train.min_workers=1",
    "train.batch_size=12",
]
STRUCK = [
    ("utterances", ".done.json"),
    ("mixtures", ".done.json"),
    ("models", "checkpoint_manager_snapshot.json"),
]


class Nodes(NamedTuple):
    """A cluster of a head and three nodes, as processes of this machine."""

    cluster: Cluster
    url: str  # of its job server
    root: Path

    def add(self) -> None:
        """Add a node with a folder of its own: nodes unpack what is submitted there."""
        self.cluster.add_node(num_cpus=1, temp_dir=tempfile.mkdtemp(dir=self.root))

    def lose_one(self) -> None:
        """Kill a node, and let another come in its place."""
        victim = next(node for node in self.cluster.list_all_nodes() if not node.head)
        self.cluster.remove_node(victim, allow_graceful=False)
        self.add()


@pytest.fixture
def nodes(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    port = free_port()
    root = Path(tempfile.mkdtemp(prefix="csc-", dir="/tmp"))  # Ray's sockets need a short path
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = Nodes(cluster, f"http://127.0.0.1:{port}", root)
    for _ in range(NODES):
        nodes.add()
    yield nodes
    cluster.shutdown()
    shutil.rmtree(root, ignore_errors=True)


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
        if (step + 1) % LINE_STEPS == 0:
            curve.append(meter.line()["total"])
            meter = Meter()
    return curve


def wait_for(mark: str, folder: Folder, job: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until a stage has written a file whose name ends so, and is not yet through."""
    until = time.monotonic() + 300
    while not any(file.name.endswith(mark) for file in folder.list()):
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.1)


def test_a_node_lost_in_each_stage_changes_no_result(
    nodes: Nodes, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    site, workspace = Site(tmp_path, f"{s3}/artifacts"), Folder(f"{s3}/cluster")
    settings = [*SMALL, *MORE, f"workspace='{workspace.uri}'", f"mlflow.uri='{site.uri}'"]
    command = [CSC, "submit", "run", "--cluster", nodes.url]
    command += [word for text in settings for word in ("--set", text)]
    said = tmp_path / "said.txt"
    with ExitStack() as servers, said.open("w") as out:
        server = servers.enter_context(site.up())
        job = subprocess.Popen(command, stdout=out, stderr=out)
        for stage, mark in STRUCK:
            wait_for(mark, workspace.child(stage), job, said)
            nodes.lose_one()
        stop(server)  # while losses are logged, which have to wait
        time.sleep(AWAY_S)
        servers.enter_context(site.up())
        code = job.wait(600)
        assert code == 0, said.read_text()
        config = load_config("demo", settings)
        with Run(config) as run:
            assert run.registry.by_alias(CHAMPION) is not None
            store, dataset, trained = run.ingest[0], run.build[0], run.train
            curve = run.registry.history(trained.about["run"], "total")
    calm = make_store(tmp_path / "store", config.ingest)
    assert shard_hashes(calm) == shard_hashes(store)
    plain = Folder.at(tmp_path / "mixtures").child(Path(dataset.uri).name)
    build(plain, calm, config.build, config.seed, serially)
    assert shard_hashes(plain) == shard_hashes(dataset)
    assert curve == pytest.approx(plain_curve(config, plain), rel=1e-3)
