"""Removal on request: what a speaker or a recording left in a store is taken out of it.

The rest of the shards it lay in is written anew, a generation without it is made, and all other
generations and shards are deleted. Its name stays as a hash, and its audio as content ids, so that
no later ingest keeps it again.
"""

import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commits import DONE, commit_shard
from pipeline.corpora import IngestConfig
from pipeline.errors import CscError
from pipeline.ingest import REJECTS_PER_GROUP
from pipeline.plan import (
    PLAN_FILE,
    Forgotten,
    Generation,
    first_free_shard,
    forgotten,
    generation,
    generation_folder,
    is_forgotten,
    new_generation,
    numbers,
    remember_forgotten,
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
from pipeline.storage import READS_AT_ONCE, Folder
from pipeline.store import discard, finish, store_id


def forget(roots: Sequence[Folder], names: Collection[str]) -> int:
    """Remove speakers (`corpus/speaker`) and recordings (`corpus/path`); return how many sources.

    `roots` are the stores of a workspace. A killed call is completed by calling it again. What an
    unfinished ingest has read so far is dropped, and read again by the next one.

    Raises:
        CscError: a name stands for nothing in any of the stores.
    """
    secrets = {secret_name(name): name for name in names}
    plans = {root.uri: _all_plans(root) for root in roots}
    unknown = [
        name
        for secret, name in secrets.items()
        if not any(
            is_forgotten(plan, {secret}).any() or secret in forgotten(root).names
            for root in roots
            for plan in [plans[root.uri]]
        )
    ]
    if unknown:
        raise CscError(f"no store has a speaker or recording {unknown[0]!r}: nothing was removed")
    count = 0
    for root in roots:
        marked = plans[root.uri].filter(pa.array(is_forgotten(plans[root.uri], set(secrets))))
        sources = pc.unique(marked["source_id"])
        remember_forgotten(root, Forgotten(set(secrets), _utterances_of(root, marked)))
        _forget_in(root)
        count += len(sources)
    return count


def index_ids(root: Folder) -> set[str]:
    """Return the ids of all finished generations, which datasets give for what they hold."""
    return {
        generation(root, number).store.read_json(INDEX)["id"] for number in numbers(root, INDEX)
    }


def _all_plans(root: Folder) -> pa.Table:
    plans = [generation(root, number).plan for number in numbers(root, PLAN_FILE)]
    return pa.concat_tables([PLAN.empty_table(), *plans])


def _utterances_of(root: Folder, marked: pa.Table) -> set[str]:
    """Return the ids of what was cut from some sources, wherever it lies."""
    shards, sources = root.child("shards"), pc.unique(marked["source_id"])
    there = {file.name for file in shards.list()}
    found: set[str] = set()
    for shard in pc.unique(marked["shard"]).to_pylist():
        if store_shard_name(shard) + DONE in there:
            columns = ["source_id", "utterance_id"]
            table = open_shard(shards, store_shard_name(shard)).read(columns=columns)
            rows = table.filter(pc.is_in(table["source_id"], value_set=sources))
            found |= set(rows["utterance_id"].to_pylist())
    return found


def _forget_in(root: Folder) -> None:
    """Make the newest finished generation one without what is forgotten; delete all others."""
    finished = numbers(root, INDEX)
    last = generation(root, finished[-1]) if finished else None
    if last is None:
        discard(root)
        return
    left = last.plan.filter(pa.array(~is_forgotten(last.plan, forgotten(root).names)))
    if not len(left):
        discard(root)
        return
    stale = _stale_shards(root.child("shards"), left)
    if stale or len(left) < len(last.plan):
        last = _rewritten(root, last, left, stale)
    _clean(root, last)


def _stale_shards(shards: Folder, plan: pa.Table) -> list[int]:
    """Return which shards of a plan hold, or tell of, sources that it does not have there."""
    numbers_ = sorted(pc.unique(plan["shard"]).to_pylist())
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(partial(_is_stale, shards, plan), numbers_))
    return [shard for shard, stale in zip(numbers_, found, strict=True) if stale]


def _is_stale(shards: Folder, plan: pa.Table, shard: int) -> bool:
    here = plan.filter(pc.equal(plan["shard"], shard))["source_id"].combine_chunks()
    name = store_shard_name(shard)
    for part in (name, rejects_name(name)):
        rows = open_shard(shards, part).read(columns=["source_id"])
        if not pc.all(pc.is_in(rows["source_id"], value_set=here), min_count=0).as_py():
            return True
    return False


def _rewritten(root: Folder, last: Generation, left: pa.Table, stale: list[int]) -> Generation:
    """Make the generation of what is left, its stale shards written anew under new numbers."""
    config = IngestConfig.model_validate_json(json.dumps(last.store.read_json(INDEX)["config"]))
    shards = root.child("shards")
    root.sweep()
    first = first_free_shard(root, last.plan)
    moved = {shard: first + place for place, shard in enumerate(stale)}
    places = [moved.get(shard, shard) for shard in left["shard"].to_pylist()]
    column = pa.array(places, pa.int32())
    plan = left.set_column(PLAN.get_field_index("shard"), PLAN.field("shard"), column)
    planned = new_generation(root, last.number + 1, plan)
    write_plan(planned)
    for old, new in moved.items():
        _rewrite(shards, old, new, plan, store_id(config))
    finish(root, planned, config, may_be_empty=True)
    return planned


def _rewrite(shards: Folder, old: int, new: int, plan: pa.Table, config: str) -> None:
    """Copy a shard, a row group at a time, without the sources that the plan does not have."""
    here = plan.filter(pc.equal(plan["shard"], new))["source_id"].combine_chunks()
    source = open_shard(shards, store_shard_name(old))
    with shards.open_input(rejects_name(store_shard_name(old))) as file:
        refused = pq.read_table(file)
    refused = refused.filter(pc.is_in(refused["source_id"], value_set=here))
    with shards.scratch() as scratch:
        path, rows = scratch / store_shard_name(new), 0
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
    for number in numbers(root):
        if number != last.number:
            generation_folder(root, number).remove(first=INDEX)
    root.sweep()
    shards = root.child("shards")
    used = {store_shard_name(shard) for shard in last.shards()}
    used |= {rejects_name(name) for name in used}
    for file in shards.list():
        if file.name.removesuffix(DONE) not in used:
            shards.remove_file(file.name)
