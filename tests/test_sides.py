"""Test sides: what lies over a voice is what the condition asks for."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.mixing import TARGET_LEVEL_DBFS
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.shards import read_catalogue
from pipeline.sides import TrialAudio, from_store, middle, side_id
from pipeline.speech import active_level_dbfs
from pipeline.storage import Folder
from pipeline.trials import CLEAN, Condition, TrialConfig, Trials, make_trials
from tests.conftest import make_store, write_corpus, write_noise, write_rooms

CONFIG = TrialConfig(utterances_per_speaker=3, nontargets_per_test=5)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A store with speech, noise and rooms in its test split."""
    root = tmp_path_factory.mktemp("roomy")
    write_corpus(root / "voices", 8, 3)
    corpora = [
        CorpusConfig(name="voices", root=str(root / "voices")),
        CorpusConfig(name="noise", root=str(write_noise(root / "noise")), kind="noise"),
        CorpusConfig(name="rooms", root=str(write_rooms(root / "rooms")), kind="room"),
    ]
    splits = {"valid_share": 0.0, "test_share": 0.99}
    return make_store(root / "store", IngestConfig(corpora=corpora, splits=splits))


@pytest.fixture(scope="module")
def trials(roomy: Folder) -> Trials:
    return make_trials(read_catalogue(roomy), "test", CONFIG, seed=1)


@pytest.fixture(scope="module")
def audio(roomy: Folder, trials: Trials) -> TrialAudio:
    return TrialAudio(from_store(roomy), trials)


def level(samples: np.ndarray) -> float:
    return 10 * float(np.log10(np.mean(samples.astype(np.float64) ** 2)))


def test_every_condition_can_be_made(trials: Trials) -> None:
    assert not trials.skipped
    assert list(trials.conditions) == list(CONFIG.conditions)


def test_clean_is_the_utterance_at_one_level(audio: TrialAudio, trials: Trials) -> None:
    for place in range(len(trials.utterances)):
        side = audio.side(place, CLEAN)
        assert active_level_dbfs(side.mixture) == pytest.approx(TARGET_LEVEL_DBFS, abs=0.1)
        assert np.array_equal(side.mixture, side.voices[0])
        assert not side.voices[1:].any()


@pytest.mark.parametrize("sir_db", [10, 5, 0, -5])
def test_an_interferer_is_at_the_asked_level(
    audio: TrialAudio, trials: Trials, sir_db: int
) -> None:
    for place in range(len(trials.utterances)):
        side = audio.side(place, f"sir_{sir_db}_db")
        target, rival, none = side.voices
        np.testing.assert_allclose(target + rival, side.mixture, atol=1e-6)
        assert not none.any()
        levels = [active_level_dbfs(voice) for voice in (target, rival)]
        assert levels[0] - levels[1] == pytest.approx(sir_db, abs=0.1)


def test_two_interferers_share_the_level_of_one(
    roomy: Folder, audio: TrialAudio, trials: Trials
) -> None:
    one = trials.conditions | {"two_0_db": Condition(interferers=1)}
    single = TrialAudio(from_store(roomy), trials._replace(conditions=one))
    for place in range(len(trials.utterances)):
        both, alone = (each.side(place, "two_0_db").voices for each in (audio, single))
        assert both[2].any()
        scaled = level(both[0]) - level(alone[0])  # as a whole, where it would clip
        assert level(both[1]) - scaled - level(alone[1]) == pytest.approx(-3.01, abs=0.02)


@pytest.mark.parametrize("snr_db", [10, 0])
def test_noise_is_at_the_asked_level(audio: TrialAudio, trials: Trials, snr_db: int) -> None:
    for place in range(len(trials.utterances)):
        side = audio.side(place, f"noise_{snr_db}_db")
        noise = side.mixture - side.voices.sum(0)
        asked = active_level_dbfs(side.voices[0]) - snr_db
        assert active_level_dbfs(noise) == pytest.approx(asked, abs=0.1)


def test_a_room_changes_the_sound_and_not_the_power(audio: TrialAudio, trials: Trials) -> None:
    for place in range(len(trials.utterances)):
        dry, wet = (audio.side(place, name).mixture for name in (CLEAN, "room"))
        assert dry.shape == wet.shape
        assert level(wet) == pytest.approx(level(dry), abs=0.01)
        assert np.corrcoef(dry, wet)[0, 1] < 0.99


def test_a_short_test_is_the_middle(audio: TrialAudio, trials: Trials) -> None:
    whole, short = audio.side(0, CLEAN).mixture, audio.side(0, "short_1_s").mixture
    assert len(short) == SAMPLE_RATE_HZ
    first = (len(whole) - len(short)) // 2
    part = whole[first : first + len(short)]
    assert np.corrcoef(short, part)[0, 1] == pytest.approx(1)
    assert active_level_dbfs(short) == pytest.approx(TARGET_LEVEL_DBFS, abs=0.1)
    assert len(middle(np.zeros(100, "<i2"), 1.0)) == 100


def test_parts_of_the_audio_give_the_same_sides(
    roomy: Folder, trials: Trials, audio: TrialAudio
) -> None:
    places = [1, 5]
    part = TrialAudio(from_store(roomy), trials, places)
    for place in places:
        for name in trials.conditions:
            assert np.array_equal(part.side(place, name).mixture, audio.side(place, name).mixture)


def test_a_side_is_named_by_what_it_is_made_of(trials: Trials) -> None:
    names = {
        side_id(trials, place, name)
        for place in range(len(trials.utterances))
        for name in trials.conditions
    }
    assert len(names) == len(trials.utterances) * len(trials.conditions)
    other = trials._replace(
        conditions={**trials.conditions, "again": trials.conditions["sir_5_db"]},
        noise=np.zeros_like(trials.noise),
        rivals=trials.rivals[:, [0, 0]],
    )
    assert side_id(other, 3, "again") == side_id(trials, 3, "sir_5_db")
    moved = trials._replace(rivals=np.roll(trials.rivals, 1, axis=0))
    assert side_id(moved, 3, "sir_5_db") != side_id(trials, 3, "sir_5_db")
    assert side_id(moved, 3, CLEAN) == side_id(trials, 3, CLEAN)


def test_audio_that_no_condition_asks_for_is_not_read(roomy: Folder, trials: Trials) -> None:
    read: list[pa.Table] = []
    plain = trials._replace(conditions={CLEAN: Condition()})
    reader = from_store(roomy)

    def watched(rows: pa.Table) -> list[np.ndarray]:
        read.append(rows)
        return reader(rows)

    TrialAudio(watched, plain, [2])
    kinds = pc.unique(pa.concat_tables(read)["kind"]).to_pylist()
    assert kinds == ["speech"]
    assert sum(len(rows) for rows in read) == 1
