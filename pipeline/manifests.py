"""Manifests: files of records about audio, read so that every complaint names file and line."""

import csv
import gzip
import io
import json
import math
import posixpath
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CscError
from pipeline.storage import Folder

LONGEST_S = 1e7  # four months
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

Record = Mapping[str, Any]
Numbered = Iterator[tuple[int, Record]]
T = TypeVar("T")


def suffix(name: str) -> str:
    """Return the suffix that tells the format of a manifest, packed or not."""
    return posixpath.splitext(name.lower().removesuffix(".gz"))[1]


def converted(
    folder: Folder, name: str, records: Numbered, convert: Callable[[Record], Iterable[T]]
) -> Iterator[T]:
    """Yield what each record of a file becomes.

    Raises:
        CscError: what `convert` raises, with the file and the line before it.
    """
    for line, record in records:
        try:
            found = convert(record)
        except CscError as error:
            problem = str(error)
        except KeyError as error:
            problem = f"there is no {error}; add it"
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            problem = f"{error}; correct it"
        else:
            yield from found
            continue
        raise CscError(f"{folder.path(name)} line {line}: {problem}")


def read_records(folder: Folder, name: str, columns: Collection[str]) -> Numbered:
    """Yield (line, record) of a manifest in one of FORMATS; text may be packed by gzip.

    Of Parquet only the `columns` are read, and a line is a row, the first being 1.
    """
    with _explained(folder.path(name)):
        if suffix(name) == ".parquet":
            yield from _parquet(folder, name, columns)
        elif suffix(name) == ".csv":
            yield from _table(csv.DictReader(_text(folder, name)))
        elif suffix(name) == ".tsv":  # has no quotes: where there are some, they are text
            yield from _table(
                csv.DictReader(_text(folder, name), delimiter="\t", quoting=csv.QUOTE_NONE)
            )
        else:
            yield from _json_lines(folder, name)


def read_pairs(folder: Folder, name: str) -> Numbered:
    """Yield (line, record) with `key` and `value` of a Kaldi file: first word, and the rest.

    Raises:
        CscError: a line has one word, or a key stands twice.
    """
    seen = set()
    with _explained(folder.path(name)):
        for line, text in enumerate(_text(folder, name), start=1):
            words = text.split(maxsplit=1)
            if not words:
                continue
            if len(words) == 1 or words[0] in seen:
                problem = "has no value" if len(words) == 1 else "stands twice"
                raise CscError(f"{folder.path(name)} line {line}: {words[0]} {problem}; correct it")
            seen.add(words[0])
            yield line, {"key": words[0], "value": words[1].rstrip()}


def plain(value: Any) -> str:
    """Return a value as text; what is missing is empty, whichever way a format says so."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value)


def seconds(what: str, value: Any) -> float:
    """Return a time in s to the microsecond, so that sums of equal spans are equal.

    Raises:
        CscError: it is no number, negative, or longer than any recording.
    """
    try:
        number = float(plain(value) or 0)
    except ValueError:
        number = -1.0
    if not 0 <= number <= LONGEST_S:
        raise CscError(f"{what} {value!r} is not a number of seconds from 0 on; correct it")
    return round(number, 6)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CscError(f"{path} is not UTF-8; save it as such") from error
    except (csv.Error, pa.ArrowInvalid, EOFError, OSError, zlib.error) as error:
        raise CscError(f"{path}: {error}; the file is damaged, get it again") from error


def _text(folder: Folder, name: str) -> TextIO:
    data: Any = io.BytesIO(folder.read(name))
    if name.lower().endswith(".gz"):
        data = gzip.GzipFile(fileobj=data)
    return io.TextIOWrapper(data, encoding="utf-8-sig", newline="")


def _table(reader: "csv.DictReader[str]") -> Numbered:
    for record in reader:
        yield reader.line_num, record


def _json_lines(folder: Folder, name: str) -> Numbered:
    for line, text in enumerate(_text(folder, name), start=1):
        if text.isspace():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            problem = f"line {line}: not JSON ({error})"
            raise CscError(f"{folder.path(name)} {problem}; write one object a line") from error
        if not isinstance(record, dict):
            raise CscError(f"{folder.path(name)} line {line}: no JSON object; write one a line")
        yield line, record


def _parquet(folder: Folder, name: str, columns: Collection[str]) -> Numbered:
    file = pq.ParquetFile(folder.open_input(name))
    there = [column for column in file.schema_arrow.names if column in columns]
    batches = file.iter_batches(columns=there)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
