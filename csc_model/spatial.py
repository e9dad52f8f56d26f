"""Masks that agree with where sounds come from: what an array tells beside what a model hears.

At each frequency a mixture model of directions, of complex angular central Gaussians (Ito, Araki
and Nakatani, 2016), is fitted to what all microphones hear. Its prior is the model's masks, as in
guided source separation (Boeddeker et al., 2018) it is who speaks when: so its classes are known,
and no frequency has to be told from another. Nothing is trained. All is computed at once, a complex
number for each class, microphone, bin and frame.
"""

import torch
from torch import Tensor

ITERATIONS = 4
TRUST = 0.9
"""Share of the given masks in the prior; the rest is even, so that directions may overrule them."""

INDEPENDENT = 3
"""Microphones' worth of evidence in a bin, at most: neighbours hear nearly the same."""

FLOOR = 1e-3  # of covariances with mean eigenvalue 1


def refined(spectrum: Tensor, masks: Tensor) -> Tensor:
    """Return masks `(..., class, bin, frame)` refined by directions; they sum to 1 over classes.

    `spectrum` is complex `(..., mic, bin, frame)`, `masks` `(..., class, bin, frame)` are at least
    0, and what they sum to does not matter. Of a class without any mask nothing is found; where all
    are 0, the others are as likely. Axes in front broadcast. A silent microphone changes nothing,
    and with one that is not the masks stay what they are, evened out.
    """
    live = spectrum.abs().amax((-2, -1)).count_nonzero(-1).clamp_min(1)
    num_live = live.to(masks.dtype)[..., None, None, None]
    sounds = spectrum.transpose(-3, -2)
    sounds = sounds / sounds.abs().square().sum(-2, keepdim=True).sqrt().clamp_min(1e-30)
    sounds = sounds.unsqueeze(-4)  # (..., 1, bin, mic, frame)
    posterior = _prior(masks)
    log_prior, distance = posterior.log(), torch.ones_like(posterior)
    evidence = (INDEPENDENT / num_live).clamp_max(1.0)
    for _ in range(ITERATIONS):
        log_det, distance = _fitted(sounds, posterior / distance, num_live)
        log_likelihood = -log_det.unsqueeze(-1) - num_live * distance.log()
        posterior = (log_prior + evidence * log_likelihood).softmax(-3)
    return posterior


def _prior(masks: Tensor) -> Tensor:
    there = masks.amax((-2, -1), keepdim=True) > 0
    there = (there | ~there.any(-3, keepdim=True)).to(masks.dtype)
    even = there / there.sum(-3, keepdim=True)
    total = masks.sum(-3, keepdim=True)
    given = torch.where(total > 0, masks / total.where(total > 0, 1), even)
    return TRUST * given + (1 - TRUST) * even


def _fitted(sounds: Tensor, weights: Tensor, num_live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-determinants of weighted covariances, and how far each sound is from them.

    Sounds are unit vectors `(..., bin, mic, frame)`, weights `(..., bin, frame)`; determinants
    `(..., bin)`, distances `z^H inv(B) z` `(..., bin, frame)`, of B with a mean eigenvalue of 1.
    """
    spread = (weights.unsqueeze(-2) * sounds) @ sounds.mH
    trace = spread.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None] / num_live[..., None]
    eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
    spread = torch.where(trace > 0, spread / trace.where(trace > 0, 1), eye) + FLOOR * eye
    lower = torch.linalg.cholesky(spread)
    log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).real.log().sum(-1)
    white = torch.linalg.solve_triangular(lower, sounds.expand(*lower.shape[:-1], -1), upper=False)
    distance = torch.view_as_real(white).square().sum((-3, -1))
    return log_det, distance.clamp_min(1e-10)
