"""What a model hears in a file, of any length, for the commands that use one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from csc_model.model import CSC
from jobs.console import Advance, progress
from pipeline.audio import load, seconds_of
from pipeline.schema import SAMPLE_RATE_HZ

WHOLE = "whole"
Vector = NDArray[np.float32]


class Listened(NamedTuple):
    """What a model hears in a file."""

    seconds: float
    names: list[str]  # of the views: slot-1, slot-2, .., whole
    vectors: Vector  # (view, dim)
    activity: Vector  # (view,)


def told_by_the_second(path: str, blocks: Iterable[Vector], advance: Advance) -> Iterator[Vector]:
    """Give the blocks of a file, `(time, ..)`, and tell how many seconds of it have come."""
    done, total = 0, seconds_of(path)
    for block in blocks:
        done += len(block)
        seconds = done // SAMPLE_RATE_HZ
        advance(seconds, max(round(total), seconds + 1))  # it may be longer than it says
        yield block


def listen(model: CSC, path: str) -> Listened:
    """Embed a file of any format, rate and length.

    Raises:
        CscError: it cannot be used; the message names it and says why.
    """
    samples = load(path)
    with progress(f"{Path(path).name}: windows") as advance:
        vectors, activity = model.embed(torch.from_numpy(samples), on_progress=advance)
    names = [f"slot-{number}" for number in range(1, len(vectors))] + [WHOLE]
    seconds = len(samples) / SAMPLE_RATE_HZ
    return Listened(seconds, names, vectors.cpu().numpy(), activity.cpu().numpy())
