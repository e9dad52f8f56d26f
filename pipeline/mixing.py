"""Recipes: what is mixed with what, drawn as data.

`recipe(seed, index, table, config)` is a pure function: no worker, node or retry changes what it
returns. Its random numbers are the raw output of Philox, a counter-based generator, so that they
are the same with every version of numpy.
"""

import hashlib
from collections import Counter
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, Strict

TARGET_LEVEL_DBFS = -25.0


class MixingConfig(Strict):
    """Distributions that recipes are drawn from."""

    seconds: float = Field(4.0, gt=0.1, le=30)
    conditions: int = Field(2, ge=2, description="mixtures of an episode")
    interferers: int = Field(1, ge=0, le=3, description="other speakers in a mixture, at most")
    single_share: float = Field(0.1, ge=0, le=1, description="conditions without an interferer")
    sir_min_db: float = -5.0
    sir_max_db: float = 10.0
    noise_share: float = Field(0.1, ge=0, le=1, description="conditions with noise")
    snr_min_db: float = 0.0
    snr_max_db: float = 15.0
    balance: float = Field(0.0, ge=0, le=1, description="0 draws speakers evenly, 1 by utterances")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for low, high in (("sir_min_db", "sir_max_db"), ("snr_min_db", "snr_max_db")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} is above {high}: {getattr(self, low)} dB")
        return self

    @property
    def num_samples(self) -> int:
        """Samples of a mixture."""
        return round(self.seconds * SAMPLE_RATE_HZ)

    @property
    def num_slots(self) -> int:
        """Places for sources in a condition: target, interferers, noise."""
        return self.interferers + 2


class BuildConfig(Strict):
    """How many episodes, and how they lie in shards."""

    train_episodes: int = Field(20_000, ge=1)
    valid_episodes: int = Field(500, ge=1)
    episodes_per_shard: int = Field(250, ge=1)
    episodes_per_group: int = Field(4, ge=1, description="episodes read in one go")
    window_shards: int = Field(8, ge=1, description="utterance shards a mixture shard draws from")
    mixing: MixingConfig = MixingConfig()


class Source(NamedTuple):
    """A dry segment within a mixture; fields as in `schema.SOURCE`."""

    condition: int
    slot: int
    utterance_id: str
    speaker_id: str
    shard: int
    row: int
    offset: int
    num_samples: int
    onset: int
    gain_db: float


class Condition(NamedTuple):
    """The levels of a mixture; None where there is no interferer or no noise."""

    sir_db: float | None
    snr_db: float | None


class Recipe(NamedTuple):
    """An episode as data: one anchor speaker under several conditions."""

    episode: int
    anchor: str
    conditions: list[Condition]
    sources: list[Source]

    def as_row(self) -> dict[str, Any]:
        """Return the row of `schema.RECIPE`."""
        return self._asdict() | {
            "conditions": [condition._asdict() for condition in self.conditions],
            "sources": [source._asdict() for source in self.sources],
        }


class Draws:
    """Uniform numbers of one stream: the same for the same key and index, for ever."""

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=seed, counter=[0, 0, 0, index])

    def fraction(self) -> float:
        """Return a number in [0, 1)."""
        return float(int(self._bits.random_raw()) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.fraction()

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self.fraction() * count)

    def distinct(self, count: int, chosen: int) -> list[int]:
        """Return `chosen` different integers below `count`, in random order (a sparse shuffle)."""
        moved: dict[int, int] = {}
        drawn = []
        for place in range(chosen):
            other = place + self.below(count - place)
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


class MixingTable:
    """The speakers of one split, laid out so that a recipe costs the same for any corpus size."""

    def __init__(self, catalogue: pa.Table, config: MixingConfig) -> None:
        ordered = catalogue.sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
        speech = ordered.filter(pc.equal(ordered["kind"], "speech"))
        self.noise = _columns(ordered.filter(pc.equal(ordered["kind"], "noise")))
        self.speech = _columns(speech)
        self.speakers, first, count = np.unique(
            self.speech["speaker_id"], return_index=True, return_counts=True
        )
        self.first, self.count = first, count
        self.anchors = np.flatnonzero(count >= config.conditions)
        weight = count[self.anchors].astype(np.float64) ** config.balance
        self.anchor_cdf = np.cumsum(weight) / max(weight.sum(), 1e-12)
        _check_enough(self, config)


def _columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    ids = ("utterance_id", "speaker_id", "session_id")
    numbers = ("shard", "row", "num_samples", "level_dbfs")
    return {name: table[name].to_numpy() for name in (*ids, *numbers)}


def _check_enough(table: MixingTable, config: MixingConfig) -> None:
    if not len(table.anchors):
        raise CscError(
            f"no speaker has {config.conditions} utterances, one for each condition of an episode: "
            "add recordings, or set build.mixing.conditions lower"
        )
    needed = config.conditions * config.interferers + 1
    if len(table.speakers) < needed:
        raise CscError(
            f"{len(table.speakers)} speaker(s) to mix, at least {needed} are needed (an anchor and "
            "another interferer for each condition): add speakers to the corpus"
        )
    if config.noise_share > 0 and not len(table.noise["shard"]):
        raise CscError(
            "build.mixing.noise_share asks for noise and no corpus of kind 'noise' has any in "
            "this split: add one, or set build.mixing.noise_share=0"
        )


def recipe(seed: int, index: int, table: MixingTable, config: MixingConfig) -> Recipe:
    """Draw episode `index`: a pure function of its arguments."""
    draws = Draws(seed, index)
    place = int(np.searchsorted(table.anchor_cdf, draws.fraction(), side="right"))
    anchor = int(table.anchors[min(place, len(table.anchors) - 1)])
    targets = _utterances_of(draws, table, anchor, config.conditions)
    others = draws.distinct(len(table.speakers) - 1, config.conditions * config.interferers)
    conditions, sources = [], []
    for number, target in enumerate(targets):
        rivals = [
            other + (other >= anchor)
            for other in others[number * config.interferers : (number + 1) * config.interferers]
        ]
        condition, drawn = _condition(draws, table, config, number, target, rivals)
        conditions.append(condition)
        sources.extend(drawn)
    return Recipe(index, str(table.speakers[anchor]), conditions, sources)


def _utterances_of(draws: Draws, table: MixingTable, speaker: int, chosen: int) -> list[int]:
    """Draw different utterances of a speaker, from different sessions as far as there are any.

    Looks at four candidates for each one chosen, so that a speaker of any size costs the same.
    """
    count = int(table.count[speaker])
    candidates = [
        int(table.first[speaker]) + place for place in draws.distinct(count, min(count, 4 * chosen))
    ]
    used: Counter[str] = Counter()
    ranked = []
    for utterance in candidates:
        session = table.speech["session_id"][utterance]
        ranked.append((used[session], utterance))
        used[session] += 1
    return [utterance for _, utterance in sorted(ranked, key=itemgetter(0))[:chosen]]


def _condition(
    draws: Draws,
    table: MixingTable,
    config: MixingConfig,
    number: int,
    target: int,
    rivals: list[int],
) -> tuple[Condition, list[Source]]:
    sources = [_source(draws, table.speech, target, config, number, 0, 0.0)]
    alone = draws.fraction() < config.single_share or not rivals
    sir_db = draws.uniform(config.sir_min_db, config.sir_max_db)
    for slot, rival in enumerate(() if alone else rivals, start=1):
        spoken = int(table.first[rival]) + draws.below(int(table.count[rival]))
        sources.append(_source(draws, table.speech, spoken, config, number, slot, -sir_db))
    noisy = draws.fraction() < config.noise_share
    snr_db = draws.uniform(config.snr_min_db, config.snr_max_db)
    if noisy:
        clip = draws.below(len(table.noise["shard"]))
        slot = config.num_slots - 1
        sources.append(_source(draws, table.noise, clip, config, number, slot, -snr_db))
    return Condition(None if alone else sir_db, snr_db if noisy else None), sources


def _source(
    draws: Draws,
    rows: dict[str, NDArray[Any]],
    at: int,
    config: MixingConfig,
    condition: int,
    slot: int,
    relative_db: float,
) -> Source:
    """Place one utterance: a random part of a long one, a random onset for a short one."""
    available = int(rows["num_samples"][at])
    num_samples = min(available, config.num_samples)
    return Source(
        condition,
        slot,
        str(rows["utterance_id"][at]),
        str(rows["speaker_id"][at]),
        int(rows["shard"][at]),
        int(rows["row"][at]),
        draws.below(available - num_samples + 1),
        num_samples,
        draws.below(config.num_samples - num_samples + 1),
        TARGET_LEVEL_DBFS - float(rows["level_dbfs"][at]) + relative_db,
    )


def stream_key(*parts: object) -> int:
    """Return a 128-bit key for `Draws` from whatever names a stream, as seed and split."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def window(seed: int, number: int, num_shards: int, width: int) -> list[int]:
    """Return which utterance shards mixture shard `number` draws from: sequential reads only."""
    if num_shards <= width:
        return list(range(num_shards))
    return sorted(Draws(stream_key(seed, "window"), number).distinct(num_shards, width))
