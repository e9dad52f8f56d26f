"""Recipes are pure, well-formed, and as the distributions say that they are drawn from."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.casting import MixingTable, Rooms, nameless
from pipeline.distributions import BuildConfig, Curriculum, MixingConfig
from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.mixing import TARGET_LEVEL_DBFS, Recipe, Source, recipe
from pipeline.schema import CATALOGUE, ROOMS, of_split
from pipeline.shards import read_catalogue
from pipeline.storage import Folder

KEY = stream_key(3, "train")
RICH = MixingConfig(
    seconds=0.5,
    interferer_shares=[0.2, 0.5, 0.3],
    overlap_min=0.0,
    absent_share=0.3,
    noise_share=0.5,
    babble_share=0.5,
    babble_voices=3,
    mixit_share=0.2,
)
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
    first = recipe(KEY, index, MixingTable(catalogue, RICH), RICH)
    again = recipe(KEY, index, MixingTable(catalogue.take(rows), RICH), RICH)
    assert first == again
    other = recipe(KEY + 1, index, MixingTable(catalogue, RICH), RICH)
    assert first.sources != other.sources


@given(st.integers(0, 2**40), st.integers(1, 3), st.sampled_from([[0.5, 0.5], [0, 0.4, 0.6]]))
@settings(max_examples=200, deadline=None)
def test_an_episode_is_one_speaker_under_different_conditions(
    catalogue: pa.Table, index: int, conditions: int, shares: list[float]
) -> None:
    changes = {"conditions": conditions, "interferer_shares": shares, "mixit_share": 0.0}
    config = RICH.model_copy(update=changes)
    drawn = recipe(KEY, index, MixingTable(catalogue, config), config)
    check(drawn, config)
    speaker_of = dict(
        zip(*(catalogue[c].to_pylist() for c in ("utterance_id", "speaker_id")), strict=True)
    )
    assert all(speaker_of[source.utterance_id] == source.speaker_id for source in drawn.sources)


def check(drawn: Recipe, config: MixingConfig) -> None:
    noise_slot = config.num_slots - 1
    targets = [source for source in drawn.sources if source.slot == 0]
    rivals = [source for source in drawn.sources if 0 < source.slot < noise_slot]
    assert drawn.sources[0].slot == 0
    assert {source.speaker_id for source in targets} == {drawn.anchor}
    assert len({source.utterance_id for source in targets}) == len(targets)
    assert drawn.anchor not in {source.speaker_id for source in rivals}
    assert len({source.speaker_id for source in rivals}) == len(rivals)
    for source in drawn.sources:
        assert source.offset >= 0
        assert 0 < source.num_samples <= config.num_samples
        assert 0 <= source.onset <= config.num_samples - source.num_samples
    for number, condition in enumerate(drawn.conditions):
        here = [source for source in drawn.sources if source.condition == number]
        voices = [source for source in here if source.slot < noise_slot]
        assert voices, "somebody speaks in every mixture"
        together = {source.slot > 0 for source in voices} == {False, True}
        assert (condition.sir_db is None) == (condition.overlap is None) == (not together)
        assert (condition.snr_db is None) == (not any(s.slot == noise_slot for s in here))
        if condition.sir_db is not None:
            assert config.sir_min_db <= condition.sir_db <= config.sir_max_db
        crowd = [s.speaker_id for s in here if s.slot == noise_slot]
        assert len(set(crowd)) == len(crowd)
        assert drawn.anchor not in crowd


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
        (9, 3, {"noise_share": 0.0, "room_share": 0.1}, "no corpus of kind 'room'"),
        (6, 3, {"noise_share": 0.0, "mixit_share": 0.1}, "6 speaker.*at least 7 are needed"),
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


NAMELESS = RICH.model_copy(update={"by_recording": True, "conditions": 3})


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_by_recording_no_label_changes_a_recipe(catalogue: pa.Table, index: int) -> None:
    speech = catalogue.filter(pc.equal(catalogue["label_kind"], "given"))
    noise, others = catalogue.filter(pc.equal(catalogue["kind"], "noise")), speech
    for name in ("speaker_id", "session_id", "gender"):
        order = pa.array(np.random.default_rng(index).permutation(len(speech)))
        place = speech.schema.get_field_index(name)
        others = others.set_column(place, name, speech[name].take(order))
    drawn, same = (
        recipe(
            KEY, index, MixingTable(nameless(pa.concat_tables([rows, noise])), NAMELESS), NAMELESS
        )
        for rows in (speech, others)
    )
    assert drawn == same
    targets = {source.utterance_id for source in drawn.sources if source.slot == 0}
    if not drawn.mixit:
        assert targets == {drawn.anchor}
    voices = [source for source in drawn.sources if source.slot < NAMELESS.num_slots - 1]
    assert all(source.speaker_id == source.utterance_id for source in voices)


def test_by_recording_what_was_cut_from_a_recording_of_nobody_known_stays_together() -> None:
    rows = [row(f"u{n}", "c/talk", "c/talk/0") | {"label_kind": "pseudo"} for n in range(3)]
    rows += [row("u3", "c/ann", "c/ann/0") | {"label_kind": "given"}]
    forgotten = nameless(pa.Table.from_pylist(rows, schema=CATALOGUE))
    assert forgotten["speaker_id"].to_pylist() == ["c/talk"] * 3 + ["u3"]


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


def table_of(speakers: int, **config: object) -> tuple[MixingTable, MixingConfig]:
    """Return speakers with six utterances each, of 0.25 to 1.5 s, every other one a woman."""
    rows = [
        row(
            f"u{s}.{n}",
            f"c/s{s:02d}",
            f"c/s{s}/{n}",
            gender="fm"[s % 2] if s < 20 else None,
            num_samples=4000 * (n + 1),
        )
        for s in range(speakers)
        for n in range(6)
    ]
    mixing = MixingConfig(**{"seconds": 0.5, "noise_share": 0.0} | config)  # type: ignore[arg-type]
    return MixingTable(pa.Table.from_pylist(rows, schema=CATALOGUE), mixing), mixing


def drawn_from(table: MixingTable, config: MixingConfig, count: int = 1000) -> list[Recipe]:
    return [recipe(KEY, index, table, config) for index in range(count)]


def of(drawn: Recipe, number: int) -> list[Source]:
    return [source for source in drawn.sources if source.condition == number]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_interferers_are_of_the_same_gender_as_often_as_asked(share: float) -> None:
    table, config = table_of(24, same_gender_share=share, interferer_shares=[0.0, 1.0])
    same = [
        int(source.speaker_id[3:]) % 2 == int(drawn.anchor[3:]) % 2
        for drawn in drawn_from(table, config)
        for source in drawn.sources
        if source.slot == 1 and int(drawn.anchor[3:]) < 20  # of the others nothing is known
    ]
    assert np.mean(same) == pytest.approx(share, abs=0.05)


def test_shares_are_what_they_say() -> None:
    table, config = table_of(24, interferer_shares=[0.2, 0.5, 0.3], absent_share=0.25)
    recipes = drawn_from(table, config)
    counts = [len({s.slot for s in of(drawn, 0)}) - 1 for drawn in recipes]
    assert np.bincount(counts) / len(counts) == pytest.approx([0.2, 0.5, 0.3], abs=0.05)
    absent = [all(s.slot for s in of(drawn, 1)) for drawn in recipes]
    assert np.mean(absent) / 2 == pytest.approx(0.25, abs=0.05), "of all mixtures"
    assert all(of(drawn, 0)[0].slot == 0 for drawn in recipes), "the first mixture has the anchor"


@given(st.integers(0, 2**40), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_voices_overlap_as_asked_where_utterances_are_long(index: int, overlap: float) -> None:
    config = MixingConfig(
        seconds=0.2,
        noise_share=0.0,
        overlap_min=overlap,
        overlap_max=overlap,
        interferer_shares=[0.0, 0.5, 0.5],
    )
    table, _ = table_of(12)
    for number in range(2):
        here = of(recipe(KEY, index, table, config), number)
        heard = np.zeros((2, config.num_samples), bool)
        for source in here:
            heard[min(source.slot, 1), source.onset : source.onset + source.num_samples] = True
        assert heard.all(0).mean() == pytest.approx(overlap, abs=1e-3)
        assert heard.any(0).all(), "there is no gap"
        assert heard.mean(1).min() >= 0.25 - 1e-3, "a turn is never too short to be heard"


def test_several_interferers_together_have_the_power_asked_for() -> None:
    table, config = table_of(12, interferer_shares=[0.0, 0.0, 1.0])
    for drawn in drawn_from(table, config, 50):
        for number, condition in enumerate(drawn.conditions):
            target, *rivals = (s.level_dbfs for s in of(drawn, number) if s.level_dbfs is not None)
            power_db = 10 * np.log10(sum(10 ** (level / 10) for level in rivals))
            assert target == TARGET_LEVEL_DBFS
            assert target - power_db == pytest.approx(condition.sir_db)


def test_babble_is_made_of_others_and_mixit_of_all() -> None:
    table, config = table_of(12, noise_share=1.0, babble_share=1.0, babble_voices=4)
    for drawn in drawn_from(table, config, 100):
        check(drawn, config)
        for number in range(2):
            voices = {s.speaker_id for s in of(drawn, number) if s.slot == config.num_slots - 1}
            assert len(voices) == 4
            assert not voices & {s.speaker_id for s in of(drawn, number) if s.slot < 2}
    table, config = table_of(12, mixit_share=0.4, mixit_voices=2)
    recipes = drawn_from(table, config)
    assert np.mean([drawn.mixit for drawn in recipes]) == pytest.approx(0.4, abs=0.05)
    for drawn in (drawn for drawn in recipes if drawn.mixit):
        for number in range(2):
            assert [s.slot for s in of(drawn, number)] == [0, 0, 1, 1]
            assert len({s.speaker_id for s in of(drawn, number)}) == 4


def test_a_mixture_is_in_one_room_of_its_split() -> None:
    rows = [
        {"utterance_id": f"r{n}", "room": f"room{n // 3}", "split": "train" if n < 9 else "test"}
        for n in range(12)
    ]
    rooms = Rooms.of(pa.Table.from_pylist(rows, schema=ROOMS), "train")
    assert rooms.responses == [range(3), range(3, 6), range(6, 9)]
    plain, _ = table_of(12)
    plain.rooms = rooms
    config = MixingConfig(seconds=0.5, noise_share=0.0, room_share=0.5)
    inside = 0
    for drawn in drawn_from(plain, config):
        for number in range(2):
            used = {source.room // 3 if source.room >= 0 else -1 for source in of(drawn, number)}
            assert len(used) == 1
            inside += used != {-1}
    assert inside / 2000 == pytest.approx(0.5, abs=0.05)


def test_windows_together_draw_speakers_evenly() -> None:
    """A speaker of whom a window has a part is drawn there in part."""
    rows = [row(f"u{s}.{n}", f"c/s{s}", f"c/s{s}/{n}") for s in range(4) for n in range(6)]
    table = pa.Table.from_pylist(rows, schema=CATALOGUE)
    config = MixingConfig(seconds=0.5, noise_share=0.0)
    mixing = MixingTable(table, config, {"c/s0": 60})
    assert mixing.anchors.cdf[-1] == pytest.approx(3.1)
    anchors = [drawn.anchor for drawn in drawn_from(mixing, config)]
    assert np.mean([anchor == "c/s0" for anchor in anchors]) == pytest.approx(0.1 / 3.1, abs=0.02)


def test_interferers_are_balanced_like_anchors() -> None:
    rows = [
        row(f"u{s}.{n}", f"c/s{s:02d}", f"c/s{s}/{n}")
        for s in range(20)
        for n in range(2 + 8 * (s < 5))
    ]
    table = pa.Table.from_pylist(rows, schema=CATALOGUE)
    for balance, share in ((0.0, 5 / 20), (1.0, 50 / 80)):
        config = MixingConfig(
            seconds=0.5, noise_share=0.0, balance=balance, interferer_shares=[0.0, 1.0]
        )
        mixing = MixingTable(table, config)
        rivals = [s.speaker_id for d in drawn_from(mixing, config) for s in d.sources if s.slot]
        assert np.mean([name < "c/s05" for name in rivals]) == pytest.approx(share, abs=0.1)


def test_a_curriculum_moves_from_easy_to_hard() -> None:
    config = MixingConfig(
        sir_min_db=-5.0,
        interferer_shares=[0.1, 0.6, 0.3],
        curriculum=Curriculum(
            epochs=4, start={"sir_min_db": 5.0, "interferer_shares": [0.5, 0.5, 0.0]}
        ),
    )
    assert [config.at(epoch).sir_min_db for epoch in (0, 2, 4, 9)] == [5.0, 0.0, -5.0, -5.0]
    assert config.at(2).interferer_shares == pytest.approx([0.3, 0.55, 0.15])
    assert config.final == config.at(4)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ({"loudness": 1.0}, "loudness cannot move"),
        ({"seconds": 1.0}, "seconds cannot move"),
        ({"balance": 1.0}, "balance cannot move"),
        ({"conditions": 2.0}, "conditions cannot move"),
        ({"interferer_shares": [1.0]}, "interferer_shares cannot move"),
        ({"interferer_shares": [0.7, 0.7]}, "sum to 1"),
        ({"noise_share": 3.0}, "less than or equal to 1"),
        ({"sir_min_db": 20.0}, "sir_min_db is above sir_max_db"),
    ],
)
def test_a_curriculum_that_leads_nowhere_is_refused(
    start: dict[str, float | list[float]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        MixingConfig(curriculum=Curriculum(epochs=3, start=start))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_what_is_in_order_stays_in_order(a: float, b: float, c: float, epochs: int) -> None:
    low, high = sorted((a, b))
    start = {"overlap_min": c, "overlap_max": c}
    config = MixingConfig(
        overlap_min=low, overlap_max=high, curriculum=Curriculum(epochs=epochs, start=start)
    )
    for epoch in range(epochs + 2):
        config.at(epoch)


def test_an_epoch_reads_a_pass_and_a_curriculum_is_gone_through_once() -> None:
    curriculum = Curriculum(epochs=2, start={"sir_min_db": 5.0})
    config = BuildConfig(passes=5, mixing=MixingConfig(curriculum=curriculum))
    assert [config.turn(epoch) for epoch in range(9)] == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert [BuildConfig(passes=2).turn(epoch) for epoch in range(4)] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="passes is 2: more than"):
        BuildConfig(passes=2, mixing=MixingConfig(curriculum=curriculum))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"episodes_per_group": 10_000}, "episodes_per_group 10000 makes row groups of"),
        ({"mixing": {"absent_share": 0.6}}, "absent_share is at most 0.5"),
        ({"mixing": {"curriculum": {"epochs": 3}}}, "epochs and start belong together"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BuildConfig.model_validate(change)


@given(st.integers(0, 2**63), st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_choice_has_a_share(index: int, shares: list[float]) -> None:
    if sum(shares) > 0:
        assert shares[Draws(KEY, index).chosen(shares)] > 0
