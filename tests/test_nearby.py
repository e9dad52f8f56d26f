"""What a node keeps of remote shards: same batches, no second reading, a limit, no trust."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.build import build, dataset_id
from pipeline.loader import Batch, EpisodeLoader
from pipeline.nearby import Nearby
from pipeline.storage import Folder
from tests.conftest import BUILD, serially


@pytest.fixture(scope="module")
def remote(s3: str, store: Folder) -> Folder:
    folder = Folder(f"{s3}/nearby").child(dataset_id(store.read_json("index.json"), BUILD, seed=3))
    build(folder, store, BUILD, 3, serially)
    return folder


def batches(dataset: Folder, nearby: Nearby | None, epoch: int = 0) -> list[Batch]:
    loader = EpisodeLoader(dataset, "train", batch_size=4, seed=5, remix=True, nearby=nearby)
    return list(loader.batches(epoch))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the pieces that are fetched from afar."""
    fetched: list[str] = []
    get = Nearby.get

    def counted(self: Nearby, file: str, piece: int, read: Any) -> memoryview:
        return get(self, file, piece, lambda: (fetched.append(file), read())[1])

    monkeypatch.setattr(Nearby, "get", counted)
    return fetched


def test_batches_are_the_same_and_pieces_are_fetched_once(
    remote: Folder, dataset: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = counting(monkeypatch)
    local = [batches(dataset, None, epoch) for epoch in range(2)]
    for epoch in range(2):
        assert_same(batches(remote, Nearby(tmp_path, 10**9), epoch), local[epoch])
    assert len(fetched) == BUILD.train_episodes // BUILD.episodes_per_group
    assert_same(batches(dataset, Nearby(tmp_path / "none", 10**9)), local[0])
    assert not (tmp_path / "none").exists()  # of a local dataset nothing is kept


def test_a_damaged_piece_is_fetched_again(remote: Folder, tmp_path: Path) -> None:
    whole = batches(remote, Nearby(tmp_path, 10**9))
    for path in tmp_path.iterdir():
        held = bytearray(path.read_bytes())
        held[-1] ^= 1
        path.write_bytes(held)
    assert_same(batches(remote, Nearby(tmp_path, 10**9)), whole)


def test_a_folder_that_takes_nothing_costs_a_warning_only(remote: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match=r"keeps no shards.*ray.cache_folder"):
        found = batches(remote, Nearby(tmp_path / "file", 10**9))
    assert_same(found, batches(remote, None))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 400)), max_size=60))
@settings(max_examples=25, deadline=None)
def test_the_limit_holds_and_what_was_used_last_stays(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int]]
) -> None:
    root, limit = tmp_path_factory.mktemp("kept"), 1000
    nearby = Nearby(root, limit)
    sizes: dict[int, int] = {}
    for piece, size in asked:
        size = sizes.setdefault(piece, size)
        expected = np.full(size, piece, np.uint8)
        found = nearby.get("a", piece, lambda data=expected: data.tobytes())
        assert np.array_equal(np.frombuffer(found, np.uint8), expected)
        assert sum(path.stat().st_size for path in root.iterdir()) <= limit
        assert nearby._path("a", piece).exists()


def test_processes_share_a_folder(tmp_path: Path) -> None:
    several = [Nearby(tmp_path, 3000) for _ in range(4)]

    def work(number: int) -> bool:
        found = several[number % 4].get("a", number % 7, lambda: bytes([number % 7]) * 400)
        return set(found.tobytes()) == {number % 7}

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(300)))
