"""Runs, model versions and aliases: the only place that talks to MLflow (with `serving.py`)."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from csc_model.config import VARIANT
from jobs.config import Config
from pipeline.errors import CscError
from pipeline.schema import config_hash

MODEL_ID, TRIALS, DATASET, STORE = (
    f"csc.{key}" for key in ("model_id", "trials", "dataset", "store")
)
FORGOTTEN = "csc.forgotten"
EXTRACTION = "csc.extraction"  # as JSON, see `extraction_gate`
CHALLENGER, CHAMPION = "challenger", "champion"
SQLITE = "sqlite:///"
LOCK, TICKET = ".promotion", "ticket:/promotion"
HOLDER, BY = "csc.ticket", "csc.ticket_by"
LONGEST_TAG = 5000


class Version(NamedTuple):
    """A version of the registered model."""

    number: str
    run_id: str
    tags: dict[str, str]


class Ticket(NamedTuple):
    """A turn at promoting."""

    number: int  # lower ones were taken before
    made_ms: int  # by the clock of who dates versions: the server's, or with a database each one's
    holder: str  # a name that nobody else has
    by: str


def masked(uri: str) -> str:
    """Return an address without the password that may stand in it."""
    return re.sub(r"//[^/@]+@", "//***@", uri)


@contextmanager
def _mlflow_errors(uri: str, advice: Mapping[str, str] | None = None) -> Iterator[None]:
    """Explain what MLflow says, with advice by its codes of errors."""
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (
        MlflowException,
        SQLAlchemyError,
        RequestException,
        BotoCoreError,
        ClientError,
        ImportError,  # of what a server's kind of storage needs
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        shown, code = masked(uri), getattr(error, "error_code", "")
        what_to_do = (advice or {}).get(code, "check mlflow.uri and try again")
        raise CscError(f"MLflow at {shown}: {reason.replace(uri, shown)}; {what_to_do}") from error


@contextmanager
def _apart_from(error_code: str) -> Iterator[None]:
    """Let one of MLflow's refusals pass."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != error_code:
            raise


class Registry:
    """MLflow's tracking store and model registry at one address."""

    def __init__(self, uri: str, config: Config) -> None:
        self.uri, self.experiment, self.model = uri, config.mlflow.experiment, config.mlflow.model
        if uri.startswith(SQLITE):
            _check_sqlite(Path(uri.removeprefix(SQLITE)))
        logging.getLogger("alembic").setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # no log line
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        with _mlflow_errors(uri):
            mlflow.set_tracking_uri(uri)
            self._client = mlflow.MlflowClient(uri)

    def create_run(self, model_id: str, config: Config, dataset: dict[str, Any]) -> str:
        """Make the MLflow run of a training and return its id."""
        resolved = config.shown()
        tags = {
            MODEL_ID: model_id,
            DATASET: dataset["id"],
            "csc.variant": VARIANT,
            "csc.config": config_hash(resolved),
        }
        if dataset["store"] is not None:  # it was not imported
            tags[STORE] = dataset["store"]
        with _mlflow_errors(self.uri):
            run = self._client.create_run(self._experiment(), tags=tags, run_name=f"csc-{model_id}")
            run_id = str(run.info.run_id)
            for section in ("model", "train"):
                for key, value in resolved[section].items():
                    self._client.log_param(run_id, f"{section}.{key}", value)
            self._client.log_dict(run_id, resolved, "config.json")
        return run_id

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found:
            return str(found.experiment_id)
        location = None
        if self.uri.startswith(SQLITE):
            database = Path(self.uri.removeprefix(SQLITE)).absolute()
            location = (database.parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(self.experiment, artifact_location=location))

    def log_metrics(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with _mlflow_errors(self.uri):
            entries = [Metric(name, value, now, step) for name, value in metrics.items()]
            self._client.log_batch(run_id, metrics=entries)

    def history(self, run_id: str, metric: str) -> list[float]:
        """Return what was logged of a metric, in the order of the steps, as `logged` does."""
        return [*self.logged(run_id, metric).values()]

    def logged(self, run_id: str, metric: str) -> dict[int, float]:
        """Return what was logged of a metric by the steps, in their order.

        Steps that a resumed run took again count once, as they were taken last.

        Raises:
            CscError: there is no such run, or it has none of that metric.
        """
        with _mlflow_errors(self.uri):
            found = self._client.get_metric_history(run_id, metric)
        if not found:
            raise CscError(f"run {run_id!r} has no {metric}: name a run of {self.uri}")
        last = {entry.step: entry for entry in sorted(found, key=lambda entry: entry.timestamp)}
        return {step: float(last[step].value) for step in sorted(last)}

    def log_folder(self, run_id: str, folder: Path, below: str) -> None:
        """Upload the files of a folder as artifacts of a run."""
        with _mlflow_errors(self.uri):
            self._client.log_artifacts(run_id, str(folder), below)

    def fetch(self, run_id: str, path: str, to: Path) -> Path | None:
        """Download an artifact of a run, or return None if it has none of that name."""
        import mlflow

        with _mlflow_errors(self.uri):
            parent = str(Path(path).parent)
            listed = {item.path for item in self._client.list_artifacts(run_id, parent)}
            if path not in listed:
                return None
            found = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=str(to), tracking_uri=self.uri
            )
        return Path(found)

    def register(self, run_id: str, model: Path, evaluation: Path, tags: dict[str, str]) -> Version:
        """Make a complete model version of a trained and evaluated model: the new challenger.

        Weights travel as safetensors; the pyfunc is code of this package, no pickle.
        """
        import mlflow

        jobs = Path(__file__).parent
        with _mlflow_errors(self.uri):
            with mlflow.start_run(run_id=run_id):
                logged = mlflow.pyfunc.log_model(
                    name="csc",
                    python_model=str(jobs / "serving.py"),
                    artifacts={"model": str(model), "evaluation": str(evaluation)},
                    code_paths=[str(jobs.parent / "csc_model")],
                    pip_requirements=_requirements(),
                )
            if not self._client.search_registered_models(f"name = '{self.model}'"):
                self._client.create_registered_model(self.model)
            made = self._client.create_model_version(
                self.model, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
            )
            self._client.set_registered_model_alias(self.model, CHALLENGER, made.version)
        return Version(str(made.version), run_id, tags)

    def version_of(self, run_id: str, trials_hash: str) -> Version | None:
        """Return the version that a run was registered as with these trials, if any."""
        for version in self.versions():
            if version.run_id == run_id and version.tags.get(TRIALS) == trials_hash:
                return version
        return None

    def versions(self) -> list[Version]:
        """Return all versions of the model."""
        with _mlflow_errors(self.uri):
            return [
                _version(v) for v in self._client.search_model_versions(f"name = '{self.model}'")
            ]

    def aliases_of(self, version: Version) -> list[str]:
        """Return the aliases that point to a version."""
        with _mlflow_errors(self.uri):
            models = self._client.search_registered_models(f"name = '{self.model}'")
        aliases = models[0].aliases if models else {}
        return sorted(alias for alias, number in aliases.items() if str(number) == version.number)

    def by_alias(self, alias: str) -> Version | None:
        """Return the version that an alias points to, if any."""
        with _mlflow_errors(self.uri):
            models = self._client.search_registered_models(f"name = '{self.model}'")
            if not models or alias not in models[0].aliases:
                return None
            return _version(self._client.get_model_version_by_alias(self.model, alias))

    def version(self, name: str) -> Version:
        """Return the version that a number, `v7`, an alias or a `models:/` address names.

        Raises:
            CscError: there is none.
        """
        address = re.fullmatch(r"models:/(?P<model>[^/@]+)[/@](?P<word>.+)", name)
        word = address["word"] if address else name
        versions = {one.number: one for one in self.versions()}
        named = versions.get(re.sub(r"^v(?=\d+$)", "", word)) or self.by_alias(word)
        if named is None or (address and address["model"] != self.model):
            known = ", ".join(sorted(versions, key=int)) or "none"
            raise CscError(f"{self.model} has no version or alias {name!r}; versions: {known}")
        return named

    def model_of(self, version: Version, to: Path) -> Path:
        """Download a version and return the folder that `CSC.load` reads."""
        to.mkdir(parents=True, exist_ok=True)
        return self.download(f"models:/{self.model}/{version.number}", to) / "model"

    def take_ticket(self, holder: str, by: str) -> None:
        """Make a ticket: a version of the model `MODEL.promotion`.

        MLflow gives the numbers of versions one by one, and as long as the model is there none
        again, also after a version was deleted.
        """
        with self._ticket_errors():
            if not self._client.search_registered_models(f"name = '{self._tickets}'"):
                about = f"Do not delete: tickets of those who promote versions of {self.model}."
                with _apart_from("RESOURCE_ALREADY_EXISTS"):
                    self._client.create_registered_model(self._tickets, description=about)
            tags = {HOLDER: holder, BY: by}
            self._client.create_model_version(self._tickets, source=TICKET, tags=tags)

    def tickets(self) -> list[Ticket]:
        """Return the tickets that are held."""
        with self._ticket_errors():
            return [
                _ticket(v) for v in self._client.search_model_versions(f"name = '{self._tickets}'")
            ]

    def drop_ticket(self, ticket: Ticket) -> None:
        """Delete a ticket, if it is still there."""
        with self._ticket_errors(), _apart_from("RESOURCE_DOES_NOT_EXIST"):
            self._client.delete_model_version(self._tickets, str(ticket.number))

    @property
    def _tickets(self) -> str:
        return f"{self.model}{LOCK}"

    def _ticket_errors(self) -> AbstractContextManager[None]:
        advice = {
            "PERMISSION_DENIED": f"who promotes needs the permission MANAGE on {self._tickets}: "
            "ask who made it, or an administrator",
            "INVALID_PARAMETER_VALUE": f"let the server take {TICKET} as a version's source "
            "(MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX)",
        }
        return _mlflow_errors(self.uri, advice)

    def tag(self, version: Version, tags: dict[str, str]) -> None:
        """Set tags of a version."""
        with _mlflow_errors(self.uri):
            for key, value in tags.items():
                shown = value[:LONGEST_TAG]
                self._client.set_model_version_tag(self.model, version.number, key, shown)

    def move_alias(self, alias: str, version: Version) -> None:
        """Point an alias to a version."""
        with _mlflow_errors(self.uri):
            self._client.set_registered_model_alias(self.model, alias, version.number)

    def log_decision(self, run_id: str, decision: dict[str, Any], name: str) -> None:
        """Keep a decision of the gate with the run, also a refusal."""
        with _mlflow_errors(self.uri):
            self._client.log_dict(run_id, decision, name)

    def read_artifact(self, version: Version, path: str) -> str | None:
        """Return a text file of a version, or None if it has none of that name."""
        import mlflow

        root = f"models:/{self.model}/{version.number}/artifacts"
        folder = f"{root}/{path.rpartition('/')[0]}"
        with _mlflow_errors(self.uri):
            listed = mlflow.artifacts.list_artifacts(artifact_uri=folder)
            if not any(item.path.endswith(path) for item in listed):
                return None
            return str(mlflow.artifacts.load_text(f"{root}/{path}"))

    def download(self, model_uri: str, to: Path) -> Path:
        """Download a registered model and return the folder that `CSC.load` reads."""
        import mlflow

        with _mlflow_errors(self.uri):
            found = mlflow.artifacts.download_artifacts(
                artifact_uri=model_uri, dst_path=str(to), tracking_uri=self.uri
            )
        return Path(found) / "artifacts"


def _version(version: Any) -> Version:
    return Version(str(version.version), str(version.run_id), dict(version.tags))


def _ticket(version: Any) -> Ticket:
    # One that others are deleting at this moment may be seen without its tags.
    holder, by = (version.tags.get(key, "somebody") for key in (HOLDER, BY))
    return Ticket(int(version.version), int(version.creation_timestamp), holder, by)


def _requirements() -> list[str]:
    """Return what a server needs to load the model: this environment's versions."""
    from importlib.metadata import version

    names = ("mlflow", "torch", "numpy", "safetensors", "pydantic", "soundfile")
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


def _check_sqlite(path: Path) -> None:
    """Say at once, and clearly, when the file is locked or is no database."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise CscError(
            f"MLflow's database {path}: {error}; close the program that uses it, or set "
            "mlflow.uri to another"
        ) from error
