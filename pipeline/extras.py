"""Packages that not everybody needs: an extra of `csc` brings each."""

from importlib import import_module
from typing import Any

from pipeline.errors import CscError


def extra(package: str, name: str, needed: str, otherwise: str = "") -> Any:
    """Import a package; `needed` says by what or for what it is, and ends in "package".

    Raises:
        CscError: it is missing; the message says which extra has it, and what to do `otherwise`.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise CscError(f"{needed} {error.name}: pip install 'csc[{name}]'{otherwise}") from error
