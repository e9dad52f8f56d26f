"""A model on disk: weights in safetensors, and in JSON what they are the weights of.

Versions: 1 had no activity head. Such a model is read with the head it would start training with,
that takes every slot for a speaker; fields that configurations have gained since have defaults that
leave the model what it was.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csc_model.config import MODEL_VERSION, VARIANT, ModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"
ACTIVITY_HEAD = "active."
Weights = dict[str, Tensor]


def write_model(folder: Path, config: ModelConfig, weights: Weights) -> None:
    """Write weights and configuration into `folder`, the configuration last."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"version": MODEL_VERSION, "variant": VARIANT, "config": config.model_dump()}
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Return the configuration of a model, and its version.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is of a later version.
    """
    path = folder / CONFIG_FILE
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); copy the model again") from error
    version = _version(path, about)
    try:
        return ModelConfig.model_validate(about["config"]), version
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the configuration of a model: {error}") from error


def _version(path: Path, about: Any) -> int:
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: has no model version; is it the {CONFIG_FILE} of a csc model?")
    if version > MODEL_VERSION:
        raise ValueError(
            f"{path}: model version {version} is newer than this program's {MODEL_VERSION}: "
            "update csc"
        )
    return version


def read_weights(folder: Path, model: nn.Module, version: int) -> None:
    """Fill `model`, fresh and of the stored configuration, with the stored weights.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, or not those of such a model.
    """
    path, wanted = folder / WEIGHTS_FILE, model.state_dict()
    if not path.exists():
        raise FileNotFoundError(f"{path}: a model needs it beside its {CONFIG_FILE}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); copy the model again") from error
    if version == 1:
        weights = _with_activity_head(path, weights, wanted)
    _check(path, weights, wanted)
    model.load_state_dict(weights)


def _with_activity_head(path: Path, weights: Weights, fresh: Weights) -> Weights:
    warnings.warn(
        f"{path}: model version 1 knows no activity: each of its slots counts as a speaker until "
        "it is trained further",
        stacklevel=4,
    )
    return {name: fresh[name] for name in fresh if name.startswith(ACTIVITY_HEAD)} | weights


def _check(path: Path, weights: Weights, wanted: Weights) -> None:
    """Refuse weights that are not those of the configuration beside them."""
    advice = f"weights and {CONFIG_FILE} are not of one model: take both from the same folder"
    for fault, names in (
        ("lacks", wanted.keys() - weights.keys()),
        ("has in excess", weights.keys() - wanted.keys()),
    ):
        if names:
            raise ValueError(f"{path}: {fault} {_some(names)}; {advice}")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the configuration asks for "
                f"{tuple(wanted[name].shape)}; {advice}"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {name} holds values that are no numbers: take another model, or copy "
                "this one again"
            )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
