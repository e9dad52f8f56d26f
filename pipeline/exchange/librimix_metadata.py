"""LibriMix metadata: rows that name speech and noise files, each with a linear gain."""

import csv
import hashlib
import io
import math
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import pyarrow as pa
from pydantic import Field, ValidationError

from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.errors import CscError
from pipeline.schema import DATASET_VERSION, SPEAKERS, Strict, config_hash, speaker_id
from pipeline.storage import Folder

Mode = Literal["min", "max"]
FEWEST_VOICES, MOST_VOICES = 2, 4


class Gained(NamedTuple):
    """A file below a root, and the linear factor that its samples are multiplied by."""

    path: str
    gain: float

    @property
    def gain_db(self) -> float:
        return 20 * math.log10(self.gain)


class MixtureRow(NamedTuple):
    """One mixture of a metadata file."""

    where: str  # "FILE row NUMBER": for messages
    voices: tuple[Gained, ...]
    noise: Gained | None


def read_rows(name: str, text: str) -> list[MixtureRow]:
    """Read a metadata file, `name` being what messages call it.

    Raises:
        CscError: naming the row that has no such columns, or a gain that is no positive number.
    """
    reader = csv.DictReader(io.StringIO(text))
    columns = set(reader.fieldnames or [])
    count = 0
    while {f"source_{count + 1}_path", f"source_{count + 1}_gain"} <= columns:
        count += 1
    if not FEWEST_VOICES <= count <= MOST_VOICES:
        raise CscError(
            f"{name} has columns for {count} sources, {FEWEST_VOICES} to {MOST_VOICES} can be "
            "imported: give a file as LibriMix's create_librimix_metadata.py writes it, with "
            "mixture_ID, source_1_path, source_1_gain, .., noise_path, noise_gain"
        )
    parts = [f"source_{place}" for place in range(1, count + 1)]
    rows = []
    for number, row in enumerate(reader, start=1):
        where = f"{name} row {number}"
        voices = tuple(_gained(row, part, where) for part in parts)
        noise = _gained(row, "noise", where) if row.get("noise_path") else None
        rows.append(MixtureRow(where, voices, noise))
    if not rows:
        raise CscError(f"{name} has no rows: give a file with mixtures")
    return rows


def _gained(row: Mapping[str, str | None], part: str, where: str) -> Gained:
    path, text = row[f"{part}_path"], row.get(f"{part}_gain")
    try:
        gain = float(text or "")
    except ValueError:
        gain = math.nan
    if not path or not 0 < gain < math.inf:
        raise CscError(
            f"{where}: {part}_path is {path!r} and {part}_gain {text!r}; a path and a factor above "
            "0 are wanted: correct the file"
        )
    return Gained(path, gain)


def speaker_of(path: str, where: str) -> str:
    """Return the speaker of a LibriSpeech path, `split/speaker/chapter/file`.

    Raises:
        CscError: the path has fewer folders.
    """
    parts = path.split("/")
    if len(parts) < 3 or not parts[-3]:
        raise CscError(f"{where}: {path!r} is no path of LibriSpeech, split/speaker/chapter/file")
    return parts[-3]


class LibriMixConfig(Strict):
    """What an imported dataset depends on, besides the files that its metadata name."""

    metadata: list[str] = Field(description="hashes of the files, in their order")
    mode: Mode = "min"
    seconds: float | None = Field(None, gt=0.1, le=30, description="none: mixtures stay whole")
    split: Literal["train", "valid"] = "train"
    corpus: str = Field("librispeech", pattern=r"^[^/]+$", description="part of speakers' ids")
    noisy: bool = False
    shard_mb: float = BuildConfig().shard_mb


@dataclass(frozen=True)
class LibriMix:
    """Mixtures to be imported, and where their sources lie."""

    rows: Sequence[MixtureRow]
    speech: Folder
    noise: Folder | None
    config: LibriMixConfig

    @classmethod
    def of(
        cls,
        metadata: Sequence[str],
        speech: Folder,
        noise: Folder | None = None,
        **options: Any,
    ) -> Self:
        """Read metadata files; `options` are those of `LibriMixConfig`.

        Raises:
            CscError: a file cannot be read, rows are of different kinds, or an option is wrong.
        """
        rows, hashes = [], []
        for uri in metadata:
            data = _folder_of(uri).read(posixpath.basename(uri))
            hashes.append(hashlib.blake2b(data, digest_size=16).hexdigest())
            rows += read_rows(posixpath.basename(uri), data.decode("utf-8-sig", "replace"))
        if len({len(row.voices) for row in rows}) != 1:
            raise CscError("the metadata files differ in how many sources they mix: import each")
        noisy = noise is not None and any(row.noise for row in rows)
        try:
            config = LibriMixConfig(metadata=hashes, noisy=noisy, **options)
        except ValidationError as error:
            problem = error.errors()[0]
            raise CscError(f"{problem['loc'][0]}: {problem['msg']}; correct the option") from error
        return cls(rows, speech, noise, config)

    @cached_property
    def id(self) -> str:
        """The name of the dataset that is made of these."""
        return config_hash([DATASET_VERSION, "librimix", self.config.model_dump()])

    @cached_property
    def build(self) -> BuildConfig:
        """What can be said of the mixtures in the terms of a build."""
        shares = [0.0] * (len(self.rows[0].voices) - 1) + [1.0]
        noisy = sum(row.noise is not None for row in self.rows) if self.config.noisy else 0
        mixing = MixingConfig(
            conditions=1, interferer_shares=shares, noise_share=noisy / len(self.rows)
        )
        if self.config.seconds:
            mixing = mixing.model_copy(update={"seconds": self.config.seconds})
        return BuildConfig(
            train_episodes=len(self.rows),
            valid_episodes=len(self.rows),
            shard_mb=self.config.shard_mb,
            mixing=mixing,
        )

    @property
    def num_samples(self) -> int | None:
        """Samples of each mixture; None where these differ."""
        return self.build.mixing.num_samples if self.config.seconds else None

    def speaker(self, row: MixtureRow, place: int) -> str:
        """Return the speaker of a source, counted from 0."""
        return speaker_id(self.config.corpus, speaker_of(row.voices[place].path, row.where))

    @cached_property
    def speakers(self) -> pa.Table:
        """All speakers with the number of their utterances, as `schema.SPEAKERS`."""
        voices = {
            (self.speaker(row, place), one.path)
            for row in self.rows
            for place, one in enumerate(row.voices)
        }
        counts = sorted(Counter(name for name, _ in voices).items())
        rows = [{"speaker_id": n, "split": self.config.split, "utterances": c} for n, c in counts]
        return pa.Table.from_pylist(rows, schema=SPEAKERS)


def _folder_of(uri: str) -> Folder:
    return Folder.at(posixpath.dirname(uri) or ".")
