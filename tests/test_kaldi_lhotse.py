"""Layouts of other tools: Kaldi data directories and lhotse cuts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpora import list_corpus
from pipeline.errors import CscError
from pipeline.splits import SplitConfig
from tests.listings import config, listed, spans, tree, write


def kaldi(root: Path, folder: str = "data/train", **files: str) -> Path:
    tree(root, "wav/r1.wav", "wav/r2.wav", f"{folder}/text")
    for name, text in files.items():
        (root / folder / name.replace("_scp", ".scp")).write_text(text)
    return root


def test_kaldi_without_segments_lists_whole_recordings(tmp_path: Path) -> None:
    kaldi(
        tmp_path,
        wav_scp=f"u1 wav/r1.wav\nu2   {tmp_path}/wav/r2.wav \n",
        utt2spk="u1 ann\nu2 bob\n",
        spk2gender="ann f\n",
    )
    table = listed(tmp_path, manifest="data/train/wav.scp")
    assert spans(table) == [("wav/r1.wav", "c/ann", 0, 0), ("wav/r2.wav", "c/bob", 0, 0)]
    assert table["gender"].to_pylist() == ["f", ""]


def test_kaldi_segments_are_spans(tmp_path: Path) -> None:
    kaldi(
        tmp_path,
        folder=".",
        wav_scp="r1 wav/r1.wav\nr2 wav/r2.wav\n",
        utt2spk="a ann\nb ann\nc bob\n",
        segments="b r1 1.2 2.5\na r1 0 1.2\nc r2 3 -1\n",
    )
    assert spans(listed(tmp_path, layout="kaldi")) == [
        ("wav/r1.wav", "c/ann", 0.0, 1.2),
        ("wav/r1.wav", "c/ann", 1.2, 1.3),
        ("wav/r2.wav", "c/bob", 3.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"wav_scp": "u touch pwned |\n"}, r"wav.scp line 1: u: commands are never run"),
        ({"wav_scp": "u touch pwned |\n", "segments": "u u 0 1\n"}, "commands are never run"),
        ({"wav_scp": "u ../../etc/passwd\n"}, "leads outside"),
        ({"wav_scp": "u wav/r3.wav\n"}, "r3.wav of its manifest is not in"),
        ({"wav_scp": "u\n"}, "line 1: u has no value"),
        ({"wav_scp": "u wav/r1.wav\nu wav/r2.wav\n"}, "line 2: u stands twice"),
        ({"wav_scp": "v wav/r1.wav\n"}, "v is not in data/train/utt2spk"),
        ({"segments": "u r9 0 1\n"}, "segments line 1: recording r9 is not in wav.scp"),
        ({"segments": "u r 1 1\n"}, "it ends at 1 s and starts at 1 s"),
        ({"segments": "u r 1\n"}, "segments line 1: not enough values"),
        ({"segments": "u r one 2\n"}, "start 'one' is not a number"),
    ],
)
def test_a_wrong_kaldi_folder_is_explained(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    kaldi(tmp_path, **({"wav_scp": "r wav/r1.wav\n", "utt2spk": "u ann\n"} | files))
    with pytest.raises(CscError, match=reason):
        listed(tmp_path, manifest="data/train/wav.scp")
    assert not list(tmp_path.rglob("pwned"))


def cut(start: float = 10.0, duration: float = 5.0, **changes: Any) -> dict[str, Any]:
    source = {"type": "file", "channels": [0], "source": "/old/place/wav/r.wav"}
    return {
        "id": "cut",
        "type": "MonoCut",
        "start": start,
        "duration": duration,
        "channel": 0,
        "recording": {"id": "r", "sources": [source], "sampling_rate": 16000},
    } | changes


def test_lhotse_supervisions_are_spans_of_the_recording(tmp_path: Path) -> None:
    tree(tmp_path, "wav/r.wav")
    parts = [
        {"id": "1", "start": -1.0, "duration": 2.0, "speaker": "ann", "gender": "F"},
        {"id": "2", "start": 0.1, "duration": 9.0, "speaker": "bob"},
        {"id": "3", "start": 2.0, "duration": 1.0},
    ]
    text = "".join(json.dumps(one) + "\n" for one in (cut(supervisions=parts), cut(start=20)))
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    keys = {"layout": "lhotse", "manifest": "cuts.jsonl.gz", "strip_prefix": "/old/place/"}
    corpus = config(tmp_path, **keys)
    table = list_corpus(corpus, SplitConfig(valid_share=0, test_share=0))
    assert spans(table) == [
        ("wav/r.wav", "c/ann", 10.0, 1.0),
        ("wav/r.wav", "c/bob", 10.1, 4.9),
        ("wav/r.wav", "c/wav/r.wav", 12.0, 1.0),
        ("wav/r.wav", "c/wav/r.wav", 20.0, 5.0),
    ]
    assert table["label_kind"].to_pylist() == ["given", "given", "pseudo", "pseudo"]
    assert table["gender"].to_pylist() == ["f", "", "", ""]


SOURCE = {"type": "file", "channels": [0], "source": "wav/r.wav"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "MixedCut", "tracks": []}, "line 1: a MixedCut; only MonoCut can be read"),
        ({"type": "MultiCut"}, "line 1: a MultiCut"),
        ({"recording": {"id": "r", "sources": [SOURCE, SOURCE]}}, "r is not one file of one"),
        ({"recording": {"id": "r", "sources": [SOURCE | {"channels": [0, 1]}]}}, "is not one file"),
        ({"recording": {"id": "r", "sources": [SOURCE | {"type": "command"}]}}, "is not one file"),
        (
            {"recording": {"id": "r", "sources": [SOURCE], "transforms": [{"name": "Speed"}]}},
            "r is changed by transforms",
        ),
        ({"recording": {}}, "line 1: there is no 'sources'"),
        ({"recording": None}, "line 1: "),
        ({"supervisions": [{"start": 6.0, "duration": 1.0}]}, "lies outside of the cut"),
        ({"supervisions": [{"start": "0", "duration": 1.0}]}, "line 1: .*correct it"),
    ],
)
def test_cuts_that_cannot_be_read_are_explained(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    tree(tmp_path, "wav/r.wav")
    write(tmp_path / "cuts.jsonl", cut(**changes))
    with pytest.raises(CscError, match=reason):
        listed(tmp_path, layout="lhotse", manifest="cuts.jsonl", strip_prefix="/old/place")
