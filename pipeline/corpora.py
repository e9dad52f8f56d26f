"""Corpora: which recordings there are, and whose voice is in them."""

import posixpath
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.errors import CscError
from pipeline.layouts import LayoutConfig, Row, rows
from pipeline.schema import LISTING, SPLITS, Strict, config_hash, speaker_id
from pipeline.speech import SpeechConfig
from pipeline.splits import SplitConfig, split_of
from pipeline.storage import File, Folder

SAMPLE_PREFIX, SHIPPED = "sample:", "shipped"
SAMPLE = Path(__file__).parent / "sample"
DESCRIPTIONS = Path(__file__).parent / "descriptions"
ROWS_PER_BATCH = 1 << 16
WAY_KEYS = frozenset(("layout", "pattern", "manifest"))
GENDERS = {"male": "m", "male_masculine": "m", "female": "f", "female_feminine": "f"}


class CorpusConfig(LayoutConfig):
    """Where a corpus lies, what it is, and how it is laid out.

    `like` names a ready description; what is set here goes before what that says.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    root: str = Field(description="folder, s3:// or gs:// address, or sample:NAME (shipped)")
    like: str | None = None
    kind: Literal["speech", "noise", "room"] = Field(
        "speech", description="of a room, every recording is one impulse response"
    )
    split: Literal["train", "valid", "test"] | None = Field(
        None, description="where all of it goes; else where the source says, else by speaker"
    )
    licence: str = "unstated"
    language: str = "unstated"

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        like = given.get("like") if isinstance(given, dict) else None
        if not isinstance(like, str):
            return given
        ready = {path.stem: path for path in sorted(DESCRIPTIONS.glob("*.toml"))}
        if like not in ready:
            raise ValueError(f"there is no description {like!r}; use one of {', '.join(ready)}")
        described = tomllib.loads(ready[like].read_text())
        if not WAY_KEYS.isdisjoint(given):  # another way to lay it out replaces the ready one
            described = {key: described[key] for key in described.keys() - WAY_KEYS}
        return described | given


class IngestConfig(Strict):
    """What to read, and what to keep of it."""

    corpora: list[CorpusConfig] = Field(min_length=1)
    speech: SpeechConfig = SpeechConfig()
    splits: SplitConfig = SplitConfig()
    source_mb_per_shard: float = Field(
        32.0, gt=0, description="encoded audio that one task reads and turns into one shard"
    )
    purity: str | None = Field(
        None,
        description="speaker model, as models:/csc-speaker-encoder@champion, that rejects "
        "what is not of one speaker",
    )
    purity_threshold: float | None = Field(
        None, ge=-1, le=1, description="cosine of one speaker; without it, the model's own"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [corpus.name for corpus in self.corpora]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"corpora of one name: {', '.join(sorted(twice))}; rename one")
        return self


def corpus_folder(corpus: CorpusConfig) -> Folder:
    """Return the folder of a corpus; `sample:NAME` is part of this package."""
    if corpus.root.startswith(SAMPLE_PREFIX):
        name = corpus.root.removeprefix(SAMPLE_PREFIX)
        return Folder.at(SAMPLE).child(name)
    return Folder.at(corpus.root)


def list_corpora(config: IngestConfig) -> pa.Table:
    """List the recordings of all corpora, in their order, as LISTING rows."""
    return pa.concat_tables(list_corpus(corpus, config.splits) for corpus in config.corpora)


def list_corpus(corpus: CorpusConfig, splits: SplitConfig) -> pa.Table:
    """List the recordings of a corpus, or the spans its manifest names, as LISTING rows.

    They are sorted by path and start. It takes one listing of the folder and at most a few
    manifests; no audio is opened.

    Raises:
        CscError: there is nothing to list, audio fits no pattern, a manifest is wrong or names
            what is not there, a span stands twice, or a recording is in two splits.
    """
    folder = corpus_folder(corpus)
    files = {file.name: file for file in folder.list()}
    if corpus.root.startswith(SAMPLE_PREFIX):  # the same whenever and wherever it was installed
        files = {name: file._replace(version=SHIPPED) for name, file in files.items()}
    if not files:
        raise CscError(
            f"corpus {corpus.name!r}: {folder.uri} does not exist or is empty; check its root"
        )
    entries = (_entry(corpus, row, file, splits) for row, file in _found(corpus, folder, files))
    batches = [_batch(chunk) for chunk in iter(lambda: list(islice(entries, ROWS_PER_BATCH)), [])]
    if not batches:
        raise CscError(
            f"corpus {corpus.name!r}: none of the {len(files)} files in {folder.uri} is audio that "
            f"the layout {corpus.way!r} names; check its root and layout"
        )
    table = pa.Table.from_batches(batches).sort_by(
        [(key, "ascending") for key in ("path", "start_s", "duration_s")]
    )
    _check_spans(corpus, table)
    return table


def _found(
    corpus: CorpusConfig, folder: Folder, files: dict[str, File]
) -> Iterator[tuple[Row, File]]:
    """Pair what the layout names with the files, and complain of what is missing in one go."""
    first, missing = "", 0
    for row in rows(corpus, folder, files):
        file = files.get(row.path)
        if file:
            yield row, file
        else:
            first, missing = first or row.path, missing + 1
    if missing:
        folder.path(first)  # a name that leads outside is refused as such
        others = f", nor are {missing - 1} other rows" if missing > 1 else ""
        raise CscError(
            f"corpus {corpus.name!r}: {first} of its manifest is not in {folder.uri}{others}; "
            "correct the paths, or set strip_prefix or path_template"
        )


def _entry(corpus: CorpusConfig, row: Row, file: File, splits: SplitConfig) -> tuple[Any, ...]:
    """Return a LISTING row; a recording of nobody known stands in as its own speaker."""
    speaker = speaker_id(corpus.name, row.speaker or row.path)
    said = corpus.splits.get(row.split, row.split)
    split = corpus.split or said or split_of(speaker, splits)
    if split not in SPLITS:
        raise CscError(
            f"corpus {corpus.name!r}: {row.path} is in split {split!r}; use one of "
            f"{', '.join(SPLITS)}, or say which it is in splits = {{{split!r} = ...}}"
        )
    gender = row.gender.lower()
    return (
        config_hash([corpus.name, row.path, row.start_s, row.duration_s]),
        corpus.name,
        row.path,
        file.num_bytes,
        file.version,
        corpus.kind,
        speaker,
        f"{speaker}/{row.session or posixpath.splitext(row.path)[0]}",
        split,
        GENDERS.get(gender, gender),
        "given" if row.speaker else "pseudo",
        row.start_s,
        row.duration_s,
    )


def _batch(entries: list[tuple[Any, ...]]) -> pa.RecordBatch:
    """Turn rows into columns, a batch at a time: as Python objects they take several times more."""
    columns = zip(*entries, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, LISTING, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=LISTING)


def _check_spans(corpus: CorpusConfig, table: pa.Table) -> None:
    """Assert of a sorted listing that no span stands twice and no recording is in two splits."""

    def repeats(key: str) -> Any:
        return pc.equal(table[key][1:].combine_chunks(), table[key][:-1].combine_chunks())

    same_file = repeats("path")
    twice = pc.and_(same_file, pc.and_(repeats("start_s"), repeats("duration_s")))
    torn = pc.and_not(same_file, repeats("split"))
    for wrong, problem in (
        (twice, "stands twice; correct its manifest"),
        (torn, "has speakers of two splits; give them the same in the manifest, or set split"),
    ):
        place = pc.index(wrong, True).as_py()
        if place >= 0:
            raise CscError(f"corpus {corpus.name!r}: {table['path'][place].as_py()} {problem}")
