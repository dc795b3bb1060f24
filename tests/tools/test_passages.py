"""Selection of the paragraphs of a page that are relevant to a question."""

from mmsr1_jax.tools.passages import best_passages, fts_query


def test_short_page_is_returned_whole():
    assert best_passages("One.\n\n  Two   words. \n", "anything", 100) == "One.\nTwo words."


def test_best_paragraphs_keep_the_order_of_the_page():
    filler = ["Nothing of use stands in this line, it is only long. " * 3] * 20
    page = "\n".join([*filler[:7], "The bridge opened in 1886.", *filler[7:],
                      "Bridges open slowly: the opening took years.", "Cookies."])  # fmt: skip
    passages = best_passages(page, "When was the bridge opened?", 80)
    assert passages == "The bridge opened in 1886.\nBridges open slowly: the opening took years."


def test_length_is_bounded():
    page = "\n".join(f"bridge {i} " + "x" * 50 for i in range(1000))
    for chars in (10, 100, 1000):
        assert 0 < len(best_passages(page, "bridge", chars)) <= chars
    assert len(best_passages("y" * 10_000_000, "bridge", 500)) == 500  # one line of 10 MB
    assert best_passages("a\nb " * 100, "?!", 10).startswith("a")
    assert best_passages("", "bridge", 10) == ""


def test_query_operators_are_ordinary_words():
    assert fts_query('a" OR (b*) NEAR c a') == '"a" OR "OR" OR "b" OR "NEAR" OR "c"'
    assert fts_query("?!") == ""
