"""Trial lists in VoxCeleb's format: `label enrolment test` in a line, audio files below a root."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.audio import Pcm, load, to_float, to_pcm
from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.schema import CATALOGUE, OnProgress, content_id
from pipeline.speech import active_level_dbfs
from pipeline.strangers import Runs, draw_strangers
from pipeline.trials import (
    MAX_RIVALS,
    NONE,
    TrialConfig,
    Trials,
    possible,
)
from pipeline.voices import MIN_SPEAKERS

FOLDERS, TARGETS = "first folders", "target trials"  # what may tell who speaks in a file


class Pair(NamedTuple):
    """A line of VoxCeleb's format."""

    target: bool
    enrolment: str
    test: str


def read_voxceleb(path: Path) -> list[Pair]:
    """Read `label enrolment test` lines.

    Raises:
        CscError: there is no such file, or a line is none; the message names it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CscError(f"{path}: {error}; give a trial list") from error
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or words[0] not in {"0", "1"}:
            raise CscError(
                f"{path}, line {number}: {line[:80]!r} is not `label enrolment test` with a label "
                "of 0 or 1"
            )
        pairs.append(Pair(words[0] == "1", words[1], words[2]))
    if {pair.target for pair in pairs} != {False, True}:
        raise CscError(f"{path}: trials of both labels, 0 and 1, are needed")
    return pairs


class Speakers(NamedTuple):
    """A speaker for each file, and what tells who it is."""

    of: dict[str, str]
    by: str  # FOLDERS or TARGETS


def speakers_of(pairs: Sequence[Pair]) -> Speakers:
    """Return who speaks in the files of a list.

    The first folder of a path is its speaker, as in VoxCeleb, if no trial contradicts that: files
    of a target trial share theirs, those of another trial do not. Else files of a target trial have
    the same speaker, named by the first of them, and two that no chain of target trials joins
    count as different people.
    """
    folder = {
        name: name.partition("/")[0] for pair in pairs for name in (pair.enrolment, pair.test)
    }
    if all(pair.target == (folder[pair.enrolment] == folder[pair.test]) for pair in pairs):
        return Speakers(folder, FOLDERS)
    return Speakers(_joined(pairs), TARGETS)


def _joined(pairs: Iterable[Pair]) -> dict[str, str]:
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for pair in pairs:
        for name in (pair.enrolment, pair.test):
            parent.setdefault(name, name)
        if pair.target:
            one, other = sorted((root(pair.enrolment), root(pair.test)))
            parent[other] = one
    return {name: root(name) for name in parent}


class FileReader:
    """Reads audio files below a root."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def __call__(self, rows: pa.Table) -> list[Pcm]:
        read = [self.one(name) for name in rows["path"].to_pylist()]
        for pcm, row in zip(read, rows.to_pylist(), strict=True):
            if content_id(pcm.tobytes()) != row["utterance_id"]:
                raise CscError(f"{row['path']} below {self.root} has changed: run again")
        return read

    def stamp(self, name: str) -> list[Any]:
        """Return what changes when a file does: its name, bytes and time.

        Raises:
            CscError: it cannot be read, or leads out of the root.
        """
        try:
            about = self._inside(name).stat()
        except OSError as error:
            raise CscError(f"{self.root / name}: {error.strerror}; see the list") from error
        return [name, about.st_size, about.st_mtime_ns]

    def one(self, name: str) -> Pcm:
        """Read a file as mono int16.

        Raises:
            CscError: it lies outside of the root, or cannot be used.
        """
        return to_pcm(load(self._inside(name)))

    def _inside(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root):
            raise CscError(f"{name} leads out of {self.root}: trials name files below their root")
        return path


def catalogue_of(pairs: Sequence[Pair], read: FileReader, on_progress: OnProgress) -> pa.Table:
    """Return rows like those of a store's catalogue, for all files of a list, sorted by speaker.

    Every file is decoded once, to name it by its content.

    Raises:
        CscError: a file cannot be used.
    """
    speakers = speakers_of(pairs).of
    ordered = sorted(speakers, key=lambda name: (speakers[name], name))
    rows = []
    for done, name in enumerate(ordered, start=1):
        pcm = read.one(name)
        rows.append(
            dict.fromkeys(CATALOGUE.names)
            | {
                "utterance_id": content_id(pcm.tobytes()),
                "speaker_id": speakers[name],
                "session_id": name,
                "gender": "",
                "path": name,
                "kind": "speech",
                "num_samples": len(pcm),
                "level_dbfs": active_level_dbfs(to_float(pcm)),
            }
        )
        on_progress(done, len(ordered))
    return pa.Table.from_pylist(rows, CATALOGUE)


def trials_of_pairs(
    pairs: Sequence[Pair], utterances: pa.Table, config: TrialConfig, seed: int
) -> Trials:
    """Make trials of a list; interferers are drawn of speakers whom a test is not compared with.

    Raises:
        CscError: there are too few speakers.
    """
    place = {name: row for row, name in enumerate(utterances["path"].to_pylist())}
    enrolled = sorted({place[pair.enrolment] for pair in pairs})
    number = {row: count for count, row in enumerate(enrolled)}
    enrolment = np.array([number[place[pair.enrolment]] for pair in pairs])
    test = np.array([place[pair.test] for pair in pairs])
    _, speaker = np.unique(utterances["speaker_id"].to_pylist(), return_inverse=True)
    if speaker.max() + 1 < MIN_SPEAKERS:
        raise CscError(
            f"the list has {speaker.max() + 1} speaker(s), as far as its {speakers_of(pairs).by} "
            f"tell: {MIN_SPEAKERS} are needed"
        )
    conditions, skipped = possible(config.conditions, {"noise": 0, "room": 0}, "the list")
    rivals = _rivals(speaker, np.array(enrolled)[enrolment], test, seed)
    fewest = int((rivals[np.unique(test)] != NONE).sum(1).min())
    for name, its in list(conditions.items()):
        if its.interferers > fewest:
            skipped[name] = "a test of the list is compared with nearly all of its speakers"
            del conditions[name]
    none = np.full(len(utterances), NONE)
    target = np.array([pair.target for pair in pairs])
    return Trials(
        conditions,
        skipped,
        utterances,
        utterances.slice(0, 0),
        utterances.slice(0, 0),
        rivals,
        none,
        none,
        np.array(enrolled)[:, None],
        enrolment,
        test,
        target,
    )


def _rivals(speaker: np.ndarray, enrolled: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Draw utterances of MAX_RIVALS speakers, or as many as there are, for each test.

    They are of speakers whom the test is not compared with.
    """
    rivals, utterances = np.full((len(speaker), MAX_RIVALS), NONE), Runs.of(speaker)
    order = np.argsort(test, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(test[order])) + 1)
    for run in runs:
        place = int(test[run[0]])
        known = {int(speaker[place]), *speaker[enrolled[run]].tolist()}
        draws = Draws(stream_key(seed, "trials", "list"), place)
        drawn = draw_strangers(utterances, speaker, known, MAX_RIVALS, draws)
        rivals[place, : len(drawn)] = drawn
    return rivals
