"""The losses: invariances, oracles, and values that must not drift."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.attention import draw_allowed
from csc_model.config import ModelConfig
from csc_model.losses import (
    best_permutation,
    contrastive_loss,
    mi_lower_bound_nats,
    pairwise_separation_loss,
    si_snr_db,
    spread_loss,
)
from csc_model.model import CSC
from csc_model.objective import Episodes, Objective

SMALL = {
    "tcn": ModelConfig(frontend="stft", window=128, hop=64, trunk="tcn", channels=16, hidden=16,
                       shared_blocks=1, separation_blocks=1, speaker_blocks=1, embedding_dim=16),
    "galr": ModelConfig(frontend="conv", window=16, hop=8, num_bins=16, trunk="galr", channels=16,
                        hidden=12, shared_blocks=1, separation_blocks=1, speaker_blocks=1,
                        segment=16, queries=4, embedding_dim=16),
}  # fmt: skip
NUM_SPEAKERS = 9


def objective(kind: str, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    return Objective(CSC(SMALL[kind]), NUM_SPEAKERS)


def episodes(seed: int, batch: int = 3, conditions: int = 2, slots: int = 2) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    references = 0.1 * torch.randn(batch, conditions, slots, 2000, generator=generator)
    orders = torch.rand(batch, conditions, NUM_SPEAKERS, generator=generator)
    anchors = torch.arange(batch)  # ordered first of all, so that it is there once
    orders[torch.arange(batch), :, anchors] = -1
    speakers = orders.argsort(-1)[:, :, :slots]
    allowed = draw_allowed(batch, conditions, generator)
    return Episodes(references.sum(2), references, speakers, anchors, allowed)


def gradients(module: Objective, given_episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    total = module(given_episodes).total
    total.backward()
    return total.detach(), {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def test_si_snr_is_the_textbook_value() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=4000)
    estimate = 0.3 * reference + 0.1 * rng.normal(size=4000)
    s, e = reference - reference.mean(), estimate - estimate.mean()
    target = (e @ s) / (s @ s) * s
    expected = 10 * math.log10((target @ target) / ((e - target) @ (e - target)))
    ours = si_snr_db(torch.from_numpy(estimate), torch.from_numpy(reference))
    # the floor of 30 dB adds 1e-3 of the signal to the error
    floored = 10 * math.log10(1 / (10 ** (-expected / 10) + 1e-3))
    assert ours.item() == pytest.approx(floored, abs=1e-3)


@given(st.floats(0.01, 100), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_si_snr_ignores_scale(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, noise = torch.randn(2, 1000, generator=generator)
    estimate = reference + noise
    assert si_snr_db(scale * estimate, reference) == pytest.approx(
        si_snr_db(estimate, reference).item(), abs=1e-2
    )


def test_a_perfect_estimate_reaches_thirty_db_and_no_more() -> None:
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert si_snr_db(reference, reference).item() == pytest.approx(30.0, abs=0.05)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_best_permutation_is_that_of_brute_force(slots: int) -> None:
    cost = torch.randn(20, slots, slots, generator=torch.Generator().manual_seed(slots))
    least, assignment = best_permutation(cost)
    for item in range(20):
        plain = {
            order: sum(cost[item, slot, reference].item() for reference, slot in enumerate(order))
            for order in permutations(range(slots))
        }
        best = min(plain, key=plain.__getitem__)
        assert least[item].item() == pytest.approx(plain[best] / slots, abs=1e-5)
        assert tuple(assignment[item].tolist()) == best


def test_an_empty_slot_costs_what_leaks_into_it() -> None:
    speech = torch.randn(1, 1, 2000, generator=torch.Generator().manual_seed(0))
    references = torch.cat([speech, torch.zeros_like(speech)], 1)
    quiet, loud = (torch.cat([speech, level * speech], 1) for level in (0.0, 1.0))
    costs = [pairwise_separation_loss(estimate, references)[0, 1, 1] for estimate in (quiet, loud)]
    assert costs[0].item() == pytest.approx(-30, abs=0.1)
    assert costs[1].item() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("kind", SMALL)
@given(seed=st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_the_order_of_references_changes_no_loss_and_no_gradient(
    kind: str, slots: int, seed: int
) -> None:
    torch.manual_seed(0)
    module = Objective(CSC(SMALL[kind].model_copy(update={"num_slots": slots})), NUM_SPEAKERS)
    module.double()  # to tell an effect from rounding
    plain = episodes(seed, slots=slots)
    plain = plain._replace(mixtures=plain.mixtures.double(), references=plain.references.double())
    swapped = plain._replace(references=plain.references.flip(2), speakers=plain.speakers.flip(2))
    loss, gradient = gradients(module, plain)
    other_loss, other_gradient = gradients(module, swapped)
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-7)
    for name, value in gradient.items():
        torch.testing.assert_close(other_gradient[name], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", SMALL)
def test_swapping_the_labels_alone_changes_the_contrastive_loss(kind: str) -> None:
    module, plain = objective(kind), episodes(1)
    swapped = plain._replace(speakers=plain.speakers.flip(2))
    assert module(swapped).separation_db.item() == module(plain).separation_db.item()
    assert abs(module(swapped).contrastive_nats - module(plain).contrastive_nats).item() > 1e-4


def test_the_table_loss_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, table = torch.randn(6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    target = torch.nn.functional.one_hot(labels, 5).float()
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (vectors, table)]
    logits = -7.0 * torch.cdist(*unit).square()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(
        contrastive_loss(vectors, table, target, torch.tensor(7.0)), expected, rtol=1e-4, atol=1e-5
    )


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_mutual_information_bound_never_exceeds_its_cap(
    speakers: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(speakers, (rows,), generator=generator)
    target = torch.nn.functional.one_hot(labels, speakers).float()
    table = torch.randn(speakers, 8, generator=generator)
    vectors = table[labels] + 0.1 * torch.randn(rows, 8, generator=generator)
    entropy = contrastive_loss(vectors, table, target, torch.tensor(60.0))
    assert mi_lower_bound_nats(entropy, target).item() <= math.log(speakers) + 1e-5


def test_rows_without_a_speaker_cost_nothing() -> None:
    table = torch.randn(4, 8)
    assert contrastive_loss(table, table, torch.zeros(4, 4), torch.tensor(5.0)).abs().max() == 0


def test_the_spread_loss_sees_the_nearest_neighbour() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert spread_loss(table).item() == pytest.approx(-0.5 * math.log(2), abs=1e-5)


def test_the_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    target = torch.softmax(normal(3, 5), -1).detach()
    scale = torch.tensor(2.0, dtype=torch.float64)
    table = normal(5, 4)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda v, t: contrastive_loss(v, t, target, scale), (normal(3, 4), table))
    assert gradcheck(spread_loss, (table,))
    assert gradcheck(pairwise_separation_loss, (normal(2, 2, 30), normal(2, 2, 30)))


def ten_steps(kind: str) -> list[float]:
    module = objective(kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for step in range(10):
        total = module(episodes(step)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


GOLDEN = {
    "tcn": [
        5.1477,
        4.19628,
        4.56032,
        3.93366,
        3.72412,
        2.98872,
        2.86524,
        2.33288,
        3.92341,
        4.38663,
    ],
    "galr": [
        7.38562,
        6.52765,
        6.60934,
        5.17091,
        5.72752,
        5.78938,
        5.67629,
        4.99273,
        5.2096,
        5.04239,
    ],
}


@pytest.mark.parametrize("kind", SMALL)
def test_ten_steps_give_the_golden_losses(kind: str) -> None:
    assert ten_steps(kind) == pytest.approx(GOLDEN[kind], rel=2e-3)
