"""What an episode sounds and looks like: WAV files and a picture of spectrograms."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipeline.audit.excerpt import Excerpt
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ

PICTURE = "spectrograms.png"
WINDOW = 512  # samples
RANGE_DB = 80.0


class Sound(NamedTuple):
    """A signal of an episode."""

    condition: int
    name: str  # mixture, target, interferer-1, .., noise
    samples: NDArray[np.float32]  # (time,), full scale 1


def slot_name(slot: int, noise_slot: int, mixit: bool) -> str:
    """Return what a slot is called."""
    if slot == noise_slot:
        return "noise"
    if mixit:
        return f"mixture-{slot}"
    return f"interferer-{slot}" if slot else "target"


def sounds(excerpt: Excerpt) -> Iterator[Sound]:
    """Yield the mixtures, each followed by what it is the sum of."""
    _, speakers, _ = excerpt.references.shape
    for condition, mixture in enumerate(excerpt.mixtures):
        yield Sound(condition, "mixture", mixture)
        slots = [line["slot"] for line in excerpt.row["lines"] if line["condition"] == condition]
        for slot in sorted(slots):
            name = slot_name(slot, speakers, excerpt.row["mixit"])
            heard = excerpt.references[condition, slot] if slot < speakers else None
            yield Sound(condition, name, excerpt.noise[condition] if heard is None else heard)


def write_files(excerpt: Excerpt, folder: Path) -> list[str]:
    """Write the sounds of an episode, its dry lines and their picture; return the names.

    What is added up is written as 32-bit float, so that it adds up in the files as well; dry lines
    are the 16-bit samples that the shard holds.

    Raises:
        CscError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for sound in sounds(excerpt):
            names.append(f"condition-{sound.condition}-{sound.name}.wav")
            soundfile.write(folder / names[-1], sound.samples, SAMPLE_RATE_HZ, subtype="FLOAT")
        for line, pcm in zip(excerpt.row["lines"], excerpt.lines, strict=True):
            slot = slot_name(line["slot"], excerpt.references.shape[1], excerpt.row["mixit"])
            names.append(f"condition-{line['condition']}-{slot}-dry.wav")
            soundfile.write(folder / names[-1], pcm, SAMPLE_RATE_HZ, subtype="PCM_16")
        (folder / PICTURE).write_bytes(picture(excerpt))
    except (OSError, soundfile.LibsndfileError) as error:
        raise CscError(f"cannot write to {folder}: {error}; choose another with --out") from error
    return [*names, PICTURE]


def picture(excerpt: Excerpt) -> bytes:
    """Draw spectrograms as a PNG: a row for each mixture, and beside it what it is made of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: dict[int, list[Sound]] = {}
    for sound in sounds(excerpt):
        rows.setdefault(sound.condition, []).append(sound)
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(4.2 * columns, 3.0 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_axis_off()
    for condition, row in rows.items():
        for panel, sound in zip(panels[condition], row, strict=False):
            panel.set_axis_on()
            _spectrogram(panel, sound, _title(excerpt, sound))
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def _title(excerpt: Excerpt, sound: Sound) -> str:
    """Say who is heard, or how the mixture came to be."""
    about = excerpt.row["conditions"][sound.condition]
    if sound.name == "mixture":
        realised = (("SIR", "realised_sir_db"), ("SNR", "realised_snr_db"))
        parts = [f"{what} {about[key]:.1f} dB" for what, key in realised if about[key] is not None]
        return ", ".join([f"mixture {sound.condition}", *parts])
    speakers = excerpt.references.shape[1]
    names = [
        source["speaker_id"]
        for source in excerpt.row["sources"]
        if source["condition"] == sound.condition
        and slot_name(source["slot"], speakers, excerpt.row["mixit"]) == sound.name
    ]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{sound.name}: {names[0]}{more}"


def _spectrogram(panel: Any, sound: Sound, title: str) -> None:
    padded = np.pad(sound.samples, (0, max(0, WINDOW - len(sound.samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:: WINDOW // 4]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(WINDOW)))).T
    level_db = 10 * np.log10(np.maximum(power, 1e-12))
    top = float(level_db.max())
    extent = (0, len(sound.samples) / SAMPLE_RATE_HZ, 0, SAMPLE_RATE_HZ / 2000)
    panel.imshow(
        level_db, origin="lower", aspect="auto", extent=extent, vmin=top - RANGE_DB, vmax=top
    )
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("s")
    panel.set_ylabel("kHz")
