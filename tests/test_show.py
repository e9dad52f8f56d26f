"""What is shown of a dataset is what training gets of it."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from matplotlib import image

from jobs.cli import main
from jobs.show_files import PICTURE, sounds, write_files
from pipeline.audit.census import census
from pipeline.audit.excerpt import read_excerpt
from pipeline.build import build, dataset_id
from pipeline.commits import commit_shard
from pipeline.datasets import Dataset, read_dataset
from pipeline.distributions import BuildConfig
from pipeline.errors import CscError
from pipeline.loader import EpisodeLoader
from pipeline.render import render
from pipeline.schema import ROOMS, SAMPLE_RATE_HZ
from pipeline.shards import encode
from pipeline.storage import Folder
from tests.conftest import BUILD, serially

TRAIN = "train-000-00000.parquet"
Csc = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def varied(store: Folder, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset with two passes of mixtures of every kind."""
    mixing = BUILD.mixing.model_dump() | {
        "absent_share": 0.3,
        "babble_share": 0.5,
        "noise_share": 0.5,
        "mixit_share": 0.2,
        "overlap_min": 0.4,
    }
    config = BuildConfig.model_validate(BUILD.model_dump() | {"passes": 2, "mixing": mixing})
    name = dataset_id(store.read_json("index.json"), config, 5)
    folder = Folder.at(tmp_path_factory.mktemp("varied")).child(name)
    build(folder, store, config, 5, serially)
    return read_dataset(folder)


@pytest.fixture
def workspace(store: Folder, dataset: Folder, tmp_path: Path) -> Path:
    shutil.copytree(Path(store.uri).parent, tmp_path / "utterances" / "root")
    shutil.copytree(dataset.uri, tmp_path / "mixtures" / Path(dataset.uri).name)
    return tmp_path


@pytest.fixture
def csc(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Csc:
    """Return the command, to be called in the workspace: exit code, output and errors."""
    monkeypatch.chdir(workspace)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["csc", "show", *words, "--workspace", str(workspace)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def read(path: Path) -> np.ndarray:
    samples, rate_hz = soundfile.read(path, dtype="float32")
    assert rate_hz == SAMPLE_RATE_HZ
    return samples


def test_files_add_up_to_the_mixture(varied: Dataset, tmp_path: Path) -> None:
    for number in range(0, 12, 3):
        excerpt, folder = read_excerpt(varied, "train", number), tmp_path / str(number)
        names = write_files(excerpt, folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        for condition in range(varied.config.mixing.conditions):
            mixture = read(folder / f"condition-{condition}-mixture.wav")
            parts = [
                read(folder / f"condition-{condition}-{sound.name}.wav")
                for sound in sounds(excerpt)
                if sound.condition == condition and sound.name != "mixture"
            ]
            np.testing.assert_allclose(sum(parts), mixture, atol=1e-6)
            assert mixture.shape == (varied.num_samples,)
        drawn = image.imread(folder / PICTURE)
        assert min(drawn.shape[:2]) > 300
        assert drawn[..., :3].std() > 0.1


def test_dry_lines_are_those_of_the_shard(varied: Dataset, tmp_path: Path) -> None:
    excerpt = read_excerpt(varied, "valid", 3)
    folder = tmp_path / "out"
    dry = [name for name in write_files(excerpt, folder) if name.endswith("-dry.wav")]
    for name, line in zip(dry, excerpt.lines, strict=True):
        assert np.array_equal(soundfile.read(folder / name, dtype="int16")[0], line)


@pytest.mark.parametrize("number", [0, 7, 23])
def test_an_episode_sounds_as_in_training(dataset: Folder, number: int) -> None:
    loader = EpisodeLoader(dataset, "train", batch_size=2, seed=1)
    for batch in loader.batches(0):
        for place in np.flatnonzero(batch.numbers.numpy() == number):
            heard = render(batch.sources[[place]], batch.gains_db[[place]])
            excerpt = read_excerpt(read_dataset(dataset), "train", number)
            np.testing.assert_allclose(heard.mixtures[0], excerpt.mixtures, atol=1e-6)
            np.testing.assert_allclose(heard.references[0], excerpt.references, atol=1e-6)
            return
    pytest.fail("the loader does not have it")


def test_rooms_are_heard(dataset: Folder, tmp_path: Path) -> None:
    """The first episode of a shard is put into a room that sounds after a tenth of a second."""
    shutil.copytree(dataset.uri, tmp_path / "d")
    folder, delay = Folder.at(tmp_path / "d"), SAMPLE_RATE_HZ // 10
    response = np.zeros(delay + 1, "<i2")
    response[delay] = 32767
    rooms = [{"utterance_id": "r", "room": "hall", "split": "train", "pcm": response.tobytes()}]
    folder.put("rooms.parquet", encode(ROOMS.empty_table().from_pylist(rooms, schema=ROOMS), 8))
    before = read_excerpt(read_dataset(folder), "train", 0)
    table = pq.read_table(folder.open_input(TRAIN))
    rows = table.to_pylist()
    for line in rows[0]["lines"]:
        line["room"] = 0
    data = encode(table.from_pylist(rows, schema=table.schema), 2)
    commit_shard(folder, TRAIN, data, len(rows), "x")
    after = read_excerpt(read_dataset(folder), "train", 0)
    assert after.rooms == {0: "hall"}
    dry, wet = before.references[0, 0], after.references[0, 0]
    assert np.abs(wet[:delay]).max() < 1e-5
    assert np.corrcoef(dry[:-delay], wet[delay:])[0, 1] > 0.999


def test_a_census_counts_what_the_rows_say(varied: Dataset) -> None:
    found = census(varied, ["train"], {row: "f" if row % 2 else "m" for row in range(8)})
    rows = [
        row
        for record in varied.records
        if record.name.startswith("train-")
        for row in pq.read_table(varied.folder.open_input(record.name)).to_pylist()
    ]
    assert found.mixtures == 2 * len(rows) == 2 * 2 * 24
    asked = [c["sir_db"] for row in rows for c in row["conditions"] if c["sir_db"] is not None]
    realised = [
        c["realised_sir_db"]
        for row in rows
        for c in row["conditions"]
        if c["realised_sir_db"] is not None
    ]
    spread, came = (found.spreads["SIR dB"][kind] for kind in ("asked", "realised"))
    assert spread is not None
    assert came is not None
    assert spread.number == len(asked)
    assert (spread.mean, came.mean) == pytest.approx((np.mean(asked), np.mean(realised)))
    assert spread.quantiles == pytest.approx(np.quantile(asked, [0.05, 0.5, 0.95]))
    overlap = found.spreads["overlap"]["difference"]
    assert overlap is not None
    assert abs(overlap.mean) < 0.01
    mixit = np.mean([row["mixit"] for row in rows])
    assert found.shares["mixture of mixtures"] == pytest.approx(mixit)
    counted = [name for name in found.shares if name.endswith("interferer(s)")]
    assert sum(found.shares[name] for name in counted) + mixit == pytest.approx(1)
    for name in ("target absent", "noise", "babble"):
        assert 0 < found.shares[name] < 1
    assert found.shares["room"] == 0
    same, known = found.same_gender
    assert 0 < same < known


def test_only_the_first_mixtures_are_looked_at(varied: Dataset) -> None:
    assert census(varied, ["train", "valid"], {}, most=10).mixtures == 10
    assert census(varied, ["valid"], {}).same_gender == (0, 0)


def test_the_command_shows_a_dataset(workspace: Path, dataset: Folder, csc: Csc) -> None:
    name = Path(dataset.uri).name
    code, out, err = csc(name[:5])
    assert code == 0, err
    for words in (
        f"dataset {name}",
        "24 train, 8 valid; passes: 1",
        "generation-00001; seed 3",
        "first (speech): licence unstated",
        "64 mixtures of train, valid",
        "same gender as the target: not known of anyone",
    ):
        assert words in out
    assert re.search(r"SIR dB +│ asked +│ +\d+ │", out)
    assert "16 mixtures of valid" in csc(name, "--split", "valid")[1]


def test_the_command_shows_an_episode(workspace: Path, dataset: Folder, csc: Csc) -> None:
    name = Path(dataset.uri).name
    code, out, err = csc(name, "5", "--split", "valid")
    assert code == 0, err
    folder = workspace / f"csc-show-{name}-5"
    assert f"files in {folder}" in out
    for path in folder.iterdir():
        assert path.name in out
    assert "mixture 0: " in out
    assert re.search(r"(first|second)/s\d\d/u\d\.flac at \d+\.\d\d s", out)
    shutil.rmtree(workspace / "utterances")  # where the store is gone, ids stand for recordings
    code, out, err = csc(name, "5", "--split", "valid", "--out", str(workspace / "again"))
    assert code == 0, err
    assert "not in the workspace" in csc(name)[1]
    assert ".flac" not in out
    assert (workspace / "again" / PICTURE).exists()


def test_what_is_not_there_is_explained(workspace: Path, dataset: Folder, csc: Csc) -> None:
    name = Path(dataset.uri).name
    (workspace / "file").write_text("")
    for words, message in (
        ([name, "24"], "has no episode 24: choose from 0 to 23"),
        ([name, "0", "--split", "test"], "has no split 'test': choose from train, valid"),
        ([name, "--split", "test"], "has no split 'test': choose from train, valid"),
        (["17"], f"choose from those of {workspace}/mixtures: {name}; to show an episode, csc"),
        ([name, "1", "--out", str(workspace / "file" / "x")], "choose another with --out"),
    ):
        code, _, err = csc(*words)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err


def test_a_damaged_episode_is_not_shown(dataset: Folder, tmp_path: Path) -> None:
    shutil.copytree(dataset.uri, tmp_path / "d")
    folder = Folder.at(tmp_path / "d")
    line = read_excerpt(read_dataset(folder), "train", 2).lines[0].tobytes()
    data = bytearray(folder.read(TRAIN))
    data[data.index(line) + len(line) // 2] ^= 1
    folder.put(TRAIN, bytes(data))
    with pytest.raises(CscError, match=f"{TRAIN} is damaged"):
        read_excerpt(read_dataset(folder), "train", 2)
