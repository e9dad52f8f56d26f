"""A small model on a few episodes: what must work before a larger run is paid for."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from csc_model.attention import draw_allowed
from csc_model.config import ModelConfig
from csc_model.losses import best_permutation, pairwise_separation_loss, si_snr_db
from csc_model.model import ACTIVE, CSC
from csc_model.objective import Episodes, Losses, Objective
from tests.conftest import voice

EPISODES, TABLE = 8, 50
ALONE = 4  # episodes whose anchor is alone under the second condition
VOICES = 3 * EPISODES - ALONE  # an anchor for each episode, and everywhere another interferer


def crops(speakers: int) -> Tensor:
    """Return real speech at one level, `(speaker, 2, time)`: a quarter of a second of two texts."""
    places = [voice(speaker, text)[6000:10_096] for speaker in range(speakers) for text in (0, 1)]
    sources = torch.stack([torch.from_numpy(place.copy()) for place in places])
    sources = 0.1 * sources / sources.std(-1, keepdim=True)
    return sources.unflatten(0, (speakers, 2))


def few_episodes() -> Episodes:
    """Return episodes of two conditions in which nobody but an anchor is heard twice."""
    spoken, anchors = crops(VOICES), torch.arange(EPISODES)
    others = torch.arange(EPISODES, EPISODES + 2 * EPISODES).unflatten(0, (2, EPISODES)).T
    others = torch.where(others < VOICES, others, -1)
    heard = spoken[others, 0] * (others >= 0).unsqueeze(-1)
    references = torch.stack([spoken[:EPISODES], heard], 2)
    speakers = torch.stack([anchors[:, None].expand(-1, 2), others], 2)
    allowed = draw_allowed(EPISODES, 2, torch.Generator().manual_seed(0))
    return Episodes(references.sum(2), references, speakers, anchors, allowed)


class Learned(NamedTuple):
    """A model that knows its episodes by heart."""

    model: CSC
    batch: Episodes
    losses: Losses


@pytest.fixture(scope="module")
def learned() -> Iterator[Learned]:
    """Overfit a model: the cheapest proof that the loss is one, before a larger run is paid for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on such small tensors a second one is waited for more than used
    batch = few_episodes()
    torch.manual_seed(0)
    config = ModelConfig(
        frontend="conv", window=64, hop=32, num_bins=256, trunk="tcn", channels=64, hidden=64,
        shared_blocks=3, separation_blocks=1, speaker_blocks=1, embedding_dim=32,
    )  # fmt: skip
    module = Objective(CSC(config), TABLE)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(110):
        losses = module(batch)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
    yield Learned(module.model.eval(), batch, losses)
    torch.set_num_threads(threads)


@torch.no_grad()
def test_a_small_model_learns_eight_episodes_by_heart(learned: Learned) -> None:
    batch, losses = learned.batch, learned.losses
    mixtures, references = batch.mixtures.flatten(0, 1), batch.references.flatten(0, 1)
    two = (batch.speakers >= 0).all(-1).flatten()
    costs, _ = best_permutation(
        pairwise_separation_loss(learned.model.sources(mixtures), references)
    )
    before = si_snr_db(mixtures.unsqueeze(1).expand_as(references), references).mean(-1)
    assert (-costs - before)[two].mean() > 10
    # a slot's cross-entropy is H(J) less the bound; an unseparated view holds two speakers equally
    heard = batch.speakers[batch.speakers >= 0]
    share = heard.bincount() / len(heard)
    assert -(share * share.log()).sum() - losses.mi_lower_bound_nats < 0.02
    least = math.log(2) * two.sum() / (len(heard) + len(mixtures))
    assert losses.contrastive_nats < least + 0.02


@torch.no_grad()
def test_who_speaks_alone_leaves_a_slot_empty_and_the_model_says_so(learned: Learned) -> None:
    output = learned.model(learned.batch.mixtures.flatten(0, 1))
    references = learned.batch.references.flatten(0, 1)
    _, assignment = best_permutation(pairwise_separation_loss(output.sources, references))
    activity = output.activity.gather(1, assignment)  # in the order of the references
    held = learned.batch.speakers.flatten(0, 1) >= 0
    assert int((~held).sum()) == ALONE
    assert ((activity > ACTIVE) == held).all()
