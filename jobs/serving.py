"""The MLflow pyfunc of a CSC model: waveforms in, speaker vectors out.

MLflow runs this file when it loads a registered model; nothing is unpickled.
"""

from pathlib import Path
from typing import Any

import mlflow
import torch

from csc_model import CSC

Waveforms = list[list[float]]
"""One list of samples at 16 kHz for each recording."""


class SpeakerEncoder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Embeds waveforms."""

    def load_context(self, context: Any) -> None:
        self.model = CSC.load(Path(context.artifacts["model"]))

    def predict(self, model_input: Waveforms) -> list[list[list[float]]]:
        """Return for each waveform its vectors `(view, dim)`, the unseparated view last."""
        return [self.model.embed(torch.tensor(wave))[0].tolist() for wave in model_input]


mlflow.models.set_model(SpeakerEncoder())
