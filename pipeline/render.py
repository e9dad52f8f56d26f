"""Rendering: dry sources and gains become mixtures, on whatever device they lie."""

from typing import NamedTuple

import torch
from torch import Tensor

PEAK = 0.95


class Rendered(NamedTuple):
    """Mixtures with the references that they were made of, at the same scale."""

    mixtures: Tensor  # (batch, condition, time)
    references: Tensor  # (batch, condition, speaker slot, time)


def render(sources: Tensor, gains_db: Tensor) -> Rendered:
    """Add sources up, the last slot being noise.

    `sources` is int16 `(batch, condition, slot, time)`, each on the mixture's time line, `gains_db`
    `(batch, condition, slot)` with minus infinity for an empty slot. A mixture that would clip is
    scaled down as a whole, and its references with it.
    """
    amplitude = torch.pow(10.0, gains_db.float() / 20) / 32768
    scaled = sources.float() * amplitude.unsqueeze(-1)
    mixtures = scaled.sum(2)
    peak = mixtures.abs().amax(-1, keepdim=True)
    scale = (PEAK / peak.clamp_min(1e-9)).clamp_max(1.0)
    return Rendered(mixtures * scale, scaled[:, :, :-1] * scale.unsqueeze(2))
