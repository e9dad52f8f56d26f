"""The whole way: ingest -> build -> train -> evaluate -> register -> promote.

A stage first sees to the ones it needs. Each is named by a hash of all it depends on: what an
earlier run finished is found and returned, what it left undone is completed.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.cluster import ray_session
from jobs.config import Config
from jobs.console import heading, progress, say, show
from jobs.ear import ear_of
from jobs.embedding import on_device, weights_id
from jobs.evaluate import (
    PAGE_FILE,
    SCORES_FILE,
    Evaluated,
    Evaluator,
    evaluate,
    evaluation_id,
)
from jobs.finetune import pinned
from jobs.ingest_report import html
from jobs.interrupt import Interrupt
from jobs.lineage import flag_forgotten
from jobs.promote import Decision, promote, rollback
from jobs.register import register
from jobs.registry import CHAMPION, MODEL_ID, Registry, Version, masked
from jobs.report import metrics_table
from jobs.schedules import refine, resampled
from jobs.train import Trained, model_id, train, validated
from jobs.workspace import Workspace
from pipeline.build import build, dataset_id
from pipeline.corpora import SAMPLE, list_corpora
from pipeline.errors import CscError
from pipeline.forget import forget as forget_sources
from pipeline.forget import index_ids
from pipeline.plan import REJECTS_FILE, Generation, changes, source_bytes
from pipeline.schema import Runner, Task, Work
from pipeline.shards import INDEX
from pipeline.storage import Folder
from pipeline.store import discard, ingest, plan_ingest, store_id, unread
from pipeline.tasks import run_tasks
from pipeline.trial_sources import ListedTrials, listed

REPORT_FILE = "report.html"
SCHEDULE_POINTS = 50
FEW_TASKS = 64  # that are sooner done than Ray would be ready


class Run:
    """The stages of one configuration, each reached once."""

    def __init__(
        self,
        config: Config,
        *,
        fresh: bool = False,
        against: Sequence[str] = (),
        given: tuple[Path, Path] | None = None,
    ) -> None:
        self.config, self.fresh, self.against, self.given = config, fresh, against, given
        self.workspace = Workspace(config)
        self._exit, self._interrupt = ExitStack(), Interrupt()

    def __enter__(self) -> "Run":
        self._exit.enter_context(self.workspace.locked())
        self._exit.enter_context(self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.workspace.mlflow_uri, self.config)

    @cached_property
    def ray(self) -> None:
        """Start Ray when a stage first has work for it."""
        say("  starting Ray")
        self._exit.enter_context(ray_session(self.config))

    def _on_ray(self, what: str) -> Callable[[Sequence[Task], Work], None]:
        def run(tasks: Sequence[Task], work: Work) -> None:
            if tasks:
                _ = self.ray
            with progress(what) as advance:

                def advanced(done: int, total: int) -> None:
                    self._interrupt.check()
                    advance(done, total)

                run_tasks(tasks, work, advanced)

        return run

    @contextmanager
    def _stage(self, name: str, folder: Folder) -> Iterator[list[str]]:
        """Announce a stage, time it and print what it says it made."""
        if self.fresh:
            folder.remove(first=INDEX)
        finished, began = folder.exists(INDEX), time.monotonic()
        heading(name, "finished before" if finished else "")
        lines: list[str] = []
        yield lines
        self._interrupt.check()
        for line in lines:
            say(f"  {line}")
        took = "" if finished else f"  ({time.monotonic() - began:.0f} s)"
        say(f"  {folder.uri}{took}")

    @property
    def store_root(self) -> Folder:
        """Where the generations of the store lie."""
        return self.workspace.utterances.child(store_id(self.config.ingest))

    @cached_property
    def plan(self) -> Generation:
        """What an ingest of the corpora, as they are now, finds done and has to do."""
        say("  listing the corpora")
        return plan_ingest(self.store_root, self.config.ingest, list_corpora(self.config.ingest))

    @cached_property
    def ingest(self) -> tuple[Folder, Any]:
        if self.fresh:
            discard(self.store_root)
        planned, config = self.plan, self.config
        with self._stage("ingest", planned.store) as lines:
            ear = None if planned.finished else ear_of(config)
            index = ingest(self.store_root, planned, config.ingest, self._on_ray("shards"), ear)
            if not planned.store.exists(REPORT_FILE):
                planned.store.put(REPORT_FILE, html(index).encode())
            speakers = ", ".join(f"{count} {split}" for split, count in index["speakers"].items())
            hours, hours_in = index["seconds"] / 3600, index["seconds_in"] / 3600
            lines.append(
                f"{index['files']} files -> {index['kept']} utterances, {hours:.2f} of "
                f"{hours_in:.2f} h; speakers: {speakers}"
            )
            if index["rejected"]:
                reasons = ", ".join(f"{n} {reason}" for reason, n in index["rejected"].items())
                lines.append(f"rejected: {reasons}; each is in {REJECTS_FILE}, see {REPORT_FILE}")
        return planned.store, index

    @cached_property
    def build(self) -> tuple[Folder, Any]:
        store, about = self.ingest
        name = dataset_id(about, self.config.build, self.config.seed)
        dataset = self.workspace.mixtures.child(name)
        with self._stage("build", dataset) as lines:
            run = self._on_ray("shards")
            index = build(dataset, store, self.config.build, self.config.seed, run)
            gigabytes = sum(shard["bytes"] for shard in index["shards"]) / 1e9
            episodes = ", ".join(f"{n} {split}" for split, n in index["episodes"].items())
            lines.append(f"episodes: {episodes}; {len(index['shards'])} shards, {gigabytes:.2f} GB")
        return dataset, index

    @cached_property
    def train(self) -> Trained:
        dataset, about = self.build
        config = self.config
        if config.train.init_from is not None:
            config = pinned(config, self.registry)
        folder = self.workspace.models.child(model_id(about, config))
        with self._stage("train", folder) as lines:
            if not folder.exists(INDEX):
                _ = self.ray
            trained = train(folder, self.ingest[0], dataset, config, self.registry)
            best = validated(
                trained.about["best_valid_eer"], trained.about.get("best_valid_improvement_db")
            )
            lines.append(
                f"{trained.about['steps']} steps; best validation, at step "
                f"{trained.about['best_step']}: {best}"
            )
        return trained

    @cached_property
    def evaluate(self) -> Evaluated:
        trained, against = self.train, self._versions()
        ids = {name: version.tags[MODEL_ID] for name, version in against.items()}
        folder = self.workspace.evaluations.child(
            evaluation_id(weights_id(trained.folder), self.config, ids, self._listed)
        )
        with self._stage("evaluate", folder) as lines:
            if not folder.exists(INDEX):
                with folder.scratch() as scratch:
                    models = {
                        name: self.registry.model_of(version, scratch / name)
                        for name, version in against.items()
                    }
                    evaluate(folder, self.evaluator, trained, models)
            evaluated = Evaluated(folder, folder.read_json(INDEX))
            lines.append(f"tables, plots and sounds in {PAGE_FILE}, scores in {SCORES_FILE}")
            for name, why in evaluated.about["trials"]["skipped"].items():
                lines.append(f"left out: {name}, as {why}")
        return evaluated

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores test sides: here where they are few, on Ray where they are many."""
        cache = self.workspace.embeddings
        run = self._here_or_on_ray("chunks")
        return Evaluator(self.config, self.ingest[0], cache, run, self._listed)

    @cached_property
    def _listed(self) -> ListedTrials | None:
        """The trial list that is to be used in place of the test split, looked through."""
        if self.given is None:
            return None
        path, root = self.given
        with progress("files") as advance:
            return listed(path, root, self.workspace.embeddings, advance)

    def _here_or_on_ray(self, what: str) -> Runner:
        on_ray = self._on_ray(what)

        def run(tasks: Sequence[Task], work: Work) -> None:
            if len(tasks) > FEW_TASKS and on_device("auto") == "cpu":  # a GPU is here, not there
                on_ray(tasks, work)
                return
            with progress(what) as advance:
                for done, task in enumerate(tasks, start=1):
                    self._interrupt.check()
                    work(task)
                    advance(done, len(tasks))

        return run

    def _versions(self) -> dict[str, Version]:
        """Return the registered versions that an evaluation stands beside, by their names."""
        found = [self.registry.version(name) for name in self.against]
        return {f"version {version.number}": version for version in found}

    @cached_property
    def register(self) -> Version:
        evaluated = self.evaluate
        heading("register", "")
        version, new = register(self.train, evaluated, self.build[0], self.ingest[0], self.registry)
        state = "registered, alias challenger" if new else "registered before"
        say(f"  {self.registry.model} version {version.number}: {state}")
        return version

    def promoted(self, *, forced: str = "", dry_run: bool = False) -> Decision:
        """Let the gate judge the challenger, and say what it said."""
        if not dry_run:
            _ = self.register
        heading("promote", "nothing is changed" if dry_run else "")
        decision = promote(self.registry, self.evaluator, forced=forced, dry_run=dry_run)
        verdict = CHAMPION if decision.promoted else "refused"
        say(f"  version {decision.version.number}: {verdict}, {decision.why}")
        return decision

    def rollback(self, why: str) -> None:
        """Make the champion before this one champion again."""
        heading("promote", "back")
        say(f"  version {rollback(self.registry, why).number} is champion again")


def refined(config: Config, run_id: str) -> Config:
    """Return a configuration with the schedule that the gradients of an MLflow run speak for."""
    registry = Registry(Workspace(config).mlflow_uri, config)
    try:
        rates = refine(registry.history(run_id, "grad_norm"))
    except ValueError as error:
        raise CscError(f"run {run_id}: {error}; train for longer first") from error
    train = config.train.model_copy(update={"refined": resampled(rates, SCHEDULE_POINTS)})
    return config.model_copy(update={"train": train})


def summary(run: Run, arguments: str) -> None:
    """Print what a whole run made, its metrics, and what to try next."""
    say("")
    show(metrics_table(run.evaluate.about))
    pair = shlex.join(str(path) for path in sorted(SAMPLE.glob("speechocean762/soc0005/*"))[:2])
    say(f"\nMade in {run.workspace.folder.uri}:")
    for what, folder in (
        ("utterance store", run.ingest[0]),
        ("mixture shards", run.build[0]),
        ("model", run.train.folder),
        ("evaluation", run.evaluate.folder),
    ):
        say(f"  {what:16} {folder.uri}")
    address = masked(run.workspace.mlflow_uri)
    say(f"  {'runs, registry':16} {address}")
    say("\nNext:")
    say(f"  csc verify{arguments} {pair}")
    say(f"  csc run{arguments} --set train.steps={2 * run.config.train.steps}")
    served = address.startswith("http")
    say(f"  {address}" if served else f"  mlflow ui --backend-store-uri {shlex.quote(address)}")


def dry_run(run: Run) -> None:
    """Say what an ingest would do, and do nothing."""
    planned = run.plan
    if planned.finished:
        say(f"  nothing new: generation {planned.number} holds all of it, {planned.store.uri}")
        return
    todo = unread(run.store_root, planned, run.config.ingest)
    new = changes(run.store_root, planned)
    say(
        f"  generation {planned.number}: {new.new} new, {new.changed} changed, {new.gone} gone, "
        f"{new.unchanged} unchanged"
    )
    gigabytes, shards = source_bytes(todo).sum() / 1e9, len(set(todo["shard"].to_pylist()))
    say(f"  to be read: {len(todo)} recordings or spans, {gigabytes:.2f} GB, in {shards} shards")
    say("  dry run: nothing was written")


def forget(run: Run, speakers: Sequence[str], recordings: Sequence[str]) -> None:
    """Take speakers and recordings out of all stores of the workspace, and name what they made."""
    names = [*speakers, *recordings]
    before = _stores(run)
    mixtures = run.workspace.mixtures
    count = forget_sources(_store_roots(run), names)
    say(f"  {count} recording(s) or span(s) removed; no later ingest reads them")
    left = _stores(run)
    for file in mixtures.list():
        folder, _, name = file.name.rpartition("/")
        if name == INDEX and mixtures.read_json(file.name)["store"] not in {None, *left}:
            say(
                f"  built before, and may hold their audio: {mixtures.path(folder)}; remove it, "
                "and what was trained on it"
            )
    for made in (run.workspace.evaluations, run.workspace.embeddings):
        if next(iter(made.list()), None) is not None:
            say(f"  may hold their voices or vectors: {made.uri}; remove it, it is made again")
    if run.config.mlflow.uri or run.workspace.folder.exists("mlflow.db"):
        flagged = flag_forgotten(run.registry, speakers, recordings, before - left)
        if flagged:
            say(f"  flagged in the registry, as trained with them: version {', '.join(flagged)}")


def _stores(run: Run) -> set[str]:
    """Return the ids of all generations of all stores of the workspace."""
    return {name for root in _store_roots(run) for name in index_ids(root)}


def _store_roots(run: Run) -> list[Folder]:
    utterances = run.workspace.utterances
    roots = sorted({file.name.partition("/")[0] for file in utterances.list() if "/" in file.name})
    return [utterances.child(root) for root in roots]
