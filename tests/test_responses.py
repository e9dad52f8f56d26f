"""Room impulse responses: what is kept of a recording of one, and what is refused."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.audio import AudioError, Samples, stream
from pipeline.corpora import SAMPLE, CorpusConfig, IngestConfig
from pipeline.responses import LEAD, PEAK, cut_response
from pipeline.schema import SAMPLE_RATE_HZ, content_id
from pipeline.shards import read_catalogue, read_pcm
from pipeline.storage import Folder
from pipeline.store import REJECTS_FILE
from tests.conftest import make_store, recordings, shard_hashes, voice, write_corpus, write_noise


def response(
    seed: int, t60_s: float = 0.5, rate_hz: int = SAMPLE_RATE_HZ, ahead_s: float = 0.02
) -> Samples:
    """Return silence, a direct sound, and after 2 ms a tail that falls by 60 dB in `t60_s`.

    The energy of the tail is three times that of the direct sound. It is half a second longer than
    its decay.
    """
    time_s = np.arange(round((t60_s + 0.5) * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(size=len(time_s))
    tail = np.where(time_s > 0.002, noise * 10 ** (-3 * time_s / t60_s), 0)
    tail *= 0.4 * np.sqrt(3 / np.sum(tail**2))
    tail[0] = 0.4
    return np.pad(tail, (round(ahead_s * rate_hz), 0)).astype(np.float32)


def reason(samples: NDArray[np.floating]) -> str:
    with pytest.raises(AudioError) as caught:
        cut_response(samples.astype(np.float32))
    assert caught.value.detail
    return caught.value.reason


def late(samples: Samples) -> float:
    """Return the level in dB, under its peak, of what a response has 0.1 to 0.2 s after that."""
    part = samples[LEAD + SAMPLE_RATE_HZ // 10 : LEAD + SAMPLE_RATE_HZ // 5].astype(np.float64)
    return float(10 * np.log10(np.mean(part**2) / PEAK**2))


def write_rooms(root: Path, rooms: int = 2, positions: int = 3) -> Path:
    """Write `room/position.wav`, of other rates and channels at each position."""
    for room in range(rooms):
        (root / f"r{room}").mkdir(parents=True)
        for position, rate_hz in zip(range(positions), (16_000, 44_100, 48_000), strict=False):
            first = response(10 * room + position, 0.3 + 0.2 * room, rate_hz)
            both = np.stack([first, -np.roll(first, 40)], axis=1)
            channels = first if position == 0 else both
            path = root / f"r{room}" / f"p{position}.wav"
            soundfile.write(path, channels, rate_hz, subtype="FLOAT")
    return root


def room_corpus(root: Path) -> CorpusConfig:
    return CorpusConfig(name="rooms", root=str(root), kind="room")


def rejects(store: Folder) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(store.open_input(REJECTS_FILE)).to_pylist()
    return {row["path"]: (row["stage"], row["reason"]) for row in rows}


def pcm_by_path(store: Folder) -> dict[str, NDArray[np.int16]]:
    return {
        row["path"]: next(iter(read_pcm(store, {row["shard"]: [row["row"]]}).values()))
        for row in read_catalogue(store).to_pylist()
    }


@given(
    seed=st.integers(0, 1 << 30),
    t60_s=st.floats(0.1, 2.0),
    ahead_s=st.sampled_from([0.0, 0.0005, 0.001, 0.3]),
    exponent=st.integers(-20, 20),
)
@settings(max_examples=40, deadline=None)
def test_a_response_is_kept_from_its_direct_sound_on(
    seed: int, t60_s: float, ahead_s: float, exponent: int
) -> None:
    recorded = response(seed, t60_s, ahead_s=ahead_s)
    start, pcm, quality = cut_response(recorded)
    direct = round(ahead_s * SAMPLE_RATE_HZ)
    assert start == max(direct - LEAD, 0)
    assert np.argmax(np.abs(pcm.astype(int))) == direct - start <= LEAD
    assert np.abs(pcm.astype(int)).max() == PEAK
    assert pcm[-1] != 0
    assert len(pcm) <= direct - start + SAMPLE_RATE_HZ
    assert np.abs(pcm / PEAK - recorded[start:][: len(pcm)] / 0.4).max() < 0.51 / PEAK
    assert np.isfinite(quality).all()
    assert np.array_equal(cut_response(recorded * np.float32(-(2.0**exponent))).pcm, -pcm)


@given(st.integers(80, 2_000), st.integers(0, 3_000))
@settings(max_examples=20, deadline=None)
def test_digital_silence_after_a_response_is_cut_off(length: int, silence: int) -> None:
    recorded = np.zeros(100 + length + silence, np.float32)
    recorded[100] = 0.5
    recorded[100 + length - 1] = -0.01
    assert len(cut_response(recorded).pcm) == LEAD + length


def test_measures_are_of_what_is_kept() -> None:
    loud = response(1) / 0.4
    quality = cut_response(loud).quality
    assert quality.level_dbfs == cut_response(0.1 * loud).quality.level_dbfs
    assert quality.clipped_share == pytest.approx(1 / len(cut_response(loud).pcm))
    assert cut_response(0.1 * loud).quality.clipped_share == 0
    assert quality.bandwidth_hz > 7_500
    dull = np.convolve(loud, np.hanning(13) / 6)
    assert cut_response(dull).quality.bandwidth_hz < 6_500


def test_the_first_channel_alone_is_taken() -> None:
    first = response(3, rate_hz=48_000)
    both = np.stack([first, np.roll(first, 2_000)], axis=1)
    taken = decoded(both, first_channel=True)
    assert np.array_equal(taken, decoded(first))
    assert not np.array_equal(taken, decoded(both))


def decoded(samples: Samples, *, first_channel: bool = False) -> Samples:
    file = io.BytesIO()
    soundfile.write(file, samples, 48_000, format="WAV", subtype="FLOAT")
    file.seek(0)
    return np.concatenate(list(stream(file, first_channel=first_channel)))


def test_silence_is_refused() -> None:
    assert reason(np.zeros(0)) == "silent"
    assert reason(np.zeros(SAMPLE_RATE_HZ)) == "silent"


@given(st.integers(1, 79), st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_less_than_five_milliseconds_are_refused(length: int, silence: int) -> None:
    assert reason(np.pad(response(1, ahead_s=0.0)[:length], (300, silence))) == "too_short"


@pytest.mark.parametrize("speaker", range(8))
def test_speech_is_refused(speaker: int) -> None:
    for samples in recordings(speaker):
        assert reason(samples) == "not_a_response"


@given(
    seed=st.integers(0, 1 << 30),
    seconds=st.floats(0.1, 5.0),
    colour=st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=40, deadline=None)
def test_steady_noise_is_refused(seed: int, seconds: float, colour: float) -> None:
    noise = np.random.default_rng(seed).normal(size=round(seconds * SAMPLE_RATE_HZ))
    smooth = np.convolve(noise, colour ** np.arange(60))[: len(noise)]
    found = reason(smooth)
    ends_with_its_peak = np.argmax(np.abs(smooth)) > len(smooth) - 80
    assert found == ("too_short" if ends_with_its_peak else "not_a_response")


def test_tones_and_real_noise_are_refused() -> None:
    assert reason(np.sin(np.arange(20_000) * 0.3)) == "not_a_response"
    for kind in ("rain", "chainsaw", "helicopter"):
        for path in sorted((SAMPLE / "esc10" / kind).iterdir()):
            samples, _ = soundfile.read(path)
            assert reason(samples) == "not_a_response"


def test_a_store_of_rooms_alone(tmp_path: Path) -> None:
    root = write_rooms(tmp_path / "rooms")
    store = make_store(tmp_path / "out", IngestConfig(corpora=[room_corpus(root)]))
    catalogue, kept = read_catalogue(store), pcm_by_path(store)
    assert len(catalogue) == 6
    assert set(catalogue["kind"].to_pylist()) == {"room"}
    for row in catalogue.to_pylist():
        pcm = kept[row["path"]]
        room = row["path"].partition("/")[0]
        assert row["utterance_id"] == content_id(pcm.tobytes())
        assert row["num_samples"] == len(pcm)
        assert row["start_sample"] == pytest.approx(0.019 * SAMPLE_RATE_HZ, abs=1)
        assert row["speaker_id"] == f"rooms/{room}"
        assert row["session_id"] == f"rooms/{room}/{row['path'].removesuffix('.wav')}"
        assert abs(int(pcm[LEAD])) == PEAK
        wanted = late(cut_response(response(9, 0.3 + 0.2 * int(room[1]))).pcm)
        assert late(pcm) == pytest.approx(wanted, abs=4)
    assert rejects(store) == {}


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    root = write_rooms(tmp_path / "rooms")
    config = IngestConfig(corpora=[room_corpus(root)])
    one, two = (shard_hashes(make_store(tmp_path / name, config)) for name in ("one", "two"))
    assert one == two


def test_each_recording_is_kept_or_has_its_reason(tmp_path: Path) -> None:
    root = write_rooms(tmp_path / "rooms", 1, 2)
    good = (root / "r0" / "p0.wav").read_bytes()
    (root / "r0" / "p9.wav").write_bytes(good)
    (root / "r0" / "empty.wav").write_bytes(b"")
    (root / "r0" / "text.wav").write_text("no audio")
    tail = np.full(SAMPLE_RATE_HZ, np.nan, np.float32)
    for name, samples in (
        ("speech", voice(0, 0)),
        ("noise", np.random.default_rng(1).normal(0, 0.05, 16_000)),
        ("silent", np.zeros(16_000)),
        ("click", np.pad([0.5], 200)),
        ("nan", np.concatenate([response(5), tail])),
    ):
        soundfile.write(root / "r0" / f"{name}.wav", samples, SAMPLE_RATE_HZ, subtype="FLOAT")
    whole = io.BytesIO()
    soundfile.write(whole, np.tile(response(6), 20), SAMPLE_RATE_HZ, format="FLAC")
    (root / "r0" / "cut.flac").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    store = make_store(tmp_path / "out", IngestConfig(corpora=[room_corpus(root)]))
    assert rejects(store) == {
        "r0/p9.wav": ("duplicates", "duplicate"),
        "r0/empty.wav": ("decode", "empty"),
        "r0/text.wav": ("decode", "unreadable"),
        "r0/speech.wav": ("quality", "not_a_response"),
        "r0/noise.wav": ("quality", "not_a_response"),
        "r0/silent.wav": ("quality", "silent"),
        "r0/click.wav": ("quality", "too_short"),
        "r0/nan.wav": ("decode", "not_finite"),
        "r0/cut.flac": ("decode", "truncated"),
    }
    assert sorted(pcm_by_path(store)) == ["r0/p0.wav", "r0/p1.wav"]


def test_only_the_beginning_of_a_long_recording_is_read(tmp_path: Path) -> None:
    (tmp_path / "rooms").mkdir()
    long = np.zeros(60 * SAMPLE_RATE_HZ, np.float32)
    long[: len(response(1))] = response(1)
    long[40 * SAMPLE_RATE_HZ] = 1.0
    soundfile.write(tmp_path / "rooms" / "long.wav", long, SAMPLE_RATE_HZ, subtype="FLOAT")
    store = make_store(tmp_path / "out", IngestConfig(corpora=[room_corpus(tmp_path / "rooms")]))
    assert np.array_equal(pcm_by_path(store)["long.wav"], cut_response(response(1)).pcm)


def test_spans_of_one_recording_are_responses_of_their_own(tmp_path: Path) -> None:
    root = tmp_path / "rooms"
    root.mkdir()
    both = np.concatenate([response(1), response(2)])
    soundfile.write(root / "all.wav", both, SAMPLE_RATE_HZ, subtype="FLOAT")
    seconds = len(response(1)) / SAMPLE_RATE_HZ
    rows = [f"all.wav,r{turn},{turn * seconds},{seconds}" for turn in range(2)]
    (root / "m.csv").write_text("\n".join(["path,speaker,start_s,duration_s", *rows]))
    corpus = room_corpus(root).model_copy(
        update={"layout": "manifest", "manifest": "m.csv", "split": "train"}
    )
    store = make_store(tmp_path / "out", IngestConfig(corpora=[corpus]))
    starts = read_catalogue(store).sort_by("start_sample")["start_sample"].to_pylist()
    assert starts == [304, 304 + len(response(1))]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """A store of speech and noise, and the same with rooms, one of which is no response."""
    root = tmp_path_factory.mktemp("beside")
    rooms = write_rooms(root / "rooms", 2, 3)
    soundfile.write(rooms / "r0" / "speech.wav", voice(0, 0), SAMPLE_RATE_HZ)
    corpora = [
        CorpusConfig(name="c", root=str(write_corpus(root / "c", 3, 2))),
        CorpusConfig(name="noise", root=str(write_noise(root / "noise", 2)), kind="noise"),
    ]
    both = {"without": corpora, "with": [*corpora, room_corpus(rooms)]}
    return {
        name: make_store(root / name, IngestConfig(corpora=some, source_mb_per_shard=0.3))
        for name, some in both.items()
    }


def test_rooms_change_nothing_of_speech_and_noise(beside: dict[str, Folder]) -> None:
    without, with_rooms = (read_catalogue(beside[name]) for name in ("without", "with"))
    rooms = pc.equal(with_rooms["kind"], "room")
    assert pc.sum(rooms).as_py() == 6
    assert with_rooms.filter(pc.invert(rooms)).equals(without)
    hashes = {name: shard_hashes(store) for name, store in beside.items()}
    assert hashes["without"].items() < hashes["with"].items()
    shards = [
        set(with_rooms.filter(pc.equal(with_rooms["kind"], kind))["shard"].to_pylist())
        for kind in ("speech", "noise", "room")
    ]
    assert all(max(before) < min(after) for before, after in pairwise(shards))


def test_rooms_are_no_hours_and_nobody(beside: dict[str, Folder]) -> None:
    without, index = (beside[name].read_json("index.json") for name in ("without", "with"))
    assert (without["responses"], index["responses"]) == (0, 6)
    for key in ("kept", "seconds", "seconds_in", "speakers", "labels", "histograms"):
        assert index[key] == without[key]
    assert index["rejected_seconds"] == without["rejected_seconds"]
    assert index["rejected"] == without["rejected"] | {"not_a_response": 1}
    rooms = index["corpora"]["rooms"]
    assert (rooms["files"], rooms["responses"], rooms["seconds"]) == (7, 6, 0.0)
    assert rejects(beside["with"])["r0/speech.wav"] == ("quality", "not_a_response")


def test_a_room_is_in_one_split(beside: dict[str, Folder]) -> None:
    rooms = read_catalogue(beside["with"])
    rooms = rooms.filter(pc.equal(rooms["kind"], "room"))
    counts = rooms.group_by("speaker_id").aggregate([("split", "count_distinct")])
    assert counts["split_count_distinct"].to_pylist() == [1, 1]
