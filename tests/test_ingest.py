"""Ingest: what is kept, what is not and why, and the same store however it was made."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, content_id
from pipeline.shards import read_catalogue, read_pcm
from pipeline.splits import SplitConfig, check_disjoint, split_of
from pipeline.storage import Folder
from pipeline.store import REJECTS_FILE
from tests.conftest import make_store, shard_hashes, voice, write_corpus


def make(root: Path, *corpora: CorpusConfig) -> Folder:
    return make_store(root, IngestConfig(corpora=list(corpora), source_mb_per_shard=0.3))


def rejects(store: Folder) -> dict[str, set[str]]:
    """Return the reasons by path, without the pauses of what is kept."""
    table = pq.read_table(store.open_input(REJECTS_FILE))
    kept = set(read_catalogue(store)["path"].to_pylist())
    found: dict[str, set[str]] = {}
    for path, reason in zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True):
        if reason != "no_speech" or path not in kept:
            found.setdefault(path, set()).add(reason)
    for path, reasons in found.items():
        found[path] = reasons - {"no_speech"} or reasons
    return found


def test_rows_hold_what_was_recorded(store: Folder) -> None:
    catalogue = read_catalogue(store)
    for row in catalogue.filter(pc.equal(catalogue["path"], "s03/u2.flac")).to_pylist():
        assert row["speaker_id"] == "first/s03"
        assert row["session_id"] == "first/s03/s03/u2"
        assert row["label_kind"] == "given"
        (pcm,) = read_pcm(store, {row["shard"]: [row["row"]]}).values()
        assert content_id(pcm.tobytes()) == row["utterance_id"]
        recorded = voice(3, 2)[row["start_sample"] :][: row["num_samples"]]
        assert len(pcm) == len(recorded)
        assert np.abs(pcm / 32768 - (recorded - recorded.mean())).max() < 1e-4


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
    soundfile.write(root / "s01" / "short.wav", voice(1, 0, 0.9), SAMPLE_RATE_HZ)
    soundfile.write(root / "s01" / "silent.wav", np.zeros(32_000), SAMPLE_RATE_HZ)
    overdriven = np.clip(voice(2, 0) * 100, -1, 1)
    soundfile.write(root / "s01" / "loud.wav", overdriven, SAMPLE_RATE_HZ)
    store = make(tmp_path / "out", CorpusConfig(name="c", root=str(root)))
    assert rejects(store) == {
        "s00/empty.wav": {"empty"},
        "s00/cut.flac": {"unreadable"},
        "s00/text.mp3": {"unreadable"},
        "s00/u0.flac": {"duplicate"},
        "s01/stolen.flac": {"duplicate"},
        "s01/u0.flac": {"duplicate"},
        "s01/short.wav": {"too_short"},
        "s01/silent.wav": {"no_speech"},
        "s01/loud.wav": {"clipped"},
    }


def test_odd_names_cost_only_themselves(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", 1, 1)
    whole = (root / "s00" / "u0.flac").read_bytes()
    (tmp_path / "outside.flac").write_bytes(whole)
    (root / "s00" / "link.flac").symlink_to(tmp_path / "outside.flac")
    (root / "s00" / "loop.flac").symlink_to(root / "s00" / "loop.flac")
    (root / "s00" / "back\\slash.flac").write_bytes(whole)
    os.mkfifo(root / "s00" / "pipe.flac")
    Path(os.fsdecode(os.fsencode(root / "s00") + b"/caf\xe9.flac")).write_bytes(whole)
    store = make(tmp_path / "out", CorpusConfig(name="c", root=str(root)))
    assert read_catalogue(store)["path"].to_pylist() == ["s00/u0.flac"] * len(read_catalogue(store))
    assert {path: reasons & {"denied", "missing"} for path, reasons in rejects(store).items()} == {
        "s00/link.flac": {"denied"},
        "s00/back\\slash.flac": {"denied"},
        "s00/pipe.flac": {"denied"},
        "s00/caf\\xe9.flac": {"denied"},
        **({"s00/loop.flac": {"denied"}} if "s00/loop.flac" in rejects(store) else {}),
    }


def test_every_second_is_kept_or_rejected(store: Folder) -> None:
    index = store.read_json("index.json")
    assert index["seconds_in"] == pytest.approx(
        index["seconds"] + sum(index["rejected_seconds"].values()), abs=0.01
    )
    spoken = sum(len(voice(speaker, turn)) for speaker in range(14) for turn in range(4))
    assert index["corpora"]["first"]["seconds_in"] == pytest.approx(spoken / 16_000, abs=0.01)


def test_a_loose_file_is_a_pseudo_speaker_of_its_own(tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "c", 1, 2)
    soundfile.write(root / "s00.wav", voice(5, 2), SAMPLE_RATE_HZ)
    store = make(tmp_path / "out", CorpusConfig(name="c", root=str(root)))
    catalogue = read_catalogue(store)
    kinds = dict(
        zip(*(catalogue[c].to_pylist() for c in ("speaker_id", "label_kind")), strict=True)
    )
    assert kinds == {"c/s00": "given", "c/s00.wav": "pseudo"}
    assert store.read_json("index.json")["labels"] == {"given": 1, "pseudo": 1}


def test_long_recordings_become_several_utterances(tmp_path: Path) -> None:
    (tmp_path / "c" / "s").mkdir(parents=True)
    soundfile.write(tmp_path / "c" / "s" / "long.wav", voice(1, 1, 40.0), SAMPLE_RATE_HZ)
    store = make(tmp_path / "out", CorpusConfig(name="c", root=str(tmp_path / "c")))
    catalogue = read_catalogue(store)
    assert len(catalogue) >= 3
    assert max(catalogue["num_samples"].to_pylist()) <= 15 * SAMPLE_RATE_HZ
    assert store.read_json("index.json")["seconds_in"] == 40.0
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
