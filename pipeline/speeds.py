"""Voices at other speeds: each makes another speaker of everyone, as their pitch is another.

(Speed perturbation with labels of its own; Yamamoto et al., 2019.)
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor

from pipeline.draws import Draws, stream_key
from pipeline.order import Share

FINEST = 100  # speeds are taken as hundredths


def play(lines: Tensor, speed: float) -> Tensor:
    """Return float lines `(line, time)` played `speed` times as fast, as long as before.

    What a faster one lacks at its end is silence, what a slower one has over is cut off. The band
    is limited as it should be; levels stay.
    """
    if not len(lines):  # a speed that nobody drew; MKL refuses to transform nothing
        return lines
    ratio, length = Fraction(speed).limit_denominator(FINEST), lines.shape[-1]
    blocks = next_fast_len(-(-length // ratio.numerator), real=True)
    before, after = blocks * ratio.numerator, blocks * ratio.denominator
    spectrum = torch.fft.rfft(lines, before)  # pads with zeros; irfft cuts bins off, or adds them
    played = torch.fft.irfft(spectrum, after) * (after / before)
    shown = min(after, length)
    return torch.nn.functional.pad(played[..., :shown], (0, length - shown))


def draw_speeds(
    choices: int, shape: Sequence[int], seed: int, step: int, share: Share | None = None
) -> Tensor:
    """Draw which speed each source of a share of a global batch, or of all, is played at.

    int64 `(episode, condition, slot)`: 0 for the speed as it is. A target has one speed in all
    conditions of its episode. A pure function, on any number of ranks.
    """
    episodes, conditions, slots = shape
    draws = Draws(stream_key(seed, "speeds"), step)
    share = share or Share.of(episodes)
    targets = draws.fractions(share.total, 1)
    drawn = draws.fractions(share.total, conditions, slots)
    drawn[:, :, 0] = np.broadcast_to(targets, drawn.shape[:2])
    mine = drawn[share.first : share.stop]
    return torch.from_numpy((mine * (choices + 1)).astype(np.int64))


def played(sources: Tensor, which: Tensor, speeds: Sequence[float]) -> Tensor:
    """Return float sources `(episode, condition, slot, time)`, each at the speed drawn for it."""
    changed = sources.to(torch.float32, copy=True)
    for number, speed in enumerate(speeds, start=1):
        there = which == number
        changed[there] = play(changed[there], speed)
    return changed


def voices(speakers: Sequence[str], speeds: Sequence[float]) -> list[str]:
    """Return the names of all whom a model tells apart: speakers, then they at each speed."""
    return [*speakers, *(f"{name}@{speed:g}" for speed in speeds for name in speakers)]
