"""Extraction on test sides: who is asked for, what is measured of it, and where it is told."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from csc_model import metrics
from csc_model.model import CSC
from jobs.array_examples import choose_talkers
from jobs.config import Config, load_config
from jobs.console import console, present
from jobs.evaluate import Evaluated, Evaluator, evaluate, evaluation_id
from jobs.examples import KINDS, OF_EACH_KIND
from jobs.extraction import (
    Measured,
    Pairs,
    choose_pairs,
    measure_side,
    ratios_db,
)
from jobs.extraction_report import tables
from jobs.extraction_summary import (
    EXTRACTED,
    NEAREST,
    extraction_metrics,
    mean_over_speakers,
    outcomes,
    summarise_extraction,
)
from jobs.finetune import SPEAKERS_FILE, TABLE_FILE
from jobs.register import metrics_of
from jobs.scoring import nearest_slot
from jobs.stepper import new_model
from jobs.train import Trained
from pipeline.schema import Task, Work
from pipeline.shards import read_catalogue
from pipeline.sides import Side
from pipeline.storage import Folder
from pipeline.trials import NONE, Condition, TrialConfig, Trials, make_trials
from tests import small_models
from tests.conftest import serially, voice
from tests.whole_run import SMALL

CONDITIONS = {"clean": Condition(), "sir_0_db": Condition(interferers=1, seconds=1.0)}
SIDES, ROOMS = 5, 2
FAST = ["frontend='stft'", "trunk='tcn'", "window=512", "hop=256"]


@pytest.fixture(scope="module")
def trials(store: Folder) -> Trials:
    config = TrialConfig(nontargets_per_test=6, conditions=CONDITIONS)
    return make_trials(read_catalogue(store), "test", config, seed=1)


@pytest.fixture(scope="module")
def config() -> Config:
    return extracting(SIDES)


def extracting(sides: int, extractor: str = "film") -> Config:
    task = "csc" if extractor == "none" else "extract"
    conditions = "{clean={},sir_0_db={interferers=1,seconds=1.0}}"
    more = [f"train.task='{task}'", "train.init_from='folder'", f"evaluate.extraction={sides}"]
    more += [f"evaluate.arrays={ROOMS}", "evaluate.recogniser='tests.test_words:levels'"]
    more += [f"evaluate.trials.conditions={conditions}", "promote.guarded=['clean']"]
    model = [f"model.{setting}" for setting in (*FAST, f"extractor='{extractor}'")]
    return load_config("demo", [*SMALL, *more, *model, "train.validate_on=['clean']"])


def with_more(trials: Trials, enrolment: int, test: int, target: bool) -> Trials:
    """Put a trial before those that there are."""
    return trials._replace(
        enrolment=np.append(enrolment, trials.enrolment),
        test=np.append(test, trials.test),
        target=np.append(target, trials.target),
    )


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_each_side_is_asked_for_its_speaker_and_for_nobody_who_is_heard(
    trials: Trials, most: int
) -> None:
    first = int(trials.test[0])
    itself = int(np.flatnonzero(trials.enrolled[:, 0] == first)[0])
    speaker = trials.speakers
    rival = int(
        np.flatnonzero(speaker[trials.enrolled[:, 0]] == speaker[trials.rivals[first, 1]])[0]
    )
    trials = with_more(with_more(trials, itself, first, True), rival, first, False)
    pairs = choose_pairs(trials, most)
    assert trials.target[pairs.target].all()
    assert not trials.target[pairs.absent].any()
    tests = trials.test[pairs.target]
    assert np.array_equal(tests, trials.test[pairs.absent])
    assert len(set(tests.tolist())) == len(tests) == min(most, len(set(trials.test.tolist())))
    assert first in tests
    for target, absent, test in zip(*pairs, tests, strict=True):
        assert test not in trials.enrolled[trials.enrolment[target]]
        asked = speaker[trials.enrolled[trials.enrolment[absent], 0]]
        assert asked not in speaker[[test, *trials.rivals[test]]]


def test_sides_are_taken_evenly(trials: Trials) -> None:
    tests = np.unique(trials.test)
    chosen = trials.test[choose_pairs(trials, len(tests) // 2).target]
    assert set(np.diff(np.searchsorted(tests, chosen)).tolist()) <= {2, 3}
    speakers = {trials.speakers[test] for test in chosen}
    assert speakers == set(trials.speakers[tests])


def test_a_rival_that_there_is_not_is_nobody(trials: Trials) -> None:
    last = len(trials.utterances) - 1  # whom a place of -1 would mean
    alone = trials._replace(rivals=np.full_like(trials.rivals, NONE))
    of_last = trials.speakers[trials.enrolled[:, 0]] == trials.speakers[last]
    kept = trials.target | of_last[trials.enrolment]
    alone = alone._replace(
        enrolment=trials.enrolment[kept], test=trials.test[kept], target=trials.target[kept]
    )
    assert len(choose_pairs(alone, 1000).absent) == len(set(alone.test[~alone.target].tolist())) > 0


def plain_si_snr_db(estimate: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """SI-SNR as it is usually written, with an error of at least a thousandth of the signal."""
    estimate, reference = estimate - estimate.mean(), reference - reference.mean()
    part = reference * (estimate @ reference) / (reference @ reference)
    rest = estimate - part
    return 10 * math.log10(part @ part / (rest @ rest + 1e-3 * part @ part))


def test_ratios_are_those_of_each_signal_with_each_voice() -> None:
    torch.manual_seed(0)
    voices = torch.randn(2, 5000)
    signals = torch.stack(
        [voices.sum(0), voices[1], voices[0] + 0.1 * voices[1], torch.randn(5000)]
    )
    found = ratios_db(signals, voices)
    for signal, row in zip(signals.double().numpy(), found, strict=True):
        for reference, value in zip(voices.double().numpy(), row, strict=True):
            expected = max(-30.0, plain_si_snr_db(signal, reference))
            assert float(value) == pytest.approx(expected, abs=1e-2)


def test_silence_has_nothing_of_any_voice() -> None:
    found = ratios_db(torch.zeros(1, 4000), torch.randn(2, 4000))
    assert found.tolist() == [[-30.0, -30.0]]


@pytest.mark.parametrize(
    ("activity", "slot"),
    [([0.9, 0.9, 0.9, 1.0], 1), ([0.9, 0.1, 0.9, 1.0], 2), ([0.1, 0.2, 0.3, 1.0], 1)],
)
def test_the_nearest_slot_is_an_active_one_if_any_is(activity: list[float], slot: int) -> None:
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    assert nearest_slot(vectors, torch.tensor(activity), torch.tensor([1.0, 0.0])) == slot


def heeding() -> CSC:
    """Return a model whose extractor lets through different things for different voices."""
    model = small_models.new_model("tcn-stft", extractor="film", window=512, hop=256)
    with torch.no_grad():
        model.extractor.early.told.weight.normal_()
    return model


def mixed() -> Side:
    voices = np.stack([voice(0, 0, 1.0), voice(5, 0, 1.0), np.zeros(16_000, np.float32)])
    return Side(voices.sum(0), voices)


def units(rows: int = 2) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 16), dim=-1)


def test_a_side_is_measured_by_what_was_let_through_of_it() -> None:
    model, side, vectors = heeding(), mixed(), units()
    found = measure_side(model, side, 2, vectors)
    mixture = torch.from_numpy(side.mixture)
    made = [model.extracted(mixture[None], one[None])[0].detach() for one in vectors]
    slots, (heard, activity) = model.separate(mixture), model.embed(mixture)
    nearest = [slots[nearest_slot(heard, activity, one)] for one in vectors]
    for number, signal in enumerate((mixture, nearest[0], made[0])):
        for place, reference in enumerate(side.voices[:2]):
            expected = plain_si_snr_db(signal.double().numpy(), reference.astype(np.float64))
            assert found.si_snr_db[number, place] == pytest.approx(max(expected, -30), abs=0.05)
    for number, signal in enumerate((nearest[1], made[1])):
        share = float(signal.square().mean() / mixture.square().mean())
        assert found.left_db[number] == pytest.approx(10 * math.log10(share + 1e-3), abs=0.01)
    target = torch.from_numpy(side.voices[0])
    for number, signal in enumerate((nearest[0], made[0])):
        share = float(signal.square().mean() / target.square().mean())
        assert found.kept_db[number] == pytest.approx(10 * math.log10(share + 1e-3), abs=0.01)
    cosines = [
        float(model.embed(one)[0][-1] @ whose) for one, whose in zip(made, vectors, strict=True)
    ]
    np.testing.assert_allclose(found.cosine, cosines, atol=1e-4)


def test_an_extractor_that_is_the_separator_is_as_good_as_its_slot() -> None:
    model = small_models.new_model("tcn-stft", extractor="film", num_slots=1)
    model.extractor.begin_with(model.state_dict())
    found = measure_side(model, mixed(), 2, units())
    np.testing.assert_allclose(found.si_snr_db[1], found.si_snr_db[2], atol=0.01)
    np.testing.assert_allclose(found.left_db[0], found.left_db[1], atol=0.01)


def test_outcomes_of_sides_that_were_worked_by_hand() -> None:
    mixture, slot = [[0.0, 0.0]] * 4, [[10.0, -9.0], [-9.0, 10.0], [0.05, -3.0], [-30.0, -30.0]]
    extracted = [[20.0, -9.0], [12.0, -9.0], [-1.0, -0.5], [0.2, 0.1]]
    si_snr_db = np.array([mixture, slot, extracted], np.float32).swapaxes(0, 1)
    left_db = np.array([[-1, -5], [-2, -6], [-3, -7], [-4, -8]], np.float32)
    unheard, cosine = np.full((4, 4), np.nan, np.float32), np.zeros((4, 2), np.float32)
    found = Measured(si_snr_db, left_db + 1, left_db, unheard, cosine)
    one = Condition(interferers=1)
    by_slot, by_extractor = (outcomes(found, output, one) for output in (0, 1))
    assert by_slot["wrong_speaker"].tolist() == [False, True, False, False]
    assert by_slot["no_gain"].tolist() == [False, True, True, True]
    assert by_slot["left_db"].tolist() == [-1, -2, -3, -4]
    assert by_slot["kept_db"].tolist() == [0, -1, -2, -3]
    np.testing.assert_allclose(by_slot["improvement_db"], [10, -9, 0.05, -30], rtol=1e-5)
    assert by_extractor["wrong_speaker"].tolist() == [False, False, True, False]
    assert by_extractor["no_gain"].tolist() == [False, False, True, False]
    np.testing.assert_allclose(by_extractor["si_snr_db"], [20, 12, -1, 0.2], rtol=1e-5)


ALWAYS = {"si_snr_db", "kept_db", "left_db"}


@pytest.mark.parametrize(
    ("condition", "keys"),
    [
        (Condition(), ALWAYS),
        (Condition(room=True, seconds=1.0), ALWAYS),
        (Condition(snr_db=0.0), {*ALWAYS, "improvement_db", "no_gain"}),
    ],
)
def test_nothing_is_said_of_what_a_condition_does_not_have(
    condition: Condition, keys: set[str]
) -> None:
    found = Measured(
        *(np.zeros(shape, np.float32) for shape in ((3, 3, 1), (3, 2), (3, 2), (3, 4), (3, 2)))
    )
    assert set(outcomes(found, 1, condition)) == keys


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-30, 30)), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_an_interval_is_that_of_values_repeated_as_often_as_speakers_were_drawn(
    sides: list[tuple[int, float]],
) -> None:
    speaker, values = (np.array(part) for part in zip(*sides, strict=True))
    draws = metrics.draw_speakers(4, 100, seed=0)
    means = [
        np.repeat(values, drawn[speaker]).mean() if drawn[speaker].any() else np.nan
        for drawn in draws
    ]
    found = mean_over_speakers(values, speaker, draws)
    expected = metrics.interval(float(values.mean()), np.array(means))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def drawn(trials: Trials, pairs: Pairs) -> tuple[dict[str, Measured], dict[str, NDArray[Any]]]:
    """Return figures of each side out of the air, and scores of all trials."""
    rng, many = np.random.default_rng(0), len(pairs.target)
    measured = {
        name: Measured(
            *(
                rng.normal(size=shape).astype(np.float32)
                for shape in (
                    (many, 3, 1 + its.interferers),
                    *[(many, 2)] * 2,
                    (many, 4),
                    (many, 2),
                )
            )
        )._replace(words=rng.integers(0, 5, (many, 4)).astype(np.float32))
        for name, its in trials.conditions.items()
    }
    return measured, {name: rng.normal(size=len(trials.test)) for name in trials.conditions}


def test_error_rates_are_those_of_the_pairs_that_were_asked(trials: Trials, config: Config) -> None:
    pairs = choose_pairs(trials, 12)
    measured, scores = drawn(trials, pairs)
    found = summarise_extraction(measured, scores, pairs, trials, config)
    assert (found["sides"], found["speakers"]) == (12, len(set(trials.speakers)))
    target = np.repeat([True, False], 12)
    for row in found["results"]:
        its = measured[row["condition"]]
        words, *errors = its.words.sum(0)
        assert row["wer_of_mixture"]["value"] == pytest.approx(errors[0] / words)
        assert row["wer"]["value"] == pytest.approx(errors[1 + (row["output"] != NEAREST)] / words)
        if row["output"] == NEAREST:
            assert "eer" not in row
            continue
        before = metrics.eer(scores[row["condition"]][np.concatenate(pairs)], target)
        after = metrics.eer(np.concatenate([its.cosine[:, 0], its.cosine[:, 1]]), target)
        assert row["eer_of_mixture"]["value"] == before
        assert row["eer"]["value"] == after
        gap = row["eer_difference"]
        assert gap["value"] == pytest.approx(after - before)
        assert gap["low"] < gap["value"] < gap["high"]
        assert row["left_median_db"] == pytest.approx(np.median(its.left_db[:, 1]))


def test_too_few_sides_give_no_error_rate_and_none_no_row(trials: Trials, config: Config) -> None:
    one = choose_pairs(trials, 1)
    found = summarise_extraction(*drawn(trials, one), one, trials, config)
    assert not any("eer" in row for row in found["results"])
    assert found["results"][0]["si_snr_db"]["value"] == found["results"][0]["si_snr_db"]["low"]
    none = choose_pairs(trials._replace(target=np.ones_like(trials.target)), 5)
    assert summarise_extraction({}, {}, none, trials, config) == {
        "sides": 0, "speakers": 0, "results": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An untrained model with an extractor, as a training would leave it."""
    root, model = tmp_path_factory.mktemp("trained"), new_model(config)
    with torch.no_grad():
        model.extractor.early.told.weight.normal_()
    model.save(root)
    folder = Folder.at(root)
    folder.put(TABLE_FILE, save({}))
    folder.put_json(SPEAKERS_FILE, [])
    return Trained(folder, {"id": "untrained"})


@pytest.fixture(scope="module")
def evaluator(config: Config, store: Folder, tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    return Evaluator(config, store, Folder.at(tmp_path_factory.mktemp("cache")), serially)


@pytest.fixture(scope="module")
def evaluated(
    evaluator: Evaluator, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    return evaluate(Folder.at(tmp_path_factory.mktemp("evaluated")), evaluator, trained, {})


def test_an_evaluation_measures_extraction(evaluated: Evaluated) -> None:
    found = evaluated.folder.read_json("index.json")["extraction"]
    assert found["sides"] == SIDES
    assert [(row["condition"], row["output"]) for row in found["results"]] == [
        (condition, output) for condition in CONDITIONS for output in (NEAREST, EXTRACTED)
    ]
    for row in found["results"]:
        assert -30 <= row["si_snr_db"]["low"] <= row["si_snr_db"]["value"] <= 30
        assert -30.01 <= row["left_median_db"] <= 10
        assert ("wrong_speaker" in row) == (row["condition"] == "sir_0_db")
        assert ("improvement_db" in row) == (row["condition"] != "clean")
        assert 0 <= row["wer"]["value"] <= 3
        assert (row["wer_of_mixture"]["value"] == 0) == (row["condition"] == "clean")


def test_of_more_rooms_than_there_are_trials_each_is_another(evaluator: Evaluator) -> None:
    trials = evaluator.trials
    every = np.flatnonzero(~trials.target)
    for many in (len(every), len(every) + 7):
        assert len(set(choose_talkers(trials, many))) == len(every)


def test_the_page_has_arrays_to_listen_to(evaluated: Evaluated, evaluator: Evaluator) -> None:
    _, page = evaluated.folder.read("report.html").decode().split("<h2>With several microphones")
    assert page.count("<section class=example>") == ROOMS
    made = ("one microphone", "beam", "beam and mask", "beam by the oracle&#x27;s mask")
    voices = [f"voice {number}, {name}" for number in (1, 2) for name in made]
    for heard in ("microphone 1", *voices):
        assert page.count(f"<b>{heard}</b>") == ROOMS
    trials = evaluator.trials
    for one, other in choose_talkers(trials, ROOMS):
        assert trials.speakers[one] != trials.speakers[other]
        assert f"{trials.speakers[one]} and {trials.speakers[other]}, equally loud, 4 micro" in page


def test_the_page_and_the_terminal_show_extraction(evaluated: Evaluated) -> None:
    page = evaluated.folder.read("report.html").decode()
    row = evaluated.about["extraction"]["results"][-1]
    cell = f"{row['si_snr_db']['value']:.1f} ["
    assert f"Extraction from {SIDES} test sides" in page
    assert f"<td>sir_0_db</td><td>extracted</td><td>{cell}" in page
    examples = page.count("<section class=example>") - ROOMS
    assert page.count("<b>extracted</b> score ") == examples > 0
    for condition in CONDITIONS:  # the hardest is shown, and the clean one
        assert f"<p>{condition}: " in page
    there, absent = (page.count(f"; who is asked for is {word}there") for word in ("", "not "))
    assert there + absent == examples == len(KINDS) * (OF_EACH_KIND + 1)
    assert there == absent
    with console.capture() as said:
        present(tables(evaluated.about))
    assert "extracted" in said.get()
    assert cell in said.get()
    without = {key: value for key, value in evaluated.about.items() if key != "extraction"}
    assert len(list(tables(without))) == 1


def test_figures_of_extraction_are_logged(evaluated: Evaluated) -> None:
    row = next(row for row in evaluated.about["extraction"]["results"] if "wrong_speaker" in row)
    logged = metrics_of(evaluated.about)
    name = "test.csc.sir_0_db.nearest_slot"
    assert logged[f"{name}.improvement_db"] == row["improvement_db"]["value"]
    assert logged[f"{name}.wrong_speaker"] == row["wrong_speaker"]["value"]
    assert logged[f"{name}.left_median_db"] == row["left_median_db"]
    assert "test.csc.sir_0_db.improvement_db" in logged  # that of separation
    assert all(isinstance(value, float) for value in logged.values())
    without = {key: value for key, value in evaluated.about.items() if key != "extraction"}
    lost = set(logged) - set(metrics_of(without))
    assert lost == {f"test.csc.{key}" for key in extraction_metrics(evaluated.about["extraction"])}


def test_what_was_measured_is_not_measured_again(
    evaluator: Evaluator, evaluated: Evaluated, trained: Trained
) -> None:
    done: list[Task] = []

    def noting(tasks: Sequence[Task], work: Work) -> None:
        done.extend(tasks)
        serially(tasks, work)

    evaluator.run = noting
    system = evaluator.test.add_model("csc", Path(trained.folder.path("")))
    scores = {name: np.zeros(len(evaluator.trials.test)) for name in CONDITIONS}
    again = evaluator.extraction(system, scores)["extraction"]
    assert done == []
    first = evaluated.about["extraction"]["results"]
    for before, after in zip(first, again["results"], strict=True):
        assert before["si_snr_db"] == after["si_snr_db"]


def test_only_a_model_that_extracts_is_asked_to(evaluator: Evaluator, tmp_path: Path) -> None:
    new_model(extracting(SIDES, "none")).save(tmp_path / "plain")
    system = evaluator.test.add_model("plain", tmp_path / "plain")
    assert evaluator.extraction(system, {}) == {}


def test_the_name_of_an_evaluation_depends_on_extraction_where_there_is_any() -> None:
    names = {
        extractor: {evaluation_id("w", extracting(sides, extractor), {}) for sides in (0, 5)}
        for extractor in ("none", "film")
    }
    assert [len(its) for its in names.values()] == [1, 2]
