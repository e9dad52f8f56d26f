"""Weights of losses by the gradients that they send into the parameters they share."""

from collections.abc import Iterable, Sequence

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from csc_model.gather import total, world_size


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the norm of each loss's gradient by the parameters, of all ranks' mean gradient."""
    norms = []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([part.flatten() for part in parts if part is not None])
        norms.append((total(flat) / world_size()).norm())
    return torch.stack(norms)


class GradientBalance(nn.Module):
    """Keeps the gradient norms of several losses in proportion, the first loss having weight 1.

    The norms are smoothed exponentially and measured anew every so many steps of training, since
    each measure costs a backward pass per loss (the idea of GradNorm, Chen et al., 2018, in closed
    form; reconstruction).
    """

    norms: Tensor
    steps: Tensor

    def __init__(self, num_losses: int, *, every: int = 20, decay: float = 0.9) -> None:
        super().__init__()
        functorch.donated_buffer = False  # else a compiled graph is gone through once alone
        self.every, self.decay = every, decay
        self.register_buffer("norms", torch.zeros(num_losses))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._taken: int | None = 0  # the same, where no device is waited for; None: ask it
        self.register_load_state_dict_post_hook(_ask_again)  # type: ignore[no-untyped-call]

    def forward(
        self, losses: Sequence[Tensor], parameters: Iterable[Tensor], proportions: Sequence[float]
    ) -> Tensor:
        """Return weights `(loss,)`, constants, with `weight * norm` as the proportions are."""
        if self.training and torch.is_grad_enabled():
            if self._taken is None:
                self._taken = int(self.steps)
            if self._taken % self.every == 0:
                norms = gradient_norms(losses, list(parameters)).to(self.norms.dtype)
                keep = self.decay * (self.norms > 0)  # a loss is known from its first gradient on
                self.norms.copy_(keep * self.norms + (1 - keep) * norms)
            self.steps.add_(1)
            self._taken += 1
        wanted = torch.stack([self.norms.new_full((), value) for value in proportions])
        weights = wanted / wanted[0] * self.norms[0] / self.norms.clamp_min(1e-12)
        return torch.where(self.norms > 0, weights, wanted / wanted[0])


def _ask_again(module: nn.Module, keys: object) -> None:
    """Have a balance that was loaded look up its step."""
    del keys
    assert isinstance(module, GradientBalance), "where it is registered"
    module._taken = None
