"""Cross-attention over the conditions of an episode, and pooling over time."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.precision import full


class Weights(NamedTuple):
    """What attention did, for diagnosis."""

    weights: Tensor  # (batch, head, condition, condition), each query's sum to 1 over the last
    largest_logit: Tensor  # a scalar; growth beyond some ten foretells that training diverges


class ConditionAttention(nn.Module):
    """Aggregate one speaker's embeddings over interfering conditions into a global vector.

    The query is the embedding under one condition, keys and values those under all conditions that
    the mask allows (CSC abstract, part 2; heads, residual and norm are reconstruction). With
    `qk_norm`, queries and keys of each head are divided by their root mean square, so that no logit
    exceeds the root of a head's width (Dehghani et al., 2023, whose norm has a learned gain as
    well).
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, embedding: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return global vectors `(batch, condition, dim)` for embeddings of that shape.

        `allowed` `(batch, condition, condition)` says which condition (last axis) each query may
        attend to; each needs at least one. None allows all.
        """
        query, key = self._matched(embedding)
        value = self._split(self.value(embedding))
        mask = None if allowed is None else allowed.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.norm(embedding + self.out(mixed.transpose(1, 2).flatten(-2)))

    @torch.no_grad()
    def weights(self, embedding: Tensor, allowed: Tensor | None = None) -> Weights:
        """Return the weights with which `forward` mixes, and the largest logit behind them."""
        query, key = self._matched(embedding)
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        return Weights(logits.softmax(-1), logits.max())

    def _matched(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, `(batch, head, condition, dim / head)`."""
        query, key = self._split(self.query(embedding)), self._split(self.key(embedding))
        if not self.qk_norm:
            return query, key
        width = query.shape[-1:]
        return F.rms_norm(query, width), F.rms_norm(key, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def draw_allowed(batch: int, conditions: int, generator: torch.Generator) -> Tensor:
    """Draw attention masks `(batch, condition, condition)`, so that one condition alone works too.

    A third of the episodes sees only itself, a third others as well, a third only others: without
    the first a single test mixture is never practised, without the last copying oneself is enough.
    Of several others each query loses every one with a chance of a half, but never all.
    """
    kind = torch.randint(3, (batch, 1, 1), generator=generator)
    itself = torch.eye(conditions, dtype=torch.bool).expand(batch, -1, -1)
    if conditions == 1:
        return itself.clone()
    others = ~itself
    if conditions > 2:
        drawn = torch.rand(itself.shape, generator=generator).masked_fill(itself, torch.inf)
        others = drawn <= drawn.amin(-1, keepdim=True).clamp_min(0.5)
    return torch.where(kind == 0, itself, others | ((kind == 1) & itself))


class AttentiveStatistics(nn.Module):
    """Attentive mean and standard deviation over time (Okabe et al., 2018)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Conv1d(channels, channels, 1), nn.Tanh(), nn.Conv1d(channels, channels, 1)
        )
        self.project = nn.Linear(2 * channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pool `(batch, channel, frame)` into `(batch, dim)`."""
        return self.project(weighted_statistics(x, self.score(x).softmax(-1)))


def weighted_statistics(x: Tensor, weight: Tensor) -> Tensor:
    """Return mean and standard deviation over the last axis, joined on the one before it.

    In single precision at least, and from the mean: squares of values far from zero, rounded to
    bf16, would differ by more than the variance.
    """
    x, weight = full(x), full(weight)
    mean = (weight * x).sum(-1, keepdim=True)
    variance = (weight * (x - mean).square()).sum(-1)
    return torch.cat([mean.squeeze(-1), variance.clamp_min(1e-6).sqrt()], -1)
