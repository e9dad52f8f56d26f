"""Reaching a Ray cluster: this user's token, and whether versions here and there go together."""

import os
import platform
from pathlib import Path

from pipeline.errors import CscError

TOKEN_FILE = "~/.ray/auth_token"
ANSWER_S = 10.0  # that a server may take for its first answer


def authorization() -> dict[str, str]:
    """Return the header with this user's token: Ray's client sends it only if told to.

    The token is looked for where Ray looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        CscError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or TOKEN_FILE).expanduser()
    if not token and (named or path.exists()):
        try:
            token = path.read_text()
        except OSError as error:
            raise CscError(
                f"RAY_AUTH_TOKEN_PATH: cannot read {path}: {error.strerror}; name the file with "
                "the cluster's token"
            ) from error
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def check_server(url: str, headers: dict[str, str]) -> None:
    """Assert that a cluster answers, takes the token and has the versions of this installation."""
    import ray
    import requests

    try:
        answer = requests.get(f"{url}/api/v0/cluster_metadata", headers=headers, timeout=ANSWER_S)
    except requests.RequestException as error:
        raise CscError(
            f"no cluster answers at {url}: name its job server with --cluster http://HEAD:8265, "
            "and see whether it runs and a port is forwarded"
        ) from error
    if answer.status_code in (401, 403):
        raise CscError(refusal(url, bool(headers)))
    try:
        found = answer.json()["data"]
        theirs = {"Ray": found["rayVersion"], "Python": found["pythonVersion"]}
    except (ValueError, KeyError, TypeError):
        raise CscError(f"what answers at {url} is no job server of Ray 2.60: check it") from None
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    if _releases(theirs) != _releases(ours):
        raise CscError(
            f"the cluster at {url} has {_releases(theirs)}, and here is {_releases(ours)}: submit "
            "from where they are the same, or give the cluster an image with these"
        )


def _releases(versions: dict[str, str]) -> str:
    """Return versions without what stands for small corrections, which go together."""
    return " and ".join(
        f"{name} {'.'.join(version.split('.')[:2])}" for name, version in versions.items()
    )


def refusal(url: str, sent: bool) -> str:
    """Return what to say where a token was sent and refused, or is asked for."""
    if sent:
        return (
            f"the cluster at {url} refuses your token: have RAY_AUTH_TOKEN_PATH name the file with "
            "the cluster's (and see that RAY_AUTH_TOKEN, which goes first, is not set)"
        )
    return (
        f"the cluster at {url} asks for a token: have RAY_AUTH_TOKEN_PATH name the file that holds "
        "it"
    )
