"""Where trials come from: a split of a store, or a list of audio files."""

import io
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.schema import CATALOGUE, OnProgress, Strict, config_hash
from pipeline.shards import encode, read_catalogue
from pipeline.sides import Read, from_store
from pipeline.storage import Folder
from pipeline.trial_lists import (
    FileReader,
    catalogue_of,
    read_voxceleb,
    speakers_of,
    trials_of_pairs,
)
from pipeline.trials import TrialConfig, Trials, make_trials


class ListedTrials(Strict):
    """A list in VoxCeleb's format, and what is known of its files."""

    path: str
    root: str  # that its paths are below
    catalogue: str  # URI of the folder of the table of its files
    name: str  # of the table there: a hash of the list


class Source(Strict):
    """What trials are made of, so that any worker makes the same."""

    store: str
    split: str
    trials: TrialConfig
    seed: int
    given: ListedTrials | None


def open_source(source: Source) -> tuple[Trials, Read]:
    """Return trials and what reads their audio.

    Raises:
        CscError: a list or a file cannot be used, or there are too few speakers.
    """
    if source.given is None:
        store = Folder(source.store)
        trials = make_trials(read_catalogue(store), source.split, source.trials, source.seed)
        return trials, from_store(store)
    given = source.given
    table = pq.read_table(io.BytesIO(Folder(given.catalogue).read(given.name)), schema=CATALOGUE)
    pairs = read_voxceleb(Path(given.path))
    trials = trials_of_pairs(pairs, table, source.trials, source.seed)
    return trials, FileReader(Path(given.root))


def listed(path: Path, root: Path, kept: Folder, on_progress: OnProgress) -> ListedTrials:
    """Look at all files of a list once, and keep what is found.

    Raises:
        CscError: the list or one of its files cannot be used.
    """
    pairs = read_voxceleb(path)
    place = str(root.resolve())
    reader = FileReader(root)
    stamps = [reader.stamp(name) for name in sorted(speakers_of(pairs))]
    name = f"list-{config_hash([place, [list(pair) for pair in pairs], stamps])}.parquet"
    if not kept.exists(name):
        table = catalogue_of(pairs, reader, on_progress)
        kept.put(name, encode(table, 1 << 16))
    return ListedTrials(path=str(path.resolve()), root=place, catalogue=kept.uri, name=name)
