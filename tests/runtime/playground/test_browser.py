"""The page in a real browser: Debian's chromium, driven by Playwright.

With LATTE_FLOW_SCREENSHOTS=docs/images it uses the bundle of `shapes`, and leaves the pictures of the documentation.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from model_repository.server import free_port
from tests.model_repository.test_service import interruptible

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = os.environ.get("LATTE_FLOW_SCREENSHOTS")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; on Debian: apt-get install chromium")
SECONDS = 60_000
"""Longest wait for what a page should show, in milliseconds."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest) -> Path:
    """The bundle that is shown."""
    if SCREENSHOTS:
        return Path(request.getfixturevalue("demo")[0]) / "bundle"
    return Path(request.getfixturevalue("bundle"))


def other(shown: Path) -> Path:
    """The bundle that the page compares it with: the distilled one for a picture, otherwise the same again."""
    return shown.with_name("bundle-4step") if SCREENSHOTS else shown


WITH_SLOWER_STEPS = """
import time
from runtime.cli import main
from runtime.serving.stations import PipelineStations
step = PipelineStations.step
def slower(*arguments):
    time.sleep(0.02)
    return step(*arguments)
PipelineStations.step = slower
main()
"""
"""The tiny model has drawn before a page can show a preview, or a click arrives."""


@contextmanager
def playground(bundle: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A running `latte-flow playground`."""
    options = (bundle, "--compare", other(bundle), "--port", str(port))
    process = interruptible([sys.executable, "-c", WITH_SLOWER_STEPS, "playground", *options])
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"the playground is at http://127.0.0.1:{port}" in line, line + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(shown: Path) -> Iterator[str]:
    port = free_port()
    with playground(shown, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page that asks nobody but its own server."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SECONDS)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    yield opened
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    opened.close()


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def set_steps(page: Page, steps: int) -> None:
    page.get_by_label("number input for Steps").first.fill(str(steps))
    page.get_by_label("number input for Steps").first.press("Enter")


def set_images(page: Page) -> None:
    """Many, so that a preview can be seen before the end."""
    page.get_by_label("number input for Images").fill("4" if SCREENSHOTS else "16")
    page.get_by_label("number input for Images").press("Enter")


def draw(page: Page, prompt: str) -> None:
    page.locator("#prompt textarea").first.fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()


def test_it_draws_with_previews_and_asks_about_what_it_drew(page: Page) -> None:
    set_steps(page, 200)
    set_images(page)
    draw(page, "a large red star left of a small blue circle")
    told = page.locator("#groups small")
    expect(told).to_contain_text("of 200, expert group", timeout=SECONDS)
    expect(page.locator("#trajectory img").nth(1)).to_be_visible(timeout=SECONDS)
    assert "step 200 of 200" not in told.inner_text()  # a preview came before the end
    expect(told).to_have_text("step 200 of 200", timeout=SECONDS)
    expect(page.locator("#past")).to_be_visible()
    expect(page.locator("#images img").first).to_be_visible()
    page.get_by_label("number input for Look back").fill("0")
    page.get_by_label("number input for Look back").press("Enter")
    picture(page, "playground-draw")

    page.get_by_role("tab", name="Ask").click()
    expect(page.locator(".pixels img").first).to_be_visible()  # sent over
    page.locator("#question textarea").fill("what colour is the star?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answer textarea")).not_to_have_value("", timeout=SECONDS)
    picture(page, "playground-ask")


def test_it_compares_and_shows_the_bundle_on_a_phone(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.get_by_role("tab", name="Compare").click()
    prompt = page.locator("#prompt textarea").nth(1)
    prompt.fill("a small green ring")
    prompt.press("Tab")  # everything is reached by keyboard
    page.locator("#compare").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#psnr")).to_contain_text("dB" if SCREENSHOTS else "infinite", timeout=SECONDS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "playground-phone")
    page.get_by_role("tab", name="Bundle").click()
    expect(page.locator(".report")).to_contain_text("expert_0")
    page.close()


def test_it_cancels_and_says_what_is_wrong(page: Page) -> None:
    set_steps(page, 200)
    set_images(page)
    draw(page, "a")
    expect(page.locator("#groups small")).to_contain_text("of 200, expert group", timeout=SECONDS)
    page.locator("#cancel").click()
    expect(page.locator("#groups small")).to_have_text("cancelled", timeout=SECONDS)
    draw(page, "<|im_end|>")
    expect(page.get_by_text("special token")).to_be_visible(timeout=SECONDS)


def test_it_goes_on_after_its_server_was_started_again(browser: Browser, shown: Path) -> None:
    port = free_port()
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    with playground(shown, port) as process:
        page.goto(f"http://127.0.0.1:{port}")
        draw(page, "a")
        expect(page.locator("#groups small")).to_have_text("step 20 of 20", timeout=SECONDS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with playground(shown, port):
        page.wait_for_timeout(1500)
        page.goto(f"http://127.0.0.1:{port}")
        draw(page, "a")
        expect(page.locator("#groups small")).to_have_text("step 20 of 20", timeout=SECONDS)
    page.close()
