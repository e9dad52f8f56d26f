"""The whole way: ingest -> build -> train -> evaluate -> register -> promote.

A stage first sees to the ones it needs. Each is named by a hash of all it depends on: what an
earlier run finished is found and returned, what it left undone is completed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ray
import torch

from jobs import telemetry
from jobs.activity import activity
from jobs.cluster import ray_session
from jobs.config import Config
from jobs.console import heading, progress, say, working
from jobs.ear import ear_of
from jobs.embedding import weights_id
from jobs.evaluate import (
    PAGE_FILE,
    SCORES_FILE,
    Evaluated,
    Evaluator,
    check_extras,
    evaluate,
    evaluation_id,
)
from jobs.finetune import pinned
from jobs.ingest_report import html
from jobs.interrupt import Interrupt
from jobs.nightly import begun, made_before, mark_done, way_id
from jobs.places import Place, gpus_for, place_of
from jobs.promote import Decision, promote, rollback
from jobs.register import register
from jobs.registry import CHALLENGER, CHAMPION, MODEL_ID, Registry, Version
from jobs.schedules import refine, resampled
from jobs.train import Trained, model_id, train, validated
from jobs.training_data import TrainingData, named
from jobs.workspace import Workspace
from pipeline.build import build, dataset_id
from pipeline.corpora import list_corpora
from pipeline.errors import CscError
from pipeline.plan import REJECTS_FILE, Generation
from pipeline.schema import Runner, Task, Work
from pipeline.shards import INDEX
from pipeline.storage import Folder
from pipeline.store import discard, ingest, plan_ingest, store_id
from pipeline.tasks import run_tasks
from pipeline.trial_sources import Given, listed, tabled

REPORT_FILE = "report.html"
SCHEDULE_POINTS = 50


class Run:
    """The stages of one configuration, each reached once."""

    def __init__(
        self,
        config: Config,
        *,
        fresh: bool = False,
        against: Sequence[str] = (),
        given: tuple[Path, Path | None] | None = None,
        if_new: bool = False,
    ) -> None:
        self.config, self.fresh, self.against, self.given = config, fresh, against, given
        self.if_new = if_new
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

    def _on_ray(
        self, what: str, gpus: int = 0, each: Callable[[], None] = lambda: None
    ) -> Callable[[Sequence[Task], Work], None]:
        def run(tasks: Sequence[Task], work: Work) -> None:
            if tasks:
                _ = self.ray
            with progress(what) as advance:

                def advanced(done: int, total: int) -> None:
                    self._interrupt.check()
                    each()
                    advance(done, total)

                run_tasks(tasks, work, advanced, **self.config.ray.tasks.asked(gpus))

        return run

    @contextmanager
    def _stage(self, name: str, folder: Folder) -> Iterator[list[str]]:
        """Announce a stage, time it and print what it says it made; keep a record of its work."""
        if self.fresh:
            folder.remove(first=INDEX)
        finished, began = folder.exists(INDEX), time.monotonic()
        with self._at_work(name, self._id(folder), before=finished):
            heading(name, "finished before" if finished else "")
            lines: list[str] = []
            yield lines
            self._interrupt.check()
            for line in lines:
                say(f"  {line}")
            took = "" if finished else f"  ({time.monotonic() - began:.0f} s)"
            say(f"  {folder.uri}{took}")

    @contextmanager
    def _at_work(self, stage: str, name: str, *, before: bool = False) -> Iterator[None]:
        """Have what is said belong to a stage and what it makes, and keep a record of its work.

        There is none where it was made `before`.
        """
        with ExitStack() as meanwhile:
            on_progress = None
            if not before:
                record = meanwhile.enter_context(activity(self.workspace.folder, stage, name))
                on_progress = record.progress
            meanwhile.enter_context(working(stage, name, on_progress))
            yield

    def _id(self, folder: Folder) -> str:
        """Return what names a folder among those of its kind: `ID`, or `ID/generation-00001`."""
        return folder.uri.removeprefix(self.workspace.folder.uri).split("/", 2)[2]

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
            made = self._id(planned.store)
            run = self._on_ray("shards", each=partial(telemetry.shard_done, "ingest", made))
            index = ingest(self.store_root, planned, config.ingest, run, ear)
            if not planned.finished:
                telemetry.ingested(made, index)
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
            run = self._on_ray("shards", each=partial(telemetry.shard_done, "build", name))
            index = build(dataset, store, self.config.build, self.config.seed, run)
            gigabytes = sum(shard["bytes"] for shard in index["shards"]) / 1e9
            episodes = ", ".join(f"{n} {split}" for split, n in index["episodes"].items())
            lines.append(f"episodes: {episodes}; {len(index['shards'])} shards, {gigabytes:.2f} GB")
        return dataset, index

    @cached_property
    def data(self) -> tuple[TrainingData, Config]:
        """What is trained on, and the configuration that would have built it."""
        if self.config.train.dataset is not None:
            return named(self.config)
        return TrainingData(self.build[0], self.build[0], self.ingest[0]), self.config

    @cached_property
    def train(self) -> Trained:
        data, config = self.data
        about = data.dataset.read_json(INDEX)
        if config.train.init_from is not None:
            config = (begun if self.if_new else pinned)(config, self.registry)
        folder = self.workspace.models.child(model_id(about, config, data.differs))
        with self._stage("train", folder) as lines:
            if not folder.exists(INDEX):
                _ = self.ray
            trained = train(folder, data, config, self.registry)
            best = validated(
                trained.about["best_valid_eer"], trained.about.get("best_valid_improvement_db")
            )
            lines.append(
                f"{trained.about['steps']} steps; best validation, at step "
                f"{trained.about['best_step']}: {best}"
            )
            if data.store is None:
                lines.append(
                    "chosen by separation alone: there is no utterance store of its voices"
                )
        return trained

    @cached_property
    def evaluate(self) -> Evaluated:
        if self.config.train.dataset is not None:
            raise CscError(
                "train.dataset is for csc train alone, as nobody knows whether the speakers of a "
                "test are in it: leave it out, or begin a run on recordings of your own with the "
                "model, train.init_from=FOLDER"
            )
        check_extras(self.config.evaluate)  # what cannot be used is told before a training
        _ = self._listed
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
                    made = evaluate(folder, self.evaluator, trained, models)
                    telemetry.evaluated(self._id(folder), made.about)
            evaluated = Evaluated(folder, folder.read_json(INDEX))
            lines.append(f"tables, plots and sounds in {PAGE_FILE}, scores in {SCORES_FILE}")
            for name, why in evaluated.about["trials"]["skipped"].items():
                lines.append(f"left out: {name}, as {why}")
        return evaluated

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores test sides: here where they are few, on Ray where they are many."""
        cache = self.workspace.embeddings
        run = self.here_or_on_ray("chunks")
        return Evaluator(self.config, self.ingest[0], cache, run, self._listed)

    @cached_property
    def _listed(self) -> Given | None:
        """The trials that are to be used in place of those of the test split, looked through."""
        if self.given is None:
            return None
        path, root = self.given
        if root is None:
            return tabled(path, self.ingest[0], self.workspace.embeddings)
        with progress("files") as advance:
            return listed(path, root, self.workspace.embeddings, advance)

    def here_or_on_ray(self, what: str) -> Runner:
        """Return what does tasks where they are soonest done: see `places`."""

        def run(tasks: Sequence[Task], work: Work) -> None:
            place = self._place_of(len(tasks))
            if place.on_ray:
                self._on_ray(what, place.num_gpus)(tasks, work)
                return
            with progress(what) as advance:
                for done, task in enumerate(tasks, start=1):
                    self._interrupt.check()
                    work(task)
                    advance(done, len(tasks))

        return run

    def _place_of(self, num_tasks: int) -> Place:
        """Look whose processors there are, joining a cluster that is there anyway."""
        here = there = torch.cuda.device_count()
        if self.config.ray.address != "local" and num_tasks:
            _ = self.ray
            there = gpus_for(ray.nodes(), self.config.ray.tasks.resources)
        return place_of(num_tasks, here, there)

    def _versions(self) -> dict[str, Version]:
        """Return the registered versions that an evaluation stands beside, by their names."""
        found = [self.registry.version(name) for name in self.against]
        return {f"version {version.number}": version for version in found}

    @cached_property
    def register(self) -> Version:
        evaluated, trained = self.evaluate, self.train  # what cannot be judged is not trained
        before = self.registry.version_of(trained.about["run"], evaluated.about["trials"]["hash"])
        with self._at_work("register", evaluated.about["model"], before=before is not None):
            heading("register", "")
            dataset, store = self.build[0], self.ingest[0]
            version, new = register(trained, evaluated, dataset, store, self.registry)
            state = "registered, alias challenger" if new else "registered before"
            say(f"  {self.registry.model} version {version.number}: {state}")
        return version

    def promoted(self, *, forced: str = "", dry_run: bool = False) -> Decision:
        """Let the gate judge the challenger, and say what it said."""
        if dry_run:
            with working("promote"):
                heading("promote", "nothing is changed")
                return self._judged(dry_run=True)
        version = self.register
        before = {CHALLENGER, CHAMPION} <= {*self.registry.aliases_of(version)}
        with self._at_work("promote", version.tags[MODEL_ID], before=before):
            heading("promote", "")
            decision = self._judged(forced=forced)
            mark_done(self.registry, version, way_id(self.ingest[1], self.config))
        return decision

    def _judged(self, *, forced: str = "", dry_run: bool = False) -> Decision:
        decision = promote(self.registry, self.evaluator, forced=forced, dry_run=dry_run)
        verdict = CHAMPION if decision.promoted else "refused"
        say(f"  version {decision.version.number}: {verdict}, {decision.why}")
        return decision

    def nothing_new(self) -> Version | None:
        """Return the version that the whole way led to before, from all that is there by now.

        None where a corpus has changed since, or a setting, or where the gate has not judged yet.
        """
        registered = self.config.mlflow.uri or self.workspace.folder.exists("mlflow.db")
        if not (registered and self.plan.finished):
            return None
        store = self.plan.store.read_json(INDEX)
        return made_before(self.registry, way_id(store, self.config))

    def rollback(self, why: str) -> None:
        """Make the champion before this one champion again."""
        with self._at_work("promote", self.registry.model):
            heading("promote", "back")
            say(f"  version {rollback(self.registry, why).number} is champion again")


def refined(config: Config, run_id: str) -> Config:
    """Return a configuration with the schedule that the gradients of an MLflow run speak for."""
    registry = Registry(Workspace(config).mlflow_uri, config)
    norms = registry.logged(run_id, "grad_norm")
    try:
        rates = refine([*norms.values()], [*norms])
    except ValueError as error:
        raise CscError(f"run {run_id}: {error}; train for longer first") from error
    train = config.train.model_copy(update={"refined": resampled(rates, SCHEDULE_POINTS)})
    return config.model_copy(update={"train": train})
