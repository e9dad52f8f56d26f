"""Embedding and scoring of trials, the same in training, evaluation and `csc verify`.

The rule: enrolment is clean and alone, so its unseparated view stands for it. A test scores by the
largest cosine over its active slots and its unseparated view. Nothing is attended over but the
recording itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_model.metrics import Trials as ScoredTrials
from csc_model.mfcc import mfcc_statistics
from csc_model.model import ACTIVE, CSC
from pipeline.render import render
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.trials import TrialAudio, Trials

Samples = NDArray[np.float32]
Views = NDArray[np.float32]
Embed = Callable[[Samples], Views]
"""Turns samples `(time,)` into unit vectors `(view, dim)`, the unseparated view last."""

TRIALS_AT_ONCE = 1 << 16


def embed_with(model: CSC) -> Embed:
    """Return the embedding function of a model, on the device where it lies."""
    device = next(model.parameters()).device

    def embed(samples: Samples) -> Views:
        vectors, activity = model.embed(torch.from_numpy(samples).to(device))
        # A slot that nobody speaks in repeats the whole, so that it never wins.
        heard = torch.where((activity >= ACTIVE).unsqueeze(-1), vectors, vectors[-1])
        return heard.float().cpu().numpy()

    return embed


def embed_mfcc(samples: Samples) -> Views:
    """Return MFCC statistics as a single view."""
    return mfcc_statistics(samples, SAMPLE_RATE_HZ)[None].astype(np.float32)


def test_side(audio: TrialAudio, place: int, sir_db: float | None) -> Samples:
    """Render the test side of an utterance, clean or interfered."""
    sources, gains_db = audio.sources(place, sir_db)
    batch = render(torch.from_numpy(sources)[None, None], torch.from_numpy(gains_db)[None, None])
    return batch.mixtures[0, 0].numpy()


def embed_places(
    embed: Embed, audio: TrialAudio, places: range, sir_db: float | None
) -> NDArray[np.float32]:
    """Embed the test sides of some utterances, `(utterance, view, dim)`."""
    return np.stack([embed(test_side(audio, place, sir_db)) for place in places])


def score(views: Views, enrolment: Views, trials: Trials) -> NDArray[np.float64]:
    """Score trials `(trial,)` from test views and clean views, `(utterance, view, dim)` both."""
    scores = []
    for first in range(0, len(trials.test), TRIALS_AT_ONCE):
        part = slice(first, first + TRIALS_AT_ONCE)
        enrolled = enrolment[trials.enrolment[part], -1]
        cosines = np.einsum("nd,nvd->nv", enrolled, views[trials.test[part]])
        scores.append(cosines.max(-1))
    return np.concatenate(scores).astype(np.float64)


def scored(trials: Trials, scores: NDArray[np.float64]) -> ScoredTrials:
    """Join scores and labels for the metrics."""
    _, speaker = np.unique(trials.speakers, return_inverse=True)
    return ScoredTrials(scores, trials.target, speaker[trials.enrolment], speaker[trials.test])


def decide(model: CSC, enrolment: Samples, test: Samples) -> tuple[float, dict[str, Any]]:
    """Score one pair and say which view of the test side won, with the slots' activity."""
    vectors, activity = model.embed(torch.from_numpy(test))
    cosines = vectors @ model.embed(torch.from_numpy(enrolment))[0][-1]
    cosines = cosines.masked_fill(activity < ACTIVE, -torch.inf)
    best = int(cosines.argmax())
    names = [f"slot {slot + 1}" for slot in range(len(cosines) - 1)] + ["the recording as it is"]
    active = [round(float(probability), 3) for probability in activity[:-1]]
    return float(cosines[best]), {"view": names[best], "activity": active}
