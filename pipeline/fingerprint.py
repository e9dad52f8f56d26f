"""How a segment sounds, in about 95 bytes per second: what finds the same recording again.

A bit is the sign of one component of a patch of the spectrogram, 0.8 s long: a cosine over bands
(a cepstral order) times a cosine over time (a modulation order). Signs of energy differences are
due to Haitsma and Kalker (A Highly Robust Audio Fingerprinting System, ISMIR 2002), who difference
neighbours; components of low order are steadier under coding. Gain and any fixed filter cancel,
since cosines over time are free of a mean and every band is divided by its own.

A fingerprint has two parts: the patches that are least ambiguous with all their bits, to look up
(keys), and half of the bits every 40 ms, to compare (frames). It is a row of 16-bit words, little
endian: the number of keys; the lower halves of all keys; the upper halves; for each key its place
and the number of its weakest bit; the frames, 0 where there is no sound that changes.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ

Words = NDArray[np.uint16]

WINDOW = 512
HOP = SAMPLE_RATE_HZ // 100  # 10 ms
PATCH = 80  # hops: 0.8 s
LOW_HZ, HIGH_HZ = 300.0, 3000.0  # what a telephone leaves
NUM_BANDS = 16
COMPRESSION = 1 / 3  # as loudness grows with power; a logarithm would weigh silence like speech
FRAME_HOPS = 4  # a frame every 40 ms: at most 20 ms off, a small part of a patch
PLACE_HOPS = 2
KEY_BITS, FRAME_BITS, WEAK_BITS = 32, 16, 5
KEY_RADIUS = 3  # hops between which only the clearest patch is a key
AMBIGUITY = 0.2  # of a bit's RMS: below this a sign is likely to flip
FAINTEST = 3.0  # RMS of components; steady noise has about 1, speech 5 to 40

# (cepstral order, modulation order) of each bit: those of 14 x 10 that on read speech are the least
# correlated with each other and rarely flip under codecs. Slow ones come first: they are a frame's,
# which may lie 20 ms off.
COMPONENTS = (
    *((0, 1), (2, 1), (4, 1), (6, 1), (7, 1), (11, 1), (0, 2), (1, 2)),
    *((5, 2), (6, 2), (10, 2), (3, 3), (5, 3), (2, 4), (3, 4), (4, 4)),
    *((0, 5), (1, 5), (6, 5), (10, 5), (0, 6), (1, 6), (7, 6), (8, 6)),
    *((2, 7), (3, 7), (4, 7), (2, 8), (3, 8), (0, 9), (6, 9), (0, 10)),
)


class Keys(NamedTuple):
    """The least ambiguous patches of a segment, in the order of time."""

    bits: NDArray[np.uint32]  # (key,)
    weak: NDArray[np.uint16]  # (key,): number of the bit that is likeliest to be wrong
    place: NDArray[np.uint16]  # (key,): time in units of PLACE_HOPS


def fingerprint(samples: Samples) -> bytes:
    """Return the fingerprint of a mono segment at SAMPLE_RATE_HZ; see `duplicates` for its use.

    Empty for what is shorter than a patch, silent throughout, or steady throughout. Sums are in
    float64, so that the order in which a machine adds them does not show in a sign.
    """
    components = _components(_bands(samples))
    active = np.sqrt(np.mean(components**2, axis=1)) > FAINTEST
    if not active.any():
        return b""
    signs = components > 0
    frames = np.where(active, _pack(signs[:, :FRAME_BITS]), 0)[::FRAME_HOPS]
    keys = _keys(components, signs, active)
    marks = keys.place << WEAK_BITS | keys.weak
    parts = ([len(keys.bits)], keys.bits & 0xFFFF, keys.bits >> 16, marks, frames)
    return np.concatenate(parts).astype("<u2").tobytes()


def _bands(samples: Samples) -> NDArray[np.float64]:
    """Return the compressed power of each band, relative to its own mean: (hop, band)."""
    if len(samples) < WINDOW:
        return np.zeros((0, NUM_BANDS))
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectrum = scipy.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32))
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    loudness = (power.astype(np.float64) @ _FILTERS) ** COMPRESSION
    return loudness / np.maximum(loudness.mean(axis=0), np.finfo(np.float64).tiny)


def _mel_filters() -> NDArray[np.float64]:
    """Return triangles equally spaced on O'Shaughnessy's mel scale: (bin, band)."""
    low_mel, high_mel = (2595 * np.log10(1 + hz / 700) for hz in (LOW_HZ, HIGH_HZ))
    edges_hz = 700 * (10 ** (np.linspace(low_mel, high_mel, NUM_BANDS + 2) / 2595) - 1)
    bins_hz = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE_HZ)[:, None]
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    return np.maximum(np.minimum(rising, falling), 0)


def _cosines(order: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """Return the DCT-II of these orders: (length, order)."""
    return np.cos(np.pi * order * (np.arange(length)[:, None] + 0.5) / length)


def _modulations() -> NDArray[np.float64]:
    """Return tapered cosines over a patch, without a mean and of unit norm: (hop, component)."""
    taper = np.sin(np.pi * (np.arange(PATCH)[:, None] + 0.5) / PATCH)
    waves = _cosines(np.array(COMPONENTS)[:, 1], PATCH) * taper
    waves -= taper * waves.sum(axis=0) / taper.sum()
    return waves / np.linalg.norm(waves, axis=0)


_FILTERS = _mel_filters()
_CEPSTRA = _cosines(np.array(COMPONENTS)[:, 0], NUM_BANDS)
_MODULATIONS = _modulations()


def _components(bands: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the components of the patch that begins at each hop: (patch, component)."""
    count = max(len(bands) - PATCH + 1, 0)
    components = np.empty((count, KEY_BITS))
    cepstra = bands @ _CEPSTRA
    for order in sorted({order for order, _ in COMPONENTS}) if count else ():
        same = [place for place, component in enumerate(COMPONENTS) if component[0] == order]
        patches = np.lib.stride_tricks.sliding_window_view(cepstra[:, same[0]], PATCH)
        components[:, same] = patches @ _MODULATIONS[:, same]
    return components


def _keys(
    components: NDArray[np.float64], signs: NDArray[np.bool_], active: NDArray[np.bool_]
) -> Keys:
    """Choose the patches that are clearer than their neighbours: a copy has mostly the same."""
    margin = np.abs(components) / np.sqrt(np.mean(components[active] ** 2, axis=0))
    clear = np.where(active, -np.exp(-margin / AMBIGUITY).sum(axis=1), -np.inf)
    around = np.pad(clear, KEY_RADIUS, constant_values=-np.inf)
    best = np.lib.stride_tricks.sliding_window_view(around, 2 * KEY_RADIUS + 1).max(axis=1)
    (place,) = np.nonzero(active & (clear >= best))
    place = place[place < PLACE_HOPS << (16 - WEAK_BITS)]  # keys of the first 41 s are enough
    weak = np.argmin(margin[place], axis=1).astype(np.uint16)
    return Keys(_pack(signs[place]), weak, (place // PLACE_HOPS).astype(np.uint16))


def _pack(signs: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Return each row of signs as a number, the first sign lowest."""
    return signs @ (np.uint32(1) << np.arange(signs.shape[1], dtype=np.uint32))
