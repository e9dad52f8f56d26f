"""What is submitted to a Ray cluster: a configuration that holds there, and this very code."""

import getpass
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.config import Config
from jobs.jobserver import STOPPED_BY, Job, JobServer
from jobs.registry import SQLITE
from jobs.workspace import Workspace
from pipeline.corpora import SAMPLE, SAMPLE_PREFIX
from pipeline.errors import CscError
from pipeline.schema import config_hash

ROOT = Path(__file__).parents[1]
PACKAGES = ("csc_model", "pipeline", "jobs")
CONFIG_FILE = "csc.json"
WITHOUT_MLFLOW = ("ingest", "build")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
FILE = re.compile(r"^file:(//)?", re.IGNORECASE)
PASSWORD = re.compile(
    r"[a-z0-9+.-]://[^/@]+@|[?&;][^=&;]*(key|secret|token|passw)[^=&;]*=", re.IGNORECASE
)  # in an address
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)


def for_cluster(stage: str, config: Config) -> Config:
    """Return a configuration as the nodes of a cluster are to have it.

    Raises:
        CscError: it holds a password, names what only this machine has, or lacks an MLflow server.
    """
    for key, text in _texts(config.model_dump(mode="json")):
        if PASSWORD.search(text):
            raise CscError(
                f"{key} holds a password, and everyone on the cluster can read a submission: leave "
                "it out, and set it on the nodes (of MLflow, in MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD)"
            )
    for key, text in places(config):
        if only_here(text):
            raise CscError(
                f"{key} is {text!r}, which only this machine can find: give an s3:// address, or "
                "the absolute path of a folder that every node of the cluster sees"
            )
    if stage not in WITHOUT_MLFLOW or config.ingest.purity:
        _ = Workspace(config).mlflow_uri
    ray = config.ray.model_copy(update={"address": "auto"})
    return config.model_copy(update={"ray": ray})


def places(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the keys that may name files."""
    yield "workspace", config.workspace
    for number, corpus in enumerate(config.ingest.corpora):
        yield f"ingest.corpora.{number}.root", corpus.root
    for key, text in (
        ("ingest.purity", config.ingest.purity),
        ("train.init_from", config.train.init_from),
        *((key, text) for key, text in _datasets(config) if "/" in text),
        ("mlflow.uri", config.mlflow.uri and config.mlflow.uri.removeprefix(SQLITE)),
    ):
        if text:
            yield key, text


def _datasets(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the datasets that are named: an id is one of the workspace."""
    yield "train.dataset", config.train.dataset or ""
    yield "train.valid_dataset", config.train.valid_dataset or ""


def is_local(place: str) -> bool:
    """Say whether a place is a path, be it written as a file: address."""
    return SCHEME.match(_path(place)) is None


def only_here(place: str) -> bool:
    """Say whether a place is a path that begins in this folder or in this user's home."""
    return is_local(place) and not Path(_path(place)).is_absolute()


def _path(place: str) -> str:
    return FILE.sub("", place)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts of a tree with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in inner:
            yield from _texts(one, f"{key}.{name}".removeprefix("."))


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Return variables of this environment that a job is to have.

    Raises:
        CscError: one is not set, or looks like a secret.
    """
    for name in names:
        if SECRET_NAME.search(name) or PASSWORD.search(os.environ.get(name, "")):
            raise CscError(
                f"--env {name} looks like a secret, and everyone on the cluster can read a "
                "submission: credentials belong to the nodes"
            )
        if name not in os.environ:
            raise CscError(f"--env {name}: it is not set here; set it, or leave it out")
    return {name: os.environ[name] for name in names}


def digest_of(config: Config) -> str:
    """Return what tells one configuration from another."""
    return config_hash(config.model_dump(mode="json"))


def under_way(server: JobServer, stage: str, config: Config) -> Job | None:
    """Return the newest job of this stage and configuration that has not ended."""
    wanted = (stage, digest_of(config))
    same = (job for job in server.jobs() if (job.stage, job.config) == wanted and job.under_way)
    return next(same, None)


def submit(
    server: JobServer,
    stage: str,
    config: Config,
    variables: dict[str, str],
    warn: Callable[[str], object],
) -> str:
    """Have a stage run on a cluster; return the id of the job, such as csc-run-1a2b3c4d-2.

    Args:
        server: of the cluster.
        stage: a command of `csc`.
        config: as `for_cluster` returns it.
        variables: of the environment, that the nodes do not have.
        warn: is told if the cluster lets wait.
    """
    digest = digest_of(config)
    job_id = _next_id(f"csc-{stage}-{digest[:8]}-", server.jobs())
    about = {
        "stage": stage,
        "config": digest,
        "workspace": config.workspace,
        "by": f"{getpass.getuser()}@{socket.gethostname()}",
    }
    with packed(config) as folder:
        environment = {
            "working_dir": str(folder),
            "env_vars": {**variables, **STOPPED_BY},
        }
        command = f"python -m jobs {stage} --config {CONFIG_FILE}"
        server.submit(job_id, command, about, environment, warn)
    return job_id


def _next_id(prefix: str, jobs: Sequence[Job]) -> str:
    """Number the submissions of a configuration: of two at a time, Ray refuses the second."""
    numbers = (job.id.removeprefix(prefix) for job in jobs if job.id.startswith(prefix))
    return (
        f"{prefix}{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    )


@contextmanager
def packed(config: Config) -> Iterator[Path]:
    """Give a folder from which `python -m jobs` runs: the packages, and the configuration.

    The sample of speech, most of its bytes, is there only where a corpus names it.
    """
    left_out = ["__pycache__", ".*"]
    if not any(corpus.root.startswith(SAMPLE_PREFIX) for corpus in config.ingest.corpora):
        left_out.append(SAMPLE.name)
    with tempfile.TemporaryDirectory(prefix="csc-submit-") as scratch:
        folder = Path(scratch)
        for package in PACKAGES:
            shutil.copytree(
                ROOT / package, folder / package, ignore=shutil.ignore_patterns(*left_out)
            )
        (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2))
        yield folder
