"""Separation and embedding of recordings of any length, in windows that overlap by one half.

Only one window goes through the model at a time, so that memory for it does not grow with the
recording. A model gives its slots in any order: each window's are put in the order of the window
before. What both say about the part they share decides; where a slot is silent there, its voice,
by the embeddings so far. All of this is ours; the signals meet in a linear cross-fade.
"""

import math
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OnProgress = Callable[[int, int], None]
"""Called with the windows done and their number."""

SHORTEST_S = 0.1  # a window's seconds, at least
SILENT = 1e-4  # share of the energy of the overlap, -40 dB: a slot below does not speak there
VOICE_WEIGHT = 0.1  # of an embedding's cosine beside a correlation: it only breaks ties


class Heard(NamedTuple):
    """What a model makes of one window."""

    sources: Tensor  # (slot, time)
    vectors: Tensor  # (slot + 1, dim), unit norm, the last of the unseparated view
    activity: Tensor  # (slot + 1,), 1 for the unseparated view


Hear = Callable[[Tensor], Heard]
"""Turns a window `(time,)` into its slots, on the device of the window or another."""


class Tracked(NamedTuple):
    """A window with its slots in the order of the recording."""

    start: int
    overlap: int  # samples that the window before holds too
    heard: Heard


def window_samples(window_s: float, sample_rate_hz: int) -> int:
    """Return the length of a window in samples.

    Raises:
        ValueError: it is shorter than `SHORTEST_S`, or infinite.
    """
    if not SHORTEST_S <= window_s < math.inf:
        raise ValueError(
            f"window_s {window_s} is too short: give {SHORTEST_S} or more, for slots are told "
            "apart by what two windows share"
        )
    return round(window_s * sample_rate_hz)


def window_starts(num_samples: int, window: int) -> list[int]:
    """Return where windows start, half a window apart; the last ends with the recording."""
    last = max(num_samples - window, 0)
    return [*range(0, last, window // 2), last]


def separate_long(
    hear: Hear, waveform: Tensor, window: int, on_progress: OnProgress | None = None
) -> Tensor:
    """Return the sources `(slot, time)` of a mixture `(time,)`, on its device."""
    sources, done = waveform.new_empty(0, 0), 0
    for piece in separated(hear, waveform, window, Voices(), on_progress):
        if not done:
            sources = piece.new_empty(len(piece), len(waveform))
        sources[:, done : done + piece.shape[-1]] = piece
        done += piece.shape[-1]
    return sources


def separated(
    hear: Hear,
    waveform: Tensor,
    window: int,
    voices: "Voices",
    on_progress: OnProgress | None = None,
) -> Iterator[Tensor]:
    """Give the sources of a mixture `(time,)` piece by piece, `(slot, time)`, on its device.

    `voices` is empty at first, and holds the means over all windows in the end.
    """
    tail = None  # what the next window has a part in
    for _, overlap, heard in track(hear, waveform, window, voices, on_progress):
        new = heard.sources.to(waveform.device)
        if tail is not None:
            before = tail.shape[-1] - overlap
            ramp = torch.arange(1, overlap + 1, device=new.device).to(new) / (overlap + 1)
            met = tail[:, before:].lerp(new[:, :overlap], ramp)
            yield tail[:, :before]
            new = torch.cat([met, new[:, overlap:]], -1)
        tail = new
    assert tail is not None  # there is a window at least
    yield tail


def embed_long(
    hear: Hear, waveform: Tensor, window: int, on_progress: OnProgress | None = None
) -> tuple[Tensor, Tensor]:
    """Return unit vectors `(slot + 1, dim)` and activity `(slot + 1,)` of a mixture `(time,)`.

    A vector is the mean of its slot's in the windows, weighted by activity and by the seconds that
    a window adds. The unseparated view counts as much as its window's most active slot: nobody
    speaks in a pause. Activity is averaged by the same weights, so it says how sure it was that
    there was a speaker where the vector comes from, and few words in an hour are enough.
    """
    voices = Voices()
    for _ in track(hear, waveform, window, voices, on_progress):
        pass  # a window has been counted once it is tracked
    return voices.mean()


class Voices:
    """Running means over windows."""

    def __init__(self) -> None:
        self.vectors = self.activity = self.weight = torch.zeros(())

    def add(self, window: Tracked) -> None:
        """Count a window in."""
        _, vectors, activity = window.heard
        added = window.heard.sources.shape[-1] - window.overlap
        weight = added * torch.cat([activity[:-1], activity[:-1].amax(0, keepdim=True)])
        self.vectors = self.vectors.to(vectors) + weight.unsqueeze(-1) * vectors
        self.activity = self.activity.to(activity) + weight * activity
        self.weight = self.weight.to(weight) + weight

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return unit vectors `(slot + 1, dim)` and activity `(slot + 1,)`."""
        return F.normalize(self.vectors, dim=-1), self.activity / self.weight.clamp_min(1e-12)


def track(
    hear: Hear, waveform: Tensor, window: int, voices: Voices, on_progress: OnProgress | None
) -> Iterator[Tracked]:
    """Hear window after window, each with its slots in the order of the first one's.

    `voices` is empty at first, and holds the means over all windows that have come.
    """
    starts, before = window_starts(len(waveform), window), None
    for number, start in enumerate(starts):
        heard = hear(waveform[start : start + window])
        overlap = 0
        if before is not None:
            overlap = before.start + window - start
            tail = before.heard.sources[:, window - overlap :]
            known = voices.mean()[0][:-1]
            heard = reorder(heard, match(tail, heard.sources[:, :overlap], known, heard.vectors))
        before = Tracked(start, overlap, heard)
        voices.add(before)
        if on_progress is not None:
            on_progress(number + 1, len(starts))
        yield before


def match(tail: Tensor, head: Tensor, known: Tensor, vectors: Tensor) -> list[int]:
    """Return which new slot goes on with each slot so far.

    `tail` and `head` `(slot, time)` are the same stretch as heard before and now, `known` and
    `vectors` `(slot, dim)` the unit vectors so far and now.
    """
    slots = len(tail)
    correlation = F.normalize(tail, dim=-1) @ F.normalize(head, dim=-1).T
    speaks = _speaks(tail).unsqueeze(1) & _speaks(head)
    gain = torch.where(speaks, correlation, VOICE_WEIGHT * (known @ vectors[:slots].T)).cpu()
    orders = torch.tensor(list(permutations(range(slots))))
    return orders[gain[torch.arange(slots), orders].sum(-1).argmax()].tolist()


def _speaks(sources: Tensor) -> Tensor:
    energy = sources.square().sum(-1)
    return energy > SILENT * energy.sum()


def reorder(heard: Heard, order: list[int]) -> Heard:
    """Put slots in the given order; the unseparated view stays the last."""
    views = [*order, len(order)]
    return Heard(heard.sources[order], heard.vectors[views], heard.activity[views])
