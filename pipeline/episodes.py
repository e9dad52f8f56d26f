"""A mixture shard open for reading: its recipes' numbers in memory, its audio by row groups."""

import base64
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.audio import Pcm
from pipeline.commits import ShardRecord
from pipeline.errors import CscError
from pipeline.nearby import Nearby
from pipeline.schema import EPISODE
from pipeline.shards import damaged, open_shard
from pipeline.storage import Folder

NUMBERS = [name for name in EPISODE.names if name not in ("conditions", "sources", "pcm")]
FOOTER_KEY = b"csc.numbers"
UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError)


class Lines(NamedTuple):
    """Fields of `schema.LINE`, each `(line,)`."""

    condition: NDArray[np.int16]
    slot: NDArray[np.int16]
    speaker: NDArray[np.int32]
    room: NDArray[np.int32]
    fixed: NDArray[np.bool_]
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
            Lines._make(flat.field(name).to_numpy(zero_copy_only=False) for name in Lines._fields),
        )

    @classmethod
    def read(cls, file: pq.ParquetFile) -> Self:
        """Take them from a shard's footer, where one read finds them all."""
        packed = (file.metadata.metadata or {})[FOOTER_KEY]
        with pa.ipc.open_stream(base64.b85decode(packed)) as stream:
            return cls.of(stream.read_all())

    @staticmethod
    def packed(table: pa.Table) -> dict[bytes, bytes]:
        """Return what goes into the footer of a shard with these rows."""
        numbers = table.select(NUMBERS)
        sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, numbers.schema, options=options) as stream:
            stream.write_table(numbers)
        return {FOOTER_KEY: base64.b85encode(sink.getvalue())}

    def checksum(self) -> str:
        """Return a checksum of all of it."""
        digest = xxhash.xxh3_64()
        for values in (*self[:-1], *self.lines):
            digest.update(np.ascontiguousarray(values).data)
        return str(digest.hexdigest())


def account(table: pa.Table, voices: Collection[int]) -> dict[str, Any]:
    """Return what the completion record says of a shard with these rows; `voices` are speakers.

    Their first and last row are enough, as the rows of a split follow each other.
    """
    return {"speakers": [min(voices), max(voices)], "numbers": Numbers.of(table).checksum()}


def listed(record: ShardRecord) -> dict[str, Any]:
    """Return what the index says of a shard: who speaks in it is for its own record to say."""
    return record._replace(about={"numbers": (record.about or {})["numbers"]}).as_json()


class Episodes(NamedTuple):
    """Some episodes: what batches are made of."""

    number: NDArray[np.int64]  # (episode,)
    anchor: NDArray[np.int32]  # (episode,), row of the speakers' table
    mixit: NDArray[np.bool_]  # (episode,)
    num_lines: NDArray[np.int32]  # (episode,)
    lines: Lines
    pcm: list[Pcm]  # of each episode, int16 (line, time)


class EpisodeShard:
    """Reads episodes of one shard; safe to be used by several threads.

    Numbers of all its recipes are read with the footer and checked; audio comes by row group and is
    checked when it is read for the first time.

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
        nearby: Nearby | None = None,
    ) -> None:
        self.folder, self.name, self.nearby = folder, name, nearby
        self.rows_per_group, self.num_samples = rows_per_group, num_samples
        self._lock, self._good = Lock(), set[int]()
        with self._blamed():
            self._source = source = folder.open_input(name)
            self._mapped = None
            if folder.is_local:  # nothing is read by that
                self._mapped = memoryview(source.read_buffer(source.size()))
            self._file = open_shard(folder, name, source)
            numbers = Numbers.read(self._file)
            if numbers.checksum() != checksum:
                raise damaged(folder, name)
        self._numbers = numbers
        self._bounds = np.cumsum([0, *numbers.num_lines])

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Turn whatever a damaged file leads to into an error that names it."""
        try:
            yield
        except pa.ArrowMemoryError:
            raise
        except UNREADABLE as error:
            if not self.folder.is_local and isinstance(error, OSError):
                raise CscError(
                    f"cannot read {self.folder.path(self.name)}: {error}; if the store answers, "
                    "csc check says whether the shard is damaged"
                ) from error
            raise damaged(self.folder, self.name) from error

    def read(self, group: int, first: int, stop: int) -> Episodes:
        """Read episodes first, .., stop - 1 of a row group."""
        start, count = group * self.rows_per_group, len(self._numbers.episode)
        here = range(start, min(start + self.rows_per_group, count))
        with self._lock, self._blamed():
            pcm = self._in_place(group, here) or self._copied(group, here)
            if group not in self._good:
                if self.nearby is not None and not self._is_whole(pcm, here):
                    self.nearby.drop(self.folder.path(self.name), group)
                    pcm = self._copied(group, here)
                if not self._is_whole(pcm, here):
                    raise damaged(self.folder, self.name)
                self._good.add(group)
        rows = slice(start + first, start + stop)
        lines = slice(*self._bounds[[rows.start, rows.stop]].tolist())
        numbers = self._numbers
        return Episodes(
            numbers.episode[rows],
            numbers.anchor[rows],
            numbers.mixit[rows],
            numbers.num_lines[rows],
            Lines._make(values[lines] for values in numbers.lines),
            pcm[first:stop],
        )

    def _is_whole(self, pcm: list[Pcm], rows: range) -> bool:
        sums = (xxhash.xxh3_64_intdigest(samples.data) for samples in pcm)
        return [*sums] == self._numbers.pcm[rows.start : rows.stop].tolist()

    def _page(self, group: int) -> memoryview | None:
        """Return the bytes of a row group's audio, if they are on this node or are to be kept."""
        if self._mapped is None and self.nearby is None:
            return None
        chunk = self._file.metadata.row_group(group).column(self._file.metadata.num_columns - 1)
        begin, size = chunk.data_page_offset, chunk.total_compressed_size
        if self._mapped is not None:
            return self._mapped[begin : begin + size]
        assert self.nearby is not None, "asked above"
        address = self.folder.path(self.name)
        return self.nearby.get(address, group, size, lambda: self._source.read_at(size, begin))

    def _in_place(self, group: int, rows: range) -> list[Pcm] | None:
        """Return the audio of a row group as views of its page, or None where it is not as plain.

        A page of plain values ends with them: each its length in four bytes, and its bytes.
        """
        page = self._page(group)
        if page is None:
            return None
        found, end = [], len(page)
        for row in reversed(rows):
            size = 2 * self.num_samples * int(self._numbers.num_lines[row])
            begin = end - size
            if begin < 4 or int.from_bytes(page[begin - 4 : begin], "little") != size:
                return None
            found.append(np.frombuffer(page[begin:end], "<i2").reshape(-1, self.num_samples))
            end = begin - 4
        return found[::-1]

    def _copied(self, group: int, rows: range) -> list[Pcm]:
        """Return the audio of a row group as Arrow reads it."""
        column = self._file.read_row_group(group, columns=["pcm"], use_threads=False)["pcm"]
        if len(column) != len(rows):
            raise damaged(self.folder, self.name)
        return [
            np.frombuffer(cell.as_buffer(), "<i2").reshape(num_lines, self.num_samples)
            for cell, num_lines in zip(column, self._numbers.num_lines[rows.start :], strict=False)
        ]
