"""Words that a recogniser of one's own hears, and how many of them are lost."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.words import Floats, recogniser_named, word_errors
from pipeline.errors import CscError

WORD = 1600


def levels(samples: Floats) -> str:
    """Recognise a word in each tenth of a second: how loud it is; none where it is silent."""
    whole = samples[: len(samples) // WORD * WORD].reshape(-1, WORD)
    loud = np.sqrt(np.square(whole).mean(-1))
    return " ".join(f"{level:.1f}" for level in loud if level >= 0.05)


def spoken(*words: float) -> Floats:
    return np.repeat(np.array(words, np.float32), WORD)


def test_errors_are_words_more_or_less_or_others() -> None:
    voice = spoken(0.1, 0.2, 0.3)
    heard = [voice, spoken(0.1, 0.3), spoken(0.1, 0.9, 0.3), spoken(0.5, 0.1, 0.2, 0.3), spoken()]
    assert word_errors(levels, voice, heard).tolist() == [3, 0, 1, 1, 1, 3]


def test_where_nothing_is_said_every_word_is_one_too_many() -> None:
    assert word_errors(levels, spoken(0.0), [spoken(0.1, 0.2), spoken()]).tolist() == [0, 2, 0]


@given(*[st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=6)] * 2)
def test_errors_are_the_distance_of_a_plain_table(voice: list[float], heard: list[float]) -> None:
    table = np.zeros((len(voice) + 1, len(heard) + 1))
    table[0], table[:, 0] = np.arange(len(heard) + 1), np.arange(len(voice) + 1)
    for i, one in enumerate(voice, start=1):
        for j, other in enumerate(heard, start=1):
            swap = table[i - 1, j - 1] + (one != other)
            table[i, j] = min(swap, table[i - 1, j] + 1, table[i, j - 1] + 1)
    found = word_errors(levels, spoken(*voice), [spoken(*heard)])
    assert found.tolist() == [len(voice), table[-1, -1]]


def test_a_recogniser_is_named_by_module_and_function() -> None:
    assert recogniser_named(f"{__name__}:levels") is levels


@pytest.mark.parametrize(
    "name",
    ["nowhere:hear", "tests.test_words:deaf", "tests.test_words:WORD", "tests.test_words", ""],
)
def test_one_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(CscError, match=r"evaluate\.recogniser .*package\.module:function"):
        recogniser_named(name)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(CscError, match=r"pip install 'csc\[words\]'"):
        recogniser_named(f"{__name__}:levels")
