"""The arithmetic of LibriMix: what of each file is in a mixture, before its gain.

LibriMix multiplies each decoded file by its gain, cuts all to the shortest voice (`min`) or pads
them to the longest (`max`), and adds up. A noise shorter than the longest voice is repeated.
"""

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipeline.audio import Pcm, Samples, to_pcm
from pipeline.errors import CscError
from pipeline.exchange.librimix_metadata import Gained, MixtureRow, Mode
from pipeline.schema import SAMPLE_RATE_HZ, content_id
from pipeline.storage import Folder

FADE = SAMPLE_RATE_HZ // 2 + 1  # samples over which a noise is blended with its own beginning
FULL_SCALE = 32768.0


class Dry(NamedTuple):
    """A line as it is stored, before its gain."""

    utterance_id: str  # of the whole decoded file
    pcm: Pcm  # (time,), as much of it as is in the mixture
    louder_db: float  # than the file: 0 where its own samples could be kept


def dry_lines(
    row: MixtureRow, speech: Folder, noise: Folder | None, mode: Mode, num_samples: int | None
) -> tuple[list[Dry], int]:
    """Read what a row names; return its lines, noise last, and the length of the mixture.

    `num_samples` cuts the mixture to that length, or pads it. No line is longer than the mixture;
    one that is shorter begins with it.

    Raises:
        CscError: naming row and file, when one is missing, outside of its root, or of another kind.
    """
    voices = [_read(_voice, speech, one.path, row.where) for one in row.voices]
    lengths = [len(voice) for voice in voices]
    heard = min(lengths) if mode == "min" else max(lengths)
    length = num_samples or heard
    taken = min(heard, length)
    lines = [Dry(content_id(pcm.tobytes()), pcm[:taken], 0.0) for pcm in voices]
    if row.noise is not None and noise is not None:
        lines.append(_noise_line(row.noise, row.where, noise, max(lengths), taken))
    return lines, length


def _noise_line(one: Gained, where: str, folder: Folder, longest: int, taken: int) -> Dry:
    """Read a noise and fit it to the longest voice, of which only so many samples are wanted.

    Even where a mixture is short, blending begins where the longest voice outlasts the noise.
    """
    samples = _read(_noise, folder, one.path, where)
    used = samples[:longest]
    if len(used) < longest:
        try:
            used = extended(used, longest)
        except CscError as error:
            raise CscError(f"{where}: {folder.path(one.path)}: {error}") from error
    pcm, louder_db = fitted(used[:taken])
    return Dry(content_id(to_pcm(samples).tobytes()), pcm, louder_db)


def _voice(folder: Folder, path: str) -> Pcm:
    """Read speech: 16 kHz, one channel, int16, so that what is stored is what was decoded."""
    with soundfile.SoundFile(io.BytesIO(folder.read(path))) as sound:
        if (sound.samplerate, sound.channels, sound.subtype) != (SAMPLE_RATE_HZ, 1, "PCM_16"):
            raise CscError(f"{folder.path(path)} is {_kind(sound)}; 16000 Hz mono int16 is wanted")
        return np.asarray(sound.read(dtype="int16"), "<i2")


def _noise(folder: Folder, path: str) -> Samples:
    """Read the first channel of a noise, as LibriMix does; of any sample format."""
    with soundfile.SoundFile(io.BytesIO(folder.read(path))) as sound:
        if sound.samplerate != SAMPLE_RATE_HZ:
            raise CscError(f"{folder.path(path)} is {_kind(sound)}; 16000 Hz is wanted")
        samples = sound.read(dtype="float32", always_2d=True)[:, 0]
    if not np.isfinite(samples).all():
        raise CscError(f"{folder.path(path)} has NaN or infinite samples")
    return samples


def _kind(sound: soundfile.SoundFile) -> str:
    return f"{sound.samplerate} Hz, {sound.channels} channel(s), {sound.subtype}"


def _read(
    read: Callable[[Folder, str], NDArray[Any]], folder: Folder, path: str, where: str
) -> Any:
    """Read a file; whatever is wrong with it is told with the row that names it."""
    try:
        samples = read(folder, path)
    except soundfile.LibsndfileError as error:
        raise CscError(
            f"{where}: cannot decode {folder.path(path)}: {error.error_string}; fetch it again"
        ) from error
    except CscError as error:
        raise CscError(f"{where}: {error}") from error
    if not len(samples):
        raise CscError(f"{where}: {folder.path(path)} has no samples; fetch it again")
    return samples


def extended(noise: Samples, num_samples: int) -> NDArray[np.float64]:
    """Repeat a noise until it is long enough, each time blended with its end, as LibriMix does.

    Raises:
        CscError: it is too short to be blended.
    """
    if len(noise) <= FADE:
        raise CscError(f"a noise of {len(noise)} samples cannot be extended: {FADE + 1} are needed")
    rise = np.hanning(2 * FADE - 1)[:FADE]
    done, end = [], noise.astype(np.float64)
    missing = num_samples - len(end)
    while missing > 0:
        done.append(end[:-FADE])
        end = np.concatenate([end[-FADE:] * rise[::-1] + noise[:FADE] * rise, noise[FADE:]])
        missing -= len(noise) - FADE
    return np.concatenate([*done, end])[:num_samples]


def fitted(samples: NDArray[np.floating[Any]]) -> tuple[Pcm, float]:
    """Return samples as int16, and by how many dB these are louder.

    What was int16 is kept as it is. Anything else is brought to full scale before it is rounded,
    so that no later gain lifts the error above half a step of the mixture.
    """
    scaled = samples.astype(np.float64) * FULL_SCALE
    rounded = np.rint(scaled)
    fits = rounded.min() >= -FULL_SCALE and rounded.max() < FULL_SCALE
    if fits and np.array_equal(scaled, rounded):
        return rounded.astype("<i2"), 0.0
    factor = (FULL_SCALE - 1) / float(np.abs(scaled).max())
    return np.rint(scaled * factor).astype("<i2"), 20 * math.log10(factor)
