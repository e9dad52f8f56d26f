"""Episodes as the objective reads them: one anchor speaker under several conditions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Episodes(NamedTuple):
    """A batch of episodes on the training device. The order of references does not matter."""

    mixtures: Tensor  # (batch, condition, time)
    references: Tensor  # (batch, condition, slot, time), silent where a slot has no speaker
    speakers: Tensor  # (batch, condition, slot), row of the speaker table, -1 for nobody
    anchors: Tensor  # (batch,), the speaker that all conditions of an episode share
    allowed: Tensor  # (batch, condition, condition), who attends to whom
    mixit: Tensor | None = None  # (batch,), bool: the first two references are mixtures themselves


def anchor_first(episodes: Episodes) -> Episodes:
    """Put the anchor's reference first in every condition, with its label; else an empty one."""
    speakers = episodes.speakers
    is_anchor = speakers == episodes.anchors[:, None, None]
    rank = torch.where(is_anchor, 0, torch.where(speakers < 0, 1, 2))
    if episodes.mixit is not None:  # whose first two references stay where they are
        rank = rank * ~episodes.mixit[:, None, None]
    order = rank.argsort(stable=True, dim=-1)
    index = order.unsqueeze(-1).expand_as(episodes.references)
    return episodes._replace(
        references=episodes.references.gather(2, index), speakers=speakers.gather(2, order)
    )


def known(episodes: Episodes) -> Tensor:
    """Return the speakers, of whom nobody is known in mixtures of mixtures."""
    if episodes.mixit is None:
        return episodes.speakers
    return episodes.speakers.masked_fill(episodes.mixit[:, None, None], -1)


def has_anchor(episodes: Episodes) -> Tensor:
    """Return which conditions `(batch, condition)` have the anchor, in their first slot."""
    first = known(episodes)[:, :, 0]
    return (first >= 0) & (first == episodes.anchors.unsqueeze(1))


def is_mixit(episodes: Episodes) -> Tensor | None:
    """Return which mixtures are mixtures of mixtures, `(mixture,)`."""
    if episodes.mixit is None:
        return None
    return episodes.mixit.repeat_interleave(episodes.mixtures.shape[1])
