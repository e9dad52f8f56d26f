"""What kills leave of a training: the loss curve of one killed again and again, beside another.

    python -m tests.benchmarks.kills [--steps 9000] [--minutes 30] [--kills 5] [--seed 1]
                                     [--tolerance 1e-5] [--set KEY=VALUE]

The shipped sample and the configuration of the demo, with one worker, trained twice at once: in
peace, and in a second workspace where the same steps are killed at random moments of the first
`--minutes` of training, in turn: the command, a worker, both at once. Then the same command goes
on. Both curves are read from MLflow; the error rates that validation found are compared too. The
steps must last for longer than that. The exit code is 1 where the curves differ.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from jobs.config import load_config
from jobs.registry import Registry
from jobs.workspace import Workspace

CSC = str(Path(sys.executable).parent / "csc")
COMPARED = ("total", "separation_db", "contrastive_nats", "grad_norm", "valid_eer")
POLL_S = 0.2
Given = Sequence[str]


def train(workspace: Path, given: Given) -> subprocess.Popen[bytes]:
    """Start `csc train`, which builds what it needs."""
    settings = [word for text in given for word in ("--set", text)]
    command = [CSC, "train", "--workspace", str(workspace), *settings]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def finish(running: subprocess.Popen[bytes]) -> None:
    """Wait for a command, which must succeed."""
    if running.wait():
        raise SystemExit(f"csc train ended with {running.returncode}")


def workers(running: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the training processes that a command has started."""
    below = psutil.Process(running.pid).children(recursive=True)
    return [child for child in below if "RayTrainWorker" in command_of(child)]


def command_of(process: psutil.Process) -> str:
    """Return what a process was started as, or nothing of one that has just ended."""
    with suppress(psutil.NoSuchProcess):  # zombies too
        return " ".join(process.cmdline())
    return ""


def kill(running: subprocess.Popen[bytes], whom: str) -> None:
    """Send SIGKILL to a worker, the command, or the command with all that it started."""
    if whom == "worker":
        random.choice(workers(running)).kill()
        return
    below = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    for child in below if whom == "all" else ():
        with suppress(psutil.NoSuchProcess):
            child.kill()
    running.wait()


def end(running: subprocess.Popen[bytes]) -> None:
    """End a command that still runs: in a session of its own, Ctrl-C does not reach it."""
    if running.poll() is None:
        kill(running, "all")


def train_under_fire(workspace: Path, given: Given, moments_s: Sequence[float]) -> None:
    """Train, with a kill whenever workers have trained for so long in all."""
    running, trained_s, mark = train(workspace, given), 0.0, time.monotonic()
    victims = ("command", "worker", "all")
    try:
        for number, moment_s in enumerate(sorted(moments_s)):
            while trained_s < moment_s:
                time.sleep(POLL_S)
                now = time.monotonic()
                trained_s += now - mark if workers(running) else 0.0
                mark = now
                if running.poll() is not None:
                    raise SystemExit(f"csc train ended with {running.returncode} before all kills")
            whom = victims[number % len(victims)]
            print(f"kill {number + 1}, after {trained_s:.0f} s of training: {whom}", flush=True)
            kill(running, whom)
            if whom != "worker":  # whose place Ray Train fills
                running = train(workspace, given)
        finish(running)
    finally:
        end(running)


def curves(workspace: Path, given: Given) -> dict[str, list[float]]:
    """Return what MLflow was told."""
    config = load_config("demo", [*given, f"workspace='{workspace}'"])
    registry = Registry(Workspace(config).mlflow_uri, config)
    (model,) = (workspace / "models").iterdir()
    run = Workspace(config).models.child(model.name).read_json("run.json")
    return {name: registry.history(run, name) for name in COMPARED}


def main() -> None:
    """Train both, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="between the curves")
    parser.add_argument("--set", action="append", default=[], dest="given")
    told = parser.parse_args()
    random.seed(told.seed)
    given = ["train.workers=1", *told.given, f"train.steps={told.steps}"]
    moments_s = [random.uniform(0, 60 * told.minutes) for _ in range(told.kills)]
    with tempfile.TemporaryDirectory(prefix="csc-kills-") as scratch:
        peace, fire = Path(scratch) / "peace", Path(scratch) / "fire"
        undisturbed = train(peace, given)
        try:
            train_under_fire(fire, given, moments_s)
            finish(undisturbed)
        finally:
            end(undisturbed)
        expected, found = curves(peace, given), curves(fire, given)
    apart = {}
    for name in COMPARED:
        pairs = list(zip(expected[name], found[name], strict=True))
        apart[name] = max(abs(mine - theirs) for mine, theirs in pairs)
        last = pairs[-1][1]
        print(f"{name}: {len(pairs)} values, at most {apart[name]:.3g} apart, last {last:.4g}")
    if not all(value <= told.tolerance for value in apart.values()):  # NaN is not
        raise SystemExit(f"the curves are more than {told.tolerance:g} apart")


if __name__ == "__main__":
    main()
