"""Mixtures of mixtures: the best assignment, against trying all of them in plain loops."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.mixit import least_squares_mixing, mixing_costs, mixing_matrices, mixit_loss


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cost(estimates: Tensor, mixtures: Tensor, choice: tuple[int, ...]) -> float:
    """Return minus the mean thresholded SNR (Wisdom et al., 2020) by forming the sums."""
    costs = []
    for which, mixture in enumerate(mixtures):
        rebuilt = sum(
            (e for e, c in zip(estimates, choice, strict=True) if c == which),
            torch.zeros_like(mixture),
        )
        error = (mixture - rebuilt).square().sum()
        power = mixture.square().sum()
        costs.append(10 * torch.log10((error + 1e-3 * power) / power))
    return torch.stack(costs).mean().item()


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_best_assignment_is_that_of_brute_force(outputs: int, seed: int) -> None:
    estimates, mixtures = drawn(2, outputs, 60, seed=seed), drawn(2, 2, 60, seed=seed + 1)
    least, mixing = mixit_loss(estimates, mixtures)
    for item in range(2):
        costs = {
            choice: plain_cost(estimates[item], mixtures[item], choice)
            for choice in product((0, 1), repeat=outputs)
        }
        best = min(costs, key=costs.__getitem__)
        assert least[item].item() == pytest.approx(costs[best], abs=1e-6)
        assert tuple(mixing[item, 1].tolist()) == best
        assert (mixing[item].sum(0) == 1).all()


@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_never_beats_trying_all(outputs: int, seed: int, noise: float) -> None:
    mixtures = drawn(3, 2, 80, seed=seed)
    estimates = mixtures.repeat(1, outputs, 1)[:, :outputs] / outputs
    estimates = estimates + noise * drawn(3, outputs, 80, seed=seed + 1)
    least, _ = mixit_loss(estimates, mixtures)
    quick = least_squares_mixing(estimates, mixtures)
    cost = mixing_costs(estimates, mixtures, quick.unsqueeze(1)).squeeze(1)
    assert (cost >= least - 1e-9).all()


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_finds_the_assignment_of_outputs_like_the_sources(
    outputs: int, seed: int
) -> None:
    sources = drawn(4, outputs, 400, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(2, (4, outputs), generator=generator)
    mixing = torch.stack([1 - choice, choice], 1)
    mixtures = mixing.double() @ sources + 0.05 * drawn(4, 2, 400, seed=seed + 1)
    estimates = sources + 0.1 * drawn(4, outputs, 400, seed=seed + 2)
    assert (least_squares_mixing(estimates, mixtures) == mixing).all()
    _, best = mixit_loss(estimates, mixtures)
    power = mixtures.square().mean(-1)
    both = (power > 0.1).all(
        -1
    )  # an empty mixture can be rebuilt no better by one way than another
    assert (best == mixing)[both].all()


@given(st.integers(2, 4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_both_searches_cost_the_same_once_outputs_are_like_the_sources(
    outputs: int, seed: int
) -> None:
    sources = drawn(3, 4, 300, seed=seed)[:, :outputs]
    choice = torch.arange(outputs) % 2
    mixtures = torch.stack([sources[:, choice == which].sum(1) for which in (0, 1)], 1)
    estimates = sources + 0.1 * drawn(3, outputs, 300, seed=seed + 1)
    costs = [mixit_loss(estimates, mixtures, search)[0] for search in ("all", "least_squares")]
    torch.testing.assert_close(*costs)


def test_true_sources_reach_thirty_db() -> None:
    sources = drawn(1, 4, 500)
    mixtures = torch.stack([sources[:, 0] + sources[:, 2], sources[:, 1] + sources[:, 3]], 1)
    assert mixit_loss(sources, mixtures)[0].item() == pytest.approx(-30, abs=1e-3)


def test_the_order_of_mixtures_and_outputs_changes_nothing() -> None:
    estimates, mixtures = drawn(3, 4, 90), drawn(3, 2, 90, seed=1)
    least, _ = mixit_loss(estimates, mixtures)
    torch.testing.assert_close(mixit_loss(estimates, mixtures.flip(1))[0], least)
    torch.testing.assert_close(mixit_loss(estimates.flip(1), mixtures)[0], least)


def test_the_gradient_agrees_with_finite_differences() -> None:
    inputs = (drawn(2, 3, 20).requires_grad_(), drawn(2, 2, 20, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda e, m: mixit_loss(e, m)[0], inputs)


def test_silence_gives_finite_numbers() -> None:
    estimates = torch.zeros(1, 2, 50, requires_grad=True)
    least, _ = mixit_loss(estimates, torch.zeros(1, 2, 50))
    least.sum().backward()
    assert least.isfinite().all()
    assert estimates.grad is not None
    assert estimates.grad.isfinite().all()
    assert mixing_matrices(3).shape == (8, 2, 3)


def test_half_precision_is_not_used_under_autocast() -> None:
    estimates, mixtures = drawn(2, 3, 200).float(), drawn(2, 2, 200, seed=1).float()
    plain, _ = mixit_loss(estimates, mixtures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        least, _ = mixit_loss(estimates, mixtures)
    torch.testing.assert_close(least, plain, rtol=0, atol=0)
