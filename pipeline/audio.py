"""Audio in: decode by content, one channel, one rate, one sample format, in blocks.

libsndfile reads what it knows; other containers (m4a, mp4, webm, ...) go through the ffmpeg
libraries in PyAV's wheels. Both may crash or hang on a hostile file: `decoder` keeps them in a
process of their own.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ

Samples = NDArray[np.float32]
Pcm = NDArray[np.int16]
Native = tuple[int, Samples]
"""A block as it was recorded: its rate in Hz, and samples `(time, channel)` in [-1, 1]."""
Mix = Callable[[Samples], Samples]
"""Makes of a block `(time, channel)` what is wanted of it, `(time,)` or `(time, channel)`."""

BLOCK_FRAMES = 1 << 14  # what a fault in the middle of a file may cost
RATES_HZ = range(1_000, 768_001)
SILENT_PEAK = 1e-4  # -80 dBFS
MIN_SECONDS = 0.3  # less than a syllable or two says nothing of a speaker
FLAC_SAMPLES_PER_BYTE = 1 << 13  # silence, in the largest blocks there are
UNREAD_BYTES = 1 << 15  # libFLAC reads ahead by less
# Plain media only: a playlist would have ffmpeg open whatever file or address it names.
CONTAINERS = "mov,matroska,aac,mp3,flac,wav,ogg,asf,avi,mpegts,mpeg,flv,amr,aiff,caf,ac3,ape,wv,tta"


class AudioError(Exception):
    """A file gives no usable audio, or none from here on. `reason` is one of the reject codes."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def stream(
    file: BinaryIO, start_s: float = 0.0, duration_s: float = 0.0, *, first_channel: bool = False
) -> Iterator[Samples]:
    """Decode a file, or a span of it, to mono blocks at SAMPLE_RATE_HZ; 0 s of span is all.

    Channels are averaged, unless that cancels them: then the loudest is taken. Or only the first
    one is, where that is asked for.

    Raises:
        AudioError: `empty` (no bytes or no samples), `unreadable`, or after the blocks that are
            good `truncated` or `not_finite`.
    """
    blocks = _native_blocks(file, start_s, duration_s)
    yield from _not_empty(_at_one_rate(blocks, _first if first_channel else _Downmix, start_s))


def stream_channels(file: BinaryIO) -> Iterator[Samples]:
    """Decode a file to blocks `(time, channel)` at SAMPLE_RATE_HZ, with all of its channels.

    Raises:
        AudioError: as `stream` does, and `unreadable` where a channel comes or goes on the way.
    """
    blocks = _same_channels(_native_blocks(file, 0.0, 0.0))
    yield from _not_empty(_at_one_rate(blocks, _every))


def _not_empty(blocks: Iterator[Samples]) -> Iterator[Samples]:
    found = False
    for block in blocks:
        found = found or len(block) > 0
        yield block
    if not found:
        raise AudioError("empty", "no sample is left after decoding")


def _same_channels(blocks: Iterator[Native]) -> Iterator[Native]:
    channels = 0
    for rate_hz, block in blocks:
        channels = channels or block.shape[1]
        if block.shape[1] != channels:
            raise AudioError("unreadable", f"{channels} channels become {block.shape[1]}")
        yield rate_hz, block


def _native_blocks(file: BinaryIO, start_s: float, duration_s: float) -> Iterator[Native]:
    """Decode with libsndfile; with ffmpeg what that does not know, and what follows a damage."""
    if not file.read(1):
        raise AudioError("empty", "the file has no bytes")
    num_bytes, seconds = file.seek(0, io.SEEK_END), 0.0
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            fault = AudioError(
                "truncated", f"more follows than the {sound.frames} samples promised"
            )
            for rate_hz, block in _span(
                _with_libsndfile(sound, start_s, num_bytes), 0.0, duration_s
            ):
                yield rate_hz, block
                seconds += len(block) / rate_hz
            more = file.tell() < num_bytes - UNREAD_BYTES and not duration_s
            if not seconds:  # or a length that its writer never filled in
                fault = AudioError("empty", "the header promises no samples")
            elif sound.format != "FLAC" or not more:
                return
    except soundfile.LibsndfileError as error:
        fault = AudioError("unreadable", error.error_string)
    except AudioError as error:
        fault = error
    file.seek(0)
    left_s = duration_s - seconds if duration_s else 0.0
    try:
        yield from _span(_with_pyav(file), start_s + seconds, left_s)
    except AudioError as error:
        raise fault if error.reason == "unreadable" else error from None
    if fault.reason == "truncated" and fault.__cause__ is not None:  # what was damaged is lost
        raise fault


def _with_libsndfile(
    sound: soundfile.SoundFile, start_s: float, num_bytes: int
) -> Iterator[Native]:
    """Read from a second on to the end, or to where the file is damaged."""
    if sound.format == "FLAC" and sound.frames > FLAC_SAMPLES_PER_BYTE * num_bytes:
        raise AudioError("truncated", "the header leaves the length open, or lies")
    found, rate_hz = False, int(sound.samplerate)
    try:
        if start_s:
            sound.seek(min(round(start_s * rate_hz), sound.frames))
        while len(block := sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            found = True
            yield rate_hz, block
    except soundfile.LibsndfileError as error:
        raise AudioError("truncated" if found else "unreadable", error.error_string) from error
    except (RuntimeError, ValueError, MemoryError) as error:
        detail = f"{type(error).__name__} while decoding"
        raise AudioError("truncated" if found else "unreadable", detail) from error


def _with_pyav(file: BinaryIO) -> Iterator[Native]:
    """Decode the first audio stream packet by packet, going on after those that are damaged."""
    found, faults = False, 0
    try:
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.audio:
                raise AudioError("unreadable", "there is no audio stream in it")
            track = container.streams.audio[0]
            track.codec_context.options = {"err_detect": "crccheck+explode"}
            for packet in container.demux(track):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    faults += 1
                    continue
                for frame in frames:
                    found = True
                    yield int(frame.sample_rate), _frame_samples(frame)
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        if not found:
            raise AudioError("unreadable", type(error).__name__) from error
        faults += 1
    if faults:
        raise AudioError("truncated" if found else "unreadable", f"{faults} damaged packet(s)")


def _frame_samples(frame: Any) -> Samples:
    """Return what a frame of PyAV holds as floats `(time, channel)`."""
    raw = frame.to_ndarray()
    channels = frame.layout.nb_channels
    shaped = raw.T if frame.format.is_planar else raw.reshape(-1, channels)
    if raw.dtype.kind == "f":
        return np.ascontiguousarray(shaped, np.float32)
    middle = 128 if raw.dtype.kind == "u" else 0
    return (shaped.astype(np.float32) - middle) * 2.0 ** (1 - 8 * raw.dtype.itemsize)


def _span(blocks: Iterator[Native], start_s: float, duration_s: float) -> Iterator[Native]:
    """Pass on what lies in a span; 0 s of duration is all from its start."""
    seconds = 0.0
    for rate_hz, block in blocks:
        first = max(0, round((start_s - seconds) * rate_hz))
        stop = round((start_s + duration_s - seconds) * rate_hz) if duration_s else len(block)
        if len(block[first:stop]):
            yield rate_hz, block[first:stop]
        seconds += len(block) / rate_hz
        if duration_s and stop <= len(block):
            return


def _at_one_rate(
    blocks: Iterator[Native], new_mix: Callable[[], Mix], start_s: float = 0.0
) -> Iterator[Samples]:
    """Mix and resample what begins at a second; rate and channels may change on the way."""
    shape: tuple[int, int] | None = None
    mix, mixed, resampler = new_mix(), np.zeros(0, np.float32), None
    for rate_hz, block in blocks:
        if rate_hz not in RATES_HZ:
            raise AudioError("unreadable", f"a sampling rate of {rate_hz} Hz")
        if not np.isfinite(block).all():
            at_s = start_s + float(np.isfinite(block).all(1).argmin()) / rate_hz
            raise AudioError("not_finite", f"NaN or infinite samples at second {at_s:.2f}")
        start_s += len(block) / rate_hz
        changed = shape != (rate_hz, block.shape[1])
        if changed:
            if resampler is not None:
                yield resampler.resample_chunk(mixed[:0], last=True)
            shape, mix = (rate_hz, block.shape[1]), new_mix()
        mixed = mix(block)
        if changed:
            resampler = _resampler(rate_hz, mixed)
        yield mixed if resampler is None else resampler.resample_chunk(mixed)
    if resampler is not None:
        yield resampler.resample_chunk(mixed[:0], last=True)


def _resampler(rate_hz: int, mixed: Samples) -> soxr.ResampleStream | None:
    if rate_hz == SAMPLE_RATE_HZ:
        return None
    channels = 1 if mixed.ndim == 1 else mixed.shape[1]
    return soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, channels, dtype="float32", quality="HQ")


class _Downmix:
    """Averages channels; or takes the loudest where the first sound says that they cancel."""

    def __init__(self) -> None:
        self._channel: int | None = None
        self._decided = False

    def __call__(self, block: Samples) -> Samples:
        mean = block.mean(axis=1, dtype=np.float32)
        if not self._decided:
            powers = np.mean(block**2, axis=0)
            self._decided = bool(powers.max() > 1e-8)  # -80 dBFS
            if float(np.mean(mean**2)) < 0.01 * powers.max():
                self._channel = int(powers.argmax())
        return mean if self._channel is None else np.ascontiguousarray(block[:, self._channel])


def _first() -> Mix:
    return lambda block: np.ascontiguousarray(block[:, 0])


def _every() -> Mix:
    return lambda block: block


def decode_16k(data: bytes) -> Samples:
    """Decode all of a file at once; raises as `stream` does."""
    return _joined(stream(io.BytesIO(data)))


def _joined(blocks: Iterable[Samples]) -> Samples:
    """Join blocks one by one: hours of sound need not be in memory twice."""
    joined = bytearray()
    for block in blocks:
        joined += block.tobytes()
    return np.frombuffer(joined, np.float32)


def to_pcm(samples: Samples) -> Pcm:
    """Round to int16; what lies outside of [-1, 1) is clipped."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")


def to_float(pcm: Pcm) -> Samples:
    """Undo `to_pcm`, but for the rounding."""
    return np.asarray(pcm * np.float32(1 / 32768), np.float32)


def load(path: str | Path) -> Samples:
    """Read a local file as mono samples at SAMPLE_RATE_HZ.

    Raises:
        CscError: naming the file and the reason.
    """
    with _named(path), Path(path).open("rb") as file:
        samples = _joined(stream(file))
    _check_sound(path, len(samples), max(samples.max(initial=0), -samples.min(initial=0)))
    return samples


def load_blocks(path: str | Path) -> Iterator[Samples]:
    """Read a local file as `load` does, block by block.

    Raises:
        CscError: naming the file and the reason; after the last block, where all of it is too short
            or silent.
    """
    return _blocks(path, stream)


def load_channels(path: str | Path) -> Iterator[Samples]:
    """Read a local file with all of its channels, in blocks `(time, channel)` at SAMPLE_RATE_HZ.

    Raises:
        CscError: as `load_blocks` does.
    """
    return _blocks(path, stream_channels)


def seconds_of(path: str | Path) -> float:
    """Return how long a file says it is, 0 where it does not: to show progress by."""
    try:
        return float(soundfile.info(str(path)).duration)
    except (RuntimeError, OSError):
        return 0.0


def _blocks(path: str | Path, decode: Callable[[BinaryIO], Iterator[Samples]]) -> Iterator[Samples]:
    num_samples, peak = 0, 0.0
    with _named(path), Path(path).open("rb") as file:
        for block in decode(file):
            num_samples += len(block)
            peak = max(peak, float(np.abs(block).max(initial=0)))
            yield block
    _check_sound(path, num_samples, peak)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Name the file in what goes wrong with it."""
    try:
        yield
    except AudioError as error:
        raise CscError(f"{path}: {error.reason}: {error.detail}; give another file") from error
    except OSError as error:
        raise CscError(f"{path}: {error.strerror}; check the path") from error


def _check_sound(path: str | Path, num_samples: int, peak: float) -> None:
    seconds = num_samples / SAMPLE_RATE_HZ
    if seconds < MIN_SECONDS:
        raise CscError(f"{path}: too short: {seconds:.2f} s; give at least {MIN_SECONDS} s")
    if peak <= SILENT_PEAK:
        raise CscError(f"{path}: silent: no sample is above -80 dBFS; give another file")
