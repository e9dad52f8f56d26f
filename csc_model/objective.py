"""What training minimises: model, speaker table and losses in one module, for DDP to wrap.

`L = separation_weight * separation + contrastive_weight * contrastive + spread_weight * spread +
activity_weight * activity`. Every term is computed in single precision, and normalised by counts
over all ranks, so that DDP's mean over ranks is what one process would have.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.balance import GradientBalance
from csc_model.contrast import (
    MAX_SCALE,
    Comparison,
    ContrastConfig,
    contrast,
)
from csc_model.diagnostics import information, slot_cosine, slot_share
from csc_model.episodes import Episodes, anchor_first, has_anchor, is_mixit, known
from csc_model.gather import global_mean
from csc_model.losses import (
    activity_loss,
    best_permutation,
    nearest_distance,
    pairwise_separation_loss,
    spread_loss,
)
from csc_model.mixit import Search, mixit_loss
from csc_model.model import CSC, Output
from csc_model.precision import full
from csc_model.rows import (
    GlobalVectors,
    Rows,
    compare_in_batch,
    compare_in_mixture,
    compare_with_table,
    forget_labels,
    make_rows,
    only,
    speaker_distance,
)

__all__ = ["Episodes", "Losses", "Objective", "in_order"]


LARGEST = ("attention_logit",)
"""Losses of which the largest of parts, steps and ranks is told, where of others it is the mean."""


class Losses(NamedTuple):
    """The terms of the loss and what is logged beside them, scalars all."""

    total: Tensor
    separation_db: Tensor  # mean cost over slots: minus SI-SNR, or the leak into an empty slot
    contrastive_nats: Tensor
    spread: Tensor
    mi_lower_bound_nats: Tensor
    scale: Tensor
    activity_nats: Tensor
    mi_cap_nats: Tensor  # what the bound cannot exceed: log of the number of candidates
    contrastive_weight: Tensor  # as used, also where gradient norms decide
    attention_logit: Tensor  # the largest; growth beyond some ten foretells divergence
    slot_cosine: Tensor  # of the embeddings of two slots of a mixture, in the mean
    slot_share: Tensor  # of the anchors, in the slot that takes most: 1 / slots is even
    embedding_distance: Tensor  # to the nearest other speaker in the mean, on the unit sphere


class Objective(nn.Module):
    """The CSC loss over a batch of episodes. The table is closed-set and not part of the model.

    With `balance="norms"`, the contrastive gradient on the trunk is kept at `contrastive_weight`
    times that of the separation. With `separation_only` nobody's voice is learned: that half of the
    model is left as it is and not computed, and of the losses all but its own are 0. With
    `freeze_separator` the other half is left as it is. With `views`, the speaker head hears as many
    views of each mixture in a step, drawn at random: for a table, as others are compared with each
    other. Without `attend`, no vector is made of several conditions. `mixit` is how the outputs of
    mixtures of mixtures are given to the two.
    """

    occurrences: Tensor  # (speaker,), in how many slots each was so far

    def __init__(
        self,
        model: CSC,
        num_speakers: int,
        *,
        separation_weight: float = 0.1,
        spread_weight: float = 0.1,
        activity_weight: float = 0.1,
        contrast: ContrastConfig | None = None,
        balance: Literal["fixed", "norms"] = "fixed",
        separation_only: bool = False,
        freeze_separator: bool = False,
        views: int = 0,
        attend: bool = True,
        mixit: Search = "all",
    ) -> None:
        super().__init__()
        self.model = model
        self.contrast = contrast or ContrastConfig()
        self.num_speakers = num_speakers
        self.has_table = self.contrast.set != "batch" and not self.contrast.label_free
        vectors = torch.randn(num_speakers * self.has_table, model.config.embedding_dim)
        self.table = nn.Parameter(F.normalize(vectors, dim=-1))
        self.raw_scale = nn.Parameter(torch.tensor(self.contrast.scale).expm1().log())
        self.register_buffer("occurrences", torch.zeros(len(vectors)))
        self.table.requires_grad_(self.has_table)
        self.raw_scale.requires_grad_(self.contrast.learn_scale)
        self.separation_weight, self.spread_weight = separation_weight, spread_weight
        self.activity_weight = activity_weight
        self.balance = GradientBalance(2) if balance == "norms" else None
        self.separation_only, self.views, self.attend = separation_only, views, attend
        self.mixit = mixit
        if separation_only:
            self.requires_grad_(False)
        self.freeze_separator = freeze_separator
        for part in model.separator:
            part.requires_grad_(not freeze_separator)

    def forward(self, episodes: Episodes, contrastive_weight: float = 1.0) -> Losses:
        """Return the losses, averaged so that the mean over ranks is that of one process.

        Every rank has as many conditions and slots, and for a set other than the table as many
        episodes.
        """
        episodes = anchor_first(episodes)
        if self.separation_only:
            return self._separation_alone(episodes)
        if self.freeze_separator:
            for part in self.model.separator:
                part.eval()  # each time: a validation ends with all of the model in training
        mixtures = episodes.mixtures.flatten(0, 1)
        heard = self._draw_views(len(mixtures), mixtures.device)
        output = self.model(mixtures, heard)
        with torch.autocast(episodes.mixtures.device.type, enabled=False):
            exact = output._replace(
                sources=full(output.sources), embeddings=full(output.embeddings)
            )
            return self._losses(exact, episodes, contrastive_weight, self._is_heard(heard))

    def _draw_views(self, count: int, device: torch.device) -> Tensor | None:
        """Draw which views `(mixture, view)` the speaker head hears; None: all."""
        if not self.views:
            return None
        drawn = torch.rand(count, self.model.config.num_slots + 1, device=device)
        return drawn.argsort(-1)[:, : self.views]

    def _is_heard(self, heard: Tensor | None) -> Tensor | None:
        """Return whether each view is, `(mixture, slot + 1)`."""
        if heard is None:
            return None
        none = heard.new_zeros(len(heard), self.model.config.num_slots + 1, dtype=torch.bool)
        return none.scatter(1, heard, True)

    def _separation_alone(self, episodes: Episodes) -> Losses:
        sources = self.model.sources(episodes.mixtures.flatten(0, 1))
        with torch.autocast(sources.device.type, enabled=False):
            sources, references = full(sources), episodes.references.flatten(0, 1)
            costs, assignment = best_permutation(pairwise_separation_loss(sources, references))
            separation = _over_all(_without_sources(costs, sources, episodes, self.mixit))
        anchors = has_anchor(episodes).flatten()
        nothing = separation.new_zeros(())
        return Losses(*[nothing] * len(Losses._fields))._replace(
            total=self.separation_weight * separation,
            separation_db=separation,
            slot_share=slot_share(assignment[:, 0], anchors, sources.shape[1]),
        )

    def _losses(
        self,
        output: Output,
        episodes: Episodes,
        contrastive_weight: float,
        is_heard: Tensor | None,
    ) -> Losses:
        references = episodes.references.flatten(0, 1)
        costs, assignment = best_permutation(pairwise_separation_loss(output.sources, references))
        separation = _over_all(_without_sources(costs, output.sources, episodes, self.mixit))
        heard = None if is_heard is None else is_heard.gather(1, assignment)
        activity = _activity(output, episodes, assignment, heard)
        slots = in_order(output.embeddings, assignment)
        present = has_anchor(episodes)
        if heard is not None:
            present = present & heard[:, 0].view_as(present)
        rows = self._rows(slots, output.embeddings[:, -1], episodes, present)
        if is_heard is not None and heard is not None:
            rows = only(rows, torch.cat([heard, is_heard[:, -1:]], 1))
        comparison = self._comparison(rows, slots, episodes)
        scale = F.softplus(self.raw_scale)
        scale = scale + (scale.clamp_max(MAX_SCALE) - scale).detach()  # it can come down again
        contrasted = contrast(comparison, scale, self.contrast)
        contrastive = global_mean(contrasted.cross_entropy, contrasted.held)
        distance = nearest_distance(self.table) if self.has_table else None
        spread = self.table.new_zeros(()) if distance is None else spread_loss(distance)
        weight = self._weight(separation, contrastive, contrastive_weight)
        bound, cap = information(comparison, contrasted, assignment.numel(), self.occurrences)
        total = (
            self.separation_weight * separation
            + weight * contrastive
            + self.spread_weight * spread
            + self.activity_weight * activity
        )
        return Losses(
            total,
            separation,
            contrastive,
            spread,
            bound,
            scale.detach(),
            activity,
            cap,
            weight,
            self.model.attention.weights(*self._attended(slots, episodes, present)).largest_logit,
            slot_cosine(output.embeddings[:, :-1]),
            slot_share(assignment[:, 0], has_anchor(episodes).flatten(), slots.shape[1]),
            # Of (rows of) the table, or else of the means of those in this rank's batch.
            speaker_distance(rows) if distance is None else distance.detach().mean(),
        )

    def _weight(self, separation: Tensor, contrastive: Tensor, asked: float) -> Tensor:
        """Return the weight of the contrastive term, as asked or by the gradients on the trunk."""
        if self.balance is None:
            return separation.new_full((), asked)
        weights = self.balance(
            [separation, contrastive], self.model.trunk.parameters(), [1.0, asked]
        )
        return self.separation_weight * weights[1]

    def _attended(
        self, slots: Tensor, episodes: Episodes, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the anchors' embeddings `(batch, condition, dim)`, and who attends to whom.

        The table knows nothing of this batch, so an anchor may see its other conditions. Where
        vectors of one episode are compared with each other it may not: what two of them had mixed
        from the same embeddings would be alike whatever the embeddings say.
        """
        anchors = slots[:, 0].unflatten(0, episodes.mixtures.shape[:2])
        itself = torch.eye(anchors.shape[1], dtype=torch.bool, device=anchors.device)
        if self.contrast.set != "table" or not self.attend:
            return anchors, itself.expand_as(episodes.allowed)
        allowed = episodes.allowed & present.unsqueeze(1) & present.unsqueeze(2)
        return anchors, allowed | (itself & ~allowed.any(-1, keepdim=True))

    def _rows(self, slots: Tensor, wholes: Tensor, episodes: Episodes, present: Tensor) -> Rows:
        """Attend, and say who each vector is: anchors, then others, then unseparated views.

        Only the anchor's slots see other conditions. Unseparated views and interferers have none,
        not even one in the place of an anchor who is not there.
        """
        attention = self.model.attention
        anchors, allowed = self._attended(slots, episodes, present)
        alone = torch.cat([slots[:, 1:], wholes.unsqueeze(1)], 1)
        vectors = torch.cat(
            [
                attention(anchors, allowed).flatten(0, 1).unsqueeze(1),
                attention(alone.flatten(0, 1).unsqueeze(1)).view_as(alone),
            ],
            1,
        )
        speakers = known(episodes)
        if self.contrast.label_free:
            speakers = forget_labels(speakers, has_anchor(episodes))
        return make_rows(
            vectors.transpose(0, 1), speakers.flatten(0, 1), episodes.references.flatten(0, 1)
        )

    def _comparison(self, rows: Rows, slots: Tensor, episodes: Episodes) -> Comparison:
        if self.contrast.set == "table":
            return compare_with_table(rows, self.table)
        if self.contrast.set == "batch":
            return compare_in_batch(rows)
        if self.contrast.label_free:  # an unseparated view holds recordings that have no vector
            rows = rows._replace(shares=rows.shares * rows.is_slot.unsqueeze(-1))
        return compare_in_mixture(rows, self._global_vectors(rows, slots, episodes))

    def _global_vectors(self, rows: Rows, slots: Tensor, episodes: Episodes) -> GlobalVectors:
        """Return the voices of each mixture, as they are known from elsewhere.

        The anchor's is what attention makes of its other conditions, this one left out. Whoever has
        none is the row of the table, or, without labels, the slot's own vector, which is then never
        the answer. At most log of the number of slots can be learned: 0.69 nats of two voices.
        """
        speakers = known(episodes).flatten(0, 1)
        elsewhere, is_known = self._elsewhere(slots, has_anchor(episodes))
        if self.contrast.label_free:
            others = (
                rows.vectors[: speakers.numel()].unflatten(0, (-1, len(speakers))).transpose(0, 1)
            )
        else:
            others = F.normalize(self.table, dim=-1)[speakers.clamp_min(0)]
        is_elsewhere = F.pad(is_known.flatten().unsqueeze(1), (0, speakers.shape[1] - 1))
        vectors = torch.where(
            is_elsewhere.unsqueeze(-1), elsewhere.flatten(0, 1).unsqueeze(1), others
        )
        heard = speakers >= 0
        return GlobalVectors(vectors, is_elsewhere if self.contrast.label_free else heard, heard)

    def _elsewhere(self, slots: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anchor as its other conditions show it, and whether there are any.

        Shapes `(batch, condition, dim)` and `(batch, condition)`. Each of the others attends to all
        of them, and their mean is taken: nothing of the condition itself is in it, so that it
        cannot be recognised by its words or its channel (reconstruction).
        """
        anchors = slots[:, 0].unflatten(0, present.shape)
        itself = torch.eye(anchors.shape[1], dtype=torch.bool, device=anchors.device)
        usable = present.unsqueeze(1) & ~itself  # (batch, left out, condition)
        found = usable.any(-1)
        mask = usable | (itself & ~found.unsqueeze(-1))
        attended = self.model.attention(
            anchors.repeat_interleave(anchors.shape[1], 0),
            mask.flatten(0, 1).unsqueeze(1).expand(-1, anchors.shape[1], -1),
        ).unflatten(0, anchors.shape[:2])
        mean = (attended * mask.unsqueeze(-1)).sum(2)
        return F.normalize(mean, dim=-1), found & present


def in_order(embeddings: Tensor, assignment: Tensor) -> Tensor:
    """Return the slots' embeddings `(mixture, slot, dim)` in the order of the references."""
    index = assignment.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])
    return embeddings.gather(1, index)


def _over_all(costs: Tensor) -> Tensor:
    """Return the mean of costs `(mixture,)` over the mixtures of all ranks."""
    return global_mean(costs, torch.ones_like(costs, dtype=torch.bool))


def _without_sources(costs: Tensor, sources: Tensor, episodes: Episodes, search: Search) -> Tensor:
    """Put the MixIT cost in place of the PIT cost `(mixture,)` where no source is known."""
    mixed = is_mixit(episodes)
    if mixed is None:
        return costs
    if episodes.references.shape[2] < 2:
        raise ValueError("mixtures of mixtures need two slots at least: set num_slots to 2 or more")
    two, _ = mixit_loss(sources, episodes.references.flatten(0, 1)[:, :2], search)
    return torch.where(mixed, two, costs)


def _activity(
    output: Output, episodes: Episodes, assignment: Tensor, heard: Tensor | None
) -> Tensor:
    """Return the loss of the activity head over what is known of who speaks."""
    logits = output.activity_logits
    values = activity_loss(logits, episodes.references.flatten(0, 1), assignment, heard)
    mixed = is_mixit(episodes)
    held = torch.ones_like(values, dtype=torch.bool) if mixed is None else ~mixed
    held = held if heard is None else held & heard.any(1)
    return global_mean(values, held)
