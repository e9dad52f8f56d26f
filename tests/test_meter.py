"""Where the time of a step goes: real steps, of which one part is held up (see `test_ranks`)."""

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csc_model.objective import Losses
from jobs.config import load_config
from jobs.meter import Meter, Work
from jobs.stepper import Stepper, new_objective
from jobs.tryouts import SPEAKERS, noise_batch
from pipeline.loader import Batch
from tests.test_tryouts import SMALL

STEPS, LATE_S = 2, 0.25
PHASES = ("data_wait", "forward", "backward", "communication", "optimizer")
Line = dict[str, float]


def line_of(late: str, work: Work | None = None) -> Line:
    """Take steps, on all ranks if there are any, and hold the phase up that is named."""
    config = load_config("demo", SMALL)
    objective, batch = new_objective(config, SPEAKERS), noise_batch(config, 2)
    stepper = Stepper(config, objective)
    if dist.is_initialized():
        world = dist.get_world_size()
        stepper = Stepper(config, objective, world=world, wrap=DistributedDataParallel)

    def loader() -> Iterator[Batch]:
        for _ in range(STEPS):
            time.sleep(LATE_S if late == "data_wait" else 0)
            yield batch

    stepper.take(0, batch, Meter())  # the first allocates
    if late == "backward":
        objective.table.register_hook(lambda _: time.sleep(LATE_S))
    meter = Meter(work)
    for step, given in enumerate(loader(), 1):
        meter.passed("data_wait")
        losses, grad_norm = stepper.take(step, given, meter)
        meter.stepped(losses, grad_norm, stepper.learning_rate, seconds=1.0)
    return meter.line()


def seconds_of(line: Line) -> dict[str, float]:
    """Return the seconds of a step by phase."""
    return {phase: line[f"{phase}_share"] * line["step_s"] for phase in PHASES}


def test_of_losses_the_means_are_told_and_of_logits_the_largest() -> None:
    meter = Meter()
    for value in (1.0, 4.0, 1.0):
        losses = Losses(*torch.full((len(Losses._fields),), value))
        meter.stepped(losses, grad_norm=value, rate=0.5, seconds=1.0)
    line = meter.line()
    assert (line["total"], line["grad_norm"], line["learning_rate"]) == (2.0, 2.0, 0.5)
    assert line["attention_logit"] == 4.0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("late", ["data_wait", "backward"])
def test_the_phases_are_all_of_a_step_and_show_which_is_late(late: str) -> None:
    work = Work(flops=6e6, peak_flops=1e9)
    line = line_of(late, work)
    spent = seconds_of(line)
    assert sum(spent.values()) == pytest.approx(line["step_s"], rel=0.01)
    assert spent[late] > LATE_S
    assert all(seconds < LATE_S for phase, seconds in spent.items() if phase != late)
    assert spent["communication"] == 0
    assert line["flops_per_s"] * line["step_s"] == pytest.approx(work.flops)
    assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e9)
    assert line["audio_seconds_per_s"] * line["step_s"] == pytest.approx(1.0)
