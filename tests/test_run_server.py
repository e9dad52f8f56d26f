"""Registration, the gate and serving against a real MLflow server with artifacts on S3."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import csc_model
from jobs.config import Config
from jobs.evaluate import Evaluated
from jobs.lineage import lines
from jobs.promote import promote
from jobs.register import register
from jobs.registry import CHALLENGER, CHAMPION, Registry, Version
from jobs.train import Trained
from pipeline.audio import load
from pipeline.errors import CscError
from tests.test_run_registry import contended
from tests.whole_run import PAIR, configured, evaluation_in, evaluator_of, only, store_in

BIN = Path(sys.executable).parent
READY_S = 240  # of a server that starts where a cluster is at work


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serving(command: list[str], health: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server as long as it is wanted, with all the processes that it starts."""
    with log.open("ab") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        until = time.monotonic() + READY_S
        while not answers(health):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


class Site:
    """Where an MLflow server keeps what it knows, so that it can be killed and started again."""

    def __init__(self, root: Path, artifacts: str) -> None:
        self.port, self.log = free_port(), root / "mlflow.log"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{root}/server.db", "--workers", "1"),
            *("--artifacts-destination", artifacts, "--serve-artifacts"),
        ]

    def up(self) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Run the server as long as it is wanted."""
        return serving(self.command, f"{self.uri}/health", self.log)


@pytest.fixture(scope="module")
def site(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        yield Site(tmp_path_factory.mktemp("site"), f"{s3}/artifacts")


def registry_at(uri: str, config: Config) -> Registry:
    served = config.mlflow.model_copy(update={"uri": uri})
    return Registry(uri, config.model_copy(update={"mlflow": served}))


def registered(workspace: Path, registry: Registry, name: str) -> Version:
    """Register what a whole run trained under a run of its own."""
    model, evaluation = only(workspace / "models"), evaluation_in(workspace)
    about = model.read_json("index.json")
    config, dataset = configured(workspace), only(workspace / "mixtures")
    run_id = registry.create_run(name, config, dataset.read_json("index.json"))
    version, _ = register(
        Trained(model, about | {"run": run_id}),
        Evaluated(evaluation, evaluation.read_json("index.json")),
        dataset,
        store_in(workspace),
        registry,
    )
    return version


@pytest.mark.cluster
def test_a_server_that_dies_in_mid_registration_leaves_nothing_half_there(
    workspace: Path, site: Site
) -> None:
    config = configured(workspace)
    with site.up() as server:
        registry = registry_at(site.uri, config)
        begun, failed = threading.Event(), []

        def attempt() -> None:
            begun.set()
            try:
                registered(workspace, registry, "killed")
            except CscError as error:
                failed.append(str(error))

        thread = threading.Thread(target=attempt)
        thread.start()
        begun.wait()
        time.sleep(1.0)  # artifacts are on their way
        stop(server)
        thread.join()
    assert failed, "the registration was faster than the kill"
    assert site.uri in failed[0]
    with site.up():
        again = registry_at(site.uri, config)
        assert again.versions() == []
        assert again.by_alias(CHALLENGER) is None
        first = registered(workspace, again, "first")
        assert [version.number for version in again.versions()] == [first.number]
        assert again.by_alias(CHALLENGER) == first
        contended(again, 4)
        decision = promote(again, evaluator_of(workspace, config))
        assert decision.promoted
        told = "\n".join(lines(again, again.version(CHAMPION)))
        assert "speechocean762 (speech)" in told


def test_a_server_that_is_away_is_named(workspace: Path, site: Site) -> None:
    with pytest.raises(CscError, match=rf"MLflow at {site.uri}: .*; check mlflow.uri"):
        registry_at(site.uri, configured(workspace)).versions()


def test_rest_answers_are_those_of_python(
    workspace: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/mlflow.db")
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    port = free_port()
    command = [
        *(str(BIN / "mlflow"), "models", "serve", "-m", "models:/csc-speaker-encoder@champion"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1"),
    ]
    here = f"http://127.0.0.1:{port}"
    samples = load(PAIR[1])
    files = [base64.b64encode(Path(path).read_bytes()).decode() for path in PAIR]
    asked = [
        {"audio": files[1], "enrolment_audio": files[0]},
        {"samples": samples.tolist()},
    ]
    (tmp_path / "request.json").write_text(json.dumps({"inputs": asked}))
    with serving(command, f"{here}/ping", tmp_path / "serve.log"):
        curl = [
            *("curl", "-s", "-X", "POST", f"{here}/invocations"),
            *("-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'request.json'}"),
        ]
        answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    by_file, by_samples = json.loads(answer)["predictions"]
    ours = csc_model.CSC.load(only(workspace / "models").uri)
    vectors, activity = ours.embed(torch.from_numpy(samples))
    for found in (by_file, by_samples):
        np.testing.assert_allclose(found["vectors"], vectors.numpy(), atol=1e-4)
        np.testing.assert_allclose(found["activity"], activity.numpy(), atol=1e-4)
    np.testing.assert_allclose(by_samples["vectors"], vectors.numpy(), atol=1e-5)
    enrolled = ours.embed(torch.from_numpy(load(PAIR[0])))[0][-1]
    score, _ = csc_model.model.best_view(vectors, activity, enrolled)
    assert by_file["score"] == pytest.approx(score, abs=1e-4)
    assert 0 < by_file["probability"] < 1
    assert by_samples["score"] is None
