"""What a LaTtE-Flow checkpoint says of itself: `config.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.flow_time import ExpertSchedule


class LatteFlowConfig(BaseModel):
    """Geometry of the flow layers, and how they meet the VLM and the autoencoder.

    The layers mirror the VLM's text layers, so the middle block of fields repeats its config; loading
    a checkpoint checks that both agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["latte_flow"] = "latte_flow"
    variant: Literal["couple", "blend"] = "couple"
    schedule: ExpertSchedule

    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    intermediate_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    mrope_section: tuple[int, int, int]

    latent_channels: int = Field(ge=1)
    latent_size: tuple[int, int] = Field(description="default height and width of the latents")
    vae_scale_factor: int = Field(ge=1, description="pixels of the image per latent, in each direction")
    latents_mean: tuple[float, ...] = Field(description="per channel; latents are (encoded - mean) / std")
    latents_std: tuple[float, ...]
    max_prompt_tokens: int = Field(default=512, ge=1, description="limit of a prompt in its chat template")

    @model_validator(mode="after")
    def _fits_together(self) -> LatteFlowConfig:
        layers, groups = self.num_hidden_layers, self.schedule.num_groups
        if layers % groups:
            raise ValueError(f"{layers} layers cannot be split into {groups} equal expert groups")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must divide by 4 and by {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not divide by {self.num_key_value_heads} key-value heads"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half of head_dim {self.head_dim}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(f"{name} needs {self.latent_channels} values, got {len(getattr(self, name))}")
        if min(self.latents_std) <= 0:
            raise ValueError("latents_std must be positive")
        return self

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layers_per_group(self) -> int:
        """M = L / K."""
        return self.num_hidden_layers // self.schedule.num_groups

    def layers_of(self, group: int) -> range:
        """Indices of the layers of one expert group."""
        return range(group * self.layers_per_group, (group + 1) * self.layers_per_group)

    @staticmethod
    def geometry_of(text_config: Any) -> dict[str, Any]:
        """The fields that mirror a Qwen2-VL text config (`Qwen2VLTextConfig`)."""
        rope = text_config.rope_parameters
        return {
            "num_hidden_layers": text_config.num_hidden_layers,
            "hidden_size": text_config.hidden_size,
            "intermediate_size": text_config.intermediate_size,
            "num_attention_heads": text_config.num_attention_heads,
            "num_key_value_heads": text_config.num_key_value_heads,
            "rms_norm_eps": text_config.rms_norm_eps,
            "rope_theta": rope["rope_theta"],
            "mrope_section": tuple(rope["mrope_section"]),
        }
