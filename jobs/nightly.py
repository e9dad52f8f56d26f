"""What recurring runs need: end at once where nothing is new, and never overlap."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from jobs.activity import (
    BEAT_S,
    LOST_AFTER_S,
    SCHEDULE_VARIABLE,
    Activity,
    Record,
    activities,
    activity,
)
from jobs.config import Config
from jobs.console import say
from jobs.finetune import pinned
from jobs.registry import CHAMPION, Registry, Version
from jobs.train import model_id
from pipeline.build import dataset_id
from pipeline.errors import CscError
from pipeline.schema import config_hash
from pipeline.storage import Folder

STAGE = "schedule"  # of the record that a run of one keeps
Others = Callable[[], list[Activity]]
POLL_S = 5.0  # from one look at the records of another run to the next
DONE = "csc.done."  # and a hash of what was judged: a tag of the version that came of it


class OverlapError(CscError):
    """Another run of the same schedule is at work."""


def way_id(store: Any, config: Config) -> str:
    """Return a hash of what a whole run goes by: a store, given its index, and the settings.

    A model to begin with counts as it is written: `@champion` stays the same when it moves on.
    """
    dataset = {"id": dataset_id(store, config.build, config.seed)}
    judged_by = (config.evaluate.model_dump(), config.promote.model_dump())
    return config_hash([model_id(dataset, config), judged_by])


def mark_done(registry: Registry, version: Version, way: str) -> None:
    """Note with a version that its whole way was gone, the gate's decision included."""
    registry.tag(version, {DONE + way: datetime.now(UTC).isoformat(timespec="seconds")})


def made_before(registry: Registry, way: str) -> Version | None:
    """Return the version that this way led to before, if any."""
    return next((one for one in registry.versions() if DONE + way in one.tags), None)


def begun(config: Config, registry: Registry) -> Config:
    """Return what `pinned` does, but begin from scratch where the champion is yet to come.

    Raises:
        CscError: another alias, or one whose model is to be kept, points to no version.
    """
    champion = f"models:/{registry.model}@{CHAMPION}"
    keeps_it = config.train.freeze_separator or config.train.task == "extract"
    if config.train.init_from != champion or keeps_it or registry.by_alias(CHAMPION):
        return pinned(config, registry)
    say(f"  {champion}: there is no champion yet, training begins from scratch")
    return config.model_copy(update={"train": config.train.model_copy(update={"init_from": None})})


@contextmanager
def alone(
    workspace: Folder,
    schedule: str,
    *,
    beat_s: float = BEAT_S,
    poll_s: float = POLL_S,
    lost_after_s: float = LOST_AFTER_S,
) -> Iterator[None]:
    """Keep a record that a schedule is at work, and refuse to start where it already is.

    A run that was killed has left a record as well: while it stands still this waits, at most
    until it counts as lost, `lost_after_s` after its last beat.

    Raises:
        OverlapError: a run of it is alive, by its record in the workspace.
    """
    others = partial(_others, workspace, schedule, lost_after_s)
    _outwait(schedule, others, poll_s, lost_after_s)
    costs_nothing = (0.0, 0.0)  # the records of its stages say what they cost
    with (
        _named(schedule),
        activity(workspace, STAGE, schedule, beat_s=beat_s, usable=lambda: costs_nothing) as record,
    ):
        _go_first(schedule, record, others, poll_s)
        yield


def _go_first(schedule: str, record: Record, others: Others, poll_s: float) -> None:
    """Go on only if no other run has an earlier ticket: of those that start at once, one does.

    As in Lamport's bakery: tell that a ticket is to come, take one that is later than all that are
    there, wait until everybody who told has one.
    """

    def rivals() -> list[Activity]:
        return [one for one in others() if one.stage == STAGE]

    record.beat()
    ticket = 1 + max((one.ticket for one in rivals()), default=0)
    record.take(ticket)
    found = rivals()
    while not all(one.ticket for one in found):
        time.sleep(poll_s)
        found = rivals()
    mine = (ticket, *_here())
    _refuse(schedule, [one for one in found if (one.ticket, one.host, one.pid) < mine])


@contextmanager
def _named(schedule: str) -> Iterator[None]:
    """Have all records of work say which schedule it is for."""
    before = os.environ.get(SCHEDULE_VARIABLE)
    os.environ[SCHEDULE_VARIABLE] = schedule
    try:
        yield
    finally:
        del os.environ[SCHEDULE_VARIABLE]
        if before is not None:
            os.environ[SCHEDULE_VARIABLE] = before


def _outwait(schedule: str, others: Others, poll_s: float, lost_after_s: float) -> None:
    """Wait until no record of other runs counts as alive; refuse where one is written anew."""
    found = left = others()
    if found:
        last = max(found, key=lambda one: one.updated)
        say(
            f"schedule {schedule}: the last sign of life of a run on {last.host} is of "
            f"{last.updated:%H:%M:%S} UTC; waiting for another, or until it counts as lost, "
            f"{lost_after_s:.0f} s after it"
        )
    while left:
        time.sleep(poll_s)
        left = others()
        _refuse(schedule, [one for one in left if one not in found])


def _others(workspace: Folder, schedule: str, lost_after_s: float) -> list[Activity]:
    """Return the live records of a schedule that other processes keep."""
    return [
        one
        for one in activities(workspace, lost_after_s=lost_after_s)
        if (one.schedule, one.state) == (schedule, "running") and (one.host, one.pid) != _here()
    ]


def _here() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _refuse(schedule: str, others: list[Activity]) -> None:
    if not others:
        return
    oldest = min(others, key=lambda one: one.began)
    raise OverlapError(
        f"schedule {schedule} is at work on {oldest.host} since {oldest.began:%Y-%m-%d %H:%M} UTC: "
        "nothing was started"
    )
