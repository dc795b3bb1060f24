"""`python -m mmsr1_jax.report`: what is read, and the page, looked at in a real browser."""

import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax.apps.report import page, pictures, reader, records
from mmsr1_jax.config import Rewards
from mmsr1_jax.episodes import turns
from mmsr1_jax.episodes.episode import Episode, Example, Segment, ShownResult, ToolCall
from mmsr1_jax.evaluation.metrics import MATCHES, Outcome, figures
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.training.sft_dataset import line_of
from tests.browser import chromium, violations

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"
    " javascript:alert(1)"
)
PAGE = "https://example.org/bridge?a=1&b=%3Cscript%3E"
CATEGORIES = ("search_free", "search_required", "<b>odd</b>")
FIGURES = (
    *(
        "reward",
        "accuracy",
        "searches",
        "turns",
        "tokens",
        "tokens_sampled",
        "accuracy_by_category/free",
    ),
    *(f"search/{kind}" for kind in ("any", "text", "image", "both", "none")),
    "search_by_category/free",
    *("time/rollout", "time/update", "time/step"),
)
WORDS = ("bridge", "tower", "cathedral", "stadium", "zürich", "canal")


def picture(processor, seed, side=112):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.NEAREST)
    return processor.images(image)


def episode_of(processor, number, *, texts, found, question, images, rng):
    """An episode of given turns, as the engine would have recorded it; `found`: the reply of each
    turn but the last, as parts, and the results in it."""
    example = Example(id=f"q{number}", question=question)
    episode = Episode(example=example, group=number, index=number)
    prompt = processor.first_turn([*images, question])
    episode.segments.append(Segment("prompt", prompt.tokens))
    episode.images += prompt.images
    for place, text in enumerate(texts):
        tokens = np.array(processor.encode_text(text), np.int32)
        logprobs = -rng.exponential(0.7, len(tokens)).astype(np.float32)
        episode.segments.append(Segment("model", tokens, logprobs, logprobs))
        episode.turns.append(turns.parse(text))
        if place < len(texts) - 1:
            read = episode.turns[-1]
            parts, results = found[place]
            reply = processor.next_turn(parts)
            call = ToolCall(turn=place, action=read.action, query=read.payload, status="ok",
                            seconds=0.25, num_results=2, num_shown=2, notes=("result 2: cut",),
                            results=results)  # fmt: skip
            episode.calls.append(call)
            closing = np.array(processor.closing(), np.int32)
            episode.segments += [Segment("forced", closing), Segment("tool", reply.tokens)]
            episode.images += reply.images
    episode.end = "answer"
    return episode


def written(episode, processor, folder, answers, **more):
    """The episode's line in a file of `folder`."""
    folder.mkdir(exist_ok=True)
    reward = reward_function.episode_reward(episode, answers, Rewards())
    line = line_of(episode, processor, folder, folder.parent / "pictures")
    return line | {"answers": answers, "reward": dataclasses.asdict(reward)} | more


def image_results(processor, seed, title):
    parts = ["<information>\n[Image Search Results]\n1. image: ", picture(processor, seed, 56),
             f"\ntitle: {title}\n2. image: ", picture(processor, seed + 1, 56),
             "\ntitle: another\n</information>\nGo on."]  # fmt: skip
    return parts, (ShownResult(title=title, images=(0,)), ShownResult(title="another", images=(1,)))


def text_results(link, text):
    parts = [f"<information>\n[Text Search Results]\n1. link: {link}\nsummary: {text}\n"
             "2. link: ftp://example.org/x\nsummary: second\n</information>\nGo on."]  # fmt: skip
    second = ShownResult(link="ftp://example.org/x", text="second")
    return parts, (ShownResult(link=link, text=text), second)


@pytest.fixture(scope="module")
def processor():
    return Processor(random_policy.make_tokenizer().to_str(), random_policy.IMAGES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, processor):
    """A run of 60 steps with 1,000 episodes of 4 workflows, some lines of which are none."""
    run = tmp_path_factory.mktemp("report") / "run"
    (run / "episodes").mkdir(parents=True)
    (run / "policy").mkdir()
    (run / "policy" / "tokenizer.json").write_text(random_policy.make_tokenizer().to_str())
    (run / "policy" / "preprocessor_config.json").write_text(
        json.dumps(random_policy.IMAGES.to_hf())
    )
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 61):
            values = {name: float(rng.uniform()) for name in FIGURES}
            if step % 20 == 0:
                values["validation/accuracy"] = 0.5
            values["update/kl"] = float("nan") if step % 2 else float("inf")
            file.write(json.dumps({"step": step, **values}) + "\n")
    made = []
    for number in range(1000):
        word = WORDS[number % 6]
        texts = [
            f"<reason>{word} {'why not ' * 20}✓</reason> <search><img></search>",
            f"<reason>{'It may be so. ' * 10}</reason> <text_search>{word} name</text_search>",
            f"<reason>Now I know.</reason> <answer>{word}</answer>",
        ][number % 3 :]
        found = [image_results(processor, number % 20, f"A {word}"),
                 text_results(PAGE, f"the {word} " * 40)][number % 3 :]  # fmt: skip
        if number < 36:
            episode = episode_of(
                processor, number, texts=texts, found=found, question=f"What {word} is this?",
                images=[picture(processor, 100 + number % 30)], rng=rng,
            )  # fmt: skip
            line = written(episode, processor, run / "episodes", ["Bridge", "canal"])
        else:  # told again
            line = made[number % 36]
        category = CATEGORIES[number % 7 % 3]
        made.append(line | {"id": f"q{number}", "category": category, "source": "made up"})
    made[1]["question"] = HOSTILE
    made[1]["category"] = HOSTILE
    made[1]["answers"] = [HOSTILE]
    hostile = episode_of(
        processor, 2, question=HOSTILE, images=[picture(processor, 1)], rng=rng,
        texts=[f"<reason>{HOSTILE}</reason> <search><img></search>",
               f"<reason>{HOSTILE}</reason> <text_search>{HOSTILE}</text_search>",
               f"<reason>x</reason> <answer>{HOSTILE}</answer>"],
        found=[image_results(processor, 5, HOSTILE), text_results("javascript:alert(1)", HOSTILE)],
    )  # fmt: skip
    made[2] = written(hostile, processor, run / "episodes", ["x"], category="", source="made up")
    for begin in range(0, 1000, 250):
        lines = [json.dumps(line) for line in made[begin : begin + 250]]
        if begin == 250:
            lines[100:100] = ["{not json", "[1]", '{"segments": 3}', "", '{"segments": [{}]}']
        (run / "episodes" / f"{begin // 250 + 1:06d}.jsonl").write_text("\n".join(lines))
    outcomes = {
        name: [outcome(name, number, rng) for number in range(40)]
        for name in ("on_demand", "rag", "direct", "agent")
    }
    results = {"workflows": {name: figures(some) for name, some in outcomes.items()}}
    (run / "results.json").write_text(json.dumps(results))
    return run, made, results


def outcome(workflow, number, rng):
    right = bool(rng.integers(2))
    return Outcome(
        workflow=workflow, index=number, sample=0, id=str(number), question="?", source="s",
        category=CATEGORIES[number % 2], right=dict.fromkeys(MATCHES) | {"em": right},
        reward=0.5, format=True, made={"image_search": 1, "text_search": int(right)},
        failed={"image_search": 0, "text_search": 0}, refused=0, allowed=2, turns=2, tokens=100,
        tokens_sampled=20, end="answer",
    )  # fmt: skip


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mmsr1_jax.report", *map(str, arguments)],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(directory, tmp_path_factory):
    """The page, made as a user makes it, and what was said."""
    run, _, _ = directory
    out = tmp_path_factory.mktemp("page") / "report.html"
    done = command(run, f"--out={out}", "--episodes=2000")
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


# Reading


def test_an_episode_as_a_record(processor, tmp_path):
    rng = np.random.default_rng(1)
    texts = ["<reason>über 日本 ✓</reason> <search><img></search>", "<answer>x</answer>"]
    found = [image_results(processor, 3, "A title")]
    images = [picture(processor, 1), picture(processor, 2)]
    episode = episode_of(
        processor, 7, texts=texts, found=found, question="Q?", images=images, rng=rng
    )
    folder = tmp_path / "episodes"
    line = written(episode, processor, folder, ["x"], category="c")
    known = pictures.Pictures(tmp_path)
    record = records.record(line, folder, known, processor.token_bytes(), step=4)
    assert record["pictures"] == [0, 1] and record["prompt"].count(0) == 1
    assert record["actions"] == "image,answer" and record["correct"] == 1.0
    assert record["reward"] == pytest.approx(
        {"reward": 0.81, "correct": 1, "format": 0, "searches": 1, "penalty": 0.9}
    )
    first, last = record["turns"]
    sampled, forced = first["pieces"]
    assert "".join(sampled["tokens"]) == texts[0] and len(sampled["tokens"]) > 10
    model = episode.segments[1]
    np.testing.assert_allclose(sampled["logprobs"], model.logprobs, atol=5e-5)
    # Each token by the tokenizer's own decoding, where it stands for whole characters.
    for token, text in zip(model.tokens, sampled["tokens"], strict=True):
        alone = processor.decode([token])
        assert text == alone or "\ufffd" in alone
    assert forced == {"kind": "forced", "text": "<|im_end|>\n"}
    assert [part for part in first["reply"] if isinstance(part, int)] == [2, 3]
    assert "im_start" not in "".join(p for p in first["reply"] if isinstance(p, str))
    assert first["calls"][0]["seconds"] == 0.25 and last["reply"] is None
    assert last["problem"] == "does not begin with <reason>..</reason>"
    data, missing = known.encode()
    assert len(data["of"]) == 4 and not missing


def test_tokens_of_another_tokenizer_are_told_by_number(processor, tmp_path):
    episode = episode_of(
        processor, 0, texts=["<answer>abc</answer>"], found=[], question="Q", images=[],
        rng=np.random.default_rng(0),
    )  # fmt: skip
    line = written(episode, processor, tmp_path / "e", ["x"])
    table = processor.token_bytes()
    for other in (None, table[:10], [b"x"] * len(table)):
        record = records.record(line, tmp_path, pictures.Pictures(), other)
        (piece,) = record["turns"][0]["pieces"]
        assert "tokens" not in piece and piece["text"] == "<answer>abc</answer>"
        assert piece["ids"] == episode.segments[1].tokens.tolist()


def test_a_placeholder_that_a_page_writes_is_text(processor, tmp_path):
    fake = "<|vision_start|><|image_pad|><|vision_end|>"
    found = [([f"1. {fake} ", picture(processor, 3, 56), " end"], ())]
    episode = episode_of(
        processor, 0, texts=["<search><img></search>", "<answer>x</answer>"], found=found,
        question=f"{fake}?", images=[picture(processor, 1)], rng=np.random.default_rng(0),
    )  # fmt: skip
    line = written(episode, processor, tmp_path / "e", ["x"])
    record = records.record(line, tmp_path / "e", pictures.Pictures(), None)
    assert record["pictures"] == [0]
    assert record["turns"][0]["reply"] == [f"1. {fake} ", 1, " end"]


def test_what_evaluations_add(processor, tmp_path):
    episode = episode_of(
        processor, 0, texts=["<answer>abc</answer>"], found=[], question="Q", images=[],
        rng=np.random.default_rng(0),
    )  # fmt: skip
    line = written(episode, processor, tmp_path / "e", ["x"], workflow="rag", em=False, subem=True)
    judged = line | {"judge": {"correct": True, "reason": "the same", "by": "judge", "model": "m"}}

    def read(line):
        return records.record(line, tmp_path, pictures.Pictures(), None)

    assert read(judged)["correct"] == 1.0 and read(judged)["workflow"] == "rag"
    assert read(judged)["verdicts"] == [
        ["judge", "right"], ["EM", "wrong"], ["SubEM", "right"], ["reason", "the same"]
    ]  # fmt: skip
    scored = read(judged | {"score": 0.25})
    assert scored["correct"] == 0.25 and scored["verdicts"][0] == ["score", "0.25"]
    silent = read(line | {"judge": {"correct": None, "reason": "timed out"}})
    assert silent["reward"]["correct"] == 0.0 and silent["correct"] is None  # what it did not say
    assert ["reason", "timed out"] in silent["verdicts"]
    assert "judge" not in dict(silent["verdicts"])
    assert read(line | {"judge": None})["correct"] == 0.0  # it was not asked
    assert read(line | {"judge": {"correct": None}, "score": 0.5})["correct"] == 0.5
    bare = read({"segments": [], "turns": line["turns"]})  # answers of which only texts are known
    assert bare["correct"] is None and bare["turns"][0]["pieces"] == []


def test_curves():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1203)
    values[rng.integers(0, 1203, 300)] = np.nan
    lines = [{"step": i + 1, "x": float(v), "gone": float("inf")} for i, v in enumerate(values)]
    found = reader.curves_of([*lines[:600], ["odd"], *lines[600:], {"x": 1.0}, {"step": 10**400}])
    assert found["mean_of"] == 3 and list(found["figures"]) == ["x"]
    assert found["steps"] == list(range(3, 1204, 3))
    expected = [b[~np.isnan(b)].mean() if (~np.isnan(b)).any() else None
                for b in values.reshape(-1, 3)]  # fmt: skip
    for got, want in zip(found["figures"]["x"], expected, strict=True):
        assert (got is None and want is None) or got == pytest.approx(want)
    assert reader.curves_of([]) == {}


def test_pictures_are_held_once_and_bounded(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in "abc":
        PIL.Image.fromarray(rng.integers(0, 256, (300, 600, 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")

    def encode():
        known = pictures.Pictures(tmp_path)
        for name in ("copy", "b", "bad", "none", "c"):
            known.number(tmp_path / f"{name}.png", pictures.RESULT)
        assert known.number(tmp_path / "copy.png", pictures.QUESTION) == 0
        assert known.number(tmp_path / "a.png", pictures.QUESTION) == 5
        return known.encode()

    data, missing = encode()
    assert data["of"] == [0, 1, None, None, 2, 0]
    assert len(missing) == 2 and "bad.png" in missing[0] and "none.png" in missing[1]
    assert all(url.startswith("data:image/webp;base64,") for url in data["data"])
    monkeypatch.setattr(pictures, "_MOST", len(data["data"][0]) + 10)
    data, missing = encode()
    assert data["of"] == [0, None, None, None, None, 0]  # the questions' first
    assert missing[-1].startswith("2 pictures: ")


@pytest.fixture
def private(tmp_path):
    """A run, and a picture that is not of it."""
    (tmp_path / "run" / "episodes").mkdir(parents=True)
    (tmp_path / "run" / "pictures").mkdir()
    PIL.Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "private.png")
    PIL.Image.new("RGB", (56, 56), (10, 200, 10)).save(tmp_path / "run" / "pictures" / "own.png")
    return tmp_path


def shown(run, names, source=None, allowed=None):
    """Whether each picture is shown that a run's lines name, and what is said of the others."""
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    line = {"segments": [{"kind": "prompt", "text": text, "tokens": [1]}], "turns": [],
            "image_grids": [[1, 2, 2]], "question": "Q"}  # fmt: skip
    path = run / "episodes" / "000001.jsonl"
    path.write_text("".join(json.dumps(line | {"images": [name]}) + "\n" for name in names))
    found = reader.read(source or run, 100, shown=allowed)
    assert len(found.episodes) == len(names) and not found.skipped
    data, missing = found.pictures.encode()
    of = [data["of"][episode["pictures"][0]] for episode in found.episodes]
    return [place is not None for place in of], missing


def test_pictures_of_others_are_not_shown(private):
    run = private / "run"
    (run / "pictures" / "link.png").symlink_to(private / "private.png")
    names = ["../pictures/own.png", str(run / "pictures" / "own.png"), str(private / "private.png"),
             "../../private.png", "../pictures/../../private.png", "../pictures/link.png",
             "../../run/pictures/own.png", "../../nowhere.png"]  # fmt: skip
    got, missing = shown(run, names)
    assert got == [True, True, False, False, False, False, True, False]
    assert len(missing) == 5
    assert all("not in the directory that is read; --pictures=DIR" in said for said in missing)
    step = run / "episodes" / "000001.jsonl"
    assert shown(run, names, source=step)[0] == got
    assert shown(run, names, allowed=private)[0] == [True] * 7 + [False]


def test_paths_that_are_no_file_are_missing(private):
    """None of them ends the report, fills the memory, or waits for ever."""
    run = private / "run"
    os.mkfifo(run / "pictures" / "pipe.png")
    (run / "pictures" / "round.png").symlink_to(run / "pictures" / "round.png")
    with open(run / "pictures" / "large.png", "wb") as file:
        file.truncate(10**9)  # nothing of it is on the disk
    names = ["../pictures/own.png", "/dev/zero", "../pictures/pipe.png", "../pictures",
             "../pictures/large.png", "../pictures/nothing.png", "a\0b.png", "\ud800.png",
             "x" * 5000, "../pictures/round.png", ""]  # fmt: skip
    got, missing = shown(run, names, allowed=pathlib.Path("/dev"))
    assert got == [True] + [False] * 10
    reasons = ["not a regular file", "not a regular file", "not a regular file",
               "1000000000 bytes are more than 64000000", "No such file", "null", "surrogates",
               "File name too long", "symbolic links", "not a regular file"]  # fmt: skip
    for said, reason in zip(missing, reasons, strict=True):
        assert reason in said
    done = command(run, f"--out={private / 'r.html'}")
    assert done.returncode == 0 and "11 of 11 episodes" in done.stdout, done.stderr[-3000:]
    assert "/dev/zero: not in the directory that is read" in done.stderr


def test_broken_lines_are_named(report, directory):
    _, done = report
    path = directory[0] / "episodes" / "000002.jsonl"
    said = done.stderr.splitlines()
    assert [line.split(":")[0] for line in said] == [
        f"{path}, line {number}" for number in (101, 102, 103, 105)
    ]
    assert "not JSON" in said[0] and "'segments' must be a list" in said[2]
    assert "1000 of 1004 episodes" in done.stdout


def test_some_of_many(directory, tmp_path):
    found = reader.read(directory[0], 100)
    ids = [episode["id"] for episode in found.episodes]
    assert 96 <= len(ids) <= 100 and (found.lines, found.looked_at) == (1004, 100)
    places = [int(name[1:]) for name in ids]
    assert places == sorted(places) and max(np.diff(places)) <= 21 and places[-1] > 975
    assert {episode["step"] for episode in found.episodes} == {1, 2, 3, 4}


def test_mistakes_are_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        reader.read(tmp_path / "nowhere", 10)
    with pytest.raises(ValueError, match=r"no metrics.jsonl, results.json or episodes"):
        reader.read(tmp_path, 10)
    file = tmp_path / "e.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="no episode in it .*line 1: 'segments'"):
        reader.read(file, 10)
    done = command(file, f"--out={file}")
    assert done.returncode == 1 and "would replace the file" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# The page as a file


class Blocks(html.parser.HTMLParser):
    """The page's scripts by id, and all its tags, as a parser of HTML sees them."""

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


def test_text_from_outside_stays_in_its_block(report, directory):
    text = report[0].read_text(encoding="utf-8")
    blocks = Blocks(text)
    assert list(blocks.scripts) == ["summary", "details", "pictures", "code"]
    for name in ("summary", "details", "pictures"):
        assert "<" not in blocks.scripts[name]
    details = [json.loads(line) for line in blocks.scripts["details"].split("\n")]
    assert [one["question"] for one in details] == [line["question"] for line in directory[1]]
    assert details[1]["category"] == HOSTILE
    assert "window.hacked" not in blocks.scripts["code"]
    policy = next(a["content"] for tag, a in blocks.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\()",
                         blocks.scripts["code"])  # fmt: skip


def test_half_a_surrogate_and_nan_can_be_written(tmp_path):
    line = {"segments": [], "question": "\ud800 half", "reward": {"reward": float("nan")}}
    (tmp_path / "e.jsonl").write_text(json.dumps(line))
    (tmp_path / "results.json").write_text('{"workflows": {"a": {"turns": NaN}}}')
    (tmp_path / "episodes.jsonl").write_text(json.dumps(line))
    for source in (tmp_path, tmp_path / "e.jsonl"):
        page.write(tmp_path / "r.html", reader.read(source, 10))
        blocks = Blocks((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert json.loads(blocks.scripts["details"])["question"] == "? half"
        json.loads(blocks.scripts["summary"])


# The page in a browser

# When the page had drawn itself and was painted, in milliseconds.
SEEN = """new Promise((resolve) => {
    const look = () => {
        const [painted] = performance.getEntriesByName("first-contentful-paint");
        const [ready] = performance.getEntriesByName("ready");
        if (painted) resolve(Math.max(painted.startTime, ready.startTime));
        else requestAnimationFrame(look);
    };
    look();
})"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, report):
    """Opens a view of the page; errors in it fail the test."""
    contexts, errors = [], []

    def open_view(view="", **options):
        options = {"viewport": {"width": 1440, "height": 900}} | options
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        tab.goto(f"{report[0].as_uri()}{view}")
        return tab

    yield open_view
    for context in contexts:
        context.close()
    assert not errors


def unfold(node):
    """Opens a `details`, and waits for what is made when it opens."""
    node.locator("summary").click()
    node.locator(":scope > :nth-child(2)").wait_for()


def test_a_thousand_episodes_open_in_two_seconds(opened):
    tab = opened("#episode-500")  # the first one meets a cold browser
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    seconds, work = [], []
    for _ in range(3):
        tab.reload()
        seconds.append(tab.evaluate(SEEN) / 1000)
        found = session.send("Performance.getMetrics")["metrics"]
        work.append(next(one["value"] for one in found if one["name"] == "TaskDuration"))
        assert tab.locator("#count").inner_text() == "1000 episodes"
        assert tab.locator("[role=option]").count() < 40
    print(f"opened in {min(seconds):.2f} s, with {min(work):.2f} s of the page's own work")
    assert 0 < min(work) < 2
    if os.getloadavg()[0] <= (os.cpu_count() or 1):  # else it waited for others
        assert min(seconds) < 2


def test_scripts_of_others_are_text(opened):
    tab = opened("#episode-3")
    assert tab.evaluate("window.hacked") is None
    shown = tab.locator("#episode")
    assert shown.locator("h2").inner_text() == HOSTILE
    assert (
        "<script>window.hacked = 1</script>" in shown.locator(".results .title").first.inner_text()
    )
    assert shown.locator("script, iframe, object").count() == 0
    assert tab.locator("[onerror]").count() == 0
    # One link in the whole page leads out, and not to a script.
    links = shown.locator("a").evaluate_all("nodes => nodes.map((node) => node.href)")
    assert links == [] and "javascript:alert(1)" in shown.inner_text()
    for place in (2, 3):
        tab = opened(f"#episode-{place}")
        for node in tab.locator("#episode details").all():
            unfold(node)
        assert tab.evaluate("window.hacked") is None
    tab = opened("#episode-2")
    links = tab.locator("#episode a").evaluate_all("nodes => nodes.map((node) => node.href)")
    assert PAGE in links and all(link.startswith(("http://", "https://")) for link in links)


def test_no_network(browser, report):
    context = browser.new_context()
    tab = context.new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report[0].as_uri())
    tab.evaluate("location.hash = '#episode-1'")
    assert [url for url in asked if not url.startswith("data:")] == [report[0].as_uri()]
    blocked = """new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
    })"""
    assert tab.evaluate(blocked).startswith("http://127.0.0.1:9")
    context.close()


def test_filters(opened, directory):
    made = directory[1]
    tab = opened("#episodes")
    count = tab.locator("#count")

    def among(wanted):
        return f"{sum(map(wanted, made))} of 1000 episodes"

    tab.select_option("#by-verdict", "wrong")
    assert count.inner_text() == among(lambda line: not line["reward"]["correct"])
    tab.select_option("#by-actions", "image,text,answer")
    assert count.inner_text() == among(
        lambda line: not line["reward"]["correct"] and len(line["turns"]) == 3
    )
    tab.select_option("#by-category", "search_required")
    expected = [
        line for line in made
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
    assert count.inner_text() == among(
        lambda line: "zürich" in json.dumps(line, ensure_ascii=False).lower()
    )
    tab.fill("#text", "nowhere at all")
    assert count.inner_text() == "0 of 1000 episodes"
    assert "No episode fits" in tab.locator("#episode").inner_text()
    tab.fill("#text", "")
    assert count.inner_text() == "1000 episodes"


def test_what_the_judge_said_nothing_of_is_not_judged(browser, processor, tmp_path):
    """Neither right nor wrong, whatever it was rewarded with."""
    episode = episode_of(
        processor, 0, texts=["<answer>x</answer>"], found=[], question="Q", images=[],
        rng=np.random.default_rng(0),
    )  # fmt: skip
    line = written(episode, processor, tmp_path / "episodes", ["x"])
    judge = {"correct": None, "reason": "no verdict: timed out", "by": "judge", "model": "m"}
    lines = [line | {"judge": judge}, line]
    path = tmp_path / "episodes" / "episodes.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    page.write(tmp_path / "r.html", reader.read(path, 10))
    tab = browser.new_page()
    tab.goto(f"{(tmp_path / 'r.html').as_uri()}#episode-1")
    assert tab.locator("#episode .pill").inner_text() == "not judged"
    assert "no verdict: timed out" in tab.locator("#episode .verdict").inner_text()
    tab.select_option("#by-verdict", "open")
    assert tab.locator("#count").inner_text() == "1 of 2 episodes"
    tab.select_option("#by-verdict", "right")
    assert tab.locator("#count").inner_text() == "1 of 2 episodes"
    assert tab.locator("#episode .pill").inner_text() == "right"
    tab.close()


def test_keyboard(opened):
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
    tab.keyboard.type("jk")  # is text there
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


def test_tokens_and_their_log_probs(opened, directory):
    line = directory[1][0]
    tab = opened("#episode-1")
    segment = next(s for s in line["segments"] if s["kind"] == "model")
    tokens = tab.locator(".turn").first.locator(".written .token")
    assert tokens.count() == len(segment["tokens"])
    assert "".join(tokens.evaluate_all("n => n.map((x) => x.textContent)")) == segment["text"]
    levels = tokens.evaluate_all("n => n.map((x) => Number(x.className.match(/p(\\d)/)[1]))")
    chances = np.exp(np.round(segment["logprobs"], 4))
    assert levels == [sum(c < least for least in (0.9, 0.5, 0.2, 0.05)) for c in chances]
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


def test_overview(opened, directory):
    _, _, results = directory
    tab = opened()
    rows = tab.locator("#overview table").first.locator("tbody tr")
    assert rows.count() == 4
    for row, (name, one) in zip(rows.all(), results["workflows"].items(), strict=True):
        cells = row.locator("td").all_inner_texts()
        assert cells[0] == name and cells[2] == f"{100 * one['accuracy']['em']['mean']:.1f} %"
    charts = tab.locator("figure.chart")
    titles = charts.locator("figcaption").all_inner_texts()
    assert {"Reward and accuracy", "Share of the episodes that search", "Tokens of an episode",
            "Time of a step, seconds"} <= set(titles)  # fmt: skip
    drawn = tab.locator("#overview").inner_html()
    assert "NaN" not in drawn and "Infinity" not in drawn and "undefined" not in drawn
    assert "line 103: 'segments' must be a list" in tab.locator("#overview .notes").inner_text()
    lines = (directory[0] / "metrics.jsonl").read_text().splitlines()
    unfold(charts.first.locator("details"))
    last = charts.first.locator("tbody tr").last.locator("td").all_inner_texts()
    assert float(last[1]) == pytest.approx(json.loads(lines[-1])["reward"], abs=6e-5)
    tab.select_option(".any select", "search_by_category/free")
    assert tab.locator(".any figcaption").inner_text() == "search_by_category/free"


@pytest.mark.parametrize(
    ("view", "scheme", "width"),
    [("#overview", "light", 1440), ("#overview", "dark", 390), ("#episode-1", "light", 1440),
     ("#episode-1", "dark", 1440), ("#episode-3", "light", 390)],
)  # fmt: skip
def test_accessibility(opened, view, scheme, width):
    tab = opened(view, color_scheme=scheme, viewport={"width": width, "height": 900})
    for node in tab.locator("main details:visible").all()[:4]:
        unfold(node)
    assert not violations(tab)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
