"""Generations of a store: what is read anew, what is there already, and in which shard it lies.

A plan is a listing with a shard for each source. It is written before anything is read, so that a
killed ingest goes on with the same shards; the next generation takes over all that is unchanged.

    STORE/shards/shard-00000.parquet        numbered through all generations, never written twice
    STORE/generation-00001/plan.parquet, ..., index.json
"""

import hashlib
import math
import posixpath
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
REJECTS_FILE = "rejects.parquet"
GENERATION = re.compile(r"generation-(\d{5})/")
SHARD = re.compile(r"(?:shard|rejects)-(\d+)\.parquet")


class Generation(NamedTuple):
    """A state of a store."""

    number: int
    store: Folder  # what later stages are given
    plan: pa.Table  # schema.PLAN, by shard and recording
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


def numbers(root: Folder, having: str = "") -> list[int]:
    """Return the generations that have a file, or any, oldest first."""
    names = [file.name for file in root.list()]
    matches = ((GENERATION.match(name), name) for name in names)
    return sorted(
        {int(match[1]) for match, name in matches if match and having in ("", name[match.end() :])}
    )


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
    # by recording, so that one with several speakers is fetched once for a shard
    order = [(key, "ascending") for key in ("shard", "corpus", "path", "start_s", "speaker_id")]
    plan = plan.cast(PLAN).sort_by(order).combine_chunks()
    return Generation(number, generation_folder(root, number), plan, finished=False)


def next_generation(root: Folder, listing: pa.Table, config: str, shard_mb: float) -> Generation:
    """Return the generation that holds a listing: the last one, or one that is not written yet.

    Sources whose shard is committed keep it, whatever happened to the ingest that made it.
    """
    listing = listing.filter(pa.array(~is_forgotten(listing, forgotten(root).names)))
    last = latest(root)
    if last is None:
        first = first_free_shard(root, PLAN.empty_table())
        return new_generation(root, 1, _assigned(listing, first, shard_mb))
    if _states(listing).equals(_states(last.plan)):
        return last
    there = _read_before(root, config)
    place = pc.index_in(_keys(listing), value_set=_keys(there))
    known = listing.filter(pc.is_valid(place))
    known = known.append_column(PLAN.field("shard"), there["shard"].take(place.drop_null()))
    first = first_free_shard(root, last.plan)
    new = _assigned(listing.filter(pc.is_null(place)), first, shard_mb)
    number = last.number + 1 if last.finished else last.number
    return new_generation(root, number, pa.concat_tables([known, new]))


def _read_before(root: Folder, config: str) -> pa.Table:
    """Return the sources whose shard is committed, by any plan, the newest first.

    What could not be read when its turn came (`denied` and the like) is not among them.
    """
    done = committed_shards(root.child("shards"), config)
    plans = [generation(root, number) for number in reversed(numbers(root, PLAN_FILE))]
    table = pa.concat_tables([PLAN.empty_table(), *(one.plan for one in plans)])
    there = [
        shard for shard in pc.unique(table["shard"]).to_pylist() if store_shard_name(shard) in done
    ]
    table = table.filter(pc.is_in(table["shard"], pa.array(there, pa.int32())))
    unread = [pa.array([], pa.string())]
    for one in plans:
        if one.finished:
            with one.store.open_input(REJECTS_FILE) as file:
                rejects = pq.read_table(file, filters=[("stage", "==", "read")])
            unread += rejects["source_id"].chunks
            break
    return table.filter(pc.invert(pc.is_in(table["source_id"], value_set=pa.concat_arrays(unread))))


def first_free_shard(root: Folder, plan: pa.Table) -> int:
    """Return a number above all that a shard here has, and above those of a plan."""
    names = [file.name for file in root.child("shards").list()]
    there = [int(match[1]) for match in map(SHARD.match, names) if match]
    return 1 + max([*there, *pc.unique(plan["shard"]).to_pylist()], default=-1)


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
    """Place sources by a hash of the speaker; each kind has shards of its own, speech the first."""
    shards = np.zeros(len(listing), np.int32)
    for kind in ("speech", "noise", "room"):
        chosen = np.flatnonzero(pc.equal(listing["kind"], kind).to_numpy())
        part = listing.take(pa.array(chosen, pa.int64()))
        count = max(math.ceil(source_bytes(part).sum() / (shard_mb * 1e6)), int(len(part) > 0))
        shards[chosen] = first + _spread(part["speaker_id"], count)
        first += count
    return listing.append_column(PLAN.field("shard"), pa.array(shards, pa.int32()))


def source_bytes(listing: pa.Table) -> NDArray[np.float64]:
    """Return the encoded bytes of each source; spans of one recording share its size."""
    if not len(listing):
        return np.zeros(0)
    _, places = _distinct(_recordings(listing))
    return listing["num_bytes"].to_numpy() / np.bincount(places)[places]


def _recordings(listing: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(listing["corpus"], listing["path"], "/")


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


class Forgotten(NamedTuple):
    """What was removed on request from the stores of a workspace."""

    names: set[str]  # secret names of speakers and recordings: not to be read again
    utterances: set[str]  # ids: the same audio under another name is not kept either


def forgotten(root: Folder) -> Forgotten:
    """Return what lies beside a store of what was forgotten: it outlives the store."""
    beside = _beside(root)
    if not beside.exists(FORGOTTEN_FILE):
        return Forgotten(set(), set())
    about = beside.read_json(FORGOTTEN_FILE)
    return Forgotten(set(about["names"]), set(about["utterances"]))


def remember_forgotten(root: Folder, more: Forgotten) -> None:
    """Add to what is forgotten."""
    known = forgotten(root)
    about = {
        "names": sorted(known.names | more.names),
        "utterances": sorted(known.utterances | more.utterances),
    }
    _beside(root).put_json(FORGOTTEN_FILE, about)


def _beside(root: Folder) -> Folder:
    return Folder(posixpath.dirname(root.uri))


def is_forgotten(listing: pa.Table, secrets: set[str]) -> NDArray[np.bool_]:
    """Mark the sources whose speaker or recording is among the secret names."""
    marks = np.zeros(len(listing), np.bool_)
    if not secrets or not len(listing):
        return marks
    for column in (listing["speaker_id"], _recordings(listing)):
        names, places = _distinct(column)
        marks |= np.asarray([secret_name(name) in secrets for name in names], np.bool_)[places]
    return marks
