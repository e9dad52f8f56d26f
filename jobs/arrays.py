"""The voices in a recording of several microphones: `csc beamform`."""

import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csc_model.beamform import IDLE_DB, array_ear, best_reference, by_level, speaking
from csc_model.longform import Hear, Voices, separated, window_samples, window_starts
from csc_model.model import CSC, WINDOW_S
from jobs.console import progress, say
from jobs.listening import told_by_the_second
from jobs.scoring import nearest_slot
from jobs.verify import Verifier
from jobs.voice_files import slot_names, write_slots, write_voices
from pipeline.audio import SILENT_PEAK, load_channels, seconds_of
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder

TOLD_FROM_GB = 1.0  # of disk that is needed for a while


class Asked(NamedTuple):
    """How to beamform."""

    reference: int | None = None  # a microphone, from 0; None is the best
    floor_db: float | None = None  # of the mask on the beams; None is no mask
    refine: bool = True  # masks by directions


class Recording(NamedTuple):
    """The channels of a file on disk, of which no more is in memory than is being heard."""

    samples: Tensor  # (time, mic), at SAMPLE_RATE_HZ
    live: NDArray[np.bool_]  # (mic,), where there is any sound
    mapped: mmap.mmap

    def forget(self) -> None:
        """Let go of the memory of what has been heard; it stays on disk."""
        self.mapped.madvise(mmap.MADV_DONTNEED)


class Spoken(NamedTuple):
    """Somebody's voice among those of a recording."""

    slot: int
    probability: float  # that it is theirs, if either was as likely before listening


def write_all(model: CSC, path: str, to: Path, asked: Asked) -> list[tuple[Path, float]]:
    """Write each voice as a WAV file; return its path and how active its slot is.

    Raises:
        CscError: the file is no recording of an array, or the folder cannot be written to.
    """
    names, voices = slot_names(path, model.config.num_slots), Voices()
    with Folder.at(to).scratch() as scratch:
        return write_slots(to, names, beams(model, path, scratch, asked, voices), voices)


def write_one(verifier: Verifier, path: str, whose: Tensor, to: Path, asked: Asked) -> Spoken:
    """Write the voice that is nearest to a unit vector `(dim,)` as a WAV file.

    Raises:
        CscError: as `write_all` does, or nobody speaks in the recording.
    """
    folder, voices = Folder.at(to.parent), Voices()
    names = slot_names(path, verifier.model.config.num_slots)
    with folder.scratch() as scratch:
        all_of_them = beams(verifier.model, path, scratch, asked, voices)
        write_voices(Folder.at(scratch), names, all_of_them)
        found = nearest(verifier, voices, whose)
        if found is None:
            raise CscError(f"{path}: nobody speaks in it, as far as the model can tell")
        folder.put(to.name, scratch / names[found.slot])
    return found


def nearest(verifier: Verifier, voices: Voices, whose: Tensor) -> Spoken | None:
    """Return which of the active slots is likeliest to be somebody's; None where none is active."""
    vectors, activity = (found.cpu() for found in voices.mean())
    if not speaking(activity).any():
        return None
    slot = nearest_slot(vectors, activity, whose.cpu())
    score = np.array(float(vectors[slot] @ whose.cpu()))
    return Spoken(slot, float(verifier.calibration.probability(score, 0.5)))


@torch.inference_mode()
def beams(model: CSC, path: str, scratch: Path, asked: Asked, voices: Voices) -> Iterator[Tensor]:
    """Give the voices of an array's recording piece by piece, `(slot, time)`, beamformed.

    `voices` is empty at first; its `mean` are their vectors and activity in the end.

    Raises:
        CscError: the file is no recording of an array.
    """
    window = window_samples(WINDOW_S, model.config.sample_rate_hz)
    with TemporaryFile(dir=scratch) as file:
        recording = _recorded(path, file, scratch, model.config.num_slots)
        hear = hearing(model)
        reference = _reference(hear, recording, window, asked.reference, path)
        chosen = "the best by its estimated output SNR" if asked.reference is None else "as asked"
        say(f"{path}: the reference is microphone {reference + 1}, {chosen}")
        ear = array_ear(hear, reference, asked.floor_db, asked.refine)
        with progress("windows") as advance:
            for piece in separated(ear, recording.samples, window, voices, advance):
                recording.forget()
                yield piece


def hearing(model: CSC) -> Hear:
    """Return how a model hears windows; by level, if its activity is the same whatever it hears.

    As that of a model is which learned separation alone, from mixtures of mixtures say.
    """
    if model.active[-1].get_parameter("weight").any():
        return model.hear
    say(
        "the model does not tell in which slots nobody speaks: taken for such are those more than "
        f"{-IDLE_DB:g} dB below the loudest"
    )
    return by_level(model.hear)


def _recorded(path: str, file: IO[bytes], scratch: Path, num_slots: int) -> Recording:
    """Bring all channels of a recording to disk, as they are to be heard.

    Raises:
        CscError: it cannot be used, has fewer than two channels with sound, or there is no room for
            it and `num_slots` voices.
    """
    peaks = np.zeros(0, np.float32)
    with progress(f"{Path(path).name}: seconds read") as advance:
        for block in told_by_the_second(path, load_channels(path), advance):
            if block.shape[1] == 1:
                raise CscError(f"{path}: one channel is no array: csc separate takes it")
            if not len(peaks):
                _check_room(path, scratch, block.shape[1], num_slots)
            found = np.abs(block).max(0, initial=0)
            peaks = np.maximum(peaks, found) if len(peaks) else found
            file.write(np.ascontiguousarray(block).data)
    file.flush()
    live = peaks > SILENT_PEAK
    for silent in np.flatnonzero(~live):
        say(f"{path}: microphone {silent + 1} is silent and takes no part")
    if live.sum() < 2:
        raise CscError(
            f"{path}: only one of its {len(live)} microphones has any sound: csc separate takes it"
        )
    mapped = mmap.mmap(file.fileno(), 0)
    samples = torch.frombuffer(mapped, dtype=torch.float32).view(-1, len(live))
    return Recording(samples, live, mapped)


def _check_room(path: str, scratch: Path, channels: int, num_slots: int) -> None:
    """Assert that a disk has room for channels and voices in floats, and for the voices' files.

    Raises:
        CscError: it has not, as far as the recording says how long it is.
    """
    num_samples = seconds_of(path) * SAMPLE_RATE_HZ
    needed_gb = num_samples * (4 * channels + (4 + 2) * num_slots) / 1e9
    free_gb = shutil.disk_usage(scratch).free / 1e9
    if needed_gb > free_gb:
        raise CscError(
            f"{path}: {channels} channels and {num_slots} voices need {needed_gb:.1f} GB of disk "
            f"at {scratch.parent} for a while, and {free_gb:.1f} GB are free: free some, or give "
            "another --out"
        )
    if needed_gb > TOLD_FROM_GB:
        say(f"{path}: up to {needed_gb:.1f} GB of disk are used at {scratch.parent} for a while")


def _reference(hear: Hear, recording: Recording, window: int, asked: int | None, path: str) -> int:
    """Return the microphone that is asked for, or else the best one of the loudest window.

    One for the whole recording and all voices: beams for different microphones do not go on where
    the others end. Masks for the choice are heard by a microphone of middling level, not by one
    that rustles or is hardly there.

    Raises:
        CscError: there is no such microphone, or it is silent.
    """
    live: Sequence[int] = np.flatnonzero(recording.live).tolist()
    if asked is not None:
        if asked not in live:
            usable = ", ".join(str(microphone + 1) for microphone in live)
            raise CscError(
                f"{path}: no sound comes from microphone {asked + 1}: take one of {usable}"
            )
        return asked
    part = _loudest(recording, window)
    by_level = sorted(live, key=lambda microphone: float(part[:, microphone].square().mean()))
    middling = by_level[len(live) // 2]
    found = hear(part[:, middling])
    mixture = part.T.to(found.sources.device)
    return best_reference(mixture, found.sources, middling, speaking(found.activity))


def _loudest(recording: Recording, window: int) -> Tensor:
    loudest, start = -1.0, 0
    for at in window_starts(len(recording.samples), window):
        power = float(recording.samples[at : at + window].square().mean())
        recording.forget()
        if power > loudest:
            loudest, start = power, at
    return recording.samples[start : start + window]
