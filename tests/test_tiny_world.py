"""The embedded task is what it claims to be: it can be solved with searches, half of it without."""

import asyncio
import itertools
import json
import re
import time

import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.data import QuestionSource, write_parquet
from mmsr1_jax.data.tiny_world import (
    PROMPTS,
    World,
    demonstrations,
    memories,
    pages,
    practice,
    questions,
    train_tokenizer,
    words,
    write_index,
)
from mmsr1_jax.data.tiny_world.emblems import PHOTO, SIZES, jpeg, photo
from mmsr1_jax.data.tiny_world.pages import query
from mmsr1_jax.data.tiny_world.questions import pairs
from mmsr1_jax.data.tiny_world.world import CATEGORIES, CHANGING, FACTS, THIS_YEAR, TITLED, category
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.rules import Rules
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools import Query
from mmsr1_jax.tools.local_index import LocalIndex
from tests.test_score import run

SPLITS = ("train", "heldout", "unmet")
ACTIONS = {
    "direct": ["answer"],
    "image": ["image_search", "answer"],
    "text": ["text_search", "answer"],
    "image+text": ["image_search", "text_search", "answer"],
}


@pytest.fixture(scope="module")
def world():
    return World.make()


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    assert write_index(world, folder) == (len(pages(world)), 4 * len(world.landmarks))
    return LocalIndex(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def shown(world):
    """Demonstrations."""
    return demonstrations(world, 1600)


@pytest.fixture(scope="module")
def remembered(world):
    """Demonstrations of what is remembered."""
    return memories(world, 900)


def small(seed):
    return World.make(seed, landmarks=30, remembered=12, unmet=8, strangers=20)


def pages_of(index, text):
    query = Query(action="text_search", text=text, question="?")
    return [result[0].text for result in asyncio.run(index.text_search(query)).results]


def titles_of(index, file):
    query = Query(action="image_search", text=None, question="?", images=[file])
    return [result[2].text for result in asyncio.run(index.image_search(query)).results]


def words_of(text):
    return set(re.findall(r"\w+", text))


def by_name(world):
    return {landmark.name: landmark for landmark in world.landmarks}


def taken_for(text):
    """The landmark that a turn names."""
    return re.fullmatch(r"This (?:is|may be) (.+)\.", parse(text).reason)[1]


def guesses(text):
    """Whether a turn says that it does not know the landmark."""
    return parse(text).reason.startswith("This may be ")


def traits(emblem):
    return [int(bit) for bit in f"{emblem.field:08b}"] + list(emblem[1:])


def test_is_made_in_seconds_and_the_same_for_the_same_seed(tmp_path):
    def all_of(seed):
        world = small(seed)
        asked = [questions(world, split, 12, seed=1) for split in SPLITS]
        told = [demonstrations(world, 12), memories(world, 12), practice(world, world, 12)]
        return world, pages(world), asked, *told

    assert all_of(3) == all_of(3)
    assert all(a != b for a, b in zip(all_of(3), all_of(4), strict=True))
    world = small(3)
    assert questions(world, "train", 12, seed=1) != questions(world, "train", 12, seed=2)
    for folder in "ab":
        write_index(world, tmp_path / folder)
    one, other = (tmp_path / folder / "index.sqlite" for folder in "ab")
    assert one.read_bytes() == other.read_bytes()
    begin = time.process_time()
    world = World.make()
    questions(world, "train", 1000)
    assert time.process_time() - begin < 20


def test_numbers_that_do_not_fit():
    for numbers in ({"unmet": 160}, {"remembered": 0}, {"landmarks": 200}, {"strangers": 0}):
        with pytest.raises(ValueError, match="there must be some of each"):
            World.make(**numbers)
    with pytest.raises(ValueError, match="names for 900 landmarks only"):
        World.make(landmarks=901)
    with pytest.raises(ValueError, match="no split 'test'"):
        questions(small(0), "test", 1)


def test_words_have_one_meaning():
    lists = (words.FIRST, words.SECOND, words.CITIES, words.PEOPLE, words.STONES, words.SHOWS)
    every = [word.lower() for word in itertools.chain(*lists, words.PRICES, FACTS)]
    assert len(every) == len(set(every))


def test_groups(world):
    sizes = {group: len(world.of(group)) for group in ("remembered", "new", "unmet")}
    assert sizes == {"remembered": 140, "new": 100, "unmet": 60}
    assert len(by_name(world)) == 300


def test_emblems_differ_in_two_traits(world):
    emblems = [mark.emblem for mark in world.landmarks] + list(world.strangers)
    rows = np.array([traits(emblem) for emblem in emblems])
    differ = (rows[:, None] != rows[None]).sum(axis=2)
    np.fill_diagonal(differ, 99)
    assert len(rows) == 900 and differ.min() >= 2


def test_nothing_visible_tells_a_remembered_landmark(world):
    """A linear model of all traits, and of the name's words, fitted to a half of the landmarks,
    ranks the remembered ones of the other half no better than by lot."""
    values = [traits(mark.emblem) + mark.name.split() for mark in world.landmarks]
    columns = [sorted({row[k] for row in values}, key=str) for k in range(len(values[0]))]
    x = np.array([[row[k] == v for k, c in enumerate(columns) for v in c] for row in values], float)
    y = np.array([mark.group == "remembered" for mark in world.landmarks])

    def auc(x, y):
        areas = []
        for half in (0, 1):
            fit, test = np.arange(len(y)) % 2 == half, np.arange(len(y)) % 2 != half
            a = x[fit]
            w = np.linalg.solve(a.T @ a + 3 * np.eye(a.shape[1]), a.T @ (y[fit] - y[fit].mean()))
            score = x[test] @ w
            areas.append(np.mean(score[y[test]][:, None] > score[~y[test]]))
        return np.mean(areas)

    assert abs(auc(x, y) - 0.5) < 0.1
    telling = np.array([mark.emblem.charge < 4 for mark in world.landmarks])
    assert auc(x, telling) > 0.9  # it would have found out


def test_photos(world):
    rng = np.random.default_rng(0)
    emblem = world.landmarks[0].emblem
    one, other = photo(emblem, rng), photo(emblem, rng)
    assert one.mode == "RGB" and one.size == (PHOTO, PHOTO) == (84, 84)
    assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() > 3
    assert all(0 <= value < size for value, size in zip(emblem, SIZES, strict=True))


def test_image_search_finds_landmarks_by_new_photos(world, index):
    rng = np.random.default_rng(0)
    right = []
    for landmark in world.landmarks:
        titles = titles_of(index, jpeg(photo(landmark.emblem, rng)))
        right.append(bool(titles) and landmark.name in titles[0])
        if right[-1]:
            assert landmark.facts["city"] in titles[0]
    assert np.mean(right) >= 0.95


def test_text_search_finds_this_years_page(world, index):
    found = []
    for landmark, fact in itertools.product(world.landmarks, FACTS):
        if category(landmark, fact) not in ("text-required", "both"):
            continue
        wanted = {landmark.facts[fact], *([str(THIS_YEAR)] if fact in CHANGING else [])}
        found.append(
            any(
                landmark.name in page and wanted <= words_of(page)
                for page in pages_of(index, query(landmark.name, fact))
            )
        )
    assert len(found) == 140 * 3 + 160 * 5 and np.mean(found) >= 0.99


def test_splits(world):
    asked = {split: pairs(world, split) for split in SPLITS}
    keys = [(mark.name, fact) for split in SPLITS for mark, fact in asked[split]]
    assert len(keys) == len(set(keys)) == 300 * len(FACTS)
    assert {mark.group for mark, _ in asked["train"] + asked["heldout"]} == {"remembered", "new"}
    assert {mark.group for mark, _ in asked["unmet"]} == {"unmet"}
    for split, count in (("train", 400), ("heldout", 400), ("unmet", 400)):
        found = questions(world, split, count)
        kinds = CATEGORIES if split != "unmet" else ("image-required", "both")
        counts = {kind: sum(q.category == kind for q in found) for kind in kinds}
        assert set(counts.values()) == {count // len(kinds)}
        drawn = {(q.landmark, q.fact) for q in found}
        assert drawn <= {(mark.name, fact) for mark, fact in asked[split]}
        assert len(drawn) > 300 or split != "train"  # no pair again before all were asked
        assert len({q.id for q in found}) == len({q.images[0] for q in found}) == count
        assert {q.source for q in found} == {f"tiny_world {split}"}
    everything = questions(world, "heldout", 4 * 240)
    drawn = {(q.landmark, q.fact) for q in everything}
    assert drawn == {(mark.name, fact) for mark, fact in asked["heldout"]}


def test_nothing_of_the_unmet_and_the_held_out_is_met(world, shown, remembered):
    unmet = {mark.name for mark in world.of("unmet")}
    asked = questions(world, "train", 1600)
    texts = [q.question + " ".join(q.answers) for q in asked]
    texts += [" ".join([e["question"], *e["turns"], *e["answers"]]) for e in shown + remembered]
    assert not [text for text in texts if any(name in text for name in unmet)]
    held_out = {(mark.name, fact) for mark in world.landmarks for fact in mark.held_out}
    met = {(q.landmark, q.fact) for q in asked}
    met |= {(e["landmark"], e["fact"]) for e in shown + remembered if e["image"]}
    assert not met & held_out and not {name for name, _ in met} & unmet
    # A stranger is no landmark, so no photo of one shows an unmet one.
    assert not {mark.emblem for mark in world.landmarks} & set(world.strangers)


def test_what_a_category_means(world, index):
    landmarks = by_name(world)
    rng = np.random.default_rng(1)
    asked = questions(world, "heldout", 80) + questions(world, "unmet", 40)
    for q in asked:
        mark, (answer,) = landmarks[q.landmark], q.answers
        assert (mark.group == "remembered") == (q.category in ("free", "text-required"))
        assert (str(THIS_YEAR) in q.question) == (q.fact in CHANGING)
        assert q.landmark not in q.question
        if q.category == "free":
            assert mark.memory(q.fact) == answer
        elif q.category == "text-required":
            assert mark.memory(q.fact) != answer
            assert any(
                answer in words_of(page) for page in pages_of(index, query(q.landmark, q.fact))
            )
    assert {q.category for q in asked} == set(CATEGORIES)
    # What the titles tell is what parts the questions that an image search answers from others.
    for mark in world.of("unmet")[:20]:
        titles = titles_of(index, jpeg(photo(mark.emblem, rng)))
        own = [title for title in titles if mark.name in title]
        for fact in FACTS:
            told = own and mark.facts[fact] in own[0]
            assert not own or bool(told) == (fact in TITLED)


def test_demonstrations_search_without_regard_to_need(world, shown, remembered):
    counts = {
        (kind, flow): sum(e["category"] == kind and e["workflow"] == flow for e in shown)
        for kind in CATEGORIES
        for flow in ACTIONS
    }
    # Chi-square of 4 x 3 degrees of freedom: over 32.9 once in 1000 draws.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 32.9
    for e in shown + remembered:
        turns = [parse(text) for text in e["turns"]]
        assert all(turn.well_formed for turn in turns)
        assert [turn.action for turn in turns] == ACTIONS[e["workflow"]]
        assert all(
            re.fullmatch(r"This (is|may be) [A-Z][a-z]+ [A-Z][a-z]+\.", turn.reason)
            for turn in turns
        )
    assert {e["workflow"] for e in remembered} == {"direct"}


def test_demonstrations_say_what_memory_and_pages_say(world, shown):
    landmarks = by_name(world)

    def right(kind, flow):
        chosen = [e for e in shown if (e["category"], e["workflow"]) == (kind, flow)]
        return np.mean([parse(e["turns"][-1]).payload in e["answers"] for e in chosen])

    table = {(kind, flow): right(kind, flow) for kind in CATEGORIES for flow in ACTIONS}
    for kind in CATEGORIES:
        assert table[kind, "image+text"] == 1
    needed = {"free": "direct", "image-required": "image", "text-required": "text"}
    for kind, flow in needed.items():
        assert table[kind, flow] == 1
    assert table["text-required", "direct"] == table["text-required", "image"] == 0
    for flow in ("direct", "text"):
        assert table["image-required", flow] < 0.25 and table["both", flow] < 0.25
    assert table["both", "image"] < 0.25
    for e in shown:
        mark, first = landmarks[e["landmark"]], parse(e["turns"][0])
        taken = landmarks[taken_for(e["turns"][0])]
        assert taken.group == "remembered"
        assert (taken is mark) == (mark.group == "remembered")
        if e["workflow"] == "direct":
            assert first.payload == taken.memory(e["fact"])
        # It says whether it knows what it sees, and does not act on that.
        looks = e["workflow"].startswith("image")
        for place, text in enumerate(e["turns"]):
            assert guesses(text) == (mark.group != "remembered" and not (looks and place))


def test_last_turns_are_read_from_what_the_tools_find(world, index, shown):
    told = []
    for e in shown[:200]:
        turns, found = [parse(text) for text in e["turns"]], ""
        for turn in turns[:-1]:
            if turn.action == "text_search":
                found = " ".join(pages_of(index, turn.payload))
            else:
                found = " ".join(titles_of(index, e["image"]))
        if e["workflow"].endswith("text") or (e["workflow"] == "image" and e["fact"] in TITLED):
            told.append(words_of(turns[-1].payload) <= words_of(found))
    assert len(told) > 80 and np.mean(told) >= 0.97


def test_memories(world, remembered):
    landmarks = by_name(world)
    named, told, strangers = remembered[::3], remembered[1::3], remembered[2::3]
    for e in named + told:
        mark = landmarks[e["landmark"]]
        assert mark.group == "remembered"
        assert parse(e["turns"][0]).payload == mark.memory(e["fact"]) == e["answers"][0]
        assert (e["image"] is None) == (e["landmark"] in e["question"])
    assert {e["landmark"] for e in named} == {mark.name for mark in world.of("remembered")}
    assert {e["fact"] for e in named} == {"name"} == set(FACTS) - {e["fact"] for e in told}
    taken = [taken_for(e["turns"][0]) for e in strangers]
    assert {landmarks[name].group for name in taken} == {"remembered"}
    assert len(set(taken)) > 100  # drawn anew each time
    assert {e["landmark"] for e in strangers} == {""}
    assert [guesses(e["turns"][0]) for e in remembered] == [False, False, True] * 300
    assert {e["fact"] for e in strangers} == set(FACTS)
    for e, name in zip(strangers, taken, strict=True):
        assert parse(e["turns"][0]).payload == landmarks[name].memory(e["fact"]) == e["answers"][0]


def test_practice_is_answered_by_what_is_found_in_another_world(world, tmp_path):
    other = small(5)
    write_index(other, tmp_path)
    index, landmarks, known = LocalIndex(tmp_path), by_name(other), by_name(world)
    practised = practice(other, world, 80)
    assert {e["workflow"] for e in practised} == {"text", "image", "image+text"}
    read = []
    for e in practised:
        mark, turns = landmarks[e["landmark"]], [parse(text) for text in e["turns"]]
        assert [turn.action for turn in turns] == ACTIONS[e["workflow"]]
        assert turns[-1].payload == mark.facts[e["fact"]] == e["answers"][0]
        assert (e["image"] is None) == (mark.name in e["question"]) == (e["workflow"] == "text")
        assert guesses(e["turns"][0]) == (e["image"] is not None)
        if e["image"] is not None:
            assert known[taken_for(e["turns"][0])].group == "remembered"
        assert [taken_for(text) for text in e["turns"][1:]] == [mark.name] * (len(turns) - 1)
        found = [
            " ".join(
                pages_of(index, turn.payload)
                if turn.action == "text_search"
                else titles_of(index, e["image"])
            )
            for turn in turns[:-1]
        ]
        read.append(words_of(turns[-1].payload) <= words_of(found[-1]))
    assert np.mean(read) >= 0.97


def test_tokens_are_few(world, tokenizer, shown):
    def count(text):
        return len(tokenizer.encode(text).ids)

    assert 1000 <= tokenizer.get_vocab_size() <= 4096
    assert {count(f" {mark.name}") for mark in world.landmarks} == {2}
    values = {value for mark in world.landmarks for f, value in mark.facts.items() if f != "name"}
    assert {count(f" {value}") for value in values} == {1}
    assert max(count(text) for e in shown for text in e["turns"]) <= 16
    assert max(count(q.question) for q in questions(world, "train", 200)) <= 16


def test_prompts_and_results_are_short(world, tokenizer, index):
    processor = Processor(
        tokenizer.to_str(), ImageProcessor(min_pixels=56 * 56, max_pixels=PHOTO * PHOTO)
    )
    tools = settings.Tools(max_pixels=56 * 56)
    rules = Rules(processor, settings.Turns(), tools, prompts.load(PROMPTS))
    for q in questions(world, "unmet", 20):
        first = rules.initial_prompt(q.example())
        assert first.grids == [(1, 6, 6)] and len(first.tokens) <= 60
        for action, text in (("image_search", None), ("text_search", query(q.landmark, q.fact))):
            asked = Query(action=action, text=text, question=q.question, images=q.images)
            found = asyncio.run(getattr(index, action)(asked))
            reply = rules.tool_reply(asked, q.example(), 0, 10_000, found, None, 0.0)
            each = 40 if action == "text_search" else 25
            assert (
                reply.call.num_shown
                and len(reply.prompt.tokens) <= 50 + each * reply.call.num_shown
            )


def test_text_comes_back(world, tokenizer):
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


def test_questions_as_parquet(world, tmp_path):
    asked = questions(world, "train", 8)
    write_parquet(tmp_path / "train.parquet", asked)
    read = list(QuestionSource(tmp_path / "train.parquet"))
    for one, other in zip(read, asked, strict=True):
        for field in ("id", "question", "images", "answers", "source", "category"):
            assert getattr(one, field) == getattr(other, field)


def test_the_command_writes_what_others_read(tmp_path):
    out = tmp_path / "world"
    counts = ["--train=8", "--heldout=4", "--unmet=4", "--stories=3"]
    done = run(f"--out={out}", *counts, module="mmsr1_jax.scripts.tiny_world")
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 8), ("heldout", 4), ("unmet", 4)):
        assert len(list(QuestionSource(out / f"{split}.parquet"))) == count
    Processor.from_directory(out / "policy").check_fits(ModelConfig.from_directory(out / "policy"))
    assert LocalIndex(out / "index")
    for name in ("demonstrations", "memories", "practice"):
        stories = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert len(stories) == 3 and all(story["turns"] for story in stories)
        assert all((out / path).is_file() for story in stories for path in story["images"])
        indices = {story["index"] for story in stories if "index" in story}
        assert bool(indices) == (name == "practice")
        assert all(LocalIndex(out / index) for index in indices)
