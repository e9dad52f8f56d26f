"""What stops a training for good is named, with what to do."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from jobs.checkpoint import State
from jobs.config import Config, load_config
from jobs.failures import (
    HopelessError,
    check_fits,
    is_out_of_memory,
    memory_named,
    no_number,
    out_of_memory,
)
from jobs.loop import SCRATCH, sweep_scratch
from jobs.meter import Meter
from jobs.registry import Registry
from jobs.stepper import NoNumberError, Stepper, new_objective
from jobs.train import SNAPSHOT, _check_snapshot, model_id, train
from jobs.training_data import TrainingData
from jobs.tryouts import SPEAKERS, noise_batch
from pipeline.datasets import read_dataset
from pipeline.errors import CscError
from pipeline.shards import INDEX
from pipeline.storage import Folder
from tests.test_tryouts import SMALL


def config(*more: str) -> Config:
    return load_config("demo", [*SMALL, *more])


def test_more_speakers_than_slots_are_refused(dataset: Folder) -> None:
    found = read_dataset(dataset)
    check_fits(found, config())
    three = ("build.mixing.interferer_shares=[0.2, 0.4, 0.4]", "model.num_slots=3")
    with pytest.raises(CscError, match=r"up to 2 speakers and the model 3 slots.*num_slots=2"):
        check_fits(found, config(*three))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 1, "has data version 1, .*build the dataset anew"),
        ("sample_rate_hz", 8000, "8000 Hz"),
    ],
)
def test_a_dataset_of_another_kind_is_refused(
    dataset: Folder, tmp_path: Path, key: str, value: int, said: str
) -> None:
    index = dataset.read_json(INDEX) | {key: value}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CscError, match=said):
        read_dataset(Folder.at(tmp_path))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    Stepper(config(), new_objective(config(), SPEAKERS)).save(tmp_path, State(3, 0, 1.0))
    wider = config("model.channels=32")
    with pytest.raises(CscError, match=r"other shapes.*--fresh"):
        Stepper(wider, new_objective(wider, SPEAKERS)).load(tmp_path)


def test_a_torn_list_of_checkpoints_is_named(tmp_path: Path) -> None:
    checkpoints = Folder(str(tmp_path))
    _check_snapshot(checkpoints)
    checkpoints.put_json(SNAPSHOT, {"checkpoint_results": []})
    _check_snapshot(checkpoints)
    checkpoints.put(SNAPSHOT, b"")
    with pytest.raises(CscError, match=f"{SNAPSHOT} is torn"):
        _check_snapshot(checkpoints)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_gains_that_are_no_numbers_name_their_episodes(tmp_path: Path, broken: float) -> None:
    stepper = Stepper(config(), new_objective(config(), SPEAKERS))
    weights = dict(stepper.objective.named_parameters())
    before = {name: tensor.clone() for name, tensor in weights.items()}
    batch = noise_batch(config(), 4)
    batch.gains_db[2, 1, 0] = broken
    with pytest.raises(NoNumberError) as caught:
        stepper.take(5, batch, Meter())
    explained = no_number(caught.value, 5, 0, batch, Folder.at(tmp_path))
    assert "1 episode(s) of the batch, 2, have gains that are no numbers" in str(explained)
    (saved,) = tmp_path.iterdir()
    assert str(saved) in str(explained)
    assert load_file(saved)["numbers"].tolist() == [0, 1, 2, 3]
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_a_rate_that_blows_up_is_no_fault_of_the_data(tmp_path: Path) -> None:
    wild = config("train.lr=1e30", "train.clip_norm=1e30")
    stepper, batch = Stepper(wild, new_objective(wild, SPEAKERS)), noise_batch(wild, 4)
    stepper.take(0, batch, Meter())
    with pytest.raises(NoNumberError) as caught:
        stepper.take(1, batch, Meter())
    assert "set train.lr" in str(no_number(caught.value, 3, 1, batch, Folder.at(tmp_path)))


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for said in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    said = str(out_of_memory(7, config("train.accumulate=2", "train.batch_size=16"), 8, 2))
    assert "4 episodes of 2 x 0.5 s at once" in said
    assert "set model.checkpointing=true, and it goes on from its last checkpoint; or " in said
    assert "train.accumulate=4 or train.batch_size lower, and it begins anew at step 0" in said
    saving = config("model.checkpointing=true", "train.accumulate=4")
    assert "each worker: set train.batch_size lower" in str(out_of_memory(7, saving, 4, 2))
    assert "accumulate" not in str(out_of_memory(7, config("train.accumulate=4"), 4, 2))
    assert isinstance(out_of_memory(7, config(), 4, 2), HopelessError)


def test_memory_that_lacks_beside_the_steps_is_named() -> None:
    named = memory_named("step 7 was validated", config(), 2)
    with pytest.raises(HopelessError, match="out of memory while step 7 was validated"), named:
        torch.empty(1 << 55)
    named = memory_named("step 7 was validated", config(), 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), named:
        torch.ones(1, 2) @ torch.ones(1, 2)


def test_whoever_sets_what_a_run_goes_on_with_gets_the_same_run() -> None:
    before = model_id({"id": "mixtures"}, config())
    assert model_id({"id": "mixtures"}, config("model.checkpointing=true")) == before
    assert model_id({"id": "mixtures"}, config("train.accumulate=2")) != before


def test_memory_that_lacks_with_fewer_workers_is_no_reason_to_give_up() -> None:
    elastic = config("train.workers=4", "train.min_workers=1", "train.batch_size=16")
    error = out_of_memory(7, elastic, 16, 1)
    assert not isinstance(error, HopelessError)
    assert "16 episodes" in str(error)
    assert "train.min_workers higher, and it goes on" in str(error)


def test_what_a_killed_worker_left_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, used = tmp_path / f"{SCRATCH}{dead.pid}-a", tmp_path / f"{SCRATCH}{os.getpid()}-b"
    for folder in (left, used):
        folder.mkdir()
    sweep_scratch()
    assert not left.exists()
    assert used.exists()


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.cluster  # on one node, but as long as such tests are
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("cluster")
def test_a_loss_that_is_no_number_ends_a_training_that_tries_for_ever(
    dataset: Folder, tmp_path: Path
) -> None:
    wild = config(
        f"workspace='{tmp_path}'",
        "train.workers=1",
        "train.retries=-1",
        "train.lr=1e30",
        "train.clip_norm=1e30",
    )
    run, data = Folder.at(tmp_path / "run"), TrainingData(dataset, dataset, None)
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db", wild)
    with pytest.raises(CscError, match=r"training failed: step 1: the loss .* no number") as caught:
        train(run, data, wild, registry)
    (saved,) = [file.name for file in run.list() if file.name.startswith("not-a-number")]
    assert run.path(saved) in str(caught.value)
