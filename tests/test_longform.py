"""Recordings of any length: windows meet without a seam, and slots stay the same."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.longform import (
    Heard,
    embed_long,
    match,
    separate_long,
    window_samples,
    window_starts,
)
from tests.conftest import voice
from tests.small_models import SMALL, new_model

SECOND = 16_000
VOICES = F.normalize(torch.tensor([[1.0, 0, 0.6], [0, 1.0, 0.6], [0.5, 0.5, 1.0]]), dim=-1)


class Oracle:
    """A model that knows the sources, and gives them in an order of its own each time.

    Each slot keeps a `leak` of the others, as a real separator's does.
    """

    def __init__(self, sources: Tensor, seed: int = 0, leak: float = 0.0) -> None:
        self.sources, self.leak, self.heard = sources, leak, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.mixture = torch.arange(float(sources.shape[-1]))  # a window tells where it lies

    def __call__(self, window: Tensor) -> Heard:
        self.heard = max(self.heard, len(window))
        sources = self.sources[:, int(window[0]) : int(window[0]) + len(window)]
        active = (sources.square().mean(-1) > 1e-6).float().clamp_min(0.01)
        order = torch.randperm(len(sources), generator=self.generator).tolist()
        views = [*order, len(order)]
        slots = len(sources)
        sources = (1 - self.leak) * sources + self.leak * sources.sum(0)
        vectors = torch.cat([VOICES[:slots], VOICES[-1:]])
        return Heard(sources[order], vectors[views], torch.cat([active, torch.ones(1)])[views])


def turns(length: int, pattern: list[tuple[int, int]], every: int) -> Tensor:
    """Two noises that are on and off by turns of `every` samples, as `pattern` repeats."""
    generator = torch.Generator().manual_seed(length)
    on = torch.tensor(list(itertools.islice(itertools.cycle(pattern), -(-length // every))))
    gates = on.T.repeat_interleave(every, 1)[:, :length]
    return gates * torch.randn(2, length, generator=generator)


@given(st.integers(1, 5000), st.integers(2, 700))
@settings(max_examples=200, deadline=None)
def test_windows_cover_everything_and_overlap_by_half(samples: int, window: int) -> None:
    starts = window_starts(samples, window)
    assert starts[0] == 0
    assert max(starts[-1] + window, samples) == max(samples, window)
    for before, start in itertools.pairwise(starts):
        assert 0 < start - before <= window // 2
        assert start + window <= samples


@given(st.integers(1, 6000), st.integers(100, 900), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_slots_that_come_in_any_order_are_put_together_exactly(
    samples: int, window: int, seed: int
) -> None:
    """A cross-fade of equal signals is that signal: any wrong order or lost sample would show."""
    oracle = Oracle(torch.randn(2, samples, generator=torch.Generator().manual_seed(seed)), seed)
    first = Oracle(oracle.sources, seed)(oracle.mixture[:window]).sources  # its order is kept
    straight = torch.equal(first, oracle.sources[:, :window])
    together = separate_long(oracle, oracle.mixture, window)
    expected = oracle.sources if straight else oracle.sources.flip(0)
    assert torch.equal(together, expected)
    assert oracle.heard <= window


@pytest.mark.parametrize(
    "pattern",
    [
        [(1, 1), (1, 0), (0, 1)],
        [(1, 0), (0, 1)],
        [(1, 1), (0, 0), (0, 0), (0, 1)],
        [(1, 0), (0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (0, 1)],
    ],
    ids=["overlapped", "alternating", "after a pause", "long pauses"],
)
def test_a_slot_that_was_silent_is_known_by_its_voice(pattern: list[tuple[int, int]]) -> None:
    oracle = Oracle(turns(9000, pattern, 300), seed=3)
    together = separate_long(oracle, oracle.mixture, 500)
    either = oracle.sources, oracle.sources.flip(0)
    assert any(torch.allclose(together, expected, atol=1e-6) for expected in either)


@pytest.mark.parametrize("leak", [0.1, 0.3, 0.45])
def test_slots_that_are_not_clean_are_told_apart(leak: float) -> None:
    sources = torch.stack([torch.from_numpy(voice(s, 0, 4.0)) for s in (1, 2)])
    oracle = Oracle(sources, seed=1, leak=leak)
    together = separate_long(oracle, oracle.mixture, 8000)
    expected = (1 - leak) * sources + leak * sources.sum(0)
    assert any(torch.allclose(together, e, atol=1e-6) for e in (expected, expected.flip(0)))


def test_where_nobody_speaks_the_voice_decides_and_where_both_do_the_signal() -> None:
    noise = torch.randn(2, 100)
    assert match(noise, noise.flip(0), VOICES[:2], VOICES[:2]) == [1, 0]
    silence = torch.zeros(2, 100)
    assert match(silence, silence, VOICES[:2], VOICES[[1, 0]]) == [1, 0]
    assert match(silence, silence, VOICES[:2], VOICES[:2]) == [0, 1]


def test_seams_do_not_click() -> None:
    """Windows that differ in gain meet in a fade: no sample jumps by more than the ramp's step."""
    signal = torch.ones(1, 5000)
    gains = itertools.cycle([1.0, 1.3, 0.8])

    def hear(window: Tensor) -> Heard:
        gain = next(gains)
        return Heard(gain * window.unsqueeze(0), VOICES[:2], torch.ones(2))

    together = separate_long(hear, signal[0], 1000)
    assert together.diff().abs().max() <= 0.5 / 500 + 1e-6


def test_embeddings_are_weighted_by_activity_and_by_what_a_window_adds() -> None:
    """Speaker 0 talks in the first half, speaker 1 in the second; each vector is that voice's."""
    sources = torch.randn(2, 4000)
    sources[0, 2000:] = sources[1, :2000] = 0
    oracle = Oracle(sources)
    vectors, activity = embed_long(oracle, oracle.mixture, 400)
    assert (vectors @ VOICES[:2].T > 0.999).any(0).all()
    assert (activity > 0.9).all()
    torch.testing.assert_close(vectors[-1], VOICES[-1])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


def test_the_mean_over_windows_is_the_formula() -> None:
    heard = [
        Heard(torch.zeros(1, 10), F.normalize(torch.randn(2, 4), dim=-1), torch.tensor([a, 1.0]))
        for a in (0.9, 0.2, 0.5)
    ]
    queue = iter(heard)
    vectors, activity = embed_long(lambda _: next(queue), torch.zeros(18), 10)
    added = [10, 5, 3]
    weight = [a * float(h.activity[0]) for a, h in zip(added, heard, strict=True)]
    for view in range(2):
        total = sum(w * h.vectors[view] for w, h in zip(weight, heard, strict=True))
        torch.testing.assert_close(vectors[view], total / total.norm())
    expected = sum(w * h.activity[0] for w, h in zip(weight, heard, strict=True)) / sum(weight)
    torch.testing.assert_close(activity[0], expected)


@pytest.mark.parametrize("kind", ["galr-conv", "conv_tasnet-conv", "tcn-stft", "tcn-conv-mel"])
@given(samples=st.integers(1, 4000))
@settings(max_examples=6, deadline=None)
def test_up_to_one_window_it_is_the_direct_pass(kind: str, samples: int) -> None:
    model = new_model(kind)
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    with torch.inference_mode():
        direct = model(waveform[None])
    assert torch.equal(model.separate(waveform, window_s=0.25), direct.sources[0])
    vectors, activity = model.embed(waveform, window_s=0.25)
    assert torch.equal(vectors, model.embed(waveform)[0])
    torch.testing.assert_close(activity, direct.activity[0])


@pytest.mark.parametrize("kind", SMALL)
def test_a_long_recording_keeps_its_length_and_tells_of_its_progress(kind: str) -> None:
    model = new_model(kind)
    waveform, told = torch.from_numpy(voice(1, 1, 3.0001)), []
    sources = model.separate(waveform, None, 0.5, lambda *counts: told.append(counts))
    assert sources.shape == (2, len(waveform))
    assert torch.isfinite(sources).all()
    assert told[0] == (1, 12)
    assert told[-1] == (12, 12)
    vectors, activity = model.embed(torch.stack([waveform, waveform]), window_s=0.5)
    assert vectors.shape == (2, 3, 16)
    assert activity.shape == (2, 3)
    torch.testing.assert_close(vectors[0], vectors[1])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["galr-conv", "conv_tasnet-conv", "tcn-stft"])
@given(samples=st.integers(4001, 9000), silent=st.booleans())
@settings(max_examples=5, deadline=None)
def test_a_real_model_has_no_seam_either(kind: str, samples: int, silent: bool) -> None:
    """No step at a seam is larger than the largest within windows, but for the gain between two."""
    model = new_model(kind)
    waveform = torch.zeros(samples) if silent else torch.from_numpy(voice(2, 1, 1.0))[:samples]
    together = model.separate(waveform, window_s=0.25)
    windows = [
        model.separate(waveform[start : start + 4000], window_s=0.25)
        for start in window_starts(samples, 4000)
    ]
    largest = max(float(window.diff().abs().max()) for window in windows)
    loudest = max(float(window.abs().max()) for window in windows)
    assert together.diff().abs().max() <= largest + 2 * loudest / 2000 + 1e-7


@pytest.mark.parametrize("length", [0.0, -1.0, 0.09, float("nan")])
def test_a_window_that_is_too_short_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match="too short"):
        window_samples(length, SECOND)


def test_nothing_to_hear_is_refused() -> None:
    model = new_model("tcn-stft")
    for hear in (model.embed, model.separate):
        with pytest.raises(ValueError, match="no samples"):
            hear(torch.zeros(0))


def test_memory_is_that_of_a_window() -> None:
    """An hour passes through windows of 4 s; what is kept is the result."""
    lengths = []

    def hear(window: Tensor) -> Heard:
        lengths.append(len(window))
        return Heard(window.repeat(2, 1), VOICES, torch.ones(3))

    hour = torch.zeros(3600 * SECOND)
    vectors, _ = embed_long(hear, hour, 4 * SECOND)
    assert set(lengths) == {4 * SECOND}
    assert len(lengths) == 1799
    assert vectors.shape == (3, 3)
