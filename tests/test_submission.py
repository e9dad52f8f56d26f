"""Stages on a real Ray cluster of one node, whose job server asks for a token."""

import os
import platform
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import ray
import typer
from typer.testing import CliRunner

from jobs.cli import app
from jobs.config import load_config
from jobs.following import follow
from jobs.jobserver import STOPPED_BY, JobServer, LostError, server_url
from jobs.reach import check_server
from jobs.submission import CONFIG_FILE, digest_of, for_cluster, packed, passed_on
from pipeline.errors import CscError
from tests.conftest import make_store, shard_hashes, write_corpus
from tests.test_run_server import BIN, READY_S, free_port, stop
from tests.whole_run import CSC, only, toml

pytestmark = pytest.mark.cluster
TOKEN = "a-token-of-the-tests-0123456789abcdef"
COUNTED = "for i in $(seq {lines}); do echo line $i; sleep 0.5; done; exit {code}"


def ready(url: str) -> bool:
    """Say whether a job server is up: it then asks for a token."""
    try:
        urllib.request.urlopen(f"{url}/api/v0/cluster_metadata", timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start the head of a cluster, which commands find in the environment."""
    root = Path(tempfile.mkdtemp(prefix="csc-", dir="/tmp"))  # Ray's sockets need a short path
    (root / "token").write_text(TOKEN)
    port, url = free_port(), f"http://127.0.0.1:{free_port()}"
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(root / "token")}
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", str(port), "--dashboard-host=127.0.0.1", "--num-cpus=2"),
        *("--dashboard-port", url.rpartition(":")[2], "--temp-dir", str(root)),
        *("--dashboard-agent-listen-port", str(free_port()), "--object-store-memory=200000000"),
    ]
    environment = os.environ | auth | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    with (root / "head.log").open("wb") as said:
        head = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    try:
        until = time.monotonic() + READY_S
        while not ready(url):
            assert head.poll() is None, (root / "head.log").read_text()
            assert time.monotonic() < until, (root / "head.log").read_text()
            time.sleep(0.2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_API_SERVER_ADDRESS", url)
            patch.setenv("RAY_AUTH_TOKEN_PATH", str(root / "token"))
            patch.delenv("RAY_AUTH_TOKEN", raising=False)
            yield url
    finally:
        end_with_children(head)
        shutil.rmtree(root)


def end_with_children(head: subprocess.Popen[bytes]) -> None:
    """End a head and its workers, which would write logs for a moment yet."""
    children = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    stop(head)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)


@pytest.fixture(scope="module")
def server(cluster: str) -> JobServer:
    return JobServer(cluster)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration: a tiny corpus, and a workspace where the cluster's one node sees it."""
    root = tmp_path_factory.mktemp("submitted")
    corpora = [{"name": "first", "root": str(write_corpus(root / "corpus", 3, 2))}]
    path = root / "mine.toml"
    path.write_text(
        f"workspace = '{root / 'workspace'}'\n"
        f"ingest = {{corpora = {toml(corpora)}, source_mb_per_shard = 0.1}}\n"
    )
    return path


def csc(*words: object) -> tuple[int, str]:
    """Call a command in this process; return its exit code and all that it said."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if isinstance(result.exception, CscError):
        return 1, f"error: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def begin(server: JobServer, job_id: str, command: str, **about: str) -> str:
    """Submit a job of a shell command, which is sooner there than a stage."""
    marks = {"stage": "build", "config": "0", "workspace": "/w", "by": "me@here"} | about
    server.submit(job_id, command, marks, {"env_vars": STOPPED_BY}, print)
    return job_id


def test_a_stage_that_was_stopped_goes_on_and_ends_as_it_would_here(
    server: JobServer, mine: Path, tmp_path: Path
) -> None:
    code, said = csc("submit", "ingest", "--config", mine, "--detach")
    assert code == 0, said
    (first,) = re.findall(r"csc jobs logs -f (csc-ingest-[0-9a-f]{8}-1) --cluster http", said)
    until(lambda: "starting Ray" in server.log(first))
    code, said = csc("jobs", "stop", first)
    assert (code, said.split()[:2]) == (0, [f"{first}:", "STOPPED"])
    assert "stopped; the same command goes on from here" in csc("jobs", "logs", first)[1]
    second = first.removesuffix("1") + "2"
    code, said = csc("submit", "ingest", "--config", mine)
    assert code == 0, said
    assert re.search(rf"6 files -> \d+ utterances(.|\n)*{second}: SUCCEEDED", said)
    config = load_config(str(mine))
    there = only(Path(config.workspace) / "utterances").child("generation-00001")
    here = make_store(tmp_path, config.ingest)
    assert shard_hashes(there) == shard_hashes(here)
    code, said = csc("jobs")
    rows = [line.split("│") for line in said.splitlines() if "csc-ingest" in line]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [
        [second, "ingest", "SUCCEEDED"],
        [first, "ingest", "STOPPED"],
    ]
    digest = digest_of(for_cluster("ingest", config))
    assert {job.config for job in server.jobs()} == {digest}
    assert {job.workspace for job in server.jobs()} == {config.workspace}


def test_what_is_under_way_is_submitted_again_only_if_asked_to(
    server: JobServer, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(for_cluster("build", load_config(str(mine))))
    name = f"csc-build-{digest[:8]}"
    begin(server, f"{name}-7", COUNTED.format(lines=500, code=0), config=digest)
    words = ("submit", "build", "--config", mine, "--detach")
    code, said = csc(*words)
    assert code == 1
    assert f"{name}-7, submitted by me@here, has the same configuration" in said
    assert f"csc jobs logs -f {name}-7 --cluster {server.url}" in said
    keyboard, terminal = pty.openpty()
    os.write(keyboard, b"n\n")
    with os.fdopen(terminal) as asked, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", asked)
        with pytest.raises(typer.Abort):
            app([str(word) for word in words], standalone_mode=False)
    os.close(keyboard)
    assert not any(job.id == f"{name}-8" for job in server.jobs())
    code, said = csc(*words, "--attach")
    assert code == 0, said
    assert f"csc jobs logs -f {name}-7 --cluster {server.url}" in said
    assert not any(job.id == f"{name}-8" for job in server.jobs())
    assert csc(*words, "--attach", "--again")[0] == 2
    code, said = csc(*words, "--again")
    assert code == 0, said
    for job_id in (f"{name}-8", f"{name}-7"):  # the one has hardly begun
        assert f"{job_id}: STOPPED" in csc("jobs", "stop", job_id)[1]
    assert f"{name}-7: ended before" in csc("jobs", "stop", f"{name}-7")[1]
    with pytest.raises(CscError, match="already exists"):
        begin(server, f"{name}-7", "true")


def test_ctrl_c_leaves_a_job_running(server: JobServer) -> None:
    job_id = begin(server, "csc-build-0-1", COUNTED.format(lines=500, code=0))
    follower = subprocess.Popen(
        [CSC, "jobs", "logs", "-f", job_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    assert any(line == "line 2\n" for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert said.startswith("detached: the job goes on\n")
    assert f"csc jobs stop {job_id} --cluster {server.url}" in said
    assert server.job(job_id).state == "RUNNING"
    assert server.stop(job_id).exit_code == 130


class Proxy(threading.Thread):
    """Carries connections to a server on this machine.

    Cuts them, falls silent, or knows no websockets when told to; counts the submissions.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._to, self._listens = port, socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.silent, self.without_websockets, self.submissions = False, False, 0
        self.url = f"http://127.0.0.1:{self._listens.getsockname()[1]}"

    def run(self) -> None:
        while True:
            ends = self._listens.accept()[0], socket.create_connection(("127.0.0.1", self._to))
            self._open += ends
            for one, other in (ends, ends[::-1]):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                self.submissions += data.startswith(b"POST /api/jobs/")
                if self.without_websockets:
                    data = data.replace(b"Upgrade: websocket", b"Removed: websocket")
                if not self.silent:
                    other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for end in self._open:
            with suppress(OSError):  # that has ended by itself
                end.shutdown(socket.SHUT_RDWR)


def test_a_log_goes_on_after_a_lost_connection_and_the_exit_code_is_the_commands(
    server: JobServer,
) -> None:
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    proxy.start()
    job_id = begin(server, "csc-promote-0-1", COUNTED.format(lines=8, code=3))
    written: list[str] = []
    cuts = []

    def write(text: str) -> None:
        written.append(text)
        if "line 2\n" in text or "line 5\n" in text:
            cuts.append(text)
            proxy.cut()

    job = follow(JobServer(proxy.url), job_id, write, print)
    assert len(cuts) == 2
    lines = [line for line in "".join(written).splitlines() if line.startswith("line")]
    assert lines == [f"line {number}" for number in range(1, 9)]
    assert (job.state, job.exit_code) == ("FAILED", 3)
    assert csc("jobs", "logs", "-f", job_id)[0] == 3


def test_a_log_of_which_nothing_comes_is_borne_and_the_head_asked_for_its_job_now_and_then(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    proxy.start()
    proxy.without_websockets = True
    for name, silence_s, fewest, most in (("6", 60.0, 0, 0), ("7", 2.0, 1, 4)):
        monkeypatch.setattr("jobs.following.SILENCE_S", silence_s)
        job_id = begin(server, f"csc-build-0-{name}", COUNTED.format(lines=8, code=3))
        written: list[str] = []
        warned: list[str] = []
        job = follow(JobServer(proxy.url), job_id, written.append, warned.append)
        assert (job.state, job.exit_code) == ("FAILED", 3)
        assert "line 8\n" in "".join(written)
        assert fewest <= proxy.submissions <= most
        assert len(warned) == fewest
    assert "and nothing comes of its log: asking the head" in warned[0]


def test_a_job_that_a_head_forgot_while_it_was_asked_for_it_is_listed_and_its_id_not_used_again(
    server: JobServer, mine: Path
) -> None:
    digest = digest_of(for_cluster("ingest", load_config(str(mine), ["seed=8"])))
    known = server.job(begin(server, "csc-build-0-8", "true"))
    job_id = f"csc-ingest-{digest[:8]}-1"
    job = known._replace(id=job_id, stage="ingest", config=digest)
    server.recover(job)
    until(lambda: not server.job(job_id).under_way)
    found = server.job(job_id)
    assert (found.state, found[1:5]) == ("FAILED", job[1:5])
    assert "submit again, to go on" in server.log(job_id)
    code, said = csc("submit", "ingest", "--config", mine, "--set", "seed=8", "--detach")
    assert code == 0, said
    assert f"{job_id.removesuffix('1')}2" in said
    server.stop(f"{job_id.removesuffix('1')}2")


def test_an_outcome_is_told_also_where_the_log_can_no_more_be_read(server: JobServer) -> None:
    job_id = begin(server, "csc-build-0-3", COUNTED.format(lines=1, code=3))
    until(lambda: server.job(job_id).state == "FAILED")
    logs = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent / "session_latest" / "logs"
    (logs / f"job-driver-{job_id}.log").unlink()
    (logs / f"job-driver-{job_id}.log").mkdir()
    code, said = csc("jobs", "logs", "-f", job_id)
    assert code == 3
    assert "the end of its log cannot be read" in said
    assert f"{job_id}: FAILED" in said


def test_a_job_of_the_same_id_on_a_new_head_is_not_taken_for_the_one_that_was_followed(
    server: JobServer,
) -> None:
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    proxy.start()
    job_id = begin(server, "csc-build-0-4", COUNTED.format(lines=500, code=0))
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if "line 2\n" in text:
            server.stop(job_id)
            server._client.delete_job(job_id)  # a head without Redis has forgotten it, too
            begin(server, job_id, "echo another")
            proxy.cut()

    with pytest.raises(CscError, match=r"lost with the head .* began anew; submit again"):
        follow(JobServer(proxy.url), job_id, write, print)
    assert "another" not in "".join(written)


def test_a_command_that_is_lost_with_what_watched_it_says_what_to_do(server: JobServer) -> None:
    job_id = begin(server, "csc-build-0-2", COUNTED.format(lines=4321, code=0))
    until(lambda: "line 1\n" in server.log(job_id))
    commands = [process for process in psutil.process_iter() if "seq 4321" in words_of(process)]
    parents = [process.parent() for process in commands]
    (supervisor,) = {one for one in parents if one and "JobSupervisor" in words_of(one)}
    supervisor.kill()
    code, said = csc("jobs", "logs", "-f", job_id)
    assert code == 1
    assert "ended, with its node or for want of memory: submit again, to go on" in said
    assert f"{job_id}: FAILED" in said


def words_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_a_server_that_falls_silent_is_not_waited_for_for_ever(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    proxy.start()
    behind = JobServer(proxy.url)
    assert {job.id for job in behind.jobs()} == {job.id for job in server.jobs()}
    monkeypatch.setattr("jobs.jobserver.ANSWER_S", 1.0)
    proxy.silent = True
    with pytest.raises(LostError, match="does not answer"):
        behind.jobs()
    with pytest.raises(LostError, match="csc-build-0-5 may have been submitted all the same"):
        begin(behind, "csc-build-0-5", "true")


def test_a_server_that_falls_silent_after_its_first_answer_is_not_waited_for_either(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(int(server.url.rpartition(":")[2]))
    proxy.start()

    def check(url: str, headers: dict[str, str]) -> None:
        check_server(url, headers)
        proxy.silent = True

    monkeypatch.setattr("jobs.jobserver.check_server", check)
    monkeypatch.setattr("jobs.jobserver.ANSWER_S", 1.0)
    with pytest.raises(LostError, match="does not answer"):
        JobServer(proxy.url)


def test_unknown_jobs_are_told_from_those_there_are(server: JobServer) -> None:
    job_id = begin(server, "csc-train-0-1", "true")
    server._client.submit_job(entrypoint="true", submission_id="of-somebody-else")
    for words in (("logs",), ("logs", "-f"), ("stop",)):
        for name in ("csc-train-0-2", "of-somebody-else", "../version", ""):
            code, said = csc("jobs", *words, name)
            assert code == 1
            assert re.search(rf"no job '{name}' at .*; there are: .*{job_id}", said)
            assert ", of-somebody-else" not in said


@pytest.mark.parametrize("command", ["submit ingest --config {mine}", "jobs", "jobs logs x"])
def test_who_cannot_be_reached_or_refuses_is_named(
    cluster: str, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words = command.format(mine=mine).split()
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"no cluster answers at {nobody}" in csc(*words, "--cluster", nobody)[1]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-0123456789")
    code, said = csc(*words)
    assert code == 1
    assert f"{cluster} refuses your token" in said
    assert "another-token" not in said
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    assert "RAY_AUTH_TOKEN_PATH: cannot read" in csc(*words)[1]
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{cluster} asks for a token" in csc(*words)[1]


def test_a_cluster_named_before_the_command_goes_before_that_of_the_environment(
    cluster: str,
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    for words in ((), ("logs", "x"), ("stop", "x")):
        assert f"no cluster answers at {nobody}" in csc("jobs", "--cluster", nobody, *words)[1]


def test_other_versions_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(platform, "python_version", lambda: "3.10.2")
        with pytest.raises(CscError, match=r"has Ray \d+\.\d+ and Python 3\.\d+, .* Python 3\.10:"):
            JobServer(cluster)
    monkeypatch.setattr(ray, "__version__", "1.13.0")
    with pytest.raises(CscError, match=r"here is Ray 1\.13 and"):
        JobServer(cluster)


def test_another_server_is_told_from_a_cluster() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever).start()
        with pytest.raises(CscError, match=r"what answers at .* is no job server"):
            JobServer(f"http://127.0.0.1:{other.server_port}")
        other.shutdown()


@pytest.mark.parametrize(
    "url",
    ["auto", "head:8265", "ray://head:10001", "http://", "http://[::1", "http://head:82a5"],
)
def test_what_is_no_address_of_a_job_server_is_refused(url: str) -> None:
    with pytest.raises(CscError, match="no address of a job server"):
        server_url(url)


@pytest.mark.parametrize("url", ["https://me:hidden@head:8265", "me:hidden@head:8265"])
def test_an_address_with_a_password_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(CscError, match="a password: leave it out") as refused:
        server_url(url)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "url"),
    [("http://head:8265", "http://head:8265"), ("10.0.0.1:6379", "http://127.0.0.1:8265")],
)
def test_a_cluster_that_is_no_job_server_is_not_taken_for_one(
    address: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert server_url(None) == url


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("workspace='work'", "workspace is 'work', which only this machine can find"),
        ("workspace='~/work'", "s3:// address, or the absolute path"),
        ("workspace='s3://bucket/w'", "set mlflow.uri to a server"),
        ("mlflow.uri='http://me:hidden@mlflow'", "mlflow.uri holds a password.*MLFLOW_TRACKING_"),
        ("mlflow.uri='postgresql://db/x?password=hidden'", "mlflow.uri holds a password"),
        ("mlflow.uri='sqlite:///mine.db'", "mlflow.uri is 'mine.db'"),
        ("ingest.corpora.0.root='s3://id:hidden@bucket'", "ingest.corpora.0.root holds a password"),
        ("ingest.corpora.0.root='file:speech'", "ingest.corpora.0.root is 'file:speech'"),
        ("ingest.corpora.0.root='speech'", "ingest.corpora.0.root is 'speech'"),
        ("train.init_from='models/a'", "train.init_from is 'models/a'"),
    ],
)
def test_what_a_cluster_cannot_find_or_should_not_know_is_refused(
    mine: Path, override: str, said: str
) -> None:
    with pytest.raises(CscError, match=said) as refused:
        for_cluster("run", load_config(str(mine), [override]))
    assert "hidden" not in str(refused.value)


def test_a_store_can_be_made_without_mlflow(mine: Path) -> None:
    remote = load_config(str(mine), ["workspace='s3://bucket/w'", "train.init_from='models:/a@b'"])
    assert for_cluster("ingest", remote).ray.address == "auto"


def test_an_at_sign_alone_is_no_password(mine: Path) -> None:
    config = load_config(str(mine), ["ingest.corpora.0.root='/data//anna@home'"])
    assert for_cluster("ingest", config).ingest.corpora[0].root == "/data//anna@home"


def test_no_secret_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert passed_on(["AWS_ENDPOINT_URL"]) == {"AWS_ENDPOINT_URL": "http://minio:9000"}
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "hf_token"):
        monkeypatch.setenv(name, "hidden")
        with pytest.raises(CscError, match=f"--env {name} looks like a secret"):
            passed_on([name])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hidden@minio:9000")
    with pytest.raises(CscError, match="looks like a secret"):
        passed_on(["AWS_ENDPOINT_URL"])
    with pytest.raises(CscError, match="NOT_SET_ANYWHERE: it is not set here"):
        passed_on(["NOT_SET_ANYWHERE"])


def test_what_is_shipped_goes_before_what_is_installed_and_has_the_sample_only_where_named(
    mine: Path,
) -> None:
    config = load_config(str(mine))
    with packed(config) as folder:
        script = "import jobs, pipeline; print(jobs.__file__, pipeline.__file__)"
        found = subprocess.check_output([sys.executable, "-B", "-c", script], cwd=folder, text=True)
        assert found.split() == [f"{folder}/{name}/__init__.py" for name in ("jobs", "pipeline")]
        assert load_config(str(folder / CONFIG_FILE)) == config
        assert (folder / "jobs/configs/demo.toml").exists()
        assert (folder / "pipeline/descriptions/voxceleb.toml").exists()
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if path.suffix in (".pyc", ".opus")]
        assert sum(path.stat().st_size for path in files) < 3e6
    with packed(load_config("demo")) as folder:
        assert (folder / "pipeline/sample/README.md").exists()


@pytest.mark.parametrize("overrides", [[], ["ingest.corpora.0.like='voxceleb'"]])
def test_a_configuration_that_was_printed_is_read_as_the_same(
    mine: Path, tmp_path: Path, overrides: list[str]
) -> None:
    printed = tmp_path / "mine.json"
    words = [word for text in overrides for word in ("--set", text)]
    printed.write_text(csc("config", "--config", mine, *words)[1])
    assert load_config(str(printed)) == load_config(str(mine), overrides)
    assert load_config(str(printed), ["seed=8"]).seed == 8
    printed.write_text("{'a': 1}")
    with pytest.raises(CscError, match=r"mine\.json: .*; correct the file"):
        load_config(str(printed))
    printed.write_text("[1]")
    with pytest.raises(CscError, match=r"mine\.json: the configuration: "):
        load_config(str(printed))
