"""The page: draw, ask, compare and look at the bundle, in Gradio over a service.

It needs no internet: fonts are the system's, and nothing is fetched or reported.
"""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from runtime.answers import DEFAULT_MAX_NEW_TOKENS, AnswerSettings
from runtime.chat import user_message
from runtime.errors import CancelledError, InputError, LatteFlowError, one_line
from runtime.flow_time import LARGEST_GUIDANCE_SCALE, SamplingDefaults
from runtime.images import png_bytes
from runtime.playground.calls import command_line, curl, python_call
from runtime.playground.following import Frame, Sessions, answer, draw
from runtime.serving.requests import AnswerRequest, GenerationRequest
from runtime.serving.service import ServedModel, Service

TITLE = "LaTtE-Flow playground"
SIDE = 280
"""Height of an image on the page, in pixels."""
BUTTONS = ["download", "fullscreen"]
CACHE_SECONDS = 3600
"""Images of the page are files of Gradio's; older ones are deleted, and all at the end."""
IN_ALL = 64
"""Requests of one kind that pages may have open together."""
CSS = """
.groups {display: flex; gap: 2px; font-size: 0.85rem}
.groups span {padding: 2px 4px; text-align: center; border-radius: 4px; background: var(--background-fill-secondary);
  color: var(--body-text-color)}
.groups .now {background: var(--primary-500); color: white; font-weight: 600}
#images img, #trajectory img, #past img, .pixels img {image-rendering: pixelated}
#images .grid-wrap {height: auto; max-height: none}
#past img, .pixels img {width: 100%; height: 100%; object-fit: contain}
.report pre {font-size: 0.75rem; line-height: 1.25; overflow-x: auto}
"""
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
)


@dataclass(frozen=True)
class Shown:
    """What a page shows besides its service."""

    bundle: str = "BUNDLE"
    """The bundle's path, in the calls that it shows."""
    report: str = ""
    """What `latte-flow inspect` prints of the bundle; empty where it is elsewhere."""
    other: Service | None = None
    """The service of another bundle, to compare with."""
    other_name: str = ""


def make_page(service: Service, shown: Shown = Shown()) -> gr.Blocks:
    """Returns the page of a service; `mount` puts it into an application."""
    sessions = Sessions()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        model = service.model
        gr.Markdown(f"# {TITLE}\n{model.width}x{model.height} pixels, {model.groups} expert groups")
        with gr.Tab("Draw"):
            drawn = _draw_tab(service, sessions, shown)
        with gr.Tab("Ask") as ask_tab:
            image = _ask_tab(service, sessions)
        with gr.Tab("Compare"):
            _compare_tab(service, sessions, shown)
        if shown.report:
            with gr.Tab("Bundle"):
                gr.HTML(f"<div class='report'><pre>{html.escape(shown.report)}</pre></div>")
        ask_tab.select(_newest, [drawn, image], image, api_visibility="private")
        page.unload(_cancel_with(sessions))
    return page


def mount(app: Any, page: gr.Blocks, max_file_bytes: int) -> Any:
    """Puts a page at `/` of a FastAPI application; its other routes stay."""
    # Gradio refuses files that were not uploaded only after a launch, and to mount a page is none.
    page.has_launched = True
    return gr.mount_gradio_app(
        app, page, path="/", theme=THEME, css=CSS, max_file_size=max_file_bytes, ssr_mode=False, footer_links=[]
    )


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


def _cancel_with(sessions: Sessions) -> Callable[[gr.Request], None]:
    def cancel(request: gr.Request) -> None:
        sessions.cancel(_session(request))

    return cancel


def _newest(drawn: list[Any] | None, image: np.ndarray | None) -> Any:
    """Sends the first drawn image over to the question, unless there is one already."""
    if image is not None or not drawn:
        return gr.skip()
    return drawn[0][0]


def _failure(error: Exception) -> gr.Error:
    """Returns an error as the page shows it: one line; one that is not ours says nothing of its inside."""
    message = one_line(error) if isinstance(error, LatteFlowError) else "internal error; see the terminal"
    return gr.Error(message, duration=None, print_exception=not isinstance(error, LatteFlowError))


def _settings(sampling: SamplingDefaults) -> tuple[gr.Textbox, gr.Textbox, gr.Component, gr.Slider, gr.Number]:
    """Returns the fields of a drawing; those that the model has no use for are hidden."""
    choice = not sampling.guidance_distilled
    prompt = gr.Textbox(label="Prompt", placeholder="a small red circle", lines=2, elem_id="prompt")
    with gr.Accordion("More", open=False, visible=choice):
        negative = gr.Textbox(label="Negative prompt")
    steps: gr.Component = gr.Slider(1, 200, sampling.num_inference_steps, step=1, label="Steps")
    if sampling.allowed_steps is not None:
        steps = gr.Radio(list(sampling.allowed_steps), value=sampling.num_inference_steps, label="Steps")
    scale = gr.Slider(
        0,
        LARGEST_GUIDANCE_SCALE / 10,
        sampling.guidance_scale,
        step=0.5,
        label="Guidance scale (1: none)",
        visible=choice,
    )
    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    return prompt, negative, steps, scale, seed


def _draw_tab(service: Service, sessions: Sessions, shown: Shown) -> gr.Gallery:
    with gr.Row():
        with gr.Column():
            prompt, negative, steps, scale, seed = _settings(service.model.sampling)
            count = gr.Slider(1, service.limits.max_images_per_request, 1, step=1, label="Images")
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Cancel", elem_id="cancel")
            groups = gr.HTML(_groups_bar(service.model, None), elem_id="groups")
        with gr.Column():
            gallery = gr.Gallery(
                label="Images",
                columns=2,
                format="png",
                elem_id="images",
                buttons=BUTTONS,
                type="numpy",
                interactive=False,
            )
            strip = gr.Gallery(
                label="Trajectory of the first image, from noise to data",
                columns=13,
                rows=1,
                height=110,
                format="png",
                elem_id="trajectory",
                interactive=False,
                buttons=[],
                allow_preview=False,
            )
            scrub = gr.Slider(0, 1, 0, step=1, label="Look back", visible=False, elem_id="scrub")
            past = gr.Image(show_label=False, height=SIDE, format="png", visible=False, buttons=[], elem_id="past")
    with gr.Accordion("The same from elsewhere", open=False):
        line = gr.Code(label="Command line", language="shell", interactive=False)
        call = gr.Code(label="Python", language="python", interactive=False)
        http = gr.Code(label="HTTP", language="shell", interactive=False)
    frames = gr.State([])
    outputs = [gallery, strip, groups, frames, scrub, past, line, call, http]

    def run(
        prompt: str, negative: str, steps: float, scale: float, seed: float, count: float, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        session, sampling = _session(request), service.model.sampling
        try:
            drawing = _drawing(service, prompt, negative, steps, scale, seed, count, session)
            base = str(request.request.base_url) if request.request is not None else "http://127.0.0.1:8080"
            yield {
                line: command_line(drawing, sampling, shown.bundle),
                call: python_call(drawing, sampling, shown.bundle),
                http: curl(drawing, sampling, base),
                scrub: gr.update(visible=False),
                past: gr.update(visible=False),
            }
            with tempfile.TemporaryDirectory() as folder:
                files = _Files(Path(folder))
                for frame in draw(service, drawing, sessions, session):
                    yield _updates(frame, files)
        except CancelledError:
            yield {groups: _groups_bar(service.model, None, "cancelled")}
        except Exception as error:
            raise _failure(error) from error

    def _updates(frame: Frame, files: _Files) -> dict[Any, Any]:
        told = f"step {frame.step} of {frame.steps}"
        updates: dict[Any, Any] = {groups: _groups_bar(service.model, frame.group, told)}
        if frame.fresh:
            updates |= {gallery: files.of(frame.images), strip: files.of(frame.trajectory)}
        if frame.done:
            last = len(frame.trajectory) - 1
            updates |= {
                frames: list(frame.trajectory),
                scrub: gr.update(visible=last > 0, maximum=max(last, 1), value=last),
                past: gr.update(visible=last > 0, value=frame.trajectory[-1]),
            }
        return updates

    inputs = [prompt, negative, steps, scale, seed, count]
    gr.on(
        [button.click, prompt.submit],
        run,
        inputs,
        outputs,
        concurrency_limit=IN_ALL,
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(_cancel_with(sessions), api_visibility="private", queue=False)
    scrub.change(_at, [frames, scrub], past, show_progress="hidden", api_visibility="private")
    return gallery


class _Files:
    """Images as files of a folder, each written once.

    Gradio writes an image again whenever it is shown again, also while the browser reads it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: list[tuple[np.ndarray, str]] = []

    def of(self, images: Sequence[np.ndarray]) -> list[str]:
        """Returns the path of each image."""
        return [self._path_of(image) for image in images]

    def _path_of(self, image: np.ndarray) -> str:
        for known, path in self._known:
            if known is image:
                return path
        file = self._folder / f"{len(self._known)}.png"
        file.write_bytes(png_bytes(Image.fromarray(image)))
        self._known.append((image, str(file)))
        return str(file)


def _at(frames: list[np.ndarray], place: float) -> np.ndarray:
    return frames[int(place)]


def _drawing(
    service: Service, prompt: str, negative: str, steps: float, scale: float, seed: float, count: float, session: str
) -> GenerationRequest:
    """Returns the request for what a page's fields say.

    Raises:
        InputError: it cannot work.
    """
    drawing = GenerationRequest(
        prompt=(prompt or "").strip(),
        negative_prompt=(negative or "").strip(),
        num_inference_steps=int(steps),
        guidance_scale=float(scale),
        shift=service.model.sampling.shift,
        seed=int(seed or 0),
        num_images=int(count),
        client_id=f"page {session}" if session else "",
    )
    drawing.check(service.limits)
    return drawing


def _groups_bar(model: ServedModel, working: int | None, told: str = "") -> str:
    """Returns the expert groups along flow time, from noise to data, and which one works."""
    parts = []
    for group in range(model.groups):
        start, end = model.schedule.interval(group)
        kind = " class='now'" if group == working else ""
        parts.append(f"<span{kind} style='flex: {end - start:g}' title='{start:g} to {end:g}'>{group}</span>")
    now = "" if working is None else f", expert group {working} works"
    return (
        f"<div class='groups' role='img' aria-label='expert groups from noise to data'>{''.join(parts)}</div>"
        f"<small aria-live='polite'>{html.escape(told)}{now}</small>"
    )


def _ask_tab(service: Service, sessions: Sessions) -> gr.Image:
    with gr.Row():
        image = gr.Image(
            label="Image",
            height=SIDE,
            elem_classes="pixels",
            type="numpy",
            format="png",
            sources=["upload", "clipboard"],
        )
        with gr.Column():
            question = gr.Textbox(label="Question", placeholder="what colour is the circle?", elem_id="question")
            length = gr.Slider(1, service.limits.max_new_tokens, DEFAULT_MAX_NEW_TOKENS, step=1, label="Most tokens")
            with gr.Row():
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Cancel")
            text = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")

    def run(image: np.ndarray | None, question: str, length: float, request: gr.Request) -> Iterator[str]:
        session = _session(request)
        try:
            if not (question or "").strip():
                raise InputError("the question is empty; write one")
            images = [] if image is None else [np.ascontiguousarray(image[..., :3])]
            conversation = (user_message(images, question),)
            asking = AnswerRequest(
                conversation, AnswerSettings(int(length)), client_id=f"page {session}" if session else ""
            )
            yield from answer(service, asking, sessions, session)
        except CancelledError:
            return
        except Exception as error:
            raise _failure(error) from error

    gr.on(
        [button.click, question.submit],
        run,
        [image, question, length],
        text,
        concurrency_limit=IN_ALL,
        api_visibility="private",
    )
    stop.click(_cancel_with(sessions), api_visibility="private", queue=False)
    return image


def _compare_tab(service: Service, sessions: Sessions, shown: Shown) -> None:
    other = shown.other
    if other is None:
        gr.Markdown("Name a second bundle to compare with: `latte-flow playground BUNDLE --compare OTHER`")
        return
    names = [Path(name).name for name in (shown.bundle, shown.other_name)]
    if names[0] == names[1]:
        names = [shown.bundle, shown.other_name]
    prompt, negative, steps, scale, seed = _settings(service.model.sampling)
    button = gr.Button("Draw with both", variant="primary", elem_id="compare")
    with gr.Row():
        here = gr.Image(label=names[0], height=SIDE, elem_classes="pixels", format="png", buttons=BUTTONS)
        there = gr.Image(label=names[1], height=SIDE, elem_classes="pixels", format="png", buttons=BUTTONS)
        difference = gr.Image(
            label="Difference, 8 times", height=SIDE, elem_classes="pixels", format="png", buttons=BUTTONS
        )
    told = gr.Markdown(elem_id="psnr")

    def run(
        prompt: str, negative: str, steps: float, scale: float, seed: float, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        session = _session(request)
        images: list[np.ndarray] = []
        try:
            for one, component in ((service, here), (other, there)):
                # A distilled model draws as it can.
                sampling = one.model.sampling
                own_steps = sampling.nearest_steps(int(steps))
                if sampling.guidance_distilled:
                    drawing = _drawing(one, prompt, "", own_steps, sampling.guidance_scale, seed, 1, session)
                else:
                    drawing = _drawing(one, prompt, negative, own_steps, scale, seed, 1, session)
                for frame in draw(one, drawing, sessions, session):
                    if frame.fresh:
                        yield {component: frame.images[0]}
                images.append(frame.images[0])
            first, second = images
            with_steps = f"; {names[1]} in {own_steps} steps" if own_steps != int(steps) else ""
            yield {difference: difference_of(first, second), told: f"PSNR {psnr(first, second)}{with_steps}"}
        except CancelledError:
            return
        except Exception as error:
            raise _failure(error) from error

    gr.on(
        [button.click, prompt.submit],
        run,
        [prompt, negative, steps, scale, seed],
        [here, there, difference, told],
        concurrency_limit=IN_ALL,
        show_progress="hidden",
        api_visibility="private",
    )


def difference_of(first: np.ndarray, second: np.ndarray, times: int = 8) -> np.ndarray:
    """Returns the absolute difference of two images `[height, width, 3]` uint8, enlarged."""
    return np.clip(np.abs(first.astype(int) - second) * times, 0, 255).astype(np.uint8)


def psnr(first: np.ndarray, second: np.ndarray) -> str:
    """Returns the peak signal-to-noise ratio of two images of uint8, in words."""
    error = float(np.mean((first.astype(float) - second) ** 2))
    return "infinite: the images are equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"
