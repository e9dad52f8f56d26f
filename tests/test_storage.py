"""Folders, local and on a real S3 server: atomic, confined, clear about what went wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.commits import commit_shard, committed_shards
from pipeline.errors import CscError
from pipeline.shards import open_shard
from pipeline.storage import Folder


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        root = request.getfixturevalue("s3")
        return Folder.at(f"{root}/{request.node.name.replace('[', '-').replace(']', '')}")
    return Folder.at(tmp_path)


def test_what_is_put_is_read_and_listed(folder: Folder) -> None:
    folder.put("a/b.bin", b"one")
    folder.put("a/b.bin", b"three")
    folder.put_json("c.json", {"x": [1, 2]})
    assert folder.read("a/b.bin") == b"three"
    assert folder.read_json("c.json") == {"x": [1, 2]}
    assert folder.list()[0][:2] == ("a/b.bin", 5)
    assert folder.exists("c.json")
    assert not folder.exists("d")
    with folder.open_input("a/b.bin") as file:
        assert file.read_at(3, 1) == b"hre"
    folder.remove(first="c.json")
    assert not folder.exists("c.json")
    assert folder.list() == []


def test_a_shard_counts_once_its_record_is_there(folder: Folder) -> None:
    record = commit_shard(folder, "s-0.parquet", b"data", rows=1, config="c1")
    folder.put("s-1.parquet", b"no record")
    assert committed_shards(folder, "c1") == {"s-0.parquet": record}
    assert committed_shards(folder, "c2") == {}
    folder.put("s-0.parquet", b"cut")
    assert committed_shards(folder, "c1") == {}


def test_missing_and_damaged_files_are_named(folder: Folder) -> None:
    with pytest.raises(CscError, match=r"read .*absent.*does not exist"):
        folder.read("absent")
    folder.put("x.json", b"{")
    with pytest.raises(CscError, match=r"x\.json is damaged"):
        folder.read_json("x.json")
    folder.put("x.parquet", b"not parquet")
    with pytest.raises(CscError, match=r"x\.parquet is damaged"):
        open_shard(folder, "x.parquet")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\\..\\b"])
def test_names_never_lead_outside(folder: Folder, name: str) -> None:
    with pytest.raises(CscError, match="leads outside"):
        folder.read(name)


def test_links_never_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CscError, match="leads outside"):
        Folder.at(inside).read("link")


WRITE_TOO_MUCH = """
import resource, signal, sys
from pipeline.errors import CscError
from pipeline.storage import Folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Folder.at(sys.argv[1]).put("big.bin", bytes(5000))
except CscError as error:
    print(error)
"""


def test_a_write_that_the_disk_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel stops the write half-way, as a full disk does."""
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "big.bin" in said
    assert "free space" in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CscError, match="cannot write"):
        Folder.at(tmp_path / "file" / "below").put("a", b"1")


KILLED = """
import os, sys, threading, time
from pipeline.storage import Folder
folder = Folder.at(sys.argv[1])
print("ready", flush=True)
while True:
    folder.put("shard.json", (b'{"n": "' + b"x" * 3_000_000 + b'"}'))
"""


def test_a_writer_killed_at_any_time_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "shard.json"
    for delay_s in (0.02, 0.023, 0.031, 0.04):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(delay_s)  # it is writing the next one over it
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(json.loads(path.read_text())["n"]) == 3_000_000
