"""What stores refuse: asked for again while it may pass, and explained where it does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import tenacity
from aiohttp import ClientError as ConnectionLost
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from pipeline.errors import CscError

PATIENCE_S = 60.0  # how long a remote store may refuse before it counts as down
FEWEST_ATTEMPTS = 3  # even where each of them takes longer than that
FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NoCredentialsError,
    PartialCredentialsError,
    ParamValidationError,
)
FAILURES = (OSError, BotoCoreError, ClientError, ConnectionLost)
# What S3 says of a write on a condition: others were sooner; or that it knows no such thing.
CHANGED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey")
UNKNOWN = ("NotImplemented", "501")
T = TypeVar("T")


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn the operating system's errors into messages that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CscError(f"cannot {action} {uri}: it does not exist; check the path") from error
    except ImportError as error:
        raise CscError(f"cannot {action} {uri}: {error}; install it") from error
    except FAILURES as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CscError(
            f"cannot {action} {uri}: {reason}; check the address, free space and permissions, "
            "then run again"
        ) from error


def patiently(call: Callable[[], T]) -> T:
    """Ask a remote store again as long as what it says may pass."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, FAILURES) and not isinstance(error, FINAL)
        ),
        wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10),
        stop=tenacity.stop_all(
            tenacity.stop_after_delay(PATIENCE_S), tenacity.stop_after_attempt(FEWEST_ATTEMPTS)
        ),
        reraise=True,
    )(call)


def code_of(error: BaseException) -> str:
    """Return what S3 calls a refusal, which other classes of errors stand for; empty if none."""
    for one in (error, error.__cause__):
        if isinstance(one, ClientError):
            return str(one.response.get("Error", {}).get("Code", ""))
    return ""


def of_one_file(error: BaseException) -> bool:
    """Tell a file that is not to be had from credentials that open nothing."""
    code = code_of(error)
    if isinstance(error, PermissionError) and code:
        return code in ("AccessDenied", "InvalidObjectState", "403")
    return isinstance(error, FileNotFoundError | PermissionError)
