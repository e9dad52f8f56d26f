"""Random numbers as functions of what they are for: the raw output of Philox, a counter-based
generator, so that they are the same on every machine and with every version of numpy."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Draws:
    """Uniform numbers of one stream: the same for the same key and index, for ever."""

    def __init__(self, key: int, index: int) -> None:
        self._bits = np.random.Philox(key=key, counter=[0, 0, 0, index])

    def fraction(self) -> float:
        """Return a number in [0, 1)."""
        return float(int(self._bits.random_raw()) >> 11) * 2.0**-53

    def fractions(self, *shape: int) -> NDArray[np.float64]:
        """Return an array of numbers in [0, 1)."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))), np.uint64)
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.fraction()

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self.fraction() * count)

    def chosen(self, shares: Sequence[float]) -> int:
        """Return a place in `shares`, as often as its share of their sum."""
        left = self.fraction() * sum(shares)
        for place, share in enumerate(shares):
            left -= share
            if left < 0:
                return place
        return max(place for place, share in enumerate(shares) if share > 0)

    def distinct(self, count: int, chosen: int) -> list[int]:
        """Return `chosen` different integers below `count`, in random order (a sparse shuffle)."""
        moved: dict[int, int] = {}
        drawn = []
        for place in range(chosen):
            other = place + self.below(count - place)
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


def stream_key(*parts: object) -> int:
    """Return a 128-bit key for `Draws` from whatever names a stream, as seed and split."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def permutation(key: int, count: int) -> NDArray[np.int64]:
    """Return the integers below `count` in the order that belongs to a key."""
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
