"""Registration and the gate: a challenger becomes champion when it is not worse."""

import getpass
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csc_model import metrics
from csc_model.config import VARIANT
from csc_model.model import CSC
from jobs.config import Config
from jobs.evaluate import CSC_NAME, DET_FILE, SCORES_FILE, Evaluated, score_model
from jobs.registry import CHALLENGER, CHAMPION, DATASET, MODEL_ID, TRIALS, Registry, Version
from jobs.train import Trained, local_copy
from pipeline.errors import CscError
from pipeline.schema import OnProgress, config_hash
from pipeline.shards import INDEX
from pipeline.storage import Folder


class Decision(NamedTuple):
    """What the gate said, and the numbers it said it by."""

    promoted: bool
    why: str
    version: Version
    differences: dict[str, dict[str, float]]


def register(trained: Trained, evaluated: Evaluated, registry: Registry) -> tuple[Version, bool]:
    """Make the trained and evaluated model a version with alias `challenger`.

    Returns the version, and whether it is new: a model is registered once.
    """
    if not trained.about["config"]["train"]["contrastive_weight"]:
        raise CscError(
            "separation alone was trained (train.contrastive_weight=0), and nobody's voice was "
            "learned: begin another run with it, train.init_from="
            f"{trained.folder.uri}, and register that"
        )
    run_id = trained.about["run"]
    known = registry.version_of(run_id, evaluated.about["trials"]["hash"])
    if known is not None:
        challenger = registry.by_alias(CHALLENGER)
        if challenger is None or int(challenger.number) < int(known.number):
            registry.move_alias(CHALLENGER, known, {})  # an earlier run ended just before this
        return known, False
    with tempfile.TemporaryDirectory(prefix="csc-register-") as scratch:
        model = local_copy(trained.folder, Path(scratch) / "model")
        evaluation = Path(scratch) / "evaluation"
        evaluation.mkdir()
        for file in (INDEX, SCORES_FILE, DET_FILE):
            (evaluation / file).write_bytes(evaluated.folder.read(file))
        registry.log_folder(run_id, evaluation, _evaluation_path(evaluated.about["trials"]["hash"]))
        registry.log_metrics(run_id, trained.about["best_step"], _flat(evaluated.about))
        version = registry.register(run_id, model, evaluation, _tags(trained, evaluated))
    return version, True


def _evaluation_path(trials_hash: str) -> str:
    return f"evaluation/{trials_hash}"


def _tags(trained: Trained, evaluated: Evaluated) -> dict[str, str]:
    tags = {
        MODEL_ID: trained.about["id"],
        TRIALS: evaluated.about["trials"]["hash"],
        DATASET: trained.about["dataset"],
        "csc.store": trained.about["store"],
        "csc.variant": VARIANT,
        "csc.config": config_hash(trained.about["config"]),
    }
    for row in evaluated.about["results"]:
        if row["system"] == CSC_NAME:
            value, low, high = row["eer"].values()
            tags[f"eer.{row['condition']}"] = f"{value:.4f} [{low:.4f}, {high:.4f}]"
    return tags


def _flat(index: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for row in index["results"]:
        name = f"test.{row['system']}.{row['condition']}"
        flat[f"{name}.min_dcf"] = row["min_dcf"]
        flat |= {f"{name}.eer.{bound}": value for bound, value in row["eer"].items()}
    return flat


def promote(registry: Registry, store: Folder, config: Config, on_progress: OnProgress) -> Decision:
    """Judge the challenger and, if it passes, make it champion; the decision is kept either way.

    A champion that was scored on other trials is scored on the challenger's first.

    Raises:
        CscError: there is no challenger, its trials are not those of this store and configuration,
            or another promotion came in between.
    """
    challenger, champion = registry.by_alias(CHALLENGER), registry.by_alias(CHAMPION)
    if challenger is None:
        raise CscError(
            f"no version of {registry.model} has the alias {CHALLENGER}: run csc register"
        )
    if champion is not None and champion.number == challenger.number:
        return Decision(True, "it is champion already", challenger, {})
    decision = Decision(True, "it is the first", challenger, {})
    if champion is not None:
        ours, theirs = (
            _scores(registry, version, challenger.tags[TRIALS], store, config, on_progress)
            for version in (challenger, champion)
        )
        decision = _judge(challenger, champion, ours, theirs, config)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {
        "challenger": challenger.number,
        "champion": champion.number if champion else None,
        "promoted": decision.promoted,
        "why": decision.why,
        "who": _user(),
        "when": now,
        "margin": config.promote.margin,
        "eer_challenger_minus_champion": decision.differences,
    }
    registry.log_decision(challenger.run_id, record, f"decisions/{now}.json")
    if registry.by_alias(CHAMPION) != champion:
        raise CscError("another promotion came in between: look at the champion and run again")
    if decision.promoted:
        tags = {
            "csc.promoted_when": now,
            "csc.promoted_by": _user(),
            "csc.promoted_from": champion.number if champion else "none",
            "csc.promoted_why": decision.why,
        }
        registry.move_alias(CHAMPION, challenger, tags)
    return decision


def _judge(
    challenger: Version, champion: Version, ours: pa.Table, theirs: pa.Table, config: Config
) -> Decision:
    counts = metrics.draw_speakers(
        len(set(ours["test_speaker"].to_pylist()) | set(ours["enrolment_speaker"].to_pylist())),
        config.evaluate.bootstrap_replicates,
        config.seed,
    )
    differences, worse = {}, []
    for condition in config.promote.guarded:
        gap = _difference(ours, theirs, condition, counts)
        differences[condition] = gap._asdict()
        if gap.low > 0 or gap.value > config.promote.margin:
            worse.append(f"{condition} {gap.value:+.2%} [{gap.low:+.2%}, {gap.high:+.2%}]")
    why = (
        f"worse than version {champion.number} in EER at {'; '.join(worse)}"
        if worse
        else (f"not worse than version {champion.number} on {', '.join(config.promote.guarded)}")
    )
    return Decision(not worse, why, challenger, differences)


def _user() -> str:
    """Return who promotes; a container's user may have a number only."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _scores(
    registry: Registry,
    version: Version,
    trials_hash: str,
    store: Folder,
    config: Config,
    on_progress: OnProgress,
) -> pa.Table:
    """Fetch the scores of a version on some trials; make and keep them if there are none yet."""
    below = _evaluation_path(trials_hash)
    with tempfile.TemporaryDirectory(prefix="csc-scores-") as scratch:
        found = registry.fetch(version.run_id, f"{below}/{SCORES_FILE}", Path(scratch))
        if found is not None:
            return pq.read_table(found)
        uri = f"models:/{registry.model}/{version.number}"
        model = CSC.load(registry.download(uri, Path(scratch)) / "model")
        table, scored_hash = score_model(model, store, config, on_progress)
        if scored_hash != trials_hash:
            raise CscError(
                "the challenger was scored on trials of other data or another configuration than "
                "this: give the one that it was evaluated with"
            )
        kept = Path(scratch) / "evaluation"
        kept.mkdir()
        pq.write_table(table, kept / SCORES_FILE)
        registry.log_folder(version.run_id, kept, below)
        return table


def _difference(
    ours: pa.Table, theirs: pa.Table, condition: str, counts: np.ndarray[Any, np.dtype[np.int64]]
) -> metrics.Interval:
    names = np.concatenate([ours["enrolment_speaker"], ours["test_speaker"]])
    _, speaker = np.unique(names, return_inverse=True)
    enrolment, test = np.split(speaker, 2)
    rates, replicates = [], []
    for table in (ours, theirs):
        score, target = table[f"{CSC_NAME}.{condition}"].to_numpy(), table["target"].to_numpy()
        rates.append(metrics.eer(score, target))
        replicates.append(
            metrics.eer_replicates(metrics.Trials(score, target, enrolment, test), counts)
        )
    return metrics.interval(rates[0] - rates[1], replicates[0] - replicates[1])
