"""Where a model comes from: version, run, dataset, store, corpora with their licences."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from csc_model.config import VARIANT
from jobs.finetune import SPEAKERS_FILE
from jobs.registry import DATASET, FORGOTTEN, MODEL_ID, STORE, TRIALS, Registry, Version
from pipeline.distributions import BuildConfig
from pipeline.errors import CscError

LINEAGE_FILE = "lineage.json"
REQUIRED = (MODEL_ID, DATASET, STORE, TRIALS)


def describe(model: dict[str, Any], dataset: dict[str, Any], store: dict[str, Any]) -> Any:
    """Return the lineage of a trained model from the indices of what it was made of."""
    configured = {corpus["name"]: corpus for corpus in store["config"]["corpora"]}
    built = BuildConfig.model_validate(dataset["config"]["build"])
    return {
        "model": model["id"],
        "variant": VARIANT,
        "run": model["run"],
        "begun_with": model["config"]["train"]["init_from"],
        "speakers": model["speakers"],
        "dataset": {key: dataset[key] for key in ("id", "seed", "episodes")}
        | {"by_recording": built.mixing.by_recording},
        "store": {key: store[key] for key in ("id", "generation", "seconds", "kept", "speakers")},
        "corpora": [
            {
                "name": name,
                "kind": configured[name]["kind"],
                "root": configured[name]["root"],
                **{key: about[key] for key in ("licence", "language", "files", "seconds")},
            }
            for name, about in store["corpora"].items()
        ],
    }


def missing(version: Version) -> list[str]:
    """Return what of its origin a version does not say."""
    return [tag for tag in REQUIRED if not version.tags.get(tag)]


def flag_forgotten(
    registry: Registry, speakers: Collection[str], recordings: Collection[str], stores: set[str]
) -> list[str]:
    """Tag the versions that were trained with what was forgotten; return their numbers.

    For a speaker a version's own lists decide. For a recording, and for a speaker where training
    was told of recordings alone, whether the version's store is among `stores`, the ids of those
    that are gone with it: it may have held it. What a version began with counts as its own.
    """
    versions = registry.versions()
    own: dict[str, list[str]] = {}
    bases: dict[str, Version | None] = {}
    for one in versions:
        origin = _origin(registry, one)
        heard = _heard(registry, one, origin)
        nameless = origin.get("dataset", {}).get("by_recording", False)
        maybe = [*recordings, *(speakers if nameless else ())]
        own[one.number] = _gone(one, heard, speakers, maybe, stores)
        bases[one.number] = _named(origin.get("begun_with"), versions)
    flagged = []
    for version in versions:
        gone, base = [*own[version.number]], bases[version.number]
        while base is not None:
            gone += own[base.number]
            base = bases[base.number]
        if gone:
            before = version.tags.get(FORGOTTEN, "").split(", ")
            names = dict.fromkeys([*filter(None, before), *gone])
            registry.tag(version, {FORGOTTEN: ", ".join(names)})
            flagged.append(version.number)
    return flagged


def inherited(registry: Registry, about: Any) -> dict[str, str]:
    """Return the tag of a new version, of this lineage, whose base knows who was forgotten."""
    base = _named(about["begun_with"], registry.versions())
    forgotten = base.tags.get(FORGOTTEN) if base else None
    return {FORGOTTEN: forgotten} if forgotten else {}


def _heard(registry: Registry, version: Version, origin: Mapping[str, Any]) -> set[str]:
    """Return whom a version learned to tell apart, and whom else it was itself trained on."""
    text = registry.read_artifact(version, f"model/{SPEAKERS_FILE}")
    known = set(json.loads(text or "[]"))
    known |= {name.rpartition("@")[0] for name in known}  # those at other speeds
    return known.union(origin.get("speakers", ()))  # which older versions do not list


def _gone(
    version: Version,
    heard: set[str],
    speakers: Collection[str],
    maybe: Collection[str],
    stores: set[str],
) -> list[str]:
    """Return what of the forgotten a version was itself trained with, or may have been."""
    gone = sorted(heard & set(speakers))
    return gone + sorted(maybe) if version.tags.get(STORE) in stores else gone


def _origin(registry: Registry, version: Version) -> dict[str, Any]:
    """Return the lineage that a version was registered with; empty where it has none."""
    text = registry.read_artifact(version, f"evaluation/{LINEAGE_FILE}")
    return dict(json.loads(text)) if text else {}


def _named(begun_with: str | None, among: Iterable[Version]) -> Version | None:
    """Return the version that `train.init_from` names: by its address, or by its model's folder."""
    word = (begun_with or "").rpartition("/")[2]
    by_number = (begun_with or "").startswith("models:/")
    found = (one for one in among if word == (one.number if by_number else one.tags.get(MODEL_ID)))
    return min(found, key=lambda one: int(one.number), default=None)


def read(registry: Registry, version: Version) -> Any:
    """Return the lineage that a version was registered with.

    Raises:
        CscError: it has none.
    """
    about = _origin(registry, version)
    if not about:
        raise CscError(
            f"version {version.number} of {registry.model} has no lineage: csc did not register it"
        )
    return about


def lines(registry: Registry, version: Version) -> Iterator[str]:
    """Tell where a version comes from, a line for each step, back to what it began with."""
    about, indent = read(registry, version), "  "
    aliases = registry.aliases_of(version)
    shown = f" ({', '.join(aliases)})" if aliases else ""
    yield f"{registry.model} version {version.number}{shown}, model {about['model']}"
    forgotten = version.tags.get(FORGOTTEN)
    if forgotten:
        yield f"{indent}trained with speakers that were forgotten since: {forgotten}"
    yield f"{indent}run {about['run']}, {about['variant']}"
    episodes = ", ".join(f"{n} {split}" for split, n in about["dataset"]["episodes"].items())
    yield f"{indent}dataset {about['dataset']['id']}: seed {about['dataset']['seed']}, {episodes}"
    store = about["store"]
    speakers = ", ".join(f"{n} {split}" for split, n in store["speakers"].items())
    yield (
        f"{indent}store {store['id']}: generation {store['generation']}, {store['kept']} "
        f"utterances, {store['seconds'] / 3600:.2f} h; speakers: {speakers}"
    )
    for corpus in about["corpora"]:
        yield (
            f"{indent * 2}{corpus['name']} ({corpus['kind']}): {corpus['seconds'] / 3600:.2f} h of "
            f"{corpus['files']} files, licence {corpus['licence']}, from {corpus['root']}"
        )
    if about["begun_with"]:
        yield f"{indent}began with {about['begun_with']}"
        base = _named(about["begun_with"], registry.versions())
        if base is not None:
            yield from (f"    {line}" for line in lines(registry, base))
