"""Windows: which parts of the utterance store are read together and mixed with each other.

The store is cut into slices, runs of utterances that lie one after another. A pass draws them in a
new order and takes some at a time, so that reads are large and sequential, and what is made of one
window costs the same whatever the size of the corpus.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.draws import permutation, stream_key
from pipeline.schema import BYTES_PER_SAMPLE

Run = tuple[int, int, int]
"""Rows of an utterance shard: shard, first row, and the row after the last."""


class Slice(NamedTuple):
    """A part of the store and who speaks in it."""

    runs: list[Run]
    speakers: dict[str, int]  # with their numbers of utterances


def cut(rows: pa.Table, slice_mb: float) -> list[Slice]:
    """Cut catalogue rows into slices of about `slice_mb` of audio."""
    rows = rows.select(["shard", "row", "num_samples", "speaker_id"])
    rows = rows.sort_by([("shard", "ascending"), ("row", "ascending")])
    num_bytes = rows["num_samples"].to_numpy() * BYTES_PER_SAMPLE
    number = (np.cumsum(num_bytes) - num_bytes) // int(slice_mb * 1e6)
    edges = [*np.flatnonzero(np.diff(number, prepend=-1)).tolist(), len(rows)]
    return [_slice(rows[a:b]) for a, b in pairwise(edges)]


def _slice(rows: pa.Table) -> Slice:
    shard, row = rows["shard"].to_numpy(), rows["row"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(rows)]
    runs = [(int(shard[a]), int(row[a]), int(row[b - 1]) + 1) for a, b in pairwise(edges)]
    counts = pc.value_counts(rows["speaker_id"]).to_pylist()
    return Slice(runs, {count["values"]: count["counts"] for count in counts})


def rounds(key: int, count: int, width: int) -> Iterator[list[int]]:
    """Yield windows of `width` slices for ever: each slice once, then all again in a new order."""
    if count <= width:
        while True:
            yield list(range(count))
    turn = 0
    while True:
        places = permutation(stream_key(key, "round", turn), count)
        # The last window of a round has as many as the others, some of them a second time.
        for first in range(0, count, width):
            chosen = np.take(places, range(first, first + width), mode="wrap")
            yield sorted(chosen.tolist())
        turn += 1


def added(slices: list[Slice], chosen: Iterable[int]) -> dict[str, int]:
    """Return the speakers of some slices with their numbers of utterances."""
    total: dict[str, int] = {}
    for place in chosen:
        for name, count in slices[place].speakers.items():
            total[name] = total.get(name, 0) + count
    return total


def widened(
    chosen: list[int], slices: list[Slice], enough: Callable[[list[int]], bool]
) -> list[int]:
    """Add slices to a window, those after its last one first, until it is enough."""
    wide = list(chosen)
    for step in range(1, len(slices) + 1):
        if enough(wide):
            break
        place = (chosen[-1] + step) % len(slices)
        wide += [] if place in chosen else [place]
    return sorted(wide)


def runs_of(slices: list[Slice], chosen: list[int]) -> list[Run]:
    """Return the runs of some slices, joined where they touch."""
    joined: list[Run] = []
    for shard, first, stop in sorted(run for place in chosen for run in slices[place].runs):
        if joined and joined[-1][0] == shard and joined[-1][2] >= first:
            joined[-1] = (shard, joined[-1][1], max(stop, joined[-1][2]))
        else:
            joined.append((shard, first, stop))
    return joined


def allot(episodes: int, weights: NDArray[np.float64]) -> list[int]:
    """Share episodes out in proportion to weights, to the last one (largest remainders)."""
    exact = episodes * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: episodes - int(counts.sum())]
    counts[most] += 1
    return [int(count) for count in counts]
