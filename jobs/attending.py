"""What attention over conditions does: does it look at the cleaner ones?

For every condition of an episode, as a query, this is how much weight each condition gets, beside
how clean that one is: the target's power over all else in the mixture.
"""

import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from csc_model.losses import best_permutation, pairwise_separation_loss
from csc_model.model import CSC
from csc_model.objective import in_order
from pipeline.loader import Batch
from pipeline.render import render

BINS = 8
SILENT = 1e-12


class Attended(NamedTuple):
    """Pairs of a query and a condition that it attends to."""

    cleaner_db: NDArray[np.float64]  # (pair,), of the condition over the mean of its episode
    weight: NDArray[np.float64]  # (pair,), over an even share, mean over heads
    itself: NDArray[np.bool_]  # (pair,), the condition is the query

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of weight and cleanness over pairs of different conditions; nan for none."""
        others = ~self.itself
        if len(np.unique(self.cleaner_db[others])) < 2:
            return float("nan")
        return float(spearmanr(self.cleaner_db[others], self.weight[others]).statistic)


@torch.inference_mode()
def attended(model: CSC, batches: Iterable[Batch], bank: Tensor | None) -> Attended:
    """Read the weights of episodes whose target is in every condition; all may see all."""
    device = next(model.parameters()).device
    pairs = [_pairs(model, batch.to(device), bank) for batch in batches]
    return Attended(*(np.concatenate(column) for column in zip(*pairs, strict=True)))


def _pairs(model: CSC, batch: Batch, bank: Tensor | None) -> Attended:
    rendered = render(batch.sources, batch.gains_db, batch.rooms, bank)
    mixtures, references = (part.flatten(0, 1) for part in rendered)
    output = model(mixtures)
    _, assignment = best_permutation(pairwise_separation_loss(output.sources, references))
    anchors = in_order(output.embeddings, assignment)[:, 0].unflatten(0, batch.speakers.shape[:2])
    weights = model.attention.weights(anchors).weights.mean(1)  # (episode, query, condition)
    target = rendered.references[:, :, 0]
    rest = (rendered.mixtures - target).square().mean(-1).clamp_min(SILENT)
    clean_db = 10 * torch.log10(target.square().mean(-1).clamp_min(SILENT) / rest)
    kept = (batch.speakers[:, :, 0] >= 0).all(1) & ~batch.mixit
    conditions = weights.shape[-1]
    relative = (clean_db - clean_db.mean(1, keepdim=True))[:, None].expand_as(weights)[kept]
    itself = torch.eye(conditions, dtype=torch.bool, device=weights.device).expand_as(weights)
    return Attended(
        relative.flatten().double().cpu().numpy(),
        (weights[kept] * conditions).flatten().double().cpu().numpy(),
        itself[kept].flatten().cpu().numpy(),
    )


def attention_plot(found: Attended) -> bytes:
    """Draw the weight that a condition gets against how much cleaner it is than the others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4))
    for itself, name in ((False, "another condition"), (True, "the query's own")):
        chosen = found.itself == itself
        x, y = found.cleaner_db[chosen], found.weight[chosen]
        panel.plot(x, y, ".", alpha=0.25, markersize=3, color=f"C{int(itself)}")
        panel.plot(*_means(x, y), "o-", color=f"C{int(itself)}", label=name)
    panel.axhline(1.0, color="grey", linewidth=0.8)
    panel.set_xlabel("target over all else, against the episode's mean (dB)")
    panel.set_ylabel("weight over an even share")
    panel.set_title(f"rank correlation with others' cleanness {found.rank_correlation:+.2f}")
    panel.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()


def _means(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return the means of equally many neighbours."""
    order = np.array_split(np.argsort(x, kind="stable"), BINS)
    filled = [part for part in order if len(part)]
    return [float(x[part].mean()) for part in filled], [float(y[part].mean()) for part in filled]
