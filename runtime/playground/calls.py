"""The same drawing from elsewhere: the command line, the Python call, and the HTTP request."""

from __future__ import annotations

import json
import shlex
from typing import Any

from runtime.flow_time import SamplingDefaults
from runtime.serving.requests import GenerationRequest

NAMES = ("negative_prompt", "num_inference_steps", "guidance_scale", "shift", "seed")
"""Arguments that all three take by these names."""


def command_line(request: GenerationRequest, sampling: SamplingDefaults, bundle: str) -> str:
    """Returns the command that draws a request's images."""
    options: list[str] = []
    for name, value in _changed(request, sampling).items():
        options.append(f"--{name.replace('_', '-')}={value}")
    if request.num_images > 1:
        options.append(f"--num-images-per-prompt={request.num_images}")
    # A prompt that begins with a dash would be an option.
    words = [*options, "--", request.prompt] if request.prompt.startswith("-") else [request.prompt, *options]
    return shlex.join(["latte-flow", "generate", bundle, *words])


def python_call(request: GenerationRequest, sampling: SamplingDefaults, bundle: str) -> str:
    """Returns the lines of Python that draw a request's images."""
    arguments = _changed(request, sampling)
    if request.num_images > 1:
        arguments["num_images_per_prompt"] = request.num_images
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return (
        "from latte_flow import LatteFlowPipeline\n\n"
        f"pipe = LatteFlowPipeline.from_pretrained({bundle!r})\n"
        f"images = pipe({request.prompt!r}{given}).images"
    )


def curl(request: GenerationRequest, sampling: SamplingDefaults, url: str) -> str:
    """Returns the HTTP request that draws a request's images, to a gateway at a URL."""
    body: dict[str, Any] = {"prompt": request.prompt} | _changed(request, sampling)
    if request.num_images > 1:
        body["n"] = request.num_images
    return (
        f"curl {shlex.quote(url.rstrip('/') + '/v1/images/generations')} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def _changed(request: GenerationRequest, sampling: SamplingDefaults) -> dict[str, Any]:
    """Returns the seed, and what differs from the model's defaults."""
    defaults = {"negative_prompt": "", **sampling.model_dump()}
    return {
        name: getattr(request, name) for name in NAMES if name == "seed" or getattr(request, name) != defaults[name]
    }
