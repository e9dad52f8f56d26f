"""Audio in, of every kind, and what is measured of it."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import AudioError, decode, decode_16k, load, to_pcm
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, content_id
from pipeline.speech import SpeechConfig, cut, measure, reject_reason
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
    samples, rate_hz = decode(encoded(voice(1, 1), SAMPLE_RATE_HZ, **format_))
    assert rate_hz == SAMPLE_RATE_HZ
    assert abs(len(samples) - len(voice(1, 1))) < 0.1 * SAMPLE_RATE_HZ


@pytest.mark.parametrize("claimed", [0, 2**36 - 1])
def test_a_flac_that_lies_about_its_length_costs_no_more_than_itself(claimed: int) -> None:
    """libsndfile cannot seek in it, and would have memory taken for all that is claimed."""
    data = bytearray(encoded(voice(1, 1), SAMPLE_RATE_HZ, format="FLAC"))
    data[21] = data[21] & 0xF0 | claimed >> 32  # the lower 36 bits from here on are the length
    data[22:26] = (claimed & 0xFFFFFFFF).to_bytes(4)
    with pytest.raises(AudioError) as caught:
        decode(bytes(data))
    assert caught.value.reason == "unreadable"


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], 1)
    samples, _ = decode(encoded(stereo, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT"))
    assert samples == pytest.approx(np.full(100, 0.125))


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
        decode(data)
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
    assert measure(padded).level_dbfs == pytest.approx(measure(speech).level_dbfs, abs=1.0)
    assert measure(0.1 * speech).level_dbfs == pytest.approx(
        measure(speech).level_dbfs - 20, abs=0.5
    )


def test_bandwidth_and_clipping_are_seen() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    telephone = decode_16k(encoded(noise, 8_000, format="WAV"))
    assert measure(noise).bandwidth_hz > 7_500
    assert 3_500 < measure(telephone).bandwidth_hz < 4_500
    assert measure(np.clip(20 * noise, -1, 1)).clipped_share > 0.3
    assert measure(noise).clipped_share == 0


@given(st.floats(0.1, 60), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_cuts_cover_everything_and_none_is_too_long(seconds: float, seed: int) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
    config = SpeechConfig(max_seconds=10.0)
    bounds = cut(samples, config)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(samples)
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    assert all(0 < end - start <= 160_000 for start, end in bounds)


def test_cuts_fall_into_pauses() -> None:
    speech = np.concatenate([voice(1, 1, 8.0), np.zeros(8_000, np.float32), voice(1, 2, 8.0)])
    (_, end), *_ = cut(speech, SpeechConfig(max_seconds=10.0))
    assert 8.0 <= end / SAMPLE_RATE_HZ <= 8.5


def test_short_and_silent_segments_are_refused() -> None:
    config = SpeechConfig()
    assert reject_reason(8_000, measure(voice(1, 1)), config)[0] == "too_short"
    silence = np.zeros(32_000, np.float32)
    assert reject_reason(32_000, measure(silence), config)[0] == "silent"
    assert reject_reason(32_000, measure(voice(1, 1)), config) == ("", "")
