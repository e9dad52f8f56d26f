"""Corpora and stores in S3: the same as on a disk, also from a server that fails now and then."""

import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

from jobs.using import Gallery
from pipeline import refusals
from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.errors import CscError
from pipeline.plan import latest
from pipeline.shards import read_catalogue
from pipeline.storage import Folder, UnconditionalError
from pipeline.updates import update
from tests.conftest import make_store, shard_hashes, write_corpus

START = Callable[..., Any]
ERRORS = {"500 Internal Server Error": "InternalError", "503 Service Unavailable": "SlowDown"}


class Flaky:
    """A WSGI application around moto that fails a share of the requests in every way S3 does.

    Writes come one by one: moto looks at their conditions before, where S3 does both at once.
    """

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._draws, self._lock = random.Random(7), threading.Lock()
        self._writes = threading.Lock()
        self.share, self.denied, self.down, self.conditions = 0.0, "", False, True
        self.faults: list[str] = []

    def __call__(self, environ: dict[str, Any], start: START) -> Iterable[bytes]:
        with self._lock:
            faulty = self._draws.random() < self.share
            how = self._draws.choice(["slow", "cut", *ERRORS]) if faulty else ""
        if self.denied and self.denied in environ["PATH_INFO"]:
            return self._refuse(start, "403 Forbidden", "AccessDenied")
        if self.down:
            return self._refuse(start, "503 Service Unavailable", "SlowDown")
        if not self.conditions and {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
            return self._refuse(start, "501 Not Implemented", "NotImplemented")
        if not how:
            return self._answer(environ, start)
        self.faults.append(how)
        if how in ERRORS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return self._refuse(start, how, ERRORS[how])
        if how == "slow":
            time.sleep(0.3)
            return self._answer(environ, start)
        return self._cut(self._answer(environ, start))

    def _answer(self, environ: dict[str, Any], start: START) -> Iterable[bytes]:
        with self._writes if environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return self._moto(environ, start)

    def _refuse(self, start: START, status: str, code: str) -> Iterable[bytes]:
        start(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>so it goes</Message></Error>".encode()]

    def _cut(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        body = b"".join(answer)
        yield body[: len(body) // 2]
        raise ConnectionAbortedError  # fewer bytes than announced, then nothing


@pytest.fixture(scope="module")
def server() -> Iterator[Flaky]:
    application = Flaky()
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-test-key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()  # they keep the endpoint of their first use
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="wild")
        yield application
    S3FileSystem.clear_instance_cache()
    server.shutdown()


@pytest.fixture
def flaky(server: Flaky) -> Iterator[Flaky]:
    yield server
    server.share, server.denied, server.down, server.conditions = 0.0, "", False, True
    server.faults.clear()


def config_of(root: object) -> IngestConfig:
    return IngestConfig(corpora=[CorpusConfig(name="c", root=str(root))], source_mb_per_shard=0.5)


def uploaded(local: Path, address: str) -> str:
    folder = Folder.at(address)
    for path in sorted(local.rglob("*.*")):
        folder.put(str(path.relative_to(local)), path.read_bytes())
    return address


def ids(store: Folder) -> list[str]:
    return read_catalogue(store)["utterance_id"].to_pylist()


def test_a_bucket_gives_what_a_disk_gives_also_when_every_fifth_request_fails(
    flaky: Flaky, tmp_path: Path
) -> None:
    local = write_corpus(tmp_path / "c", 12, 4)
    here = make_store(tmp_path / "store", config_of(local))
    there = uploaded(local, f"s3://wild/{tmp_path.name}/corpus")
    assert ids(make_store(tmp_path / "from-s3", config_of(there))) == ids(here)
    assert not flaky.faults
    flaky.share = 0.2
    cloud = make_store(Folder.at(f"s3://wild/{tmp_path.name}/store"), config_of(there))
    flaky.share = 0.0
    assert len(flaky.faults) > 20
    assert set(flaky.faults) == {"slow", "cut", *ERRORS}
    assert ids(cloud) == ids(here)
    assert shard_hashes(cloud) == shard_hashes(here)


def test_an_outage_stops_clean_and_the_next_call_goes_on(
    flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "PATIENCE_S", 0.5)
    local = write_corpus(tmp_path / "c", 1, 2)
    config = config_of(uploaded(local, f"s3://wild/{tmp_path.name}/corpus"))

    def goes_down(tasks: Any, work: Any) -> None:
        flaky.down = True
        for task in tasks:
            work(task)

    with pytest.raises(CscError, match=f"wild/{tmp_path.name}/corpus") as caught:
        make_store(tmp_path / "store", config, goes_down)
    assert "secret-test-key" not in str(caught.value)
    flaky.down = False
    root = Folder.at(tmp_path / "store")
    planned = latest(root)
    assert planned is not None
    assert not planned.finished
    assert [file.name for file in root.child("shards").list()] == []
    store = make_store(root, config)
    assert store == planned.store
    assert ids(store) == ids(make_store(tmp_path / "disk", config_of(local)))


def test_keys_are_taken_as_they_are(flaky: Flaky, tmp_path: Path) -> None:
    local = write_corpus(tmp_path / "c", 1, 2)
    prefix = f"{tmp_path.name}/corpus"
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("", "s00/"):
        client.put_object(Bucket="wild", Key=f"{prefix}/{key}", Body=b"")
    for key, name in (("s00//u0.flac", "u0.flac"), ("s01/u1.flac", "u1.flac")):
        data = (local / "s00" / name).read_bytes()
        client.put_object(Bucket="wild", Key=f"{prefix}/{key}", Body=data)
    store = make_store(tmp_path / "store", config_of(f"s3://wild/{prefix}"))
    assert store.read_json("index.json")["files"] == 2
    assert set(read_catalogue(store)["path"].to_pylist()) == {"s00//u0.flac", "s01/u1.flac"}


def test_an_object_that_is_denied_or_gone_costs_only_itself(flaky: Flaky, tmp_path: Path) -> None:
    local = write_corpus(tmp_path / "c", 4, 2)
    address = uploaded(local, f"s3://wild/{tmp_path.name}/corpus")

    def meanwhile(tasks: Any, work: Any) -> None:
        flaky.denied = "s01/u0"
        Folder.at(address).remove_file("s02/u0.flac")
        Folder.at(address).put("s03/u0.flac", (local / "s01" / "u1.flac").read_bytes())
        for task in tasks:
            work(task)
        flaky.denied = ""

    index = make_store(tmp_path / "store", config_of(address), meanwhile).read_json("index.json")
    assert index["examples"]["denied"]["path"] == "s01/u0.flac"
    assert index["examples"]["missing"]["path"] == "s02/u0.flac"
    assert index["examples"]["changed"]["path"] == "s03/u0.flac"
    counted = make_store(tmp_path / "store", config_of(address)).read_json("index.json")
    assert counted["changes"]["changed"] == 1
    assert counted["changes"]["gone"] == 1
    assert "changed" not in counted["rejected"]


def enrolled_at_once(gallery: Gallery, many: int, each: int) -> list[bool]:
    """Have several enrol people at the same time; return of whom it was said they were there."""
    ready = threading.Barrier(many)

    def enrol(who: int) -> list[bool]:
        ready.wait()
        return [gallery.put(someone(f"{who}-{number}")) for number in range(each)]

    with ThreadPoolExecutor(many) as pool:
        return [was_there for told in pool.map(enrol, range(many)) for was_there in told]


def someone(name: str, at: float = 1.0) -> dict[str, Any]:
    return {"name": name, "model": "m", "files": ["f"], "vector": [at]}


def names_in(gallery: Gallery) -> set[str]:
    return set(gallery.read()["name"].to_pylist())


def test_of_those_who_enrol_at_once_in_a_bucket_nobody_is_lost(
    flaky: Flaky, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = Gallery(Path(f"s3://wild/{tmp_path.name}/people.parquet"))
    assert not any(enrolled_at_once(gallery, 6, 3))
    assert names_in(gallery) == {f"{who}-{number}" for who in range(6) for number in range(3)}
    assert gallery.put(someone("0-0", at=2.0))
    assert len(gallery.read()) == 18
    flaky.share = 0.2  # also where the answer to a write is lost
    again = Gallery(Path(f"s3://wild/{tmp_path.name}/again.parquet"))
    assert not any(enrolled_at_once(again, 3, 3))
    assert flaky.faults
    assert names_in(again) == {f"{who}-{number}" for who in range(3) for number in range(3)}
    assert len(again.read()) == 9
    assert capsys.readouterr().out == ""


def test_where_a_store_knows_no_conditions_people_are_enrolled_and_the_risk_is_said(
    flaky: Flaky, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flaky.conditions = False
    folder = Folder.at(f"s3://wild/{tmp_path.name}")
    gallery = Gallery(Path(f"s3://wild/{tmp_path.name}/people.parquet"))
    for name in "ab":
        assert not gallery.put(someone(name))
    assert names_in(gallery) == {"a", "b"}
    assert capsys.readouterr().out.count("does not write on a condition") == 2
    with pytest.raises(UnconditionalError, match="use another store"):
        folder.replace("people.parquet", b"", folder.version("people.parquet"))


def test_a_file_is_replaced_only_as_it_was_read(flaky: Flaky, tmp_path: Path) -> None:
    folder = Folder.at(f"s3://wild/{tmp_path.name}")
    assert folder.version("a") is None
    assert folder.replace("a", b"first", None)
    assert not folder.replace("a", b"another first", None)
    first = folder.version("a")
    assert folder.replace("a", b"second", first)
    assert not folder.replace("a", b"third", first)
    assert folder.read("a") == b"second"
    second = folder.version("a")
    folder.remove_file("a")
    assert not folder.replace("a", b"third", second)
    assert not folder.exists("a")


def test_a_file_that_goes_while_it_is_changed_is_made_anew(
    flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, look = Folder.at(f"s3://wild/{tmp_path.name}"), Folder.version
    folder.put("a", b"old")

    def goes(self: Folder, name: str) -> str | None:
        version = look(self, name)
        self.remove_file(name)
        return version

    monkeypatch.setattr(Folder, "version", goes)
    assert update(folder, "a", lambda data: (data or b"") + b"new")
    assert folder.read("a") == b"new"


def test_a_disk_that_has_no_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(CscError, match=r"cannot lock .*/\.people\.lock: No locks available"):
        update(Folder.at(tmp_path), "people", lambda data: data or b"")
