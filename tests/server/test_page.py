"""The built-in page, as a person sees it: in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from tests.server.conftest import Server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the package playwright is not installed"
)
expect = playwright.expect
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(which, BROWSERS)), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"there is no browser: none of {', '.join(BROWSERS)} is installed"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        # a container has no room for the sandbox's namespaces; the page is our own
        browser = api.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.errors = errors
    yield page
    context.close()


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Its answers end after some frames."""
    flags = ("--alias", "tiny", "-c", 4096, "-t", 1, "-n", 600)
    running = Server(model, *flags).wait_until_ready()
    yield running
    assert running.terminate() == 0


def ask(page: Any, question: str) -> None:
    page.fill("#text", question)
    page.press("#text", "Enter")


def test_an_answer_streams(page: Any, server: Server) -> None:
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(server.url) else elsewhere.append(r.url))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.evaluate(
        """() => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const answer = document.querySelector('.assistant');
                if (answer) window.lengths.add(answer.textContent.length);
            }).observe(document.querySelector('#turns'), {subtree: true, childList: true});
        }"""
    )
    ask(page, "Say something long.")
    expect(page.locator(".notes")).to_contain_text("tokens")
    assert page.inner_text(".user") == "Say something long."
    assert len(page.evaluate("[...window.lengths]")) > 3  # it grew piece by piece
    assert page.inner_text(".assistant").strip()
    ask(page, "And more?")
    expect(page.locator(".notes", has_text="tokens")).to_have_count(2)
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert not elsewhere
    assert not page.errors


def test_stop_and_new(page: Any, serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 32768, "-t", 1).wait_until_ready()
    page.goto(server.url)
    ask(page, "Talk for ever.")
    expect(page.locator(".assistant")).to_have_text(re.compile(r".{20}"))
    expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    expect(page.locator(".notes")).to_have_text("stopped")
    server.wait_until_idle()
    assert page.inner_text("#send") == "Send"
    ask(page, "And now?")  # what was said counts
    expect(page.locator(".assistant").nth(1)).to_have_text(re.compile(r".{20}"))
    assert roles(page) == ["user", "assistant", "user"]
    page.click("#new")  # in the middle of the answer
    expect(page.locator("#send")).to_have_text("Send")
    server.wait_until_idle()
    assert (roles(page), page.input_value("#text"), page.locator(".turn").count()) == ([], "", 0)
    ask(page, "Something else.")
    expect(page.locator(".assistant")).to_have_text(re.compile(r".{20}"))
    assert roles(page) == ["user"]
    assert not page.errors


def roles(page: Any) -> Any:
    """Of the conversation as it will be sent."""
    return page.evaluate("messages.map(message => message.role)")


def test_what_a_model_says_is_no_markup(page: Any, server: Server) -> None:
    page.goto(server.url)
    said = "<img src=x onerror=alert(1)>\n```js\n<b>1</b>\n```\nend"
    page.evaluate("said => { turn('assistant', said) }", said)
    assert page.locator(".assistant img, .assistant b").count() == 0
    assert page.inner_text(".assistant pre") == "<b>1</b>"
    assert page.locator(".assistant p").all_inner_texts() == ["<img src=x onerror=alert(1)>", "end"]
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None  # the policy allows the page's own script alone


def test_a_key_is_asked_for(page: Any, serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 1024, "-t", 1, "-n", 20, "--api-key", "sesame").wait_until_ready()
    page.goto(server.url)
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    expect(page.locator("#model")).not_to_be_empty()
    ask(page, "Hello")
    expect(page.locator(".notes")).to_contain_text("tokens")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(browser: Any, server: Server, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 700})
    page = context.new_page()
    page.goto(server.url)
    page.evaluate(
        "turn('user', 'word'.repeat(100)); turn('assistant', '```\\n' + 'x'.repeat(500) + '\\n```')"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#text").bounding_box()
    assert box["y"] + box["height"] <= 700
    assert contrast(page, "body") > 7
    assert contrast(page, "#send") > 4.5
    context.close()


def contrast(page: Any, selector: str) -> float:
    """Of text and ground, as WCAG counts it."""

    def luminance(color: str) -> float:
        numbers = [int(n) / 255 for n in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = f"getComputedStyle(document.querySelector('{selector}'))"
    levels = [luminance(page.evaluate(f"{style}.{name}")) for name in ("color", "backgroundColor")]
    return (max(levels) + 0.05) / (min(levels) + 0.05)
