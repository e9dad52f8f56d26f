"""Training on a cluster that loses a node and gets another: the same curve with fewer workers."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.config import load_config
from jobs.run import Run
from pipeline.storage import Folder
from tests.clusters import checkpointed, plain_curve, wait_for
from tests.whole_run import CSC, SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
ELASTIC = [
    "train.workers=3",
    "train.min_workers=1",
    "train.batch_size=12",  # three blocks: of two workers, one has two
    "train.steps=600",
    "train.validate_every=600",
    "train.validate_on=['clean']",
    "train.checkpoint_minutes=0.05",  # a group that could grow does so after twice as long
]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_workers_come_and_go_and_the_loss_curve_stays(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    settings = [*SMALL, *ELASTIC, f"workspace='{root}'", f"ray.address='{cluster.address}'"]
    words = [word for text in settings for word in ("--set", text)]
    config = load_config("demo", settings)

    def history(name: str) -> list[float]:
        (made,) = (root / "models").glob("*/run.json")
        return run.registry.history(made.read_text().strip().strip('"'), name)

    said = tmp_path / "said.txt"
    with said.open("w") as out:
        job = subprocess.Popen([CSC, "train", *words], stdout=out, stderr=out)
    run = Run(config)  # beside it, to look at what it logs
    wait_for(lambda: checkpointed(Folder.at(root / "models")), job, said)
    victim = next(node for node in cluster.list_all_nodes() if not node.head)
    cluster.remove_node(victim, allow_graceful=False)
    wait_for(lambda: 2.0 in history("workers"), job, said)
    cluster.add_node(num_cpus=1)
    assert job.wait(400) == 0, said.read_text()
    workers = history("workers")
    assert workers[0] == workers[-1] == 3.0
    assert set(workers) == {2.0, 3.0}
    with run:
        found, expected = history("total"), plain_curve(config, run.build[0])
    assert found[:5] == pytest.approx(expected[:5], rel=1e-3)  # from then on, rounding shows
    assert found == pytest.approx(expected, rel=0.03)
