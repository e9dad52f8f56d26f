"""Losses as pure functions: separation with utterance-level PIT, and the contrastive part.

`L = separation + weight * contrastive + weight * spread`; the terms and their sources:
SI-SNR (Le Roux et al., 2019) with a floor for silent references (Wisdom et al., 2021), uPIT
(Kolbaek et al., 2017), the contrastive separative loss as reconstructed, and the embedding spread
of Wavesplit (Zeghidour and Grangier, 2020).
"""

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-3  # relative error power below which there is nothing to gain: 30 dB
SILENT = 1e-8  # mean power under which a reference counts as silence


def _full(x: Tensor) -> Tensor:
    """Return at least single precision: under autocast the losses stay exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _db(power: Tensor) -> Tensor:
    return 10 * torch.log10(power)


def si_snr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio in dB over the last axis, at most 30 dB."""
    return _pairwise_si_snr_db(estimate.unsqueeze(-2), reference.unsqueeze(-2))[..., 0, 0]


def _pairwise_si_snr_db(estimates: Tensor, references: Tensor) -> Tensor:
    """SI-SNR of every estimate with every reference, `(..., slot, time)` -> `(..., slot, slot)`.

    By inner products: the projection has energy <e, s>^2 / <s, s>, the error is what is left of e.
    No signal is formed for a pair, which makes the loss several times cheaper than the plain form.
    """
    estimates = _full(estimates) - _full(estimates).mean(-1, keepdim=True)
    references = _full(references) - _full(references).mean(-1, keepdim=True)
    power = references.square().sum(-1).clamp_min(1e-8).unsqueeze(-2)
    signal = (estimates @ references.transpose(-1, -2)).square() / power
    error = (estimates.square().sum(-1).unsqueeze(-1) - signal).clamp_min(0)
    return _db((signal + 1e-8) / (error + FLOOR * signal + 1e-8))


def pairwise_separation_loss(estimates: Tensor, references: Tensor) -> Tensor:
    """Return what it costs, in dB, to give slot i reference j: `(batch, slot, slot)`.

    A reference that speaks costs its negative SI-SNR. A silent one costs the level of the estimate
    relative to all references, so that a slot without a speaker learns to be quiet.
    """
    cost = -_pairwise_si_snr_db(estimates, references)
    power = _full(references).square().mean(-1)
    leak = _full(estimates).square().mean(-1) / power.sum(-1, keepdim=True).clamp_min(1e-12)
    silent = (power < SILENT).unsqueeze(1)
    return torch.where(silent, _db(leak + FLOOR).unsqueeze(-1), cost)


def best_permutation(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for costs `(batch, slot, slot)`, the least mean cost and the slot of each reference.

    Exhaustive over the permutations, utterance-level. The assignment `(batch, slot)` is a constant:
    `assignment[b, j]` is the slot that holds reference j.
    """
    slots = cost.shape[-1]
    orders = torch.tensor(list(permutations(range(slots))), device=cost.device)
    totals = cost[:, orders, torch.arange(slots, device=cost.device)].mean(-1)
    least, index = totals.min(-1)
    return least, orders[index]


def contrastive_loss(vectors: Tensor, table: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy between a supervisory p and q = softmax(-scale * distance), per row, in nats.

    `vectors` `(row, dim)` are compared with every row of `table` `(speaker, dim)`, both taken to
    unit norm, by squared distance: no speaker is sampled. `target` `(row, speaker)` is p; a row of
    zeros has no speaker and costs nothing. For a one-hot p this is the exact cross-entropy of which
    the mutual-information bound is made (`mi_lower_bound_nats`).
    """
    cosine = F.normalize(_full(vectors), dim=-1) @ F.normalize(_full(table), dim=-1).T
    log_q = torch.log_softmax(-scale * (2 - 2 * cosine), -1)
    return -(target * log_q).sum(-1)


def mi_lower_bound_nats(cross_entropy: Tensor, target: Tensor) -> Tensor:
    """Bound the mutual information of vector and speaker from below: `H(J) - mean CE`, in nats.

    H is the entropy of the speakers as they occur in `target`, never above log of their number, so
    neither is the bound. Rows of `target` without a speaker are left out.
    """
    held = target.sum(-1) > 0
    share = target[held].sum(0) / target[held].sum().clamp_min(1e-12)
    return torch.special.entr(share).sum() - cross_entropy[held].mean()


def spread_loss(table: Tensor) -> Tensor:
    """Push each speaker's vector from its nearest neighbour: `-mean log min distance`."""
    unit = F.normalize(_full(table), dim=-1)
    squared = (2 - 2 * unit @ unit.T).clamp_min(1e-6)
    own = torch.eye(len(table), dtype=torch.bool, device=table.device)
    return -0.5 * squared.masked_fill(own, torch.inf).amin(-1).log().mean()
