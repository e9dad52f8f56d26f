"""The same recording is found again whatever was done to it; nothing else is."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import duplicates
from pipeline.audio import Samples, load
from pipeline.duplicates import near_duplicates
from pipeline.fingerprint import fingerprint
from pipeline.schema import SAMPLE_RATE_HZ
from tests.conftest import voice

SAMPLE = Path(duplicates.__file__).parent / "sample" / "speechocean762"
SPEECH = [load(path) for path in sorted(SAMPLE.rglob("*.opus"))[::4]]  # many the same sentences
PRINTS = [fingerprint(samples) for samples in SPEECH]
LONG = [place for place, samples in enumerate(SPEECH) if len(samples) > 3 * SAMPLE_RATE_HZ]


def near(*fingerprints: bytes | None, first_new: int = 0) -> list[int]:
    return near_duplicates(pa.array(fingerprints, pa.binary()), first_new).tolist()


def recoded(samples: Samples, rate_hz: int, **options: str | float) -> Samples:
    sink = io.BytesIO()
    soundfile.write(sink, soxr.resample(samples, SAMPLE_RATE_HZ, rate_hz), rate_hz, **options)
    decoded, _ = soundfile.read(io.BytesIO(sink.getvalue()), dtype="float32")
    return soxr.resample(decoded, rate_hz, SAMPLE_RATE_HZ).astype(np.float32)


def copies_found(copies: list[Samples], of: list[int]) -> float:
    """Return the share of copies of `SPEECH[of]` that are found among all of it, and no other."""
    prints = [*PRINTS, *(fingerprint(copy) for copy in copies)]
    found = near(*prints, first_new=len(PRINTS))[len(PRINTS) :]
    assert all(original in (-1, right) for original, right in zip(found, of, strict=True))
    return float(np.mean(np.array(found) == of))


def test_different_utterances_are_different() -> None:
    assert len(PRINTS) > 150
    assert set(near(*PRINTS)) == {-1}


@pytest.mark.parametrize(
    ("rate_hz", "options"),
    [
        (16_000, {"format": "OGG", "subtype": "OPUS"}),
        (16_000, {"format": "OGG", "subtype": "VORBIS", "compression_level": 0.8}),
        (44_100, {"format": "MP3"}),
        (8_000, {"format": "WAV", "subtype": "ULAW"}),
        (8_000, {"format": "WAV", "subtype": "GSM610"}),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_a_coded_copy_is_found_though_it_is_shifted_and_softer(
    rate_hz: int, options: dict[str, str | float]
) -> None:
    rng = np.random.default_rng(rate_hz)
    chosen = LONG[::6]
    starts = rng.integers(0, SAMPLE_RATE_HZ // 2, len(chosen))
    copies = [
        0.3 * recoded(SPEECH[place][start:], rate_hz, **options)
        for place, start in zip(chosen, starts, strict=True)
    ]
    assert copies_found(copies, chosen) > (0.9 if "GSM610" in options.values() else 0.97)


def test_a_copy_is_found_in_noise_and_through_a_filter() -> None:
    rng = np.random.default_rng(1)
    chosen = LONG[::2]
    noisy = [SPEECH[i] + rng.normal(0, 0.03 * SPEECH[i].std(), len(SPEECH[i])) for i in chosen]
    brighter = [np.diff(SPEECH[i]) for i in chosen]
    assert copies_found([copy.astype(np.float32) for copy in noisy], chosen) > 0.97
    assert copies_found(brighter, chosen) > 0.97


def test_parts_of_one_recording_that_overlap_enough_are_found() -> None:
    """Cut after a second, and again two thirds in: each has something that the other has not."""
    recording = np.concatenate([SPEECH[place] for place in LONG[:60]])
    hop, length = 7 * SAMPLE_RATE_HZ + 77, 6 * SAMPLE_RATE_HZ
    starts = np.arange(0, len(recording) - length - 3 * SAMPLE_RATE_HZ, hop)
    first = [fingerprint(recording[start : start + length]) for start in starts]
    second = [fingerprint(recording[start : start + length]) for start in starts + 33_333]
    far = [fingerprint(recording[start : start + length]) for start in starts + 64_000]
    found = np.array(near(*first, *second, first_new=len(first))[len(first) :])
    assert np.mean(found == np.arange(len(first))) > 0.97
    assert max(np.array(near(*first, *far, first_new=len(first)))[: len(first)]) == -1
    assert not np.any(np.array(near(*first, *far))[len(first) :] == np.arange(len(first)))


@given(st.integers(0, 6), st.integers(-40, 12))
@settings(max_examples=10, deadline=None)
def test_a_power_of_two_in_gain_changes_no_bit(speaker: int, exponent: int) -> None:
    samples = voice(speaker, 1)
    assert fingerprint(samples) == fingerprint(np.ldexp(samples, exponent).astype(np.float32))


@given(st.floats(-60, 20), st.integers(0, 8_000))
@settings(max_examples=20, deadline=None)
def test_any_gain_and_any_shift_is_found(gain_db: float, start: int) -> None:
    place = LONG[start % len(LONG)]
    copy = (10 ** (gain_db / 20) * SPEECH[place][start:]).astype(np.float32)
    assert near(PRINTS[place], fingerprint(copy)) == [-1, 0]


def test_what_does_not_change_has_no_fingerprint() -> None:
    time = np.arange(3 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    hum = sum(np.sin(2 * np.pi * 50 * k * time + k) / k for k in range(1, 40))
    noise = np.random.default_rng(0).normal(0, 0.1, len(time))
    for steady in (0 * time, 0.1 * np.sin(2 * np.pi * 1000 * time), 0.1 * hum, noise):
        assert fingerprint(steady.astype(np.float32)) == b""
    for length in (0, 1, 511, 512, 8_000, 13_151):
        assert fingerprint(voice(1, 1)[:length]) == b""


def test_a_fingerprint_is_small() -> None:
    seconds = sum(map(len, SPEECH)) / SAMPLE_RATE_HZ
    assert sum(map(len, PRINTS)) < 100 * seconds


def test_nothing_is_a_duplicate_of_nothing() -> None:
    assert near() == []
    assert near(b"", b"", None, PRINTS[0], b"", None) == [-1] * 6
    assert near_duplicates(pa.chunked_array([], pa.binary())).tolist() == []


def test_the_first_row_that_is_kept_is_named() -> None:
    a, b = PRINTS[LONG[0]], PRINTS[LONG[1]]
    assert near(a, b, a, b, a, b"", a) == [-1, -1, 0, 1, 0, -1, 0]
    assert near(a, b, a, b, a, first_new=3) == [-1, -1, -1, 1, 0]


@given(st.integers(0, 30))
@settings(max_examples=10, deadline=None)
def test_rows_that_were_kept_need_no_second_look(first_new: int) -> None:
    rows = [*PRINTS[:30], *PRINTS[20:40], *PRINTS[:5]]
    assert near(*rows, first_new=first_new) == near(*rows)


def test_a_row_is_kept_that_resembles_only_what_is_dropped() -> None:
    """Two thirds of a sentence each: the last part has nothing that the first one has."""
    whole = np.concatenate([SPEECH[place] for place in LONG[:4]])
    parts = [whole[start * 32_000 : start * 32_000 + 96_000] for start in (0, 1, 2)]
    first, middle, last = (fingerprint(part) for part in parts)
    assert near(first, middle, last) == [-1, 0, -1]
    assert near(middle, last) == [-1, 0]


def test_chunks_and_slices_are_read_as_one() -> None:
    rows = [*PRINTS[:20], *PRINTS[:20]]
    whole = pa.array(rows, pa.binary())
    chunked = pa.chunked_array([whole.slice(0, 7), whole.slice(7, 0), whole.slice(7)])
    expected = near(*rows)
    assert near_duplicates(chunked).tolist() == expected
    assert near_duplicates(pa.array([b"odd", *rows]).slice(1)).tolist() == expected


def frames(data: bytes) -> np.ndarray:
    words = np.frombuffer(data, "<u2")
    return words[1 + 3 * int(words[0]) :]


def plainly_same(one: bytes, other: bytes) -> bool:
    """Compare at every alignment there is, without any key."""
    a, b = frames(one), frames(other)
    both = (a[:, None] != 0) & (b != 0)
    lag = np.arange(len(a))[:, None] - np.arange(len(b)) + len(b)
    wrong = np.bincount(lag.ravel(), (np.bitwise_count(a[:, None] ^ b) * both).ravel())
    compared = np.bincount(lag.ravel(), both.ravel())
    common = np.bincount(lag.ravel())
    half = 2 * (common + 20) >= min(len(a), len(b)) + 20
    return bool(np.any(half & (wrong < 16 * (0.3 * compared - 0.9 * np.sqrt(compared)))))


def test_a_quadratic_loop_without_keys_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    chosen = rng.choice(LONG[:60], 60)  # some of them more than once
    copies = [SPEECH[place][rng.integers(0, 24_000) :] for place in chosen]
    rows = [*(PRINTS[place] for place in LONG[:60]), *map(fingerprint, copies)]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    expected: list[int] = []
    for later, row in enumerate(rows):
        kept = (i for i in range(later) if expected[i] < 0 and plainly_same(rows[i], row))
        expected.append(next(kept, -1))
    assert sum(original >= 0 for original in expected) > 50
    assert near(*rows) == expected
    monkeypatch.setattr(duplicates, "KEYS_PER_PASS", 999)
    monkeypatch.setattr(duplicates, "PAIRS_PER_PASS", 7)
    assert near(*rows) == expected


def test_a_sound_that_all_share_costs_no_more_than_its_heads() -> None:
    entries = np.arange(100_000, dtype=np.uint64)  # one key
    pairs = [(len(later), earlier.max()) for later, earlier in duplicates._shared(entries, 0)]
    assert sum(count for count, _ in pairs) <= duplicates.BUCKET_HEADS * len(entries)
    assert max(earlier for _, earlier in pairs) == duplicates.BUCKET_HEADS - 1


def test_every_one_of_many_copies_is_found() -> None:
    assert near(*[PRINTS[LONG[0]]] * 500) == [-1] + [0] * 499
