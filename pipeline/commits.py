"""Shards that count: each has a completion record beside it, written after it."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.storage import READS_AT_ONCE, Folder

DONE = ".done.json"  # after the name of a shard: its completion record


class ShardRecord(NamedTuple):
    """What a completion record says of a shard."""

    name: str
    rows: int
    bytes: int
    sha256: str
    config: str
    about: Mapping[str, Any] | None = None  # what else its maker says of it

    def as_json(self) -> dict[str, Any]:
        """Return the record for a file; what is not said is left out."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def commit_shard(
    folder: Folder,
    name: str,
    data: bytes | Path,
    rows: int,
    config: str,
    about: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Write a shard and then its completion record; without the latter it does not count.

    `data` may be a file in the folder's `scratch`.
    """
    if isinstance(data, Path):
        with data.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = data.stat().st_size
    else:
        sha256, num_bytes = hashlib.sha256(data).hexdigest(), len(data)
    record = ShardRecord(name, rows, num_bytes, sha256, config, about)
    folder.put(name, data)
    folder.put_json(name + DONE, record.as_json())
    return record


def committed_shards(folder: Folder, config: str) -> dict[str, ShardRecord]:
    """Return by name the shards that an earlier run completed with this configuration."""
    sizes = {file.name: file.num_bytes for file in folder.list()}
    names = [name for name in sizes if name.endswith(DONE)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        records = [ShardRecord(**about) for about in pool.map(folder.read_json, names)]
    return {
        record.name: record
        for record in records
        if record.config == config and sizes.get(record.name) == record.bytes
    }
