"""Who speaks in the utterances of a split: what trials are drawn from."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.draws import Draws
from pipeline.errors import CscError
from pipeline.strangers import Places, Runs, draw_strangers

MIN_SPEAKERS = 5  # fewer give no interval


class Voices(NamedTuple):
    """Who speaks, as trials are drawn from."""

    speaker: Places  # (utterance,), a number, ascending
    session: NDArray[np.object_]  # (utterance,)
    gender: NDArray[np.object_]  # (utterance,), empty where unknown
    enrolled: Places  # (enrolment, utterance), by speaker
    utterances: Runs
    enrolments: Runs
    pools: dict[str, tuple[Places, Places]]  # by gender: enrolments of it, and all others

    @classmethod
    def of(cls, utterances: pa.Table, split: str, together: int) -> "Voices":
        """Return those of utterances that are sorted by speaker, enrolled by some `together`.

        Raises:
            CscError: they are fewer than MIN_SPEAKERS, or nobody is left to test once enrolled.
        """
        names, gender, session = (
            np.asarray(utterances[name].to_pylist(), dtype=object)
            for name in ("speaker_id", "gender", "session_id")
        )
        distinct, speaker, count = np.unique(names, return_inverse=True, return_counts=True)
        if len(distinct) < MIN_SPEAKERS or max(count) < 1 + together:
            raise CscError(
                f"split {split!r} has {len(distinct)} speaker(s); trials need {MIN_SPEAKERS}, one "
                f"of them with {1 + together} utterances: add recordings, or raise its share in "
                "ingest.splits"
            )
        runs = Runs.of(speaker)
        groups = [
            range(first, first + together)
            for start, stop in pairwise(runs.first.tolist())
            for first in range(start, stop - together + 1, together)
        ]
        enrolled = np.array(groups, np.int64)
        of_gender = gender[enrolled[:, 0]]
        alike = {name: (of_gender == name) & (name != "") for name in set(gender)}
        return cls(
            speaker,
            session,
            gender,
            enrolled,
            runs,
            Runs(np.searchsorted(speaker[enrolled[:, 0]], np.arange(len(distinct) + 1))),
            {name: (np.flatnonzero(same), np.flatnonzero(~same)) for name, same in alike.items()},
        )

    def rivals(self, test: int, count: int, draws: Draws) -> list[int]:
        """Draw utterances of so many different speakers who are not the test's."""
        known = [self.speaker[test]]
        return draw_strangers(self.utterances, self.speaker, known, count, draws)

    def own(self, test: int) -> Places:
        """Return the same speaker's enrolments, of other sessions where there are any."""
        speaker = self.speaker[test]
        mine = np.arange(*self.enrolments.first[[speaker, speaker + 1]])
        mine = mine[~(self.enrolled[mine] == test).any(1)]
        apart = (self.session[self.enrolled[mine]] != self.session[test]).all(1)
        return mine[apart] if apart.any() else mine

    def others(
        self, test: int, rivals: list[int], most: int, same_gender_share: float, draws: Draws
    ) -> Places:
        """Draw enrolments of speakers who are not heard in the test side, of both genders.

        At most so many, a share of them of the tested speaker's gender as far as there are any.
        """
        heard = self.speaker[[test, *rivals]].tolist()
        pools = self.pools[self.gender[test]]
        same, rest = (self.enrolments.without(heard, among=pool) for pool in pools)
        count = min(same.many + rest.many, most)
        share = same_gender_share if same.many else 0.0
        few = max(count - rest.many, min(same.many, round(share * count)))
        chosen = [
            pool[left.nth(np.array(draws.distinct(left.many, some), np.int64))]
            for pool, left, some in zip(pools, (same, rest), (few, count - few), strict=True)
        ]
        return np.sort(np.concatenate(chosen))
