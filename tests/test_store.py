"""Generations: what is new is read, what is not stays as it is, and what is forgotten is gone."""

import random
import shutil
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
import soundfile

from pipeline.corpora import CorpusConfig, IngestConfig, list_corpora
from pipeline.errors import CscError
from pipeline.forget import forget, index_ids
from pipeline.plan import changes, latest, source_bytes
from pipeline.schema import SAMPLE_RATE_HZ, Task, Work
from pipeline.shards import read_catalogue, read_pcm
from pipeline.storage import Folder
from pipeline.store import discard, ingest, plan_ingest, unread
from tests.conftest import make_store, serially, shard_hashes, voice, write_corpus


class Counted:
    """Runs tasks in this process, counts them, and stops when told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.shards: list[int] = []
        self._stop_after = stop_after

    def __call__(self, tasks: Sequence[Task], work: Work) -> None:
        for task in tasks:
            if len(self.shards) == self._stop_after:
                raise KeyboardInterrupt
            work(task)
            self.shards.append(task["shard"])


def config_of(root: Path) -> IngestConfig:
    return IngestConfig(corpora=[CorpusConfig(name="c", root=str(root))], source_mb_per_shard=0.3)


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def utterances(store: Folder) -> list[str]:
    return sorted(read_catalogue(store)["utterance_id"].to_pylist())


def test_a_grown_corpus_has_only_what_is_new_read(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 4, 3)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    first = make_store(root, config)
    before = files_of(tmp_path / "store")
    write_corpus(corpus, 2, 2, first=4)
    soundfile.write(corpus / "s01" / "late.flac", voice(1, 4), SAMPLE_RATE_HZ)
    soundfile.write(corpus / "s02" / "u0.flac", voice(2, 4), SAMPLE_RATE_HZ)
    (corpus / "s03" / "u0.flac").unlink()

    planned = plan_ingest(root, config, list_corpora(config))
    assert changes(root, planned) == (5, 1, 1, 10)
    assert sorted(unread(root, planned, config)["path"].to_pylist()) == [
        "s01/late.flac", "s02/u0.flac", "s04/u0.flac", "s04/u1.flac", "s05/u0.flac", "s05/u1.flac"
    ]  # fmt: skip
    counted = Counted()
    second = make_store(root, config, counted)
    assert set(counted.shards).isdisjoint(int(name[6:11]) for name in shard_hashes(first))
    after = files_of(tmp_path / "store")
    assert all(after[name] == data for name, data in before.items())
    paths = set(read_catalogue(second)["path"].to_pylist())
    assert {"s01/late.flac", "s04/u0.flac", "s02/u0.flac"} < paths
    assert "s03/u0.flac" not in paths
    assert utterances(second) == utterances(make_store(tmp_path / "anew", config))
    catalogue = read_catalogue(second)
    row = catalogue.filter(pc.equal(catalogue["path"], "s02/u0.flac")).to_pylist()[0]
    (pcm,) = read_pcm(second, {row["shard"]: [row["row"]]}).values()
    assert len(pcm) == row["num_samples"]
    assert utterances(first) != utterances(second)  # the old generation is still what it was


def test_nothing_new_makes_no_generation(tmp_path: Path) -> None:
    config = config_of(write_corpus(tmp_path / "c", 3, 2))
    first = make_store(tmp_path / "store", config)
    before = files_of(tmp_path / "store")
    counted = Counted()
    assert make_store(tmp_path / "store", config, counted) == first
    assert counted.shards == []
    assert files_of(tmp_path / "store") == before


def test_a_corpus_may_move_join_and_leave(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", 3, 2)
    two = write_corpus(tmp_path / "two", 2, 2, first=5)
    first = make_store(tmp_path / "store", config_of(one))
    moved = Path(shutil.copytree(one, tmp_path / "moved"))  # copytree keeps times
    both = config_of(moved)
    joined = both.model_copy(
        update={"corpora": [*both.corpora, CorpusConfig(name="d", root=str(two))]}
    )
    counted = Counted()
    second = make_store(tmp_path / "store", joined, counted)
    assert {row["corpus"] for row in read_catalogue(second).to_pylist()} == {"c", "d"}
    read = pq.read_table(second.path("plan.parquet"))
    new = read.filter(pc.is_in(read["shard"], pc.cast(counted.shards, "int32")))
    assert set(new["corpus"].to_pylist()) == {"d"}
    third = make_store(tmp_path / "store", both, counted)
    assert third.read_json("index.json")["id"] == first.read_json("index.json")["id"]


def test_a_stopped_ingest_does_only_what_is_missing(corpora: IngestConfig, store: Folder) -> None:
    root = Folder.at(Path(store.uri).parent.parent / "again")
    stopped, rest = Counted(stop_after=2), Counted()
    with pytest.raises(KeyboardInterrupt):
        make_store(root, corpora, stopped)
    planned = latest(root)
    assert planned is not None
    assert not planned.finished
    made = make_store(root, corpora, rest)
    assert len(stopped.shards) == 2
    assert sorted(stopped.shards + rest.shards) == planned.shards()
    assert files_of(Path(root.uri)) == files_of(Path(store.uri).parent)
    assert made.read("index.json") == store.read("index.json")


def test_a_corpus_that_grows_while_ingest_is_down_loses_nothing(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 4, 2)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    stopped, rest = Counted(stop_after=1), Counted()
    with pytest.raises(KeyboardInterrupt):
        make_store(root, config, stopped)
    write_corpus(corpus, 1, 2, first=4)
    store = make_store(root, config, rest)
    assert store.uri.endswith("generation-00001")
    assert set(stopped.shards).isdisjoint(rest.shards)
    assert utterances(store) == utterances(make_store(tmp_path / "anew", config))


def test_a_copy_that_comes_later_is_found_across_ingests(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 2, 2)
    config = config_of(corpus)
    make_store(tmp_path / "store", config)
    shutil.copy(corpus / "s00" / "u0.flac", corpus / "s01" / "again.flac")
    reencoded = voice(1, 1)[4_000:] * 0.5
    soundfile.write(corpus / "s00" / "near.ogg", reencoded, SAMPLE_RATE_HZ, subtype="OPUS")
    store = make_store(tmp_path / "store", config)
    table = pq.read_table(store.path("rejects.parquet"))
    found = {
        (row["path"], row["reason"]): row["detail"]
        for row in table.to_pylist()
        if row["stage"] == "duplicates"
    }
    assert set(found) == {("s01/again.flac", "duplicate"), ("s00/near.ogg", "near_duplicate")}
    assert "c/s00/u0.flac at" in found["s01/again.flac", "duplicate"]
    assert "c/s01/u1.flac at" in found["s00/near.ogg", "near_duplicate"]
    (corpus / "s00" / "u0.flac").unlink()  # then the copy is the only one, and comes back
    paths = read_catalogue(make_store(tmp_path / "store", config))["path"].to_pylist()
    assert "s01/again.flac" in paths


def holds(root: Path, samples: bytes) -> bool:
    """Tell whether these samples lie in any file; audio is stored as it is."""
    return any(samples in data for data in files_of(root).values())


def named(root: Path, speaker: str) -> bool:
    """Tell whether any table or text below a folder has a name in it."""
    tables = (
        str(
            pq.read_table(path)
            .drop_columns(["pcm"] if "pcm" in pq.read_schema(path).names else [])
            .to_pylist()
        )
        for path in root.rglob("*.parquet")
    )
    texts = (path.read_text() for path in root.rglob("*.json"))
    return any(speaker in text for text in (*tables, *texts))


def test_what_is_forgotten_is_gone_and_stays_gone(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 4, 2)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    first = make_store(root, config)
    catalogue = read_catalogue(first)
    rows = catalogue.filter(pc.equal(catalogue["speaker_id"], "c/s01")).to_pylist()
    pcm = read_pcm(first, {rows[0]["shard"]: [rows[0]["row"]]}).popitem()[1].tobytes()
    assert holds(tmp_path / "store", pcm)
    assert named(tmp_path / "store", "s01")
    old = index_ids(root)

    assert forget([root], ["c/s01", "c/s02/u1.flac"]) == 3
    assert not holds(tmp_path / "store", pcm)
    assert not named(tmp_path / "store", "s01")
    left = latest(root)
    assert left is not None
    kept = read_catalogue(left.store)
    assert set(kept["speaker_id"].to_pylist()) == {"c/s00", "c/s02", "c/s03"}
    assert "s02/u1.flac" not in kept["path"].to_pylist()
    assert left.store.read_json("index.json")["forgotten"] == 2
    assert index_ids(root).isdisjoint(old)
    for row in kept.to_pylist():
        (found,) = read_pcm(left.store, {row["shard"]: [row["row"]]}).values()
        assert len(found) == row["num_samples"]

    write_corpus(corpus, 1, 1, first=5)
    grown = utterances(make_store(root, config))
    assert not named(tmp_path / "store", "s01")
    discard(root)
    assert utterances(make_store(root, config)) == grown


def fails(*_: object, **__: object) -> None:
    raise KeyError


def test_forgetting_is_completed_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, root = config_of(write_corpus(tmp_path / "c", 4, 2)), Folder.at(tmp_path / "store")
    make_store(root, config)
    whole = Path(shutil.copytree(tmp_path / "store", tmp_path / "whole"))
    forget([Folder.at(whole)], ["c/s01"])
    for step in ("write_plan", "finish", "_rewrite", "_clean"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.forget.{step}", fails)
            with pytest.raises(KeyError):
                forget([root], ["c/s01"])
        shutil.copytree(tmp_path / "store", tmp_path / f"after-{step}")
    for step in ("write_plan", "finish", "_rewrite", "_clean"):
        forget([Folder.at(tmp_path / f"after-{step}")], ["c/s01"])
        last = latest(Folder.at(tmp_path / f"after-{step}"))
        assert last is not None
        assert not named(tmp_path / f"after-{step}", "s01")
        expected = latest(Folder.at(whole))
        assert expected is not None
        assert utterances(last.store) == utterances(expected.store)


def test_a_name_that_is_not_there_is_no_success(tmp_path: Path) -> None:
    config, root = config_of(write_corpus(tmp_path / "c", 2, 2)), Folder.at(tmp_path / "store")
    with pytest.raises(CscError, match="no store has a speaker or recording 'c/s01'"):
        forget([root], ["c/s01"])
    make_store(root, config)
    before = files_of(tmp_path)
    with pytest.raises(CscError, match="'c/s1': nothing was removed"):
        forget([root], ["c/s01", "c/s1"])
    assert files_of(tmp_path) == before


def test_the_last_speaker_can_be_forgotten_too(tmp_path: Path) -> None:
    config, root = config_of(write_corpus(tmp_path / "c", 2, 2)), Folder.at(tmp_path / "store")
    make_store(root, config)
    forget([root], ["c/s00", "c/s01"])
    assert not files_of(tmp_path / "store")
    write_corpus(tmp_path / "c", 1, 2, first=2)
    catalogue = read_catalogue(make_store(root, config))
    assert set(catalogue["speaker_id"].to_pylist()) == {"c/s02"}


def until_the_end(tasks: Sequence[Task], work: Work) -> None:
    serially(tasks, work)
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", ["changed", "removed", "unfinished", "killed"])
def test_what_older_generations_hold_is_forgotten_too(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c", 3, 2)
    config = config_of(corpus).model_copy(update={"source_mb_per_shard": 30.0})
    root = Folder.at(tmp_path / "w" / "store")
    if before == "unfinished":
        make_store(root, config_of(write_corpus(tmp_path / "d", 1, 2, first=7)))
        with pytest.raises(KeyboardInterrupt):
            make_store(root, config_of(corpus), until_the_end)
    else:
        make_store(root, config)
    heard = (voice(1, 0) * 32768).astype("<i2").tobytes()[40_000:60_000]
    if before == "changed":
        soundfile.write(corpus / "s01" / "u0.flac", voice(9, 0), SAMPLE_RATE_HZ)
        make_store(root, config)
    if before == "removed":
        shutil.rmtree(corpus / "s01")
        make_store(root, config)
    if before == "killed":
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.forget._forget_in", fails)
            with pytest.raises(KeyError):
                forget([root], ["c/s01"])
        make_store(root, config)
    assert named(tmp_path / "w", "s01")
    forget([root], ["c/s01"])
    assert not named(tmp_path / "w", "s01")
    assert not holds(tmp_path / "w", heard)


def test_forgotten_audio_does_not_come_back_under_another_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 3, 2)
    shutil.copy(corpus / "s00" / "u0.flac", corpus / "s01" / "copy.flac")
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    make_store(root, config)
    forget([root], ["c/s00"])
    store = make_store(root, config)
    assert set(read_catalogue(store)["speaker_id"].to_pylist()) == {"c/s01", "c/s02"}
    assert store.read_json("index.json")["rejected"]["forgotten"] >= 1
    assert "s01/copy.flac" not in read_catalogue(store)["path"].to_pylist()


def test_a_shard_number_is_never_given_twice(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 2, 2)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    make_store(root, config)
    write_corpus(corpus, 1, 1, first=5)
    make_store(root, config)
    (corpus / "s05" / "u0.flac").unlink()
    make_store(root, config)
    soundfile.write(corpus / "s05" / "u0.flac", voice(6, 0), SAMPLE_RATE_HZ)
    store = make_store(root, config)
    assert utterances(store) == utterances(make_store(tmp_path / "anew", config))


def test_a_discarded_store_leaves_no_shard_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c", 2, 2)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    make_store(root, config)
    removed: list[str] = []

    def stops(folder: Folder, first: str) -> None:
        removed.append(folder.uri)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", stops)
        with pytest.raises(KeyboardInterrupt):
            discard(root)
    soundfile.write(corpus / "s01" / "u0.flac", voice(8, 0), SAMPLE_RATE_HZ)
    store = make_store(root, config)
    assert utterances(store) == utterances(make_store(tmp_path / "anew", config))


def test_what_left_and_came_back_is_not_read_again(tmp_path: Path) -> None:
    one, two = write_corpus(tmp_path / "a", 2, 2), write_corpus(tmp_path / "b", 2, 2, first=4)
    for root in (one, two, one, two):
        counted = Counted()
        make_store(tmp_path / "store", config_of(root), counted)
    assert counted.shards == []


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 2, 2)
    config, root = config_of(corpus), Folder.at(tmp_path / "store")
    hidden = corpus / "s00" / "u0.flac"

    def while_hidden(tasks: Sequence[Task], work: Work) -> None:
        hidden.rename(tmp_path / "elsewhere")
        serially(tasks, work)
        (tmp_path / "elsewhere").rename(hidden)

    first = make_store(root, config, while_hidden)
    assert first.read_json("index.json")["rejected"]["missing"] == 1
    write_corpus(corpus, 1, 2, first=4)
    paths = set(read_catalogue(make_store(root, config))["path"].to_pylist())
    assert "s00/u0.flac" in paths


def test_a_recording_with_several_speakers_is_fetched_once_for_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    for name in ("one", "two"):
        talk = np.concatenate([voice(speaker, 0, 4.0) for speaker in range(4)])
        soundfile.write(corpus / f"{name}.flac", talk, SAMPLE_RATE_HZ)
    rows = [f"{name}.flac,s{turn},{4 * turn},4" for turn in range(4) for name in ("one", "two")]
    (corpus / "m.csv").write_text("\n".join(["path,speaker,start_s,duration_s", *rows]))
    spans = CorpusConfig(name="c", root=str(corpus), manifest="m.csv", split="train")
    fetched: list[str] = []
    fetch = Folder.fetch

    def noted(folder: Folder, name: str, into: Path) -> Path:
        fetched.append(name)
        return fetch(folder, name, into)

    monkeypatch.setattr(Folder, "fetch", noted)
    store = make_store(tmp_path / "store", IngestConfig(corpora=[spans]))
    assert sorted(fetched) == ["one.flac", "two.flac"]
    index = store.read_json("index.json")
    assert index["seconds_in"] == pytest.approx(32.0)
    assert index["rejected"]["duplicate"] >= 3  # the second talk is the first one again
    for row in read_catalogue(store).to_pylist():
        assert int(row["speaker_id"][-1]) == row["start_sample"] // (4 * SAMPLE_RATE_HZ)


def test_spans_share_the_size_of_their_recording(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 1, 1)
    rows = [f"s00/u0.flac,p{place % 4},{place / 10},0.1" for place in range(20)]
    (corpus / "m.csv").write_text("\n".join(["path,speaker,start_s,duration_s", *rows]))
    spans = CorpusConfig(name="c", root=str(corpus), manifest="m.csv", split="train")
    config = IngestConfig(corpora=[spans], source_mb_per_shard=0.3)
    planned = plan_ingest(Folder.at(tmp_path / "store"), config, list_corpora(config))
    assert planned.shards() == [0]
    num_bytes = (corpus / "s00" / "u0.flac").stat().st_size
    assert source_bytes(planned.plan).sum() == pytest.approx(num_bytes)


def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    config, root = config_of(write_corpus(tmp_path / "c", 2, 2)), Folder.at(tmp_path / "store")

    def loses_rows(tasks: Sequence[Task], work: Work) -> None:
        serially(tasks, work)
        shards = root.child("shards")
        empty = pq.read_table(shards.path("shard-00000.parquet")).slice(0, 0)
        pq.write_table(empty, shards.path("shard-00000.parquet"))
        record = shards.read_json("shard-00000.parquet.done.json")
        record["bytes"] = Path(shards.path("shard-00000.parquet")).stat().st_size
        shards.put_json("shard-00000.parquet.done.json", record)

    planned = plan_ingest(root, config, list_corpora(config))
    with pytest.raises(CscError, match=r"shard-00000\.parquet is damaged"):
        ingest(root, planned, config, loses_rows)
    assert not planned.store.exists("index.json")


INGEST = """
import sys
from pathlib import Path
from pipeline.corpora import CorpusConfig, IngestConfig, list_corpora
from pipeline.storage import Folder
from pipeline.store import ingest, plan_ingest

def run(tasks, work):
    for task in tasks:
        print(task["shard"], flush=True)
        work(task)

root, corpus = Folder.at(sys.argv[1]), CorpusConfig(name="c", root=sys.argv[2])
config = IngestConfig(corpora=[corpus], source_mb_per_shard=0.2)
planned = plan_ingest(root, config, list_corpora(config))
print("planned", flush=True)
ingest(root, planned, config, run)
"""


def test_killed_at_ten_random_points_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 12, 4)
    draws = random.Random(11)

    def start(store: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", INGEST, str(tmp_path / store), str(corpus)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    assert whole.wait() == 0
    assert whole.stdout is not None
    shards = len(whole.stdout.readlines()) - 1
    assert shards >= 8
    kills = 0
    for _ in range(10):
        process = start("killed")
        assert process.stdout is not None
        for _ in range(draws.randint(1, 2)):  # a task or two further each time
            process.stdout.readline()
        time.sleep(draws.uniform(0, 0.3))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 8
    assert start("killed").wait() == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
