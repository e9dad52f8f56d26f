"""The training loop of one worker. Ray Train runs it in every process of the group.

Step t is a function of (seed, t): batch, attention masks and dropout are drawn from it, so a
resumed run needs no generator state and goes on where the checkpoint was made.
"""

import math
import shutil
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csc_model.model import CSC
from csc_model.objective import Episodes, Losses, Objective
from jobs.batches import parts, to_episodes
from jobs.checkpoint import BEST, State, load_training, save_training
from jobs.config import Config, TrainConfig
from jobs.ema import Average
from jobs.finetune import TABLE_FILE, begin_with, save_table, table_of
from jobs.meter import Meter
from jobs.schedules import factor
from jobs.validation import Validator
from pipeline.datasets import read_dataset
from pipeline.draws import stream_key
from pipeline.errors import CscError
from pipeline.loader import Batch, EpisodeLoader, audio_seconds
from pipeline.storage import Folder

STEPS_PER_LINE = 20


def new_model(config: Config) -> CSC:
    """Return the untrained model of a run, the same wherever it is made."""
    torch.manual_seed(config.seed)
    return CSC(config.model)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the rate of a step over the base rate."""
    return factor(
        step,
        steps=config.steps,
        warmup_steps=config.warmup_steps,
        shape="refined" if config.refined else config.schedule,
        refined=config.refined,
    )


def build_optimizer(objective: Objective, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW; the speaker table has a rate of its own and no weight decay."""
    return torch.optim.AdamW(
        [
            {"params": list(objective.model.parameters()), "weight_decay": config.weight_decay},
            {
                "params": [objective.table, objective.raw_scale],
                "lr": config.lr * config.table_lr_scale,
                "weight_decay": 0.0,
            },
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
        fused=True,
    )


class Job(NamedTuple):
    """What a worker is told."""

    config: Config
    store: Folder
    dataset: Folder
    folder: str  # of the run
    num_speakers: int
    reporter: Any  # handle of the actor that the driver listens to

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Job":
        return cls(
            Config.model_validate_json(told["config"]),
            Folder(told["store"]),
            Folder(told["dataset"]),
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
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(config.train.threads)
        self.objective = Objective(
            new_model(config),
            job.num_speakers,
            separation_weight=config.train.separation_weight,
            spread_weight=config.train.spread_weight,
            activity_weight=config.train.activity_weight,
            contrast=config.train.contrast,
            balance=config.train.balance,
        ).to(self.device)
        if config.train.init_from is not None:
            speakers = read_dataset(job.dataset).about["speakers"]
            begin_with(self.objective, Folder(job.folder), speakers)
        self.average: Average | None = None
        if config.train.ema_decay:
            self.average = Average(self.objective.model, config.train.ema_decay)
        if config.train.compile:  # the losses are small, and gather over ranks
            self.objective.model.compile()
        self.wrapped = ray.train.torch.prepare_model(self.objective)
        self.optimizer = build_optimizer(self.objective, config.train)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.state = State(0, 0, 1.0)
        self.best: dict[str, Tensor] = {}
        self.best_table: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.train_data = self._loader("train")
        bank = self.train_data.rooms
        self.bank = None if bank is None else bank.to(self.device)
        self.validator = Validator(config, job.store, self._loader("valid"), self.rank, self.world)

    def _loader(self, split: str) -> EpisodeLoader:
        return EpisodeLoader(
            self.job.dataset,
            split,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            rank=self.rank,
            world=self.world,
            remix=self.config.train.remix and split == "train",
        )

    def resume(self) -> None:
        """Go back to the last checkpoint of this run, if it has one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.state = load_training(Path(folder), self.objective, self.optimizer, self.average)
            if (Path(folder) / BEST).exists():
                self.best = CSC.load(Path(folder) / BEST).state_dict()
                self.best_table = load_file(Path(folder) / BEST / TABLE_FILE)

    def run(self) -> None:
        """Train to the last step, with checkpoints and validations at the configured pace."""
        self.resume()
        meter, train = Meter(), self.config.train
        while self.state.step < train.steps and not self._is_over():
            epoch, first = divmod(self.state.step, self.train_data.steps_per_epoch)
            for batch in self.train_data.batches(epoch, first):
                meter.passed("data_wait")
                losses, grad_norm = self.step(batch, meter)
                rate = self.optimizer.param_groups[0]["lr"]
                meter.stepped(losses, grad_norm, rate, audio_seconds(batch) * self.world)
                self.state = self.state._replace(step=self.state.step + 1)
                last = self.state.step == train.steps
                due = self.state.step % train.validate_every == 0 or last
                if due or self.state.step % STEPS_PER_LINE == 0:
                    self.tell(meter.line())
                    meter = Meter()
                if due:
                    self.validate()
                    meter = Meter()
                    if last or self._is_over():
                        break
                elif self._save_is_due():
                    self._report({})
                    meter.passed("checkpoint")

    def _is_over(self) -> bool:
        """Tell whether validation has not become better for as long as is waited for that."""
        patience = self.config.train.early_stop * self.config.train.validate_every
        return bool(patience) and self.state.step - self.state.best_step >= patience

    def _save_is_due(self) -> bool:
        """Ask rank 0's clock, now and then, so that all ranks save at the same step."""
        if self.state.step % STEPS_PER_LINE:
            return False
        due = time.monotonic() - self.saved_at > 60 * self.config.train.checkpoint_minutes
        answer = torch.tensor([due], dtype=torch.int32, device=self.device)
        if self.world > 1:
            dist.broadcast(answer, 0)
        return bool(answer.item())

    def step(self, batch: Batch, meter: Meter) -> tuple[Losses, float]:
        """Take one optimizer step on this rank's share of a global batch.

        Raises:
            CscError: the loss or its gradient is no number; the batch was saved.
        """
        step, train = self.state.step, self.config.train
        torch.manual_seed(stream_key(self.config.seed, "dropout", step, self.rank) % 2**63)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * learning_rate_factor(step, train)
        ramp = min(1.0, step / train.contrastive_ramp_steps) if train.contrastive_ramp_steps else 1
        moved = batch.to(self.device)
        episodes = to_episodes(moved, self.bank, self.config.seed, step, self.rank, self.world)
        if not batch.mixit.any():  # on the host, where asking costs nothing
            episodes = episodes._replace(mixit=None)
        self.optimizer.zero_grad()
        made = [
            self._backward(part, train.contrastive_weight * ramp, place == train.accumulate, meter)
            for place, part in enumerate(parts(episodes, train.accumulate), start=1)
        ]
        losses = Losses(*(torch.stack(terms).mean() for terms in zip(*made, strict=True)))
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), train.clip_norm)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm) or not math.isfinite(float(losses.total)):
            raise CscError(self._not_a_number(batch, losses, grad_norm))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.objective.model)
        meter.passed("optimizer")
        return losses, grad_norm

    def _backward(
        self, episodes: Episodes, contrastive_weight: float, last: bool, meter: Meter
    ) -> Losses:
        """Add the gradient of a part of the batch; ranks exchange theirs with the last one."""
        bf16 = self.config.train.precision == "bf16"
        bf16 |= self.config.train.precision == "auto" and self.device.type == "cuda"
        quiet: AbstractContextManager[Any] = nullcontext()
        if not last and self.world > 1:
            quiet = self.wrapped.no_sync()
        with quiet:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                losses = self.wrapped(episodes, contrastive_weight)
            meter.passed("forward")
            (losses.total / self.config.train.accumulate).backward()
            meter.passed("backward")
        return Losses(*(term.detach() for term in losses))

    def _not_a_number(self, batch: Batch, losses: Losses, grad_norm: float) -> str:
        """Save the batch of this rank beside the run, and say what happened."""
        name = f"not-a-number-step-{self.state.step}-rank-{self.rank}.safetensors"
        folder = Folder(self.job.folder)
        with folder.scratch() as scratch:
            tensors = {name: tensor.contiguous() for name, tensor in batch._asdict().items()}
            save_file(tensors, scratch / name)
            folder.put(name, scratch / name)
        terms = ", ".join(f"{key} {float(value):.4g}" for key, value in losses._asdict().items())
        return (
            f"step {self.state.step}: the loss or its gradient is no number (gradient norm "
            f"{grad_norm:.4g}; {terms}); the batch is in {folder.path(name)}; set train.lr or "
            "train.clip_norm lower, or train.precision=fp32: that is another run, which begins at "
            "step 0, or with train.init_from at what an earlier one has come to"
        )

    def tell(self, metrics: dict[str, float]) -> None:
        """Send metrics of this step to the driver: rank 0 does, so losses are of its share."""
        if self.rank == 0:
            self.job.reporter.put.remote(self.state.step, metrics)

    def validate(self) -> None:
        """Measure, keep the best weights and hand Ray Train a checkpoint; all ranks take part."""
        model = self.objective.model
        if self.average is not None:
            model = CSC(self.config.model).to(self.device)
            model.load_state_dict(self.average.state)
        valid_eer, improvement_db = self.validator.measure(model)
        if not self.best or valid_eer < self.state.best_valid_eer:
            self.state = self.state._replace(best_step=self.state.step, best_valid_eer=valid_eer)
            weights = model.state_dict()
            self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
            self.best_table = table_of(self.objective)
        metrics = {"valid_eer": valid_eer, "valid_si_snr_improvement_db": improvement_db}
        self.tell(metrics)
        self._report(metrics)

    def _report(self, metrics: dict[str, float]) -> None:
        """Hand Ray Train a checkpoint, which it uploads while training goes on."""
        self.saved_at = time.monotonic()
        if self.rank:
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="csc-checkpoint-"))
        try:
            save_training(folder, self.objective, self.optimizer, self.state, self.average)
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


def train_loop(told: dict[str, Any]) -> None:
    """Train as told: what Ray Train calls in each worker."""
    Worker(Job.read(told)).run()
