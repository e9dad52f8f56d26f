"""What is tried before a training: batch sizes and learning rates, with real steps."""

import math
from collections.abc import Iterator

import pytest
import ray

from csc_model.config import ModelConfig
from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.tryouts import (
    SPEAKERS,
    Rate,
    Size,
    batch_sizes,
    best_size,
    learning_rates,
    noise_batch,
    sensitivity,
    shrunk,
)
from pipeline.datasets import read_dataset
from pipeline.storage import Folder

SMALL = [
    "build.train_episodes=32",
    "build.valid_episodes=16",
    "build.episodes_per_group=4",
    "build.mixing.seconds=0.5",
    "build.mixing.noise_share=0.0",
    "model.window=128",
    "model.hop=64",
    "model.channels=16",
    "model.hidden=16",
    "model.embedding_dim=32",
    "train.batch_size=8",
    "train.warmup_steps=0",
]


@pytest.fixture
def config() -> Config:
    return load_config("demo", SMALL)


def test_noise_has_the_shapes_of_training(config: Config) -> None:
    batch = noise_batch(config, 8)
    stepper = Stepper(config, new_objective(config, SPEAKERS))
    losses, grad_norm = stepper.take(0, batch, Meter())
    assert math.isfinite(float(losses.total))
    assert grad_norm > 0
    assert batch.sources.shape == (8, 2, 3, config.build.mixing.num_samples)


def test_the_smallest_batch_that_is_about_as_fast_is_best() -> None:
    sizes = [Size(8, 50.0, None, True), Size(16, 97.0, None, True), Size(32, 100.0, None, True)]
    assert best_size([*sizes, Size(64, 0.0, None, False)]) == sizes[1]
    assert best_size([Size(8, 0.0, None, False)]) is None


def test_a_loss_that_went_wild_counts_as_that_of_the_start() -> None:
    rates = [Rate(1e-3, 4.0, 1.0, 0.0, False), Rate(1e-1, 4.0, math.inf, 0.0, True)]
    assert sensitivity(rates) == pytest.approx((0 + 3) / 2)


def test_a_narrow_model_keeps_its_depth() -> None:
    narrow = shrunk(ModelConfig(channels=64, hidden=128, embedding_dim=128), 0.1)
    assert (narrow.channels, narrow.hidden, narrow.embedding_dim) == (8, 12, 12)
    assert narrow.ecapa_channels == 16
    assert shrunk(ModelConfig(attention_heads=1), 0.01).channels == 8
    assert narrow.shared_blocks == ModelConfig().shared_blocks


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.cluster  # on one node, but as long as such tests are
@pytest.mark.usefixtures("cluster")
def test_real_steps_find_what_fits_and_what_diverges(config: Config, dataset: Folder) -> None:
    sizes = batch_sizes(config)
    assert [size.episodes for size in sizes] == [4 * 2**n for n in range(len(sizes))]
    assert all(size.fits and size.audio_seconds_per_s > 0 for size in sizes)

    speakers = len(read_dataset(dataset).about["speakers"])
    told: list[int] = []
    rates = learning_rates(
        config, dataset, speakers, [1e-3, 1e15], 20, lambda done, _: told.append(done)
    )
    assert told == [1, 2]
    calm, wild = rates
    assert not calm.diverged
    assert calm.loss < calm.first_loss
    assert wild.diverged or wild.loss > calm.loss
