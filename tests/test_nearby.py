"""What a node keeps of remote shards: same batches, no second reading, a limit, no trust."""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import nearby as kept
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


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is kept hang on its limit alone, not on how full this disk is."""
    monkeypatch.setattr(kept, "FREE_SHARE", 0.0)


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

    def counted(self: Nearby, file: str, piece: int, size: int, read: Any) -> memoryview:
        return get(self, file, piece, size, lambda: (fetched.append(file), read())[1])

    monkeypatch.setattr(Nearby, "get", counted)
    return fetched


def test_batches_are_the_same_and_pieces_are_fetched_once(
    remote: Folder, dataset: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = counting(monkeypatch)
    local = [batches(dataset, None, epoch) for epoch in range(2)]
    for epoch in range(2):
        assert_same(batches(remote, Nearby(str(tmp_path), 10**9), epoch), local[epoch])
    assert len(fetched) == BUILD.train_episodes // BUILD.episodes_per_group
    assert_same(batches(dataset, Nearby(str(tmp_path / "none"), 10**9)), local[0])
    assert not (tmp_path / "none").exists()  # of a local dataset nothing is kept


@pytest.mark.parametrize("damage", [lambda held: held[:-1] + b"?", lambda held: held[:100]])
def test_a_damaged_piece_is_fetched_again(
    remote: Folder, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    nearby = Nearby(str(tmp_path), 10**9)
    whole = batches(remote, nearby)
    kept = {path: path.read_bytes() for path in nearby.root.iterdir()}
    for path, held in kept.items():
        path.write_bytes(damage(held))
    assert_same(batches(remote, Nearby(str(tmp_path), 10**9)), whole)
    left = {path: path.read_bytes() for path in nearby.root.iterdir()}
    assert left.items() <= kept.items()  # nothing damaged is left


def test_a_folder_that_others_can_write_to_is_not_used(remote: Folder, tmp_path: Path) -> None:
    nearby = Nearby(str(tmp_path), 10**9)
    nearby.root.mkdir()
    nearby.root.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write there"):
        assert_same(batches(remote, nearby), batches(remote, None))
    assert not list(nearby.root.iterdir())


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    nearby = Nearby(str(tmp_path), 1000)
    assert nearby._usable()
    others = [tmp_path / "thesis.tar", nearby.root / "thesis.tar"]
    for path in others:
        path.write_bytes(bytes(5000))
    for piece in range(20):
        nearby.get("a", piece, 100, lambda: bytes(100))
    assert all(path.stat().st_size == 5000 for path in others)


def test_a_folder_that_takes_nothing_costs_a_warning_only(remote: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match=r"no shards are kept.*ray.cache_folder"):
        found = batches(remote, Nearby(str(tmp_path / "file"), 10**9))
    assert_same(found, batches(remote, None))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 400)), max_size=60))
@settings(max_examples=25, deadline=None)
def test_the_limit_holds_and_what_was_used_last_stays(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int]]
) -> None:
    root, limit = tmp_path_factory.mktemp("kept"), 1000
    nearby = Nearby(str(root), limit)
    sizes: dict[int, int] = {}
    for piece, size in asked:
        size = sizes.setdefault(piece, size)
        expected = np.full(size, piece, np.uint8)
        found = nearby.get("a", piece, size, lambda data=expected: data.tobytes())
        assert np.array_equal(np.frombuffer(found, np.uint8), expected)
        assert sum(path.stat().st_size for path in nearby.root.iterdir()) <= limit
        assert nearby._path("a", piece).exists()


def test_where_the_disk_is_nearly_full_what_was_kept_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearby, used = Nearby(str(tmp_path), 10_000), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(kept, "FREE_SHARE", 0.1)

    def held(free: int) -> int:
        full = used._replace(total=10_000, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        nearby.get("a", free, 400, lambda: bytes(400))
        return sum(path.stat().st_size for path in nearby.root.iterdir())

    assert [held(free) for free in (5000, 4000, 400, 0)] == [400, 800, 400, 0]


def fill(parent: str, number: int) -> bool:
    """Ask for pieces as one of several processes; return whether each was what it should be."""
    kept.FREE_SHARE = 0.0  # of this process of its own
    nearby = Nearby(parent, 3000)

    def right(piece: int) -> bool:
        return set(nearby.get("a", piece, 400, lambda: bytes([piece]) * 400)) == {piece}

    return all(right((number + turn) % 11) for turn in range(100))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert all(pool.map(fill, [str(tmp_path)] * 4, range(4)))
    held = [path.stat().st_size for path in Nearby(str(tmp_path), 0).root.iterdir()]
    assert 0 < sum(held) <= 3000 + 2 * 400
