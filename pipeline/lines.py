"""From recipes to what a mixture shard holds: dry lines, their levels, what mixtures came to be."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.audio import Pcm
from pipeline.mixing import Recipe, Source
from pipeline.schema import EPISODE, NOISE, SEVERAL
from pipeline.speech import ACTIVE_RANGE_DB, AUDIBLE_DBFS, EMPTY_DB, FRAME

FULL_SCALE = 32768.0
AMPLITUDE_BITS = 15  # of gains within a line: integers add up to the same in any order
LEVEL_DECIMALS = 2
MOST_GAIN_DB = 40.0  # of what is all but silent


class Use(NamedTuple):
    """Where an utterance goes: which source of which line of the shard."""

    line: int
    place: int
    source: Source
    alone: bool  # in its line


class Canvas:
    """The episodes of one shard while their utterances come in, in any order."""

    def __init__(self, recipes: Sequence[Recipe], num_samples: int, num_slots: int) -> None:
        self.recipes, self.num_samples, self.noise_slot = recipes, num_samples, num_slots - 1
        self.uses: dict[tuple[int, int], list[Use]] = defaultdict(list)
        self.voices: set[str] = set()  # speakers that are heard
        self.lines: list[list[list[Source]]] = []  # (episode, line, source)
        count = 0
        for drawn in recipes:
            lines = _grouped(drawn.sources)
            self.lines.append(lines)
            for sources in lines:
                self._expect(count, sources)
                count += 1
        self.pcm = np.zeros((count, num_samples), "<i2")
        self.gains_db: dict[tuple[int, int], float] = {}  # of (line, place)
        self.levels_dbfs: dict[int, float] = {}  # of lines, measured
        self._sums: dict[int, NDArray[np.int64]] = {}
        self._scale_db: dict[int, float] = {}

    def _expect(self, line: int, sources: list[Source]) -> None:
        if sources[0].slot < self.noise_slot or len(sources) > 1:
            self.voices |= {source.speaker_id for source in sources}
        for place, source in enumerate(sources):
            use = Use(line, place, source, len(sources) == 1)
            self.uses[source.shard, source.row].append(use)

    def put(self, shard: int, row: int, pcm: Pcm) -> None:
        """Take what is wanted of an utterance, and find the gains for the levels asked for."""
        for line, number, source, alone in self.uses[shard, row]:
            taken = pcm[source.offset : source.offset + source.num_samples]
            place = slice(source.onset, source.onset + source.num_samples)
            level_dbfs = pcm_level_dbfs(taken)
            gain_db = gain_for(level_dbfs, source)
            self.gains_db[line, number], self.levels_dbfs[line] = gain_db, level_dbfs
            if alone:
                self.pcm[line, place] = taken
            else:
                amplitude = round(10 ** (gain_db / 20) * 2**AMPLITUDE_BITS)
                total = self._sums.setdefault(line, np.zeros(self.num_samples, np.int64))
                total[place] += taken.astype(np.int64) * amplitude

    def table(self, speaker_rows: Mapping[str, int]) -> pa.Table:
        """Return the rows of the shard, when all utterances are in."""
        for line, total in self._sums.items():
            self.pcm[line], self._scale_db[line] = _fitted(total)
            self.levels_dbfs[line] = pcm_level_dbfs(np.trim_zeros(self.pcm[line]))
        rows, first = [], 0
        for drawn, grouped in zip(self.recipes, self.lines, strict=True):
            lines = [
                self._line(first + place, sources, drawn, speaker_rows)
                for place, sources in enumerate(grouped)
            ]
            rows.append(self._row(first, drawn, grouped, lines, speaker_rows[drawn.anchor]))
            first += len(lines)
        table = pa.Table.from_pylist(rows, schema=EPISODE.remove(EPISODE.get_field_index("pcm")))
        table = table.set_column(
            table.schema.get_field_index("checksum"), EPISODE.field("checksum"), self._checksums()
        )
        return table.append_column(EPISODE.field("pcm"), self._pcm_column())

    def _line(
        self, line: int, sources: list[Source], drawn: Recipe, speaker_rows: Mapping[str, int]
    ) -> dict[str, Any]:
        one, several = sources[0], len(sources) > 1
        if drawn.mixit or several:
            speaker = SEVERAL
        else:
            speaker = NOISE if one.slot == self.noise_slot else speaker_rows[one.speaker_id]
        # Of several, the line has their gains in it already.
        gain_db = 0.0 if several else self.gains_db[line, 0]
        level_dbfs = self.levels_dbfs[line]
        if not several and one.level_dbfs is not None:
            level_dbfs = max(level_dbfs, one.utterance_dbfs - ACTIVE_RANGE_DB)
        return {
            "condition": one.condition,
            "slot": one.slot,
            "speaker": speaker,
            "room": one.room,
            "fixed": drawn.conditions[one.condition].fixed,
            "gain_db": gain_db - self._scale_db.get(line, 0.0),
            "level_dbfs": level_dbfs,
        }

    def _row(
        self,
        first: int,
        drawn: Recipe,
        grouped: list[list[Source]],
        lines: list[dict[str, Any]],
        anchor: int,
    ) -> dict[str, Any]:
        """Return a row but for its audio; `first` is the number of its first line."""
        heard_dbfs = [self.levels_dbfs[first + n] + line["gain_db"] for n, line in enumerate(lines)]
        conditions = [
            asked._asdict() | self._realised(number, drawn.sources, lines, heard_dbfs)
            for number, asked in enumerate(drawn.conditions)
        ]
        sources = [
            source._asdict() | {"gain_db": self.gains_db[first + number, place]}
            for number, group in enumerate(grouped)
            for place, source in enumerate(group)
        ]
        return {
            "episode": drawn.episode,
            "anchor": anchor,
            "mixit": drawn.mixit,
            "conditions": conditions,
            "sources": sources,
            "lines": lines,
        }

    def _realised(
        self,
        number: int,
        sources: Iterable[Source],
        lines: Iterable[dict[str, Any]],
        heard_dbfs: Iterable[float],
    ) -> dict[str, float | None]:
        """Measure a mixture: levels of the dry lines after their gains, and who speaks when."""
        heard = {
            line["slot"]: level
            for line, level in zip(lines, heard_dbfs, strict=True)
            if line["condition"] == number
        }
        rivals = [level for slot, level in heard.items() if 0 < slot < self.noise_slot]
        target, noise = heard.get(0), heard.get(self.noise_slot)
        mine = [source for source in sources if source.condition == number]
        both = target is not None and rivals
        speech = target if target is not None else (_sum_db(rivals) if rivals else None)
        return {
            "realised_sir_db": target - _sum_db(rivals) if both and target is not None else None,
            "realised_snr_db": None if noise is None or speech is None else speech - noise,
            "realised_overlap": self._overlap(mine) if both else None,
        }

    def _overlap(self, sources: Iterable[Source]) -> float:
        """Return the share of the mixture in which the target and somebody else are heard."""
        heard = np.zeros((2, self.num_samples), bool)
        for source in sources:
            if source.slot < self.noise_slot:
                end = source.onset + source.num_samples
                heard[min(source.slot, 1), source.onset : end] = True
        return float(heard.all(0).mean())

    def _bounds(self) -> NDArray[np.int64]:
        """Return the first line of each episode, and the number of lines."""
        return np.cumsum([0, *map(len, self.lines)])

    def _checksums(self) -> pa.Array:
        bounds = self._bounds()
        parts = [self.pcm[a:b] for a, b in pairwise(bounds)]
        return pa.array([xxhash.xxh3_64_intdigest(part.data) for part in parts], pa.uint64())

    def _pcm_column(self) -> pa.Array:
        offsets = self._bounds() * self.num_samples * 2
        buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(self.pcm)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.recipes), buffers)


def _grouped(sources: Iterable[Source]) -> list[list[Source]]:
    """Group the sources of an episode by the line that they are in."""
    lines: dict[tuple[int, int], list[Source]] = defaultdict(list)
    for source in sources:
        lines[source.condition, source.slot].append(source)
    return list(lines.values())


def _fitted(total: NDArray[np.int64]) -> tuple[NDArray[np.int16], float]:
    """Round a sum to int16, made smaller where it would clip, and return by how many dB it was."""
    peak = int(np.abs(total).max()) >> AMPLITUDE_BITS
    if peak < 32767:
        return ((total + (1 << AMPLITUDE_BITS - 1)) >> AMPLITUDE_BITS).astype("<i2"), 0.0
    divisor = peak + 1
    fitted = (total >> AMPLITUDE_BITS) * 32767 // divisor
    return fitted.astype("<i2"), round(20 * math.log10(32767 / divisor), 4)


def _sum_db(levels_db: Sequence[float]) -> float:
    return 10 * math.log10(sum(10 ** (level / 10) for level in levels_db))


def pcm_level_dbfs(pcm: Pcm) -> float:
    """Return the level of active frames, as `speech.active_level_dbfs` does, in exact arithmetic.

    Squares of int16 add up without rounding in float64: the same on any machine.
    """
    whole = len(pcm) // FRAME * FRAME
    frames = pcm[:whole].reshape(-1, FRAME).astype(np.float64)
    power = np.einsum("ft,ft->f", frames, frames) / (FRAME * FULL_SCALE**2)
    audible = power[power > 10 ** (AUDIBLE_DBFS / 10)]
    if not len(audible):
        return EMPTY_DB
    active = audible[audible > audible.mean() * 10 ** (-ACTIVE_RANGE_DB / 10)]
    return round(float(10 * np.log10(active.mean())), LEVEL_DECIMALS)


def gain_for(level_dbfs: float, source: Source) -> float:
    """Return the gain in dB that brings a part of this level to the one that is asked for.

    What is far under its own utterance is a pause, and not lifted to be speech.
    """
    if source.level_dbfs is None:
        return 0.0
    spoken_dbfs = max(level_dbfs, source.utterance_dbfs - ACTIVE_RANGE_DB)
    return min(source.level_dbfs - spoken_dbfs, MOST_GAIN_DB)
