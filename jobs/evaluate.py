"""Evaluate: error rates on speakers never heard in training, by what lies over their voices.

Next to the trained model stand references measured on the same trials: the model before training,
MFCC statistics, and whichever registered versions are named.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from csc_model.calibration import Calibration, calibrate
from jobs.array_examples import ArrayExample, array_examples, choose_talkers
from jobs.config import Config, EvaluateConfig
from jobs.embedding import MFCC, MFCC_ID, Embeddings, System
from jobs.evaluation_page import page
from jobs.examples import OF_EACH_KIND, Example, choose, examples, hardest
from jobs.extraction import choose_pairs, measure
from jobs.extraction_summary import summarise_extraction
from jobs.quality import measures, quality
from jobs.report import det_plot, histogram_plot, sir_plot
from jobs.scoring import Views, enrol, score
from jobs.stepper import new_model
from jobs.summary import gender_pairs, summarise
from jobs.train import Trained, local_copy
from jobs.words import recogniser_named
from pipeline.arrays import check_rooms
from pipeline.schema import Runner, config_hash
from pipeline.shards import INDEX, encode
from pipeline.storage import Folder
from pipeline.trial_sources import Given, ListedTrials, Source
from pipeline.trials import CLEAN, SIDES_VERSION, TRIALS_VERSION, Trials

CSC_NAME, UNTRAINED, NORMED = "csc", "untrained", "csc, AS-norm"
SCORES_FILE, PAGE_FILE = "scores.parquet", "report.html"
SIR_FILE, DET_FILE, HISTOGRAM_FILE = "eer_by_sir.png", "det.png", "scores.png"
ByCondition = dict[str, NDArray[np.float64]]
"""Scores by condition, `(trial,)`."""


class Scored(NamedTuple):
    """What a system makes of trials."""

    scores: ByCondition
    improvement_db: dict[str, float]  # mean gain of separation by condition, where there is any


class Calibrated(NamedTuple):
    """Scores of the test trials, and what they are worth by the validation trials."""

    scores: ByCondition
    improvement_db: dict[str, float]
    calibration: Calibration


class Evaluated(NamedTuple):
    """A finished evaluation."""

    folder: Folder
    about: dict[str, Any]  # its index


class Evaluator:
    """What an evaluation works with: stored embeddings of both splits, and who computes further."""

    def __init__(
        self,
        config: Config,
        store: Folder,
        cache: Folder,
        run: Runner,
        given: Given | None = None,
    ) -> None:
        self.config, self.run = config, run
        trials, seed = config.evaluate.trials, config.seed
        valid = Source(store=store.uri, split="valid", trials=trials, seed=seed, given=None)
        self.valid = Embeddings(cache, valid)
        self.test = Embeddings(cache, valid.model_copy(update={"split": "test", "given": given}))
        torch.set_num_threads(config.train.threads)  # more would fight with numpy's for the cores

    @property
    def trials(self) -> Trials:
        """The trials that are reported."""
        return self.test.trials

    @property
    def speakers_by(self) -> str:
        """What tells who speaks in their files."""
        given = self.test.source.given
        return (
            f"{given.speakers_by} of the list" if isinstance(given, ListedTrials) else "the store"
        )

    def scores(self, system: System, cohort: Views | None = None) -> Calibrated:
        """Score the test trials, and calibrate by the validation trials of all conditions."""
        self.test.hear([system], self.run)
        self.valid.hear([system], self.run)
        valid = list(_scored(self.valid, system, cohort).scores.values())
        target = np.tile(self.valid.trials.target, len(valid))
        calibration = calibrate(np.concatenate(valid), target)
        return Calibrated(*_scored(self.test, system, cohort), calibration)

    def quality(self, system: System) -> dict[str, dict[str, dict[str, float]]]:
        """Return PESQ and STOI by condition, where separation is asked for and they are wanted."""
        places = np.unique(self.trials.test)[: self.config.evaluate.quality].tolist()
        if not places:
            return {}
        model, audio = self.test.model(system), self.test.audio_of(places)
        return {
            name: quality(model, [audio.side(p, name) for p in places], 1 + its.interferers)
            for name, its in self.trials.conditions.items()
            if 0 < its.interferers < model.config.num_slots
        }

    def extraction(self, system: System, scores: ByCondition) -> dict[str, Any]:
        """Return the figures of extraction, where the model can and they are wanted.

        `scores` are those of the mixtures.
        """
        many = self.config.evaluate.extraction
        if not many or self.test.model(system).config.extractor == "none":
            return {}
        pairs = choose_pairs(self.trials, many)
        recogniser = self.config.evaluate.recogniser
        measured = (
            measure(self.test, system, pairs, self.run, recogniser) if len(pairs.target) else {}
        )
        figures = summarise_extraction(measured, scores, pairs, self.trials, self.config)
        return {"extraction": figures}

    def arrays(self, system: System) -> list[ArrayExample]:
        """Return examples of arrays, as many as are wanted."""
        talkers = choose_talkers(self.trials, self.config.evaluate.arrays)
        if not talkers:
            return []
        audio = self.test.audio_of(sorted({place for pair in talkers for place in pair}))
        return list(array_examples(self.test.model(system), audio, talkers, self.config.seed))

    def cohort(self, system: System) -> Views | None:
        """Return a vector of each of some training speakers, if any are asked for."""
        if not self.config.evaluate.cohort:
            return None
        return enrol(self.test.strangers(system, self.config.evaluate.cohort))


def _scored(embeddings: Embeddings, system: System, cohort: Views | None) -> Scored:
    found = Scored({}, {})
    clean = embeddings.of(system, CLEAN)
    for name in embeddings.trials.conditions:
        views, gains = clean if name == CLEAN else embeddings.of(system, name)
        found.scores[name] = score(views, clean.views, embeddings.trials, cohort)
        if not np.isnan(gains).all():
            found.improvement_db[name] = float(np.nanmean(gains))
    return found


def check_extras(config: EvaluateConfig) -> None:
    """Assert that the packages are there that an evaluation is to measure or simulate with.

    Raises:
        CscError: one is missing.
    """
    if config.quality:
        measures()
    if config.arrays:
        check_rooms()
    if config.recogniser is not None:
        recogniser_named(config.recogniser)


def evaluation_id(
    weights: str, config: Config, against: Mapping[str, str], given: Given | None = None
) -> str:
    """Return the name of the evaluation of some weights beside versions, by their names and ids."""
    versions = [TRIALS_VERSION, SIDES_VERSION, MFCC_ID]
    unused = {"extraction", "recogniser"} if config.model.extractor == "none" else set()
    asked = config.evaluate.model_dump(exclude=unused)
    parts = [weights, asked, config.seed, dict(against), versions]
    return config_hash([*parts, given.model_dump()] if given else parts)


def evaluate(
    folder: Folder, evaluator: Evaluator, trained: Trained, against: Mapping[str, Path]
) -> Evaluated:
    """Score the test trials into a folder named by `evaluation_id`, or return what is there.

    `against` are further models by the name that they have in tables.
    """
    if folder.exists(INDEX):
        return Evaluated(folder, folder.read_json(INDEX))
    systems = _systems(evaluator.test, trained, evaluator.config, against)
    found = {system.name: evaluator.scores(system) for system in systems}
    cohort, trials = evaluator.cohort(systems[0]), evaluator.trials
    if cohort is not None:
        found[NORMED] = evaluator.scores(systems[0], cohort)
    scores = {name: its.scores for name, its in found.items()}
    index = {
        "id": folder.uri.rpartition("/")[2],
        "model": trained.about["id"],
        "trials": {
            "hash": trials.hash,
            "count": len(trials.target),
            "targets": int(trials.target.sum()),
            "speakers": len(set(trials.speakers)),
            "speakers_by": evaluator.speakers_by,
            "skipped": trials.skipped,
        },
        "calibration": found[CSC_NAME].calibration._asdict(),
        "improvement_db": found[CSC_NAME].improvement_db,
        "quality": evaluator.quality(systems[0]),
        **evaluator.extraction(systems[0], scores[CSC_NAME]),
        **summarise(
            scores, {name: its.calibration for name, its in found.items()}, trials, evaluator.config
        ),
    }
    folder.put(SCORES_FILE, encode(score_table(scores, trials), 1 << 16))
    plots = _plots(scores, index, trials)
    for name, (_, png) in plots.items():
        folder.put(name, png)
    rooms = evaluator.arrays(systems[0])
    made = _examples(evaluator, systems[0], found[CSC_NAME], index)
    folder.put(PAGE_FILE, page(index, dict(plots.values()), made, rooms).encode())
    folder.put_json(INDEX, index)
    return Evaluated(folder, index)


def _plots(
    scores: Mapping[str, ByCondition], index: Mapping[str, Any], trials: Trials
) -> dict[str, tuple[str, bytes]]:
    """Draw what there is to draw, with captions, by file name."""
    curve = sir_plot(index["results"], trials.conditions)
    return {
        **({SIR_FILE: ("Error rate against SIR of one interferer", curve)} if curve else {}),
        DET_FILE: ("Misses against false alarms", det_plot(scores, trials.target)),
        HISTOGRAM_FILE: (
            f"Scores of {CSC_NAME}",
            histogram_plot(scores[CSC_NAME], trials.target),
        ),
    }


def _examples(
    evaluator: Evaluator, system: System, found: Calibrated, index: Mapping[str, Any]
) -> Iterator[Example]:
    """Make listening examples of the hardest condition; for an extractor, of clean voices too.

    Of these one of each kind: whether a clean voice passes, and what is left if it is another's.
    """
    model = evaluator.test.model(system)
    wanted = {hardest(evaluator.trials, index["results"], CSC_NAME): OF_EACH_KIND}
    if model.config.extractor != "none" and CLEAN in found.scores:
        wanted.setdefault(CLEAN, 1)
    for condition, many in wanted.items():
        chosen = list(choose(found.scores[condition], evaluator.trials, many))
        audio = evaluator.test.audio([trial for _, trial in chosen])
        yield from examples(model, audio, chosen, condition, found.calibration)


def _systems(
    embeddings: Embeddings, trained: Trained, config: Config, against: Mapping[str, Path]
) -> list[System]:
    with trained.folder.scratch() as scratch:
        ours = embeddings.add_model(CSC_NAME, local_copy(trained.folder, scratch / "trained"))
        new_model(config).save(scratch / UNTRAINED)
        untrained = embeddings.add_model(UNTRAINED, scratch / UNTRAINED)
    others = [embeddings.add_model(name, folder) for name, folder in against.items()]
    return [ours, untrained, System(MFCC, MFCC_ID), *others]


def score_table(scores: Mapping[str, ByCondition], trials: Trials) -> pa.Table:
    """Return all scores: a row for each trial, a column for each system and condition."""
    ids = np.asarray(trials.utterances["utterance_id"].to_pylist())
    speakers, first = trials.speakers, trials.enrolled[trials.enrolment, 0]
    columns = {
        "enrolment": [" ".join(ids[own]) for own in trials.enrolled[trials.enrolment]],
        "test": ids[trials.test],
        "enrolment_speaker": speakers[first].astype(str),
        "test_speaker": speakers[trials.test].astype(str),
        "target": trials.target,
        "gender": gender_pairs(trials),
    }
    for system, by_condition in scores.items():
        for condition, values in by_condition.items():
            columns[f"{system}.{condition}"] = values
    return pa.table(columns)
