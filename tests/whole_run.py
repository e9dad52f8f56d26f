"""A run of all stages on a third of the sample, with small sizes: what tests of the whole share."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jobs.cli import app
from jobs.config import Config, load_config
from jobs.evaluate import Evaluator
from jobs.registry import Registry
from jobs.train import RAY_FOLDER, SNAPSHOT
from jobs.workspace import Workspace
from pipeline.corpora import SAMPLE
from pipeline.errors import CscError
from pipeline.storage import Folder
from tests.conftest import serially


def toml(value: Any) -> str:
    """Write lists, tables and strings as TOML on one line."""
    if isinstance(value, list):
        return f"[{','.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}={toml(one)}' for key, one in value.items())}}}"
    return f"'{value}'"


IGNORED = [f"soc{digit}*/**" for digit in range(2, 10)]  # a third of the speakers is left
CORPORA = [
    {
        "name": "speechocean762",
        "root": "sample:speechocean762",
        "pattern": "{speaker}/*.opus",
        "ignore": [*IGNORED, "manifest.csv"],
    },
    {"name": "esc10", "root": "sample:esc10", "kind": "noise", "manifest": "manifest.csv"},
]
SMALL = [
    f"ingest.corpora={toml(CORPORA)}",
    "ingest.splits={valid_share=0.25,test_share=0.25}",
    "ingest.source_mb_per_shard=1.0",
    "build.train_episodes=64",
    "build.valid_episodes=16",
    "build.shard_mb=1.6",
    "build.episodes_per_group=4",
    "build.mixing.seconds=0.5",
    "model.frontend='conv'",
    "model.window=128",
    "model.hop=64",
    "model.num_bins=32",
    "model.trunk='galr'",
    "model.channels=16",
    "model.hidden=16",
    "model.shared_blocks=1",
    "model.separation_blocks=1",
    "model.speaker_blocks=1",
    "model.embedding_dim=32",
    "train.steps=12",
    "train.batch_size=8",
    "train.validate_every=4",
    "evaluate.trials.utterances_per_speaker=2",
    "evaluate.trials.nontargets_per_test=10",
    "evaluate.bootstrap_replicates=100",
]
SNAPSHOTS = f"models/*/{RAY_FOLDER}/{SNAPSHOT}"
CSC = str(Path(sys.executable).parent / "csc")
PAIR = sorted(str(path) for path in SAMPLE.glob("speechocean762/soc0005/*"))[:2]


def command(name: str, workspace: Path, *more: str) -> list[str]:
    settings = [word for text in SMALL for word in ("--set", text)]
    return [CSC, name, "--workspace", str(workspace), *settings, *more]


def csc(name: str, workspace: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, workspace, *more), capture_output=True, text=True, check=False
    )


def configured(workspace: Path) -> Config:
    return load_config("demo", [*SMALL, f"workspace='{workspace}'"])


def only(folder: Path) -> Folder:
    (found,) = folder.iterdir()
    return Folder.at(found)


def store_in(workspace: Path) -> Folder:
    return only(workspace / "utterances").child("generation-00001")


def registry_of(workspace: Path) -> Registry:
    config = configured(workspace)
    return Registry(Workspace(config).mlflow_uri, config)


def evaluator_of(workspace: Path, config: Config) -> Evaluator:
    cache = Folder.at(workspace / "embeddings")
    return Evaluator(config, store_in(workspace), cache, serially)


def ask(name: str, workspace: Path, *more: object) -> tuple[int, str]:
    """Call a command in this process, which is sooner done; return exit code and what it said."""
    words = [*command(name, workspace)[1:], *map(str, more)]
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, CscError):
        return 1, f"error: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def evaluation_in(workspace: Path) -> Folder:
    """Return the evaluation of the whole run: later ones stand beside further versions."""
    (folder,) = (
        folder
        for folder in (workspace / "evaluations").iterdir()
        if len(json.loads((folder / "index.json").read_text())["differences"]) == 8
    )
    return Folder.at(folder)
