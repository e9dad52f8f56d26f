"""Mixtures are the plain sum of what they are made of, in a room or in none."""

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.render import PEAK, mix, render, reverberate


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = rng.integers(-32768, 32768, (2, 2, 3, 50)).astype(np.int16)
    gains_db = rng.uniform(-30, 10, (2, 2, 3)).astype(np.float32)
    gains_db[0, 0, 2] = -np.inf
    return sources, gains_db


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_rendering_is_the_plain_sum(seed: int) -> None:
    sources, gains_db = drawn(seed)
    rendered = render(torch.from_numpy(sources), torch.from_numpy(gains_db))
    for place in np.ndindex(2, 2):
        amplitude = 10 ** (gains_db[place].astype(np.float64) / 20) / 32768
        dry = sources[place] * amplitude[:, None]
        scale = min(1.0, PEAK / np.abs(dry.sum(0)).max())
        np.testing.assert_allclose(rendered.mixtures[place], scale * dry.sum(0), atol=1e-5)
        np.testing.assert_allclose(rendered.references[place], scale * dry[:2], atol=1e-5)
    assert rendered.mixtures.abs().max() <= PEAK + 1e-6


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_quick_way_to_mixtures_leads_to_the_same(seed: int) -> None:
    sources, gains_db = drawn(seed)
    pick = np.random.default_rng(seed).permutation(12).reshape(2, 2, 3)
    lines = np.empty((12, 50), np.int16)
    lines[pick.ravel()] = sources.reshape(12, 50)
    pick[0, 0, 2] = -1
    quick = mix(torch.from_numpy(lines), torch.from_numpy(pick), torch.from_numpy(gains_db))
    slow = render(torch.from_numpy(sources), torch.from_numpy(gains_db)).mixtures
    np.testing.assert_allclose(quick, slow, atol=1e-6)


def test_a_room_is_a_convolution_that_keeps_the_power() -> None:
    rng = np.random.default_rng(0)
    dry, responses = rng.normal(size=(4, 300)), rng.normal(size=(4, 80))
    wet = reverberate(torch.from_numpy(dry), torch.from_numpy(responses)).numpy()
    for line, response, heard in zip(dry, responses, wet, strict=True):
        expected = scipy.signal.convolve(line, response)[:300]
        expected *= np.sqrt((line**2).sum() / (expected**2).sum())
        np.testing.assert_allclose(heard, expected, atol=1e-9)


def test_only_what_is_in_a_room_sounds_like_it() -> None:
    sources, gains_db = (torch.from_numpy(array) for array in drawn(1))
    bank = torch.zeros(2, 30, dtype=torch.int16)
    bank[0, 0], bank[1, 7] = 29491, -12000
    rooms = torch.full((2, 2, 3), -1)
    rooms[1, 0, 1], rooms[1, 1, 0] = 1, 0
    dry, wet = render(sources, gains_db - 40), render(sources, gains_db - 40, rooms, bank)
    moved = dry.references[1, 0, 1].roll(7)
    moved[:7] = 0
    power = dry.references[1, 0, 1].square().sum() / moved.square().sum()
    assert torch.allclose(wet.references[1, 0, 1], -moved * power.sqrt(), atol=1e-6)
    same = torch.ones(2, 2, 2, dtype=torch.bool)
    same[1, 0, 1] = False
    assert torch.allclose(wet.references[same], dry.references[same], atol=1e-6)
    assert torch.allclose(wet.mixtures[0], dry.mixtures[0], atol=1e-6)


def test_silence_stays_silent_in_a_room() -> None:
    assert reverberate(torch.zeros(1, 50), torch.ones(1, 20)).abs().max() == pytest.approx(0)
