"""Mixtures that are taken out of shards sound as they do in training."""

import numpy as np
import torch

from pipeline.exchange.unpack import Mixture, signals


def test_rooms_sound_in_what_is_exported() -> None:
    dry = np.random.default_rng(0).integers(-9000, 9000, (2, 800)).astype("<i2")
    bank = np.zeros((2, 40), "<i2")
    bank[1, [0, 9]] = 30_000, 12_000
    lines = [{"slot": slot, "gain_db": -6.0, "room": slot} for slot in (0, 1)]
    mixture = Mixture("train-00000000-0", False, {}, [], lines, dry, 2)
    made = {
        name: pcm.astype(np.float64) for name, pcm in signals(mixture, torch.tensor(bank)).items()
    }
    wet = np.convolve(dry[1], bank[1].astype(np.float64))[:800]
    wet *= np.sqrt((dry[1].astype(np.float64) ** 2).sum() / (wet**2).sum()) * 10 ** (-6 / 20)
    assert np.abs(made["s2"] - wet).max() <= 1
    assert np.abs(made["mixture"] - made["s1"] - made["s2"]).max() <= 2
