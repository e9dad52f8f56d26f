"""Following a job of a cluster to its end, through lost connections and lost heads."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime

from jobs.jobserver import GO_ON, RETRY_S, Job, JobServer, LostError, UnknownJobError
from pipeline.errors import CscError

PATIENCE_S = 300.0  # that a server may be out of reach while a job is followed
SILENCE_S = 60.0  # after which a log is asked for anew, and the head for a job without any


def follow(
    server: JobServer,
    job_id: str,
    write: Callable[[str], object],
    warn: Callable[[str], object],
) -> Job:
    """Write the log of a job that is there as it grows, and return the job when it has ended.

    A lost connection is taken up again, and what was written is not written twice.

    Raises:
        CscError: the cluster stayed out of reach, or came back and does not know the job.
    """
    follower = _Follower(server, job_id, write, warn)
    while True:
        job = follower.look()
        if job is not None and not job.under_way:
            follower.finish()
            return job
        if job is None or not follower.hear(job):
            time.sleep(RETRY_S)


class _Follower:
    """What is known of a job that is followed, and how much of its log is written."""

    def __init__(
        self,
        server: JobServer,
        job_id: str,
        write: Callable[[str], object],
        warn: Callable[[str], object],
    ) -> None:
        self._server, self._id, self._warn = server, job_id, warn
        self._log, self._asked, self._silent_since = _Log(write), False, time.monotonic()
        self._began: datetime | None = None
        self._lost_at: float | None = None

    def look(self) -> Job | None:
        """Return the job, or None if the server is out of reach, which is borne for a while."""
        try:
            job = self._server.job(self._id)
        except LostError as error:
            self._bear(error)
            return None
        except UnknownJobError as error:
            raise self._lost_with_head() from error
        self._lost_at, self._began = None, self._began or job.began
        if job.began != self._began:  # another of this id: a new head numbers from 1
            raise self._lost_with_head()
        return job

    def _bear(self, error: LostError) -> None:
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            self._warn(f"{error}; the job may go on, trying again for {PATIENCE_S:.0f} s")
        if now - self._lost_at > PATIENCE_S:
            raise CscError(
                f"{error}. Once it does, submit again with --attach: what still runs is "
                "followed; else it goes on from what the workspace holds"
            ) from error

    def _lost_with_head(self) -> CscError:
        return CscError(
            f"{self._id} is lost with the head of the cluster: what answers at "
            f"{self._server.url} began anew; {GO_ON}"
        )

    def hear(self, job: Job) -> bool:
        """Write what comes of the log, or ask for a job of which nothing came; say if any came."""
        if time.monotonic() - self._silent_since >= SILENCE_S:
            self._ask(job)
            return False
        heard = asyncio.run(self._tail())
        if heard:
            self._silent_since = time.monotonic()
        return heard

    async def _tail(self) -> bool:
        """Take the log up from its beginning, to its end or the connection's; say if any came."""
        from aiohttp import ClientError

        heard = False
        async with aclosing(self._server.tail(self._id)) as parts:
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        part = await anext(parts, None)
                except (ClientError, OSError, RuntimeError):
                    return heard
                if part is None:
                    return heard
                self._log.take(part, begins=not heard)
                heard = True

    def _ask(self, job: Job) -> None:
        """Have the head see whether a job is still there of whose log nothing comes."""
        if not self._asked:
            self._warn(f"{job.id} is {job.state} and nothing comes of its log: asking the head")
        self._server.recover(job)  # which may take as long as a silence lasts
        self._asked, self._silent_since = True, time.monotonic()

    def finish(self) -> None:
        """Write what is left of the log, which may be lost with its node: the outcome is not."""
        try:
            self._log.take(self._server.log(self._id), begins=True)
        except (LostError, UnknownJobError) as error:
            self._warn(f"the end of its log cannot be read: {error}")


class _Log:
    """Writes a log that is read from its beginning several times, each part once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._written, self._place = write, 0, 0

    def take(self, part: str, *, begins: bool) -> None:
        """Write what is new of a part, which goes on after the last one or begins anew."""
        self._place = 0 if begins else self._place
        new = part[max(0, self._written - self._place) :]
        self._place += len(part)
        self._written = max(self._written, self._place)
        if new:
            self._write(new)
