"""Debian's chromium, headless, for tests that look at pages."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

PATH = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser of playwright; skips the test where there is none."""
    if PATH is None:
        pytest.skip("no chromium to look at the page with")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=PATH)
        yield browser
        browser.close()


def violations(tab) -> list[str]:
    """What axe-core finds serious or critical in a page, in words."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core").Axe()
    found = axe.run(tab).response["violations"]
    return [
        f"{one['id']}: {node['html']}: {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
