"""Tones and held chords are told from speech; a voice, at any gain, and what glides are not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.speech import SpeechConfig
from pipeline.tones import tonal_share
from tests.conftest import voice

MAX_TONAL_SHARE = SpeechConfig().max_tonal_share
TIME = np.arange(5 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
Wave = NDArray[np.float64]
WHITE = np.random.default_rng(0).standard_normal(len(TIME))


def harmonic(hertz: float | Wave, count: int = 15) -> Wave:
    """Return harmonics that fall off as those of a bowed string or a reed do."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, TIME.shape)) / SAMPLE_RATE_HZ
    return np.sum([np.sin(number * phase) / number for number in range(1, count + 1)], axis=0)


def sine(hertz: float) -> Wave:
    return np.sin(2 * np.pi * hertz * TIME)


def at_level(wave: Wave, level_dbfs: float = -26.0) -> Samples:
    scale = 10 ** (level_dbfs / 20) / np.sqrt(np.mean(wave**2))
    return (scale * wave).astype(np.float32)


TONAL = {
    "a tone": sine(1000),
    "a low tone": sine(250),
    "a dial tone": sine(350) + sine(440),
    "a busy tone": sine(425) * (TIME % 1 < 0.7),
    "a held note": harmonic(130),
    "a chord": harmonic(220) + harmonic(277) + harmonic(330),
    "chords struck twice a second": (harmonic(220) + harmonic(277)) * np.exp(-(TIME % 0.5) / 0.3),
    "a tune": harmonic(220 * 2 ** ((np.floor(TIME) * 5 % 12) / 12)),
    "a chord in noise": harmonic(220) + harmonic(277) + 0.3 * WHITE,
}
MOVING = {
    "noise": WHITE,
    "a sweep": np.sin(2 * np.pi * (100 + 380 * TIME) * TIME),
    "a siren": np.sin(2 * np.pi * np.cumsum(900 + 400 * sine(0.5)) / SAMPLE_RATE_HZ),
    "beeps of 0.15 s": sine(1000) * (TIME % 0.5 < 0.15),
    "a gliding voice": harmonic(150 + 40 * sine(0.7)),
}


@pytest.mark.parametrize("kind", TONAL)
def test_what_stays_is_tonal(kind: str) -> None:
    assert tonal_share(at_level(TONAL[kind])) > MAX_TONAL_SHARE


@pytest.mark.parametrize("kind", MOVING)
def test_what_moves_is_not(kind: str) -> None:
    assert tonal_share(at_level(MOVING[kind])) < MAX_TONAL_SHARE


def test_all_of_a_tone_and_nothing_of_silence_is_tonal() -> None:
    assert tonal_share(at_level(sine(1000))) > 0.95
    assert tonal_share(np.zeros(SAMPLE_RATE_HZ, np.float32)) == 0.0
    assert 0.0 <= tonal_share(np.ones(10, np.float32)) <= 1.0


def test_vibrato_and_noise_lower_it() -> None:
    depths = (0.0, 0.003, 0.01, 0.03)
    by_depth = [tonal_share(at_level(harmonic(220 * (1 + d * sine(5.5))))) for d in depths]
    assert by_depth[0] > by_depth[1] > by_depth[-1]
    by_noise = [tonal_share(at_level(sine(1000) + level * WHITE)) for level in (0.0, 0.3, 1.0, 10)]
    assert by_noise == sorted(by_noise, reverse=True)


@pytest.mark.parametrize("speaker", range(0, 68, 4))
def test_speech_passes(speaker: int) -> None:
    for seconds in (1.5, 5.0, 15.0):
        assert tonal_share(voice(speaker, 0, seconds)) < MAX_TONAL_SHARE


@pytest.mark.parametrize("kind", ["a chord", "a tune"])
def test_music_as_loud_as_the_speech_over_it_is_heard(kind: str) -> None:
    for speaker in range(8):
        speech = at_level(voice(speaker, 0, 5.0).astype(np.float64))
        assert tonal_share(speech + at_level(TONAL[kind])) > MAX_TONAL_SHARE


@given(st.floats(-60, 20), st.sampled_from(["a chord", "speech", "a siren"]))
@settings(max_examples=30, deadline=None)
def test_the_gain_does_not_matter(gain_db: float, kind: str) -> None:
    samples = voice(3, 0, 3.0) if kind == "speech" else at_level((TONAL | MOVING)[kind])
    louder = np.float32(10 ** (gain_db / 20)) * samples
    assert tonal_share(louder) == pytest.approx(tonal_share(samples), rel=1e-3, abs=1e-6)


@given(st.integers(0, 30_000), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_it_is_a_share_of_any_samples(count: int, seed: int) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.1, count).astype(np.float32)
    assert 0.0 <= tonal_share(samples) <= 1.0
