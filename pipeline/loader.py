"""The loader: batch t of an epoch is a function of (seed, epoch, t), on any number of ranks.

Row groups are permuted anew in every epoch and read straight from the shards; a global batch is a
run of episodes in that order, of which each rank takes an equal slice. The state is two integers,
epoch and step, and starting anywhere costs nothing.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import CscError
from pipeline.mixing import BuildConfig, stream_key
from pipeline.schema import DATASET_VERSION, SAMPLE_RATE_HZ
from pipeline.shards import INDEX, damaged, open_shard
from pipeline.storage import Folder

PREFETCHED_BATCHES = 3


class Batch(NamedTuple):
    """Episodes as they lie in the shards, ready to be moved to the training device."""

    sources: Tensor  # int16 (episode, condition, slot, time); target, interferers, noise
    gains_db: Tensor  # float32 (episode, condition, slot), minus infinity where there is none
    speakers: Tensor  # int64 (episode, condition, slot - 1), row of the speaker list or -1
    numbers: Tensor  # int64 (episode,), which episodes these are

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Piece(NamedTuple):
    """Some episodes of one row group."""

    shard: int
    group: int
    first: int
    stop: int


def order(seed: int, epoch: int, num_groups: int) -> NDArray[np.int64]:
    """Return the order of row groups in an epoch."""
    bits = np.random.Philox(key=stream_key(seed, "order", epoch))
    return np.argsort(bits.random_raw(num_groups), kind="stable")


class EpisodeLoader:
    """Reads the batches of one rank.

    Every rank of an epoch has `steps_per_epoch` batches; the episodes left over are others in every
    epoch.

    Raises:
        CscError: the dataset is of another version, damaged, or smaller than one batch.
    """

    def __init__(
        self,
        dataset: Folder,
        split: str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        index = dataset.read_json(INDEX)
        if index["version"] != DATASET_VERSION:
            raise CscError(
                f"{dataset.uri} has data version {index['version']}, this program reads "
                f"{DATASET_VERSION}: build it anew"
            )
        if batch_size % world:
            raise CscError(f"a batch of {batch_size} episodes cannot be shared by {world} workers")
        self.dataset, self.seed, self.rank, self.world = dataset, seed, rank, world
        self.mixing = BuildConfig.model_validate(index["config"]["build"]).mixing
        self.speakers = pa.array(index["speakers"], pa.string())
        self.share = batch_size // world
        self.steps_per_epoch = index["episodes"][split] // batch_size
        if not self.steps_per_epoch:
            raise CscError(
                f"{dataset.uri} has {index['episodes'][split]} {split} episodes, fewer than one "
                f"batch of {batch_size}: build more, or set train.batch_size lower"
            )
        records = [shard for shard in index["shards"] if shard["name"].startswith(f"{split}-")]
        self.names = [record["name"] for record in records]
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups = self._list_groups(records)

    def _list_groups(self, records: list[dict[str, Any]]) -> list[Piece]:
        sizes = {file.name: file.num_bytes for file in self.dataset.list()}
        groups = []
        for shard, record in enumerate(records):
            if sizes.get(record["name"]) != record["bytes"]:
                raise damaged(self.dataset, record["name"])
            metadata = self._open(shard).metadata
            groups += [
                Piece(shard, group, 0, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]
        return groups

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = open_shard(self.dataset, self.names[shard])
        return self._files[shard]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch from a step on, read ahead in a thread."""
        groups = [self._groups[place] for place in order(self.seed, epoch, len(self._groups))]
        starts = np.cumsum([0] + [group.stop for group in groups])
        with ThreadPoolExecutor(1) as reader:
            waiting: list[Future[Batch]] = []
            for step in range(first_step, self.steps_per_epoch):
                waiting.append(reader.submit(self._read, groups, starts, step))
                if len(waiting) > PREFETCHED_BATCHES:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def _read(self, groups: list[Piece], starts: NDArray[np.int64], step: int) -> Batch:
        first = (step * self.world + self.rank) * self.share
        place = int(np.searchsorted(starts, first, side="right")) - 1
        tables: list[pa.Table] = []
        while first < (step * self.world + self.rank + 1) * self.share:
            group = groups[place]
            begin = first - int(starts[place])
            count = min(group.stop - begin, self.share - sum(len(table) for table in tables))
            tables.append(self._read_group(group).slice(begin, count))
            first, place = first + count, place + 1
        return self._assemble(pa.concat_tables(tables))

    def _read_group(self, group: Piece) -> pa.Table:
        try:
            return self._open(group.shard).read_row_group(
                group.group, columns=["episode", "sources", "pcm"], use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.dataset, self.names[group.shard]) from error

    def _assemble(self, table: pa.Table) -> Batch:
        """Put the sources, which lie one after another, in their places of a dense batch."""
        lists = table["sources"].combine_chunks()
        episode = np.repeat(np.arange(len(table)), lists.value_lengths().to_numpy())
        source = lists.flatten()
        field = {name: source.field(name).to_numpy() for name in ("condition", "slot", "gain_db")}
        where = (episode, field["condition"], field["slot"])
        shape = (len(table), self.mixing.conditions, self.mixing.num_slots)
        audio = np.zeros((*shape, self.mixing.num_samples), np.int16)
        dry = [np.frombuffer(cell.as_buffer(), "<i2") for cell in table["pcm"]]
        audio[where] = np.concatenate(dry).reshape(-1, self.mixing.num_samples)
        gains_db = np.full(shape, -np.inf, np.float32)
        gains_db[where] = field["gain_db"]
        known = pc.index_in(source.field("speaker_id"), value_set=self.speakers)
        speakers = np.full(shape, -1, np.int64)
        speakers[where] = known.fill_null(-1).to_numpy(zero_copy_only=False)
        arrays = (audio, gains_db, speakers[:, :, :-1], table["episode"].to_numpy().copy())
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def audio_seconds(batch: Batch) -> float:
    """Return the seconds of mixtures that a batch holds."""
    episodes, conditions, _, time = batch.sources.shape
    return episodes * conditions * time / SAMPLE_RATE_HZ
