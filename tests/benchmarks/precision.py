"""What bf16 and `torch.compile` are worth: compiled bf16 beside eager fp32, on one GPU.

    python -m tests.benchmarks.precision [--trunk conv_tasnet] [--tf32]
    python -m tests.benchmarks.precision --device cpu --seconds 0.5 --batch-size 1 --steps 2

A training step (forward, backward, optimizer) of the default model with its losses, as `csc train`
takes it, on the same batches of noise and from the same weights. The first steps, compilation among
them, are not counted; each of the others is timed until the device has done it, and medians are
compared. `--tf32` lets a GPU round what it multiplies in fp32 to TF32, which is off without it. A
CPU shows no more than that the script works.
"""

import argparse
import gc
import json
import statistics
import time
from typing import NamedTuple

import torch

from csc_model.config import TRUNKS, ModelConfig
from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.tryouts import SPEAKERS, noise_batch

TARGET = 3.0
BATCHES = 4  # that steps take in turns
WAYS = {"eager fp32": ("fp32", False), "compiled bf16": ("bf16", True)}


class Told(NamedTuple):
    """What is asked for on the command line."""

    trunk: str
    batch_size: int
    seconds: float
    steps: int
    warm_steps: int
    device: str
    tf32: bool
    given: list[str]


class Spent(NamedTuple):
    """What a step of one way takes."""

    ms: float
    peak_gb: float  # of a GPU's memory


def config_of(told: Told, precision: str, compiled: bool) -> Config:
    """Return the configuration of a training in one of the two ways."""
    train = {"workers": 1, "batch_size": told.batch_size, "precision": precision, "remix": False}
    sizes = {f"model.{key}": value for key, value in ModelConfig(trunk=told.trunk)}
    sizes |= {f"train.{key}": value for key, value in train.items()}
    sizes |= {"train.compile": compiled, "build.mixing.seconds": told.seconds}
    changes = [f"{key}={json.dumps(value)}" for key, value in sizes.items()]
    return load_config("demo", [*changes, *told.given])


def measure(config: Config, told: Told) -> Spent:
    """Take steps, and return the median of those that count."""
    device = torch.device(told.device)
    stepper = Stepper(config, new_objective(config, SPEAKERS).to(device))
    seeded = [config.model_copy(update={"seed": seed}) for seed in range(BATCHES)]
    batches = [noise_batch(one, told.batch_size) for one in seeded]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took_s = []
    for step in range(told.warm_steps + told.steps):
        finish(device)
        began = time.perf_counter()
        stepper.take(step, batches[step % BATCHES], Meter())
        finish(device)
        took_s.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Spent(1000 * statistics.median(took_s[told.warm_steps :]), peak / 1e9)


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def told_by(words: list[str] | None = None) -> Told:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", choices=TRUNKS, default="galr")
    parser.add_argument("--batch-size", type=int, default=16, help="episodes of two mixtures")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a mixture")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-steps", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="given", metavar="KEY=VALUE")
    told = Told(**vars(parser.parse_args(words)))
    if told.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "there is no GPU here, and what is asked is what one gains; --device cpu "
            "shows that the script works"
        )
    return told


def main() -> None:
    """Measure both ways, and say how they compare."""
    told = told_by()
    torch.set_float32_matmul_precision("high" if told.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = told.tf32
    name = torch.cuda.get_device_name() if told.device.startswith("cuda") else told.device
    print(
        f"{name}, torch {torch.__version__}, TF32 {'on' if told.tf32 else 'off'}: {told.trunk}, "
        f"{told.batch_size} episodes, mixtures of {told.seconds:g} s"
    )
    found = {}
    for way, (precision, compiled) in WAYS.items():
        found[way] = measure(config_of(told, precision, compiled), told)
        gc.collect()  # the model of this way, before the next one's peak
        memory = f", {found[way].peak_gb:.2f} GB at most" if found[way].peak_gb else ""
        print(f"{way:14} {found[way].ms:9.1f} ms a step{memory}", flush=True)
    eager, compiled_ms = (found[way].ms for way in WAYS)
    print(f"{eager / compiled_ms:.2f} times as fast (target on a GPU: {TARGET:g})")


if __name__ == "__main__":
    main()
