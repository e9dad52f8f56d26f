"""Mixtures of a dataset one after another, as whoever does not train on them wants to have them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.audio import Pcm, to_pcm
from pipeline.commits import ShardRecord
from pipeline.datasets import Dataset
from pipeline.episodes import NUMBERS, UNREADABLE, Numbers
from pipeline.render import bank_of, render
from pipeline.schema import ROOMS_FILE, SAMPLE_RATE_HZ
from pipeline.shards import damaged, open_shard, read_table

MIXTURE, NOISE = "mixture", "noise"


class Mixture(NamedTuple):
    """One condition of one episode."""

    name: str  # SPLIT-EPISODE-CONDITION
    mixit: bool  # slots are mixtures themselves
    condition: Mapping[str, float | None]  # fields of `schema.CONDITION`
    sources: list[Mapping[str, Any]]  # fields of `schema.SOURCE`
    lines: list[Mapping[str, Any]]  # fields of `schema.LINE`
    pcm: Pcm  # int16 (line, time), dry
    noise_slot: int

    @property
    def num_samples(self) -> int:
        return int(self.pcm.shape[1])

    @property
    def seconds(self) -> float:
        return self.num_samples / SAMPLE_RATE_HZ

    @property
    def slots(self) -> list[int]:
        """Return the slots in which somebody speaks."""
        return sorted({line["slot"] for line in self.lines} - {self.noise_slot})

    @property
    def noisy(self) -> bool:
        return any(line["slot"] == self.noise_slot for line in self.lines)

    @property
    def parts(self) -> list[str]:
        """Return the names of what the mixture is the sum of: s1 (slot 0), s2, .., noise."""
        return [*map(part_of, self.slots), *([NOISE] if self.noisy else [])]


def part_of(slot: int) -> str:
    """Return the name of what is in a slot of speech."""
    return f"s{slot + 1}"


def mixtures_of(dataset: Dataset, split: str) -> Iterator[Mixture]:
    """Yield the mixtures of all passes of a split in their order, a row group in memory at a time.

    Raises:
        CscError: naming a shard that is missing or damaged.
    """
    for record in dataset.records:
        place = dataset.place(record)
        if place is not None and place[0] == split:
            for row in _rows(dataset, record):
                yield from _mixtures(row, split, dataset.config.mixing.num_slots - 1)


def _rows(dataset: Dataset, record: ShardRecord) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard, each with its audio as int16 (line, time), checked."""
    try:
        file = open_shard(dataset.folder, record.name)
        numbers = Numbers.of(file.read(columns=NUMBERS, use_threads=False))
        if numbers.checksum() != (record.about or {}).get("numbers"):
            raise damaged(dataset.folder, record.name)
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, use_threads=False).to_pylist():
                if xxhash.xxh3_64_intdigest(row["pcm"]) != row["checksum"]:
                    raise damaged(dataset.folder, record.name)
                pcm = np.frombuffer(row["pcm"], "<i2").reshape(len(row["lines"]), -1)
                yield row | {"pcm": pcm}
    except UNREADABLE as error:
        raise damaged(dataset.folder, record.name) from error


def _mixtures(row: Mapping[str, Any], split: str, noise_slot: int) -> Iterator[Mixture]:
    for number, condition in enumerate(row["conditions"]):
        mine = [place for place, line in enumerate(row["lines"]) if line["condition"] == number]
        yield Mixture(
            f"{split}-{row['episode']:08d}-{number}",
            row["mixit"],
            condition,
            [source for source in row["sources"] if source["condition"] == number],
            [row["lines"][place] for place in mine],
            row["pcm"][mine],
            noise_slot,
        )


def rooms_of(dataset: Dataset) -> Tensor | None:
    """Return the responses of all rooms, int16 (room, time), or None where no room is used."""
    if not dataset.config.mixing.ever("room_share"):
        return None
    return bank_of(read_table(dataset.folder, ROOMS_FILE, ["pcm"]))


def signals(mixture: Mixture, bank: Tensor | None) -> dict[str, Pcm]:
    """Render a mixture: int16 (time,) of it and of its parts, which add up to it but for rounding.

    All are scaled down together where the mixture would exceed what `render` allows, or a part
    would clip.
    """
    shape = (1, 1, mixture.noise_slot + 1)
    sources = torch.zeros((*shape, mixture.num_samples), dtype=torch.int16)
    gains_db, rooms = torch.full(shape, -torch.inf), torch.full(shape, -1)
    for line, pcm in zip(mixture.lines, mixture.pcm, strict=True):
        sources[0, 0, line["slot"]] = torch.from_numpy(pcm)
        gains_db[0, 0, line["slot"]] = line["gain_db"]
        rooms[0, 0, line["slot"]] = line["room"]
    rendered = render(sources, gains_db, rooms, bank)
    whole, voices = rendered.mixtures[0, 0], rendered.references[0, 0]
    found = {part_of(slot): voices[slot] for slot in mixture.slots}
    if mixture.noisy:
        found[NOISE] = whole - voices.sum(0)
    loudest = max(float(part.abs().max()) for part in found.values())
    scale = min(1.0, 1.0 / loudest) if loudest > 0 else 1.0
    return {
        name: to_pcm((part * scale).numpy()) for name, part in [(MIXTURE, whole), *found.items()]
    }
