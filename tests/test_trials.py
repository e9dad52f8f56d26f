"""Trials: nothing but the voice tells target from non-target."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.schema import CATALOGUE
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from pipeline.trials import CLEAN, MAX_RIVALS, NONE, Condition, TrialConfig, Trials, make_trials

CONFIG = TrialConfig(utterances_per_speaker=3, nontargets_per_test=5)


@pytest.fixture(scope="module")
def catalogue(store: Folder) -> pa.Table:
    return read_catalogue(store)


@pytest.fixture(scope="module")
def trials(catalogue: pa.Table) -> Trials:
    return make_trials(catalogue, "test", CONFIG, seed=1)


def test_trials_are_well_formed(trials: Trials) -> None:
    speakers = trials.speakers
    enrolment = speakers[trials.enrolled[trials.enrolment, 0]]
    test = speakers[trials.test]
    assert np.array_equal(trials.target, enrolment == test)
    assert not (trials.enrolled[trials.enrolment] == trials.test[:, None]).any()
    pairs = set(zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True))
    assert len(pairs) == len(trials.test)
    for rival in speakers[trials.rivals[trials.test]].T:
        assert not (rival == test).any()
        assert not (rival == enrolment).any()
    one, other = speakers[trials.rivals].T
    assert not (one == other).any()
    counts = np.bincount(trials.test[~trials.target])
    assert counts.max() == CONFIG.nontargets_per_test


@pytest.mark.parametrize("together", [1, 2])
def test_a_test_side_has_trials_of_both_kinds_or_none(catalogue: pa.Table, together: int) -> None:
    config = TrialConfig(enrolment_utterances=together, nontargets_per_test=5)
    trials = make_trials(catalogue, "test", config, seed=1)
    targets = set(trials.test[trials.target].tolist())
    assert targets == set(trials.test[~trials.target].tolist())


def test_a_split_in_which_few_can_be_enrolled_is_refused(catalogue: pa.Table) -> None:
    speech = catalogue.filter(pc.equal(catalogue["kind"], "speech"))
    speech = speech.filter(pc.equal(speech["split"], "test"))
    names = sorted(set(speech["speaker_id"].to_pylist()))
    first = speech.filter(pc.equal(speech["speaker_id"], names[0]))
    rest = [speech.filter(pc.equal(speech["speaker_id"], name)).slice(0, 1) for name in names[1:]]
    config = TrialConfig(enrolment_utterances=2)
    with pytest.raises(CscError, match="too few speakers who can be enrolled by 2"):
        make_trials(pa.concat_tables([first, *rest]), "test", config, seed=1)


def test_half_of_the_nontargets_are_of_one_gender(catalogue: pa.Table) -> None:
    speaker = catalogue["speaker_id"].to_pylist()
    genders = pa.array(["fm"[sum(map(ord, name)) % 2] for name in speaker])
    known = catalogue.set_column(catalogue.column_names.index("gender"), "gender", genders)
    trials = make_trials(known, "test", TrialConfig(nontargets_per_test=4), seed=1)
    gender = np.asarray(trials.utterances["gender"].to_pylist())
    same = gender[trials.enrolled[trials.enrolment, 0]] == gender[trials.test]
    for test in np.unique(trials.test):
        mine = (trials.test == test) & ~trials.target
        assert mine.sum() == 4
        assert same[mine].sum() == 2
    assert same[trials.target].all()


def test_several_utterances_enrol_together(catalogue: pa.Table) -> None:
    config = TrialConfig(enrolment_utterances=2, nontargets_per_test=5)
    trials = make_trials(catalogue, "test", config, seed=1)
    speakers = trials.speakers[trials.enrolled]
    assert trials.enrolled.shape[1] == 2
    assert np.array_equal(speakers[:, 0], speakers[:, 1])
    assert not (trials.enrolled[:, 0] == trials.enrolled[:, 1]).any()
    assert not (trials.enrolled[trials.enrolment] == trials.test[:, None]).any()
    assert trials.target.any()


def test_conditions_that_lack_their_noise_are_left_out_and_said(catalogue: pa.Table) -> None:
    speech = catalogue.filter(pc.equal(catalogue["kind"], "speech"))
    trials = make_trials(speech, "test", CONFIG, seed=1)
    assert set(trials.skipped) == {"noise_10_db", "noise_0_db", "room"}
    assert set(trials.conditions) == set(CONFIG.conditions) - set(trials.skipped)
    assert (trials.noise == NONE).all()
    trials.require([CLEAN, "two_0_db"])
    with pytest.raises(CscError, match="noise_0_db: split 'test' has no noise; ingest some"):
        trials.require([CLEAN, "noise_0_db"])


def test_only_what_is_of_the_split_takes_part(trials: Trials, catalogue: pa.Table) -> None:
    train = catalogue.filter(pc.not_equal(catalogue["split"], "test"))
    for table, kind in ((trials.utterances, "speech"), (trials.noises, "noise")):
        assert set(table["kind"].to_pylist()) == {kind}
        assert not set(table["utterance_id"].to_pylist()) & set(train["utterance_id"].to_pylist())
    assert not set(trials.speakers) & set(train["speaker_id"].to_pylist())


def test_trials_depend_on_seed_and_data_alone(catalogue: pa.Table, trials: Trials) -> None:
    order = np.random.default_rng(0).permutation(len(catalogue))
    assert make_trials(catalogue.take(order), "test", CONFIG, seed=1).hash == trials.hash
    assert make_trials(catalogue, "test", CONFIG, seed=2).hash != trials.hash
    conditions = CONFIG.conditions | {"room": Condition(room=True, seconds=1.0)}
    assert make_trials(catalogue, "test", CONFIG, seed=1).hash == trials.hash
    noisier = CONFIG.conditions | {"noise_0_db": Condition(snr_db=-1.0)}
    for changed in (conditions, noisier):
        config = CONFIG.model_copy(update={"conditions": changed})
        made = make_trials(catalogue, "test", config, seed=1)
        assert (made.hash == trials.hash) == (changed is conditions)  # there is no room to put in


def by_looking_at_all(rows: pa.Table, config: TrialConfig, seed: int) -> tuple[Any, Any]:
    """Draw rivals and pairs as the definition says: from whoever is left, found by looking."""
    names, gender, session = (
        np.array(rows[key].to_pylist()) for key in ("speaker_id", "gender", "session_id")
    )
    together = config.enrolment_utterances
    enrolled = np.array(
        [
            own[first : first + together]
            for own in (np.flatnonzero(names == name) for name in np.unique(names))
            for first in range(0, len(own) - together + 1, together)
        ]
    )
    who, of_gender = names[enrolled[:, 0]], gender[enrolled[:, 0]]
    all_rivals, pairs = [], []
    for test in range(len(rows)):
        draws, rivals = Draws(stream_key(seed, "trials", "test"), test), []
        for _ in range(MAX_RIVALS):
            strangers = np.flatnonzero(~np.isin(names, names[[test, *rivals]]))
            rivals.append(int(strangers[draws.below(len(strangers))]))
        all_rivals.append(rivals)
        without = (who == names[test]) & ~(enrolled == test).any(1)
        apart = without & (session[enrolled] != session[test]).all(1)
        own = np.flatnonzero(apart if apart.any() else without)
        strange = ~np.isin(who, names[[test, *rivals]])
        alike = strange & (of_gender == gender[test]) & (gender[test] != "")
        same, rest = np.flatnonzero(alike), np.flatnonzero(strange & ~alike)
        count = min(len(same) + len(rest), config.nontargets_per_test)
        share = config.same_gender_share if len(same) else 0.0
        few = max(count - len(rest), min(len(same), round(share * count)))
        if len(own) and count:
            chosen = [same[place] for place in draws.distinct(len(same), few)]
            chosen += [rest[place] for place in draws.distinct(len(rest), count - few)]
            pairs += [(*enrolled[number], test) for number in (*own, *sorted(chosen))]
    return all_rivals, pairs


@given(
    st.lists(st.integers(1, 5), min_size=5, max_size=9).filter(lambda each: max(each) > 2),
    st.randoms(use_true_random=False),
    st.integers(1, 2),
    st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_trials_are_those_that_looking_at_all_utterances_draws(
    each: list[int], random: Any, together: int, nontargets: int
) -> None:
    rows = [
        dict.fromkeys(CATALOGUE.names)
        | {
            "utterance_id": f"{speaker}-{number}",
            "speaker_id": f"s{speaker}",
            "session_id": random.choice("xyz"),
            "gender": random.choice(["f", "m", ""]),  # also within a speaker
            "kind": "speech",
            "split": "test",
        }
        for speaker, count in enumerate(each)
        for number in range(count)
    ]
    table = pa.Table.from_pylist(rows, CATALOGUE)
    config = TrialConfig(enrolment_utterances=together, nontargets_per_test=nontargets)
    rivals, pairs = by_looking_at_all(table, config, seed=3)
    if not pairs:
        return
    trials = make_trials(table, "test", config, seed=3)
    assert trials.rivals.tolist() == rivals
    enrolled = trials.enrolled[trials.enrolment].tolist()
    made = [(*one, test) for one, test in zip(enrolled, trials.test.tolist(), strict=True)]
    assert made == pairs


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"sir_0_db": Condition(interferers=1)}, "first of the conditions is clean"),
        ({"clean": Condition(room=True)}, "nothing is done to what is clean"),
        ({"clean": Condition(), "a.b": Condition()}, "cannot name a condition"),
    ],
)
def test_conditions_are_checked(conditions: dict[str, Condition], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrialConfig(conditions=conditions)


def test_a_split_without_speakers_is_refused(catalogue: pa.Table) -> None:
    with pytest.raises(CscError, match="split 'test' has 0 speaker"):
        make_trials(CATALOGUE.empty_table(), "test", CONFIG, seed=1)
    one = catalogue.filter(pc.equal(catalogue["speaker_id"], catalogue["speaker_id"][0]))
    with pytest.raises(CscError, match=r"has 1 speaker\(s\)"):
        make_trials(one, one["split"][0].as_py(), CONFIG, seed=1)
