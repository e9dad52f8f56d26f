"""The order of training as a function: which episodes global step t of an epoch consists of."""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.draws import permutation, stream_key
from pipeline.errors import CscError

SHUFFLED_SHARDS = 64  # that are read at the same time: open files, and the reach of the shuffle


class Share(NamedTuple):
    """The episodes of a global batch that are one rank's: first, .., stop - 1 of `total`."""

    first: int
    stop: int
    total: int

    @classmethod
    def of(cls, batch_size: int, rank: int = 0, world: int = 1, block: int = 1) -> Self:
        """Share a batch out by whole blocks, as evenly as they allow.

        Raises:
            CscError: there are fewer blocks than ranks, or a part of one is left over.
        """
        blocks, rest = divmod(batch_size, block)
        if rest or blocks < world:
            raise CscError(
                f"a batch of {batch_size} episodes, in blocks of {block}, cannot be shared by "
                f"{world} workers: set train.batch_size to a multiple of both, or "
                "build.episodes_per_group lower"
            )
        return cls(rank * blocks // world * block, (rank + 1) * blocks // world * block, batch_size)

    @property
    def size(self) -> int:
        return self.stop - self.first


class Piece(NamedTuple):
    """Some episodes of one row group."""

    shard: int
    group: int
    first: int  # within the group
    stop: int


class Order:
    """Row groups of an epoch in a random order, cut into batches.

    Shards are permuted, and the row groups of each SHUFFLED_SHARDS of them among each other.
    """

    def __init__(self, rows: list[int], rows_per_group: int, seed: int, epoch: int) -> None:
        """`rows` are the episodes of each shard."""
        groups = [-(-count // rows_per_group) for count in rows]
        shards = permutation(stream_key(seed, "shards", epoch), len(rows))
        keys = np.random.Philox(key=stream_key(seed, "groups", epoch)).random_raw(sum(groups))
        shard = np.repeat(shards, [groups[place] for place in shards])
        group = np.concatenate([np.arange(groups[place]) for place in shards])
        near = np.repeat(np.arange(len(shards)) // SHUFFLED_SHARDS, np.take(groups, shards))
        order = np.lexsort((keys, near))
        self.shard: NDArray[np.int64] = shard[order]
        self.group: NDArray[np.int64] = group[order]
        count = np.minimum(rows_per_group, np.take(rows, self.shard) - self.group * rows_per_group)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(count)])

    def pieces(self, first: int, stop: int) -> list[Piece]:
        """Return where episodes first, .., stop - 1 of the epoch lie."""
        found = []
        place = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < stop:
            begin = first - int(self.starts[place])
            end = min(stop, int(self.starts[place + 1])) - int(self.starts[place])
            found.append(Piece(int(self.shard[place]), int(self.group[place]), begin, end))
            first, place = int(self.starts[place + 1]), place + 1
        return found
