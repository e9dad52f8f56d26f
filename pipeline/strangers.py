"""Draws among what is of other speakers, in time that does not grow with how much there is."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.draws import Draws

Places = NDArray[np.int64]


class Runs(NamedTuple):
    """Numbers from 0 on, a run for each speaker, of which some speakers' can be left out."""

    first: Places  # (speaker + 1,), where each one's run starts

    @classmethod
    def of(cls, speaker: Places) -> "Runs":
        """Return the runs of equal numbers in ascending ones."""
        return cls(np.searchsorted(speaker, np.arange(speaker[-1] + 2)))

    def without(self, speakers: Iterable[int], among: Places | None = None) -> "Left":
        """Leave speakers out, of all numbers or of the ascending ones `among` them."""
        bounds = self.first[[[speaker, speaker + 1] for speaker in sorted({*speakers})]]
        if among is None:
            return Left(int(self.first[-1]), bounds)
        return Left(len(among), np.searchsorted(among, bounds))


class Left(NamedTuple):
    """What is left of `total` places without runs `(run, 2)`, ascending and apart."""

    total: int
    gone: Places

    @property
    def many(self) -> int:
        return self.total - int((self.gone[:, 1] - self.gone[:, 0]).sum())

    def nth(self, number: Places) -> Places:
        """Return the place of the n-th that is left, for each of `number`."""
        place = np.array(number, np.int64)
        for start, stop in self.gone:
            place += (place >= start) * (stop - start)
        return place


def draw_strangers(
    utterances: Runs, speaker: Places, known: Iterable[int], most: int, draws: Draws
) -> list[int]:
    """Draw utterances of up to `most` different speakers, none of whom is known.

    There are fewer where there are no further speakers. `speaker` `(utterance,)` ascends.
    """
    chosen: list[int] = []
    for _ in range(most):
        strangers = utterances.without([*known, *speaker[chosen].tolist()])
        if not strangers.many:
            break
        chosen.append(int(strangers.nth(np.array(draws.below(strangers.many)))))
    return chosen
