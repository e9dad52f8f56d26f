"""Changing a file that others may be changing at the same time."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import tenacity

from pipeline.errors import CscError
from pipeline.refusals import PATIENCE_S, explained
from pipeline.storage import Folder, UnconditionalError

Change = Callable[[bytes | None], bytes]
"""Makes what a file is to hold of what it holds, None where there is no file."""


def update(folder: Folder, name: str, change: Change) -> bool:
    """Change a file in a way that keeps what others change at the same time; tell if it could.

    Where it is local they wait for each other. On S3 it is written on the condition that it is
    what was read, and read again where others were sooner; where the answer to a write was lost,
    `change` is given what it made itself. Of stores that say that they know no conditions, False is
    returned: what was written last counts there, as it does where a store takes no notice of them.

    Raises:
        CscError: it cannot be read or written, or others change it all the time.
    """
    if folder.is_local:
        _alone(folder, name, change)
        return True
    try:
        _when_unchanged(folder, name, change)
    except UnconditionalError:
        folder.put(name, change(_read(folder, name)))
        return False
    return True


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except CscError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _alone(folder: Folder, name: str, change: Change) -> None:
    path = Path(folder.path(name))
    lock = path.with_name(f".{path.name}.lock")
    with explained("write", str(lock)):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
    with held:
        with explained("lock", str(lock)):
            fcntl.flock(held, fcntl.LOCK_EX)
        folder.put(name, change(_read(folder, name)))


def _when_unchanged(folder: Folder, name: str, change: Change) -> None:
    def attempt() -> bool:
        version = folder.version(name)  # before it is read: a later one is refused, and no loss
        old = None if version is None else _read(folder, name)  # it may be removed meanwhile
        return folder.replace(name, change(old), version)

    try:
        tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda written: not written),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
            stop=tenacity.stop_after_delay(PATIENCE_S),
        )(attempt)
    except tenacity.RetryError as error:
        raise CscError(
            f"{folder.path(name)}: others change it all the time; run again when they are done"
        ) from error
