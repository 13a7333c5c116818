"""The proof of a plan, from metadata alone: every element written exactly once, every element read exactly once.

It looks only at the compiled copies, so it does not trust the algebra that made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product

from converters.errors import PlanError
from converters.plan import Plan, Region
from converters.tiling import Strided, faults, strided
from converters.topology import Coord, Mesh, Topology

Places = list[tuple[Coord | None, Mesh | None]]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The account of a plan.

    Attributes:
        source: Column that is read.
        target: Column that is written.
        source_tensors: Tensors of the source, all of them accounted for.
        target_tensors: Tensors of the target, over all places that are no replicas.
        elements: Source elements that move.
        padding: Constant elements in the target, by tensor (over all places that are no replicas).
        constants: Constant elements that the source must hold, by tensor.
        tied: Source elements that are written a second time, or verified, by rule.
        dropped: For each source tensor that goes nowhere, the reason.
        lost: For each target tensor that is not made, the reason.
        rank_elements: Elements that each rank writes (or reads, when only the source is cut), in rank order.
        faults: What is wrong; empty when the plan holds.
    """

    source: str
    target: str
    source_tensors: int
    target_tensors: int
    elements: int
    padding: Mapping[str, int]
    constants: Mapping[str, int]
    tied: Mapping[str, int]
    dropped: Mapping[str, str]
    lost: Mapping[str, str]
    rank_elements: tuple[int, ...]
    faults: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether every element is accounted for."""
        return not self.faults

    def check(self) -> Proof:
        """This proof.

        Raises:
            PlanError: It does not hold; the message lists every fault.
        """
        if self.faults:
            raise PlanError(
                f"the plan {self.source} -> {self.target} does not hold:\n" + "\n".join(f"  {f}" for f in self.faults)
            )
        return self

    def as_dict(self) -> dict[str, object]:
        """The account as plain data, for JSON."""
        return {**asdict(self), "holds": self.holds}


@dataclass
class _Side:
    """The regions of one side, by place and tensor.

    Those of `once` and `constant` must tile a tensor; in a tensor without the first (a tied copy that is only held
    against another) those of `verified` and `constant`.
    """

    shapes: dict[tuple[Coord | None, str], int] = field(default_factory=dict)
    once: dict[tuple[Coord | None, str], list[Strided]] = field(default_factory=dict)
    constant: dict[tuple[Coord | None, str], list[Strided]] = field(default_factory=dict)
    verified: dict[tuple[Coord | None, str], list[Strided]] = field(default_factory=dict)

    def tensors(self, place: Coord | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for key, shape in shapes.items():
            elements = 1
            for extent in shape:
                elements *= extent
            self.shapes[place, key] = elements

    def add(self, where: str, place: Coord | None, region: Region, shape: tuple[int, ...]) -> None:
        found: dict[tuple[Coord | None, str], list[Strided]] = getattr(self, where)
        found.setdefault((place, region.key), []).append(strided(region.offset, region.strides, shape))

    def faults(self, side: str, verb: str, skip: Iterable[str] = ()) -> Iterator[str]:
        left_out = set(skip)
        for (place, key), elements in self.shapes.items():
            if key in left_out:
                continue
            boxes = self.once.get((place, key)) or self.verified.get((place, key), [])
            boxes = boxes + self.constant.get((place, key), [])
            at = f" at {place}" if place is not None else ""
            found = faults(boxes, elements)
            yield from (f"{side} {key}{at} ({elements:,} elements): {f}".replace("covered", verb) for f in found[:3])
            if len(found) > 3:
                yield f"{side} {key}{at}: and {len(found) - 3} more faults"


def prove(plan: Plan, *, source: Topology | None = None, target: Topology | None = None) -> Proof:
    """Account for every element of both sides of `plan`.

    Args:
        plan: A whole plan (no mesh on either side).
        source: Where given, the source is held by the ranks of this mesh, and replicas are read once.
        target: Where given, the target is held by the ranks of this mesh, and every replica is written in full.

    Returns:
        The proof, whose `faults` name tensors, ranks and element ranges.

    Raises:
        LayoutError: A size that a mesh does not divide.
        TopologyError: Layers that do not divide over the pipeline.
    """
    sources, targets = _places(source), _places(target)
    reads, writes = _Side(), _Side()
    padding: dict[str, int] = {}
    constants: dict[str, int] = {}
    tied: dict[str, int] = {}
    moved = 0
    per_place: dict[tuple[Coord | None, Coord | None], int] = {}
    for (out_of, source_mesh), (into, target_mesh) in product(sources, targets):
        part = plan.restrict(source=source_mesh, target=target_mesh)
        reads.tensors(out_of, part.source_tensors)
        writes.tensors(into, part.target_tensors)
        per_place[out_of, into] = part.elements
        for copy in part.copies:
            if not copy.source_replica and copy.kind != "verify":
                writes.add("once", into, copy.target, copy.shape)
            if not copy.target_replica and copy.kind != "tie":
                reads.add("verified" if copy.kind == "verify" else "once", out_of, copy.source, copy.shape)
            if not (copy.source_replica or copy.target_replica):
                moved += copy.elements if copy.kind == "move" else 0
                if copy.kind != "move":
                    tied[copy.rule] = tied.get(copy.rule, 0) + copy.elements
        if out_of == sources[0][0]:
            for fill in part.fills:
                writes.add("constant", into, fill.region, fill.shape)
                padding[fill.region.key] = padding.get(fill.region.key, 0) + (0 if fill.replica else fill.elements)
        if into == targets[0][0]:
            for fill in part.constants:
                reads.add("constant", out_of, fill.region, fill.shape)
                constants[fill.region.key] = constants.get(fill.region.key, 0) + (0 if fill.replica else fill.elements)
    broken = [
        *writes.faults(plan.target, "written"),
        *reads.faults(plan.source, "read", skip=plan.drops),
    ]
    return Proof(
        source=plan.source,
        target=plan.target,
        source_tensors=len({key for _, key in reads.shapes}) if source is None else len(plan.source_tensors),
        target_tensors=len({key for _, key in writes.shapes}) if target is None else len(plan.target_tensors),
        elements=moved,
        padding=padding,
        constants=constants,
        tied=tied,
        dropped=plan.drops,
        lost=plan.lost,
        rank_elements=_by_rank(per_place, source, target),
        faults=tuple(broken),
    )


def _places(topology: Topology | None) -> Places:
    if topology is None:
        return [(None, None)]
    return [(coord, Mesh(topology, coord)) for coord in topology.shards()]


def _by_rank(
    elements: Mapping[tuple[Coord | None, Coord | None], int], source: Topology | None, target: Topology | None
) -> tuple[int, ...]:
    """Elements of each rank, its model chunks added up."""
    topology = target or source
    if topology is None:
        return (sum(elements.values()),)
    totals = dict.fromkeys(topology.shards(), 0)
    for (out_of, into), count in elements.items():
        place = into if target else out_of
        assert place is not None
        totals[place] += count
    return tuple(sum(totals[shard] for shard in topology.chunks_of(coord)) for coord in topology.coords())
