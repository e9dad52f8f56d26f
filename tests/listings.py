"""Small corpora that are only listed: empty files, and the rows they give."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.corpora import CorpusConfig, list_corpus
from pipeline.splits import SplitConfig

Rows = dict[str, dict[str, Any]]


def tree(root: Path, *names: str, **texts: str) -> Path:
    """Write empty files, which is all that listing needs, and files with a text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, text in texts.items():
        (root / name).write_text(text)
    return root


def config(root: Path | str, toml: str = "", **keys: Any) -> CorpusConfig:
    """Return a corpus as a configuration file gives it: checked as JSON, in which types are few."""
    values = {"name": "c", "root": str(root)} | tomllib.loads(toml) | keys
    return CorpusConfig.model_validate_json(json.dumps(values))


def listed(root: Path | str, toml: str = "", **keys: Any) -> pa.Table:
    return list_corpus(config(root, toml, **keys), SplitConfig())


def rows(root: Path | str, toml: str = "", **keys: Any) -> Rows:
    """Return rows by path, where each path has one."""
    found = listed(root, toml, **keys).to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def speakers(found: Rows) -> dict[str, str]:
    return {path: row["speaker_id"] for path, row in found.items()}


def spans(table: pa.Table) -> list[tuple[str, str, float, float]]:
    columns = ("path", "speaker_id", "start_s", "duration_s")
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def write(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
