"""The direction of imports is part of the design."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("csc_model", "pipeline", "jobs")
# A module of the pipeline may import those of its own rank and of lower ones.
RANKS = [
    {"errors"},
    {"schema", "draws", "refusals", "extras"},
    {"distributions", "strangers", "storage", "audio", "patterns", "fingerprint", "tones"},
    {"commits", "nearby", "speech", "splits", "vad", "decoder", "manifests", "duplicates"},
    {"segments", "layouts", "responses", "updates", "arrays"},
    {"casting", "windows", "order", "shards", "corpora", "render", "tasks", "speakers", "datasets"},
    {"mixing", "speeds", "planning", "rooms", "episodes", "plan", "summary", "voices"},
    {"lines", "remix"},
    {"loader", "trials", "ingest", "build"},
    {"audit", "exchange", "sides"},
    {"store", "trial_lists", "trial_tables"},
    {"forget", "trial_sources"},
]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules("csc_model"), ids=lambda path: path.stem)
def test_the_model_knows_tensors_only(path: Path) -> None:
    allowed = {"csc_model", "torch", "numpy", "safetensors", "pydantic"} | sys.stdlib_module_names
    assert tops(path) <= allowed


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda path: path.stem)
def test_the_pipeline_knows_neither_model_nor_jobs(path: Path) -> None:
    assert not tops(path) & {"csc_model", "jobs", "mlflow"}
    assert ("ray" in tops(path)) == (path.stem == "tasks")


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda path: path.stem)
def test_the_pipeline_imports_downwards(path: Path) -> None:
    rank = {module: place for place, group in enumerate(RANKS) for module in group}
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}
    module = path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
    if module != "__init__":
        assert all(rank[other] <= rank[module] for other in inside)


def test_only_the_registry_talks_to_mlflow() -> None:
    users = {
        path.stem for package in PACKAGES for path in modules(package) if "mlflow" in tops(path)
    }
    assert users == {"registry", "serving"}


def reached(paths: list[Path]) -> set[str]:
    """Return all modules of these packages that files import, themselves or by others."""
    found: set[str] = set()
    waiting = [name for path in paths for name in imported(path)]
    while waiting:
        name = waiting.pop()
        file = (ROOT / name.replace(".", "/")).with_suffix(".py")
        if name not in found and file.exists():
            found.add(name)
            waiting += imported(file)
    return found


def test_arrays_are_tested_on_and_never_trained_on() -> None:
    """What builds mixtures and what trains does not know how arrays are simulated."""
    names = ("train.py", "train_config.py", "training_data.py", "loop.py", "stepper.py")
    training = [ROOT / "jobs" / name for name in (*names, "validation.py", "batches.py")]
    building = [ROOT / "pipeline" / name for name in ("build.py", "loader.py", "render.py")]
    known = reached([*modules("csc_model"), *training, *building])
    assert {"pipeline.mixing", "pipeline.rooms", "jobs.loop", "csc_model.objective"} <= known
    assert "pipeline.arrays" not in known
    assert "pipeline.arrays" in reached([ROOT / "jobs" / "array_examples.py"])


def test_nothing_unpickles() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert "pickle" not in tops(path)
            assert "torch.load" not in path.read_text()
