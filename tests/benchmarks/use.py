"""How soon `csc verify` answers, and how many seconds of sound `csc embed` hears in a second.

    python -m tests.benchmarks.use MODEL [--workspace DIR] [--hours 1]

MODEL is a version or the folder of one, as `csc verify --model` takes it. Latency is of two
recordings of 3 s: cold, a process from its start to its end; warm, what a program does that has the
model loaded. Throughput is of `csc embed` with its model loaded, on one thread of a CPU: reading,
decoding and windows included. Beside it stands the plain loop, which has the samples in memory and
calls the network on one window of 16 s after another; windows of the product overlap by half, so
two is the least ratio that a long file can have.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch

from csc_model.model import CSC, WINDOW_S
from jobs.config import load_config
from jobs.listening import listen
from jobs.verify import compare, load_verifier
from pipeline.audio import Samples, load
from pipeline.corpora import SAMPLE
from pipeline.schema import SAMPLE_RATE_HZ

REPEATS = 5


def sample_speech(seconds: float) -> Samples:
    """Return real speech: the shipped sample's, again and again."""
    paths = sorted((SAMPLE / "speechocean762").glob("*/*.opus"))[:100]
    spoken = np.concatenate([load(path) for path in paths])
    return np.resize(spoken, round(seconds * SAMPLE_RATE_HZ))


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of some calls."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return median(took)


@torch.inference_mode()
def plain_loop(model: CSC, samples: Samples) -> None:
    """Call the network on one window after another, and nothing else."""
    for window in torch.from_numpy(samples).split(round(WINDOW_S * SAMPLE_RATE_HZ)):
        model(window.unsqueeze(0))


def main() -> None:
    """Print latency and throughput."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--workspace", default="csc-workspace")
    parser.add_argument("--hours", type=float, default=1.0, help="length of the longest file")
    told = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config("demo", [f"workspace='{told.workspace}'"])
    verifier = load_verifier(told.model, config)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for seconds in (3.0, 30.0, told.hours * 3600):
            files[seconds] = str(Path(scratch) / f"{seconds:.0f}.wav")
            soundfile.write(files[seconds], sample_speech(seconds), SAMPLE_RATE_HZ)
        _latency(told.model, told.workspace, files[3.0], verifier.model)
        for seconds, path in files.items():
            _throughput(verifier.model, path, seconds)


def _latency(name: str, workspace: str, path: str, model: CSC) -> None:
    csc = str(Path(sys.executable).parent / "csc")
    command = [csc, "verify", path, path, "--model", name, "--workspace", workspace]
    cold_s = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True), 3)
    imports_s = seconds_of(
        lambda: subprocess.run([sys.executable, "-c", "import jobs.verify"], check=True), 3
    )
    samples = load(path)
    warm_s = seconds_of(lambda: compare(model, path, path), REPEATS)
    plain_s = 2 * seconds_of(lambda: plain_loop(model, samples), REPEATS)
    print(f"csc verify, cold: {cold_s:6.2f} s, of which imports {imports_s:.2f} s")
    print(f"    warm: {1000 * warm_s:6.0f} ms, {warm_s / plain_s:.2f} of the plain loop's time")


def _throughput(model: CSC, path: str, seconds: float) -> None:
    repeats = REPEATS if seconds < 60 else 1
    samples = load(path)
    with redirect_stdout(io.StringIO()):  # of its progress
        ours_s = seconds_of(lambda: listen(model, path), repeats)
    plain_s = seconds_of(lambda: plain_loop(model, samples), repeats)
    print(
        f"csc embed, {seconds:6.0f} s: {seconds / ours_s:6.1f} s of sound in a second, plain loop "
        f"{seconds / plain_s:6.1f}: {ours_s / plain_s:.2f} of its time"
    )


if __name__ == "__main__":
    main()
