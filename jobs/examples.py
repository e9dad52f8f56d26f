"""Trials to listen to: the worst errors of a model, and a few that it gets right as a rule."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from csc_model.calibration import Calibration
from csc_model.extraction import leak_db
from csc_model.model import CSC, best_view
from jobs.report import pyplot
from jobs.scoring import embed_with, enrol
from jobs.summary import eer_by_condition
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sides import TrialAudio
from pipeline.trials import CLEAN, Trials

OF_EACH_KIND = 3
KINDS = {
    "missed": "the same speaker, taken for another",
    "false alarm": "another speaker, taken for the same",
    "found": "the same speaker, an ordinary trial",
    "told apart": "another speaker, an ordinary trial",
}
SPECTRUM, HOP, RANGE_DB = 512, 256, 60.0


class Sound(NamedTuple):
    """Something to listen to and to look at."""

    name: str
    note: str
    mp3: bytes
    png: bytes  # spectrogram


class Example(NamedTuple):
    """A trial with what the model makes of it."""

    kind: str
    condition: str
    enrolled: str  # speakers
    tested: str
    rivals: list[str]
    score: float
    probability: float  # of one speaker, at even odds before listening
    sounds: list[Sound]


def hardest(trials: Trials, results: list[dict[str, Any]], system: str) -> str:
    """Return the condition with the highest error rate, of those with interferers if there are."""
    rates = eer_by_condition(results, system)
    several = {name: rate for name, rate in rates.items() if trials.conditions[name].interferers}
    chosen = several or rates
    return max(chosen, key=lambda name: chosen[name])


def choose(
    score: NDArray[np.float64], trials: Trials, many: int = OF_EACH_KIND
) -> Iterator[tuple[str, int]]:
    """Choose trials of each of KINDS by their scores, no test side twice."""
    used: set[int] = set()
    order = np.argsort(score, kind="stable")
    targets, others = (order[trials.target[order] == kind] for kind in (True, False))
    middles = (np.roll(part, -(len(part) // 2)) for part in (targets, others))
    for kind, places in zip(KINDS, (targets, others[::-1], *middles), strict=True):
        count = 0
        for trial in places:
            test = int(trials.test[trial])
            if count < many and test not in used:
                used.add(test)
                count += 1
                yield kind, int(trial)


def examples(
    model: CSC,
    audio: TrialAudio,
    chosen: list[tuple[str, int]],
    condition: str,
    calibration: Calibration,
) -> Iterator[Example]:
    """Make what there is to hear of chosen trials: enrolment, mixture, each separated slot.

    And the enrolled voice as it was extracted, where the model can.
    """
    trials, embed = audio.trials, embed_with(model)
    for kind, trial in chosen:
        enrolled, test = trials.enrolled[trials.enrolment[trial]], int(trials.test[trial])
        clean = [audio.side(int(place), CLEAN).mixture for place in enrolled]
        side = audio.side(test, condition)
        enrolment = torch.from_numpy(enrol(np.stack([embed(samples) for samples in clean])))
        mixture = torch.from_numpy(side.mixture)
        vectors, activity = model.embed(mixture)
        score, _ = best_view(vectors, activity, enrolment)
        cosines, slots = (vectors @ enrolment).tolist(), model.separate(mixture).numpy()
        sounds = [sound("enrolled", "clean", clean[0])]
        sounds.append(sound("heard", f"as it is: score {cosines[-1]:.2f}", side.mixture))
        sounds += [
            sound(
                f"slot {number}",
                f"score {cosine:.2f}, active {float(active):.0%}",
                samples,
            )
            for number, (samples, cosine, active) in enumerate(
                zip(slots, cosines[:-1], activity[:-1], strict=True), start=1
            )
        ]
        if model.config.extractor != "none":
            sounds.append(_extracted(model, mixture, enrolment, bool(trials.target[trial])))
        speakers, over = trials.speakers, trials.conditions[condition].interferers
        yield Example(
            kind,
            condition,
            str(speakers[enrolled[0]]),
            str(speakers[test]),
            [str(speakers[rival]) for rival in trials.rivals[test, :over]],
            score,
            float(calibration.probability(np.array(score), 0.5)),
            sounds,
        )


def _extracted(model: CSC, mixture: Tensor, enrolment: Tensor, there: bool) -> Sound:
    voice = model.let_through(mixture, enrolment)
    cosine, level_db = float(model.embed(voice)[0][-1] @ enrolment), float(leak_db(voice, mixture))
    whose = "is there" if there else "is not there"
    note = f"score {cosine:.2f}, {level_db:+.1f} dB over the mixture; who is asked for {whose}"
    return sound("extracted", note, voice.numpy())


def sound(name: str, note: str, samples: NDArray[np.float32]) -> Sound:
    """Encode a waveform for a browser; what would clip is made quieter."""
    safe = samples / max(1.0, float(np.abs(samples).max()))
    sink = io.BytesIO()
    soundfile.write(sink, safe, SAMPLE_RATE_HZ, format="MP3")
    return Sound(name, note, sink.getvalue(), spectrogram(safe))


def spectrogram(samples: NDArray[np.float32]) -> bytes:
    """Draw the spectrum over time as a PNG, 60 dB from black to the brightest."""
    padded = np.pad(samples, (0, max(0, SPECTRUM - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, SPECTRUM)[::HOP]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(SPECTRUM))))
    level_db = 10 * np.log10(power.T[::-1] + 1e-10)
    sink = io.BytesIO()
    top = float(level_db.max())
    pyplot().imsave(sink, level_db, cmap="magma", vmin=top - RANGE_DB, vmax=top, format="png")
    return sink.getvalue()
