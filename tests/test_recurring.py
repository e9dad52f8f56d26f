"""Recurring jobs: objects that Kubernetes takes, times that cron takes, and no run too many."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from jobs import nightly as nightly_runs
from jobs.activity import FOLDER, SCHEDULE_VARIABLE, Activity, activities
from jobs.cli import app
from jobs.config import Config, load_config
from jobs.cron import FIELDS, checked_cron, checked_time_zone
from jobs.kubectl import Kubectl, as_yaml, check_name
from jobs.nightly import OverlapError, alone, begun, way_id
from jobs.recurring import Kind, Schedule, objects
from jobs.registry import CHAMPION, Registry
from jobs.run import Run
from jobs.workspace import Workspace
from pipeline.corpora import SAMPLE
from pipeline.errors import CscError
from pipeline.storage import Folder
from tests.kubernetes_server import Kubernetes, kubernetes
from tests.manifests import problems
from tests.whole_run import SMALL, ask, registry_of, store_in

STAGES = ("run", "ingest", "build", "train", "evaluate")
ON_CLUSTER = [
    "workspace='s3://lake/csc'",
    "mlflow.uri='http://mlflow:5000'",
    "train.workers=4",
    "train.batch_size=32",
]
KINDS: tuple[Kind, ...] = ("cronjob", "raycronjob")


def configured(*more: str) -> Config:
    return load_config("demo", [*ON_CLUSTER, *more])


def nightly(**parts: Any) -> Schedule:
    return Schedule(**({"name": "nightly", "cron": "0 3 * * *", "stage": "run"} | parts))


def pods(manifest: Any) -> Iterator[dict[str, Any]]:
    """Go through the pod templates of an object."""
    if isinstance(manifest, dict):
        if "containers" in manifest.get("spec", {}):
            yield manifest
        for inner in manifest.values():
            yield from pods(inner)
    elif isinstance(manifest, list):
        for inner in manifest:
            yield from pods(inner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_kubernetes_takes_the_objects_and_yaml_keeps_them(kind: Kind, stage: str) -> None:
    made = objects(nightly(kind=kind, stage=stage, namespace="csc"), configured())
    assert [problem for manifest in made for problem in problems(manifest)] == []
    assert list(yaml.safe_load_all(as_yaml(made))) == made
    for manifest in made:
        assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "csc"
        assert manifest["metadata"]["labels"]["csc.schedule"] == "nightly"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_configuration_that_was_scheduled(kind: Kind, tmp_path: Path) -> None:
    config = configured("train.lr=3e-4", "ingest.corpora.0.root='s3://lake/Übung \"a\"'")
    (stored, _) = objects(nightly(kind=kind), config)
    (document, _) = yaml.safe_load_all(as_yaml([stored, {}]))
    path = tmp_path / "config.json"
    path.write_text(document["data"]["config.json"])
    joined = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "auto"})})
    assert load_config(str(path)) == joined


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_the_objects(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    made = objects(nightly(kind=kind), configured())
    assert "s3cr3t" not in as_yaml(made)
    for uri in ("http://anna:pw@mlflow:5000", "http://mlflow:5000/?token=pw"):
        with pytest.raises(CscError, match=r"mlflow\.uri holds a password"):
            objects(nightly(kind=kind), configured(f"mlflow.uri='{uri}'"))


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_no_rights_that_they_do_not_need(kind: Kind) -> None:
    (_, starter) = objects(nightly(kind=kind), configured())
    templates = list(pods(starter))
    assert len(templates) == {"cronjob": 1, "raycronjob": 2}[kind]
    for template in templates:
        assert template["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["serviceAccountName"] in ("csc", "csc-submit")
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_a_cron_job_waits_for_its_run_and_lets_no_other_begin() -> None:
    schedule = nightly(deadline_hours=2.5, retries=3, time_zone="Europe/Berlin")
    (_, starter) = objects(schedule, configured())
    spec, job = starter["spec"], starter["spec"]["jobTemplate"]["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Europe/Berlin")
    assert (job["activeDeadlineSeconds"], job["backoffLimit"]) == (9000, 3)
    (container,) = job["template"]["spec"]["containers"]
    assert "--detach" not in container["command"]
    assert {"name": "RAY_AUTH_TOKEN_PATH", "value": "/etc/csc-token/auth_token"} in container["env"]
    assert "--attach" in container["command"]
    evicted, ended = job["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == (
        "Ignore",
        "DisruptionTarget",
    )
    # A run that finds another, or that was stopped, is not tried again.
    assert (ended["action"], ended["onExitCodes"]["values"]) == ("FailJob", [4, 130])


def parsed(words: list[str]) -> dict[str, Any]:
    """Return what `csc` makes of the words of a command."""
    group: Any = get_command(app)
    assert words[0] == "csc"
    return dict(group.commands[words[1]].make_context(words[1], words[2:]).params)


@pytest.mark.parametrize("stage", STAGES)
def test_what_pods_are_told_is_what_csc_understands(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, starter) = objects(nightly(stage=stage), configured())
    (container,) = next(pods(starter))["spec"]["containers"]
    given = parsed(container["command"])
    assert given["stage"] == stage
    assert given["cluster"] == "http://csc-head-svc:8265"
    there = {entry["name"]: entry["value"] for entry in container["env"]}
    for name in given["env"]:  # what csc submit passes on to the cluster
        monkeypatch.setenv(name, there[name])
    on_cluster = parsed(["csc", stage])
    (_, starter) = objects(nightly(stage=stage, kind="raycronjob"), configured())
    own = parsed(shlex.split(starter["spec"]["jobTemplate"]["entrypoint"]))
    assert own["config"] == given["config"] == "/etc/csc/config.json"
    for params in (on_cluster, own):
        assert params["schedule"] == "nightly"
        assert params.get("if_new") is (True if stage == "run" else None)


@pytest.mark.parametrize(
    ("more", "gpus"),
    [((), "1"), (("ray.workers.gpus=0",), None), (("ray.workers.gpus=2",), "2")],
)
def test_a_cluster_of_its_own_has_what_the_training_asks_for(
    more: tuple[str, ...], gpus: str | None
) -> None:
    needs = ("ray.workers.resources={gpu_node=0.01}", "ray.tasks.resources={data=0.01}")
    (_, starter) = objects(nightly(kind="raycronjob"), configured(*more, *needs))
    job = starter["spec"]["jobTemplate"]
    assert job["backoffLimit"] == 0  # a run that finds another makes no second cluster
    cluster = job["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == 4
    written = group["rayStartParams"]["resources"]  # as KubeRay hands it to bash
    word = subprocess.check_output(["bash", "-c", f"printf %s {written}"], text=True)
    assert json.loads(word) == {"data": 1, "gpu_node": 1}
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert container["image"] == ("csc-cuda" if gpus else "csc-cpu")


@pytest.mark.parametrize(
    ("parts", "more", "said"),
    [
        ({}, ["workspace='csc-workspace'"], "only this machine can find"),
        ({"kind": "raycronjob"}, ["workspace='/data/csc'"], "/data/csc is on a disk"),
        ({"kind": "raycronjob"}, ["workspace='file:///data/csc'"], "workspace: file:///data/csc"),
        ({"kind": "raycronjob"}, ["train.init_from='/data/m'"], "train.init_from: /data/m is on"),
        ({"kind": "raycronjob"}, ["mlflow.uri='sqlite:////data/m.db'"], "mlflow.uri: /data/m.db"),
        ({"cluster": "http://anna:pw@head"}, [], "a user name or a password"),
        ({"cluster": "http://localhost:8265"}, [], "in a pod, that is the pod itself"),
        ({"cluster": "csc-head"}, [], "no address of a job server"),
        ({"time_zone": "Europe/Berlim"}, [], "did you mean Europe/Berlin"),
        ({"memory": "16GB"}, [], "write it as 16Gi"),
        ({"name": "Nightly"}, [], "small letters"),
        ({"name": "list"}, [], "none of add, list"),
        ({"cron": "0 3 * *"}, [], "has 4 fields"),
    ],
)
def test_what_would_fail_at_night_is_refused_by_day(
    parts: dict[str, Any], more: list[str], said: str
) -> None:
    with pytest.raises(CscError, match=re.escape(said)):
        objects(nightly(**parts), configured(*more))


def words_of(place: int) -> st.SearchStrategy[str]:
    """Return what may stand in a field, as its grammar says."""
    field = FIELDS[place]
    numbers = st.integers(field.low, field.high)
    names = field.words.split()

    def written(number: int, by_name: bool, zeros: str) -> str:
        return names[number - field.low] if names and by_name else f"{zeros}{number}"

    def ranged(ends: tuple[int, int], by_name: bool) -> str:
        return "-".join(written(number, by_name, "") for number in sorted(ends))

    single = st.builds(written, numbers, st.booleans(), st.sampled_from(["", "0"]))
    several = st.builds(ranged, st.tuples(numbers, numbers), st.booleans())
    stepped = st.builds(
        "{}/{}".format,
        st.one_of(st.just("*"), several),
        st.integers(1, field.high - field.low),
    )
    item = st.one_of(st.just("*"), single, several, stepped)
    return st.lists(item, min_size=1, max_size=3).map(",".join)


def days_that_are(words: list[str]) -> bool:
    """Leave out the 30th of February and the like, which is a matter of its own."""
    every = re.search(r"(^|,)\*(/0*1)?(,|$)", words[4])
    return not every or not re.search(r"(^|[,-])0?(29|3[01])", words[2])


EXPRESSIONS = st.tuples(*map(words_of, range(5))).map(list).filter(days_that_are)


@given(EXPRESSIONS, st.sampled_from([" ", "  ", "\t"]), st.booleans())
def test_every_expression_of_the_grammar_is_taken(
    words: list[str], space: str, upper: bool
) -> None:
    text = space.join(words)
    assert checked_cron(text.upper() if upper else text).lower() == " ".join(words)


WRONG = [  # in any field
    *("", "x", "-1", "1-", "-", "*-3", "1,", ",1", "*/0", "*/", "*/x", "5/2", "1--2", "99", "1.5"),
    *("@daily", "?", "L", "**", "*/99", "1-99", "mond", "\u0661"),
]


@given(EXPRESSIONS, st.integers(0, 4), st.sampled_from(WRONG))
def test_a_wrong_field_is_named(words: list[str], place: int, wrong: str) -> None:
    changed = [*words[:place], wrong, *words[place + 1 :]]
    said = FIELDS[place].name if wrong else "has 4 fields"
    with pytest.raises(CscError, match=said):
        checked_cron(" ".join(changed))


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("0 3 30 2 *", "no such month has a day 30"),
        ("0 0 31 2 */1", "no such month has a day 31"),
        ("0 0 31 2 mon,*", "no such month has a day 31"),
        ("0 3 31 feb,apr *", "no such month has a day 31"),
        ("0 17-9 * * *", "the range 17-9 runs backwards"),
        ("0 3 * * 7", "7 is not from 0 to 6 (sun is 0)"),
        ("0 3 * * fri-mon", "runs backwards"),
        ("TZ=UTC 0 3 * * *", "has 6 fields"),
        ("0 3 * mai *", "'mai' is no number, or jan feb"),
    ],
)
def test_times_that_never_come_are_refused(expression: str, said: str) -> None:
    with pytest.raises(CscError, match=re.escape(said)):
        checked_cron(expression)


def test_a_leap_day_comes() -> None:
    assert checked_cron("0 3 29 feb *") == "0 3 29 feb *"
    assert checked_cron("0 3 30 2 mon") == "0 3 30 2 mon"  # on Mondays, then
    assert checked_time_zone("America/Argentina/Buenos_Aires")


SMALL_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@given(st.text(SMALL_LETTERS + "-", min_size=1, max_size=32))
def test_names_of_kubernetes_are_taken(name: str) -> None:
    check_name("a" + name[1:-1] + "9")


@given(
    st.text(SMALL_LETTERS, min_size=1, max_size=31),
    st.sampled_from(["A", "_", ".", " ", "é", "/", ",", "=", "\n"]),
    st.integers(0, 31),
)
def test_other_names_are_refused(name: str, wrong: str, place: int) -> None:
    for other in (name[:place] + wrong + name[place:], f"-{name}", f"{name}-", f"{name:a<33}"):
        with pytest.raises(CscError, match="cannot name a schedule"):
            check_name(other)
    with pytest.raises(CscError, match="cannot name a schedule"):
        check_name("")


def asked(*words: str) -> tuple[int, str]:
    """Call `csc schedule`; return exit code and what it said."""
    result = CliRunner().invoke(app, ["schedule", *words])
    if isinstance(result.exception, CscError):
        return 1, f"error: {result.exception}"
    return result.exit_code, result.output


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """Options that name a configuration file."""
    path = tmp_path / "mine.toml"
    path.write_text(
        "workspace = 's3://lake/csc'\nmlflow.uri = 'http://mlflow:5000'\n"
        "[[ingest.corpora]]\nname = 'calls'\nroot = 's3://lake/calls'\n"
    )
    return ["--config", str(path)]


def test_add_may_be_left_out(mine: list[str]) -> None:
    words = ["nightly", "--cron", "0 3 * * *", "ingest", *mine, "--render"]
    code, said = asked(*words)
    assert code == 0
    assert asked("add", *words) == (0, said)
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(said)]
    assert kinds == ["ConfigMap", "CronJob"]


def test_without_kubectl_rendering_is_the_way(
    mine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    code, said = asked("nightly", "--cron", "0 3 * * *", "run", *mine)
    assert code == 1
    assert "there is no kubectl here" in said
    assert "--render" in said


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps what it learns of a server there
    with kubernetes() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@needs_kubectl
def test_a_schedule_is_made_changed_suspended_and_removed(
    cluster: Kubernetes, mine: list[str]
) -> None:
    words = ["nightly", "--cron", "0 3 * * *", "run", *mine]
    code, said = asked(*words)
    assert (code, said.count("created")) == (0, 2), said
    made = cluster.objects["cronjobs", "csc-nightly"]
    assert asked("suspend", "nightly")[0] == 0
    assert made["spec"]["schedule"] == "0 3 * * *"
    assert asked(*words, "--cron", "30 4 * * mon")[0] == 0
    made = cluster.objects["cronjobs", "csc-nightly"]
    assert (made["spec"]["schedule"], made["spec"]["suspend"]) == ("30 4 * * mon", True)
    made["status"] = {"lastScheduleTime": "2026-11-22T04:30:00Z"}
    (listed,) = Kubectl().schedules()
    assert (listed.name, listed.cron, listed.stage) == ("nightly", "30 4 * * mon", "run")
    assert (listed.suspended, listed.last_run) == (True, "2026-11-22T04:30:00Z")
    _, said = asked("list")
    for word in ("nightly", "30 4 * * mon", "csc run", "suspended", "2026-11-22"):
        assert word in said
    assert asked("resume", "nightly")[0] == 0
    assert not cluster.objects["cronjobs", "csc-nightly"]["spec"]["suspend"]
    assert asked("remove", "nightly")[0] == 0
    assert cluster.objects == {}


@needs_kubectl
def test_one_schedule_is_not_two_kinds_of_objects(cluster: Kubernetes, mine: list[str]) -> None:
    words = ["weekly", "--cron", "0 3 * * sun", "train", *mine]
    assert asked(*words, "--kind", "raycronjob")[0] == 0
    code, said = asked(*words)
    assert code == 1
    assert "weekly is there as a RayCronJob" in said
    assert ("cronjobs", "csc-weekly") not in cluster.objects
    code, said = asked("remove", "nightly")
    assert (code, said) == (1, "error: there is no schedule 'nightly'; there are: weekly")
    assert asked("remove", "weekly")[0] == 0
    assert cluster.objects == {}


@needs_kubectl
def test_a_cluster_without_kuberay_has_cron_jobs(
    tmp_path: Path, mine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with kubernetes(kuberay=False) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        words = ["nightly", "--cron", "0 3 * * *", "ingest", *mine]
        assert asked(*words)[0] == 0
        assert [one.name for one in Kubectl().schedules()] == ["nightly"]
        code, said = asked("other", *words[1:], "--kind", "raycronjob")
        assert code == 1
        assert said.startswith("error: kubectl apply: ")


# Nothing new


def test_a_run_with_nothing_new_ends_at_once(workspace: Path) -> None:
    code, said = ask("run", workspace, "--if-new")
    assert code == 0
    assert "nothing new since version 1 was made" in said
    assert "starting Ray" not in said
    assert "finished before" not in said  # no stage was looked at
    assert ask("run", workspace, "--if-new", "--fresh")[0] == 2


def has_all(workspace: Path, *more: str) -> bool:
    """Say whether a run in a workspace has nothing to do."""
    config = load_config("demo", [*SMALL, f"workspace='{workspace}'", *more])
    with Run(config, if_new=True) as run:
        return run.nothing_new() is not None


def test_a_new_file_or_setting_is_something_to_do(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = tmp_path / "sample"
    shutil.copytree(SAMPLE, sample)
    monkeypatch.setattr("pipeline.corpora.SAMPLE", sample)
    assert has_all(workspace)
    assert has_all(workspace, "ray.address='auto'", "train.checkpoint_minutes=3.0")
    assert not has_all(workspace, "promote.margin=0.02")
    assert not has_all(workspace, "build.train_episodes=65")
    heard = next(sample.glob("speechocean762/soc0*/*.opus"))
    shutil.copy(heard, heard.with_name("again.opus"))
    assert not has_all(workspace)


def test_a_workspace_without_a_registry_has_all_to_do(tmp_path: Path) -> None:
    config = load_config("demo", [*SMALL, f"workspace='{tmp_path / 'w'}'"])
    with Run(config, if_new=True) as run:
        assert run.nothing_new() is None
    assert not (tmp_path / "w" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ("train.steps=99", False),
        ("train.init_from='models:/csc-speaker-encoder@champion'", False),
        ("seed=8", False),
        ("evaluate.cohort=20", False),
        ("train.threads=2", True),
        ("mlflow.uri='http://other:5000'", True),
    ],
)
def test_a_way_is_known_by_all_that_its_model_depends_on(
    workspace: Path, setting: str, same: bool
) -> None:
    store = store_in(workspace).read_json("index.json")
    ways = [way_id(store, load_config("demo", [*SMALL, *more])) for more in ([], [setting])]
    assert (ways[0] == ways[1]) is same
    assert way_id({**store, "id": "another"}, load_config("demo", SMALL)) != ways[0]


def beginning(workspace: Path, model: str, alias: str, *more: str) -> str | None:
    """Return what a run begins with that is to begin with `alias` of a registered model."""
    wanted = [f"mlflow.model='{model}'", f"train.init_from='models:/{model}@{alias}'", *more]
    config = load_config("demo", [*SMALL, f"workspace='{workspace}'", *wanted])
    registry = Registry(Workspace(config).mlflow_uri, config)
    return begun(config, registry).train.init_from


def test_the_first_run_of_a_schedule_begins_without_a_champion(workspace: Path) -> None:
    champion = registry_of(workspace).by_alias(CHAMPION)
    assert champion is not None
    there = f"models:/csc-speaker-encoder/{champion.number}"
    assert beginning(workspace, "csc-speaker-encoder", CHAMPION) == there
    assert beginning(workspace, "nobody", CHAMPION) is None
    with pytest.raises(CscError, match="nobody@best points to no version"):
        beginning(workspace, "nobody", "best")
    with pytest.raises(CscError, match="points to no version"):  # there is nothing to keep
        beginning(workspace, "nobody", CHAMPION, "train.freeze_separator=true")
    extractor = ("train.task='extract'", "model.extractor='film'")
    with pytest.raises(CscError, match="points to no version"):  # nor to train it for
        beginning(workspace, "nobody", CHAMPION, *extractor)


# One at a time


def at_work(workspace: Path, seconds_ago: float, state: str = "running") -> None:
    """Write the record of a run elsewhere whose last beat was some time ago."""
    moment = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    record = Activity.model_validate(
        {
            "stage": "train",
            "name": "x",
            "schedule": "nightly",
            "host": "node-7",
            "pid": 1,
            "began": datetime(2026, 11, 22, 3, 0, tzinfo=UTC),
            "updated": moment,
            "state": state,
        }
    )
    Folder.at(workspace).put(f"{FOLDER}/train/1.json", record.model_dump_json().encode())


@contextmanager
def beating(workspace: Path) -> Iterator[None]:
    """Have a run elsewhere go on with its beats."""
    over = threading.Event()

    def beats() -> None:
        while not over.wait(0.02):
            at_work(workspace, 0.0)

    at_work(workspace, 20.0)
    thread = threading.Thread(target=beats)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("stage", STAGES)
def test_a_schedule_that_is_at_work_is_not_begun_again(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly_runs, "alone", partial(alone, poll_s=0.1))
    with beating(tmp_path):
        answers = [ask(stage, tmp_path, "--schedule", "nightly")]
        monkeypatch.setenv(SCHEDULE_VARIABLE, "nightly")  # as csc submit passes it on
        answers.append(ask(stage, tmp_path))
    for code, said in answers:
        assert code == 4
        assert "nightly: the last sign of life of a run on node-7" in said
        assert "nightly is at work on node-7 since 2026-11-22 03:00 UTC" in said
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.parametrize(("age_s", "state"), [(301.0, "running"), (20.0, "failed")])
def test_a_run_that_is_dead_keeps_none_from_work(age_s: float, state: str, tmp_path: Path) -> None:
    at_work(tmp_path, age_s, state)
    with alone(Folder.at(tmp_path), "nightly"):
        (live,) = [one for one in activities(Folder.at(tmp_path)) if one.state == "running"]
        assert (live.schedule, live.host, live.pid) == (
            "nightly",
            socket.gethostname(),
            os.getpid(),
        )
        assert os.environ[SCHEDULE_VARIABLE] == "nightly"  # for the records of its stages
    assert SCHEDULE_VARIABLE not in os.environ
    assert not any(one.state == "running" for one in activities(Folder.at(tmp_path)))


def test_a_run_that_was_just_killed_is_waited_for_until_it_counts_as_lost(tmp_path: Path) -> None:
    at_work(tmp_path, 0.0)
    began = time.monotonic()
    with alone(Folder.at(tmp_path), "nightly", poll_s=0.05, lost_after_s=0.6):
        assert 0.5 < time.monotonic() - began < 30


def test_other_schedules_go_on(tmp_path: Path) -> None:
    at_work(tmp_path, 20.0)
    with alone(Folder.at(tmp_path), "hourly"):
        pass


def _try_to_be_alone(folder: str, start: Any, entered: Any, over: Any) -> None:
    start.wait()
    try:
        with alone(Folder.at(folder), "nightly", beat_s=0.2, poll_s=0.05):
            entered.put(os.getpid())
            over.wait()
    except OverlapError:
        entered.put(0)


def test_of_runs_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    many = 6
    context = multiprocessing.get_context("fork")
    start, entered, over = context.Barrier(many), context.Queue(), context.Event()
    runs = [
        context.Process(target=_try_to_be_alone, args=(str(tmp_path), start, entered, over))
        for _ in range(many)
    ]
    for run in runs:
        run.start()
    began = time.monotonic()
    answers = [entered.get(timeout=60) for _ in runs]
    over.set()
    for run in runs:
        run.join(timeout=60)
    assert sum(map(bool, answers)) == 1, f"{answers} in {time.monotonic() - began:.1f} s"
