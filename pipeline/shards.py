"""Parquet shards: the same bytes for the same rows, row groups that can be read alone."""

import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audio import Pcm
from pipeline.errors import CscError
from pipeline.schema import CATALOGUE
from pipeline.storage import Folder

INDEX = "index.json"
CATALOGUE_FILE = "utterances.parquet"
ONE_PAGE = 1 << 30  # bytes: more than any row group has


def encode(table: pa.Table, rows_per_group: int) -> bytes:
    """Serialise a shard whose audio is in memory."""
    sink = pa.BufferOutputStream()
    with shard_writer(sink, table.schema) as writer:
        writer.write_table(table, row_group_size=rows_per_group)
    return sink.getvalue().to_pybytes()


def shard_writer(where: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a shard for writing by row groups.

    Audio stays uncompressed: noise-like samples gain little and cost time; and a row group of it is
    one page, so that it can be read in place. Only numbers of shards have statistics, so that a
    part can be found in a long table.
    """
    compact = _leaves(schema, but=("pcm", "fingerprint"))
    return pq.ParquetWriter(
        where,
        schema,
        compression=dict.fromkeys(compact, "zstd"),
        use_dictionary=compact,
        data_page_size=ONE_PAGE,
        write_statistics=["shard"] if "shard" in schema.names else False,
    )


def _leaves(schema: pa.Schema, but: Collection[str]) -> list[str]:
    """Return the Parquet paths of all columns but some, nested ones included."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [columns.column(place).path for place in range(len(columns))]
    return [path for path in paths if path not in but]


def open_shard(folder: Folder, name: str, source: pa.NativeFile | None = None) -> pq.ParquetFile:
    """Open a shard, or the file that it was opened as, for reading by row groups.

    Raises:
        CscError: naming the shard, when it is missing or is not whole.
    """
    try:
        return pq.ParquetFile(source or folder.open_input(name))
    except pa.ArrowInvalid as error:
        raise damaged(folder, name) from error


def damaged(folder: Folder, name: str) -> CscError:
    """Return the error that names a damaged shard and says what to do."""
    return CscError(
        f"{folder.path(name)} is damaged: remove it and the {INDEX} that names it, and run the "
        "stage again; only what is missing is redone"
    )


def read_catalogue(
    store: Folder, shards: Iterable[int] | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Read the table of utterances of a finished store without audio, or some of it."""
    only = None if shards is None else [("shard", "in", list(shards))]
    with store.open_input(CATALOGUE_FILE) as file:
        return pq.read_table(file, schema=CATALOGUE, filters=only, columns=columns)


def store_shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def rejects_name(shard_name: str) -> str:
    """Return the name of the table that says what a shard does not hold."""
    return shard_name.replace("shard-", "rejects-")


def audio_of(store: Folder) -> Folder:
    """Return where the utterance shards lie that a generation of the store refers to."""
    return Folder(posixpath.dirname(store.uri)).child("shards")


def read_table(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table that lies beside shards."""
    with folder.open_input(name) as file:
        return pq.read_table(file, columns=columns)


def iter_pcm(
    store: Folder, wanted: Mapping[int, Iterable[int]]
) -> Iterator[tuple[tuple[int, int], Pcm]]:
    """Give utterances by (shard, row) in the order in which they lie, a row group at a time.

    Row groups that hold none of them are passed over.
    """
    shards = audio_of(store)
    for shard, rows in sorted(wanted.items()):
        needed, start = set(rows), 0
        file = open_shard(shards, store_shard_name(shard))
        for group in range(file.num_row_groups):
            inside = range(start, start + file.metadata.row_group(group).num_rows)
            start = inside.stop
            here = [row for row in inside if row in needed]
            if here:
                column = file.read_row_group(group, columns=["pcm"])["pcm"].combine_chunks()
                for row in here:
                    data = column[row - inside.start].as_buffer()
                    yield (shard, row), np.frombuffer(data, "<i2")


def read_pcm(store: Folder, wanted: Mapping[int, Iterable[int]]) -> dict[tuple[int, int], Pcm]:
    """Read utterances by (shard, row) into memory."""
    return dict(iter_pcm(store, wanted))
