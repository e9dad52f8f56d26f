"""Activity records: which stage is at work in a workspace, where, how far, and what it costs.

Each piece of work has one small object, `activity/STAGE/TIME-XXXXXXXX.json`, which a thread beside
the work overwrites at every beat: a run that is killed is known, with its cost up to the last beat.
Times are UTC by the clock of the machine that works. Where a reader's clock is ahead of it by more
than `LOST_AFTER_S`, work that goes on looks lost; where it is behind, lost work looks alive for as
much longer. Costs are measured by one machine alone and do not depend on that.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CscError
from pipeline.storage import READS_AT_ONCE, Folder

FOLDER = "activity"
SCHEDULE_VARIABLE = "CSC_SCHEDULE"  # names the schedule that a command was started by
BEAT_S, LOST_AFTER_S = 30.0, 300.0
NEWEST = 1000
LONGEST_REASON = 500
State = Literal["running", "finished", "failed", "stopped", "lost"]


class Activity(BaseModel):
    """A piece of work as its record says, by the last beat; `lost` is what a reader makes of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # later versions may say more

    stage: str
    name: str  # the id of what is made
    schedule: str = ""
    ticket: int = 0  # its place among runs of the schedule; 0 while it has none
    host: str
    pid: int
    began: datetime
    updated: datetime
    cores: float = 0.0  # that the stage could use at the last beat
    gpus: float = 0.0
    core_s: float = 0.0  # summed over time: cost, whether they were busy or not
    gpu_s: float = 0.0
    done: int = 0  # of `total`, in the units of the stage
    total: int = 0
    state: State = "running"
    reason: str = ""  # why it failed


class Record:
    """The record of work that is going on, and the way to say how far it is."""

    def __init__(
        self, workspace: Folder, first: Activity, usable: Callable[[], tuple[float, float]]
    ) -> None:
        stem = f"{first.began:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self.file = f"{FOLDER}/{first.stage}/{stem}.json"
        self._workspace, self._activity, self._usable = workspace, first, usable
        self._beaten = time.monotonic()
        self._progress = {"done": 0, "total": 0}
        self._one_beat = threading.Lock()

    def progress(self, done: int, total: int) -> None:
        """Have the next beat tell how far the work is."""
        self._progress = {"done": done, "total": total}

    def take(self, ticket: int) -> None:
        """Write down a place among the runs of the schedule."""
        with self._one_beat:
            self._activity = self._activity.model_copy(update={"ticket": ticket})
        self.beat()

    def beat(self, state: State = "running", reason: str = "") -> None:
        """Add up the cost since the last beat and write the record."""
        with self._one_beat:
            cores, gpus = self._at_hand()
            now = time.monotonic()
            passed_s, self._beaten = now - self._beaten, now
            update = {
                "updated": datetime.now(UTC),
                "cores": cores,
                "gpus": gpus,
                "core_s": self._activity.core_s + passed_s * cores,
                "gpu_s": self._activity.gpu_s + passed_s * gpus,
                "state": state,
                "reason": reason,
                **self._progress,
            }
            self._activity = self._activity.model_copy(update=update)
            self._workspace.put(self.file, self._activity.model_dump_json(indent=1).encode())

    def _at_hand(self) -> tuple[float, float]:
        try:
            return self._usable()
        except Exception:  # Ray is down, which is when the end of the work is to be told
            return self._activity.cores, self._activity.gpus


@contextmanager
def activity(
    workspace: Folder,
    stage: str,
    name: str,
    *,
    schedule: str = "",
    beat_s: float = BEAT_S,
    usable: Callable[[], tuple[float, float]] | None = None,
) -> Iterator[Record]:
    """Keep a record of the work inside, which ends as finished, failed, or stopped by Ctrl-C.

    `name` is the id of what is made, `schedule` what started it (else $CSC_SCHEDULE), `usable` says
    what cores and GPUs are at hand. A beat that cannot be written is made up for by the next;
    whatever goes wrong with a record, the work goes on.
    """
    now = datetime.now(UTC)
    first = Activity(
        stage=stage,
        name=name,
        schedule=schedule or os.environ.get(SCHEDULE_VARIABLE, ""),
        host=socket.gethostname(),
        pid=os.getpid(),
        began=now,
        updated=now,
    )
    record, over = Record(workspace, first, usable or usable_now), threading.Event()

    def beats() -> None:
        while True:
            with suppress(Exception):
                record.beat()
            if over.wait(beat_s):
                return

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    state: State = "failed"
    reason = ""
    try:
        yield record
        state = "finished"
    except KeyboardInterrupt:
        state = "stopped"
        raise
    except BaseException as error:
        reason = _reason(error)
        raise
    finally:
        over.set()
        thread.join()
        with suppress(Exception):
            record.beat(state, reason)


def _reason(error: BaseException) -> str:
    """Return what a message for the user says; others may hold anything."""
    said = str(error).partition("\n")[0] if isinstance(error, CscError) else ""
    return (said or type(error).__name__)[:LONGEST_REASON]


def usable_now() -> tuple[float, float]:
    """Return the cores and GPUs that a stage can use: all of Ray's where it is up, else one core.

    Without Ray, a GPU counts once this process uses one. Nothing is imported or started for it.
    """
    ray: Any = sys.modules.get("ray")
    if hasattr(ray, "is_initialized") and ray.is_initialized():  # it may be half imported
        resources = ray.cluster_resources()
        cores = float(resources.get("CPU", 0))
        if len(ray.nodes()) == 1:  # a Ray of one machine may be told of more than it has
            cores = min(cores, float(os.cpu_count() or 1))
        return cores, float(resources.get("GPU", 0))
    cuda: Any = sys.modules.get("torch.cuda")
    return 1.0, float(hasattr(cuda, "is_initialized") and cuda.is_initialized())


def activities(
    workspace: Folder, *, newest: int = NEWEST, lost_after_s: float = LOST_AFTER_S
) -> list[Activity]:
    """Return the newest pieces of work of a workspace, the newest first, by one listing.

    Raises:
        CscError: a record is damaged.
    """
    folder = workspace.child(FOLDER)
    files = [file.name for file in folder.list() if file.name.endswith(".json")]
    files.sort(key=lambda name: name.rpartition("/")[2], reverse=True)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda name: _read(folder, name), files[:newest]))
    found.sort(key=lambda one: one.began, reverse=True)
    deadline = datetime.now(UTC) - timedelta(seconds=lost_after_s)
    return [_seen(one, deadline) for one in found]


def _read(folder: Folder, name: str) -> Activity:
    try:
        return Activity.model_validate_json(folder.read(name))
    except ValidationError as error:
        raise CscError(f"{folder.path(name)} is damaged: remove it") from error


def _seen(one: Activity, deadline: datetime) -> Activity:
    lost = one.state == "running" and one.updated < deadline
    return one.model_copy(update={"state": "lost"}) if lost else one
