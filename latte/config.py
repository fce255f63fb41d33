"""The config of a LaTtE-Flow checkpoint, `config.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.flow_time import ExpertSchedule, SamplingDefaults

_Section = Annotated[int, Field(ge=0)]
_Side = Annotated[int, Field(ge=1)]
FORMAT_VERSION: Literal[2] = 2
"""Version of the checkpoint's format. Format 1 had other norms and another modulation in its flow layers."""


class LatteFlowConfig(BaseModel):
    """Geometry of the flow layers, and their interface to the VLM and the autoencoder.

    The flow layers mirror the VLM's text layers, so the middle block of fields repeats the VLM's config; loading a
    checkpoint checks that the two agree. In the `couple` variant the flow layers have their own weights; in `blend`
    they share the VLM's (arXiv 2506.06952).

    Raises:
        ValidationError: a value is out of range, or two values contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["latte_flow"] = "latte_flow"
    format_version: Literal[2] = FORMAT_VERSION
    variant: Literal["couple", "blend"] = "couple"
    schedule: ExpertSchedule

    num_hidden_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    intermediate_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    mrope_section: tuple[_Section, _Section, _Section]

    latent_channels: int = Field(ge=1)
    latent_size: tuple[_Side, _Side] = Field(description="default height and width in latents")
    vae_scale_factor: int = Field(ge=1, description="pixels per latent, in each direction")
    latents_mean: tuple[float, ...] = Field(description="per channel; latents = (encoded - mean) / std")
    latents_std: tuple[float, ...]
    max_prompt_tokens: int = Field(default=512, ge=1, description="limit in tokens, including the chat template")
    sampling: SamplingDefaults = Field(default=SamplingDefaults(), description="for callers who say nothing")

    @model_validator(mode="after")
    def _fits_together(self) -> LatteFlowConfig:
        layers, groups = self.num_hidden_layers, self.schedule.num_groups
        if layers % groups:
            raise ValueError(f"{layers} layers cannot be split into {groups} equal expert groups")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half of head_dim {self.head_dim}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name} needs {self.latent_channels} values, one per latent channel; "
                    f"got {len(getattr(self, name))}"
                )
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std must be positive, got {list(self.latents_std)}")
        return self

    @property
    def head_dim(self) -> int:
        """Head dimension, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layers_per_group(self) -> int:
        """Layers per expert group, M = L / K."""
        return self.num_hidden_layers // self.schedule.num_groups

    def layers_of(self, group: int) -> range:
        """Returns the indices of the layers of one expert group."""
        return range(group * self.layers_per_group, (group + 1) * self.layers_per_group)

    @staticmethod
    def geometry_of(text_config: Any) -> dict[str, Any]:
        """Returns the fields that mirror the VLM's text config, a `Qwen2VLTextConfig`."""
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


def one_group(config: LatteFlowConfig, layers: int) -> LatteFlowConfig:
    """Returns a config with the same sizes and this number of layers, all in one expert group."""
    return config.model_copy(update={"num_hidden_layers": layers, "schedule": ExpertSchedule.uniform(1)})
