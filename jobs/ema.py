"""A running average of the weights, which verifies better than the weights of the last step."""

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's state, corrected for its beginning.

    Its decay at update n is min(decay, (1 + n) / (10 + n)), so that early weights are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {name: t.detach().clone() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of a step."""
        self.updates += 1
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - kept)
            else:
                self.state[name].copy_(tensor)

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from a checkpoint."""
        self.updates = updates
        for name, tensor in state.items():
            self.state[name].copy_(tensor)
