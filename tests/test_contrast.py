"""The contrastive loss: its bounds, its gradients, and rows that say nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from csc_model.contrast import (
    Comparison,
    ContrastConfig,
    add_margin,
    contrast,
    divergence,
    log_kernel,
    mi_cap_nats,
    mi_lower_bound_nats,
)
from tests.test_one_equation import SCALE, class_data, drawn, others


def test_a_divergence_is_zero_only_where_q_is_p() -> None:
    p = drawn(4, 6).softmax(-1)
    assert divergence(p, p.log()).abs().max() < 1e-12
    assert (divergence(p, drawn(4, 6, seed=1).log_softmax(-1)) > 0).all()


@given(
    st.sampled_from(["gaussian", "cosine", "student"]),
    st.integers(2, 40),
    st.integers(1, 60),
    st.floats(0.1, 64),
    st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_the_information_on_a_table_never_exceeds_its_cap(
    kernel: str, speakers: int, rows: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(speakers, (rows,), generator=generator)
    table = F.normalize(torch.randn(speakers, 8, generator=generator), dim=-1)
    noise = 0.1 * torch.randn(rows, 8, generator=generator)
    vectors = F.normalize(table[labels] + noise, dim=-1)
    p = F.one_hot(labels, speakers).float()
    config = ContrastConfig(kernel=kernel)  # type: ignore[arg-type]
    evidence = contrast(Comparison(vectors, table, p, None), scale, config).evidence
    assert mi_lower_bound_nats(evidence, p) <= mi_cap_nats(p) + 1e-5
    assert mi_cap_nats(p).item() == pytest.approx(math.log(speakers))


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_information_within_a_batch_never_exceeds_its_cap(
    rows: int, speakers: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(speakers, (rows,), generator=generator)
    vectors = F.normalize(F.one_hot(labels, 8) + 0.1 * torch.randn(rows, 8), dim=-1)
    allowed = others(rows) & (torch.rand(rows, rows, generator=generator) < 0.8)
    weight = ((labels == labels[:, None]) & allowed).float()
    p = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    config = ContrastConfig(set="batch")
    evidence = contrast(Comparison(vectors, vectors, p, allowed), 60.0, config).evidence
    bound = mi_lower_bound_nats(evidence, p, allowed)
    assert bound <= mi_cap_nats(p, allowed) + 1e-5
    assert mi_cap_nats(p, allowed).item() <= math.log(rows)


def test_smoothing_and_margin_leave_the_bound_alone() -> None:
    vectors, table, _, p = class_data()
    plain = contrast(Comparison(vectors, table, p, None), 5.0, ContrastConfig(kernel="cosine"))
    config = ContrastConfig(kernel="cosine", alpha=0.3, margin=0.2)
    changed = contrast(Comparison(vectors, table, p, None), 5.0, config)
    torch.testing.assert_close(changed.evidence, plain.evidence)
    assert (changed.cross_entropy > plain.cross_entropy).any()


def test_a_margin_beyond_the_half_circle_still_rises_with_the_angle() -> None:
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    p = torch.ones(200, dtype=torch.float64)
    assert (add_margin(angle.cos(), p, 0.5).diff() < 0).all()


def test_a_row_without_a_speaker_costs_nothing() -> None:
    table = F.normalize(drawn(4, 8), dim=-1)
    nobody = Comparison(table, table, torch.zeros(4, 4).double(), None)
    for config in (ContrastConfig(), ContrastConfig(alpha=0.4)):
        result = contrast(nobody, 5.0, config)
        assert result.cross_entropy.abs().max() == 0
        assert not result.held.any()
        assert mi_lower_bound_nats(result.evidence, nobody.p) == 0


def test_a_row_that_may_be_compared_with_nobody_gives_a_gradient_of_zero() -> None:
    vectors = drawn(3, 8).requires_grad_()
    lonely = Comparison(vectors, vectors, torch.zeros(3, 3).double(), torch.zeros(3, 3).bool())
    result = contrast(lonely, 5.0, ContrastConfig(set="batch"))
    result.cross_entropy.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("kernel", "margin"), [("gaussian", 0.0), ("cosine", 0.0), ("cosine", 0.2), ("student", 0.0)]
)
def test_the_gradients_agree_with_finite_differences(kernel: str, margin: float) -> None:
    p = drawn(3, 5, seed=3).softmax(-1)
    config = ContrastConfig(kernel=kernel, margin=margin, alpha=0.1)  # type: ignore[arg-type]

    def loss(vectors: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        units = [F.normalize(x, dim=-1) for x in (vectors, table)]
        return contrast(Comparison(*units, p, None), scale, config).cross_entropy

    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = (drawn(3, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_(), scale)
    assert torch.autograd.gradcheck(loss, inputs)


def test_rows_may_have_candidates_of_their_own() -> None:
    items, candidates = drawn(3, 4), drawn(3, 5, 4)
    for kernel in ("gaussian", "cosine", "student"):
        ours = log_kernel(items, candidates, 2.0, kernel)
        for row in range(3):
            alone = log_kernel(items[row : row + 1], candidates[row], 2.0, kernel)
            torch.testing.assert_close(ours[row : row + 1], alone)


def test_half_precision_is_not_used_under_autocast() -> None:
    vectors, table, _, p = class_data()
    whole = Comparison(vectors.float(), table.float(), p.float(), None)
    plain = contrast(whole, SCALE, ContrastConfig()).cross_entropy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = contrast(whole, SCALE, ContrastConfig()).cross_entropy
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "given", [{"label_free": True}, {"margin": 0.2}, {"scale": 65.0}, {"set": "all"}]
)
def test_a_choice_that_means_nothing_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ContrastConfig(**given)  # type: ignore[arg-type]
