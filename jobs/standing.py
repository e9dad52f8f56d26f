"""How far a configuration is in its workspace: which stages are done, partly done, or not yet.

Nothing is written, locked or listed but the workspace: corpora may have grown since.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.activity import Activity
from jobs.config import Config
from jobs.registry import CHAMPION, Registry, Version
from jobs.workspace import Workspace
from pipeline.build import dataset_id
from pipeline.commits import DONE, committed_shards
from pipeline.errors import CscError
from pipeline.plan import GENERATION, PLAN_FILE
from pipeline.shards import INDEX, store_shard_name
from pipeline.storage import Folder
from pipeline.store import store_id

FOLDERS = {
    "ingest": "utterances",
    "build": "mixtures",
    "train": "models",
    "evaluate": "evaluations",
}
Index = dict[str, Any] | None
"""What a finished stage says it made; None where it is not finished."""


@dataclass(frozen=True)
class Standing:
    """How far one stage is."""

    stage: str
    id: str = ""  # of what it makes, as far as that is known
    state: Literal["done", "partly", "not yet", "unknown"] = "not yet"
    detail: str = ""


class Held:
    """What files a workspace holds, by one listing for each kind, and who was at work."""

    def __init__(self, workspace: Workspace, activities: Sequence[Activity]) -> None:
        self.workspace, self.activities = workspace, activities
        self.folders = {stage: workspace.folder.child(kind) for stage, kind in FOLDERS.items()}
        self.names = {
            stage: {file.name for file in folder.list()} for stage, folder in self.folders.items()
        }

    def folder(self, stage: str, name: str) -> Folder:
        return self.folders[stage].child(name)

    def finished(self, stage: str, name: str) -> bool:
        return f"{name}/{INDEX}" in self.names.get(stage, ())

    def index(self, stage: str, name: str) -> Index:
        """Return what a stage says of what it made, or None where it is not finished."""
        if not self.finished(stage, name):
            return None
        return dict(self.folder(stage, name).read_json(INDEX))

    def ids(self, stage: str) -> list[str]:
        """Return the names of all that is finished."""
        ends = f"/{INDEX}"
        names = (name.removesuffix(ends) for name in self.names[stage] if name.endswith(ends))
        return sorted(names)

    def generations(self, store: str) -> list[int]:
        """Return the generations of a store that have a plan, oldest first."""
        below = f"{store}/"
        names = (n.removeprefix(below) for n in self.names["ingest"] if n.startswith(below))
        matches = ((GENERATION.match(name), name) for name in names)
        return sorted(int(m[1]) for m, name in matches if m and name[m.end() :] == PLAN_FILE)

    def last(self, stage: str, name: str) -> Activity | None:
        """Return who was last at work on a thing."""
        own = (one for one in self.activities if (one.stage, one.name) == (stage, name))
        return next(own, None)


def standings(
    config: Config, held: Held, registry: Registry | None, why_none: str = ""
) -> list[Standing]:
    """Return how far each stage is, in the order of the whole way, by the ids that `Run` uses.

    `why_none` says why there is no registry although there should be one.

    Raises:
        CscError: something in the workspace is damaged, or it or the registry does not answer.
    """
    ingest, store = _ingest(config, held)
    build, dataset = _build(config, held, store)
    train, model = _train(config, held, dataset, registry)
    evaluate, evaluation = _evaluate(config, held, model)
    if model is None or evaluation is None:
        last = [Standing("register"), Standing("promote")]
    else:
        last = _registered(model["run"], evaluation["trials"]["hash"], registry, why_none)
    return [ingest, build, train, evaluate, *last]


def _ingest(config: Config, held: Held) -> tuple[Standing, Index]:
    name = store_id(config.ingest)
    numbers = held.generations(name)
    if not numbers:
        return Standing("ingest", name), None
    made = f"{name}/generation-{numbers[-1]:05d}"
    index = held.index("ingest", made)
    if index is None:
        return Standing("ingest", made, "partly", _shards_done(held, name, made)), None
    asked = config.ingest.model_dump()
    if any(index["config"][key] != asked[key] for key in ("corpora", "splits")):
        detail = f"generation {numbers[-1]} is of other corpora or splits: a new one will be made"
        return Standing("ingest", name, "not yet", detail), None
    detail = f"{index['seconds'] / 3600:.2f} h, {index['kept']} utterances, of the corpora as then"
    return Standing("ingest", made, "done", detail), index


def _shards_done(held: Held, store: str, made: str) -> str:
    with held.folder("ingest", made).open_input(PLAN_FILE) as file:
        planned = pc.unique(pq.read_table(file, columns=["shard"])["shard"]).to_pylist()
    names = (f"{store}/shards/{store_shard_name(shard)}{DONE}" for shard in planned)
    done = sum(name in held.names["ingest"] for name in names)
    return f"{done} of {len(planned)} shards"


def _build(config: Config, held: Held, store: Index) -> tuple[Standing, Index]:
    if store is None:
        return Standing("build"), None
    name, build = dataset_id(store, config.build, config.seed), config.build
    index = held.index("build", name)
    if index is not None:
        return Standing("build", name, "done", f"{len(index['shards'])} shards"), index
    if not any(one.startswith(f"{name}/") for one in held.names["build"]):
        return Standing("build", name), None
    rows = sum(one.rows for one in committed_shards(held.folder("build", name), name).values())
    total = build.train_episodes * build.passes + build.valid_episodes
    return Standing("build", name, "partly", f"{rows} of {total} episodes"), None


def _train(
    config: Config, held: Held, dataset: Index, registry: Registry | None
) -> tuple[Standing, Index]:
    differs: list[str | None] = []
    if config.train.dataset is not None:
        from jobs.training_data import named

        try:
            data, config = named(config)
        except CscError as error:
            return Standing("train", "", "unknown", str(error)), None
        dataset, differs = data.dataset.read_json(INDEX), data.differs
    if dataset is None:
        return Standing("train"), None
    from jobs.finetune import pinned
    from jobs.train import RUN_FILE, model_id

    if config.train.init_from is not None:
        if registry is None:
            return Standing("train", "", "unknown", "train.init_from needs the registry"), None
        try:
            config = pinned(config, registry)
        except CscError as error:
            return Standing("train", "", "unknown", str(error)), None
    name = model_id(dataset, config, differs)
    index = held.index("train", name)
    if index is not None:
        return Standing("train", name, "done", f"{index['steps']} steps"), index
    if f"{name}/{RUN_FILE}" not in held.names["train"]:
        return Standing("train", name), None
    last = held.last("train", name)
    detail = f"{last.done} of {last.total} steps" if last and last.total else "begun"
    return Standing("train", name, "partly", detail), None


def _evaluate(config: Config, held: Held, model: Index) -> tuple[Standing, Index]:
    if model is None:
        return Standing("evaluate"), None
    from jobs.embedding import weights_id
    from jobs.evaluate import evaluation_id

    name = evaluation_id(weights_id(held.folder("train", model["id"])), config, {})
    index = held.index("evaluate", name)
    if index is None:
        return Standing("evaluate", name), None
    return Standing("evaluate", name, "done", f"{index['trials']['count']} trials"), index


def _registered(
    run_id: str, trials: str, registry: Registry | None, why_none: str
) -> list[Standing]:
    last = ("register", "promote")
    if registry is None and why_none:
        return [Standing(stage, "", "unknown", why_none) for stage in last]
    version = registry.version_of(run_id, trials) if registry else None
    if registry is None or version is None:
        return [Standing(stage) for stage in last]
    name = f"version {version.number}"
    return [Standing("register", name, "done"), _promoted(name, version, registry)]


def _promoted(name: str, version: Version, registry: Registry) -> Standing:
    from jobs.promote import DECIDED, DECISION, WHEN

    champion = registry.by_alias(CHAMPION)
    if champion is not None and champion.number == version.number:
        since = version.tags.get(WHEN) or "?"
        return Standing("promote", name, "done", f"champion since {since[:16]}")
    if version.tags.get(DECIDED):
        return Standing("promote", name, "done", f"refused: {version.tags.get(DECISION, '')}")
    if version.tags.get(WHEN):
        return Standing("promote", name, "done", f"was champion from {version.tags[WHEN][:16]}")
    return Standing("promote", name)
