"""The sizes of the model, as a frozen strict record that travels with the weights."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MODEL_VERSION = 4
"""1: no activity head, activity was a share of energy; 2: no ECAPA; 3: no extractor."""

VARIANT = "reconstructed-v1"

TRUNKS = {
    "galr": "csc_model.galr.Galr",
    "conv_tasnet": "csc_model.conv_tasnet.ConvTasNet",
    "tcn": "csc_model.tcn.Tcn",
    "blstm": "csc_model.blstm.Blstm",
}
"""Where each `csc_model.trunk.Trunk` lies. A further one is a file, and a line here."""


class ModelConfig(BaseModel):
    """Sizes of a CSC model. The defaults are those of a small GALR on a learned encoder."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    sample_rate_hz: int = Field(16_000, ge=8_000, le=48_000)
    num_slots: int = Field(2, ge=1, le=4)
    frontend: Literal["conv", "stft"] = "conv"
    window: int = Field(16, ge=2, description="samples a frame spans: kernel or FFT size")
    hop: int = Field(8, ge=1, description="samples from one frame to the next")
    num_bins: int = Field(64, ge=1, description="filters of the conv front end; stft has its own")
    channels: int = Field(64, ge=4)
    trunk: str = Field("galr", description=f"one of {', '.join(TRUNKS)}")
    hidden: int = Field(
        128,
        ge=4,
        description="LSTM cells (galr: each way, blstm: both together) or inner channels",
    )
    shared_blocks: int = Field(4, ge=1)
    separation_blocks: int = Field(2, ge=0)
    speaker_blocks: int = Field(2, ge=0)
    segment: int = Field(64, ge=2, description="frames of a GALR segment")
    queries: int = Field(8, ge=1, description="positions a GALR segment is compressed to")
    dilation_cycle: int = Field(
        4, ge=1, le=16, description="blocks until the dilation of convolutions is 1 again"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    checkpointing: bool = Field(
        False, description="compute blocks a second time in the backward pass, to save memory"
    )
    speaker_features: Literal["carrier", "mel"] = "carrier"
    mel_bands: int = Field(80, ge=8, le=256)
    speaker_net: Literal["trunk", "ecapa"] = Field(
        "trunk", description="blocks of the trunk, or an ECAPA-TDNN of its own on mel features"
    )
    ecapa_channels: int = Field(128, ge=8, multiple_of=8)
    detach_separation: bool = Field(
        False, description="no gradient from the speaker head through the separated signals"
    )
    extractor: Literal["none", "film", "voicefilter"] = Field(
        "none", description="network that lets through the voice of a vector that it is given"
    )
    extractor_channels: int = Field(64, ge=8, description="of the convolutions of voicefilter")
    attention_heads: int = Field(4, ge=1)
    qk_norm: bool = Field(False, description="bound the logits of attention over conditions")
    embedding_dim: int = Field(128, ge=4)

    @field_validator("trunk")
    @classmethod
    def _trunk_is_known(cls, trunk: str) -> str:
        if trunk not in TRUNKS:
            raise ValueError(f"trunk {trunk!r} is not one of {', '.join(TRUNKS)}")
        return trunk

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hop > self.window:
            raise ValueError(f"hop {self.hop} leaves gaps: it must not exceed window {self.window}")
        if self.frontend == "stft" and self.hop == self.window:
            raise ValueError(
                f"hop {self.hop} is all of window {self.window}: where the window is zero nothing "
                "can be restored; make it smaller"
            )
        if self.segment % 2:
            raise ValueError(f"segment {self.segment} must be even: segments overlap by one half")
        if self.speaker_net == "ecapa" and self.speaker_features != "mel":
            raise ValueError("speaker_net ecapa reads log-mel features: set speaker_features=mel")
        if self.extractor == "voicefilter" and self.frontend != "stft":
            raise ValueError("extractor voicefilter masks spectra: set frontend=stft")
        for name in ("channels", "embedding_dim"):
            if getattr(self, name) % self.attention_heads:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of "
                    f"attention_heads {self.attention_heads}"
                )
        return self
