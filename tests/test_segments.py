"""Voice activity and cutting: every sample is in one piece, wherever the stream was cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from silero_vad.sequence_vad import SileroVADSequence

from pipeline import segments
from pipeline.audio import Samples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segments import Piece, noise_pieces, speech_pieces, turns
from pipeline.speech import SpeechConfig
from pipeline.vad import WINDOW, VoiceActivity, network
from tests.conftest import voice

CONFIG = SpeechConfig()


def silence(seconds: float, seed: int = 0) -> Samples:
    count = round(seconds * SAMPLE_RATE_HZ)
    return np.random.default_rng(seed).normal(0, 1e-4, count).astype(np.float32)


def speech_of(pieces: list[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.samples is not None]


def spoken(pieces: list[Piece]) -> list[tuple[float, float]]:
    """Return start and end in seconds of the pieces that are speech."""
    return [
        (piece.start_sample / SAMPLE_RATE_HZ, (piece.start_sample + piece.num_samples) / 16_000)
        for piece in pieces
        if piece.samples is not None
    ]


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_voice_activity_is_that_of_its_authors(at_once: int) -> None:
    samples = voice(1, 1, 10.0)
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW)
    ours = VoiceActivity()
    found = np.concatenate(
        [ours(windows[first : first + at_once]) for first in range(0, len(windows), at_once)]
    )
    theirs = SileroVADSequence(str(network()))
    assert found == pytest.approx(theirs.audio_forward(windows.reshape(-1)), abs=1e-5)


PARTS = st.lists(
    st.tuples(st.integers(0, 20), st.floats(0.1, 9.0), st.floats(0.0, 2.0)), min_size=1, max_size=6
)


@given(PARTS, st.sampled_from([1, 5, 64, 5_000]), st.floats(2.5, 15.0))
@example([(2, 5.0, 0.0)], 1, 2.5)
@example([(2, 3.0, 0.0)], 64, 2.5)
@settings(max_examples=25, deadline=None)
def test_pieces_are_the_same_however_the_stream_comes(
    parts: list[tuple[int, float, float]], at_once: int, longest: float
) -> None:
    samples = np.concatenate(
        [
            part
            for speaker, seconds, pause in parts
            for part in (voice(speaker, 0, seconds), silence(pause, speaker))
        ]
    )
    config = SpeechConfig(max_seconds=longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "WINDOWS_AT_ONCE", 10_000)
        whole = list(speech_pieces([samples], config))
        patch.setattr(segments, "WINDOWS_AT_ONCE", at_once)
        streamed = list(speech_pieces(np.array_split(samples, 9), config))
    assert spoken(streamed) == spoken(whole)
    for piece, other in zip(speech_of(streamed), speech_of(whole), strict=True):
        assert np.array_equal(piece.samples, other.samples)
        assert piece.snr_db == pytest.approx(other.snr_db, abs=1e-3)
    for pieces in (whole, streamed):
        assert pieces[0].start_sample == 0
        ends = [piece.start_sample + piece.num_samples for piece in pieces]
        assert [piece.start_sample for piece in pieces[1:]] == ends[:-1]
        assert ends[-1] == len(samples)
        assert all(
            piece.num_samples <= longest * SAMPLE_RATE_HZ
            for piece in pieces
            if piece.samples is not None
        )


def test_speech_is_cut_out_of_silence() -> None:
    first, second = voice(1, 0), voice(2, 0)
    samples = np.concatenate([silence(3), first, silence(2, 1), second, silence(4, 2)])
    found = spoken(list(speech_pieces([samples], CONFIG)))
    assert len(found) == 2
    (start, end), (again, until) = found
    assert 2.9 <= start < end <= 3.1 + len(first) / 16_000
    assert (
        4.9 + len(first) / 16_000
        <= again
        < until
        <= 5.1 + len(first + 0) / 16_000 + len(second) / 16_000
    )


def test_long_speech_is_cut_in_its_pauses() -> None:
    samples = np.concatenate([voice(speaker, 0, 12.0) for speaker in range(6)])
    bounds = spoken(list(speech_pieces([samples], CONFIG)))
    assert len(bounds) >= 6
    power = np.mean(samples**2)
    for _, end in bounds[:-1]:
        cut = round(end * SAMPLE_RATE_HZ)
        assert np.mean(samples[cut - 160 : cut + 160] ** 2) < 0.05 * power


def test_nothing_is_said_in_silence_noise_and_tones() -> None:
    time = np.arange(20 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    for samples in (
        np.zeros(20 * SAMPLE_RATE_HZ, np.float32),
        np.random.default_rng(0).normal(0, 0.1, len(time)).astype(np.float32),
        (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32),
    ):
        assert spoken(list(speech_pieces([samples], CONFIG))) == []


@pytest.mark.parametrize("snr_db", [5, 10, 20, 30])
def test_the_snr_is_estimated_to_within_two_decibels(snr_db: float) -> None:
    errors = []
    for speaker in range(12):
        speech = np.concatenate([np.zeros(16_000, np.float32), voice(speaker, 0)])
        active = [p.samples for p in speech_pieces([speech], CONFIG) if p.samples is not None]
        power = np.mean(np.concatenate(active) ** 2) / 10 ** (snr_db / 10)
        noise = np.random.default_rng(speaker).normal(0, np.sqrt(power), len(speech))
        mixed = (speech + noise).astype(np.float32)
        errors += [
            piece.snr_db - snr_db
            for piece in speech_pieces([mixed], CONFIG)
            if piece.samples is not None and piece.num_samples > 16_000
        ]
    assert abs(np.median(errors)) < 2


def test_noise_is_cut_evenly() -> None:
    samples = silence(40)
    pieces = list(noise_pieces(np.array_split(samples, 7), CONFIG))
    assert [piece.num_samples for piece in pieces] == [240_000, 240_000, 160_000]
    joined = np.concatenate([piece.samples for piece in pieces if piece.samples is not None])
    assert np.array_equal(joined, samples)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 8))
def test_turns_are_runs_with_short_pauses_filled(mask: list[bool], pause: int) -> None:
    found = turns(np.asarray(mask, np.bool_), pause)
    covered = {place for start, stop in found for place in range(start, stop)}
    assert {place for place, speech in enumerate(mask) if speech} <= covered
    assert all(mask[start] and mask[stop - 1] for start, stop in found)
    assert all(start - stop > pause for (_, stop), (start, _) in pairwise(found))
