"""What a model learns from: what the stages made, or a dataset that is there already."""

from typing import NamedTuple

from jobs.config import Config, rebuilt
from jobs.datasets import Found, find_dataset
from jobs.failures import check_fits
from jobs.workspace import Workspace
from pipeline.datasets import Dataset, read_dataset
from pipeline.errors import CscError
from pipeline.plan import forgotten, secret_name
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
        CscError: there is no such dataset, it is of another version or rate, it has people who
            were forgotten, or may, or the model, the batches or the validation do not fit it.
    """
    found = find_dataset(config.train.dataset, config)
    dataset = _usable(found, config)
    valid, name = dataset, config.train.valid_dataset
    if name is not None:
        valid = _usable(find_dataset(name, config), config)
        _check_strangers(dataset, valid)
    elif not dataset.episodes.get("valid"):
        raise CscError(
            f"{dataset.folder.uri} has no valid mixtures to choose the best weights by: import or "
            "build some, of other speakers (csc import .. --split valid), and name them with "
            "--valid-dataset"
        )
    _check_batch(dataset, "train", config)
    _check_batch(valid, "valid", config)
    _check_asked(valid, config)
    build = dataset.config.model_copy(update={"valid_episodes": valid.episodes["valid"]})
    settled = rebuilt(config, build, dataset.folder.uri)
    return TrainingData(dataset.folder, valid.folder, found.store), settled


def _usable(found: Found, config: Config) -> Dataset:
    """Read a dataset, and refuse forgotten people and what a worker would stumble over."""
    folder = found.folder
    dataset = read_dataset(folder)
    if dataset.store is not None and found.store is None:
        raise CscError(
            f"{folder.uri}: the store it was built from is not here: copy the utterances/ of its "
            "workspace beside mixtures/; or, if csc forget removed it, build another (csc build)"
        )
    if dataset.store is None:
        _check_remembered(dataset, config)
    if dataset.num_samples is None:
        raise CscError(
            f"{folder.uri} holds mixtures of different lengths, which make no batch: import it "
            "with --seconds"
        )
    check_fits(dataset, config)
    return dataset


def _check_remembered(dataset: Dataset, config: Config) -> None:
    """Refuse an import with speakers whom the workspace forgot, as far as names tell."""
    gone = forgotten(Workspace(config).utterances.child("any")).names
    names = read_table(dataset.folder, SPEAKERS_FILE)["speaker_id"].to_pylist()
    known = [name for name in names if secret_name(name) in gone]
    if known:
        raise CscError(
            f"{dataset.folder.uri} has {len(known)} speaker(s) that csc forget removed, as "
            f"{', '.join(known[:SHOWN])}: name another dataset, or import it without them"
        )


def _check_asked(valid: Dataset, config: Config) -> None:
    """Assert that extraction can be judged: a voice is asked for by another recording of it."""
    mixing = valid.config.mixing
    if config.train.task == "extract" and (mixing.conditions == 1 or mixing.mixit_share == 1):
        raise CscError(
            f"{valid.folder.uri} has no two mixtures of one voice that is known, and "
            "train.task=extract asks for it in one by the other: name another with --valid-dataset"
        )


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
