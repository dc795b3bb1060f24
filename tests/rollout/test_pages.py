"""The table of pages against a model of it: sharing, freeing, offloading."""

import numpy as np
import pytest

from mmsr1_jax.rollout.pages import PageTable

LANES, PROMPT, PAGES, SIZE, CAPACITY = 4, 4, 12, 8, 64


class Memory:
    """Pages on a pretended device, each with one number that tells its contents."""

    def __init__(self):
        self.device = np.full(PAGES, -1)
        self.table = PageTable(LANES + 1, PAGES, SIZE, CAPACITY, SIZE, self.to_host, self.to_device)

    def to_host(self, pages):
        assert len(set(pages)) == len(pages)
        contents = [[np.array(self.device[page])] for page in pages]
        self.device[list(pages)] = -1
        return contents

    def to_device(self, pages, contents):
        for page, (value,) in zip(pages, contents, strict=True):
            self.device[page] = value

    def held(self, holder):
        return len(self.table._pages[holder])

    def values(self, holder):
        return self.device[self.table.table[holder, : self.held(holder)]].tolist()

    def fill(self, holder, tokens, value):
        """Reserve pages and write `value` to the new ones."""
        before = self.held(holder)
        if self.table.reserve(holder, tokens):
            self.device[self.table.table[holder, before : self.held(holder)]] = value
            return True
        return False


@pytest.fixture
def memory():
    return Memory()


def test_a_lane_takes_what_it_holds(memory):
    table = memory.table
    assert memory.fill(0, 1, 10) and table.num_free == PAGES - 1
    assert memory.fill(0, 8, 11) and table.num_free == PAGES - 1
    assert memory.fill(0, 9, 12) and table.num_free == PAGES - 2
    assert memory.values(0) == [10, 12]
    table.truncate(0, 8)
    assert memory.values(0) == [10] and table.num_free == PAGES - 1
    table.release(0)
    assert table.num_free == PAGES and not table.table.any()


def test_a_prompt_is_stored_once(memory):
    """Eight rollouts hold its full pages together, and a page each for what follows."""
    table, tokens = memory.table, 3 * SIZE + 5
    memory.fill(0, tokens, 1)
    table.share(0, PROMPT, tokens)
    assert table.num_free == PAGES - 4
    for lane in (1, 2, 3):
        source, target = table.fork(PROMPT, lane, tokens)
        assert source == table.table[0, 3] != target == table.table[lane, 3]
        np.testing.assert_array_equal(table.table[lane, :3], table.table[0, :3])
    assert table.num_free == PAGES - 4 - 3
    table.release(0)
    assert table.num_free == PAGES - 7  # the prompt still holds its last page
    table.release(PROMPT)
    assert table.num_free == PAGES - 6
    for lane in (1, 2, 3):
        table.release(lane)
    assert table.num_free == PAGES


def test_a_fork_at_the_end_of_a_page_copies_nothing(memory):
    table = memory.table
    memory.fill(0, 2 * SIZE, 1)
    assert table.fork(0, 1, 2 * SIZE) == (0, 0)
    assert table.num_free == PAGES - 2
    assert memory.fill(1, 2 * SIZE + 1, 2)
    assert memory.values(0) == [1, 1] and memory.values(1) == [1, 1, 2]


def test_without_a_free_page_nothing_changes(memory):
    table = memory.table
    memory.fill(0, 8 * SIZE, 1)
    memory.fill(1, 4 * SIZE - 1, 2)
    assert not table.reserve(2, 1)
    assert table.fork(1, 2, 4 * SIZE - 1) is None
    assert memory.held(2) == 0 and table.num_free == 0


def test_the_youngest_lanes_move_to_the_host(memory):
    table = memory.table
    for lane in (2, 0, 1):  # in order of age
        memory.fill(lane, 3 * SIZE, lane)
    assert table.make_room(0, 6 * SIZE) and table.num_offloaded == 0
    assert table.make_room(2, 4 * SIZE)
    assert table.offloaded == {1} and table.num_offloaded == 3
    assert not table.make_room(0, 8 * SIZE + 1)  # the youngest of those on the device
    assert table.offloaded == {0, 1} and memory.values(2)[:3] == [2, 2, 2]
    table.restore_lanes()
    assert table.offloaded == {1}  # with a page in reserve for each, there is room for one
    assert memory.values(0)[:3] == [0, 0, 0]
    table.release(2)
    table.restore_lanes()
    assert not table.offloaded and memory.values(1) == [1, 1, 1]


def test_the_only_lane_on_the_device_cannot_make_room_for_itself(memory):
    memory.fill(0, SIZE, 1)
    memory.table.make_room(0, CAPACITY)
    memory.fill(1, 2 * SIZE, 2)
    assert not memory.table.make_room(1, 6 * SIZE) and memory.table.offloaded == {1}
    memory.table.table = np.zeros((LANES + 1, 2 * PAGES), np.int32)
    with pytest.raises(RuntimeError, match=f"KV cache of {PAGES} pages cannot hold 104 tokens"):
        memory.table.make_room(0, 13 * SIZE)


def test_pages_shared_by_offloaded_lanes_leave_the_device(memory):
    """Else a lane that needs them all would wait for ever."""
    table, tokens = memory.table, 3 * SIZE
    memory.fill(0, 2 * SIZE, 9)
    memory.fill(1, tokens, 1)
    table.share(1, PROMPT, tokens)
    table.fork(PROMPT, 2, tokens)
    assert table.make_room(0, 8 * SIZE) and table.num_free == PAGES - 11
    assert table.make_room(0, 8 * SIZE) and not table.offloaded
    table.offload(PROMPT)
    table.offload(2)
    assert table.num_offloaded == 0  # lane 1 still needs them
    table.release(1)
    assert table.num_offloaded == 3 and table.num_free == PAGES - 8
    assert table.restore(2) and memory.values(2) == [1, 1, 1]
    assert table.restore(PROMPT) and memory.values(PROMPT) == [1, 1, 1]
    table.release(2)
    table.release(PROMPT)
    assert table.num_free == PAGES - 8


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_contents(memory, seed):
    """Every holder reads what was written for it, and no page is lost or held twice."""
    rng, table = np.random.default_rng(seed), memory.table
    expected: dict[int, list[int]] = {}
    for number in range(300):
        holder = int(rng.integers(LANES + 1))
        action = rng.choice(["grow", "share", "release", "truncate", "offload", "restore"])
        on_device = holder in expected and holder not in table.offloaded
        if action == "grow" and holder != PROMPT and (on_device or holder not in expected):
            pages = int(rng.integers(1, 8))
            if pages >= len(expected.get(holder, [])) and memory.fill(holder, pages * SIZE, number):
                values = expected.setdefault(holder, [])
                values += [number] * (pages - len(values))
        elif action == "share" and on_device:
            other = int(rng.integers(LANES + 1))
            if other not in expected:
                pages = int(rng.integers(1, len(expected[holder]) + 1))
                table.share(holder, other, pages * SIZE)
                expected[other] = expected[holder][:pages]
        elif action == "release" and holder in expected:
            table.release(holder)
            del expected[holder]
        elif action == "truncate" and on_device:
            pages = int(rng.integers(1, len(expected[holder]) + 1))
            table.truncate(holder, pages * SIZE)
            del expected[holder][pages:]
        elif action == "offload" and on_device:
            table.offload(holder)
        elif action == "restore" and holder in table.offloaded:
            table.restore(holder)
        for other, values in expected.items():
            if other not in table.offloaded:
                assert memory.values(other) == values
        on_device = {p for h in expected for p in table._pages[h] if p.index >= 0}
        assert len({p.index for p in on_device}) == len(on_device) == PAGES - table.num_free
        assert all(p.active for p in on_device)
    for holder in list(expected):
        table.release(holder)
    assert table.num_free == PAGES


def test_a_prompt_leaves_the_device_if_only_offloaded_lanes_remain(memory):
    """Else neither could ever continue."""
    table = memory.table
    memory.fill(1, 8 * SIZE, 2)
    table.offload(1)
    memory.fill(0, 5 * SIZE, 1)
    table.share(0, PROMPT, 5 * SIZE)
    table.restore_lanes()
    assert table.offloaded == {1}
    table.release(0)
    table.restore_lanes()
    assert table.offloaded == {PROMPT} and memory.values(1) == [2] * 8
    assert not table.fits_prompt(5 * SIZE, held=True)
    table.release(1)
    assert table.fits_prompt(5 * SIZE, held=True)
    assert table.restore(PROMPT) and memory.values(PROMPT) == [1] * 5
