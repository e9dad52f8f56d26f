"""Scores of trained systems on valid and test, and the table that is made of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_model
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from csc_model import metrics
from csc_model.mfcc import mfcc_statistics
from csc_model.model import CSC
from jobs.config import Config
from jobs.datasets import find_dataset
from jobs.scoring import Embed, Samples, embed_with, improvement_db, score, scored
from pipeline.loader import EpisodeLoader
from pipeline.render import render
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.shards import read_catalogue
from pipeline.sides import Side, TrialAudio, from_store
from pipeline.trials import CLEAN, Trials, make_trials
from tests.benchmarks.campaign.training import NETWORK_FILE, new_peer

SPLITS = ("valid", "test")
LDA_DIMENSIONS = 39
Scores = dict[str, NDArray[np.float64]]
"""By condition, `(trial,)`."""


class Judge(NamedTuple):
    """The trials of a split, ready to be scored."""

    config: Config
    trials: Trials
    audio: TrialAudio

    @classmethod
    def of(cls, config: Config, split: str) -> "Judge":
        store = find_dataset(None, config).store
        assert store is not None, "prepare builds both from one store"
        trials = make_trials(read_catalogue(store), split, config.evaluate.trials, config.seed)
        return cls(config, trials, TrialAudio(from_store(store), trials))

    def sides(self, condition: str) -> Iterator[Side]:
        """Render all test sides under a condition."""
        for place in range(len(self.trials.utterances)):
            yield self.audio.side(place, condition)

    def scores(self, embed: Embed) -> Scores:
        """Score as `csc evaluate` does."""
        views = {
            name: np.stack([embed(side.mixture) for side in self.sides(name)])
            for name in self.trials.conditions
        }
        return {name: score(views[name], views[CLEAN], self.trials) for name in views}

    @torch.inference_mode()
    def improvement_db(self, model: CSC) -> float:
        """Return the mean gain in SI-SNR over both voices at 0 dB."""
        gains = []
        for side in self.sides("sir_0_db"):
            mixture = torch.from_numpy(side.mixture)[None]
            references = torch.from_numpy(side.voices[None, : model.config.num_slots])
            gains.append(float(improvement_db(model.sources(mixture), mixture, references)))
        return float(np.mean(gains))


def csc_embed(folder: Path) -> tuple[Embed, CSC]:
    model = CSC.load(folder)
    return embed_with(model), model


def peer_embed(name: str, config: Config, folder: Path) -> Embed:
    """Return the embedding function of a plain network: one view."""
    network = new_peer(name, config).eval()
    load_model(network, str(folder / NETWORK_FILE))

    @torch.inference_mode()
    def embed(samples: Samples) -> NDArray[np.float32]:
        vector = network(torch.from_numpy(samples)[None])
        return torch.nn.functional.normalize(vector, dim=-1).numpy()

    return embed


def lda_embed(config: Config) -> Embed:
    """Fit LDA on MFCC statistics of one epoch of mixtures, labelled by their anchors."""
    loader = EpisodeLoader(
        find_dataset(None, config).folder,
        "train",
        batch_size=config.train.batch_size,
        seed=config.seed,
        remix=True,
    )
    features, labels = [], []
    for batch in loader.batches(0):
        rendered = render(batch.sources, batch.gains_db)
        for mixture in rendered.mixtures.flatten(0, 1).numpy():
            features.append(mfcc_statistics(mixture, SAMPLE_RATE_HZ))
        labels += batch.anchors.repeat_interleave(rendered.mixtures.shape[1]).tolist()
    model = LinearDiscriminantAnalysis(
        solver="eigen", shrinkage="auto", n_components=LDA_DIMENSIONS
    )
    model.fit(np.stack(features), labels)

    def embed(samples: Samples) -> NDArray[np.float32]:
        vector = model.transform(mfcc_statistics(samples, SAMPLE_RATE_HZ)[None])
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    return embed


def write_scores(to: Path, split: str, scores: Scores, about: dict[str, float]) -> None:
    """Keep the scores of a system; the description last, which makes them count."""
    save_file(scores, to / f"{split}.safetensors")
    (to / f"{split}.json").write_text(json.dumps(about))


def table(root: Path, judges: dict[str, Judge], replicates: int, against: str) -> str:
    """Return error rates in per cent, the mean over seeds, with intervals over speakers.

    Beside each, in brackets, is the 95 % interval; the ratio is to the same mean of `against`.
    """
    conditions = next(iter(judges.values())).trials.conditions
    names = " | ".join(conditions)
    lines = [f"| system | seeds | core-s | split | {names} | SI-SNRi at 0 dB |"]
    lines.append("|---" * (5 + len(conditions)) + "|")
    systems = sorted({path.parent.parent for path in root.glob("*/*/test.json")})
    for split, judge in judges.items():
        count = len(set(judge.trials.speakers))
        draws = metrics.draw_speakers(count, replicates, judge.config.seed)
        peer = replicated(root / against, split, judge, draws)
        for system in systems:
            found = replicated(system, split, judge, draws)
            lines.append(_row(system, split, found, None if system.name == against else peer))
    return "\n".join(lines)


class Replicated(NamedTuple):
    """Error rates `(condition,)` and their replicates `(condition, replicate)`, over seeds."""

    rates: NDArray[np.float64]
    replicates: NDArray[np.float64]
    seeds: int


def replicated(
    system: Path, split: str, judge: Judge, draws: NDArray[np.int64]
) -> Replicated | None:
    """Return the error rates of a system, or None where it has not been scored."""
    files = sorted(system.glob(f"*/{split}.safetensors"))
    if not files:
        return None
    rates, replicates = [], []
    for file in files:
        scores = load_file(file)
        values = [scores[name] for name in judge.trials.conditions]
        rates.append([metrics.eer(one, judge.trials.target) for one in values])
        replicates.append(
            [metrics.eer_replicates(scored(judge.trials, one), draws) for one in values]
        )
    return Replicated(np.mean(rates, 0), np.mean(replicates, 0), len(files))


def _row(system: Path, split: str, found: Replicated | None, peer: Replicated | None) -> str:
    if found is None:
        return f"| {system.name} | 0 | | {split} |"
    about = [json.loads(path.read_text()) for path in sorted(system.glob(f"*/{split}.json"))]
    cells = []
    for condition, (rate, replicates) in enumerate(zip(found.rates, found.replicates, strict=True)):
        known = metrics.interval(float(rate), replicates)
        cell = f"{100 * known.value:.1f} [{100 * known.low:.1f}, {100 * known.high:.1f}]"
        if peer is not None:
            ratio = replicates / peer.replicates[condition]
            between = metrics.interval(float(rate / peer.rates[condition]), ratio)
            cell += f" x{between.value:.2f} [{between.low:.2f}, {between.high:.2f}]"
        cells.append(cell)
    gains = [one["improvement_db"] for one in about if "improvement_db" in one]
    gain = f"{np.mean(gains):+.1f} dB" if gains else ""
    cost = np.mean([one["core_s"] for one in about])
    return (
        f"| {system.name} | {found.seeds} | {cost:.0f} | {split} | {' | '.join(cells)} | {gain} |"
    )
