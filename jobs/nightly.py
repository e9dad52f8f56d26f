"""What recurring runs need: end at once where nothing is new, and never overlap."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from jobs.activity import BEAT_S, LOST_AFTER_S, SCHEDULE_VARIABLE, Activity, activities, activity
from jobs.config import Config
from jobs.console import say
from jobs.finetune import pinned
from jobs.registry import CHAMPION, Registry, Version
from jobs.train import model_id
from pipeline.build import dataset_id
from pipeline.errors import CscError
from pipeline.schema import config_hash
from pipeline.storage import Folder

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
        CscError: another alias, or a model whose separator is to be kept, points to no version.
    """
    champion = f"models:/{registry.model}@{CHAMPION}"
    keeps_it = config.train.freeze_separator
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
    _outwait(workspace, schedule, poll_s, lost_after_s)
    costs_nothing = (0.0, 0.0)  # the records of its stages say what they cost
    with (
        _named(schedule),
        activity(
            workspace, "schedule", schedule, beat_s=beat_s, usable=lambda: costs_nothing
        ) as record,
    ):
        record.beat()  # of two that start at once, one at least sees the other by now
        ours, others = _parted(workspace, schedule, lost_after_s)
        began = max(one.began for one in ours)
        _refuse(schedule, [one for one in others if one.began <= began])
        yield


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


def _outwait(workspace: Folder, schedule: str, poll_s: float, lost_after_s: float) -> None:
    """Wait until no record of other runs counts as alive; refuse where one is written anew."""
    found = others = _parted(workspace, schedule, lost_after_s)[1]
    if found:
        last = max(found, key=lambda one: one.updated)
        say(
            f"schedule {schedule}: the last sign of life of a run on {last.host} is of "
            f"{last.updated:%H:%M:%S} UTC; waiting for another, or until it counts as lost, "
            f"{lost_after_s:.0f} s after it"
        )
    while others:
        time.sleep(poll_s)
        others = _parted(workspace, schedule, lost_after_s)[1]
        _refuse(schedule, [one for one in others if one not in found])


def _parted(
    workspace: Folder, schedule: str, lost_after_s: float
) -> tuple[list[Activity], list[Activity]]:
    """Return the live records of a schedule: those of this process, and those of others."""
    here = (socket.gethostname(), os.getpid())
    ours: list[Activity] = []
    others: list[Activity] = []
    for one in activities(workspace, lost_after_s=lost_after_s):
        if (one.schedule, one.state) == (schedule, "running"):
            (ours if (one.host, one.pid) == here else others).append(one)
    return ours, others


def _refuse(schedule: str, others: list[Activity]) -> None:
    if not others:
        return
    oldest = min(others, key=lambda one: one.began)
    raise OverlapError(
        f"schedule {schedule} is at work on {oldest.host} since {oldest.began:%Y-%m-%d %H:%M} UTC: "
        "nothing was started"
    )
