"""The system's Chromium, headless, for tests of pages."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

PATH = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def launch_chromium() -> Iterator:
    """Yield a browser of Playwright. Skip the test if Chromium or Playwright is not installed."""
    if PATH is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=PATH)
        yield browser
        browser.close()


def violations(tab) -> list[str]:
    """Return a description of each serious or critical violation that axe-core finds in a page."""
    module = "axe_playwright_python.sync_playwright"
    axe = pytest.importorskip(module, reason="axe-core is not installed").Axe()
    return [
        f"{violation['id']}: {node['html']}: {node['failureSummary']}"
        for violation in axe.run(tab).response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
