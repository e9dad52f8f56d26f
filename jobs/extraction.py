"""Target-speaker extraction on test sides: who is asked for, and what comes out.

Each test side is asked, under every condition, for the voice of its target and for one that is not
in it, both by other recordings: those of a target and of a non-target trial. Beside the extractor
stands what a model can do without: the separated slot whose voice is the nearest. What is measured
is kept beside the embeddings, a file for a few test sides.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from csc_model.extraction import leak_db
from csc_model.longform import Voices
from csc_model.losses import SILENT, si_snr_db
from csc_model.model import CSC
from jobs.embedding import Embeddings, System, added_model, on_device, opened
from jobs.scoring import embed_with, enrol, evenly, nearest_slot
from jobs.words import Recogniser, recogniser_named, word_errors
from pipeline.schema import Runner, Task, config_hash
from pipeline.sides import Side, TrialAudio, side_id
from pipeline.storage import Folder
from pipeline.strangers import Places
from pipeline.trials import CLEAN, NONE, Trials

SIDES_PER_TASK = 8
EXTRACTION_VERSION = 2  # of what is measured
LEAST_DB = -30.0  # of SI-SNR, as its most is 30 dB
Floats = NDArray[np.float32]


class Pairs(NamedTuple):
    """Trials by which the same test sides are asked for two voices; places in the trials."""

    target: Places  # (side,), of who speaks there
    absent: Places  # (side,), of who does not

    def chunks(self) -> Iterator[Self]:
        """Part them into those of one task each."""
        for first in range(0, len(self.target), SIDES_PER_TASK):
            yield type(self)(*(trials[first : first + SIDES_PER_TASK] for trials in self))


class Measured(NamedTuple):
    """What was measured under one condition; an output is of the nearest slot, or extracted."""

    si_snr_db: Floats  # (side, signal, voice), of the mixture and both outputs, the target first
    kept_db: Floats  # (side, output), the level over the target's own
    left_db: Floats  # (side, output), over the mixture, of a voice that is not there
    words: Floats  # (side, 1 + signal), in the voice alone, errors in the rest; nan: nobody asked
    cosine: Floats  # (side, 2), of what was extracted with who was asked for: target, absent


def choose_pairs(trials: Trials, most: int) -> Pairs:
    """Choose test sides evenly among those that have a trial of either kind, and one of each.

    An enrolment is never by the test's own recording, and who is absent is no rival either.
    """
    _, speaker = np.unique(trials.speakers, return_inverse=True)
    enrolled = trials.enrolled[trials.enrolment]
    rivals = trials.rivals[trials.test]
    over = ((speaker[rivals] == speaker[enrolled[:, :1]]) & (rivals != NONE)).any(1)
    itself = (enrolled == trials.test[:, None]).any(1)
    own, others = (
        np.flatnonzero(kind) for kind in (trials.target & ~itself, ~trials.target & ~over)
    )
    chosen = evenly(np.intersect1d(trials.test[own], trials.test[others]), most)
    return Pairs(*(_one_of_each(kind, trials.test[kind], chosen) for kind in (own, others)))


def _one_of_each(places: Places, test: Places, chosen: Places) -> Places:
    """Return a trial for each test side, by turns the first, second, .. that it has."""
    found = []
    for turn, side in enumerate(chosen):
        its = places[test == side]
        found.append(its[turn % len(its)])
    return np.array(found, np.int64)


def measure(
    embeddings: Embeddings, system: System, pairs: Pairs, run: Runner, recogniser: str | None
) -> dict[str, Measured]:
    """Ask for the voices of pairs under each condition; what was measured before is read."""
    trials, folder = embeddings.trials, embeddings.folder.child(system.id)
    there = {file.name for file in folder.list()}
    tasks = []
    for part in pairs.chunks():
        missing = [
            name for name in trials.conditions if _file(trials, part, name, recogniser) not in there
        ]
        if missing:
            asked = {key: places.tolist() for key, places in part._asdict().items()}
            tasks.append(
                embeddings.told
                | {"system": system.id, "conditions": missing, "pairs": asked}
                | {"recogniser": recogniser}
            )
    run(tasks, measure_sides)
    found = {}
    for name in trials.conditions:
        parts = [
            load(folder.read(_file(trials, part, name, recogniser))) for part in pairs.chunks()
        ]
        arrays = (np.concatenate([part[key] for part in parts]) for key in Measured._fields)
        found[name] = Measured(*arrays)
    return found


def _file(trials: Trials, pairs: Pairs, condition: str, recogniser: str | None) -> str:
    """Return the file of a chunk: a hash of its test sides, enrolments, and who hears words."""
    ids = trials.utterances["utterance_id"]
    sides = [side_id(trials, place, condition) for place in trials.test[pairs.target].tolist()]
    by = [
        [ids[place].as_py() for place in trials.enrolled[trials.enrolment[trial]].tolist()]
        for trial in np.concatenate(pairs).tolist()
    ]
    return f"extraction-{config_hash([EXTRACTION_VERSION, sides, by, recogniser])}.safetensors"


def measure_sides(task: Task) -> None:
    """Ask for both voices of a chunk's test sides under the conditions that it lacks."""
    model = added_model(task["cache"], task["system"], on_device("auto"))
    trials, read = opened(task["source"])
    pairs = Pairs(*(np.array(task["pairs"][key], np.int64) for key in Pairs._fields))
    enrolled = trials.enrolled[trials.enrolment[np.stack(pairs)]]  # (voice, side, utterance)
    tests, folder = trials.test[pairs.target].tolist(), Folder(task["cache"]).child(task["system"])
    hear = None if task["recogniser"] is None else recogniser_named(task["recogniser"])
    audio = TrialAudio(read, trials, sorted({*tests, *enrolled.ravel().tolist()}))
    vectors = unit_vectors(model, audio, enrolled)
    for name in task["conditions"]:
        found = measure_condition(model, audio, tests, name, vectors, hear)
        folder.put(_file(trials, pairs, name, task["recogniser"]), save(found._asdict()))


def measure_condition(
    model: CSC,
    audio: TrialAudio,
    tests: Sequence[int],
    condition: str,
    vectors: Tensor,
    recogniser: Recogniser | None = None,
) -> Measured:
    """Ask test sides under a condition for the voices of unit vectors `(voice, side, dim)`."""
    many = 1 + audio.trials.conditions[condition].interferers
    found = [
        measure_side(model, audio.side(place, condition), many, vectors[:, number], recogniser)
        for number, place in enumerate(tests)
    ]
    return Measured(*(np.stack(parts) for parts in zip(*found, strict=True)))


def unit_vectors(model: CSC, audio: TrialAudio, enrolled: Places) -> Tensor:
    """Return unit vectors `(.., dim)` of those who are enrolled by places `(.., utterance)`."""
    used, at = np.unique(enrolled, return_inverse=True)
    embed = embed_with(model)
    clean = np.stack([embed(audio.side(place, CLEAN).mixture) for place in used.tolist()])
    return torch.from_numpy(enrol(clean[at.reshape(enrolled.shape)]))


@torch.inference_mode()
def measure_side(
    model: CSC, side: Side, voices: int, vectors: Tensor, recogniser: Recogniser | None = None
) -> Measured:
    """Ask a test side, in which so many speak, for the voices of unit vectors `(2, dim)`.

    The target's and that of who is absent. Returns its row of each array.
    """
    mixture, heard = torch.from_numpy(side.mixture), Voices()
    slots = torch.cat(list(model.separated(mixture, heard)), -1)
    known, activity = (part.cpu() for part in heard.mean())
    nearest = [slots[nearest_slot(known, activity, whose)] for whose in vectors]
    extracted = torch.stack([model.let_through(mixture, whose) for whose in vectors])
    made = torch.stack([mixture, nearest[0], extracted[0]])
    words = torch.full((1 + len(made),), torch.nan)
    if recogniser is not None:
        words = torch.from_numpy(word_errors(recogniser, side.voices[0], list(made.numpy())))
    again, _ = model.embed(extracted)
    found = (
        ratios_db(made, torch.from_numpy(side.voices[:voices])),
        leak_db(made[1:], torch.from_numpy(side.voices[0])),
        leak_db(torch.stack([nearest[1], extracted[1]]), mixture),
        words,
        (again[:, -1].cpu() * vectors).sum(-1),
    )
    return Measured(*(part.float().numpy() for part in found))


def ratios_db(signals: Tensor, voices: Tensor) -> Tensor:
    """Return the SI-SNR of signals `(signal, time)` with voices `(voice, time)`, -30 to 30 dB.

    `(signal, voice)`. Silence has the least with any voice: nothing of it was let through.
    """
    found = si_snr_db(signals.unsqueeze(1), voices).clamp_min(LEAST_DB)
    silent = signals.square().mean(-1, keepdim=True) < SILENT
    return found.masked_fill(silent, LEAST_DB)
