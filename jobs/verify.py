"""`csc verify`: are two recordings of one speaker?"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from csc_model.calibration import Calibration
from csc_model.model import CONFIG_FILE, CSC, best_view
from jobs.config import Config
from jobs.console import say
from jobs.embedding import weights_id
from jobs.listening import WHOLE, Listened, listen
from jobs.registry import CHAMPION
from jobs.workspace import registry_of
from pipeline.errors import CscError
from pipeline.shards import INDEX
from pipeline.storage import Folder


def verify(enrolment: str, test: str, model_uri: str | None, prior: float, config: Config) -> None:
    """Score two files with a registered model, or a folder of one; print the answer.

    `prior` is how probable one speaker is without hearing the files.

    Raises:
        CscError: a file cannot be used, or there is no such model.
    """
    verifier = load_verifier(model_uri or champion_of(config), config)
    score, view, heard = compare(verifier.model, enrolment, test)
    probability = float(verifier.calibration.probability(np.array(score), prior))
    say("same speaker" if probability >= 0.5 else "different speakers")
    say(
        f"  probability {probability:.1%}, if {prior:.0%} was expected before listening; score "
        f"{score:.3f}, even odds at {verifier.threshold:.3f} (calibrated on validation trials)"
    )
    shown = "the recording as it is" if view == WHOLE else view.replace("-", " ")
    say(f"  best match in the second file: {shown}")
    active = ", ".join(f"{probability:.0%}" for probability in heard.activity[:-1])
    say(f"  somebody speaks in its slots: {active}")


def compare(model: CSC, enrolment: str, test: str) -> tuple[float, str, Listened]:
    """Score a file against a clean one; tell which view of it won, and all that is heard in it.

    Raises:
        CscError: a file cannot be used.
    """
    enrolled, heard = (listen(model, path) for path in (enrolment, test))
    views = torch.from_numpy(heard.vectors), torch.from_numpy(heard.activity)
    score, best = best_view(*views, torch.from_numpy(enrolled.vectors[-1]))
    return score, heard.names[best], heard


def champion_of(config: Config) -> str:
    """Return the address of the champion."""
    return f"models:/{config.mlflow.model}@{CHAMPION}"


class Verifier(NamedTuple):
    """A model with what its scores are worth, and its id."""

    model: CSC
    calibration: Calibration
    model_id: str

    @property
    def threshold(self) -> float:
        """The score that speaks for neither answer."""
        return -self.calibration.offset / self.calibration.scale


def load_model(model_uri: str, config: Config) -> CSC:
    """Return a registered model, that of a folder with its evaluation, or of a folder alone.

    Torch has `train.threads` threads from then on, as with `load_verifier`.

    Raises:
        CscError: there is no such model.
    """
    torch.set_num_threads(config.train.threads)
    with tempfile.TemporaryDirectory(prefix="csc-model-") as scratch:
        folder = artifacts_of(model_uri, config, Path(scratch))
        try:
            return CSC.load(folder if (folder / CONFIG_FILE).exists() else folder / "model")
        except (FileNotFoundError, ValueError) as error:
            raise CscError(
                f"{model_uri}: {error}; name a version that csc registered, or a folder with a "
                "model in it"
            ) from error


def load_verifier(model_uri: str, config: Config) -> Verifier:
    """Return a registered model, or one in a folder with its evaluation.

    From then on torch has `train.threads` threads: where others use the cores too, more of them
    mostly wait for each other.

    Raises:
        CscError: there is no such model.
    """
    torch.set_num_threads(config.train.threads)
    with tempfile.TemporaryDirectory(prefix="csc-verify-") as scratch:
        folder = artifacts_of(model_uri, config, Path(scratch))
        if (folder / CONFIG_FILE).exists():
            raise CscError(
                f"{model_uri} is a model without its `evaluation`, which says when two voices are "
                "one: name a version that csc registered, or a folder with both"
            )
        try:
            model = CSC.load(folder / "model")
            about = json.loads((folder / "evaluation" / INDEX).read_text())
        except (FileNotFoundError, ValueError) as error:
            raise CscError(
                f"{model_uri}: {error}; name a version that csc registered, or a folder with its "
                "`model` and `evaluation`"
            ) from error
        weights = weights_id(Folder.at(folder / "model"))
    return Verifier(model, Calibration(**about["calibration"]), weights)


def artifacts_of(model_uri: str, config: Config, scratch: Path) -> Path:
    """Return a folder with the `model` and `evaluation` of a version, or the folder that is named.

    Raises:
        CscError: there is no such model.
    """
    if Path(model_uri).is_dir():
        return Path(model_uri)
    return registry_of(config).download(model_uri, scratch)
