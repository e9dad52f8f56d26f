"""Losses are computed in single precision at least, also inside autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full(x: Tensor) -> Tensor:
    """Return floating numbers in at least single precision; any other tensor as it is."""
    if not x.is_floating_point():
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of tensors without autocast, its positional tensors in full precision.

    To convert the inputs is not enough: autocast would round them again before each product.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(kind, enabled=False):
            exactly: Any = [full(x) if isinstance(x, Tensor) else x for x in args]
            return function(*exactly, **kwargs)

    return wrapper
