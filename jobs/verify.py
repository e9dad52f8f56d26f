"""`csc verify`: are two recordings of one speaker?"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from csc_model.model import CSC
from jobs.config import Config
from jobs.console import say
from jobs.registry import CHAMPION, Registry
from jobs.scoring import decide
from jobs.workspace import Workspace
from pipeline.audio import load
from pipeline.errors import CscError
from pipeline.shards import INDEX


def verify(enrolment: str, test: str, model_uri: str | None, config: Config) -> None:
    """Score two files with a registered model, or a folder of one; print the answer.

    Raises:
        CscError: a file cannot be used, or there is no such model.
    """
    clips = load(enrolment), load(test)
    model, threshold, _ = load_verifier(
        model_uri or f"models:/{config.mlflow.model}@{CHAMPION}", config
    )
    score, details = decide(model, *clips)
    say("same speaker" if score >= threshold else "different speakers")
    say(f"  score {score:.3f}, threshold {threshold:.3f} (equal error rate on validation trials)")
    say(f"  best match in the second file: {details['view']}")
    active = ", ".join(f"{probability:.0%}" for probability in details["activity"])
    say(f"  somebody speaks in its slots: {active}")


class Verifier(NamedTuple):
    """A model with the score at which it decides, and its id."""

    model: CSC
    threshold: float
    model_id: str


def load_verifier(model_uri: str, config: Config) -> Verifier:
    """Return a registered model, or one in a folder with its evaluation.

    Raises:
        CscError: there is no such model.
    """
    with tempfile.TemporaryDirectory(prefix="csc-verify-") as scratch:
        folder = artifacts_of(model_uri, config, Path(scratch))
        try:
            model = CSC.load(folder / "model")
            about = json.loads((folder / "evaluation" / INDEX).read_text())
        except (FileNotFoundError, ValueError) as error:
            raise CscError(
                f"{model_uri}: {error}; name a version that csc registered, or a folder with its "
                "`model` and `evaluation`"
            ) from error
    return Verifier(model, float(about["threshold"]), str(about["model"]))


def artifacts_of(model_uri: str, config: Config, scratch: Path) -> Path:
    """Return a folder with the `model` and `evaluation` of a version, or the folder that is named.

    Raises:
        CscError: there is no such model.
    """
    if Path(model_uri).is_dir():
        return Path(model_uri)
    workspace = Workspace(config)
    if config.mlflow.uri is None and not workspace.folder.exists("mlflow.db"):
        raise CscError(f"{workspace.folder.uri} has no model yet: run csc run, or give --workspace")
    return Registry(workspace.mlflow_uri, config).download(model_uri, scratch)
