"""Two ranks, each with half of a batch, give the losses and gradients of one process."""

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
from csc_model.objective import Episodes, Objective
from tests.small_models import small
from tests.test_losses import NUM_SPEAKERS, SMALL, episodes

WORLD = 2
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


def share(given: Episodes, rank: int) -> Episodes:
    size = len(given.anchors) // WORLD
    return Episodes(*(x[rank * size : (rank + 1) * size] for x in given if x is not None))


def measured(module: torch.nn.Module, given: Episodes) -> dict[str, Tensor]:
    losses = module(given)
    losses.total.backward()
    found = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    terms = ("total", "separation_db", "contrastive_nats", "activity_nats", "contrastive_weight")
    return found | {f"loss {term}": getattr(losses, term).detach().clone() for term in terms}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD)
    for name in (*CASES, NORMED):
        wrapped = DistributedDataParallel(objective(name))
        found = measured(wrapped, share(uneven(), rank))
        save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/{name}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), WORLD)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_gives(name: str, folder: Path) -> None:
    alone = measured(objective(name), uneven())
    ranks = [load_file(folder / f"{name}-{rank}") for rank in range(WORLD)]
    assert alone.keys() == ranks[0].keys() == ranks[1].keys()
    for key, expected in alone.items():
        mean = sum(rank[key] for rank in ranks) / WORLD
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-9, msg=f"{name} {key}")
        if not key.startswith("loss"):
            assert torch.equal(ranks[0][key], ranks[1][key])
    assert (alone["loss contrastive_nats"] > 0) == (name != "separation_only")


def test_ranks_agree_where_each_norms_its_share(folder: Path) -> None:
    ranks = [load_file(folder / f"{NORMED}-{rank}") for rank in range(WORLD)]
    gradients = [key for key in ranks[0] if not key.startswith("loss")]
    assert any(key.startswith("model.ecapa") for key in gradients)
    for key in gradients:
        assert torch.equal(ranks[0][key], ranks[1][key])
        assert ranks[0][key].isfinite().all()
