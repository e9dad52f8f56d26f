"""Train: dataset in, best model out, through Ray Train; a killed run goes on where it was."""

import json
import math
import posixpath
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from csc_model.config import VARIANT
from csc_model.model import CONFIG_FILE, CSC, WEIGHTS_FILE
from jobs import telemetry
from jobs.attending import attended, attention_plot
from jobs.checkpoint import BEST, State
from jobs.config import Config
from jobs.console import Advance, progress, say
from jobs.failures import check_fits
from jobs.finetune import MODEL_FILES, SPEAKERS_FILE, TABLE_FILE, fetch_base, keep_voices
from jobs.loop import train_loop
from jobs.places import gpus_for
from jobs.registry import Registry
from jobs.training_data import TrainingData
from pipeline.datasets import read_dataset
from pipeline.errors import CscError
from pipeline.loader import EpisodeLoader
from pipeline.schema import config_hash
from pipeline.shards import INDEX, read_catalogue
from pipeline.speeds import voices
from pipeline.storage import Folder, arrow_filesystem
from pipeline.trials import make_trials

POLL_SECONDS = 1.0
RAY_FOLDER, RUN_FILE = "checkpoints", "run.json"
ATTENTION_FILE, ATTENTION_EPISODES, ATTENTION_BATCHES = "attention.png", 4, 32
SNAPSHOT = "checkpoint_manager_snapshot.json"
MODEL_WITHOUT_EFFECT = {"checkpointing"}
WITHOUT_EFFECT = {"checkpoint_minutes", "threads", "min_workers", "retries"} | {
    "dataset",  # which stands in the hash by its id
    "valid_dataset",
}
# Large tensors of a step are returned to the system and faulted in again without huge pages.
WORKER_ENV = {"THP_MEM_ALLOC_ENABLE": "1"}


class Trained(NamedTuple):
    """A finished training run."""

    folder: Folder
    about: dict[str, Any]  # its index


def model_id(dataset: dict[str, Any], config: Config, differs: Sequence[str | None] = ()) -> str:
    """Return the name of a training run: a hash of all that its result depends on.

    But for what a cluster does to it: with fewer workers, dropout, views, who is asked for and
    the rows of a large table that are spread are drawn anew, and an ECAPA-TDNN is normed over other
    shares. `differs` is that of its `TrainingData`.
    """
    train = config.train.model_dump(exclude=WITHOUT_EFFECT)
    model = config.model.model_dump(exclude=MODEL_WITHOUT_EFFECT)
    parts = (model, train, config.evaluate.trials.model_dump())
    return config_hash([VARIANT, dataset["id"], *differs, config.seed, parts])


class Reporter:
    """Carries metrics from rank 0 to the driver, wherever in the cluster they are."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, dict[str, float]]] = []
        self._ended_by = ""

    def put(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.append((step, metrics))

    def end(self, reason: str) -> None:
        """Note what ends the run for good: the first who says so is right."""
        self._ended_by = self._ended_by or reason

    def ended_by(self) -> str:
        return self._ended_by

    def take(self) -> list[tuple[int, dict[str, float]]]:
        lines, self._lines = self._lines, []
        return lines


def train(folder: Folder, data: TrainingData, config: Config, registry: Registry) -> Trained:
    """Train into a folder named by `model_id`, or return the finished run that is there.

    Raises:
        CscError: training failed; the message is the worker's.
    """
    if not folder.exists(INDEX):
        _train_and_export(folder, data, config, registry)
    folder.child(RAY_FOLDER).remove(first=SNAPSHOT)
    return Trained(folder, folder.read_json(INDEX))


def _train_and_export(
    folder: Folder, data: TrainingData, config: Config, registry: Registry
) -> None:
    built = read_dataset(data.dataset)
    check_fits(built, config)
    _check_trials(data.store, config)
    about, name = built.about, posixpath.basename(folder.uri)
    if not folder.exists(RUN_FILE):
        folder.put_json(RUN_FILE, registry.create_run(name, config, about))
    run_id = folder.read_json(RUN_FILE)
    fetch_base(config, folder)
    _check_snapshot(folder.child(RAY_FOLDER))
    checkpoint = _fit(folder, data, config, registry, run_id, len(about["speakers"]))
    names = voices(about["speakers"], config.train.speeds)
    if not config.train.learns_voices:
        names = []  # nobody's vector was learned: a run that begins with this one has its own
    state = _copy_best(folder, checkpoint, names)
    if config.train.task == "extract":
        keep_voices(folder)
    if config.learns_attention:
        _report_attention(folder, data.valid, config, registry, run_id)
    _finish(folder, state, name, run_id, data, config)


def _check_snapshot(checkpoints: Folder) -> None:
    """Assert that Ray Train's list of checkpoints is whole: on a disk it writes over the last."""
    if not checkpoints.exists(SNAPSHOT):
        return
    try:
        json.loads(checkpoints.read(SNAPSHOT))
    except ValueError:
        raise CscError(
            f"{checkpoints.path(SNAPSHOT)} is torn: a crash came while it was written. "
            "Remove it, and the same command trains from step 0"
        ) from None


def _check_trials(store: Folder | None, config: Config) -> None:
    """Assert that there are trials: what cannot be judged afterwards is not worth training."""
    if store is None or config.train.separation_only:
        return
    catalogue = read_catalogue(store)
    needed = {"valid": config.train.validate_on, "test": config.promote.guarded}
    for split, names in needed.items():
        make_trials(catalogue, split, config.evaluate.trials, config.seed).require(names)


def _fit(
    folder: Folder,
    data: TrainingData,
    config: Config,
    registry: Registry,
    run_id: str,
    num_speakers: int,
) -> ray.train.Checkpoint:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reporter = ray.remote(num_cpus=0, scheduling_strategy=here)(Reporter).remote()
    filesystem, path = arrow_filesystem(folder.uri)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "config": config.model_dump_json(),
            "store": data.store and data.store.uri,
            "dataset": data.dataset.uri,
            "valid": data.valid.uri,
            "folder": folder.uri,
            "num_speakers": num_speakers,
            "reporter": reporter,
        },
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=config.train.retries),
            worker_runtime_env={"env_vars": WORKER_ENV},
        ),
    )
    with (
        progress("steps") as advance,
        _listening(reporter, registry, run_id, posixpath.basename(folder.uri), config, advance),
        _interruptible(),
    ):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            reason = ray.get(reporter.ended_by.remote()) or _cause(error)
            raise CscError(f"training failed: {reason}") from error
        ended_by = ray.get(reporter.ended_by.remote())
        if ended_by:  # of which Ray's next try knew
            raise CscError(f"training failed: {ended_by}")
    if result.checkpoint is None:
        raise CscError(f"training left no checkpoint in {folder.uri}: run again with --fresh")
    return result.checkpoint


def _scaling(config: Config) -> ScalingConfig:
    """Return how many workers there are to be, and what each has of a node."""
    train, needs = config.train, config.ray.workers
    least = train.min_workers if train.elastic else train.workers
    gpus = needs.gpus
    if gpus is None:
        there = gpus_for(ray.nodes(), needs.resources)
        gpus = float(there >= least)
        if there and not gpus:
            say(
                f"{there} GPU(s) are not one for each of {least} workers, which train on CPUs: "
                "set train.workers, or where it is set train.min_workers, lower"
            )
    return ScalingConfig(
        num_workers=(least, train.workers) if train.elastic else train.workers,
        use_gpu=gpus > 0,
        resources_per_worker={"CPU": needs.cpus, **needs.resources}
        | ({"GPU": gpus} if gpus else {}),
        placement_strategy=needs.placement,
        # A group that grows goes back to its last checkpoint: it has had time for one by then.
        elastic_resize_monitor_interval_s=120 * train.checkpoint_minutes,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C end the command as it does elsewhere: Ray Train's handler exits, and stays."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        signal.signal(signal.SIGINT, handler)


def _cause(error: BaseException) -> str:
    """Return the last line of the first worker's error: what a person needs of it."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [line for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


@contextmanager
def _listening(
    reporter: Any, registry: Registry, run_id: str, model: str, config: Config, advance: Advance
) -> Iterator[None]:
    """Show and log what rank 0 reports of a model, in a thread beside the training."""
    over = threading.Event()
    waiting: deque[tuple[int, dict[str, float]]] = deque()

    def hand_on() -> None:
        lines = ray.get(reporter.take.remote())
        for _, metrics in lines:
            telemetry.trained(model, metrics)
        waiting.extend(lines)
        while waiting:
            step, metrics = waiting[0]
            registry.log_metrics(run_id, step, metrics)
            advance(step, config.train.steps, note(metrics))
            waiting.popleft()

    def listen() -> None:
        while not over.wait(POLL_SECONDS):
            with suppress(CscError):  # MLflow is away for a moment: the lines wait
                hand_on()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        telemetry.trained(model, {"step_s": math.nan})  # a gauge stays as it is: no step is taken
    hand_on()


def note(metrics: dict[str, float]) -> str:
    """Return what fits beside the progress bar of a narrow terminal; MLflow has the rest."""
    found = validated(metrics.get("valid_eer"), metrics.get("valid_si_snr_improvement_db"))
    if found:
        return f"valid {found}"
    return (
        f"loss {metrics['total']:.2f}, sep. {metrics['separation_db']:.1f} dB, "
        f"{metrics['audio_seconds_per_s']:.0f} audio-s/s, wait {metrics['data_wait_share']:.0%}"
    )


def validated(eer: float | None, improvement_db: float | None) -> str:
    """Say what a validation found; what it did not measure is None."""
    rate = "" if eer is None else f"EER {eer:.1%}"
    gain = "" if improvement_db is None else f"separation {improvement_db:+.1f} dB"
    return ", ".join(filter(None, (rate, gain)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _copy_best(folder: Folder, checkpoint: ray.train.Checkpoint, names: Sequence[str]) -> State:
    """Copy the best weights out of the last checkpoint, and return how training ended."""
    with checkpoint.as_directory() as path:
        folder.put_json(SPEAKERS_FILE, list(names))
        for file in (TABLE_FILE, WEIGHTS_FILE, CONFIG_FILE):
            folder.put(file, (Path(path) / BEST / file).read_bytes())
        return State.read(Path(path))


def _report_attention(
    folder: Folder, dataset: Folder, config: Config, registry: Registry, run_id: str
) -> None:
    """Plot what attention of the best weights looks at, beside the model and in MLflow."""
    loader = EpisodeLoader(
        dataset,
        "valid",
        batch_size=ATTENTION_EPISODES,  # on the driver, whatever the workers have memory for
        seed=config.seed,
    )
    torch.set_num_threads(config.train.threads)
    with tempfile.TemporaryDirectory(prefix="csc-attention-") as scratch:
        model = CSC.load(local_copy(folder, Path(scratch) / "model"))
        found = attended(model, islice(loader.batches(0), ATTENTION_BATCHES), loader.rooms)
        plots = Path(scratch) / "plots"
        plots.mkdir()
        (plots / ATTENTION_FILE).write_bytes(attention_plot(found))
        folder.put(ATTENTION_FILE, plots / ATTENTION_FILE)
        registry.log_folder(run_id, plots, "plots")
    correlation = found.rank_correlation
    if math.isfinite(correlation):
        registry.log_metrics(
            run_id, config.train.steps, {"attention_rank_correlation": correlation}
        )


def _finish(
    folder: Folder,
    state: State,
    name: str,
    run_id: str,
    data: TrainingData,
    config: Config,
) -> None:
    """Write the index, which makes the model count."""
    dataset = read_dataset(data.dataset).about
    index = {
        "id": name,
        "variant": VARIANT,
        "run": run_id,
        "dataset": dataset["id"],
        "valid_dataset": read_dataset(data.valid).id,
        "store": dataset["store"],
        "speakers": dataset["speakers"],
        "best_step": state.best_step,
        "best_valid_eer": _number(state.best_valid_eer),
        "best_valid_improvement_db": _number(state.best_improvement_db),
        "steps": state.step,
        "torch": torch.__version__,
        "config": config.shown(),
    }
    folder.put_json(INDEX, index)


def local_copy(folder: Folder, to: Path) -> Path:
    """Copy a trained model, with the vectors of its speakers, to a local folder."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in MODEL_FILES:
        (to / file).write_bytes(folder.read(file))
    return to
