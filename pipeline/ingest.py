"""Ingest: what lies in the corpora becomes utterances and rejects, one shard to a task.

A task reads the sources of its speakers, cuts them into speech, measures that and writes a shard
as it goes, so that a recording of any length needs no more memory than another.
"""

import errno
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipeline.audio import AudioError, Pcm, Samples, to_pcm
from pipeline.commits import commit_shard
from pipeline.decoder import own_decoder
from pipeline.errors import CscError
from pipeline.fingerprint import fingerprint
from pipeline.plan import sources_of
from pipeline.responses import READ_S, cut_response
from pipeline.schema import REJECT, SAMPLE_RATE_HZ, STORED_UTTERANCE, Task, content_id
from pipeline.segments import Piece, noise_pieces, speech_pieces
from pipeline.shards import encode, rejects_name, shard_writer, store_shard_name
from pipeline.speakers import Ear, SpeakerCheck
from pipeline.speech import Quality, SpeechConfig, measure, reject_reason
from pipeline.storage import Folder, OutsideError

ROWS_PER_GROUP = 32
REJECTS_PER_GROUP = 1 << 13
READS_AT_ONCE = 8
BYTES_AHEAD = 256 << 20  # of copies that wait on the local disk
OF_ONE_FILE = (errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO)
Row = dict[str, Any]


class Read(NamedTuple):
    """A file that was read: where it lies on this machine and its hash; or why it could not be."""

    path: Path | None
    sha256: str
    fault: AudioError | None


class Outcome(NamedTuple):
    """What became of a part of a source: a row of `STORED_UTTERANCE`, or one of `REJECT`."""

    kept: bool
    row: Row


def ingest_shard(task: Task, ear: Ear | None = None) -> None:
    """Read the sources of one shard of a plan; write its utterances and, beside them, its rejects.

    Raises:
        CscError: a store is down, or lets nobody in. Nothing is committed then.
    """
    shards, name = Folder(task["shards"]), store_shard_name(task["shard"])
    roots = {corpus: Folder(uri) for corpus, uri in task["roots"].items()}
    speech = SpeechConfig.model_validate(task["speech"])
    sources = sources_of(Folder(task["generation"]), task["shard"])
    rejects: list[Row] = []
    with shards.scratch() as scratch:
        with _Rows(scratch / name) as rows:
            for source, read in reads(sources, roots, scratch):
                for outcome in outcomes(source, read, speech, ear):
                    (rows.add if outcome.kept else rejects.append)(outcome.row)
        table = pa.Table.from_pylist(rejects, schema=REJECT)
        shards.put(rejects_name(name), encode(table, REJECTS_PER_GROUP))
        commit_shard(shards, name, scratch / name, rows.written, task["config"])


class _Rows:
    """Writes utterances to a file of the local disk, a row group at a time."""

    def __init__(self, path: Path) -> None:
        self._writer = shard_writer(str(path), STORED_UTTERANCE)
        self._group: list[Row] = []
        self.written = 0

    def __enter__(self) -> Self:
        return self

    def add(self, row: Row) -> None:
        self._group.append(row)
        if len(self._group) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._group:
            self._writer.write_table(pa.Table.from_pylist(self._group, schema=STORED_UTTERANCE))
        self.written += len(self._group)
        self._group = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()


def reads(
    sources: Iterable[Row], roots: Mapping[str, Folder], scratch: Path
) -> Iterator[tuple[Row, Read]]:
    """Give each source with its file at hand, while those after it are being read."""
    files = [list(group) for _, group in groupby(sources, itemgetter("corpus", "path"))]
    waiting: deque[tuple[list[Row], Future[Read]]] = deque()
    pool = ThreadPoolExecutor(READS_AT_ONCE)
    try:
        for number, spans in enumerate(files):
            folder = roots[spans[0]["corpus"]]
            job = pool.submit(_read, folder, spans[0], scratch / f"source-{number}")
            waiting.append((spans, job))
            ahead = sum(spans[0]["num_bytes"] for spans, _ in waiting)
            while len(waiting) > READS_AT_ONCE or (waiting and ahead > BYTES_AHEAD):
                ahead -= waiting[0][0][0]["num_bytes"]
                yield from _taken(*waiting.popleft(), scratch)
        while waiting:
            yield from _taken(*waiting.popleft(), scratch)
    finally:
        pool.shutdown(cancel_futures=True)  # where one fails for good, the others would too


def _taken(spans: list[Row], job: Future[Read], scratch: Path) -> Iterator[tuple[Row, Read]]:
    read = job.result()
    for source in spans:
        yield source, read
    if read.path is not None and read.path.parent == scratch:
        read.path.unlink()


def _read(folder: Folder, source: Row, into: Path) -> Read:
    try:
        path = folder.fetch(source["path"], into)
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return Read(None, "", AudioError("missing", "it was there when the corpus was listed"))
    except PermissionError as error:
        return Read(None, "", AudioError("denied", error.strerror or "reading is not permitted"))
    except OutsideError:
        return Read(None, "", AudioError("denied", "its name leads out of the corpus"))
    except OSError as error:
        if error.errno in OF_ONE_FILE:
            return Read(None, "", AudioError("denied", str(error.strerror)))
        raise CscError(
            f"cannot read {folder.path(source['path'])}: {error.strerror}; run again"
        ) from error
    num_bytes = path.stat().st_size
    if num_bytes != source["num_bytes"]:
        detail = f"{num_bytes} bytes, listed with {source['num_bytes']}: ingest again"
        return Read(path, sha256, AudioError("changed", detail))
    return Read(path, sha256, None)


def outcomes(source: Row, read: Read, config: SpeechConfig, ear: Ear | None) -> Iterator[Outcome]:
    """Give all that becomes of a source, in order of time; every sample is in one of them.

    A room gives one outcome, without what lies around the response.

    Raises:
        CscError: that last is not so, which would be a fault of this code.
    """
    if read.fault is not None or read.path is None:
        yield _reject(source, 0, 0, "read", read.fault or AudioError("missing", ""))
        return
    if source["kind"] == "room":
        yield _response(source, read.path, read.sha256)
        return
    blocks = _UntilFault(own_decoder().stream(read.path, source["start_s"], source["duration_s"]))
    check = SpeakerCheck(ear, source["label_kind"]) if source["kind"] == "speech" and ear else None
    cut = speech_pieces if source["kind"] == "speech" else noise_pieces
    accounted, silence = 0, None
    for piece in cut(blocks, config):
        accounted += piece.num_samples
        if piece.samples is None:
            silence = _joined(silence, piece)
            continue
        if silence is not None:
            yield _no_speech(source, silence)
            silence = None
        yield _judged(source, read.sha256, piece, config, check)
    if silence is not None:
        yield _no_speech(source, silence)
    if blocks.fault is not None:
        yield _reject(source, accounted, 0, "decode", blocks.fault)
    if check is not None:
        for start, num_samples, fault in check.others():
            yield _reject(source, start, num_samples, "speaker", fault)
    if accounted != blocks.num_samples:
        raise CscError(f"{source['path']}: samples were lost or invented; report this")


def _response(source: Row, path: Path, sha256: str) -> Outcome:
    """Keep a room impulse response, or say why not; damage anywhere costs it whole.

    Its first channel is taken: the mean of several microphones is the response of no room.
    """
    span = (source["start_s"], min(source["duration_s"] or READ_S, READ_S))
    blocks = _UntilFault(own_decoder().stream(path, *span, first_channel=True))
    samples = np.concatenate([np.zeros(0, np.float32), *blocks])
    if blocks.fault is not None:
        return _reject(source, 0, len(samples), "decode", blocks.fault)
    try:
        start_sample, pcm, quality = cut_response(samples)
    except AudioError as fault:
        return _reject(source, 0, len(samples), "quality", fault)
    return Outcome(True, _utterance(source, sha256, start_sample, pcm, quality))


class _UntilFault:
    """Blocks of audio up to where they are good; what ended them is kept in `fault`."""

    def __init__(self, blocks: Iterator[Samples]) -> None:
        self._blocks = blocks
        self.fault: AudioError | None = None
        self.num_samples = 0

    def __iter__(self) -> Iterator[Samples]:
        try:
            for block in self._blocks:
                self.num_samples += len(block)
                yield block
        except AudioError as error:
            self.fault = error


def _joined(before: Piece | None, piece: Piece) -> Piece:
    if before is None:
        return piece
    return before._replace(num_samples=before.num_samples + piece.num_samples)


def _judged(
    source: Row, sha256: str, piece: Piece, config: SpeechConfig, check: SpeakerCheck | None
) -> Outcome:
    """Keep a piece, or say why not."""
    assert piece.samples is not None
    quality = measure(piece.samples, piece.snr_db)
    reason, detail = reject_reason(piece.num_samples, quality, source["kind"], config)
    if reason:
        return _reject(
            source, piece.start_sample, piece.num_samples, "quality", AudioError(reason, detail)
        )
    fault = check.fault(piece) if check is not None else None
    if fault is not None:
        return _reject(source, piece.start_sample, piece.num_samples, "speaker", fault)
    centred = piece.samples - piece.samples.mean(dtype="float64").astype("float32")
    sound = fingerprint(centred) if source["kind"] == "speech" else b""
    pcm, start_sample = to_pcm(centred), piece.start_sample
    return Outcome(True, _utterance(source, sha256, start_sample, pcm, quality, sound))


def _utterance(
    source: Row, sha256: str, start_sample: int, samples: Pcm, quality: Quality, sound: bytes = b""
) -> Row:
    pcm = samples.tobytes()
    named = ("speaker_id", "session_id", "kind", "label_kind", "split", "gender", "corpus", "path")
    return {
        "utterance_id": content_id(pcm),
        "source_id": source["source_id"],
        **{name: source[name] for name in named},
        "file_sha256": sha256,
        "start_sample": _within_file(source, start_sample),
        "num_samples": len(samples),
        "fingerprint": sound,
        "pcm": pcm,
        **quality._asdict(),
    }


def _within_file(source: Row, start_sample: int) -> int:
    return round(source["start_s"] * SAMPLE_RATE_HZ) + start_sample


def _no_speech(source: Row, piece: Piece) -> Outcome:
    fault = AudioError("no_speech", "no voice activity")
    return _reject(source, piece.start_sample, piece.num_samples, "speech", fault)


def _reject(
    source: Row, start_sample: int, num_samples: int, stage: str, fault: AudioError
) -> Outcome:
    row = {
        "source_id": source["source_id"],
        "corpus": source["corpus"],
        "path": source["path"],
        "start_sample": _within_file(source, start_sample),
        "num_samples": num_samples,
        "stage": stage,
        "reason": fault.reason,
        "detail": fault.detail,
    }
    return Outcome(False, row)
