"""Rendering: dry sources and gains become mixtures, on whatever device they lie."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from scipy.fft import next_fast_len
from torch import Tensor

PEAK = 0.95
FULL_SCALE = 32768


class Rendered(NamedTuple):
    """Mixtures with the references that they were made of, at the same scale."""

    mixtures: Tensor  # (batch, condition, time)
    references: Tensor  # (batch, condition, speaker slot, time)


def bank_of(table: pa.Table) -> Tensor:
    """Return the responses of `schema.ROOMS`, int16 `(room, time)`."""
    cells = table["pcm"]
    return torch.from_numpy(np.stack([np.frombuffer(cell.as_buffer(), "<i2") for cell in cells]))


def render(
    sources: Tensor, gains_db: Tensor, rooms: Tensor | None = None, bank: Tensor | None = None
) -> Rendered:
    """Add sources up, the last slot being noise.

    `sources` is int16 `(batch, condition, slot, time)`, each on the mixture's time line, `gains_db`
    `(batch, condition, slot)` with minus infinity for an empty slot. Where `rooms`, of that shape,
    is not negative, a source sounds in the room of that row of `bank`, int16 `(room, time)`. A
    mixture that would clip is scaled down as a whole, and its references with it.
    """
    amplitude = torch.pow(10.0, gains_db.float() / 20) / FULL_SCALE
    scaled = sources.float() * amplitude.unsqueeze(-1)
    if rooms is not None and bank is not None:
        inside = rooms >= 0
        scaled[inside] = reverberate(scaled[inside], bank[rooms[inside]].float())
    mixtures = scaled.sum(2)
    peak = mixtures.abs().amax(-1, keepdim=True)
    scale = (PEAK / peak.clamp_min(1e-9)).clamp_max(1.0)
    return Rendered(mixtures * scale, scaled[:, :, :-1] * scale.unsqueeze(2))


def mix(lines: Tensor, pick: Tensor, gains_db: Tensor) -> Tensor:
    """Return the mixtures that `render` makes, on the CPU and without their references.

    `lines` is int16 `(line, time)`, `pick` `(batch, condition, slot)` says which of them, -1 for
    none. Several times as fast: each sample is touched while it is in the processor's cache.
    """
    dry, amplitude = lines.numpy(), np.float32(10.0) ** (gains_db.numpy() / 20) / FULL_SCALE
    mixtures = np.empty((*pick.shape[:2], lines.shape[-1]), np.float32)
    scaled = np.empty(lines.shape[-1], np.float32)
    for place in np.ndindex(*pick.shape[:2]):
        mixture, empty = mixtures[place], True
        for line, gain in zip(pick[place].tolist(), amplitude[place], strict=True):
            if line >= 0:
                into = mixture if empty else scaled
                np.copyto(into, dry[line])
                into *= gain
                if not empty:
                    mixture += scaled
                empty = False
        if empty:
            mixture[:] = 0
        peak = max(mixture.max(), -mixture.min())
        if peak > PEAK:
            mixture *= PEAK / peak
    return torch.from_numpy(mixtures)


def reverberate(dry: Tensor, responses: Tensor) -> Tensor:
    """Convolve each of `(source, time)` with its response, and keep its length and its power.

    What has the same power as before has the same SIR and SNR.
    """
    size = next_fast_len(dry.shape[-1] + responses.shape[-1] - 1, real=True)
    spectrum = torch.fft.rfft(dry, size) * torch.fft.rfft(responses, size)
    wet = torch.fft.irfft(spectrum, size)[..., : dry.shape[-1]]
    power = dry.square().sum(-1, keepdim=True) / wet.square().sum(-1, keepdim=True).clamp_min(1e-20)
    return wet * power.sqrt()
