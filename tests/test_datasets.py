"""Which dataset a command is about."""

import shutil
from pathlib import Path

import pytest

from jobs.config import Config
from jobs.datasets import find_dataset
from jobs.train_config import TrainConfig
from pipeline.audit.check import check
from pipeline.corpora import IngestConfig
from pipeline.errors import CscError
from pipeline.plan import Forgotten, remember_forgotten
from pipeline.storage import Folder
from pipeline.store import store_id
from tests.conftest import BUILD
from tests.test_check import copied


def test_a_configuration_names_its_dataset(
    corpora: IngestConfig, store: Folder, dataset: Folder, tmp_path: Path
) -> None:
    train = TrainConfig(batch_size=4)
    config = Config(workspace=str(tmp_path), seed=3, ingest=corpora, build=BUILD, train=train)
    with pytest.raises(CscError, match="none yet, csc build makes one"):
        find_dataset(None, config)
    shutil.copytree(Path(store.uri).parent, tmp_path / "utterances" / store_id(corpora))
    copy = copied(dataset, tmp_path / "mixtures")
    found = find_dataset(None, config)
    assert found.folder == copy
    assert found.store is not None
    assert check(found.folder, found.store).findings == []
    elsewhere = config.model_copy(update={"workspace": str(tmp_path / "other")})
    assert find_dataset(copy.uri, elsewhere) == found  # the store beside it is found, too
    remember_forgotten(Folder.at(Path(found.store.uri).parent), Forgotten(set(), {"abc"}))
    assert find_dataset(found.name, config).forgotten == {"abc"}
    copy.remove_file("index.json")
    with pytest.raises(CscError, match=r"has no index\.json"):
        find_dataset(None, config)
