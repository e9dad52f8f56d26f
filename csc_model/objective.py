"""What training minimises: model, speaker table and losses in one module, for DDP to wrap."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.losses import (
    best_permutation,
    contrastive_loss,
    mi_lower_bound_nats,
    pairwise_separation_loss,
    spread_loss,
)
from csc_model.model import CSC, Output

MAX_SCALE = 64.0


class Episodes(NamedTuple):
    """A batch of episodes on the training device. The order of references does not matter."""

    mixtures: Tensor  # (batch, condition, time)
    references: Tensor  # (batch, condition, slot, time), silent where a slot has no speaker
    speakers: Tensor  # (batch, condition, slot), row of the speaker table, -1 for nobody
    anchors: Tensor  # (batch,), the speaker that all conditions of an episode share
    allowed: Tensor  # (batch, condition, condition), who attends to whom


class Losses(NamedTuple):
    """The terms of the loss and what is logged beside them, scalars all."""

    total: Tensor
    separation_db: Tensor  # mean cost over slots: minus SI-SNR, or the leak into an empty slot
    contrastive_nats: Tensor
    spread: Tensor
    mi_lower_bound_nats: Tensor
    scale: Tensor


class Objective(nn.Module):
    """The CSC loss over a batch of episodes. The table is closed-set and not part of the model."""

    def __init__(
        self,
        model: CSC,
        num_speakers: int,
        *,
        separation_weight: float = 0.1,
        spread_weight: float = 0.1,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Parameter(
            F.normalize(torch.randn(num_speakers, model.config.embedding_dim), dim=-1)
        )
        self.raw_scale = nn.Parameter(torch.tensor(scale).expm1().log())
        self.separation_weight, self.spread_weight = separation_weight, spread_weight

    def forward(self, episodes: Episodes, contrastive_weight: float = 1.0) -> Losses:
        """Return the losses, averaged so that the mean over equal ranks is that of one process."""
        episodes = _anchor_first(episodes)
        output = self.model(episodes.mixtures.flatten(0, 1))
        references = episodes.references.flatten(0, 1)
        least, assignment = best_permutation(pairwise_separation_loss(output.sources, references))
        vectors = self._global_vectors(output, assignment, episodes)
        target = self._target(episodes, references)
        scale = F.softplus(self.raw_scale).clamp_max(MAX_SCALE)
        entropy = contrastive_loss(vectors, self.table, target, scale)
        separation, contrastive = least.mean(), entropy.mean()
        spread = spread_loss(self.table)
        total = (
            self.separation_weight * separation
            + contrastive_weight * contrastive
            + self.spread_weight * spread
        )
        slots = slice(0, assignment.numel())
        bound = mi_lower_bound_nats(entropy[slots].detach(), target[slots])
        return Losses(total, separation, contrastive, spread, bound, scale.detach())

    def _global_vectors(self, output: Output, assignment: Tensor, episodes: Episodes) -> Tensor:
        """Order slots by reference and attend: `(row, dim)`, anchors, then others, then wholes.

        Only the anchor's slots see other conditions; interferers and unseparated views have none.
        """
        index = assignment.unsqueeze(-1).expand(-1, -1, output.embeddings.shape[-1])
        slots = output.embeddings.gather(1, index)
        anchors = slots[:, 0].unflatten(0, episodes.mixtures.shape[:2])
        alone = torch.cat([slots[:, 1:].flatten(0, 1), output.embeddings[:, -1]])
        attention = self.model.attention
        attended = attention(anchors, episodes.allowed).flatten(0, 1)
        return torch.cat([attended, attention(alone.unsqueeze(1)).squeeze(1)])

    def _target(self, episodes: Episodes, references: Tensor) -> Tensor:
        """Return p in the order of the vectors: the slot's speaker; for wholes, by energy."""
        speakers = episodes.speakers.flatten(0, 1)
        present = (speakers >= 0).float().unsqueeze(-1)
        one_hot = F.one_hot(speakers.clamp_min(0), len(self.table)) * present
        energy = references.square().mean(-1, keepdim=True) * present
        share = energy / energy.sum(1, keepdim=True).clamp_min(1e-12)
        whole = (one_hot * share).sum(1)
        return torch.cat([one_hot[:, 0], one_hot[:, 1:].flatten(0, 1), whole])


def _anchor_first(episodes: Episodes) -> Episodes:
    """Put the anchor's reference first in every condition, with its label."""
    others = (episodes.speakers != episodes.anchors[:, None, None]).int()
    order = others.argsort(stable=True, dim=-1)
    index = order.unsqueeze(-1).expand_as(episodes.references)
    return episodes._replace(
        references=episodes.references.gather(2, index),
        speakers=episodes.speakers.gather(2, order),
    )
