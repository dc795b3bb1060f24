"""Prompts: built-in files, a user's files, and published pickles, which are read as data."""

import os
import pickle

import pytest

from mmsr1_jax.episodes import prompts


def test_built_in_prompts_have_all_fields():
    texts = prompts.load()
    assert set(texts) == {"question", "after_image_search", "after_text_search", "search_failed",
                          "over_limit", "malformed"}  # fmt: skip
    assert "[Image Search Results]\n{results}\n</information>" in texts["after_image_search"]
    assert "[Text Search Results]\n{results}\n</information>" in texts["after_text_search"]
    for name in ("question", "search_failed", "over_limit", "malformed"):
        assert "{question}" in texts[name] and "<answer>" in texts[name]


def test_replacements_are_not_expanded_again():
    parts = prompts.fill("a {question}\n{images}!", {"question": ["{images}?"], "images": [1, 2]})
    assert parts == ["a ", "{images}?", "\n", 1, 2, "!"]


def test_user_files_replace_built_in_prompts(tmp_path):
    (tmp_path / "malformed.txt").write_text("Once more, {question}\n", encoding="utf-8")
    texts = prompts.load(tmp_path)
    assert texts["malformed"] == "Once more, {question}"
    assert texts["question"] == prompts.load()["question"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("question", "{images}", "'question' lacks {question}"),
        ("after_text_search", "no fields", "'after_text_search' lacks {results}"),
        ("malformed", "{results}", "'malformed' has no field {results}"),
    ],
)
def test_prompts_with_missing_or_unknown_fields_are_refused(tmp_path, name, text, message):
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(prompts.PromptsError, match=message):
        prompts.load(tmp_path)


def test_unusable_directories_are_refused(tmp_path):
    with pytest.raises(prompts.PromptsError, match="no such directory"):
        prompts.load(tmp_path / "nowhere")
    with pytest.raises(prompts.PromptsError, match="neither question, "):
        prompts.load(tmp_path)
    (tmp_path / "question.txt").write_bytes(b"\xff{question}{images}")
    with pytest.raises(prompts.PromptsError, match="question.txt: not UTF-8"):
        prompts.load(tmp_path)


def published(directory, protocol=pickle.DEFAULT_PROTOCOL):
    """Return a directory of published prompts: three pickles of one string each."""
    for name in ("round_1_user_prompt", "after_image_search_prompt", "after_text_search_prompt"):
        with open(directory / f"{name}_qwenvl.pkl", "wb") as file:
            pickle.dump(f"Do {name} {{so}}. <image>", file, protocol)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_published_prompts_are_read(tmp_path, protocol):
    published(tmp_path, protocol)
    texts = prompts.load(tmp_path)
    assert texts["question"] == (
        "Do round_1_user_prompt {so}.\nQuestion: {question}\nImage: {images}"
    )
    assert texts["after_image_search"] == (
        "<information>\n[Image Search Results]\n{results}\n</information>\n"
        "Original question: {question}\nDo after_image_search_prompt {so}."
    )
    assert "[Text Search Results]" in texts["after_text_search"]
    assert texts["malformed"] == prompts.load()["malformed"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    published(tmp_path)
    path, marker = tmp_path / "round_1_user_prompt_qwenvl.pkl", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(prompts.PromptsError, match="round_1_user_prompt_qwenvl.pkl: not a pickle"):
        prompts.load(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [pickle.dumps(["a list"]), b"rubbish", b"", pickle.dumps(7)])
def test_pickles_of_other_values_are_refused(tmp_path, content):
    published(tmp_path)
    (tmp_path / "after_text_search_prompt_qwenvl.pkl").write_bytes(content)
    with pytest.raises(prompts.PromptsError, match="after_text_search_prompt_qwenvl.pkl"):
        prompts.load(tmp_path)


def test_two_pickles_for_one_prompt_are_refused(tmp_path):
    published(tmp_path)
    (tmp_path / "round_1_user_prompt_other.pkl").write_bytes(pickle.dumps("x"))
    with pytest.raises(prompts.PromptsError, match="keep one of them"):
        prompts.load(tmp_path)


def test_the_workflow_agent_requires_its_own_question_prompt(tmp_path):
    """Otherwise it would equal the trained workflow."""
    published(tmp_path)
    with pytest.raises(prompts.PromptsError, match="agent/question.txt"):
        prompts.load(tmp_path, "agent")
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "question.txt").write_text("Search! {question} {images}")
    assert prompts.load(tmp_path, "agent")["question"] == "Search! {question} {images}"
    assert prompts.load(tmp_path, "rag")["question"] == prompts.load(tmp_path)["question"]
