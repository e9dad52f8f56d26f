"""How well speech is told from what is around it, against a gate on the level.

    python -m tests.benchmarks.vad [SPEECH_FOLDER] [NOISE_FOLDER] [--utterances 200]

Utterances are trimmed and laid between silences, which is what makes the truth known: a silence
that was laid is no speech; and speech is what of a clean utterance lies at most 25 dB under its
loud frames, gaps of up to 0.1 s (closures of stops) filled. Only utterances whose loud frames are
40 dB over their quiet ones take part. What else is within an utterance, its pauses, breaths and
the 50 ms around it, is of neither kind and is not scored.

Weaknesses: the truth comes from the levels of the clean recording, which favours the gate; phones
weaker than 25 dB count nowhere; utterances have one level, which a conversation has not; and there
is about as much silence as speech, on which precision depends.

The SNR is that of the frames of speech over the noise, which goes on throughout. `decisions` are
silero's, with hysteresis, by 32 ms; `segments` are what the pipeline cuts out, with the padding and
the pauses that it means to keep. `gate` is that of the pipeline's measure of level, 20 dB under the
mean of a track; `best gate` is one threshold on the level of 20 ms frames that is chosen for each
row knowing the truth, as good as such a gate can be on utterances of one level.
"""

import argparse
import functools
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import Samples, load
from pipeline.corpora import SAMPLE
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segments import Mask, hysteresis, speech_pieces
from pipeline.speech import FRAME, SpeechConfig, active_frames, frame_levels_db
from pipeline.vad import WINDOW, VoiceActivity

CONFIG = SpeechConfig()
SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
TICK = SAMPLE_RATE_HZ // 100  # 10 ms, what a score counts
LOUD_RANGE_DB = 25.0
CLEAN_RANGE_DB = 40.0
LONGEST_GAP = 10  # ticks
MARGIN = 5  # ticks
SILENCE_S = (0.8, 4.0)
UTTERANCES_PER_TRACK = 10
LEVEL_DBFS = -26.0
FLOOR_DBFS = -85.0  # of the noise in "clean" tracks
SNRS_DB = (20, 15, 10, 5, 0)
METHODS = ("decisions", "segments", "gate", "best gate")
SPEECH, NEITHER, SILENCE = 1, 0, -1
Truth = NDArray[np.int8]  # by tick
T = TypeVar("T", bound=np.generic)


class Track(NamedTuple):
    samples: Samples
    truth: Truth


class Counts(NamedTuple):
    """Ticks that are called speech and are, that are not, and that are speech but missed."""

    hits: int
    false: int
    missed: int
    silent: int

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def scores(self) -> tuple[float, float, float, float]:
        """Return precision, recall, their harmonic mean, and the share of wrong ticks."""
        hits, false, missed, silent = self
        return (
            hits / max(hits + false, 1),
            hits / max(hits + missed, 1),
            2 * hits / max(2 * hits + false + missed, 1),
            (false + missed) / (hits + missed + silent),
        )


def audio_below(folder: Path) -> list[Path]:
    """Return audio files, except for room responses."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return [path for path in paths if "rir" not in path.parts]


def trimmed(samples: Samples) -> Track | None:
    """Return an utterance at one level with its truth, or nothing where it is not clean enough."""
    ticks = samples[: len(samples) // TICK * TICK].reshape(-1, TICK).astype(np.float64)
    levels = 10 * np.log10(ticks.var(axis=1) + 1e-12)
    quiet, loud = np.percentile(levels, [5, 95])
    if loud - quiet < CLEAN_RANGE_DB:
        return None
    truth = np.where(levels > loud - LOUD_RANGE_DB, SPEECH, NEITHER).astype(np.int8)
    places = np.flatnonzero(truth == SPEECH)
    for before, after in pairwise(places):
        if after - before <= LONGEST_GAP + 1:
            truth[before:after] = SPEECH
    first, stop = max(places[0] - MARGIN, 0), min(places[-1] + 1 + MARGIN, len(ticks))
    spoken = ticks[first:stop] - ticks.mean()
    power = np.mean(spoken[truth[first:stop] == SPEECH] ** 2)
    scaled = spoken.reshape(-1) * np.sqrt(10 ** (LEVEL_DBFS / 10) / power)
    return Track(scaled.astype(np.float32), truth[first:stop])


def tracks(utterances: list[Track], rng: np.random.Generator) -> list[Track]:
    """Lay utterances between silences, some to a track."""
    made = []
    for first in range(0, len(utterances), UTTERANCES_PER_TRACK):
        parts = [_silence(rng)]
        for utterance in utterances[first : first + UTTERANCES_PER_TRACK]:
            parts += [utterance, _silence(rng)]
        samples = np.concatenate([part.samples for part in parts])
        made.append(Track(samples, np.concatenate([part.truth for part in parts])))
    return made


def _silence(rng: np.random.Generator) -> Track:
    count = round(rng.uniform(*SILENCE_S) * SAMPLE_RATE_HZ) // TICK
    return Track(np.zeros(count * TICK, np.float32), np.full(count, SILENCE, np.int8))


def white(count: int, rng: np.random.Generator) -> Samples:
    return rng.standard_normal(count).astype(np.float32)


def from_clips(clips: list[Samples], count: int, rng: np.random.Generator) -> Samples:
    """Chain clips drawn at random, each of power 1."""
    parts: list[Samples] = []
    while sum(map(len, parts)) < count:
        clip = clips[rng.integers(len(clips))]
        parts.append(clip / np.std(clip))
    return np.concatenate(parts)[:count]


def decisions(samples: Samples) -> Mask:
    """Return for each tick what the voice activity says, before anything is cut."""
    windows = np.pad(samples, (0, -len(samples) % WINDOW)).reshape(-1, WINDOW)
    return _by_tick(hysteresis(VoiceActivity()(windows), False, CONFIG), WINDOW, len(samples))


def segments(samples: Samples) -> Mask:
    """Return for each tick whether it is in a piece of speech."""
    mask = np.zeros(len(samples), np.bool_)
    for piece in speech_pieces([samples], CONFIG):
        if piece.samples is not None:
            mask[piece.start_sample : piece.start_sample + piece.num_samples] = True
    return mask[TICK // 2 :: TICK]


def gate(samples: Samples) -> Mask:
    return _by_tick(active_frames(frame_levels_db(samples)), FRAME, len(samples))


def _by_tick(frames: NDArray[T], size: int, count: int) -> NDArray[T]:
    """Return what frames of `size` samples say at the middle of each tick."""
    return frames[np.arange(TICK // 2, count, TICK) // size]


def counts(found: Mask, truth: Truth) -> Counts:
    speech, silent = truth == SPEECH, truth == SILENCE
    return Counts(
        int(np.sum(found & speech)),
        int(np.sum(found & silent)),
        int(np.sum(~found & speech)),
        int(np.sum(silent)),
    )


def best_gate(noisy: list[Track]) -> Counts:
    """Return the counts of the threshold on the level that has the highest F1."""
    levels = np.concatenate(
        [_by_tick(frame_levels_db(samples), FRAME, len(samples)) for samples, _ in noisy]
    )
    truth = np.concatenate([track.truth for track in noisy])
    scored = [counts(levels > from_db, truth) for from_db in np.arange(-100.0, 0.0, 0.5)]
    return max(scored, key=lambda each: each.scores[2])


def report(kind: str, snr_db: float, noisy: list[Track]) -> None:
    """Print a row: what each method scores; how decisions compare with the gate."""
    totals = {"best gate": best_gate(noisy)}
    for name, method in (("decisions", decisions), ("segments", segments), ("gate", gate)):
        each = [counts(method(samples), truth) for samples, truth in noisy]
        totals[name] = functools.reduce(Counts.plus, each)
    row = f"{kind:6}{'clean' if np.isinf(snr_db) else f'{snr_db:g} dB':>6}"
    for name in METHODS:
        precision, recall, f1, _ = totals[name].scores
        row += f"  | {precision:6.1%} {recall:6.1%} {f1:6.1%}"
    (_, _, our_f1, ours), (_, _, its_f1, its) = totals["decisions"].scores, totals["gate"].scores
    print(f"{row}  | {100 * (our_f1 - its_f1):+6.1f} {its / max(ours, 1e-9):7.1f}", flush=True)


def mixed(
    laid: list[Track], clips: list[Samples], snr_db: float, rng: np.random.Generator
) -> list[Track]:
    """Add noise to each track: of the clips, or white where there are none."""
    level_db = FLOOR_DBFS if np.isinf(snr_db) else LEVEL_DBFS - snr_db
    made = []
    for samples, truth in laid:
        count = len(samples)
        noise = from_clips(clips, count, rng) if clips else white(count, rng)
        made.append(Track(samples + np.float32(10 ** (level_db / 20)) * noise, truth))
    return made


def report_material(laid: list[Track], utterances: int, clean: int, clips: int) -> None:
    kinds = np.bincount(np.concatenate([track.truth for track in laid]) + 1, minlength=3) / 100
    print(
        f"{clean} of {utterances} utterances are clean; laid out: {kinds[SPEECH + 1]:.0f} s of "
        f"speech, {kinds[SILENCE + 1]:.0f} s of silence, {kinds[NEITHER + 1]:.0f} s unscored; "
        f"{clips} clips of noise"
    )
    print("precision, recall and F1 by 10 ms; then of decisions and gate: difference of F1 in")
    print("points, and how many times the errors the gate makes")
    print(f"{'':12}" + "".join(f"  | {name:20}" for name in METHODS) + "  | points   times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", nargs="?", type=Path, default=SAMPLE / "speechocean762")
    parser.add_argument("noise", nargs="?", type=Path, default=SAMPLE / "esc10")
    parser.add_argument("--utterances", type=int, default=200)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    paths = audio_below(options.speech)
    cut = [trimmed(load(paths[place])) for place in rng.permutation(len(paths))]
    clean = [track for track in cut if track is not None]
    laid = tracks(clean[: options.utterances], rng)
    clips = [load(path) for path in audio_below(options.noise)]
    report_material(laid, len(cut), len(clean), len(clips))
    report("", np.inf, mixed(laid, [], np.inf, rng))
    for kind, chosen in (("white", []), ("clips", clips)):
        for snr_db in SNRS_DB:
            report(kind, snr_db, mixed(laid, chosen, snr_db, rng))


if __name__ == "__main__":
    main()
