"""The page of `serve` in a real browser."""

import pytest

from tests.browser import violations
from tests.serving import HOSTILE, IMAGES, PATIENCE, QUESTIONS, served, wait_for

ACTIONS = ("image_search", "text_search")


@pytest.fixture
def open_page(browser):
    """A function that opens the page as a new user; errors in the page fail the test."""
    contexts, errors = [], []

    def open_page(url, **options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(1000 * PATIENCE)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda sent: None if sent.url.startswith((url, "blob:", "data:"))
               else errors.append(sent.url))  # fmt: skip
        tab.goto(url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def choose(tab, file):
    tab.set_input_files("#image", {"name": "p.png", "mimeType": "image/png", "buffer": file})


def fill(tab, question, file):
    choose(tab, file)
    tab.fill("#question", question)
    tab.press("#question", "Enter")


def shown(tab, selector) -> list[str]:
    return tab.locator(selector).all_text_contents()


def test_three_users_are_answered_concurrently(engine, alone, open_page):
    views = ({}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}})
    with served(engine) as (url, _, gate):
        tabs = [open_page(url, **view) for view in views]
        for tab, question, file in zip(tabs, QUESTIONS, IMAGES, strict=True):
            assert violations(tab) == []
            fill(tab, question, file)
        gate.wait(3)
        for tab in tabs:
            tab.wait_for_selector(".turn .payload")
            assert tab.locator("#stop").is_visible() and tab.locator("#send").is_disabled()
        gate.open()
        for tab, question, episode in zip(tabs, QUESTIONS, alone, strict=True):
            tab.wait_for_selector(".final")
            assert shown(tab, ".episode h2") == [question]
            searches = [turn for turn in episode.turns if turn.action in ACTIONS]
            payloads = [turn.payload or "The whole image" for turn in searches]
            assert shown(tab, ".payload") == payloads
            reasons = shown(tab, ".reason")
            assert len(reasons) == len(episode.turns)
            for text, turn in zip(reasons, episode.turns, strict=True):
                assert turn.problem or text == turn.reason
            assert tab.locator(".results > li").count() == sum(c.num_shown for c in episode.calls)
            assert tab.locator(".results img").count() == len(episode.images) - 1
            if episode.answer is not None:
                assert shown(tab, ".final p") == [episode.answer]
            assert tab.locator("#send").is_enabled() and tab.locator("#stop").is_hidden()
            # External content is text.
            assert HOSTILE in "".join(shown(tab, ".results"))
            assert tab.evaluate("window.hacked") is None
            assert tab.locator("main script, [onerror], a[href^=javascript]").count() == 0
            for details in tab.locator("details summary").all():
                details.click()
            assert violations(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_problems_are_shown_on_the_page(engine, open_page):
    with served(engine) as (url, queue, gate):
        tab = open_page(url)
        problem = tab.locator("#problem")
        tab.press("#question", "Enter")
        assert problem.inner_text() == "Choose an image."
        assert tab.evaluate("document.activeElement.id") == "image"
        fill(tab, "", IMAGES[0])
        assert problem.inner_text() == "Write a question."
        fill(tab, "What?", b"not an image")
        _expect(tab.locator("#problem")).to_contain_text("JPEG")
        choose(tab, bytes(200_000))
        assert problem.inner_text() == "The image is larger than 0.15 MB."
        tab.press("#question", "Enter")  # the earlier image is not used
        assert problem.inner_text() == "Choose an image."
        fill(tab, "What?", IMAGES[0][:2000])
        tab.wait_for_selector(".final.bad")
        assert "cannot be decoded" in tab.locator(".final.bad").inner_text()
        # A stopped question leaves the queue.
        fill(tab, QUESTIONS[0], IMAGES[0])
        gate.wait(1)
        tab.click("#stop")
        _expect(tab.locator(".status").first).to_have_text("Stopped.")
        assert tab.locator("#send").is_enabled()
        gate.open()
        wait_for(lambda: not any(queue._active))


def _expect(locator):
    """Return an assertion of Playwright that waits, since the page does not allow eval."""
    from playwright.sync_api import expect  # may not be installed, see `browser.py`

    expect.set_options(timeout=1000 * PATIENCE)
    return expect(locator)
