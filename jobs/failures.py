"""What stops a training for good, said so that a person can do something about it."""

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
    broken = batch.gains_db.isnan() | batch.gains_db.isposinf()
    episodes = batch.numbers[broken.flatten(1).any(1)].tolist()
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a device, or the machine, had no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)


def out_of_memory(step: int, config: Config, share: int, world: int) -> CscError:
    """Say what needs less memory, for a worker with so many episodes, one of `world`.

    With fewer workers than there may be, a next try may have more, and smaller shares.
    """
    train, seconds = config.train, config.build.mixing.seconds
    more = (parts for parts in range(train.accumulate + 1, share + 1) if share % parts == 0)
    smaller = "".join(f"train.accumulate={parts}, " for parts in islice(more, 1))
    if train.elastic:
        smaller = "train.min_workers higher, "
    kind = CscError if world < train.workers else HopelessError
    return kind(
        f"step {step}: out of memory with {share // train.accumulate} episodes of "
        f"{config.build.mixing.conditions} x {seconds:g} s at once on each worker: set {smaller}"
        "model.checkpointing=true, or train.batch_size lower (csc try batch-size finds what fits)"
    )
