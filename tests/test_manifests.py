"""Manifests: tables in any format with any columns, and what is said of wrong ones."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CscError
from tests.listings import listed, rows, spans, tree, write

RECORDS = [
    {"wav": "a.wav", "spk": "x", "chapter": "1", "sex": "female", "offset": 1.5, "length": 2},
    {"wav": "./b/../b.wav", "spk": "y", "chapter": "2", "sex": "M", "offset": 0, "length": 0},
]
COLUMNS = """
[columns]
path = "wav"
speaker = "spk"
session = "chapter"
gender = "sex"
start_s = "offset"
duration_s = "length"
"""


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.json", "m.jsonl.gz", "m.parquet"])
def test_a_manifest_may_be_any_table_with_any_columns(tmp_path: Path, name: str) -> None:
    tree(tmp_path, "a.wav", "b.wav", "unnamed.wav")
    separator = "\t" if name == "m.tsv" else ","
    lines = [RECORDS[0].keys(), *(record.values() for record in RECORDS)]
    text = "".join(separator.join(map(str, line)) + "\n" for line in lines)
    if "json" in name:
        text = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    if name == "m.parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / name)
    elif name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / name).write_text(text)
    table = listed(tmp_path, COLUMNS, manifest=name)
    assert spans(table) == [("a.wav", "c/x", 1.5, 2.0), ("b.wav", "c/y", 0.0, 0.0)]
    assert table["session_id"].to_pylist() == ["c/x/1", "c/y/2"]
    assert table["gender"].to_pylist() == ["f", "m"]


def test_a_nemo_manifest_is_read_by_its_columns(tmp_path: Path) -> None:
    tree(tmp_path, "wavs/1.wav")
    line = {"audio_filepath": "/cluster/data/wavs/1.wav", "duration": 1.25, "speaker": 7}
    write(tmp_path / "train.json", line | {"offset": 0.5}, line)
    table = listed(
        tmp_path,
        """
        manifest = "train.json"
        columns = { path = "audio_filepath", start_s = "offset", duration_s = "duration" }
        strip_prefix = "/cluster/data"
        """,
    )
    assert spans(table) == [("wavs/1.wav", "c/7", 0.0, 1.25), ("wavs/1.wav", "c/7", 0.5, 1.25)]
    assert len(set(table["source_id"].to_pylist())) == 2


def test_paths_may_be_absolute_below_the_root_or_made_by_a_template(tmp_path: Path) -> None:
    tree(tmp_path, "clips/a.wav", "clips/b.wav")
    (tmp_path / "m.csv").write_text(f"path,speaker\n{tmp_path}/clips/a.wav,x\n")
    assert list(rows(tmp_path, manifest="m.csv")) == ["clips/a.wav"]
    (tmp_path / "m.csv").write_text("path,speaker\nb,x\n")
    found = rows(tmp_path, manifest="m.csv", path_template="clips/{path}.wav")
    assert list(found) == ["clips/b.wav"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("file,speaker\na.wav,x\n", r"m.csv line 2: no column path; add it"),
        ("path,speaker\nb.wav,x\n", r"b.wav of its manifest is not in .*; correct the paths"),
        ("path,speaker\nb,x\nd,x\na.wav,x\n", r"b of its manifest is not in .*, nor are 1 other"),
        ("path,speaker\n../a.wav,x\n", "leads outside"),
        ("path,speaker\n/etc/passwd,x\n", "leads outside"),
        ("path,speaker\na.wav,x\na.wav,y\n", "a.wav stands twice"),
        ("path,speaker\na.wav,x\n\na.wav,\n", "line 4: path or speaker is empty"),
        ("speaker,path\nx\n", "line 2: path or speaker is empty"),
        ("path,speaker,split\na.wav,x,dev\n", "a.wav is in split 'dev'"),
        ("path,speaker,start_s\na.wav,x,-1\n", "line 2: start_s '-1' is not a number"),
        ("path,speaker,duration_s\na.wav,x,two\n", "line 2: duration_s 'two' is not a number"),
        ("path,speaker,duration_s\na.wav,x,inf\n", "line 2: duration_s 'inf' is not a number"),
        (
            "path,speaker,start_s,split\na.wav,x,0,train\na.wav,y,5,test\n",
            "a.wav has speakers of two splits",
        ),
        ("path,speaker\n", "none of the 2 files in .* is audio"),
        ("path,speaker\na.wav,\xe9\n", "m.csv is not UTF-8"),
    ],
)
def test_a_wrong_manifest_is_explained(tmp_path: Path, manifest: str, reason: str) -> None:
    tree(tmp_path, "a.wav")
    (tmp_path / "m.csv").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(CscError, match=reason):
        listed(tmp_path, manifest="m.csv")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("m.jsonl", b'{"path": "a.wav", "speaker": "x"}\n{"path"\n', "line 2: not JSON"),
        ("m.jsonl", b'["a.wav"]\n', "line 1: no JSON object"),
        ("m.jsonl", b'{"path": "a.wav"}\n', "line 1: no column speaker"),
        ("m.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-20], "the file is damaged"),
        ("m.jsonl.gz", b"text", "the file is damaged"),
        ("m.parquet", b"text", "the file is damaged"),
        ("m.tsv", b"path\tspeakers\na.wav\tx\n", "no column speaker"),
    ],
)
def test_a_damaged_manifest_is_explained(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    tree(tmp_path, "a.wav")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CscError, match=reason):
        listed(tmp_path, manifest=name)


def test_a_column_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    tree(tmp_path, "a.wav", **{"m.csv": "path,speaker\na.wav,x\n"})
    with pytest.raises(CscError, match="no column chapter"):
        listed(tmp_path, manifest="m.csv", columns={"session": "chapter"})
