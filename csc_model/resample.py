"""Waveforms at another sample rate, by a windowed sinc."""

import math
from fractions import Fraction
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST_HZ, HIGHEST_HZ = 1_000, 768_000
FINEST = 1000  # denominator: odd rates are off by a few millionths, for small filters
LOBES = 24  # zeros of the sinc on either side
ROLLOFF = 0.95  # of the lower half rate: where the filter ends to pass all


def resampled(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Return `(..., time)` at another rate, `ceil(time * to_hz / from_hz)` samples long.

    Raises:
        ValueError: a rate is none of audio.
    """
    for rate_hz in (from_hz, to_hz):
        if not LOWEST_HZ <= rate_hz <= HIGHEST_HZ:
            raise ValueError(
                f"{rate_hz} Hz is no sample rate of audio: give {LOWEST_HZ} to {HIGHEST_HZ}"
            )
    if from_hz == to_hz:
        return waveform
    up, down = Fraction(to_hz, from_hz).limit_denominator(FINEST).as_integer_ratio()
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
