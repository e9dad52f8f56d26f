"""Mixture-invariant training (MixIT; Wisdom et al., 2020): separation without a known source.

A model hears the sum of two mixtures. Its outputs, each given to one of the two, must add up to
them again; which output goes where is the assignment that costs least.
"""

from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from csc_model.precision import exact

FLOOR = 1e-3  # error power, relative to the mixture's, below which nothing is gained: 30 dB
TINY = 1e-8
Search = Literal["all", "least_squares"]


@lru_cache(16)
def mixing_matrices(num_outputs: int, device: torch.device | None = None) -> Tensor:
    """Return every way to give outputs to two mixtures: 0 or 1, `(2 ** output, 2, output)`.

    Copied to a device once, as a copy makes it wait.
    """
    with torch.inference_mode(False):  # so that what is kept may be used in training
        choice = torch.tensor(list(product((0, 1), repeat=num_outputs)), device=device)
        return torch.stack([1 - choice, choice], 1)


@exact
def mixing_costs(estimates: Tensor, mixtures: Tensor, mixing: Tensor) -> Tensor:
    """Return minus the mean SNR, in dB, of both mixtures as a mixing puts them together.

    `estimates` `(batch, output, time)`, `mixtures` `(batch, 2, time)`, `mixing` `(batch or 1, way,
    2, output)`; the costs are `(batch, way)`. The SNR is the thresholded one of Wisdom et al.
    (2020), of at most 30 dB. It is computed by inner products, once for all ways:
    `|x - A s|^2 = <x, x> - 2 A <s, x> + A <s, s> A'`.
    """
    mixing = mixing.to(estimates.dtype)
    power = mixtures.square().sum(-1).unsqueeze(1)
    cross = (mixtures @ estimates.transpose(-1, -2)).unsqueeze(1)
    gram = (estimates @ estimates.transpose(-1, -2)).unsqueeze(1)
    rebuilt = ((mixing @ gram) * mixing).sum(-1)
    error = (power - 2 * (mixing * cross).sum(-1) + rebuilt).clamp_min(0)
    snr_db = 10 * torch.log10((power + TINY) / (error + FLOOR * power + TINY))
    return -snr_db.mean(-1)


def mixit_loss(
    estimates: Tensor, mixtures: Tensor, search: Search = "all"
) -> tuple[Tensor, Tensor]:
    """Return what the best assignment costs in dB `(batch,)`, and it: `(batch, 2, output)`.

    Shapes as in `mixing_costs`. `all` tries all `2 ** output` ways, 16 for four outputs;
    `least_squares` takes that of `least_squares_mixing`.
    """
    if search == "least_squares":
        mixing = least_squares_mixing(estimates, mixtures)
        return mixing_costs(estimates, mixtures, mixing.unsqueeze(1)).squeeze(1), mixing
    ways = mixing_matrices(estimates.shape[1], estimates.device)
    least, index = mixing_costs(estimates, mixtures, ways.unsqueeze(0)).min(-1)
    return least, ways[index]


@torch.no_grad()
@exact
def least_squares_mixing(estimates: Tensor, mixtures: Tensor) -> Tensor:
    """Return an assignment `(batch, 2, output)` in closed form, for outputs too many to try all.

    Least squares over real matrices, then each output goes where its weight is largest (Wisdom et
    al., 2021, "Sparse, efficient, and semantic mixture invariant training"). Never cheaper than the
    best of all, and the same once the outputs are like the sources.
    """
    gram = estimates @ estimates.transpose(-1, -2)
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * 1e-6 + TINY
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Nothing is checked, which would make a device wait: the ridge keeps it solvable.
    weights, _ = torch.linalg.solve_ex(gram, estimates @ mixtures.transpose(-1, -2))
    choice = weights.argmax(-1)
    return torch.stack([1 - choice, choice], 1)
