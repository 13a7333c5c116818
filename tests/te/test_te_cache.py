"""The key-value cache by itself: what goes in comes out at its place, and what does not fit is refused."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converters.errors import CacheError
from converters.te.cache_rows import remove_last, reorder_rows
from converters.te.reference import InferenceParams
from converters.te.reference.cache_managers import NonPagedKVCacheManager, PagedKVCacheManager

HEADS, WIDTH_K, WIDTH_V = 3, 5, 2
LAYERS = (1, 4)
FORMATS = ("bshd", "sbhd", "thd")


def _params(batch: int, length: int, page_size: int | None = None, **options: Any) -> InferenceParams:
    if page_size is not None:
        options = {"total_num_pages": batch * length // page_size} | options
        options |= {"is_paged": True, "page_size": page_size}
    given: dict[str, Any] = {"qkv_format": "thd", "max_ctx_len": length, "head_dim_v": WIDTH_V, "dtype": torch.float32}
    params = InferenceParams(batch, length, HEADS, WIDTH_K, **(given | options))
    for layer in LAYERS:
        params.allocate_memory(layer)
    return params


def _lay_out(sequences: list[Tensor], qkv_format: str) -> Tensor:
    """Sequences `[s h d]` in a format, with NaN for padding: none of it may reach the cache."""
    if qkv_format == "thd":
        return torch.cat(sequences)
    rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=float("nan"))
    return rows if qkv_format == "bshd" else rows.transpose(0, 1)


class Mirror:
    """What the cache should hold: the tokens of each sequence by layer, kept as lists."""

    def __init__(self, params: InferenceParams) -> None:
        self.params = params
        self.held: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    def step(self, lengths: dict[int, int], qkv_format: str) -> None:
        before = {seq: len(self.held[seq][LAYERS[0]][0]) if seq in self.held else 0 for seq in lengths}
        self.params.pre_step(OrderedDict(lengths))
        assert self.params.get_seqlens_pre_step()[: len(lengths)].tolist() == list(before.values())
        kept = {seq: self.held.get(seq, {}) for seq in lengths}
        for layer in LAYERS:
            news = {
                seq: (torch.randn(count, HEADS, WIDTH_K), torch.randn(count, HEADS, WIDTH_V))
                for seq, count in lengths.items()
            }
            for seq, new in news.items():
                old = kept[seq].get(layer)
                kept[seq][layer] = new if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            k, v = (_lay_out([new[which] for new in news.values()], qkv_format) for which in (0, 1))
            self.held = kept
            self.check(layer, self.params.step(layer, k, v, qkv_format), qkv_format, lengths)

    def check(self, layer: int, found: Any, qkv_format: str, lengths: dict[int, int]) -> None:
        _, _, cu_q, cu_kv, longest, output_format = found
        assert (longest, output_format) == (
            self.params.max_sequence_length,
            "bshd" if qkv_format == "bshd" else f"{qkv_format}_2bshd",
        )
        assert cu_q.diff()[: len(lengths)].tolist() == list(lengths.values())
        assert cu_kv.diff()[: len(lengths)].tolist() == [len(held[layer][0]) for held in self.held.values()]
        assert len(cu_q) == len(cu_kv) == self.params.max_batch_size + 1
        self.compare(layer, *found[:2])

    def compare(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.params.is_paged:
            k, v = self.params.convert_paged_to_nonpaged(layer)
        for row, held in enumerate(self.held.values()):
            for one, expected in zip((k, v), held[layer], strict=True):
                assert torch.equal(one[row, : len(expected)], expected), (layer, row)


STEPS: list[tuple[str, dict[int, int]]] = [
    ("thd", {0: 3, 1: 5, 2: 2}),
    ("bshd", {0: 1, 1: 1, 2: 4}),  # prompts in parts, of different lengths
    ("sbhd", {1: 2, 2: 1, 7: 6}),  # 0 has finished and 7 has joined: rows move up
    ("bshd", {1: 1, 2: 1, 7: 1}),
    ("thd", {2: 3, 7: 0}),  # 1 has finished; 7 waits
    ("sbhd", {2: 1, 7: 1, 1: 2}),  # 1 is back, as a new sequence
]


@pytest.mark.parametrize("page_size", [None, 1, 4, 12])
def test_every_token_is_where_it_belongs(page_size: int | None) -> None:
    torch.manual_seed(0)
    mirror = Mirror(_params(3, 12, page_size))
    for qkv_format, lengths in STEPS:
        mirror.step(lengths, qkv_format)
    mirror.params.reset()
    mirror.held = {}
    mirror.step({5: 12, 6: 12, 7: 12}, "bshd")  # full to the last token, after a reset


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_of_sequences(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([None, 1, 3, 6]))
    mirror = Mirror(_params(4, 12, page_size))
    fresh = 0
    for _ in range(data.draw(st.integers(1, 6))):
        held = {seq: len(layers[LAYERS[0]][0]) for seq, layers in mirror.held.items()}
        lengths = {
            seq: data.draw(st.integers(0, 12 - length)) for seq, length in held.items() if data.draw(st.booleans())
        }
        for _ in range(
            data.draw(st.integers(0 if lengths else 1, 4 - len(lengths)) if len(lengths) < 4 else st.just(0))
        ):
            lengths[fresh] = data.draw(st.integers(0, 12))
            fresh += 1
        mirror.step(lengths, data.draw(st.sampled_from(FORMATS)))
        order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=len(lengths), max_size=len(lengths)))
        _reorder(mirror, order)


def _reorder(mirror: Mirror, order: list[int]) -> None:
    rows = [dict(held) for held in mirror.held.values()]
    reorder_rows(mirror.params.cache_manager, order)
    mirror.held = {seq: dict(rows[source]) for seq, source in zip(mirror.held, order, strict=True)}
    for layer, (k, v) in mirror.params.cache_manager.cache.items():
        mirror.compare(layer, k, v)


@pytest.mark.parametrize("page_size", [None, 2, 4])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 0, 2], [2, 2, 0]])
def test_reordered_rows_go_on_apart(page_size: int | None, order: list[int]) -> None:
    torch.manual_seed(1)
    mirror = Mirror(_params(4, 8, page_size))
    mirror.step({0: 3, 1: 5, 2: 4}, "thd")
    _reorder(mirror, order)
    for _ in range(3):
        mirror.step(dict.fromkeys(range(3), 1), "bshd")
    if page_size is not None:
        manager = mirror.params.cache_manager
        assert isinstance(manager, PagedKVCacheManager)
        used = [page for seq in range(3) for page in manager.get_page_list(seq)]
        free = [page.page_id for page in manager.free_pages]
        assert sorted(used + free) == list(range(manager.total_num_pages)), "each page is used once or free once"


@pytest.mark.parametrize("page_size", [None, 2])
def test_tokens_taken_back_are_written_anew(page_size: int | None) -> None:
    torch.manual_seed(2)
    mirror = Mirror(_params(2, 8, page_size))
    mirror.step({0: 5, 1: 4}, "thd")
    remove_last(mirror.params.cache_manager, 3)
    mirror.held = {
        seq: {layer: (k[:-3], v[:-3]) for layer, (k, v) in held.items()} for seq, held in mirror.held.items()
    }
    mirror.step({0: 6, 1: 7}, "thd")
    with pytest.raises(CacheError, match="take back 9 tokens"):
        remove_last(mirror.params.cache_manager, 9)


def test_pages_of_finished_sequences_serve_new_ones() -> None:
    params = _params(2, 8, 4)
    manager = params.cache_manager
    assert isinstance(manager, PagedKVCacheManager)
    for first in range(10):
        params.pre_step({first: 8, first + 1: 0})
        assert manager.get_page_count(first) == 2
    small = PagedKVCacheManager(3, 4, HEADS, WIDTH_K, torch.float32, max_batch_size=2, max_seqlen=8)
    with pytest.raises(CacheError, match="2 sequences need 4 pages of 4 tokens, and the cache has 3"):
        small.pre_step({0: 8, 1: 5})
    small.pre_step({0: 8, 1: 4})
    with pytest.raises(CacheError, match="all 3 pages of 4 tokens are in use, and sequence 1 needs one more"):
        small.allocate_page(1)


def test_refused_step_changes_nothing() -> None:
    torch.manual_seed(3)
    mirror = Mirror(_params(2, 4, 2))
    mirror.step({0: 2, 1: 3}, "thd")
    with pytest.raises(CacheError):
        mirror.params.pre_step({0: 1, 1: 2})
    mirror.step({0: 2, 1: 1}, "thd")


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({0: 1, 1: 1, 2: 1}, r"room for 2 sequences \(max_batch_size\) and this step has 3"),
        ({0: 2, 1: 6}, r"room for 8 tokens a sequence[^\n]*\n  sequence 1: 3 tokens held \+ 6 new = 9"),
        ({1: 1, 0: 1}, r"expected \[0, 1\], found \[1, 0\]"),
        ({9: 1, 1: 1}, r"expected \[1, 9\], found \[9, 1\]"),
        ({0: -1}, "sequence 0: -1"),
    ],
)
@pytest.mark.parametrize("page_size", [None, 4])
def test_steps_that_are_refused(page_size: int | None, lengths: dict[int, int], message: str) -> None:
    params = _params(2, 8, page_size)
    params.pre_step({0: 2, 1: 3})
    with pytest.raises(CacheError, match=message):
        params.pre_step(lengths)


def _new(
    tokens: tuple[int, ...], heads: int = HEADS, width: int = WIDTH_K, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.zeros(*tokens, heads, width, dtype=dtype)


@pytest.mark.parametrize(
    ("layer", "k", "v", "qkv_format", "message"),
    [
        (2, _new((3,)), _new((3,), width=WIDTH_V), "thd", r"layer 2 has no memory.*\[1, 4\].*allocate_memory\(2\)"),
        (1, _new((4,)), _new((4,), width=WIDTH_V), "thd", r"announced 3 new tokens \(\[1, 2\]\), and 4 came in thd"),
        (1, _new((2, 1)), _new((2, 1), width=WIDTH_V), "bshd", r"2 sequences of \[1, 2\] new tokens, and 2 of 1 came"),
        (1, _new((2, 3)), _new((2, 3), width=WIDTH_V), "sbhd", r"2 sequences of \[1, 2\] new tokens, and 3 of 2 came"),
        (1, _new((3,), heads=6), _new((3,), width=WIDTH_V), "thd", "keys have 6 heads of 5, the cache 3 of 5"),
        (1, _new((3,)), _new((3,)), "thd", "values have 3 heads of 5, the cache 3 of 2"),
        (1, _new((3,), dtype=torch.bfloat16), _new((3,), width=WIDTH_V), "thd", "keys are torch.bfloat16, the cache"),
        (1, _new((3,)), _new((2,), width=WIDTH_V), "thd", r"keys have tokens \(3,\), values \(2,\)"),
        (1, _new((1, 3)), _new((1, 3), width=WIDTH_V), "thd", "have shape .1, 3, 3, 5.; thd has 3 dimensions"),
        (1, _new((3,)), _new((3,), width=WIDTH_V), "bhsd", "qkv_format is 'bhsd'"),
    ],
)
def test_tokens_that_are_refused(layer: int, k: Tensor, v: Tensor, qkv_format: str, message: str) -> None:
    params = _params(2, 8)
    params.pre_step({0: 1, 1: 2})
    with pytest.raises(CacheError, match=message):
        params.step(layer, k, v, qkv_format)


def test_a_step_without_pre_step() -> None:
    params = _params(2, 8)
    k, v = _new((3,)), _new((3,), width=WIDTH_V)
    with pytest.raises(CacheError, match="pre_step was not called before the first step"):
        params.step(1, k, v, "thd")
    params.pre_step({0: 1, 1: 2})
    params.step(1, k, v, "thd")
    params.step(4, k, v, "thd")
    with pytest.raises(CacheError, match="layer 1 steps, and pre_step was not called before this layer's second step"):
        params.step(1, k, v, "thd")
    params.reset()
    with pytest.raises(CacheError, match="before the first step"):
        params.step(1, k, v, "thd")


def test_more_new_tokens_than_max_ctx_len() -> None:
    params = _params(2, 8, max_ctx_len=4)
    params.pre_step({0: 5})
    with pytest.raises(CacheError, match="5 new tokens in thd and the cache was made with max_ctx_len=4"):
        params.step(1, _new((5,)), _new((5,), width=WIDTH_V), "thd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": None}, r"needs these sizes of the model's attention \(1\):\n  dtype"),
        ({"qkv_format": "hd"}, "qkv_format is 'hd'"),
        ({"max_ctx_len": None}, r"from 1 to max_sequence_length \(8\); found None"),
        ({"max_ctx_len": 9}, "found 9"),
        ({"is_paged": True}, "needs page_size, a divisor"),
        ({"is_paged": True, "page_size": 3}, r"a divisor of max_sequence_length \(8\); found 3"),
        ({"is_paged": True, "page_size": 4, "total_num_pages": 3}, "= 4; found 3"),
    ],
)
def test_caches_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        _params(2, 8, **options)


def test_its_own_manager() -> None:
    class Counting(NonPagedKVCacheManager):
        steps = 0

        def step(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            Counting.steps += 1
            return super().step(*args, **kwargs)

    mirror = Mirror(_params(2, 8, custom_cache_manager=Counting))
    mirror.step({0: 3, 1: 5}, "bshd")
    assert Counting.steps == len(LAYERS)
    with pytest.raises(CacheError, match="this cache is not paged"):
        mirror.params.convert_paged_to_nonpaged(1)
