"""Embedding and scoring of trials, the same in training, evaluation and `csc verify`.

The rule: enrolment is clean and alone, so its unseparated view stands for it. A test scores by the
largest cosine over its active slots and its unseparated view. Nothing is attended over but the
recording itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csc_model.calibration import Cohort, as_norm
from csc_model.losses import SILENT, best_permutation, pairwise_separation_loss, si_snr_db
from csc_model.metrics import Trials as ScoredTrials
from csc_model.mfcc import mfcc_statistics
from csc_model.model import ACTIVE, CSC
from csc_model.objective import in_order
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.trials import Trials

Samples = NDArray[np.float32]
Views = NDArray[np.float32]
Embed = Callable[[Samples], Views]
"""Turns samples `(time,)` into unit vectors `(view, dim)`, the unseparated view last."""

TRIALS_AT_ONCE = 1 << 16
NEAREST = 100  # strangers of a cohort that a score is normalised by


def embed_with(model: CSC) -> Embed:
    """Return the embedding function of a model, on the device where it lies."""

    def embed(samples: Samples) -> Views:
        vectors, activity = model.embed(torch.from_numpy(samples))
        # A slot that nobody speaks in repeats the whole, so that it never wins.
        heard = torch.where((activity >= ACTIVE).unsqueeze(-1), vectors, vectors[-1])
        return heard.float().cpu().numpy()

    return embed


def embed_mfcc(samples: Samples) -> Views:
    """Return MFCC statistics as a single view."""
    return mfcc_statistics(samples, SAMPLE_RATE_HZ)[None].astype(np.float32)


def enrol(clean: Views) -> NDArray[np.float32]:
    """Return the unit vector `(..., dim)` of clean views `(..., utterance, view, dim)` of a voice.

    The mean of what is heard unseparated: a clean utterance holds nobody else.
    """
    mean = clean[..., -1, :].mean(-2)
    return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True), np.float32)


def score(
    views: Views, clean: Views, trials: Trials, cohort: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """Score trials `(trial,)` from test views and clean views, `(utterance, view, dim)` both.

    With a cohort, unit vectors `(stranger, dim)`, each view's cosine is normalised by it (AS-norm)
    before the largest is taken.
    """
    enrolled = enrol(clean[trials.enrolled])
    of_enrolled = None if cohort is None else Cohort.of(enrolled @ cohort.T, NEAREST)
    of_views = None if cohort is None else Cohort.of(views.swapaxes(0, 1) @ cohort.T, NEAREST)
    scores = []
    for first in range(0, len(trials.test), TRIALS_AT_ONCE):
        part = slice(first, first + TRIALS_AT_ONCE)
        enrolment, test = trials.enrolment[part], trials.test[part]
        cosines = np.einsum("nd,nvd->nv", enrolled[enrolment], views[test]).astype(np.float64)
        if of_enrolled is not None and of_views is not None:
            cosines = as_norm(cosines.T, of_enrolled, of_views, enrolment, test).T
        scores.append(cosines.max(-1))
    return np.concatenate(scores)


def scored(trials: Trials, scores: NDArray[np.float64]) -> ScoredTrials:
    """Join scores and labels for the metrics."""
    _, speaker = np.unique(trials.speakers, return_inverse=True)
    enrolled = speaker[trials.enrolled[:, 0]]
    return ScoredTrials(scores, trials.target, enrolled[trials.enrolment], speaker[trials.test])


def nearest_slot(vectors: Tensor, activity: Tensor, whose: Tensor) -> int:
    """Return the slot whose voice is nearest to a unit vector: an active one, if any is.

    Vectors and activity are those of the views `(slot + 1, dim)`, the unseparated one last.
    """
    active = activity[:-1] >= ACTIVE
    cosines = vectors[:-1] @ whose
    return int(cosines.masked_fill(~active & active.any(), -torch.inf).argmax())


def evenly(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of the places, as far apart in their order as they can be."""
    count = min(most, len(places))
    return places[np.arange(count) * len(places) // max(count, 1)]


def matched(sources: Tensor, references: Tensor) -> Tensor:
    """Put sources in the order of their references, `(mixture, slot, time)` both."""
    _, assignment = best_permutation(pairwise_separation_loss(sources, references))
    return in_order(sources, assignment)


def padded(voices: Samples, num_slots: int) -> Tensor:
    """Return voices `(voice, time)` as references `(slot, time)`: further slots are silent."""
    silent = torch.zeros(num_slots - len(voices), voices.shape[-1])
    return torch.cat([torch.from_numpy(voices), silent])


def improvement_db(sources: Tensor, mixtures: Tensor, references: Tensor) -> Tensor:
    """Return by how much SI-SNR is above the mixture's, in the mean over who speaks: `(mixture,)`.

    Mixtures are `(mixture, time)`, sources and references `(mixture, slot, time)`, matched by the
    best permutation; nan where nobody speaks.
    """
    before = si_snr_db(mixtures.unsqueeze(1).expand_as(references), references)
    gains = si_snr_db(matched(sources, references), references) - before
    speaks = references.square().mean(-1) >= SILENT
    return gains.where(speaks, gains.new_tensor(float("nan"))).nanmean(-1)
