"""Ingest: corpora become the utterance store and the table of what was not kept.

A task reads the files of its speakers, writes their shard and its rejects. The catalogue and the
index come last and make the store exist; a second run skips what is complete.
"""

import hashlib
from collections import Counter, defaultdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.audio import AudioError, Samples, decode_16k, to_pcm
from pipeline.corpora import AudioFile, IngestConfig, corpus_folder, list_corpus
from pipeline.errors import CscError
from pipeline.schema import (
    CATALOGUE,
    REJECT,
    SAMPLE_RATE_HZ,
    STORE_VERSION,
    STORED_UTTERANCE,
    UTTERANCE,
    Runner,
    Task,
    config_hash,
    content_id,
    stable_fraction,
)
from pipeline.shards import CATALOGUE_FILE, INDEX, encode, open_shard, store_shard_name
from pipeline.speech import Quality, SpeechConfig, cut, measure, reject_reason
from pipeline.splits import check_disjoint
from pipeline.storage import Folder, commit_shard, committed_shards

ROWS_PER_GROUP = 32
REJECTS_FILE = "rejects.parquet"
Row = dict[str, Any]


def list_corpora(config: IngestConfig) -> list[AudioFile]:
    """List the files of all corpora."""
    return [file for corpus in config.corpora for file in list_corpus(corpus, config.splits)]


def ingest(store: Folder, config: IngestConfig, listing: list[AudioFile], run: Runner) -> Any:
    """Read the listed files into a store named by `store_id` and return its index.

    A finished store is returned as it is, an unfinished one is completed.

    Raises:
        CscError: none of the audio can be kept, or a speaker is in two splits.
    """
    if store.exists(INDEX):
        return store.read_json(INDEX)
    name = store_id(config, listing)
    done = committed_shards(store, name)
    common = {
        "store": store.uri,
        "config": name,
        "speech": config.speech.model_dump(),
        "roots": {corpus.name: corpus_folder(corpus).uri for corpus in config.corpora},
    }
    tasks = [
        common | {"shard": shard, "files": [file._asdict() for file in files]}
        for shard, files in _assign(listing, config).items()
        if store_shard_name(shard) not in done
    ]
    run(tasks, ingest_shard)
    return _finish(store, name, config, listing)


def store_id(config: IngestConfig, listing: list[AudioFile]) -> str:
    """Return the name of the store that this configuration makes of these files.

    Files are told apart by name and size. Where the corpora lie does not matter, so local copies
    and a bucket give the same store.
    """
    described = config.model_dump()
    for corpus in described["corpora"]:
        del corpus["root"]
    return config_hash([STORE_VERSION, described, listing])


def _assign(listing: list[AudioFile], config: IngestConfig) -> dict[int, list[AudioFile]]:
    """Place files by a hash of the speaker; noise has shards of its own, after those of speech."""
    shards: dict[int, list[AudioFile]] = defaultdict(list)
    first = 0
    for kind in ("speech", "noise"):
        files = [file for file in listing if file.kind == kind]
        num_bytes = sum(file.num_bytes for file in files)
        count = -(-num_bytes // int(config.source_mb_per_shard * 1e6))
        for file in files:
            shards[first + int(stable_fraction(file.speaker_id) * count)].append(file)
        first += count
    return dict(sorted(shards.items()))


def ingest_shard(task: Task) -> None:
    """Read, measure and write the utterances of one shard, and say of the others why not."""
    store, speech = Folder(task["store"]), SpeechConfig.model_validate(task["speech"])
    kept: list[Row] = []
    rejects: list[Row] = []
    for fields in task["files"]:
        file = AudioFile(**fields)
        rows, refused = _utterances(file, Folder(task["roots"][file.corpus]), speech)
        kept += rows
        rejects += refused
    name = store_shard_name(task["shard"])
    table = pa.Table.from_pylist(kept, schema=STORED_UTTERANCE)
    table = table.sort_by([(key, "ascending") for key in ("speaker_id", "path", "start_sample")])
    refused_table = pa.Table.from_pylist(rejects, schema=REJECT)
    store.put(_rejects_name(name), encode(refused_table, ROWS_PER_GROUP))
    commit_shard(store, name, encode(table, ROWS_PER_GROUP), len(table), task["config"])


def _rejects_name(shard_name: str) -> str:
    return shard_name.replace("shard-", "rejects-")


def _utterances(
    file: AudioFile, folder: Folder, config: SpeechConfig
) -> tuple[list[Row], list[Row]]:
    """Return the rows of one file: utterances and rejects."""
    try:
        data = folder.read(file.path)
        samples = decode_16k(data)
    except AudioError as error:
        return [], [_reject(file, "decode", error.reason, error.detail)]
    except CscError as error:
        return [], [_reject(file, "read", "unreadable", str(error))]
    kept, rejects = [], []
    digest = hashlib.sha256(data).hexdigest()
    for start, end in cut(samples, config):
        quality = measure(samples[start:end])
        reason, detail = reject_reason(end - start, quality, config)
        if reason:
            rejects.append(_reject(file, "speech", reason, detail, start))
        else:
            kept.append(_utterance(file, digest, samples[start:end], start, quality))
    return kept, rejects


def _utterance(file: AudioFile, digest: str, segment: Samples, start: int, quality: Quality) -> Row:
    pcm = to_pcm(segment).tobytes()
    return {
        "utterance_id": content_id(pcm),
        "speaker_id": file.speaker_id,
        "session_id": file.session_id,
        "kind": file.kind,
        "label_kind": file.label_kind,
        "split": file.split,
        "gender": file.gender,
        "corpus": file.corpus,
        "path": file.path,
        "file_sha256": digest,
        "start_sample": start,
        "num_samples": len(segment),
        "pcm": pcm,
        **quality._asdict(),
    }


def _reject(file: AudioFile, stage: str, reason: str, detail: str, start: int = 0) -> Row:
    return dict(
        zip(REJECT.names, (file.corpus, file.path, start, stage, reason, detail), strict=True)
    )


def _finish(store: Folder, name: str, config: IngestConfig, listing: list[AudioFile]) -> Any:
    """Write catalogue, rejects and, last of all, the index."""
    records = sorted(committed_shards(store, name).values())
    tables = [_without_audio(store, record.name) for record in records]
    catalogue, duplicates = _deduplicate(pa.concat_tables(tables).combine_chunks())
    refused = [pq.read_table(store.open_input(_rejects_name(record.name))) for record in records]
    rejects = pa.concat_tables([*refused, duplicates])
    _check_complete(listing, catalogue, rejects, sum(record.rows for record in records))
    reasons = Counter(rejects["reason"].to_pylist())
    if not len(catalogue):
        raise CscError(f"nothing in the corpora can be kept: {dict(reasons)}; give other audio")
    check_disjoint(catalogue)
    store.put(REJECTS_FILE, encode(rejects, ROWS_PER_GROUP))
    store.put(CATALOGUE_FILE, encode(catalogue, 1 << 16))
    index = {
        "version": STORE_VERSION,
        "id": name,
        "config": config.model_dump(),
        "files": len(listing),
        "kept": len(catalogue),
        "rejected": dict(sorted(reasons.items())),
        "seconds": round(pc.sum(catalogue["num_samples"]).as_py() / SAMPLE_RATE_HZ, 3),
        "speakers": _speakers_by_split(catalogue),
        "licences": {corpus.name: corpus.licence for corpus in config.corpora},
        "shards": [record._asdict() for record in records],
    }
    store.put_json(INDEX, index)
    return index


def _without_audio(store: Folder, name: str) -> pa.Table:
    table = open_shard(store, name).read(columns=UTTERANCE.names)
    shard = pa.array([int(name.split("-")[1].split(".")[0])] * len(table), pa.int32())
    rows = pa.array(range(len(table)), pa.int32())
    return table.append_column("shard", shard).append_column("row", rows).cast(CATALOGUE)


def _deduplicate(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Keep the first of equal contents, by speaker and path, and reject the others by name."""
    table = table.sort_by([(key, "ascending") for key in ("speaker_id", "path", "start_sample")])
    first: dict[str, str] = {}
    keep, rejects = [], []
    columns = ("utterance_id", "corpus", "path", "start_sample")
    for content, corpus, path, start in zip(*(table[c].to_pylist() for c in columns), strict=True):
        original = first.setdefault(content, f"{corpus}/{path}@{start}")
        keep.append(original == f"{corpus}/{path}@{start}")
        if not keep[-1]:
            detail = f"the same audio as {original}"
            row = (corpus, path, start, "duplicates", "duplicate", detail)
            rejects.append(dict(zip(REJECT.names, row, strict=True)))
    kept = table.filter(pa.array(keep, pa.bool_()))
    kept = kept.sort_by([("shard", "ascending"), ("row", "ascending")])
    return kept, pa.Table.from_pylist(rejects, schema=REJECT)


def _check_complete(
    listing: list[AudioFile], catalogue: pa.Table, rejects: pa.Table, stored: int
) -> None:
    """Assert that every file is kept or rejected, and every stored row in the catalogue or not."""
    duplicates = pc.sum(pc.equal(rejects["reason"], "duplicate")).as_py() or 0
    seen = {
        pair
        for table in (catalogue, rejects)
        for pair in zip(table["corpus"].to_pylist(), table["path"].to_pylist(), strict=True)
    }
    if seen != {(file.corpus, file.path) for file in listing} or (
        len(catalogue) + duplicates != stored
    ):
        raise CscError(
            "ingest lost or invented rows: remove the store and run again, and report it"
        )


def _speakers_by_split(catalogue: pa.Table) -> dict[str, int]:
    speech = catalogue.filter(pc.equal(catalogue["kind"], "speech"))
    counts = speech.group_by("split").aggregate([("speaker_id", "count_distinct")])
    pairs = zip(
        counts["split"].to_pylist(), counts["speaker_id_count_distinct"].to_pylist(), strict=True
    )
    return dict(sorted(pairs))
