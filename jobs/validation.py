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

from csc_model.extraction import asked
from csc_model.losses import SILENT, snr_db
from csc_model.metrics import eer
from csc_model.mixit import mixing_costs, mixit_loss
from csc_model.model import CSC
from jobs.batches import to_episodes
from jobs.config import Config
from jobs.scoring import embed_with, improvement_db, score
from pipeline.loader import Batch, EpisodeLoader
from pipeline.render import render
from pipeline.shards import read_catalogue
from pipeline.sides import TrialAudio, from_store
from pipeline.storage import Folder
from pipeline.trials import CLEAN, make_trials

MIXTURE_BATCHES = 4


class Found(NamedTuple):
    """What a validation measured."""

    eer: float  # the mean over conditions; nan where no voice is learned, or there are no trials
    # Mean gain in SI-SNR over the mixture, or where all are mixtures of mixtures in the SNR of the
    # two; nan where no mixture says what it is.
    improvement_db: float


class Verification:
    """Measures error rates on the trials of the validation split."""

    def __init__(self, config: Config, store: Folder, rank: int, world: int) -> None:
        trials = config.evaluate.trials
        self.trials = make_trials(read_catalogue(store), "valid", trials, config.seed)
        self.conditions = [CLEAN, *(n for n in config.train.validate_on if n != CLEAN)]
        self.own = range(rank, len(self.trials.utterances), world)
        self.audio = TrialAudio(from_store(store), self.trials, self.own)
        self.judged = [self.conditions.index(name) for name in config.train.validate_on]
        self.world = world

    def eer(self, model: CSC) -> float:
        """Return the mean error rate over the conditions that are judged."""
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
        for rank, part in enumerate(_gathered(own, self.world)):
            whole[rank :: self.world] = part
        return whole


class Validator:
    """Measures a model on the validation split: its trials, if there is a store, and mixtures."""

    def __init__(
        self, config: Config, store: Folder | None, mixtures: EpisodeLoader, rank: int, world: int
    ) -> None:
        self.voices: Verification | None = None
        if store is not None and config.train.learns_voices:
            self.voices = Verification(config, store, rank, world)
        self.mixtures, self.bank, self.world = mixtures, mixtures.rooms, world
        self.train = config.train

    def measure(self, model: CSC) -> Found:
        """Measure a model. To be called by every rank at the same step."""
        model.eval()
        rate = math.nan if self.voices is None else self.voices.eer(model)
        result = Found(rate, self._improvement_db(model))
        model.train()
        return result

    @torch.inference_mode()
    def _improvement_db(self, model: CSC) -> float:
        """Return the mean gain over the mixture; nan where no mixture says what it is."""
        device = next(model.parameters()).device
        if self.bank is not None:
            self.bank = self.bank.to(device)  # where it stays
        gain_db = _mixit_db if self.mixtures.mixing.mixit_share == 1 else _separation_db
        if self.train.task == "extract":
            gain_db = _extraction_db
        gains = []
        for _, batch in zip(range(MIXTURE_BATCHES), self.mixtures.batches(0), strict=False):
            gains.append(gain_db(model, batch.to(device), self.bank).cpu().numpy())
        found = np.concatenate(_gathered(np.concatenate(gains), self.world))
        return float(found.mean()) if len(found) else float("nan")


def _gathered(own: Any, world: int) -> list[Any]:
    if world == 1:
        return [own]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, own)
    return parts


def _separation_db(model: CSC, batch: Batch, bank: Tensor | None) -> Tensor:
    """Return what separation gains in the mixtures where every slot has a speaker."""
    rendered = render(batch.sources, batch.gains_db, batch.rooms, bank)
    mixtures, references = (part.flatten(0, 1) for part in rendered)
    gained = improvement_db(model.sources(mixtures), mixtures, references)
    full = (references.square().mean(-1) > SILENT).all(-1)
    full &= ~batch.mixit.repeat_interleave(batch.pick.shape[1])  # no voice is known there
    return gained[full]


def _mixit_db(model: CSC, batch: Batch, bank: Tensor | None) -> Tensor:
    """Return what mixtures of mixtures gain: the SNR of the two, as the outputs add up to them."""
    rendered = render(batch.sources, batch.gains_db, batch.rooms, bank)
    mixtures, two = rendered.mixtures.flatten(0, 1), rendered.references.flatten(0, 1)[:, :2]
    to_both = torch.ones(1, 1, 2, 1, device=mixtures.device)
    before = mixing_costs(mixtures.unsqueeze(1), two, to_both).squeeze(1)
    after, _ = mixit_loss(model.sources(mixtures), two)
    return (before - after)[batch.mixit.repeat_interleave(batch.pick.shape[1])]


def _extraction_db(model: CSC, batch: Batch, bank: Tensor | None) -> Tensor:
    """Return the SNR that extraction gains where the voice is there, and not alone."""
    told = asked(to_episodes(batch, bank, 0, 0))
    voices = model.extracted(told.mixtures, model.voice(told.enrolments))
    gained = snr_db(voices, told.targets) - snr_db(told.mixtures, told.targets)
    over = (told.mixtures - told.targets).square().mean(-1) > SILENT
    return gained[told.usable & told.present & over]
