"""Resampling: soxr as oracle, lengths, and rates that make no sense."""

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.resample import resampled
from tests.conftest import voice


@pytest.mark.parametrize("from_hz", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000])
def test_it_is_what_soxr_makes(from_hz: int) -> None:
    spoken = soxr.resample(voice(2, 0, 1.0), 16_000, from_hz, "VHQ")
    found = resampled(torch.from_numpy(spoken), from_hz, 16_000).numpy()
    expected = soxr.resample(spoken, from_hz, 16_000, "VHQ")
    length = min(len(found), len(expected))
    spectra = [np.fft.rfft(x[:length] * np.hanning(length)) for x in (found, expected)]
    inside = np.fft.rfftfreq(length, 1 / 16_000) < 0.43 * min(from_hz, 16_000)
    error = np.square(np.abs(spectra[0] - spectra[1]))[inside].sum()
    assert error < 1e-5 * np.square(np.abs(spectra[1]))[inside].sum()


@given(st.integers(1, 2000), st.sampled_from([8_000, 11_025, 16_000, 44_100, 48_000]))
@settings(max_examples=40, deadline=None)
def test_lengths_are_as_stated(num_samples: int, from_hz: int) -> None:
    found = resampled(torch.randn(2, num_samples), from_hz, 16_000)
    assert found.shape == (2, -(-num_samples * 16_000 // from_hz))
    assert found.isfinite().all()


@pytest.mark.parametrize("rate_hz", [0, -1, 999, 1_000_000])
def test_a_rate_is_one_of_audio(rate_hz: int) -> None:
    with pytest.raises(ValueError, match="is no sample rate of audio"):
        resampled(torch.randn(10), rate_hz, 16_000)


def test_an_odd_rate_costs_no_more_than_others() -> None:
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(44_101) / 44_101)
    found = resampled(tone, 44_101, 16_000)
    assert abs(len(found) - 16_000) <= 1
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(len(found)) / 16_000)
    assert torch.allclose(found[500:-500], expected[500:-500], atol=1e-2)
