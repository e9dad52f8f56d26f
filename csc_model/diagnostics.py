"""What is logged beside the losses, because training goes wrong there first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from csc_model.contrast import Comparison, Contrasted, mi_cap_nats, mi_lower_bound_nats
from csc_model.gather import total


@torch.no_grad()
def information(
    comparison: Comparison, contrasted: Contrasted, num_slots: int, occurrences: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the bound on the information in all ranks' slots, each's first rows, and its cap.

    With a table its speakers are counted in `occurrences` `(speaker,)`, in place: their entropy is
    that of all steps so far, as a batch has few of them, and a larger one more.
    """
    p = comparison.p[:num_slots] * contrasted.held[:num_slots, None]
    allowed = None if comparison.allowed is None else comparison.allowed[:num_slots]
    if allowed is None:
        occurrences += total(p.sum(0))
    evidence = contrasted.evidence[:num_slots]
    return mi_lower_bound_nats(evidence, p, allowed, occurrences), mi_cap_nats(p, allowed)


@torch.no_grad()
def slot_cosine(embeddings: Tensor) -> Tensor:
    """Return the mean cosine of the embeddings `(mixture, slot, dim)` of two different slots.

    An embedding of 0 is none; with no two in any mixture the mean is 0.
    """
    unit = F.normalize(embeddings, dim=-1)
    there = (unit.square().sum(-1) > 0.5).to(unit.dtype)
    pair = there.unsqueeze(1) * there.unsqueeze(2)
    pair = pair - torch.diag_embed(there)
    return (unit @ unit.transpose(-1, -2) * pair).sum() / pair.sum().clamp_min(1)


@torch.no_grad()
def slot_share(winner: Tensor, held: Tensor, num_slots: int) -> Tensor:
    """Return the share of the slot that takes most of the anchors."""
    slots = torch.arange(num_slots, device=winner.device)
    wins = ((winner.unsqueeze(-1) == slots) & held.unsqueeze(-1)).sum(0)
    return wins.max() / wins.sum().clamp_min(1)
