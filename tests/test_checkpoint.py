"""Training goes on from a checkpoint as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from csc_model.objective import Objective
from jobs.checkpoint import State, load_training, save_training
from jobs.config import load_config
from jobs.stepper import build_optimizer, learning_rate_factor
from tests.test_losses import SMALL, episodes, objective

CONFIG = load_config("demo", ["train.steps=20", "train.warmup_steps=4"]).train


def advance(module: Objective, optimizer: torch.optim.Optimizer, first: int, last: int) -> float:
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate_factor(step, CONFIG)
        total = module(episodes(step)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return total.item()


@pytest.mark.parametrize("kind", SMALL)
def test_2n_steps_are_n_steps_a_checkpoint_and_n_steps(kind: str, tmp_path: Path) -> None:
    whole = objective(kind)
    expected = advance(whole, build_optimizer(whole, CONFIG), 0, 12)
    half = objective(kind)
    optimizer = build_optimizer(half, CONFIG)
    advance(half, optimizer, 0, 6)
    save_training(tmp_path, half, optimizer, State(6, 4, 0.25))

    resumed = objective(kind, seed=99)
    optimizer = build_optimizer(resumed, CONFIG)
    assert load_training(tmp_path, resumed, optimizer) == State(6, 4, 0.25)
    assert advance(resumed, optimizer, 6, 12) == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    module = objective("tcn")
    optimizer = build_optimizer(module, CONFIG)
    advance(module, optimizer, 0, 1)
    save_training(tmp_path, module, optimizer, State(1, 0, 1.0))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    factors = [learning_rate_factor(step, CONFIG) for step in range(CONFIG.steps)]
    assert factors[:3] == sorted(factors[:3])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(1 / CONFIG.steps)
