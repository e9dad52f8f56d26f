"""What the rows of a mixture shard must be: whole, of one split, and at one with themselves."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.datasets import Dataset
from pipeline.episodes import NUMBERS, Numbers
from pipeline.schema import BYTES_PER_SAMPLE, EPISODE, ROOMS_FILE, SPEAKERS_FILE

Found = tuple[str, NDArray[np.int64]]
"""A fault, and in which rows it is."""


class Known(NamedTuple):
    """What rows are compared with; None where that is not to be had."""

    speakers: pa.Table | None  # schema.SPEAKERS
    stored: Mapping[str, str] | None  # split of each speaker and noise recording of the store
    rooms: NDArray[np.object_] | None  # split of each row of ROOMS_FILE
    forgotten: frozenset[str]  # utterances that were removed on request

    @property
    def splits(self) -> dict[str, str]:
        """Return the split of each speaker of the dataset."""
        if self.speakers is None:
            return {}
        names, splits = (self.speakers[name].to_pylist() for name in ("speaker_id", "split"))
        return dict(zip(names, splits, strict=True))


class Seen(NamedTuple):
    """What a shard was found to hold."""

    faults: list[str]
    numbers: NDArray[np.int64]  # of its episodes
    checksum: str  # of what training reads of its recipes
    voices: frozenset[str]  # speakers that are heard


class _Flat(NamedTuple):
    """The structs in a list column of some rows, one after another."""

    row: NDArray[np.int64]  # which of the rows each is in
    items: pa.StructArray

    @classmethod
    def of(cls, table: pa.Table, column: str) -> "_Flat":
        lists = table[column].combine_chunks()
        counts = lists.value_lengths().to_numpy()
        return cls(np.repeat(np.arange(len(table)), counts), lists.flatten())

    def column(self, field: str) -> NDArray[Any]:
        return np.asarray(self.items.field(field).to_numpy(zero_copy_only=False))

    def place(self) -> NDArray[np.int64]:
        """Return a number for each that is the same where row, condition and slot are."""
        condition, slot = (self.column(name).astype(np.int64) for name in ("condition", "slot"))
        return (self.row << 32) + (condition << 16) + slot


def look_through(path: Path, split: str, known: Known, dataset: Dataset) -> Seen:
    """Read a shard by row groups, with the checksums of its pages, and look at each row.

    Raises:
        pa.ArrowException, OSError, ValueError, KeyError: it is no whole shard.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(EPISODE):
            raise ValueError("its columns are not those of a mixture shard")
        look = _Look(split, known, dataset)
        for group in range(file.num_row_groups):
            look.at(file.read_row_group(group, use_threads=False))
        checksum = Numbers.of(file.read(columns=NUMBERS, use_threads=False)).checksum()
    numbers = np.concatenate([np.empty(0, np.int64), *look.numbers])
    return Seen(look.faults(), numbers, checksum, frozenset(look.voices))


class _Look:
    """What is found in a shard; the same fault of many rows is told once, with their number."""

    def __init__(self, split: str, known: Known, dataset: Dataset) -> None:
        self.split, self.known = split, known
        self.num_samples = dataset.num_samples
        self.noise_slot = dataset.config.mixing.num_slots - 1
        self.splits = known.splits
        self.numbers: list[NDArray[np.int64]] = []
        self.voices: set[str] = set()
        self._faults: dict[str, list[int]] = {}

    def faults(self) -> list[str]:
        return [
            f"{what}: episode {rows[0]}" + (f" and {len(rows) - 1} more" if rows[1:] else "")
            for what, rows in self._faults.items()
        ]

    def at(self, table: pa.Table) -> None:
        """Look at the rows of a row group."""
        number = table["episode"].to_numpy()
        self.numbers.append(number)
        sources, lines = _Flat.of(table, "sources"), _Flat.of(table, "lines")
        found = [
            *self._audio(table, sources, lines),
            *self._speakers(sources),
            *self._rooms(sources),
            *self._labels(table, sources, lines),
        ]
        for what, rows in found:
            if len(rows):
                self._faults.setdefault(what, []).extend(number[np.unique(rows)].tolist())

    def _audio(self, table: pa.Table, sources: _Flat, lines: _Flat) -> Iterator[Found]:
        counts = np.bincount(lines.row, minlength=len(table))
        cells = [cell.as_buffer() for cell in table["pcm"]]
        sums = table["checksum"].to_pylist()
        other = [xxhash.xxh3_64_intdigest(cell) != sums[row] for row, cell in enumerate(cells)]
        sizes = np.array([cell.size for cell in cells])
        lengths = sizes // np.maximum(counts * BYTES_PER_SAMPLE, 1)
        if self.num_samples is not None:
            lengths[:] = self.num_samples
        end = sources.column("onset").astype(np.int64) + sources.column("num_samples")
        yield "audio that is not what its checksum is of", np.flatnonzero(other)
        odd = sizes != counts * lengths * BYTES_PER_SAMPLE
        yield "audio that is not as long as its lines", np.flatnonzero(odd)
        yield "a source that ends after its mixture", sources.row[end > lengths[sources.row]]

    def _speakers(self, sources: _Flat) -> Iterator[Found]:
        names = sources.column("speaker_id")
        _, group, size = np.unique(sources.place(), return_inverse=True, return_counts=True)
        # What stands alone in the last slot is noise, several together are babble.
        heard = (sources.column("slot") < self.noise_slot) | (size[group] > 1)
        here = set(names[heard].tolist())
        self.voices |= here
        for name in sorted(set(names.tolist())):
            what = self._fault(name, name in here)
            if what:
                yield what, sources.row[names == name]
        gone = np.isin(sources.column("utterance_id").astype(str), sorted(self.known.forgotten))
        yield "audio that csc forget was to remove", sources.row[gone]

    def _fault(self, name: str, heard: bool) -> str | None:
        """Say what is wrong with somebody's being in a mixture of this split."""
        stored = self.known.stored
        split = (stored or {}).get(name) or self.splits.get(name, self.split)
        if split != self.split:
            return f"{name} of split {split!r} in a mixture of {self.split!r}"
        if stored is not None and name not in stored:
            return f"{name}, who is not in the store, in a mixture"
        if heard and self.known.speakers is not None and name not in self.splits:
            return f"{name}, who is not in {SPEAKERS_FILE}, in a mixture"
        return None

    def _rooms(self, sources: _Flat) -> Iterator[Found]:
        room, splits = sources.column("room").astype(np.int64), self.known.rooms
        if splits is None:
            return
        outside = room >= len(splits)
        inside = (room >= 0) & ~outside
        foreign = np.zeros(len(room), bool)
        foreign[inside] = splits[room[inside]] != self.split
        yield f"a room that {ROOMS_FILE} does not have", sources.row[outside]
        yield "a room of another split", sources.row[foreign]

    def _labels(self, table: pa.Table, sources: _Flat, lines: _Flat) -> Iterator[Found]:
        """Compare what training reads of a recipe, its lines, with the recipe."""
        there, first = np.unique(sources.place(), return_index=True)
        wanted = lines.place()
        unique, counts = np.unique(wanted, return_counts=True)
        odd = np.concatenate([np.setxor1d(unique, there), unique[counts > 1]])
        yield "lines that are not those of its sources", odd >> 32
        if len(odd) or self.known.speakers is None:
            return
        labels, names = (
            lines.column("speaker").astype(np.int64),
            np.array([*self.splits, None], object),
        )
        source = first[np.searchsorted(there, wanted)]
        named = names[np.clip(labels, -1, len(names) - 1)]
        wrong = (labels >= 0) & (named != sources.column("speaker_id")[source])
        yield f"a line labelled as somebody else of {SPEAKERS_FILE}", lines.row[wrong]
        anchors = names[np.clip(table["anchor"].to_numpy(), -1, len(names) - 1)]
        foreign = [self.splits.get(name) != self.split for name in anchors]
        yield "an anchor that is no speaker of its split", np.flatnonzero(foreign)
