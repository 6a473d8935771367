"""Attention in Triton against float64, and each of its rows against itself among other rows."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from skipjack.kernels import attention, attention_rules
from skipjack.kernels.attention_index import AttentionIndex, TritonIndex
from skipjack.kernels.splits import FAR_FACTOR, pages_of, split_length

PAGE = 64
RTOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)


def oracle(q: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None, slopes: Tensor | None) -> Tensor:
    """One row in float64: q [heads, D]; keys, values [T, kv_heads, D]."""
    heads, head_dim = q.shape
    first = 0 if window is None else max(0, position - window + 1)
    span = torch.arange(first, position + 1)
    k, v = (part[span].double().repeat_interleave(heads // keys.shape[1], 1) for part in (keys, values))
    scores = torch.einsum("hd,thd->ht", q.double(), k) / head_dim**0.5
    if slopes is not None:
        scores += slopes.double()[:, None] * (span - position)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v).flatten()


class Cached:
    """A paged cache of random keys: sequences of `lengths` positions on shuffled pages; every other slot is NaN."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, width: int = 0
    ) -> None:
        width = max(width, -(-max(lengths) // PAGE))
        count = len(lengths)
        order = torch.randperm(count * width, generator=torch.Generator().manual_seed(5)) + 1
        self.table = order.view(count, width)
        self.flat = randn(2, count, max(lengths), kv_heads, head_dim, dtype=dtype, seed=6)
        self.keys, self.values = torch.full((2, count * width + 2, kv_heads, PAGE, head_dim), torch.nan, dtype=dtype)
        for s, length in enumerate(lengths):
            for p in range(length):
                page, offset = self.table[s, p // PAGE], p % PAGE
                self.keys[page, :, offset], self.values[page, :, offset] = self.flat[0, s, p], self.flat[1, s, p]

    def index(
        self, sequence: Tensor, position: Tensor, tile: int | None = 8, table: Tensor | None = None
    ) -> TritonIndex:
        chosen = self.table if table is None else table
        return TritonIndex(sequence.to(DEVICE), position.to(DEVICE), chosen.to(DEVICE), page_size=PAGE, tile=tile)

    def attend(
        self,
        q: Tensor,
        index: TritonIndex,
        window: int | None = None,
        slopes: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        moved = [None if x is None else x.to(DEVICE) for x in (q, self.keys, self.values, slopes, active)]
        return attention.attend(
            *moved[:3], index, scale=q.shape[-1] ** -0.5, window=window, slopes=moved[3], active=moved[4]
        ).cpu()

    def assert_formula(
        self,
        got: Tensor,
        q: Tensor,
        sequence: Tensor,
        position: Tensor,
        window: int | None = None,
        slopes: Tensor | None = None,
        rows: list[int] | None = None,
    ) -> None:
        for i in range(len(q)) if rows is None else rows:
            expected = oracle(q[i], *self.flat[:, sequence[i]], int(position[i]), window, slopes)
            error = (got[i].double() - expected).norm() / expected.norm()
            assert error < RTOL[got.dtype], f"row {i} at {position[i]}: relative error {error:.2e}"


CASES = [
    (9, 3, 64, None, False, torch.float32, 8),
    (4, 4, 12, None, True, torch.float32, 8),
    (8, 2, 128, 100, False, torch.float32, 8),
    (6, 2, 16, 40, True, torch.float16, 64),
    (5, 1, 80, 300, False, torch.bfloat16, 8),
    (3, 3, 16, None, True, torch.bfloat16, 64),
    (9, 3, 64, None, False, torch.float32, None),
    (5, 1, 80, 300, True, torch.bfloat16, None),
]
CONTEXTS = [1, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 1000, 1600]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "window", "alibi", "dtype", "tile"), CASES)
def test_attention_is_the_formula(
    heads: int, kv_heads: int, head_dim: int, window: int | None, alibi: bool, dtype: torch.dtype, tile: int | None
) -> None:
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    contexts = CONTEXTS if head_dim == 64 else CONTEXTS[2::3]
    cached = Cached(contexts, kv_heads, head_dim, dtype)
    position = torch.tensor(contexts) - 1
    sequence = torch.arange(len(contexts))
    q = randn(len(contexts), heads, head_dim, dtype=dtype, seed=7)
    got = cached.attend(q, cached.index(sequence, position, tile), window, slopes)
    cached.assert_formula(got, q, sequence, position, window, slopes)


@pytest.mark.parametrize("tile", [8, 64, None])
def test_a_prompt_is_the_formula(tile: int | None) -> None:
    cached = Cached([150, 70], 2, 16)
    sequence, position = torch.tensor([0] * 150 + [1] * 70), torch.cat([torch.arange(150), torch.arange(70)])
    q = randn(220, 4, 16, seed=8)
    got = cached.attend(q, cached.index(sequence, position, tile))
    cached.assert_formula(got, q, sequence, position)


def ragged() -> tuple[Cached, Tensor, Tensor, list[int]]:
    """Five sequences of 1, 9, 0, 3 and 17 rows, some followed by padding rows; the valid rows."""
    lengths = [140, 300, 64, 600, 90]
    cached = Cached(lengths, 2, 16)
    sequence, position = [], []
    for s, (rows, padding) in enumerate([(1, 2), (9, 0), (0, 1), (3, 4), (17, 1)]):
        sequence += [s] * rows + [-1] * padding
        position += [*range(lengths[s] - rows, lengths[s])] + [0] * padding
    return cached, torch.tensor(sequence), torch.tensor(position), [i for i, s in enumerate(sequence) if s >= 0]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("programs", [1, None])
def test_rows_of_a_ragged_pass_are_those_rows_alone(
    window: int | None, programs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, sequence, position, valid = ragged()
    q = randn(len(sequence), 6, 16, seed=9)
    alone = {
        i: cached.attend(q[i : i + 1], cached.index(sequence[i : i + 1], position[i : i + 1]), window)[0]
        for i in valid[:: 2 if window is None else 5]
    }
    if programs is not None:
        monkeypatch.setattr(attention_rules, "attention_programs", lambda *_: programs)
    got = cached.attend(q, cached.index(sequence, position), window)
    cached.assert_formula(got, q, sequence, position, window, rows=valid)
    assert got[sequence < 0].isnan().all()
    for i, row in alone.items():
        assert torch.equal(got[i], row)


def test_rows_do_not_depend_on_their_neighbours_or_the_width_of_the_table() -> None:
    cached = Cached([280, 40], 3, 12, width=9)
    position = torch.tensor([*range(120, 132), *range(252, 260), *range(2), *range(36, 40)])
    sequence = torch.tensor([0] * 20 + [1] * 6)
    q = randn(len(position), 3, 12, seed=8)
    narrow = cached.table[:, :5]
    slopes = randn(3, seed=1)

    def run(rows: list[int], table: Tensor) -> Tensor:
        return cached.attend(q[rows], cached.index(sequence[rows], position[rows], table=table), 100, slopes)

    alone = torch.cat([run([i], narrow) for i in range(len(position))])
    for rows in (list(range(26)), list(range(5, 14)), [3, 11, 24], list(range(1, 26, 2)), [0, 13, 19, 20, 21, 25]):
        assert torch.equal(run(rows, cached.table), alone[rows])


@pytest.mark.parametrize("programs", [1, 2, 3, None])
def test_sharing_splits_does_not_round(programs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = Cached([1700], 1, 16)
    sequence, position = (
        torch.zeros(9, dtype=torch.int64),
        torch.tensor([5, 127, 128, 500, 1023, 1024, 1535, 1536, 1699]),
    )
    q = randn(9, 2, 16, seed=2)
    usual = cached.attend(q, cached.index(sequence, position))
    cached.assert_formula(usual, q, sequence, position)
    if programs is not None:
        monkeypatch.setattr(attention_rules, "attention_programs", lambda *_: programs)
    assert torch.equal(cached.attend(q, cached.index(sequence, position)), usual)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("programs", [1, 3, None])
def test_even_splits_are_the_formula(window: int | None, programs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = Cached([3700], 1, 16)
    position = torch.tensor([0, 127, 128, 1023, 1024, 1279, 1280, 2047, 3071, 3072, 3583, 3584, 3699])
    sequence, q = torch.zeros_like(position), randn(len(position), 2, 16, seed=2)
    if programs is not None:
        monkeypatch.setattr(attention_rules, "attention_programs", lambda *_: programs)
    for rows in (slice(0, 3), slice(3, 8), slice(6, 9), slice(8, 13), slice(12, 13)):
        got = cached.attend(q[rows], cached.index(sequence[rows], position[rows], None), window)
        cached.assert_formula(got, q[rows], sequence[rows], position[rows], window)


def test_even_splits_are_never_more_and_never_longer_than_uneven_ones() -> None:
    near = 128 * attention_rules.NEAR_SPLITS
    for positions in range(1, 9000):
        even = 128 if positions <= near else 256 if positions <= 3 * near else 512
        assert -(-positions // even) <= attention_rules.attention_splits(positions, 128)
        assert even <= (128 if positions <= near else 512)


def test_inactive_rows_are_neither_read_nor_written() -> None:
    cached, sequence, position, valid = ragged()
    q = randn(len(sequence), 4, 16, seed=3)
    usual = cached.attend(q, cached.index(sequence, position))
    active = torch.rand(len(sequence), generator=torch.Generator().manual_seed(1)) < 0.4
    active[[10, 11, 12]] = False
    chosen = [i for i in valid if active[i]]
    untouched = [i for i in range(len(sequence)) if i not in chosen]
    q[untouched] = torch.nan
    got = cached.attend(q, cached.index(sequence, position), active=active)
    assert torch.equal(got[chosen], usual[chosen])
    assert got[untouched].isnan().all()

    cached.keys.fill_(torch.nan)
    nothing = cached.attend(q, cached.index(sequence, position), active=torch.zeros_like(active))
    assert nothing.isnan().all()


@pytest.mark.parametrize("dtype", RTOL)
def test_a_mask_changes_no_bit_of_active_rows_wherever_it_starts(dtype: torch.dtype) -> None:
    cached = Cached([150], 2, 16, dtype=dtype)
    position = torch.arange(131, 150)
    sequence = torch.zeros_like(position)
    q = randn(len(position), 4, 16, dtype=dtype, seed=3)
    usual = cached.attend(q, cached.index(sequence, position))
    # Three of four masks start between two words of memory.
    masks = torch.rand(8, len(position), generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.5
    masks[0] = True
    for active in masks:
        got = cached.attend(q, cached.index(sequence, position), active=active)
        assert torch.equal(got[active.cpu()], usual[active.cpu()])
        assert got[~active.cpu()].isnan().all()


def test_positions_only_inactive_rows_see_are_not_read() -> None:
    cached = Cached([130], 2, 16)
    sequence, position = torch.zeros(4, dtype=torch.int64), torch.tensor([100, 110, 125, 129])
    active = torch.tensor([True, True, False, False])
    q = randn(4, 2, 16, seed=3)
    usual = cached.attend(q, cached.index(sequence, position))
    for p in range(111, 130):
        cached.keys[cached.table[0, p // PAGE], :, p % PAGE] = torch.nan
        cached.values[cached.table[0, p // PAGE], :, p % PAGE] = torch.nan
    assert torch.equal(cached.attend(q, cached.index(sequence, position), active=active)[:2], usual[:2])


def test_an_index_serves_every_layer_of_a_pass() -> None:
    layers = [Cached([700, 300], 2, 16), Cached([700, 300], 2, 16)]
    layers[1].keys, layers[1].values, layers[1].flat = layers[0].values, layers[0].keys, layers[0].flat.flip(0)
    sequence, position = torch.tensor([0] * 3 + [1]), torch.tensor([500, 600, 699, 299])
    index = layers[0].index(sequence, position)
    masks = [None, torch.tensor([True, False, False, True]), None, torch.zeros(4, dtype=torch.bool), None]
    for number, active in enumerate(masks):
        cached, q = layers[number % 2], randn(4, 4, 16, seed=number)
        got = cached.attend(q, index, active=active)
        rows = list(range(4)) if active is None else active.nonzero().flatten().tolist()
        cached.assert_formula(got, q, sequence, position, rows=rows)
    q = randn(4, 2, 16, seed=9)
    layers[0].assert_formula(layers[0].attend(q, index, 50), q, sequence, position, 50)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_row_groups_are_runs_of_a_sequence(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequence: list[int] = []
    for s in torch.randperm(6, generator=generator).tolist():
        count, padding = torch.randint(0, (3, 40, 600)[seed], (2,), generator=generator).tolist()
        sequence += [s] * count + [-1] * (padding % 5)
    index = TritonIndex(
        torch.tensor(sequence).to(DEVICE),
        torch.zeros(len(sequence), dtype=torch.int64).to(DEVICE),
        torch.zeros(8, 4, dtype=torch.int64).to(DEVICE),
        page_size=PAGE,
        tile=8,
    )
    groups = attention.row_groups(index, rows)
    assert groups.count.shape == groups.first.shape == (groups.bound,)
    assert (groups.count.data_ptr() - groups.first.data_ptr()) % 16 == 0  # or their readers would be compiled twice
    found = [
        (first, count) for first, count in zip(groups.first.tolist(), groups.count.tolist(), strict=True) if count > 0
    ]
    expected, start = [], 0
    while start < len(sequence):
        end = start
        while end < len(sequence) and end - start < rows and sequence[end] == sequence[start]:
            end += 1
        if sequence[start] >= 0:
            expected.append((start, end - start))
        start = end
    assert found == expected


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_a_program_takes_no_more_rows_than_there_are_and_rounds_as_with_all_of_a_tile(arch: int) -> None:
    for head_dim, group, itemsize in (
        (64, 4, 2),
        (128, 4, 2),
        (64, 3, 2),
        (128, 7, 2),
        (64, 8, 2),
        (128, 4, 4),
        (80, 1, 2),
        (256, 71, 2),
    ):
        for tile in (8, 64):
            whole = attention_rules.attention_rule(head_dim, group, 8, tile, itemsize, arch)
            assert whole.rows <= tile
            # What prompts multiply by takes 64: a token of a sequence would be one row of them.
            assert 16 <= whole.rows * whole.heads <= max(64 if arch == 90 and tile > 8 else 32, whole.heads)
            for width in (1, 2, 3, 5, 8, 33):
                rule = attention_rules.attention_rule(head_dim, group, 8, tile, itemsize, arch, width, sequences=64)
                assert rule.heads >= group
                assert rule.rows * rule.heads >= 16
                assert rule.rows == whole.rows or width <= rule.rows < 2 * width
                assert (rule.split, rule.warps) == (whole.split, whole.warps)
                # From 64 on sm_90 multiplies by another instruction, whose sums have another order.
                assert (rule.rows * rule.heads >= 64) == (whole.rows * whole.heads >= 64)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "width", "sequences", "products"),
    [
        (64, 3, 8, 1, 16), (64, 8, 8, 1, 16), (64, 3, 9, 1, 32), (64, 3, 16, 1, 32), (64, 8, 16, 1, 32),
        (64, 8, 8, 2, 16), (64, 8, 8, 3, 32), (64, 3, 1, 1, 16), (128, 8, 8, 1, 32), (64, 3, 8, 9, 32),
    ],
)  # fmt: skip
def test_few_programs_over_narrow_keys_take_one_product_each(
    head_dim: int, kv_heads: int, width: int, sequences: int, products: int
) -> None:
    for arch in (80, 90, 100):
        rule = attention_rules.attention_rule(head_dim, 4, kv_heads, 8, 2, arch, width, sequences)
        assert rule.rows * rule.heads == products


def test_splits_are_short_where_keys_are_wide_or_programs_few() -> None:
    for head_dim, kv_heads, split in ((64, 8, 128), (64, 3, 64), (128, 8, 64)):
        assert attention_rules.attention_rule(head_dim, 4, kv_heads, 8, 2, 90).split == split


@triton.jit
def pages_kernel(table_ptr, out_ptr, split, last, BLOCK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr):
    length = split_length(last, SPLIT, EVEN)
    pages = pages_of(table_ptr, split, length, last * 0, last, BLOCK, SPLIT, EVEN)
    tl.store(out_ptr + tl.arange(0, FAR_FACTOR * SPLIT // BLOCK), pages)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(
    ("last", "expected"), [(-1, []), (0, [7]), (63, [7]), (64, [7, 8]), (127, [7, 8]), (300, [7, 8])]
)
def test_rows_that_are_none_have_no_pages(even: bool, last: int, expected: list[int]) -> None:
    """What a table's memory says of no sequence is no page: to ask for its keys was to ask for any address."""
    table = torch.arange(7, 27, device=DEVICE)
    out = torch.full((8,), -1, device=DEVICE)
    pages_kernel[(1,)](table, out, 0, last, BLOCK=64, SPLIT=128, EVEN=even)
    assert [page for page in out.tolist() if page] == expected


def test_splits_cover_every_position() -> None:
    for positions in (1, 64, 128, 129, 1023, 1024, 1025, 1536, 1537, 10**6):
        splits = attention_rules.attention_splits(positions, 128)
        near, far = min(splits, attention_rules.NEAR_SPLITS) * 128, max(splits - attention_rules.NEAR_SPLITS, 0) * 512
        assert positions <= near + far < positions + 512


def test_programs_stay_within_the_splits_and_the_chip() -> None:
    for tiles, splits, at_once, programs in (
        (8, 22, 264, 22), (8, 70, 264, 33), (8, 70, 132, 16), (16, 9, 132, 8), (32, 9, 132, 4), (64, 9, 132, 2),
        (64, 5, 264, 4),
    ):  # fmt: skip
        assert attention_rules.attention_programs(tiles, splits, at_once) == programs


@pytest.mark.parametrize("at_once", [132, 264])
def test_no_processors_stand_idle_beside_long_programs(at_once: int) -> None:
    """Splits that the busiest processor has, starts counted as one, are near those of an even share."""
    for tiles in range(1, 128):
        for splits in (5, 9, 22, 70, 500):
            programs = attention_rules.attention_programs(tiles, splits, at_once)
            rounds, each = -(-tiles * programs // at_once), -(-splits // programs)
            assert rounds * each <= 2 * max(1.0, tiles * splits / at_once) + 1


def test_splits_are_folded_in_order_by_one_program_past_a_threshold() -> None:
    assert not attention_rules.attention_in_order(127, 1 << 28)
    assert attention_rules.attention_in_order(128, 1)
    assert attention_rules.attention_in_order(1, (1 << 28) + 1)
    assert attention_rules.attention_programs(8, 1, 264) == 1, "one split has nothing to share"


def test_an_index_of_another_backend_is_refused() -> None:
    table = torch.zeros(1, 1, dtype=torch.int64)
    index = AttentionIndex(table[0], table[0], table, page_size=PAGE, tile=8)
    with pytest.raises(TypeError, match="TritonIndex"):
        attention.attend(randn(1, 2, 16), randn(1, 1, PAGE, 16), randn(1, 1, PAGE, 16), index, scale=1.0)
