"""What Prometheus finds at a real Ray's endpoint, and what a log store gets of a real command."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from jobs import console, telemetry
from jobs.activity import activities
from jobs.cli import app
from jobs.telemetry import METRICS, emit
from pipeline.storage import Folder
from tests.whole_run import CSC, command, only, store_in

LINE = {"total": 2.5, "step_s": 0.25, "data_wait_share": 0.5, "audio_seconds_per_s": 8.0}
RESULTS = [
    {"system": "csc", "condition": "clean", "eer": {"value": 0.125}},
    {"system": "csc", "condition": "sir_0_db", "eer": {"value": 0.25}},
    {"system": "mfcc", "condition": "clean", "eer": {"value": 0.375}},
]
Series = dict[tuple[str, str, str], float]  # by exported name, run, and the value of another tag


@pytest.fixture(autouse=True)
def as_text() -> Iterator[None]:
    """Have what other tests do in this process speak as text."""
    yield
    console.log_as(console.LogFormat.TEXT, "")


def test_without_ray_nothing_is_told_and_ray_is_not_started() -> None:
    emit("csc_shards", 1, run="a", stage="ingest")
    telemetry.trained("a", LINE)
    assert not ray.is_initialized()


class Built(NamedTuple):
    """A store and a dataset, made by a command that spoke JSON while Ray was up."""

    workspace: Path
    lines: list[dict[str, Any]]
    port: int  # of Ray's endpoint for Prometheus


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        root = tmp_path_factory.mktemp("built")
        words = command("build", root)[1:]
        answer = CliRunner().invoke(app, ["--log", "json", *words], catch_exceptions=False)
        assert answer.exit_code == 0, answer.stderr
        yield Built(root, [json.loads(line) for line in answer.stdout.splitlines()], port)
    finally:
        ray.shutdown()


def scraped(port: int) -> Series:
    """Return what the endpoint says of this project, by a parser of Prometheus' own."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [one for family in families for one in family.samples if "_csc_" in one.name]
    known = {"stage", "reason", "condition"}
    return {
        (one.name, one.labels["run"], "".join(one.labels[k] for k in known & {*one.labels})): (
            one.value
        )
        for one in samples
    }


@pytest.mark.cluster
def test_every_metric_is_at_the_endpoint_under_its_exported_name(built: Built) -> None:
    telemetry.trained("model", LINE)
    telemetry.trained("model", {"valid_eer": 0.5, "valid_si_snr_improvement_db": 1.0})
    telemetry.evaluated("evaluation", {"results": RESULTS})
    names = {
        f"ray_{name}{'_total' if about.kind == 'counter' else ''}"
        for name, about in METRICS.items()
    }
    deadline, found = time.monotonic() + 30, Series()
    while {name for name, *_ in found} != names and time.monotonic() < deadline:
        time.sleep(0.2)
        found = scraped(built.port)
    assert {name for name, *_ in found} == names
    index = store_in(built.workspace).read_json("index.json")
    made = f"{index['store']}/generation-00001"
    dataset = Path(only(built.workspace / "mixtures").uri).name
    assert found["ray_csc_shards_total", made, "ingest"] == len(index["shards"])
    assert found["ray_csc_shards_total", dataset, "build"] >= 1
    assert found["ray_csc_kept_utterances_total", made, ""] == index["kept"]
    hours = index["seconds_in"] / 3600
    assert found["ray_csc_ingested_hours_total", made, ""] == pytest.approx(hours)
    for reason, count in index["rejected"].items():
        assert found["ray_csc_rejected_sources_total", made, reason] == count
    assert found["ray_csc_train_loss", "model", ""] == 2.5
    assert found["ray_csc_train_step_seconds", "model", ""] == 0.25
    assert found["ray_csc_train_data_wait_share", "model", ""] == 0.5
    assert found["ray_csc_train_audio_seconds_per_second", "model", ""] == 8.0
    assert found["ray_csc_valid_eer", "model", ""] == 0.5
    assert found["ray_csc_test_eer", "evaluation", "clean"] == 0.125
    assert found["ray_csc_test_eer", "evaluation", "sir_0_db"] == 0.25


def test_every_line_of_a_command_is_an_object_with_stage_and_run(built: Built) -> None:
    store = Path(only(built.workspace / "utterances").uri).name
    dataset = Path(only(built.workspace / "mixtures").uri).name
    for line in built.lines:
        assert {"time", "level", "stage", "run", "message"} <= set(line)
        assert datetime.fromisoformat(line["time"]).utcoffset() == datetime.now(UTC).utcoffset()
        assert line["message"].strip() == line["message"] != ""
    runs = {(line["stage"], line["run"]) for line in built.lines}
    assert runs == {("build", ""), ("ingest", f"{store}/generation-00001"), ("build", dataset)}
    told = [line for line in built.lines if "total" in line]
    for stage in ("ingest", "build"):
        last = [line for line in told if line["stage"] == stage][-1]
        assert last["done"] == last["total"] > 0


def test_records_of_a_command_say_what_it_cost_and_how_far_it_came(built: Built) -> None:
    found = activities(Folder.at(built.workspace))
    assert [(one.stage, one.state, one.cores) for one in found] == [
        ("build", "finished", 2.0),
        ("ingest", "finished", 2.0),
    ]
    for one in found:
        assert one.done == one.total > 0
        assert one.core_s > 0


def test_a_table_is_an_object_of_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "[bold]EER %[/bold]", title="all of [i]them[/i]")
    table.add_row("a [1, 2]", Text("[not markup]"))
    table.add_row("b", "3")
    console.log_as(console.LogFormat.JSON, "models")
    console.present([table, "that [was] it"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["stage"], first["message"]) == ("models", "all of them")
    assert first["rows"] == [
        {"name": "a [1, 2]", "EER %": "[not markup]"},
        {"name": "b", "EER %": "3"},
    ]
    assert second["message"] == "that [was] it"
    assert "rows" not in second


def test_a_stage_ends_where_it_ends_and_passes_progress_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.log_as(console.LogFormat.JSON, "run")
    far: list[tuple[int, int]] = []
    with console.working("train", "abc", lambda *so_far: far.append(so_far)):
        with console.progress("steps") as advance:
            advance(1, 2)
            advance(2, 2, "loss 1.00")
        with console.working("evaluate", "def"):
            console.say("inside")
    console.say("after")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["stage"], one["run"]) for one in said] == [
        ("train", "abc"),
        ("evaluate", "def"),
        ("run", ""),
    ]
    assert (said[0]["message"], said[0]["done"], said[0]["total"]) == ("steps  loss 1.00", 2, 2)
    assert far == [(1, 2), (2, 2)]


def test_errors_are_objects_on_stderr() -> None:
    words = [CSC, "config", "--set", "train.lrr=1"]
    env = os.environ | {"CSC_LOG": "json"}
    logged = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert (logged.returncode, logged.stdout) == (1, "")
    (line,) = map(json.loads, logged.stderr.splitlines())
    assert (line["level"], line["stage"]) == ("error", "config")
    assert line["message"].startswith("--set train.lrr=1: unknown key")


def test_an_unknown_format_is_refused() -> None:
    answer = CliRunner().invoke(app, ["--log", "xml", "config"])
    assert answer.exit_code == 2
