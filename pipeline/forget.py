"""Removal on request: what a speaker or a recording left in a store is taken out of it.

The rest of the shards it lay in is written anew, a generation without it is made, and the
generations and shards that held it are deleted. Its name stays as a hash, so that no later ingest
reads it again.
"""

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commits import commit_shard
from pipeline.corpora import IngestConfig
from pipeline.errors import CscError
from pipeline.ingest import REJECTS_PER_GROUP
from pipeline.plan import (
    FORGOTTEN_FILE,
    PLAN_FILE,
    Generation,
    forgotten,
    generation,
    generation_folder,
    is_forgotten,
    new_generation,
    numbers,
    secret_name,
    write_plan,
)
from pipeline.schema import PLAN, STORED_UTTERANCE
from pipeline.shards import (
    INDEX,
    encode,
    open_shard,
    rejects_name,
    shard_writer,
    store_shard_name,
)
from pipeline.storage import Folder
from pipeline.store import finish, store_id


def forget(root: Folder, names: Collection[str], config: IngestConfig) -> int:
    """Remove speakers (`corpus/speaker`) and recordings (`corpus/path`); return how many sources.

    A killed call is completed by calling it again. What an unfinished ingest has read so far is
    dropped and read again by the next one.

    Raises:
        CscError: the store has no finished generation, knows nothing of these names, or would be
            empty without them.
    """
    finished = numbers(root, INDEX)
    if not finished:
        raise CscError(f"{root.uri} has no finished generation: run csc ingest first")
    last = generation(root, finished[-1])
    secrets = {secret_name(name) for name in names}
    known = forgotten(root)
    marks = is_forgotten(last.plan, secrets)
    if not marks.any() and not secrets <= known:
        raise CscError(f"no speaker or recording in {root.uri} is named {' or '.join(names)}")
    if marks.all():
        raise CscError(f"nothing would be left: remove {root.uri} itself")
    root.put_json(FORGOTTEN_FILE, sorted(known | secrets))
    if marks.any():
        last = _rewritten(root, last, pa.array(marks), config)
    _clean(root, last)
    return int(marks.sum())


def index_ids(root: Folder) -> set[str]:
    """Return the ids of all finished generations, which datasets give for what they hold."""
    return {
        generation(root, number).store.read_json(INDEX)["id"] for number in numbers(root, INDEX)
    }


def _rewritten(root: Folder, last: Generation, marks: pa.Array, config: IngestConfig) -> Generation:
    """Make the generation that has all but the marked sources."""
    shards, name = root.child("shards"), store_id(config)
    shards.sweep()
    touched = sorted(pc.unique(last.plan.filter(marks)["shard"]).to_pylist())
    first = _first_free(shards)
    moved = {shard: first + place for place, shard in enumerate(touched)}
    left = last.plan.filter(pc.invert(marks))
    places = [moved.get(shard, shard) for shard in left["shard"].to_pylist()]
    column = pa.array(places, pa.int32())
    plan = left.set_column(PLAN.get_field_index("shard"), PLAN.field("shard"), column)
    planned = new_generation(root, last.number + 1, plan)
    planned.store.remove_file(INDEX)
    write_plan(planned)
    for old, new in moved.items():
        if new in planned.shards():
            _rewrite(shards, old, new, plan, name)
    finish(root, planned, config)
    return planned


def _first_free(shards: Folder) -> int:
    """Return a number above all that a shard here has or had."""
    names = [file.name for file in shards.list() if file.name.startswith("shard-")]
    return 1 + max((int(name.split("-")[1].split(".")[0]) for name in names), default=-1)


def _rewrite(shards: Folder, old: int, new: int, plan: pa.Table, config: str) -> None:
    """Copy a shard, a row group at a time, without the sources that the plan does not have."""
    here = plan.filter(pc.equal(plan["shard"], new))["source_id"].combine_chunks()
    source = open_shard(shards, store_shard_name(old))
    with shards.open_input(rejects_name(store_shard_name(old))) as file:
        refused = pq.read_table(file)
    refused = refused.filter(pc.is_in(refused["source_id"], value_set=here))
    with shards.scratch() as scratch:
        path, rows = Path(scratch) / store_shard_name(new), 0
        with shard_writer(str(path), STORED_UTTERANCE) as writer:
            for group in range(source.num_row_groups):
                table = source.read_row_group(group)
                table = table.filter(pc.is_in(table["source_id"], value_set=here))
                if len(table):
                    writer.write_table(table)
                rows += len(table)
        shards.put(rejects_name(store_shard_name(new)), encode(refused, REJECTS_PER_GROUP))
        commit_shard(shards, store_shard_name(new), path, rows, config)


def _clean(root: Folder, last: Generation) -> None:
    """Delete all generations but the last, and all shards that it does not refer to."""
    for number in numbers(root, PLAN_FILE):
        if number != last.number:
            generation_folder(root, number).remove(first=INDEX)
    shards = root.child("shards")
    used = {store_shard_name(shard) for shard in last.shards()}
    used |= {rejects_name(name) for name in used}
    for file in shards.list():
        if file.name.removesuffix(".done.json") not in used:
            shards.remove_file(file.name)
