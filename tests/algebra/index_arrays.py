"""Plans executed on numpy arrays of integers, as slowly and plainly as possible.

Every element that a plan writes must still be empty, so running a plan also shows that no element is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import count

import numpy as np
import numpy.typing as npt

from converters.plan import Plan, Region
from converters.topology import Coord, Mesh, Topology

Array = npt.NDArray[np.int64]
Tensors = dict[str, Array]
Shards = dict[Coord | None, Tensors]
EMPTY = -(10**12)


def positions(region: Region, shape: tuple[int, ...]) -> Array:
    """The flat position of every element of `region`, as an array of `shape`."""
    found = np.full(shape, region.offset, dtype=np.int64)
    for dim, (stride, extent) in enumerate(zip(region.strides, shape, strict=True)):
        walk = [1] * len(shape)
        walk[dim] = extent
        found = found + stride * np.arange(extent).reshape(walk)
    return found


def coded(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors no two elements of which are equal."""
    start = count(1000, 100_000)
    return {key: np.arange(math.prod(shape)).reshape(shape) + next(start) for key, shape in shapes.items()}


def places(topology: Topology | None) -> Iterator[tuple[Coord | None, Mesh | None]]:
    """Every rank and model chunk of a mesh, or the one place without a mesh."""
    if topology is None:
        yield None, None
    else:
        yield from ((coord, Mesh(topology, coord)) for coord in topology.shards())


def convert(plan: Plan, held: Shards, *, source: Topology | None = None, target: Topology | None = None) -> Shards:
    """What every place of the target mesh holds after `plan` ran from every place of the source mesh.

    Raises:
        AssertionError: An element is written twice or not at all, or a tied copy or a constant is not what it must be.
    """
    return {into: _written(plan, held, source, mesh) for into, mesh in places(target)}


def run(plan: Plan, tensors: Tensors) -> Tensors:
    """The whole tensors of the target."""
    return convert(plan, {None: tensors})[None]


def _written(plan: Plan, held: Shards, source: Topology | None, mesh: Mesh | None) -> Tensors:
    shapes = plan.restrict(target=mesh).target_tensors
    out = {key: np.full(math.prod(shape), EMPTY, dtype=np.int64) for key, shape in shapes.items()}
    parts = {place: plan.restrict(source=where, target=mesh) for place, where in places(source)}
    for part in list(parts.values())[:1]:
        for fill in part.fills:
            at = positions(fill.region, fill.shape)
            assert (out[fill.region.key][at] == EMPTY).all(), f"{fill} overwrites"
            out[fill.region.key][at] = int(fill.value)
    for place, part in parts.items():
        for constant in part.constants:
            found = held[place][constant.region.key].reshape(-1)[positions(constant.region, constant.shape)]
            assert (found == int(constant.value)).all(), f"{constant} does not hold"
        for copy in part.copies:
            if copy.source_replica or copy.kind == "verify":
                continue
            at = positions(copy.target, copy.shape)
            assert (out[copy.target.key][at] == EMPTY).all(), f"{copy} overwrites"
            values = held[place][copy.source.key].reshape(-1)[positions(copy.source, copy.shape)]
            out[copy.target.key][at] = values + int(copy.shift)
    for place, part in parts.items():
        for copy in part.copies:
            if copy.kind == "verify":
                second = held[place][copy.source.key].reshape(-1)[positions(copy.source, copy.shape)]
                assert (out[copy.target.key][positions(copy.target, copy.shape)] == second).all(), f"{copy} differs"
    for key, array in out.items():
        assert (array != EMPTY).all(), f"{key} has elements that nothing writes"
    return {key: array.reshape(shapes[key]) for key, array in out.items()}


def same(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    """Whether the tensors have the same names, shapes and elements."""
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)
