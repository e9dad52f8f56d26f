"""Arrays to listen to: two test speakers in simulated rooms, and what beams make of them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csc_model.beamform import beamform
from csc_model.losses import si_snr_db
from csc_model.model import CSC
from jobs.examples import Sound, sound
from jobs.scoring import evenly, matched, padded
from pipeline.arrays import ArrayConfig, array_recipe, array_scene
from pipeline.sides import TrialAudio
from pipeline.trials import CLEAN, Trials

ARRAY = ArrayConfig(microphones=4)
FLOOR_DB = -20.0  # of the mask on a beam, as far as csc beamform recommends it


class ArrayExample(NamedTuple):
    """Two voices in a room, as they are heard by one microphone and by all."""

    about: str
    sounds: list[Sound]


def choose_talkers(trials: Trials, many: int) -> list[tuple[int, int]]:
    """Choose pairs of utterances of two speakers each, evenly among the non-target trials."""
    chosen = evenly(np.flatnonzero(~trials.target), many)
    enrolled = trials.enrolled[trials.enrolment[chosen], 0]
    return list(zip(enrolled.tolist(), trials.test[chosen].tolist(), strict=True))


def array_examples(
    model: CSC, audio: TrialAudio, talkers: list[tuple[int, int]], seed: int
) -> Iterator[ArrayExample]:
    """Make what there is to hear of pairs of utterances, in a room each.

    Which slot is whose is known here, as it is where SI-SNRi is measured.
    """
    for index, pair in enumerate(talkers):
        dry = [audio.side(place, CLEAN).mixture.astype(np.float64) for place in pair]
        length, recipe = min(map(len, dry)), array_recipe(seed, index, ARRAY)
        scene = array_scene(recipe, np.stack([one[:length] for one in dry]), seed, index)
        mixture, images = (torch.from_numpy(part).float() for part in scene)
        names = " and ".join(str(audio.trials.speakers[place]) for place in pair)
        about = (
            f"{names}, equally loud, {ARRAY.microphones} microphones {ARRAY.spacing_m * 100:g} cm "
            f"apart, reverberation {recipe.rt60_s:.2f} s"
        )
        yield ArrayExample(about, list(_sounds(model, mixture, images)))


@torch.inference_mode()
def _sounds(model: CSC, mixture: Tensor, images: Tensor) -> Iterator[Sound]:
    slots = padded(images.numpy(), model.config.num_slots)
    sources = matched(model.separate(mixture[0])[None], slots[None])[0, : len(images)]
    made = {
        "one microphone": sources,
        "beam": beamform(mixture, sources, 0, refine=True).float(),
        "beam and mask": beamform(mixture, sources, 0, FLOOR_DB, refine=True).float(),
        "beam by the oracle's mask": beamform(mixture, images, 0).float(),
    }
    before = si_snr_db(mixture[0].expand_as(images), images)
    yield sound("microphone 1", "as it is", mixture[0].numpy())
    for name, voices in made.items():
        gains_db = (si_snr_db(voices, images) - before).tolist()
        for number, (voice, gain_db) in enumerate(zip(voices, gains_db, strict=True), start=1):
            yield sound(f"voice {number}, {name}", f"SI-SNRi {gain_db:+.1f} dB", voice.numpy())
