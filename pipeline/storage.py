"""Folders that may be local or in an object store, written so that nothing is ever half there.

Small objects and listings go through fsspec (s3fs for `s3://`), large shards are read through
Arrow's own file systems, which map local files and read ranges from S3. Credentials come from where
the AWS tools look for them; `AWS_ENDPOINT_URL` is honoured by both.
"""

import hashlib
import json
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError

from pipeline.errors import CscError


class File(NamedTuple):
    """An entry of a listing: its name within the folder, and its size."""

    name: str
    num_bytes: int


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn the operating system's errors into messages that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CscError(f"cannot {action} {uri}: it does not exist; check the path") from error
    except ImportError as error:
        raise CscError(f"cannot {action} {uri}: {error}; install it") from error
    except (OSError, BotoCoreError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CscError(
            f"cannot {action} {uri}: {reason}; check the address, free space and permissions, "
            "then run again"
        ) from error


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return Arrow's file system and the path in it, for a local path or an `s3://` address."""
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60, "region": region}
    if endpoint:
        options |= {"endpoint_override": endpoint, "region": region or "us-east-1"}
    return pafs.S3FileSystem(**options), uri.removeprefix("s3://")


@dataclass(frozen=True)
class Folder:
    """A folder of immutable files under one root. Names that would lead outside are refused."""

    uri: str

    @classmethod
    def at(cls, uri: str | Path) -> Self:
        """Return the folder at a local path (made absolute) or a `scheme://` address."""
        text = str(uri)
        if re.match(r"^[a-z0-9]+://", text):
            return cls(text.rstrip("/"))
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @cached_property
    def _fs(self) -> Any:
        options = {} if self.is_local else {"use_listings_cache": False}
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
            raise CscError(f"{name!r} leads outside of {self.uri}: correct the name")
        return f"{self.uri}/{inside}"

    def child(self, name: str) -> "Folder":
        """Return a folder inside this one."""
        return Folder(self.path(name))

    def exists(self, name: str) -> bool:
        with explained("look for", self.path(name)):
            return bool(self._fs.exists(self.path(name)))

    def list(self) -> list[File]:
        """Return all files below, sorted by name, from one recursive listing."""
        with explained("list", self.uri):
            found = self._fs.find(self.uri, detail=True)
        root = self._fs._strip_protocol(self.uri) + "/"
        return sorted(
            File(path.removeprefix(root), int(about["size"])) for path, about in found.items()
        )

    def read(self, name: str) -> bytes:
        with explained("read", self.path(name)):
            return bytes(self._fs.cat_file(self.path(name)))

    def put(self, name: str, data: bytes) -> None:
        """Write a file in one step: a reader sees all of it or nothing."""
        path = self.path(name)
        with explained("write", path):
            if self.is_local:
                _replace(Path(path), data)
            else:
                self._fs.pipe_file(path, data)

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

    def remove(self, first: str) -> None:
        """Delete the folder and all in it, if it is there; before all else the file `first`.

        That file is what makes the folder count as whole: what a kill leaves does not.
        """
        with explained("remove", self.uri):
            if self._fs.exists(self.path(first)):
                self._fs.rm_file(self.path(first))
            if self._fs.exists(self.uri):
                self._fs.rm(self.uri, recursive=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=".part-", dir=path.parent)
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


class ShardRecord(NamedTuple):
    """What a completion record says of a shard."""

    name: str
    rows: int
    bytes: int
    sha256: str
    config: str


def commit_shard(folder: Folder, name: str, data: bytes, rows: int, config: str) -> ShardRecord:
    """Write a shard and then its completion record; without the latter it does not count."""
    record = ShardRecord(name, rows, len(data), hashlib.sha256(data).hexdigest(), config)
    folder.put(name, data)
    folder.put_json(f"{name}.done.json", record._asdict())
    return record


def committed_shards(folder: Folder, config: str) -> dict[str, ShardRecord]:
    """Return by name the shards that an earlier run completed with this configuration."""
    sizes = {file.name: file.num_bytes for file in folder.list()}
    records = (
        ShardRecord(**folder.read_json(name)) for name in sizes if name.endswith(".done.json")
    )
    return {
        record.name: record
        for record in records
        if record.config == config and sizes.get(record.name) == record.bytes
    }
