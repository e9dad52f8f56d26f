"""When a training is over, and which of its weights are kept."""

import math

import pytest

from jobs.checkpoint import State
from jobs.config import load_config
from jobs.loop import is_better, is_over
from jobs.train_config import TrainConfig
from jobs.validation import Found


def config(*more: str) -> TrainConfig:
    return load_config("demo", ["train.steps=100", "train.validate_every=10", *more]).train


@pytest.mark.parametrize(
    ("early_stop", "step", "best_step", "over"),
    [
        (0, 90, 10, False),
        (0, 100, 100, True),
        (3, 40, 20, False),
        (3, 50, 20, True),
        (3, 60, 60, False),
    ],
)
def test_training_ends_when_it_was_no_better_for_as_long_as_is_waited(
    early_stop: int, step: int, best_step: int, over: bool
) -> None:
    assert is_over(State(step, best_step, 0.2), config(f"train.early_stop={early_stop}")) == over


@pytest.mark.parametrize(
    ("eer", "gained_db", "better"),
    [
        (0.1, -9.0, True),  # error rates decide where there are any
        (0.2, 9.0, False),  # of two that are as good the first is kept
        (0.3, 9.0, False),
        (math.nan, 3.1, True),
        (math.nan, 3.0, False),
        (math.nan, math.nan, True),  # nothing is known of it: the last is kept
    ],
)
def test_weights_are_kept_that_are_better(eer: float, gained_db: float, better: bool) -> None:
    best = State(20, 10, 0.2, best_improvement_db=3.0)
    assert is_better(Found(eer, gained_db), best) == better
