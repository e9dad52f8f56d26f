"""Whether the files of a dataset are those that its index names, to the last byte."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.audit.rows import Known, Seen, look_through
from pipeline.commits import DONE, ShardRecord
from pipeline.datasets import Dataset
from pipeline.episodes import UNREADABLE
from pipeline.errors import CscError

MISSING = "is missing"
Fault = tuple[str, str]
"""The name of a file, and what is wrong with it."""


def look_at(
    dataset: Dataset, known: Known, scratch: Path, record: ShardRecord
) -> tuple[list[Fault], Seen | None]:
    """Read a shard and its record; what it holds is returned where it is whole.

    A remote shard is copied once, to `scratch`, and hashed in blocks: one row group of it is in
    memory at a time.

    Raises:
        CscError: the storage is down.
    """
    faults = [(record.name + DONE, what) for what in _of_record(dataset, record)]
    if record.config != dataset.id:
        faults.append((record.name, f"foreign config: the index has it made by {record.config}"))
    copy = scratch / record.name
    try:
        path = dataset.folder.fetch(record.name, copy)
        what = _of_bytes(dataset, record, path)
        if what is not None:
            return [*faults, (record.name, what)], None
        place = dataset.place(record)
        seen = look_through(path, place[0] if place else "", known, dataset)
    except FileNotFoundError:
        return [*faults, (record.name, MISSING)], None
    except UNREADABLE as error:
        return [*faults, (record.name, f"cannot be read: {error}")], None
    finally:
        copy.unlink(missing_ok=True)
    if len(seen.numbers) != record.rows:
        what = f"has {len(seen.numbers)} rows, the index says {record.rows}"
        faults.append((record.name, what))
    if seen.checksum != (record.about or {}).get("numbers", seen.checksum):
        faults.append((record.name, "has other recipes than the index has the checksum of"))
    return faults, seen


def _of_record(dataset: Dataset, record: ShardRecord) -> Iterator[str]:
    """Compare the completion record of a shard with the index."""
    name = record.name + DONE
    if not dataset.folder.exists(name):
        yield MISSING
        return
    try:
        there = ShardRecord(**dataset.folder.read_json(name))
    except (CscError, TypeError) as error:
        yield f"is no completion record ({error})"
        return
    if there.config != dataset.id:
        yield f"foreign config: {there.config} made the shard, the dataset is {dataset.id}"
    for field in ("name", "rows", "bytes", "sha256"):
        said, wanted = getattr(there, field), getattr(record, field)
        if said != wanted:
            yield f"says {field} {said}, the index {wanted}"
    for field, wanted in (record.about or {}).items():
        said = (there.about or {}).get(field)
        if said != wanted:
            yield f"says {field} {said}, the index {wanted}"


def _of_bytes(dataset: Dataset, record: ShardRecord, path: Path) -> str | None:
    """Compare the bytes of a shard with its record."""
    size = path.stat().st_size
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 == record.sha256:
        return None if size == record.bytes else f"has {size} bytes, the index says {record.bytes}"
    for other in dataset.records:
        if other.sha256 == sha256:
            return f"holds what should be in {other.name}"
    if size != record.bytes:
        return f"has {size} bytes, the index says {record.bytes}"
    return "is damaged: its bytes are not those that were written (sha256)"


def misnumbered(
    numbers: NDArray[np.int64], first: int, due: int, whole: bool
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield which of `due` episodes from `first` on are not there once; gaps of a `whole` pass."""
    found, counts = np.unique(numbers, return_counts=True)
    wanted = np.arange(first, first + due)
    odd = {
        "are there more than once": found[counts > 1],
        "are not of this pass": np.setdiff1d(found, wanted),
        "are missing": np.setdiff1d(wanted, found) if whole else found[:0],
    }
    yield from ((what, which) for what, which in odd.items() if len(which))
