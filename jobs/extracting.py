"""One voice out of a recording of any length: `csc extract`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csc_model.model import ACTIVE, CSC
from csc_model.streaming import CONTEXT_S, Pace
from jobs.console import Advance, complain, progress
from jobs.listening import listen, told_by_the_second
from jobs.scoring import enrol
from jobs.voice_files import write_voices
from pipeline.audio import load_blocks
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.storage import Folder

STRETCH_S = 4.0  # in which some words are heard, whatever is around them


class Extracted(NamedTuple):
    """What was let through."""

    seconds: float
    level_db: float  # over the mixture
    most_db: float  # the same, in the stretch of STRETCH_S where it is most


def check_extracts(model: CSC, name: str) -> None:
    """Assert that a model has an extractor.

    Raises:
        CscError: it has none.
    """
    if model.config.extractor == "none":
        raise CscError(
            f"{name} has no extractor: train one for it, with train.task=extract, "
            f"model.extractor=film and train.init_from={name}; or csc separate gives all voices"
        )


def voice_of_files(model: CSC, paths: Sequence[str]) -> Tensor:
    """Return the unit vector `(dim,)` of somebody's recordings.

    One in which several people seem to speak is complained of, and used.

    Raises:
        CscError: a file cannot be used, or is silent or too short.
    """
    clean = []
    for path in paths:
        heard = listen(model, path)
        active = [f"{one:.0%}" for one in heard.activity[:-1] if one >= ACTIVE]
        if len(active) > 1:
            complain(
                f"{path}: {len(active)} people seem to speak in it (probabilities "
                f"{', '.join(active)}): enrol by recordings of the one voice alone"
            )
        clean.append(heard.vectors)
    return torch.from_numpy(enrol(np.stack(clean)))


def extract_file(
    model: CSC, mixture: str, vector: Tensor, to: Path, chunk_s: float, look_ahead_s: float
) -> Extracted:
    """Write the voice of a vector in a recording as a WAV file, at its level there.

    Raises:
        CscError: the recording cannot be used, or the file cannot be written.
    """
    heard, kept = Energy(), Energy()

    def blocks(advance: Advance) -> Iterator[Tensor]:
        for block in told_by_the_second(mixture, load_blocks(mixture), advance):
            heard.add(block)
            yield torch.from_numpy(block)

    def voice() -> Iterator[Tensor]:
        pace = Pace.of(SAMPLE_RATE_HZ, CONTEXT_S, chunk_s, look_ahead_s)
        with progress(f"{Path(mixture).name}: seconds") as advance:
            for piece in model.extracting(vector, blocks(advance), pace):
                kept.add(piece.numpy())
                yield piece.unsqueeze(0)

    write_voices(Folder.at(to.parent), [to.name], voice())
    return Extracted(heard.num_samples / SAMPLE_RATE_HZ, *levels_db(kept, heard))


class Energy:
    """The energy of a signal in each stretch of `STRETCH_S`, as its blocks come."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.by_stretch: list[float] = []

    def add(self, block: NDArray[np.float32]) -> None:
        """Count a block `(time,)` in."""
        length = round(STRETCH_S * SAMPLE_RATE_HZ)
        while len(block):
            if self.num_samples % length == 0:
                self.by_stretch.append(0.0)
            part = block[: length - self.num_samples % length]
            self.by_stretch[-1] += float(np.square(part, dtype=np.float64).sum())
            self.num_samples, block = self.num_samples + len(part), block[len(part) :]


def levels_db(kept: Energy, heard: Energy) -> tuple[float, float]:
    """Return the level in dB over a mixture of what was kept of it: of all, and where it is most.

    A stretch of the mixture that is quieter than the mean, or at its end shorter, counts as such a
    one: what leaks through in a pause says nothing of who speaks.
    """
    left, whole = np.array(kept.by_stretch), np.array(heard.by_stretch)
    share = (left / np.maximum(whole, whole.mean())).max()
    shares = np.array([left.sum() / whole.sum(), share])
    all_db, most_db = (10 * np.log10(shares + 1e-12)).tolist()
    return all_db, most_db
