"""The MLflow pyfunc of a CSC model: waveforms in, speaker vectors out.

MLflow runs this file when it loads a registered model; nothing is unpickled.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch

from csc_model import CSC


class SpeakerEncoder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Embeds waveforms at 16 kHz."""

    def load_context(self, context: Any) -> None:
        self.model = CSC.load(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return for each waveform its vectors `(view, dim)`, the unseparated view last.

        Untyped on purpose: MLflow would read annotations as a schema of its own.
        """
        waveforms = np.atleast_2d(np.asarray(model_input, dtype=np.float32))
        return [self.model.embed(torch.from_numpy(row))[0].numpy() for row in waveforms]


mlflow.models.set_model(SpeakerEncoder())
