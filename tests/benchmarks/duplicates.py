"""How well copies are found, how often others are taken for one, and what it costs.

    python -m tests.benchmarks.duplicates [FOLDER] [--files 300] [--rows 10000 100000]

Every file below the folder is one row; copies of some of them are made, coded and cut, and looked
for among all rows. Synthetic rows show how the time grows.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import soundfile
import soxr

from pipeline.audio import Samples, load
from pipeline.duplicates import near_duplicates
from pipeline.fingerprint import KEY_BITS, WEAK_BITS, fingerprint
from pipeline.schema import SAMPLE_RATE_HZ

SAMPLE = Path(__file__).parents[2] / "pipeline" / "sample" / "speechocean762"
SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
Copy = Callable[[Samples], Samples]


def through_av(codec: str, container: str, bits_per_s: int, rate_hz: int) -> Copy:
    """Return what encodes and decodes with ffmpeg's libraries."""

    def copy(samples: Samples) -> Samples:
        sink = io.BytesIO()
        with av.open(sink, "w", format=container) as file:
            stream = file.add_stream(codec, rate=rate_hz, layout="mono")
            stream.bit_rate = bits_per_s
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = SAMPLE_RATE_HZ
            size = stream.codec_context.frame_size or None
            fit = av.AudioResampler(stream.format, "mono", rate_hz, size)
            for ready in [*fit.resample(frame), *fit.resample(None), None]:
                file.mux(stream.encode(ready))
        with av.open(io.BytesIO(sink.getvalue())) as file:
            back = av.AudioResampler("flt", "mono", SAMPLE_RATE_HZ)
            frames = [out for frame in file.decode(audio=0) for out in back.resample(frame)]
            return np.concatenate([out.to_ndarray()[0] for out in [*frames, *back.resample(None)]])

    return copy


def through_soundfile(rate_hz: int, **options: str | float) -> Copy:
    def copy(samples: Samples) -> Samples:
        sink = io.BytesIO()
        resampled = soxr.resample(samples, SAMPLE_RATE_HZ, rate_hz)
        soundfile.write(sink, resampled, rate_hz, **options)
        decoded, _ = soundfile.read(io.BytesIO(sink.getvalue()), dtype="float32")
        return soxr.resample(decoded, rate_hz, SAMPLE_RATE_HZ)

    return copy


def with_noise(snr_db: float) -> Copy:
    def copy(samples: Samples) -> Samples:
        noise = np.random.default_rng(len(samples)).standard_normal(len(samples))
        scale = np.sqrt(np.mean(samples**2)) * 10 ** (-snr_db / 20)
        return (samples + scale * noise).astype(np.float32)

    return copy


COPIES: dict[str, Copy] = {
    "gain -20 dB": lambda samples: np.float32(0.1) * samples,
    "white noise, SNR 30 dB": with_noise(30),
    "white noise, SNR 20 dB": with_noise(20),
    "Opus 32 kbit/s": through_av("libopus", "ogg", 32_000, 48_000),
    "Opus 16 kbit/s": through_av("libopus", "ogg", 16_000, 48_000),
    "MP3 64 kbit/s": through_av("libmp3lame", "mp3", 64_000, 44_100),
    "MP3 32 kbit/s": through_av("libmp3lame", "mp3", 32_000, 16_000),
    "AAC 32 kbit/s": through_av("aac", "adts", 32_000, 16_000),
    "Vorbis, low quality": through_soundfile(
        16_000, format="OGG", subtype="VORBIS", compression_level=0.8
    ),
    "mu-law 8 kHz": through_soundfile(8_000, format="WAV", subtype="ULAW"),
    "GSM 06.10 8 kHz": through_soundfile(8_000, format="WAV", subtype="GSM610"),
}
CUTS = {
    "up to 0.1 s": lambda samples, rng: samples[rng.integers(1_600) :],
    "a quarter": lambda samples, rng: samples[len(samples) // 4 + rng.integers(640) :],
    "2 s common": lambda samples, rng: samples[-2 * SAMPLE_RATE_HZ - rng.integers(640) :],
    "1.5 s common": lambda samples, rng: samples[-3 * SAMPLE_RATE_HZ // 2 - rng.integers(640) :],
}


def report_false(prints: list[bytes], paths: list[Path]) -> None:
    found = near_duplicates(pa.array(prints, pa.binary()))
    false, pairs = np.flatnonzero(found >= 0), len(prints) * (len(prints) - 1) // 2
    print(f"called duplicates among {len(prints)} files ({pairs:,} pairs): {len(false)}")
    for row in false:
        print(f"  {paths[row]} of {paths[found[row]]}")


def report_recall(speech: list[Samples], prints: list[bytes], number: int) -> None:
    """Print for each kind of copy and cut the share that is found, naming the right row."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(speech))[:number])
    print(f"\nshare found of {len(chosen)} copies, cut at the start by, or to:")
    print(f"{'':24}" + "".join(f"{cut:>14}" for cut in CUTS))
    for kind, copy in COPIES.items():
        copies = [copy(speech[place]) for place in chosen]
        shares = []
        for cut in CUTS.values():
            rows = [*prints, *(fingerprint(cut(samples, rng)) for samples in copies)]
            found = near_duplicates(pa.array(rows, pa.binary()), len(prints))[len(prints) :]
            shares.append(np.mean(found == chosen))
            wrong = np.sum((found != chosen) & (found >= 0))
            assert wrong == 0, f"{kind}: {wrong} are taken for another row's"
        print(f"{kind:24}" + "".join(f"{share:14.1%}" for share in shares), flush=True)


def synthetic(num_rows: int, entropy_bits: int = 25, seconds: float = 5.0) -> pa.LargeBinaryArray:
    """Return random fingerprints, the last twentieth of them copies of the first.

    Keys of `entropy_bits` even bits meet as often by chance as those of different speech, whose
    collision entropy was measured to be 24.5 bits.
    """
    rng = np.random.default_rng(num_rows)
    num_keys, num_frames = round(8.6 * (seconds - 0.8)), round(25 * (seconds - 0.8))
    words = rng.integers(1, 1 << 16, (num_rows, 1 + 3 * num_keys + num_frames), dtype=np.uint16)
    words[:, 0] = num_keys
    words[:, 1 + num_keys : 1 + 2 * num_keys] %= 1 << entropy_bits - KEY_BITS // 2
    place = np.sort(rng.integers(0, round(50 * (seconds - 0.8)), (num_rows, num_keys)))
    weak = rng.integers(0, entropy_bits, (num_rows, num_keys))
    words[:, 1 + 2 * num_keys : 1 + 3 * num_keys] = place << WEAK_BITS | weak
    words[num_rows - num_rows // 20 :] = words[: num_rows // 20]
    offsets = np.arange(num_rows + 1) * words[0].nbytes
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(words)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), num_rows, buffers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--files", type=int, default=300, help="how many to copy")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix in SUFFIXES)
    speech = [load(path) for path in paths]
    start = time.perf_counter()
    prints = [fingerprint(samples) for samples in speech]
    taken, seconds = time.perf_counter() - start, sum(map(len, speech)) / SAMPLE_RATE_HZ
    print(f"{seconds / taken:,.0f} s of audio per s, {sum(map(len, prints)) / seconds:.0f} bytes/s")
    report_false(prints, paths)
    report_recall(speech, prints, options.files)
    print("\nrows of 5 s, a twentieth of them copies:")
    for num_rows in options.rows:
        rows = synthetic(num_rows)
        start = time.perf_counter()
        found = int(np.sum(near_duplicates(rows) >= 0))
        print(f"{num_rows:>12,}: {time.perf_counter() - start:.1f} s, {found:,} found", flush=True)


if __name__ == "__main__":
    main()
