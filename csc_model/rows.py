"""Whom the vectors of a batch are compared with: the contrast sets, as comparisons.

Numbers of speakers are rows of the speaker table, -1 for nobody; with labels left aside
(`forget_labels`), numbers of recordings.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csc_model.contrast import Comparison
from csc_model.gather import gather, rank, world_size


class Rows(NamedTuple):
    """Vectors with what is known of them: of each reference in each mixture, then unseparated."""

    vectors: Tensor  # (row, dim), unit norm
    speakers: Tensor  # (row, slot), who speaks in the row's mixture, -1 for nobody
    shares: Tensor  # (row, slot), of whom the row holds how much; sums to 1, or 0 without a label
    mixture: Tensor  # (row,), which mixture of this rank
    is_slot: Tensor  # (row,), bool; False for the unseparated views


class GlobalVectors(NamedTuple):
    """What the speakers of a mixture are compared with, inside the mixture."""

    vectors: Tensor  # (mixture, slot, dim), unit norm
    right: Tensor  # (mixture, slot), bool: this one may be the answer
    heard: Tensor  # (mixture, slot), bool: this one is there


def make_rows(vectors: Tensor, speakers: Tensor, references: Tensor) -> Rows:
    """Say of vectors `(slot + 1, mixture, dim)`, the last unseparated, whom they hold.

    `speakers` `(mixture, slot)` and `references` `(mixture, slot, time)` lie in the order of the
    vectors. An unseparated view holds the speakers by their energy.
    """
    num_mixtures, num_slots = speakers.shape
    present = (speakers >= 0).to(vectors.dtype)
    energy = references.square().mean(-1).to(vectors.dtype) * present
    whole = energy / energy.sum(1, keepdim=True).clamp_min(1e-12)
    shares = torch.cat([torch.diag_embed(present), whole.unsqueeze(1)], 1)
    mixture = torch.arange(num_mixtures, device=speakers.device).repeat(num_slots + 1)
    return Rows(
        F.normalize(vectors, dim=-1).flatten(0, 1),
        speakers.repeat(num_slots + 1, 1),
        shares.transpose(0, 1).flatten(0, 1),
        mixture,
        torch.arange(len(mixture), device=mixture.device) < num_slots * num_mixtures,
    )


def forget_labels(speakers: Tensor, has_anchor: Tensor) -> Tensor:
    """Number recordings in place of speakers `(episode, condition, slot)`, over all ranks.

    The first slot, where `has_anchor` `(episode, condition)`, is the recording that the conditions
    of an episode share; any other is alone. Of the speakers only their presence is read.
    """
    episodes, _, slots = speakers.shape
    device = speakers.device
    shared = rank() * episodes + torch.arange(episodes, device=device)
    alone = torch.arange(speakers.numel(), device=device).view_as(speakers)
    numbers = world_size() * episodes + rank() * speakers.numel() + alone
    is_shared = has_anchor.unsqueeze(-1) & (torch.arange(slots, device=device) == 0)
    numbers = torch.where(is_shared, shared[:, None, None], numbers)
    return torch.where(speakers >= 0, numbers, -1)


def only(rows: Rows, heard: Tensor) -> Rows:
    """Have the rows that were not heard, bool `(mixture, slot + 1)`, say nothing."""
    return rows._replace(shares=rows.shares * heard.T.flatten().unsqueeze(-1))


def compare_with_table(rows: Rows, table: Tensor) -> Comparison:
    """Compare with every row of the table `(speaker, dim)`: p is one-hot, by energy for wholes."""
    p = rows.shares.new_zeros(len(rows.shares), len(table))
    p = p.scatter_add(1, rows.speakers.clamp_min(0), rows.shares)
    return Comparison(rows.vectors, F.normalize(table, dim=-1), p, None)


def compare_in_batch(rows: Rows) -> Comparison:
    """Compare with the slots of all ranks: p is uniform over the same speaker's others.

    A false negative is thus impossible where ids are true. Slots of nobody known are no candidates.
    The other slots of the own mixture are (they are why no negative need be sampled), the row
    itself is not, and an unseparated view is not compared with the slots that were cut from it, nor
    is it a candidate. A row whose speaker is nowhere else says nothing.
    """
    label = _label(rows)
    number = torch.arange(len(label), device=label.device) + rank() * len(label)
    mixture = rows.mixture + rank() * (rows.mixture.amax() + 1)
    known = gather(rows.is_slot & (label >= 0))
    allowed = known & (number.unsqueeze(1) != gather(number))
    cut_from_it = ~rows.is_slot.unsqueeze(1) & (mixture.unsqueeze(1) == gather(mixture))
    allowed = allowed & ~cut_from_it
    same = rows.speakers.unsqueeze(1) == gather(label)[:, None]  # (row, candidate, slot)
    weight = (rows.shares.unsqueeze(1) * same).sum(-1) * allowed
    p = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return Comparison(rows.vectors, gather(rows.vectors), p, allowed)


def compare_in_mixture(rows: Rows, candidates: GlobalVectors) -> Comparison:
    """Compare with the global vectors of the speakers heard in the row's own mixture."""
    p = rows.shares * candidates.right[rows.mixture]
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-12)
    vectors = candidates.vectors[rows.mixture]
    return Comparison(rows.vectors, vectors, p, candidates.heard[rows.mixture])


def speaker_distance(rows: Rows) -> Tensor:
    """Return the mean distance of each speaker's mean vector to the nearest other one's."""
    label = _label(rows)
    known = rows.is_slot & (label >= 0)
    same = (label.unsqueeze(1) == label) & known
    means = F.normalize(same.to(rows.vectors.dtype) @ rows.vectors, dim=-1)
    squared = (2 - 2 * means @ means.T).masked_fill(same | ~known, 4.0).clamp_min(0)
    distance = torch.where(known, squared.amin(-1).sqrt(), 0)
    return distance.sum() / known.sum().clamp_min(1)


def _label(rows: Rows) -> Tensor:
    """Return the speaker of whom a row holds most, -1 for nobody."""
    most = rows.speakers.gather(1, rows.shares.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(rows.shares.sum(-1) > 0, most, -1)
