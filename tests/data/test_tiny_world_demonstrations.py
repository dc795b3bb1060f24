"""Demonstrations of the tiny world are consistent with memory, pages and search results."""

import asyncio
import re

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.data.tiny_world import (
    PROMPTS,
    pages,
    practice,
    questions,
    write_index,
)
from mmsr1_jax.data.tiny_world.emblems import PHOTO
from mmsr1_jax.data.tiny_world.pages import search_query
from mmsr1_jax.data.tiny_world.world import CATEGORIES, FACTS, TITLED
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools import Query
from mmsr1_jax.tools.local_index import LocalIndex
from tests.landmarks import (
    ACTIONS,
    by_name,
    find_pages,
    find_titles,
    is_guess,
    named_landmark,
    small_world,
    word_set,
)


def test_searches_of_demonstrations_are_independent_of_the_category(
    world, demonstrated, remembered
):
    counts = {
        (kind, flow): sum(e["category"] == kind and e["workflow"] == flow for e in demonstrated)
        for kind in CATEGORIES
        for flow in ACTIONS
    }
    # Chi-square with 4 x 3 degrees of freedom exceeds 32.9 once in 1000 draws.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 32.9
    for e in demonstrated + remembered:
        turns = [parse(text) for text in e["turns"]]
        assert all(turn.form is not None for turn in turns)
        assert [turn.action for turn in turns] == ACTIONS[e["workflow"]]
        assert all(
            re.fullmatch(r"This (is|may be) [A-Z][a-z]+ [A-Z][a-z]+\.", turn.reason)
            for turn in turns
        )
    assert {e["workflow"] for e in remembered} == {"direct"}


def test_answers_of_demonstrations_come_from_memory_or_search_results(world, demonstrated):
    landmarks = by_name(world)

    def accuracy(kind, flow):
        chosen = [e for e in demonstrated if (e["category"], e["workflow"]) == (kind, flow)]
        return np.mean([parse(e["turns"][-1]).payload in e["answers"] for e in chosen])

    table = {(kind, flow): accuracy(kind, flow) for kind in CATEGORIES for flow in ACTIONS}
    for kind in CATEGORIES:
        assert table[kind, "image+text"] == 1
    needed = {"free": "direct", "image-required": "image", "text-required": "text"}
    for kind, flow in needed.items():
        assert table[kind, flow] == 1
    assert table["text-required", "direct"] == table["text-required", "image"] == 0
    for flow in ("direct", "text"):
        assert table["image-required", flow] < 0.25 and table["both", flow] < 0.25
    assert table["both", "image"] < 0.25
    for e in demonstrated:
        mark, first = landmarks[e["landmark"]], parse(e["turns"][0])
        believed = landmarks[named_landmark(e["turns"][0])]
        assert believed.group == "remembered"
        assert (believed is mark) == (mark.group == "remembered")
        if e["workflow"] == "direct":
            assert first.payload == believed.memory(e["fact"])
        # The reasoning tells knowledge from guesses, but the actions do not depend on that.
        searches_image = e["workflow"].startswith("image")
        for position, text in enumerate(e["turns"]):
            assert is_guess(text) == (
                mark.group != "remembered" and not (searches_image and position)
            )


def test_answers_after_a_search_occur_in_its_results(world, index, demonstrated):
    occurs = []
    for e in demonstrated[:200]:
        turns, results = [parse(text) for text in e["turns"]], ""
        for turn in turns[:-1]:
            if turn.action == "text_search":
                results = " ".join(find_pages(index, turn.payload))
            else:
                results = " ".join(find_titles(index, e["image"]))
        if e["workflow"].endswith("text") or (e["workflow"] == "image" and e["fact"] in TITLED):
            occurs.append(word_set(turns[-1].payload) <= word_set(results))
    assert len(occurs) > 80 and np.mean(occurs) >= 0.97


def test_memories_cover_remembered_landmarks_and_strangers(world, remembered):
    landmarks = by_name(world)
    photos, by_name_only, strangers = remembered[::3], remembered[1::3], remembered[2::3]
    for e in photos + by_name_only:
        mark = landmarks[e["landmark"]]
        assert mark.group == "remembered"
        assert parse(e["turns"][0]).payload == mark.memory(e["fact"]) == e["answers"][0]
        assert (e["image"] is None) == (e["landmark"] in e["question"])
    assert {e["landmark"] for e in photos} == {
        mark.name for mark in world.landmarks_of("remembered")
    }
    assert {e["fact"] for e in photos} == {"name"} == set(FACTS) - {e["fact"] for e in by_name_only}
    believed = [named_landmark(e["turns"][0]) for e in strangers]
    assert {landmarks[name].group for name in believed} == {"remembered"}
    assert len(set(believed)) > 100  # sampled each time
    assert {e["landmark"] for e in strangers} == {""}
    assert [is_guess(e["turns"][0]) for e in remembered] == [False, False, True] * 300
    assert {e["fact"] for e in strangers} == set(FACTS)
    for e, name in zip(strangers, believed, strict=True):
        assert parse(e["turns"][0]).payload == landmarks[name].memory(e["fact"]) == e["answers"][0]


def test_practice_is_answered_from_search_results_of_another_world(world, tmp_path):
    other = small_world(5)
    write_index(other, tmp_path)
    index, landmarks, known = LocalIndex(tmp_path), by_name(other), by_name(world)
    practised = practice(other, world, 80)
    assert {e["workflow"] for e in practised} == {"text", "image", "image+text"}
    occurs = []
    for e in practised:
        mark, turns = landmarks[e["landmark"]], [parse(text) for text in e["turns"]]
        assert [turn.action for turn in turns] == ACTIONS[e["workflow"]]
        assert turns[-1].payload == mark.facts[e["fact"]] == e["answers"][0]
        assert (e["image"] is None) == (mark.name in e["question"]) == (e["workflow"] == "text")
        assert is_guess(e["turns"][0]) == (e["image"] is not None)
        if e["image"] is not None:
            assert known[named_landmark(e["turns"][0])].group == "remembered"
        assert [named_landmark(text) for text in e["turns"][1:]] == [mark.name] * (len(turns) - 1)
        results = [
            " ".join(
                find_pages(index, turn.payload)
                if turn.action == "text_search"
                else find_titles(index, e["image"])
            )
            for turn in turns[:-1]
        ]
        occurs.append(word_set(turns[-1].payload) <= word_set(results[-1]))
    assert np.mean(occurs) >= 0.97


def test_names_and_values_take_few_tokens(world, tokenizer, demonstrated):
    def count(text):
        return len(tokenizer.encode(text).ids)

    assert 1000 <= tokenizer.get_vocab_size() <= 4096
    assert {count(f" {mark.name}") for mark in world.landmarks} == {2}
    values = {value for mark in world.landmarks for f, value in mark.facts.items() if f != "name"}
    assert {count(f" {value}") for value in values} == {1}
    assert max(count(text) for e in demonstrated for text in e["turns"]) <= 16
    assert max(count(q.question) for q in questions(world, "train", 200)) <= 16


def test_prompts_and_results_take_few_tokens(world, tokenizer, index):
    processor = Processor(
        tokenizer.to_str(), ImageProcessor(min_pixels=56 * 56, max_pixels=PHOTO * PHOTO)
    )
    tools = settings.Tools(max_pixels=56 * 56)
    rules = Rules(processor, settings.Turns(), tools, prompts.load(PROMPTS))
    for q in questions(world, "unmet", 20):
        first = rules.initial_prompt(q.example())
        assert first.grids == [(1, 6, 6)] and len(first.tokens) <= 60
        for action, text in (
            ("image_search", None),
            ("text_search", search_query(q.landmark, q.fact)),
        ):
            request = Query(action=action, text=text, question=q.question, images=q.images)
            results = asyncio.run(getattr(index, action)(request))
            reply = rules.tool_reply(request, q.example(), 0, 10_000, results, None, 0.0)
            tokens_each = 40 if action == "text_search" else 25
            assert (
                reply.call.num_shown
                and len(reply.prompt.tokens) <= 50 + tokens_each * reply.call.num_shown
            )


def test_encoded_text_is_decoded_unchanged(world, tokenizer):
    texts = [page["text"] for page in pages(world)]
    texts += [
        "",
        " ",
        "a  b\n\n c",
        "<",
        "</answer",
        "<|im_end|>",
        "Žluťoučký kůň 東京 🙂",
        "12345 67",
    ]
    processor = Processor(tokenizer.to_str(), ImageProcessor())
    bytes_of = processor.token_bytes()
    for text in texts:
        tokens = processor.encode_text(text)
        assert processor.decode(tokens) == text
        assert not set(tokens) & set(processor.control.values())
        assert b"".join(bytes_of[token] for token in tokens) == text.encode()
