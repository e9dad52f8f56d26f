"""One optimizer step: parts of a batch, the clipped gradient, two rates, averaged weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.checkpoint import State
from jobs.config import load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.tryouts import SPEAKERS, noise_batch
from tests.test_tryouts import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")
EPISODES = 4
BF16 = "train.precision=bf16"
SHORT = [
    *SMALL,
    "build.mixing.seconds=0.25",
    "train.batch_size=8",
    "model.shared_blocks=1",
    "model.separation_blocks=1",
    "model.speaker_blocks=1",
]


def stepper(*more: str) -> Stepper:
    config = load_config("demo", [*SHORT, *more])
    return Stepper(config, new_objective(config, SPEAKERS))


def advance(stepper: Stepper, first: int, last: int) -> None:
    for step in range(first, last):
        batch = noise_batch(stepper.config.model_copy(update={"seed": step}), EPISODES)
        stepper.take(step, batch, Meter())


def gradients(stepper: Stepper) -> dict[str, Tensor]:
    advance(stepper, 0, 1)
    named = stepper.objective.named_parameters()
    return {name: value.grad for name, value in named if value.grad is not None}


def test_parts_of_a_batch_give_the_gradient_of_the_whole() -> None:
    whole = gradients(stepper("train.clip_norm=1e9"))
    parts = gradients(stepper("train.clip_norm=1e9", "train.accumulate=4"))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_in_bf16_weights_stay_whole_and_the_gradient_is_about_the_same() -> None:
    exact, rough = stepper("train.clip_norm=1e9"), stepper("train.clip_norm=1e9", BF16)
    whole, rounded = gradients(exact), gradients(rough)
    assert all(p.dtype == torch.float32 for p in rough.objective.parameters())
    assert whole.keys() == rounded.keys()
    flat, other = (torch.cat([g.flatten() for g in gs.values()]) for gs in (whole, rounded))
    assert not torch.equal(flat, other)
    assert torch.cosine_similarity(flat, other, dim=0) > 0.99


def test_a_large_gradient_is_clipped_and_told_as_it_was() -> None:
    free, clipped = stepper("train.clip_norm=1e9"), stepper("train.clip_norm=1e-3")
    _, norm = free.take(0, noise_batch(free.config, EPISODES), Meter())
    _, told = clipped.take(0, noise_batch(clipped.config, EPISODES), Meter())
    left = [p.grad for p in clipped.objective.parameters() if p.grad is not None]
    assert told == pytest.approx(norm)
    assert torch.nn.utils.get_total_norm(left).item() == pytest.approx(1e-3, rel=1e-3)


def test_the_speaker_table_has_a_rate_of_its_own_and_no_decay() -> None:
    one = stepper("train.lr=0.01", "train.table_lr_scale=3.0", "train.weight_decay=0.5")
    advance(one, 0, 2)
    groups = {id(p): group for group in one.optimizer.param_groups for p in group["params"]}
    weight = one.objective.model.pool.project.weight
    table, model = groups[id(one.objective.table)], groups[id(weight)]
    assert (table["weight_decay"], model["weight_decay"]) == (0.0, 0.5)
    assert 0 < model["lr"] < 0.01, "by the schedule"
    assert table["lr"] == pytest.approx(3 * model["lr"])
    assert len(groups) == len(list(one.objective.parameters()))


def test_a_killed_training_goes_on_to_the_same_averaged_weights(tmp_path: Path) -> None:
    averaged = "train.ema_decay=0.9"
    undisturbed = stepper(averaged)
    advance(undisturbed, 0, 6)
    killed = stepper(averaged)
    advance(killed, 0, 3)
    killed.save(tmp_path, State(3, 0, 1.0))
    advance(killed, 3, 4)  # of which nothing was saved
    resumed = stepper(averaged)
    assert resumed.load(tmp_path) == State(3, 0, 1.0, averaged=3)
    advance(resumed, 3, 6)
    judged, last = resumed.judged().state_dict(), resumed.objective.model.state_dict()
    for name, tensor in undisturbed.judged().state_dict().items():
        assert torch.equal(judged[name], tensor), name
    assert not all(torch.equal(judged[name], tensor) for name, tensor in last.items())
