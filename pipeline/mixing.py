"""Recipes: what is mixed with what, drawn as data.

`recipe(seed, index, table, config)` is a pure function: no worker, node or retry changes what it
returns.
"""

import math
from collections import Counter
from itertools import cycle, islice
from operator import itemgetter
from typing import NamedTuple

from pipeline.casting import MixingTable, Rows
from pipeline.distributions import MixingConfig
from pipeline.draws import Draws

TARGET_LEVEL_DBFS = -25.0
SHORTEST_TURN = 0.25  # of a mixture, where voices overlap in part


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
    utterance_dbfs: float  # level of the whole of it
    level_dbfs: float | None  # of its active speech in the mixture; None where a gain is given
    room: int


class Condition(NamedTuple):
    """What is asked of a mixture; None where there is nothing to ask."""

    sir_db: float | None
    snr_db: float | None
    overlap: float | None
    fixed: bool  # somebody else's voice or noise in it would make it another mixture than asked for


class Recipe(NamedTuple):
    """An episode as data: one anchor speaker under several conditions."""

    episode: int
    anchor: str
    mixit: bool
    conditions: list[Condition]
    sources: list[Source]


def recipe(seed: int, index: int, table: MixingTable, config: MixingConfig) -> Recipe:
    """Draw episode `index`: a pure function of its arguments."""
    draws = Draws(seed, index)
    mixit = draws.fraction() < config.mixit_share
    anchor = table.anchor(draws)
    targets = _utterances_of(draws, table, anchor, config)
    scene = _Scene(draws, table, config, anchor)
    for number, target in enumerate(targets):
        (scene.mixture_of_mixtures if mixit else scene.mixture)(number, target)
    name = str(table.speakers[anchor])
    return Recipe(index, name, mixit, scene.conditions, scene.sources)


def power_db(count: int) -> float:
    """Return by how many dB as many equal signals are louder together than one alone."""
    return 10 * math.log10(count)


def _utterances_of(
    draws: Draws, table: MixingTable, speaker: int, config: MixingConfig
) -> list[int]:
    """Draw an utterance of a speaker for each condition.

    They are different, of different sessions as far as there are any, and as long as the mixture if
    there are such. Looks at four candidates for each, so that a speaker of any size costs the same.
    Where no label is read there may be fewer, which then are heard in several conditions.
    """
    count, chosen = int(table.count[speaker]), config.conditions
    candidates = [
        int(table.first[speaker]) + place for place in draws.distinct(count, min(count, 4 * chosen))
    ]
    candidates.sort(key=lambda at: table.speech.num_samples[at] < config.num_samples)
    used: Counter[str] = Counter()
    ranked = []
    for utterance in candidates:
        session = table.speech.session_id[utterance]
        ranked.append((used[session], utterance))
        used[session] += 1
    return list(islice(cycle(at for _, at in sorted(ranked, key=itemgetter(0))), chosen))


class _Scene:
    """The mixtures of one episode while they are drawn."""

    def __init__(self, draws: Draws, table: MixingTable, config: MixingConfig, anchor: int) -> None:
        self.draws, self.table, self.config = draws, table, config
        self.used = {anchor}  # speakers of the episode: conditions have different interferers
        self.anchor = anchor
        self.conditions: list[Condition] = []
        self.sources: list[Source] = []

    def mixture(self, number: int, target: int) -> None:
        """Draw one condition: target, interferers, noise, and the room that they are in."""
        draws, config = self.draws, self.config
        count = draws.chosen(config.interferer_shares)
        # The first mixture has its target, so that the others are without it more often.
        share = config.absent_share * config.conditions / max(config.conditions - 1, 1)
        absent = draws.fraction() < share and number > 0
        rivals = [self._rival() for _ in range(max(count, 1) if absent else count)]
        sir_db = draws.uniform(config.sir_min_db, config.sir_max_db)
        overlap = draws.uniform(config.overlap_min, config.overlap_max)
        together = bool(rivals) and not absent
        target_at, others_at = self._turns(overlap if together else 1.0)
        rooms = self.table.rooms.draw(draws, config.room_share)
        if not absent:
            self._add(number, 0, target, 0.0, target_at, rooms)
        louder_db = -sir_db if together else 0.0
        for slot, rival in enumerate(rivals, start=1):
            level_db = louder_db - power_db(len(rivals))
            spoken = self.table.utterance(draws, rival, len(others_at))
            self._add(number, slot, spoken, level_db, others_at, rooms)
        snr_db, babble = self._noise(number, set(rivals))
        asked = (sir_db, overlap) if together else (None, None)
        fixed = babble or (together and overlap < 1) or config.same_gender_share is not None
        self.conditions.append(Condition(asked[0], snr_db, asked[1], fixed))

    def mixture_of_mixtures(self, number: int, target: int) -> None:
        """Draw two mixtures that are added up: what is known is their sum and they, no voice."""
        draws, config = self.draws, self.config
        sir_db = draws.uniform(config.sir_min_db, config.sir_max_db)
        whole = range(config.num_samples)
        for slot in range(2):
            for voice in range(config.mixit_voices):
                if slot == voice == 0:
                    utterance = target
                else:
                    utterance = self.table.utterance(draws, self._rival(), config.num_samples)
                below_db = draws.uniform(config.sir_min_db, config.sir_max_db) if voice else 0.0
                level_db = -below_db - (sir_db if slot else 0.0)
                self._add(number, slot, utterance, level_db, whole, None)
        self.conditions.append(Condition(sir_db, None, 1.0, fixed=True))

    def _rival(self) -> int:
        """Draw a speaker that the episode does not have yet."""
        same = self.config.same_gender_share
        wanted = None if same is None else self.draws.fraction() < same
        drawn = self.table.other(self.draws, self.used, self.anchor, wanted)
        self.used.add(drawn)
        return drawn

    def _turns(self, overlap: float) -> tuple[range, range]:
        """Draw where target and interferers speak, so that they share this part of the mixture."""
        length = self.config.num_samples
        first_is_target = self.draws.fraction() < 0.5
        low = max(0.0, SHORTEST_TURN - overlap)
        before = self.draws.uniform(low, min(1 - overlap, 1 - SHORTEST_TURN))
        turns = (
            range(round((before + overlap) * length)),
            range(round(before * length), length),
        )
        return turns if first_is_target else (turns[1], turns[0])

    def _noise(self, number: int, rivals: set[int]) -> tuple[float | None, bool]:
        """Add noise or babble to a condition; return its SNR, and whether it is babble."""
        draws, config, table = self.draws, self.config, self.table
        noisy, babble = draws.fraction() < config.noise_share, draws.fraction()
        snr_db = draws.uniform(config.snr_min_db, config.snr_max_db)
        if not noisy:
            return None, False
        slot, whole = config.num_slots - 1, range(config.num_samples)
        if babble >= config.babble_share:
            clip = draws.below(len(table.noise.utterance_id))
            self._add(number, slot, clip, -snr_db, whole, None, table.noise)
            return snr_db, False
        crowd = table.crowd(draws, {self.anchor, *rivals}, config.babble_voices)
        for voice in crowd:
            level_db = -snr_db - power_db(len(crowd))
            spoken = table.utterance(draws, voice, config.num_samples)
            self._add(number, slot, spoken, level_db, whole, None)
        return snr_db, True

    def _add(
        self,
        number: int,
        slot: int,
        at: int,
        relative_db: float,
        extent: range,
        rooms: range | None,
        rows: Rows | None = None,
    ) -> None:
        """Place one utterance: a random part of a long one, a random onset for a short one."""
        rows = rows or self.table.speech
        room = rooms[self.draws.below(len(rooms))] if rooms else -1
        available, space = int(rows.num_samples[at]), len(extent)
        num_samples = min(available, space)
        offset = self.draws.below(available - num_samples + 1)
        onset = extent.start + self.draws.below(space - num_samples + 1)
        self.sources.append(
            Source(
                number,
                slot,
                str(rows.utterance_id[at]),
                str(rows.speaker_id[at]),
                int(rows.shard[at]),
                int(rows.row[at]),
                offset,
                num_samples,
                onset,
                float(rows.level_dbfs[at]),
                TARGET_LEVEL_DBFS + relative_db,
                room,
            )
        )
