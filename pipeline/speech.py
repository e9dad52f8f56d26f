"""What is in a recording: active speech and its level, noise, clipping, bandwidth; and cuts.

Activity is judged by frame energy, which is right for corpora of read speech.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ, Strict

FRAME = SAMPLE_RATE_HZ // 50  # 20 ms
AUDIBLE_DBFS = -70.0
ACTIVE_RANGE_DB = 20.0
SPECTRUM_SIZE = 1024
BANDWIDTH_RANGE_DB = 50.0
EMPTY_DB = -120.0


class SpeechConfig(Strict):
    """What is kept as an utterance."""

    min_seconds: float = Field(1.0, gt=0)
    max_seconds: float = Field(15.0, gt=2, description="longer recordings are cut at quiet places")
    min_level_dbfs: float = Field(-60.0, description="active level below which it is silence")


class Quality(NamedTuple):
    """Measures of one segment."""

    level_dbfs: float
    snr_db: float
    clipped_share: float
    bandwidth_hz: float


def frame_levels_db(samples: Samples) -> NDArray[np.float64]:
    """Return the level in dBFS of each 20 ms frame; a last part of a frame counts as one."""
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % FRAME)).reshape(-1, FRAME)
    return 10 * np.log10(np.mean(padded**2, axis=1) + 10 ** (EMPTY_DB / 10))


def active_frames(levels_db: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mark frames that count as speech, by two gates as in ITU-R BS.1770, the second one wider.

    Silence below the first gate has no say in the second, so padding changes no level.
    """
    audible = levels_db > AUDIBLE_DBFS
    gate_db = _mean_level_db(levels_db[audible]) - ACTIVE_RANGE_DB
    return audible & (levels_db > gate_db)


def _mean_level_db(levels_db: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.mean(10 ** (levels_db / 10)))) if len(levels_db) else EMPTY_DB


def bandwidth_hz(samples: Samples) -> float:
    """Return the frequency above which the mean spectrum stays 50 dB under its peak."""
    padded = np.pad(samples, (0, -len(samples) % SPECTRUM_SIZE)).reshape(-1, SPECTRUM_SIZE)
    power = np.mean(np.abs(np.fft.rfft(padded * np.hanning(SPECTRUM_SIZE))) ** 2, axis=0)
    loud = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_RANGE_DB / 10))
    return float(loud[-1] if len(loud) else 0) * SAMPLE_RATE_HZ / SPECTRUM_SIZE


def measure(samples: Samples) -> Quality:
    """Measure a segment. The SNR is a rough one: active level over the 10th percentile's."""
    levels_db = frame_levels_db(samples)
    level_db = _mean_level_db(levels_db[active_frames(levels_db)])
    noise_db = float(np.percentile(levels_db, 10))
    clipped = float(np.mean(np.abs(samples) >= 32767 / 32768))
    return Quality(level_db, level_db - noise_db, clipped, bandwidth_hz(samples))


def cut(samples: Samples, config: SpeechConfig) -> list[tuple[int, int]]:
    """Return (start, end) of segments no longer than allowed, cut at the quietest late frame."""
    longest = int(config.max_seconds * SAMPLE_RATE_HZ)
    levels_db = frame_levels_db(samples)
    start, bounds = 0, []
    while len(samples) - start > longest:
        first, last = (start + longest * 2 // 3) // FRAME, (start + longest) // FRAME
        end = (first + int(np.argmin(levels_db[first:last]))) * FRAME
        bounds.append((start, end))
        start = end
    return [*bounds, (start, len(samples))]


def reject_reason(num_samples: int, quality: Quality, config: SpeechConfig) -> tuple[str, str]:
    """Return the reject code and its detail, or two empty strings for a segment to keep."""
    seconds = num_samples / SAMPLE_RATE_HZ
    if seconds < config.min_seconds:
        return "too_short", f"{seconds:.2f} s, at least {config.min_seconds:g} s are needed"
    if quality.level_dbfs < config.min_level_dbfs:
        return "silent", f"level {quality.level_dbfs:.0f} dBFS"
    return "", ""
