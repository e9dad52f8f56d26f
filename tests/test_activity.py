"""Records of work: how each kind of end is told, and what is known of work that was killed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.activity import SCHEDULE_VARIABLE, Activity, activities, activity, usable_now
from pipeline.errors import CscError
from pipeline.storage import Folder

BEAT_S = 0.05
WORK = """
import sys, time
from jobs.activity import activity
from pipeline.storage import Folder
with activity(Folder.at(sys.argv[1]), "train", "abc", beat_s=0.1, usable=lambda: (4.0, 1.0)) as it:
    it.progress(3, 8)
    time.sleep(60)
"""


def recorded(workspace: Folder, error: BaseException | None = None) -> Activity:
    """Do a short piece of work that ends as told, and return what is known of it."""
    with activity(workspace, "build", "abc", beat_s=BEAT_S, usable=lambda: (2.0, 0.5)):
        if error is not None:
            raise error
    return activities(workspace)[0]


def until(workspace: Folder, holds: Callable[[Activity], bool]) -> Activity:
    """Return the newest record once something holds of it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = activities(workspace)
        if found and holds(found[0]):
            return found[0]
        time.sleep(BEAT_S)
    raise AssertionError("it never held")


@pytest.mark.parametrize("where", ["local", "s3"])
def test_killed_work_is_lost_with_its_cost_up_to_the_last_beat(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = f"{request.getfixturevalue('s3')}/{tmp_path.name}" if where == "s3" else str(tmp_path)
    workspace = Folder.at(address)
    process = subprocess.Popen([sys.executable, "-c", WORK, address])
    try:
        alive = until(workspace, lambda one: one.core_s > 1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (alive.state, alive.stage, alive.name) == ("running", "train", "abc")
    assert (alive.pid, alive.done, alive.total) == (process.pid, 3, 8)
    assert activities(workspace)[0].state == "running"  # nobody can know yet
    time.sleep(0.3)
    (lost,) = activities(workspace, lost_after_s=0.2)
    assert lost.state == "lost"
    assert lost.core_s >= alive.core_s
    assert lost.core_s == 4 * lost.gpu_s
    seconds = (lost.updated - lost.began).total_seconds()
    assert lost.gpu_s == pytest.approx(seconds, abs=0.5)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (CscError("no room; remove files\nand more"), "failed", "no room; remove files"),
        (RuntimeError("s3://key:secret@bucket"), "failed", "RuntimeError"),
        (SystemExit(1), "failed", "SystemExit"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_work_ends_as_it_ended_and_its_error_passes(
    tmp_path: Path, error: BaseException | None, state: str, reason: str
) -> None:
    workspace = Folder.at(tmp_path)
    if error is None:
        recorded(workspace)
    else:
        with pytest.raises(type(error)) as caught:
            recorded(workspace, error)
        assert caught.value is error
    (ended,) = activities(workspace, lost_after_s=0)  # what has ended is not lost, however old
    assert (ended.state, ended.reason) == (state, reason)
    (file,) = tmp_path.rglob("*.json")
    assert "secret" not in file.read_text()
    before = file.read_bytes()
    time.sleep(3 * BEAT_S)
    assert file.read_bytes() == before  # nothing beats after the end


def test_states_only_go_from_running_to_an_end_and_cost_only_grows(tmp_path: Path) -> None:
    workspace, seen = Folder.at(tmp_path), []
    with activity(workspace, "build", "abc", beat_s=BEAT_S, usable=lambda: (2.0, 0.5)) as record:
        for done in range(20):
            record.progress(done, 20)
            seen += activities(workspace)
            time.sleep(BEAT_S / 2)
    seen += activities(workspace)
    assert [one.state for one in seen] == ["running"] * (len(seen) - 1) + ["finished"]
    assert len({one.core_s for one in seen}) > 5
    for before, after in pairwise(seen):
        assert before.core_s <= after.core_s
        assert before.done <= after.done
        assert before.updated <= after.updated
        assert before.began == after.began
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_cost_follows_the_cores_that_there_are(tmp_path: Path) -> None:
    workspace, cores = Folder.at(tmp_path), 1.0
    with activity(workspace, "build", "abc", beat_s=BEAT_S, usable=lambda: (cores, 0.0)):
        small = until(workspace, lambda one: one.core_s > 0.1)
        cores = 100.0
        until(workspace, lambda one: one.cores == 100)
        large = until(workspace, lambda one: one.core_s > small.core_s + 20)
    seconds = (large.updated - large.began).total_seconds()
    assert seconds < large.core_s < 100 * seconds


def test_a_store_that_fails_harms_no_work_and_the_next_beat_makes_up_for_it(tmp_path: Path) -> None:
    workspace, blocked = Folder.at(tmp_path), tmp_path / "activity"
    blocked.write_text("a file where records should lie")
    began = time.monotonic()
    with activity(workspace, "build", "abc", beat_s=BEAT_S, usable=lambda: (1.0, 0.0)) as record:
        with pytest.raises(CscError):
            record.beat()
        time.sleep(5 * BEAT_S)
        assert blocked.is_file()
        blocked.unlink()
        back = until(workspace, lambda one: one.state == "running")
    assert back.core_s >= 5 * BEAT_S  # what passed unwritten is counted
    (ended,) = activities(workspace)
    assert ended.state == "finished"
    assert ended.core_s <= time.monotonic() - began


def test_an_end_is_told_also_when_nobody_can_say_what_is_at_hand(tmp_path: Path) -> None:
    workspace, down = Folder.at(tmp_path), False

    def usable() -> tuple[float, float]:
        if down:
            raise RuntimeError("Ray is down")
        return 8.0, 0.0

    def work() -> None:
        nonlocal down
        with activity(workspace, "train", "abc", beat_s=BEAT_S, usable=usable):
            until(workspace, lambda one: one.cores == 8)
            down = True
            raise CscError("training failed")

    with pytest.raises(CscError, match="training failed"):
        work()
    (ended,) = activities(workspace)
    assert (ended.state, ended.reason, ended.cores) == ("failed", "training failed", 8.0)
    assert ended.core_s > 0


def test_work_goes_on_where_no_record_can_ever_be_written(tmp_path: Path) -> None:
    (tmp_path / "activity").write_text("a file where records should lie")
    with activity(Folder.at(tmp_path), "build", "abc", beat_s=BEAT_S):
        done = True
    assert done
    assert (tmp_path / "activity").is_file()


def test_records_are_listed_once_and_only_the_newest_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Folder.at(tmp_path)
    for day in range(1, 7):
        then = datetime(2020, 1, day, tzinfo=UTC)
        stage = "ingest" if day % 2 else "build"
        one = Activity(stage=stage, name=f"n{day}", host="h", pid=1, began=then, updated=then)
        file = f"activity/{stage}/{then:%Y%m%dT%H%M%S}-0.json"
        workspace.put(file, one.model_dump_json().encode())
    (tmp_path / "activity" / "build" / ".part-x").write_text("being written")
    calls: list[str] = []
    for name in ("list", "read"):
        real = getattr(Folder, name)
        monkeypatch.setattr(
            Folder, name, lambda *a, _n=name, _r=real: (calls.append(_n), _r(*a))[1]
        )
    assert [one.name for one in activities(workspace, newest=3)] == ["n6", "n5", "n4"]
    assert calls == ["list", *["read"] * 3]


def test_an_empty_workspace_has_no_records_and_stays_empty(tmp_path: Path) -> None:
    assert activities(Folder.at(tmp_path / "none")) == []
    assert not list(tmp_path.iterdir())


def test_records_of_later_versions_are_read_and_damaged_ones_are_named(tmp_path: Path) -> None:
    workspace = Folder.at(tmp_path)
    recorded(workspace)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"later": 1}))
    assert activities(workspace)[0].state == "finished"
    file.write_text("{}")
    with pytest.raises(CscError, match=rf"{file.name} is damaged: remove it"):
        activities(workspace)


def test_a_record_names_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCHEDULE_VARIABLE, "nightly")
    assert recorded(Folder.at(tmp_path)).schedule == "nightly"
    with activity(Folder.at(tmp_path), "build", "abc", schedule="weekly"):
        pass
    assert {one.schedule for one in activities(Folder.at(tmp_path))} == {"nightly", "weekly"}


def test_times_are_utc(tmp_path: Path) -> None:
    one = recorded(Folder.at(tmp_path))
    assert one.began.utcoffset() == one.updated.utcoffset() == timedelta(0)


def test_without_ray_one_core_counts() -> None:
    assert usable_now() == (1.0, 0.0)
