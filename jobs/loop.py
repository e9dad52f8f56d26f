"""The training loop of one worker. Ray Train runs it in every process of the group.

Step t is a function of (seed, t): batch, attention masks and dropout are drawn from it, so a
resumed run needs no generator state and goes on where the checkpoint was made.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from csc_model.attention import draw_allowed
from csc_model.model import CSC
from csc_model.objective import Episodes, Losses, Objective
from jobs.checkpoint import BEST, State, load_training, save_training
from jobs.config import Config, TrainConfig
from jobs.validation import Validator
from pipeline.draws import stream_key
from pipeline.loader import Batch, EpisodeLoader, audio_seconds
from pipeline.render import render
from pipeline.storage import Folder

STEPS_PER_LINE = 20


def new_model(config: Config) -> CSC:
    """Return the untrained model of a run, the same wherever it is made."""
    torch.manual_seed(config.seed)
    return CSC(config.model)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return warm-up and linear decay to zero at the last step, over the base rate."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return warm * (1 - step / config.steps)


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
    )


def to_episodes(
    batch: Batch, bank: Tensor | None, seed: int, step: int, rank: int, world: int
) -> Episodes:
    """Render a batch on its device and draw this rank's share of the global attention masks.

    Nobody attends to a mixture that lacks the anchor, unless nothing else is left.
    """
    rendered = render(batch.sources, batch.gains_db, batch.rooms, bank)
    share, conditions = batch.speakers.shape[:2]
    generator = torch.Generator().manual_seed(stream_key(seed, "attention", step) % 2**63)
    allowed = draw_allowed(share * world, conditions, generator)[rank * share : (rank + 1) * share]
    heard = (batch.speakers[:, :, 0] >= 0).unsqueeze(1)
    itself = torch.eye(conditions, dtype=torch.bool, device=heard.device)
    allowed = allowed.to(heard.device) & heard
    allowed |= itself & ~allowed.any(-1, keepdim=True)
    return Episodes(rendered.mixtures, rendered.references, batch.speakers, batch.anchors, allowed)


class Job(NamedTuple):
    """What a worker is told."""

    config: Config
    store: Folder
    dataset: Folder
    num_speakers: int
    reporter: Any  # handle of the actor that the driver listens to

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Job":
        return cls(
            Config.model_validate_json(told["config"]),
            Folder(told["store"]),
            Folder(told["dataset"]),
            told["num_speakers"],
            told["reporter"],
        )


class Meter:
    """Means of the losses since the last validation, and where the time went."""

    def __init__(self) -> None:
        self.began = self.mark = time.perf_counter()
        self.waited = self.seconds = 0.0
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def loaded(self) -> None:
        """Call when a batch has come: the time since the last step was spent waiting for it."""
        self.waited += time.perf_counter() - self.mark

    def stepped(self, losses: Losses, grad_norm: Tensor, seconds: float) -> None:
        """Count a step over `seconds` of audio, on all ranks together."""
        for name, value in {**losses._asdict(), "grad_norm": grad_norm}.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        self.mark = time.perf_counter()

    def line(self) -> dict[str, float]:
        """Return what is logged."""
        spent = self.mark - self.began
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        speed = {
            "audio_seconds_per_s": self.seconds / spent,
            "data_wait_share": self.waited / spent,
        }
        return means | speed


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
        ).to(self.device)
        self.wrapped = ray.train.torch.prepare_model(self.objective)
        self.optimizer = build_optimizer(self.objective, config.train)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.state = State(0, 0, 1.0)
        self.best: dict[str, Tensor] = {}
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
            self.state = load_training(Path(folder), self.objective, self.optimizer)
            self.best = CSC.load(Path(folder) / BEST).state_dict()

    def run(self) -> None:
        """Train to the last step, with a checkpoint and a validation at the configured pace."""
        self.resume()
        meter, last = Meter(), self.config.train.steps
        while self.state.step < last:
            epoch, first = divmod(self.state.step, self.train_data.steps_per_epoch)
            for batch in self.train_data.batches(epoch, first):
                meter.loaded()
                losses, grad_norm = self.step(batch)
                meter.stepped(losses, grad_norm, audio_seconds(batch) * self.world)
                self.state = self.state._replace(step=self.state.step + 1)
                due = self.state.step % self.config.train.validate_every == 0
                if due or self.state.step % STEPS_PER_LINE == 0 or self.state.step == last:
                    self.tell(meter.line())
                if due or self.state.step == last:
                    self.validate()
                    meter = Meter()
                if self.state.step == last:
                    break

    def step(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Take one optimizer step on this rank's share of a global batch."""
        step, train = self.state.step, self.config.train
        torch.manual_seed(stream_key(self.config.seed, "dropout", step, self.rank) % 2**63)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * learning_rate_factor(step, train)
        ramp = min(1.0, step / train.contrastive_ramp_steps) if train.contrastive_ramp_steps else 1
        episodes = to_episodes(
            batch.to(self.device), self.bank, self.config.seed, step, self.rank, self.world
        )
        losses = self.wrapped(episodes, train.contrastive_weight * ramp)
        self.optimizer.zero_grad()
        losses.total.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.objective.parameters(), train.clip_norm)
        self.optimizer.step()
        return Losses(*(term.detach() for term in losses)), grad_norm

    def tell(self, metrics: dict[str, float]) -> None:
        """Send metrics of this step to the driver: rank 0 does, so losses are of its share."""
        if self.rank == 0:
            self.job.reporter.put.remote(self.state.step, metrics)

    def validate(self) -> None:
        """Measure, keep the best weights and hand Ray Train a checkpoint; all ranks take part."""
        valid_eer, improvement_db = self.validator.measure(self.objective.model)
        if not self.best or valid_eer < self.state.best_valid_eer:
            self.state = self.state._replace(best_step=self.state.step, best_valid_eer=valid_eer)
            weights = self.objective.model.state_dict()
            self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
        metrics = {"valid_eer": valid_eer, "valid_si_snr_improvement_db": improvement_db}
        self.tell(metrics)
        self._report(metrics)

    def _report(self, metrics: dict[str, float]) -> None:
        if self.rank:
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="csc-checkpoint-"))
        try:
            save_training(folder, self.objective, self.optimizer, self.state)
            best = CSC(self.config.model)
            best.load_state_dict(self.best)
            best.save(folder / BEST)
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
            ray.train.report(metrics, checkpoint=checkpoint)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def train_loop(told: dict[str, Any]) -> None:
    """Train as told: what Ray Train calls in each worker."""
    Worker(Job.read(told)).run()
