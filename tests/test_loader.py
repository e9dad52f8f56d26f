"""The order of training: one function of (seed, epoch, step), on any number of ranks."""

import threading
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.build import build
from pipeline.errors import CscError
from pipeline.loader import Batch, EpisodeLoader, audio_seconds
from pipeline.order import SHUFFLED_SHARDS, Order, Piece
from pipeline.storage import Folder
from tests.conftest import BUILD, serially


def loader(
    dataset: Folder, rank: int = 0, world: int = 1, batch_size: int = 4, remix: bool = False
) -> EpisodeLoader:
    return EpisodeLoader(
        dataset, "train", batch_size=batch_size, seed=5, rank=rank, world=world, remix=remix
    )


def assert_same_mixtures(parts: list[Batch], whole: Batch) -> None:
    """Compare what comes of batches: on a rank, lines are numbered among its own."""
    for part in parts:
        assert part.lines.shape[0] < whole.lines.shape[0] or len(parts) == 1
    for name in ("gains_db", "rooms", "speakers", "anchors", "mixit", "numbers"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    there = torch.cat([part.pick >= 0 for part in parts])
    assert torch.equal(there, whole.pick >= 0)
    sources = torch.cat([part.sources for part in parts])
    assert torch.equal(sources[there], whole.sources[there])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("remix", [False, True])
def test_the_global_batch_is_the_same_for_any_world(
    dataset: Folder, world: int, epoch: int, remix: bool
) -> None:
    alone = list(loader(dataset, batch_size=8, remix=remix).batches(epoch))
    ranks = [list(loader(dataset, rank, world, 8, remix).batches(epoch)) for rank in range(world)]
    assert len(alone) == 3
    for step, whole in enumerate(alone):
        assert_same_mixtures([rank[step] for rank in ranks], whole)


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
    names = [shard["name"] for shard in dataset.read_json("index.json")["shards"]]
    rows = {
        row["episode"]: row
        for name in names
        if name.startswith("train")
        for row in pq.read_table(dataset.open_input(name)).to_pylist()
    }
    speakers = pq.read_table(dataset.open_input("speakers.parquet"))["speaker_id"].to_pylist()
    for batch in loader(dataset).batches(0):
        assert audio_seconds(batch) == 4 * 2 * 0.5
        for place, number in enumerate(batch.numbers.tolist()):
            row = rows[number]
            placed = np.frombuffer(row["pcm"], "<i2").reshape(len(row["sources"]), -1)
            filled = torch.isfinite(batch.gains_db[place]).sum().item()
            assert filled == len(row["sources"]) == (batch.pick[place] >= 0).sum().item()
            assert batch.anchors[place].item() == row["anchor"]
            for source, audio in zip(row["sources"], placed, strict=True):
                where = (place, source["condition"], source["slot"])
                assert np.array_equal(batch.sources[where].numpy(), audio)
                assert batch.gains_db[where].item() == pytest.approx(source["gain_db"])
                if source["slot"] < 2:
                    assert speakers[batch.speakers[where].item()] == source["speaker_id"]


shard_rows = st.lists(st.integers(1, 40), min_size=1, max_size=150)


@given(st.integers(0, 2**31), st.integers(0, 1000), shard_rows, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_pure_permutation_in_reach(
    seed: int, epoch: int, rows: list[int], rows_per_group: int
) -> None:
    total = sum(rows)
    pieces = Order(rows, rows_per_group, seed, epoch).pieces(0, total)
    assert pieces == Order(rows, rows_per_group, seed, epoch).pieces(0, total)
    seen = [
        (piece.shard, piece.group * rows_per_group + place)
        for piece in pieces
        for place in range(piece.first, piece.stop)
    ]
    everything = [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    assert sorted(seen) == everything
    opened = {piece.shard: place for place, piece in reversed([*enumerate(pieces)])}
    left = {piece.shard: place for place, piece in enumerate(pieces)}
    for place in range(len(pieces)):
        reading = sum(opened[shard] <= place <= left[shard] for shard in opened)
        assert reading <= SHUFFLED_SHARDS


@given(shard_rows, st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_of_an_order_fit_together(
    rows: list[int], rows_per_group: int, data: st.DataObject
) -> None:
    order, total = Order(rows, rows_per_group, 1, 2), sum(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=8)))
    edges = [0, *cuts, total]

    def episodes(pieces: list[Piece]) -> list[tuple[int, int, int]]:
        return [(p.shard, p.group, row) for p in pieces for row in range(p.first, p.stop)]

    parts = [episodes(order.pieces(a, b)) for a, b in pairwise(edges)]
    assert [place for part in parts for place in part] == episodes(order.pieces(0, total))
    assert [len(part) for part in parts] == [b - a for a, b in pairwise(edges)]


def test_each_pass_is_read_in_its_epoch(store: Folder, tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    build(folder, store, BUILD.model_copy(update={"passes": 2}), 3, serially)
    both = loader(folder)
    seen = [
        {number for batch in both.batches(epoch) for number in batch.numbers.tolist()}
        for epoch in range(3)
    ]
    assert seen == [set(range(24)), set(range(24, 48)), set(range(24))]


def copied(dataset: Folder, to: Path | str) -> Folder:
    folder = Folder.at(to)
    for file in dataset.list():
        folder.put(file.name, dataset.read(file.name))
    return folder


NAME = "train-000-00001.parquet"


def test_a_short_or_missing_shard_is_an_error_before_the_first_step(
    dataset: Folder, tmp_path: Path
) -> None:
    folder = copied(dataset, tmp_path)
    folder.put(NAME, dataset.read(NAME)[:-100])
    with pytest.raises(CscError, match=r"train-000-00001\.parquet is damaged"):
        loader(folder)
    folder.remove_file(NAME)
    with pytest.raises(CscError, match=r"train-000-00001\.parquet is damaged"):
        loader(folder)


def all_batches(folder: Folder) -> list[Batch]:
    return list(loader(folder).batches(0))


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_is_found_or_changes_nothing(
    dataset: Folder, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    """Wherever it lies: in the audio, in the recipes, in what says where those are."""
    folder = copied(dataset, tmp_path_factory.mktemp("flipped"))
    data = bytearray(dataset.read(NAME))
    data[int(place * len(data))] ^= 1 << bit
    folder.put(NAME, bytes(data))
    try:
        batches = all_batches(folder)
    except CscError as error:
        said = str(error)
    else:
        said = f"{NAME} is damaged"
        for ours, theirs in zip(batches, all_batches(dataset), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert f"{NAME} is damaged" in said


def test_the_audio_of_every_row_group_is_checked(dataset: Folder, tmp_path: Path) -> None:
    folder = copied(dataset, tmp_path)
    data = dataset.read(NAME)
    row = pq.read_table(dataset.open_input(NAME), columns=["pcm"])["pcm"][-1].as_py()
    at = data.index(row) + len(row) - 7
    folder.put(NAME, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CscError, match=r"train-000-00001\.parquet is damaged"):
        all_batches(folder)


def test_batches_come_from_s3_as_from_a_disk(dataset: Folder, s3: str) -> None:
    cloud = copied(dataset, f"{s3}/mixtures")
    for ours, theirs in zip(all_batches(cloud), all_batches(dataset), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_store_that_is_gone_is_no_damage(
    dataset: Folder, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be reached must not be called damaged: the advice would be to remove it."""
    folder = copied(dataset, f"{s3}/away")
    ready = loader(folder)
    monkeypatch.setattr("pipeline.storage.ARROW_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CscError, match=r"cannot (read|open) "):
        next(ready.batches(0))


def test_a_reader_may_stop_anywhere(dataset: Folder) -> None:
    before = threading.active_count()
    batches = loader(dataset).batches(0)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_dataset_that_does_not_fit_is_refused(dataset: Folder, tmp_path: Path) -> None:
    with pytest.raises(CscError, match="fewer than one batch of 25"):
        loader(dataset, batch_size=25)
    with pytest.raises(CscError, match="cannot be shared by 5"):
        loader(dataset, world=5)
    with pytest.raises(CscError, match="in blocks of 2, cannot be shared by 3"):
        loader(dataset, world=3, remix=True)
    other = copied(dataset, tmp_path)
    other.put_json("index.json", dataset.read_json("index.json") | {"version": 99})
    with pytest.raises(CscError, match="version 99"):
        loader(other)


def test_episodes_are_those_of_the_build(dataset: Folder) -> None:
    assert dataset.read_json("index.json")["episodes"] == {
        "train": BUILD.train_episodes,
        "valid": BUILD.valid_episodes,
    }


def test_endless_is_epoch_after_epoch(dataset: Folder) -> None:
    loader = EpisodeLoader(dataset, "train", batch_size=4, seed=3)
    epochs = [batch for epoch in range(3) for batch in loader.batches(epoch)]
    for first in (0, 1, loader.steps_per_epoch, loader.steps_per_epoch + 2):
        found = list(islice(loader.endless(first), len(epochs) - first))
        assert len(found) == len(epochs) - first
        for ours, theirs in zip(found, epochs[first:], strict=True):
            assert torch.equal(ours.numbers, theirs.numbers)
            assert torch.equal(ours.lines, theirs.lines)
