"""The utterance store: from a listing to a finished generation, and removal on request."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.commits import ShardRecord, committed_shards
from pipeline.corpora import IngestConfig, corpus_folder
from pipeline.duplicates import near_duplicates
from pipeline.errors import CscError
from pipeline.ingest import REJECTS_PER_GROUP, ingest_shard
from pipeline.plan import (
    PLAN_FILE,
    REJECTS_FILE,
    Generation,
    changes,
    forgotten,
    generation_folder,
    next_generation,
    numbers,
    write_plan,
)
from pipeline.schema import (
    CATALOGUE,
    REJECT,
    SAMPLE_RATE_HZ,
    STORE_VERSION,
    UTTERANCE,
    Runner,
    config_hash,
)
from pipeline.shards import (
    CATALOGUE_FILE,
    INDEX,
    damaged,
    encode,
    open_shard,
    read_catalogue,
    rejects_name,
    store_shard_name,
)
from pipeline.speakers import Ear
from pipeline.splits import check_disjoint
from pipeline.storage import READS_AT_ONCE, Folder
from pipeline.summary import summary

ROWS_PER_GROUP = 1 << 13  # of the catalogue: what a build reads of it is the rows of a few shards


class Contents(NamedTuple):
    """What a generation holds, and what it does not."""

    catalogue: pa.Table
    rejects: pa.Table


def store_id(config: IngestConfig) -> str:
    """Return the name of the store for this way of making utterances of recordings.

    Corpora may come, grow and move: they make generations of one store.
    """
    judge = None if config.purity is None else [config.purity, config.purity_threshold]
    return config_hash([STORE_VERSION, config.speech.model_dump(), judge])


def plan_ingest(root: Folder, config: IngestConfig, listing: pa.Table) -> Generation:
    """Return the generation that an ingest of this listing finds, completes or makes.

    Raises:
        CscError: a speaker or a session is in two splits.
    """
    check_disjoint(listing, ("speaker_id", "session_id"))
    return next_generation(root, listing, store_id(config), config.source_mb_per_shard)


def ingest(
    root: Folder, planned: Generation, config: IngestConfig, run: Runner, ear: Ear | None = None
) -> Any:
    """Make a generation of what is planned and return its index; a finished one as it is.

    Raises:
        CscError: none of the audio can be kept, or a speaker is in two splits.
    """
    if planned.finished:
        return planned.store.read_json(INDEX)
    shards, name = root.child("shards"), store_id(config)
    root.sweep()
    write_plan(planned)
    common = {
        "shards": shards.uri,
        "generation": planned.store.uri,
        "config": name,
        "speech": config.speech.model_dump(),
        "roots": {corpus.name: corpus_folder(corpus).uri for corpus in config.corpora},
    }
    todo = sorted(pc.unique(unread(root, planned, config)["shard"]).to_pylist())
    run([common | {"shard": shard} for shard in todo], partial(ingest_shard, ear=ear))
    return finish(root, planned, config)


def unread(root: Folder, planned: Generation, config: IngestConfig) -> pa.Table:
    """Return the part of a plan whose shards are yet to be made."""
    done = committed_shards(root.child("shards"), store_id(config))
    todo = [shard for shard in planned.shards() if store_shard_name(shard) not in done]
    return planned.plan.filter(pc.is_in(planned.plan["shard"], pa.array(todo, pa.int32())))


def discard(root: Folder) -> None:
    """Delete all generations and shards; what was forgotten stays so."""
    for number in numbers(root, INDEX):  # first of all, nothing counts as finished
        generation_folder(root, number).remove_file(INDEX)
    root.child("shards").remove(first=store_shard_name(0))
    for number in numbers(root):
        generation_folder(root, number).remove(first=PLAN_FILE)


def finish(
    root: Folder, planned: Generation, config: IngestConfig, *, may_be_empty: bool = False
) -> Any:
    """Write catalogue, rejects and, last of all, the index."""
    shards = root.child("shards")
    done = committed_shards(shards, store_id(config))
    records = [done[store_shard_name(shard)] for shard in planned.shards()]
    contents = _contents(root, planned, records)
    if not len(contents.catalogue) and not may_be_empty:
        reasons = sorted(set(contents.rejects["reason"].to_pylist()))
        raise CscError(
            f"nothing in the corpora can be kept ({', '.join(reasons)}): give others, or if they "
            "can be read by now, run again with --fresh"
        )
    check_disjoint(contents.catalogue)
    planned.store.put(REJECTS_FILE, encode(contents.rejects, REJECTS_PER_GROUP))
    planned.store.put(CATALOGUE_FILE, encode(contents.catalogue, ROWS_PER_GROUP))
    index = {
        "version": STORE_VERSION,
        "id": _content_hash(contents.catalogue),
        "store": store_id(config),
        "generation": planned.number,
        "config": config.model_dump(),
        "changes": changes(root, planned)._asdict(),
        "forgotten": len(forgotten(root).names),
        **summary(planned.plan, contents.catalogue, contents.rejects, config.corpora),
        "shards": [record._asdict() for record in records],
    }
    planned.store.put_json(INDEX, index)
    return index


def _contents(root: Folder, planned: Generation, records: Sequence[ShardRecord]) -> Contents:
    """Join the shards' rows, less what is stale, of another speaker, or there already.

    Of copies, the one that an earlier generation kept is kept, or else the first.
    """
    shards = root.child("shards")
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        rows = list(pool.map(partial(_without_audio, shards), records, planned.shards()))
        refused = list(pool.map(partial(_rejects, shards), planned.shards()))
    stored = _current(pa.concat_tables(rows), planned.plan)
    rejects = _current(pa.concat_tables(refused), planned.plan).select(REJECT.names)
    others = rejects.filter(pc.equal(rejects["reason"], "other_speaker"))
    left = stored.filter(pc.invert(pc.is_in(_places(stored), value_set=_places(others))))
    left, gone = _parted(left, _forgotten(left, root), "forgotten", "removed on request,")
    left, num_kept = _kept_first(left, _before(root, planned))
    left, twice = _parted(
        left, _first_alike(left["utterance_id"]), "duplicate", "the same audio as"
    )
    left, nearly = _parted(left, _sounds_alike(left, num_kept), "near_duplicate", "sounds like")
    catalogue = left.select(CATALOGUE.names).cast(CATALOGUE)
    catalogue = catalogue.sort_by([("shard", "ascending"), ("row", "ascending")])
    contents = Contents(catalogue, pa.concat_tables([rejects, gone, twice, nearly]))
    dropped = sum(map(len, (others, gone, twice, nearly)))
    _check_complete(planned.plan, contents, len(stored) - dropped)
    return contents


def _forgotten(rows: pa.Table, root: Folder) -> NDArray[np.int64]:
    """Mark rows of forgotten audio, under whatever name, with their own number; others with -1."""
    ids = pa.array(sorted(forgotten(root).utterances), pa.string())
    marks = pc.is_in(rows["utterance_id"], value_set=ids).to_numpy()
    return np.where(marks, np.arange(len(rows)), -1)


def _before(root: Folder, planned: Generation) -> pa.Table:
    """Return the catalogue of the last finished generation, or an empty one."""
    finished = [number for number in numbers(root, INDEX) if number < planned.number]
    if not finished:
        return CATALOGUE.empty_table()
    return read_catalogue(generation_folder(root, finished[-1]))


def _kept_first(rows: pa.Table, before: pa.Table) -> tuple[pa.Table, int]:
    """Put the rows of an earlier catalogue before the others, and count them."""
    columns = ("utterance_id", "source_id", "start_sample")
    then, now = (_joined([table[name] for name in columns]) for table in (before, rows))
    kept = pc.is_in(now, value_set=then)
    return pa.concat_tables([rows.filter(kept), rows.filter(pc.invert(kept))]), pc.sum(
        kept
    ).as_py() or 0


def _sounds_alike(rows: pa.Table, num_kept: int) -> NDArray[np.int64]:
    """Return for each row the one before it that it is a near-duplicate of, or -1."""
    speech = np.flatnonzero(pc.equal(rows["kind"], "speech").to_numpy())
    prints = rows["fingerprint"].take(pa.array(speech, pa.int64()))
    alike = near_duplicates(prints, first_new=int(np.searchsorted(speech, num_kept)))
    originals = np.full(len(rows), -1, np.int64)
    originals[speech] = np.where(alike >= 0, speech[alike], -1)
    return originals


def _without_audio(shards: Folder, record: ShardRecord, shard: int) -> pa.Table:
    table = open_shard(shards, record.name).read(columns=[*UTTERANCE.names, "fingerprint"])
    if len(table) != record.rows:
        raise damaged(shards, record.name)
    # Together they may pass the 2 GiB that offsets of 32 bits reach.
    prints = table["fingerprint"].cast(pa.large_binary())
    table = table.set_column(table.num_columns - 1, "fingerprint", prints)
    return _numbered(table, shard).append_column("row", pa.array(range(len(table)), pa.int32()))


def _rejects(shards: Folder, shard: int) -> pa.Table:
    with shards.open_input(rejects_name(store_shard_name(shard))) as file:
        return _numbered(pq.read_table(file, schema=REJECT), shard)


def _numbered(table: pa.Table, shard: int) -> pa.Table:
    return table.append_column("shard", pa.array([shard] * len(table), pa.int32()))


def _current(table: pa.Table, plan: pa.Table) -> pa.Table:
    """Take the rows of sources that the plan still has, as they were read last."""
    columns = ("source_id", "shard")
    wanted, found = (_joined([side[name] for name in columns]) for side in (plan, table))
    return table.filter(pc.is_in(found, value_set=wanted)).combine_chunks()


def _places(table: pa.Table) -> pa.Array:
    return _joined([table["source_id"], table["start_sample"]])


def _joined(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    joined = pc.binary_join_element_wise(*(column.cast(pa.string()) for column in columns), "@")
    return pa.concat_arrays([pa.array([], pa.string()), *joined.chunks])


def _first_alike(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return for each row the first one before it of the same value, or -1."""
    codes = pa.concat_arrays([pa.array([], pa.string()), *values.chunks]).dictionary_encode()
    places = codes.indices.to_numpy()
    _, first = np.unique(places, return_index=True)  # codes are given in order of appearance
    found = first[places] if len(places) else np.zeros(0, np.int64)
    return np.where(found < np.arange(len(places)), found, -1)


def _parted(
    table: pa.Table, original: NDArray[np.int64], reason: str, words: str
) -> tuple[pa.Table, pa.Table]:
    """Part a table into the rows that repeat none before them, and the rejects of the others."""
    again = np.flatnonzero(original >= 0)
    slim = table.select([name for name in REJECT.names if name in table.schema.names])
    copies, originals = slim.take(pa.array(again)), slim.take(pa.array(original[again]))
    start_s = pc.round(
        pc.divide(pc.cast(originals["start_sample"], pa.float64()), SAMPLE_RATE_HZ), 2
    )
    where = pc.binary_join_element_wise(originals["corpus"], originals["path"], "/")
    detail = pc.binary_join_element_wise(words, where, "at", start_s.cast(pa.string()), "s", " ")
    constant = {"stage": "duplicates", "reason": reason}
    columns = {
        **{name: copies[name] for name in slim.schema.names},
        **{name: pa.array([text] * len(copies), pa.string()) for name, text in constant.items()},
        "detail": detail,
    }
    rejects = pa.table({name: columns[name] for name in REJECT.names}, schema=REJECT)
    return table.filter(pa.array(original < 0)), rejects


def _check_complete(plan: pa.Table, contents: Contents, kept: int) -> None:
    """Assert that every row is kept or rejected, and that there is word of every source."""
    seen = pa.concat_tables(table.select(["source_id"]) for table in contents)
    sources = pc.count_distinct(seen["source_id"]).as_py()
    if len(contents.catalogue) != kept or sources != len(plan):
        raise CscError("ingest lost or invented rows: run with --fresh, and report it")


def _content_hash(catalogue: pa.Table) -> str:
    """Return the name of what is in a catalogue and where in the store it lies."""
    digest = hashlib.blake2b(digest_size=8)
    for batch in catalogue.combine_chunks().to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()
