"""A mixture shard open for reading: its recipes' numbers in memory, its audio by row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.audio import Pcm
from pipeline.errors import CscError
from pipeline.schema import EPISODE
from pipeline.shards import damaged, open_shard
from pipeline.storage import Folder

NUMBERS = [name for name in EPISODE.names if name not in ("conditions", "sources", "pcm")]
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError)


class Lines(NamedTuple):
    """Fields of `schema.LINE`, each `(line,)`."""

    condition: NDArray[np.int16]
    slot: NDArray[np.int16]
    speaker: NDArray[np.int32]
    room: NDArray[np.int32]
    gain_db: NDArray[np.float32]
    level_dbfs: NDArray[np.float32]


class Numbers(NamedTuple):
    """The recipes of a shard, as far as training needs them."""

    episode: NDArray[np.int64]  # (episode,)
    anchor: NDArray[np.int32]  # (episode,)
    mixit: NDArray[np.bool_]  # (episode,)
    num_lines: NDArray[np.int32]  # (episode,)
    pcm: NDArray[np.uint64]  # (episode,), checksum of its audio
    lines: Lines

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Take them from rows of `schema.EPISODE`."""
        lists = table["lines"].combine_chunks()
        flat = lists.flatten()
        return cls(
            table["episode"].to_numpy(),
            table["anchor"].to_numpy(),
            table["mixit"].to_numpy(),
            lists.value_lengths().to_numpy(),
            table["checksum"].to_numpy(),
            Lines._make(flat.field(name).to_numpy() for name in Lines._fields),
        )

    def checksum(self) -> str:
        """Return a checksum of all of it."""
        digest = xxhash.xxh3_64()
        for values in (*self[:-1], *self.lines):
            digest.update(np.ascontiguousarray(values).data)
        return str(digest.hexdigest())


class Episodes(NamedTuple):
    """Some episodes: what batches are made of."""

    number: NDArray[np.int64]  # (episode,)
    anchor: NDArray[np.int32]  # (episode,), row of the speakers' table
    mixit: NDArray[np.bool_]  # (episode,)
    num_lines: NDArray[np.int32]  # (episode,)
    lines: Lines
    pcm: Pcm  # int16 (line, time)


class EpisodeShard:
    """Reads episodes of one shard; safe to be used by several threads.

    Numbers of all its recipes are read and checked at once; audio comes by row group and is checked
    when it is read for the first time.

    Raises:
        CscError: naming the shard, when it is missing, short or damaged.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        *,
        checksum: str,
        rows_per_group: int,
        num_samples: int,
    ) -> None:
        self.folder, self.name = folder, name
        self.rows_per_group, self.num_samples = rows_per_group, num_samples
        self._lock, self._good = Lock(), set[int]()
        with self._blamed():
            self._file = open_shard(folder, name)
            numbers = Numbers.of(self._file.read(columns=NUMBERS, use_threads=False))
            if numbers.checksum() != checksum:
                raise damaged(folder, name)
        self._numbers, self._bounds = numbers, np.cumsum([0, *numbers.num_lines])

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Turn whatever a damaged file leads to into an error that names it."""
        try:
            yield
        except UNREADABLE as error:
            if "AWS Error" in str(error):
                raise CscError(f"cannot read {self.folder.path(self.name)}: {error}") from error
            raise damaged(self.folder, self.name) from error

    def read(self, group: int, first: int, stop: int) -> Episodes:
        """Read episodes first, .., stop - 1 of a row group."""
        start = group * self.rows_per_group
        with self._lock, self._blamed():
            read = self._file.read_row_group(group, columns=["pcm"], use_threads=False)["pcm"]
            bounds = self._bounds[start : start + len(read) + 1]
            pcm = _audio(read).reshape(bounds[-1] - bounds[0], self.num_samples)
            if group not in self._good:
                self._check(pcm, bounds - bounds[0], start)
                self._good.add(group)
        rows = slice(start + first, start + stop)
        begin, end = int(self._bounds[rows.start]), int(self._bounds[rows.stop])
        numbers = self._numbers
        return Episodes(
            numbers.episode[rows],
            numbers.anchor[rows],
            numbers.mixit[rows],
            numbers.num_lines[rows],
            Lines._make(values[begin:end] for values in numbers.lines),
            pcm[begin - bounds[0] : end - bounds[0]],
        )

    def _check(self, pcm: Pcm, bounds: NDArray[np.int64], start: int) -> None:
        for place, (begin, end) in enumerate(pairwise(bounds.tolist())):
            if xxhash.xxh3_64_intdigest(pcm[begin:end].data) != self._numbers.pcm[start + place]:
                raise damaged(self.folder, self.name)


def _audio(column: pa.ChunkedArray) -> Pcm:
    """Return all samples of a column of PCM, as a view where it is in one piece."""
    parts = []
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset :]
        samples = np.frombuffer(chunk.buffers()[2], "<i2")
        parts.append(samples[offsets[0] // 2 : offsets[len(chunk)] // 2])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
