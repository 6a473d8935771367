"""Pages have one owner; nothing reads a slot that its layer never wrote."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skipjack import CapacityError, Engine, SamplingParams
from skipjack.runtime.cache import KVCache
from skipjack.runtime.rows import one_sequence


def small() -> KVCache:
    return KVCache(2, 1, 4, pages=6, page_size=8, dtype=torch.float32, device=torch.device("cpu"))


def test_pages_are_taken_zeroed_and_given_back() -> None:
    cache = small()
    first = cache.reserve(17)
    assert len(set(first)) == 3
    assert 0 not in first
    cache.keys[:, first] = torch.nan
    cache.release(first)
    assert first == []
    assert cache.free_pages == cache.total_pages == 6
    assert cache.keys[:, cache.reserve(48)].eq(0).all()


def test_all_pages_are_zeroed_at_once() -> None:
    """Keys and values, an operation each: on a GPU every one is a launch."""
    cache, calls = small(), list[str]()

    class Changes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if args and args[0] is not None and func._schema.is_mutable:
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    cache.keys[:] = cache.values[:] = torch.nan
    with Changes():
        pages = cache.reserve(40)
    assert len(calls) == 2
    assert cache.keys[:, pages].eq(0).all()
    assert cache.values[:, pages].eq(0).all()
    assert cache.keys[:, [page for page in range(7) if page not in pages]].isnan().all()


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    cache = small()
    cache.reserve(24)
    with pytest.raises(CapacityError, match="3 of 6 pages free and 25 tokens need 4"):
        cache.reserve(25)
    assert cache.free_pages == 3


def test_a_cache_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(CapacityError, match="set a lower cache_tokens"):
        KVCache(64, 64, 256, pages=10**7, page_size=256, dtype=torch.float32, device=torch.device("cpu"))


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    cache = small()
    parent = cache.reserve(20)
    cache.keys[:, parent] = torch.randn(2, 3, 1, 8, 4)
    before = cache.keys.clone()
    with cache.forked(parent, 13, 20) as child:
        assert child[0] == parent[0]
        assert not set(child[1:]) & set(parent)
        assert torch.equal(cache.keys[:, child[1], :, :5], before[:, parent[1], :, :5])
        cache.keys[:, child[1]] = 7.0
        assert torch.equal(cache.keys[:, parent], before[:, parent])
        assert cache.free_pages == 1
    assert cache.free_pages == 3


def test_an_interrupt_while_pages_are_taken_loses_none(interrupted: Callable[..., Iterator[None]]) -> None:
    cache = small()
    parent = cache.reserve(20)

    def work() -> None:
        mine: list[int] = []
        try:
            cache.reserve(9, mine)
            with cache.forked(parent, 13, 14):
                pass
        finally:
            cache.release(mine)

    for _ in interrupted(work, KVCache.reserve, KVCache.forked, KVCache._zero):
        assert sorted([*parent, *cache._free]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "method",
    [
        "autoregressive",
        "swift:skip_attention=2+4,skip_mlp=3,threshold=0.0",
        "swift:skip_attention=2+4,tree=true,threshold=0.0,max_nodes=9",
        "swift:search_budget=0.9,window=8",
        "layerskip:exit_layer=3,verify=false",
    ],
)
def test_no_pass_reads_a_hole(synthetic: Callable[..., Engine], audit: Callable[..., Any], method: str) -> None:
    engine = synthetic("tiny")
    watched = audit(engine)
    engine.generate([[5, 6, 7], [9] * 40], SamplingParams(max_tokens=30, ignore_eos=True), method=method)
    assert watched.reads > 1000


def test_the_audit_sees_a_hole(synthetic: Callable[..., Engine], audit: Callable[..., Any]) -> None:
    """Decoding with a skipped attention block and then reading its layer is what the audit is for."""
    engine = synthetic("tiny")
    watched = audit(engine)
    model, cache = engine._loaded()
    pages = cache.reserve(20)
    try:
        with torch.inference_mode():
            model.forward(one_sequence([1, 2, 3], 0, pages, 8, model.device), cache, model.full.without(attention=[3]))
            assert watched.ran == [(i, 3) for i in range(16) if i != 6]
            with pytest.raises(AssertionError, match="layer 3 reads slot 0, which was never written there"):
                model.forward(one_sequence([4], 3, pages, 8, model.device), cache, model.full)
    finally:
        cache.release(pages)


def test_the_audit_sees_a_slot_of_an_earlier_holder(
    synthetic: Callable[..., Engine], audit: Callable[..., Any]
) -> None:
    engine = synthetic("tiny")
    audit(engine)
    model, cache = engine._loaded()

    def read(tokens: list[int], start: int) -> None:
        pages = cache.reserve(20)
        try:
            with torch.inference_mode():
                model.forward(one_sequence(tokens, start, pages, 8, model.device), cache, model.full)
        finally:
            cache.release(pages)

    read([1, 2, 3], 0)
    with pytest.raises(AssertionError, match="layer 0 reads slot 0, which was never written there"):
        read([4], 3)


class Owner:
    """Whoever has layers of its own."""


@torch.inference_mode()
def test_an_annex_goes_with_the_pages_and_its_owner() -> None:
    cache, owner = small(), Owner()
    ((keys, values),) = cache.annex(owner, 1)
    assert keys.shape == values.shape == cache.keys.shape[1:]
    pages = cache.reserve(20)
    for number, part in enumerate((keys, values), start=1):
        part[pages] = torch.arange(3.0)[:, None, None, None] + 10 * number
    with cache.forked(pages, 12, 30) as child:
        assert child[0] == pages[0]
        for part in (keys, values):
            assert torch.equal(part[child[1]], part[pages[1]])
    other = cache.reserve(20)
    cache.copy(pages, other, 13)
    for part in (keys, values):
        assert torch.equal(part[other[0]], part[pages[0]])
        assert torch.equal(part[other[1], :, :5], part[pages[1], :, :5])
        assert part[other[1], :, 5:].eq(0).all()
        assert part[other[2]].eq(0).all()
    again = cache.annex(owner, 1)[0]
    assert (again[0].data_ptr(), again[1].data_ptr()) == (keys.data_ptr(), values.data_ptr())
    cache.release(pages)
    cache.release(other)
    taken = cache.reserve(48)
    assert keys[taken].eq(0).all()
    assert values[taken].eq(0).all()
    del owner
    gc.collect()
    assert len(cache._annexes) == 0


def test_an_annex_that_was_made_within_a_request_is_zeroed_outside_of_one() -> None:
    cache, owner = small(), Owner()
    with torch.inference_mode():
        ((keys, _),) = cache.annex(owner, 1)
    assert keys[cache.reserve(8)].eq(0).all()


def test_an_annex_that_does_not_fit_into_memory_is_refused() -> None:
    cache = small()
    with pytest.raises(CapacityError, match=r"10+ more layers in a KV cache of 48 tokens need .* cache_tokens"):
        cache.annex(Owner(), 10**13)
