"""The plan of a build: which window each task reads, and which episodes it makes of that."""

from collections.abc import Iterator
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.casting import Rooms, check_enough
from pipeline.distributions import BuildConfig
from pipeline.draws import stream_key
from pipeline.errors import CscError
from pipeline.schema import of_split
from pipeline.windows import Run, Slice, added, allot, cut, rounds, runs_of, widened

BUILT_SPLITS = ("train", "valid")
NOISE_SLICES = 2  # of a window
Window = tuple[list[Run], float]
"""What is read together, and how many episodes it is due in proportion to others."""


def plan_tasks(
    catalogue: pa.Table, rooms: pa.Table | None, config: BuildConfig, seed: int
) -> list[dict[str, Any]]:
    """Return the tasks of a dataset, each with its window, distributions and shards.

    Raises:
        CscError: a split has too little of what is asked for.
    """
    return [
        task
        for split in BUILT_SPLITS
        for task in _tasks_of(_windows(catalogue, rooms, split, config, seed), split, config, seed)
    ]


def _windows(
    catalogue: pa.Table, rooms: pa.Table | None, split: str, config: BuildConfig, seed: int
) -> Iterator[Window]:
    """Yield windows of a split for ever."""
    rows = of_split(catalogue, split)
    speech = cut(rows.filter(pc.equal(rows["kind"], "speech")), config.slice_mb)
    noise = cut(rows.filter(pc.equal(rows["kind"], "noise")), config.slice_mb)
    counts = added(speech, range(len(speech)))
    try:
        for mixing in (config.mixing.at(0), config.mixing.final):
            check_enough(
                mixing,
                speakers=len(counts),
                most_utterances=max(counts.values(), default=0),
                noises=len(noise),
                rooms=len(Rooms.of(rooms, split).responses),
            )
    except CscError as error:  # said here, once, before any work
        raise CscError(f"split {split!r}: {error}, or change ingest.splits") from error
    noises = rounds(stream_key(seed, split, "noise"), len(noise), NOISE_SLICES)
    for chosen in rounds(stream_key(seed, split, "speech"), len(speech), config.window_slices):
        wide = widened(chosen, speech, lambda chosen: _due(chosen, speech, counts, config) > 0)
        runs = sorted(runs_of(speech, wide) + runs_of(noise, next(noises)))
        yield runs, _due(wide, speech, counts, config)


def _due(
    chosen: list[int], slices: list[Slice], counts: dict[str, int], config: BuildConfig
) -> float:
    """Return the weight of a window: that of the anchors of its `MixingTable`, 0 where they lack.

    Too few speakers for an episode make it 0 as well.
    """
    here, mixing = added(slices, chosen), config.mixing
    if len(here) < mixing.speakers_needed:
        return 0.0
    anchors = {name: n for name, n in here.items() if n >= mixing.utterances_needed}
    return sum(n * counts[name] ** (mixing.balance - 1) for name, n in anchors.items())


def _tasks_of(
    windows: Iterator[Window], split: str, config: BuildConfig, seed: int
) -> Iterator[dict[str, Any]]:
    train = split == "train"
    episodes = config.train_episodes if train else config.valid_episodes
    for epoch in range(config.passes if train else 1):
        # Validation is always what training ends with.
        mixing = config.mixing.at(epoch) if train else config.mixing.final
        common = {
            "split": split,
            "key": stream_key(seed, split),
            "mixing": mixing.model_dump(),
            "episodes_per_group": config.episodes_per_group,
        }
        first, names = epoch * episodes, (f"{split}-{epoch:03d}-{n:05d}.parquet" for n in count())
        for runs, due in _shares(windows, episodes, config):
            shards = _shards(first, due, config, names)
            first += due
            most = config.shards_per_window + 1  # some windows are due more than others
            for place in range(0, len(shards), most):
                yield common | {"runs": runs, "shards": shards[place : place + most]}


def _shards(
    first: int, due: int, config: BuildConfig, names: Iterator[str]
) -> list[dict[str, Any]]:
    """Spread episodes evenly, by whole row groups, over as few shards as hold them."""
    group, number = config.episodes_per_group, -(-due // config.episodes_per_shard)
    groups = -(-due // group)
    edges = [min(groups * place // number * group, due) for place in range(number + 1)]
    return [
        {"name": next(names), "first": first + a, "stop": first + b} for a, b in pairwise(edges)
    ]


def _shares(
    windows: Iterator[Window], episodes: int, config: BuildConfig
) -> Iterator[tuple[list[Run], int]]:
    """Share the episodes of a pass out over as many windows as it takes, by whole row groups.

    Only the last window may end with a part of one: batches then begin where row groups do.
    """
    number = -(-episodes // (config.episodes_per_shard * config.shards_per_window))
    chosen = list(islice(windows, number))
    group, left = config.episodes_per_group, episodes
    shares = allot(-(-episodes // group), np.array([weight for _, weight in chosen]))
    for (runs, _), share in zip(chosen, shares, strict=True):
        due = min(share * group, left)
        if due:
            yield runs, due
        left -= due
