"""Registration: an evaluated model becomes a version, with its figures and where it comes from."""

import json
import tempfile
from pathlib import Path
from typing import Any

from csc_model.config import VARIANT
from jobs.config import Config
from jobs.evaluate import CSC_NAME, Evaluated
from jobs.extraction_gate import extraction_tag
from jobs.extraction_summary import extraction_metrics
from jobs.lineage import LINEAGE_FILE, describe, inherited
from jobs.registry import (
    CHALLENGER,
    DATASET,
    MODEL_ID,
    STORE,
    TRIALS,
    Registry,
    Version,
)
from jobs.train import Trained, local_copy
from pipeline.errors import CscError
from pipeline.schema import config_hash
from pipeline.shards import INDEX
from pipeline.storage import Folder


def register(
    trained: Trained, evaluated: Evaluated, dataset: Folder, store: Folder, registry: Registry
) -> tuple[Version, bool]:
    """Make the trained and evaluated model a version with alias `challenger`.

    Returns the version, and whether it is new: a model is registered once.

    Raises:
        CscError: nobody's voice was learned, or MLflow cannot be reached.
    """
    config = Config.model_validate(trained.about["config"])
    if config.train.separation_only:
        raise CscError(
            "separation alone was trained (train.contrastive_weight=0), and nobody's voice was "
            "learned: begin another run with it, train.init_from="
            f"{trained.folder.uri}, and register that; csc beamform --model takes it as it is"
        )
    run_id, trials = trained.about["run"], evaluated.about["trials"]["hash"]
    known = registry.version_of(run_id, trials)
    if known is not None:
        challenger = registry.by_alias(CHALLENGER)
        if challenger is None or int(challenger.number) < int(known.number):
            registry.move_alias(CHALLENGER, known)  # an earlier run ended just before this
        return known, False
    with tempfile.TemporaryDirectory(prefix="csc-register-") as scratch:
        model = local_copy(trained.folder, Path(scratch) / "model")
        evaluation = Path(scratch) / "evaluation"
        evaluation.mkdir()
        for file in evaluated.folder.list():
            (evaluation / file.name).write_bytes(evaluated.folder.read(file.name))
        lineage = describe(trained.about, dataset.read_json(INDEX), store.read_json(INDEX))
        (evaluation / LINEAGE_FILE).write_text(json.dumps(lineage, indent=1))
        registry.log_folder(run_id, evaluation, evaluation_path(trials))
        registry.log_metrics(run_id, trained.about["best_step"], metrics_of(evaluated.about))
        tags = _tags(trained, evaluated) | inherited(registry, lineage)
        version = registry.register(run_id, model, evaluation, tags)
    return version, True


def evaluation_path(trials_hash: str) -> str:
    """Return where a run keeps its scores on some trials."""
    return f"evaluation/{trials_hash}"


def _tags(trained: Trained, evaluated: Evaluated) -> dict[str, str]:
    tags = {
        MODEL_ID: trained.about["id"],
        TRIALS: evaluated.about["trials"]["hash"],
        DATASET: trained.about["dataset"],
        STORE: trained.about["store"],
        "csc.variant": VARIANT,
        "csc.config": config_hash(trained.about["config"]),
    }
    for row in evaluated.about["results"]:
        if row["system"] == CSC_NAME:
            value, low, high = row["eer"].values()
            tags[f"eer.{row['condition']}"] = f"{value:.4f} [{low:.4f}, {high:.4f}]"
    extractor = trained.about["config"]["model"].get("extractor", "none")
    return tags | extraction_tag(extractor, evaluated.about)


def metrics_of(index: dict[str, Any]) -> dict[str, float]:
    """Return the figures of an evaluation, given its index, by the names that a run logs."""
    flat: dict[str, float] = {}
    for row in index["results"]:
        name = f"test.{row['system'].replace(',', '')}.{row['condition']}"
        flat |= {f"{name}.eer.{bound}": value for bound, value in row["eer"].items()}
        flat |= {f"{name}.{key}": value for key, value in row.items() if isinstance(value, float)}
    measured = {f"{name}.improvement_db": gain for name, gain in index["improvement_db"].items()}
    if "extraction" in index:
        measured |= extraction_metrics(index["extraction"])
    return flat | {f"test.{CSC_NAME}.{name}": value for name, value in measured.items()}
