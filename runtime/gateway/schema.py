"""The bodies of OpenAI's image and chat endpoints, with the extensions that servers of diffusion models share.

Fields that change nothing here are taken where clients send them without being asked; a field that is unknown is
refused, since a typing error would otherwise change the image silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.answers import DEFAULT_MAX_NEW_TOKENS
from runtime.flow_time import DEFAULT_GUIDANCE_SCALE, DEFAULT_SHIFT, DEFAULT_STEPS

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
QUALITY_STEPS = {"low": DEFAULT_STEPS // 2, "high": 2 * DEFAULT_STEPS, "hd": 2 * DEFAULT_STEPS}
"""Number of steps by quality; every other quality has the default."""
MOST_PARTIAL_IMAGES = 3
MAX_TEXT = 32_000
"""Characters of a prompt, as OpenAI's. The model's limit in tokens is lower."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Body(BaseModel):
    """A body that takes no unknown fields."""

    model_config = ConfigDict(extra="forbid")


class DrawingOptions(Body):
    """What an image may be asked for, beyond OpenAI's fields. The names are those of diffusers' pipelines."""

    negative_prompt: Text = Field(default="", description="what the image should not show")
    num_inference_steps: int | None = Field(
        default=None, ge=1, description=f"number of Euler steps; default {DEFAULT_STEPS}, or what `quality` says"
    )
    guidance_scale: float = Field(
        default=DEFAULT_GUIDANCE_SCALE, allow_inf_nan=False, description="1 disables guidance and halves the cost"
    )
    shift: float = Field(default=DEFAULT_SHIFT, allow_inf_nan=False, description="time-grid shift")
    seed: int | None = Field(default=None, ge=0, description="image i is drawn from seed + i; random by default")
    size: str = Field(default="auto", pattern=r"^(auto|\d{1,5}x\d{1,5})$", description="auto, or WIDTHxHEIGHT")
    quality: Quality = Field(default="auto", description="low: half the steps; high and hd: twice the steps")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100, description="quality of JPEG and WebP")
    priority: int = Field(default=0, ge=-2, le=2, description="requests with a higher priority are served first")
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="seconds, then it fails")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.num_inference_steps or QUALITY_STEPS.get(self.quality, DEFAULT_STEPS)

    @model_validator(mode="after")
    def _check_compression(self) -> DrawingOptions:
        if self.output_compression is not None and self.output_format == "png":
            raise ValueError("output_compression is for jpeg and webp; png loses nothing")
        return self


class ImagesBody(DrawingOptions):
    """The body of `POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    model: str | None = None
    n: int = Field(default=1, ge=1, description="number of images")
    response_format: Literal["b64_json", "url"] = "b64_json"
    background: Literal["auto", "opaque"] = Field(default="auto", description="images here have no transparency")
    moderation: Literal["auto", "low"] = Field(default="auto", description="changes nothing")
    user: Annotated[str, Field(max_length=256)] = Field(default="", description="who asks, for fairness")
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=MOST_PARTIAL_IMAGES, description="only with stream")

    @model_validator(mode="after")
    def _check_stream(self) -> ImagesBody:
        if self.stream and self.n > 1:
            raise ValueError("a stream is of one image, since its events do not say which; ask n times")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream sends b64_json")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] = Field(default="auto", description="changes nothing")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """One message. A client may send back what it got as an assistant's message, with fields that change nothing."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    images: list[ImagePart] = Field(default=[], description="what the assistant drew")


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="changes nothing")


class ChatBody(DrawingOptions):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    model: str | None = None
    modalities: list[Literal["text", "image"]] = Field(default=["text"], min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, description=f"of the answer; default {DEFAULT_MAX_NEW_TOKENS}")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="another name of max_tokens")
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False, description="0: the most likely token")
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    user: Annotated[str, Field(max_length=256)] = ""
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        """Takes the fields of a nested `extra_body`, which clients without OpenAI's library send as it is."""
        if isinstance(data, dict) and isinstance(data.get("extra_body"), dict):
            outer = {name: value for name, value in data.items() if name != "extra_body"}
            return data["extra_body"] | outer
        return data

    @property
    def draws(self) -> bool:
        """Whether an image is asked for, instead of an answer."""
        return "image" in self.modalities

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_new_tokens(self) -> int:
        """Largest number of tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_NEW_TOKENS
