"""What an array of microphones adds to a model that was trained on single channels.

    python -m tests.benchmarks.arrays --model FOLDER_OR_URI [--config FILE] [--set key=value]
        [--microphones 2 4 6] [--mixtures 20] [--seconds 4] [--seed 1]

Two talkers of the test split of a workspace's store stand around a linear array, 5 cm from one
microphone to the next, in rooms by the image source method. Rooms, places and words are the same
for every number of microphones and every reverberation time. Both talkers are as loud at the first
microphone, and each microphone has noise of its own, 30 dB below their sum.

A figure is the SI-SDR of a voice less that of the mixture at the first microphone, in dB, both
against that talker's image there, reverberation included: the mean over the two talkers and over
the mixtures, with the 95 % interval of a bootstrap over mixtures. The model hears the first
microphone alone, and which slot is whose is known. Nothing was trained on any room.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from csc_model.beamform import beamform
from csc_model.losses import si_snr_db
from csc_model.metrics import interval
from csc_model.model import CSC
from jobs.config import load_config
from jobs.console import progress
from jobs.datasets import find_dataset
from jobs.scoring import matched, padded
from jobs.verify import load_model
from pipeline.arrays import ArrayConfig, array_recipe, array_scene
from pipeline.audio import to_float
from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.shards import read_catalogue
from pipeline.sides import from_store
from pipeline.speech import active_level_dbfs
from pipeline.storage import Folder

MICROPHONES, MOST = (2, 4, 6), 6
RT60_S = (0.2, 0.4, 0.6)
FLOORS_DB = (-6.0,)
REPLICATES = 1000

Gains = dict[tuple[str, int | None], dict[float, list[float]]]
"""By system and microphones, by reverberation time, of each mixture, in dB."""


def talkers(store: Folder, count: int, seconds: float, seed: int) -> Iterator[NDArray[np.float64]]:
    """Give the words of two test speakers at a time, `(source, time)`, equally loud."""
    rows, length = read_catalogue(store), round(seconds * SAMPLE_RATE_HZ)
    usable = (rows["kind"].to_numpy() == "speech") & (rows["split"].to_numpy() == "test")
    rows = rows.filter(pa.array(usable)).filter(pc.field("num_samples") >= length)
    speakers = rows["speaker_id"].to_numpy()
    if len(set(speakers)) < 2:
        raise CscError(f"{store.uri}: no two test speakers talk for {seconds} s: give --seconds")
    read = from_store(store)
    for index in range(count):
        draws = Draws(stream_key(seed, "talkers"), index)
        one = draws.below(len(rows))
        others = np.flatnonzero(speakers != speakers[one])
        other = int(others[draws.below(len(others))])
        spoken = [to_float(pcm[:length]) for pcm in read(rows.take([one, other]))]
        yield np.stack([x * 10 ** (-active_level_dbfs(x) / 20) for x in spoken]).astype(np.float64)


def scene(dry: NDArray[np.float64], index: int, rt60_s: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return a mixture `(mic, time)` and the images at the first microphone `(source, time)`."""
    config = ArrayConfig(microphones=MOST, rt60_min_s=rt60_s, rt60_max_s=rt60_s)
    made = array_scene(array_recipe(seed, index, config), dry, seed, index)
    return torch.from_numpy(made.mixture).float(), torch.from_numpy(made.images).float()


@torch.inference_mode()
def gains_db(
    model: CSC, mixture: Tensor, images: Tensor, microphones: Sequence[int]
) -> dict[tuple[str, int | None], float]:
    """Return the improvement by each system and number of microphones."""
    slots = padded(images.numpy(), model.config.num_slots)
    sources = matched(model.sources(mixture[:1]), slots.unsqueeze(0))[0, : len(images)]
    made: dict[tuple[str, int | None], Tensor] = {("the model, one microphone", None): sources}
    for count in microphones:
        heard = mixture[:count]
        made["MVDR", count] = beamform(heard, sources, 0)
        made["MVDR, masks refined", count] = beamform(heard, sources, 0, refine=True)
        for floor_db in FLOORS_DB:
            name = f"MVDR, masks refined, and on it, {floor_db:.0f} dB at least"
            made[name, count] = beamform(heard, sources, 0, floor_db, refine=True)
        made["MVDR by the oracle's mask", count] = beamform(heard, images, 0)
    before = si_snr_db(mixture[0].expand_as(images), images)
    return {
        name: float((si_snr_db(voices.float(), images) - before).mean())
        for name, voices in made.items()
    }


def table(gains: Gains, seed: int) -> str:
    """Return means with their intervals, a row for each system."""
    lines = [
        "| | microphones | " + " | ".join(f"RT60 {rt60_s} s" for rt60_s in RT60_S) + " |",
        "|---" * (2 + len(RT60_S)) + "|",
    ]
    for (name, count), by_time in sorted(gains.items(), key=lambda row: row[0][1] or 0):
        cells = []
        for values in by_time.values():
            drawn = np.random.default_rng(seed).choice(values, (REPLICATES, len(values))).mean(1)
            known = interval(float(np.mean(values)), drawn)
            cells.append(f"{known.value:+.1f} [{known.low:+.1f}, {known.high:+.1f}]")
        lines.append(f"| {name} | {count or 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="given")
    parser.add_argument(
        "--microphones", type=int, nargs="+", default=MICROPHONES, choices=range(1, MOST + 1)
    )
    parser.add_argument("--mixtures", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(told.config, told.given)
    model, store = load_model(told.model, config), find_dataset(None, config).store
    if store is None:
        raise CscError("the store that the dataset was built from is gone")
    gains: Gains = {}
    with progress("mixtures") as advance:
        for index, dry in enumerate(talkers(store, told.mixtures, told.seconds, told.seed)):
            for rt60_s in RT60_S:
                heard = gains_db(model, *scene(dry, index, rt60_s, told.seed), told.microphones)
                for key, gain in heard.items():
                    gains.setdefault(key, {}).setdefault(rt60_s, []).append(gain)
            advance(index + 1, told.mixtures)
    print(table(gains, told.seed))


if __name__ == "__main__":
    main()
