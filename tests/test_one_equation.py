"""One equation: every named method equals its usual form, written here on its own."""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.contrast import (
    ONE_EQUATION,
    Comparison,
    ContrastConfig,
    contrast,
    cross_entropy,
    divergence,
    log_kernel,
    log_softmax,
    mix_uniform,
)
from csc_model.rows import Rows, compare_in_batch, forget_labels, make_rows, only

SCALE = 7.0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(count: int) -> Tensor:
    return ~torch.eye(count, dtype=torch.bool)


def class_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unit vectors, unit rows of a table, labels and their one-hot p."""
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    vectors, table = (F.normalize(drawn(n, 8, seed=n + 10 * seed), dim=-1) for n in (6, 5))
    return vectors, table, labels, F.one_hot(labels, 5).double()


def on_table(name: str, seed: int, scale: float = SCALE) -> Tensor:
    vectors, table, _, p = class_data(seed)
    config = ONE_EQUATION[name].config
    assert config is not None
    return contrast(Comparison(vectors, table, p, None), scale, config).cross_entropy.mean()


def in_batch(name: str, positive: Tensor, vectors: Tensor) -> Tensor:
    """Train with p uniform over the positives of each row, itself left out."""
    config = ONE_EQUATION[name].config
    assert config is not None
    p = positive.double() / positive.sum(-1, keepdim=True)
    allowed = others(len(vectors))
    return contrast(Comparison(vectors, vectors, p, allowed), SCALE, config).cross_entropy.mean()


def csc(seed: int) -> tuple[Tensor, Tensor]:
    vectors, table, labels, _ = class_data(seed)
    return on_table("csc", seed), F.cross_entropy(
        -SCALE * torch.cdist(vectors, table).square(), labels
    )


def csc_in_mix(seed: int) -> tuple[Tensor, Tensor]:
    """Two voices: the logistic loss of the difference between two squared distances."""
    vectors, config = class_data(seed)[0], ONE_EQUATION["csc_in_mix"].config
    assert config is not None
    pairs = F.normalize(drawn(6, 2, 8, seed=seed), dim=-1)
    p = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2)
    ours = contrast(Comparison(vectors, pairs, p, p >= 0), SCALE, config).cross_entropy.mean()
    right, wrong = ((vectors - pairs[:, k]).square().sum(-1) for k in (0, 1))
    return ours, F.softplus(SCALE * (right - wrong)).mean()


def softmax(seed: int) -> tuple[Tensor, Tensor]:
    vectors, table, labels, _ = class_data(seed)
    return on_table("softmax", seed), F.cross_entropy(SCALE * vectors @ table.T, labels)


def label_smooth(seed: int) -> tuple[Tensor, Tensor]:
    vectors, table, labels, _ = class_data(seed)
    config = ONE_EQUATION["label_smooth"].config
    assert config is not None
    return on_table("label_smooth", seed), F.cross_entropy(
        SCALE * vectors @ table.T, labels, label_smoothing=config.alpha
    )


def aam(seed: int) -> tuple[Tensor, Tensor]:
    vectors, table, labels, p = class_data(seed)
    config = ONE_EQUATION["aam"].config
    assert config is not None
    angle = torch.acos(vectors @ table.T)
    turned = torch.where(p > 0, angle + config.margin, angle)
    return on_table("aam", seed, 30.0), F.cross_entropy(30.0 * turned.cos(), labels)


def plain_supcon(vectors: Tensor, labels: list[int]) -> Tensor:
    """Return L_out of Khosla et al. (2020), in loops."""
    losses = []
    for i, row in enumerate(vectors):
        rest = [j for j in range(len(labels)) if j != i]
        normaliser = sum(torch.exp(SCALE * row @ vectors[j]) for j in rest)
        positives = [j for j in rest if labels[j] == labels[i]]
        terms = [torch.log(torch.exp(SCALE * row @ vectors[j]) / normaliser) for j in positives]
        losses.append(-sum(terms) / len(positives))
    return torch.stack(losses).mean()


LABELS = [0, 1, 0, 2, 1, 0, 2, 1]


def supcon(seed: int) -> tuple[Tensor, Tensor]:
    vectors, labels = F.normalize(drawn(8, 5, seed=seed), dim=-1), torch.tensor(LABELS)
    positive = (labels == labels[:, None]) & others(8)
    return in_batch("supcon", positive, vectors), plain_supcon(vectors, LABELS)


def csc_batch(seed: int) -> tuple[Tensor, Tensor]:
    """On the sphere a Gaussian of half the scale is the cosine kernel: SupCon again."""
    vectors, labels = F.normalize(drawn(8, 5, seed=seed), dim=-1), torch.tensor(LABELS)
    positive = (labels == labels[:, None]) & others(8)
    ours = in_batch("csc_batch", positive, vectors / math.sqrt(2))
    return ours, plain_supcon(vectors, LABELS)


def simclr(seed: int) -> tuple[Tensor, Tensor]:
    """NT-Xent (Chen et al., 2020): 2 k and 2 k + 1 are views of one recording."""
    vectors = F.normalize(drawn(8, 5, seed=seed), dim=-1)
    partner = torch.arange(8) ^ 1
    similarity = SCALE * vectors @ vectors.T
    similarity.fill_diagonal_(-torch.inf)
    ours = in_batch("simclr", F.one_hot(partner, 8).bool(), vectors)
    return ours, F.cross_entropy(similarity, partner)


def sne_p(x: Tensor, sigma: float = 1.3) -> Tensor:
    weight = torch.exp(-torch.cdist(x, x).square() / (2 * sigma**2)).fill_diagonal_(0)
    return weight / weight.sum(1, keepdim=True)


def sne(seed: int) -> tuple[Tensor, Tensor]:
    """Hinton and Roweis (2002)."""
    x, y = drawn(7, 6, seed=seed), drawn(7, 2, seed=seed + 1)
    log_p = log_softmax(log_kernel(x, x, 1 / (2 * 1.3**2)), others(7))
    ours = divergence(log_p.exp(), log_softmax(log_kernel(y, y, 1.0), others(7))).sum()
    p, q = sne_p(x), sne_p(y, sigma=math.sqrt(0.5))
    return ours, sum(
        p[i, j] * torch.log(p[i, j] / q[i, j]) for i in range(7) for j in range(7) if i != j
    )


def tsne(seed: int) -> tuple[Tensor, Tensor]:
    """Van der Maaten and Hinton (2008): one distribution over all ordered pairs."""
    x, y = drawn(7, 6, seed=seed), drawn(7, 2, seed=seed + 1)
    p = sne_p(x)
    joint = (p + p.T) / (2 * 7)
    logits = log_kernel(y, y, 1.0, "student").reshape(1, -1)
    ours = divergence(joint.reshape(1, -1), log_softmax(logits, others(7).reshape(1, -1))).sum()
    student = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
    q = student / student.sum()
    return ours, sum(
        joint[i, j] * torch.log(joint[i, j] / q[i, j]) for i in range(7) for j in range(7) if i != j
    )


def kmeans(seed: int) -> tuple[Tensor, Tensor]:
    """The sums of squares of all ways to halve six points are an affine map of the divergence.

    With wide Gaussians p falls linearly with the squared distance, and log q has two values. What
    is left of the divergence is the sum of squared distances inside the clusters, which is 2 |C|
    times the sum of squares about the means.
    """
    x, sigma, alpha = drawn(6, 3, seed=seed), 1e4, 0.3
    p = log_softmax(log_kernel(x, x, 1 / (2 * sigma**2))).exp()
    ours, usual = [], []
    for first in combinations(range(6), 3):
        label = torch.tensor([int(i in first) for i in range(6)])
        same = (label == label[:, None]).double()
        q = mix_uniform(same / 3, alpha)
        ours.append(cross_entropy(p, q.log()).sum())
        parts = [x[label == c] for c in (0, 1)]
        usual.append(sum((part - part.mean(0)).square().sum() for part in parts))
    weight = math.log((1 - alpha) / 3 + alpha / 6) - math.log(alpha / 6)
    slope = weight / (6 * 2 * sigma**2) * 2 * 3
    ours, usual = torch.stack(ours), torch.stack(usual)
    return (ours - ours[0]) / slope, usual - usual[0]


Form = Callable[[int], tuple[Tensor, Tensor]]
FORMS: list[Form] = [
    csc, csc_in_mix, csc_batch, softmax, label_smooth, aam, supcon, simclr, sne, tsne, kmeans,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_method_is_a_choice_of_p_and_q(form: Form, seed: int) -> None:
    ours, usual = form(seed)
    loose = form is kmeans  # which holds in a limit only
    torch.testing.assert_close(ours, usual, rtol=1e-6, atol=1e-4 if loose else 1e-9)


def test_every_method_of_the_table_is_tested() -> None:
    assert {form.__name__ for form in FORMS} == set(ONE_EQUATION)


def trained(rows: Rows, name: str) -> Tensor:
    """Return the loss of the vectors of slots, with p as training makes it of a batch."""
    config = ONE_EQUATION[name].config
    assert config is not None
    heard = torch.tensor([[True, False]]).expand(len(rows.vectors) // 2, 2)
    result = contrast(compare_in_batch(only(rows, heard)), SCALE, config)
    return result.cross_entropy[result.held].mean()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_batch_of_single_voices_is_trained_by_supcon_and_without_labels_by_nt_xent(
    seed: int,
) -> None:
    """Four episodes of two recordings each, one voice in a recording."""
    vectors, labels = drawn(8, 5, seed=seed), torch.tensor(LABELS)
    both, sounds = torch.stack([vectors, vectors]), torch.ones(8, 1, 4)
    labelled = make_rows(both, labels[:, None], sounds)
    units = F.normalize(vectors, dim=-1)
    torch.testing.assert_close(trained(labelled, "supcon"), plain_supcon(units, LABELS))
    numbers = forget_labels(labels.view(4, 2, 1), torch.ones(4, 2, dtype=torch.bool))
    unlabelled = make_rows(both, numbers.view(8, 1), sounds)
    torch.testing.assert_close(trained(unlabelled, "simclr"), simclr(seed)[1])


@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_a_uniform_share_adds_what_it_costs_to_find_nobody_in_particular(
    seed: int, alpha: float
) -> None:
    """On any set: `(1 - alpha)` of the loss without it, `alpha` of the mean of all candidates."""
    units, labels = F.normalize(drawn(8, 5, seed=seed), dim=-1), torch.tensor(LABELS)
    p = ((labels == labels[:, None]) & others(8)).double()
    comparison = Comparison(units, units, p / p.sum(-1, keepdim=True), others(8))
    plain, mixed = (
        contrast(comparison, SCALE, ContrastConfig(set="batch", alpha=share)).cross_entropy
        for share in (0.0, alpha)
    )
    squared = torch.cdist(units, units).square()
    rest = [[j for j in range(8) if j != i] for i in range(8)]
    mean = torch.stack([-(-SCALE * squared[i, rest[i]]).log_softmax(0).mean() for i in range(8)])
    torch.testing.assert_close(mixed, (1 - alpha) * plain + alpha * mean)


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 0.9))
@settings(max_examples=20, deadline=None)
def test_a_uniform_share_bounds_how_far_a_wrong_candidate_is_pushed(
    seed: int, alpha: float
) -> None:
    """A candidate that q gives less than `alpha / N` is drawn nearer, be it the wrong one."""
    p = F.one_hot(torch.tensor([2]), 6).double()
    logits = drawn(1, 6, seed=seed).mul(3).requires_grad_()
    cross_entropy(mix_uniform(p, alpha), log_softmax(logits)).sum().backward()
    wrong = p[0] == 0
    assert logits.grad is not None
    drawn_nearer = logits.grad[0, wrong] < 0
    assert torch.equal(drawn_nearer, logits.detach().softmax(-1)[0, wrong] < alpha / 6)
