"""Audio in, of every kind, and what is measured of it."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import AudioError, decode_16k, load, stream, to_pcm
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, content_id
from pipeline.speech import SpeechConfig, measure, reject_reason
from tests.conftest import voice


def encoded(samples: np.ndarray, rate_hz: int, **format_: str) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate_hz, **format_)
    return sink.getvalue()


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_int16_audio_keeps_every_sample(seed: int) -> None:
    pcm = np.random.default_rng(seed).integers(-32768, 32768, 3000).astype("<i2")
    back = to_pcm(decode_16k(encoded(pcm, SAMPLE_RATE_HZ, format="WAV")))
    assert np.array_equal(back, pcm)
    assert content_id(back.tobytes()) == content_id(pcm.tobytes())


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_pitch_and_level_at_any_rate(rate_hz: int) -> None:
    time = np.arange(rate_hz) / rate_hz
    samples = decode_16k(encoded(0.5 * np.sin(2 * np.pi * 440 * time), rate_hz, format="FLAC"))
    assert len(samples) == SAMPLE_RATE_HZ
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) == 440
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.01)


@pytest.mark.parametrize(
    "format_",
    [
        {"format": "WAV", "subtype": "PCM_24"},
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "OGG", "subtype": "VORBIS"},
        {"format": "OGG", "subtype": "OPUS"},
        {"format": "MP3"},
        {"format": "AIFF"},
    ],
    ids=lambda format_: "-".join(format_.values()),
)
def test_formats_are_told_by_content(format_: dict[str, str]) -> None:
    samples = decode_16k(encoded(voice(1, 1), SAMPLE_RATE_HZ, **format_))
    assert alike(samples, voice(1, 1))


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [("mp4", "aac", 44_100), ("adts", "aac", 32_000), ("webm", "libopus", 48_000)],
)
def test_containers_that_libsndfile_does_not_know(container: str, codec: str, rate_hz: int) -> None:
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as output:
        track = output.add_stream(codec, rate=rate_hz, layout="stereo")
        spoken = soxr.resample(voice(1, 1), SAMPLE_RATE_HZ, rate_hz)
        for start in range(0, len(spoken), 1024):
            both = np.tile(spoken[start : start + 1024], (2, 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
            frame.rate = rate_hz
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    assert alike(decode_16k(sink.getvalue()), voice(1, 1))


def alike(samples: np.ndarray, original: np.ndarray) -> bool:
    """Tell whether a lossy copy sounds like its original at the same time, give or take 50 ms."""
    count = min(len(samples), len(original))
    spectra = np.fft.rfft(samples[:count]) * np.fft.rfft(original[:count]).conj()
    shift = np.roll(np.fft.irfft(spectra), 800)[:1600].max()
    norm = np.linalg.norm(samples[:count]) * np.linalg.norm(original[:count])
    return bool(shift > 0.9 * norm and abs(len(samples) - len(original)) < 0.1 * SAMPLE_RATE_HZ)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(WHOLE)
    playlist = f"#EXTM3U\n#EXTINF:2,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"
    script = f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n"
    for text in (playlist, script):
        with pytest.raises(AudioError) as caught:
            decode_16k(text.encode())
        assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_spans_are_parts_of_the_whole(rate_hz: int) -> None:
    data = encoded(soxr.resample(voice(1, 1), 16_000, rate_hz), rate_hz, format="WAV")
    whole = decode_16k(data)
    part = np.concatenate(list(stream(io.BytesIO(data), 0.5, 1.0)))
    assert len(part) == pytest.approx(SAMPLE_RATE_HZ, abs=2)
    assert np.abs(part[200:-200] - whole[8_000:24_000][200 : len(part) - 200]).max() < 0.01
    rest = np.concatenate(list(stream(io.BytesIO(data), 0.5)))
    assert len(rest) == pytest.approx(len(whole) - 8_000, abs=2)


@pytest.mark.parametrize("claimed", [0, 1_000, 2**36 - 1])
def test_a_flac_that_lies_about_its_length_is_read_whole(claimed: int) -> None:
    spoken = voice(1, 1, 6.0)
    data = bytearray(encoded(spoken, SAMPLE_RATE_HZ, format="FLAC"))
    data[21] = data[21] & 0xF0 | claimed >> 32  # the lower 36 bits from here on are the length
    data[22:26] = (claimed & 0xFFFFFFFF).to_bytes(4)
    blocks, fault = until_fault(bytes(data))
    assert fault is None
    assert len(blocks) == len(spoken)
    assert np.abs(blocks - spoken).max() < 1e-4


def test_what_follows_a_damage_is_read_too() -> None:
    spoken = voice(1, 1, 6.0)
    data = bytearray(encoded(spoken, SAMPLE_RATE_HZ, format="FLAC"))
    data[len(data) // 2] ^= 0xFF
    blocks, fault = until_fault(bytes(data))
    assert fault == "truncated"
    assert len(spoken) - 8_192 <= len(blocks) < len(spoken)
    assert np.abs(blocks[-16_000:] - spoken[-16_000:]).max() < 1e-4


def until_fault(data: bytes) -> tuple[np.ndarray, str | None]:
    """Return what is decoded before the file turns out bad, and why it does."""
    blocks = [np.zeros(0, np.float32)]
    try:
        blocks.extend(stream(io.BytesIO(data)))
    except AudioError as error:
        return np.concatenate(blocks), error.reason
    return np.concatenate(blocks), None


REASONS = {"empty", "unreadable", "truncated", "not_finite", None}


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_cut_anywhere_is_read_to_there(format_: str) -> None:
    data = encoded(voice(1, 1), SAMPLE_RATE_HZ, format=format_)
    lengths = []
    for tenth in range(11):
        samples, reason = until_fault(data[: len(data) * tenth // 10])
        assert reason in REASONS
        lengths.append(len(samples))
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[10] == pytest.approx(len(voice(1, 1)), abs=3_000)
    assert lengths[6] > 0.2 * lengths[10]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_are_read_or_refused_with_a_reason(data: st.DataObject) -> None:
    format_ = data.draw(st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]))
    broken = bytearray(encoded(voice(1, 1, 2.0), SAMPLE_RATE_HZ, format=format_))
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=50)):
        broken[place] ^= data.draw(st.integers(1, 255))
    samples, reason = until_fault(bytes(broken))
    assert reason in REASONS
    assert np.isfinite(samples).all()


def test_a_wav_whose_length_was_never_filled_in_is_read_whole() -> None:
    data = bytearray(encoded(voice(1, 1, 3.0), SAMPLE_RATE_HZ, format="WAV"))
    data[4:8] = bytes(4)
    length = data.index(b"data") + 4
    data[length : length + 4] = bytes(4)
    assert np.abs(decode_16k(bytes(data)) - voice(1, 1, 3.0)).max() < 1e-4


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], 1)
    samples = decode_16k(encoded(stereo, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT"))
    assert samples == pytest.approx(np.full(100, 0.125))


def test_channels_that_cancel_leave_the_loudest() -> None:
    both = np.stack([voice(1, 1), -0.9 * voice(1, 1), 0 * voice(1, 1)], 1)
    samples = decode_16k(encoded(both, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT"))
    assert np.array_equal(samples, voice(1, 1))
    eight = np.tile(voice(1, 1)[:, None], (1, 8))
    samples = decode_16k(encoded(eight, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT"))
    assert np.abs(samples - voice(1, 1)).max() < 1e-6


WHOLE = encoded(voice(1, 1), SAMPLE_RATE_HZ, format="WAV")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not audio at all", "unreadable"),
        (WHOLE[:20], "unreadable"),
        (WHOLE[:44], "empty"),
        (encoded(np.full(9, np.nan), 16_000, format="WAV", subtype="FLOAT"), "not_finite"),
    ],
)
def test_what_is_no_audio_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(AudioError) as caught:
        decode_16k(data)
    assert caught.value.reason == reason


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    silent = tmp_path / "silent.wav"
    silent.write_bytes(encoded(np.zeros(16_000), SAMPLE_RATE_HZ, format="WAV"))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    short = tmp_path / "short.wav"
    short.write_bytes(encoded(voice(1, 1)[:160], SAMPLE_RATE_HZ, format="WAV"))
    reasons = {silent: "silent", broken: "unreadable", short: "too short: 0.01 s"}
    for path, reason in (reasons | {tmp_path / "no": "No such"}).items():
        with pytest.raises(CscError, match=f"{path.name}.*{reason}"):
            load(path)


def test_the_level_is_that_of_active_speech() -> None:
    speech = voice(2, 1)
    padded = np.concatenate([np.zeros(40_000, np.float32), speech, np.zeros(40_000, np.float32)])
    level_dbfs = measure(speech, 0.0).level_dbfs
    assert measure(padded, 0.0).level_dbfs == pytest.approx(level_dbfs, abs=1.0)
    assert measure(0.1 * speech, 0.0).level_dbfs == pytest.approx(level_dbfs - 20, abs=0.5)
    assert measure(speech + 0.3, 0.0).level_dbfs == pytest.approx(level_dbfs, abs=0.1)


def test_bandwidth_and_clipping_are_seen() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    telephone = decode_16k(encoded(noise, 8_000, format="WAV"))
    assert measure(noise, 0.0).bandwidth_hz > 7_500
    assert 3_500 < measure(telephone, 0.0).bandwidth_hz < 4_500
    overdriven = np.clip(20 * noise, -1, 1)
    assert measure(overdriven, 0.0).clipped_share > 0.3
    at_44_khz = soxr.resample(overdriven, 16_000, 44_100)
    again = decode_16k(encoded(np.clip(at_44_khz, -1, 1), 44_100, format="WAV"))
    assert measure(again, 0.0).clipped_share > 0.05
    assert measure(noise, 0.0).clipped_share == 0


def test_what_is_not_good_enough_is_refused_with_its_reason() -> None:
    config = SpeechConfig(min_bandwidth_hz=4_500)
    good = measure(voice(1, 1), 20.0)

    def reason(seconds: float = 3.0, kind: str = "speech", **measured: float) -> str:
        return reject_reason(int(seconds * 16_000), good._replace(**measured), kind, config)[0]

    assert reason() == ""
    assert reason(seconds=1.4) == "too_short"
    assert reason(level_dbfs=-70) == "silent"
    assert reason(clipped_share=0.02) == "clipped"
    assert reason(snr_db=-1) == "low_snr"
    assert reason(bandwidth_hz=4_000) == "narrowband"
    assert reason(tonal_share=0.2) == "tonal"
    assert reason(snr_db=-1, bandwidth_hz=400, kind="noise") == ""
