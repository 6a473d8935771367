"""Pages have one owner; nothing reads a slot that its layer never wrote."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipjack import CapacityError, Engine, SamplingParams
from skipjack.kernels import ops, reference
from skipjack.kernels.attention_index import AttentionIndex
from skipjack.runtime.cache import KVCache


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


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    cache = small()
    cache.reserve(24)
    with pytest.raises(CapacityError, match="3 of 6 pages free and 25 tokens need 4"):
        cache.reserve(25)
    assert cache.free_pages == 3


def test_a_cache_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(CapacityError, match="set cache_tokens"):
        KVCache(64, 64, 256, pages=10**7, page_size=256, dtype=torch.float32, device=torch.device("cpu"))


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    cache = small()
    parent = cache.reserve(20)
    cache.keys[:, parent] = torch.randn(2, 3, 1, 8, 4)
    before = cache.keys.clone()
    child = cache.fork(parent, 13, 20)
    assert child[0] == parent[0]
    assert not set(child[1:]) & set(parent)
    assert torch.equal(cache.keys[:, child[1], :, :5], before[:, parent[1], :, :5])
    cache.keys[:, child[1]] = 7.0
    assert torch.equal(cache.keys[:, parent], before[:, parent])
    cache.release(parent)
    assert cache.free_pages == 6 - len(child), "the shared page lives on"
    cache.release(child)
    assert cache.free_pages == 6


class Audit:
    """Op wrappers that record which slots each layer wrote, and refuse to read others."""

    def __init__(self) -> None:
        self.written: set[tuple[int, int, int]] = set()
        self.reads = 0

    def append(self, *args: object, **options: object) -> Tensor:
        keys, slots = args[7], args[9]
        assert isinstance(keys, Tensor)
        assert isinstance(slots, reference.Slots)
        layer = keys.data_ptr()
        self.written |= {(layer, p, o) for p, o in zip(slots.page.tolist(), slots.offset.tolist(), strict=True)}
        return reference.qkv_rope_append(*args, **options)

    def fork(self, cache: KVCache) -> Callable[[list[int], int, int], list[int]]:
        """`cache.fork`, with the slots it copies counted as written."""
        original = cache.fork

        def fork(pages: list[int], length: int, tokens: int) -> list[int]:
            child = original(pages, length, tokens)
            full, part = divmod(length, cache.page_size)
            copied = {(layer, o) for layer, p, o in self.written if part and p == pages[full] and o < part}
            self.written |= {(layer, child[full], o) for layer, o in copied}
            return child

        return fork

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, index: AttentionIndex, **options: object) -> Tensor:
        size = keys.shape[2]
        for _, positions, pages in index._groups:
            for position in range(max(positions) + 1):
                slot = (keys.data_ptr(), pages[position // size], position % size)
                assert slot in self.written, f"position {position} was never written in this layer"
                self.reads += 1
        return reference.attend(q, keys, values, index, **options)


@pytest.mark.parametrize(
    "method",
    ["autoregressive", "swift:skip_attention=2+4,skip_mlp=3,threshold=0.0", "swift:search_budget=0.9,window=8"],
)
def test_no_pass_reads_a_hole(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine, audit = synthetic("tiny"), Audit()
    model, cache = engine._loaded()
    monkeypatch.setattr(cache, "fork", audit.fork(cache))
    monkeypatch.setattr(model, "ops", replace(ops.TORCH, qkv_rope_append=audit.append, attend=audit.attend))
    engine.generate([[5, 6, 7], [9] * 40], SamplingParams(max_tokens=30, ignore_eos=True), method=method)
    assert audit.reads > 1000


def test_the_audit_sees_a_hole(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding with a skipped attention block and then reading its layer is what the audit is for."""
    from skipjack.runtime.rows import one_sequence

    engine, audit = synthetic("tiny"), Audit()
    model, cache = engine._loaded()
    monkeypatch.setattr(model, "ops", replace(ops.TORCH, qkv_rope_append=audit.append, attend=audit.attend))
    pages = cache.reserve(20)
    try:
        with torch.inference_mode():
            model.forward(one_sequence([1, 2, 3], 0, pages, 8, model.device), cache, model.full.without(attention=[3]))
            with pytest.raises(AssertionError, match="never written"):
                model.forward(one_sequence([4], 3, pages, 8, model.device), cache, model.full)
    finally:
        cache.release(pages)
