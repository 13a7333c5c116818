"""What `generate()` does to the rows of a key-value cache: reorder them after a step of beam search, take tokens back.

Works on the managers of the reference and on Transformer Engine's, by the attributes that both have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from converters.errors import CacheError


def reorder_rows(manager: Any, order: Sequence[int]) -> None:
    """Make row i hold what row `order[i]` held: keys, values and length; in place.

    Pages are moved by their table. Only where a row is taken more than once are pages copied, into those of the rows
    that nobody took: both copies will be written to.

    Args:
        manager: A contiguous or paged manager.
        order: For each row of the batch, the row that it continues.

    Raises:
        CacheError: Not one entry for each row held, or a row that there is not.
    """
    names = _rows(manager)
    if len(order) != len(names) or not all(0 <= row < len(names) for row in order):
        raise CacheError(
            f"a new order of the cache's {len(names)} sequences names one of rows 0 to {len(names) - 1} for each; "
            f"found {list(order)}"
        )
    lengths = [manager.sequences[name] for name in names]
    if hasattr(manager, "page_table"):
        _reorder_pages(manager, names, order)
    else:
        longest = max(lengths, default=0)
        for pair in manager.cache.values():
            for one in pair:
                index = torch.as_tensor(order, device=one.device)
                one[: len(order), :longest] = one[index, :longest]
    for name, row in zip(names, order, strict=True):
        manager.sequences[name] = lengths[row]


def _reorder_pages(manager: Any, names: list[int], order: Sequence[int]) -> None:
    held = [manager.allocated_pages[name] for name in names]
    heir = dict.fromkeys(order, -1)  # of each row that goes on, the one that keeps its pages: itself where it can
    for row, source in reversed(list(enumerate(order))):
        heir[source] = row if heir[source] != source else source
    for row, pages in enumerate(held):
        if row not in heir:
            for page in pages:
                page.deallocate_page()
                manager.free_pages.append(page)
    sources: list[int] = []
    targets: list[int] = []
    for row, source in enumerate(order):
        manager.allocated_pages[names[row]] = held[source] if heir[source] == row else []
    for row, source in enumerate(order):
        if heir[source] != row:
            for page in held[source]:
                manager.allocate_page(names[row])
                sources.append(page.page_id)
            targets += manager.get_page_list(names[row])
    if sources:
        for pair in manager.cache.values():
            for one in pair:
                one[torch.as_tensor(targets, device=one.device)] = one[torch.as_tensor(sources, device=one.device)]
    manager.page_table = manager.get_page_table(list(manager.sequences))


def remove_last(manager: Any, count: int) -> None:
    """Take back the last `count` tokens of every row.

    Raises:
        CacheError: A row holds fewer.
    """
    if short := {name: manager.sequences[name] for name in _rows(manager) if manager.sequences[name] < count}:
        raise CacheError(f"cannot take back {count} tokens: sequences hold {short}")
    for name in _rows(manager):
        manager.sequences[name] -= count
        if hasattr(manager, "page_table"):
            keep = -(-manager.sequences[name] // manager.page_size)
            for page in manager.allocated_pages[name][keep:]:
                page.deallocate_page()
                manager.free_pages.append(page)
            del manager.allocated_pages[name][keep:]
    if hasattr(manager, "page_table"):
        manager.page_table = manager.get_page_table(list(manager.sequences))


def _rows(manager: Any) -> list[int]:
    """The ids of the batch's sequences: negative ones are padding of a step, which always comes last."""
    return [name for name in manager.sequences if name >= 0]
