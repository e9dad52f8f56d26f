"""Signals that come in blocks, through what hears a stretch at a time: bounded memory and delay."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

CONTEXT_S, CHUNK_S, LOOK_AHEAD_S = 4.0, 8.0, 4.0  # of a stretch, where nothing else is asked for
FADE_S = 0.02  # over which one stretch gives way to the next

Process = Callable[[Tensor], Tensor]
"""Turns a stretch `(time,)` into another of its length."""


class Pace(NamedTuple):
    """What is heard for each chunk that is given back, in samples."""

    context: int  # heard again, before the chunk
    chunk: int
    look_ahead: int  # heard behind it: it is given back that much later
    fade: int

    @classmethod
    def of(cls, sample_rate_hz: int, context_s: float, chunk_s: float, look_ahead_s: float) -> Self:
        """Return the pace of some seconds.

        Raises:
            ValueError: a time is negative, or the chunk none.
        """
        if min(context_s, look_ahead_s) < 0 or not chunk_s > 0:
            raise ValueError(
                f"context {context_s} s, chunk {chunk_s} s, look-ahead {look_ahead_s} s: the chunk "
                "must be longer than nothing, the others no less"
            )
        samples = (round(s * sample_rate_hz) for s in (context_s, chunk_s, look_ahead_s))
        context, chunk, look_ahead = samples
        fade = min(round(FADE_S * sample_rate_hz), look_ahead, chunk)
        return cls(context, max(chunk, 1), look_ahead, fade)


def streamed(process: Process, blocks: Iterable[Tensor], pace: Pace) -> Iterator[Tensor]:
    """Give back a signal that comes in blocks `(time,)`, chunk by chunk and as long as it is.

    Each chunk is heard with its context and look-ahead; it fades in over what the stretch before
    made of the same moment. The delay is a chunk and the look-ahead.
    """
    held, given, tail = torch.empty(0), 0, torch.empty(0)
    for block in blocks:
        held = torch.cat([held.to(block), block])
        while len(held) - given >= pace.chunk + pace.look_ahead:
            end = given + pace.chunk
            made = process(held[: end + pace.look_ahead])
            yield _faded(tail, made[given:end])
            tail, forget = made[end : end + pace.fade], max(end - pace.context, 0)
            held, given = held[forget:], end - forget
    if len(held) > given:
        yield _faded(tail, process(held)[given:])


def _faded(tail: Tensor, head: Tensor) -> Tensor:
    """Let what follows fade in over what was made of the same samples before."""
    met, tail = min(len(tail), len(head)), tail.to(head)
    ramp = torch.arange(1, met + 1, device=head.device).to(head) / (met + 1)
    return torch.cat([tail[:met].lerp(head[:met], ramp), head[met:]])
