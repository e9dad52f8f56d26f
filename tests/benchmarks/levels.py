"""Which levels and overlaps mixtures were asked to have, and which they have.

    python -m tests.benchmarks.levels [--mixtures 10000]

Mixtures of the shipped sample, 4 s, two to an episode, of one to three voices, with noise in half
of them and no target in a tenth; overlaps from none to all.

Asked is what the recipes say. What came to be is measured here, on the dry lines after their gains,
in floating point over the frames that count as speech. These frames begin with the mixture; those
that gains are set by begin where an utterance does, and how far both are apart is printed too. Of
remixed batches, what the loader draws is what was asked. Differences are what came to be - asked.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

import pipeline.remix
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.draws import Draws
from pipeline.loader import Batch, EpisodeLoader
from pipeline.remix import Cast
from pipeline.speech import active_level_dbfs
from pipeline.storage import Folder
from tests.benchmarks.loading import BATCH, shard_paths
from tests.benchmarks.peers import CONDITIONS, LENGTH, SECONDS, built, sample_store

MIXING = MixingConfig(
    seconds=SECONDS,
    conditions=CONDITIONS,
    interferer_shares=[0.1, 0.6, 0.3],
    overlap_min=0.0,
    overlap_max=1.0,
    noise_share=0.5,
    absent_share=0.1,
)
KINDS = {"SIR": ("sir_db", 1.0), "SNR": ("snr_db", 1.0), "overlap": ("overlap", 100.0)}
QUANTILES = (5, 50, 95)
Values = dict[str, list[tuple[float, float]]]
"""Of each kind, what was asked and what came to be, by mixture."""


def sum_db(levels_db: Iterable[float]) -> float:
    return float(10 * np.log10(sum(10 ** (level / 10) for level in levels_db)))


def ratios(levels_db: dict[int, float]) -> tuple[float | None, float | None]:
    """Return SIR and SNR, given how loud each slot of a mixture is."""
    target, noise = levels_db.get(0), levels_db.get(MIXING.num_slots - 1)
    rivals = [levels_db[slot] for slot in range(1, MIXING.num_slots - 1) if slot in levels_db]
    speech = target if target is not None else sum_db(rivals)
    sir_db = target - sum_db(rivals) if target is not None and rivals else None
    return sir_db, None if noise is None else speech - noise


def episodes(dataset: Folder) -> Iterator[dict[str, Any]]:
    for path in shard_paths(dataset):
        file = pq.ParquetFile(path, memory_map=True)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group).to_pylist()


def measured(dataset: Folder) -> tuple[Values, Values]:
    """Return what recipes ask and what came to be; and what shards say of the latter."""
    values: Values = defaultdict(list)
    said: Values = defaultdict(list)
    for row in episodes(dataset):
        pcm = np.frombuffer(row["pcm"], "<i2").reshape(-1, LENGTH)
        levels_db: list[dict[int, float]] = [{} for _ in row["conditions"]]
        for line, samples in zip(row["lines"], pcm, strict=True):
            level_db = active_level_dbfs(samples.astype(np.float32) / 32768) + line["gain_db"]
            levels_db[line["condition"]][line["slot"]] = level_db
        for number, condition in enumerate(row["conditions"]):
            got = (*ratios(levels_db[number]), overlap(row["sources"], number))
            for (kind, (name, _)), value in zip(KINDS.items(), got, strict=True):
                if condition[name] is not None and value is not None:
                    values[kind].append((condition[name], value))
                    said[kind].append((condition[f"realised_{name}"], value))
    return values, said


def overlap(sources: list[dict[str, Any]], number: int) -> float:
    """Return the share of a mixture in which the target and anybody else are laid."""
    laid = np.zeros((2, LENGTH), bool)
    for source in sources:
        if source["condition"] == number and source["slot"] < MIXING.num_slots - 1:
            stop = source["onset"] + source["num_samples"]
            laid[min(source["slot"], 1), source["onset"] : stop] = True
    return float(laid.all(0).mean())


def remixed(dataset: Folder) -> Values:
    """Return what remixed batches of an epoch were to have, and what they have."""
    asked: dict[bytes, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    gains = pipeline.remix._gains

    def recorded(drawn: Cast, draws: Draws, mixing: MixingConfig) -> NDArray[np.float32]:
        """Set the gains as ever, and note what was drawn: by the gains, which differ."""
        known = _Recorded(draws)
        found = gains(drawn, known, mixing)  # type: ignore[arg-type]
        sir, snr = known.drawn
        sir_db = mixing.sir_min_db + (mixing.sir_max_db - mixing.sir_min_db) * sir
        snr_db = mixing.snr_min_db + (mixing.snr_max_db - mixing.snr_min_db) * snr
        for episode, its_gains in enumerate(found):
            asked[its_gains.tobytes()] = (sir_db[episode], snr_db[episode])
        return found

    values: Values = defaultdict(list)
    loader = EpisodeLoader(dataset, "train", batch_size=BATCH, seed=5, remix=True, pin=False)
    with patch.object(pipeline.remix, "_gains", recorded):
        for batch in loader.batches(1):
            for kind, value, got in _in_batch(batch, asked):
                values[kind].append((value, got))
    return values


class _Recorded:
    """Draws that remember what they gave last."""

    def __init__(self, draws: Draws) -> None:
        self.draws, self.drawn = draws, np.empty(0)

    def fractions(self, *shape: int) -> NDArray[np.float64]:
        self.drawn = self.draws.fractions(*shape)
        return self.drawn


def _in_batch(batch: Batch, asked: dict[bytes, Any]) -> Iterator[tuple[str, float, float]]:
    dry = batch.lines.numpy().astype(np.float32) / 32768
    line_levels_db = [active_level_dbfs(samples) for samples in dry]
    for episode, gains_db in enumerate(batch.gains_db.numpy()):
        wanted = asked[gains_db.tobytes()]
        for number, picked in enumerate(batch.pick[episode].tolist()):
            levels_db = {
                slot: line_levels_db[line] + float(gains_db[number, slot])
                for slot, line in enumerate(picked)
                if line >= 0
            }
            for kind, each, got in zip(KINDS, wanted, ratios(levels_db), strict=False):
                if got is not None:
                    yield kind, float(each[number]), got


def report(title: str, values: Values, parts: tuple[str, ...]) -> None:
    """Print mean, deviation and quantiles of what was asked, of what came to be, and between."""
    quantiles = "".join(f"{f'{q} %':>8}" for q in QUANTILES)
    print(f"\n{title:20}{'':12} mixtures    mean      sd{quantiles}")
    for kind, pairs in values.items():
        scale = KINDS[kind][1]
        asked, got = scale * np.array(pairs).T
        rows = {"asked": asked, "got": got, "difference": got - asked}
        unit = "%" if scale > 1 else "dB"
        for part in parts:
            row = rows[part]
            numbers = (row.mean(), row.std(), *np.percentile(row, QUANTILES))
            cells = "".join(f"{number:8.2f}" for number in numbers)
            print(f"{f'{kind}, {unit}':20}{part:12} {len(row):8}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixtures", type=int, default=10_000)
    parser.add_argument("--store", help="a generation of a store; without it, one is made")
    options = parser.parse_args()
    config = BuildConfig(
        train_episodes=options.mixtures // CONDITIONS, valid_episodes=BATCH, mixing=MIXING
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        dataset = built(sample_store(root / "store", options.store), root / "dataset", config)
        values, said = measured(dataset)
        report("built", values, ("asked", "got", "difference"))
        report("built, as shards say", said, ("difference",))
        report("remixed", remixed(dataset), ("difference",))


if __name__ == "__main__":
    main()
