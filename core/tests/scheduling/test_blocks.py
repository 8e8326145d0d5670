from __future__ import annotations

import pytest

from paddock.scheduling.blocks import BlockPool, extend_chain


def chain(token_ids: list[int], *, page_size: int = 2, salt: str = "") -> list[bytes]:
    """Return the names of the full blocks of `token_ids`."""
    names: list[bytes] = []
    extend_chain(names, token_ids, page_size, salt)
    return names


def held(pool: BlockPool, names: list[bytes]) -> list[int]:
    """Return freshly granted pages that go by `names`."""
    pages = pool.grant(len(names))
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    return pages


def test_a_block_is_named_after_everything_up_to_its_end() -> None:
    """Equal tokens have equal names only behind equal tokens; the unfinished block has none."""
    assert chain([1, 2, 3, 4, 5]) == chain([1, 2, 3, 4])
    assert chain([1, 2, 3, 4])[0] == chain([1, 2, 9, 4])[0]
    assert chain([1, 2, 3, 4])[1] != chain([9, 2, 3, 4])[1]
    assert len({*chain([7, 7, 7, 7, 7, 7])}) == 3


def test_names_differ_between_salts() -> None:
    """Two tenants never share a block."""
    assert not set(chain([1, 2, 3, 4], salt="a")) & set(chain([1, 2, 3, 4], salt="b"))


def test_a_chain_grown_token_by_token_equals_one_made_at_once() -> None:
    """Extending a chain adds the missing blocks and leaves the others."""
    tokens, grown = list(range(9)), list[bytes]()
    for end in range(len(tokens) + 1):
        extend_chain(grown, tokens[:end], 2, "salt")
    assert grown == chain(tokens, salt="salt")


def test_every_page_is_granted_once_and_comes_back() -> None:
    """All pages of the pool can be held at once, and released they are free."""
    pool = BlockPool(5)
    pages = pool.grant(5)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert (pool.num_used, pool.num_available) == (5, 0)
    pool.release(pages)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (5, 0, 0)
    pool.check([])


def test_a_named_page_is_cached_and_found_until_it_is_granted_anew() -> None:
    """Release keeps what is in a page; a later grant takes free pages first, then that one, which nobody finds any more."""
    pool, names = BlockPool(3), chain([1, 2])
    pages = held(pool, names)
    pool.release(pages)
    assert (pool.num_cached, pool.match(names)) == (1, pages)
    assert pages[0] not in pool.grant(2)
    assert pool.grant(1) == pages
    assert pool.match(names) == []
    pool.check()


def test_a_match_ends_at_the_first_missing_block() -> None:
    """Blocks behind a gap are of no use."""
    pool, names = BlockPool(4), chain([1, 2, 3, 4, 5, 6])
    first, _, third = held(pool, [names[0], b"another", names[2]])
    assert pool.match(names) == [first]
    assert pool.match(names[2:]) == [third]


def test_a_shared_page_is_used_until_its_last_holder_lets_go() -> None:
    """Holders are counted, and a page in use is never granted."""
    pool = BlockPool(2)
    pages = held(pool, chain([1, 2]))
    pool.share(pages)
    pool.release(pages)
    assert pool.num_used == 1
    assert pool.grant(1) != pages
    pool.release(pages)
    assert pool.num_cached == 1
    pool.check()


def test_sharing_a_cached_page_takes_it_out_of_reach() -> None:
    """A cached page that is shared can no longer be granted."""
    pool = BlockPool(1)
    pages = held(pool, chain([1, 2]))
    pool.release(pages)
    assert pool.num_idle(pages) == 1
    pool.share(pages)
    assert (pool.num_idle(pages), pool.num_available) == (0, 0)


def test_the_least_recently_used_page_is_evicted_first_and_the_end_of_a_chain_before_its_start() -> None:
    """The older sequence's last block goes before its first, and both before the newer one's."""
    pool, older, newer = BlockPool(4), chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    old_pages, new_pages = held(pool, older), held(pool, newer)
    pool.release(old_pages)
    pool.release(new_pages)
    assert [pool.grant(1)[0] for _ in range(4)] == [*reversed(old_pages), *reversed(new_pages)]


def test_a_name_stays_with_the_first_page_that_had_it() -> None:
    """A second page full of the same block goes free when released."""
    pool, names = BlockPool(2), chain([1, 2])
    first, second = held(pool, names), held(pool, names)
    assert pool.match(names) == first
    pool.release(first + second)
    assert (pool.num_free, pool.num_cached) == (1, 1)
    pool.check([])


def test_forgotten_pages_are_found_by_nobody_unless_somebody_holds_them() -> None:
    """Forgetting is for pages that one sequence alone has filled."""
    pool, names = BlockPool(2), chain([1, 2, 3, 4])
    pages = held(pool, names)
    pool.share(pages[:1])
    pool.release(pages, forget=True)
    assert pool.match(names) == pages[:1]
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.check(pages[:1])


@pytest.mark.parametrize("damage", ["lost", "free twice", "free and used", "still named", "held by nobody known"])
def test_check_sees_damage(damage: str) -> None:
    """Every way to break the invariant is noticed."""
    pool = BlockPool(4)
    pages = held(pool, chain([1, 2]))
    match damage:
        case "lost":
            pool._free.pop()
        case "free twice":
            pool._free.append(pool._free[0])
        case "free and used":
            pool._free.append(pages[0])
        case "still named":
            pool._page_of[b"nothing"] = 3
        case _:
            pool._holders[pages[0]] += 1
    with pytest.raises(AssertionError):
        pool.check(pages)
