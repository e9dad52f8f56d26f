"""A small model on a few episodes: what must work before a larger run is paid for."""

import math

import torch
from torch import Tensor

from csc_model.attention import draw_allowed
from csc_model.config import ModelConfig
from csc_model.losses import si_snr_db
from csc_model.model import CSC
from csc_model.objective import Episodes, Objective
from tests.conftest import voice


def crops(speakers: int) -> Tensor:
    """Return real speech at one level, `(speaker, 2, time)`: a quarter of a second of two texts."""
    places = [voice(speaker, text)[6000:10_096] for speaker in range(speakers) for text in (0, 1)]
    sources = torch.stack([torch.from_numpy(place.copy()) for place in places])
    sources = 0.1 * sources / sources.std(-1, keepdim=True)
    return sources.unflatten(0, (speakers, 2))


def test_a_small_model_learns_eight_episodes_by_heart() -> None:
    """The cheapest proof that the loss is one: without it no larger run is worth its price."""
    sources, speakers = crops(8), torch.arange(8)[:, None].expand(8, 2)
    references = torch.stack([sources, sources.roll(1, 0)], 2)
    present = torch.stack([speakers, speakers.roll(1, 0)], 2)
    allowed = draw_allowed(8, 2, torch.Generator().manual_seed(0))
    batch = Episodes(references.sum(2), references, present, torch.arange(8), allowed)
    torch.manual_seed(0)
    config = ModelConfig(
        frontend="conv", window=64, hop=32, num_bins=256, trunk="tcn", channels=64, hidden=64,
        shared_blocks=3, separation_blocks=1, speaker_blocks=1, embedding_dim=32,
    )  # fmt: skip
    module = Objective(CSC(config), 50)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(120):
        losses = module(batch)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
    before = si_snr_db(batch.mixtures.unsqueeze(2).expand_as(references), references).mean()
    assert -losses.separation_db - before > 10
    # a slot's cross-entropy is H(J) less the bound; an unseparated view holds two speakers equally
    assert math.log(8) - losses.mi_lower_bound_nats < 0.02
    assert losses.contrastive_nats < math.log(2) / 3 + 0.02
