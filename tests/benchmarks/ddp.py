"""What Ray Train costs: the step of `csc train` beside that of a plain DDP loop.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ddp [--steps 120] [--rounds 3] [--set KEY=VALUE]

The shipped sample and the configuration of the demo, two workers over gloo. Ray has processes of
its own: leave them a core (`--set train.workers=1` on two), or they take it from the workers. Both
take the same steps on the same batches with the same loader; Ray's side also reports to the driver,
counts what it computes and logs to MLflow, every 20 steps. The plain loop is
`torch.multiprocessing` with `DistributedDataParallel` and nothing else. Taken in turns; medians
over lines of 20 steps, without the first of each round. Nothing else should run on the machine.
"""

import argparse
import json
import os
import statistics
import tempfile
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from jobs.config import Config, load_config
from jobs.loop import STEPS_PER_LINE
from jobs.meter import Meter
from jobs.run import Run
from jobs.stepper import Stepper, new_objective
from jobs.train import WORKER_ENV
from pipeline.datasets import read_dataset
from pipeline.loader import EpisodeLoader, audio_seconds
from pipeline.storage import Folder

Lines = list[dict[str, float]]
SHOWN = ("step_s", "data_wait_share")


def of_ray(config: Config) -> Lines:
    """Train through Ray Train, and return what it logged."""
    with Run(config) as run:
        trained = run.train
        history = {name: run.registry.history(trained.about["run"], name) for name in SHOWN}
        trained.folder.remove(first="index.json")
    return [dict(zip(SHOWN, values, strict=True)) for values in zip(*history.values(), strict=True)]


def of_plain(config: Config, dataset: Folder) -> Lines:
    """Train in a plain DDP loop, and return the same."""
    with tempfile.TemporaryDirectory() as scratch:
        told = (config.model_dump_json(), dataset.uri, scratch)
        mp.spawn(_work, told, config.train.workers)
        return list(json.loads((Path(scratch) / "lines.json").read_text()))


def _work(rank: int, text: str, uri: str, scratch: str) -> None:
    config, dataset = Config.model_validate_json(text), Folder(uri)
    torch.set_num_threads(config.train.threads)
    world = config.train.workers
    where = f"file://{scratch}/meeting"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    objective = new_objective(config, len(read_dataset(dataset).about["speakers"]))
    loader = EpisodeLoader(
        dataset,
        "train",
        batch_size=config.train.batch_size,
        seed=config.seed,
        rank=rank,
        world=world,
        remix=config.train.remix,
    )
    ranks = {"rank": rank, "world": world, "share": loader.share}
    stepper = Stepper(config, objective, **ranks, wrap=DistributedDataParallel)
    lines, meter = [], Meter()
    for step, batch in enumerate(islice(loader.endless(), config.train.steps), start=1):
        meter.passed("data_wait")
        losses, grad_norm = stepper.take(step - 1, batch, meter)
        meter.stepped(losses, grad_norm, stepper.learning_rate, audio_seconds(batch) * world)
        if step % STEPS_PER_LINE == 0:
            lines.append(meter.line())
            meter = Meter()
    if rank == 0:
        (Path(scratch) / "lines.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="given")
    told = parser.parse_args()
    found: dict[str, Lines] = {"Ray Train": [], "plain DDP": []}
    os.environ |= WORKER_ENV  # Ray's workers have it
    with tempfile.TemporaryDirectory(prefix="csc-ddp-") as workspace:
        sizes = [f"train.steps={told.steps}", f"train.validate_every={told.steps}"]
        config = load_config("demo", [*told.given, *sizes, f"workspace='{workspace}'"])
        with Run(config) as run:
            dataset = run.build[0]
        for _ in range(told.rounds):
            found["Ray Train"] += of_ray(config)[1:]
            found["plain DDP"] += of_plain(config, dataset)[1:]
    medians = {
        name: {key: statistics.median(line[key] for line in lines) for key in SHOWN}
        for name, lines in found.items()
    }
    for name, values in medians.items():
        wait = 100 * values["data_wait_share"]
        print(f"{name}: {1000 * values['step_s']:.1f} ms a step, {wait:.2f} % of it waiting")
    ratio = medians["Ray Train"]["step_s"] / medians["plain DDP"]["step_s"]
    print(f"Ray Train takes {ratio:.3f} of the time of a plain loop")


if __name__ == "__main__":
    main()
