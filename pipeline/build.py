"""Build: recipes become mixture shards of episodes.

A task reads one window of the utterance store in sequence and makes the shards that belong to it:
it draws their recipes, a pure function of seed and index wherever it runs, and puts what they use
of each utterance in its place while that passes by.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.casting import MixingTable, Rooms, Rows, as_mixed
from pipeline.commits import ShardRecord, commit_shard, committed_shards
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.episodes import Numbers, account, listed
from pipeline.errors import CscError
from pipeline.lines import Canvas
from pipeline.mixing import recipe
from pipeline.planning import BUILT_SPLITS, plan_tasks
from pipeline.rooms import rooms_of
from pipeline.schema import (
    DATASET_VERSION,
    EPISODE,
    ROOMS_FILE,
    SAMPLE_RATE_HZ,
    SPEAKERS,
    SPEAKERS_FILE,
    Runner,
    Task,
    config_hash,
    of_split,
)
from pipeline.shards import INDEX, encode, iter_pcm, read_catalogue, read_table, shard_writer
from pipeline.splits import check_disjoint
from pipeline.storage import Folder


def dataset_id(store: Any, config: BuildConfig, seed: int) -> str:
    """Return the name of the dataset that this configuration makes of a store, given its index."""
    return config_hash([DATASET_VERSION, store["id"], config.model_dump(), seed])


def build(dataset: Folder, store: Folder, config: BuildConfig, seed: int, run: Runner) -> Any:
    """Build mixtures into a dataset named by `dataset_id` and return its index.

    A finished dataset is returned as it is, an unfinished one is completed.

    Raises:
        CscError: the store has too few speakers, utterances, noises or rooms for what is asked, or
            has a speaker, a recording or an utterance in two splits.
    """
    if dataset.exists(INDEX):
        return dataset.read_json(INDEX)
    name = dataset_id(store.read_json(INDEX), config, seed)
    catalogue = read_catalogue(store)
    check_disjoint(catalogue)
    catalogue = as_mixed(catalogue, config.mixing)
    speakers = speakers_of(catalogue)
    dataset.put(SPEAKERS_FILE, encode(speakers, len(speakers)))
    rooms = rooms_of(store, catalogue) if config.mixing.ever("room_share") else None
    if rooms is not None:
        dataset.put(ROOMS_FILE, encode(rooms, 64))
    done = committed_shards(dataset, name)
    common = {"store": store.uri, "dataset": dataset.uri, "config": name}
    tasks = plan_tasks(catalogue, rooms, config, seed)
    missing = [
        common | task | {"shards": [s for s in task["shards"] if s["name"] not in done]}
        for task in tasks
    ]
    run([task for task in missing if task["shards"]], build_shards)
    return _finish(dataset, name, store, config, seed, speakers, tasks)


def speakers_of(catalogue: pa.Table) -> pa.Table:
    """Return the speakers that mixtures are built of, those of the first split first."""
    speech = catalogue.filter(pc.equal(catalogue["kind"], "speech"))
    counts = speech.group_by(["split", "speaker_id"]).aggregate([("utterance_id", "count")])
    parts = [of_split(counts, split).sort_by("speaker_id") for split in BUILT_SPLITS]
    table = pa.concat_tables(parts).rename_columns(["split", "speaker_id", "utterances"])
    return table.select(SPEAKERS.names).cast(SPEAKERS)


def build_shards(task: Task) -> None:
    """Make the shards of a task and commit each."""
    dataset = Folder(task["dataset"])
    speakers = read_table(dataset, SPEAKERS_FILE)
    row_of = {name: row for row, name in enumerate(speakers["speaker_id"].to_pylist())}
    with dataset.scratch() as scratch:
        for shard, canvas in zip(task["shards"], canvases(task, speakers), strict=True):
            table = canvas.table(row_of)
            path = scratch / shard["name"]
            write_episodes(path, table, task["episodes_per_group"])
            about = account(table, {row_of[voice] for voice in canvas.voices})
            commit_shard(dataset, shard["name"], path, len(table), task["config"], about)


def write_episodes(path: Path, table: pa.Table, rows_per_group: int) -> None:
    """Write rows of `schema.EPISODE` as a mixture shard."""
    with shard_writer(str(path), EPISODE) as writer:
        writer.write_table(table, row_group_size=rows_per_group)
        writer.add_key_value_metadata(Numbers.packed(table))


def canvases(task: Task, speakers: pa.Table) -> list[Canvas]:
    """Draw the recipes of the shards of a task and gather what they use of the store."""
    config = MixingConfig.model_validate(task["mixing"])
    store = Folder(task["store"])
    table = window_table(store, task, config, speakers)
    made = [
        Canvas(
            [recipe(task["key"], i, table, config) for i in range(shard["first"], shard["stop"])],
            config.num_samples,
            config.num_slots,
        )
        for shard in task["shards"]
    ]
    wanted: dict[int, set[int]] = {}
    for shard, row in (place for canvas in made for place in canvas.uses):
        wanted.setdefault(shard, set()).add(row)
    for (shard, row), pcm in iter_pcm(store, wanted):
        for canvas in made:
            canvas.put(shard, row, pcm)
    return made


def window_table(
    store: Folder, task: Task, config: MixingConfig, speakers: pa.Table
) -> MixingTable:
    """Return what the recipes of a task are drawn from."""
    columns = [*Rows._fields, "split", "kind", "label_kind"]
    rows = read_catalogue(store, {shard for shard, *_ in task["runs"]}, columns)
    rows = of_split(as_mixed(rows, config), task["split"])
    shard, row = rows["shard"].to_numpy(), rows["row"].to_numpy()
    inside = np.zeros(len(rows), bool)
    for number, first, stop in task["runs"]:
        inside |= (shard == number) & (row >= first) & (row < stop)
    names, counts = (speakers[name].to_pylist() for name in ("speaker_id", "utterances"))
    rooms = None
    if config.room_share:
        rooms = read_table(Folder(task["dataset"]), ROOMS_FILE, ["room", "split"])
    return MixingTable(
        rows.filter(pa.array(inside)),
        config,
        dict(zip(names, counts, strict=True)),
        Rooms.of(rooms, task["split"]),
    )


def _finish(
    dataset: Folder,
    name: str,
    store: Folder,
    config: BuildConfig,
    seed: int,
    speakers: pa.Table,
    tasks: Sequence[Task],
) -> Any:
    records = sorted(committed_shards(dataset, name).values(), key=itemgetter(0))
    planned = {s["name"]: s["stop"] - s["first"] for task in tasks for s in task["shards"]}
    if planned != {record.name: record.rows for record in records}:
        raise CscError(f"{dataset.uri} has not all of its shards: run the build again")
    _assert_apart(dataset, records, speakers)
    about = store.read_json(INDEX)
    index = {
        "version": DATASET_VERSION,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "id": name,
        "store": about["id"],
        "seed": seed,
        "config": {"build": config.model_dump(), "ingest": about["config"]},
        "speakers": of_split(speakers, "train")["speaker_id"].to_pylist(),
        "episodes": {
            split: sum(record.rows for record in records if record.name.startswith(f"{split}-000-"))
            for split in BUILT_SPLITS
        },
        "shards": [listed(record) for record in records],
    }
    dataset.put_json(INDEX, index)
    return index


def _assert_apart(dataset: Folder, records: Sequence[ShardRecord], speakers: pa.Table) -> None:
    """Assert that those whom tasks put into the mixtures of a split are speakers of that split.

    Raises:
        CscError: naming shard and speaker.
    """
    splits = speakers["split"].to_pylist()
    for record in records:
        split = record.name.partition("-")[0]
        for row in (record.about or {})["speakers"]:
            if splits[row] != split:
                name = speakers["speaker_id"][row]
                raise CscError(f"{dataset.path(record.name)} has {name} of split {splits[row]!r}")
