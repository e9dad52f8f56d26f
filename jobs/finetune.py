"""Fine-tuning: a run that begins with the weights of an earlier model, and knows its speakers."""

import json
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csc_model.config import ModelConfig
from csc_model.extractor import FilmExtractor
from csc_model.model import CSC
from csc_model.objective import Objective
from csc_model.saving import CONFIG_FILE, WEIGHTS_FILE
from jobs.config import Config
from jobs.registry import Registry
from jobs.verify import artifacts_of
from pipeline.errors import CscError
from pipeline.storage import Folder

TABLE_FILE, SPEAKERS_FILE = "table.safetensors", "speakers.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TABLE_FILE, SPEAKERS_FILE)
OF_EXTRACTOR = {"extractor", "extractor_channels"}
WITHOUT_WEIGHTS = {"dropout", "detach_separation", "checkpointing"}
BASE = "base"  # folder of a run, with the model it begins with
ALIASED = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>.+)")


def pinned(config: Config, registry: Registry) -> Config:
    """Replace an alias in `train.init_from` by the version it points to now.

    Raises:
        CscError: it points to none.
    """
    match = ALIASED.fullmatch(config.train.init_from or "")
    if match is None or match["name"] != registry.model:
        return config
    version = registry.by_alias(match["alias"])
    if version is None:
        raise CscError(
            f"train.init_from: {config.train.init_from} points to no version: promote one, or "
            "name a version or a folder"
        )
    uri = f"models:/{registry.model}/{version.number}"
    return config.model_copy(update={"train": config.train.model_copy(update={"init_from": uri})})


def fetch_base(config: Config, run: Folder) -> None:
    """Copy the model that a run begins with to where all its workers find it.

    Raises:
        CscError: there is no such model, it has other sizes than `[model]` says, or it tells no
            voices apart where an extractor is to be trained for it.
    """
    if config.train.init_from is None or run.exists(f"{BASE}/{CONFIG_FILE}"):
        return
    with tempfile.TemporaryDirectory(prefix="csc-base-") as scratch:
        folder = artifacts_of(config.train.init_from, config, Path(scratch))
        if not (folder / CONFIG_FILE).exists():  # it is that of a version, not of a training
            folder = folder / "model"
        try:
            sizes = CSC.load(folder).config
        except (FileNotFoundError, ValueError) as error:
            raise CscError(f"train.init_from: {config.train.init_from}: {error}") from error
        wanted = config.model.model_dump()
        had = sizes.model_dump(exclude=OF_EXTRACTOR | WITHOUT_WEIGHTS)
        other = {key: value for key, value in had.items() if wanted[key] != value}
        if other:
            settings = ", ".join(f"model.{key}={value}" for key, value in other.items())
            raise CscError(f"train.init_from: that model has other sizes: set {settings}")
        if config.train.task == "extract":
            _check_embeds(folder, sizes, config.train.init_from)
        for name in reversed(MODEL_FILES):  # the configuration last: it makes the copy count
            if (folder / name).exists():
                run.put(f"{BASE}/{name}", (folder / name).read_bytes())


def _check_embeds(folder: Path, sizes: ModelConfig, name: str) -> None:
    """Refuse a model of separation alone; one with an extractor was looked at before it had it."""
    file = folder / SPEAKERS_FILE
    if sizes.extractor == "none" and file.exists() and not json.loads(file.read_text()):
        raise CscError(
            f"train.init_from: {name} tells no voices apart, separation alone was trained "
            "(train.contrastive_weight=0): train it further with train.task=csc first"
        )


def begin_with(objective: Objective, run: Folder, speakers: list[str]) -> int:
    """Load the model that a run begins with, and the vectors of the speakers that it knew.

    New speakers keep the vectors they have. Whoever is not in `speakers` has none from here on: a
    vector that nothing is said of any more would only be pushed away, and `csc forget` would not
    reach it. Returns how many were known.
    """
    base = run.child(BASE)
    with tempfile.TemporaryDirectory(prefix="csc-base-") as scratch:
        there = {file.name for file in base.list()}
        for name in there:
            (Path(scratch) / name).write_bytes(base.read(name))
        begin_model(objective.model, CSC.load(scratch))
        if not {TABLE_FILE, SPEAKERS_FILE} <= there:
            return 0
        known = json.loads((Path(scratch) / SPEAKERS_FILE).read_text())
        saved = load_file(Path(scratch) / TABLE_FILE)
    return _grow(objective, saved, known, speakers)


def begin_model(model: CSC, before: CSC) -> None:
    """Take over weights. An extractor stays with the model that it was trained for.

    One that is new begins as that model's separator where it has the shape of one.
    """
    same = _same_extractor(model.config, before.config)
    weights = before.state_dict()
    kept = {k: v for k, v in weights.items() if same or not k.startswith("extractor.")}
    own = {k: v for k, v in model.state_dict().items() if k.startswith("extractor.")}
    model.load_state_dict(own | kept)
    extractor = getattr(model, "extractor", None)
    if not same and isinstance(extractor, FilmExtractor):
        extractor.begin_with(kept)


def _same_extractor(one: ModelConfig, other: ModelConfig) -> bool:
    """Tell whether two models, of the same sizes otherwise, have extractors of one shape."""
    channels = one.extractor_channels == other.extractor_channels
    return one.extractor == other.extractor and (channels or one.extractor != "voicefilter")


@torch.no_grad()
def _grow(
    objective: Objective, saved: dict[str, Tensor], known: list[str], speakers: list[str]
) -> int:
    row_of = {name: row for row, name in enumerate(known)}
    pairs = [(row, row_of[name]) for row, name in enumerate(speakers) if name in row_of]
    if pairs and objective.has_table and len(saved["table"]):
        rows, before = torch.tensor(pairs).T
        objective.table[rows] = saved["table"][before].to(objective.table)
        if objective.contrast.learn_scale:  # else it is what the configuration says
            objective.raw_scale.copy_(saved["raw_scale"])
    return len(pairs)


def keep_voices(run: Folder) -> None:
    """Have a run end with the speakers, and their vectors, of the frozen model it began with."""
    base = run.child(BASE)
    if base.exists(TABLE_FILE) and base.exists(SPEAKERS_FILE):
        for name in (TABLE_FILE, SPEAKERS_FILE):
            run.put(name, base.read(name))


def table_of(objective: Objective) -> dict[str, Tensor]:
    """Return a copy of what a later run needs to know the speakers of this one."""
    table = {"table": objective.table, "raw_scale": objective.raw_scale}
    return {name: tensor.detach().clone() for name, tensor in table.items()}


def save_table(folder: Path, table: dict[str, Tensor]) -> None:
    """Write it beside the weights."""
    save_file({name: tensor.cpu() for name, tensor in table.items()}, folder / TABLE_FILE)
