"""Audio in: decode by content, one channel, one rate, one sample format."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ

Samples = NDArray[np.float32]
Pcm = NDArray[np.int16]
BLOCK = 1 << 18
MIN_SECONDS = 0.3  # less than a syllable or two says nothing of a speaker


class AudioError(Exception):
    """A file gives no usable audio. `reason` is one of the reject codes."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> tuple[Samples, int]:
    """Decode whatever libsndfile reads, going by content: mono samples in [-1, 1], and the rate.

    Channels are averaged.

    Raises:
        AudioError: `empty` (no bytes or no samples), `unreadable`, or `not_finite`.
    """
    if not data:
        raise AudioError("empty", "the file has no bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate_hz, blocks = int(file.samplerate), list(_blocks(file))
    except soundfile.LibsndfileError as error:
        raise AudioError("unreadable", error.error_string) from error
    except (RuntimeError, ValueError, MemoryError) as error:
        raise AudioError("unreadable", f"{type(error).__name__} while decoding") from error
    if not blocks:
        raise AudioError("empty", "the file has a header and no samples")
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise AudioError("not_finite", "the file has NaN or infinite samples")
    return samples, rate_hz


def _blocks(file: soundfile.SoundFile) -> Iterator[Samples]:
    """Read to the end whatever length the header claims, channels averaged."""
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        yield block.mean(axis=1, dtype=np.float32)


def decode_16k(data: bytes) -> Samples:
    """Decode and resample to SAMPLE_RATE_HZ; raises as `decode` does."""
    samples, rate_hz = decode(data)
    if rate_hz == SAMPLE_RATE_HZ:
        return samples
    resampled = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    if not len(resampled):
        raise AudioError("empty", "no sample is left after resampling")
    return resampled.astype(np.float32, copy=False)


def to_pcm(samples: Samples) -> Pcm:
    """Round to int16; what lies outside of [-1, 1) is clipped."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")


def load(path: str | Path) -> Samples:
    """Read a local file as mono samples at SAMPLE_RATE_HZ.

    Raises:
        CscError: naming the file and the reason.
    """
    try:
        samples = decode_16k(Path(path).read_bytes())
    except AudioError as error:
        raise CscError(f"{path}: {error.reason}: {error.detail}; give another file") from error
    except OSError as error:
        raise CscError(f"{path}: {error.strerror}; check the path") from error
    seconds = len(samples) / SAMPLE_RATE_HZ
    if seconds < MIN_SECONDS:
        raise CscError(f"{path}: too short: {seconds:.2f} s; give at least {MIN_SECONDS} s")
    if not np.any(np.abs(samples) > 1e-4):
        raise CscError(f"{path}: silent: no sample is above -80 dBFS; give another file")
    return samples
