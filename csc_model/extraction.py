"""Training of an extractor: one voice of each mixture, asked for by another recording of it.

The rest of the model stays as it is. Reconstruction throughout: the papers condition a separator by
a vector (VoiceFilter: Wang et al., 2019; SpeakerBeam: Zmolikova et al., 2019), not this one.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from csc_model.encoder import FrontEnd
from csc_model.episodes import Episodes, anchor_first, has_anchor
from csc_model.extractor import COMPRESSION
from csc_model.gather import global_mean
from csc_model.losses import FLOOR, si_snr_db, snr_db
from csc_model.mel import unit_level
from csc_model.model import CSC
from csc_model.objective import Losses, Objective
from csc_model.precision import exact, full


class Asked(NamedTuple):
    """Voices that are asked for, each in one mixture."""

    mixtures: Tensor  # (mixture, time)
    targets: Tensor  # (mixture, time), silent where the voice is not there
    enrolments: Tensor  # (mixture, time), the voice elsewhere
    present: Tensor  # (mixture,), bool: it is there
    usable: Tensor  # (mixture,), bool: there is an enrolment


def asked(episodes: Episodes, others_share: float = 0.0) -> Asked:
    """Ask of each mixture for its episode's anchor, enrolled by the next condition that has it.

    Never by the mixture itself: what is said there is not said here. The anchor's conditions take
    turns by its sessions as far as there are several. Where no other condition has the anchor,
    there is no enrolment. `others_share` of the mixtures are asked for somebody else instead.
    """
    episodes = anchor_first(episodes)
    present = has_anchor(episodes)
    targets = torch.where(present.unsqueeze(-1), episodes.references[:, :, 0], 0)
    conditions = present.shape[1]
    after = torch.arange(conditions, device=present.device)
    others = (after.unsqueeze(1) + after[1:]) % conditions  # (condition, other)
    there = present[:, others]
    if conditions == 1:
        chosen, found = after.expand_as(present), torch.zeros_like(present)
    else:
        nearest = there.to(torch.uint8).argmax(-1, keepdim=True)
        chosen = others.expand_as(there).gather(-1, nearest).squeeze(-1)
        found = there.any(-1)
    enrolments = targets.gather(1, chosen.unsqueeze(-1).expand_as(targets))
    parts = (episodes.mixtures, targets, enrolments, present, found)
    told = Asked(*(part.flatten(0, 1) for part in parts))
    return _asked_for_others(told, episodes, others_share) if others_share else told


def _asked_for_others(told: Asked, episodes: Episodes, share: float) -> Asked:
    """Ask a share of the mixtures, drawn at random, for the next episode's anchor.

    Where that one is not in them; a batch of one episode has nobody else to ask for.
    """
    conditions = episodes.mixtures.shape[1]
    turn = torch.rand(len(told.present), device=told.present.device) < share
    other = episodes.anchors.roll(-1).repeat_interleave(conditions)
    heard = (episodes.speakers.flatten(0, 1) == other.unsqueeze(-1)).any(-1)
    lacks = turn & ~heard & told.usable & told.usable.roll(-conditions)
    return told._replace(
        targets=told.targets.masked_fill(lacks.unsqueeze(-1), 0),
        enrolments=torch.where(
            lacks.unsqueeze(-1), told.enrolments.roll(-conditions, 0), told.enrolments
        ),
        present=told.present & ~lacks,
    )


@exact
def leak_db(estimate: Tensor, mixture: Tensor) -> Tensor:
    """Return the level of an estimate over its mixture's, in dB over the last axis, from -30 on.

    For a voice that is not there, of which nothing should be left.
    """
    left = estimate.square().mean(-1) / mixture.square().mean(-1).clamp_min(1e-12)
    return 10 * torch.log10(left + FLOOR)


@exact
def power_law_loss(estimate: Tensor, target: Tensor, mixture: Tensor, frontend: FrontEnd) -> Tensor:
    """Return VoiceFilter's loss `(batch,)`: the squared error of compressed magnitudes.

    In the mean over bins and frames of a Fourier transform, of signals `(batch, time)` in units of
    the mixture's level.
    """
    level, _ = unit_level(mixture)
    made, wanted = (_compressed(frontend.encode(signal / level)) for signal in (estimate, target))
    return (made - wanted).square().mean((-1, -2))


def _compressed(spectrum: Tensor) -> Tensor:
    power = torch.view_as_real(spectrum).square().sum(-1)  # abs has no gradient at silence
    return (power + 1e-8).pow(COMPRESSION / 2)


class ExtractionObjective(Objective):
    """What training of an extractor minimises; all of the model but the extractor stays as it is.

    `separation_db` of the losses is the cost in dB: minus the SNR of a voice that is there (or its
    SI-SNR), or the level of what is left where it is not. It is what is minimised, or else logged
    beside the power-law loss. SI-SNR asks for no level, and together with the cost of what is left
    teaches to turn everything down.
    """

    def __init__(
        self,
        model: CSC,
        num_speakers: int,
        *,
        extraction_loss: Literal["snr", "si_snr", "power_law"] = "snr",
        others_share: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(model, num_speakers, **others)
        self.extraction_loss, self.others_share = extraction_loss, others_share
        self.requires_grad_(False)
        model.extractor.requires_grad_(True)

    def forward(self, episodes: Episodes, contrastive_weight: float = 1.0) -> Losses:  # noqa: ARG002
        """Return the losses, averaged so that the mean over ranks is that of one process."""
        told, model = asked(episodes, self.others_share), self.model
        model.eval()  # norms of what stays as it is are not those of these batches
        model.extractor.train(self.training)
        with torch.no_grad():
            vectors = model.voice(told.enrolments)
        estimates = model.extracted(told.mixtures, vectors)
        with torch.autocast(estimates.device.type, enabled=False):
            return self._losses_of(full(estimates), told)

    def _losses_of(self, estimates: Tensor, told: Asked) -> Losses:
        likeness_db = si_snr_db if self.extraction_loss == "si_snr" else snr_db
        kept = -likeness_db(estimates, told.targets)
        cost_db = torch.where(told.present, kept, leak_db(estimates, told.mixtures))
        separation = global_mean(cost_db, told.usable)
        total = separation
        if self.extraction_loss == "power_law":
            frontend = self.model.extractor.frontend
            values = power_law_loss(estimates, told.targets, told.mixtures, frontend)
            total, separation = global_mean(values, told.usable), separation.detach()
        nothing = separation.new_zeros(())
        return Losses(*[nothing] * len(Losses._fields))._replace(
            total=total, separation_db=separation
        )
