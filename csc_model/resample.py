"""Waveforms at another sample rate, by a windowed sinc."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LOBES = 24  # zeros of the sinc on either side
ROLLOFF = 0.95  # of the lower half rate: where the filter ends to pass all


def resampled(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Return `(..., time)` at another rate, `ceil(time * to_hz / from_hz)` samples long.

    Raises:
        ValueError: a rate is not positive.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"a sample rate is positive: {from_hz} and {to_hz} Hz were given")
    if from_hz == to_hz:
        return waveform
    common = math.gcd(from_hz, to_hz)
    down, up = from_hz // common, to_hz // common
    kernels, width = _kernels(down, up)
    lines = waveform.reshape(-1, 1, waveform.shape[-1])
    padded = F.pad(lines, (width, width + down))
    phases = F.conv1d(padded, kernels.to(waveform), stride=down)
    length = -(-up * waveform.shape[-1] // down)
    return phases.transpose(1, 2).flatten(1)[:, :length].reshape(*waveform.shape[:-1], length)


@lru_cache(8)
def _kernels(down: int, up: int) -> tuple[Tensor, int]:
    """Return a filter for each of the `up` samples made of `down`, and how far they reach back."""
    cutoff = ROLLOFF * min(down, up)
    width = math.ceil(LOBES * down / cutoff)
    taps = torch.arange(-width, width + down, dtype=torch.float64) / down
    phases = torch.arange(up, dtype=torch.float64).unsqueeze(1) / up
    place = ((taps - phases) * cutoff).clamp(-LOBES, LOBES)
    window = torch.cos(place * math.pi / LOBES / 2).square()
    return (torch.sinc(place) * window * cutoff / down).unsqueeze(1), width
