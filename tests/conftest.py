"""Small real things for tests: speech, corpora on disk, a store, a dataset."""

import functools
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import boto3
import numpy as np
import pytest
import soundfile
import torch
from moto.server import ThreadedMotoServer

from pipeline.audio import Samples, load
from pipeline.build import build, dataset_id
from pipeline.corpora import SAMPLE, CorpusConfig, IngestConfig, list_corpora
from pipeline.distributions import BuildConfig, MixingConfig
from pipeline.schema import SAMPLE_RATE_HZ, Runner, Task, Work
from pipeline.storage import Folder
from pipeline.store import ingest, plan_ingest

# What a shell starts in the background ignores Ctrl-C, and so would all commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Take one core: on such small tensors a second one is waited for more than used."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def serially(tasks: Sequence[Task], work: Work) -> None:
    """Run the tasks of a stage in this process: the plain loop that Ray must agree with."""
    for task in tasks:
        work(task)


@functools.cache
def recordings(speaker: int) -> list[Samples]:
    """Return what a speaker of the shipped sample says, the longest first."""
    folders = sorted(path for path in (SAMPLE / "speechocean762").iterdir() if path.is_dir())
    spoken = [load(path) for path in sorted(folders[speaker].iterdir())]
    return sorted(spoken, key=len, reverse=True)


def voice(speaker: int, utterance: int, seconds: float | None = None) -> Samples:
    """Return real speech: one utterance, or as many seconds from there on as are asked for."""
    spoken = recordings(speaker)
    if seconds is None:
        return spoken[utterance % len(spoken)]
    count = round(seconds * SAMPLE_RATE_HZ)
    turns = [spoken[(utterance + turn) % len(spoken)] for turn in range(1 + count // 16_000)]
    return np.concatenate(turns)[:count]


def write_corpus(root: Path, speakers: int, utterances: int, first: int = 0) -> Path:
    """Write `speaker/utterance.flac` below a folder."""
    for speaker in range(first, first + speakers):
        folder = root / f"s{speaker:02d}"
        folder.mkdir(parents=True)
        for utterance in range(utterances):
            path = folder / f"u{utterance}.flac"
            soundfile.write(path, voice(speaker, utterance), SAMPLE_RATE_HZ)
    return root


def write_noise(root: Path, clips: int = 12) -> Path:
    root.mkdir(parents=True)
    for clip in range(clips):
        samples = np.random.default_rng(clip).normal(0, 0.05, 2 * SAMPLE_RATE_HZ)
        soundfile.write(root / f"n{clip:02d}.wav", samples.astype(np.float32), SAMPLE_RATE_HZ)
    return root


def write_rooms(root: Path, rooms: int = 12) -> Path:
    """Write two responses of each room: a direct sound, and noise that dies away."""
    for room in range(rooms):
        (root / f"room{room:02d}").mkdir(parents=True)
        for place in range(2):
            rng = np.random.default_rng([room, place])
            samples = rng.normal(0, 0.05, 4000) * np.exp(-np.arange(4000) / (300 + 50 * room))
            samples[10] = 1.0
            path = root / f"room{room:02d}" / f"place{place}.wav"
            soundfile.write(path, samples.astype(np.float32), SAMPLE_RATE_HZ, subtype="FLOAT")
    return root


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> IngestConfig:
    """Two corpora of speech with 24 speakers together, and one of noise."""
    root = tmp_path_factory.mktemp("corpora")
    return IngestConfig(
        corpora=[
            CorpusConfig(name="first", root=str(write_corpus(root / "first", 14, 4))),
            CorpusConfig(name="second", root=str(write_corpus(root / "second", 10, 3, first=14))),
            CorpusConfig(name="noise", root=str(write_noise(root / "noise")), kind="noise"),
        ],
        splits={"valid_share": 0.25, "test_share": 0.25},
        source_mb_per_shard=0.5,
    )


BUILD = BuildConfig(
    train_episodes=24,
    valid_episodes=8,
    shard_mb=0.6,  # six episodes
    episodes_per_group=2,
    slice_mb=0.5,
    window_slices=3,
    shards_per_window=2,
    mixing=MixingConfig(seconds=0.5, interferer_shares=[0.2, 0.8], noise_share=0.3),
)


def make_store(root: Path | Folder, config: IngestConfig, run: Runner = serially) -> Folder:
    """Ingest into a store and return its newest generation."""
    folder = root if isinstance(root, Folder) else Folder.at(root)
    planned = plan_ingest(folder, config, list_corpora(config))
    ingest(folder, planned, config, run)
    return planned.store


@pytest.fixture(scope="session")
def store(corpora: IngestConfig, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_store(tmp_path_factory.mktemp("store"), corpora)


@pytest.fixture(scope="session")
def dataset(store: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    name = dataset_id(store.read_json("index.json"), BUILD, seed=3)
    folder = Folder.at(tmp_path_factory.mktemp("dataset")).child(name)
    build(folder, store, BUILD, 3, serially)
    return folder


def shard_hashes(folder: Folder) -> dict[str, str]:
    return {shard["name"]: shard["sha256"] for shard in folder.read_json("index.json")["shards"]}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Start an S3 server on loopback and return an address in its bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="lake")
        yield "s3://lake/work"
    server.stop()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which `csc run` was killed in mid-training and then went through."""
    from tests.whole_run import SNAPSHOTS, command, csc

    root = tmp_path_factory.mktemp("workspace")
    first = subprocess.Popen(command("run", root), stdout=subprocess.DEVNULL)
    # A checkpoint counts once Ray's controller has written it down.
    while not any('"checkpoint_dir_name"' in path.read_text() for path in root.glob(SNAPSHOTS)):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = csc("run", root)
    assert second.returncode == 0, second.stderr
    (root / "said.txt").write_text(second.stdout)
    return root
