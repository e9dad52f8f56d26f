"""The loaders that `tests.benchmarks.loader` compares with, over the same audio.

A sample is an episode: the dry int16 sources, two to a mixture, and their gains. Each tool stores
them uncompressed in its own way and gives them shuffled in batches of BATCH, in this process.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pipeline.audio import Pcm
from pipeline.storage import Folder
from tests.benchmarks.peers import CONDITIONS, LENGTH, SECONDS, spent

BATCH = 16
VOICES = 2  # of a mixture
LINES = CONDITIONS * VOICES
SHUFFLED = 64  # samples from which the next is drawn, where a tool shuffles in a buffer
SHARD_BYTES = 1 << 27
Pair = tuple[Tensor, Tensor]
"""Dry sources, int16 (episode, line, time), and their gains in dB, float32 (episode, line)."""


class Peer(NamedTuple):
    """How a tool stores a dataset, and how it gives the batches of an epoch."""

    package: str
    write: Callable[[Folder, Path], None]
    read: Callable[[Folder, Path], Callable[[int], Iterator[Pair]]]


def shard_paths(dataset: Folder) -> list[str]:
    names = sorted(file.name for file in dataset.list())
    return [
        dataset.path(name) for name in names if name.startswith("train-") and "done" not in name
    ]


def decoded(table: pa.Table) -> tuple[Pcm, NDArray[np.float32]]:
    """Return the sources and gains of rows of our shards, which have LINES lines each."""
    cells = [np.frombuffer(cell.as_buffer(), "<i2") for cell in table["pcm"]]
    gains_db = table["lines"].combine_chunks().flatten().field("gain_db").to_numpy()
    return np.stack(cells).reshape(-1, LINES, LENGTH), gains_db.reshape(-1, LINES)


def samples(dataset: Folder) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the episodes of a dataset in their order."""
    for path in shard_paths(dataset):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            sources, gains_db = decoded(file.read_row_group(group, columns=["pcm", "lines"]))
            for one, its_gains_db in zip(sources, gains_db, strict=True):
                yield {"sources": one, "gains": its_gains_db}


def added(batch: Pair) -> Tensor:
    """Make float mixtures of a batch, as one does in torch."""
    sources, gains_db = batch
    amplitude = torch.pow(10.0, gains_db / 20) / 32768
    scaled = sources.float() * amplitude.unsqueeze(-1)
    return scaled.view(-1, CONDITIONS, VOICES, LENGTH).sum(2)


def write_mds(dataset: Folder, root: Path) -> None:
    from streaming import MDSWriter

    columns = {"sources": f"ndarray:int16:{LINES},{LENGTH}", "gains": f"ndarray:float32:{LINES}"}
    with MDSWriter(out=str(root), columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in samples(dataset):
            writer.write(sample)


def read_mds(dataset: Folder, root: Path) -> Callable[[int], Iterator[Pair]]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    warnings.filterwarnings("ignore", message=".*not writable.*")
    stored = StreamingDataset(local=str(root), shuffle=True, batch_size=BATCH)
    loader = DataLoader(stored, batch_size=BATCH, num_workers=0, drop_last=True)
    return lambda _: ((batch["sources"], batch["gains"]) for batch in loader)


def write_tar(dataset: Folder, root: Path) -> None:
    from webdataset import ShardWriter

    root.mkdir()
    with ShardWriter(str(root / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for place, sample in enumerate(samples(dataset)):
            named = {f"{name}.npy": array for name, array in sample.items()}
            writer.write({"__key__": f"{place:07d}"} | named)


def read_tar(dataset: Folder, root: Path) -> Callable[[int], Iterator[Pair]]:
    from webdataset import WebDataset

    tars = [str(path) for path in sorted(root.glob("*.tar"))]
    stored = WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(SHUFFLED).decode()
    batches = stored.to_tuple("sources.npy", "gains.npy").batched(BATCH, partial=False)

    def epoch(number: int) -> Iterator[Pair]:
        for sources, gains_db in batches:
            yield torch.as_tensor(sources), torch.as_tensor(gains_db)

    return epoch


def write_nothing(dataset: Folder, root: Path) -> None:
    """Ray Data reads the very shards of the dataset."""


def read_ray(dataset: Folder, root: Path) -> Callable[[int], Iterator[Pair]]:
    import ray
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Decode(ArrowBatchCollateFn):
        def __call__(self, batch: pa.Table) -> dict[str, Tensor]:
            sources, gains_db = decoded(batch.combine_chunks())
            return {"sources": torch.from_numpy(sources), "gains": torch.tensor(gains_db)}

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(shard_paths(dataset), columns=["pcm", "lines"], shuffle="files")

    def epoch(number: int) -> Iterator[Pair]:
        for batch in rows.iter_torch_batches(
            batch_size=BATCH,
            local_shuffle_buffer_size=SHUFFLED,
            local_shuffle_seed=number,
            collate_fn=Decode(),
            drop_last=True,
        ):
            yield batch["sources"], batch["gains"]

    return epoch


PEERS = {
    "mosaicml-streaming": Peer("mosaicml-streaming", write_mds, read_mds),
    "webdataset": Peer("webdataset", write_tar, read_tar),
    "Ray Data": Peer("ray", write_nothing, read_ray),
}


def limits(dataset: Folder, repeats: int) -> None:
    """Print how fast the bytes of a dataset can be copied, hashed and read at all."""
    groups = [group for path in shard_paths(dataset) for group in _groups(path)]
    episodes = sum(pq.ParquetFile(path).metadata.num_rows for path in shard_paths(dataset))
    warm = np.empty(max(map(len, groups)), np.uint8)
    ways: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
        "copy into warm memory": lambda group: np.copyto(warm[: len(group)], group),
        "copy into fresh memory": lambda group: group.copy(),
        "xxh3": lambda group: xxhash.xxh3_64_intdigest(group.data),
        "sha256": lambda group: hashlib.sha256(group.data).digest(),
    }
    passes: dict[str, Callable[[], Any]] = {
        name: functools.partial(lambda way: [way(group) for group in groups], way)
        for name, way in ways.items()
    }
    passes["reading the column with pyarrow"] = lambda: [_groups(p) for p in shard_paths(dataset)]
    num_bytes = sum(map(len, groups))
    for name, once in passes.items():
        once()
        took = float(np.median([spent(once).core for _ in range(repeats)]))
        done = episodes * CONDITIONS * SECONDS / took
        print(f"{name:30} {'':12} {done:12.0f}   {num_bytes / took / 1e9:5.1f} GB/s", flush=True)


def _groups(path: str) -> list[np.ndarray[Any, Any]]:
    """Return the bytes of the audio of each row group, mapped."""
    file = pq.ParquetFile(path, memory_map=True)
    tables = [
        file.read_row_group(group, columns=["pcm"], use_threads=False)["pcm"].combine_chunks()
        for group in range(file.num_row_groups)
    ]
    return [np.frombuffer(column.buffers()[2], np.uint8) for column in tables]
