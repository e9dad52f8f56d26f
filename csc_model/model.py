"""CSC, reconstructed: one trunk, a separation head, a speaker head bound to its slots."""

import json
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csc_model.attention import AttentiveStatistics, ConditionAttention
from csc_model.config import MODEL_VERSION, VARIANT, ModelConfig
from csc_model.encoder import build_frontend
from csc_model.trunk import Trunk

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"


class Output(NamedTuple):
    """What one pass gives. The last of the embeddings reads the mixture unseparated."""

    sources: Tensor  # (batch, slot, time)
    embeddings: Tensor  # (batch, slot + 1, dim), before attention
    activity: Tensor  # (batch, slot + 1), share of the energy that a slot holds


class _Heard(NamedTuple):
    level: Tensor  # (batch, 1), root mean square that the input was divided by
    carrier: Tensor  # (batch, bin, frame)
    masks: Tensor  # (batch, slot, bin, frame)
    embeddings: Tensor
    activity: Tensor


class CSC(nn.Module):
    """Contrastive separative coding, reconstructed (arXiv 2103.00816; variant in `config.py`).

    The speaker head reads, for each slot, the carrier as weighed by that slot's mask, with one set
    of weights for all slots: slot c of either head is the same slot by construction. A further view
    of the mixture as it is competes with them, which keeps clean speech from suffering.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = build_frontend(config)
        bins, channels = self.frontend.num_bins, config.channels
        self.bottleneck = nn.Sequential(nn.GroupNorm(1, bins), nn.Conv1d(bins, channels, 1))
        self.trunk = Trunk(config)
        self.separation_blocks = self.trunk.stack(config.separation_blocks)
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, config.num_slots * bins, 1))
        self.view = nn.Sequential(nn.GroupNorm(1, bins), nn.Conv1d(bins, channels, 1))
        self.speaker_blocks = self.trunk.stack(config.speaker_blocks)
        self.pool = AttentiveStatistics(channels, config.embedding_dim)
        self.attention = ConditionAttention(config.embedding_dim, config.attention_heads)

    def forward(self, waveform: Tensor) -> Output:
        """Separate and embed mixtures `(batch, time)`; any level, any length."""
        heard = self._listen(waveform)
        sources = self._decode(heard.carrier, heard.masks, waveform.shape[-1])
        return Output(sources * heard.level.unsqueeze(1), heard.embeddings, heard.activity)

    def _listen(self, waveform: Tensor) -> "_Heard":
        """Do all but return to waveforms, which embedding does not need."""
        level = waveform.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-5)
        carrier = self.frontend.encode(waveform / level)
        magnitude = carrier.abs()
        num_frames = carrier.shape[-1]
        x = self.trunk.split(self.bottleneck(self.frontend.features(magnitude)))
        shared = self.trunk.shared(x)
        separated = self.trunk.join(self.separation_blocks(shared), num_frames)
        masks = self.frontend.squash(
            self.mask(separated).unflatten(1, (self.config.num_slots, self.frontend.num_bins))
        )
        views = magnitude.unsqueeze(1) * torch.cat([masks, torch.ones_like(masks[:, :1])], 1)
        embeddings = self._embed_views(views, self.trunk.join(shared, num_frames))
        return _Heard(level, carrier, masks, embeddings, _activity(views.detach()))

    def _decode(self, carrier: Tensor, masks: Tensor, num_samples: int) -> Tensor:
        slots = _weigh(carrier.unsqueeze(1), masks).flatten(0, 1)
        return self.frontend.decode(slots, num_samples).unflatten(0, (-1, self.config.num_slots))

    def _embed_views(self, views: Tensor, shared: Tensor) -> Tensor:
        """Embed magnitudes `(batch, view, bin, frame)`, each view beside the shared features."""
        num_views = views.shape[1]
        x = self.view(self.frontend.features(views.flatten(0, 1)))
        x = x + shared.repeat_interleave(num_views, 0)
        x = self.trunk.join(self.speaker_blocks(self.trunk.split(x)), x.shape[-1])
        return self.pool(x).unflatten(0, (-1, num_views))

    @torch.inference_mode()
    def embed(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit-norm speaker vectors and their activity for `(time,)` or `(batch, time)`.

        Shapes `(slot + 1, dim)` and `(slot + 1,)`, with a batch axis in front where one was given.
        Each view attends to itself alone: one recording is all that a user has at test time.
        """
        heard = self._listen(torch.atleast_2d(waveform))
        vectors = self.attention(heard.embeddings.flatten(0, 1).unsqueeze(1))
        vectors = nn.functional.normalize(vectors.squeeze(1), dim=-1)
        vectors = vectors.unflatten(0, heard.embeddings.shape[:2])
        if waveform.ndim == 1:
            return vectors[0], heard.activity[0]
        return vectors, heard.activity

    @torch.inference_mode()
    def separate(self, waveform: Tensor) -> Tensor:
        """Return the sources `(slot, time)` of a mixture `(time,)`."""
        return self(waveform.unsqueeze(0)).sources[0]

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"version": MODEL_VERSION, "variant": VARIANT, "config": self.config.model_dump()}
        (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a model that `save` wrote, in evaluation mode on the CPU.

        Raises:
            ValueError: the folder holds a model of a later version.
        """
        about = json.loads((Path(folder) / CONFIG_FILE).read_text())
        if about["version"] > MODEL_VERSION:
            raise ValueError(
                f"{folder}: model version {about['version']} is newer than this program's "
                f"{MODEL_VERSION}: update csc"
            )
        model = cls(ModelConfig.model_validate(about["config"]))
        model.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
        return model.eval()


def _weigh(carrier: Tensor, masks: Tensor) -> Tensor:
    """Multiply by real masks. Torch would first make a complex copy of them."""
    if not carrier.is_complex():
        return carrier * masks
    return torch.view_as_complex(torch.view_as_real(carrier) * masks.unsqueeze(-1))


def _activity(views: Tensor) -> Tensor:
    """Return each slot's share of the slots' energy; 1 for the unseparated view, the last."""
    energy = views[:, :-1].square().sum((-1, -2))
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.cat([share, torch.ones_like(share[:, :1])], 1)
