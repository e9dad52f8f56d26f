"""What a segment is like: level of active speech, clipping, bandwidth; and whether to keep it."""

from typing import NamedTuple, Self

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ, Strict
from pipeline.tones import tonal_share

FRAME = SAMPLE_RATE_HZ // 50  # 20 ms
AUDIBLE_DBFS = -70.0
ACTIVE_RANGE_DB = 20.0
SPECTRUM_SIZE = 1024
HANN = np.hanning(SPECTRUM_SIZE).astype(np.float32)
BANDWIDTH_RANGE_DB = 50.0
EMPTY_DB = -120.0
CLIPPED_FROM = 0.99  # resampling rounds what was cut off


class SpeechConfig(Strict):
    """What is cut out of a recording as an utterance, and what is kept of that."""

    min_seconds: float = Field(1.5, gt=0)
    max_seconds: float = Field(15.0, gt=2, description="longer speech is cut at pauses")
    max_pause_s: float = Field(0.6, gt=0.2, le=2, description="a longer pause ends an utterance")
    pad_s: float = Field(0.1, ge=0, le=0.1, description="kept before and after what is spoken")
    speech_from: float = Field(0.5, gt=0, lt=1, description="probability at which speech begins")
    speech_until: float = Field(0.35, gt=0, lt=1, description="and below which it ends")
    min_level_dbfs: float = Field(-60.0, description="active level below which it is silence")
    min_snr_db: float = Field(0.0, description="of active speech over its pauses")
    max_clipped_share: float = Field(0.01, ge=0, le=1)
    min_bandwidth_hz: float = Field(2500.0, ge=0, description="4500 turns telephone speech away")
    max_tonal_share: float = Field(
        0.1, ge=0, le=1, description="power in partials that hold for half a second, as in music"
    )

    @model_validator(mode="after")
    def _orders_hold(self) -> Self:
        for low, high in (("min_seconds", "max_seconds"), ("speech_until", "speech_from")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high}")
        return self


class Quality(NamedTuple):
    """Measures of one segment."""

    level_dbfs: float
    snr_db: float
    clipped_share: float
    bandwidth_hz: float
    tonal_share: float


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


def active_level_dbfs(samples: Samples) -> float:
    """Return the level of the frames that count as speech."""
    levels_db = frame_levels_db(samples)
    return _mean_level_db(levels_db[active_frames(levels_db)])


def _mean_level_db(levels_db: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.mean(10 ** (levels_db / 10)))) if len(levels_db) else EMPTY_DB


def bandwidth_hz(samples: Samples) -> float:
    """Return the frequency above which the mean spectrum stays 50 dB under its peak."""
    padded = np.pad(samples, (0, -len(samples) % SPECTRUM_SIZE)).reshape(-1, SPECTRUM_SIZE)
    spectra = scipy.fft.rfft(padded * HANN)
    power = np.mean(spectra.real**2 + spectra.imag**2, axis=0)
    loud = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_RANGE_DB / 10))
    return float(loud[-1] if len(loud) else 0) * SAMPLE_RATE_HZ / SPECTRUM_SIZE


def measure(samples: Samples, snr_db: float) -> Quality:
    """Measure a segment whose SNR is known; a constant offset counts as nothing."""
    centred = samples - samples.mean()
    level_db = active_level_dbfs(centred)
    clipped = float(np.mean(np.abs(samples) >= CLIPPED_FROM))
    return Quality(level_db, snr_db, clipped, bandwidth_hz(centred), tonal_share(centred))


def reject_reason(
    num_samples: int, quality: Quality, kind: str, config: SpeechConfig
) -> tuple[str, str]:
    """Return the reject code and its detail, or two empty strings for a segment to keep."""
    seconds = num_samples / SAMPLE_RATE_HZ
    if seconds < config.min_seconds:
        return "too_short", f"{seconds:.2f} s, at least {config.min_seconds:g} s are needed"
    if quality.level_dbfs < config.min_level_dbfs:
        return "silent", f"level {quality.level_dbfs:.0f} dBFS"
    if quality.clipped_share > config.max_clipped_share:
        return "clipped", f"{quality.clipped_share:.1%} of the samples"
    if kind == "speech" and quality.snr_db < config.min_snr_db:
        return "low_snr", f"{quality.snr_db:.1f} dB"
    if kind == "speech" and quality.bandwidth_hz < config.min_bandwidth_hz:
        return "narrowband", f"nothing above {quality.bandwidth_hz:.0f} Hz"
    if kind == "speech" and quality.tonal_share > config.max_tonal_share:
        return "tonal", f"{quality.tonal_share:.0%} of the power is in held tones"
    return "", ""
