"""What a workspace holds, who works there now, what was left unfinished, and what it cost.

All of it is read; a run that is at work there goes on undisturbed.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from jobs.activity import NEWEST, Activity, activities
from jobs.config import Config
from jobs.registry import CHALLENGER, CHAMPION, Registry
from jobs.standing import Held, Standing, standings
from jobs.summary import eer_by_condition
from jobs.workspace import Workspace, registry_of
from pipeline.errors import CscError
from pipeline.storage import READS_AT_ONCE

GENERATIONS = 3  # of a store that are told
Figures = dict[str, int | float | str | None]


class Made(BaseModel):
    """A finished thing: what made it, its id, and its figures by name."""

    stage: str
    id: str
    figures: Figures


class Versions(BaseModel):
    """What aliases of the registered model point to, or why that cannot be told."""

    model: str
    champion: str | None = None
    challenger: str | None = None
    error: str = ""


class Cost(BaseModel):
    """What a stage cost, by all records there are of it."""

    stage: str
    pieces: int
    core_hours: float
    gpu_hours: float


class Status(BaseModel):
    """What `csc status` tells."""

    workspace: str
    exists: bool
    running: list[Activity]
    unfinished: list[Activity]  # lost, failed or stopped, and not made up for since
    stages: list[Standing]  # of the configuration
    made: list[Made]
    registry: Versions | None
    costs: list[Cost]


def status(config: Config) -> Status:
    """Look at a workspace.

    Raises:
        CscError: something there is damaged, or the store does not answer.
    """
    workspace = Workspace(config)
    held = Held(workspace, activities(workspace.folder))
    registry, versions = _registry(config)
    latest = {(one.stage, one.name): one for one in reversed(held.activities)}.values()
    return Status(
        workspace=workspace.folder.uri,
        exists=bool(held.activities or any(held.names.values())),
        running=[one for one in latest if one.state == "running"],
        unfinished=[one for one in latest if _is_unfinished(one, held)],
        stages=standings(config, held, registry, versions.error if versions else ""),
        made=list(_made(held)),
        registry=versions,
        costs=costs(held.activities),
    )


def _is_unfinished(one: Activity, held: Held) -> bool:
    over = one.state in ("lost", "failed", "stopped")
    return over and one.stage in held.folders and not held.finished(one.stage, one.name)


def _registry(config: Config) -> tuple[Registry | None, Versions | None]:
    """Return the registry, where there is one that answers, and what its aliases point to."""
    if config.mlflow.uri is None:
        folder = Workspace(config).folder
        if not (folder.is_local and folder.exists("mlflow.db")):
            return None, None
    try:
        registry = registry_of(config)
        found = {alias: registry.by_alias(alias) for alias in (CHAMPION, CHALLENGER)}
    except CscError as error:
        return None, Versions(model=config.mlflow.model, error=str(error))
    numbers = {alias: version and version.number for alias, version in found.items()}
    return registry, Versions(model=registry.model, **numbers)


def _made(held: Held) -> Iterator[Made]:
    wanted = [
        *(("ingest", name) for name in _newest_generations(held)),
        *((stage, name) for stage in FIGURES if stage != "ingest" for name in held.ids(stage)),
    ]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        indexes = pool.map(lambda place: held.index(*place), wanted)
    for (stage, name), index in zip(wanted, indexes, strict=True):
        if index is not None:
            yield Made(stage=stage, id=name, figures=FIGURES[stage](index))


def _newest_generations(held: Held) -> Iterator[str]:
    stores: dict[str, list[str]] = {}
    for name in held.ids("ingest"):
        stores.setdefault(name.partition("/")[0], []).append(name)
    for generations in stores.values():
        yield from generations[-GENERATIONS:]


def _of_store(index: Mapping[str, Any]) -> Figures:
    return {
        "hours": round(index["seconds"] / 3600, 2),
        "utterances": index["kept"],
        "speakers": sum(index["speakers"].values()),
    }


def _of_dataset(index: Mapping[str, Any]) -> Figures:
    gigabytes = round(sum(shard["bytes"] for shard in index["shards"]) / 1e9, 2)
    return {f"{split}_episodes": count for split, count in index["episodes"].items()} | {
        "shards": len(index["shards"]),
        "gigabytes": gigabytes,
    }


def _of_model(index: Mapping[str, Any]) -> Figures:
    return {
        "steps": index["steps"],
        "best_valid_eer": index["best_valid_eer"],
        "dataset": index["dataset"],
    }


def _of_evaluation(index: Mapping[str, Any]) -> Figures:
    rates = eer_by_condition(index["results"])
    return {f"eer.{condition}": rate for condition, rate in rates.items()} | {
        "model": index["model"]
    }


FIGURES = {
    "ingest": _of_store,
    "build": _of_dataset,
    "train": _of_model,
    "evaluate": _of_evaluation,
}


def costs(found: Sequence[Activity]) -> list[Cost]:
    """Add up what work cost, by stage; what costs nothing is left out."""
    stages = dict.fromkeys(one.stage for one in found if one.core_s or one.gpu_s)
    return [
        Cost(
            stage=stage,
            pieces=sum(one.stage == stage for one in found),
            core_hours=sum(one.core_s for one in found if one.stage == stage) / 3600,
            gpu_hours=sum(one.gpu_s for one in found if one.stage == stage) / 3600,
        )
        for stage in sorted(stages)
    ]


def tables(found: Status) -> Iterator[Table | str]:
    """Give what a person reads of it."""
    if not found.exists:
        yield f"{found.workspace}: nothing is there yet: csc run, with these options, begins"
        return
    yield found.workspace
    yield _work_table("at work now", found.running) if found.running else "nobody is at work"
    if found.unfinished:
        yield _work_table("left unfinished", found.unfinished)
        yield "the command that was at work there goes on from where it was"
    stages = [astuple(standing) for standing in found.stages]
    yield _table("this configuration", stages, ("stage", "id", "state", "detail"))
    if found.made:
        yield _made_table(found.made)
    if found.registry is not None:
        yield _aliases(found.registry)
    if found.costs:
        yield _costs_table(found.costs)


def _table(title: str, rows: Sequence[Sequence[str]], headings: Sequence[str]) -> Table:
    table = Table(*headings, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # what people wrote, not markup
    return table


def _work_table(title: str, found: Sequence[Activity]) -> Table:
    now = datetime.now(UTC)
    rows = [
        (
            one.stage,
            one.name,
            f"{one.host} ({one.pid})" + (f", {one.schedule}" if one.schedule else ""),
            f"{one.began:%Y-%m-%d %H:%M}",
            f"{one.done} of {one.total}" if one.total else "",
            one.reason or one.state,
            f"{max(0.0, (now - one.updated).total_seconds()):.0f} s ago",
        )
        for one in found
    ]
    heads = ("stage", "id", "where", "began (UTC)", "done", "state", "last heard of")
    return _table(title, rows, heads)


def _made_table(made: Sequence[Made]) -> Table:
    rows = [
        (one.stage, one.id, ", ".join(_figure(*figure) for figure in one.figures.items()))
        for one in made
    ]
    return _table("what there is", rows, ("made by", "id", "what"))


def _figure(name: str, value: int | float | str | None) -> str:
    if "eer" in name:
        value = f"{value:.1%}" if isinstance(value, float) else "not measured"
    return f"{name} {value}"


def _aliases(found: Versions) -> str:
    if found.error:
        return f"{found.model}: {found.error}"
    names = {CHAMPION: found.champion, CHALLENGER: found.challenger}
    told = (f"{alias}: {f'version {n}' if n else 'none'}" for alias, n in names.items())
    return f"{found.model}: {', '.join(told)}"


def _costs_table(found: Sequence[Cost]) -> Table:
    rows = [
        (one.stage, str(one.pieces), f"{one.core_hours:.3f}", f"{one.gpu_hours:.3f}")
        for one in found
    ]
    title = f"cost, by the newest {NEWEST} records at most: what stages could use, for how long"
    return _table(title, rows, ("stage", "pieces of work", "core hours", "GPU hours"))
