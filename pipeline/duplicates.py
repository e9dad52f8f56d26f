"""The same recording again, whatever was done to it: which rows to drop from a store.

Fingerprints that share a key (see `fingerprint`) are candidates; either key may have its weakest
bit wrong. Where the key stands in each tells how they lie on each other, and the frames that
coincide are compared by their bit error rate. A row is a duplicate when this is too low for chance
over at least half of the shorter segment. Memory grows as the number of keys does, and so does the
time at most: a key is compared with no more than BUCKET_HEADS others, however common a sound is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.fingerprint import FRAME_BITS, FRAME_HOPS, PATCH, PLACE_HOPS, WEAK_BITS, Words

Indices = NDArray[np.int64]

BUCKET_HEADS = 16  # the first ones, since those are the rows that are kept
KEYS_PER_PASS = 1 << 24
PAIRS_PER_PASS = 1 << 16
PATCH_FRAMES = PATCH // FRAME_HOPS
PROBES = 16
MAX_PROBE_ERROR = 0.32
# Copies have bit error rates of 0.03 to 0.15, by codec and noise; two recordings have about 0.4,
# spread wider the fewer frames there are. On 1,540 recordings no pair with similar keys came below
# MAX_ERROR - 0.73 / sqrt(frames), and the tail falls to a tenth with each 0.25 more.
MAX_ERROR = 0.3
SPREAD = 0.9


class Table(NamedTuple):
    """All fingerprints as one array, and where the parts of each row lie in it."""

    words: Words
    first_key: Indices  # (row + 1,): number of the first key of a row among all keys
    row_of_key: NDArray[np.int32]  # (key,)
    keys_at: Indices  # (row,): its place in words
    frames_at: Indices  # (row,)
    num_frames: Indices  # (row,)


class Pairs(NamedTuple):
    """Rows that may be the same: frame i of the later lies on frame i + shift of the earlier."""

    later: Indices
    earlier: Indices
    shift: Indices

    def take(self, chosen: NDArray[np.bool_]) -> "Pairs":
        return Pairs(self.later[chosen], self.earlier[chosen], self.shift[chosen])


def near_duplicates(
    fingerprints: pa.Array | pa.ChunkedArray, first_new: int = 0
) -> NDArray[np.int64]:
    """Return for each row the earlier row that it is a copy of, or -1 where it is to be kept.

    The earlier row is the first one that is itself kept. Rows before `first_new` are kept as they
    are, whatever they resemble. The result depends on nothing but the rows and their order.
    """
    table = _read(fingerprints)
    original = np.full(len(table.keys_at), -1)
    for later, earlier in _matches(table, first_new):
        if original[later] < 0 and original[earlier] < 0:
            original[later] = earlier
    return original


def _matches(table: Table, first_new: int) -> Indices:
    """Return (later, earlier) of all rows found to be the same: (pair, 2), sorted, each once."""
    found = [np.zeros((0, 2), np.int64)]
    last_found = np.full(len(table.keys_at), -1)  # most copies share many keys: compare them once
    for pairs in _candidates(table, first_new):
        due = (pairs.earlier < pairs.later) & (pairs.earlier != last_found[pairs.later])
        found.append(_verified(table, pairs.take(due)))
        last_found[found[-1][:, 0]] = found[-1][:, 1]
    return np.unique(np.concatenate(found), axis=0)


def _read(fingerprints: pa.Array | pa.ChunkedArray) -> Table:
    chunks = getattr(fingerprints, "chunks", [fingerprints])
    parts = [chunk.cast(pa.large_binary()).fill_null(b"") for chunk in chunks]
    array = pa.concat_arrays([*parts, pa.array([b"\0\0"], pa.large_binary())])  # never no data
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset :][: len(array)] // 2
    words = np.frombuffer(data, "<u2")
    num_keys = np.where(np.diff(bounds) > 0, words[bounds[:-1]], 0).astype(np.int64)
    frames_at = bounds[:-1] + 1 + 3 * num_keys
    num_frames = np.maximum(bounds[1:] - frames_at, 0)
    first_key = np.concatenate([[0], np.cumsum(num_keys)])
    row_of_key = np.repeat(np.arange(len(num_keys), dtype=np.int32), num_keys)
    return Table(words, first_key, row_of_key, bounds[:-1] + 1, frames_at, num_frames)


def _spans(starts: Indices, lengths: Indices) -> Indices:
    """Return the numbers from each start on, as many as its length, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _lookup(table: Table, keys: Indices) -> tuple[Indices, Indices]:
    """Return the row of each key and its place in time."""
    row = table.row_of_key[keys].astype(np.int64)
    num_keys = table.first_key[row + 1] - table.first_key[row]
    at = table.keys_at[row] + 2 * num_keys + keys - table.first_key[row]
    return row, (table.words[at] >> WEAK_BITS).astype(np.int64)


def _keys(table: Table) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return all keys of all rows, as they are and with the weakest bit turned over."""
    plain = np.empty(table.first_key[-1], np.uint32)
    turned = np.empty_like(plain)
    for start in range(0, len(table.keys_at), PAIRS_PER_PASS):
        bounds = table.first_key[start : start + PAIRS_PER_PASS + 1]
        lengths = np.diff(bounds)
        at = _spans(table.keys_at[start : start + PAIRS_PER_PASS], lengths)
        step = np.repeat(lengths, lengths)
        low, high, mark = (table.words[at + part * step] for part in range(3))
        keys = low | high.astype(np.uint32) << 16
        plain[bounds[0] : bounds[-1]] = keys
        turned[bounds[0] : bounds[-1]] = keys ^ (np.uint32(1) << (mark & (1 << WEAK_BITS) - 1))
    return plain, turned


def _candidates(table: Table, first_new: int) -> Iterator[Pairs]:
    """Find new rows that share a key with an earlier row, part of the keys at a time."""
    keys = _keys(table)
    first_key = table.first_key[min(first_new, len(table.keys_at))]
    passes = -(-2 * len(keys[0]) // KEYS_PER_PASS)
    for part in range(passes):
        places = [np.flatnonzero(_scatter(each) % passes == part) for each in keys]
        entries = [
            each[place].astype(np.uint64) << 32 | place.astype(np.uint64)
            for each, place in zip(keys, places, strict=True)
        ]
        for later, earlier in _shared(np.sort(np.concatenate(entries)), first_key):
            row, time = _lookup(table, later)
            other, other_time = _lookup(table, earlier)
            yield Pairs(row, other, (other_time - time) * PLACE_HOPS // FRAME_HOPS)


def _scatter(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Spread keys evenly over numbers (multiplicative hashing: Knuth, TAOCP 3, 6.4)."""
    return keys * np.uint32(2654435769) >> np.uint32(16)


def _shared(entries: NDArray[np.uint64], first_new: int) -> Iterator[tuple[Indices, Indices]]:
    """Pair the number of each new entry with those of the first entries of the same key.

    An entry is a key and, in the lower 32 bits, its number; entries are sorted.
    """
    value = entries >> np.uint64(32)
    number = (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    begins = np.concatenate([[True], value[1:] != value[:-1]])[: len(entries)]
    head = np.maximum.accumulate(np.where(begins, np.arange(len(entries)), 0))
    place = np.flatnonzero(number >= first_new)
    head = head[place]
    for lag in range(BUCKET_HEADS):
        beyond = place > head + lag
        place, head = place[beyond], head[beyond]
        for start in range(0, len(place), PAIRS_PER_PASS):
            some = slice(start, start + PAIRS_PER_PASS)
            yield number[place[some]], number[head[some] + lag]


def _overlap(table: Table, pairs: Pairs) -> tuple[Indices, Indices]:
    """Return the first frame of the later row that has a counterpart, and how many have one."""
    first = np.maximum(0, -pairs.shift)
    last = np.minimum(table.num_frames[pairs.later], table.num_frames[pairs.earlier] - pairs.shift)
    return first, last - first


def _verified(table: Table, pairs: Pairs) -> Indices:
    """Return (later, earlier) of the pairs that are duplicates: (pair, 2), sorted, each once."""
    likely = pairs.take(_long_enough(table, pairs))
    likely = likely.take(_probe(table, likely))
    distinct = np.unique(np.stack(likely, axis=1), axis=0)
    # Places are rounded, and a copy may begin in the middle of a frame.
    near = np.concatenate([distinct + np.array([0, 0, step]) for step in (-1, 0, 1)])
    shifted = Pairs(*near.T)
    shifted = shifted.take(_long_enough(table, shifted))
    same = shifted.take(_match(table, shifted))
    return np.unique(np.stack([same.later, same.earlier], axis=1), axis=0)


def _long_enough(table: Table, pairs: Pairs) -> NDArray[np.bool_]:
    """Tell whether half of the shorter segment is common; the last frame lasts a whole patch."""
    _, common = _overlap(table, pairs)
    shorter = np.minimum(table.num_frames[pairs.later], table.num_frames[pairs.earlier])
    return (common > 0) & (2 * (common + PATCH_FRAMES) >= shorter + PATCH_FRAMES)


def _probe(table: Table, pairs: Pairs) -> NDArray[np.bool_]:
    """Tell whether some frames spread over the overlap agree: most chance pairs end here."""
    first, common = _overlap(table, pairs)
    at = first[:, None] + np.arange(PROBES) * common[:, None] // PROBES
    wrong, compared = _compare(
        table,
        table.frames_at[pairs.later][:, None] + at,
        (table.frames_at[pairs.earlier] + pairs.shift)[:, None] + at,
    )
    return wrong.sum(axis=1) <= MAX_PROBE_ERROR * FRAME_BITS * compared.sum(axis=1)


def _match(table: Table, pairs: Pairs) -> NDArray[np.bool_]:
    """Tell whether the bit error rate over the whole overlap is too low for chance."""
    if not len(pairs.later):
        return np.zeros(0, np.bool_)
    first, common = _overlap(table, pairs)
    wrong, compared = _compare(
        table,
        _spans(table.frames_at[pairs.later] + first, common),
        _spans(table.frames_at[pairs.earlier] + pairs.shift + first, common),
    )
    begins = np.cumsum(common) - common
    frames = np.add.reduceat(compared, begins, dtype=np.int64)
    errors = np.add.reduceat(wrong, begins, dtype=np.int64)
    # errors / bits < MAX_ERROR - SPREAD / sqrt(frames)
    return errors < FRAME_BITS * (MAX_ERROR * frames - SPREAD * np.sqrt(frames))


def _compare(
    table: Table, later_at: Indices, earlier_at: Indices
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the wrong bits of frames, and where there is sound in both so that they count."""
    later, earlier = table.words[later_at], table.words[earlier_at]
    compared = (later != 0) & (earlier != 0)
    return np.bitwise_count(later ^ earlier) * compared, compared
