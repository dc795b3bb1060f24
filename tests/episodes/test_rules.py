"""The rules of an episode: the step after each turn, and the user turns shown to the policy."""

import json

import numpy as np
import PIL.Image
import pytest
from pyarrow import parquet

from configs import qwen7b
from mmsr1_jax.config import settings
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode, Example, Segment, ToolCall
from mmsr1_jax.episodes.escaping import escape_tags
from mmsr1_jax.episodes.rules import PromptTooLongError, Rules, Step
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools import Observation, Part, Query, image_result, text_result

ANSWER = parse("<reason>r</reason><answer>a</answer>")
IMAGE = parse("<reason>r</reason><search><img></search>")
TEXT = parse("<reason>r</reason><text_search>q</text_search>")
NOTHING = parse("hm")
EXAMPLE = Example(question="What is </information> this?")


@pytest.fixture
def rules(processor):
    limits = settings.Turns(
        max_episode_tokens=2000, min_turn_tokens=100, max_new_tokens=200, max_result_tokens=800
    )
    tools = settings.Tools(max_pixels=112 * 112, max_result_chars=200)
    return Rules(processor, limits, tools, prompts.load())


def call(turn, status="ok"):
    return ToolCall(turn=0, action=turn.action, query=turn.payload, status=status)


@pytest.mark.parametrize(
    "turns, calls, truncated, expected",
    [
        ([ANSWER], [], False, Step("end", end="answer")),
        ([IMAGE], [], False, Step("search")),
        ([TEXT], [], False, Step("search")),
        ([IMAGE, TEXT], [IMAGE], False, Step("search")),
        ([TEXT, TEXT], [TEXT], False, Step("search")),
        ([TEXT, IMAGE], [TEXT], False, Step("search")),
        ([IMAGE, IMAGE], [IMAGE], False,
         Step("notice", prompt="over_limit", reason="the picture may be searched once")),
        ([NOTHING], [], False,
         Step("notice", prompt="malformed", reason="no closing tag of an action")),
        ([NOTHING], [], True,
         Step("notice", prompt="malformed", reason="it is too long, and was cut off")),
        ([IMAGE, TEXT, TEXT], [IMAGE, TEXT], False, Step("end", end="turns")),
        ([NOTHING, NOTHING, NOTHING], [], False, Step("end", end="turns")),
        ([IMAGE, TEXT, ANSWER], [IMAGE, TEXT], False, Step("end", end="answer")),
    ],
)  # fmt: skip
def test_the_step_after_each_turn(rules, turns, calls, truncated, expected):
    assert rules.next_step(turns, [call(c) for c in calls], truncated) == expected


def test_the_limit_of_all_searches(processor):
    limits = settings.Turns(max_turns=5, max_searches=2, max_image_searches=1, max_text_searches=2)
    rules = Rules(processor, limits, settings.Tools(), prompts.load())
    step = rules.next_step([IMAGE, TEXT, TEXT], [call(IMAGE), call(TEXT)], truncated=False)
    assert step == Step("notice", prompt="over_limit", reason="you may search twice in all")
    # Refused searches are not counted.
    step = rules.next_step(
        [IMAGE, IMAGE, TEXT], [call(IMAGE), call(IMAGE, "refused")], truncated=False
    )
    assert step == Step("search")


def reply(rules, observation, *, action="text_search", budget=1500, error=None):
    query = Query(action=action, text="q", question=EXAMPLE.question)
    read = rules.validate_observation(observation) if error is None else None
    return rules.tool_reply(query, EXAMPLE, 0, budget, read, error, 0.5)


def test_results_have_the_published_format(rules, processor):
    user_turn = reply(rules, Observation(results=[text_result("http://a", "first"),
                                              text_result("http://b", "second")]))  # fmt: skip
    assert processor.decode(user_turn.prompt.tokens).startswith(
        "<|im_start|>user\n<information>\n[Text Search Results]\n"
        "1. link: http://a\nsummary: first\n2. link: http://b\nsummary: second\n</information>\n"
        "The question was: What is </information> this?\n"
    )
    assert processor.decode(user_turn.prompt.tokens).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert user_turn.call == ToolCall(turn=0, action="text_search", query="q", status="ok",
                                  seconds=0.5, num_results=2, num_shown=2)  # fmt: skip
    image = PIL.Image.new("RGB", (112, 112))
    user_turn = reply(rules, Observation(results=[image_result(image, "a tower")]),
                  action="image_search")  # fmt: skip
    text = processor.decode(user_turn.prompt.tokens)
    pads = "<|image_pad|>" * (len(user_turn.prompt.images[0].values) // 4)
    assert (
        f"[Image Search Results]\n1. image: <|vision_start|>{pads}<|vision_end|>\ntitle: a tower\n"
        "</information>" in text
    )


def test_results_over_the_budget_are_dropped_completely(rules, processor):
    """As many results are shown as fit, each of them complete."""
    results = [text_result(f"http://{i}", "w" * 150) for i in range(5)]
    sizes, shown = [], []
    for budget in range(0, 1500, 25):
        user_turn = reply(rules, Observation(results=results), budget=budget)
        if user_turn.prompt is None:
            assert budget < 400 and user_turn.call.num_shown == 0
            continue
        assert len(user_turn.prompt.tokens) <= budget
        text = processor.decode(user_turn.prompt.tokens)
        assert text.count("w" * 150) == text.count("summary: ") == user_turn.call.num_shown
        sizes.append(len(user_turn.prompt.tokens))
        shown.append(user_turn.call.num_shown)
        num_dropped = 5 - user_turn.call.num_shown
        note = f"{num_dropped} of 5 results dropped: no token budget left"
        assert user_turn.call.notes == ((note,) if num_dropped else ())
    assert shown == sorted(shown) and {0, 1, 2, 3} <= set(shown)
    assert max(sizes) <= 800  # max_result_tokens


def test_images_are_never_truncated(rules, processor):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    results = [image_result(image, f"title {i}") for i in range(5)]
    seen = set()
    for budget in range(50, 600, 15):
        user_turn = reply(rules, Observation(results=results), action="image_search", budget=budget)
        seen.add(user_turn.call.num_shown)
        if user_turn.prompt is None:
            continue
        pads = int((user_turn.prompt.tokens == processor.control["<|image_pad|>"]).sum())
        assert pads == sum(len(i.values) // 4 for i in user_turn.prompt.images)
        assert user_turn.call.num_shown == len(user_turn.prompt.images)
    assert seen == set(range(6))


@pytest.mark.parametrize(
    "observation, error, reason, status",
    [
        (None, TimeoutError(), "it took too long", "failed"),
        (None, RuntimeError("key=SECRET"), "the service failed", "failed"),
        (Observation(status="failed", error="key=SECRET"), None, "the service failed", "failed"),
        (Observation(status="empty"), None, "nothing was found", "empty"),
        (Observation(results=[]), None, "nothing was found", "empty"),
        ("text", None, "the service failed", "failed"),
        (Observation(results=[[Part()]]), None, "the service failed", "failed"),
    ],
)
def test_a_failed_search_is_described(rules, processor, observation, error, reason, status):
    user_turn = reply(rules, observation, error=error)
    text = processor.decode(user_turn.prompt.tokens)
    assert f"The search gave nothing: {reason}." in text and "SECRET" not in text
    assert user_turn.call.status == status and user_turn.call.num_shown == 0


@pytest.mark.parametrize(
    "text",
    ["</information>", "a</INFORMATION >b", "< / information>", "<\ninformation>",
     "</information", "<</information>>"],
)  # fmt: skip
def test_closing_information_tags_are_escaped(text):
    safe = escape_tags(text)
    assert (
        "<" not in safe.replace("<\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "")
        and "information" in safe.lower()
    )
    assert escape_tags("5 < 6 and <b>inform</b>") == "5 < 6 and <b>inform</b>"


def test_a_refused_search_is_recorded(rules):
    episode = Episode(example=EXAMPLE, group=0, index=0)
    episode.segments.append(Segment("prompt", np.zeros(50, np.int32)))
    episode.turns += [IMAGE, IMAGE]
    step = rules.next_step(episode.turns, [call(IMAGE)], truncated=False)
    user_turn = rules.notice(step, episode, budget=1000)
    assert user_turn.call == ToolCall(turn=1, action="image_search", query=None, status="refused")
    assert rules.notice(step, episode, budget=20).prompt is None
    assert rules.token_budget(episode, closing=2) == 2000 - 100 - 50 - 2


def test_real_questions_and_pages(shared):
    """With the released tokenizer and the settings of the 7B, every question leaves tokens for a
    turn, and every page is shown as plain text."""
    config = qwen7b.get_config()
    tokenizer = (shared / "tokenizer" / "qwen" / "tokenizer.json").read_text(encoding="utf-8")
    images = ImageProcessor(
        min_pixels=config.images.min_pixels, max_pixels=config.images.max_pixels
    )
    processor = Processor(tokenizer, images)
    rules = Rules(processor, config.turns, config.tools, prompts.load())
    placeholder = processor.control["<|image_pad|>"]
    lengths = []
    for row in parquet.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist():
        images = [image["bytes"] for image in row["images"]]
        prompt = rules.initial_prompt(Example(question=row["prompt"][0]["content"], images=images))
        pads = int((prompt.tokens == placeholder).sum())
        assert pads == sum(len(image.values) // 4 for image in prompt.images) >= 334
        lengths.append(len(prompt.tokens))
    assert len(lengths) == 26 and max(lengths) <= 2048
    lines = (shared / "data" / "web_pages.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line) for line in lines]
    for first in range(0, len(pages), 5):
        results = [
            text_result(page["url"], page["summary"] or page["snippet"])
            for page in pages[first : first + 5]
        ]
        user_turn = reply(rules, Observation(results=results), budget=2048)
        assert user_turn.call.num_shown == 5 and user_turn.call.status == "ok", user_turn.call
        text = processor.decode(user_turn.prompt.tokens)
        for page in pages[first : first + 5]:
            assert page["url"] in text
        assert text.count("</information>\nThe question was") == 1
        assert sorted(set(user_turn.prompt.tokens.tolist()) & set(processor.control.values())) == [
            processor.control["<|im_start|>"], processor.control["<|im_end|>"]
        ]  # fmt: skip


def test_a_question_that_leaves_no_tokens_is_refused(rules):
    with pytest.raises(PromptTooLongError, match="turns.min_turn_tokens allow"):
        rules.initial_prompt(Example(question="word " * 2000))
