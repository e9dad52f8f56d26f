"""How fast and in how much memory `csc extract` works on one thread of a CPU.

    python -m tests.benchmarks.extract FOLDER [--hours 1]

FOLDER holds a model with an extractor. Beside it stands the plain call of its network on the 30 s
as a whole. The delay is what passes from a sound to its being written: a chunk and the look-ahead.
"""

import argparse
import io
import resource
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import soundfile
import torch

from csc_model.model import CSC
from jobs.extracting import extract_file
from pipeline.audio import load
from pipeline.schema import SAMPLE_RATE_HZ
from tests.benchmarks.use import REPEATS, sample_speech, seconds_of

PACES_S = ((8.0, 4.0), (4.0, 1.0), (1.0, 0.5), (0.25, 0.25))
"""Chunk and look-ahead; the first is what the command takes."""


def main() -> None:
    """Print seconds of work for a second of sound, by pace; then of hours, with memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--hours", type=float, default=1.0)
    told = parser.parse_args()
    torch.set_num_threads(1)
    model = CSC.load(told.folder).eval()
    vector = model.embed(torch.from_numpy(sample_speech(5.0)))[0][-1]
    with tempfile.TemporaryDirectory() as scratch:
        short, long = Path(scratch) / "short.wav", Path(scratch) / "long.wav"
        spoken = sample_speech(30.0)
        soundfile.write(short, spoken, SAMPLE_RATE_HZ)
        with soundfile.SoundFile(long, "w", SAMPLE_RATE_HZ, 1) as sink:  # piece by piece, as read
            for _ in range(round(told.hours * 120)):
                sink.write(spoken)
        _plain(model, short, vector)
        for pace in PACES_S:
            factor = _factor(model, short, vector, pace, 30.0, REPEATS)
            print(f"chunk {pace[0]} s, look-ahead {pace[1]} s: {factor:.3f} s for a second")
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        factor = _factor(model, long, vector, PACES_S[0], told.hours * 3600, 1)
        after_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{told.hours} h: {factor:.3f} s for a second; peak {after_mb:.0f} MB, of 30 s "
            f"{before_mb:.0f} MB"
        )


@torch.inference_mode()
def _plain(model: CSC, path: Path, vector: torch.Tensor) -> None:
    samples = torch.from_numpy(load(path)).unsqueeze(0)
    took_s = seconds_of(lambda: model.extracted(samples, vector.unsqueeze(0)), REPEATS)
    print(f"the network on all 30 s at once: {took_s / 30:.3f} s for a second")


def _factor(
    model: CSC,
    path: Path,
    vector: torch.Tensor,
    pace: tuple[float, float],
    seconds: float,
    repeats: int,
) -> float:
    to = path.with_suffix(".out.wav")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # of its progress
        took_s = seconds_of(lambda: extract_file(model, str(path), vector, to, *pace), repeats)
    return took_s / seconds


if __name__ == "__main__":
    main()
