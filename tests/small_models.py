"""Models that are made and run in milliseconds: every trunk on every front end."""

from typing import Any

import torch

from csc_model.config import TRUNKS, ModelConfig
from csc_model.model import CSC

FRONTENDS = {"conv": {"window": 16, "hop": 8, "num_bins": 16}, "stft": {"window": 128, "hop": 64}}
SIZES = {"channels": 16, "hidden": 12, "embedding_dim": 16, "segment": 16, "queries": 4}
BLOCKS = {"shared_blocks": 2, "separation_blocks": 1, "speaker_blocks": 1}


def small(trunk: str, frontend: str, **changes: Any) -> ModelConfig:
    """Return the configuration of a tiny model."""
    sizes = SIZES | BLOCKS | FRONTENDS[frontend] | changes
    return ModelConfig.model_validate({"trunk": trunk, "frontend": frontend} | sizes)


SMALL = {
    f"{trunk}-{frontend}": small(trunk, frontend) for trunk in TRUNKS for frontend in FRONTENDS
} | {"tcn-conv-mel": small("tcn", "conv", speaker_features="mel")}


def new_model(kind: str, seed: int = 0, **changes: Any) -> CSC:
    """Return an untrained model in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return CSC(ModelConfig.model_validate(SMALL[kind].model_dump() | changes)).eval()
