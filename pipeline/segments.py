"""Cutting a recording, as it streams in, into speech at its pauses; and saying what is no speech.

Every sample ends up in exactly one piece. What comes out does not depend on how the stream is cut
into blocks, and no more than a segment and a pause of it is held.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.speech import SpeechConfig
from pipeline.vad import WINDOW, VoiceActivity

Mask = NDArray[np.bool_]
WINDOWS_AT_ONCE = 128  # 4 s
NOISE_MEMORY = 3 * SAMPLE_RATE_HZ // WINDOW  # windows before a segment that tell its noise
FEWEST_NOISE_WINDOWS = 8
QUIETEST_POWER = 1e-12


class Piece(NamedTuple):
    """A part of a recording that is speech, or else has no samples here."""

    start_sample: int
    num_samples: int
    samples: Samples | None
    snr_db: float


class _Heard(NamedTuple):
    """What of the stream is not yet decided on, by window."""

    windows: Samples  # (window, WINDOW)
    speech: Mask
    powers: NDArray[np.float64]

    def since(self, first: int) -> "_Heard":
        return _Heard(self.windows[first:], self.speech[first:], self.powers[first:])

    def plus(self, other: "_Heard") -> "_Heard":
        return _Heard(
            np.concatenate([self.windows, other.windows]),
            np.concatenate([self.speech, other.speech]),
            np.concatenate([self.powers, other.powers]),
        )


def speech_pieces(blocks: Iterable[Samples], config: SpeechConfig) -> Iterator[Piece]:
    """Cut mono audio at SAMPLE_RATE_HZ into speech of up to `max_seconds` and what is between."""
    cutter, total = _Cutter(config), 0
    rest = np.zeros(0, np.float32)
    for block in blocks:
        total += len(block)
        rest = np.concatenate([rest, block])
        whole = len(rest) // (WINDOW * WINDOWS_AT_ONCE) * WINDOW * WINDOWS_AT_ONCE
        if whole:
            yield from cutter.push(rest[:whole].reshape(-1, WINDOW), last=False)
            rest = rest[whole:]
    padded = np.pad(rest, (0, -len(rest) % WINDOW)).reshape(-1, WINDOW)
    yield from _within(cutter.push(padded, last=True), total)


def noise_pieces(blocks: Iterable[Samples], config: SpeechConfig) -> Iterator[Piece]:
    """Cut a recording of noise into pieces of `max_seconds`."""
    longest = int(config.max_seconds * SAMPLE_RATE_HZ)
    rest, start = np.zeros(0, np.float32), 0
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) >= longest:
            yield Piece(start, longest, rest[:longest], 0.0)
            rest, start = rest[longest:], start + longest
    if len(rest):
        yield Piece(start, len(rest), rest, 0.0)


def _within(pieces: Iterable[Piece], total: int) -> Iterator[Piece]:
    """Take the padding of the last window off again."""
    for piece in pieces:
        count = min(piece.num_samples, total - piece.start_sample)
        if count > 0:
            samples = None if piece.samples is None else piece.samples[:count]
            yield piece._replace(num_samples=count, samples=samples)


class _Cutter:
    def __init__(self, config: SpeechConfig) -> None:
        self._config = config
        self._vad = VoiceActivity()
        self._speaking = False
        self._first = 0  # number within the recording of the first window that is held
        self._held = _Heard(
            np.zeros((0, WINDOW), np.float32), np.zeros(0, np.bool_), np.zeros(0, np.float64)
        )
        self._noise = np.zeros(0, np.float64)  # powers of the last windows before those, or NaN

    def push(self, windows: Samples, *, last: bool) -> Iterator[Piece]:
        """Take in windows and give the pieces that are now decided."""
        if len(windows):
            speech = hysteresis(self._vad(windows), self._speaking, self._config)
            self._speaking = bool(speech[-1])
            powers = windows.astype(np.float64).var(axis=1)
            self._held = self._held.plus(_Heard(windows, speech, powers))
        done, segments, open_from = 0, *self._decided(last=last)
        for start, stop in segments:
            if start > done:
                yield self._silence(done, start)
            yield self._speech(start, stop)
            done = stop
        if open_from > done:
            yield self._silence(done, open_from)
        self._forget(open_from)

    def _decided(self, *, last: bool) -> tuple[list[tuple[int, int]], int]:
        """Return the bounds of segments that nothing to come can change, and where those end."""
        config, speech = self._config, self._held.speech
        pad, longest = _windows(config.pad_s), _windows(config.max_seconds)
        pause = _windows(config.max_pause_s)
        segments: list[tuple[int, int]] = []
        for turn_start, turn_stop in turns(speech, pause):
            start, stop = max(turn_start - pad, 0), min(turn_stop + pad, len(speech))
            while stop - start > longest:
                cut = start + _quietest(speech, self._held.powers, start, longest)
                spoken = np.flatnonzero(speech[start:cut])[-1] + start + 1
                segments.append((start, min(int(spoken) + pad, cut)))
                start = max(cut + int(np.argmax(speech[cut:])) - pad, cut)
            if not last and len(speech) - turn_stop <= pause:
                return segments, start
            if start < turn_stop:  # else a cut took all that was said, and left padding
                segments.append((start, stop))
        return segments, len(speech) if last else max(len(speech) - pad, 0)

    def _silence(self, start: int, stop: int) -> Piece:
        return Piece((self._first + start) * WINDOW, (stop - start) * WINDOW, None, 0.0)

    def _speech(self, start: int, stop: int) -> Piece:
        samples = self._held.windows[start:stop].reshape(-1)
        return Piece(
            (self._first + start) * WINDOW, len(samples), samples, self._snr_db(start, stop)
        )

    def _snr_db(self, start: int, stop: int) -> float:
        """Return the level of speech over that of pauses within it and of the seconds before."""
        held = self._held
        quiet = np.where(held.speech[:stop], np.nan, held.powers[:stop])
        noise = np.concatenate([self._noise, quiet])[-(stop - start + NOISE_MEMORY) :]
        noise = noise[~np.isnan(noise)]
        inside = held.powers[start:stop]
        if len(noise) < FEWEST_NOISE_WINDOWS:
            noise = np.percentile(inside, [10])
        noise_power = max(float(np.median(noise)), QUIETEST_POWER)
        power = float(inside[held.speech[start:stop]].mean())
        return float(10 * np.log10(max(power - noise_power, 0.01 * noise_power) / noise_power))

    def _forget(self, end: int) -> None:
        gone = np.where(self._held.speech[:end], np.nan, self._held.powers[:end])
        self._noise = np.concatenate([self._noise, gone])[-NOISE_MEMORY:]
        self._held = self._held.since(end)
        self._first += end


def _windows(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE_HZ / WINDOW)


def hysteresis(probabilities: NDArray[np.float32], speaking: bool, config: SpeechConfig) -> Mask:
    """Begin to speak at one probability and stop at a lower one."""
    clear = (probabilities >= config.speech_from) | (probabilities < config.speech_until)
    last_clear = np.maximum.accumulate(np.where(clear, np.arange(len(clear)), -1))
    return np.where(last_clear < 0, speaking, probabilities[last_clear] >= config.speech_from)


def turns(speech: Mask, longest_pause: int) -> list[tuple[int, int]]:
    """Return (start, stop) of runs of speech; what a short pause parts is one run."""
    edges = np.flatnonzero(np.diff(speech.astype(np.int8), prepend=0, append=0))
    starts, stops = edges[::2], edges[1::2]
    apart = starts[1:] - stops[:-1] > longest_pause
    firsts = np.concatenate([[True], apart]) if len(starts) else apart
    lasts = np.concatenate([apart, [True]]) if len(starts) else apart
    return list(zip(starts[firsts].tolist(), stops[lasts].tolist(), strict=True))


def _quietest(speech: Mask, powers: NDArray[np.float64], start: int, longest: int) -> int:
    """Return how many windows to keep before a cut: to the middle of the longest late pause."""
    first = longest // 2
    late = ~speech[start + first : start + longest]
    edges = np.flatnonzero(np.diff(late.astype(np.int8), prepend=0, append=0))
    if not len(edges):
        return first + int(np.argmin(powers[start + first : start + longest]))
    pause = int(np.argmax(edges[1::2] - edges[::2]))
    return first + max(1, int(edges[2 * pause] + edges[2 * pause + 1]) // 2)
