"""Folders that may be local or in an object store, written so that nothing is ever half there.

Small objects and listings go through fsspec (s3fs for `s3://`), large shards are read through
Arrow's own file systems, which map local files and read ranges from S3. Credentials come from where
the AWS tools look for them; `AWS_ENDPOINT_URL` is honoured by both. What a remote store refuses for
the moment is asked for again.
"""

import errno
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import CscError
from pipeline.refusals import (
    CHANGED,
    FAILURES,
    FINAL,
    UNKNOWN,
    code_of,
    explained,
    of_one_file,
    patiently,
)

ARROW_ATTEMPTS = 10
READS_AT_ONCE = 16
PART = ".part-"
T = TypeVar("T")


class OutsideError(CscError):
    """A name leads out of its folder."""


class UnconditionalError(CscError):
    """A store does not write on a condition."""


class File(NamedTuple):
    """An entry of a listing: its name within the folder, its size, and what changes with it."""

    name: str
    num_bytes: int
    version: str  # the object's ETag, or when the local file was written


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return Arrow's file system and the path in it, for a local path or an `s3://` address."""
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _arrow_s3(endpoint, region, ARROW_ATTEMPTS, os.getpid()), uri.removeprefix("s3://")


@lru_cache(8)
def _arrow_s3(
    endpoint: str | None, region: str | None, attempts: int, _pid: int
) -> pafs.S3FileSystem:
    """Return a client: one for all of a process, as each has connections of its own."""
    options: dict[str, Any] = {
        "connect_timeout": 10,
        "request_timeout": 60,
        "region": region,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    }
    if endpoint:
        options |= {"endpoint_override": endpoint, "region": region or "us-east-1"}
    return pafs.S3FileSystem(**options)


@dataclass(frozen=True)
class Folder:
    """A folder of immutable files under one root. Names that would lead outside are refused."""

    uri: str

    @classmethod
    def at(cls, uri: str | Path) -> Self:
        """Return the folder at a local path (made absolute) or a `scheme://` address."""
        text = str(uri)
        if isinstance(uri, Path):  # has made one slash of the two in an address
            text = re.sub(r"^([a-z0-9]{2,}):/", r"\1://", text)
        if re.match(r"^[a-z0-9]+://", text):
            return cls(text.rstrip("/"))
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @cached_property
    def _fs(self) -> Any:
        options: dict[str, Any] = {} if self.is_local else {"use_listings_cache": False}
        if self.uri.startswith("s3://"):  # this module asks again itself, for as long as it wants
            options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": 1}}
        return fsspec.core.url_to_fs(self.uri, **options)[0]

    def path(self, name: str) -> str:
        """Return where `name` lies.

        Raises:
            CscError: the name is absolute or climbs out of the folder, by `..` or by a link.
        """
        inside = posixpath.normpath(name)
        outside = inside.startswith(("/", "..")) or "\\" in name
        if self.is_local and not outside:
            root = os.path.realpath(self.uri)
            outside = os.path.commonpath([root, os.path.realpath(f"{root}/{inside}")]) != root
        if outside:
            raise OutsideError(f"{name!r} leads outside of {self.uri}: correct the name")
        if inside == ".":
            return self.uri
        return f"{self.uri}/{inside if self.is_local else name}"  # keys may hold // and /./

    def child(self, name: str) -> "Folder":
        """Return a folder inside this one."""
        return Folder(self.path(name))

    def _ask(self, action: str, name: str, call: Callable[[str], T]) -> T:
        """Do something with a file by its path, patiently where it is remote."""
        path = self.path(name)
        with explained(action, path):
            return call(path) if self.is_local else patiently(lambda: call(path))

    def exists(self, name: str) -> bool:
        return bool(self._ask("look for", name, self._fs.exists))

    def list(self) -> list[File]:
        """Return all files below, sorted by name, from one recursive listing."""
        found = self._ask("list", "", lambda path: self._fs.find(path, detail=True))
        root = self._fs._strip_protocol(self.uri) + "/"
        files = (
            File(_readable(path.removeprefix(root)), int(about["size"]), _version(about))
            for path, about in found.items()
        )
        return sorted(file for file in files if file.name and not file.name.endswith("/"))

    def read(self, name: str) -> bytes:
        return bytes(self._ask("read", name, self._fs.cat_file))

    def fetch(self, name: str, into: Path) -> Path:
        """Return a local file with what `name` holds: itself, or a copy that is made at `into`.

        Raises:
            FileNotFoundError, PermissionError: this one file is not to be had.
            CscError: the store is down, or lets nobody in.
        """
        if self.is_local:
            path = Path(self.path(name))
            if path.exists() and not path.is_file():
                raise PermissionError(errno.EPERM, "it is no regular file", str(path))
            path.open("rb").close()
            return path
        try:
            self._ask("read", name, lambda path: self._fs.get_file(path, str(into)))
        except CscError as error:
            if isinstance(error.__cause__, FINAL) and of_one_file(error.__cause__):
                raise error.__cause__ from None
            raise
        return into

    def put(self, name: str, data: bytes | Path) -> None:
        """Write a file in one step: a reader sees all of it or nothing.

        A local file that is given as a path must lie in `scratch`, and is gone after.
        """
        if not self.is_local and isinstance(data, Path):
            self._ask("write", name, lambda path: self._fs.put_file(str(data), path))
        elif not self.is_local:
            self._ask("write", name, lambda path: self._fs.pipe_file(path, data))
        else:
            self._ask("write", name, lambda path: _replace(Path(path), data))

    def version(self, name: str) -> str | None:
        """Return what is another when a file is changed, or None where there is none."""

        def look(path: str) -> str | None:
            try:
                return _version(self._fs.info(path)) or None
            except FileNotFoundError:
                return None

        return self._ask("look for", name, look)

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        """Write a file if it still is of a version, or None if there is none; tell if it was.

        A store that takes no notice of conditions writes in any case, and says no word of it.

        Raises:
            UnconditionalError: that can be asked of S3 only, and not of every store that speaks it.
        """
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}

        def attempt(path: str) -> bool:
            try:
                self._fs.pipe_file(path, data, chunksize=1 + len(data), **condition)  # in one piece
            except FAILURES as error:
                if code_of(error) in CHANGED:
                    return False
                if code_of(error) in UNKNOWN:
                    raise refused from error
                raise
            return True

        refused = UnconditionalError(f"{self.uri} writes on no condition: use another store")
        if not self.uri.startswith("s3://"):
            raise refused
        return self._ask("write", name, attempt)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Have a local folder for a while, on the file system of this one where that is local."""
        beside = None
        if self.is_local:
            with explained("write", self.uri):
                Path(self.uri).mkdir(parents=True, exist_ok=True)
            beside = self.uri
        with tempfile.TemporaryDirectory(prefix=PART, dir=beside) as folder:
            yield Path(folder)

    def sweep(self) -> None:
        """Remove what a kill left half written; nobody else may be at work here."""
        if self.is_local:
            for left in [*Path(self.uri).rglob(f"{PART}*")]:
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise CscError(f"{self.path(name)} is damaged ({error}): remove it") from error

    def put_json(self, name: str, value: Any) -> None:
        self.put(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def open_input(self, name: str) -> pa.NativeFile:
        """Open for random access: a memory map where the file is local."""
        path = self.path(name)
        with explained("open", path):
            if self.is_local:
                return pa.memory_map(path)
            if self.uri.startswith("s3://"):
                filesystem, inside = arrow_filesystem(path)
                return filesystem.open_input_file(inside)
            return pa.PythonFile(self._fs.open(path, "rb"), mode="r")

    def remove_file(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(name):
            self._ask("remove", name, self._fs.rm_file)

    def remove(self, first: str) -> None:
        """Delete the folder and all in it, if it is there; before all else the file `first`.

        That file is what makes the folder count as whole: what a kill leaves does not.
        """
        self.remove_file(first)
        if self.exists(""):
            self._ask("remove", "", lambda path: self._fs.rm(path, recursive=True))


def _readable(name: str) -> str:
    """Spell out what is no UTF-8 in a name: it cannot be read by it, but it can be named."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _version(about: Mapping[str, Any]) -> str:
    """Return what tells one state of a file from the next, as far as the file system says."""
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated"):
        if about.get(key):
            return str(about[key]).strip('"')
    return ""


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _replace(path: Path, data: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, Path):
        with data.open("rb") as file:
            os.fsync(file.fileno())
        data.replace(path)
        return
    handle, beside = tempfile.mkstemp(prefix=PART, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o666 & ~_umask())
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
