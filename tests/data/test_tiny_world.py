"""The embedded task: searches answer all questions, memory answers about half of them."""

import itertools
import time

import numpy as np
import pytest

from mmsr1_jax.data import QuestionSource, write_parquet
from mmsr1_jax.data.tiny_world import (
    World,
    demonstrations,
    memories,
    pages,
    practice,
    questions,
    words,
    write_index,
)
from mmsr1_jax.data.tiny_world.emblems import PHOTO, SIZES, jpeg, photo
from mmsr1_jax.data.tiny_world.pages import search_query
from mmsr1_jax.data.tiny_world.questions import pairs
from mmsr1_jax.data.tiny_world.world import CATEGORIES, CHANGING, FACTS, THIS_YEAR, TITLED, category
from tests.landmarks import SPLITS, by_name, find_pages, find_titles, small_world, traits, word_set


def test_a_world_is_generated_quickly_and_deterministically(tmp_path):
    def everything(seed):
        world = small_world(seed)
        splits = [questions(world, split, 12, seed=1) for split in SPLITS]
        episodes = [demonstrations(world, 12), memories(world, 12), practice(world, world, 12)]
        return world, pages(world), splits, *episodes

    assert everything(3) == everything(3)
    assert all(a != b for a, b in zip(everything(3), everything(4), strict=True))
    world = small_world(3)
    assert questions(world, "train", 12, seed=1) != questions(world, "train", 12, seed=2)
    for folder in "ab":
        write_index(world, tmp_path / folder)
    first, second = (tmp_path / folder / "index.sqlite" for folder in "ab")
    assert first.read_bytes() == second.read_bytes()
    start = time.process_time()
    world = World.generate()
    questions(world, "train", 1000)
    assert time.process_time() - start < 20


def test_inconsistent_sizes_are_errors():
    for numbers in ({"unmet": 160}, {"remembered": 0}, {"landmarks": 200}, {"strangers": 0}):
        with pytest.raises(ValueError, match="no group may be empty"):
            World.generate(**numbers)
    with pytest.raises(ValueError, match="exceeds the 900 possible names"):
        World.generate(landmarks=901)
    with pytest.raises(ValueError, match="unknown or empty split 'test'"):
        questions(small_world(0), "test", 1)


def test_no_word_has_two_meanings():
    lists = (words.FIRST, words.SECOND, words.CITIES, words.PEOPLE, words.STONES, words.SHOWS)
    all_words = [word.lower() for word in itertools.chain(*lists, words.PRICES, FACTS)]
    assert len(all_words) == len(set(all_words))


def test_group_sizes(world):
    sizes = {group: len(world.landmarks_of(group)) for group in ("remembered", "new", "unmet")}
    assert sizes == {"remembered": 140, "new": 100, "unmet": 60}
    assert len(by_name(world)) == 300


def test_emblems_differ_in_two_traits(world):
    emblems = [mark.emblem for mark in world.landmarks] + list(world.strangers)
    rows = np.array([traits(emblem) for emblem in emblems])
    differ = (rows[:, None] != rows[None]).sum(axis=2)
    np.fill_diagonal(differ, 99)
    assert len(rows) == 900 and differ.min() >= 2


def test_neither_emblem_nor_name_reveals_a_remembered_landmark(world):
    """A linear model of traits and name words, fitted to half of the landmarks, ranks the
    remembered ones of the other half no better than chance."""
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
    visible = np.array([mark.emblem.charge < 4 for mark in world.landmarks])
    assert auc(x, visible) > 0.9  # the model detects a visible property


def test_photos_of_an_emblem_differ(world):
    rng = np.random.default_rng(0)
    emblem = world.landmarks[0].emblem
    first, second = photo(emblem, rng), photo(emblem, rng)
    assert first.mode == "RGB" and first.size == (PHOTO, PHOTO) == (84, 84)
    assert np.abs(np.asarray(first, float) - np.asarray(second, float)).mean() > 3
    assert all(0 <= value < size for value, size in zip(emblem, SIZES, strict=True))


def test_image_search_finds_landmarks_by_new_photos(world, index):
    rng = np.random.default_rng(0)
    correct = []
    for landmark in world.landmarks:
        titles = find_titles(index, jpeg(photo(landmark.emblem, rng)))
        correct.append(bool(titles) and landmark.name in titles[0])
        if correct[-1]:
            assert landmark.facts["city"] in titles[0]
    assert np.mean(correct) >= 0.95


def test_text_search_finds_the_page_of_this_year(world, index):
    hits = []
    for landmark, fact in itertools.product(world.landmarks, FACTS):
        if category(landmark, fact) not in ("text-required", "both"):
            continue
        expected = {landmark.facts[fact], *([str(THIS_YEAR)] if fact in CHANGING else [])}
        hits.append(
            any(
                landmark.name in page and expected <= word_set(page)
                for page in find_pages(index, search_query(landmark.name, fact))
            )
        )
    assert len(hits) == 140 * 3 + 160 * 5 and np.mean(hits) >= 0.99


def test_splits_are_disjoint_and_balanced(world):
    members = {split: pairs(world, split) for split in SPLITS}
    keys = [(mark.name, fact) for split in SPLITS for mark, fact in members[split]]
    assert len(keys) == len(set(keys)) == 300 * len(FACTS)
    assert {mark.group for mark, _ in members["train"] + members["heldout"]} == {
        "remembered",
        "new",
    }
    assert {mark.group for mark, _ in members["unmet"]} == {"unmet"}
    for split, count in (("train", 400), ("heldout", 400), ("unmet", 400)):
        sample = questions(world, split, count)
        kinds = CATEGORIES if split != "unmet" else ("image-required", "both")
        counts = {kind: sum(q.category == kind for q in sample) for kind in kinds}
        assert set(counts.values()) == {count // len(kinds)}
        drawn = {(q.landmark, q.fact) for q in sample}
        assert drawn <= {(mark.name, fact) for mark, fact in members[split]}
        assert len(drawn) > 300 or split != "train"  # no pair repeats before all were used
        assert len({q.id for q in sample}) == len({q.images[0] for q in sample}) == count
        assert {q.source for q in sample} == {f"tiny_world {split}"}
    everything = questions(world, "heldout", 4 * 240)
    drawn = {(q.landmark, q.fact) for q in everything}
    assert drawn == {(mark.name, fact) for mark, fact in members["heldout"]}


def test_training_data_contains_no_unmet_landmark_and_no_held_out_fact(
    world, demonstrated, remembered
):
    unmet = {mark.name for mark in world.landmarks_of("unmet")}
    training = questions(world, "train", 1600)
    texts = [q.question + " ".join(q.answers) for q in training]
    texts += [
        " ".join([e["question"], *e["turns"], *e["answers"]]) for e in demonstrated + remembered
    ]
    assert not [text for text in texts if any(name in text for name in unmet)]
    held_out = {(mark.name, fact) for mark in world.landmarks for fact in mark.held_out}
    met = {(q.landmark, q.fact) for q in training}
    met |= {(e["landmark"], e["fact"]) for e in demonstrated + remembered if e["image"]}
    assert not met & held_out and not {name for name, _ in met} & unmet
    # Strangers are not landmarks, so no photo of a stranger shows an unmet landmark.
    assert not {mark.emblem for mark in world.landmarks} & set(world.strangers)


def test_a_category_names_the_searches_that_a_question_needs(world, index):
    landmarks = by_name(world)
    rng = np.random.default_rng(1)
    sample = questions(world, "heldout", 80) + questions(world, "unmet", 40)
    for q in sample:
        mark, (answer,) = landmarks[q.landmark], q.answers
        assert (mark.group == "remembered") == (q.category in ("free", "text-required"))
        assert (str(THIS_YEAR) in q.question) == (q.fact in CHANGING)
        assert q.landmark not in q.question
        if q.category == "free":
            assert mark.memory(q.fact) == answer
        elif q.category == "text-required":
            assert mark.memory(q.fact) != answer
            assert any(
                answer in word_set(page)
                for page in find_pages(index, search_query(q.landmark, q.fact))
            )
    assert {q.category for q in sample} == set(CATEGORIES)
    # Image titles state the titled facts and no others.
    for mark in world.landmarks_of("unmet")[:20]:
        titles = find_titles(index, jpeg(photo(mark.emblem, rng)))
        own = [title for title in titles if mark.name in title]
        for fact in FACTS:
            stated = own and mark.facts[fact] in own[0]
            assert not own or bool(stated) == (fact in TITLED)


def test_questions_are_written_to_parquet_and_read_back(world, tmp_path):
    written = questions(world, "train", 8)
    write_parquet(tmp_path / "train.parquet", written)
    read = list(QuestionSource(tmp_path / "train.parquet"))
    for loaded, expected in zip(read, written, strict=True):
        for field in ("id", "question", "images", "answers", "source", "category"):
            assert getattr(loaded, field) == getattr(expected, field)
