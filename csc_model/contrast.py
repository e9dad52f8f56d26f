"""The contrastive loss as one equation: the divergence of a learned q from a supervisory p.

`L = mean_i KL(p(.|i) || q(.|i))` (I-Con; Alshammari et al., 2025, arXiv 2504.16929). As p is fixed,
to minimise it is to minimise the cross-entropy, which is what is trained and logged here. CSC's own
loss, as reconstructed, is one choice of p and q, and these are others (`ONE_EQUATION`):

| name          | p(j|i)                              | q(j|i), a softmax over j of          |
|---------------|-------------------------------------|--------------------------------------|
| csc           | 1 at the speaker's row of the table | minus scale times squared distance   |
| csc_in_mix    | 1 at the speaker of this slot       | the same, over voices of the mixture |
| csc_batch     | uniform over the speaker's others   | the same, over the batch without i   |
| softmax       | 1 at the row of the class           | scaled cosine                        |
| label_smooth  | the same, with alpha uniform        | scaled cosine                        |
| aam           | 1 at the row of the class           | scaled cosine with a margin          |
| supcon        | uniform over items of the same label| scaled cosine, without i             |
| simclr        | the other views of the recording    | scaled cosine, without i             |
| sne           | Gaussian of the inputs' distance    | minus squared distance, without i    |
| tsne          | its symmetric mean over all pairs   | Student-t, one softmax of all pairs  |
| kmeans        | Gaussian in the limit of its width  | uniform in i's cluster, mixed        |

The distances of sne, tsne and kmeans are those of the vectors as they are; all others compare on
the unit sphere. The equality of kmeans holds for clusters of one size, up to an affine map.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from csc_model.gather import gather, total
from csc_model.precision import exact

MAX_SCALE = 64.0
Kernel = Literal["gaussian", "cosine", "student"]


class ContrastConfig(BaseModel):
    """Which p, which q, and who is compared with whom."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    set: Literal["table", "batch", "in_mix"] = Field(
        "table",
        description="compare with every row of the speaker table, every vector of the batch over "
        "all ranks, or the voices of the same mixture",
    )
    kernel: Kernel = Field("gaussian", description="on the unit sphere")
    scale: float = Field(10.0, gt=0, le=MAX_SCALE, description="1 / temperature, at first")
    learn_scale: bool = True
    alpha: float = Field(0.0, ge=0, lt=1, description="share of a uniform p: debiasing")
    label_free: bool = Field(False, description="each recording is its own speaker")
    margin: float = Field(0.0, ge=0, le=1, description="radians (AAM-softmax)")

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.label_free and self.set == "table":
            raise ValueError("label_free has no speaker table: set batch or in_mix")
        if self.margin and (self.set, self.kernel) != ("table", "cosine"):
            raise ValueError("margin is for the cosine kernel on the table")
        return self


class Case(NamedTuple):
    """One method as a choice of p and q; `config` trains it, None is not for voices."""

    p: str
    q: str
    config: ContrastConfig | None


ONE_EQUATION: dict[str, Case] = {
    "csc": Case("row", "gaussian", ContrastConfig()),
    "csc_in_mix": Case("slot", "gaussian", ContrastConfig(set="in_mix")),
    "csc_batch": Case("label", "gaussian", ContrastConfig(set="batch")),
    "softmax": Case("row", "cosine", ContrastConfig(kernel="cosine")),
    "label_smooth": Case("row", "cosine", ContrastConfig(kernel="cosine", alpha=0.1)),
    "aam": Case(
        "row",
        "cosine",
        ContrastConfig(kernel="cosine", scale=30.0, learn_scale=False, margin=0.2),
    ),
    "supcon": Case("label", "cosine", ContrastConfig(set="batch", kernel="cosine")),
    "simclr": Case(
        "recording", "cosine", ContrastConfig(set="batch", kernel="cosine", label_free=True)
    ),
    "sne": Case("gaussian of inputs", "gaussian", None),
    "tsne": Case("gaussian of inputs", "student", None),
    "kmeans": Case("wide gaussian of inputs", "cluster", None),
}
"""The table above. Sources: I-Con for softmax, supcon, simclr, sne, tsne and that k-means belongs
here; the form of k-means is derived here, in the test; csc is the reconstruction."""


class Comparison(NamedTuple):
    """Items, whom they are compared with, and who is right."""

    items: Tensor  # (row, dim), unit norm
    candidates: Tensor  # (candidate, dim), or (row, candidate, dim) where each row has its own
    p: Tensor  # (row, candidate); a row of zeros has no speaker and says nothing
    allowed: Tensor | None  # (row, candidate), bool; None: all, the same for every row


class Contrasted(NamedTuple):
    """What a comparison costs, per row in nats."""

    cross_entropy: Tensor  # of p and q as trained, with margin and uniform share
    evidence: Tensor  # of p and q without them, detached: what bounds the information
    held: Tensor  # bool, rows that have somebody to find among at least two


@exact
def log_kernel(
    items: Tensor, candidates: Tensor, scale: Tensor | float, kernel: Kernel = "gaussian"
) -> Tensor:
    """Return the logarithm of the kernel of items with candidates, `(row, candidate)`.

    `items` `(row, dim)`, `candidates` `(candidate, dim)` or `(row, candidate, dim)`, both as they
    are. With d the distance: gaussian is `-scale d^2`, student `-log(1 + scale d^2)` (Student-t of
    one degree of freedom), cosine `scale <x, y>`, which on the unit sphere is a Gaussian of half
    the scale.
    """
    if candidates.ndim == 2:
        inner = items @ candidates.T
    else:
        inner = (candidates @ items.unsqueeze(-1)).squeeze(-1)
    if kernel == "cosine":
        return scale * inner
    squared = items.square().sum(-1, keepdim=True) + candidates.square().sum(-1) - 2 * inner
    return -scale * squared if kernel == "gaussian" else -torch.log1p(scale * squared.clamp_min(0))


@exact
def log_softmax(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return log q over the last axis; minus infinity where not allowed.

    A row that may be compared with nobody is left as if with all: its p is zero.
    """
    if allowed is not None:
        closed = ~allowed & allowed.any(-1, keepdim=True)
        logits = logits.masked_fill(closed, -torch.inf)
    return logits.log_softmax(-1)


@exact
def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """Return `-sum_j p(j|i) log q(j|i)`, per row in nats, with 0 log 0 = 0."""
    return -(p * log_q.masked_fill(p == 0, 0)).sum(-1)


@exact
def divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) per row in nats: the cross-entropy less p's own entropy, a constant."""
    return cross_entropy(p, log_q) - torch.special.entr(p).sum(-1)


def mix_uniform(p: Tensor, alpha: float, allowed: Tensor | None = None) -> Tensor:
    """Return `(1 - alpha) p + alpha / N` over the N candidates allowed (I-Con's debiasing).

    On the table this is label smoothing. A row of zeros stays one.
    """
    open_to = torch.ones_like(p) if allowed is None else allowed.to(p.dtype)
    uniform = open_to / open_to.sum(-1, keepdim=True).clamp_min(1)
    return (1 - alpha) * p + alpha * uniform * p.sum(-1, keepdim=True)


@exact
def add_margin(cosine: Tensor, p: Tensor, margin: float) -> Tensor:
    """Return `cos(angle + p margin)`: the right candidate must win by an angle (Deng et al., 2019).

    Where the angle would leave the half circle, the cosine falls on linearly, as is usual. A row
    whose p is shared out has its margin shared out likewise.
    """
    cosine = cosine.clamp(-1, 1)
    added = p * margin
    sine = (1 - cosine.square()).clamp_min(1e-12).sqrt()
    turned = cosine * added.cos() - sine * added.sin()
    return torch.where(cosine > -added.cos(), turned, cosine - added * added.sin())


def contrast(comparison: Comparison, scale: Tensor | float, config: ContrastConfig) -> Contrasted:
    """Compare as configured."""
    items, candidates, p, allowed = comparison
    logits = log_kernel(items, candidates, scale, config.kernel)
    log_q = log_softmax(logits, allowed)
    evidence = cross_entropy(p, log_q).detach()
    if config.margin:
        log_q = log_softmax(scale * add_margin(logits / scale, p, config.margin), allowed)
    entropy = cross_entropy(mix_uniform(p, config.alpha, allowed) if config.alpha else p, log_q)
    return Contrasted(entropy, evidence, (p.sum(-1) > 0) & (_num_candidates(comparison) > 1))


def _num_candidates(comparison: Comparison) -> Tensor:
    if comparison.allowed is None:
        return torch.full_like(comparison.p[:, 0], comparison.p.shape[-1])
    return comparison.allowed.sum(-1).to(comparison.p.dtype)


def mi_lower_bound_nats(
    evidence: Tensor,
    p: Tensor,
    allowed: Tensor | None = None,
    occurrences: Tensor | None = None,
) -> Tensor:
    """Bound the mutual information of vector and candidate from below: `H(J) - mean CE`, in nats.

    Of the rows of all ranks whose p is not zero. Where all rows have the same candidates, H is the
    entropy of those as they occur (exact: CE is that of a variational posterior of J;
    reconstruction): in `occurrences` `(candidate,)`, or else in p. Where each row has its own, J is
    uniform over them and H is `log|A|`, as in InfoNCE (van den Oord et al., 2018). Never above the
    log of the number of candidates, as no CE is below zero.
    """
    held = p.sum(-1) > 0
    gained = -evidence
    if allowed is not None:
        gained = gained + allowed.sum(-1).clamp_min(1).to(p.dtype).log()
    count = total(held.sum()).clamp_min(1)
    mean = total(torch.where(held, gained, 0).sum()) / count
    if allowed is not None:
        return mean
    occurrences = total(p.sum(0)) if occurrences is None else occurrences
    return torch.special.entr(occurrences / occurrences.sum().clamp_min(1)).sum() + mean


def mi_cap_nats(p: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the log of the largest number of candidates: what no bound can exceed, in nats."""
    if allowed is None:
        return p.new_full((), math.log(p.shape[-1]))
    return gather(allowed.sum(-1).amax().unsqueeze(0)).amax().clamp_min(1).to(p.dtype).log()
