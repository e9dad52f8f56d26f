"""The whole way on a cluster that loses a node in every stage, and MLflow while it trains."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.loop import STEPS_PER_LINE
from jobs.registry import CHAMPION
from jobs.run import Run
from pipeline.build import build
from pipeline.storage import Folder
from tests.clusters import Nodes, nodes_up, plain_curve, submission, wait_for, written
from tests.conftest import make_store, serially, shard_hashes
from tests.test_run_server import Site, stop
from tests.whole_run import SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NODES, STEPS, AWAY_S = 3, 120, 10
MORE = [
    "ingest.source_mb_per_shard=0.25",
    "build.train_episodes=192",
    "build.shard_mb=0.8",
    f"train.steps={STEPS}",
    f"train.validate_every={STEPS_PER_LINE}",
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


@pytest.fixture
def nodes(s3: str) -> Iterator[Nodes]:
    with nodes_up(NODES) as nodes:
        yield nodes


def test_a_node_lost_in_each_stage_changes_no_result(
    nodes: Nodes, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    site, workspace = Site(tmp_path, f"{s3}/artifacts"), Folder(f"{s3}/cluster")
    settings = [*SMALL, *MORE, f"workspace='{workspace.uri}'", f"mlflow.uri='{site.uri}'"]
    command = submission("run", nodes.url, settings)
    said = tmp_path / "said.txt"
    with ExitStack() as servers, said.open("w") as out:
        server = servers.enter_context(site.up())
        job = subprocess.Popen(command, stdout=out, stderr=out)
        for stage, mark in STRUCK:
            wait_for(partial(written, mark, workspace.child(stage)), job, said)
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
