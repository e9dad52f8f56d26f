"""Corpora: which files there are, and whose voice is in them."""

import csv
import io
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from pipeline.errors import CscError
from pipeline.schema import SPLITS, Strict, speaker_id
from pipeline.speech import SpeechConfig
from pipeline.splits import SplitConfig, split_of
from pipeline.storage import Folder

SAMPLE_PREFIX = "sample:"
SAMPLE = Path(__file__).parent / "sample"


class CorpusConfig(Strict):
    """Where a corpus lies and how it is laid out.

    Without a manifest, every file is tried, and the first folder below the root names the speaker;
    a file beside the folders has a `pseudo` label: it stands in as its own speaker.
    A manifest is a CSV beside the audio with the columns `path` and `speaker`, and optionally
    `session`, `split` and `gender`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    root: str = Field(description="folder, s3:// address, or sample:NAME for the shipped sample")
    kind: Literal["speech", "noise"] = "speech"
    manifest: str | None = None
    licence: str = "unstated"


class IngestConfig(Strict):
    """What to read, and what to keep of it."""

    corpora: list[CorpusConfig] = Field(min_length=1)
    speech: SpeechConfig = SpeechConfig()
    splits: SplitConfig = SplitConfig()
    source_mb_per_shard: float = Field(
        32.0, gt=0, description="encoded audio that one task reads and turns into one shard"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [corpus.name for corpus in self.corpora]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"corpora of one name: {', '.join(sorted(twice))}; rename one")
        return self


class AudioFile(NamedTuple):
    """A file of a corpus with what is known of it before it is opened."""

    corpus: str
    path: str
    num_bytes: int
    kind: str
    speaker_id: str
    session_id: str
    split: str
    gender: str
    label_kind: str


def corpus_folder(corpus: CorpusConfig) -> Folder:
    """Return the folder of a corpus; `sample:NAME` is part of this package."""
    if corpus.root.startswith(SAMPLE_PREFIX):
        name = corpus.root.removeprefix(SAMPLE_PREFIX)
        return Folder.at(SAMPLE).child(name)
    return Folder.at(corpus.root)


def list_corpus(corpus: CorpusConfig, splits: SplitConfig) -> list[AudioFile]:
    """List the audio of a corpus, sorted by path, from one listing and at most one manifest.

    Raises:
        CscError: the folder is missing or empty, or the manifest names what is not there.
    """
    folder = corpus_folder(corpus)
    sizes = {file.name: file.num_bytes for file in folder.list()}
    if not sizes:
        raise CscError(
            f"corpus {corpus.name!r}: {folder.uri} does not exist or is empty; check its root"
        )
    if corpus.manifest is None:
        rows = [_row_of_path(name) for name in sizes]
    else:
        rows = _manifest_rows(folder, corpus.manifest)
    missing = next((row["path"] for row in rows if row["path"] not in sizes), None)
    if missing is not None:
        folder.path(missing)  # a name that leads outside is refused as such
        raise CscError(f"corpus {corpus.name!r}: {missing} of its manifest is not in {folder.uri}")
    files = [_audio_file(corpus, row, sizes[row["path"]], splits) for row in rows]
    return sorted(files, key=lambda file: file.path)


def _row_of_path(path: str) -> dict[str, str]:
    """Take the first folder for the speaker; a loose file stands in as its own."""
    first, inside, _ = path.partition("/")
    return {"path": path, "speaker": first, "label_kind": "given" if inside else "pseudo"}


def _manifest_rows(folder: Folder, name: str) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(folder.read(name).decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise CscError(f"{folder.path(name)} is not UTF-8; save it as such") from error
    rows = list(reader)
    lacking = {"path", "speaker"} - set(reader.fieldnames or ())
    if lacking:
        raise CscError(f"{folder.path(name)}: no column {', '.join(sorted(lacking))}; add it")
    for line, row in enumerate(rows, start=2):
        if not row["path"] or not row["speaker"]:
            raise CscError(f"{folder.path(name)} line {line}: path or speaker is empty; fill it in")
    twice = [path for path, count in Counter(row["path"] for row in rows).items() if count > 1]
    if twice:
        raise CscError(f"{folder.path(name)}: {twice[0]} stands twice; correct it")
    return rows


def _audio_file(
    corpus: CorpusConfig, row: dict[str, str], num_bytes: int, splits: SplitConfig
) -> AudioFile:
    path, speaker = row["path"], speaker_id(corpus.name, row["speaker"])
    session = row.get("session") or PurePosixPath(path).with_suffix("").as_posix()
    split = row.get("split") or split_of(speaker, splits)
    if split not in SPLITS:
        raise CscError(
            f"corpus {corpus.name!r}: {path} is in split {split!r}; use one of {', '.join(SPLITS)}"
        )
    return AudioFile(
        corpus.name,
        path,
        num_bytes,
        corpus.kind,
        speaker,
        f"{speaker}/{session}",
        split,
        row.get("gender") or "",
        row.get("label_kind", "given"),
    )
