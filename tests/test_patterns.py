"""Patterns of paths: they read what was written by them, and miss nothing in silence."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import CscError
from pipeline.patterns import path_pattern
from tests.listings import config, listed, rows, tree


def test_a_pattern_names_what_it_finds(tmp_path: Path) -> None:
    tree(tmp_path, "dev/f/ann/s1-a-01.flac", "train/m/bob/s2-07.flac", "dev/f/ann/s1-a-01.txt")
    found = rows(
        tmp_path,
        """
        pattern = "{split}/{gender}/{speaker}/{session}-{utterance}.flac"
        splits = { dev = "valid" }
        """,
    )
    ann = found["dev/f/ann/s1-a-01.flac"]
    assert (ann["speaker_id"], ann["session_id"]) == ("c/ann", "c/ann/s1-a")
    assert (ann["split"], ann["gender"]) == ("valid", "f")
    assert found["train/m/bob/s2-07.flac"]["split"] == "train"


def test_audio_that_fits_no_pattern_is_counted_and_named(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.wav", "b/c/1.wav", "b/d/2.WAV", "b/d/2.dat")
    with pytest.raises(CscError, match=r"2 audio files fit no pattern, the first is b/c/1.wav"):
        listed(tmp_path, pattern="{speaker}/*")
    assert list(rows(tmp_path, pattern="{speaker}/*", ignore=["b/**"])) == ["a/1.wav"]
    found = rows(tmp_path, pattern=["{speaker}/*.wav", "**"])
    assert found["b/d/2.dat"]["label_kind"] == "pseudo"
    assert found["a/1.wav"]["label_kind"] == "given"


NAME = st.text(st.characters(blacklist_characters="/-", blacklist_categories=("Cs",)), min_size=1)


@given(split=NAME, speaker=NAME, session=NAME, utterance=NAME, gender=NAME)
def test_a_pattern_reads_what_was_written_by_it(**fields: str) -> None:
    text = "**/{split}-{gender}/{speaker}/{session}-{utterance}.wav"
    for above in ("", "some/where-else/"):
        path = above + text.removeprefix("**/").format(**fields)
        found = path_pattern(text).fullmatch(path)
        assert found
        assert found.groupdict() == {key: fields[key] for key in fields if key != "utterance"}


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("*.wav", ["a.wav", ".wav"], ["a/b.wav", "a.wav.txt", "awav"]),
        ("**.wav", ["a.wav", "a/b/c.wav"], ["a/b.flac"]),
        ("**/x/*", ["x/a", "y/x/a"], ["yx/a", "x/a/b"]),
        ("{speaker}/{speaker}_*", ["p1/p1_2"], ["p1/p2_2", "p1/p1"]),
        ("{speaker:id*}/{}", ["id1/a", "id/a"], ["xid/a", "id1/"]),
    ],
)
def test_wildcards_stop_where_they_should(
    pattern: str, fits: list[str], fits_not: list[str]
) -> None:
    assert all(path_pattern(pattern).fullmatch(path) for path in fits)
    assert not any(path_pattern(pattern).fullmatch(path) for path in fits_not)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"pattern": "{speeker}/*"}, "no field 'speeker'"),
        ({"pattern": "{speaker/*"}, "brace is left over"),
        ({"layout": "pattern"}, "needs the key pattern"),
        ({"layout": "lhotse"}, "needs the key manifest"),
        ({"layout": "folders", "manifest": "m.csv"}, "has no use for manifest"),
        ({"pattern": "*", "manifest": "m.csv"}, "has no use for manifest"),
        ({"manifest": "m.xlsx"}, "ends in none of .csv"),
        ({"manifest": "m.csv", "path_template": "clips"}, "lacks {path}"),
        ({"like": "librispeach"}, "no description 'librispeach'; use one of aishell, "),
        ({"splits": {"dev": "validation"}}, "splits.dev"),
    ],
)
def test_keys_that_do_not_fit_are_explained(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config("/nowhere", **keys)
