"""Who may be in a mixture: the speakers, noises and rooms that recipes are drawn from."""

from collections.abc import Collection
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.distributions import MixingConfig
from pipeline.draws import Draws
from pipeline.errors import CscError


class Rows(NamedTuple):
    """Columns of the catalogue, in an order that does not depend on how it was read."""

    utterance_id: NDArray[np.object_]
    speaker_id: NDArray[np.object_]
    session_id: NDArray[np.object_]
    gender: NDArray[np.object_]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    num_samples: NDArray[np.int64]

    @classmethod
    def of(cls, catalogue: pa.Table, kind: str) -> Self:
        rows = catalogue.filter(pc.equal(catalogue["kind"], kind))
        rows = rows.sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
        return cls(*(rows[name].to_numpy() for name in cls._fields))


class Rooms(NamedTuple):
    """Rooms, each with the rows of its responses."""

    responses: list[range]

    @classmethod
    def of(cls, rooms: pa.Table | None, split: str) -> Self:
        """Take the rooms of a split from a table that lists each room's responses together."""
        if rooms is None:
            return cls([])
        mine = np.flatnonzero(pc.equal(rooms["split"], split).to_numpy())
        names = rooms["room"].take(pa.array(mine)).to_numpy()
        runs = np.split(mine, np.flatnonzero(names[1:] != names[:-1]) + 1)
        return cls([range(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)])

    def draw(self, draws: Draws, share: float) -> range | None:
        """Return the responses of a room, or None for a mixture that is in none."""
        inside, place = draws.fraction() < share, draws.fraction()
        return self.responses[int(place * len(self.responses))] if inside else None


class MixingTable:
    """The speakers of one window of one split, laid out so that a recipe costs the same always.

    `utterances_of` says how many utterances each speaker has in the whole split, so that windows
    together draw each as often as it should be, however its utterances are spread over them.

    Raises:
        CscError: there are too few speakers, utterances, noises or rooms for what is asked.
    """

    def __init__(
        self,
        catalogue: pa.Table,
        config: MixingConfig,
        utterances_of: dict[str, int] | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        self.noise, self.speech = Rows.of(catalogue, "noise"), Rows.of(catalogue, "speech")
        self.rooms = rooms or Rooms([])
        self.speakers, self.first, self.count = np.unique(
            self.speech.speaker_id, return_index=True, return_counts=True
        )
        genders = self.speech.gender[self.first] if len(self.speakers) else np.empty(0, object)
        self.everyone = np.arange(len(self.speakers))
        self.by_gender = {
            gender: np.flatnonzero(genders == gender) for gender in set(genders) - {None, ""}
        }
        self.gender = genders
        self.anchors = np.flatnonzero(self.count >= config.conditions)
        self.anchor_cdf = np.cumsum(self._weights(utterances_of or {}, config.balance))
        check_enough(
            config,
            speakers=len(self.speakers),
            most_utterances=max(self.count, default=0),
            noises=len(self.noise.utterance_id),
            rooms=len(self.rooms.responses),
        )

    def _weights(self, utterances_of: dict[str, int], balance: float) -> NDArray[np.float64]:
        here = self.count[self.anchors].astype(np.float64)
        names = self.speakers[self.anchors]
        whole = np.array([utterances_of.get(name, 0) for name in names], np.float64)
        whole = np.maximum(whole, here)
        return here / whole * whole**balance

    @property
    def weight(self) -> float:
        """How many episodes this window is due, in proportion to others."""
        return float(self.anchor_cdf[-1])

    def anchor(self, draws: Draws) -> int:
        """Draw the speaker of an episode."""
        drawn = draws.fraction() * self.anchor_cdf[-1]
        place = int(np.searchsorted(self.anchor_cdf, drawn, side="right"))
        return int(self.anchors[min(place, len(self.anchors) - 1)])

    def utterance(self, draws: Draws, speaker: int) -> int:
        """Draw what a speaker says."""
        return int(self.first[speaker]) + draws.below(int(self.count[speaker]))

    def other(
        self, draws: Draws, used: Collection[int], anchor: int, same_gender: bool | None
    ) -> int:
        """Draw a speaker that is not used yet: of the anchor's gender, of another, or anyone."""
        pool = self._pool(anchor, same_gender)
        place = _unused(draws, pool, used)
        if place is None:
            pool = self.everyone
            place = _unused(draws, pool, used)
        assert place is not None, "there are more speakers than an episode can use"
        return int(pool[place])

    def _pool(self, anchor: int, same_gender: bool | None) -> NDArray[np.int64]:
        mine = self.gender[anchor]
        if same_gender is None or mine not in self.by_gender:
            return self.everyone
        if same_gender:
            return self.by_gender[mine]
        others = [pool for gender, pool in self.by_gender.items() if gender != mine]
        return np.sort(np.concatenate(others)) if others else self.everyone

    def crowd(self, draws: Draws, but: Collection[int], voices: int) -> list[int]:
        """Draw different speakers, none of whom is in `but`; fewer where there are not as many."""
        used = set(but)
        for _ in range(min(voices, len(self.speakers) - len(used))):
            place = _unused(draws, self.everyone, used)
            assert place is not None, "counted before"
            used.add(int(self.everyone[place]))
        return sorted(used - set(but))


def _unused(draws: Draws, pool: NDArray[np.int64], used: Collection[int]) -> int | None:
    """Draw a place in a sorted pool among those that hold nobody who is used."""
    taken = [
        place
        for place, speaker in ((int(np.searchsorted(pool, s)), s) for s in sorted(used))
        if place < len(pool) and pool[place] == speaker
    ]
    if len(taken) == len(pool):
        return None
    drawn = draws.below(len(pool) - len(taken))
    for place in taken:
        drawn += place <= drawn
    return drawn


def check_enough(
    config: MixingConfig, *, speakers: int, most_utterances: int, noises: int, rooms: int
) -> None:
    """Assert that there is what recipes ask for; `most_utterances` is of one speaker.

    Raises:
        CscError: naming what is too little, and what to do.
    """
    if most_utterances < config.conditions:
        raise CscError(
            f"no speaker has {config.conditions} utterances, one for each condition of an episode: "
            "add recordings, or set build.mixing.conditions lower"
        )
    if speakers < config.speakers_needed:
        raise CscError(
            f"{speakers} speaker(s) to mix, at least {config.speakers_needed} are needed (an "
            "anchor and another interferer for each condition): add speakers to the corpus"
        )
    asked = (
        ("noise_share", "noise", config.noise_share > 0 and config.babble_share < 1, noises),
        ("room_share", "room", config.room_share > 0, rooms),
    )
    for name, kind, wanted, found in asked:
        if wanted and not found:
            raise CscError(
                f"build.mixing.{name} asks for some and no corpus of kind {kind!r} has any in "
                f"this split: add one, or set build.mixing.{name}=0"
            )
