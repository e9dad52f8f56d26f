"""Which dataset a command is about, and the store that it was built from."""

import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

from jobs.config import Config
from jobs.workspace import Workspace
from pipeline.build import dataset_id
from pipeline.corpora import list_corpora
from pipeline.errors import CscError
from pipeline.plan import forgotten
from pipeline.shards import INDEX
from pipeline.storage import Folder
from pipeline.store import plan_ingest, store_id

STORE_INDEX = re.compile(r"[^/]+/generation-\d+/index\.json")


class Found(NamedTuple):
    """A dataset, and what of its origin is still there."""

    folder: Folder
    store: Folder | None  # the generation that it was built from
    forgotten: frozenset[str]  # utterances that were removed from the workspace on request

    @property
    def name(self) -> str:
        return posixpath.basename(self.folder.uri)


def find_dataset(name: str | None, config: Config) -> Found:
    """Find a dataset by its id, a prefix of it that no other has, its path, or its configuration.

    Raises:
        CscError: there is none, or several; the message lists the ones that there are.
    """
    mixtures = Workspace(config).mixtures
    folder = _of_config(config) if name is None else _by_name(name, mixtures)
    if not folder.exists(INDEX):
        raise CscError(f"{folder.uri} has no {INDEX}: the dataset is not finished, or is none")
    wanted = folder.read_json(INDEX)
    utterances = [Workspace(config).utterances]
    beside = Folder(posixpath.dirname(folder.uri))
    if posixpath.basename(beside.uri) == "mixtures" and beside != mixtures:
        utterances.append(Folder(posixpath.dirname(beside.uri)).child("utterances"))
    store = next((one for root in utterances for one in _stores(root, wanted)), None)
    gone = (forgotten(root.child("any")).utterances for root in utterances)
    return Found(folder, store, frozenset[str]().union(*gone))


def _by_name(name: str, mixtures: Folder) -> Folder:
    ids = _ids(mixtures)
    matches = [name] if name in ids else [one for one in ids if name and one.startswith(name)]
    if len(matches) == 1:
        return mixtures.child(matches[0])
    if len(matches) > 1:
        raise CscError(f"{name!r} is the beginning of {', '.join(matches)}: write more of it")
    if "/" in name or (Path(name) / INDEX).is_file():
        return Folder.at(name)
    hint = f"; to show an episode, csc show DATASET {name}" if name.isdigit() else ""
    raise CscError(f"there is no dataset {name!r}: {_choice(mixtures, ids)}{hint}")


def _of_config(config: Config) -> Folder:
    """Return the dataset that `csc build` makes of a configuration, and make nothing."""
    mixtures = Workspace(config).mixtures
    ids = _ids(mixtures)
    try:
        root = Workspace(config).utterances.child(store_id(config.ingest))
        planned = plan_ingest(root, config.ingest, list_corpora(config.ingest))
    except CscError as error:
        raise CscError(f"{error}; or name a dataset: {_choice(mixtures, ids)}") from error
    if planned.finished:
        name = dataset_id(planned.store.read_json(INDEX), config.build, config.seed)
        if name in ids:
            return mixtures.child(name)
    choice = _choice(mixtures, ids)
    raise CscError(f"the dataset of this configuration is not built: run csc build, or {choice}")


def _ids(mixtures: Folder) -> list[str]:
    names = (file.name for file in mixtures.list())
    return sorted({name.partition("/")[0] for name in names if name.count("/") == 1})


def _choice(mixtures: Folder, ids: list[str]) -> str:
    if not ids:
        return f"{mixtures.uri} has none yet, csc build makes one"
    return f"choose from those of {mixtures.uri}: {', '.join(ids)}"


def _stores(utterances: Folder, dataset: Any) -> list[Folder]:
    """Return the generations that a dataset's index names."""
    wanted = dataset.get("store") if isinstance(dataset, dict) else None
    if wanted is None:
        return []
    names = [file.name for file in utterances.list() if STORE_INDEX.fullmatch(file.name)]
    return [
        utterances.child(posixpath.dirname(name))
        for name in names
        if utterances.read_json(name)["id"] == wanted
    ]
