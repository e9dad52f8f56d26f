"""Training of one system with one seed, in this process."""

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from csc_model.attention import AttentiveStatistics
from csc_model.config import ModelConfig
from csc_model.contrast import ONE_EQUATION, Comparison, contrast
from csc_model.ecapa import Ecapa
from csc_model.encoder import build_frontend
from csc_model.mel import unit_level
from csc_model.model import CSC
from csc_model.trunk import build_trunk
from jobs.batches import to_episodes
from jobs.config import Config
from jobs.datasets import find_dataset
from jobs.ema import Average
from jobs.finetune import begin_model
from jobs.meter import Meter
from jobs.stepper import Stepper, learning_rate_factor, new_objective
from pipeline.datasets import read_dataset
from pipeline.loader import Batch, EpisodeLoader
from pipeline.storage import Folder

STEPS_PER_LINE = 50
NETWORK_FILE = "network.safetensors"


def train_csc(config: Config, seed: int, before: Path | None, to: Path) -> None:
    """Train one stage of CSC with the step that `csc train` takes."""
    dataset = find_dataset(None, config).folder
    config = config.model_copy(update={"seed": seed})  # that of the data is another
    objective = new_objective(config, len(read_dataset(dataset).about["speakers"]))
    if before is not None:
        begin_model(objective.model, CSC.load(before))
    stepper, spent, meter = Stepper(config, objective), 0.0, Meter()
    for step, batch in enumerate(_batches(dataset, config)):
        began = time.process_time()
        losses, _ = stepper.take(step, batch, meter)
        spent += time.process_time() - began
        _tell(to, step, spent, separation_db=losses.separation_db, nats=losses.contrastive_nats)
    stepper.judged().save(to)
    (to / "cost.json").write_text(json.dumps({"steps": config.train.steps, "core_s": spent}))


class SameTrunk(nn.Module):
    """The trunk of CSC on the mixture as it is, with all its blocks, and CSC's pooling."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = config.shared_blocks + config.separation_blocks
        self.frontend = build_frontend(config)
        self.bottleneck = nn.Sequential(
            nn.GroupNorm(1, self.frontend.num_bins),
            nn.Conv1d(self.frontend.num_bins, config.channels, 1),
        )
        self.trunk = build_trunk(config.model_copy(update={"shared_blocks": blocks}))
        self.pool = AttentiveStatistics(config.channels, config.embedding_dim)

    def forward(self, waveform: Tensor) -> Tensor:
        _, unit = unit_level(waveform)
        magnitude = self.frontend.encode(unit).abs()
        x = self.trunk.split(self.bottleneck(self.frontend.features(magnitude)))
        return self.pool(self.trunk.join(self.trunk.shared(x), magnitude.shape[-1]))


def new_peer(name: str, config: Config) -> nn.Module:
    """Return an untrained plain network."""
    torch.manual_seed(config.seed)
    return SameTrunk(config.model) if name == "same_trunk" else Ecapa.of(config.model)


def train_peer(name: str, config: Config, seed: int, to: Path) -> None:
    """Train a plain network to name the anchor of each mixture."""
    dataset = find_dataset(None, config).folder
    config = config.model_copy(update={"seed": seed})
    speakers = read_dataset(dataset).about["speakers"]
    network, train = new_peer(name, config), config.train
    table = nn.Parameter(torch.randn(len(speakers), config.model.embedding_dim))
    weights = [*network.parameters(), table]
    optimizer = torch.optim.AdamW(
        weights, lr=train.lr, weight_decay=train.weight_decay, betas=(0.9, 0.98), fused=True
    )
    average, spent = Average(network, train.ema_decay), 0.0
    for step, batch in enumerate(_batches(dataset, config)):
        began = time.process_time()
        optimizer.param_groups[0]["lr"] = train.lr * learning_rate_factor(step, train)
        loss = _aam(network, table, batch, config, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, train.clip_norm)
        optimizer.step()
        average.update(network)
        spent += time.process_time() - began
        _tell(to, step, spent, nats=loss.detach())
    network.load_state_dict(average.state)
    to.mkdir(parents=True, exist_ok=True)
    save_model(network, str(to / NETWORK_FILE))
    (to / "cost.json").write_text(json.dumps({"steps": train.steps, "core_s": spent}))


def _aam(network: nn.Module, table: Tensor, batch: Batch, config: Config, step: int) -> Tensor:
    episodes = to_episodes(batch, None, config.seed, step)
    labels = episodes.anchors.repeat_interleave(episodes.mixtures.shape[1])
    vectors = F.normalize(network(episodes.mixtures.flatten(0, 1)), dim=-1)
    right = F.one_hot(labels, len(table)).to(vectors.dtype)
    comparison = Comparison(vectors, F.normalize(table, dim=-1), right, None)
    aam = ONE_EQUATION["aam"].config
    assert aam is not None, "it is for voices"
    return contrast(comparison, vectors.new_tensor(aam.scale), aam).cross_entropy.mean()


def _batches(dataset: Folder, config: Config) -> Iterator[Batch]:
    """Return the batches of all steps."""
    loader = EpisodeLoader(
        dataset,
        "train",
        batch_size=config.train.batch_size,
        seed=config.seed,
        remix=config.train.remix,
    )
    return islice(loader.endless(), config.train.steps)


def _tell(to: Path, step: int, spent: float, **values: Tensor) -> None:
    if step % STEPS_PER_LINE == 0:
        shown = ", ".join(f"{name} {float(value):.2f}" for name, value in values.items())
        print(f"{to.parent.name}/{to.name}: step {step}, {spent:.0f} core-s, {shown}", flush=True)
