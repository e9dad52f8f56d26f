"""Validation inside training: error rate on interfered trials, and what separation gains.

All ranks take part: each embeds its share of the utterances, all see the whole result.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from csc_model.losses import SILENT
from csc_model.metrics import eer
from csc_model.model import CSC
from jobs.config import Config
from jobs.scoring import embed_with, improvement_db, score
from pipeline.loader import EpisodeLoader
from pipeline.render import render
from pipeline.shards import read_catalogue
from pipeline.sides import TrialAudio, from_store
from pipeline.storage import Folder
from pipeline.trials import CLEAN, make_trials

MIXTURE_BATCHES = 4


class Found(NamedTuple):
    """What a validation measured."""

    eer: float  # the mean over conditions; nan where separation is all that is trained
    improvement_db: float  # mean gain in SI-SNR over the mixture; nan where no slot is full


class Validator:
    """Measures a model on the speakers of the validation split."""

    def __init__(
        self, config: Config, store: Folder, mixtures: EpisodeLoader, rank: int, world: int
    ) -> None:
        trials = config.evaluate.trials
        self.trials = make_trials(read_catalogue(store), "valid", trials, config.seed)
        self.conditions = [CLEAN, *(n for n in config.train.validate_on if n != CLEAN)]
        self.own = range(rank, len(self.trials.utterances), world)
        self.audio = TrialAudio(from_store(store), self.trials, self.own)
        self.judged = [self.conditions.index(name) for name in config.train.validate_on]
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
        own = [
            np.stack([embed(self.audio.side(place, name).mixture) for place in self.own])
            for name in self.conditions
        ]
        clean, *_ = views = [self._whole(part) for part in own]
        tests = [views[place] for place in self.judged]
        rates = [eer(score(test, clean, self.trials), self.trials.target) for test in tests]
        return float(np.mean(rates))

    def _whole(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put the ranks' embeddings, every `world`-th utterance each, in order."""
        whole = np.empty((len(self.trials.utterances), *own.shape[1:]), np.float32)
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
            gained = improvement_db(model.sources(mixtures), mixtures, references)
            full = (references.square().mean(-1) > SILENT).all(-1)
            full &= ~batch.mixit.repeat_interleave(batch.pick.shape[1])  # no voice is known there
            gains.append(gained[full].cpu().numpy())
        found = np.concatenate(self._gather(np.concatenate(gains)))
        return float(found.mean()) if len(found) else float("nan")
