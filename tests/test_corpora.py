"""Corpora: what is listed of folders and buckets, and what ready descriptions make of them."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.corpora import DESCRIPTIONS, CorpusConfig, IngestConfig, list_corpora
from pipeline.errors import CscError
from pipeline.schema import LISTING, config_hash
from pipeline.splits import SplitConfig, split_of
from pipeline.storage import Folder
from tests.listings import config, listed, rows, speakers, tree


def test_a_row_says_all_that_is_known_before_the_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "a" / "x" / "1.wav").write_bytes(b"1234")
    table = listed(tmp_path)
    assert table.schema == LISTING
    (row,) = table.to_pylist()
    assert row.pop("version")
    assert row == {
        "source_id": config_hash(["c", "a/x/1.wav", 0.0, 0.0]),
        "corpus": "c",
        "path": "a/x/1.wav",
        "num_bytes": 4,
        "kind": "speech",
        "speaker_id": "c/a",
        "session_id": "c/a/a/x/1",
        "split": split_of("c/a", SplitConfig()),
        "gender": "",
        "label_kind": "given",
        "start_s": 0.0,
        "duration_s": 0.0,
    }


def test_folders_try_every_name_but_those_that_are_surely_no_audio(tmp_path: Path) -> None:
    audio = ["a/1.wav", "a/b/2.MP3", "a/noise.dat", "a/take", "loose.flac"]
    texts = ["a/1.txt", "a/a.trans.txt", "README", "x.csv", "a/1.TextGrid"]
    found = rows(tree(tmp_path, *audio, *texts, ".git/1.wav", "a/._1.wav"))
    assert list(found) == sorted(audio)
    assert found["a/b/2.MP3"]["speaker_id"] == "c/a"
    loose = found["loose.flac"]
    assert (loose["speaker_id"], loose["label_kind"]) == ("c/loose.flac", "pseudo")
    assert "a/take" not in rows(tmp_path, ignore="a/t*")


def test_unlabelled_recordings_are_speakers_of_their_own(tmp_path: Path) -> None:
    found = rows(tree(tmp_path, "a/1.wav", "a/2.wav"), layout="unlabelled")
    assert speakers(found) == {"a/1.wav": "c/a/1.wav", "a/2.wav": "c/a/2.wav"}
    assert {row["label_kind"] for row in found.values()} == {"pseudo"}


READY = {
    "librispeech": (
        [
            "LibriSpeech/SPEAKERS.TXT",
            "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac",
            "LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt",
            "LibriSpeech/dev-other/116/288045/116-288045-0000.flac",
            "LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac",
        ],
        {
            "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac": ("103", "1240", "train"),
            "LibriSpeech/dev-other/116/288045/116-288045-0000.flac": ("116", "288045", "valid"),
            "LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac": ("1089", "134686", "test"),
        },
    ),
    "voxceleb": (
        [
            "vox1/dev/wav/id10001/1zcIwhmdeo4/00001.wav",
            "wav/id10270/5r0dWxy17C8/00001.wav",
            "vox2/dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
            "vox2/dev/txt/id00012/21Uxsk56VDQ/00001.txt",
            "vox2/dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
        ],
        {
            "vox1/dev/wav/id10001/1zcIwhmdeo4/00001.wav": ("id10001", "1zcIwhmdeo4", None),
            "wav/id10270/5r0dWxy17C8/00001.wav": ("id10270", "5r0dWxy17C8", None),
            "vox2/dev/aac/id00012/21Uxsk56VDQ/00001.m4a": ("id00012", "21Uxsk56VDQ", None),
        },
    ),
    "vctk": (
        [
            "VCTK-Corpus-0.92/speaker-info.txt",
            "VCTK-Corpus-0.92/wav48_silence_trimmed/log.txt",
            "VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_mic1.flac",
            "VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_mic2.flac",
            "VCTK-Corpus-0.92/wav48_silence_trimmed/s5/s5_001_mic1.flac",
            "VCTK-Corpus-0.92/txt/p225/p225_001.txt",
            "wav48/p226/p226_001.wav",
        ],
        {
            "VCTK-Corpus-0.92/wav48_silence_trimmed/p225/p225_001_mic1.flac": ("p225", None, None),
            "VCTK-Corpus-0.92/wav48_silence_trimmed/s5/s5_001_mic1.flac": ("s5", None, None),
            "wav48/p226/p226_001.wav": ("p226", None, None),
        },
    ),
    "common_voice": (
        ["clips/common_voice_en_1.mp3", "clips/common_voice_en_2.mp3", "validated.tsv"],
        {"clips/common_voice_en_1.mp3": ("8f2b", None, None)},
    ),
    "aishell": (
        [
            "wav/train/S0002/BAC009S0002W0122.wav",
            "wav/dev/S0724/BAC009S0724W0121.wav",
            "wav/test/S0764/BAC009S0764W0121.wav",
            "transcript/aishell_transcript_v0.8.txt",
            "wav/S0002.tar.gz",
        ],
        {
            "wav/train/S0002/BAC009S0002W0122.wav": ("S0002", None, "train"),
            "wav/dev/S0724/BAC009S0724W0121.wav": ("S0724", None, "valid"),
            "wav/test/S0764/BAC009S0764W0121.wav": ("S0764", None, "test"),
        },
    ),
    "cn_celeb": (
        [
            "CN-Celeb_flac/data/id00010/live_broadcast-02-003.flac",
            "CN-Celeb_flac/eval/enroll/id00800-enroll.flac",
            "CN-Celeb_flac/eval/test/id00800-singing-01-002.flac",
            "CN-Celeb_flac/dev/dev.lst",
            "CN-Celeb2_flac/data/id10000/vlog-01-001.flac",
        ],
        {
            "CN-Celeb_flac/data/id00010/live_broadcast-02-003.flac": (
                "id00010",
                "live_broadcast-02",
                None,
            ),
            "CN-Celeb2_flac/data/id10000/vlog-01-001.flac": ("id10000", "vlog-01", None),
        },
    ),
    "folders": (
        ["alice/one.wav", "alice/2024/two.mp3"],
        {"alice/one.wav": ("alice", None, None), "alice/2024/two.mp3": ("alice", None, None)},
    ),
}


def test_every_description_is_tried_here() -> None:
    assert {path.stem for path in DESCRIPTIONS.glob("*.toml")} == READY.keys()


@pytest.mark.parametrize("like", READY)
def test_a_ready_description_reads_the_corpus_as_it_unpacks(tmp_path: Path, like: str) -> None:
    names, expected = READY[like]
    tree(tmp_path, *names)
    if like == "common_voice":
        header = "client_id\tpath\tsentence\tup_votes\tgender\n"
        line = '8f2b\tcommon_voice_en_1.mp3\tA "quote that never ends\t2\tmale_masculine\n'
        (tmp_path / "validated.tsv").write_text(header + line)
    found = rows(tmp_path, like=like)
    assert found.keys() == expected.keys()
    for path, (speaker, session, split) in expected.items():
        row = found[path]
        assert row["speaker_id"] == f"c/{speaker}"
        assert row["label_kind"] == "given"
        assert row["session_id"] == f"c/{speaker}/{session or path.rpartition('.')[0]}"
        assert row["split"] == (split or split_of(f"c/{speaker}", SplitConfig()))
    if like != "folders":
        assert config(tmp_path, like=like).licence != "unstated"


def test_a_part_of_librispeech_is_read_too(tmp_path: Path) -> None:
    tree(tmp_path, "103/1240/103-1240-0000.flac")
    assert speakers(rows(tmp_path, like="librispeech")) == {"103/1240/103-1240-0000.flac": "c/103"}


def test_what_is_set_goes_before_what_a_description_says() -> None:
    corpus = config("/data", like="common_voice", language="sw", manifest="train.tsv")
    assert (corpus.language, corpus.licence) == ("sw", "CC0 1.0")
    assert (corpus.manifest, corpus.columns.speaker) == ("train.tsv", "client_id")
    assert config("/data", like="librispeech", layout="unlabelled").pattern == []
    again = CorpusConfig.model_validate_json(corpus.model_dump_json())
    assert again == corpus


def test_a_corpus_may_go_to_one_split_as_a_whole(tmp_path: Path) -> None:
    names = [f"{split}/{speaker}/1.wav" for split in ("train", "dev") for speaker in range(9)]
    tree(tmp_path, *names)
    found = rows(tmp_path, pattern="{split}/{speaker}/*", split="test")
    assert {row["split"] for row in found.values()} == {"test"}


def test_corpora_come_in_the_order_of_the_configuration(tmp_path: Path) -> None:
    tree(tmp_path, "z/s/1.wav", "a/s/2.wav", "a/s/1.wav")
    corpora = [config(tmp_path / name, name=name) for name in ("z", "a")]
    table = list_corpora(IngestConfig(corpora=corpora))
    assert table.schema == LISTING
    assert table["corpus"].to_pylist() == ["z", "a", "a"]
    assert table["path"].to_pylist() == ["s/1.wav", "s/1.wav", "s/2.wav"]
    assert len(set(table["source_id"].to_pylist())) == 3


def test_a_missing_or_empty_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(CscError, match=f"'{name}'.*does not exist or is empty"):
            listed(tmp_path / name, name=name)
    tree(tmp_path, "texts/a.txt")
    with pytest.raises(CscError, match=r"none of the 1 files in .* is audio"):
        listed(tmp_path / "texts")


def test_the_shipped_sample_is_listed() -> None:
    found = rows("sample:librispeech", manifest="manifest.csv")
    assert found["ls103/ls103-1240-0000.opus"]["session_id"] == "c/ls103/1240"
    assert {row["split"] for row in found.values()} == {"train"}


def test_a_bucket_is_listed_once_and_like_a_folder(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Folder.at(f"{s3}/corpora")
    names = ["wav/train/S0002/a.wav", "wav/dev/S0724/b.wav", "wav/test/S0764/c.wav", "note.txt"]
    tree(tmp_path, *names)
    for name in names:
        bucket.put(name, b"")
    local, calls, list_files = listed(tmp_path, like="aishell"), [], Folder.list

    def counted(folder: Folder) -> Any:
        calls.append(folder.uri)
        return list_files(folder)

    monkeypatch.setattr(Folder, "list", counted)
    remote = listed(bucket.uri, like="aishell")
    assert calls == [bucket.uri]
    assert remote.drop_columns("version").equals(local.drop_columns("version"))
    assert all(remote["version"].to_pylist())
