"""Embeddings of test sides by many systems, computed once and kept: a file for a chunk of them.

A file is named by the test sides it holds and lies in the folder of what heard them, so whoever
scores the same model on the same sides again, or goes on after a kill, finds it. Chunks are tasks:
a loop here does them, or Ray wherever there are processors.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from csc_model.model import CONFIG_FILE, CSC, WEIGHTS_FILE
from jobs.scoring import Embed, Views, embed_mfcc, embed_with, improvement_db, padded
from pipeline.audio import to_float
from pipeline.schema import (
    Runner,
    Task,
    config_hash,
    content_id,
    of_split,
    stable_fraction,
)
from pipeline.shards import read_catalogue
from pipeline.sides import Read, Side, TrialAudio, from_store, side_id
from pipeline.storage import Folder
from pipeline.trial_sources import Source, open_source
from pipeline.trials import CLEAN, Condition, Trials

PLACES_PER_TASK = 64
MFCC = "mfcc"
MFCC_ID = "mfcc-1"
EMBED_VERSION = 1  # of what is done with a model to embed a test side


class System(NamedTuple):
    """Something that embeds, by the name it has in tables and the id of what it is."""

    name: str
    id: str


class Heard(NamedTuple):
    """What a system makes of all utterances under one condition."""

    views: Views  # (utterance, view, dim), the unseparated view last
    improvement_db: NDArray[np.float32]  # (utterance,), gain in SI-SNR; nan where nobody interferes


class Embeddings:
    """The embeddings of a source's test sides that lie in a folder, and the way to further ones."""

    def __init__(self, folder: Folder, source: Source) -> None:
        self.folder, self.source = folder, source
        self.told = {"cache": folder.uri, "source": source.model_dump_json()}
        self.trials, self.read = opened(source.model_dump_json())

    def add_model(self, name: str, model: Path) -> System:
        """Put a model where every worker finds it, and return it as a system."""
        system = System(name, weights_id(Folder.at(model)))
        folder = self.folder.child(system.id)
        if not folder.exists(CONFIG_FILE):
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                folder.put(file, model / file)
        return system

    def hear(self, systems: Sequence[System], run: Runner) -> None:
        """Embed what is not there yet of all test sides, on a GPU where a worker has one."""
        run([self.told | task for system in systems for task in self._missing(system)], embed_sides)

    def _chunks(self, condition: str) -> Iterator[list[int]]:
        """Give what is heard under a condition: all tests, and clean what is enrolled as well."""
        heard = self.trials.test
        if condition == CLEAN:
            heard = np.concatenate([heard, self.trials.enrolled.ravel()])
        wanted = np.unique(heard).tolist()
        for first in range(0, len(wanted), PLACES_PER_TASK):
            yield wanted[first : first + PLACES_PER_TASK]

    def _missing(self, system: System) -> Iterator[dict[str, Any]]:
        there = {file.name for file in self.folder.child(system.id).list()}
        names = list(self.trials.conditions)
        for together in ([CLEAN], [name for name in names if name != CLEAN]):
            for places in self._chunks(together[0]) if together else ():
                missing = [
                    name for name in together if chunk_name(self.trials, places, name) not in there
                ]
                if missing:
                    yield {"system": system.id, "places": places, "conditions": missing}

    def of(self, system: System, condition: str) -> Heard:
        """Read what a system made of a condition."""
        views, gains = None, np.full(len(self.trials.utterances), np.nan, np.float32)
        folder = self.folder.child(system.id)
        for places in self._chunks(condition):
            found = load(folder.read(chunk_name(self.trials, places, condition)))
            if views is None:
                shape = (len(self.trials.utterances), *found["views"].shape[1:])
                views = np.zeros(shape, np.float32)
            views[places], gains[places] = found["views"], found["improvement_db"]
        assert views is not None, "there are no trials without utterances"
        return Heard(views, gains)

    def model(self, system: System) -> CSC:
        """Return a model that was added, on the CPU."""
        return added_model(self.folder.uri, system.id, "cpu")

    def audio(self, trials: Sequence[int]) -> TrialAudio:
        """Read what both sides of some trials are made of."""
        some = list(trials)
        enrolled = self.trials.enrolled[self.trials.enrolment[some]].ravel()
        return self.audio_of({*enrolled.tolist(), *self.trials.test[some].tolist()})

    def audio_of(self, places: Iterable[int]) -> TrialAudio:
        """Read what the test sides of some utterances are made of."""
        return TrialAudio(self.read, self.trials, sorted(places))

    def strangers(self, system: System, most: int) -> Views:
        """Embed an utterance of each of some training speakers, `(speaker, 1, view, dim)`."""
        embed, _ = _embedder(self.folder.uri, system.id, on_device("auto"))
        store = Folder(self.source.store)
        catalogue = read_catalogue(store)
        rows = of_split(catalogue.filter(pc.equal(catalogue["kind"], "speech")), "train")
        rows = rows.sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
        names, first = np.unique(rows["speaker_id"].to_pylist(), return_index=True)
        order = np.argsort([stable_fraction(f"cohort:{name}") for name in names])  # of all corpora
        kept = rows.take(pa.array(first[order[:most]]))
        return np.stack([embed(to_float(pcm))[None] for pcm in from_store(store)(kept)])


def weights_id(model: Folder) -> str:
    """Return the id of a model's configuration and weights, and of the way that they are used."""
    content = model.read(CONFIG_FILE) + model.read(WEIGHTS_FILE)
    return content_id(content + f"embedding {EMBED_VERSION}".encode())


def chunk_name(trials: Trials, places: Sequence[int], condition: str) -> str:
    """Return the file of a chunk: a hash of its test sides."""
    sides = [side_id(trials, place, condition) for place in places]
    return f"{config_hash(sides)}.safetensors"


def on_device(name: str) -> str:
    """Return the device that `auto` means in this process, or the one that is named."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def added_model(cache: str, system: str, device: str) -> CSC:
    """Return a model that was added to a folder of embeddings, by the id of its system."""
    _, model = _embedder(cache, system, device)
    assert model is not None, "what was added is a model"
    return model


@lru_cache(maxsize=4)
def _embedder(cache: str, system: str, device: str) -> tuple[Embed, CSC | None]:
    if system == MFCC_ID:
        return embed_mfcc, None
    folder = Folder(cache).child(system)
    with folder.scratch() as scratch:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            (scratch / file).write_bytes(folder.read(file))
        model = CSC.load(scratch).to(device)
    return embed_with(model), model


@lru_cache(maxsize=2)
def opened(source: str) -> tuple[Trials, Read]:
    """Return the trials of a source, given as JSON, and what reads their audio."""
    return open_source(Source.model_validate_json(source))


def embed_sides(task: Task) -> None:
    """Embed a chunk of utterances under each condition that it lacks, and keep what comes out."""
    embed, model = _embedder(task["cache"], task["system"], on_device("auto"))
    trials, read = opened(task["source"])
    places, folder = task["places"], Folder(task["cache"]).child(task["system"])
    audio = TrialAudio(read, trials, places)
    for name in task["conditions"]:
        sides = [audio.side(place, name) for place in places]
        heard = {
            "views": np.stack([embed(side.mixture) for side in sides]),
            "improvement_db": _improvements_db(model, sides, trials.conditions[name]),
        }
        folder.put(chunk_name(trials, places, name), save(heard))


def _improvements_db(
    model: CSC | None, sides: Sequence[Side], condition: Condition
) -> NDArray[np.float32]:
    voices = 1 + condition.interferers
    if model is None or voices == 1 or voices > model.config.num_slots:
        return np.full(len(sides), np.nan, np.float32)
    device = next(model.parameters()).device
    gains = []
    for side in sides:
        mixture = torch.from_numpy(side.mixture).to(device)
        references = padded(side.voices[:voices], model.config.num_slots).to(device)
        sources = model.separate(mixture)
        gains.append(float(improvement_db(sources[None], mixture[None], references[None])))
    return np.array(gains, np.float32)
