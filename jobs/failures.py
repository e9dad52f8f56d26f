"""What stops a training for good, said so that a person can do something about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from safetensors.torch import save_file

from jobs.config import Config
from jobs.stepper import NoNumberError
from pipeline.datasets import Dataset
from pipeline.errors import CscError
from pipeline.loader import Batch
from pipeline.storage import Folder

NAMED_EPISODES = 5
NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "allocation_failed")


class HopelessError(CscError):
    """A failure that a second try would only repeat."""


def check_fits(dataset: Dataset, config: Config) -> None:
    """Assert that a model of this configuration can be trained on a dataset.

    Raises:
        CscError: its mixtures have other numbers of speakers than the model has slots.
    """
    speakers = dataset.config.mixing.interferers + 1
    if speakers != config.model.num_slots:
        raise CscError(
            f"{dataset.folder.uri} has mixtures of up to {speakers} speakers and the model "
            f"{config.model.num_slots} slots: set model.num_slots={speakers}, or build another"
        )


def no_number(
    error: NoNumberError, step: int, rank: int, batch: Batch, run: Folder
) -> HopelessError:
    """Save the batch of this rank beside the run, and say where it is and what to do."""
    name = f"not-a-number-step-{step}-rank-{rank}.safetensors"
    with run.scratch() as scratch:
        tensors = {field: tensor.contiguous() for field, tensor in batch._asdict().items()}
        save_file(tensors, scratch / name)
        run.put(name, scratch / name)
    episodes = broken_episodes(batch)
    if episodes:
        shown = ", ".join(map(str, episodes[:NAMED_EPISODES]))
        return HopelessError(
            f"step {step}: {len(episodes)} episode(s) of the batch, {shown}, have gains that are "
            f"no numbers; the batch is in {run.path(name)}; csc check tells which shards are "
            "damaged, csc build --fresh makes them anew"
        )
    return HopelessError(
        f"step {step}: {error}; the batch is in {run.path(name)}; set train.lr or train.clip_norm "
        "lower, or train.precision=fp32: that is another run, which begins at step 0, or with "
        "train.init_from at what an earlier one has come to"
    )


def broken_episodes(batch: Batch) -> list[int]:
    """Return the numbers of the episodes whose gains are no numbers."""
    broken = batch.gains_db.isnan() | batch.gains_db.isposinf()
    return list(batch.numbers[broken.flatten(1).any(1)].tolist())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a device, or the machine, had no memory left: for a tensor, or for a library."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in NO_MEMORY)


def out_of_memory(step: int, config: Config, share: int, world: int) -> CscError:
    """Say what needs less memory, for a worker with so many episodes, one of `world`.

    With fewer workers than there may be, a next try may have more, and smaller shares.
    """
    train, seconds = config.train, config.build.mixing.seconds
    more = (parts for parts in range(train.accumulate + 1, share + 1) if share % parts == 0)
    smaller = [f"train.accumulate={parts}" for parts in islice(more, 1) if not train.elastic]
    anew = " or ".join([*smaller, "train.batch_size lower"])
    same = ["model.checkpointing=true"] * (not config.model.checkpointing)
    same += ["train.min_workers higher"] * train.elastic
    goes_on = f"{' or '.join(same)}, and it goes on from its last checkpoint; or " if same else ""
    return _kind(config, world)(
        f"step {step}: out of memory with {share // train.accumulate} episodes of "
        f"{config.build.mixing.conditions} x {seconds:g} s at once on each worker: set {goes_on}"
        f"{anew}, and it begins anew at step 0 (csc try batch-size finds what fits)"
    )


@contextmanager
def memory_named(doing: str, config: Config, world: int) -> Iterator[None]:
    """Have memory that lacks beside the steps named, by what was done.

    Raises:
        CscError: there was none left.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _kind(config, world)(
            f"out of memory while {doing}: see that nothing else fills the device, or set "
            "train.batch_size lower or sizes of [model] smaller, and it begins anew at step 0"
        ) from None


def _kind(config: Config, world: int) -> type[CscError]:
    return CscError if world < config.train.workers else HopelessError
