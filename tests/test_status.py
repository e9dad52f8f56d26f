"""What `csc status` says of finished, half-finished, killed and empty workspaces; and that it only
reads."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.activity import Activity, activities
from jobs.registry import CHAMPION
from jobs.standing import FOLDERS
from jobs.train import RUN_FILE
from jobs.workspace import Workspace
from pipeline.storage import Folder
from tests.whole_run import ask, configured, evaluation_in, only, registry_of, store_in

STAGES = ("ingest", "build", "train", "evaluate", "register", "promote")


def told(workspace: object, *more: object) -> dict[str, Any]:
    """Return what `csc status --json` says."""
    code, said = ask("status", workspace, "--json", *more)  # type: ignore[arg-type]
    assert code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


def states(found: dict[str, Any]) -> dict[str, str]:
    return {one["stage"]: one["state"] for one in found["stages"]}


def details(found: dict[str, Any]) -> dict[str, str]:
    return {one["stage"]: one["detail"] for one in found["stages"]}


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def copy(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the finished workspace, to take things out of."""
    for name in (*FOLDERS.values(), "activity"):
        shutil.copytree(workspace / name, tmp_path / name)
    return tmp_path


def test_a_finished_run_is_told_stage_by_stage_by_the_ids_of_the_run(workspace: Path) -> None:
    found = told(workspace)
    evaluation = evaluation_in(workspace)
    places = [store_in(workspace), only(workspace / "mixtures"), only(workspace / "models")]
    ids = ["/".join(Path(place.uri).relative_to(workspace).parts[1:]) for place in places]
    assert states(found) == dict.fromkeys(STAGES, "done")
    assert [one["id"] for one in found["stages"]][:4] == [*ids, Path(evaluation.uri).name]
    assert not {one["name"] for one in found["running"] + found["unfinished"]} & set(ids)
    champion = registry_of(workspace).by_alias(CHAMPION)
    assert champion is not None
    assert found["registry"]["champion"] == champion.number


def test_figures_are_those_of_the_indexes(workspace: Path) -> None:
    figures = {(one["stage"], one["id"]): one["figures"] for one in told(workspace)["made"]}
    by_stage = {stage: what for (stage, _), what in figures.items()}
    model, store = only(workspace / "models"), store_in(workspace).read_json("index.json")
    assert by_stage["ingest"]["utterances"] == store["kept"]
    assert by_stage["ingest"]["hours"] == pytest.approx(store["seconds"] / 3600, abs=0.005)
    assert by_stage["build"]["train_episodes"] == 64
    best = model.read_json("index.json")["best_valid_eer"]
    assert by_stage["train"]["best_valid_eer"] == best
    evaluation = evaluation_in(workspace)
    rows = evaluation.read_json("index.json")["results"]
    shown = figures["evaluate", Path(evaluation.uri).name]
    assert {shown[f"eer.{row['condition']}"] for row in rows if row["system"] == "csc"} == {
        row["eer"]["value"] for row in rows if row["system"] == "csc"
    }


def test_costs_are_the_sums_of_all_records_the_killed_run_included(workspace: Path) -> None:
    costs = {one["stage"]: one for one in told(workspace)["costs"]}
    records = activities(Folder.at(workspace))
    assert {*FOLDERS, "register", "promote"} <= set(costs)
    for stage, cost in costs.items():
        own = [one for one in records if one.stage == stage]
        assert cost["pieces"] == len(own)
        assert cost["core_hours"] == pytest.approx(sum(one.core_s for one in own) / 3600)
        assert cost["core_hours"] > 0 == cost["gpu_hours"]
    name = Path(only(workspace / "models").uri).name
    both = [one for one in records if (one.stage, one.name) == ("train", name)]
    assert len(both) == 2  # the run was killed in training, and went through the second time
    for stage in ("register", "promote"):
        assert [one.state for one in records if (one.stage, one.name) == (stage, name)] == [
            "finished"
        ]


def test_status_reads_only_also_while_a_run_is_at_work(workspace: Path) -> None:
    before = contents(workspace)
    with Workspace(configured(workspace)).locked():
        code, said = ask("status", workspace)
    assert code == 0
    for words in ("this configuration", "champion: version", "core hours"):
        assert words in said
    assert contents(workspace) == before


def test_of_a_workspace_that_does_not_exist_it_says_what_to_run(tmp_path: Path) -> None:
    root = tmp_path / "none"
    code, said = ask("status", root)
    assert code == 0
    assert "nothing is there yet: csc run" in said
    assert set(states(told(root)).values()) == {"not yet"}
    assert not root.exists()


def test_a_half_built_dataset_is_counted_in_episodes(copy: Path) -> None:
    dataset = only(copy / "mixtures")
    index = dataset.read_json("index.json")
    dataset.remove_file("index.json")
    gone = index["shards"][0]
    dataset.remove_file(f"{gone['name']}.done.json")
    found = told(copy)
    assert details(found)["build"] == f"{80 - gone['rows']} of 80 episodes"
    assert states(found) == dict(zip(STAGES, ["done", "partly", *["not yet"] * 4], strict=True))


def test_a_half_read_store_is_counted_in_shards(copy: Path) -> None:
    store = store_in(copy)
    count = len(store.read_json("index.json")["shards"])
    store.remove_file("index.json")
    next((copy / "utterances").glob("*/shards/*.done.json")).unlink()
    found = told(copy)
    assert details(found)["ingest"] == f"{count - 1} of {count} shards"
    assert states(found) == dict(zip(STAGES, ["partly", *["not yet"] * 5], strict=True))


def test_killed_training_is_lost_and_says_how_far_it_came(copy: Path) -> None:
    model = only(copy / "models")
    model.remove_file("index.json")
    assert model.exists(RUN_FILE)
    newest, killed = (one for one in training(copy) if one.name == Path(model.uri).name)
    record(copy, newest).unlink()
    then = datetime.now(UTC) - timedelta(minutes=6)
    aged = killed.model_copy(update={"updated": then, "done": 4, "total": 12})
    assert aged.state == "running"
    record(copy, killed).write_text(aged.model_dump_json())
    found = told(copy)
    (lost,) = found["unfinished"]
    assert (lost["stage"], lost["state"], lost["name"]) == ("train", "lost", killed.name)
    assert (states(found)["train"], details(found)["train"]) == ("partly", "4 of 12 steps")
    assert "goes on from where it was" in ask("status", copy)[1]
    at_work = aged.model_copy(update={"updated": datetime.now(UTC)})
    record(copy, killed).write_text(at_work.model_dump_json())
    found = told(copy)
    assert [one["name"] for one in found["running"]] == [killed.name]
    assert found["unfinished"] == []


def training(root: Path) -> list[Activity]:
    """Return records of training as they stand, however long ago they were written."""
    found = activities(Folder.at(root), lost_after_s=1e9)
    return [one for one in found if one.stage == "train"]


def record(root: Path, one: Activity) -> Path:
    (found,) = (
        path
        for path in (root / "activity" / one.stage).iterdir()
        if json.loads(path.read_text())["pid"] == one.pid
    )
    return found


def test_other_corpora_settings_and_seeds_are_not_done(workspace: Path) -> None:
    found = told(workspace, "--set", "ingest.corpora.0.root='/elsewhere'")
    assert set(states(found).values()) == {"not yet"}
    assert "other corpora" in details(found)["ingest"]
    assert list(states(told(workspace, "--set", "seed=8")).values()) == ["done", *["not yet"] * 5]
    longer = told(workspace, "--set", "train.steps=24")
    assert list(states(longer).values()) == ["done", "done", *["not yet"] * 4]


def test_what_the_registry_does_not_tell_is_said_and_the_rest_is_told(copy: Path) -> None:
    assert list(states(told(copy)).values()) == [*["done"] * 4, *["not yet"] * 2]
    (copy / "mlflow.db").write_bytes(b"not a database" * 100)
    found = told(copy)
    assert list(states(found).values()) == [*["done"] * 4, *["unknown"] * 2]
    assert "not a database" in found["registry"]["error"]


def test_a_bucket_is_told_like_a_folder(copy: Path, s3: str) -> None:
    address = f"{s3}/{copy.name}"
    folder = Folder.at(address)
    for path in copy.rglob("*"):
        if path.is_file():
            folder.put(str(path.relative_to(copy)), path.read_bytes())
    here, there = told(copy), told(address)
    assert there.pop("workspace") == address
    here.pop("workspace")
    assert here == there
