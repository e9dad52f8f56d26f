"""One episode taken out of a dataset and rendered as training renders it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from pipeline.audio import Pcm
from pipeline.commits import ShardRecord
from pipeline.datasets import Dataset
from pipeline.episodes import UNREADABLE
from pipeline.errors import CscError
from pipeline.render import bank_of, render
from pipeline.schema import ROOMS_FILE
from pipeline.shards import damaged, open_shard, read_table


class Excerpt(NamedTuple):
    """An episode: its recipe and what it sounds like."""

    shard: str
    row: Mapping[str, Any]  # of schema.EPISODE, without audio
    lines: Pcm  # int16 (line, time), dry
    mixtures: NDArray[np.float32]  # (condition, time)
    references: NDArray[np.float32]  # (condition, speaker slot, time)
    noise: NDArray[np.float32]  # (condition, time), what is in a mixture and in no reference
    rooms: dict[int, str]  # of the rooms it sounds in: row of ROOMS_FILE, name


def read_excerpt(dataset: Dataset, split: str, number: int) -> Excerpt:
    """Read and render episode `number` of a split.

    Raises:
        CscError: there is no such episode, or the shard that has it is damaged.
    """
    record, place = _where(dataset, split, number)
    try:
        row, pcm = _row(dataset, record, place)
    except UNREADABLE as error:
        raise damaged(dataset.folder, record.name) from error
    if row["episode"] != number or xxhash.xxh3_64_intdigest(pcm) != row["checksum"]:
        raise damaged(dataset.folder, record.name)
    lines = np.frombuffer(pcm, "<i2").reshape(len(row["lines"]), -1)
    return _rendered(dataset, record.name, row, lines)


def _where(dataset: Dataset, split: str, number: int) -> tuple[ShardRecord, int]:
    """Return the shard of an episode, and the row in it."""
    splits = [name for name, count in dataset.episodes.items() if count]
    if split not in splits:
        raise CscError(f"{dataset.id} has no split {split!r}: choose from {', '.join(splits)}")
    first = 0
    for record in (r for r in dataset.records if (dataset.place(r) or ("",))[0] == split):
        if first <= number < first + record.rows:
            return record, number - first
        first += record.rows
    raise CscError(
        f"split {split!r} of {dataset.id} has no episode {number}: choose from 0 to {first - 1}"
    )


def _row(dataset: Dataset, record: ShardRecord, place: int) -> tuple[dict[str, Any], bytes]:
    file = open_shard(dataset.folder, record.name)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if place < count:
            (row,) = file.read_row_group(group).slice(place, 1).to_pylist()
            return row, row.pop("pcm")
        place -= count
    raise pa.ArrowInvalid("fewer rows than the index says")


def _rendered(dataset: Dataset, shard: str, row: Mapping[str, Any], lines: Pcm) -> Excerpt:
    shape = (1, len(row["conditions"]), dataset.config.mixing.num_slots)
    sources = torch.zeros((*shape, lines.shape[1]), dtype=torch.int16)
    gains_db, rooms = torch.full(shape, -torch.inf), torch.full(shape, -1)
    for line, pcm in zip(row["lines"], lines, strict=True):
        at = (0, line["condition"], line["slot"])
        sources[at] = torch.from_numpy(pcm.astype(np.int16))
        gains_db[at], rooms[at] = line["gain_db"], line["room"]
    bank, names = None, {}
    used = sorted({line["room"] for line in row["lines"]} - {-1})
    if used:
        table = read_table(dataset.folder, ROOMS_FILE)
        bank = bank_of(table)
        names = {place: table["room"][place].as_py() for place in used}
    made = render(sources, gains_db, rooms, bank)
    mixtures, references = made.mixtures[0].numpy(), made.references[0].numpy()
    noise = mixtures - references.sum(1)
    return Excerpt(shard, row, lines, mixtures, references, noise, names)
