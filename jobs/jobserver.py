"""The job server of a Ray cluster: who answers there, which jobs are ours, and what they say."""

import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jobs.reach import authorization, check_server, refusal
from pipeline.errors import CscError

DEFAULT_URL = "http://127.0.0.1:8265"
URL_VARIABLE = "RAY_API_SERVER_ADDRESS"
RAY_VARIABLE = "RAY_ADDRESS"  # which may as well name what is no job server
ANSWER_S = 60.0  # that a server may be silent for: Ray's client would wait for ever
NOT_YET = "No available agent"  # what a head answers that has only just begun
BEGINS_S = 60.0  # that it may do so
STOPPED = 130  # exit code, as after Ctrl-C
STOP_GRACE_S = 30  # from the signal until what has not ended is killed
RETRY_S = POLL_S = 1.0
UNDER_WAY = ("PENDING", "RUNNING")
ABOUT = {"stage", "config", "workspace", "by"}  # what a job of ours has with it
WATCHER_DIED = "JOB_SUPERVISOR_ACTOR_DIED"
WATCHER_MISSED = "JOB_SUPERVISOR_ACTOR_START_FAILURE"  # and has a node only if it was there once
GO_ON = "submit again, to go on from what the workspace holds"
LOST_COMMAND = f"echo 'lost with the head of the cluster: {GO_ON}'; exit 1"
MOST_NAMED = 20
RAY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
# Read by Ray where the job runs: it is stopped as by Ctrl-C, and has time to put things in order.
STOPPED_BY = {
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
}


class LostError(CscError):
    """The server did not answer, or not as it should: later it may."""


class SilentError(LostError):
    """The server did not answer: it may have done what it was asked."""


class UnknownJobError(CscError):
    """There is no such job."""


class Job(NamedTuple):
    """A stage that was submitted, and what has become of it."""

    id: str
    stage: str
    config: str  # hash of the resolved configuration
    workspace: str
    by: str  # user@host
    state: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    message: str
    began: datetime | None
    ended: datetime | None
    command_exit_code: int | None  # None where the command did not begin or was stopped
    lost: bool  # with the process that watched its command

    @property
    def under_way(self) -> bool:
        return self.state in UNDER_WAY

    @property
    def exit_code(self) -> int:
        """Return 0 for success, 130 if stopped, what the command said (3: refused), else 1."""
        if self.state == "SUCCEEDED":
            return 0
        if self.state == "STOPPED":
            return STOPPED
        said = self.command_exit_code or 0
        return said if 0 < said < 256 else 1


def server_url(given: str | None) -> str:
    """Return the address of a job server: as given, as Ray's variables say, or on this machine.

    Raises:
        CscError: it is none, or holds a password.
    """
    rays = os.environ.get(RAY_VARIABLE, "")
    rays = rays if rays.startswith("http") else ""
    text = given or os.environ.get(URL_VARIABLE) or rays or DEFAULT_URL
    if "@" in text:
        raise CscError(
            "the address of the cluster holds a user name or a password: leave it out; Ray takes "
            "a token, from the file that RAY_AUTH_TOKEN_PATH names"
        )
    try:
        parts = urlsplit(text)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets, and of a port that is no number
        named = False
    if not named:
        raise CscError(
            f"{text} is no address of a job server: give one as http://HEAD:8265, with --cluster "
            f"or in {URL_VARIABLE}"
        )
    return parts.geturl().rstrip("/")


class JobServer:
    """What a cluster runs for `csc`; jobs of others are left alone."""

    def __init__(self, url: str) -> None:
        """Connect.

        Raises:
            CscError: nothing answers, the token is refused, or versions differ.
        """
        self.url, headers = url, authorization()
        check_server(url, headers)
        for name in RAY_LOGGERS:  # each is set to tell of every upload
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._explained(), _variable(URL_VARIABLE, url):  # which goes before what it is told
            self._client = _client(url, headers)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            raise CscError(refusal(self.url, sent=True)) from error
        except (RequestException, OSError) as error:
            raise SilentError(
                f"the cluster at {self.url} does not answer: see whether it runs"
            ) from error
        except RuntimeError as error:  # the server's trace
            reason = str(error).strip(" \n.").splitlines()[-1]
            raise LostError(f"the cluster at {self.url} refused: {reason}") from error

    def jobs(self) -> list[Job]:
        """Return the jobs that `csc` submitted, the newest first."""
        with self._explained():
            found = [_job(details) for details in self._client.list_jobs()]
        ours = [job for job in found if job is not None]
        return sorted(ours, key=lambda job: (job.began is None, job.began), reverse=True)

    def job(self, job_id: str) -> Job:
        """Return one of them.

        Raises:
            CscError: it is not there; the message names those that are.
        """
        jobs = self.jobs()
        job = next((job for job in jobs if job.id == job_id), None)
        if job is None:
            names = ", ".join(job.id for job in jobs[:MOST_NAMED]) or "none"
            raise UnknownJobError(f"no job {job_id!r} at {self.url}; there are: {names}")
        return job

    def submit(
        self,
        job_id: str,
        command: str,
        about: dict[str, str],
        runtime_env: dict[str, Any],
        warn: Callable[[str], object],
    ) -> None:
        """Have a command run on the cluster; `about` has what `Job` tells of it.

        Raises:
            CscError: a job of this id has been submitted before, or the server says why not.
        """
        until, warned = time.monotonic() + BEGINS_S, False
        while True:
            try:
                return self._submit(job_id, command, about, runtime_env)
            except LostError as error:
                if NOT_YET not in str(error) or time.monotonic() > until:
                    raise
            if not warned:
                warn(f"the cluster at {self.url} has only just begun: waiting {BEGINS_S:.0f} s")
            warned = True
            time.sleep(RETRY_S)

    def _submit(
        self, job_id: str, command: str, about: dict[str, str], runtime_env: dict[str, Any]
    ) -> None:
        try:
            with self._explained():
                self._client.submit_job(
                    submission_id=job_id,
                    entrypoint=command,
                    metadata=about,
                    runtime_env=runtime_env,
                )
        except SilentError as error:
            raise SilentError(
                f"{error}; {job_id} may have been submitted all the same: look with csc jobs"
            ) from error

    def log(self, job_id: str) -> str:
        """Return what a job has said so far."""
        with self._explained():
            return str(self._client.get_job_logs(self.job(job_id).id))

    def stop(self, job_id: str) -> Job:
        """Stop a job as Ctrl-C would, and return it when it has ended."""
        job = self.job(job_id)
        if job.under_way:
            with self._explained():
                self._client.stop_job(job_id)
        until = time.monotonic() + 2 * STOP_GRACE_S
        while job.under_way:
            if time.monotonic() > until:
                raise CscError(f"{job_id} was told to stop and is still {job.state}: try again")
            time.sleep(POLL_S)
            job = self.job(job_id)
        return job

    def tail(self, job_id: str) -> AsyncGenerator[str, None]:
        """Yield a log from its beginning, in parts, and what is added until the job has ended."""
        return self._client.tail_job_logs(job_id)

    def recover(self, job: Job) -> None:
        """Have the head see whether a job is lost that a head before it began.

        A new head finds such a job in its Redis, and lists it as under way until its agent is
        first asked for something. A log is asked for where the job began; a submission reaches
        the agent, which looks after what it finds, and refuses an id that is there. So look at the
        job right before: a head that has forgotten it would run this, and list it as ours, failed.
        """
        with suppress(LostError), self._explained():
            self._client.submit_job(
                submission_id=job.id, entrypoint=LOST_COMMAND, metadata=_about(job)
            )


def _client(url: str, headers: dict[str, str]) -> Any:
    """Return Ray's client, which by itself would wait for an answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=ANSWER_S, **kwargs)

    return Client(url, headers=headers)


def _job(details: Any) -> Job | None:
    """Return a job of Ray's as one of ours, or None if it is somebody else's."""
    about = details.metadata or {}
    if not details.submission_id or not about.keys() >= ABOUT:
        return None
    return Job(
        id=details.submission_id,
        stage=about["stage"],
        config=about["config"],
        workspace=about["workspace"],
        by=about["by"],
        state=str(details.status.value),
        message=details.message or "",
        began=_moment(details.start_time),
        ended=_moment(details.end_time),
        command_exit_code=details.driver_exit_code,
        lost=_lost(details),
    )


def _about(job: Job) -> dict[str, str]:
    """Return what a job of ours was submitted with."""
    return {name: text for name, text in job._asdict().items() if name in ABOUT}


def _lost(details: Any) -> bool:
    """Say whether the process that watched a command was there and is no more."""
    missed = details.error_type == WATCHER_MISSED and details.driver_node_id is not None
    return missed or details.error_type == WATCHER_DIED


def _moment(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
