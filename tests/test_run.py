"""The whole way on real speech: every component is the real one, only the sizes are small."""

import contextlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import csc_model
from csc_model.saving import WEIGHTS_FILE
from jobs.cli import app
from jobs.config import load_config
from jobs.interrupt import Interrupt
from jobs.registry import CHALLENGER, CHAMPION, Registry
from jobs.run import refined
from jobs.workspace import Workspace
from pipeline.audio import load as load_audio
from pipeline.build import build, dataset_id
from pipeline.errors import CscError
from pipeline.storage import Folder
from tests.conftest import make_store, serially, shard_hashes, voice, write_corpus
from tests.whole_run import (
    CSC,
    PAIR,
    ask,
    command,
    configured,
    csc,
    only,
    registry_of,
    store_in,
)


def test_a_run_says_what_it_made_and_what_to_try(workspace: Path) -> None:
    said = (workspace / "said.txt").read_text()
    assert re.search(r"clean +│ +\d+\.\d \[", said)
    for word in ("untrained", "mfcc", "clean", "sir_5_db", "sir_0_db", "champion, it is the first"):
        assert word in said
    assert len(re.findall(r"^  (csc verify|csc run|mlflow ui) ", said, re.MULTILINE)) == 3


def test_a_killed_run_goes_on_where_it_was(workspace: Path) -> None:
    said = (workspace / "said.txt").read_text()
    assert said.count("finished before") == 2  # ingest and build
    model = only(workspace / "models")
    assert model.read_json("index.json")["steps"] == 12
    assert not model.exists("checkpoints")
    registry = registry_of(workspace)
    history = registry._client.get_metric_history(model.read_json("run.json"), "total")
    assert max(metric.step for metric in history) == 12
    assert len(history) < 2 * 4  # steps before the checkpoint were not done twice


def test_a_second_run_does_nothing_again(workspace: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("*/*/*")}
    again = csc("run", workspace)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 4
    assert "starting Ray" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in workspace.glob("*/*/*")} == before


def test_ray_and_a_kill_leave_the_shards_of_a_plain_loop(workspace: Path, tmp_path: Path) -> None:
    config = configured(workspace)
    store = make_store(tmp_path / "s", config.ingest)
    assert shard_hashes(store) == shard_hashes(store_in(workspace))
    name = dataset_id(store.read_json("index.json"), config.build, config.seed)
    dataset = Folder.at(tmp_path / "d").child(name)
    build(dataset, store, config.build, config.seed, serially)
    assert shard_hashes(dataset) == shard_hashes(only(workspace / "mixtures"))


def test_the_attention_of_the_best_weights_is_shown(workspace: Path) -> None:
    model = only(workspace / "models")
    assert model.read("attention.png").startswith(b"\x89PNG")
    correlation = registry_of(workspace).history(
        model.read_json("run.json"), "attention_rank_correlation"
    )
    assert -1 <= correlation[-1] <= 1


def test_the_evaluation_is_complete(workspace: Path) -> None:
    evaluation = only(workspace / "evaluations")
    index = evaluation.read_json("index.json")
    spoken = store_in(workspace).read_json("index.json")["speakers"]
    assert index["trials"]["speakers"] == spoken["test"] >= 5
    assert {(row["system"], row["condition"]) for row in index["results"]} == {
        (system, condition)
        for system in ("csc", "untrained", "mfcc")
        for condition in ("clean", "sir_5_db", "sir_0_db", "noise_0_db")
    }
    for row in index["results"]:
        assert 0 < row["eer"]["low"] <= row["eer"]["value"] <= row["eer"]["high"] < 0.6
        assert 0 < row["min_dcf_0.01"] <= 1
        assert row["act_dcf_0.05"] >= row["min_dcf_0.05"] > 0
        assert 0 < row["cllr"] < 2
    assert set(index["improvement_db"]) == {"sir_5_db", "sir_0_db"}
    assert evaluation.read("det.png").startswith(b"\x89PNG")
    scores = pq.read_table(evaluation.open_input("scores.parquet"))
    assert len(scores) == index["trials"]["count"]


def test_a_schedule_is_refined_from_what_a_run_logged(workspace: Path) -> None:
    config, run = configured(workspace), only(workspace / "models").read_json("run.json")
    logged = len(registry_of(workspace).history(run, "grad_norm"))
    if logged < 10:
        with pytest.raises(
            CscError, match="at least ten positive gradient norms; train for longer"
        ):
            refined(config, run)
    registry = registry_of(workspace)
    for step in range(20):
        registry.log_metrics(run, 100 + step, {"grad_norm": 1.0 + 5 / (1 + step)})
    registry.log_metrics(run, 119, {"grad_norm": 1.2})  # as a resumed run does
    history = registry.history(run, "grad_norm")
    assert (len(history), history[-1]) == (logged + 20, 1.2)
    rates = refined(config, run).train.refined
    assert max(rates) == pytest.approx(1, abs=0.05)
    assert rates[-1] == 0
    with pytest.raises(CscError, match="nosuchrun"):
        refined(config, "nosuchrun")


@pytest.mark.cluster
def test_a_champion_is_trained_further(workspace: Path) -> None:
    uri = "models:/csc-speaker-encoder@champion"
    settings = (f"train.init_from='{uri}'", "train.steps=4", "train.contrastive_weight=0.0")
    answer = csc("train", workspace, *(word for text in settings for word in ("--set", text)))
    assert answer.returncode == 0, answer.stderr
    folders = [Folder.at(path) for path in (workspace / "models").iterdir()]
    (tuned,) = [folder for folder in folders if folder.exists("base/model.json")]
    index = tuned.read_json("index.json")
    assert index["config"]["train"]["init_from"] == "models:/csc-speaker-encoder/1"
    assert index["steps"] == 4
    assert index["best_valid_eer"] is None  # separation alone: nobody's voice was learned
    assert index["best_valid_improvement_db"] is not None
    before, after = (load_file(Path(tuned.uri) / name / WEIGHTS_FILE) for name in ("base", "."))
    moved = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert moved
    assert moved <= {"frontend", "bottleneck", "trunk", "separation_blocks", "mask"}
    shutil.rmtree(tuned.uri)


def test_the_registered_version_is_whole(workspace: Path, tmp_path: Path) -> None:
    registry = registry_of(workspace)
    champion, challenger = registry.by_alias(CHAMPION), registry.by_alias(CHALLENGER)
    assert champion is not None
    assert champion == challenger
    assert champion.tags["csc.variant"] == "reconstructed-v1"
    assert champion.tags["csc.dataset"] == Path(only(workspace / "mixtures").uri).name
    assert re.fullmatch(r"0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", champion.tags["eer.clean"])
    uri = f"models:/{registry.model}@{CHAMPION}"
    folder = registry.download(uri, tmp_path)
    assert not list(folder.rglob("*.pkl"))
    samples = load_audio(PAIR[0])
    expected = csc_model.CSC.load(folder / "model").embed(torch.from_numpy(samples))[0].numpy()
    served = mlflow.pyfunc.load_model(uri).predict([{"samples": samples.tolist()}])
    np.testing.assert_allclose(served[0].vectors, expected, atol=1e-5)


def csc_verify(workspace: Path, *files: str) -> subprocess.CompletedProcess[str]:
    words = [CSC, "verify", *files, "--workspace", str(workspace)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_verify_refuses_what_it_cannot_hear(workspace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    answer = csc_verify(workspace, PAIR[0], str(broken))
    assert answer.returncode == 1
    assert re.match(r"error: .*broken\.wav: unreadable", answer.stderr)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "ingest.corpora.0.root='/nowhere'"], "/nowhere does not exist or is empty"),
        (["--set", "train.lrr=1"], "did you mean train.lr?"),
        (["--workspace", "/dev/null/x"], "cannot write to the workspace /dev/null/x"),
        (["--config", "nothing"], "no configuration 'nothing'"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, more: list[str], said: str) -> None:
    code, answer = ask("run", tmp_path, *more)
    assert code == 1
    assert answer.startswith("error: ")
    assert said in answer


def test_a_corpus_with_one_speaker_is_explained(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "one", 1, 4)
    path = tmp_path / "one.toml"
    path.write_text(f"[[ingest.corpora]]\nname = 'one'\nroot = '{corpus}'\n")
    config = load_config(str(path), [f"workspace='{tmp_path / 'w'}'"])
    store = make_store(tmp_path / "store", config.ingest)
    with pytest.raises(CscError, match="1 speaker"):
        build(Workspace(config).mixtures.child("d"), store, config.build, 1, serially)


def test_two_commands_do_not_share_a_workspace(tmp_path: Path) -> None:
    with Workspace(configured(tmp_path)).locked():
        answer = csc("ingest", tmp_path)
    assert answer.returncode == 1
    assert "another csc is at work" in answer.stderr


def test_a_locked_or_foreign_database_is_named(tmp_path: Path) -> None:
    config = configured(tmp_path)
    path = tmp_path / "mlflow.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CscError, match=r"mlflow\.db: database is locked; close the program"):
        Registry(Workspace(config).mlflow_uri, config)
    holder.close()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(CscError, match="file is not a database"):
        Registry(Workspace(config).mlflow_uri, config)


def test_ctrl_c_is_not_lost_where_a_library_swallows_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_command_says_so_and_leaves_no_index(tmp_path: Path) -> None:
    running = subprocess.Popen(command("ingest", tmp_path), stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("utterances/*/shards/shard-*.done.json")):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.strip() == "stopped; the same command goes on from here"
    assert not list(tmp_path.glob("utterances/*/*/index.json"))


def test_help_comes_at_once_and_names_every_stage() -> None:
    answer = subprocess.run([CSC, "--help"], capture_output=True, text=True, check=True)
    stages = ("run", "ingest", "build", "train", "evaluate", "register", "promote")
    for stage in (*stages, "verify", "forget"):
        assert f" {stage} " in answer.stdout
    heavy = "import sys, jobs.cli; print({'torch', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "set()"


def test_ingest_grows_and_forgets_from_the_command_line(workspace: Path, tmp_path: Path) -> None:
    corpus, root = write_corpus(tmp_path / "c", 4, 2), tmp_path / "w"
    soundfile.write(corpus / "s00" / "long.flac", voice(0, 2, 12.0), 16_000)
    (tmp_path / "judge").mkdir()
    for part, folder in (("model", "models"), ("evaluation", "evaluations")):
        shutil.copytree(only(workspace / folder).uri, tmp_path / "judge" / part)
    (tmp_path / "mine.toml").write_text(
        f"workspace = '{root}'\n[ingest]\npurity = '{tmp_path / 'judge'}'\n"
        "purity_threshold = 1.0\nspeech.max_pause_s = 2.0\n"
        f"[[ingest.corpora]]\nname = 'mine'\nroot = '{corpus}'\n"
    )

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--config", str(tmp_path / "mine.toml")])
        if result.exception is not None:
            raise result.exception
        return result.output

    assert "9 new, 0 changed, 0 gone, 0 unchanged" in run("ingest", "--dry-run")
    assert not (root / "utterances").exists()
    command = [CSC, "ingest", "--config", str(tmp_path / "mine.toml")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "several people speak" in said  # no model finds two parts that much alike
    assert (root / "utterances").glob("*/generation-00001/report.html")
    assert "nothing new: generation 1" in run("ingest", "--dry-run")
    write_corpus(corpus, 1, 2, first=4)
    assert "2 new, 0 changed, 0 gone, 9 unchanged" in run("ingest", "--dry-run")
    assert "2 recording(s) or span(s) removed" in run("forget", "--speaker", "mine/s01")
    (left,) = (root / "utterances").glob("*/generation-*")
    assert left.name == "generation-00002"
    assert "2 new, 0 changed, 0 gone, 7 unchanged" in run("ingest", "--dry-run")
