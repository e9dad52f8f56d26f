"""LibriMix: imported mixtures are what its own arithmetic makes of the same files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.datasets import read_dataset
from pipeline.errors import CscError
from pipeline.exchange.librimix import import_librimix
from pipeline.exchange.librimix_audio import FADE, extended, fitted
from pipeline.exchange.librimix_metadata import LibriMix, read_rows
from pipeline.exchange.unpack import mixtures_of
from pipeline.loader import EpisodeLoader
from pipeline.schema import SAMPLE_RATE_HZ, SPEAKERS_FILE, content_id
from pipeline.storage import Folder
from tests.conftest import voice
from tests.librimix_files import (
    Files,
    FloatArray,
    as_written,
    librimix,
    overlapped,
    write_csv,
    write_files,
)


@pytest.fixture(scope="module", params=[2, 3])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("librimix"), request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("librimix"), 2)


def plain_sums(folder: Folder, split: str = "train") -> list[FloatArray]:
    """Return the sums of the lines of each row after their gains, in steps of int16."""
    return [
        sum(
            (
                pcm.astype(np.float64) * 10 ** (line["gain_db"] / 20)
                for line, pcm in zip(mixture.lines, mixture.pcm, strict=True)
            ),
            np.zeros(mixture.num_samples),
        )
        for mixture in mixtures_of(read_dataset(folder), split)
    ]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("noisy", [True, False])
def test_mixtures_are_those_of_librimix(
    files: Files, mode: str, noisy: bool, tmp_path: Path
) -> None:
    folder = files.imported(tmp_path / "made", mode=mode, noisy=noisy)
    mixtures = plain_sums(folder)
    assert len(mixtures) == len(files.rows)
    for row, mixture in zip(files.rows, mixtures, strict=True):
        wanted = sum(librimix(files, row, mode, noisy), np.zeros(1))
        assert np.abs(wanted).max() < 1  # nothing clips
        difference = np.rint(mixture) - as_written(wanted, tmp_path / "mixture.wav")
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_length_cuts_or_pads_the_same_mixtures(pair: Files, mode: str, tmp_path: Path) -> None:
    whole = plain_sums(pair.imported(tmp_path, mode=mode))
    folder = pair.imported(tmp_path, mode=mode, seconds=1.5)
    assert folder.read_json("index.json")["num_samples"] == 24_000
    for cut, mixture in zip(plain_sums(folder), whole, strict=True):
        wanted = np.pad(mixture, (0, max(0, 24_000 - len(mixture))))[:24_000]
        assert np.abs(cut - wanted).max() < 1


def test_recipes_say_where_everything_is_from(pair: Files, tmp_path: Path) -> None:
    folder = pair.imported(tmp_path)
    index = folder.read_json("index.json")
    assert index["num_samples"] is None
    assert index["store"] is None
    assert index["episodes"] == {"train": 3, "valid": 0}
    names = pq.read_table(folder.path(SPEAKERS_FILE)).to_pylist()
    assert [row["speaker_id"] for row in names] == [f"librispeech/{100 + n}" for n in range(4)]
    assert sum(row["utterances"] for row in names) == 6
    for mixture, row in zip(mixtures_of(read_dataset(folder), "train"), pair.rows, strict=True):
        assert [source["slot"] for source in mixture.sources] == [0, 1, 2]
        first = mixture.sources[0]
        pcm, _ = soundfile.read(pair.speech.path(row["source_1_path"]), dtype="int16")
        assert first["utterance_id"] == content_id(pcm.tobytes())
        assert first["speaker_id"] == "librispeech/" + row["source_1_path"].split("/")[1]
        assert (first["shard"], first["row"], first["offset"], first["onset"]) == (-1, -1, 0, 0)
        for source, column in zip(mixture.sources, ("source_1", "source_2", "noise"), strict=True):
            gain = float(row[f"{column}_gain"])
            assert source["gain_db"] == pytest.approx(20 * math.log10(gain), abs=1e-9)
        assert mixture.condition["realised_overlap"] == 1
        assert mixture.condition["realised_sir_db"] is not None
        assert mixture.condition["realised_snr_db"] is not None


def test_levels_are_measured_on_what_is_heard(pair: Files, tmp_path: Path) -> None:
    folder = pair.imported(tmp_path, mode="max")
    for mixture, row in zip(mixtures_of(read_dataset(folder), "train"), pair.rows, strict=True):
        parts = librimix(pair, row, "max", True)
        noise = parts[-1][: len(parts[-1]) // 320 * 320].reshape(-1, 320)
        level_db = 10 * math.log10(float((noise**2).mean()))
        line = mixture.lines[-1]
        assert line["gain_db"] + line["level_dbfs"] == pytest.approx(level_db, abs=0.3)
        lengths = [source["num_samples"] for source in mixture.sources[:2]]
        assert mixture.condition["realised_overlap"] == pytest.approx(min(lengths) / max(lengths))


def test_an_interrupted_import_goes_on(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2, rows=20)
    options: dict[str, Any] = {"seconds": 1.0, "shard_mb": 1.0, "split": "valid"}
    whole = files.imported(tmp_path / "whole", **options)
    shards = whole.read_json("index.json")["shards"]
    assert [shard["rows"] for shard in shards] == [8, 8, 4]
    plan = files.plan(**options)
    cut = Folder.at(tmp_path / "cut").child(plan.id)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_librimix(cut, plan, stop)
    assert not cut.exists("index.json")
    before = Path(cut.path("valid-000-00000.parquet")).stat().st_mtime_ns
    seen: list[int] = []
    assert import_librimix(cut, plan, lambda *at: seen.append(at[0]))["shards"] == shards
    assert seen == [8, 16, 20]
    assert Path(cut.path("valid-000-00000.parquet")).stat().st_mtime_ns == before
    names = {file.name for file in whole.list()}
    assert names == {file.name for file in cut.list()}
    assert all(whole.read(name) == cut.read(name) for name in names)


def test_the_loader_reads_what_has_one_length(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2, rows=12)
    folder = files.imported(tmp_path / "made", seconds=1.0)
    loader = EpisodeLoader(folder, "train", batch_size=4, seed=1)
    batches = list(loader.batches(0))
    assert len(batches) == 3
    assert sorted(n for batch in batches for n in batch.numbers.tolist()) == list(range(12))
    assert batches[0].gains_db.isfinite().all()
    assert batches[0].lines.shape[1] == SAMPLE_RATE_HZ


def test_the_id_depends_on_what_is_made(pair: Files) -> None:
    plans = [
        pair.plan(),
        pair.plan(noisy=False),
        pair.plan(mode="max"),
        pair.plan(seconds=2.0),
        pair.plan(split="valid"),
        pair.plan(corpus="other"),
    ]
    assert len({plan.id for plan in plans}) == len(plans)
    assert pair.plan().id == plans[0].id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source_1_path": "dev-clean/1/7/gone.flac"}, r"row 2: .*gone.flac: it does not exist"),
        ({"source_1_path": "a/../../../etc/x/y"}, r"row 2: .*leads outside"),
        ({"source_1_path": "/etc/a/b/passwd"}, r"row 2: .*leads outside"),
        ({"source_1_path": "x.flac"}, r"row 2: 'x.flac' is no path of LibriSpeech"),
        ({"source_1_path": "a/b/c/text.flac"}, r"row 2: cannot decode .*text.flac"),
        ({"source_1_path": "a/b/c/cut.flac"}, r"row 2: cannot decode .*cut.flac.*fetch it again"),
        ({"source_1_path": "a/b/c/stereo.wav"}, r"row 2: .*16000 Hz, 2 channel\(s\), PCM_16;"),
        ({"source_1_path": "a/b/c/deep.wav"}, r"row 2: .*1 channel\(s\), PCM_24; .* mono int16"),
        ({"source_1_path": "a/b/c/slow.wav"}, r"row 2: .*8000 Hz"),
        ({"source_1_path": "a/b/c/empty.wav"}, r"row 2: .*empty.wav has no samples"),
        ({"source_1_gain": "0"}, r"row 2: source_1_path .* source_1_gain '0'; .* above 0"),
        ({"source_2_gain": "loud"}, r"row 2: .*source_2_gain 'loud'"),
        ({"noise_path": "short.wav"}, r"row 2: .*short.wav: a noise of 8001 .* cannot be extended"),
        ({"noise_path": "nan.wav"}, r"row 2: .*nan.wav has NaN"),
    ],
)
def test_what_is_wrong_is_told_with_row_and_file(
    change: dict[str, str], reason: str, tmp_path: Path
) -> None:
    files = write_files(tmp_path, 2)
    strange = tmp_path / "speech/a/b/c"
    strange.mkdir(parents=True)
    strange.joinpath("text.flac").write_text("no audio")
    sound = voice(0, 0, 1.0)
    soundfile.write(strange / "cut.flac", sound, SAMPLE_RATE_HZ)
    whole = (strange / "cut.flac").read_bytes()
    (strange / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(strange / "stereo.wav", np.stack([sound, sound], 1), SAMPLE_RATE_HZ)
    soundfile.write(strange / "deep.wav", sound, SAMPLE_RATE_HZ, subtype="PCM_24")
    soundfile.write(strange / "slow.wav", sound, 8_000)
    soundfile.write(strange / "empty.wav", sound[:0], SAMPLE_RATE_HZ)
    soundfile.write(tmp_path / "noise/short.wav", sound[:FADE], SAMPLE_RATE_HZ)
    soundfile.write(tmp_path / "noise/nan.wav", sound * np.nan, SAMPLE_RATE_HZ, subtype="FLOAT")
    files.rows[1] |= change
    write_csv(files.metadata, files.rows)
    with pytest.raises(CscError, match=f"libri2mix_dev-clean.csv {reason}"):
        files.imported(tmp_path / "made")


def test_metadata_of_another_kind_is_refused(pair: Files, tmp_path: Path) -> None:
    with pytest.raises(CscError, match="columns for 1 sources"):
        read_rows("a.csv", "mixture_ID,source_1_path,source_1_gain\n")
    with pytest.raises(CscError, match="has no rows"):
        read_rows("a.csv", ",".join(pair.rows[0]) + "\n")
    three = write_files(tmp_path, 3)
    with pytest.raises(CscError, match="differ in how many"):
        LibriMix.of([str(pair.metadata), str(three.metadata)], pair.speech)
    with pytest.raises(CscError, match=r"seconds: .* correct the option"):
        pair.plan(seconds=90.0)


@settings(deadline=None, max_examples=8)
@given(st.integers(10_000, 20_000), st.integers(20_001, 40_000), st.integers(0, 2**32 - 1))
@example(8002, 8005, 1)
def test_a_noise_is_extended_as_librimix_does(length: int, wanted: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)
    assert np.abs(extended(noise, wanted) - overlapped(noise, wanted)).max() < 1e-7


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50), st.booleans())
def test_what_is_stored_is_near_enough(values: list[float], whole_steps: bool) -> None:
    samples = np.array(values, np.float32)
    if whole_steps:
        samples = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.float32) / 32768
    pcm, louder_db = fitted(samples)
    assert louder_db == 0.0 or not whole_steps
    back = pcm / 32768 * 10 ** (-louder_db / 20)
    assert np.abs(back - samples).max() <= float(np.abs(samples).max()) * 0.51 / 32767
