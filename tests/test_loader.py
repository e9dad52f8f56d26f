"""The order of training: one function of (seed, epoch, step), on any number of ranks."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CscError
from pipeline.loader import Batch, EpisodeLoader, audio_seconds, order
from pipeline.storage import Folder
from tests.conftest import BUILD


def loader(dataset: Folder, rank: int = 0, world: int = 1, batch_size: int = 4) -> EpisodeLoader:
    return EpisodeLoader(dataset, "train", batch_size=batch_size, seed=5, rank=rank, world=world)


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_global_batch_is_the_same_for_any_world(
    dataset: Folder, world: int, epoch: int
) -> None:
    alone = list(loader(dataset).batches(epoch))
    ranks = [list(loader(dataset, rank, world).batches(epoch)) for rank in range(world)]
    assert len(alone) == 6
    for step, whole in enumerate(alone):
        for ours, theirs in zip(joined([rank[step] for rank in ranks]), whole, strict=True):
            assert torch.equal(ours, theirs)


def test_an_epoch_can_be_entered_at_any_step(dataset: Folder) -> None:
    whole = [batch.numbers.tolist() for batch in loader(dataset).batches(1)]
    for first in range(len(whole) + 1):
        rest = loader(dataset).batches(1, first)
        assert [batch.numbers.tolist() for batch in rest] == whole[first:]


def test_an_epoch_has_every_episode_once_in_an_order_of_its_own(dataset: Folder) -> None:
    orders = [
        [number for batch in loader(dataset).batches(epoch) for number in batch.numbers.tolist()]
        for epoch in range(2)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))


def test_what_does_not_fill_a_batch_is_left_to_other_epochs(dataset: Folder) -> None:
    big = loader(dataset, batch_size=10)
    assert big.steps_per_epoch == 2
    seen = {n for epoch in range(8) for b in big.batches(epoch) for n in b.numbers.tolist()}
    assert seen == set(range(24))


def test_batches_hold_what_the_shards_hold(dataset: Folder) -> None:
    rows = {
        row["episode"]: row
        for shard in range(4)
        for row in pq.read_table(dataset.open_input(f"train-{shard:05d}.parquet")).to_pylist()
    }
    speakers = dataset.read_json("index.json")["speakers"]
    for batch in loader(dataset).batches(0):
        assert audio_seconds(batch) == 4 * 2 * 0.5
        for place, number in enumerate(batch.numbers.tolist()):
            row = rows[number]
            placed = np.frombuffer(row["pcm"], "<i2").reshape(len(row["sources"]), -1)
            filled = torch.isfinite(batch.gains_db[place]).sum().item()
            assert filled == len(row["sources"])
            for source, audio in zip(row["sources"], placed, strict=True):
                where = (place, source["condition"], source["slot"])
                assert np.array_equal(batch.sources[where].numpy(), audio)
                assert batch.gains_db[where].item() == pytest.approx(source["gain_db"])
                if source["slot"] < 2:
                    assert speakers[batch.speakers[where].item()] == source["speaker_id"]


@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_the_order_is_a_pure_permutation(seed: int, epoch: int, count: int) -> None:
    first = order(seed, epoch, count)
    assert np.array_equal(first, order(seed, epoch, count))
    assert sorted(first.tolist()) == list(range(count))


def copied(dataset: Folder, to: Path) -> Folder:
    folder = Folder.at(to)
    for file in dataset.list():
        folder.put(file.name, dataset.read(file.name))
    return folder


def test_a_damaged_shard_is_an_error_that_names_it(dataset: Folder, tmp_path: Path) -> None:
    short = copied(dataset, tmp_path / "short")
    short.put("train-00002.parquet", dataset.read("train-00002.parquet")[:-100])
    with pytest.raises(CscError, match=r"train-00002\.parquet is damaged"):
        loader(short)
    same_size = copied(dataset, tmp_path / "same")
    whole = bytearray(dataset.read("train-00001.parquet"))
    whole[-200:] = bytes(200)
    same_size.put("train-00001.parquet", bytes(whole))
    with pytest.raises(CscError, match=r"train-00001\.parquet is damaged"):
        loader(same_size)


def test_a_dataset_that_does_not_fit_is_refused(dataset: Folder, tmp_path: Path) -> None:
    with pytest.raises(CscError, match="fewer than one batch of 25"):
        loader(dataset, batch_size=25)
    with pytest.raises(CscError, match="cannot be shared by 3"):
        loader(dataset, world=3)
    other = copied(dataset, tmp_path)
    other.put_json("index.json", dataset.read_json("index.json") | {"version": 99})
    with pytest.raises(CscError, match="version 99"):
        loader(other)


def test_episodes_are_those_of_the_build(dataset: Folder) -> None:
    assert dataset.read_json("index.json")["episodes"] == {
        "train": BUILD.train_episodes,
        "valid": BUILD.valid_episodes,
    }
