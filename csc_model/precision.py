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


def _full_if_tensor(x: object) -> object:
    return full(x) if isinstance(x, Tensor) else x


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of tensors without autocast, on them in full precision.

    To convert the inputs is not enough: autocast would round them again before each product.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(kind, enabled=False):
            placed: Any = [_full_if_tensor(x) for x in args]
            named: Any = {name: _full_if_tensor(x) for name, x in kwargs.items()}
            return function(*placed, **named)

    return wrapper
