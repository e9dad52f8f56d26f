"""Losses as pure functions: separation with utterance-level PIT, activity, spread.

The terms and their sources: SI-SNR (Le Roux et al., 2019) with a floor for silent references
(Wisdom et al., 2021), uPIT (Kolbaek et al., 2017), the embedding spread of Wavesplit (Zeghidour and
Grangier, 2020). The contrastive part is in `contrast.py`, mixtures of mixtures in `mixit.py`.
"""

from functools import lru_cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from csc_model.precision import exact

FLOOR = 1e-3  # relative error power below which there is nothing to gain: 30 dB
CLEAR = 1e-2  # error power below which a voice that is asked for is clear enough: 20 dB
SILENT = 1e-8  # mean power under which a reference counts as silence


def _db(power: Tensor) -> Tensor:
    return 10 * torch.log10(power)


def si_snr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio in dB over the last axis, at most 30 dB."""
    return _pairwise_si_snr_db(estimate.unsqueeze(-2), reference.unsqueeze(-2))[..., 0, 0]


@exact
def _pairwise_si_snr_db(estimates: Tensor, references: Tensor) -> Tensor:
    """SI-SNR of every estimate with every reference, `(..., slot, time)` -> `(..., slot, slot)`.

    By inner products: the projection has energy <e, s>^2 / <s, s>, the error is what is left of e.
    No signal is formed for a pair, which makes the loss several times cheaper than the plain form.
    """
    estimates = estimates - estimates.mean(-1, keepdim=True)
    references = references - references.mean(-1, keepdim=True)
    power = references.square().sum(-1).clamp_min(1e-8).unsqueeze(-2)
    signal = (estimates @ references.transpose(-1, -2)).square() / power
    error = (estimates.square().sum(-1).unsqueeze(-1) - signal).clamp_min(0)
    return _db((signal + 1e-8) / (error + FLOOR * signal + 1e-8))


@exact
def snr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio in dB over the last axis, at most 20 dB.

    Thresholded as by Wisdom et al. (2020). SI-SNR forgives any level; this does not.
    """
    power = reference.square().mean(-1)
    error = (estimate - reference).square().mean(-1)
    return _db((power + 1e-12) / (error + CLEAR * power + 1e-12))


@exact
def pairwise_separation_loss(estimates: Tensor, references: Tensor) -> Tensor:
    """Return what it costs, in dB, to give slot i reference j: `(batch, slot, slot)`.

    Estimates and references are `(batch, slot, time)`.

    A reference that speaks costs its negative SI-SNR. A silent one costs the level of the estimate
    relative to all references, so that a slot without a speaker learns to be quiet. Where all are
    silent there is nothing to be relative to, and every slot costs 0.
    """
    cost = -_pairwise_si_snr_db(estimates, references)
    power = references.square().mean(-1)
    silent = power < SILENT
    leak = estimates.square().mean(-1) / power.sum(-1, keepdim=True).clamp_min(1e-12)
    leak = torch.where(silent.all(-1, keepdim=True), 1 - FLOOR, leak)
    return torch.where(silent.unsqueeze(1), _db(leak + FLOOR).unsqueeze(-1), cost)


@lru_cache(16)
def _orders(slots: int, device: torch.device) -> Tensor:
    """Return all permutations `(order, slot)`: copied once, as a copy makes the device wait."""
    with torch.inference_mode(False):  # so that what is kept may be used in training
        return torch.tensor(list(permutations(range(slots))), device=device)


def best_permutation(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for costs `(batch, slot, slot)`, the least mean cost and the slot of each reference.

    Exhaustive, utterance-level: 24 permutations at the most slots that a model has, on a matrix of
    costs that is computed once. The assignment `(batch, slot)` is a constant:
    `assignment[b, j]` is the slot that holds reference j.
    """
    slots = cost.shape[-1]
    orders = _orders(slots, cost.device)
    totals = cost[:, orders, torch.arange(slots, device=cost.device)].mean(-1)
    least, index = totals.min(-1)
    return least, orders[index]


@exact
def activity_loss(
    logits: Tensor, references: Tensor, assignment: Tensor, heard: Tensor | None = None
) -> Tensor:
    """Cross-entropy, per mixture in nats, of logits that a slot holds a speaker.

    `logits` `(batch, slot)` are compared with which of `references` `(batch, slot, time)` hold
    speech, each at the slot that `assignment` `(batch, slot)` gives it (`best_permutation`). With
    `heard`, bool `(batch, slot)`, the mean is over these references. The term is reconstruction.
    """
    holds = (references.square().mean(-1) >= SILENT).to(logits.dtype)
    said = logits.gather(1, assignment)
    losses = F.binary_cross_entropy_with_logits(said, holds, reduction="none")
    if heard is None:
        return losses.mean(-1)
    return (losses * heard).sum(-1) / heard.sum(-1).clamp_min(1)


@exact
def nearest_distance(vectors: Tensor, at_most: int = 1024) -> Tensor:
    """Return the distance on the unit sphere to the nearest other vector, `(row,)` of `(row, dim)`.

    Between 0 and 2, which it is where there is no other. Of more than `at_most` rows as many are
    drawn at random: those of all would take the square of their number in memory.
    """
    unit = F.normalize(vectors, dim=-1)
    places = torch.arange(len(unit), device=unit.device)
    asked = unit
    if len(unit) > at_most:
        places = torch.randperm(len(unit), device=unit.device)[:at_most]
        asked = unit[places]
    squared = (2 - 2 * asked @ unit.T).clamp_min(1e-6)
    return squared.scatter(1, places.unsqueeze(1), 4.0).amin(-1).sqrt()


@exact
def spread_loss(nearest: Tensor) -> Tensor:
    """Push each speaker's vector from its nearest neighbour, at `nearest` `(row,)`: `-mean log`."""
    return -nearest.log().mean()
