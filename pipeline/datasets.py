"""A dataset as its index tells of it: what a build, or an import, says that it made."""

import re
from operator import itemgetter
from typing import Any, NamedTuple

from pipeline.commits import ShardRecord
from pipeline.distributions import BuildConfig
from pipeline.errors import CscError
from pipeline.schema import DATASET_VERSION, SAMPLE_RATE_HZ
from pipeline.shards import INDEX
from pipeline.storage import Folder

SHARD_NAME = re.compile(r"(?P<split>\w+)-(?P<turn>\d+)-\d+\.parquet")


class Dataset(NamedTuple):
    """An index, read."""

    folder: Folder
    id: str
    store: str | None  # id of the generation that it was built from; None: it was imported
    seed: Any
    config: BuildConfig
    episodes: dict[str, int]  # of one pass, by split
    records: list[ShardRecord]  # in the order of their names
    about: dict[str, Any]  # the index itself

    @property
    def num_samples(self) -> int | None:
        """Samples of a mixture; None for an import in which each has a length of its own."""
        given = self.about.get("num_samples", self.config.mixing.num_samples)
        return None if given is None else int(given)

    def shards(self, split: str, turn: int = 0) -> list[ShardRecord]:
        """Return the shards of a split and pass, in the order of their episodes."""
        return [record for record in self.records if self.place(record) == (split, turn)]

    @staticmethod
    def place(record: ShardRecord) -> tuple[str, int] | None:
        """Return split and pass of a shard, or None for a name that no build gives."""
        match = SHARD_NAME.fullmatch(record.name)
        return (match["split"], int(match["turn"])) if match else None

    @property
    def places(self) -> list[tuple[str, int]]:
        """Return all splits and passes that have shards, in the order of their names."""
        found = (self.place(record) for record in self.records)
        return list(dict.fromkeys(place for place in found if place))


def read_dataset(folder: Folder) -> Dataset:
    """Read the index of a dataset.

    Raises:
        CscError: there is none, it is damaged, or it is of another version.
    """
    where = folder.path(INDEX)
    if not folder.exists(INDEX):
        raise CscError(f"{where} does not exist: no dataset is there, or csc build has to end it")
    index = folder.read_json(INDEX)
    version = index.get("version") if isinstance(index, dict) else None
    if version != DATASET_VERSION:
        raise CscError(
            f"{where} has data version {version}, this program reads {DATASET_VERSION}: build the "
            "dataset anew"
        )
    rate_hz = index.get("sample_rate_hz", SAMPLE_RATE_HZ)
    if rate_hz != SAMPLE_RATE_HZ:
        raise CscError(
            f"{where} is of audio at {rate_hz} Hz, this program works at {SAMPLE_RATE_HZ}: build "
            "the dataset anew"
        )
    try:
        return Dataset(
            folder,
            index["id"],
            index["store"],
            index.get("seed"),
            BuildConfig.model_validate(index["config"]["build"]),
            dict(index["episodes"]),
            sorted((ShardRecord(**about) for about in index["shards"]), key=itemgetter(0)),
            index,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CscError(
            f"{where} is no index of a dataset ({error!r}): remove it and run csc build again, "
            "which writes it anew"
        ) from error
