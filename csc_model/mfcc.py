"""MFCC statistics: the plain reference that a speaker model has to beat."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from csc_model.mel import HOP_SECONDS, WINDOW_SECONDS, mel_filters

Floats = NDArray[np.float64]
NUM_FILTERS, NUM_CEPSTRA = 40, 20


@lru_cache
def _cosines() -> Floats:
    """Return rows 1.. of the discrete cosine transform; row 0 would hold the level."""
    rows = np.arange(1, NUM_CEPSTRA + 1)[:, None]
    return np.cos(np.pi * rows * (np.arange(NUM_FILTERS) + 0.5) / NUM_FILTERS)


def mfcc_statistics(samples: NDArray[np.float32], sample_rate_hz: int) -> Floats:
    """Return mean and standard deviation over time of the cepstra, unit norm, `(dim,)`."""
    window, hop = round(WINDOW_SECONDS * sample_rate_hz), round(HOP_SECONDS * sample_rate_hz)
    padded = np.pad(samples.astype(np.float64), (0, max(0, window - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    fft_size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hamming(window), fft_size)) ** 2
    energies = np.log(power @ mel_filters(NUM_FILTERS, fft_size, sample_rate_hz).T + 1e-8)
    cepstra = energies @ _cosines().T
    statistics = np.concatenate([cepstra.mean(0), cepstra.std(0)])
    norm = np.linalg.norm(statistics)
    return statistics / (norm if norm > 0 else 1.0)
