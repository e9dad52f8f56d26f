"""Shards of mixtures: the same bytes from a loop, from Ray, on S3, and after a kill."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.build import build, dataset_id
from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.distributions import Curriculum, MixingConfig
from pipeline.errors import CscError
from pipeline.schema import NOISE, SEVERAL, Task, Work, of_split
from pipeline.shards import encode, read_catalogue, read_pcm
from pipeline.speech import active_level_dbfs
from pipeline.storage import Folder
from pipeline.tasks import run_tasks
from tests.conftest import BUILD, make_store, serially, shard_hashes, write_rooms


def named(root: Folder, store: Folder) -> Folder:
    return root.child(dataset_id(store.read_json("index.json"), BUILD, 3))


def test_ray_builds_what_a_loop_builds(store: Folder, dataset: Folder, tmp_path: Path) -> None:
    hashes = []
    seen: list[tuple[int, int]] = []

    def on_ray(tasks: Sequence[Task], work: Work) -> None:
        run_tasks(tasks, work, lambda *counts: seen.append(counts))

    for cpus in (1, 4):
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        try:
            folder = named(Folder.at(tmp_path / str(cpus)), store)
            build(folder, store, BUILD, 3, on_ray)
            hashes.append(shard_hashes(folder))
            assert seen[-1] == (3, 3)  # two windows for training, one for validation
        finally:
            ray.shutdown()
    assert hashes[0] == hashes[1] == shard_hashes(dataset)


def test_errors_of_ray_tasks_arrive_as_they_are(tmp_path: Path) -> None:
    def work(task: object) -> None:
        raise CscError("shard 7: the disk is full")

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(CscError, match="shard 7: the disk is full"):
            run_tasks([{"a": 1}], work, lambda *_: None)
    finally:
        ray.shutdown()


def test_s3_holds_the_same_bytes(store: Folder, dataset: Folder, s3: str) -> None:
    cloud = Folder.at(f"{s3}/datasets")
    here, there = Folder.at(Path(store.uri).parent), Folder.at(f"{s3}/store")
    for file in here.list():
        there.put(file.name, here.read(file.name))
    copy = there.child(Path(store.uri).name)
    built = named(cloud, copy)
    build(built, copy, BUILD, 3, serially)
    assert shard_hashes(built) == shard_hashes(dataset)
    assert built.read("train-000-00000.parquet") == dataset.read("train-000-00000.parquet")


SLOW_BUILD = """
import sys
from pipeline import build as module
from pipeline.storage import Folder
from tests.conftest import BUILD, serially

commit = module.commit_shard
def said(folder, name, *rest):
    commit(folder, name, *rest)
    print(name, flush=True)
module.commit_shard = said
module.build(Folder(sys.argv[2]), Folder(sys.argv[1]), BUILD, 3, serially)
"""


@pytest.mark.parametrize("shards_before_the_kill", [1, 2, 3, 5])
def test_a_killed_build_ends_with_the_same_bytes(
    store: Folder, dataset: Folder, tmp_path: Path, shards_before_the_kill: int
) -> None:
    folder = named(Folder.at(tmp_path), store)
    builder = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, store.uri, folder.uri],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert builder.stdout is not None
    for _ in range(shards_before_the_kill):
        builder.stdout.readline()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not folder.exists("index.json")
    redone: list[str] = []

    def counted(tasks: Sequence[Task], work: Work) -> None:
        redone.extend(shard["name"] for task in tasks for shard in task["shards"])
        serially(tasks, work)

    build(folder, store, BUILD, 3, counted)
    assert len(redone) <= len(shard_hashes(dataset)) - shards_before_the_kill
    assert shard_hashes(folder) == shard_hashes(dataset)


def rows_of(dataset: Folder, split: str = "train") -> list[dict[str, Any]]:
    names = [name for name in shard_hashes(dataset) if name.startswith(split)]
    return [row for name in names for row in pq.read_table(dataset.open_input(name)).to_pylist()]


def test_a_shard_holds_recipe_and_dry_audio(store: Folder, dataset: Folder) -> None:
    rows = rows_of(dataset)
    assert [row["episode"] for row in rows] == list(range(24))
    num_samples = BUILD.mixing.num_samples
    for row in rows:
        placed = np.frombuffer(row["pcm"], "<i2").reshape(-1, num_samples)
        for line, about, source in zip(placed, row["lines"], row["sources"], strict=True):
            (pcm,) = read_pcm(store, {source["shard"]: [source["row"]]}).values()
            first, count = source["offset"], source["num_samples"]
            expected = np.zeros(num_samples, "<i2")
            expected[source["onset"] : source["onset"] + count] = pcm[first : first + count]
            assert np.array_equal(line, expected)
            assert (about["condition"], about["slot"]) == (source["condition"], source["slot"])
            assert about["gain_db"] == pytest.approx(source["gain_db"])


def test_no_speaker_of_another_split_is_in_a_mixture(store: Folder, dataset: Folder) -> None:
    catalogue = read_catalogue(store)
    for split in ("train", "valid"):
        allowed = set(of_split(catalogue, split)["speaker_id"].to_pylist())
        for row in rows_of(dataset, split):
            assert {source["speaker_id"] for source in row["sources"]} <= allowed


def test_a_speaker_that_was_smuggled_in_is_found(store: Folder, tmp_path: Path) -> None:
    """What a shard says of its speakers is compared with their splits before it counts."""
    folder = named(Folder.at(tmp_path), store)

    def smuggling(tasks: Sequence[Task], work: Work) -> None:
        serially(tasks, work)
        name = "valid-000-00000.parquet.done.json"
        record = folder.read_json(name)
        record["about"]["speakers"][0] = 0
        folder.put_json(name, record)

    with pytest.raises(CscError, match=r"valid-000-00000\.parquet has first/s01 of split 'train'"):
        build(folder, store, BUILD, 3, smuggling)
    assert not folder.exists("index.json")


def test_a_task_that_got_lost_is_noticed(store: Folder, tmp_path: Path) -> None:
    folder = named(Folder.at(tmp_path), store)
    with pytest.raises(CscError, match="has not all of its shards: run the build again"):
        build(folder, store, BUILD, 3, lambda tasks, work: serially(tasks[1:], work))
    assert not folder.exists("index.json")


def test_a_torn_store_is_refused(store: Folder, tmp_path: Path) -> None:
    """A speaker in two splits of the store stops the build before any work."""
    copy = Folder.at(tmp_path / "generation")
    table = read_catalogue(store)
    splits = table["split"].to_pylist()
    splits[0] = "test" if splits[0] == "train" else "train"
    torn = table.set_column(table.schema.get_field_index("split"), "split", pa.array(splits))
    copy.put("utterances.parquet", encode(torn, 100))
    copy.put_json("index.json", store.read_json("index.json"))
    with pytest.raises(CscError, match="is in more than one of the splits"):
        build(Folder.at(tmp_path / "d"), copy, BUILD, 3, serially)


def pauses(row: dict[str, Any]) -> bool:
    """Tell whether a part of an utterance was taken that is far under the whole of it."""
    return any(
        source["level_dbfs"] - source["gain_db"] < source["utterance_dbfs"] - 19.9
        for source in row["sources"]
    )


def test_a_mixture_has_the_levels_that_were_asked_for(dataset: Folder) -> None:
    """Of the parts that were taken, not of the utterances that they are parts of."""
    for row, condition in ((one, c) for one in rows_of(dataset) for c in one["conditions"]):
        for name in ("sir_db", "snr_db"):
            realised = condition[f"realised_{name}"]
            assert (realised is None) == (condition[name] is None)
            if realised is not None:  # a pause is not lifted to be speech
                assert realised == pytest.approx(condition[name], abs=1e-3) or pauses(row)


def test_realised_levels_are_those_of_the_mixture(dataset: Folder) -> None:
    """Measured again from what `render` makes of a row."""
    compared = 0
    for row in rows_of(dataset):
        dry = np.frombuffer(row["pcm"], "<i2").reshape(len(row["lines"]), -1)
        for number, condition in enumerate(row["conditions"]):
            heard = {
                line["slot"]: active_level_dbfs(
                    samples.astype(np.float64) / 32768 * 10 ** (line["gain_db"] / 20)
                )
                for line, samples in zip(row["lines"], dry, strict=True)
                if line["condition"] == number
            }
            if condition["realised_sir_db"] is not None:
                compared += 1
                measured = heard[0] - heard[1]
                assert condition["realised_sir_db"] == pytest.approx(measured, abs=0.5)
                assert condition["realised_overlap"] > 0.9
            if condition["realised_snr_db"] is not None:
                measured = heard[0] - heard[2]
                assert condition["realised_snr_db"] == pytest.approx(measured, abs=0.5)
    assert compared > 20


def test_passes_are_shards_of_their_own_and_a_curriculum_moves(
    store: Folder, tmp_path: Path
) -> None:
    moving = Curriculum(epochs=2, start={"sir_min_db": 10.0, "sir_max_db": 10.0})
    mixing = BUILD.mixing.model_copy(update={"curriculum": moving})
    config = BUILD.model_copy(update={"passes": 3, "mixing": mixing})
    folder = Folder.at(tmp_path)
    index = build(folder, store, config, 3, serially)
    assert index["episodes"] == {"train": 24, "valid": 8}
    rows = rows_of(folder)
    assert [row["episode"] for row in rows] == list(range(72))
    asked = [
        [c["sir_db"] for row in rows[a : a + 24] for c in row["conditions"] if c["sir_db"]]
        for a in (0, 24, 48)
    ]
    assert set(asked[0]) == {10.0}
    assert min(asked[1]) >= 2.5
    assert min(asked[2]) < 0
    assert min(c["sir_db"] or 10 for row in rows_of(folder, "valid") for c in row["conditions"]) < 5


def test_everything_at_once_is_the_same_on_any_number_of_workers(
    corpora: IngestConfig, tmp_path: Path
) -> None:
    """Rooms, babble, absent targets, mixtures of mixtures, two interferers, partial overlap."""
    rooms = CorpusConfig(name="rooms", root=str(write_rooms(tmp_path / "rooms")), kind="room")
    store = make_store(
        tmp_path / "store",
        corpora.model_copy(update={"corpora": [*corpora.corpora, rooms]}),
    )
    mixing = MixingConfig(
        seconds=0.5,
        interferer_shares=[0.2, 0.4, 0.4],
        overlap_min=0.0,
        absent_share=0.3,
        noise_share=0.6,
        babble_share=0.5,
        babble_voices=3,
        room_share=0.5,
        mixit_share=0.2,
        mixit_voices=1,
    )
    config = BUILD.model_copy(update={"mixing": mixing})
    here, there = Folder.at(tmp_path / "a"), Folder.at(tmp_path / "b")
    build(here, store, config, 3, serially)

    def backwards(tasks: Sequence[Task], work: Work) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, reversed(tasks)))

    build(there, store, config, 3, backwards)
    assert shard_hashes(here) == shard_hashes(there)
    rows = rows_of(here)
    lines = [line for row in rows for line in row["lines"]]
    assert {line["speaker"] for line in lines} >= {NOISE, SEVERAL}
    assert any(line["room"] >= 0 for line in lines)
    check_premixed(store, rows)


def check_premixed(store: Folder, rows: list[dict[str, Any]]) -> None:
    """A line of several voices is their plain sum, to within rounding."""
    several = 0
    for row in rows:
        dry = np.frombuffer(row["pcm"], "<i2").reshape(len(row["lines"]), -1)
        for line, samples in zip(row["lines"], dry, strict=True):
            where = (line["condition"], line["slot"])
            sources = [s for s in row["sources"] if (s["condition"], s["slot"]) == where]
            expected = np.zeros(len(samples))
            for source in sources:
                (pcm,) = read_pcm(store, {source["shard"]: [source["row"]]}).values()
                taken = pcm[source["offset"] : source["offset"] + source["num_samples"]]
                place = slice(source["onset"], source["onset"] + len(taken))
                expected[place] += taken * 10 ** ((source["gain_db"] - line["gain_db"]) / 20)
            several += len(sources) > 1
            assert np.abs(samples - expected).max() <= 1 + len(sources) * 0.6
    assert several > 5
