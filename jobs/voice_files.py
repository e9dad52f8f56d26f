"""Voices into WAV files, piece by piece: hours of them are never in memory."""

import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from torch import Tensor

from csc_model.longform import Voices
from pipeline.audio import to_pcm
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder

SAMPLES_AT_ONCE = 1 << 20


def slot_names(path: str, num_slots: int) -> list[str]:
    """Return the names of the files for the slots of a recording."""
    return [f"{Path(path).stem}-slot-{slot + 1}.wav" for slot in range(num_slots)]


def write_slots(
    to: Path, names: Sequence[str], pieces: Iterable[Tensor], voices: Voices
) -> list[tuple[Path, float]]:
    """Write the slots of a recording; return the path of each and how active it is.

    `voices` is that of the pieces: complete once these have come.

    Raises:
        CscError: the folder cannot be written to.
    """
    write_voices(Folder.at(to), names, pieces)
    activity = voices.mean()[1][:-1].tolist()
    return [(to / name, active) for name, active in zip(names, activity, strict=True)]


def write_voices(folder: Folder, names: Sequence[str], pieces: Iterable[Tensor]) -> None:
    """Write voices that come in pieces `(voice, time)`, each as a file of its name.

    At 16 kHz in 16 bits, at their level; one that would clip there makes all of them quieter.
    Nothing is in place before all is written.

    Raises:
        CscError: the folder cannot be written to.
    """
    peak, many = 1.0, len(names)
    with folder.scratch() as scratch, TemporaryFile(dir=scratch) as file:
        for piece in pieces:
            if piece.numel():
                peak = max(peak, float(piece.abs().max()))
            file.write(piece.T.cpu().numpy().astype(np.float32).tobytes())
        for number, name in enumerate(names):
            file.seek(0)
            with wave.open(str(scratch / name), "wb") as voice:
                voice.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
                while block := file.read(4 * many * SAMPLES_AT_ONCE):
                    sources = np.frombuffer(block, np.float32).reshape(-1, many)
                    voice.writeframes(to_pcm(sources[:, number] / peak).tobytes())
        for name in names:
            folder.put(name, scratch / name)
