"""Runs on a cluster that loses its head, or hears nothing of a node that goes on and comes back."""

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
from ray._raylet import GcsClient
from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient, JobStatus

from jobs.config import Config, load_config
from jobs.following import follow
from jobs.jobserver import JobServer
from jobs.run import Run
from pipeline.build import build
from pipeline.storage import Folder
from tests.clusters import (
    PATIENCE_S,
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
from tests.test_run_server import free_port
from tests.whole_run import SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PERIOD_MS, MISSED = 2000, 3
HEALTH = {  # by the checks of Ray's head, a node is dead so soon; by default it takes a minute
    "health_check_period_ms": PERIOD_MS,
    "health_check_timeout_ms": PERIOD_MS,
    "health_check_failure_threshold": MISSED,
}
ABOUT = {"stage": "run", "config": "0", "workspace": "/w", "by": "me@here"}
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


def test_a_command_that_a_new_head_finds_in_its_redis_is_found_to_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.following.SILENCE_S", 2.0)
    found = JobInfo(
        status=JobStatus.RUNNING,
        entrypoint="python -m jobs run",
        start_time=int(time.time() * 1000),
        metadata=ABOUT,
        driver_agent_http_address=f"http://127.0.0.1:{free_port()}",
        driver_node_id="f" * 56,  # of the head that was
    )
    warned: list[str] = []
    with nodes_up(0) as nodes:
        records = JobInfoStorageClient(GcsClient(address=nodes.cluster.address))
        asyncio.run(records.put_info("csc-run-0-1", found))
        server = JobServer(nodes.url)
        assert server.job("csc-run-0-1").state == "RUNNING"
        job = follow(server, "csc-run-0-1", print, warned.append)
        assert (job.state, job.lost, job.exit_code) == ("FAILED", True, 1)
        assert [job.id for job in server.jobs()] == ["csc-run-0-1"]
    assert warned[0] == "csc-run-0-1 is RUNNING and nothing comes of its log: asking the head"


def test_a_head_that_has_only_just_begun_is_waited_for() -> None:
    with nodes_up(0) as nodes:
        kept = GcsClient(address=nodes.cluster.address)
        agents = DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX.encode(), KV_NAMESPACE_DASHBOARD
        until = time.monotonic() + PATIENCE_S
        while not (keys := kept.internal_kv_keys(*agents)):
            assert time.monotonic() < until
            time.sleep(0.1)
        address = kept.internal_kv_get(keys[0], KV_NAMESPACE_DASHBOARD)
        kept.internal_kv_del(keys[0], False, KV_NAMESPACE_DASHBOARD)
        warned: list[str] = []

        def warn(text: str) -> None:
            warned.append(text)
            kept.internal_kv_put(keys[0], address, True, KV_NAMESPACE_DASHBOARD)

        server = JobServer(nodes.url)
        server.submit("csc-run-0-1", "true", ABOUT, {}, warn)
        assert [job.id for job in server.jobs()] == ["csc-run-0-1"]
    assert [text.endswith("has only just begun: waiting 60 s") for text in warned] == [True]


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
