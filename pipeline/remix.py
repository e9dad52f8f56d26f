"""Remix: the same voices under other conditions in every epoch, without reading anything more.

A remixed batch is a function of (seed, epoch, step), like the one it is made of, on any number of
ranks: what moves, moves within blocks of episodes that are never cut between ranks. Mixtures that
are `fixed` keep their voices and noise, and get other gains and rooms only: those whose voices
overlap in part, whose interferers were chosen by gender, with babble, and mixtures of mixtures.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.casting import Rooms
from pipeline.distributions import MixingConfig
from pipeline.draws import Draws, stream_key
from pipeline.episodes import Episodes
from pipeline.lines import MOST_GAIN_DB
from pipeline.mixing import TARGET_LEVEL_DBFS
from pipeline.order import Share
from pipeline.schema import NOISE

ATTEMPTS = 12  # to mend a permutation of interferers that brings together who must not meet


class Cast(NamedTuple):
    """Which line is where in the mixtures of a batch, and how loud; -1 for nothing."""

    pick: NDArray[np.int64]  # (episode, condition, slot), line
    gains_db: NDArray[np.float32]  # (episode, condition, slot)
    levels_dbfs: NDArray[np.float32]  # (episode, condition, slot), before the gain
    rooms: NDArray[np.int64]  # (episode, condition, slot)
    speakers: NDArray[np.int64]  # (episode, condition, slot), -1 for nobody that is known
    fixed: NDArray[np.bool_]  # (episode, condition)
    anchors: NDArray[np.int64]  # (episode,)
    mixit: NDArray[np.bool_]  # (episode,)


def cast(parts: Sequence[Episodes], mixing: MixingConfig) -> Cast:
    """Lay out episodes as their recipes say."""
    num_lines = np.concatenate([part.num_lines for part in parts])
    lines = [np.concatenate(field) for field in zip(*(part.lines for part in parts), strict=True)]
    condition, slot, speaker, room, still, gain_db, level_dbfs = lines
    where = (np.repeat(np.arange(len(num_lines)), num_lines), condition, slot)
    shape = (len(num_lines), mixing.conditions, mixing.num_slots)
    pick, rooms, speakers = (np.full(shape, -1, np.int64) for _ in range(3))
    gains_db, levels_dbfs = (np.full(shape, -np.inf, np.float32) for _ in range(2))
    pick[where], rooms[where] = np.arange(len(condition)), room
    gains_db[where], levels_dbfs[where] = gain_db, level_dbfs
    speakers[where] = speaker
    fixed = np.zeros(shape[:2], bool)
    fixed[where[:2]] = still
    anchors = np.concatenate([part.anchor for part in parts]).astype(np.int64)
    mixit = np.concatenate([part.mixit for part in parts])
    return Cast(
        pick, gains_db, levels_dbfs, rooms, np.maximum(speakers, NOISE), fixed, anchors, mixit
    )


class Remix:
    """Draws gains, interferers, noises and rooms anew, for a share of whole blocks."""

    def __init__(
        self, mixing: MixingConfig, seed: int, block: int, share: Share, rooms: Rooms
    ) -> None:
        self.seed, self.block, self.share, self.rooms = seed, block, share, rooms
        self._mixing = lru_cache(2)(mixing.at)

    def __call__(self, drawn: Cast, epoch: int, step: int) -> Cast:
        """Remix the share of a global batch."""
        mixing = self._mixing(epoch)
        key = stream_key(self.seed, "remix", epoch, step)
        first = self.share.first // self.block
        blocks = [
            self._block(
                Cast._make(field[place : place + self.block] for field in drawn),
                Draws(key, first + number),
                mixing,
            )
            for number, place in enumerate(range(0, self.share.size, self.block))
        ]
        return Cast._make(np.concatenate(fields) for fields in zip(*blocks, strict=True))

    def _block(self, drawn: Cast, draws: Draws, mixing: MixingConfig) -> Cast:
        moved = _moved(drawn, slice(1, -1), _rivals(drawn, draws))
        moved = _moved(moved, slice(-1, None), _noises(drawn, draws))
        moved = moved._replace(gains_db=_gains(moved, draws, mixing))
        return moved._replace(rooms=self._rooms(moved, draws, mixing))

    def _rooms(self, drawn: Cast, draws: Draws, mixing: MixingConfig) -> NDArray[np.int64]:
        """Put whole mixtures, but not their noise, into a room each: one response for a voice."""
        shape = drawn.pick.shape
        inside, place = draws.fractions(2, *shape[:2])
        response = draws.fractions(*shape)
        rooms = np.full(shape, -1, np.int64)
        if mixing.room_share:
            chosen = (place * len(self.rooms.responses)).astype(np.int64)
            first = np.array([room.start for room in self.rooms.responses])[chosen][..., None]
            size = np.array([len(room) for room in self.rooms.responses])[chosen][..., None]
            within = (inside < mixing.room_share) & ~drawn.mixit[:, None]
            rooms = np.where(within[..., None], first + (response * size).astype(np.int64), -1)
            rooms[:, :, -1] = -1
        return np.where(drawn.pick >= 0, rooms, -1)


def _moved(drawn: Cast, slots: slice, source: NDArray[np.int64]) -> Cast:
    """Take some slots of every mixture from the mixtures `source` says."""

    def moved(field: NDArray[Any]) -> NDArray[Any]:
        flat = field.reshape(-1, field.shape[-1]).copy()
        flat[:, slots] = flat[source, slots]
        return flat.reshape(field.shape)

    return drawn._replace(
        pick=moved(drawn.pick),
        levels_dbfs=moved(drawn.levels_dbfs),
        speakers=moved(drawn.speakers),
    )


def _rivals(drawn: Cast, draws: Draws) -> NDArray[np.int64]:
    """Draw from which mixture each takes its interferers, so that all in an episode differ.

    A random permutation is mended: those who must not meet change places with others, again and
    again. Where that does not end, as with very few speakers, all keep theirs.
    """
    count = drawn.fixed.size
    free = np.flatnonzero(~drawn.fixed.ravel())
    rivals = drawn.speakers[:, :, 1:-1].reshape(count, -1)
    source, moving = np.arange(count), free
    for _ in range(ATTEMPTS):
        source[moving] = source[moving[np.argsort(draws.fractions(len(moving)), kind="stable")]]
        wrong = _wrong(rivals[source], drawn)
        if not wrong.any():
            return source
        stirred = wrong | (draws.fractions(count) < 0.25)
        moving = free[stirred[free]]
    return np.arange(count)


def _wrong(rivals: NDArray[np.int64], drawn: Cast) -> NDArray[np.bool_]:
    """Tell which mixtures cannot be: they repeat somebody of their episode, or have nobody."""
    episodes, conditions = drawn.fixed.shape
    everyone = np.concatenate([rivals.reshape(episodes, -1), drawn.anchors[:, None]], axis=1)
    same = (everyone[:, :, None] == everyone[:, None, :]) & (everyone >= 0)[:, :, None]
    twice = (same.sum(2) > 1)[:, :-1].reshape(episodes * conditions, -1).any(1)
    absent = (drawn.pick[:, :, 0] < 0).ravel()
    return twice | (absent & (rivals < 0).all(1))


def _noises(drawn: Cast, draws: Draws) -> NDArray[np.int64]:
    """Draw from which mixture each takes its noise."""
    source = np.arange(drawn.fixed.size)
    free = np.flatnonzero(~drawn.fixed.ravel())
    source[free] = free[np.argsort(draws.fractions(len(free)), kind="stable")]
    return source


def _gains(drawn: Cast, draws: Draws, mixing: MixingConfig) -> NDArray[np.float32]:
    """Draw SIR and SNR, and return the gains that make the active speech have them."""
    sir, snr = draws.fractions(2, *drawn.pick.shape[:2])
    sir_db = mixing.sir_min_db + (mixing.sir_max_db - mixing.sir_min_db) * sir
    snr_db = mixing.snr_min_db + (mixing.snr_max_db - mixing.snr_min_db) * snr
    there = drawn.pick >= 0
    voices = np.maximum(there[:, :, 1:-1].sum(2), 1)
    relative_db = np.zeros(drawn.pick.shape)
    relative_db[:, :, 1:-1] -= (10 * np.log10(voices))[..., None]
    relative_db[:, :, 1:-1] -= np.where(there[:, :, 0], sir_db, 0.0)[..., None]
    relative_db[:, :, -1] = -snr_db
    levels_dbfs = np.where(there, drawn.levels_dbfs, 0.0)
    gains_db = np.minimum(TARGET_LEVEL_DBFS - levels_dbfs + relative_db, MOST_GAIN_DB)
    return np.where(there, gains_db, -np.inf).astype(np.float32)
