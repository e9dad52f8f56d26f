"""Generations of a store: what is read anew, what is there already, and in which shard it lies.

A plan is a listing with a shard for each source. It is written before anything is read, so that a
killed ingest goes on with the same shards; the next generation takes over all that is unchanged.

    STORE/shards/shard-00000.parquet        numbered through all generations, never written twice
    STORE/generation-00001/plan.parquet, ..., index.json
"""

import hashlib
import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.commits import committed_shards
from pipeline.schema import LISTING, PLAN, stable_fraction
from pipeline.shards import INDEX, encode, store_shard_name
from pipeline.storage import Folder

PLAN_FILE = "plan.parquet"
FORGOTTEN_FILE = "forgotten.json"
SOURCES_PER_GROUP = 1 << 13
GENERATION = re.compile(r"generation-(\d{5})/")


class Generation(NamedTuple):
    """A state of a store."""

    number: int
    store: Folder  # what later stages are given
    plan: pa.Table  # schema.PLAN, by shard, speaker and path
    finished: bool

    def shards(self) -> list[int]:
        """Return the numbers of the shards that its rows lie in."""
        return sorted(pc.unique(self.plan["shard"]).to_pylist())


class Changes(NamedTuple):
    """What a plan brings, in sources, against the last finished generation before it."""

    new: int
    changed: int
    gone: int
    unchanged: int


def numbers(root: Folder, having: str) -> list[int]:
    """Return the generations that have a file, oldest first."""
    names = [file.name for file in root.list()]
    matches = ((GENERATION.match(name), name) for name in names)
    return sorted(int(match[1]) for match, name in matches if match and match[0] + having == name)


def generation_folder(root: Folder, number: int) -> Folder:
    return root.child(f"generation-{number:05d}")


def generation(root: Folder, number: int) -> Generation:
    """Return a generation that has a plan."""
    folder = generation_folder(root, number)
    with folder.open_input(PLAN_FILE) as file:
        plan = pq.read_table(file, schema=PLAN)
    return Generation(number, folder, plan, folder.exists(INDEX))


def latest(root: Folder) -> Generation | None:
    """Return the newest generation, finished or under way."""
    planned = numbers(root, PLAN_FILE)
    return generation(root, planned[-1]) if planned else None


def new_generation(root: Folder, number: int, plan: pa.Table) -> Generation:
    """Return a generation that is not written yet, its plan put in order."""
    order = [(key, "ascending") for key in ("shard", "speaker_id", "path", "start_s")]
    plan = plan.cast(PLAN).sort_by(order).combine_chunks()
    return Generation(number, generation_folder(root, number), plan, finished=False)


def next_generation(root: Folder, listing: pa.Table, config: str, shard_mb: float) -> Generation:
    """Return the generation that holds a listing: the last one, or one that is not written yet.

    Sources whose shard is committed keep it, whatever happened to the ingest that made it.
    """
    listing = listing.filter(pa.array(~is_forgotten(listing, forgotten(root))))
    last = latest(root)
    if last is None:
        return new_generation(root, 1, _assigned(listing, 0, shard_mb))
    if _states(listing).equals(_states(last.plan)):
        return last
    done = committed_shards(root.child("shards"), config)
    there = [shard for shard in last.shards() if store_shard_name(shard) in done]
    kept = last.plan.filter(pc.is_in(last.plan["shard"], pa.array(there, pa.int32())))
    place = pc.index_in(_keys(listing), value_set=_keys(kept))
    known = listing.filter(pc.is_valid(place))
    known = known.append_column(PLAN.field("shard"), kept["shard"].take(place.drop_null()))
    first = 1 + max(last.shards(), default=-1)
    new = _assigned(listing.filter(pc.is_null(place)), first, shard_mb)
    number = last.number + 1 if last.finished else last.number
    return new_generation(root, number, pa.concat_tables([known, new]))


def write_plan(generation: Generation) -> None:
    """Write the plan, after which the generation is under way."""
    generation.store.put(PLAN_FILE, encode(generation.plan, SOURCES_PER_GROUP))


def sources_of(store: Folder, shard: int) -> list[dict[str, Any]]:
    """Return the sources of one shard in their order, reading that part of the plan only."""
    with store.open_input(PLAN_FILE) as file:
        return pq.read_table(file, filters=[("shard", "==", shard)]).to_pylist()


def _keys(table: pa.Table) -> pa.Array:
    """Return for each source a string that any change of it changes."""
    columns = [table[name].cast(pa.string()) for name in LISTING.names]
    joined = pc.binary_join_element_wise(*columns, "\x1f")
    return pa.concat_arrays(joined.chunks) if joined.num_chunks else pa.array([], pa.string())


def _states(table: pa.Table) -> pa.Array:
    """Return the keys of all sources in an order of their own."""
    keys = _keys(table)
    return keys.take(pc.sort_indices(keys))


def _assigned(listing: pa.Table, first: int, shard_mb: float) -> pa.Table:
    """Place sources by a hash of the speaker; noise has shards of its own, after all speech."""
    shards = np.zeros(len(listing), np.int32)
    for kind in ("speech", "noise"):
        chosen = np.flatnonzero(pc.equal(listing["kind"], kind).to_numpy())
        part = listing.take(pa.array(chosen, pa.int64()))
        count = -(-(pc.sum(part["num_bytes"]).as_py() or 0) // int(shard_mb * 1e6))
        count = max(count, int(len(part) > 0))
        shards[chosen] = first + _spread(part["speaker_id"], count)
        first += count
    return listing.append_column(PLAN.field("shard"), pa.array(shards, pa.int32()))


def _spread(speakers: pa.ChunkedArray, count: int) -> NDArray[np.int32]:
    names, places = _distinct(speakers)
    return np.asarray([int(stable_fraction(name) * count) for name in names], np.int32)[places]


def _distinct(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """Return the different values of a column, and for each row which of them it has."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def changes(root: Folder, planned: Generation) -> Changes:
    """Compare a plan with the last finished generation before it."""
    before = [number for number in numbers(root, INDEX) if number < planned.number]
    if not before:
        return Changes(len(planned.plan), 0, 0, 0)
    now, then = planned.plan, generation(root, before[-1]).plan
    same = pc.sum(pc.is_in(_keys(now), value_set=_keys(then))).as_py() or 0
    ids = pa.concat_arrays(then["source_id"].chunks)
    known = pc.sum(pc.is_in(now["source_id"], value_set=ids)).as_py() or 0
    return Changes(len(now) - known, known - same, len(then) - known, same)


def secret_name(name: str) -> str:
    """Return what stands for a forgotten speaker or recording, so that its name is gone too."""
    return hashlib.blake2b(f"forget:{name}".encode(), digest_size=16).hexdigest()


def forgotten(root: Folder) -> set[str]:
    """Return the secret names of what must not be read again."""
    return set(root.read_json(FORGOTTEN_FILE)) if root.exists(FORGOTTEN_FILE) else set()


def is_forgotten(listing: pa.Table, secrets: set[str]) -> NDArray[np.bool_]:
    """Mark the sources whose speaker or recording is among the secret names."""
    marks = np.zeros(len(listing), np.bool_)
    if not secrets or not len(listing):
        return marks
    recordings = pc.binary_join_element_wise(listing["corpus"], listing["path"], "/")
    for column in (listing["speaker_id"], recordings):
        names, places = _distinct(column)
        marks |= np.asarray([secret_name(name) in secrets for name in names], np.bool_)[places]
    return marks
