"""How many pages prompts and lanes take."""

import jax
import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pages import PageTable
from tests.engines import LIMITS, VOCAB_SIZE, make_config, search_tools
from tests.scripted_policy import scripted_processor

SIZE, GROUP = 128, 8


def test_rollouts_of_a_prompt_share_its_full_pages(model):
    """Eight rollouts of a prompt of 3,000 tokens, before the first search."""
    limits = settings.Turns(**{**_fields(LIMITS), "max_episode_tokens": 4096})
    config = make_config(limits=limits, lanes=GROUP, page_size=SIZE)
    engine = Engine(model, scripted_processor(VOCAB_SIZE), config, search_tools())
    pages, counts = engine.device.pages, []

    def count(episode, tokens):
        if len(counts) < GROUP:
            counts.append((pages.num_pages - pages.num_free, len(episode), len(tokens)))

    copied, fork = [], engine.device.fork
    engine.device.fork = lambda *args: (copied.append(args[:2]), fork(*args))
    rollout = engine.rollout_part(
        lambda n: [(0, Example(id="0", question="x" * 2650, images=[]))] if not counts else [],
        group_size=GROUP,
        sampling=settings.Sampling(),
        on_tokens=count,
    )
    next(rollout)
    engine.close()
    prompt = counts[0][1]
    assert 2900 < prompt < 3100 and prompt % SIZE + config.rollout.decode_steps <= SIZE
    assert counts[0][0] == prompt // SIZE + GROUP
    assert len(copied) == GROUP - 1  # one page each
    assert len({target for _, target in copied}) == GROUP - 1


def _fields(turns: settings.Turns) -> dict:
    return {name: getattr(turns, name) for name in turns.__dataclass_fields__}


def page_table(lanes, num_pages, capacity, *, chunk=16, size=SIZE):
    """Return a table of lanes that are never offloaded."""

    def never(*args):
        pytest.fail("a lane was offloaded")

    return PageTable(lanes + 1, num_pages, size, capacity, chunk, never, never)


def test_four_times_the_lanes_fit_if_a_quarter_is_filled():
    """2k tokens of 8k in each of 192 lanes, in the memory of 48, the first chunk included."""
    lanes, capacity, filled, chunk = 48, 8192, 2048, 16
    table = page_table(4 * lanes, lanes * capacity // SIZE, capacity)
    for lane in range(4 * lanes):
        assert table.fits_prompt(filled - chunk, held=False)
        assert table.reserve(lane, filled - chunk)
    for lane in range(4 * lanes):
        assert table.make_room(lane, filled)
    assert table.num_free == 0 and not table.fits_prompt(1, held=False)
    held = table.table[: 4 * lanes, : filled // SIZE]
    assert len(np.unique(held)) == table.num_pages


def test_lanes_that_cannot_grow_reserve_nothing():
    table = page_table(144, 143 * 64 + 2, 64 * SIZE)
    for lane in range(143):
        table.reserve(lane, 64 * SIZE)
    assert table.fits_prompt(SIZE, held=False) and not table.fits_prompt(2 * SIZE, held=False)


def test_a_chunk_of_several_pages_is_reserved():
    """For the lanes that are there and for the new one, which shares the full pages of a group."""
    table = page_table(4, 20, 16 * 8, chunk=32, size=8)
    table.reserve(0, 5)  # 1 page, and 4 after a chunk
    assert table.fits_prompt(11 * 8, held=False)
    assert not table.fits_prompt(11 * 8 + 1, held=False)
    table.share(0, table.prompt, 5)
    assert table.fits_prompt(5, held=True)
    table.reserve(1, 8)
    table.fork(table.prompt, 2, 5)
    assert table.num_free == 3 * 4 + 5 and table.fits_prompt(5, held=True)
    table.reserve(1, 9)
    assert not table.fits_prompt(5, held=True)


def test_memory_of_the_cache_is_what_the_setting_says(model):
    """It depends on `cache_tokens`, not on the lanes."""
    sizes = []
    for lanes in (4, 16):
        config = make_config(lanes=lanes, cache_tokens=4 * 1024)
        engine = Engine(model, scripted_processor(VOCAB_SIZE), config, search_tools())
        with engine.device.rollout(None):
            arrays = jax.tree.leaves(engine.device.runner._cache.pages)
            sizes.append(sum(pages.nbytes for pages in arrays))
        engine.close()
    text = model.config.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    assert sizes == [4 * 1024 * token] * 2
