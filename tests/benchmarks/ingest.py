"""How fast ingest is beside a plain loop, and how much memory a long recording takes.

    python -m tests.benchmarks.ingest [--hours 1 8] [--format mp3]

Recordings are made of the shipped sample: utterances with pauses, at 44.1 kHz in stereo as MP3, or
at 16 kHz as FLAC. The plain loop decodes with soundfile, resamples with soxr and asks silero's own
sequence model, which is the same network; it writes nothing and measures nothing. Both run on one
core each time, in processes of their own; the time is CPU time, that of child processes included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from pipeline.audio import load
from pipeline.corpora import SAMPLE, CorpusConfig, IngestConfig, list_corpora
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder
from pipeline.store import ingest, plan_ingest
from pipeline.vad import network

RATE_HZ = {"mp3": 44_100, "flac": SAMPLE_RATE_HZ}


def make_recording(path: Path, hours: float) -> None:
    """Write speech with pauses of half a second to two; mp3 in stereo, flac in mono."""
    rng, rate_hz = np.random.default_rng(0), RATE_HZ[path.suffix[1:]]
    files = sorted((SAMPLE / "speechocean762").glob("*/*.opus"))
    channels, written = 2 if path.suffix == ".mp3" else 1, 0.0
    with soundfile.SoundFile(path, "w", rate_hz, channels) as out:
        while written < hours * 3600:
            gain, pause_s = rng.uniform(0.3, 1.0), rng.uniform(0.5, 2.0)
            spoken = load(files[int(rng.integers(len(files)))]) * np.float32(gain)
            turn = np.concatenate([spoken, np.zeros(int(pause_s * SAMPLE_RATE_HZ), np.float32)])
            samples = soxr.resample(turn, SAMPLE_RATE_HZ, rate_hz)
            out.write(np.tile(samples[:, None], (1, channels)))
            written += len(turn) / SAMPLE_RATE_HZ


def ours(folder: Path) -> float:
    """Ingest a folder without Ray and return its seconds of audio."""
    config = IngestConfig(
        corpora=[CorpusConfig(name="long", root=str(folder), layout="unlabelled")]
    )
    with tempfile.TemporaryDirectory() as scratch:
        root = Folder.at(scratch)
        planned = plan_ingest(root, config, list_corpora(config))
        index = ingest(root, planned, config, lambda tasks, work: [work(t) for t in tasks] and None)
    return float(index["seconds_in"])


def plain(folder: Path) -> float:
    """Decode, resample and find speech in the files of a folder; return its seconds of audio."""
    from silero_vad.sequence_vad import SileroVADSequence

    model, seconds = SileroVADSequence(str(network())), 0.0
    for path in sorted(folder.iterdir()):
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        if rate_hz != SAMPLE_RATE_HZ:
            mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
        model.audio_forward(mono)
        seconds += len(mono) / SAMPLE_RATE_HZ
    return seconds


WAYS: dict[str, Callable[[Path], float]] = {"ours": ours, "plain": plain}


def measured(way: str, folder: Path) -> dict[str, float]:
    """Run one way in a process of its own, on one thread."""
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--way", way, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def report(way: str, folder: Path) -> None:
    """Print what one way took, as JSON: audio seconds, CPU seconds, megabytes at most."""
    before = _cpu_s()
    seconds = WAYS[way](folder)
    from pipeline.decoder import own_decoder

    own_decoder().close()  # a child's time counts once it has ended
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_kb += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"audio_s": seconds, "cpu_s": _cpu_s() - before, "mb": peak_kb / 1024}))


def _cpu_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0])
    parser.add_argument("--format", choices=sorted(RATE_HZ), nargs="+", default=["mp3", "flac"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        report(options.way[0], Path(options.way[1]))
        return
    print("format  hours  way    audio-s per s and core     peak MB   ratio")
    for format_ in options.format:
        for hours in options.hours:
            compare(format_, hours, options.repeats)


def compare(format_: str, hours: float, repeats: int) -> None:
    """Measure both ways on one recording, in turns, and print the medians."""
    with tempfile.TemporaryDirectory() as scratch:
        make_recording(Path(scratch) / f"long.{format_}", hours)
        runs = [{way: measured(way, Path(scratch)) for way in WAYS} for _ in range(repeats)]
    speed = {
        way: float(np.median([run[way]["audio_s"] / run[way]["cpu_s"] for run in runs]))
        for way in WAYS
    }
    for way in WAYS:
        megabytes = max(run[way]["mb"] for run in runs)
        ratio = f"{speed['ours'] / speed['plain']:.2f}" if way == "ours" else ""
        print(f"{format_:6} {hours:6g}  {way:6} {speed[way]:10.0f} {megabytes:24.0f}   {ratio}")


if __name__ == "__main__":
    main()
