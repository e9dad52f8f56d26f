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

DRAWS_FOR_LENGTH = 4
DRAWS_BY_WEIGHT = 32  # before those who are left are counted


class Rows(NamedTuple):
    """Columns of the catalogue, in an order that does not depend on how it was read."""

    utterance_id: NDArray[np.object_]
    speaker_id: NDArray[np.object_]
    session_id: NDArray[np.object_]
    gender: NDArray[np.object_]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    num_samples: NDArray[np.int64]
    level_dbfs: NDArray[np.float32]

    @classmethod
    def of(cls, catalogue: pa.Table, kind: str) -> Self:
        rows = catalogue.filter(pc.equal(catalogue["kind"], kind))
        rows = rows.sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
        return cls(*(rows[name].to_numpy() for name in cls._fields))


def nameless(catalogue: pa.Table) -> pa.Table:
    """Forget who speaks: every utterance of a known speaker becomes a speaker of its own.

    What was cut from a recording of nobody known goes on belonging together, and so does what is no
    speech, as the responses of a room.
    """
    given = pc.and_(
        pc.equal(catalogue["kind"], "speech"), pc.equal(catalogue["label_kind"], "given")
    )
    named = pc.if_else(given, catalogue["utterance_id"], catalogue["speaker_id"])
    place = catalogue.schema.get_field_index("speaker_id")
    return catalogue.set_column(place, "speaker_id", named)


def as_mixed(catalogue: pa.Table, config: MixingConfig) -> pa.Table:
    """Return what there is to mix with whom a build takes each to be."""
    return nameless(catalogue) if config.by_recording else catalogue


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


class Pool(NamedTuple):
    """Speakers to draw from, each as often as its weight."""

    speakers: NDArray[np.int64]
    cdf: NDArray[np.float64]  # weights, added up

    @classmethod
    def of(cls, speakers: NDArray[np.int64], weight: NDArray[np.float64]) -> Self:
        return cls(speakers, np.cumsum(weight[speakers]))

    def draw(self, draws: Draws) -> int:
        """Draw one of the speakers."""
        place = int(np.searchsorted(self.cdf, draws.fraction() * self.cdf[-1], side="right"))
        return int(self.speakers[min(place, len(self.speakers) - 1)])

    def draw_unused(self, draws: Draws, used: Collection[int]) -> int | None:
        """Draw a speaker who is not used, or None where all are."""
        if not len(self.speakers):
            return None
        for _ in range(DRAWS_BY_WEIGHT):
            drawn = self.draw(draws)
            if drawn not in used:
                return drawn
        left = [int(speaker) for speaker in self.speakers if speaker not in used]
        return left[draws.below(len(left))] if left else None


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
        weight = self._weights(utterances_of or {}, config.balance)
        self.everyone = Pool.of(np.arange(len(self.speakers)), weight)
        self.gender = self.speech.gender[self.first]
        known = np.array([gender not in (None, "") for gender in self.gender], bool)
        self.by_gender: dict[tuple[str, bool | None], Pool] = {
            (gender, same): Pool.of(
                np.flatnonzero(known & ((self.gender == gender) == same)), weight
            )
            for gender in sorted(set(self.gender[known].tolist()))
            for same in (True, False)
        }
        self.anchors = Pool.of(np.flatnonzero(self.count >= config.utterances_needed), weight)
        check_enough(
            config,
            speakers=len(self.speakers),
            most_utterances=max(self.count, default=0),
            noises=len(self.noise.utterance_id),
            rooms=len(self.rooms.responses),
        )

    def _weights(self, utterances_of: dict[str, int], balance: float) -> NDArray[np.float64]:
        here = self.count.astype(np.float64)
        whole = np.array([utterances_of.get(name, 0) for name in self.speakers], np.float64)
        whole = np.maximum(whole, here)
        return here / whole * whole**balance

    def anchor(self, draws: Draws) -> int:
        """Draw the speaker of an episode."""
        return self.anchors.draw(draws)

    def utterance(self, draws: Draws, speaker: int, num_samples: int) -> int:
        """Draw what a speaker says: the first of a few that is as long, or the longest of them."""
        few = [
            int(self.first[speaker]) + draws.below(int(self.count[speaker]))
            for _ in range(DRAWS_FOR_LENGTH)
        ]
        return max(few, key=lambda at: min(int(self.speech.num_samples[at]), num_samples))

    def other(
        self, draws: Draws, used: Collection[int], anchor: int, same_gender: bool | None
    ) -> int:
        """Draw a speaker that is not used yet: of the anchor's gender, of another, or anyone."""
        wanted = self.by_gender.get((self.gender[anchor], same_gender))
        drawn = None if wanted is None else wanted.draw_unused(draws, used)
        if drawn is None:
            drawn = self.everyone.draw_unused(draws, used)
        assert drawn is not None, "there are more speakers than an episode can use"
        return drawn

    def crowd(self, draws: Draws, but: Collection[int], voices: int) -> list[int]:
        """Draw different speakers, none of whom is in `but`; fewer where there are not as many."""
        used = set(but)
        for _ in range(min(voices, len(self.speakers) - len(used))):
            drawn = self.everyone.draw_unused(draws, used)
            assert drawn is not None, "counted before"
            used.add(drawn)
        return sorted(used - set(but))


def check_enough(
    config: MixingConfig, *, speakers: int, most_utterances: int, noises: int, rooms: int
) -> None:
    """Assert that there is what recipes ask for; `most_utterances` is of one speaker.

    Raises:
        CscError: naming what is too little, and what to do.
    """
    if most_utterances < config.utterances_needed:
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
