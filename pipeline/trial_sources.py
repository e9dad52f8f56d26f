"""Where trials come from: a split of a store, a table of its utterances, or a list of files."""

import io
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.errors import CscError
from pipeline.schema import CATALOGUE, OnProgress, Strict, config_hash, content_id
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
from pipeline.trial_tables import trials_of_table
from pipeline.trials import TrialConfig, Trials, make_trials


class ListedTrials(Strict):
    """A list in VoxCeleb's format, and what is known of its files."""

    path: str
    root: str  # that its paths are below
    catalogue: str  # URI of the folder of the table of its files
    name: str  # of the table there: a hash of the list
    speakers_by: str  # what tells who speaks in a file: see `speakers_of`


class TabledTrials(Strict):
    """A table of trials of a store, kept where every worker finds it."""

    kept: str  # URI of the folder of the table
    table: str  # its name there: a hash of it


Given = ListedTrials | TabledTrials


class Source(Strict):
    """What trials are made of, so that any worker makes the same."""

    store: str
    split: str
    trials: TrialConfig
    seed: int
    given: Given | None


def open_source(source: Source) -> tuple[Trials, Read]:
    """Return trials and what reads their audio.

    Raises:
        CscError: a list or a file cannot be used, or there are too few speakers.
    """
    given, store = source.given, Folder(source.store)
    if given is None:
        trials = make_trials(read_catalogue(store), source.split, source.trials, source.seed)
        return trials.reduced(), from_store(store)
    if isinstance(given, TabledTrials):
        data = Folder(given.kept).read(given.table)
        return trials_of_table(data, read_catalogue(store), given.table), from_store(store)
    table = pq.read_table(io.BytesIO(Folder(given.catalogue).read(given.name)), schema=CATALOGUE)
    pairs = read_voxceleb(Path(given.path))
    trials = trials_of_pairs(pairs, table, source.trials, source.seed)
    return trials, FileReader(Path(given.root))


def tabled(path: Path, store: Folder, kept: Folder) -> TabledTrials:
    """Check a table of trials of a store, and keep it.

    Raises:
        CscError: it cannot be read, or is of another store; see `trials_of_table`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CscError(f"{path}: {error.strerror}; give a table as csc trials writes it") from error
    trials_of_table(data, read_catalogue(store), str(path))
    name = f"trials-{content_id(data)}.tsv"
    kept.put(name, data)
    return TabledTrials(kept=kept.uri, table=name)


def listed(path: Path, root: Path, kept: Folder, on_progress: OnProgress) -> ListedTrials:
    """Look at all files of a list once, and keep what is found.

    Raises:
        CscError: the list or one of its files cannot be used.
    """
    pairs = read_voxceleb(path)
    place = str(root.resolve())
    reader = FileReader(root)
    speakers = speakers_of(pairs)
    stamps = [reader.stamp(name) for name in sorted(speakers.of)]
    parts = [place, [list(pair) for pair in pairs], stamps, speakers.by]
    name = f"list-{config_hash(parts)}.parquet"
    if not kept.exists(name):
        table = catalogue_of(pairs, reader, on_progress)
        kept.put(name, encode(table, 1 << 16))
    return ListedTrials(
        path=str(path.resolve()),
        root=place,
        catalogue=kept.uri,
        name=name,
        speakers_by=speakers.by,
    )
