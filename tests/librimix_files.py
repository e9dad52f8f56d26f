"""Small LibriMix metadata with their files, and LibriMix's arithmetic written anew as an oracle."""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipeline.audio import Samples
from pipeline.exchange.librimix import import_librimix
from pipeline.exchange.librimix_metadata import LibriMix
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder
from tests.conftest import voice

FloatArray = NDArray[np.floating[Any]]
GAINS = (0.41801762871, 1.04416012822, 0.65182552607, 2.38881089431)


class Files(NamedTuple):
    """A metadata file with what it names."""

    speech: Folder
    noise: Folder
    metadata: Path
    rows: list[dict[str, str]]

    def plan(self, noisy: bool = True, **options: Any) -> LibriMix:
        return LibriMix.of(
            [str(self.metadata)], self.speech, self.noise if noisy else None, **options
        )

    def imported(self, into: Path, **options: Any) -> Folder:
        plan = self.plan(**options)
        folder = Folder.at(into).child(plan.id)
        import_librimix(folder, plan, lambda *_: None)
        return folder


def write_files(root: Path, voices: int, rows: int = 3) -> Files:
    """Write a small LibriSpeech, noises that are too short and long enough, and metadata."""
    noise = np.random.default_rng(5)
    lines = []
    for row in range(rows):
        line = {"mixture_ID": f"mix-{row}"}
        for place in range(voices):
            speaker, seconds = (row + place) % 4, 1.1 + 0.37 * ((row + 2 * place) % 3)
            name = f"dev-clean/{speaker + 100}/7/{speaker + 100}-7-{row:04d}{place}.flac"
            path = root / "speech" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, voice(speaker, row, seconds), SAMPLE_RATE_HZ, subtype="PCM_16")
            line |= {
                f"source_{place + 1}_path": name,
                f"source_{place + 1}_gain": repr(GAINS[(row + place) % 4] / voices),
            }
        # 0.55 s has to be extended several times, 1.3 s within the mixture or behind its end.
        seconds, name = (0.55, 1.3, 9.0)[row % 3], f"cv/noise-{row}.wav"
        (root / "noise/cv").mkdir(parents=True, exist_ok=True)
        samples = noise.normal(0, 0.08, (round(seconds * SAMPLE_RATE_HZ), 2))
        subtype = ("PCM_16", "FLOAT", "PCM_16")[row % 3]
        soundfile.write(root / "noise" / name, samples, SAMPLE_RATE_HZ, subtype=subtype)
        lines.append(line | {"noise_path": name, "noise_gain": repr(GAINS[3 - row % 4])})
    metadata = root / "libri2mix_dev-clean.csv"
    write_csv(metadata, lines)
    return Files(Folder.at(root / "speech"), Folder.at(root / "noise"), metadata, lines)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def overlapped(noise: Samples, wanted: int) -> FloatArray:
    """Extend a noise sample by sample: its end fades into its beginning over half a second."""
    ramp = [0.5 - 0.5 * math.cos(math.pi * i / 8000) for i in range(8001)]
    made = [float(x) for x in noise]
    while len(made) < wanted:
        start = len(made) - 8001
        for i in range(8001):
            made[start + i] = made[start + i] * ramp[8000 - i] + float(noise[i]) * ramp[i]
        made += [float(x) for x in noise[8001:]]
    return np.array(made[:wanted])


def librimix(files: Files, row: dict[str, str], mode: str, noisy: bool) -> list[FloatArray]:
    """Return the gained parts of a mixture: what LibriMix's script does, written anew."""
    count = sum(name.endswith("_gain") for name in row) - 1
    parts = []
    for place in range(1, count + 1):
        path = files.speech.path(row[f"source_{place}_path"])
        samples, _ = soundfile.read(path, dtype="float32")
        parts.append(samples * np.float32(row[f"source_{place}_gain"]))
    longest = max(map(len, parts))
    samples, _ = soundfile.read(files.noise.path(row["noise_path"]), dtype="float32", stop=longest)
    noise = samples[:, 0]
    if len(noise) < longest:
        noise = overlapped(noise, longest)
    if noisy:
        parts.append(noise * float(row["noise_gain"]))
    if mode == "min":
        shortest = min(map(len, parts))
        return [part[:shortest] for part in parts]
    return [np.pad(part, (0, longest - len(part))) for part in parts]


def as_written(samples: FloatArray, path: Path) -> NDArray[np.int64]:
    """Return the int16 samples of the WAV file that soundfile makes of a signal."""
    soundfile.write(path, samples, SAMPLE_RATE_HZ)
    return soundfile.read(path, dtype="int16")[0].astype(np.int64)
