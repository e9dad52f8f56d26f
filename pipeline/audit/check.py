"""Check: does a dataset hold what its build promised?

Every shard is read once: its size, its hash and its record, then its rows. Some are made anew from
the store. All that is wrong is told, not only the first of it.
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.audit.files import MISSING, look_at, misnumbered
from pipeline.audit.recipes import planned_tasks, remade, sampled, unplanned
from pipeline.audit.rows import Known, Seen
from pipeline.build import dataset_id, speakers_of
from pipeline.casting import as_mixed
from pipeline.commits import DONE, ShardRecord
from pipeline.datasets import Dataset, read_dataset
from pipeline.episodes import UNREADABLE
from pipeline.errors import CscError
from pipeline.rooms import rooms_of
from pipeline.schema import ROOMS_FILE, SPEAKERS_FILE, OnProgress, of_split
from pipeline.shards import INDEX, read_catalogue
from pipeline.storage import Folder

SAMPLE = 3  # shards made anew
SHARDS_AT_ONCE = 4


class Finding(NamedTuple):
    """Something that is not as it should be."""

    where: str  # path or address
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class Report(NamedTuple):
    """What a check found."""

    findings: list[Finding]
    notes: list[str]  # what could not be checked, and why
    shards: int
    episodes: int
    remade: int


def check(
    folder: Folder,
    store: Folder | None,
    *,
    forgotten: frozenset[str] = frozenset(),
    sample: int | None = SAMPLE,
    on_progress: OnProgress = lambda *_: None,
) -> Report:
    """Check a dataset against itself and, where that is still there, the store it was built from.

    `store` is the generation that the index names, `forgotten` the ids of utterances that were
    removed on request, `sample` how many shards are made anew (None: all).

    Raises:
        CscError: no index is there that can be read, or the storage is down.
    """
    return _Check(read_dataset(folder), store, forgotten, sample, on_progress).report()


class _Check:
    """The findings about one dataset while they come in."""

    def __init__(
        self,
        dataset: Dataset,
        store: Folder | None,
        forgotten: frozenset[str],
        sample: int | None,
        on_progress: OnProgress,
    ) -> None:
        self.dataset, self.store = dataset, store
        self.forgotten, self.sample = forgotten, sample
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self._room_splits: NDArray[np.object_] | None = np.empty(0, object)
        count = len(dataset.records)
        self._done, self._total = 0, count
        if store is not None:
            self._total += count if sample is None else min(sample, count)
        self._on_progress = on_progress
        imported = dataset.store is None
        self.again = "import it again" if imported else "run csc build again"
        self.anew = f"remove the dataset and {self.again}"
        self.complete = f"remove {INDEX} and {self.again}, only what is missing is made"
        self.redo = f"remove it and {self.complete.removeprefix('remove ')}"

    def report(self) -> Report:
        """Look at everything."""
        catalogue = self._catalogue()
        speakers = self._speakers(catalogue)
        rooms = self._rooms(catalogue)
        self._index(speakers)
        self._listing()
        known = self._known(speakers, catalogue)
        seen = self._shards(known)
        sound = [record for record in self.dataset.records if record.name in seen]
        self._numbers(seen)
        self._apart(seen)
        done = 0
        if self.store is not None and catalogue is not None:
            done = self._recipes(self.store, catalogue, rooms, sound)
        rows = sum(len(one.numbers) for one in seen.values())
        return Report(self.findings, self.notes, len(self.dataset.records), rows, done)

    def _find(self, name: str, what: str, remedy: str) -> None:
        self.findings.append(Finding(self.dataset.folder.path(name), what, remedy))

    def _advance(self, count: int = 1) -> None:
        self._done += count
        self._on_progress(self._done, self._total)

    def _catalogue(self) -> pa.Table | None:
        """Read what the store holds, or note why that cannot be."""
        if self.dataset.store is None:
            self.notes.append("it was imported, not built from a store: no shard was made anew")
        elif self.store is None:
            self.notes.append(
                f"store {self.dataset.store} is not in the workspace any more: it was removed, or "
                "csc forget changed it; no shard was made anew"
            )
        else:
            try:
                return as_mixed(read_catalogue(self.store), self.dataset.config.mixing)
            except (CscError, *UNREADABLE) as error:
                what = f"its catalogue cannot be read, {error}"
                self.findings.append(Finding(self.store.uri, what, "run csc ingest --fresh"))
        return None

    def _table(self, name: str) -> pa.Table | None:
        """Read a table that lies beside the shards."""
        try:
            with self.dataset.folder.open_input(name) as file:
                return pq.read_table(file, page_checksum_verification=True)
        except (CscError, *UNREADABLE) as error:
            if self.dataset.folder.exists(name):
                self._find(name, f"is damaged ({error})", self.redo)
            else:
                self._find(name, MISSING, self.complete)
        return None

    def _speakers(self, catalogue: pa.Table | None) -> pa.Table | None:
        there = self._table(SPEAKERS_FILE)
        built = None if catalogue is None else speakers_of(catalogue)
        if there is not None and built is not None and not there.equals(built):
            self._find(SPEAKERS_FILE, "does not list the speakers of the store", self.anew)
        return there if built is None else built

    def _rooms(self, catalogue: pa.Table | None) -> pa.Table | None:
        if not self.dataset.config.mixing.ever("room_share"):
            return None
        there = self._table(ROOMS_FILE)
        self._room_splits = None if there is None else there["split"].to_numpy()
        if catalogue is None or self.store is None:
            return there
        try:
            built = rooms_of(self.store, catalogue)
        except (CscError, *UNREADABLE) as error:
            self.findings.append(
                Finding(self.store.uri, f"its rooms cannot be read, {error}", "run csc ingest")
            )
            return there
        if there is not None and not there.equals(built):
            self._find(ROOMS_FILE, "does not hold the rooms of the store", self.anew)
        return built

    def _known(self, speakers: pa.Table | None, catalogue: pa.Table | None) -> Known:
        stored = None
        if catalogue is not None:
            names = catalogue.group_by("speaker_id").aggregate([("split", "min")])
            columns = (names[name].to_pylist() for name in ("speaker_id", "split_min"))
            stored = dict(zip(*columns, strict=True))
        return Known(speakers, stored, self._room_splits, self.forgotten)

    def _index(self, speakers: pa.Table | None) -> None:
        """Compare the index with what its own fields, and the speakers, make it be."""
        dataset = self.dataset
        if dataset.store is not None:
            name = dataset_id({"id": dataset.store}, dataset.config, dataset.seed)
            if name != dataset.id:
                what = f"its id is {dataset.id}, and store, build and seed in it make {name}"
                self._find(INDEX, f"{what}: it was changed by hand", self.anew)
        listed = dataset.about.get("speakers")
        if speakers is not None and listed is not None:
            names = of_split(speakers, "train")["speaker_id"].to_pylist()
            if names != listed:
                self._find(INDEX, f"its speakers are not those of {SPEAKERS_FILE}", self.anew)
        for record in dataset.records:
            if dataset.place(record) is None:
                self._find(INDEX, f"names {record.name!r}, which no shard is called", self.anew)

    def _listing(self) -> None:
        """Name the files that belong to nothing."""
        shards = {record.name for record in self.dataset.records}
        known = shards | {name + DONE for name in shards} | {INDEX, SPEAKERS_FILE}
        known |= {ROOMS_FILE} if self.dataset.config.mixing.ever("room_share") else set()
        for file in self.dataset.folder.list():
            if file.name not in known:
                self._find(file.name, "belongs to nothing that the index names", "remove it")

    def _shards(self, known: Known) -> dict[str, Seen]:
        """Read all shards, several at a time, and return what those hold that are whole."""
        seen: dict[str, Seen] = {}
        records = [record for record in self.dataset.records if self.dataset.place(record)]
        with tempfile.TemporaryDirectory(prefix="csc-check-") as scratch:
            pool = ThreadPoolExecutor(SHARDS_AT_ONCE, "csc-check")
            try:
                work = partial(look_at, self.dataset, known, Path(scratch))
                for record, (faults, found) in zip(records, pool.map(work, records), strict=True):
                    for name, what in faults:
                        self._find(name, what, self.complete if what == MISSING else self.redo)
                    if found is not None:
                        seen[record.name] = found
                        for what in found.faults:
                            self._find(record.name, f"has {what}", self.redo)
                    self._advance()
            finally:
                pool.shutdown(cancel_futures=True)
        return seen

    def _numbers(self, seen: Mapping[str, Seen]) -> None:
        """Assert that the episodes of each split are numbered 0, 1, .., through all its passes."""
        dataset = self.dataset
        missing = {split for split, count in dataset.episodes.items() if count}
        for split in sorted(missing - {split for split, _ in dataset.places}):
            self._find(INDEX, f"names no shard of split {split!r}", self.anew)
        for split, turn in dataset.places:
            records, due = dataset.shards(split, turn), dataset.episodes.get(split, 0)
            whole = all(record.name in seen for record in records)
            parts = [seen[record.name].numbers for record in records if record.name in seen]
            here = np.concatenate([np.empty(0, np.int64), *parts])
            where = f"pass {turn} of split {split!r}"
            for what, numbers in misnumbered(here, turn * due, due, whole):
                shown = ", ".join(map(str, numbers[:5].tolist())) + ", .." * (len(numbers) > 5)
                self._find(INDEX, f"{where}: {len(numbers)} episode(s) {what}: {shown}", self.anew)

    def _apart(self, seen: Mapping[str, Seen]) -> None:
        """Assert of the mixtures alone that no speaker is in those of two splits."""
        voices: dict[str, set[str]] = {}
        for split, turn in self.dataset.places:
            for record in self.dataset.shards(split, turn):
                if record.name in seen:
                    voices.setdefault(split, set()).update(seen[record.name].voices)
        for (one, some), (other, others) in combinations(sorted(voices.items()), 2):
            for name in sorted(some & others):
                what = f"{name} is in mixtures of {one!r} and of {other!r}"
                self.findings.append(Finding(self.dataset.folder.uri, what, self.anew))

    def _recipes(
        self,
        store: Folder,
        catalogue: pa.Table,
        rooms: pa.Table | None,
        sound: list[ShardRecord],
    ) -> int:
        """Make some shards anew; return how many."""
        try:
            tasks = planned_tasks(self.dataset, store, catalogue, rooms)
        except CscError as error:
            self._find(INDEX, f"cannot have been built from {store.uri}, {error}", self.anew)
            return 0
        for name, what in unplanned(self.dataset, tasks):
            self._find(name, what, self.anew)
        if self._room_splits is None:
            self.notes.append(f"without {ROOMS_FILE} no shard was made anew")
            return 0
        chosen, count = sampled(self.dataset, sound, self.sample), 0
        for one in remade(self.dataset, tasks, speakers_of(catalogue), chosen, self._advance):
            count += one.failure is None
            if one.failure is not None:
                mend = "restore the store, or run csc ingest --fresh"
                self._find(one.name, f"cannot be made anew, {one.failure}", mend)
            elif one.difference is not None:
                mend = f"it was edited, or another csc made it: {self.redo}"
                self._find(one.name, one.difference, mend)
        return count
