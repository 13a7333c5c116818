"""Who sends what to whom when the weights of one mesh of ranks become those of another. Metadata only; no torch.

The plan between two columns, restricted to a place of the source mesh and a place of the target mesh, is what the one
holds of what the other needs. What several places hold alike is sent by one of them: by the receiver itself where it
is one of them, else by one of its node, else by the one that has sent least. So each element reaches each place that
needs it once, and what a place holds already does not travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from converters.errors import PlanError, TopologyError, near
from converters.plan import Copy, Piece, Plan, Region
from converters.proof import Proof
from converters.tiling import Strided, faults, strided
from converters.topology import Coord, Mesh, Topology

Place = tuple[int, Coord]
"""A rank, and where it stands for one of its model chunks."""


@dataclass(frozen=True)
class Held:
    """One side of an exchange: a mesh, and the rank at each of its places.

    Attributes:
        topology: The mesh.
        ranks: Global ranks in the order in which `topology` counts places.

    Raises:
        TopologyError: Another number of ranks than places, or a rank at two places.
    """

    topology: Topology
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranks) != self.topology.world_size or len(set(self.ranks)) != len(self.ranks):
            raise TopologyError(
                f"{self.topology} has {self.topology.world_size} places, expected as many different ranks, found "
                f"{list(self.ranks)}"
            )

    def places(self) -> Iterator[Place]:
        """Every place, in the order of ranks, those of one rank's chunks one after the other."""
        for index, rank in enumerate(self.ranks):
            for coord in self.topology.chunks_of(self.topology.coord(index)):
                yield rank, coord

    def of(self, rank: int) -> list[Place]:
        """The places of one rank, one a model chunk; none where it is not of this side."""
        return [place for place in self.places() if place[0] == rank]

    def mesh(self, place: Place) -> Mesh:
        """The mesh seen from a place."""
        return Mesh(self.topology, place[1])


@dataclass(frozen=True, slots=True)
class Move:
    """One strided box of elements from a chunk of one rank to a chunk of another, or of the same."""

    copy: Copy
    sender: Place
    receiver: Place

    @property
    def local(self) -> bool:
        """Whether it stays on its rank."""
        return self.sender[0] == self.receiver[0]


@dataclass(frozen=True)
class Step:
    """A part of an exchange that leaves no tensor half done.

    Attributes:
        moves: All moves into its tensors.
        keys: The tensors of each receiver.
    """

    moves: list[Move]
    keys: dict[Place, list[str]]


@dataclass(frozen=True)
class Exchange:
    """All moves between two meshes.

    Args:
        plan: A whole plan (no mesh on either side) between the two columns, each side with its own padding.
        source: The mesh that is read.
        target: The mesh that is written. The two may share ranks, all of them or some.
        node: Ranks of one machine, counted from rank 0; a holder on the receiver's machine is preferred. By default
            all ranks are equally near.
    """

    plan: Plan
    source: Held
    target: Held
    node: int | None = None
    _parts: dict[tuple[str, Coord], Plan] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.plan.source_mesh or self.plan.target_mesh:
            raise PlanError("the plan of an exchange is whole: it is the exchange that restricts it to ranks")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank of either side, in order."""
        return tuple(sorted({*self.source.ranks, *self.target.ranks}))

    def reads(self, place: Place) -> Plan:
        """The plan from one place of the source: the tensors that it holds, and its constants."""
        key = ("source", place[1])
        if key not in self._parts:
            self._parts[key] = self.plan.restrict(source=self.source.mesh(place))
        return self._parts[key]

    def writes(self, place: Place) -> Plan:
        """The plan to one place of the target: the tensors that it holds, and its constants."""
        key = ("target", place[1])
        if key not in self._parts:
            self._parts[key] = self.plan.restrict(target=self.target.mesh(place))
        return self._parts[key]

    def check(self) -> None:
        """See that each place of both meshes holds a part of the model.

        Raises:
            LayoutError: Sizes of the model that a mesh does not divide.
            TopologyError: Layers that do not divide over a pipeline.
        """
        shapes = [self.reads(members[0]).source_tensors for members in alike(self.plan, self.plan.source, self.source)]
        shapes += [
            self.writes(members[0]).target_tensors for members in alike(self.plan, self.plan.target, self.target)
        ]
        assert shapes

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Every move, receiver by receiver, tensor by tensor."""
        sources = alike(self.plan, self.plan.source, self.source)
        targets = alike(self.plan, self.plan.target, self.target)
        needed: list[tuple[list[tuple[Copy, list[Place]]], Place]] = []
        for receivers in targets:
            held: dict[tuple[Region, tuple[int, ...]], list[tuple[Copy, list[Place]]]] = {}
            for senders in sources:
                here, there = self.source.mesh(senders[0]), self.target.mesh(receivers[0])
                for copy in self.plan.restrict(source=here, target=there).copies:
                    if copy.kind != "verify":
                        held.setdefault((copy.target, copy.shape), []).append((copy, senders))
            needed += [(holders, receiver) for receiver in receivers for holders in held.values()]
        return self._assigned(needed)

    def _assigned(self, needed: Sequence[tuple[list[tuple[Copy, list[Place]]], Place]]) -> tuple[Move, ...]:
        """For each need one of its holders; the largest needs choose first, so that the small ones even out."""
        sent = dict.fromkeys(self.source.ranks, 0)
        chosen: dict[int, Move] = {}
        for index in sorted(range(len(needed)), key=lambda index: -needed[index][0][0][0].elements):
            holders, receiver = needed[index]
            copy, sender = min(
                ((copy, sender) for copy, senders in holders for sender in senders),
                key=lambda found: (*self._distance(found[1][0], receiver[0]), sent[found[1][0]]),
            )
            move = chosen[index] = Move(copy, sender, receiver)
            sent[sender[0]] += 0 if move.local else copy.elements
        return tuple(chosen[index] for index in range(len(needed)))

    def _distance(self, sender: int, receiver: int) -> tuple[bool, bool]:
        return sender != receiver, self.node is not None and sender // self.node != receiver // self.node

    def steps(self, nbytes: Callable[[Place, str], int], bucket: int) -> list[Step]:
        """The moves in groups that each fill whole tensors, of at most `bucket` bytes a receiver or one tensor.

        Args:
            nbytes: The size of a tensor of a receiver.
            bucket: Bytes of one group.
        """
        at: dict[tuple[Place, str], int] = {}
        for place in self.target.places():
            step = held = 0
            for key in self.writes(place).target_tensors:
                size = nbytes(place, key)
                if held and held + size > bucket:
                    step, held = step + 1, 0
                at[place, key], held = step, held + size
        steps = [
            Step([], {place: [] for place in self.target.places()}) for _ in range(max(at.values(), default=-1) + 1)
        ]
        for (place, key), step in at.items():
            steps[step].keys[place].append(key)
        for move in self.moves:
            steps[at[move.receiver, move.copy.target.key]].moves.append(move)
        return steps

    def explain(self, rank: int, key: str, chunk: int = 0) -> list[str]:
        """What tensor `key` of a rank of the target is made of, and which rank each part comes from.

        Raises:
            PlanError: The rank is not of the target, or holds no such tensor.
        """
        places = [place for place in self.target.of(rank) if place[1].chunk == chunk]
        if not places:
            raise PlanError(
                f"rank {rank} has no chunk {chunk} of the target, whose ranks are {list(self.target.ranks)}"
            )
        part = self.writes(places[0])
        if key not in part.target_tensors:
            raise PlanError(f"rank {rank} has no {self.plan.target} tensor {key!r}{near(key, part.target_tensors)}")
        parts = [(fill.region.offset, str(Piece(fill))) for fill in part.fills if fill.region.key == key]
        for move in self.moves:
            if move.receiver == places[0] and move.copy.target.key == key:
                where = "held here" if move.local else f"from rank {move.sender[0]} ({move.sender[1]})"
                parts.append((move.copy.target.offset, f"{Piece(move.copy)}, {where}"))
        return [text for _, text in sorted(parts)]

    def prove(self) -> Proof:
        """Account for every element: of the plan between the two meshes, and of these moves.

        The first says that the two meshes hold the same model; the second that what is sent, with the constants that
        are filled in, covers every tensor of every receiver exactly once.

        Raises:
            LayoutError, TopologyError: A mesh that does not fit the model.
        """
        proof = self.plan.prove(source=self.source.topology, target=self.target.topology)
        written: dict[tuple[Place, str], list[Strided]] = {}
        for move in self.moves:
            box = strided(move.copy.target.offset, move.copy.target.strides, move.copy.shape)
            written.setdefault((move.receiver, move.copy.target.key), []).append(box)
        found = []
        for place in self.target.places():
            part = self.writes(place)
            for fill in part.fills:
                box = strided(fill.region.offset, fill.region.strides, fill.shape)
                written.setdefault((place, fill.region.key), []).append(box)
            for key, shape in part.target_tensors.items():
                wrong = faults(written.get((place, key), ()), math.prod(shape))
                found += [f"rank {place[0]} ({place[1]}), {key}: {fault}" for fault in wrong]
        return replace(proof, faults=(*proof.faults, *found))

    def schedule(self, itemsize: Callable[[Move], int], bucket: int) -> Schedule:
        """What travels between which ranks, for elements of `itemsize` bytes in messages of at most `bucket` bytes."""
        pairs: dict[tuple[int, int], int] = {}
        local: dict[int, int] = {}
        for move in self.moves:
            nbytes = move.copy.elements * itemsize(move)
            if move.local:
                local[move.sender[0]] = local.get(move.sender[0], 0) + nbytes
            else:
                pair = move.sender[0], move.receiver[0]
                pairs[pair] = pairs.get(pair, 0) + nbytes
        return Schedule(ranks=self.ranks, pairs=pairs, local=local, bucket=bucket)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What travels.

    Attributes:
        ranks: Every rank that takes part, in order.
        pairs: Bytes from a rank to another.
        local: Bytes that a rank copies from itself.
        bucket: The most bytes of one message.
    """

    ranks: tuple[int, ...]
    pairs: Mapping[tuple[int, int], int]
    local: Mapping[int, int]
    bucket: int

    @property
    def bytes(self) -> int:
        """Bytes that travel."""
        return sum(self.pairs.values())

    def __str__(self) -> str:
        lines = [
            f"{self.bytes:,} bytes between {len(self.pairs)} pairs of {len(self.ranks)} ranks, in messages of at most "
            f"{self.bucket:,} bytes; {sum(self.local.values()):,} bytes stay on their rank"
        ]
        lines += [f"  rank {sender} -> rank {receiver}: {n:,} bytes" for (sender, receiver), n in self.pairs.items()]
        return "\n".join(lines)


def alike(plan: Plan, column: str, side: Held) -> list[list[Place]]:
    """The places of a side, those together that hold the same."""
    cuts = {dim for row in plan.rules for layout in plan.table.layouts(row, column) for dim in layout.cuts}
    dims = sorted(cuts) + ["chunk"] * ("pp" in cuts)
    groups: dict[tuple[int, ...], list[Place]] = {}
    for place in side.places():
        groups.setdefault(tuple(getattr(place[1], dim) for dim in dims), []).append(place)
    return list(groups.values())
