"""Validation inside training: error rate on interfered trials, and what separation gains.

All ranks take part: each embeds its share of the utterances, all see the whole result.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from csc_model.losses import SILENT, best_permutation, pairwise_separation_loss, si_snr_db
from csc_model.metrics import eer
from csc_model.model import CSC
from jobs.config import Config
from jobs.scoring import embed_places, embed_with, score
from pipeline.loader import EpisodeLoader
from pipeline.render import render
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from pipeline.trials import TrialAudio, make_trials

MIXTURE_BATCHES = 4


class Found(NamedTuple):
    """What a validation measured."""

    eer: float  # the mean over conditions; nan where separation is all that is trained
    improvement_db: float  # mean gain in SI-SNR over the mixture; nan where no slot is full


def improvement_db(model: CSC, mixtures: Tensor, references: Tensor) -> Tensor:
    """Return by how much each slot's SI-SNR is above the mixture's, in the mean: `(mixture,)`.

    Mixtures are `(mixture, time)`, references `(mixture, slot, time)`, all of which speak.
    """
    least, _ = best_permutation(pairwise_separation_loss(model.sources(mixtures), references))
    before = si_snr_db(mixtures.unsqueeze(1).expand_as(references), references).mean(-1)
    return -least - before


class Validator:
    """Measures a model on the speakers of the validation split."""

    def __init__(
        self, config: Config, store: Folder, mixtures: EpisodeLoader, rank: int, world: int
    ) -> None:
        trials = config.evaluate.trials
        self.trials = make_trials(read_catalogue(store), "valid", trials, config.seed)
        self.audio = TrialAudio(store, self.trials)
        self.conditions = list(trials.conditions.values())
        self.mixtures, self.rank, self.world = mixtures, rank, world
        self.separation_only = config.train.separation_only

    def measure(self, model: CSC) -> Found:
        """Measure a model. To be called by every rank at the same step."""
        model.eval()
        rate = math.nan if self.separation_only else self._eer(model)
        result = Found(rate, self._improvement_db(model))
        model.train()
        return result

    def _eer(self, model: CSC) -> float:
        embed = embed_with(model)
        own = range(self.rank, len(self.audio.pcm), self.world)
        views = [
            self._whole(embed_places(embed, self.audio, own, sir_db)) for sir_db in self.conditions
        ]
        clean = views[self.conditions.index(None)]
        target = self.trials.target
        return float(np.mean([eer(score(test, clean, self.trials), target) for test in views]))

    def _whole(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put the ranks' embeddings, every `world`-th utterance each, in order."""
        whole = np.empty((len(self.audio.pcm), *own.shape[1:]), np.float32)
        for rank, part in enumerate(self._gather(own)):
            whole[rank :: self.world] = part
        return whole

    def _gather(self, own: Any) -> list[Any]:
        if self.world == 1:
            return [own]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, own)
        return parts

    @torch.inference_mode()
    def _improvement_db(self, model: CSC) -> float:
        """Return the gain over the mixture where every slot has a speaker; nan where none is so."""
        device = next(model.parameters()).device
        bank = None if self.mixtures.rooms is None else self.mixtures.rooms.to(device)
        gains = []
        for _, batch in zip(range(MIXTURE_BATCHES), self.mixtures.batches(0), strict=False):
            batch = batch.to(device)
            rendered = render(batch.sources, batch.gains_db, batch.rooms, bank)
            mixtures, references = (part.flatten(0, 1) for part in rendered)
            gained = improvement_db(model, mixtures, references)
            full = (references.square().mean(-1) > SILENT).all(-1)
            full &= ~batch.mixit.repeat_interleave(batch.pick.shape[1])  # no voice is known there
            gains.append(gained[full].cpu().numpy())
        found = np.concatenate(self._gather(np.concatenate(gains)))
        return float(found.mean()) if len(found) else float("nan")
