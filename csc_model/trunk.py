"""What the model asks of a trunk, and the way to one by its name.

A trunk lays frames out as its blocks work on them, and joins them again. It is built of stacks of
blocks that keep the shape: the shared stack and those of the two heads differ in number only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csc_model.config import TRUNKS, ModelConfig


class Stack(nn.Sequential):
    """Blocks one after the other.

    With `checkpointing`, what lies within a block is not kept for the backward pass but computed
    again: the memory of one block, at the price of a second forward pass. Losses and gradients are
    the same, dropout included.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, checkpointing: bool) -> None:
        super().__init__(*blocks)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.run(block, x)
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """Call a block, with or without its inner values being kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class Trunk(nn.Module, ABC):
    """The shared stack; heads take further blocks from `stack`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = self.stack(config.shared_blocks)

    @abstractmethod
    def stack(self, num_blocks: int) -> Stack:
        """Return `num_blocks` further blocks; their output has the shape of their input."""

    def split(self, frames: Tensor) -> Tensor:
        """Lay frames `(batch, channel, frame)` out as the blocks expect them."""
        return frames

    def join(self, x: Tensor, num_frames: int) -> Tensor:  # noqa: ARG002 - others need the number
        """Undo `split`."""
        return x


def build_trunk(config: ModelConfig) -> Trunk:
    """Return the trunk that `config.trunk` names."""
    module, _, name = TRUNKS[config.trunk].rpartition(".")
    trunk: type[Trunk] = getattr(import_module(module), name)
    return trunk(config)
