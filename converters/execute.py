"""The one copy kernel, and what guards it: names, shapes and dtypes agree, constants and ties hold, nothing is cast.

A plan is data; running it is a loop over its copies. Stores say where tensors live (a mapped file, a live module) and
hand out views, so a copy moves bytes once, from where they are to where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from converters.errors import CheckpointError, listing
from converters.plan import Copy, Fill, Plan, Region
from converters.tensors import FLOATS, TensorInfo, check_tensors
from converters.values import Cast

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Store(Protocol):
    """Where named tensors live."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor held."""

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor `key`, contiguous, as a view of where it lives (writable in a store that is written)."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a run did.

    Attributes:
        tensors: Target tensors written.
        bytes: Bytes written into them.
        casts: Target tensors whose dtype differs from their source's, with the value map.
    """

    tensors: int
    bytes: int
    casts: Mapping[str, Cast]


@dataclass(frozen=True)
class Only:
    """Some tensors of a store, the whole of which has been checked before.

    Attributes:
        store: The store.
        keys: Those that are seen.
    """

    store: Store
    keys: Collection[str]

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of those tensors."""
        held = self.store.tensors()
        return {key: held[key] for key in self.keys if key in held}

    def tensor(self, key: str) -> torch.Tensor:
        """A view of where the tensor lives."""
        return self.store.tensor(key)


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """`torch.bfloat16` for `bfloat16`."""
    found: torch.dtype = getattr(torch, name)
    return found


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """A tensor's shape and dtype."""
    return TensorInfo(tuple(tensor.shape), name_of(tensor.dtype))


def view(tensor: torch.Tensor, region: Region, shape: tuple[int, ...]) -> torch.Tensor:
    """The elements of `region` in `tensor` (contiguous), as a view of `shape`."""
    return tensor.as_strided(shape, region.strides, tensor.storage_offset() + region.offset)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that equality means equal bits (NaN, and the sign of zero, included)."""
    return tensor.view(INTEGERS[tensor.element_size()])


def apply(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
    """Run one `move` or `tie`: read `copy.source` in `source`, write `copy.target` in `target`."""
    values = view(source, copy.source, copy.shape)
    view(target, copy.target, copy.shape).copy_(values + copy.shift if copy.shift else values)


def fill(part: Fill, target: torch.Tensor) -> None:
    """Write one constant."""
    view(target, part.region, part.shape).fill_(part.value)


def tied_fault(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> str | None:
    """What is wrong with one `verify`: a second copy in the source that differs from what the target already holds."""
    second, first = view(source, copy.source, copy.shape), view(target, copy.target, copy.shape)
    if second.dtype == first.dtype and torch.equal(bits(second), bits(first)):
        return None
    count = "dtype" if second.dtype != first.dtype else f"{int((bits(second) != bits(first)).sum()):,} elements"
    return f"{copy.source.key} is a tied copy of {copy.target.key}, and differs from it ({count})"


def constant_faults(constants: Iterable[Fill], read: Callable[[str], torch.Tensor]) -> list[str]:
    """The constants that the source should hold and does not."""
    out = []
    for part in constants:
        values = view(read(part.region.key), part.region, part.shape)
        wrong = int((values != part.value).sum())
        if wrong:
            out.append(
                f"{part.region.key}: {wrong:,} of {part.elements:,} elements that must be {part.value:g} are not "
                f"({part.rule})"
            )
    return out


def casts_of(plan: Plan, source: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo]) -> dict[str, Cast]:
    """The target tensors whose dtype is not that of what they are made of."""
    return {
        copy.target.key: Cast(source[copy.source.key].dtype, target[copy.target.key].dtype)
        for copy in plan.copies
        if source[copy.source.key].dtype != target[copy.target.key].dtype
    }


def refuse_casts(casts: Mapping[str, Cast]) -> None:
    """Raise unless there are none.

    Raises:
        CheckpointError: A dtype would change, which happens only on request.
    """
    if casts:
        lines = [f"{key}: {cast.source} -> {cast.target}" for key, cast in casts.items()]
        raise CheckpointError(
            listing("dtypes differ, and a cast must be asked for (cast=True), for tensors", lines)
            + "\nEither build the model in the checkpoint's dtype, or allow the rounding "
            "(on the command line, convert --dtype)"
        )


def refuse_kinds(casts: Mapping[str, Cast]) -> None:
    """Raise where an integer would become a float, or a float an integer: such a change is never a rounding.

    Raises:
        CheckpointError: Casts between kinds; all of them.
    """
    wrong = [
        f"{key}: {cast.source} -> {cast.target}"
        for key, cast in casts.items()
        if (cast.source in FLOATS) != (cast.target in FLOATS)
    ]
    if wrong:
        raise CheckpointError(
            listing("a cast rounds floats to floats; integers are no numbers to round, in tensors", wrong)
            + "\nThe checkpoint is quantised, or its dtypes are damaged: dequantise it, or look at what wrote it"
        )


def run(
    plan: Plan,
    source: Store,
    target: Store,
    *,
    cast: bool = False,
    where: str = "the source",
    written_bytes: Callable[[int], None] | None = None,
) -> Transfer:
    """Move every tensor of `plan` from `source` to `target`, one target tensor at a time.

    Args:
        plan: The plan, restricted to what the two stores hold.
        source: Read only.
        target: Tensors that exist already, with any content.
        cast: Allow dtypes to change, rounding to nearest even.
        where: What the source is called in messages.
        written_bytes: Told the size of each target tensor when it is written.

    Raises:
        CheckpointError: Tensors that do not fit the plan, a dtype change not asked for, a constant or a tie that does
            not hold. Names, shapes and dtypes are checked before anything is written.
    """
    held, made = source.tensors(), target.tensors()
    check_tensors(plan.source_tensors, held, where)
    check_tensors(plan.target_tensors, made, "the target")
    casts = casts_of(plan, held, made)
    refuse_kinds(casts)
    if not cast:
        refuse_casts(casts)
    problems = constant_faults(plan.constants, source.tensor)
    written = 0
    verify = [copy for copy in plan.copies if copy.kind == "verify"]
    with torch.no_grad():
        for key, copies, fills in plan.by_target():
            into = target.tensor(key)
            for copy in copies:
                if copy.kind != "verify":
                    apply(copy, source.tensor(copy.source.key), into)
            for part in fills:
                fill(part, into)
            written += into.numel() * into.element_size()
            if written_bytes is not None:
                written_bytes(into.numel() * into.element_size())
        for copy in verify:
            first = target.tensor(copy.target.key)
            second = source.tensor(copy.source.key)
            fault = tied_fault(copy, second.to(first.dtype), first)
            problems += [fault] if fault else []
    if problems:
        raise CheckpointError(listing(f"{where}: values that must be equal are not", set(problems)))
    return Transfer(tensors=len(plan.target_tensors), bytes=written, casts=casts)
