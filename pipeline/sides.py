"""The audio of trials: what lies under and over a test side, and the mixture that it makes."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.audio import Pcm, to_float
from pipeline.mixing import TARGET_LEVEL_DBFS, power_db
from pipeline.render import render
from pipeline.schema import SAMPLE_RATE_HZ, config_hash
from pipeline.shards import read_pcm
from pipeline.speech import active_level_dbfs
from pipeline.storage import Folder
from pipeline.trials import MAX_RIVALS, NONE, SIDES_VERSION, Condition, Trials

SLOTS = 2 + MAX_RIVALS  # target, rivals, noise
PAUSE_DB = 20.0  # below its utterance a part counts as hardly spoken
Floats = NDArray[np.float32]


class Read(Protocol):
    """Reads rows of a catalogue as PCM, in their order."""

    def __call__(self, rows: pa.Table) -> list[Pcm]: ...


class Side(NamedTuple):
    """A test side: the mixture `(time,)`, and the voices in it `(voice, time)`, the target first.

    Rivals that the condition does not have are silent.
    """

    mixture: Floats
    voices: Floats


def from_store(store: Folder) -> Read:
    """Return what reads utterances of a store."""

    def read(rows: pa.Table) -> list[Pcm]:
        places = list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True))
        wanted: dict[int, set[int]] = {}
        for shard, row in places:
            wanted.setdefault(shard, set()).add(row)
        audio = read_pcm(store, wanted)
        return [audio[place] for place in places]

    return read


class TrialAudio:
    """The audio that the test sides of some utterances are made of, in memory."""

    def __init__(self, read: Read, trials: Trials, places: Iterable[int] | None = None) -> None:
        self.trials = trials
        wanted = range(len(trials.utterances)) if places is None else list(places)
        rivals = trials.rivals[wanted].ravel().tolist() if self._any("interferers") else []
        self._speech = _Audio.of(read, trials.utterances, {*wanted, *rivals} - {NONE})
        noises = {int(trials.noise[place]) for place in wanted} if self._any("snr_db") else set()
        self._noise = _Audio.of(read, trials.noises, noises - {NONE})
        rooms = {int(trials.room[place]) for place in wanted} if self._any("room") else set()
        self._rooms = _Audio.of(read, trials.rooms, rooms - {NONE})

    def _any(self, key: str) -> bool:
        plain = getattr(Condition(), key)
        return any(getattr(its, key) != plain for its in self.trials.conditions.values())

    def side(self, place: int, condition: str) -> Side:
        """Render the test side of an utterance under a condition."""
        asked = self.trials.conditions[condition]
        target = middle(self._speech.pcm[place], asked.seconds)
        sources = np.zeros((SLOTS, len(target)), "<i2")
        gains_db = np.full(SLOTS, -np.inf, np.float32)
        sources[0], gains_db[0] = target, self._speech.gain_db(place, target)
        for slot, rival in enumerate(self.trials.rivals[place, : asked.interferers], start=1):
            sources[slot], gain_db = self._speech.over(int(rival), len(target))
            gains_db[slot] = gain_db - asked.sir_db - power_db(asked.interferers)
        if asked.snr_db is not None:
            sources[-1], gain_db = self._noise.over(int(self.trials.noise[place]), len(target))
            gains_db[-1] = gain_db - asked.snr_db
        return self._rendered(sources, gains_db, int(self.trials.room[place]), asked.room)

    def _rendered(self, sources: Pcm, gains_db: Floats, room: int, inside: bool) -> Side:
        rooms = bank = None
        if inside:
            bank = torch.from_numpy(self._rooms.pcm[room].copy())[None]
            rooms = torch.full((1, 1, SLOTS), -1)
            rooms[..., :-1] = torch.from_numpy(np.where(np.isinf(gains_db[:-1]), -1, 0))
        made = render(
            torch.from_numpy(sources)[None, None],
            torch.from_numpy(gains_db)[None, None],
            rooms,
            bank,
        )
        return Side(made.mixtures[0, 0].numpy(), made.references[0, 0].numpy())


class _Audio(NamedTuple):
    """Utterances by their place, with their levels."""

    pcm: Mapping[int, Pcm]
    level_dbfs: Mapping[int, float]

    @classmethod
    def of(cls, read: Read, table: pa.Table, places: Iterable[int]) -> "_Audio":
        ordered = sorted(set(places))
        rows = table.take(pa.array(ordered, pa.int64()))
        levels = rows["level_dbfs"].to_pylist()
        return cls(
            dict(zip(ordered, read(rows), strict=True)), dict(zip(ordered, levels, strict=True))
        )

    def over(self, place: int, num_samples: int) -> tuple[Pcm, float]:
        """Return an utterance that lies over a whole mixture, and its gain: a short one repeats."""
        part = np.resize(self.pcm[place], num_samples)
        return part, self.gain_db(place, part)

    def gain_db(self, place: int, part: Pcm) -> float:
        """Return what brings a part to TARGET_LEVEL_DBFS; a pause in it is not made loud."""
        quietest = self.level_dbfs[place] - PAUSE_DB
        return TARGET_LEVEL_DBFS - max(active_level_dbfs(to_float(part)), quietest)


def middle(pcm: Pcm, seconds: float | None) -> Pcm:
    """Return the middle of a recording, or all of it where that is no longer."""
    length = len(pcm) if seconds is None else min(len(pcm), round(seconds * SAMPLE_RATE_HZ))
    first = (len(pcm) - length) // 2
    return pcm[first : first + length]


def side_id(trials: Trials, place: int, condition: str) -> str:
    """Return the name of a test side: a hash of all that its samples depend on."""
    asked = trials.conditions[condition]
    names = [trials.utterances["utterance_id"][place].as_py()]
    if asked.interferers:
        rivals = trials.rivals[place, : asked.interferers].tolist()
        names += [trials.utterances["utterance_id"][rival].as_py() for rival in rivals]
    if asked.snr_db is not None:
        names.append(trials.noises["utterance_id"][int(trials.noise[place])].as_py())
    if asked.room:
        names.append(trials.rooms["utterance_id"][int(trials.room[place])].as_py())
    return config_hash([SIDES_VERSION, asked.model_dump(), names])
