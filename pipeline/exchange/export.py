"""Export: the mixtures of a dataset as WAV files, with the lists that other tools read.

Shards are read row group by row group and lists are written as they grow, so that a dataset of any
size takes the same memory. WAV files that an earlier run wrote are kept.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import soundfile

from pipeline.audio import Pcm
from pipeline.datasets import Dataset
from pipeline.errors import CscError
from pipeline.exchange.formats import FORMATS, Format, Wanted
from pipeline.exchange.unpack import Mixture, mixtures_of, rooms_of, signals
from pipeline.schema import SAMPLE_RATE_HZ, OnProgress
from pipeline.storage import PART, READS_AT_ONCE, Folder

MARKER = "csc-export.json"
WAV_HEADER_BYTES = 44


class Exported(NamedTuple):
    """What an export did."""

    mixtures: int  # that are told of in the lists
    written: int  # WAV files; the others were there
    left_out: Counter[str]  # mixtures that the format cannot tell, by reason
    lists: list[str]  # names within the folder


def export(
    wanted: Wanted,
    out: Folder,
    form: str,
    on_progress: OnProgress,
    *,
    limit: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the mixtures of a split, or the first `limit` of them, into a folder.

    `form` is one of `FORMATS`. A WAV file that is there with the right length is kept, unless
    `overwrite`.

    Raises:
        CscError: the folder holds something else, the dataset is damaged or has no such split.
    """
    dataset, split = wanted.dataset, wanted.split
    count = dataset.config.mixing.conditions * _episodes(wanted)
    total = count if limit is None else min(count, limit)
    kind = FORMATS[form]
    with _claimed(out, kind.mark(wanted)).scratch() as scratch:
        lists = kind(wanted, out, scratch)
        there = {} if overwrite else {file.name: file.num_bytes for file in out.list()}
        writer = _Writer(dataset, out, lists, there)
        done = 0
        with ThreadPoolExecutor(READS_AT_ONCE, "csc-export") as pool:
            for mixtures in _chunks(islice(mixtures_of(dataset, split), total)):
                writer.put(mixtures, pool)
                done += len(mixtures)
                on_progress(done, total)
        return Exported(writer.mixtures, writer.written, writer.left_out, lists.put())


def _episodes(wanted: Wanted) -> int:
    """Return how many episodes all passes of the split have."""
    dataset, split = wanted.dataset, wanted.split
    places = [place for place in dataset.places if place[0] == split]
    if not places:
        raise CscError(
            f"{dataset.folder.uri} has no mixtures of split {split!r}: choose among "
            f"{', '.join(dict.fromkeys(place[0] for place in dataset.places)) or 'none'}"
        )
    return sum(record.rows for _, turn in places for record in dataset.shards(split, turn))


def _claimed(out: Folder, mark: Mapping[str, Any]) -> Folder:
    """Return the folder, which is empty or has an export of the same kind, and mark it so."""
    names = [file.name for file in out.list() if not file.name.startswith(PART)]
    if names and (MARKER not in names or out.read_json(MARKER) != mark):
        raise CscError(
            f"{out.uri} is not empty and holds no export like this one "
            f"({json.dumps(mark)}): choose another --out"
        )
    out.put_json(MARKER, mark)
    out.sweep()
    return out


def _chunks(mixtures: Iterator[Mixture]) -> Iterator[list[Mixture]]:
    while chunk := list(islice(mixtures, READS_AT_ONCE)):
        yield chunk


class _Writer:
    """Writes what is not there yet, and counts."""

    def __init__(
        self, dataset: Dataset, out: Folder, lists: Format, there: Mapping[str, int]
    ) -> None:
        self.out, self.lists, self.there = out, lists, there
        self.bank = rooms_of(dataset)
        self.mixtures = self.written = 0
        self.left_out: Counter[str] = Counter()

    def put(self, mixtures: list[Mixture], pool: ThreadPoolExecutor) -> None:
        """Write the WAV files of some mixtures side by side, and list them in their order."""
        told = []
        for mixture in mixtures:
            reason = self.lists.refusal(mixture)
            if reason is None:
                told.append(mixture)
            else:
                self.left_out[reason] += 1
        self.written += sum(pool.map(self._wavs, told))
        self.mixtures += len(told)
        for mixture in told:
            self.lists.add(mixture)

    def _wavs(self, mixture: Mixture) -> int:
        size = WAV_HEADER_BYTES + 2 * mixture.num_samples
        names = self.lists.names(mixture)
        missing = [part for part, name in names.items() if self.there.get(name) != size]
        rendered = signals(mixture, self.bank) if missing else {}
        for part in missing:
            self.out.put(names[part], _wav(rendered[part]))
        return len(missing)


def _wav(pcm: Pcm) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE_HZ, "PCM_16", format="WAV")
    return buffer.getvalue()
