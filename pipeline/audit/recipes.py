"""Shards made anew from the store, and compared with what lies there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.build import canvases
from pipeline.commits import ShardRecord
from pipeline.datasets import Dataset
from pipeline.draws import permutation, stream_key
from pipeline.episodes import UNREADABLE
from pipeline.errors import CscError
from pipeline.planning import plan_tasks
from pipeline.schema import Task
from pipeline.shards import open_shard
from pipeline.storage import Folder

SHOWN = 60  # characters of a value in a message


class Remade(NamedTuple):
    """What came of making a shard anew."""

    name: str
    difference: str | None  # the first one
    failure: str | None  # why it could not be made


def sampled(dataset: Dataset, sound: Sequence[ShardRecord], count: int | None) -> list[ShardRecord]:
    """Return as many shards, or all, always the same ones of a dataset."""
    order = permutation(stream_key("check", dataset.id), len(sound)).tolist()
    return sorted(sound[place] for place in order[: len(sound) if count is None else count])


def planned_tasks(
    dataset: Dataset, store: Folder, catalogue: pa.Table, rooms: pa.Table | None
) -> list[Task]:
    """Return the tasks that a build of this dataset has.

    Raises:
        CscError: the store cannot have been what it was built from.
    """
    common = {"store": store.uri, "dataset": dataset.folder.uri, "config": dataset.id}
    tasks = plan_tasks(catalogue, rooms, dataset.config, dataset.seed)
    return [common | task for task in tasks]


def unplanned(dataset: Dataset, tasks: Sequence[Task]) -> Iterator[tuple[str, str]]:
    """Yield shards that a build would make otherwise, each with what is wrong."""
    planned = {one["name"]: one["stop"] - one["first"] for task in tasks for one in task["shards"]}
    listed = {record.name: record.rows for record in dataset.records}
    for name in sorted(planned.keys() | listed.keys()):
        if name not in listed:
            yield name, "a build makes it and the index does not name it"
        elif name not in planned:
            yield name, "the index names it and no build makes it"
        elif planned[name] != listed[name]:
            yield name, f"has {listed[name]} rows in the index, a build makes {planned[name]}"


def remade(
    dataset: Dataset,
    tasks: Sequence[Task],
    speakers: pa.Table,
    chosen: Sequence[ShardRecord],
    advance: Callable[[int], None],
) -> Iterator[Remade]:
    """Make shards anew and compare each with what lies there.

    A window of the store is read once for all of its shards.
    """
    names = {record.name for record in chosen}
    row_of = {name: row for row, name in enumerate(speakers["speaker_id"].to_pylist())}
    for task in tasks:
        shards = [shard for shard in task["shards"] if shard["name"] in names]
        if not shards:
            continue
        try:
            made = canvases({**task, "shards": shards}, speakers)
        except (CscError, *UNREADABLE) as error:
            yield from (Remade(one["name"], None, str(error)) for one in shards)
            advance(len(shards))
            continue
        for shard, canvas in zip(shards, made, strict=True):
            table = canvas.table(row_of)
            yield Remade(shard["name"], _difference(dataset.folder, shard["name"], table), None)
            advance(1)


def _difference(folder: Folder, name: str, made: pa.Table) -> str | None:
    """Compare a shard with its rows made anew, a row group at a time."""
    file, first = open_shard(folder, name), 0
    if file.metadata.num_rows != len(made):
        return f"has {file.metadata.num_rows} rows, made anew it has {len(made)}"
    for group in range(file.num_row_groups):
        there = file.read_row_group(group)
        found = _first_difference(there, made.slice(first, len(there)))
        if found is not None:
            row, column, how = found
            number = there["episode"][row].as_py()
            return (
                f"is not what the store gives: row {first + row} (episode {number}), {column}{how}"
            )
        first += len(there)
    return None


def _first_difference(there: pa.Table, made: pa.Table) -> tuple[int, str, str] | None:
    """Return row, column and how they differ, of the first row that does."""
    differing = [name for name in made.schema.names if not there[name].equals(made[name])]
    for row in range(len(made)) if differing else ():
        for name in differing:
            one, other = there[name][row], made[name][row]
            if not one.equals(other):
                return row, name, _how(one, other)
    return None


def _how(there: pa.Scalar, made: pa.Scalar) -> str:
    if pa.types.is_large_binary(there.type):
        one, other = (np.frombuffer(side.as_buffer(), np.uint8) for side in (there, made))
        if len(one) != len(other):
            return f" has {len(one)} bytes, made anew {len(other)}"
        return f" at byte {np.flatnonzero(one != other)[0]}"
    return _path(there.as_py(), made.as_py())


def _path(there: Any, made: Any) -> str:
    """Return where two nested values differ first, and by what."""
    if isinstance(there, list) and isinstance(made, list):
        if len(there) != len(made):
            return f" has {len(there)} entries, made anew {len(made)}"
        pairs = enumerate(zip(there, made, strict=True))
        place, (one, other) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        return f"[{place}]{_path(one, other)}"
    if isinstance(there, dict) and isinstance(made, dict):
        key = next(key for key in made if there.get(key) != made[key])
        return f".{key}{_path(there.get(key), made[key])}"
    return f" is {repr(there)[:SHOWN]}, made anew {repr(made)[:SHOWN]}"
