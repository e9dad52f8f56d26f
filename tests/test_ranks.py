"""Ranks, each with a share of a batch, give the losses and gradients of one process.

What they wait for each other is shown as such.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from csc_model.contrast import ContrastConfig
from csc_model.model import CSC
from csc_model.objective import Episodes, Losses, Objective
from jobs.meter import over_ranks
from pipeline.order import Share
from tests.small_models import small
from tests.test_losses import NUM_SPEAKERS, SMALL, episodes
from tests.test_meter import LATE_S, PHASES, line_of, seconds_of

WORLDS = (2, 3)
CASES: dict[str, dict[str, Any]] = {
    "table": {},
    "table_norms": {"balance": "norms"},
    "no_attention": {"attend": False},
    "views": {"views": 3},  # all of them, in an order that each rank draws
    "separation_only": {"separation_only": True},
    "freeze_separator": {"freeze_separator": True},
    "batch": {"contrast": ContrastConfig(set="batch")},
    "in_mix": {"contrast": ContrastConfig(set="in_mix")},
    "batch_label_free": {"contrast": ContrastConfig(set="batch", label_free=True)},
    "in_mix_label_free": {"contrast": ContrastConfig(set="in_mix", label_free=True)},
}

TERMS = (
    "total",
    "separation_db",
    "contrastive_nats",
    "activity_nats",
    "contrastive_weight",
    "mi_lower_bound_nats",
    "mi_cap_nats",
)
UNEVEN = ("table", "table_norms", "no_attention", "views", "separation_only", "freeze_separator")
"""Cases that shares of different sizes are for: one of three ranks has half of the batch."""

LATE = ("data_wait", "backward")
"""What one of two ranks is late with."""

NORMED = "ecapa"
"""A case that is normed over a rank's share of the batch: ranks agree, but not with one process."""


def objective(name: str) -> Objective:
    torch.manual_seed(0)
    config = SMALL["tcn"]
    if name == NORMED:
        config = small("tcn", "stft", speaker_features="mel", speaker_net="ecapa", ecapa_channels=8)
    return Objective(CSC(config), NUM_SPEAKERS, **CASES.get(name, {})).double()


def uneven() -> Episodes:
    """Return a batch whose second half has few known speakers, and a mixture of mixtures."""
    plain = episodes(0, batch=4, conditions=3)
    speakers, references = plain.speakers.clone(), plain.references.double()
    for place in ((2, 0, 0), (2, 1, 1), (3, 0, 0), (3, 0, 1)):
        speakers[place], references[place] = -1, 0
    mixtures = references.sum(2) + 1e-3
    mixit = torch.tensor([False, False, False, True])
    return Episodes(mixtures, references, speakers, plain.anchors, plain.allowed, mixit)


def part(given: Episodes, rank: int, world: int) -> Episodes:
    share = Share.of(len(given.anchors), rank, world)
    return Episodes(*(x[share.first : share.stop] for x in given if x is not None))


def cases(world: int) -> list[str]:
    return [*CASES, NORMED] if world == 2 else [*UNEVEN]


def measured(module: torch.nn.Module, given: Episodes) -> dict[str, Tensor]:
    losses = module(given)
    losses.total.backward()
    found = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return found | {f"loss {term}": getattr(losses, term).detach().clone() for term in TERMS}


def work(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/meeting-{world}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    for name in cases(world):
        wrapped = DistributedDataParallel(objective(name))
        found = measured(wrapped, part(uneven(), rank, world))
        save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/{name}-{world}-{rank}")
    if world == 2:
        for late in LATE:
            save_file(timed(late if rank else ""), f"{folder}/{late}-{rank}")
    dist.destroy_process_group()


def timed(late: str) -> dict[str, Tensor]:
    """Return what a rank tells of its steps, and what it measured itself."""
    own = line_of(late)
    found = over_ranks(own, torch.device("cpu")) | {f"own {key}": own[key] for key in own}
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}


def found_by(ranks: int, name: str, folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{ranks}-{rank}") for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        mp.spawn(work, (str(folder), world), world)
    return folder


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in WORLDS for name in cases(world) if name in CASES]
)
def test_ranks_give_what_one_gives(world: int, name: str, folder: Path) -> None:
    alone = measured(objective(name), uneven())
    ranks = found_by(world, name, folder)
    assert all(rank.keys() == alone.keys() for rank in ranks)
    for key, expected in alone.items():
        mean = sum(rank[key] for rank in ranks) / world
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-9, msg=f"{name} {key}")
        if not key.startswith("loss"):
            assert all(torch.equal(ranks[0][key], rank[key]) for rank in ranks)
    assert (alone["loss contrastive_nats"] > 0) == (name != "separation_only")


def test_ranks_agree_where_each_norms_its_share(folder: Path) -> None:
    ranks = found_by(2, NORMED, folder)
    gradients = [key for key in ranks[0] if not key.startswith("loss")]
    assert any(key.startswith("model.ecapa") for key in gradients)
    for key in gradients:
        assert torch.equal(ranks[0][key], ranks[1][key])
        assert ranks[0][key].isfinite().all()


@pytest.mark.parametrize("late", LATE)
def test_who_waits_for_another_rank_does_so_in_communication(late: str, folder: Path) -> None:
    waiting, slow = (
        {key: float(value) for key, value in load_file(folder / f"{late}-{rank}").items()}
        for rank in (0, 1)
    )
    own = {phase: waiting[f"own {phase}_share"] * waiting["step_s"] for phase in PHASES}
    assert sum(own.values()) == pytest.approx(waiting["step_s"], rel=0.02)
    assert own["communication"] > 0.9 * LATE_S
    assert all(seconds < LATE_S for phase, seconds in own.items() if phase != "communication")
    assert seconds_of(slow)["communication"] < LATE_S < seconds_of(slow)[late]
    longest = max(rank["own data_wait_share"] for rank in (waiting, slow))
    assert waiting["data_wait_share"] == slow["data_wait_share"] == pytest.approx(longest)
    assert (waiting["data_wait_share"] > 0.3) == (late == "data_wait")


def test_logged_losses_are_means_over_ranks_and_the_logit_the_largest(folder: Path) -> None:
    lines = [load_file(folder / f"{LATE[0]}-{rank}") for rank in (0, 1)]
    for name in Losses._fields:
        own = [float(line[f"own {name}"]) for line in lines]
        joined = max(own) if name == "attention_logit" else sum(own) / 2
        assert all(float(line[name]) == pytest.approx(joined, rel=1e-5) for line in lines)
    assert all(float(line["workers"]) == 2 for line in lines)
