"""The loader: batch t of an epoch is a function of (seed, epoch, t), on any number of ranks.

A global batch is a run of episodes in the order of the epoch, of which each rank reads a slice,
as even as whole blocks allow. The state is two integers, epoch and step, and starting anywhere
costs nothing.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.casting import Rooms
from pipeline.commits import ShardRecord
from pipeline.datasets import Dataset, read_dataset
from pipeline.episodes import Episodes, EpisodeShard
from pipeline.errors import CscError
from pipeline.nearby import Nearby
from pipeline.order import SHUFFLED_SHARDS, Order, Share
from pipeline.remix import Cast, Remix, cast
from pipeline.render import bank_of
from pipeline.schema import ROOMS_FILE, SAMPLE_RATE_HZ
from pipeline.shards import damaged, read_table
from pipeline.storage import Folder

READERS_FROM_AFAR = 4  # threads: what one waits for of a remote store, others use
BATCHES_AHEAD = 4
OPEN_SHARDS = 2 * SHUFFLED_SHARDS


class Batch(NamedTuple):
    """Episodes as they lie in the shards, and how they are to be added up."""

    lines: Tensor  # int16 (line, time), dry
    pick: Tensor  # int64 (episode, condition, slot), row of `lines`, -1 where there is none
    gains_db: Tensor  # float32 (episode, condition, slot), minus infinity where there is none
    rooms: Tensor  # int64 (episode, condition, slot), row of the loader's `rooms`, -1 for none
    speakers: Tensor  # int64 (episode, condition, slot - 1), row of the speakers' table or -1
    anchors: Tensor  # int64 (episode,), row of the speakers' table
    mixit: Tensor  # bool (episode,): slots are mixtures of speakers that count as unknown
    numbers: Tensor  # int64 (episode,), which episodes these are

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; from pinned memory that goes on beside whatever is done there."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def sources(self) -> Tensor:
        """Return the lines in their slots: int16 (episode, condition, slot, time)."""
        return self.lines[self.pick.clamp_min(0)]


class _Slot:
    """Room for a shard that one thread opens."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.shard: EpisodeShard | None = None


class EpisodeLoader:
    """Reads the batches of one rank.

    Every rank of an epoch has `steps_per_epoch` batches; the episodes left over are others in every
    epoch. With `remix`, each epoch mixes the same voices anew: see `Remix`. What is read of a
    remote dataset is kept in `nearby`, if there is one.

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
        remix: bool = False,
        pin: bool | None = None,
        nearby: Nearby | None = None,
    ) -> None:
        about = read_dataset(dataset)
        if about.num_samples is None:
            raise CscError(
                f"{dataset.uri} holds mixtures of different lengths, which make no batch: import "
                "it with --seconds"
            )
        self.dataset, self.seed = dataset, seed
        self.nearby = None if dataset.is_local else nearby
        self.mixing, self.rows_per_group = about.config.mixing, about.config.episodes_per_group
        self._turn = about.config.turn
        self.num_samples = about.num_samples
        self.share = Share.of(batch_size, rank, world, self.rows_per_group if remix else 1)
        episodes = about.episodes.get(split, 0)
        self.steps_per_epoch = episodes // batch_size
        if not self.steps_per_epoch:
            raise CscError(
                f"{dataset.uri} has {episodes} {split} episodes, fewer than one "
                f"batch of {batch_size}: build more, or set train.batch_size lower"
            )
        self._passes = self._list_shards(about, split)
        self._open: OrderedDict[tuple[int, int], _Slot] = OrderedDict()
        self._lock = Lock()
        self._pin = torch.cuda.is_available() if pin is None else pin
        responses = Rooms([])
        self.rooms: Tensor | None = None
        if self.mixing.ever("room_share"):
            table = read_table(dataset, ROOMS_FILE)
            responses, self.rooms = Rooms.of(table, split), bank_of(table)
        self._remix = None
        if remix:
            self._remix = Remix(self.mixing, seed, self.rows_per_group, self.share, responses)

    def _list_shards(self, about: Dataset, split: str) -> list[list[ShardRecord]]:
        """Return the shards of each pass, which are all there and of the right size."""
        sizes = {file.name: file.num_bytes for file in self.dataset.list()}
        passes = [about.shards(*place) for place in about.places if place[0] == split]
        for record in (record for shards in passes for record in shards):
            if sizes.get(record.name) != record.bytes:
                raise damaged(self.dataset, record.name)
        return passes

    def _shard(self, turn: int, place: int) -> EpisodeShard:
        with self._lock:
            slot = self._open.setdefault((turn, place), _Slot())
            self._open.move_to_end((turn, place))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        with slot.lock:  # others may open other shards meanwhile
            if slot.shard is None:
                record = self._passes[turn][place]
                slot.shard = EpisodeShard(
                    self.dataset,
                    record.name,
                    checksum=(record.about or {})["numbers"],
                    rows_per_group=self.rows_per_group,
                    num_samples=self.num_samples,
                    nearby=self.nearby,
                )
            return slot.shard

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch from a step on, read ahead in threads.

        Raises:
            CscError: naming a shard that is damaged.
        """
        turn = self._turn(epoch) if len(self._passes) > 1 else 0
        rows = [record.rows for record in self._passes[turn]]
        order = Order(rows, self.rows_per_group, self.seed, epoch)
        pool = ThreadPoolExecutor(1 if self.dataset.is_local else READERS_FROM_AFAR, "csc-loader")
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in range(first_step, self.steps_per_epoch):
                waiting.append(pool.submit(self._read, order, turn, epoch, step))
                if step == first_step:  # none ahead of it must make it wait
                    wait(waiting)
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def endless(self, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches from a step of training on, epoch after epoch."""
        epoch, step = divmod(first_step, self.steps_per_epoch)
        while True:
            yield from self.batches(epoch, step)
            epoch, step = epoch + 1, 0

    def _read(self, order: Order, turn: int, epoch: int, step: int) -> Batch:
        before = step * self.share.total
        parts = [
            self._shard(turn, piece.shard).read(piece.group, piece.first, piece.stop)
            for piece in order.pieces(before + self.share.first, before + self.share.stop)
        ]
        drawn = cast(parts, self.mixing)
        if self._remix is not None:
            drawn = self._remix(drawn, epoch, step)
        return self._batch(parts, drawn)

    def _batch(self, parts: list[Episodes], drawn: Cast) -> Batch:
        numbers = np.concatenate([part.number for part in parts])
        arrays = (
            drawn.pick,
            drawn.gains_db,
            drawn.rooms,
            drawn.speakers[:, :, :-1],
            drawn.anchors,
            drawn.mixit,
            numbers,
        )
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        return Batch(self._lines(parts), *(t.pin_memory() if self._pin else t for t in tensors))

    def _lines(self, parts: list[Episodes]) -> Tensor:
        """Put the audio of all parts in one piece: the only copy before the device's own."""
        pieces = [samples for part in parts for samples in part.pcm]
        shape = (sum(map(len, pieces)), self.num_samples)
        if self._pin:
            lines = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        else:  # of Arrow's pool, whose pages are there already when a batch of before is gone
            lines = torch.frombuffer(pa.allocate_buffer(2 * shape[0] * shape[1]), dtype=torch.int16)
            lines = lines.reshape(shape)
        np.concatenate(pieces, out=lines.numpy())
        return lines


def audio_seconds(batch: Batch) -> float:
    """Return the seconds of mixtures that a batch holds."""
    episodes, conditions, _ = batch.pick.shape
    return episodes * conditions * batch.lines.shape[-1] / SAMPLE_RATE_HZ
