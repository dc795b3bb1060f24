"""Pages of `construct`: hostile texts stay texts, and people decide with the keyboard."""

import dataclasses
import json
import re

import pytest

from mmsr1_jax.apps.construction import report_page, review_page
from mmsr1_jax.config import Config
from mmsr1_jax.data.construction import reviews
from mmsr1_jax.data.construction.concepts import Concept
from mmsr1_jax.data.construction.labels import Labelled
from mmsr1_jax.data.construction.meter import Meter
from mmsr1_jax.data.construction.pipeline import STAGES, ConstructionResult, question_id
from mmsr1_jax.data.construction.questions import Calculation, Draft
from mmsr1_jax.data.construction.sources import Source
from mmsr1_jax.data.construction.stages import StageResult
from tests.browser import violations
from tests.question_files import png

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\""


def counted(folder):
    """Return a meter of some requests."""
    meter = Meter(folder / "calls.jsonl", {})
    for name in ["checker"] * 7 + ["serper"] * 2:
        meter.before_request(name)
    meter.add_tokens("checker", 1_000_000, 5)
    return meter


def item(number, text):
    source = Source(
        concept=text, names=(text,), band="tail", url="javascript:alert(3)", page=text,
        image="images/a.jpg" if number else "images/missing.jpg", image_hash="00", other_hashes=(),
        image_title=text, image_link=text, licence=text,
    )  # fmt: skip
    calculation = Calculation(operation="sum", numbers=(text, "2"))
    draft = Draft(source=source, question=f"{text} {number}?", answer=text, evidence=text,
                  calculation=calculation)  # fmt: skip
    return Labelled(draft=draft, aliases=(text,), category=text)


@pytest.fixture
def items():
    return [item(number, HOSTILE) for number in range(3)]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(png(1, (400, 300)))
    return tmp_path


def made(items, folder):
    config = Config()
    config.construction.prices = ("checker=1/0",)
    results = {name: StageResult(kept=list(items)) for name in STAGES}
    results["checked"].drop(HOSTILE, f"reason {HOSTILE}")
    return ConstructionResult(
        config=config, concepts=[Concept(name=HOSTILE)], num_concepts=5, results=results,
        questions=items, added={HOSTILE: 3}, meter=counted(folder),
    )  # fmt: skip


def test_the_report_escapes_everything_and_allows_no_script(items, out):
    report_page.write(out / "report.html", made(items, out), out)
    page = (out / "report.html").read_text()
    assert "<script" not in page and "script-src 'none'" in page and "onerror=alert" in page
    assert not re.search("<img[^>]*onerror", page)
    assert page.count('class="item"') == 3
    assert "<td>checker</td>" in page and ">1.00<" in page and page.count("data:image/jpeg") == 2
    assert "3 questions about 1 of 5 concepts" in page


def test_the_review_page_has_texts_as_data_only(items, out):
    review_page.write(out / "review.html", items, out)
    page = (out / "review.html").read_text()
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert "default-src 'none'" in page and "unsafe" not in page.split("</head>")[0]
    data = json.loads(re.search('id="data">(.*?)</script>', page)[1])
    assert [entry["question"] for entry in data["items"]] == [f"{HOSTILE} {i}?" for i in range(3)]
    assert data["items"][0]["image"] == "" and data["items"][1]["image"].startswith("data:image/")


def test_decisions_are_made_with_the_keyboard_saved_and_read(browser, items, out):
    review_page.write(out / "review.html", items, out)
    context = browser.new_context(accept_downloads=True)
    tab, problems = context.new_page(), []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    tab.goto((out / "review.html").as_uri())
    assert violations(tab) == []
    tab.fill("#reviewer", "Ann O'Neil")
    tab.press("#reviewer", "Tab")
    tab.locator("#item").focus()
    assert tab.locator(".question").inner_text() == f"{HOSTILE} 0?"
    tab.keyboard.press("a")
    assert tab.locator("#status").inner_text() == "1 of 3 decided"
    tab.keyboard.press("e")
    assert violations(tab) == []
    tab.fill("#question", "Who built this?")
    tab.fill("#answer", "Rossi")
    tab.press("#answer", "Control+Enter")
    tab.keyboard.press("r")
    tab.keyboard.press("u")
    assert tab.locator("#status").inner_text() == "All questions are decided."
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(out / "ann.json")
    review = reviews.read(out / "ann.json")
    assert review.reviewer == "Ann O'Neil"
    decisions = [review.decisions[question_id(entry)] for entry in items]
    assert [decision.verdict for decision in decisions] == ["accept", "edit", "reject"]
    assert dataclasses.astuple(decisions[1])[1:] == ("Who built this?", "Rossi")
    second = browser.new_context().new_page()  # another browser continues from the file
    second.goto((out / "review.html").as_uri())
    second.set_input_files("#load", out / "ann.json")
    second.wait_for_function("document.getElementById('status').textContent.startsWith('3 of 3')")
    assert second.input_value("#reviewer") == "Ann O'Neil"
    assert not problems
    context.close()
    second.context.close()


def test_a_construction_without_questions_has_pages_too(out):
    report_page.write(out / "report.html", made([], out), out)
    review_page.write(out / "review.html", [], out)
    assert "0 samples" in (out / "report.html").read_text()
