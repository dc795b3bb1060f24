"""The report page, as a file and in a real browser."""

import html.parser
import json
import os
import re

import numpy as np
import pytest

from mmsr1_jax.apps.report import page, reader
from tests.browser import violations
from tests.reports import HOSTILE, PAGE, make_episode, make_line

# The page as a file


class PageParser(html.parser.HTMLParser):
    """The page's scripts by id, and all its tags, according to an HTML parser."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self._open = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._open = dict(attributes).get("id", "code")
            self.scripts[self._open] = ""

    def handle_endtag(self, tag):
        self._open = None if tag == "script" else self._open

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] += data


def test_external_text_stays_in_its_block(report, run_with_episodes):
    text = report[0].read_text(encoding="utf-8")
    blocks = PageParser(text)
    assert list(blocks.scripts) == ["summary", "charts", "details", "images", "code"]
    for name in ("summary", "charts", "details", "images"):
        assert "<" not in blocks.scripts[name]
    details = [json.loads(line) for line in blocks.scripts["details"].split("\n")]
    assert [episode["question"] for episode in details] == [
        line["question"] for line in run_with_episodes[1]
    ]
    assert details[1]["category"] == HOSTILE
    assert "window.hacked" not in blocks.scripts["code"]
    policy = next(a["content"] for tag, a in blocks.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\()",
                         blocks.scripts["code"])  # fmt: skip


def test_lone_surrogates_and_nan_are_replaced(tmp_path):
    line = {"segments": [], "question": "\ud800 half", "reward": {"reward": float("nan")}}
    (tmp_path / "e.jsonl").write_text(json.dumps(line))
    (tmp_path / "results.json").write_text('{"workflows": {"a": {"turns": NaN}}}')
    (tmp_path / "episodes.jsonl").write_text(json.dumps(line))
    for source in (tmp_path, tmp_path / "e.jsonl"):
        page.write(tmp_path / "r.html", reader.read(source, 10))
        blocks = PageParser((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert json.loads(blocks.scripts["details"])["question"] == "? half"
        json.loads(blocks.scripts["summary"])


# The page in a browser

# Time in milliseconds at which the page was complete and painted.
PAINTED = """new Promise((resolve) => {
    const poll = () => {
        const [painted] = performance.getEntriesByName("first-contentful-paint");
        const [ready] = performance.getEntriesByName("ready");
        if (painted) resolve(Math.max(painted.startTime, ready.startTime));
        else requestAnimationFrame(poll);
    };
    poll();
})"""


@pytest.fixture
def opened(browser, report):
    """A function that opens a view of the page, in which errors fail the test."""
    contexts, errors = [], []

    def open_view(view="", **options):
        options = {"viewport": {"width": 1440, "height": 900}} | options
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on(
            "console", lambda entry: errors.append(entry.text) if entry.type == "error" else None
        )
        tab.goto(f"{report[0].as_uri()}{view}")
        return tab

    yield open_view
    for context in contexts:
        context.close()
    assert not errors


def unfold(node):
    """Open a `details` element, and wait for its content."""
    node.locator("summary").click()
    node.locator(":scope > :nth-child(2)").wait_for()


def test_a_thousand_episodes_open_in_two_seconds(opened):
    tab = opened("#episode-500")  # warm up the browser
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    seconds, work = [], []
    for _ in range(3):
        tab.reload()
        seconds.append(tab.evaluate(PAINTED) / 1000)
        metrics = session.send("Performance.getMetrics")["metrics"]
        work.append(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))
        assert tab.locator("#count").inner_text() == "1000 episodes"
        assert tab.locator("[role=option]").count() < 40
    print(f"opened in {min(seconds):.2f} s, with {min(work):.2f} s of the page's own work")
    assert 0 < min(work) < 2
    if os.getloadavg()[0] <= (os.cpu_count() or 1):  # on a busy machine it waits for other programs
        assert min(seconds) < 2


def test_hostile_texts_are_not_executed(opened):
    tab = opened("#episode-3")
    assert tab.evaluate("window.hacked") is None
    shown = tab.locator("#episode")
    assert shown.locator("h2").inner_text() == HOSTILE
    assert (
        "<script>window.hacked = 1</script>" in shown.locator(".results .title").first.inner_text()
    )
    assert shown.locator("script, iframe, object").count() == 0
    assert tab.locator("[onerror]").count() == 0
    # There is no external link, in particular none to a script.
    links = shown.locator("a").evaluate_all("nodes => nodes.map((node) => node.href)")
    assert links == [] and "javascript:alert(1)" in shown.inner_text()
    for number in (2, 3):
        tab = opened(f"#episode-{number}")
        for node in tab.locator("#episode details").all():
            unfold(node)
        assert tab.evaluate("window.hacked") is None
    tab = opened("#episode-2")
    links = tab.locator("#episode a").evaluate_all("nodes => nodes.map((node) => node.href)")
    assert PAGE in links and all(link.startswith(("http://", "https://")) for link in links)


def test_the_page_uses_no_network(browser, report):
    context = browser.new_context()
    tab = context.new_page()
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(report[0].as_uri())
    tab.evaluate("location.hash = '#episode-1'")
    assert [url for url in requests if not url.startswith("data:")] == [report[0].as_uri()]
    blocked = """new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
    })"""
    assert tab.evaluate(blocked).startswith("http://127.0.0.1:9")
    context.close()


def test_episodes_are_filtered(opened, run_with_episodes):
    lines = run_with_episodes[1]
    tab = opened("#episodes")
    count = tab.locator("#count")

    def label(matches):
        return f"{sum(map(matches, lines))} of 1000 episodes"

    tab.select_option("#by-verdict", "wrong")
    assert count.inner_text() == label(lambda line: not line["reward"]["correct"])
    tab.select_option("#by-actions", "image,text,answer")
    assert count.inner_text() == label(
        lambda line: not line["reward"]["correct"] and len(line["turns"]) == 3
    )
    tab.select_option("#by-category", "search_required")
    expected = [
        line for line in lines
        if not line["reward"]["correct"] and len(line["turns"]) == 3
        and line["category"] == "search_required"
    ]  # fmt: skip
    assert count.inner_text() == f"{len(expected)} of 1000 episodes"
    tab.locator("#list").focus()
    tab.keyboard.press("End")
    assert f"id {expected[-1]['id']}" in tab.locator("#episode .about").inner_text()
    for name in ("verdict", "actions", "category"):
        tab.select_option(f"#by-{name}", "all")
    tab.fill("#text", "ZÜRICH know")
    assert count.inner_text() == label(
        lambda line: "zürich" in json.dumps(line, ensure_ascii=False).lower()
    )
    tab.fill("#text", "nowhere at all")
    assert count.inner_text() == "0 of 1000 episodes"
    assert "No episode matches" in tab.locator("#episode").inner_text()
    tab.fill("#text", "")
    assert count.inner_text() == "1000 episodes"


def test_an_episode_without_a_verdict_is_not_judged(browser, processor, tmp_path):
    """It is neither correct nor wrong, whatever its reward."""
    episode = make_episode(
        processor, 0, texts=["<answer>x</answer>"]
    )  # fmt: skip
    line = make_line(episode, processor, tmp_path / "episodes", ["x"])
    judge = {"correct": None, "reason": "no verdict: timed out", "by": "judge", "model": "m"}
    lines = [line | {"judge": judge}, line]
    path = tmp_path / "episodes" / "episodes.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in lines))
    page.write(tmp_path / "r.html", reader.read(path, 10))
    tab = browser.new_page()
    tab.goto(f"{(tmp_path / 'r.html').as_uri()}#episode-1")
    assert tab.locator("#episode .pill").inner_text() == "not judged"
    assert "no verdict: timed out" in tab.locator("#episode .verdict").inner_text()
    tab.select_option("#by-verdict", "open")
    assert tab.locator("#count").inner_text() == "1 of 2 episodes"
    tab.select_option("#by-verdict", "correct")
    assert tab.locator("#count").inner_text() == "1 of 2 episodes"
    assert tab.locator("#episode .pill").inner_text() == "correct"
    tab.close()


def test_the_keyboard_selects_episodes(opened):
    tab = opened("#episodes")
    press = tab.keyboard.press
    shown = lambda: tab.locator("#episode .about b").first.inner_text()  # noqa: E731
    assert shown() == "q0"
    for key, expected in (("j", "q1"), ("j", "q2"), ("k", "q1"), ("k", "q0"), ("k", "q0")):
        press(key)
        assert shown() == expected
    assert tab.evaluate("location.hash") == "#episode-1"
    press("/")
    assert tab.evaluate("document.activeElement.id") == "text"
    tab.keyboard.type("jk")  # text in this field
    assert tab.input_value("#text") == "jk" and "0 of" in tab.locator("#count").inner_text()
    tab.fill("#text", "")
    press("Escape")
    assert tab.evaluate("document.activeElement.id") == "list"
    press("ArrowDown")
    press("End")
    assert shown() == "q999"
    press("ArrowUp")
    active = tab.locator("#list").get_attribute("aria-activedescendant")
    row = tab.locator(f"#{active}")
    assert row.get_attribute("aria-selected") == "true" and row.is_visible()
    assert tab.locator("[aria-selected=true]").count() == 1 and shown() == "q998"


def test_tokens_show_their_logprobs(opened, run_with_episodes):
    line = run_with_episodes[1][0]
    tab = opened("#episode-1")
    segment = next(s for s in line["segments"] if s["kind"] == "model")
    tokens = tab.locator(".turn").first.locator(".written .token")
    assert tokens.count() == len(segment["tokens"])
    assert "".join(tokens.evaluate_all("n => n.map((x) => x.textContent)")) == segment["text"]
    levels = tokens.evaluate_all("n => n.map((x) => Number(x.className.match(/p(\\d)/)[1]))")
    probabilities = np.exp(np.round(segment["logprobs"], 4))
    assert levels == [sum(p < bound for bound in (0.9, 0.5, 0.2, 0.05)) for p in probabilities]
    tokens.nth(3).hover()
    tip = tab.locator("#tip")
    assert f"log-prob {segment['logprobs'][3]:.3f}" in tip.inner_text()
    unfold(tab.locator(".turn").first.locator("details").first)
    cells = tab.locator(".turn").first.locator("tbody td:nth-child(3)").all_inner_texts()
    np.testing.assert_allclose([float(c) for c in cells], segment["logprobs"], atol=6e-4)
    assert all(re.fullmatch(r"-?\d+\.\d{3}", cell) for cell in cells)
    assert tab.locator(".turn .forced").first.inner_text().strip() == "<|im_end|>"
    assert tab.locator(".turn").first.locator(".results img").count() == 2
    reward = tab.locator(".reward div").first.inner_text().split()
    assert reward[0] == "reward" and float(reward[1]) == pytest.approx(line["reward"]["reward"])


def test_the_overview_shows_results_and_curves(opened, run_with_episodes):
    _, _, results = run_with_episodes
    tab = opened()
    rows = tab.locator("#overview table").first.locator("tbody tr")
    assert rows.count() == 4
    for row, (name, metrics) in zip(rows.all(), results["workflows"].items(), strict=True):
        cells = row.locator("td").all_inner_texts()
        assert cells[0] == name and cells[2] == f"{100 * metrics['accuracy']['em']['mean']:.1f} %"
    charts = tab.locator("figure.chart")
    titles = charts.locator("figcaption").all_inner_texts()
    assert {"Reward and accuracy", "Fraction of episodes that search", "Tokens per episode",
            "Step time in seconds"} <= set(titles)  # fmt: skip
    for chart in charts.locator("img").all():
        assert chart.get_attribute("alt").endswith(".")
        assert chart.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    shown = tab.locator("#overview").inner_html()
    assert "NaN" not in shown and "Infinity" not in shown and "undefined" not in shown
    assert "line 103: 'segments' must be a list" in tab.locator("#overview .notes").inner_text()
    lines = (run_with_episodes[0] / "metrics.jsonl").read_text().splitlines()
    unfold(charts.first.locator("details"))
    last = charts.first.locator("tbody tr").last.locator("td").all_inner_texts()
    assert float(last[1]) == pytest.approx(json.loads(lines[-1])["reward"], abs=6e-5)
    tab.select_option(".any select", "search_by_category/free")
    assert tab.locator(".any figcaption").inner_text() == "search_by_category/free"
    alt = tab.locator(".any img").get_attribute("alt")
    assert alt.startswith("search_by_category/free, steps 1 to 60: ")


@pytest.mark.parametrize(
    ("view", "scheme", "width"),
    [("#episode-1", "light", 1440)]
    + [
        pytest.param(*view, marks=pytest.mark.proof)
        for view in (
            ("#overview", "dark", 390), ("#overview", "light", 1440),
            ("#episode-1", "dark", 1440), ("#episode-3", "light", 390),
        )
    ],
)  # fmt: skip
def test_views_are_accessible(opened, view, scheme, width):
    tab = opened(view, color_scheme=scheme, viewport={"width": width, "height": 900})
    for node in tab.locator("main details:visible").all()[:4]:
        unfold(node)
    assert not violations(tab)
    assert tab.evaluate(
        "document.documentElement.scrollWidth <= innerWidth"
    )  # no horizontal scrolling
