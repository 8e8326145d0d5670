"""KV pages: who holds which, and which still hold a block of tokens somebody may want again.

A *block* is a page full of tokens, named by a SHA-256 over its tokens and the name of the block before it, so a name stands
for everything from the first token on. Pages never hold blocks of two sequences that differ anywhere before their end, and
only full pages are shared, so a shared page is never written and never copied.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


def extend_chain(chain: list[bytes], token_ids: list[int], page_size: int, salt: str) -> None:
    """Append to `chain` the names of the full blocks of `token_ids` it does not cover yet; `salt` separates tenants."""
    parent = chain[-1] if chain else sha256(salt.encode("utf-8", "surrogatepass")).digest()
    for start in range(len(chain) * page_size, len(token_ids) - page_size + 1, page_size):
        parent = sha256(parent + array("q", token_ids[start : start + page_size]).tobytes()).digest()
        chain.append(parent)


class BlockPool:
    """Every KV page, each in one of three states: free, used (held by at least one sequence), or cached.

    A cached page is held by nobody but still full of a named block: it serves the next sequence that starts alike, and is
    granted anew, least recently used first, when no free page is left.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_pages
        self._name_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Return how many pages hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Return how many pages nobody holds but may be shared again."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Return how many pages at least one sequence holds."""
        return self.num_pages - self.num_available

    @property
    def num_available(self) -> int:
        """Return how many pages can be granted: free and cached."""
        return len(self._free) + len(self._cached)

    def grant(self, count: int) -> list[int]:
        """Return `count` pages, now held once each; the caller has seen that they are available."""
        assert count <= self.num_available, f"{count} pages asked for, {self.num_available} available"
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def match(self, names: Iterable[bytes]) -> list[int]:
        """Return the pages that hold the blocks called `names`, up to the first that no page holds."""
        pages = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """Return how many of `pages` are cached, so that sharing them leaves fewer to grant."""
        return sum(not self._holders[page] for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of `pages`, found by `match`, once more."""
        for page in pages:
            if not self._holders[page]:
                del self._cached[page]
            self._holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Let a held page be found as the block called `name`; the first page of a name keeps it."""
        assert self._holders[page], f"page {page} is named but not held"
        assert self._name_of[page] is None, f"page {page} is named twice"
        if name not in self._page_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def release(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """Hold each of `pages` once less; those held no more stay cached if they have a name, unless `forget`.

        The last page goes first: a block is of no use without the blocks before it, so it is evicted before them.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was released more often than held"
            if self._holders[page]:
                continue
            if forget:
                self._unname(page)
            if self._name_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def free_unfilled(self, pages: Iterable[int]) -> None:
        """Free those of `pages`, held by nobody, that are cached under names they never came to deserve."""
        for page in pages:
            assert not self._holders[page], f"page {page} is still held"
            if self._name_of[page] is not None:
                self._unname(page)
                del self._cached[page]
                self._free.append(page)

    def forget(self) -> None:
        """Free every cached page and drop every name, for when nobody can say what the pages hold."""
        self._free += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._name_of = [None] * self.num_pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._unname(page)
        return page

    def _unname(self, page: int) -> None:
        name, self._name_of[page] = self._name_of[page], None
        if name is not None:
            del self._page_of[name]

    def check(self, held: Iterable[int] | None = None) -> None:
        """Assert free + used + cached == total and all that goes with it; `held` lists every page once per holder."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, holders in enumerate(self._holders) if holders}
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free | cached | used) == len(free) + len(cached) + len(used), "a page is in two states"
        assert len(free) + len(used) + len(cached) == self.num_pages, "a page is lost"
        assert all(self._name_of[page] is None for page in free), "a free page has a name"
        assert all(self._name_of[page] is not None for page in cached), "a cached page has no name"
        named = {name: page for page, name in enumerate(self._name_of) if name is not None}
        assert named == self._page_of, "names and pages disagree"
        if held is not None:
            counted = [0] * self.num_pages
            for page in held:
                counted[page] += 1
            assert counted == self._holders, "pages are held that no sequence has, or the reverse"
