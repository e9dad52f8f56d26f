"""The objective as a whole: what must and must not change it, for every contrast set."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from csc_model.balance import GradientBalance, gradient_norms
from csc_model.contrast import ContrastConfig
from csc_model.episodes import anchor_first, has_anchor
from csc_model.mixit import mixit_loss
from csc_model.model import CSC
from csc_model.objective import Episodes, Objective
from csc_model.rows import compare_in_batch, forget_labels, make_rows, only
from tests.test_losses import NUM_SPEAKERS, SMALL, episodes, gradients

CONTRASTS = {
    "table": ContrastConfig(),
    "batch": ContrastConfig(set="batch"),
    "in_mix": ContrastConfig(set="in_mix"),
    "batch_label_free": ContrastConfig(set="batch", label_free=True),
    "in_mix_label_free": ContrastConfig(set="in_mix", label_free=True),
    "aam": ContrastConfig(kernel="cosine", scale=30.0, learn_scale=False, margin=0.2),
    "student_smoothed": ContrastConfig(set="batch", kernel="student", alpha=0.2),
}
every_contrast = pytest.mark.parametrize("name", CONTRASTS)


def objective(name: str, slots: int = 2, **options: object) -> Objective:
    torch.manual_seed(0)
    config = SMALL["tcn"].model_copy(update={"num_slots": slots})
    return Objective(CSC(config), NUM_SPEAKERS, contrast=CONTRASTS[name], **options)  # type: ignore[arg-type]


def in_double(given: Episodes) -> Episodes:
    mixtures, references = given.mixtures.double(), given.references.double()
    return given._replace(mixtures=mixtures, references=references)


def with_absences(given: Episodes) -> Episodes:
    """Leave out the anchor of one mixture and the interferers of another."""
    references, speakers = given.references.clone(), given.speakers.clone()
    anchor_first = speakers == given.anchors[:, None, None]
    for episode, condition, absent in (
        (1, 0, anchor_first[1, 0]),
        (2, 1, ~anchor_first[2, 1]),
    ):
        speakers[episode, condition, absent] = -1
        references[episode, condition, absent] = 0
    return given._replace(
        mixtures=references.sum(2) + 1e-3, references=references, speakers=speakers
    )


@every_contrast
@pytest.mark.parametrize("slots", [2, 3])
@given(seed=st.integers(0, 1000), absences=st.booleans())
@settings(max_examples=3, deadline=None)
def test_the_order_of_references_changes_no_loss_and_no_gradient(
    name: str, slots: int, seed: int, absences: bool
) -> None:
    module = objective(name, slots).double()
    plain = in_double(episodes(seed, slots=slots))
    plain = with_absences(plain) if absences else plain
    swapped = plain._replace(references=plain.references.flip(2), speakers=plain.speakers.flip(2))
    loss, gradient = gradients(module, plain)
    other_loss, other_gradient = gradients(module, swapped)
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-7)
    assert gradient.keys() == other_gradient.keys()
    for key, value in gradient.items():
        torch.testing.assert_close(other_gradient[key], value, rtol=1e-5, atol=1e-8)


@every_contrast
def test_only_a_loss_with_labels_sees_them(name: str) -> None:
    module, plain = objective(name), episodes(1)
    order = torch.randperm(NUM_SPEAKERS, generator=torch.Generator().manual_seed(0))
    if CONTRASTS[name].label_free:  # other names for the same recordings
        renamed = plain._replace(speakers=order[plain.speakers], anchors=order[plain.anchors])
        assert module(renamed).total.item() == module(plain).total.item()
    swapped = plain._replace(speakers=plain.speakers.flip(2))
    assert module(swapped).separation_db.item() == module(plain).separation_db.item()
    assert abs(module(swapped).contrastive_nats - module(plain).contrastive_nats).item() > 1e-5


@every_contrast
def test_the_information_never_exceeds_its_cap(name: str) -> None:
    module = objective(name)
    for seed in range(5):
        losses = module(with_absences(episodes(seed)))
        assert losses.mi_lower_bound_nats <= losses.mi_cap_nats + 1e-5
        assert losses.contrastive_nats >= 0
    caps = {"table": NUM_SPEAKERS, "in_mix": 2, "batch": 11}
    assert losses.mi_cap_nats.item() <= math.log(caps[CONTRASTS[name].set]) + 1e-5


@every_contrast
def test_one_condition_and_nobody_known_are_no_trouble(name: str) -> None:
    module = objective(name)
    alone = episodes(0, conditions=1)
    nobody = alone._replace(
        speakers=torch.full_like(alone.speakers, -1), references=torch.zeros_like(alone.references)
    )
    for given_episodes in (alone, nobody, with_absences(episodes(0))):
        loss, gradient = gradients(module, given_episodes)
        assert loss.isfinite()
        assert all(value.isfinite().all() for value in gradient.values())
        assert all(term.isfinite() for term in module(given_episodes))
    assert module(nobody).contrastive_nats == 0


@every_contrast
def test_whoever_is_absent_contributes_nothing(name: str) -> None:
    """An episode of nobody beside others changes their contrastive loss not at all."""
    module = objective(name).double()
    plain = in_double(episodes(0))
    speakers, references = plain.speakers.clone(), plain.references.clone()
    speakers[-1], references[-1] = -1, 0
    silent = plain._replace(speakers=speakers, references=references)
    fewer = Episodes(*(x[:-1] for x in plain if x is not None))
    with_nobody, without = module(silent), module(fewer)
    assert with_nobody.contrastive_nats.item() == pytest.approx(without.contrastive_nats.item())
    assert with_nobody.mi_lower_bound_nats.item() == pytest.approx(
        without.mi_lower_bound_nats.item()
    )


@every_contrast
def test_mixtures_of_mixtures_take_no_part_in_the_contrast(name: str) -> None:
    module = objective(name, slots=3).double()
    plain = in_double(episodes(0, slots=3))
    references = plain.references.clone()
    references[0, :, 2] = 0
    mixed = plain._replace(
        mixtures=references.sum(2),
        references=references,
        mixit=torch.tensor([True, False, False]),
    )
    losses = module(mixed)
    known = Episodes(*(x[1:] for x in plain if x is not None))
    assert losses.contrastive_nats.item() == pytest.approx(module(known).contrastive_nats.item())
    sources = module.model(mixed.mixtures.flatten(0, 1)).sources
    first = mixit_loss(sources[:2], references[0, :, :2])[0]
    rest = module(known).separation_db
    expected = (first.sum() + 4 * rest) / 6
    assert losses.separation_db.item() == pytest.approx(expected.item())
    swapped = mixed._replace(
        references=torch.cat([references[:, :, :2].flip(2), references[:, :, 2:]], 2),
        speakers=torch.cat([plain.speakers[:, :, :2].flip(2), plain.speakers[:, :, 2:]], 2),
    )
    assert module(swapped).total.item() == pytest.approx(losses.total.item(), rel=1e-7)


def test_mixtures_of_mixtures_are_put_together_as_asked() -> None:
    mixed = episodes(2, slots=4)._replace(mixit=torch.ones(3, dtype=torch.bool))
    sources = objective("table", slots=4).model.sources(mixed.mixtures.flatten(0, 1))
    for search in ("all", "least_squares"):
        module = objective("table", slots=4, separation_only=True, mixit=search)
        expected = mixit_loss(sources, mixed.references.flatten(0, 1)[:, :2], search)[0].mean()
        torch.testing.assert_close(module(mixed).separation_db, expected)


def test_mixtures_of_mixtures_need_two_slots() -> None:
    one = episodes(0, slots=1)._replace(mixit=torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="set num_slots"):
        objective("table", slots=1)(one)


@every_contrast
def test_the_losses_are_exact_under_autocast(name: str) -> None:
    module = objective(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = module(episodes(0))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in losses)
    losses.total.backward()
    parameters = [p for p in module.parameters() if p.grad is not None]
    assert all(p.grad.isfinite().all() for p in parameters if p.grad is not None)


@every_contrast
def test_the_same_seed_gives_the_same_loss(name: str) -> None:
    first, second = (gradients(objective(name), episodes(0)) for _ in range(2))
    assert first[0].item() == second[0].item()
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())


def test_a_condition_is_never_compared_with_what_was_made_of_it() -> None:
    """In the mixture, the anchor's candidate must not move with the condition's own audio."""
    module = objective("in_mix")
    slots = torch.randn(9, 2, 16, requires_grad=True)
    present = torch.ones(3, 3, dtype=torch.bool)
    vectors, known = module._elsewhere(slots, present)
    assert known.all()
    (gradient,) = torch.autograd.grad(vectors[0, 1].sum() + vectors[0, 1].prod(), slots)
    assert gradient[1].abs().max() == 0
    assert gradient[[0, 2], 0].abs().amax(-1).min() > 0
    assert gradient[3:].abs().max() == 0


@every_contrast
def test_vectors_compared_with_each_other_have_not_attended_to_each_other(name: str) -> None:
    module, plain = objective(name), episodes(0, conditions=3)
    everyone = plain._replace(allowed=torch.ones(3, 3, 3, dtype=torch.bool))
    alone = plain._replace(allowed=torch.eye(3, dtype=torch.bool).expand(3, 3, 3))
    same = module(everyone).contrastive_nats == module(alone).contrastive_nats
    assert same == (CONTRASTS[name].set != "table")


def test_positives_of_the_batch_are_the_same_speakers_others() -> None:
    """Two mixtures with speakers (0, 1) and (0, 2); 1 and 2 are alone and say nothing."""
    speakers = torch.tensor([[0, 1], [0, 2]])
    vectors = torch.randn(3, 2, 4)
    rows = make_rows(vectors, speakers, torch.ones(2, 2, 8))
    comparison = compare_in_batch(rows)
    # rows and candidates: anchors of both, interferers of both, wholes of both
    assert comparison.p.tolist() == [
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert comparison.allowed is not None
    assert comparison.allowed.int().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 0],
    ]


def test_without_labels_a_recording_is_a_speaker() -> None:
    speakers = torch.tensor([[[4, 7], [4, 7]], [[4, -1], [-1, 7]]])
    numbers = forget_labels(speakers, torch.tensor([[True, True], [True, False]]))
    assert (numbers >= 0).equal(speakers >= 0)
    assert numbers[0, 0, 0] == numbers[0, 1, 0]
    assert numbers[0, 0, 0] != numbers[1, 0, 0]
    heard = numbers[numbers >= 0]
    assert len(heard.unique()) == len(heard) - 1


def test_who_stands_in_the_place_of_an_absent_anchor_attends_to_itself() -> None:
    """With as many interferers as slots, one of them is first where the anchor is not."""
    module, plain = objective("table"), episodes(0, batch=1, conditions=3)
    speakers = plain.speakers.clone()
    speakers[0, 1] = torch.tensor([5, 6])
    allowed = torch.ones_like(plain.allowed)
    given_episodes = anchor_first(plain._replace(speakers=speakers, allowed=allowed))
    present = has_anchor(given_episodes)
    assert present.tolist() == [[True, False, True]]
    _, who = module._attended(torch.zeros(3, 2, 16), given_episodes, present)
    assert who[0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_a_new_activity_head_knows_nothing_of_who_is_absent() -> None:
    module = objective("table")
    losses = module(with_absences(episodes(0)))
    assert 0.1 < losses.activity_nats < 3


def test_gradient_norms_are_kept_in_proportion() -> None:
    trunk = torch.nn.Linear(4, 3, dtype=torch.float64)
    balance = GradientBalance(2, every=1, decay=0.0)
    hidden = trunk(torch.randn(5, 4, dtype=torch.float64))
    losses = [hidden.square().mean(), 50 * hidden.sin().mean()]
    weights = balance(losses, trunk.parameters(), [1.0, 0.5])
    norms = gradient_norms(
        [weight * loss for weight, loss in zip(weights, losses, strict=True)],
        list(trunk.parameters()),
    )
    assert weights[0] == 1
    assert (norms[1] / norms[0]).item() == pytest.approx(0.5, rel=1e-5)


class Unasked(TorchDispatchMode):
    """Refuses what a device would have to be waited for: values, and sizes that depend on them."""

    ASKING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.ASKING, name
        assert name != "_linalg_check_errors", name
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["table", "batch", "in_mix_label_free"])
def test_the_losses_never_make_a_device_wait(name: str) -> None:
    config = SMALL["tcn"].model_copy(update={"num_slots": 3, "frontend": "conv", "num_bins": 16})
    module = Objective(
        CSC(config),
        NUM_SPEAKERS,
        contrast=CONTRASTS[name],
        balance="norms",
        mixit="least_squares",
    )
    given = episodes(0, slots=3)._replace(mixit=torch.tensor([True, False, False]))
    with Unasked():
        module(given).total.backward()
    with pytest.raises(AssertionError, match="masked_select"), Unasked():
        given.mixtures.masked_select(given.mixtures > 0)


def test_a_balance_that_is_loaded_goes_on_where_it_was() -> None:
    first, second = (objective("table", balance="norms") for _ in range(2))
    first(episodes(0))
    second.load_state_dict(first.state_dict())
    assert second.balance is not None
    before = second.balance.norms.clone()
    second(episodes(1))
    assert torch.equal(second.balance.norms, before)  # measured anew after 20 steps, not 19


def test_balancing_by_norms_measures_now_and_then() -> None:
    module = objective("table", balance="norms")
    first = module(episodes(0)).contrastive_weight.item()
    assert first > 0
    assert module(episodes(1)).contrastive_weight.item() == first
    assert module(episodes(1), 0.0).contrastive_weight.item() == 0
    module.eval()
    with torch.no_grad():
        assert module(episodes(2)).contrastive_weight.item() == first


def test_the_contrastive_gradient_on_the_trunk_is_as_large_as_asked() -> None:
    module = objective("table", balance="norms")
    losses = module(episodes(0), 0.5)
    terms = [losses.separation_db, losses.contrastive_nats]
    norms = gradient_norms(terms, list(module.model.trunk.parameters()))
    ratio = losses.contrastive_weight * norms[1] / (0.1 * norms[0])
    assert ratio.item() == pytest.approx(0.5, rel=1e-4)


def test_the_logged_terms_add_up() -> None:
    losses = objective("table")(episodes(0))
    expected = (
        0.1 * losses.separation_db
        + losses.contrastive_weight * losses.contrastive_nats
        + 0.1 * losses.spread
        + 0.1 * losses.activity_nats
    )
    assert losses.total.item() == pytest.approx(expected.item())
    assert 0.5 <= losses.slot_share <= 1
    assert -1 <= losses.slot_cosine <= 1
    assert 0 < losses.embedding_distance <= 2
    assert losses.attention_logit.isfinite()
    logged = [getattr(losses, name) for name in losses._fields if name != "total"]
    assert all(term.ndim == 0 for term in logged)


def test_separation_alone_is_the_separation_of_the_whole() -> None:
    given = in_double(episodes(3))
    whole = objective("table", spread_weight=0.0, activity_weight=0.0).double()
    alone = objective("table", separation_only=True).double()
    expected, losses = whole(given, 0.0), alone(given)
    torch.testing.assert_close(losses.separation_db, expected.separation_db)
    torch.testing.assert_close(losses.total, expected.total)
    assert losses.contrastive_nats == losses.activity_nats == 0
    expected.total.backward()
    losses.total.backward()
    separator = {id(p) for part in alone.model.separator for p in part.parameters()}
    for mine, theirs in zip(alone.parameters(), whole.parameters(), strict=True):
        if id(mine) in separator:
            torch.testing.assert_close(mine.grad, theirs.grad)
        else:
            assert mine.grad is None


def test_a_frozen_separator_is_left_as_it_is() -> None:
    frozen = objective("table", freeze_separator=True)
    losses = frozen(episodes(3))
    losses.total.backward()
    for part in frozen.model.separator:
        assert all(parameter.grad is None for parameter in part.parameters())
    assert frozen.model.pool.project.weight.grad is not None
    plain = objective("table")(episodes(3))
    torch.testing.assert_close(losses.total, plain.total)


def test_a_frozen_separator_drops_nothing() -> None:
    torch.manual_seed(0)
    config = SMALL["tcn"].model_copy(update={"trunk": "blstm", "dropout": 0.5})
    heard: dict[bool, list[float]] = {True: [], False: []}
    for frozen, found in heard.items():
        module = Objective(CSC(config), NUM_SPEAKERS, freeze_separator=frozen)
        for _ in range(2):
            module.model.train()  # as a validation leaves it
            found.append(module(episodes(3)).separation_db.item())
        assert module.model.speaker_blocks.training
    assert heard[True][0] == heard[True][1]
    assert heard[False][0] != heard[False][1]


def test_all_views_drawn_are_all_views() -> None:
    every = objective("table", views=3)(episodes(3))
    plain = objective("table")(episodes(3))
    for name, value in plain._asdict().items():
        torch.testing.assert_close(getattr(every, name), value, msg=name)


def test_views_that_are_not_heard_say_nothing() -> None:
    given = episodes(3)
    one = objective("table", views=1, spread_weight=0.0)
    losses = one(given)
    assert losses.slot_cosine == 0
    assert all(torch.isfinite(value) for value in losses)
    torch.testing.assert_close(losses.separation_db, objective("table")(given).separation_db)
    rows = make_rows(torch.randn(3, 4, 8), torch.tensor([[0, 1]] * 4), torch.randn(4, 2, 50))
    heard = torch.tensor([[True, False, False], [False, True, False]] * 2)
    kept = only(rows, heard).shares.sum(-1).view(3, 4) > 0
    assert torch.equal(kept, heard.T)
