"""Attention over conditions: who reads whom, with which weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.attention import ConditionAttention, draw_allowed, weighted_statistics


def test_attention_reads_only_what_it_may() -> None:
    attention = ConditionAttention(8, 2)
    embedding = torch.randn(1, 3, 8)
    itself = torch.eye(3, dtype=torch.bool)[None]
    changed = embedding.clone()
    changed[:, 1:] += 1
    torch.testing.assert_close(attention(embedding, itself)[:, 0], attention(changed, itself)[:, 0])
    assert not torch.allclose(attention(embedding)[:, 0], attention(changed)[:, 0])


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_query_may_attend_to_something(batch: int, conditions: int, seed: int) -> None:
    allowed = draw_allowed(batch, conditions, torch.Generator().manual_seed(seed))
    assert allowed.shape == (batch, conditions, conditions)
    assert allowed.any(-1).all()


@given(st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_conditions_are_masked_at_random(conditions: int, seed: int) -> None:
    """A third of the episodes sees itself, one others too, one only others, who come and go."""
    allowed = draw_allowed(300, conditions, torch.Generator().manual_seed(seed))
    itself = torch.eye(conditions, dtype=torch.bool)
    sees_itself, others = (allowed & itself).any(-1), (allowed & ~itself).sum(-1)
    assert (sees_itself == sees_itself[:, :1]).all()
    alone = others[:, 0] == 0
    assert ((others == 0) == alone[:, None]).all()
    assert not (alone & ~sees_itself[:, 0]).any()
    kinds = [alone, ~alone & sees_itself[:, 0], ~sees_itself[:, 0]]
    assert all(60 < int(kind.sum()) < 140 for kind in kinds)
    for kind in kinds[1:]:
        assert set(others[kind].flatten().tolist()) == {*range(1, conditions)}
    if conditions > 2:
        kept = allowed[~alone][:, ~itself].float().mean(0)  # by query and condition
        assert ((kept > 0.4) & (kept < 0.85)).all()


def test_of_two_conditions_each_keeps_the_other() -> None:
    """For two, nothing is drawn but the kind of an episode."""
    generator, other = (torch.Generator().manual_seed(0) for _ in range(2))
    kinds, itself = torch.randint(3, (40, 1, 1), generator=other), torch.eye(2, dtype=torch.bool)
    expected = torch.where(kinds == 0, itself, (kinds == 1) | ~itself)
    assert torch.equal(draw_allowed(40, 2, generator), expected)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_are_those_that_forward_mixes_with(qk_norm: bool, masked: bool) -> None:
    torch.manual_seed(0)
    attention, embedding = ConditionAttention(16, 4, qk_norm=qk_norm), torch.randn(5, 3, 16)
    allowed = draw_allowed(5, 3, torch.Generator().manual_seed(1)) if masked else None
    weights = attention.weights(embedding, allowed).weights
    assert weights.shape == (5, 4, 3, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 4, 3))
    if allowed is not None:
        assert not weights[~allowed.unsqueeze(1).expand_as(weights)].any()
    value = attention.value(embedding).reshape(5, 3, 4, 4)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(-2)
    expected = attention.norm(embedding + attention.out(mixed))
    torch.testing.assert_close(attention(embedding, allowed), expected)


def test_the_largest_logit_grows_with_the_embeddings_unless_bounded() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(4, 3, 16)
    free, bounded = ConditionAttention(16, 4), ConditionAttention(16, 4, qk_norm=True)
    assert free.weights(100 * embedding).largest_logit > 1000 * free.weights(embedding)[1]
    assert bounded.weights(100 * embedding).largest_logit <= math.sqrt(16 / 4) + 1e-5


@pytest.mark.parametrize("mean", [0.0, 10.0, 200.0])
def test_statistics_of_rounded_values_are_those_of_the_values(mean: float) -> None:
    torch.manual_seed(0)
    x = (mean + torch.randn(2, 3, 50)).bfloat16()
    weight = torch.rand(2, 3, 50).softmax(-1).bfloat16()
    exact, share = x.double().numpy(), weight.double().numpy()
    means = (share * exact).sum(-1)
    deviations = np.sqrt((share * (exact - means[..., None]) ** 2).sum(-1))
    expected = np.concatenate([means, deviations], -1)
    np.testing.assert_allclose(weighted_statistics(x, weight).numpy(), expected, rtol=1e-4)


def test_one_condition_attends_to_itself() -> None:
    weights = ConditionAttention(8, 2).weights(torch.randn(2, 1, 8)).weights
    assert torch.equal(weights, torch.ones(2, 2, 1, 1))
