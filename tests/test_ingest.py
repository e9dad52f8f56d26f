"""Ingest: what is kept, what is not and why, and the same store however it was made."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.corpora import CorpusConfig, IngestConfig, list_corpus
from pipeline.errors import CscError
from pipeline.ingest import REJECTS_FILE, ingest, ingest_shard, list_corpora, store_id
from pipeline.schema import SAMPLE_RATE_HZ, Task, content_id
from pipeline.shards import read_catalogue, read_pcm
from pipeline.splits import SplitConfig, check_disjoint, split_of
from pipeline.storage import Folder
from tests.conftest import serially, shard_hashes, voice, write_corpus


def make(root: Path, *corpora: CorpusConfig) -> Folder:
    config = IngestConfig(corpora=list(corpora), source_mb_per_shard=0.3)
    listing = list_corpora(config)
    store = Folder.at(root).child(store_id(config, listing))
    ingest(store, config, listing, serially)
    return store


def rejects(store: Folder) -> dict[str, str]:
    table = pq.read_table(store.open_input(REJECTS_FILE))
    return dict(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_rows_hold_what_was_recorded(store: Folder) -> None:
    catalogue = read_catalogue(store)
    assert len(catalogue) == 14 * 4 + 10 * 3 + 12
    row = catalogue.filter(pc.equal(catalogue["path"], "s03/u2.flac")).to_pylist()[0]
    assert row["speaker_id"] == "first/s03"
    assert row["session_id"] == "first/s03/s03/u2"
    assert row["label_kind"] == "given"
    (pcm,) = read_pcm(store, {row["shard"]: [row["row"]]}).values()
    assert content_id(pcm.tobytes()) == row["utterance_id"]
    assert len(pcm) == row["num_samples"]
    assert np.abs(pcm / 32768 - voice(3, 2)).max() < 1e-4


def test_one_shard_holds_all_of_a_speaker(store: Folder) -> None:
    counts = read_catalogue(store).group_by("speaker_id").aggregate([("shard", "count_distinct")])
    assert set(counts["shard_count_distinct"].to_pylist()) == {1}
    assert len(shard_hashes(store)) > 2


def test_every_file_is_kept_or_rejected_with_its_reason(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", 2, 2)
    whole = (root / "s00" / "u0.flac").read_bytes()
    (root / "s00" / "empty.wav").write_bytes(b"")
    (root / "s00" / "cut.flac").write_bytes(whole[:30])
    (root / "s00" / "text.mp3").write_text("no audio")
    (root / "s00" / "again.flac").write_bytes(whole)
    (root / "s01" / "stolen.flac").write_bytes(whole)
    (root / "s01" / "misnamed.wav").write_bytes((root / "s01" / "u0.flac").read_bytes())
    soundfile.write(root / "s01" / "short.wav", voice(1, 9, 0.2), SAMPLE_RATE_HZ)
    soundfile.write(root / "s01" / "silent.wav", np.zeros(32_000), SAMPLE_RATE_HZ)
    store = make(tmp_path / "out", CorpusConfig(name="c", root=str(root)))
    assert rejects(store) == {
        "s00/empty.wav": "empty",
        "s00/cut.flac": "unreadable",
        "s00/text.mp3": "unreadable",
        "s00/u0.flac": "duplicate",
        "s01/stolen.flac": "duplicate",
        "s01/u0.flac": "duplicate",
        "s01/short.wav": "too_short",
        "s01/silent.wav": "silent",
    }
    index = store.read_json("index.json")
    assert index["kept"] + sum(index["rejected"].values()) == index["files"]


def test_a_loose_file_is_a_pseudo_speaker_of_its_own(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", 1, 2)
    soundfile.write(root / "s00.wav", voice(5, 5), SAMPLE_RATE_HZ)
    catalogue = read_catalogue(make(tmp_path / "out", CorpusConfig(name="c", root=str(root))))
    kinds = dict(
        zip(*(catalogue[c].to_pylist() for c in ("speaker_id", "label_kind")), strict=True)
    )
    assert kinds == {"c/s00": "given", "c/s00.wav": "pseudo"}


def test_long_recordings_become_several_utterances(tmp_path: Path) -> None:
    (tmp_path / "c" / "s").mkdir(parents=True)
    soundfile.write(tmp_path / "c" / "s" / "long.wav", voice(1, 1, 40.0), SAMPLE_RATE_HZ)
    catalogue = read_catalogue(
        make(tmp_path / "out", CorpusConfig(name="c", root=str(tmp_path / "c")))
    )
    assert len(catalogue) >= 3
    assert sum(catalogue["num_samples"].to_pylist()) == 40 * SAMPLE_RATE_HZ
    assert len(set(catalogue["session_id"].to_pylist())) == 1


def test_the_store_is_the_same_wherever_the_corpus_lies(tmp_path: Path) -> None:
    here = write_corpus(tmp_path / "here", 4, 2)
    there = shutil.copytree(here, tmp_path / "there")
    stores = [
        make(tmp_path / f"out{number}", CorpusConfig(name="c", root=str(root)))
        for number, root in enumerate((here, there))
    ]
    assert Path(stores[0].uri).name == Path(stores[1].uri).name
    assert shard_hashes(stores[0]) == shard_hashes(stores[1])


def test_a_stopped_ingest_does_only_what_is_missing(corpora: IngestConfig, store: Folder) -> None:
    listing = list_corpora(corpora)
    calls: list[int] = []

    def until_the_second(tasks: list[Task], work: object) -> None:
        for task in tasks:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(task["shard"])
            ingest_shard(task)

    def the_rest(tasks: list[Task], work: object) -> None:
        calls.extend(task["shard"] for task in tasks)
        serially(tasks, ingest_shard)

    other = Folder.at(Path(store.uri).parent / "again").child(Path(store.uri).name)
    with pytest.raises(KeyboardInterrupt):
        ingest(other, corpora, listing, until_the_second)
    assert not other.exists("index.json")
    ingest(other, corpora, listing, the_rest)
    assert sorted(calls) == sorted(set(calls))
    assert shard_hashes(other) == shard_hashes(store)


def test_a_missing_or_empty_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(CscError, match=f"'{name}'.*does not exist or is empty"):
            list_corpus(CorpusConfig(name=name, root=str(tmp_path / name)), SplitConfig())


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("file,speaker\na.wav,x\n", "no column path"),
        ("path,speaker\nb.wav,x\n", "b.wav of its manifest is not in"),
        ("path,speaker\n../a.wav,x\n", "leads outside"),
        ("path,speaker\na.wav,x\na.wav,y\n", "a.wav stands twice"),
        ("path,speaker\na.wav,\n", "line 2: path or speaker is empty"),
        ("speaker,path\nx\n", "line 2: path or speaker is empty"),
        ("path,speaker,split\na.wav,x,dev\n", "split 'dev'"),
    ],
)
def test_a_wrong_manifest_is_explained(tmp_path: Path, manifest: str, reason: str) -> None:
    soundfile.write(tmp_path / "a.wav", voice(1, 1), SAMPLE_RATE_HZ)
    (tmp_path / "m.csv").write_text(manifest)
    corpus = CorpusConfig(name="c", root=str(tmp_path), manifest="m.csv")
    with pytest.raises(CscError, match=reason):
        list_corpus(corpus, SplitConfig())


def test_a_speaker_in_two_splits_is_refused(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", 1, 2)
    rows = "s00/u0.flac,a,train\ns00/u1.flac,a,test\n"
    (root / "m.csv").write_text(f"path,speaker,split\n{rows}")
    with pytest.raises(CscError, match="'c/a' is in more than one"):
        make(tmp_path / "out", CorpusConfig(name="c", root=str(root), manifest="m.csv"))


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "c" / "s").mkdir(parents=True)
    (tmp_path / "c" / "s" / "a.wav").write_bytes(b"junk")
    with pytest.raises(CscError, match=r"nothing .* can be kept.*unreadable"):
        make(tmp_path / "out", CorpusConfig(name="c", root=str(tmp_path / "c")))


def test_splits_are_disjoint_and_of_the_asked_size(store: Folder) -> None:
    check_disjoint(read_catalogue(store))
    config = SplitConfig(valid_share=0.1, test_share=0.2)
    splits = [split_of(f"c/{number}", config) for number in range(5000)]
    assert splits.count("valid") / 5000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / 5000 == pytest.approx(0.2, abs=0.02)
