"""One speaker at a time: what a speaker model says of segments and recordings.

The model comes from outside, as `Ear`: this package knows no model.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import AudioError, Samples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segments import Piece

PART_SAMPLES = 2 * SAMPLE_RATE_HZ  # shorter ones say too little of who speaks
ROWS_AT_ONCE = 1 << 10


class Ear(Protocol):
    """Turns speech into a unit vector; two of one speaker have a cosine above `threshold`."""

    name: str  # of the model, for the record
    threshold: float

    def __call__(self, samples: Samples) -> NDArray[np.float32]:
        """Return the vector `(dim,)` of samples `(time,)`."""


class _Heard(NamedTuple):
    start_sample: int
    num_samples: int
    vector: NDArray[np.float32]


class SpeakerCheck:
    """Listens to the segments of one source.

    Within a segment, its parts of two seconds must sound like one another. Where the recording
    stands in for its speaker (`pseudo`), so must its segments: the largest group that agrees with
    one of them is kept.
    """

    def __init__(self, ear: Ear, label_kind: str) -> None:
        self._ear, self._label_kind = ear, label_kind
        self._heard: list[_Heard] = []

    def fault(self, piece: Piece) -> AudioError | None:
        """Return why a segment is not of one speaker, or None."""
        assert piece.samples is not None
        count = max(1, piece.num_samples // PART_SAMPLES)
        parts = [self._ear(part) for part in np.array_split(piece.samples, count)]
        cosines = np.stack(parts) @ np.stack(parts).T
        if count > 1 and (least := float(cosines.min())) < self._ear.threshold:
            return AudioError("several_speakers", self._detail("between parts", least))
        if self._label_kind == "pseudo":
            mean = np.mean(parts, axis=0)
            vector = (mean / np.linalg.norm(mean)).astype(np.float32)
            self._heard.append(_Heard(piece.start_sample, piece.num_samples, vector))
        return None

    def _detail(self, what: str, cosine: float) -> str:
        needed = f"{self._ear.threshold:.2f} is needed by model {self._ear.name}"
        return f"a cosine of {cosine:.2f} {what}, {needed}"

    def others(self) -> list[tuple[int, int, AudioError]]:
        """Return start, length and reason of the segments that are not of the main speaker."""
        if not self._heard:
            return []
        vectors = np.stack([heard.vector for heard in self._heard])
        agreeing = [
            int(number)
            for first in range(0, len(vectors), ROWS_AT_ONCE)
            for number in (
                vectors[first : first + ROWS_AT_ONCE] @ vectors.T >= self._ear.threshold
            ).sum(axis=1)
        ]
        cosines = vectors @ vectors[int(np.argmax(agreeing))]
        return [
            (
                heard.start_sample,
                heard.num_samples,
                AudioError("other_speaker", self._detail("to the main speaker", float(cosine))),
            )
            for heard, cosine in zip(self._heard, cosines, strict=True)
            if cosine < self._ear.threshold
        ]
