"""A registered model as the judge of one speaker at a time in what is ingested."""

import numpy as np
import torch
from numpy.typing import NDArray

from csc_model.model import CSC
from jobs.config import Config
from jobs.scoring import Samples
from jobs.verify import load_verifier
from pipeline.speakers import Ear


class ModelEar:
    """Hears with a model's unseparated view; `threshold` is where it decides in verification."""

    def __init__(self, model: CSC, threshold: float, name: str) -> None:
        self._model, self.threshold, self.name = model.eval(), threshold, name

    def __call__(self, samples: Samples) -> NDArray[np.float32]:
        torch.set_num_threads(1)  # as many workers as cores are at it
        vectors, _ = self._model.embed(torch.from_numpy(np.ascontiguousarray(samples)))
        return vectors[-1].float().numpy()


def ear_of(config: Config) -> Ear | None:
    """Return the judge that `ingest.purity` names, or None where it names none.

    Raises:
        CscError: there is no such model.
    """
    uri = config.ingest.purity
    if uri is None:
        return None
    found = load_verifier(uri, config)
    given = config.ingest.purity_threshold
    return ModelEar(found.model, found.threshold if given is None else given, found.model_id)
