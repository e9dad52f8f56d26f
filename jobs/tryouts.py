"""What to find out before a long training: the batch that a device likes, the rate a model bears.

Both take real steps (`Stepper`) in one process on one device, as Ray hands it out.
"""

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import ray
import torch

from csc_model.config import ModelConfig
from csc_model.objective import Losses
from jobs.config import Config
from jobs.failures import is_out_of_memory
from jobs.meter import Meter
from jobs.stepper import NoNumberError, Stepper, new_objective
from pipeline.loader import Batch, EpisodeLoader, audio_seconds
from pipeline.schema import OnProgress
from pipeline.storage import Folder

WARM_STEPS, TIMED_STEPS = 2, 3
ENOUGH = 1.05  # a batch twice as large that is not as much faster is not worth its memory
MOST_EPISODES = 4096
SPEAKERS = 1000  # of a made-up table; its cost is small beside the model's


class Size(NamedTuple):
    """What a worker's share of a batch costs."""

    episodes: int
    audio_seconds_per_s: float
    peak_memory_gb: float | None  # of a GPU
    fits: bool


class Rate(NamedTuple):
    """What became of a model at a learning rate."""

    lr: float
    first_loss: float
    loss: float  # mean of the last tenth of the steps
    attention_logit: float  # the largest of them
    diverged: bool


def batch_sizes(config: Config) -> list[Size]:
    """Double a worker's share of the batch until it does not fit or does not pay."""
    block = config.build.episodes_per_group if config.train.remix else 1
    sizes: list[Size] = []
    while not sizes or (_pays(sizes) and sizes[-1].episodes < MOST_EPISODES):
        episodes = 2 * sizes[-1].episodes if sizes else math.lcm(block, config.train.accumulate)
        sizes.append(_remotely(_measure_size, config.model_dump_json(), episodes))
    return sizes


def best_size(sizes: Sequence[Size]) -> Size | None:
    """Return the smallest share that is about as fast as the fastest, None where none fits."""
    fitting = [size for size in sizes if size.fits]
    fastest = max((size.audio_seconds_per_s for size in fitting), default=0.0)
    return next((size for size in fitting if ENOUGH * size.audio_seconds_per_s >= fastest), None)


def _pays(sizes: Sequence[Size]) -> bool:
    if not sizes[-1].fits:
        return False
    speed = [size.audio_seconds_per_s for size in sizes]
    return len(speed) == 1 or speed[-1] > ENOUGH * speed[-2]


def _measure_size(text: str, episodes: int) -> Size:
    config = Config.model_validate_json(text)
    torch.set_num_threads(config.train.threads)
    device = _device()
    batch = noise_batch(config, episodes)
    try:
        stepper = Stepper(config, new_objective(config, SPEAKERS).to(device))
        for step in range(WARM_STEPS):
            stepper.take(step, batch, Meter())
        began = time.perf_counter()
        for step in range(TIMED_STEPS):  # each ends with a look at the gradient, on the host
            stepper.take(step, batch, Meter())
        spent = time.perf_counter() - began
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Size(episodes, 0.0, None, False)
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
    return Size(episodes, TIMED_STEPS * audio_seconds(batch) / spent, memory, True)


def noise_batch(config: Config, episodes: int) -> Batch:
    """Return a batch of the shapes that training has, of noise, with every slot taken."""
    mixing, draw = config.build.mixing, torch.Generator().manual_seed(config.seed)
    shape = (episodes, mixing.conditions, mixing.num_slots)
    count = math.prod(shape)
    speakers = torch.randint(SPEAKERS, (*shape[:2], shape[2] - 1), generator=draw)
    return Batch(
        torch.randint(-3000, 3000, (count, mixing.num_samples), dtype=torch.int16, generator=draw),
        torch.arange(count).view(shape),
        torch.zeros(shape),
        torch.full(shape, -1),
        speakers,
        speakers[:, 0, 0],
        torch.zeros(episodes, dtype=torch.bool),
        torch.arange(episodes),
    )


def learning_rates(
    config: Config,
    dataset: Folder,
    speakers: int,
    rates: Sequence[float],
    steps: int,
    on_progress: OnProgress,
) -> list[Rate]:
    """Train `config.model` for a few steps at each rate, from the same weights on the same data."""
    train = config.train.model_copy(update={"steps": steps, "workers": 1, "refined": []})
    jobs = [
        config.model_copy(update={"train": train.model_copy(update={"lr": lr})}) for lr in rates
    ]
    task = _task(_measure_rate)
    waiting = [task.remote(job.model_dump_json(), dataset.uri, speakers) for job in jobs]
    left = list(waiting)
    while left:
        _, left = ray.wait(left)
        on_progress(len(waiting) - len(left), len(waiting))
    return ray.get(waiting)


def _measure_rate(text: str, dataset: str, speakers: int) -> Rate:
    config = Config.model_validate_json(text)
    train = config.train
    torch.set_num_threads(train.threads)
    stepper = Stepper(config, new_objective(config, speakers).to(_device()))
    data = EpisodeLoader(
        Folder(dataset),
        "train",
        batch_size=train.batch_size,
        seed=config.seed,
        rank=0,
        world=1,
        remix=train.remix,
    )
    made: list[Losses] = []
    meter, diverged = Meter(), False
    for step, batch in enumerate(islice(data.endless(), train.steps)):
        try:
            made.append(stepper.take(step, batch, meter)[0])
        except NoNumberError:
            diverged = True
            break
    totals = [float(losses.total) for losses in made] or [math.nan]
    logits = [float(losses.attention_logit) for losses in made] or [math.nan]
    last = totals[-max(1, len(totals) // 10) :]
    loss = math.inf if diverged else sum(last) / len(last)
    return Rate(train.lr, totals[0], loss, max(logits), diverged)


def sensitivity(rates: Sequence[Rate]) -> float:
    """Return by how much the loss is above the best of all rates, in the mean over them.

    A loss counts at most as much as that of the first step (learning-rate sensitivity; Wortsman et
    al., 2023, arXiv 2309.14322). Of two models that reach the same loss, the one with the smaller
    value is the safer.
    """
    start = max(rate.first_loss for rate in rates)
    losses = [min(rate.loss, start) for rate in rates]
    return sum(losses) / len(losses) - min(losses)


def shrunk(model: ModelConfig, width: float) -> ModelConfig:
    """Return the model with layers `width` times as wide, and as many of them."""

    def narrow(size: int, unit: int) -> int:
        return unit * max(math.ceil(8 / unit), round(size * width / unit))

    names = ("channels", "hidden", "embedding_dim")
    sizes = {name: narrow(getattr(model, name), model.attention_heads) for name in names}
    sizes["ecapa_channels"] = narrow(model.ecapa_channels, 8)
    return ModelConfig.model_validate(model.model_dump() | sizes)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _task(work: Any) -> Any:
    """Return work as a Ray task on one GPU where there are any, each call in a fresh process."""
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    return ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(work)


def _remotely(work: Any, *arguments: Any) -> Any:
    return ray.get(_task(work).remote(*arguments))
