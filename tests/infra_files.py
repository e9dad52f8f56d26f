"""The files in infra/, as their tests read them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
CONFIG = INFRA / "kuberay/cluster/config.toml"
COMPOSE = INFRA / "compose/compose.yaml"
SBATCH = INFRA / "slurm/csc.sbatch"


def documents(*paths: Path) -> list[dict[str, Any]]:
    return [one for path in paths for one in yaml.load_all(path.read_text(), yaml.CSafeLoader)]


def manifests() -> list[dict[str, Any]]:
    """Return all objects that Kubernetes is given, and kustomizations."""
    found = documents(*INFRA.glob("**/*.yaml"))
    return [one for one in found if "apiVersion" in one and one["kind"] != "ClusterConfig"]


def one(kind: str) -> dict[str, Any]:
    return next(manifest for manifest in manifests() if manifest["kind"] == kind)


def inner(value: Any) -> Iterator[Any]:
    """Yield a value and all that is in it."""
    yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from inner(child)


def run(*words: str | Path, **options: Any) -> str:
    """Return what a command said; fail with it if the command does."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(name: str) -> str:
    """Return where a tool is, on the path or beside this Python; skip the test if it is nowhere."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def rules() -> list[dict[str, Any]]:
    groups = one("PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]
