"""One voice out of a recording of any length: `csc extract`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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


class Extracted(NamedTuple):
    """What was let through."""

    seconds: float
    level_db: float  # over the mixture


def check_extracts(model: CSC, name: str) -> None:
    """Assert that a model has an extractor.

    Raises:
        CscError: it has none.
    """
    if model.config.extractor == "none":
        raise CscError(
            f"{name} has no extractor: train one for it, with train.task=extract, "
            f"model.extractor=film, build.mixing.absent_share=0.1 and train.init_from={name}; or "
            "csc separate gives all voices"
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
    heard, kept, done = 0.0, 0.0, 0

    def blocks(advance: Advance) -> Iterator[Tensor]:
        nonlocal heard, done
        for block in told_by_the_second(mixture, load_blocks(mixture), advance):
            heard += float(np.square(block, dtype=np.float64).sum())
            done += len(block)
            yield torch.from_numpy(block)

    def voice() -> Iterator[Tensor]:
        nonlocal kept
        pace = Pace.of(SAMPLE_RATE_HZ, CONTEXT_S, chunk_s, look_ahead_s)
        with progress(f"{Path(mixture).name}: seconds") as advance:
            for piece in model.extracting(vector, blocks(advance), pace):
                kept += float(piece.double().square().sum())
                yield piece.unsqueeze(0)

    write_voices(Folder.at(to.parent), [to.name], voice())
    return Extracted(done / SAMPLE_RATE_HZ, 10 * math.log10((kept + 1e-12) / (heard + 1e-12)))
