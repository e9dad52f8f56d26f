"""Runs on a cluster that loses its head, or hears nothing of a node that goes on and comes back."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.config import Config, load_config
from jobs.run import Run
from pipeline.build import build
from pipeline.storage import Folder
from tests.clusters import (
    Nodes,
    checkpointed,
    held,
    nodes_up,
    plain_curve,
    submission,
    wait_for,
    written,
)
from tests.conftest import make_store, serially, shard_hashes
from tests.whole_run import SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PERIOD_MS, MISSED = 2000, 3
HEALTH = {  # by the checks of Ray's head, a node is dead so soon; by default it takes a minute
    "health_check_period_ms": PERIOD_MS,
    "health_check_timeout_ms": PERIOD_MS,
    "health_check_failure_threshold": MISSED,
}
SIZES = [
    "build.train_episodes=192",
    "build.shard_mb=0.4",
    "train.steps=80",
    "train.validate_every=20",
    "train.validate_on=['clean']",
    "train.workers=2",
    "train.min_workers=1",
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Folder, list[float]]:
    """A store, a dataset and a curve of losses as plain loops make them, without Ray."""
    root, config = tmp_path_factory.mktemp("calm"), load_config("demo", [*SMALL, *SIZES])
    store, dataset = make_store(root / "store", config.ingest), Folder.at(root / "mixtures")
    build(dataset, store, config.build, config.seed, serially)
    return store, dataset, plain_curve(config, dataset)


def configured(workspace: str, root: Path) -> list[str]:
    return [*SMALL, *SIZES, f"workspace='{workspace}'", f"mlflow.uri='sqlite:///{root}/mlflow.db'"]


def agree(config: Config, calm: tuple[Folder, Folder, list[float]]) -> None:
    """Assert that a training's store, dataset and losses are those of the plain loops."""
    store, dataset, curve = calm
    with Run(config) as run:
        assert shard_hashes(run.ingest[0]) == shard_hashes(store)
        assert shard_hashes(run.build[0]) == shard_hashes(dataset)
        found = run.registry.history(run.train.about["run"], "total")
    assert found == pytest.approx(curve, rel=1e-3)


def test_a_command_whose_head_is_lost_says_so_and_the_next_goes_on(
    s3: str, tmp_path: Path, calm: tuple[Folder, Folder, list[float]]
) -> None:
    workspace = Folder(f"{s3}/headless")
    settings = configured(workspace.uri, tmp_path)
    mixtures, models = workspace.child("mixtures"), workspace.child("models")
    losses = [lambda: written(".done.json", mixtures), lambda: checkpointed(models)]
    with nodes_up(2) as nodes:
        command = submission("train", nodes.url, settings)
        for number, due in enumerate(losses):
            said = tmp_path / f"said-{number}.txt"
            with said.open("w") as out:
                job = subprocess.Popen(command, stdout=out, stderr=out)
            wait_for(due, job, said)
            nodes.lose_head()  # the other nodes work on until they miss it
            nodes.begin(2)
            assert job.wait(60) == 1
            assert "is lost with the head of the cluster" in said.read_text()
            assert "submit again, to go on" in said.read_text()
            assert "Traceback" not in said.read_text()
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    agree(load_config("demo", settings), calm)


@pytest.fixture
def watchful() -> Iterator[Nodes]:
    with nodes_up(3, **HEALTH) as nodes:
        yield nodes


def test_a_node_that_comes_back_from_the_dead_changes_no_result(
    watchful: Nodes, s3: str, tmp_path: Path, calm: tuple[Folder, Folder, list[float]]
) -> None:
    workspace, said = Folder(f"{s3}/revenant"), tmp_path / "said.txt"
    settings = configured(workspace.uri, tmp_path)
    mixtures, models = workspace.child("mixtures"), workspace.child("models")
    with said.open("w") as out:
        command = submission("train", watchful.url, settings)
        job = subprocess.Popen(command, stdout=out, stderr=out)
    wait_for(lambda: written(".done.json", mixtures), job, said)
    building, training, _ = watchful.others()
    with held(building):
        time.sleep(PERIOD_MS / 1000)
    assert watchful.alive() == 4
    with held(building):
        wait_for(lambda: watchful.alive() == 3, job, said)
    wait_for(lambda: checkpointed(models), job, said)
    with held(training):
        wait_for(lambda: watchful.alive() == 2, job, said)
    assert job.wait(600) == 0, said.read_text()
    agree(load_config("demo", settings), calm)
