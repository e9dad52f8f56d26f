"""Layouts: how the files of a corpus say who speaks in them, one small function for each way."""

import posixpath
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.errors import CscError
from pipeline.manifests import (
    FORMATS,
    Record,
    converted,
    plain,
    read_pairs,
    read_records,
    seconds,
    suffix,
)
from pipeline.patterns import is_audio, path_pattern, tried
from pipeline.schema import Strict
from pipeline.storage import Folder

Way = Literal["folders", "pattern", "manifest", "kaldi", "lhotse", "unlabelled"]
Patterns = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Row(NamedTuple):
    """What a layout says of a recording or of a span of it; what it does not say is empty."""

    path: str
    speaker: str = ""
    session: str = ""
    split: str = ""
    gender: str = ""
    start_s: float = 0.0
    duration_s: float = 0.0  # 0: to the end


class Columns(Strict):
    """What the columns of a manifest are called; only path and speaker have to be there."""

    path: str = "path"
    speaker: str = "speaker"
    session: str = "session"
    split: str = "split"
    gender: str = "gender"
    start_s: str = "start_s"
    duration_s: str = "duration_s"


class LayoutConfig(Strict):
    """How a corpus is laid out.

    `folders` (the default): the first folder names the speaker, and every file is tried.
    `pattern`: paths look like `{split}/{speaker}/{session}/*.flac`. `*` and `{}` stop at a slash,
    `**` does not, `{speaker:id*}` says what the name looks like. The first that fits counts.
    `manifest`: a table names paths and speakers: .csv, .tsv, .parquet or JSON lines.
    `kaldi`: a data directory (wav.scp, utt2spk, and if there are segments and spk2gender).
    `lhotse`: cuts as JSON lines. `unlabelled`: every recording is a speaker of its own.
    """

    layout: Way | None = Field(None, description="what pattern or manifest imply, else folders")
    pattern: Patterns = Field([], description="one or several, tried in turn")
    ignore: Patterns = Field([], description="patterns of files to leave out")
    manifest: str | None = Field(None, description="within the root; for kaldi, its wav.scp")
    columns: Columns = Columns()
    path_template: str = Field("{path}", description="what to make of a manifest's paths")
    strip_prefix: str = Field("", description="where the audio lay when the manifest was made")
    splits: dict[str, Literal["train", "valid", "test"]] = Field(
        {}, description="the source's name of a split: ours"
    )

    @property
    def way(self) -> Way:
        if self.layout or self.pattern:
            return self.layout or "pattern"
        if self.manifest is None:
            return "folders"
        return "kaldi" if posixpath.basename(self.manifest) == "wav.scp" else "manifest"

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        for text in [*self.pattern, *self.ignore]:
            path_pattern(text)
        for key, required, allowed in (
            ("pattern", ("pattern",), ("pattern",)),
            ("manifest", ("manifest", "lhotse"), ("manifest", "lhotse", "kaldi")),
        ):
            if self.way in required and not getattr(self, key):
                raise ValueError(f"layout {self.way!r} needs the key {key}: add it")
            if self.way not in allowed and getattr(self, key):
                raise ValueError(f"layout {self.way!r} has no use for {key}: remove one of them")
        if self.way == "manifest" and suffix(self.manifest or "") not in FORMATS:
            raise ValueError(f"manifest {self.manifest!r} ends in none of {', '.join(FORMATS)}")
        if "{path}" not in self.path_template:
            raise ValueError(f"path_template {self.path_template!r} lacks {{path}}: add it")
        return self


def rows(config: LayoutConfig, folder: Folder, names: Collection[str]) -> Iterator[Row]:
    """Yield what the layout says of the files of a folder, `names` being all that are in it.

    Paths of manifests are not looked up in `names`: that is for the caller.

    Raises:
        CscError: audio fits no pattern; or naming the manifest, the line and what is wrong there.
    """
    match config.way:
        case "manifest":
            return _manifest(config, folder)
        case "kaldi":
            return _kaldi(config, folder, names)
        case "lhotse":
            return _lhotse(config, folder)
        case "pattern":
            return _pattern(config.pattern, folder, tried(names, config.ignore))
        case "folders":
            return map(_named_by_folder, tried(names, config.ignore))
        case "unlabelled":
            return map(Row, tried(names, config.ignore))


def _named_by_folder(name: str) -> Row:
    first, inside, _ = name.partition("/")
    return Row(name, first if inside else "")


def _pattern(texts: list[str], folder: Folder, names: Iterator[str]) -> Iterator[Row]:
    patterns = [path_pattern(text) for text in texts]
    unmatched = []
    for name in names:
        found = next((match for one in patterns if (match := one.fullmatch(name))), None)
        if found:
            said: dict[str, Any] = found.groupdict()
            yield Row(name, **said)
        elif is_audio(name):
            unmatched.append(name)
    if unmatched:  # refused, not dropped: a part of a corpus would be missing, and nobody told
        raise CscError(
            f"{folder.uri}: {len(unmatched)} audio files fit no pattern, the first is "
            f"{unmatched[0]}: add a pattern, or leave them out with ignore"
        )


def _manifest(config: LayoutConfig, folder: Folder) -> Iterator[Row]:
    name, columns = config.manifest or "", config.columns.model_dump()
    required = {columns["path"], columns["speaker"]}
    if "json" not in suffix(name):  # where a line may leave out what it has no value for
        required |= {column for field, column in columns.items() if column != field}

    def convert(record: Record) -> list[Row]:
        lacking = required - record.keys()
        if lacking:
            listed = ", ".join(sorted(lacking))
            raise CscError(f"no column {listed}; add it, or name the right one in columns")
        *texts, start, duration = (record.get(column) for column in columns.values())
        path, speaker, session, split, gender = map(plain, texts)
        if not path or not speaker:
            raise CscError("path or speaker is empty; fill it in")
        span = seconds("start_s", start), seconds("duration_s", duration)
        return [Row(_inside(config, folder, path), speaker, session, split, gender, *span)]

    return converted(folder, name, read_records(folder, name, columns.values()), convert)


def _kaldi(config: LayoutConfig, folder: Folder, names: Collection[str]) -> Iterator[Row]:
    scp = config.manifest or "wav.scp"
    speakers_file, genders_file, segments_file = (
        posixpath.join(posixpath.dirname(scp), name)
        for name in ("utt2spk", "spk2gender", "segments")
    )
    speakers = _mapping(folder, speakers_file)
    genders = _mapping(folder, genders_file) if genders_file in names else {}
    segmented = segments_file in names
    recordings = _mapping(folder, scp) if segmented else {}

    def convert(record: Record) -> list[Row]:
        utterance, value = record["key"], record["value"]
        path, *span = _segment(value, recordings) if segmented else (value, 0.0, 0.0)
        if path.endswith("|"):
            raise CscError(f"{utterance}: commands are never run; write the audio to a file")
        if utterance not in speakers:
            raise CscError(f"{utterance} is not in {speakers_file}; add it")
        speaker = speakers[utterance]
        gender = genders.get(speaker, "")
        return [Row(_inside(config, folder, path), speaker, "", "", gender, *span)]

    source = segments_file if segmented else scp
    return converted(folder, source, read_pairs(folder, source), convert)


def _mapping(folder: Folder, name: str) -> dict[str, str]:
    return {record["key"]: record["value"] for _, record in read_pairs(folder, name)}


def _segment(value: str, recordings: Mapping[str, str]) -> tuple[str, float, float]:
    recording, start, end = value.split()
    if recording not in recordings:
        raise CscError(f"recording {recording} is not in wav.scp; add it")
    start_s = seconds("start", start)
    if float(end) == -1:  # Kaldi's way to say: to the end
        return recordings[recording], start_s, 0.0
    if seconds("end", end) <= start_s:
        raise CscError(f"it ends at {end} s and starts at {start} s; correct it")
    return recordings[recording], start_s, seconds("end", float(end) - start_s)


def _lhotse(config: LayoutConfig, folder: Folder) -> Iterator[Row]:
    def convert(cut: Record) -> list[Row]:
        path = _inside(config, folder, _cut_source(cut))
        whole = {"start": 0, "duration": cut["duration"]}
        return [_supervised(path, cut, part) for part in cut.get("supervisions") or [whole]]

    name = config.manifest or ""
    return converted(folder, name, read_records(folder, name, ()), convert)


def _cut_source(cut: Record) -> str:
    """Return the file of a cut whose samples are the file's: anything else would be misread."""
    if cut.get("type") != "MonoCut":
        raise CscError(f"a {cut.get('type', 'record without a type')}; only MonoCut can be read")
    recording = cut["recording"]
    source, *others = recording["sources"]
    if others or len(source["channels"]) != 1 or source["type"] != "file":
        raise CscError(f"{recording['id']} is not one file of one channel; write it as such")
    if recording.get("transforms"):
        raise CscError(f"{recording['id']} is changed by transforms; write the result to a file")
    return str(source["source"])


def _supervised(path: str, cut: Record, part: Record) -> Row:
    """Return the part of a supervision that lies within its cut; times are relative to the cut."""
    start = max(0.0, part["start"])
    end = min(cut["duration"], part["start"] + part["duration"])
    if end <= start:
        raise CscError(f"a supervision of {cut['id']} lies outside of the cut; correct it")
    span = seconds("start", cut["start"] + start), seconds("duration", end - start)
    return Row(path, plain(part.get("speaker")), "", "", plain(part.get("gender")), *span)


def _inside(config: LayoutConfig, folder: Folder, path: str) -> str:
    """Return what a manifest's path is called within the folder."""
    for prefix in (config.strip_prefix, folder.uri):
        place = prefix.rstrip("/") + "/"
        if prefix and path.startswith(place):
            path = path.removeprefix(place)
    name = config.path_template.replace("{path}", path)
    return posixpath.normpath(name) if "./" in name else name
