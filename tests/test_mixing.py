"""Recipes are pure, well-formed, and rendered as a plain loop would."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.build import of_split
from pipeline.errors import CscError
from pipeline.mixing import Draws, MixingConfig, MixingTable, Recipe, recipe, stream_key, window
from pipeline.render import PEAK, render
from pipeline.schema import CATALOGUE, RECIPE
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from tests.conftest import BUILD

KEY = stream_key(3, "train")
GOLDEN_FRACTIONS = [0.751610134832803, 0.9542084747804751, 0.7765064223344135]
GOLDEN_KEY = 118772365653703011139793883125082790913


@pytest.fixture(scope="module")
def catalogue(store: Folder) -> pa.Table:
    return of_split(read_catalogue(store), "train")


def test_random_numbers_never_change() -> None:
    """Recipes of all datasets ever built hang on these values."""
    draws = Draws(1, 2)
    assert [draws.fraction() for _ in range(3)] == GOLDEN_FRACTIONS
    assert stream_key(7, "train") == GOLDEN_KEY


@given(st.integers(0, 2**63), st.integers(1, 50), st.data())
@settings(max_examples=50, deadline=None)
def test_distinct_draws_are_distinct(index: int, count: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, count))
    drawn = Draws(KEY, index).distinct(count, chosen)
    assert len(set(drawn)) == chosen
    assert all(0 <= value < count for value in drawn)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_recipe_depends_on_seed_and_index_alone(catalogue: pa.Table, index: int) -> None:
    rows = np.random.default_rng(index).permutation(len(catalogue))
    first = recipe(KEY, index, MixingTable(catalogue, BUILD.mixing), BUILD.mixing)
    again = recipe(KEY, index, MixingTable(catalogue.take(rows), BUILD.mixing), BUILD.mixing)
    assert first == again
    other = recipe(KEY + 1, index, MixingTable(catalogue, BUILD.mixing), BUILD.mixing)
    assert first.sources != other.sources


@given(st.integers(0, 2**40), st.integers(2, 3), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_an_episode_is_one_speaker_under_different_conditions(
    catalogue: pa.Table, index: int, conditions: int, interferers: int
) -> None:
    config = BUILD.mixing.model_copy(update={"conditions": conditions, "interferers": interferers})
    drawn = recipe(KEY, index, MixingTable(catalogue, config), config)
    check(drawn, config)
    speaker_of = dict(
        zip(*(catalogue[c].to_pylist() for c in ("utterance_id", "speaker_id")), strict=True)
    )
    assert all(speaker_of[source.utterance_id] == source.speaker_id for source in drawn.sources)
    pa.Table.from_pylist([drawn.as_row()], schema=RECIPE)


def check(drawn: Recipe, config: MixingConfig) -> None:
    targets = [source for source in drawn.sources if source.slot == 0]
    rivals = [source for source in drawn.sources if 0 < source.slot <= config.interferers]
    assert [source.condition for source in targets] == list(range(config.conditions))
    assert {source.speaker_id for source in targets} == {drawn.anchor}
    assert len({source.utterance_id for source in targets}) == config.conditions
    assert drawn.anchor not in {source.speaker_id for source in rivals}
    assert len({source.speaker_id for source in rivals}) == len(rivals)
    for source in drawn.sources:
        assert source.offset >= 0
        assert 0 < source.num_samples <= config.num_samples
        assert 0 <= source.onset <= config.num_samples - source.num_samples
    for number, condition in enumerate(drawn.conditions):
        here = [source for source in rivals if source.condition == number]
        assert (condition.sir_db is None) == (not here)
        if condition.sir_db is not None:
            assert config.sir_min_db <= condition.sir_db <= config.sir_max_db


def test_conditions_come_from_different_sessions_where_there_are_any() -> None:
    rows = [
        row(f"u{speaker}{n}", f"c/s{speaker}", session=f"c/s{speaker}/{n // 4}")
        for speaker in range(4)
        for n in range(8)
    ]
    table = pa.Table.from_pylist(rows, schema=CATALOGUE)
    config = MixingConfig(seconds=0.5, noise_share=0.0)
    mixing = MixingTable(table, config)
    session = {line["utterance_id"]: line["session_id"] for line in rows}
    for index in range(50):
        targets = [s for s in recipe(KEY, index, mixing, config).sources if s.slot == 0]
        assert len({session[source.utterance_id] for source in targets}) == 2


def row(utterance: str, speaker: str, session: str, **more: object) -> dict[str, object]:
    base = dict.fromkeys(CATALOGUE.names)
    return base | {
        "utterance_id": utterance,
        "speaker_id": speaker,
        "session_id": session,
        "kind": "speech",
        "split": "train",
        "num_samples": 20_000,
        "level_dbfs": -20.0,
        "shard": 0,
        "row": 0,
        **more,
    }


@pytest.mark.parametrize(
    ("speakers", "utterances", "changes", "reason"),
    [
        (1, 5, {"noise_share": 0.0}, "1 speaker"),
        (9, 1, {"noise_share": 0.0}, "no speaker has 2 utterances"),
        (9, 3, {"noise_share": 0.5}, "no corpus of kind 'noise'"),
    ],
)
def test_too_small_a_corpus_is_refused(
    speakers: int, utterances: int, changes: dict[str, float], reason: str
) -> None:
    rows = [
        row(f"u{s}{n}", f"c/s{s}", f"c/s{s}/{n}")
        for s in range(speakers)
        for n in range(utterances)
    ]
    with pytest.raises(CscError, match=reason):
        MixingTable(pa.Table.from_pylist(rows, schema=CATALOGUE), MixingConfig(**changes))


def test_every_speaker_is_drawn_as_often_whatever_it_has_said() -> None:
    rows = [
        row(f"u{s}.{n}", f"c/s{s}", f"c/s{s}/{n}")
        for s in range(4)
        for n in range(2 + 30 * (s == 0))
    ]
    table = pa.Table.from_pylist(rows, schema=CATALOGUE)
    for balance, share in ((0.0, 1 / 4), (1.0, 32 / 38)):
        config = MixingConfig(seconds=0.5, noise_share=0.0, balance=balance)
        mixing = MixingTable(table, config)
        anchors = [recipe(KEY, index, mixing, config).anchor for index in range(600)]
        assert np.mean([anchor == "c/s0" for anchor in anchors]) == pytest.approx(share, abs=0.06)


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_windows_are_pure_sorted_and_as_wide_as_asked(number: int, shards: int, width: int) -> None:
    drawn = window(KEY, number, shards, width)
    assert drawn == window(KEY, number, shards, width) == sorted(set(drawn))
    assert len(drawn) == min(shards, width)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_rendering_is_the_plain_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = rng.integers(-32768, 32768, (2, 2, 3, 50)).astype(np.int16)
    gains_db = rng.uniform(-30, 10, (2, 2, 3)).astype(np.float32)
    gains_db[0, 0, 2] = -np.inf
    rendered = render(torch.from_numpy(sources), torch.from_numpy(gains_db))
    for place in np.ndindex(2, 2):
        amplitude = 10 ** (gains_db[place].astype(np.float64) / 20) / 32768
        dry = sources[place] * amplitude[:, None]
        scale = min(1.0, PEAK / np.abs(dry.sum(0)).max())
        np.testing.assert_allclose(rendered.mixtures[place], scale * dry.sum(0), atol=1e-5)
        np.testing.assert_allclose(rendered.references[place], scale * dry[:2], atol=1e-5)
    assert rendered.mixtures.abs().max() <= PEAK + 1e-6
