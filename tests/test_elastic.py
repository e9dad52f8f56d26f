"""Training on a cluster that loses a node: on with fewer workers, and the same curve."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from jobs.config import Config, load_config
from jobs.run import Run
from tests.whole_run import SMALL, SNAPSHOTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
ELASTIC = [
    "train.workers=3",
    "train.min_workers=1",
    "train.batch_size=12",  # three blocks: of two workers, one has two
    "train.steps=120",
    "train.validate_every=20",
    "train.validate_on=['clean']",
]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def configured(workspace: Path) -> Config:
    return load_config("demo", [*SMALL, *ELASTIC, f"workspace='{workspace}'"])


def curves(run: Run, *names: str) -> list[list[float]]:
    run_id = run.train.about["run"]
    return [run.registry.history(run_id, name) for name in names]


def test_a_lost_node_leaves_the_loss_curve_and_fewer_workers(
    cluster: Cluster, tmp_path: Path
) -> None:
    with Run(configured(tmp_path / "calm")) as calm:
        expected, workers = curves(calm, "total", "workers")
    assert set(workers) == {3.0}
    root = tmp_path / "stormy"

    def strike() -> None:
        while not any('"checkpoint_dir_name"' in path.read_text() for path in root.glob(SNAPSHOTS)):
            time.sleep(0.1)
        victim = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        cluster.remove_node(victim, allow_graceful=False)

    thread = threading.Thread(target=strike, daemon=True)
    with Run(configured(root)) as stormy:
        _ = stormy.build
        thread.start()
        found, workers = curves(stormy, "total", "workers")
    assert not thread.is_alive()
    assert sorted(set(workers)) == [2.0, 3.0]
    assert workers == sorted(workers, reverse=True)
    assert found == pytest.approx(expected, rel=1e-3)
