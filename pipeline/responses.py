"""A recording of a room impulse response: cut to the response, or refused with a reason."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import AudioError, Pcm, Samples
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.speech import (
    CLIPPED_FROM,
    SPECTRUM_SIZE,
    Quality,
    active_level_dbfs,
    bandwidth_hz,
)

READ_S = 30.0  # of a recording; the direct sound is looked for in this much
LEAD = SAMPLE_RATE_HZ // 1000  # 1 ms, kept before the direct sound
LONGEST = SAMPLE_RATE_HZ  # 1 s, kept from the direct sound on
SHORTEST = SAMPLE_RATE_HZ // 200  # 5 ms
PEAK = 29491  # 0.9 of full scale
AHEAD = SAMPLE_RATE_HZ // 100  # 10 ms: a reflection may be louder than the true direct sound
MAX_AHEAD_DB = -15.0
MAX_SPREAD_S = 0.0125
EARLY = SAMPLE_RATE_HZ // 20  # 50 ms
MIN_DECAY_DB = 10.0


class Response(NamedTuple):
    """A room impulse response, and where in its recording it begins."""

    start_sample: int
    pcm: Pcm  # (time,), mono at SAMPLE_RATE_HZ
    quality: Quality


def cut_response(samples: Samples) -> Response:
    """Cut mono samples `(time,)` at SAMPLE_RATE_HZ to the response, with its peak at PEAK.

    It begins 1 ms before the direct sound, which is the largest sample, and ends 1 s after it or
    where only digital silence follows. A constant offset is left in: to take it out would put one
    where there is none, since a response need not sum to zero.

    Raises:
        AudioError: `silent`, `too_short` or `not_a_response`, as `_check_shape` has it.
    """
    if not np.any(samples):
        raise AudioError("silent", "all samples are zero")
    direct = int(np.argmax(np.abs(samples)))
    start = max(direct - LEAD, 0)
    relative = samples.astype(np.float64) / abs(float(samples[direct]))
    rounded = np.rint(PEAK * relative[start : direct + LONGEST])
    pcm = rounded[: np.flatnonzero(rounded)[-1] + 1].astype("<i2")
    stop = start + len(pcm)
    if stop - direct < SHORTEST:
        length_ms = 1000 * (stop - direct) / SAMPLE_RATE_HZ
        raise AudioError(
            "too_short", f"{length_ms:.1f} ms from the direct sound on, at least 5 ms are needed"
        )
    _check_shape(relative[: max(direct - AHEAD, 0)], relative[start:stop])
    return Response(start, pcm, _quality(samples[start:stop], pcm))


def _check_shape(ahead: NDArray[np.float64], response: NDArray[np.float64]) -> None:
    """Assert that it begins at once, with most of its weight there, and decays.

    Both are `(time,)` and relative to the direct sound. Three things set a response apart:

    * hardly anything comes before it: what lies more than 10 ms ahead of the direct sound has at
      most -15 dB of the energy of the response;
    * it is a pulse: its energy would last for at most 12.5 ms at the level of the direct sound;
    * it decays: its last quarter is at least 10 dB below its first 50 ms, or its first half where
      that is shorter.

    Steady noise and tones fail the last one at least. Speech has most of a sentence before the
    loudest sample, or goes on after it for longer than a pulse. A lone clap or shot passes, and
    nearly is a response.

    Raises:
        AudioError: `not_a_response`, with what is wrong.
    """
    energy = float(np.sum(response**2))
    ahead_db = _decibels(float(np.sum(ahead**2)) / energy)
    spread_s = energy / SAMPLE_RATE_HZ
    first, last = response[: min(EARLY, len(response) // 2)], response[-(len(response) // 4) :]
    decay_db = _decibels(float(np.mean(first**2) / np.mean(last**2)))
    for wrong, detail in (
        (
            ahead_db > MAX_AHEAD_DB,
            f"{ahead_db:.0f} dB of its energy comes before it, at most {MAX_AHEAD_DB:.0f} dB may",
        ),
        (
            spread_s > MAX_SPREAD_S,
            f"it has the energy of {1000 * spread_s:.1f} ms of its peak, at most "
            f"{1000 * MAX_SPREAD_S:g} ms are a pulse",
        ),
        (
            decay_db < MIN_DECAY_DB,
            f"it decays by {decay_db:.1f} dB, at least {MIN_DECAY_DB:g} dB are needed",
        ),
    ):
        if wrong:
            raise AudioError("not_a_response", detail)


def _decibels(ratio: float) -> float:
    return 10 * float(np.log10(max(ratio, np.finfo(np.float64).tiny)))


def _quality(recorded: Samples, pcm: Pcm) -> Quality:
    """Measure a response: what was clipped as it was recorded, the rest as it is kept.

    There is no speech whose noise or partials could be told, so that SNR and tonal share are 0.
    """
    kept = pcm * np.float32(1 / 32768)
    centred = np.pad(kept, (SPECTRUM_SIZE // 2, 0))  # its onset in the middle of a window
    return Quality(
        level_dbfs=active_level_dbfs(kept),
        snr_db=0.0,
        clipped_share=float(np.mean(np.abs(recorded) >= CLIPPED_FROM)),
        bandwidth_hz=bandwidth_hz(centred),
        tonal_share=0.0,
    )
