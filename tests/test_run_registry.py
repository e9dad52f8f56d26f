"""The gate and the registry after a whole run: scores are made, registry and gate are the real."""

import json
import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.config import Config, load_config
from jobs.evaluate import Evaluated, evaluate
from jobs.extraction_gate import extraction_tag
from jobs.extraction_summary import EXTRACTED
from jobs.finetune import MODEL_FILES, SPEAKERS_FILE
from jobs.lineage import flag_forgotten, lines
from jobs.promote import (
    ALREADY,
    BACK_WHEN,
    FROM,
    WHEN,
    Decision,
    differences,
    promote,
    rollback,
)
from jobs.promotion_lock import LOCK_S, promotion
from jobs.register import register
from jobs.registry import (
    CHALLENGER,
    CHAMPION,
    EXTRACTION,
    FORGOTTEN,
    LOCK,
    STORE,
    Registry,
    Version,
)
from jobs.train import Trained
from pipeline.errors import CscError
from pipeline.shards import encode
from pipeline.storage import Folder
from tests.test_trial_lists import write_list
from tests.whole_run import (
    CSC,
    SMALL,
    ask,
    configured,
    evaluation_in,
    evaluator_of,
    only,
    registry_of,
    store_in,
)

BUSY = r"somebody else is promoting a version of .*: (\S+@\S+|somebody) since .* UTC"


def shifted(workspace: Path, shift: float) -> Version:
    """Register the model again, with its target scores moved: better or worse by construction."""
    registry, config = registry_of(workspace), configured(workspace)
    model, evaluation = only(workspace / "models"), evaluation_in(workspace)
    about = evaluation.read_json("index.json")
    scores = pq.read_table(evaluation.open_input("scores.parquet"))
    for condition in config.promote.guarded:
        name = f"csc.{condition}"
        moved = scores[name].to_numpy() + shift * scores["target"].to_numpy()
        scores = scores.set_column(scores.column_names.index(name), name, pa.array(moved))
    folder = Folder.at(workspace.parent / f"shift{shift}")
    for file in ("index.json", "det.png"):
        folder.put(file, evaluation.read(file))
    folder.put("scores.parquet", encode(scores, 1 << 16))
    trained = Trained(model, model.read_json("index.json"))
    run_id = registry.create_run(f"shift{shift}", config, about | {"store": "s"})
    again = Trained(model, trained.about | {"run": run_id})
    dataset = only(workspace / "mixtures")
    evaluated = Evaluated(folder, about)
    version, new = register(again, evaluated, dataset, store_in(workspace), registry)
    assert new
    return version


def judge(workspace: Path, **how: Any) -> Decision:
    config = configured(workspace)
    return promote(registry_of(workspace), evaluator_of(workspace, config), **how)


def test_a_worse_challenger_is_refused_and_a_better_one_promoted(workspace: Path) -> None:
    registry = registry_of(workspace)
    first = registry.by_alias(CHAMPION)
    assert first is not None
    worse = shifted(workspace, -1.0)
    refusal = judge(workspace)
    assert not refusal.promoted
    assert f"worse than version {first.number}" in refusal.why
    assert refusal.differences["clean"]["low"] > 0
    assert registry.version(worse.number).tags["csc.decision"] == refusal.why
    code, said = ask("models", workspace)
    assert code == 0, said
    assert "refused" in said
    assert f"champion: version {first.number} since" in said

    better = shifted(workspace, 1.0)
    tried = judge(workspace, dry_run=True)
    assert tried.promoted
    assert registry.by_alias(CHAMPION) == first
    promotion = judge(workspace)
    assert promotion.promoted
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.number == better.number
    assert champion.tags["csc.promoted_from"] == first.number


def test_what_the_gate_refuses_can_be_forced_and_taken_back(workspace: Path) -> None:
    registry = registry_of(workspace)
    before = registry.by_alias(CHAMPION)
    assert before is not None
    worse = shifted(workspace, -0.5)
    decision = judge(workspace, forced="the old one has a fault")
    assert decision.promoted
    assert "forced: the old one has a fault; the gate: worse" in decision.why
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.number == worse.number
    again = rollback(registry, "it was worse indeed")
    assert again.number == before.number
    assert registry.version(worse.number).tags["csc.rolled_back_why"] == "it was worse indeed"
    refused = judge(workspace)
    assert not refused.promoted
    assert refused.why == "it was rolled back: it was worse indeed"
    # Another one goes on to the version before that.
    earlier = rollback(registry, "that too")
    assert earlier.number == before.tags["csc.promoted_from"]
    with pytest.raises(CscError, match="is the first champion"):
        rollback(registry, "and on")


def test_of_two_promotions_one_wins_and_the_other_is_told(workspace: Path) -> None:
    registry = registry_of(workspace)
    shifted(workspace, 0.75)
    ready, told = threading.Barrier(2), []

    def attempt() -> None:
        ready.wait()
        try:
            told.append(judge(workspace).why)
        except CscError as error:
            told.append(f"refused: {error}")

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [why for why in told if why.startswith("refused")]
    already = [why for why in told if why == "it is champion already"]
    assert len(told) == 2
    assert len(refused) + len(already) <= 1
    assert all(re.search(f"{BUSY}|another promotion came in between", why) for why in refused)
    champion = registry.by_alias(CHAMPION)
    challenger = registry.by_alias(CHALLENGER)
    assert champion is not None
    assert champion == challenger
    with promotion(registry), pytest.raises(CscError, match=BUSY), promotion(registry):
        pass
    with promotion(registry):  # the first has let go of it
        pass


def killed(registry: Registry) -> None:
    """Leave what a promotion leaves that was killed."""
    registry.take_ticket("killed", "ann@there")


def aged(workspace: Path, model: str) -> None:
    """Make all tickets older than one that is held can be."""
    with sqlite3.connect(workspace / "mlflow.db") as database:
        database.execute(
            "UPDATE model_versions SET creation_time = creation_time - ? WHERE name = ?",
            (1000 * (LOCK_S + 60), f"{model}{LOCK}"),
        )


def contended(registry: Registry, many: int) -> None:
    """Have many promote at the same time: some do, one at a time, and all others are told."""
    inside: list[int] = []
    together: list[int] = []  # how many were inside whenever somebody came in
    start = threading.Barrier(many)

    def contend(who: int) -> str:
        start.wait()
        try:
            with promotion(registry):
                inside.append(who)
                together.append(len(inside))
                time.sleep(0.02)
                inside.remove(who)
        except CscError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(many) as pool:
        refused = [told for told in pool.map(contend, range(many)) if told]
    assert [told for told in refused if not re.search(BUSY, told)] == []
    assert together == [1] * (many - len(refused))
    assert together
    assert registry.tickets() == []


def test_of_many_who_find_a_killed_promotion_one_at_a_time_goes_on(workspace: Path) -> None:
    registry = registry_of(workspace)
    with promotion(registry):
        pass
    for _ in range(4):
        killed(registry)
        aged(workspace, registry.model)
        contended(registry, 6)


def test_a_lock_grows_old_by_the_clock_that_dated_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(workspace)
    clock = "mlflow.store.model_registry.sqlalchemy_store.get_current_time_millis"
    behind_ms = 3_600_000  # of ours is the server's

    def server_ms() -> int:
        return int(1000 * time.time()) - behind_ms

    monkeypatch.setattr(clock, server_ms)
    with promotion(registry), pytest.raises(CscError, match=BUSY), promotion(registry):
        pass
    killed(registry)
    behind_ms -= 1000 * (LOCK_S - 50)
    told = "ann@there since .* UTC; run again .* if they were killed, in 1 min"
    with pytest.raises(CscError, match=told), promotion(registry):
        pass
    behind_ms -= 1000 * 60
    with promotion(registry):
        pass


def test_a_request_that_is_repeated_or_cut_off_keeps_nobody_out(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(workspace)
    take = registry.take_ticket

    def twice(*words: str) -> None:
        take(*words)
        take(*words)

    def cut_off(*words: str) -> None:
        take(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "take_ticket", twice)
    with promotion(registry) as held:
        assert len(registry.tickets()) == 2
        held.check()
    assert registry.tickets() == []
    monkeypatch.setattr(registry, "take_ticket", cut_off)
    with pytest.raises(KeyboardInterrupt), promotion(registry):
        pass
    assert registry.tickets() == []


def test_a_ticket_that_stays_is_said_and_hides_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = registry_of(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "drop_ticket", down)
        with pytest.raises(ZeroDivisionError), promotion(registry):
            raise ZeroDivisionError
    assert "nobody can promote for 10 minutes: it is down" in capsys.readouterr().out
    (left,) = registry.tickets()
    registry.drop_ticket(left)


def down(*_: object) -> None:
    raise CscError("it is down")


def test_a_promotion_that_stood_still_for_too_long_moves_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(workspace)
    with promotion(registry) as held:
        aged(workspace, registry.model)
        with promotion(registry):  # takes the first for killed
            pass
        with pytest.raises(CscError, match="stood still for too long"):
            held.check()
    with promotion(registry) as held:
        held.check()
        monkeypatch.setattr("jobs.promotion_lock.HELD_S", 0)
        with pytest.raises(CscError, match="stood still for too long"):
            held.check()


def test_a_promotion_that_breaks_off_leaves_no_false_traces_and_is_completed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, challenger = registry_of(workspace), shifted(workspace, 0.7)
    before = registry.by_alias(CHAMPION)
    assert before is not None
    registry.tag(challenger, {BACK_WHEN: "then"})
    for step in ("log_decision", "move_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(Registry, step, down)
            with pytest.raises(CscError, match="it is down"):
                judge(workspace, forced="at last")
        tags = registry.version(challenger.number).tags
        assert (tags.get(WHEN, ""), tags[BACK_WHEN]) == ("", "then")
        assert registry.by_alias(CHAMPION) == before
    tag = Registry.tag

    def fails_in_the_end(self: Registry, version: Version, tags: dict[str, str]) -> None:
        (down if BACK_WHEN in tags else tag)(self, version, tags)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "tag", fails_in_the_end)
        assert judge(workspace, forced="at last").promoted
    assert "is champion, but this is not noted on it: it is down" in capsys.readouterr().out
    assert len(registry._client.list_artifacts(challenger.run_id, "decisions")) == 2
    assert judge(workspace).why == ALREADY
    champion = registry.version(CHAMPION)
    assert champion.number == challenger.number
    assert champion.tags[WHEN].startswith("20")
    assert (champion.tags[BACK_WHEN], champion.tags[FROM]) == ("", before.number)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "move_alias", down)
        with pytest.raises(CscError, match="it is down"):
            rollback(registry, "worse")
    assert registry.version(CHAMPION).number == challenger.number
    assert rollback(registry, "worse").number == before.number


def test_a_version_that_does_not_say_where_it_comes_from_is_refused(workspace: Path) -> None:
    registry = registry_of(workspace)
    version = shifted(workspace, 0.8)
    registry.tag(version, {STORE: ""})
    decision = judge(workspace)
    assert not decision.promoted
    assert decision.why == f"it does not say where it comes from ({STORE})"
    with pytest.raises(CscError, match="no scores under room"):
        differences(pa.table({"a": [1]}), pa.table({"a": [1]}), ["room"], configured(workspace))
    registry.tag(version, {STORE: "s", "csc.variant": "another"})
    assert "is of variant another" in judge(workspace).why


FIGURES = {"si_snr_db": 6.0, "kept_db": -1.0, "left_db": -20.0}


def extracting(config: Config, sides: int = 5, **changed: float) -> dict[str, str]:
    """Return what a version with an extractor says of it, guarded conditions all alike."""
    rows = [
        {"condition": name, "output": EXTRACTED}
        | {key: {"value": value} for key, value in (FIGURES | changed).items()}
        for name in config.promote.guarded
    ]
    return extraction_tag("film", {"extraction": {"sides": sides, "results": rows}})


def test_a_promotion_does_not_lose_an_extractor(workspace: Path) -> None:
    registry, config = registry_of(workspace), configured(workspace)
    champion = registry.version(CHAMPION)
    challenger = shifted(workspace, 0.7)
    assert json.loads(challenger.tags[EXTRACTION]) == {"extractor": "none"}
    registry.tag(champion, extracting(config))
    assert judge(workspace).why == f"it has no extractor, and version {champion.number} has one"
    first, *_ = config.promote.guarded
    for worse, by in ({"si_snr_db": 4.0}, 2), ({"kept_db": -30.0}, 29), ({"left_db": 0.0}, 20):
        registry.tag(challenger, extracting(config, **worse))
        refusal = judge(workspace)
        assert not refusal.promoted
        worse_than = f"it extracts worse than version {champion.number}: "
        assert refusal.why.startswith(f"{worse_than}{first} {next(iter(worse))} by {by}.0")
    registry.tag(challenger, extracting(config, sides=9, si_snr_db=-20.0))
    told = judge(workspace, dry_run=True)
    assert told.promoted
    assert "extraction was not compared" in told.why
    registry.tag(challenger, extracting(config, si_snr_db=5.5))
    allowed = judge(workspace)
    assert allowed.promoted
    assert "extract" not in allowed.why
    registry.tag(champion, {EXTRACTION: ""})
    rollback(registry, "as it was")


def test_a_champion_of_other_trials_is_scored_on_the_challengers(workspace: Path) -> None:
    registry, model = registry_of(workspace), only(workspace / "models")
    config = load_config(
        "demo", [*SMALL, f"workspace='{workspace}'", "evaluate.trials.nontargets_per_test=7"]
    )
    about = model.read_json("index.json")
    run_id = registry.create_run("again", config, {"id": about["dataset"], "store": "s"})
    trained = Trained(model, about | {"run": run_id})
    evaluator = evaluator_of(workspace, config)
    evaluated = evaluate(Folder.at(workspace.parent / "other-trials"), evaluator, trained, {})
    version, _ = register(
        trained, evaluated, only(workspace / "mixtures"), store_in(workspace), registry
    )
    decision = promote(registry, evaluator)
    assert decision.promoted
    assert decision.version.number == version.number
    assert all(gap["value"] == 0 for gap in decision.differences.values())


def test_versions_are_compared_pair_by_pair(workspace: Path) -> None:
    worse, better = shifted(workspace, -0.6), shifted(workspace, 0.6)
    code, said = ask("compare", workspace, f"v{better.number}", worse.number)
    assert code == 0, said
    for condition in configured(workspace).promote.guarded:
        (row,) = (line for line in said.splitlines() if f" {condition} " in line)
        assert "better" in row
    (same,) = (line for line in said.splitlines() if " noise_0_db " in line)
    assert "+0.0 [+0.0, +0.0]" in same
    code, said = ask("compare", workspace, "champion", "99")
    assert code == 1
    assert "has no version or alias '99'" in said


def test_a_lineage_leads_back_to_the_corpora(workspace: Path) -> None:
    code, said = ask("lineage", workspace, "1")
    assert code == 0, said
    model, dataset = only(workspace / "models"), only(workspace / "mixtures")
    for word in (
        model.read_json("index.json")["id"],
        model.read_json("run.json"),
        dataset.read_json("index.json")["id"],
        store_in(workspace).read_json("index.json")["id"],
        "speechocean762 (speech)",
        "esc10 (noise)",
        "licence",
    ):
        assert word in said


def test_versions_trained_with_who_is_forgotten_are_flagged(workspace: Path) -> None:
    registry, dataset = registry_of(workspace), only(workspace / "mixtures")
    index = dataset.read_json("index.json")
    someone = index["speakers"][0]
    assert not flag_forgotten(registry, ["nobody/at-all"], [], set())
    numbers = [version.number for version in registry.versions()]
    assert sorted(flag_forgotten(registry, [someone], [], set())) == sorted(numbers)
    assert registry.version(numbers[0]).tags[FORGOTTEN] == someone
    assert any("forgotten" in line for line in lines(registry, registry.version(numbers[0])))
    flag_forgotten(registry, [], ["a/recording.wav"], {index["store"]})
    assert registry.version(numbers[0]).tags[FORGOTTEN] == f"{someone}, a/recording.wav"


def begun_with(
    workspace: Path,
    folder: Folder,
    init_from: str,
    speakers: Sequence[str] = (),
    dataset: Folder | None = None,
) -> Version:
    """Register a model that began with another one and learned nobody's vector itself."""
    registry, model = registry_of(workspace), only(workspace / "models")
    about, evaluation = model.read_json("index.json"), evaluation_in(workspace)
    for file in MODEL_FILES:
        folder.put(file, b"[]" if file == SPEAKERS_FILE else model.read(file))
    run_id = registry.create_run("further", configured(workspace), about)
    train = about["config"]["train"] | {"init_from": init_from}
    settings = about["config"] | {"train": train}
    name = folder.uri.rpartition("/")[2]
    changes = {"id": name, "run": run_id, "config": settings, "speakers": [*speakers]}
    trained = Trained(folder, about | changes)
    evaluated = Evaluated(evaluation, evaluation.read_json("index.json"))
    dataset = dataset or only(workspace / "mixtures")
    return register(trained, evaluated, dataset, store_in(workspace), registry)[0]


def test_what_began_with_a_flagged_version_is_flagged(workspace: Path, tmp_path: Path) -> None:
    registry = registry_of(workspace)
    one, other = only(workspace / "mixtures").read_json("index.json")["speakers"][1:3]
    base = min(registry.versions(), key=lambda version: int(version.number))
    first, second = (Folder.at(tmp_path / name) for name in ("first", "second"))
    child = begun_with(workspace, first, f"models:/{registry.model}/{base.number}")
    before = child.tags.get(FORGOTTEN)
    assert child.number in flag_forgotten(registry, [one], [], set())
    flag = registry.version(child.number).tags[FORGOTTEN]
    assert flag == (f"{before}, {one}" if before else one)
    grandchild = begun_with(workspace, second, first.uri)  # of what is flagged already
    assert registry.version(grandchild.number).tags[FORGOTTEN] == flag
    flagged = flag_forgotten(registry, [other], [], set())
    assert {base.number, child.number, grandchild.number} <= {*flagged}
    assert registry.version(grandchild.number).tags[FORGOTTEN] == f"{flag}, {other}"
    told = "\n".join(lines(registry, grandchild))
    assert f"model {base.tags['csc.model_id']}" in told


def test_whom_a_version_heard_without_learning_their_vectors_counts(
    workspace: Path, tmp_path: Path
) -> None:
    registry, folder = registry_of(workspace), Folder.at(tmp_path / "extractor")
    version = begun_with(workspace, folder, "elsewhere/model", ["corpus/new"])
    assert flag_forgotten(registry, ["corpus/new"], [], set()) == [version.number]


def test_what_was_told_of_recordings_alone_may_have_heard_anybody_of_its_store(
    workspace: Path, tmp_path: Path
) -> None:
    registry, index = registry_of(workspace), only(workspace / "mixtures").read_json("index.json")
    index["config"]["build"]["mixing"]["by_recording"] = True
    nameless, folder = Folder.at(tmp_path / "nameless"), Folder.at(tmp_path / "label-free")
    nameless.put_json("index.json", index)
    version = begun_with(workspace, folder, "elsewhere/model", dataset=nameless)
    assert not flag_forgotten(registry, ["corpus/ann"], [], set())
    assert flag_forgotten(registry, ["corpus/ann"], [], {index["store"]}) == [version.number]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--force"], "give a reason with --why"),
        (["--rollback"], "give a reason with --why"),
        (["--rollback", "--why", "x", "--dry-run"], "goes with --why only"),
    ],
)
def test_a_promotion_without_a_reason_is_refused(words: list[str], said: str) -> None:
    answer = subprocess.run([CSC, "promote", *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert said in answer.stderr


def test_an_evaluation_by_a_list_of_files(workspace: Path, tmp_path: Path) -> None:
    path = write_list(tmp_path)
    code, said = ask("evaluate", workspace, "--trials", path, "--audio", tmp_path)
    assert code == 0, said
    assert re.search(r"8 speakers\],\s+80 trials", said)
    assert "left out: noise_0_db, as the list has no noise" in said
    (about,) = (
        about["trials"]
        for folder in (workspace / "evaluations").iterdir()
        for about in [json.loads((folder / "index.json").read_text())]
        if about["trials"]["count"] == 80
    )
    assert about["speakers_by"] == "first folders of the list"
    code, said = ask("evaluate", workspace, "--audio", tmp_path)
    assert code == 2
    assert "--audio is of a list of files" in said


def test_scores_are_normalised_by_a_cohort_where_that_is_asked_for(workspace: Path) -> None:
    code, said = ask("evaluate", workspace, "--set", "evaluate.cohort=6")
    assert code == 0, said
    assert "AS-norm" in said
    (rows,) = (
        about["results"]
        for path in (workspace / "evaluations").glob("*/index.json")
        for about in [json.loads(path.read_text())]
        if any(row["system"] == "csc, AS-norm" for row in about["results"])
    )
    by_system = {row["system"]: row["eer"]["value"] for row in rows if row["condition"] == "clean"}
    assert by_system["csc, AS-norm"] != by_system["csc"]


def test_the_trials_of_a_split_are_written_down_and_evaluated_again(
    workspace: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trials.tsv"
    code, said = ask("trials", workspace, "--out", path)
    assert code == 0, said
    index = evaluation_in(workspace).read_json("index.json")
    rows = path.read_text().splitlines()
    assert len(rows) == 1 + 4 * index["trials"]["count"]
    # Without a condition, so that it is another evaluation.
    path.write_text("\n".join(row for row in rows if not row.startswith("sir_5_db\t")) + "\n")
    code, said = ask("evaluate", workspace, "--trials", path)
    assert code == 0, said
    (again,) = (
        about
        for folder in (workspace / "evaluations").iterdir()
        for about in [json.loads((folder / "index.json").read_text())]
        if about["trials"]["count"] == index["trials"]["count"]
        and {row["condition"] for row in about["results"]} == {"clean", "sir_0_db", "noise_0_db"}
    )
    assert again["trials"]["speakers_by"] == "the store"
    assert again["calibration"] == index["calibration"]
    for kind in ("results", "differences"):
        assert again[kind] == [row for row in index[kind] if row["condition"] != "sir_5_db"]
    path.write_text("1 a.wav b.wav\n")
    code, said = ask("evaluate", workspace, "--trials", path)
    assert code == 1
    assert "or --audio FOLDER with a list of files" in said


def test_a_version_beside_which_to_evaluate(workspace: Path) -> None:
    code, said = ask("evaluate", workspace, "--against", "1")
    assert code == 0, said
    assert "version 1" in said
    config: Config = configured(workspace)
    (about,) = (
        about
        for path in (workspace / "evaluations").glob("*/index.json")
        for about in [json.loads(path.read_text())]
        if any(row["system"] == "version 1" for row in about["results"])
    )
    gaps = [row["eer"] for row in about["differences"] if row["against"] == "version 1"]
    assert len(gaps) == len(config.evaluate.trials.conditions)
    assert all(gap == {"value": 0, "low": 0, "high": 0} for gap in gaps)  # it is the same model
