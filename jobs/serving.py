"""The MLflow pyfunc of a CSC model: recordings in, speaker vectors and scores out.

MLflow runs this file when it loads a registered model; nothing is unpickled.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pydantic
import soundfile
import torch

from csc_model import CSC
from csc_model.calibration import Calibration
from csc_model.model import best_view

SHORTEST_S, QUIETEST = 0.3, 1e-4  # -80 dBFS


class Request(pydantic.BaseModel):
    """A recording as a file in base64, or as samples; and one to compare it with, if any."""

    audio: str | None = None  # base64 of WAV, FLAC, Ogg or MP3
    samples: list[float] | None = None  # mono
    sample_rate_hz: int = 16_000  # of samples
    enrolment_audio: str | None = None
    enrolment_samples: list[float] | None = None  # at the same rate


class Answer(pydantic.BaseModel):
    """What is heard: `vectors` `(view, dim)` and `activity` `(view,)`, the whole recording last.

    With an enrolment also `score`, the largest cosine over active views, `llr`, its log-likelihood
    ratio in nats, and `probability` of one speaker at even odds.
    """

    vectors: list[list[float]]
    activity: list[float]
    score: float | None = None
    llr: float | None = None
    probability: float | None = None


class SpeakerEncoder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Embeds recordings, and scores them against clean ones of a speaker."""

    def load_context(self, context: Any) -> None:
        """Load weights and calibration."""
        self.model = CSC.load(Path(context.artifacts["model"]))
        about = json.loads((Path(context.artifacts["evaluation"]) / "index.json").read_text())
        self.calibration = Calibration(**about["calibration"])

    def predict(self, model_input: list[Request]) -> list[Answer]:
        """Answer each request."""
        return [self._answer(request) for request in model_input]

    def _answer(self, request: Request) -> Answer:
        vectors, activity = self._embed(request.audio, request.samples, request.sample_rate_hz)
        answer = Answer(vectors=vectors.tolist(), activity=activity.tolist())
        if request.enrolment_audio is None and request.enrolment_samples is None:
            return answer
        enrolled, _ = self._embed(
            request.enrolment_audio, request.enrolment_samples, request.sample_rate_hz
        )
        score, _ = best_view(vectors, activity, enrolled[-1])
        told = {
            "score": score,
            "llr": float(self.calibration.llr(np.array(score))),
            "probability": float(self.calibration.probability(np.array(score), 0.5)),
        }
        return answer.model_copy(update=told)

    def _embed(
        self, audio: str | None, samples: list[float] | None, rate_hz: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (audio is None) == (samples is None):
            raise ValueError("give a recording as audio, a file in base64, or as samples, not both")
        waveform = np.asarray(samples, np.float32)
        if audio is not None:
            data = io.BytesIO(base64.b64decode(audio, validate=True))
            waveform, rate_hz = soundfile.read(data, dtype="float32", always_2d=True)
            waveform = waveform.mean(1)
        if len(waveform) < SHORTEST_S * rate_hz or not np.any(np.abs(waveform) > QUIETEST):
            raise ValueError(f"a recording is silent, or shorter than {SHORTEST_S} s")
        return self.model.embed(torch.from_numpy(waveform), rate_hz)


mlflow.models.set_model(SpeakerEncoder())
