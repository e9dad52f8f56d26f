"""One optimizer step: model, losses, optimizer and schedule on one device, without Ray.

Step t is a function of (seed, t) and, for what ranks draw for themselves, of their number: all is
drawn from these, so whoever goes on from a checkpoint needs no generator state.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from csc_model.extraction import ExtractionObjective
from csc_model.model import CSC
from csc_model.objective import LARGEST, Episodes, Losses, Objective
from jobs.batches import parts, to_episodes
from jobs.checkpoint import State, load_training, save_training
from jobs.config import Config
from jobs.ema import Average
from jobs.meter import Meter
from jobs.schedules import factor
from jobs.train_config import TrainConfig
from pipeline.draws import stream_key
from pipeline.errors import CscError
from pipeline.loader import Batch
from pipeline.order import Share


class NoNumberError(CscError):
    """The loss, or its gradient, is no number."""

    own_loss = True
    """Whether this rank's loss is none: if not, the gradient may have come from another rank."""

    @classmethod
    def of(cls, losses: Losses, grad_norm: float) -> Self:
        terms = ", ".join(f"{key} {float(value):.4g}" for key, value in losses._asdict().items())
        error = cls(
            f"the loss or its gradient is no number (gradient norm {grad_norm:.4g}; {terms})"
        )
        error.own_loss = not math.isfinite(float(losses.total))
        return error


def new_model(config: Config) -> CSC:
    """Return the untrained model of a run, the same wherever it is made."""
    torch.manual_seed(config.seed)
    return CSC(config.model)


def new_objective(config: Config, num_speakers: int) -> Objective:
    """Return the untrained model with its losses; each further speed is as many speakers more."""
    train = config.train
    kind: Callable[..., Objective] = Objective
    if train.task == "extract":
        kind = partial(
            ExtractionObjective,
            extraction_loss=train.extraction_loss,
            others_share=train.extraction_others,
        )
    return kind(
        new_model(config),
        num_speakers * (1 + len(train.speeds)),
        separation_weight=train.separation_weight,
        spread_weight=train.spread_weight,
        activity_weight=train.activity_weight,
        contrast=train.contrast,
        balance=train.balance,
        separation_only=train.separation_only,
        freeze_separator=train.freeze_separator,
        views=train.views,
        attend=train.attend,
        mixit=train.mixit,
    )


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


class Stepper:
    """What is trained, on one device of one rank.

    `share` says which episodes of a global batch are this rank's: without it, all. `wrap` makes of
    the objective what exchanges gradients with the other ranks.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        bank: Tensor | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        share: Share | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config, self.objective, self.rank, self.world = config, objective, rank, world
        self.share = share
        self.device = objective.table.device
        self.bf16 = config.train.precision == "bf16"
        if config.train.precision == "auto" and self.device.type == "cuda":
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.bank = None if bank is None else bank.to(self.device)
        self.average: Average | None = None
        if config.train.ema_decay:
            self.average = Average(objective.model, config.train.ema_decay)
        if config.train.compile and config.train.separation_only:
            objective.model.sources = torch.compile(objective.model.sources)  # type: ignore[method-assign]
        elif config.train.compile and config.train.task == "extract":
            objective.model.extractor.compile()
        elif config.train.compile:  # the losses are small, and gather over ranks
            objective.model.compile()
        self.wrapped: Any = wrap(objective)
        self.optimizer = build_optimizer(objective, config.train)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learning_rate(self) -> float:
        """The rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self, folder: Path, state: State) -> None:
        """Write a checkpoint of training that stands at `state`."""
        save_training(folder, self.objective, self.optimizer, state, self.average)

    def load(self, folder: Path) -> State:
        """Go back to a checkpoint, and return where training stood."""
        return load_training(folder, self.objective, self.optimizer, self.average)

    def judged(self) -> CSC:
        """Return the model to validate and keep: of the averaged weights, where there are any."""
        if self.average is None:
            return self.objective.model
        model = CSC(self.config.model).to(self.device)
        model.load_state_dict(self.average.state)
        return model

    def take(self, step: int, batch: Batch, meter: Meter) -> tuple[Losses, float]:
        """Take one optimizer step on this rank's share of a global batch.

        Returns the losses and the norm of the gradient before it is clipped.

        Raises:
            NoNumberError: the loss or its gradient is no number; no weight has changed.
        """
        train = self.config.train
        torch.manual_seed(stream_key(self.config.seed, "dropout", step, self.rank) % 2**63)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = base * learning_rate_factor(step, train)
        ramp = min(1.0, step / train.contrastive_ramp_steps) if train.contrastive_ramp_steps else 1
        moved = batch.to(self.device)
        episodes = to_episodes(
            moved,
            self.bank,
            self.config.seed,
            step,
            self.share,
            train.speeds,
            self.objective.num_speakers // (1 + len(train.speeds)),
        )
        if not batch.mixit.any():  # on the host, where asking costs nothing
            episodes = episodes._replace(mixit=None)
        self.optimizer.zero_grad()
        made = [
            self._backward(part, train.contrastive_weight * ramp, place == train.accumulate, meter)
            for place, part in enumerate(parts(episodes, train.accumulate), start=1)
        ]
        losses = _of_all(made)
        grad_norm = float(nn.utils.clip_grad_norm_(self.objective.parameters(), train.clip_norm))
        if not math.isfinite(grad_norm) or not math.isfinite(float(losses.total)):
            raise NoNumberError.of(losses, grad_norm)
        meter.exchanged(self.wrapped)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.objective.model)
        meter.passed("optimizer")
        return losses, grad_norm

    def _backward(
        self, episodes: Episodes, contrastive_weight: float, last: bool, meter: Meter
    ) -> Losses:
        """Add the gradient of a part of the batch; ranks exchange theirs with the last one."""
        quiet: AbstractContextManager[Any] = nullcontext()
        if not last and self.world > 1:
            quiet = self.wrapped.no_sync()
        with quiet, meter.watching(self.wrapped):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                losses = self.wrapped(episodes, contrastive_weight)
            meter.passed("forward")
            (losses.total / self.config.train.accumulate).backward()
            meter.passed("backward")
        return Losses(*(term.detach() for term in losses))


def _of_all(made: Sequence[Losses]) -> Losses:
    """Return the losses of a batch from those of its parts."""
    found = {}
    for name, terms in zip(Losses._fields, zip(*made, strict=True), strict=True):
        stacked = torch.stack(terms)
        found[name] = stacked.amax() if name in LARGEST else stacked.mean()
    return Losses(**found)
