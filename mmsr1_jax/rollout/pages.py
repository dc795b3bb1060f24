"""Allocation of the KV cache: which pages each lane holds, on the host.

A page is shared by all holders that begin with the same tokens, and returns to the free ones with
the last of them. Holders are the lanes and, under one more index, the prompt of a group that has
episodes without a lane. When pages run out, those that only a given holder needs move to host
memory and come back later with the same contents, so nothing is computed twice.
"""

import dataclasses
from collections.abc import Callable, Container, Sequence

import numpy as np

# Contents of some pages, one array a layer.
Contents = list[np.ndarray]


@dataclasses.dataclass(eq=False)
class Page:
    """A page with its holders.

    Attributes:
      index: Index on the device; -1 while its contents are on the host.
      holders: Number of holders.
      active: Number of holders that are not offloaded.
      contents: Contents while on the host, one array a layer.
    """

    index: int
    holders: int = 1
    active: int = 1
    contents: Contents | None = None


class PageTable:
    """Pages of all holders.

    Args:
      holders: Number of holders.
      num_pages: Number of pages on the device.
      page_size: Number of tokens in a page.
      max_tokens: Maximum number of tokens of a holder.
      chunk_tokens: Maximum number of tokens that a decoding call appends to a lane.
      to_host: Returns the contents of the pages with these indices.
      to_device: Writes contents, one entry a page, to the pages with these indices.

    Attributes:
      prompt: Holder of a group's prompt, the last one; the others are lanes.
      table: Device indices of the pages of each holder, int32[holders, pages]; 0 beyond them.
      offloaded: Holders whose pages are on the host, as far as no other holder needs them.
      num_offloaded: Number of pages moved to the host since the table was created.
    """

    def __init__(
        self,
        holders: int,
        num_pages: int,
        page_size: int,
        max_tokens: int,
        chunk_tokens: int,
        to_host: Callable[[Sequence[int]], list[Contents]],
        to_device: Callable[[Sequence[int], list[Contents]], None],
    ):
        self.page_size, self.num_pages, self.prompt = page_size, num_pages, holders - 1
        self._max_tokens, self._chunk_tokens = max_tokens, chunk_tokens
        self._to_host, self._to_device = to_host, to_device
        self.table = np.zeros((holders, -(-max_tokens // page_size)), np.int32)
        self.num_offloaded = 0
        self.clear()

    def clear(self) -> None:
        """Drop all pages of all holders."""
        self._pages: list[list[Page]] = [[] for _ in self.table]
        self._tokens = [0] * len(self.table)  # for which a holder has pages
        self._free = list(range(self.num_pages))[::-1]
        self.table[:] = 0
        self.offloaded: set[int] = set()
        self._order: dict[int, None] = {}  # holders with pages, the oldest first

    @property
    def num_free(self) -> int:
        """Number of free pages on the device."""
        return len(self._free)

    def count(self, tokens: int) -> int:
        """Return the number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def missing(self, holder: int) -> int:
        """Return the number of a holder's pages that are on the host."""
        return sum(page.index < 0 for page in self._pages[holder])

    def reserve(self, holder: int, tokens: int) -> bool:
        """Give a holder pages for this many tokens; return False if too few pages are free."""
        assert holder not in self.offloaded
        pages, required = self._pages[holder], self.count(tokens)
        if required - len(pages) > len(self._free):
            return False
        self._order.setdefault(holder)
        self._tokens[holder] = max(self._tokens[holder], tokens)
        while len(pages) < required:
            pages.append(Page(self._free.pop()))
            self.table[holder, len(pages) - 1] = pages[-1].index
        return True

    def share(self, source: int, target: int, tokens: int) -> None:
        """Let an empty holder also hold the pages of the first `tokens` tokens of another."""
        assert not self._pages[target] and not {source, target} & self.offloaded
        self._order.setdefault(target)
        self._tokens[target] = tokens
        for number, page in enumerate(self._pages[source][: self.count(tokens)]):
            page.holders += 1
            page.active += 1
            self._pages[target].append(page)
            self.table[target, number] = page.index

    def fork(self, source: int, target: int, tokens: int) -> tuple[int, int] | None:
        """Let an empty holder begin with the first `tokens` tokens of another and continue alone.

        Full pages are shared. The last one, if partly filled, has to be copied on the device.

        Returns:
          Device indices of the page to copy and of its copy, the same if none has to be copied;
          None if no page is free.
        """
        full, rest = divmod(tokens, self.page_size)
        if rest and not self._free:
            return None
        self.share(source, target, full * self.page_size)
        if not rest:
            return 0, 0
        self.reserve(target, tokens)
        return int(self.table[source, full]), int(self.table[target, full])

    def truncate(self, holder: int, tokens: int) -> None:
        """Release the pages of a holder beyond its first `tokens` tokens."""
        pages, kept = self._pages[holder], self.count(tokens)
        for page in pages[kept:]:
            page.holders -= 1
            page.active -= holder not in self.offloaded
            if page.holders == 0 and page.index >= 0:
                self._free.append(page.index)
        self._move([page for page in pages[kept:] if page.holders and not page.active])
        self.table[holder, kept : len(pages)] = 0
        self._tokens[holder] = min(self._tokens[holder], tokens)
        del pages[kept:]

    def release(self, holder: int) -> None:
        """Release all pages of a holder."""
        self.truncate(holder, 0)
        self.offloaded.discard(holder)
        self._order.pop(holder, None)

    # Host memory

    def make_room(self, holder: int, tokens: int) -> bool:
        """Give a holder pages for this many tokens, offloading younger holders as needed.

        Returns:
          Whether it has them. If it is the youngest itself, it is offloaded instead.
        """
        while not self.reserve(holder, tokens):
            youngest = next(other for other in self._by_age() if other not in self.offloaded)
            if youngest == holder and self._num_active_lanes <= 1:
                raise RuntimeError(
                    f"the KV cache of {self.num_pages} pages cannot hold {tokens} tokens"
                )
            self.offload(youngest)
            if youngest == holder:
                return False
        return True

    def _by_age(self) -> list[int]:
        """Return the holders with pages, the youngest first; a prompt counts as the youngest."""
        return sorted(reversed(self._order), key=lambda holder: holder != self.prompt)

    def oldest_first(self, holders: Container[int]) -> list[int]:
        """Return those of some holders that have pages, the oldest first."""
        return [holder for holder in self._order if holder in holders]

    def restore_lanes(self) -> None:
        """Bring lanes back to the device, the oldest first, while there is room.

        All lanes on the device keep enough free pages in reserve for their next decoding call, so
        that none is offloaded again at once.
        """
        for holder in [h for h in self._order if h in self.offloaded and h != self.prompt]:
            required = self.missing(holder) + self._next_pages(holder)
            prompt_active = self.prompt in self._order and self.prompt not in self.offloaded
            if not self._has_room(required) and prompt_active and not self._num_active_lanes:
                self.offload(self.prompt)
            if not self._has_room(required) or not self.restore(holder):
                return

    def fits_prompt(self, tokens: int, *, held: bool) -> bool:
        """Return whether a lane with a prompt of this many tokens may be admitted.

        There must be room for the prompt and for the lane's first decoding call.

        Args:
          tokens: Number of tokens of the prompt.
          held: Whether the prompt's pages exist already.
        """
        if self.offloaded - {self.prompt}:
            return False  # their pages come first
        required = self._pages_after_chunk(tokens)
        if held:  # the lane shares the full ones
            required += self.missing(self.prompt) - tokens // self.page_size
        return self._has_room(required)

    def _has_room(self, pages: int) -> bool:
        """Return whether so many pages are free beside those that active lanes need next."""
        lanes = (h for h in self._order if h not in self.offloaded and h != self.prompt)
        return pages + sum(map(self._next_pages, lanes)) <= self.num_free

    def _next_pages(self, holder: int) -> int:
        """Return the number of further pages that a lane's next decoding call may need."""
        return self._pages_after_chunk(self._tokens[holder]) - len(self._pages[holder])

    def _pages_after_chunk(self, tokens: int) -> int:
        """Return the number of pages of a lane of so many tokens after a decoding call."""
        return self.count(min(tokens + self._chunk_tokens, self._max_tokens))

    @property
    def _num_active_lanes(self) -> int:
        return sum(h not in self.offloaded and h != self.prompt for h in self._order)

    def offload(self, holder: int) -> None:
        """Move a holder's pages to the host, those excepted that an active holder needs."""
        assert holder not in self.offloaded
        self.offloaded.add(holder)
        for page in self._pages[holder]:
            page.active -= 1
        self._move([page for page in self._pages[holder] if not page.active])

    def _move(self, pages: Sequence[Page]) -> None:
        """Move pages to the host that are still on the device."""
        pages = [page for page in pages if page.index >= 0]
        if not pages:
            return
        for page, contents in zip(pages, self._to_host([p.index for p in pages]), strict=True):
            self._free.append(page.index)
            page.index, page.contents = -1, contents
        self.num_offloaded += len(pages)

    def restore(self, holder: int) -> bool:
        """Bring a holder's pages back to the device; return False if too few pages are free."""
        absent = [page for page in self._pages[holder] if page.index < 0]
        if len(absent) > len(self._free):
            return False
        contents = []
        for page in absent:
            assert page.contents is not None
            contents.append(page.contents)
            page.index, page.contents = self._free.pop(), None
        if absent:
            self._to_device([page.index for page in absent], contents)
        for number, page in enumerate(self._pages[holder]):
            page.active += 1
            self.table[holder, number] = page.index
        self.offloaded.discard(holder)
        return True
