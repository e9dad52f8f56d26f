"""Voices at other speeds: pitch, length, labels, and the same for any number of ranks."""

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs.batches import to_episodes
from pipeline.order import Share
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.speeds import draw_speeds, play, played, voices
from tests.conftest import voice
from tests.test_attending import batch

SPEEDS = [0.9, 1.1]


def in_band(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE_HZ) > 5600] = 0
    return np.fft.irfft(spectrum, len(samples))


@pytest.mark.parametrize("speed", [0.8, 0.9, 1.0, 1.1, 1.25])
def test_playing_is_resampling(speed: float) -> None:
    spoken = voice(3, 0, 2.0) * np.hanning(2 * SAMPLE_RATE_HZ).astype(np.float32)
    found = play(torch.from_numpy(spoken)[None], speed)[0].numpy()
    assert found.shape == spoken.shape
    expected = np.zeros_like(spoken)
    resampled = soxr.resample(spoken, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ, "VHQ")
    expected[: len(resampled)] = resampled[: len(spoken)]
    # Near the end of the band the filters differ, as they may.
    error = in_band(found - expected)
    assert np.square(error).mean() < 1e-4 * np.square(in_band(expected)).mean()


def test_a_tone_is_higher_by_the_speed() -> None:
    time_s = torch.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tone = torch.sin(2 * torch.pi * 1000 * time_s)[None]
    peak = torch.fft.rfft(play(tone, 1.1)).abs().argmax()
    assert int(peak) == pytest.approx(1100, abs=2)


@given(st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_ranks_draw_what_one_would(choices: int, step: int) -> None:
    whole = draw_speeds(choices, (8, 2, 3), 7, step)
    shares = [Share.of(8, rank, 3) for rank in range(3)]
    parts = [draw_speeds(choices, (share.size, 2, 3), 7, step, share) for share in shares]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[:, 0, 0], whole[:, 1, 0])
    assert 0 <= int(whole.min()) <= int(whole.max()) <= choices


def test_a_voice_at_another_speed_is_another_speaker() -> None:
    given_batch, count = batch(), 2
    plain = to_episodes(given_batch, None, 7, 0)
    made = to_episodes(given_batch, None, 7, 0, None, SPEEDS, count)
    again = to_episodes(given_batch, None, 7, 0, None, SPEEDS, count)
    assert torch.equal(made.mixtures, again.mixtures)
    assert made.anchors.unique().numel() > 1
    heard = plain.speakers >= 0
    assert torch.equal(made.speakers < 0, ~heard)
    assert torch.equal(made.speakers[heard] % count, plain.speakers[heard])
    targets = made.speakers[:, :, 0]
    same = (targets == made.anchors[:, None]) | (targets < 0)
    assert same.all()
    as_it_is = made.speakers < count
    for mine, theirs, kept in zip(
        made.references.flatten(0, 2),
        plain.references.flatten(0, 2),
        as_it_is.flatten(),
        strict=True,
    ):  # a mixture may be scaled as a whole
        alike = torch.cosine_similarity(mine, theirs, dim=0)
        assert (float(alike) > 0.999) == bool(kept)


def test_a_speed_that_nobody_drew_changes_nothing() -> None:
    sources = torch.randn(1, 2, 2, 800)
    which = torch.tensor([[[0, 2], [0, 0]]])
    found = played(sources, which, [0.85, 1.15])
    assert torch.equal(found[which == 0], sources[which == 0])
    assert torch.equal(found[0, 0, 1], play(sources[0, 0, 1:], 1.15)[0])


def test_names_stand_where_the_labels_point() -> None:
    assert voices(["a", "b"], SPEEDS) == ["a", "b", "a@0.9", "b@0.9", "a@1.1", "b@1.1"]
    assert voices(["a"], []) == ["a"]
