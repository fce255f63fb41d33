"""The bodies of OpenAI's image and chat endpoints, with the extensions that servers of diffusion models share.

Every field of OpenAI's is here. Some change nothing; some ask for what the model cannot do, and are taken only with
values that ask for nothing. A field that is unknown is refused: a typing error would otherwise change the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from runtime.answers import DEFAULT_MAX_NEW_TOKENS

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
MOST_PARTIAL_IMAGES = 3
MAX_TEXT = 32_000
"""Characters of a prompt, as OpenAI's. The model's limit in tokens is lower."""
MAX_CONVERSATION_TEXT = 4 * MAX_TEXT
"""Characters of all messages. More would hold up everybody else while they are made tokens, before they are refused."""
MAX_PARTS = 256
"""Parts of a message."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]


Name = Annotated[str, Field(max_length=256)]
Unused = Annotated[Any, Field(description="changes nothing")]


class Only:
    """Marks a field of OpenAI's that asks for what the model cannot do, unless it has one of these values."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._values], "description": "asks for what is not supported"}

    def _check(self, value: Any) -> Any:
        if value not in self._values:
            raise ValueError("not supported here; leave it out")
        return value


class Body(BaseModel):
    """A body that takes no unknown fields. A field that is null counts as left out, as OpenAI's do."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class DrawingOptions(Body):
    """What an image may be asked for, beyond OpenAI's fields. The names are those of diffusers' pipelines."""

    negative_prompt: Text = Field(default="", description="what the image should not show")
    num_inference_steps: int | None = Field(
        default=None, ge=1, description="number of Euler steps; by default what `quality` says"
    )
    guidance_scale: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="by default the model's; 1 disables guidance and halves the cost",
    )
    shift: float | None = Field(default=None, allow_inf_nan=False, description="time-grid shift; default: the model's")
    seed: int | None = Field(default=None, ge=0, description="image i is drawn from seed + i; random by default")
    size: str = Field(default="auto", pattern=r"^(auto|\d{1,5}x\d{1,5})$", description="auto, or WIDTHxHEIGHT")
    quality: Quality = Field(default="auto", description="low: half the model's steps; high and hd: twice as many")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100, description="quality of JPEG and WebP")
    priority: int = Field(default=0, ge=-2, le=2, description="requests with a higher priority are served first")
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="seconds, then it fails")

    @model_validator(mode="before")
    @classmethod
    def _take_sides(cls, data: Any) -> Any:
        """Takes `width` and `height`, which other servers of diffusion models have instead of `size`."""
        if not isinstance(data, dict) or (data.get("width") is None and data.get("height") is None):
            return data
        sides = {name: data.get(name) for name in ("width", "height")}
        if data.get("size") is not None or not all(isinstance(side, int) for side in sides.values()):
            raise ValueError("give size, or the whole numbers width and height")
        others = {name: value for name, value in data.items() if name not in sides}
        return others | {"size": "{width}x{height}".format(**sides)}

    @model_validator(mode="after")
    def _check_compression(self) -> DrawingOptions:
        # 100 is OpenAI's default, for png too.
        if self.output_compression not in (None, 100) and self.output_format == "png":
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
    user: Name = Field(default="", description="who asks, for fairness")
    safety_identifier: Name = Field(default="", description="newer name of user")
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=MOST_PARTIAL_IMAGES, description="only with stream")
    complexity: Unused = None
    frame_count: Annotated[Any, Only(1)] = None
    frame_duration_ms: Annotated[Any, Only()] = None
    style: Annotated[Any, Only()] = None
    svg: Annotated[Any, Only()] = None

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
    prompt_cache_breakpoint: Unused = None


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] = Field(default="auto", description="changes nothing")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Unused = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _form_of(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]
Content = Annotated[Annotated[Text, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_form_of)]
"""An error is of the form that the content has, not of both."""


class ChatMessage(Body):
    """One message. A client may send back what it got as an assistant's message, with fields that change nothing."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    images: list[ImagePart] = Field(default=[], max_length=MAX_PARTS, description="what the assistant drew")

    @property
    def characters(self) -> int:
        """Length of its text."""
        if isinstance(self.content, list):
            return sum(len(part.text) for part in self.content if isinstance(part, TextPart))
        return len(self.content or "")


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="changes nothing")


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class ChatBody(DrawingOptions):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    model: str | None = None
    modalities: list[Literal["text", "image"]] = Field(default=["text"], min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, description=f"of the answer; default {DEFAULT_MAX_NEW_TOKENS}")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="another name of max_tokens")
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False, description="0: the most likely token")
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    stop: Stops = Field(default=[], description="texts that end the answer")
    n: Literal[1] = 1
    user: Name = ""
    safety_identifier: Name = Field(default="", description="newer name of user")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    metadata: Unused = None
    parallel_tool_calls: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    reasoning_effort: Unused = None
    service_tier: Unused = None
    store: Unused = None
    verbosity: Unused = None
    audio: Annotated[Any, Only()] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    logit_bias: Annotated[Any, Only({})] = None
    logprobs: Annotated[Any, Only(False)] = None
    moderation: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    web_search_options: Annotated[Any, Only()] = None

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, data: Any) -> Any:
        """Takes the fields of a nested `extra_body`, which clients without OpenAI's library send as it is."""
        if isinstance(data, dict) and isinstance(data.get("extra_body"), dict):
            outer = {name: value for name, value in data.items() if name != "extra_body" and value is not None}
            return data["extra_body"] | outer
        return data

    @model_validator(mode="after")
    def _check_text(self) -> ChatBody:
        characters = sum(message.characters for message in self.messages)
        if characters > MAX_CONVERSATION_TEXT:
            raise ValueError(f"the messages have {characters} characters, the limit is {MAX_CONVERSATION_TEXT}")
        return self

    @property
    def draws(self) -> bool:
        """Whether an image is asked for, instead of an answer."""
        return "image" in self.modalities

    @property
    def max_new_tokens(self) -> int:
        """Largest number of tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_NEW_TOKENS


def field_place(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """Returns where a body is wrong, from pydantic's location: without the names of the forms that a field may have."""
    place: list[str | int] = []
    for before, part in zip((None, *location), location, strict=False):
        is_form = before == "content" and part in ("text", "parts")
        is_kind = isinstance(before, int) and "content" in location and part in ("text", "image_url")
        if not (is_form or (is_kind and place[-2:-1] != ["messages"])):
            place.append(part)
    return tuple(place)
