"""LibriMix as a dataset: its metadata become recipes, its sources dry lines of mixture shards.

Each row is an episode of one condition: source 1 in the target's slot, the other sources after it,
the noise in the last slot. The sum of the lines after their gains is LibriMix's mixture.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.commits import ShardRecord, commit_shard, committed_shards
from pipeline.episodes import NUMBERS, Numbers, account, listed
from pipeline.exchange.librimix_audio import Dry, dry_lines
from pipeline.exchange.librimix_metadata import LibriMix
from pipeline.lines import Canvas, pcm_level_dbfs
from pipeline.mixing import Condition, Recipe, Source
from pipeline.planning import BUILT_SPLITS
from pipeline.schema import (
    DATASET_VERSION,
    EPISODE,
    SAMPLE_RATE_HZ,
    SPEAKERS_FILE,
    OnProgress,
    of_split,
    speaker_id,
)
from pipeline.shards import INDEX, encode, shard_writer
from pipeline.storage import READS_AT_ONCE, Folder

NOWHERE = -1  # shard and row of a source that is in no utterance store


def import_librimix(dataset: Folder, mixtures: LibriMix, on_progress: OnProgress) -> Any:
    """Import mixtures into a dataset named by their id and return its index.

    A finished dataset is returned as it is; of an unfinished one, the shards that are there are
    kept.

    Raises:
        CscError: naming row and file, when a source is missing, damaged or of another kind.
    """
    if dataset.exists(INDEX):
        return dataset.read_json(INDEX)
    dataset.sweep()
    dataset.put(SPEAKERS_FILE, encode(mixtures.speakers, len(mixtures.speakers)))
    records = list(_kept(dataset, mixtures))
    number, first = len(records), sum(record.rows for record in records)
    on_progress(first, len(mixtures.rows))
    groups = _groups(mixtures, first)
    waiting = next(groups, None)
    while waiting is not None:
        rest = _Rest(waiting, groups)
        record = _write_shard(dataset, mixtures, _shard_name(mixtures, number), rest)
        number, first, waiting = number + 1, first + record.rows, rest.waiting
        on_progress(first, len(mixtures.rows))
    return _finish(dataset, mixtures)


def _shard_name(mixtures: LibriMix, number: int) -> str:
    return f"{mixtures.config.split}-000-{number:05d}.parquet"


def _kept(dataset: Folder, mixtures: LibriMix) -> Iterator[ShardRecord]:
    """Yield the shards that are there from the first on: each begins where the last one ends."""
    done = committed_shards(dataset, mixtures.id)
    for number in range(len(done)):
        record = done.get(_shard_name(mixtures, number))
        if record is None:
            return
        yield record


class _Group(NamedTuple):
    """Episodes that are written, and read, in one go."""

    table: pa.Table
    speakers: set[int]

    @property
    def num_bytes(self) -> int:
        return sum(cell.as_buffer().size for cell in self.table["pcm"])


@dataclass
class _Rest:
    """What is not written yet: a group, and those that come after it."""

    waiting: _Group | None
    groups: Iterator[_Group]


def _write_shard(dataset: Folder, mixtures: LibriMix, name: str, rest: _Rest) -> ShardRecord:
    """Write as many groups as fit into one shard, at least one, and commit it."""
    room, speakers = int(mixtures.config.shard_mb * 1e6), set[int]()
    numbers: list[pa.Table] = []
    with dataset.scratch() as scratch:
        path = scratch / name
        with shard_writer(str(path), EPISODE) as writer:
            while (group := rest.waiting) is not None:
                room -= group.num_bytes
                if numbers and room < 0:
                    break
                writer.write_table(group.table, row_group_size=len(group.table))
                numbers.append(group.table.select(NUMBERS))
                speakers |= group.speakers
                rest.waiting = next(rest.groups, None)
            table = pa.concat_tables(numbers)
            writer.add_key_value_metadata(Numbers.packed(table))
        about = account(table, speakers)
        return commit_shard(dataset, name, path, len(table), mixtures.id, about)


def _groups(mixtures: LibriMix, first: int) -> Iterator[_Group]:
    """Yield groups of episodes from one on."""
    row_of = {name: row for row, name in enumerate(mixtures.speakers["speaker_id"].to_pylist())}
    size, tables, speakers = mixtures.build.episodes_per_group, [], set[int]()
    for canvas in _canvases(mixtures, first):
        tables.append(canvas.table(row_of))
        speakers |= {row_of[voice] for voice in canvas.voices}
        if len(tables) == size:
            yield _Group(pa.concat_tables(tables).combine_chunks(), speakers)
            tables, speakers = [], set[int]()
    if tables:
        yield _Group(pa.concat_tables(tables).combine_chunks(), speakers)


def _canvases(mixtures: LibriMix, first: int) -> Iterator[Canvas]:
    """Yield episodes in their order, while the sources of some more are read in threads."""
    pool = ThreadPoolExecutor(READS_AT_ONCE, "csc-librimix")
    waiting: deque[Future[Canvas]] = deque()
    try:
        for episode in range(first, len(mixtures.rows)):
            waiting.append(pool.submit(_canvas, mixtures, episode))
            if len(waiting) > READS_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Filled(Canvas):
    """An episode whose lines are there at once."""

    def fill(self, lines: Sequence[Dry], gains_db: Sequence[float]) -> None:
        """Put each line in its place, and remember by how much it is louder than its source."""
        for place, (line, gain_db) in enumerate(zip(lines, gains_db, strict=True)):
            self.pcm[place, : len(line.pcm)] = line.pcm
            self.gains_db[place, 0], self._scale_db[place] = gain_db, line.louder_db
            self.levels_dbfs[place] = pcm_level_dbfs(line.pcm)


def _canvas(mixtures: LibriMix, episode: int) -> Canvas:
    row = mixtures.rows[episode]
    lines, length = dry_lines(
        row, mixtures.speech, mixtures.noise, mixtures.config.mode, mixtures.num_samples
    )
    canvas = _Filled([_recipe(mixtures, episode, lines)], length, len(row.voices) + 1)
    gains_db = [one.gain_db for one in (*row.voices, row.noise) if one is not None]
    canvas.fill(lines, gains_db[: len(lines)])  # without a root for noise there is no line of it
    return canvas


def _recipe(mixtures: LibriMix, episode: int, lines: Sequence[Dry]) -> Recipe:
    row = mixtures.rows[episode]
    speakers = [mixtures.speaker(row, place) for place in range(len(row.voices))]
    named = list(zip(row.voices, speakers, strict=True))
    if row.noise is not None:
        named.append((row.noise, speaker_id("noise", row.noise.path)))
    sources = [
        Source(
            condition=0,
            slot=slot,
            utterance_id=line.utterance_id,
            speaker_id=named[slot][1],
            shard=NOWHERE,
            row=NOWHERE,
            offset=0,
            num_samples=len(line.pcm),
            onset=0,
            utterance_dbfs=pcm_level_dbfs(line.pcm),
            level_dbfs=None,
            room=-1,
        )
        for slot, line in enumerate(lines)
    ]
    return Recipe(episode, speakers[0], False, [Condition(None, None, None, fixed=True)], sources)


def _finish(dataset: Folder, mixtures: LibriMix) -> Any:
    records = sorted(committed_shards(dataset, mixtures.id).values(), key=itemgetter(0))
    episodes = dict.fromkeys(BUILT_SPLITS, 0)
    episodes[mixtures.config.split] = sum(record.rows for record in records)
    index = {
        "version": DATASET_VERSION,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "id": mixtures.id,
        "store": None,
        "seed": None,
        "num_samples": mixtures.num_samples,
        "config": {
            "build": mixtures.build.model_dump(),
            "ingest": None,
            "librimix": mixtures.config.model_dump(),
        },
        "speakers": of_split(mixtures.speakers, "train")["speaker_id"].to_pylist(),
        "episodes": episodes,
        "shards": [listed(record) for record in records],
    }
    dataset.put_json(INDEX, index)
    return index
