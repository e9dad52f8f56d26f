"""Trials: nothing but the voice tells target from non-target."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.errors import CscError
from pipeline.mixing import TARGET_LEVEL_DBFS
from pipeline.schema import CATALOGUE
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from pipeline.trials import TrialAudio, TrialConfig, Trials, make_trials

CONFIG = TrialConfig(utterances_per_speaker=3, nontargets_per_test=5)


@pytest.fixture(scope="module")
def catalogue(store: Folder) -> pa.Table:
    return read_catalogue(store)


@pytest.fixture(scope="module")
def trials(catalogue: pa.Table) -> Trials:
    return make_trials(catalogue, "test", CONFIG, seed=1)


def test_trials_are_well_formed(trials: Trials) -> None:
    speakers = trials.speakers
    enrolment, test = speakers[trials.enrolment], speakers[trials.test]
    assert np.array_equal(trials.target, enrolment == test)
    assert not (trials.enrolment == trials.test).any()
    pairs = set(zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True))
    assert len(pairs) == len(trials.test)
    rival = speakers[trials.interferer[trials.test]]
    assert not (rival == test).any()
    assert not (rival == enrolment).any()
    counts = np.bincount(trials.test[~trials.target])
    assert counts.max() == CONFIG.nontargets_per_test


def test_only_speakers_of_the_split_take_part(trials: Trials, catalogue: pa.Table) -> None:
    train = catalogue.filter(pc.not_equal(catalogue["split"], "test"))
    assert not set(trials.speakers) & set(train["speaker_id"].to_pylist())
    assert set(trials.utterances["kind"].to_pylist()) == {"speech"}


def test_trials_depend_on_seed_and_data_alone(catalogue: pa.Table, trials: Trials) -> None:
    order = np.random.default_rng(0).permutation(len(catalogue))
    again = make_trials(catalogue.take(order), "test", CONFIG, seed=1)
    assert again.hash(CONFIG) == trials.hash(CONFIG)
    assert make_trials(catalogue, "test", CONFIG, seed=2).hash(CONFIG) != trials.hash(CONFIG)
    louder = TrialConfig(sir_db=[5.0], utterances_per_speaker=3, nontargets_per_test=5)
    assert trials.hash(louder) != trials.hash(CONFIG)


def test_the_test_side_has_the_asked_sir(store: Folder, trials: Trials) -> None:
    audio = TrialAudio(store, trials)
    levels = trials.utterances["level_dbfs"].to_numpy()
    for place in range(0, len(audio.pcm), 5):
        clean, gains_db = audio.sources(place, None)
        assert np.array_equal(clean[0], audio.pcm[place])
        assert not clean[1:].any()
        assert np.isinf(gains_db[1:]).all()
        mixed, gains_db = audio.sources(place, 5.0)
        assert mixed[1].any()
        assert levels[place] + gains_db[0] == pytest.approx(TARGET_LEVEL_DBFS, abs=1e-3)
        rival = levels[trials.interferer[place]] + gains_db[1]
        assert rival == pytest.approx(TARGET_LEVEL_DBFS - 5, abs=1e-3)


def test_a_split_without_speakers_is_refused(catalogue: pa.Table) -> None:
    with pytest.raises(CscError, match="split 'test' has 0 speaker"):
        make_trials(CATALOGUE.empty_table(), "test", CONFIG, seed=1)
    one = catalogue.filter(pc.equal(catalogue["speaker_id"], catalogue["speaker_id"][0]))
    with pytest.raises(CscError, match=r"has 1 speaker\(s\)"):
        make_trials(one, one["split"][0].as_py(), CONFIG, seed=1)
