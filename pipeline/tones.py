"""Music and tones tell themselves from speech by partials that stay where they are.

A voice moves: within half a second its harmonics leave the few hertz that a long window resolves,
the higher ones first. Those of a chord, a dial tone or a held note do not. That harmonic sound is
smooth along time is an idea of Fitzgerald (Harmonic/percussive separation using median filtering,
DAFx 2010); his medians are minima and medians of blocks here, which are cheap.
"""

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ

WINDOW = 4096  # 256 ms: harmonics of a voice smear in it
HANN = np.hanning(WINDOW).astype(np.float32)
HELD_FRAMES = 3  # a partial has to last for 0.5 s, as frames overlap by half
BAND_HZ = (100, 4000)
FULL_FROM_HZ = 800  # the lowest harmonics of a voice do stay, so the weight rises up to here,
STEEPNESS = 6  # by this power of the frequency
BLOCK = 32  # bins of a neighbourhood, 125 Hz: a partial stands out of it
PROMINENCE = 10.0  # of a partial over the median of its neighbourhood, as a ratio of powers
AUDIBLE = 1e-3  # quieter frames than this under the loudest one have no say


def tonal_share(samples: Samples) -> float:
    """Return the share of power, 0 to 1, that is in partials which stay for half a second.

    It is the mean over half seconds, each counting alike, so that what fills the pauses of loud
    speech is heard as well; the gain does not matter. Less than 0.5 s of samples are padded, and
    digital silence has nothing tonal.

    Speech has about 0.01, up to 0.09; in a room that rings for 1.5 s 0.05, up to 0.1. Solo singing
    has no more than that, as a voice glides and trembles: it is not told from speech.
    """
    power = _weighted_power(samples)
    blocks = sliding_window_view(power, HELD_FRAMES, axis=0).min(axis=-1)
    blocks = blocks.reshape(len(blocks), -1, BLOCK)
    stands_out = blocks > PROMINENCE * np.median(blocks, axis=2, keepdims=True)
    held = np.sum(blocks, axis=(1, 2), where=stands_out)
    total = sliding_window_view(power.sum(axis=1), HELD_FRAMES).max(axis=-1)
    audible = total > AUDIBLE * total.max()
    return float(np.mean(held[audible] / total[audible])) if audible.any() else 0.0


def _weighted_power(samples: Samples) -> NDArray[np.float32]:
    """Return power `(frame, bin)` of the band, in whole blocks of bins."""
    missing = WINDOW + (HELD_FRAMES - 1) * WINDOW // 2 - len(samples)
    padded = np.pad(samples, (0, max(missing, 0)))
    frames = sliding_window_view(padded, WINDOW)[:: WINDOW // 2]
    first, stop = (round(edge * WINDOW / SAMPLE_RATE_HZ) for edge in BAND_HZ)
    stop -= (stop - first) % BLOCK
    spectrum = scipy.fft.rfft(frames * HANN)[:, first:stop]
    hertz = np.arange(first, stop) * SAMPLE_RATE_HZ / WINDOW
    weight = np.minimum(hertz / FULL_FROM_HZ, 1.0).astype(np.float32) ** STEEPNESS
    return (spectrum.real**2 + spectrum.imag**2) * weight
