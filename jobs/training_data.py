"""What a model learns from: what the stages made, or a dataset that is there already."""

from typing import NamedTuple

from jobs.config import Config, rebuilt
from jobs.datasets import find_dataset
from jobs.failures import check_fits
from pipeline.datasets import Dataset, read_dataset
from pipeline.errors import CscError
from pipeline.schema import SPEAKERS_FILE, of_split
from pipeline.shards import read_table
from pipeline.storage import Folder

SHOWN = 3  # speakers


class TrainingData(NamedTuple):
    """Where the mixtures are, and the voices that error rates are measured on."""

    dataset: Folder
    valid: Folder  # the dataset whose valid mixtures are used
    store: Folder | None  # None: it was imported, and separation alone can be validated

    @property
    def differs(self) -> list[str | None]:
        """What a result depends on besides the dataset: nothing where one build made it all."""
        if self.valid == self.dataset and self.store is not None:
            return []
        return [read_dataset(self.valid).id, "trials" if self.store else None]


def named(config: Config) -> tuple[TrainingData, Config]:
    """Find the dataset of `train.dataset`; return it, and the configuration as if it had built it.

    Raises:
        CscError: there is no such dataset, it is of another version or rate, or the model, the
            batches or the validation do not fit it.
    """
    found = find_dataset(config.train.dataset, config)
    dataset = _usable(found.folder, config)
    valid, name = dataset, config.train.valid_dataset
    if name is not None:
        valid = _usable(find_dataset(name, config).folder, config)
        _check_strangers(dataset, valid)
    elif not dataset.episodes.get("valid"):
        raise CscError(
            f"{dataset.folder.uri} has no valid mixtures to choose the best weights by: import or "
            "build some, of other speakers (csc import .. --split valid), and name them with "
            "--valid-dataset"
        )
    _check_batch(dataset, "train", config)
    _check_batch(valid, "valid", config)
    settled = rebuilt(config, dataset.config, dataset.folder.uri)
    return TrainingData(dataset.folder, valid.folder, found.store), settled


def _usable(folder: Folder, config: Config) -> Dataset:
    """Read a dataset, and refuse what a worker would stumble over."""
    dataset = read_dataset(folder)
    if dataset.num_samples is None:
        raise CscError(
            f"{folder.uri} holds mixtures of different lengths, which make no batch: import it "
            "with --seconds"
        )
    check_fits(dataset, config)
    return dataset


def _check_batch(dataset: Dataset, split: str, config: Config) -> None:
    count, batch = dataset.episodes.get(split, 0), config.train.batch_size
    if count < batch:
        raise CscError(
            f"{dataset.folder.uri} has {count} {split} episodes, fewer than one batch of {batch}: "
            "name another dataset, or set train.batch_size lower"
        )


def _check_strangers(dataset: Dataset, valid: Dataset) -> None:
    """Assert that nobody is trained on who is validated on, as far as names tell."""
    judged = of_split(read_table(valid.folder, SPEAKERS_FILE), "valid")["speaker_id"].to_pylist()
    both = sorted(set(judged) & set(dataset.about["speakers"]))
    if both:
        raise CscError(
            f"{len(both)} speaker(s), as {', '.join(both[:SHOWN])}, are in the training mixtures "
            f"of {dataset.folder.uri} and in the valid ones of {valid.folder.uri}: name others "
            "with --valid-dataset"
        )
