"""The training loop of one worker. Ray Train runs it in every process of the group."""

import math
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from csc_model.flops import BACKWARD_FORWARD, forward_flops, peak_flops
from csc_model.model import CSC
from csc_model.objective import Losses, Objective
from jobs.checkpoint import BEST, State
from jobs.config import Config
from jobs.failures import (
    HopelessError,
    broken_episodes,
    is_out_of_memory,
    memory_named,
    no_number,
    out_of_memory,
)
from jobs.finetune import TABLE_FILE, begin_with, save_table, table_of
from jobs.meter import Meter, Work, over_ranks
from jobs.stepper import NoNumberError, Stepper, new_objective
from jobs.system import system_metrics
from jobs.train_config import TrainConfig
from jobs.validation import Found, Validator
from pipeline.datasets import read_dataset
from pipeline.errors import CscError
from pipeline.loader import Batch, EpisodeLoader, audio_seconds
from pipeline.nearby import Nearby
from pipeline.speeds import voices
from pipeline.storage import Folder

STEPS_PER_LINE = 20
SCRATCH = "csc-checkpoint-"
UPLOAD_TIMEOUT_S, UPLOAD_POLL_S = 1200, 0.05
CULPRIT_FIRST_S = 10


class Job(NamedTuple):
    """What a worker is told."""

    config: Config
    store: Folder | None  # None: there are no trials
    dataset: Folder
    valid: Folder  # the dataset of the mixtures that are validated on
    folder: str  # of the run
    num_speakers: int
    reporter: Any  # handle of the actor that the driver listens to

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Job":
        return cls(
            Config.model_validate_json(told["config"]),
            Folder(told["store"]) if told["store"] else None,
            Folder(told["dataset"]),
            Folder(told["valid"]),
            told["folder"],
            told["num_speakers"],
            told["reporter"],
        )


class Worker:
    """One process of the group: its model, data and place in the schedule."""

    def __init__(self, job: Job) -> None:
        config = job.config
        self.job, self.config = job, config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device()
        torch.set_num_threads(config.train.threads)
        objective = new_objective(config, job.num_speakers).to(device)
        if config.train.init_from is not None:
            speakers = read_dataset(job.dataset).about["speakers"]
            begin_with(objective, Folder(job.folder), voices(speakers, config.train.speeds))
        self.train_data = self._loader(job.dataset, "train")
        self.work = self._work(objective) if self.rank == 0 else None  # who reports it
        self.stepper = Stepper(
            config,
            objective,
            self.train_data.rooms,
            rank=self.rank,
            world=self.world,
            share=self.train_data.share,
            wrap=ray.train.torch.prepare_model,
        )
        self.state = State(0, 0, 1.0)
        self.best: dict[str, Tensor] = {}
        self.best_table: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.uploading: Path | None = None
        valid_data = self._loader(job.valid, "valid")
        self.validator = Validator(config, job.store, valid_data, self.rank, self.world)

    def _work(self, objective: Objective) -> Work:
        mixing, train = self.config.build.mixing, self.config.train
        count = partial(forward_flops, objective.model, mixing.num_samples)
        step = BACKWARD_FORWARD * count(separation_only=train.separation_only, views=train.views)
        if train.freeze_separator:  # which is not gone through backwards
            step -= (BACKWARD_FORWARD - 1) * count(separation_only=True)
        if train.task == "extract":  # beside it, one voice is embedded
            step = BACKWARD_FORWARD * count(extraction=True)
            step += count(views=1) - count(separation_only=True)
        mixtures = self.train_data.share.size * mixing.conditions
        return Work(step * mixtures, peak_flops(objective.table.device))

    def _loader(self, dataset: Folder, split: str) -> EpisodeLoader:
        kept, ray_config = None, self.config.ray
        if ray_config.cache_gb:
            kept = Nearby(ray_config.cache_folder, int(1e9 * ray_config.cache_gb))
        return EpisodeLoader(
            dataset,
            split,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            rank=self.rank,
            world=self.world,
            remix=self.config.train.remix and split == "train",
            nearby=kept,
        )

    def resume(self) -> None:
        """Go back to the last checkpoint of this run, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.state = self.stepper.load(Path(folder))
            if (Path(folder) / BEST).exists():
                self.best = CSC.load(Path(folder) / BEST).state_dict()
                self.best_table = load_file(Path(folder) / BEST / TABLE_FILE)

    def run(self) -> None:
        """Train to the last step, with checkpoints and validations at the configured pace."""
        with memory_named("the last checkpoint was loaded", self.config, self.world):
            self.resume()
        if is_over(self.state, self.config.train):
            return
        meter, train = Meter(self.work, self.stepper.device), self.config.train
        for batch in self.train_data.endless(self.state.step):
            meter.passed("data_wait")
            losses, grad_norm = self._step(batch, meter)
            seconds = audio_seconds(batch) * train.batch_size / self.train_data.share.size
            meter.stepped(losses, grad_norm, self.stepper.learning_rate, seconds)
            self.state = self.state._replace(step=self.state.step + 1)
            due = self.state.step % train.validate_every == 0 or self.state.step == train.steps
            if due or self.state.step % STEPS_PER_LINE == 0:
                line = meter.line()
                meter = Meter(self.work, self.stepper.device)  # to tell takes time of its own
                line = over_ranks(line, self.stepper.device)
                self.tell(line | system_metrics(self.stepper.device))
                meter.passed("report")
            if due:
                self.validate()
                meter = Meter(self.work, self.stepper.device)
                if is_over(self.state, train):
                    return
            else:
                if self._save_is_due():
                    self._report({})
                meter.passed("checkpoint")

    def _save_is_due(self) -> bool:
        """Ask rank 0's clock, now and then, so that all ranks save at the same step."""
        if self.state.step % STEPS_PER_LINE:
            return False
        due = time.monotonic() - self.saved_at > 60 * self.config.train.checkpoint_minutes
        answer = torch.tensor([due], dtype=torch.int32, device=self.stepper.device)
        if self.world > 1:
            dist.broadcast(answer, 0)
        return bool(answer.item())

    def _step(self, batch: Batch, meter: Meter) -> tuple[Losses, float]:
        """Take a step; what would fail again is said once, and ends the run."""
        step = self.state.step
        try:
            return self.stepper.take(step, batch, meter)
        except NoNumberError as error:
            train = self.config.train  # of a batch compared over ranks, one spoils all losses
            shared = train.learns_voices and train.contrast.set == "batch"
            named = (error.own_loss and not shared) or bool(broken_episodes(batch))
            if self.world > 1 and not named:
                time.sleep(CULPRIT_FIRST_S)  # the rank that can name what is broken speaks first
            raise no_number(error, step, self.rank, batch, Folder(self.job.folder)) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            share = self.train_data.share.size
            raise out_of_memory(step, self.config, share, self.world) from None

    def tell(self, metrics: dict[str, float]) -> None:
        """Send metrics of this step to the driver: rank 0 does."""
        if self.rank == 0:
            self.job.reporter.put.remote(self.state.step, metrics)

    def validate(self) -> None:
        """Measure, keep the best weights and hand Ray Train a checkpoint; all ranks take part."""
        model = self.stepper.judged()
        if self.world > 1:
            for buffer in model.buffers():  # running statistics are a rank's own until then
                dist.broadcast(buffer, 0)
        with memory_named(f"step {self.state.step} was validated", self.config, self.world):
            found = self.validator.measure(model)
        if not self.best or is_better(found, self.state):
            self.state = self.state._replace(
                best_step=self.state.step,
                best_valid_eer=found.eer,
                best_improvement_db=found.improvement_db,
            )
            weights = model.state_dict()
            self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
            self.best_table = table_of(self.stepper.objective)
        metrics = {
            "valid_eer": found.eer,
            "valid_si_snr_improvement_db": found.improvement_db,
        }
        known = {name: value for name, value in metrics.items() if not math.isnan(value)}
        if known:
            self.tell(known)
        self._report(metrics)

    def _report(self, metrics: dict[str, float]) -> None:
        """Hand Ray Train a checkpoint, which it uploads while training goes on."""
        self.saved_at = time.monotonic()
        if self.rank:
            ray.train.report(metrics)
            return
        self._await_upload()
        folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
        try:
            self.stepper.save(folder, self.state)
            if self.best:
                best = CSC(self.config.model)
                best.load_state_dict(self.best)
                best.save(folder / BEST)
                save_table(folder / BEST, self.best_table)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        self.uploading = folder

    def _await_upload(self) -> None:
        """Let no more than one checkpoint wait for a slow store: each is as large as the model."""
        until = time.monotonic() + UPLOAD_TIMEOUT_S
        while self.uploading is not None and self.uploading.exists():
            if time.monotonic() > until:
                raise CscError(
                    f"{self.uploading} was not uploaded, or not removed after it, in "
                    f"{UPLOAD_TIMEOUT_S} s: see to the network, or the store of the workspace; the "
                    "same command goes on from the checkpoint before"
                )
            time.sleep(UPLOAD_POLL_S)


def is_over(state: State, train: TrainConfig) -> bool:
    """Tell whether all steps are taken, or validation is no better for as long as is waited."""
    patience = train.early_stop * train.validate_every
    waited = bool(patience) and state.step - state.best_step >= patience
    return state.step >= train.steps or waited


def is_better(found: Found, best: State) -> bool:
    """Compare error rates, or what separation gains where there are none.

    Where no mixture says what that is, the last is the best.
    """
    if math.isnan(found.eer):
        return not found.improvement_db <= best.best_improvement_db
    return found.eer < best.best_valid_eer


def sweep_scratch() -> None:
    """Remove what killed workers of this machine left of checkpoints."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def train_loop(told: dict[str, Any]) -> None:
    """Train as told: what Ray Train calls in each worker, and again where one of them failed.

    Raises:
        HopelessError: told to the driver, for whom it is the end: Ray's next try does nothing.
    """
    job = Job.read(told)
    if ray.get(job.reporter.ended_by.remote()):
        return  # an error would have Ray try again, with train.retries=-1 for ever
    sweep_scratch()
    try:
        world = ray.train.get_context().get_world_size()
        with memory_named("the model was set up", job.config, world):
            worker = Worker(job)
        worker.run()
    except HopelessError as error:
        ray.get(job.reporter.end.remote(str(error)))
        raise
