"""The workspace: where each stage puts what it made, and who is at work there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.config import Config
from jobs.registry import Registry
from pipeline.errors import CscError
from pipeline.storage import Folder

LOCK_FILE = ".lock"


class Workspace:
    """A folder with `utterances`, `mixtures`, `models`, `evaluations`, `embeddings` below."""

    def __init__(self, config: Config) -> None:
        self.folder = Folder.at(config.workspace)
        self.utterances = self.folder.child("utterances")
        self.mixtures = self.folder.child("mixtures")
        self.models = self.folder.child("models")
        self.evaluations = self.folder.child("evaluations")
        self.embeddings = self.folder.child("embeddings")
        self._mlflow = config.mlflow.uri

    @property
    def mlflow_uri(self) -> str:
        """Return where MLflow keeps its runs.

        Raises:
            CscError: the workspace is remote and no server is named.
        """
        if self._mlflow:
            return self._mlflow
        if self.folder.is_local:
            return f"sqlite:///{self.folder.uri}/mlflow.db"
        raise CscError(
            f"{self.folder.uri} cannot hold MLflow's SQLite file: set mlflow.uri to a server"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from writing here at the same time (local workspaces only).

        The lock goes with the process, however it ends.

        Raises:
            CscError: the folder cannot be written to, or another command works in it.
        """
        if not self.folder.is_local:
            yield
            return
        import fcntl

        path = Path(self.folder.uri) / LOCK_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CscError(
                f"cannot write to the workspace {self.folder.uri}: {error.strerror}; "
                "choose another with --workspace, or make it writable"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CscError(
                    f"another csc is at work in {self.folder.uri}: wait for it, or use --workspace"
                ) from error
            yield
        finally:
            os.close(handle)


def registry_of(config: Config) -> Registry:
    """Return the registry of a workspace that has one.

    Raises:
        CscError: it has none yet.
    """
    workspace = Workspace(config)
    if config.mlflow.uri is None and not workspace.folder.exists("mlflow.db"):
        raise CscError(f"{workspace.folder.uri} has no model yet: run csc run, or give --workspace")
    return Registry(workspace.mlflow_uri, config)
