"""Log-mel features against the formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.mel import FLOOR, SPREAD, LogMel, mel_filters
from tests.conftest import voice


def mel(hz: float) -> float:
    return 1127 * math.log(1 + hz / 700)  # 2595 log10, as the HTK book also writes it


def weight(hz: float, number: int, bands: int, rate: int) -> float:
    """Triangle `number` at a frequency: rising and falling linearly in Hz between mel points."""
    points = [(number + step) * mel(rate / 2) / (bands + 1) for step in range(3)]
    low, middle, high = (700 * (math.exp(point / 1127) - 1) for point in points)
    if low <= hz <= middle:
        return (hz - low) / (middle - low)
    return (high - hz) / (high - middle) if middle < hz <= high else 0.0


@pytest.mark.parametrize(("bands", "fft_size", "rate"), [(80, 512, 16_000), (40, 256, 8_000)])
def test_filters_are_triangles_on_the_mel_scale(bands: int, fft_size: int, rate: int) -> None:
    expected = [
        [weight(bin_ * rate / fft_size, number, bands, rate) for bin_ in range(fft_size // 2 + 1)]
        for number in range(bands)
    ]
    np.testing.assert_allclose(mel_filters(bands, fft_size, rate), expected, atol=2e-4)


def test_a_frame_is_the_plain_transform_of_its_samples() -> None:
    samples = voice(1, 1)[:8000]
    features = LogMel(80, 16_000)(torch.from_numpy(samples)[None])[0].numpy()
    assert features.shape == (80, 51)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    centre = 20 * 160
    power = np.abs(np.fft.rfft(hann * samples[centre - 200 : centre + 200], 512)) ** 2
    expected = np.log(mel_filters(80, 512, 16_000) @ power + FLOOR) / SPREAD
    np.testing.assert_allclose(features[:, 20], expected, atol=1e-3)


@given(st.integers(1, 3000))
@settings(max_examples=20, deadline=None)
def test_any_length_gives_a_frame_every_ten_milliseconds(samples: int) -> None:
    features = LogMel(24, 16_000)(torch.randn(2, samples))
    assert features.shape == (2, 24, max(samples, 512) // 160 + 1)
    assert torch.isfinite(features).all()


def test_silence_has_a_finite_gradient() -> None:
    waveform = torch.zeros(1, 1600, requires_grad=True)
    LogMel(80, 16_000)(waveform).sum().backward()
    assert torch.isfinite(waveform.grad).all()


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_no_band_is_empty_at_any_rate(rate: int) -> None:
    assert (LogMel(80, rate).filters.sum(-1) > 0).all()


def test_a_recording_keeps_its_mean() -> None:
    """A filter on the channel moves all frames by a constant, which stays."""
    waveform = torch.randn(1, 16_000)
    low = torch.nn.functional.avg_pool1d(waveform, 3, 1, 1)
    mel_of = LogMel(80, 16_000)
    assert (mel_of(waveform) - mel_of(low)).mean(-1).abs().max() > 0.5
