"""Build: recipes become mixture shards of episodes.

A task draws the recipes of its shard, a pure function of seed and index wherever it runs, reads
the window of utterance shards that they use and writes the episodes with their dry sources.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.audio import Pcm
from pipeline.commits import commit_shard, committed_shards
from pipeline.errors import CscError
from pipeline.mixing import (
    BuildConfig,
    MixingConfig,
    MixingTable,
    Recipe,
    Source,
    recipe,
    stream_key,
    window,
)
from pipeline.schema import DATASET_VERSION, EPISODE, Runner, Task, config_hash
from pipeline.shards import INDEX, encode, read_catalogue, read_pcm
from pipeline.storage import Folder

BUILT_SPLITS = ("train", "valid")


def dataset_id(store: Any, config: BuildConfig, seed: int) -> str:
    """Return the name of the dataset that this configuration makes of a store, given its index."""
    return config_hash([DATASET_VERSION, store["id"], config.model_dump(), seed])


def build(dataset: Folder, store: Folder, config: BuildConfig, seed: int, run: Runner) -> Any:
    """Build mixtures into a dataset named by `dataset_id` and return its index.

    A finished dataset is returned as it is, an unfinished one is completed.

    Raises:
        CscError: the store has too few speakers, utterances or noises for what is asked.
    """
    if dataset.exists(INDEX):
        return dataset.read_json(INDEX)
    name = dataset_id(store.read_json(INDEX), config, seed)
    catalogue = read_catalogue(store)
    done = committed_shards(dataset, name)
    common = {
        "store": store.uri,
        "dataset": dataset.uri,
        "config": name,
        "mixing": config.mixing.model_dump(),
        "episodes_per_group": config.episodes_per_group,
    }
    plan = plan_shards(catalogue, config, seed)
    run([common | task for task in plan if task["name"] not in done], build_shard)
    return _finish(dataset, name, store, config, seed, catalogue)


def plan_shards(catalogue: pa.Table, config: BuildConfig, seed: int) -> list[dict[str, Any]]:
    """Return name, window and range of episodes of each mixture shard."""
    tasks = []
    episodes = {"train": config.train_episodes, "valid": config.valid_episodes}
    for split in BUILT_SPLITS:
        rows = of_split(catalogue, split)
        try:
            MixingTable(rows, config.mixing)
        except CscError as error:  # said here, once, before any work
            raise CscError(f"split {split!r}: {error}, or change ingest.splits") from error
        shards = pc.unique(rows.filter(pc.equal(rows["kind"], "speech"))["shard"]).to_pylist()
        noise = pc.unique(rows.filter(pc.equal(rows["kind"], "noise"))["shard"]).to_pylist()
        key = stream_key(seed, split)
        for number, start in enumerate(range(0, episodes[split], config.episodes_per_shard)):
            chosen = window(key, number, len(shards), config.window_shards)
            tasks.append(
                {
                    "name": f"{split}-{number:05d}.parquet",
                    "split": split,
                    "key": key,
                    "first": start,
                    "stop": min(start + config.episodes_per_shard, episodes[split]),
                    "window": [*(shards[i] for i in chosen), *noise],
                }
            )
    return tasks


def of_split(catalogue: pa.Table, split: str) -> pa.Table:
    return catalogue.filter(pc.equal(catalogue["split"], split))


def build_shard(task: Task) -> None:
    """Draw, read, place and write the episodes of one shard."""
    store, config = Folder(task["store"]), MixingConfig.model_validate(task["mixing"])
    catalogue = of_split(read_catalogue(store, shards=task["window"]), task["split"])
    table = MixingTable(catalogue, config)
    recipes = [
        recipe(task["key"], index, table, config) for index in range(task["first"], task["stop"])
    ]
    wanted: dict[int, set[int]] = {}
    for source in (source for drawn in recipes for source in drawn.sources):
        wanted.setdefault(source.shard, set()).add(source.row)
    audio = read_pcm(store, wanted)
    rows = [drawn.as_row() | {"pcm": place(drawn, audio, config)} for drawn in recipes]
    data = encode(pa.Table.from_pylist(rows, schema=EPISODE), task["episodes_per_group"])
    commit_shard(Folder(task["dataset"]), task["name"], data, len(rows), task["config"])


def place(drawn: Recipe, audio: dict[tuple[int, int], Pcm], config: MixingConfig) -> bytes:
    """Return the sources of an episode, each on its mixture's time line, one after another."""
    placed = np.zeros((len(drawn.sources), config.num_samples), "<i2")
    for line, source in zip(placed, drawn.sources, strict=True):
        line[source.onset : source.onset + source.num_samples] = _segment(source, audio)
    return placed.tobytes()


def _segment(source: Source, audio: dict[tuple[int, int], Pcm]) -> Pcm:
    return audio[source.shard, source.row][source.offset : source.offset + source.num_samples]


def _finish(
    dataset: Folder, name: str, store: Folder, config: BuildConfig, seed: int, catalogue: pa.Table
) -> Any:
    train = of_split(catalogue, "train")
    speech = train.filter(pc.equal(train["kind"], "speech"))
    records = sorted(committed_shards(dataset, name).values())
    about = store.read_json(INDEX)
    index = {
        "version": DATASET_VERSION,
        "id": name,
        "store": about["id"],
        "seed": seed,
        "config": {"build": config.model_dump(), "ingest": about["config"]},
        "speakers": sorted(pc.unique(speech["speaker_id"]).to_pylist()),
        "episodes": {
            split: sum(record.rows for record in records if record.name.startswith(f"{split}-"))
            for split in BUILT_SPLITS
        },
        "shards": [record._asdict() for record in records],
    }
    dataset.put_json(INDEX, index)
    return index
