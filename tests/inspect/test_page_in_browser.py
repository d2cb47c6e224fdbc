"""The page of `dynamask inspect` in headless Chromium: the slider, the keyboard, both colour schemes, no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.inspect import inspect_text, inspection_page
from tests.conftest import variant

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
if BROWSER is None:
    pytest.skip("needs Chromium (apt-get install chromium-headless-shell), or CHROMIUM=path", allow_module_level=True)

pytestmark = pytest.mark.slow

PROMPT, NEW = 36, 4
LENGTH = PROMPT + NEW
FOCUSED = """() => {
  const focused = document.activeElement;
  return focused.id || focused.name || focused.parentElement.id || focused.parentElement.parentElement.id;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def found() -> Any:
    return inspect_text(variant("dma-heads"), torch.arange(PROMPT)[None] * 7 % 50, new_tokens=NEW)


@pytest.fixture(scope="module")
def file(found: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(inspection_page(found, [f" w{i}" for i in range(LENGTH)], "tiny <model>"), encoding="utf-8")
    return path


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light-desktop", "dark-phone"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.append(asked.url) if not asked.url.startswith("file:") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=10_000)
    yield page
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    context.close()


def held(page: Any) -> str:
    return str(page.inner_text("#held"))


def expected(found: Any, position: int) -> str:
    alive = found.alive(position)
    kept, every = int(alive.sum()), alive.shape[0] * alive.shape[1] * (position + 1)
    return f"Holds {kept} of {every} keys ({int(100 * kept / every + 0.5)} %)"


def test_the_slider_shows_what_is_alive(page: Any, found: Any) -> None:
    assert held(page) == expected(found, LENGTH - 1)
    for position in (0, 17, 30):
        page.evaluate(
            f"const s = document.getElementById('position'); s.value = {position}; s.dispatchEvent(new Event('input'))"
        )
        assert held(page) == expected(found, position)
        page.select_option("#layer", "1")
        page.select_option("#head", "1")
        colored = page.evaluate("[...document.querySelectorAll('#text .s9')].map((span) => Number(span.dataset.j))")
        assert colored == found.alive(position)[1, 1].nonzero()[:, 0].tolist()
        page.click("#all")


def test_the_keyboard_reaches_everything(page: Any, found: Any) -> None:
    page.keyboard.press("Home")
    assert page.inner_text("#where").startswith("Token 1 of 40")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert held(page) == expected(found, 11)
    page.keyboard.press("End")
    assert held(page) == expected(found, LENGTH - 1)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
        if reached[-1] in ("position", "layer", "map"):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus is visible"
        if reached[-1] == "map":
            break
    assert {"position", "mode", "layer", "text", "made", "map"} <= set(reached)
    page.keyboard.press("ArrowRight")  # from layer 0 to layer 1
    assert page.inner_text("#map-note") == "Layer 1, head 0: window of 12 keys."
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#map-note") == "Layer 1, head 1: window of 4 keys."
    page.keyboard.press("a")
    assert page.inner_text("#map-note") == "All heads are shown."


def test_generated_tokens_show_what_they_attended_to(page: Any, found: Any) -> None:
    page.click("#made button:nth-child(2)")
    assert page.is_checked("[name=mode][value=attention]")
    listed = page.eval_on_selector_all("#looked li", "items => items.map((item) => item.title)")
    mean = found.attention.mean[1].clone()
    mean[:2] = 0  # the sinks are named apart
    assert listed[0] == f"token {int(mean.argmax()) + 1}"
    page.check("[name=mode][value=rank]", force=True)
    assert page.inner_text("#high") == "ranked highest"
