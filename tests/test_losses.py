"""Separation, activity and spread: oracles, invariances, and values that must not drift."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from csc_model.attention import draw_allowed
from csc_model.config import ModelConfig
from csc_model.losses import (
    activity_loss,
    best_permutation,
    nearest_distance,
    pairwise_separation_loss,
    si_snr_db,
    snr_db,
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


def test_snr_is_the_textbook_value_and_heeds_the_level() -> None:
    reference, noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).double()
    error = float((0.1 * noise).square().sum() / reference.square().sum())
    expected = -10 * math.log10(error + 1e-2)  # the floor of 20 dB
    assert snr_db(reference + 0.1 * noise, reference).item() == pytest.approx(expected)
    halved = -10 * math.log10(0.25 + 1e-2)
    assert snr_db(0.5 * reference, reference).item() == pytest.approx(halved)
    assert snr_db(reference, reference).item() == pytest.approx(20.0)


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


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
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
        hungarian = linear_sum_assignment(cost[item].T.numpy())[1]
        assert assignment[item].tolist() == hungarian.tolist()


def test_the_separation_loss_is_exact_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(3, 2, 4000, generator=generator)
    estimates = references + 0.05 * torch.randn(3, 2, 4000, generator=generator)
    plain = pairwise_separation_loss(estimates, references)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = pairwise_separation_loss(estimates, references)
        rounded = pairwise_separation_loss(estimates.bfloat16(), references)
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    assert rounded.dtype == torch.float32


def test_the_activity_loss_is_the_cross_entropy_of_who_is_heard_where() -> None:
    references = torch.stack([torch.ones(1, 50), torch.zeros(1, 50)], 1)
    logits = torch.tensor([[2.0, -1.0]])
    right = activity_loss(logits, references, torch.tensor([[0, 1]]))
    wrong = activity_loss(logits, references, torch.tensor([[1, 0]]))
    heard, quiet = math.log1p(math.exp(-2)), math.log1p(math.exp(-1))
    assert right.item() == pytest.approx((heard + quiet) / 2)
    assert wrong.item() == pytest.approx((heard + 2 + quiet + 1) / 2)


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


def test_the_spread_loss_sees_the_nearest_neighbour() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert spread_loss(nearest_distance(table)).item() == pytest.approx(
        -0.5 * math.log(2), abs=1e-5
    )
    assert nearest_distance(table).tolist() == pytest.approx([math.sqrt(2)] * 3)


def test_the_nearest_neighbours_of_a_large_table_are_those_of_rows_that_are_drawn() -> None:
    table = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = nearest_distance(table, at_most=10)
    assert len(found) == 10
    whole = nearest_distance(table)
    assert len(whole) == 40
    assert torch.isclose(found.unsqueeze(1), whole, atol=1e-5).any(1).all()


def test_where_nobody_speaks_nothing_is_to_be_separated() -> None:
    estimates = torch.randn(2, 2, 100, requires_grad=True)
    references = torch.stack([torch.zeros(2, 100), torch.randn(2, 100)])
    cost = pairwise_separation_loss(estimates, references)
    torch.testing.assert_close(cost[0], torch.zeros(2, 2), atol=1e-5, rtol=0)
    cost.sum().backward()
    assert estimates.grad is not None
    assert estimates.grad[0].eq(0).all()
    assert estimates.grad[1].ne(0).any()


def test_what_is_exact_is_so_for_tensors_by_name() -> None:
    estimate, reference = torch.randn(2, 50).bfloat16()
    by_name = snr_db(estimate=estimate, reference=reference)
    assert by_name.dtype == torch.float32
    assert torch.equal(by_name, snr_db(estimate, reference))


def test_the_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    gradcheck = torch.autograd.gradcheck
    references = normal(2, 2, 30)
    assignment = torch.tensor([[0, 1], [1, 0]])
    assert gradcheck(lambda table: spread_loss(nearest_distance(table)), (normal(5, 4),))
    assert gradcheck(pairwise_separation_loss, (normal(2, 2, 30), references))
    assert gradcheck(lambda x: activity_loss(x, references.detach(), assignment), (normal(2, 2),))


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
    "tcn": [6.79389, 6.10682, 4.33178, 2.6799, 2.9677, 3.32735, 3.37181, 2.88459, 2.53864, 2.53601],
    "galr": [
        14.8275,
        15.1256,
        10.8772,
        10.3604,
        7.96954,
        9.30499,
        7.04919,
        8.29688,
        7.08511,
        7.45557,
    ],
}


@pytest.mark.parametrize("kind", SMALL)
def test_ten_steps_give_the_golden_losses(kind: str) -> None:
    assert ten_steps(kind) == pytest.approx(GOLDEN[kind], rel=2e-3)
