"""The automaton stops where a search of the text would, for all token boundaries."""

import numpy as np
import pytest

from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout import stop

STOPS = ("</text_search>", "</search>", "</answer>")
FILL = [
    "<reason>The bridge is old?</reason>\n",
    "</text_searc></answ</sea",
    "<</</a</t",
    "漢字 🏛️ é ",
    "<search><img>",
    " text_search> answer>\n\n",
    "</text_</search_>",
]


def search(tokens, token_bytes):
    """Return the index of the token that completes the first stop string, and the string."""
    text, boundaries = b"", []
    for token in tokens:
        text += token_bytes[token]
        boundaries.append(len(text))
    ends = [(text.find(s.encode()) + len(s), s) for s in STOPS if s.encode() in text]
    if not ends:
        return None, None
    end, which = min(ends)
    return int(np.searchsorted(boundaries, end)), which


def walk(table, tokens):
    state = 0
    for index, token in enumerate(tokens):
        state = table.next_state[state, token]
        if state >= table.running:
            return index, table.reason(state)
    return None, None


def random_split(rng, text, vocabulary):
    """Return tokens with the bytes of a text and random boundaries."""
    data, tokens, start = text.encode(), [], 0
    while start < len(data):
        ends = [e for e in range(start + 1, min(start + 12, len(data)) + 1)
                if data[start:e] in vocabulary]  # fmt: skip
        end = ends[rng.integers(len(ends))]
        tokens.append(vocabulary[data[start:end]])
        start = end
    return tokens


def check(processor, count, seed=0):
    token_bytes = processor.token_bytes()
    end_tokens = {name: processor.control[name] for name in ("<|im_end|>", "<|endoftext|>")}
    table = stop.build(token_bytes, len(token_bytes) + 40, STOPS, end_tokens)
    vocabulary = {b: i for i, b in enumerate(token_bytes) if i not in processor.control.values()}
    ordinary = np.array(sorted(vocabulary.values()))
    rng = np.random.default_rng(seed)
    stopped = 0
    for _ in range(count):
        tokens = rng.choice(ordinary, rng.integers(0, 6)).tolist()
        parts = rng.choice([*FILL, *STOPS], rng.integers(1, 5)).tolist()
        tokens += random_split(rng, "".join(parts), vocabulary)
        tokens += rng.choice(ordinary, rng.integers(0, 4)).tolist()
        expected = search(tokens, token_bytes)
        assert walk(table, tokens) == expected, (tokens, parts)
        stopped += expected[0] is not None
    assert count * 0.4 < stopped < count * 0.95
    return table, token_bytes


@pytest.mark.proof
def test_the_released_vocabulary(shared):
    text = (shared / "tokenizer" / "qwen" / "tokenizer.json").read_text("utf-8")
    processor = Processor(text, ImageProcessor())
    table, token_bytes = check(processor, 10_000)
    assert table.next_state.nbytes < 16e6  # on every device
    # Released tokens do merge across the boundaries of tags.
    assert any(b.endswith(b"?</") for b in token_bytes) and b">\n" in token_bytes


def test_a_byte_level_bpe(processor):
    check(processor, 1000)


def test_token_bytes_join_to_the_text(processor):
    token_bytes = processor.token_bytes()
    for text in FILL:
        tokens = processor.encode_text(text)
        assert b"".join(token_bytes[t] for t in tokens) == text.encode()


def test_end_tokens_stop_immediately(processor):
    end = processor.control["<|im_end|>"]
    table = stop.build(processor.token_bytes(), 600, STOPS, {"<|im_end|>": end})
    tokens = [*processor.encode_text("so</answe"), end, *processor.encode_text("r>")]
    assert walk(table, tokens) == (tokens.index(end), "<|im_end|>")
    finished = table.next_state[table.running :]
    assert (finished == np.arange(table.running, len(table.next_state))[:, None]).all()
    assert (table.next_state[:, 599] == np.arange(len(table.next_state))).all()  # an unknown id


def test_the_longer_of_two_stop_strings_that_end_together_counts():
    token_bytes = [bytes([b]) for b in range(256)]
    table = stop.build(token_bytes, 256, ["ab", "xab"], {})
    assert walk(table, list(b"..xab")) == (4, "xab")
    assert walk(table, list(b"..yab")) == (4, "ab")
    with pytest.raises(ValueError, match="must not be empty"):
        stop.build(token_bytes, 256, ["a", ""], {})
