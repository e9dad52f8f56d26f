"""What mixtures came to be: what was asked of them, what that became, and who is in them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.commits import ShardRecord
from pipeline.datasets import Dataset
from pipeline.episodes import UNREADABLE
from pipeline.schema import NOISE, SAMPLE_RATE_HZ, SEVERAL
from pipeline.shards import damaged

MOST = 10_000  # mixtures that are looked at
ASKED = {"SIR dB": "sir_db", "SNR dB": "snr_db", "overlap": "overlap"}
COLUMNS = ["anchor", "mixit", "conditions", "lines"]
QUANTILES = (0.05, 0.5, 0.95)
MARKS = ("target absent", "noise", "babble", "room", "mixture of mixtures")
Row = Mapping[str, Any]
"""A row of a shard without its audio."""


class Spread(NamedTuple):
    """How some numbers lie."""

    number: int  # of values
    mean: float
    deviation: float
    quantiles: tuple[float, ...]  # QUANTILES

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Spread | None":
        if not len(values):
            return None
        quantiles = tuple(np.quantile(values, QUANTILES).tolist())
        return cls(len(values), float(values.mean()), float(values.std()), quantiles)


class Census(NamedTuple):
    """Numbers over mixtures."""

    mixtures: int
    spreads: dict[str, dict[str, Spread | None]]  # of what, then: asked, realised, difference
    shares: dict[str, float]  # of the mixtures
    same_gender: tuple[int, int]  # interferers of the target's gender, of those where it is known


def census(
    dataset: Dataset, splits: Sequence[str], genders: Mapping[int, str], most: int = MOST
) -> Census:
    """Look at mixtures of some splits in the order of their shards, without their audio.

    `genders` gives the gender of a row of the speakers' table, where it is known.

    Raises:
        CscError: naming a shard that is damaged.
    """
    parts, left = [], -(-most // dataset.config.mixing.conditions)
    for split, turn in dataset.places:
        for record in dataset.shards(split, turn) if split in splits else ():
            if left <= 0:
                break
            parts.append(_read(dataset, record, COLUMNS).slice(0, left))
            left -= len(parts[-1])
    rows = [row for part in parts for row in part.to_pylist()]
    return Census(
        sum(len(row["conditions"]) for row in rows),
        {what: _spreads(rows, name) for what, name in ASKED.items()},
        _shares(rows, dataset.config.mixing.num_slots - 1),
        _same_gender(rows, genders, dataset.config.mixing.num_slots - 1),
    )


def seconds_of(dataset: Dataset) -> float:
    """Return how long all mixtures are together.

    Raises:
        CscError: naming a shard that is damaged.
    """
    if dataset.num_samples is not None:
        episodes = sum(record.rows for record in dataset.records)
        return episodes * dataset.config.mixing.conditions * dataset.num_samples / SAMPLE_RATE_HZ
    total = 0
    for record in dataset.records:
        for row in _read(dataset, record, ["sources"]).to_pylist():
            total += max(source["onset"] + source["num_samples"] for source in row["sources"])
    return total / SAMPLE_RATE_HZ


def _read(dataset: Dataset, record: ShardRecord, columns: list[str]) -> pa.Table:
    try:
        with dataset.folder.open_input(record.name) as file:
            return pq.read_table(file, columns=columns)
    except UNREADABLE as error:
        raise damaged(dataset.folder, record.name) from error


def _spreads(rows: Sequence[Row], name: str) -> dict[str, Spread | None]:
    conditions = list(chain.from_iterable(row["conditions"] for row in rows))
    asked, realised = (
        np.array([condition[key] for condition in conditions], np.float64)  # None becomes NaN
        for key in (name, f"realised_{name}")
    )
    values = {"asked": asked, "realised": realised, "difference": realised - asked}
    return {what: Spread.of(array[~np.isnan(array)]) for what, array in values.items()}


def _mixtures(rows: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """Return each mixture as its episode and its lines."""
    return [
        (row, [line for line in row["lines"] if line["condition"] == number])
        for row in rows
        for number in range(len(row["conditions"]))
    ]


def _shares(rows: Sequence[Row], noise_slot: int) -> dict[str, float]:
    found = [_marks(row, lines, noise_slot) for row, lines in _mixtures(rows)]
    names = [*(f"{count} interferer(s)" for count in range(noise_slot)), *MARKS]
    return {name: sum(name in marks for marks in found) / max(len(found), 1) for name in names}


def _marks(row: Row, lines: Sequence[Row], noise_slot: int) -> set[str]:
    """Return what is true of a mixture."""
    if row["mixit"]:
        return {"mixture of mixtures"}
    slots = {line["slot"] for line in lines}
    behind = [line["speaker"] for line in lines if line["slot"] == noise_slot]
    marks = {
        "target absent": 0 not in slots,
        "noise": NOISE in behind,
        "babble": SEVERAL in behind,
        "room": any(line["room"] >= 0 for line in lines),
    }
    return {f"{len(slots - {0, noise_slot})} interferer(s)"} | {m for m, so in marks.items() if so}


def _same_gender(
    rows: Sequence[Row], genders: Mapping[int, str], noise_slot: int
) -> tuple[int, int]:
    same = [
        genders[row["anchor"]] == genders[line["speaker"]]
        for row, lines in _mixtures(rows)
        for line in lines
        if 0 < line["slot"] < noise_slot and {row["anchor"], line["speaker"]} <= genders.keys()
    ]
    return sum(same), len(same)
