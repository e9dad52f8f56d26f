"""Shards of mixtures: the same bytes from a loop, from Ray, on S3, and after a kill."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.build import build, dataset_id
from pipeline.errors import CscError
from pipeline.schema import Task, Work
from pipeline.shards import read_catalogue, read_pcm
from pipeline.storage import Folder
from pipeline.tasks import run_tasks
from tests.conftest import BUILD, serially, shard_hashes


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
            assert seen[-1] == (6, 6)
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
    assert built.read("train-00000.parquet") == dataset.read("train-00000.parquet")


SLOW_BUILD = """
import sys, time
from pipeline.build import build
from pipeline.storage import Folder
from tests.conftest import BUILD

def slowly(tasks, work):
    for task in tasks:
        work(task)
        print(task["name"], flush=True)
        time.sleep(0.05)

build(Folder(sys.argv[2]), Folder(sys.argv[1]), BUILD, 3, slowly)
"""


@pytest.mark.parametrize("shards_before_the_kill", [1, 3])
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
    time.sleep(0.01)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not folder.exists("index.json")
    redone: list[str] = []

    def counted(tasks: Sequence[Task], work: Work) -> None:
        redone.extend(task["name"] for task in tasks)
        serially(tasks, work)

    build(folder, store, BUILD, 3, counted)
    assert len(redone) <= 6 - shards_before_the_kill
    assert shard_hashes(folder) == shard_hashes(dataset)


def test_a_shard_holds_recipe_and_dry_audio(store: Folder, dataset: Folder) -> None:
    rows = pq.read_table(dataset.open_input("train-00001.parquet")).to_pylist()
    assert [row["episode"] for row in rows] == list(range(6, 12))
    num_samples = BUILD.mixing.num_samples
    for row in rows:
        placed = np.frombuffer(row["pcm"], "<i2").reshape(-1, num_samples)
        for line, source in zip(placed, row["sources"], strict=True):
            (pcm,) = read_pcm(store, {source["shard"]: [source["row"]]}).values()
            first, count = source["offset"], source["num_samples"]
            expected = np.zeros(num_samples, "<i2")
            expected[source["onset"] : source["onset"] + count] = pcm[first : first + count]
            assert np.array_equal(line, expected)


def test_no_speaker_of_another_split_is_in_a_mixture(store: Folder, dataset: Folder) -> None:
    catalogue = read_catalogue(store)
    for shard in shard_hashes(dataset):
        split = shard.partition("-")[0]
        allowed = set(
            catalogue.filter(pc.equal(catalogue["split"], split))["speaker_id"].to_pylist()
        )
        for row in pq.read_table(dataset.open_input(shard), columns=["sources"]).to_pylist():
            assert {source["speaker_id"] for source in row["sources"]} <= allowed


def test_a_lower_sir_makes_the_interferer_louder(store: Folder, dataset: Folder) -> None:
    """The levels in a shard are the ones asked for, up to what a crop differs from its whole."""
    catalogue = read_catalogue(store).select(["utterance_id", "level_dbfs"]).to_pylist()
    level = {row["utterance_id"]: row["level_dbfs"] for row in catalogue}
    for row in pq.read_table(dataset.open_input("train-00000.parquet")).to_pylist():
        for number, condition in enumerate(row["conditions"]):
            here = [s for s in row["sources"] if s["condition"] == number]
            heard = {s["slot"]: level[s["utterance_id"]] + s["gain_db"] for s in here}
            if 1 in heard:
                assert heard[0] - heard[1] == pytest.approx(condition["sir_db"], abs=1e-3)
            if 2 in heard:
                assert heard[0] - heard[2] == pytest.approx(condition["snr_db"], abs=1e-3)
