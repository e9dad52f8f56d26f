"""Evaluate: error rates on speakers never heard in training, clean and interfered.

Next to the trained model stand two plain references measured in the same run on the same trials:
the model before training, and MFCC statistics.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from csc_model import metrics
from csc_model.model import CSC
from jobs.config import Config
from jobs.report import det_plot
from jobs.scoring import Embed, Views, embed_mfcc, embed_with, score, scored, test_side
from jobs.stepper import new_model
from jobs.train import Trained, local_copy
from pipeline.schema import OnProgress, config_hash
from pipeline.shards import INDEX, encode, read_catalogue
from pipeline.storage import Folder
from pipeline.trials import TrialAudio, Trials, make_trials

CSC_NAME, UNTRAINED, MFCC = "csc", "untrained", "mfcc"
REFERENCES = (UNTRAINED, MFCC)
SCORES_FILE, DET_FILE = "scores.parquet", "det.png"
TARGET_PRIOR = 0.05
Scores = dict[str, dict[str, NDArray[np.float64]]]
"""By system and condition, `(trial,)`."""


class Evaluated(NamedTuple):
    """A finished evaluation."""

    folder: Folder
    about: dict[str, Any]  # its index


def evaluation_id(model_id: str, config: Config) -> str:
    """Return the name of the evaluation of a model."""
    return config_hash([model_id, config.evaluate.model_dump(), config.seed])


def evaluate(
    folder: Folder, store: Folder, trained: Trained, config: Config, on_progress: OnProgress
) -> Evaluated:
    """Score the test trials into a folder named by `evaluation_id`, or return what is there."""
    if folder.exists(INDEX):
        return Evaluated(folder, folder.read_json(INDEX))
    torch.set_num_threads(config.train.threads)  # more would fight with numpy's for the cores
    with tempfile.TemporaryDirectory(prefix="csc-model-") as scratch:
        model = CSC.load(local_copy(trained.folder, Path(scratch) / "model"))
    scores, trials = _score_split("test", systems_of(model, config), store, config, on_progress)
    index = {
        "id": evaluation_id(trained.about["id"], config),
        "model": trained.about["id"],
        "trials": {
            "hash": trials.hash(config.evaluate.trials),
            "count": len(trials.target),
            "targets": int(trials.target.sum()),
            "speakers": len(set(trials.speakers)),
        },
        "threshold": _threshold(model, store, config),
        **summarise(scores, trials, config),
    }
    folder.put(SCORES_FILE, encode(score_table(scores, trials), 1 << 16))
    folder.put(DET_FILE, det_plot(scores, trials.target))
    folder.put_json(INDEX, index)
    return Evaluated(folder, index)


def systems_of(model: CSC, config: Config) -> dict[str, Embed]:
    """Return the model and its references by name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    untrained = new_model(config).eval().to(device)
    return {
        CSC_NAME: embed_with(model.to(device)),
        UNTRAINED: embed_with(untrained),
        MFCC: embed_mfcc,
    }


def score_model(
    model: CSC, store: Folder, config: Config, on_progress: OnProgress
) -> tuple[pa.Table, str]:
    """Score the test trials with one model; return the table of scores and the trials' hash."""
    systems = {CSC_NAME: embed_with(model)}
    scores, trials = _score_split("test", systems, store, config, on_progress)
    return score_table(scores, trials), trials.hash(config.evaluate.trials)


def _score_split(
    split: str,
    systems: Mapping[str, Embed],
    store: Folder,
    config: Config,
    on_progress: OnProgress,
) -> tuple[Scores, Trials]:
    """Make the trials of a split and score them with every system."""
    trials = make_trials(read_catalogue(store), split, config.evaluate.trials, config.seed)
    audio = TrialAudio(store, trials)
    return score_systems(systems, audio, trials, config, on_progress), trials


def score_systems(
    systems: Mapping[str, Embed],
    audio: TrialAudio,
    trials: Trials,
    config: Config,
    on_progress: OnProgress,
) -> Scores:
    """Embed every utterance under every condition with every system, and score the trials."""
    conditions, count = config.evaluate.trials.conditions, len(audio.pcm)
    scores: Scores = {system: {} for system in systems}
    enrolment: dict[str, Views] = {}
    for number, (condition, sir_db) in enumerate(conditions.items()):
        views: dict[str, list[Views]] = {system: [] for system in systems}
        for place in range(count):
            samples = test_side(audio, place, sir_db)
            for system, embed in systems.items():
                views[system].append(embed(samples))
            on_progress(number * count + place + 1, len(conditions) * count)
        for system, embedded in views.items():
            stacked = np.stack(embedded)
            enrolment.setdefault(system, stacked)  # the first condition is clean
            scores[system][condition] = score(stacked, enrolment[system], trials)
    return scores


def summarise(scores: Scores, trials: Trials, config: Config) -> dict[str, Any]:
    """Return error rates with intervals, and the paired differences to the references."""
    counts = metrics.draw_speakers(
        len(set(trials.speakers)), config.evaluate.bootstrap_replicates, config.seed
    )
    results, differences = [], []
    for condition in scores[CSC_NAME]:
        rates, replicates = {}, {}
        for system, by_condition in scores.items():
            values = by_condition[condition]
            rates[system] = metrics.eer(values, trials.target)
            replicates[system] = metrics.eer_replicates(scored(trials, values), counts)
            results.append(
                {
                    "system": system,
                    "condition": condition,
                    "eer": metrics.interval(rates[system], replicates[system])._asdict(),
                    "min_dcf": metrics.min_dcf(values, trials.target, TARGET_PRIOR),
                }
            )
        for system in REFERENCES:
            gap = metrics.interval(
                rates[CSC_NAME] - rates[system], replicates[CSC_NAME] - replicates[system]
            )
            differences.append({"against": system, "condition": condition, "eer": gap._asdict()})
    return {"results": results, "differences": differences, "min_dcf_target_prior": TARGET_PRIOR}


def _threshold(model: CSC, store: Folder, config: Config) -> float:
    """Return the score at which to decide: the EER point of the pooled validation trials."""
    systems = {CSC_NAME: embed_with(model)}
    scores, trials = _score_split("valid", systems, store, config, lambda *_: None)
    by_condition = list(scores[CSC_NAME].values())
    target = np.tile(trials.target, len(by_condition))
    return metrics.eer_threshold(np.concatenate(by_condition), target)


def score_table(scores: Scores, trials: Trials) -> pa.Table:
    """Return all scores: a row for each trial, a column for each system and condition."""
    ids = np.asarray(trials.utterances["utterance_id"].to_pylist())
    speakers = trials.speakers
    columns = {
        "enrolment": ids[trials.enrolment],
        "test": ids[trials.test],
        "enrolment_speaker": speakers[trials.enrolment].astype(str),
        "test_speaker": speakers[trials.test].astype(str),
        "target": trials.target,
    }
    for system, by_condition in scores.items():
        for condition, values in by_condition.items():
            columns[f"{system}.{condition}"] = values
    return pa.table(columns)
