"""PESQ and STOI of separated voices, through their own packages (`pip install 'csc[quality]'`)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from csc_model.model import CSC
from jobs.scoring import matched, padded
from pipeline.extras import extra
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sides import Side

Floats = NDArray[np.float32]
Measure = Callable[[Floats, Floats], float]
"""Of a reference and an estimate, `(time,)` both."""


def measures() -> dict[str, Measure]:
    """Return wide-band PESQ (ITU-T P.862.2) and STOI (Taal et al., 2011).

    Raises:
        CscError: a package is missing.
    """
    pesq, stoi = (
        extra(
            package, "quality", "evaluate.quality needs the package", ", or set evaluate.quality=0"
        )
        for package in ("pesq", "pystoi")
    )

    def pesq_of(reference: Floats, estimate: Floats) -> float:
        try:
            return float(pesq.pesq(SAMPLE_RATE_HZ, reference, estimate, "wb"))
        except pesq.PesqError:  # no utterance is found in one of them
            return float("nan")

    def stoi_of(reference: Floats, estimate: Floats) -> float:
        return float(stoi.stoi(reference, estimate, SAMPLE_RATE_HZ))

    return {"pesq": pesq_of, "stoi": stoi_of}


def quality(model: CSC, sides: Sequence[Side], voices: int) -> dict[str, dict[str, float]]:
    """Return for each measure the means of the target as it was mixed, and as it was separated.

    `voices` is how many there are in each side, no more than the model has slots. What a measure
    cannot tell of is left out.
    """
    known = measures()
    found: dict[str, dict[str, list[float]]] = {
        name: {"mixture": [], "separated": []} for name in known
    }
    for side in sides:
        separated = _target(model, side, voices)
        for name, measure in known.items():
            found[name]["mixture"].append(measure(side.voices[0], side.mixture))
            found[name]["separated"].append(measure(side.voices[0], separated))
    return {
        name: {kind: float(np.nanmean(values)) for kind, values in kinds.items()}
        for name, kinds in found.items()
    }


@torch.inference_mode()
def _target(model: CSC, side: Side, voices: int) -> Floats:
    """Separate a side and return the slot that holds the target, by the best permutation."""
    sources = model.separate(torch.from_numpy(side.mixture))
    references = padded(side.voices[:voices], len(sources))
    return np.asarray(matched(sources[None], references[None])[0, 0].numpy(), np.float32)
