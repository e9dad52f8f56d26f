"""CSC, reconstructed: one trunk, a separation head, a speaker head bound to its slots."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from csc_model import longform
from csc_model.attention import AttentiveStatistics, ConditionAttention
from csc_model.config import ModelConfig
from csc_model.ecapa import Ecapa
from csc_model.encoder import build_frontend, weigh
from csc_model.extractor import build_extractor, voice_of
from csc_model.longform import Heard, OnProgress, Voices
from csc_model.mel import LogMel, unit_level
from csc_model.resample import resampled
from csc_model.saving import CONFIG_FILE, WEIGHTS_FILE, read_config, read_weights, write_model
from csc_model.streaming import CHUNK_S, CONTEXT_S, LOOK_AHEAD_S, Pace, streamed
from csc_model.trunk import build_trunk

__all__ = ["ACTIVE", "CONFIG_FILE", "CSC", "WEIGHTS_FILE", "WINDOW_S", "Output", "best_view"]

ACTIVE = 0.5
"""Activity from which on a slot holds a speaker: one below it must not win a trial."""

WINDOW_S = 16.0
"""Seconds from which on `embed` and `separate` go by windows.

Longer than training's mixtures: within a window slots are kept by the model, which errs less than
the matching of windows does.
"""

FIRST_LOGIT = 3.0  # activity 0.95: a head that knows nothing yet keeps no slot from winning


def best_view(vectors: Tensor, activity: Tensor, enrolled: Tensor) -> tuple[float, int]:
    """Score a recording against an enrolled unit vector `(dim,)`, and say which view won.

    The largest cosine over the views `(view, dim)` of the recording that hold a speaker, the
    unseparated one always among them.
    """
    cosines = (vectors @ enrolled).masked_fill(activity < ACTIVE, -torch.inf)
    best = int(cosines.argmax())
    return float(cosines[best]), best


class Output(NamedTuple):
    """What one pass gives. The last of the embeddings reads the mixture unseparated."""

    sources: Tensor  # (batch, slot, time)
    embeddings: Tensor  # (batch, slot + 1, dim), before attention
    activity: Tensor  # (batch, slot + 1), probability of a speaker; 1 for the unseparated view
    activity_logits: Tensor  # (batch, slot)


class _Separated(NamedTuple):
    carrier: Tensor  # (batch, bin, frame), of the mixture at unit power
    masks: Tensor  # (batch, slot, bin, frame)
    magnitude: Tensor  # (batch, bin, frame), of the carrier
    views: Tensor  # (batch, slot, bin, frame), magnitudes as weighed by the masks
    shared: Tensor  # (batch, channel, frame), what both heads read


class CSC(nn.Module):
    """Contrastive separative coding, reconstructed (arXiv 2103.00816; variant in `config.py`).

    The speaker head has one set of weights for all slots: slot c of either head is the same slot by
    construction. It reads, as `speaker_features` says, for each slot the carrier as weighed by that
    slot's mask, beside the shared features; or log-mel features of that slot's waveform and nothing
    else, with blocks of the trunk or an ECAPA-TDNN. A further view of the mixture as it is competes
    with them, which keeps clean speech from suffering.

    The activity head reads a slot's pooled features and its energy. It starts at 0.95 for any slot
    and learns from a loss on `activity_logits`; without one it stays there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = build_frontend(config)
        bins, channels, dim = self.frontend.num_bins, config.channels, config.embedding_dim
        self.bottleneck = nn.Sequential(nn.GroupNorm(1, bins), nn.Conv1d(bins, channels, 1))
        self.trunk = build_trunk(config)
        self.separation_blocks = self.trunk.stack(config.separation_blocks)
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, config.num_slots * bins, 1))
        if config.speaker_net == "ecapa":
            self.ecapa = Ecapa.of(config)
        else:
            self._make_speaker_stack(bins)
        self.attention = ConditionAttention(dim, config.attention_heads, qk_norm=config.qk_norm)
        verdict = nn.Linear(dim, 1)
        nn.init.zeros_(verdict.weight)
        nn.init.constant_(verdict.bias, FIRST_LOGIT)
        self.active = nn.Sequential(nn.Linear(dim + 1, dim), nn.ReLU(), verdict)
        if config.extractor != "none":
            self.extractor = build_extractor(config)

    def _make_speaker_stack(self, bins: int) -> None:
        config = self.config
        if config.speaker_features == "mel":
            self.mel = LogMel(config.mel_bands, config.sample_rate_hz)
            self.view: nn.Module = nn.Conv1d(config.mel_bands, config.channels, 1)
        else:
            self.view = nn.Sequential(nn.GroupNorm(1, bins), nn.Conv1d(bins, config.channels, 1))
        self.speaker_blocks = self.trunk.stack(config.speaker_blocks)
        self.pool = AttentiveStatistics(config.channels, config.embedding_dim)

    def forward(self, waveform: Tensor, heard: Tensor | None = None) -> Output:
        """Separate and embed mixtures `(batch, time)`; any level, any length.

        `heard`, int64 `(batch, some)`, says which views of each mixture the speaker head hears,
        the last being the mixture itself; the embeddings of the others are 0. None is all.
        """
        level, unit = unit_level(waveform)
        separated = self._separate(unit)
        sources = self._decode(separated, unit.shape[-1])
        embeddings, logits = self._speakers(unit, separated, sources, heard)
        return Output(sources * level.unsqueeze(1), embeddings, _activity(logits), logits)

    def sources(self, waveform: Tensor) -> Tensor:
        """Separate mixtures `(batch, time)` and do not ask whose voices they are."""
        level, unit = unit_level(waveform)
        return self._decode(self._separate(unit), unit.shape[-1]) * level.unsqueeze(1)

    def voice(self, waveform: Tensor) -> Tensor:
        """Return the unit vectors `(batch, dim)` of clean voices `(batch, time)`: enrolment."""
        _, unit = unit_level(waveform)
        if self.config.speaker_features == "mel":  # which reads waveforms: nothing is separated
            none = unit.new_empty(len(unit), 0, unit.shape[-1])
            found = self._heard_as_waveforms(unit, none, None)
        else:
            last = torch.full((len(unit), 1), self.config.num_slots, device=unit.device)
            found = self._speakers(unit, self._separate(unit), None, last)[0][:, -1]
        return self._alone(found.unsqueeze(1)).squeeze(1)

    def extracted(self, waveform: Tensor, vectors: Tensor) -> Tensor:
        """Return the voices of `vectors` `(batch, dim)` in mixtures: `(batch, time)` both."""
        level, unit = unit_level(waveform)
        voices: Tensor = self.extractor(unit, vectors)
        return voices * level

    @property
    def separator(self) -> tuple[nn.Module, ...]:
        """The parts that `sources` needs; the others hear who speaks."""
        return self.frontend, self.bottleneck, self.trunk, self.separation_blocks, self.mask

    def _separate(self, unit: Tensor) -> _Separated:
        """Find the masks of mixtures `(batch, time)` of unit power."""
        carrier = self.frontend.encode(unit)
        return self._masked(carrier, carrier.abs())

    def _masked(self, carrier: Tensor, magnitude: Tensor) -> _Separated:
        """Find the masks of a carrier by its magnitude `(batch, bin, frame)`."""
        frames = magnitude.shape[-1]
        x = self.trunk.split(self.bottleneck(self.frontend.features(magnitude)))
        shared = self.trunk.shared(x)
        logits = self.mask(self.trunk.join(self.separation_blocks(shared), frames))
        masks = self.frontend.squash(logits.unflatten(1, (self.config.num_slots, -1)))
        views = magnitude.unsqueeze(1) * masks
        return _Separated(carrier, masks, magnitude, views, self.trunk.join(shared, frames))

    def _decode(self, separated: _Separated, num_samples: int) -> Tensor:
        """Return the waveforms of the slots, `(batch, slot, time)`."""
        slots = weigh(separated.carrier.unsqueeze(1), separated.masks).flatten(0, 1)
        return self.frontend.decode(slots, num_samples).unflatten(0, (-1, self.config.num_slots))

    def _speakers(
        self,
        unit: Tensor,
        separated: _Separated,
        sources: Tensor | None,
        heard: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings `(batch, slot + 1, dim)` and activity logits `(batch, slot)`."""
        views, chosen = self.config.num_slots + 1, None
        if heard is not None:
            first = views * torch.arange(len(unit), device=unit.device)
            chosen = (heard + first.unsqueeze(1)).flatten()
        if self.config.speaker_features == "mel":
            sources = self._decode(separated, unit.shape[-1]) if sources is None else sources
            found = self._heard_as_waveforms(unit, sources, chosen)
        else:
            found = self._pooled(self._carrier_views(separated, chosen))
        if chosen is not None:
            found = found.new_zeros(len(unit) * views, found.shape[-1]).index_copy(0, chosen, found)
        embeddings = found.unflatten(0, (-1, views))
        loudness = _loudness(separated).unsqueeze(-1)
        logits = self.active(torch.cat([embeddings[:, :-1], loudness], -1)).squeeze(-1)
        return embeddings, logits

    def _pooled(self, x: Tensor) -> Tensor:
        """Turn features `(view, channel, frame)` into embeddings `(view, dim)`."""
        return self.pool(self.trunk.join(self.speaker_blocks(self.trunk.split(x)), x.shape[-1]))

    def _carrier_views(self, separated: _Separated, chosen: Tensor | None) -> Tensor:
        """Show the speaker head carriers of slots, and of mixtures."""
        views = separated.views.detach() if self.config.detach_separation else separated.views
        views = torch.cat([views, separated.magnitude.unsqueeze(1)], 1)
        shared = separated.shared.repeat_interleave(views.shape[1], 0)
        x = self.view(self.frontend.features(_rows(views.flatten(0, 1), chosen)))
        return x + _rows(shared, chosen)

    def _heard_as_waveforms(self, unit: Tensor, sources: Tensor, chosen: Tensor | None) -> Tensor:
        """Embed waveforms of slots, and mixtures, by their log-mel features."""
        if self.config.detach_separation:
            sources = sources.detach()
        waveforms = _rows(torch.cat([sources, unit.unsqueeze(1)], 1).flatten(0, 1), chosen)
        if self.config.speaker_net == "ecapa":
            return self.ecapa(waveforms)
        return self._pooled(self.view(self.mel(waveforms)))

    @torch.inference_mode()
    def embed(
        self,
        waveform: Tensor,
        sample_rate_hz: int | None = None,
        window_s: float = WINDOW_S,
        on_progress: OnProgress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return unit-norm speaker vectors and their activity for `(time,)` or `(batch, time)`.

        At any sample rate; None is the model's. What comes back is on the model's device.

        Shapes `(slot + 1, dim)` and `(slot + 1,)`, with a batch axis in front where one was given.
        Each view attends to itself alone: one recording is all that a user has at test time. What
        is longer than `window_s` is heard in windows (`longform.embed_long`).

        Raises:
            ValueError: there is no sample, one is no number, or `window_s` is no length.
        """
        waveform = self._usable(waveform, sample_rate_hz)
        window = longform.window_samples(window_s, self.config.sample_rate_hz)
        if waveform.shape[-1] > window:
            if waveform.ndim == 1:
                return longform.embed_long(self.hear, waveform, window, on_progress)
            rows = [longform.embed_long(self.hear, row, window, on_progress) for row in waveform]
            return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        _, unit = unit_level(torch.atleast_2d(waveform).to(self._device))
        embeddings, logits = self._speakers(unit, self._separate(unit), None)
        vectors, activity = self._alone(embeddings), _activity(logits)
        return (vectors[0], activity[0]) if waveform.ndim == 1 else (vectors, activity)

    @torch.inference_mode()
    def separate(
        self,
        waveform: Tensor,
        sample_rate_hz: int | None = None,
        window_s: float = WINDOW_S,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Return the sources `(slot, time)` of a mixture `(time,)`, at the model's sample rate.

        The mixture may be at another one; None is the model's. What is longer than `window_s` is
        heard in windows (`longform.separate_long`). Sources have the course of the voices, not
        their level: what the model was trained by forgives any.

        Raises:
            ValueError: there is no sample, one is no number, there is more than one axis, or
                `window_s` is no length.
        """
        if waveform.ndim != 1:
            raise ValueError(f"a mixture is (time,), one at a time, not {tuple(waveform.shape)}")
        waveform = self._usable(waveform, sample_rate_hz)
        window = longform.window_samples(window_s, self.config.sample_rate_hz)
        if len(waveform) > window:
            return longform.separate_long(self.hear, waveform, window, on_progress)
        return self.sources(waveform.to(self._device).unsqueeze(0))[0].to(waveform.device)

    @torch.inference_mode()
    def extract(
        self,
        mixture: Tensor,
        enrolment: Tensor | Sequence[Tensor],
        sample_rate_hz: int | None = None,
    ) -> Tensor:
        """Return the voice of `enrolment` in a mixture, `(time,)` each, at the model's sample rate.

        `enrolment` is a clean recording of the speaker alone, or several; they and the mixture may
        be at another rate, None is the model's. What is longer than 12 s is heard in stretches, as
        `csc extract` hears a file.

        Raises:
            ValueError: the model has no extractor, there is no sample, or one is no number.
        """
        clean = [enrolment] if isinstance(enrolment, Tensor) else enrolment
        vector = voice_of(torch.stack([self.embed(one, sample_rate_hz)[0][-1] for one in clean]))
        waveform = self._usable(mixture, sample_rate_hz)
        return self.let_through(waveform, vector)

    def let_through(self, mixture: Tensor, vector: Tensor) -> Tensor:
        """Return the voice of a unit vector `(dim,)` in a mixture `(time,)` at the model's rate.

        Raises:
            ValueError: the model has no extractor.
        """
        pace = Pace.of(self.config.sample_rate_hz, CONTEXT_S, CHUNK_S, LOOK_AHEAD_S)
        return torch.cat(list(self.extracting(vector, [mixture], pace)))

    def extracting(self, vector: Tensor, blocks: Iterable[Tensor], pace: Pace) -> Iterator[Tensor]:
        """Give the voice of a unit vector `(dim,)` in a mixture that comes in blocks `(time,)`.

        At the model's rate; stretches alone are brought to its device.

        Raises:
            ValueError: the model has no extractor.
        """
        if self.config.extractor == "none":
            raise ValueError("the model has no extractor: train one with train.task=extract")
        whose = vector.to(self._device).unsqueeze(0)

        @torch.inference_mode()
        def process(stretch: Tensor) -> Tensor:
            return self.extracted(stretch.to(whose.device).unsqueeze(0), whose)[0].to(stretch)

        return streamed(process, blocks, pace)

    @torch.inference_mode()
    def separated(
        self,
        waveform: Tensor,
        voices: Voices,
        window_s: float = WINDOW_S,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Tensor]:
        """Give the sources of a mixture `(time,)` piece by piece, `(slot, time)`: for hours of it.

        At the model's rate; windows alone are brought to its device. `voices` is empty at first;
        its `mean` are the vectors and activity of the recording in the end.

        Raises:
            ValueError: as `separate` does.
        """
        waveform = self._usable(waveform, None)
        window = longform.window_samples(window_s, self.config.sample_rate_hz)
        yield from longform.separated(self.hear, waveform, window, voices, on_progress)

    def _usable(self, waveform: Tensor, sample_rate_hz: int | None) -> Tensor:
        """Bring a waveform to the model's rate."""
        if not waveform.numel():
            raise ValueError(f"a waveform of shape {tuple(waveform.shape)} has no samples")
        if not torch.stack(waveform.aminmax()).isfinite().all():  # of hours, without a copy
            raise ValueError("a sample of the waveform is NaN or infinite")
        rate_hz = self.config.sample_rate_hz
        given_hz = rate_hz if sample_rate_hz is None else sample_rate_hz
        return resampled(waveform.float(), given_hz, rate_hz)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def hear(self, window: Tensor) -> Heard:
        """Hear a window `(time,)`, brought to the device of the model."""
        output = self(window.to(self._device).unsqueeze(0))
        return Heard(output.sources[0], self._alone(output.embeddings)[0], output.activity[0])

    def _alone(self, embeddings: Tensor) -> Tensor:
        """Return unit vectors `(batch, view, dim)`, each view attending to itself alone."""
        vectors = self.attention(embeddings.flatten(0, 1).unsqueeze(1)).squeeze(1)
        return nn.functional.normalize(vectors, dim=-1).unflatten(0, (-1, embeddings.shape[1]))

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into `folder`."""
        write_model(folder, self.config, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a model that `save` wrote, in evaluation mode on the CPU.

        One of version 1 gets an activity head that takes every slot for a speaker, with a warning.

        Raises:
            FileNotFoundError: a file of the model is missing.
            ValueError: a file is damaged, of a later version, or not the other's.
        """
        config, version = read_config(Path(folder))
        model = cls(config)
        read_weights(Path(folder), model, version)
        return model.eval()


def _rows(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else x[chosen]


def _loudness(separated: _Separated) -> Tensor:
    """Return the log of each slot's share of the mixture's energy, `(batch, slot)`; a constant."""
    energy = separated.views.detach().square().sum((-1, -2))
    whole = separated.magnitude.detach().square().sum((-1, -2)).unsqueeze(1).clamp_min(1e-8)
    return torch.log(energy / whole + 1e-4)


def _activity(logits: Tensor) -> Tensor:
    """Return the probability of a speaker in each slot, and 1 for the unseparated view."""
    return torch.cat([logits.sigmoid(), torch.ones_like(logits[:, :1])], 1)
