"""Of those who promote at once one goes on: MLflow itself lets the last writer of an alias win.

What MLflow does guard is the numbers of versions, so these are tickets: the lowest goes first.
"""

import getpass
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from jobs.console import say
from jobs.registry import Registry, Ticket
from pipeline.errors import CscError

LOCK_S = 600  # after which others take its holder for killed
HELD_S = 300  # for which its holder counts on it: a request may be on its way for the rest


class Promotion:
    """One's place among those who promote at the same time."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._holder = registry, uuid.uuid4().hex
        self._began_s = time.monotonic()

    def take(self) -> None:
        """Take a ticket, and go on only if nobody holds a lower one; remove those of the killed.

        Their age is by the clock that dated both: that of MLflow's server. Where `mlflow.uri` is a
        database there is none, and the clocks of those who promote must agree to a few minutes.

        Raises:
            CscError: somebody else is promoting.
        """
        self._registry.take_ticket(self._holder, f"{user()}@{socket.gethostname()}")
        held = self._registry.tickets()
        own = self._lowest(held)
        for other in held:
            if other.number < own.number:
                self._check_killed(other, max(own.made_ms - other.made_ms, 0) / 1000)
                self._registry.drop_ticket(other)

    def check(self) -> None:
        """Assert that nobody else can have gone on meanwhile.

        Raises:
            CscError: somebody may have: this one stood still for too long.
        """
        self._lowest(self._registry.tickets())

    def drop(self) -> None:
        """Let others go on. What was done is done: where it fails, that is said and not raised."""
        try:
            for ticket in self._registry.tickets():
                if ticket.holder == self._holder:
                    self._registry.drop_ticket(ticket)
        except CscError as error:
            minutes = LOCK_S // 60
            say(f"a ticket may be left, then nobody can promote for {minutes} minutes: {error}")

    def _lowest(self, held: Sequence[Ticket]) -> Ticket:
        """Return the own ticket: the lowest, as a request that was repeated has made several."""
        own = [ticket for ticket in held if ticket.holder == self._holder]
        if not own or time.monotonic() - self._began_s >= HELD_S:
            raise CscError(
                "the promotion stood still for too long, others may have gone on: look at "
                "csc models, and run again"
            )
        return min(own)

    def _check_killed(self, other: Ticket, age_s: float) -> None:
        if age_s > LOCK_S:
            return
        since = datetime.fromtimestamp(other.made_ms / 1000, UTC)
        raise CscError(
            f"somebody else is promoting a version of {self._registry.model}: {other.by} since "
            f"{since:%H:%M:%S} UTC; run again when they are done or, if they were killed, in "
            f"{math.ceil((LOCK_S - age_s) / 60)} min"
        )


@contextmanager
def promotion(registry: Registry) -> Iterator[Promotion]:
    """Keep others from moving the champion, for some minutes at most.

    Raises:
        CscError: somebody else is promoting.
    """
    held = Promotion(registry)
    try:
        held.take()
        yield held
    finally:
        held.drop()  # also after a request whose answer was lost


def user() -> str:
    """Return who is at work; a container's user may have a number only."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
