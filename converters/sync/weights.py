"""Weights from one live mesh of ranks to another, point to point: from training to serving, from one layout to another.

    sync = WeightSync(plan, source=Topology(tp=2, pp=2), target=Topology(tp=4))
    print(sync.schedule())                                  # who sends how much to whom; nothing has moved
    sync.run(training_chunks, serving_chunks)               # every rank, as often as there are new weights
    for name, tensor in sync.stream(training_chunks):       # or: whole tensors by name, on the serving ranks alone
        engine.load_weights([(name, tensor)])

The plan is `bridge.plan(provider).inverse()` towards Hugging Face's names, and otherwise what `columns.between` makes
of two such plans. No rank gathers: it sends of its tensors what each rank of the target needs (`resharding` says what),
in messages of at most `bucket_bytes` (`messages` says how). Messages are bytes: nothing is cast unless it is asked for.
All ranks of the group call the same methods in the same order. Before the first message they agree that all of them can
go through with it; else each raises what any of them found, and nothing has been written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from converters import collective, execute
from converters.errors import CheckpointError, ConfigError, TopologyError, listing
from converters.plan import Plan
from converters.proof import Proof
from converters.sync import ties
from converters.sync.messages import Dtypes, Tensors, Wire
from converters.sync.readiness import (
    Chunk,
    Ready,
    Stated,
    arguments_that_differ,
    cast_faults,
    held,
    made_dtypes,
    shared,
)
from converters.sync.resharding import Exchange, Held, Place, Schedule
from converters.tensors import ITEMSIZE
from converters.topology import Topology

BUCKET = 4 << 20


class WeightSync:
    """Moves the weights of one model between two meshes of the ranks of one process group.

    Args:
        plan: The whole plan from the column of the source to that of the target, each side with its own padding.
        source: The mesh that is read.
        target: The mesh that is written. Replicas (dp) are each written.
        source_ranks: The global rank at each place of `source`; by default the first ranks of the group.
        target_ranks: Likewise. The two may be the same ranks, others, or some of both.
        group: The process group, with every rank of either side in it; by default the default one.
        bucket_bytes: The most bytes of one message. A rank holds two in each direction.
        node: Ranks of one machine: of several holders of an element one on the receiver's machine sends it.

    Raises:
        TopologyError: Ranks that do not fit a mesh or that the group has not, or a mesh that the model does not fit.
        LayoutError: Sizes of the model that a mesh does not divide.
        PlanError: A plan that is restricted already.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        source: Topology,
        target: Topology,
        source_ranks: Sequence[int] | None = None,
        target_ranks: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET,
        node: int | None = None,
    ) -> None:
        widest = max(ITEMSIZE.values())
        if bucket_bytes < widest:
            raise ConfigError(f"bucket_bytes={bucket_bytes}, expected room for an element, {widest} bytes or more")
        self.group, self.bucket_bytes = group, bucket_bytes
        self.members, self.rank = collective.members(group), collective.rank()
        read, written = (
            Held(mesh, self.members[: mesh.world_size] if ranks is None else tuple(ranks))
            for mesh, ranks in ((source, source_ranks), (target, target_ranks))
        )
        self.exchange = Exchange(plan, read, written, node=node)
        strangers = sorted(set(self.exchange.ranks) - set(self.members))
        if strangers:
            raise TopologyError(f"ranks {strangers} are not in the process group, whose ranks are {list(self.members)}")
        self.exchange.check()
        self._ties = ties.TiedCopies(self.exchange)

    def prove(self) -> Proof:
        """Account for every element of both sides and of every message (see `Exchange.prove`). No communication."""
        return self.exchange.prove()

    def schedule(self, dtype: str = "bfloat16") -> Schedule:
        """Who sends how much to whom where all weights are of `dtype`. No communication."""
        return self.exchange.schedule(lambda _: ITEMSIZE[dtype], self.bucket_bytes)

    @torch.no_grad()
    def run(
        self,
        source_chunks: Sequence[Chunk] = (),
        target_chunks: Sequence[Chunk] = (),
        *,
        cast: bool = False,
        padding: str = "verify",
    ) -> Schedule:
        """Write the weights of the source into the tensors of the target. Collective over the group.

        Args:
            source_chunks: This rank's chunks of the source, in order; none on a rank that is not of it. Only read.
            target_chunks: Likewise of the target; their tensors exist already, with any content.
            cast: Allow dtypes to change, rounding to nearest even. What travels is the narrower of the two.
            padding: `verify`: rows and groups that only pad must still be zero in the source. `drop`: let go of what
                training made of them; the target's are zero in any case.

        Returns:
            What moved.

        Raises:
            CheckpointError: On every rank, what any rank found: tensors that are missing, misshapen, not contiguous or
                quantised, padding that is not zero, tied tensors that differ, a dtype change not asked for, arguments
                that differ between ranks. Nothing has been written then.
        """
        ready = self._agreed("run", source_chunks, target_chunks, cast=cast, padding=padding)
        self._fill(ready.written)
        self._wire(ready).transfer(self.exchange.moves, ready.read, ready.written, ready.dtypes)
        return self.exchange.schedule(ready.dtypes.itemsize, self.bucket_bytes)

    @torch.no_grad()
    def stream(
        self, source_chunks: Sequence[Chunk] = (), *, dtype: str | None = None, padding: str = "verify"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the target's tensors by name on the ranks of the target, and nothing on the others. Collective.

        Tensors are made and sent in groups of `bucket_bytes`, so a rank of the target holds one group at a time where
        its caller lets go of those before. Every rank exhausts the iterator, those that get nothing from it too.

        Args:
            source_chunks: As in `run`.
            dtype: Round to this dtype; by default tensors have that of what they are made of.
            padding: As in `run`.

        Raises:
            CheckpointError: As in `run`.
            TopologyError: A target with several chunks a rank, whose tensors share names.
        """
        if self.exchange.target.topology.vpp > 1:
            raise TopologyError(f"{self.exchange.target.topology} has chunks whose tensors share names: use run")
        ready = self._agreed("stream", source_chunks, (), cast=dtype is not None, padding=padding, dtype=dtype)
        wire, dtypes = self._wire(ready), ready.dtypes.written

        def nbytes(place: Place, key: str) -> int:
            return math.prod(self.exchange.writes(place).target_tensors[key]) * ITEMSIZE[dtypes[place][key]]

        for step in self.exchange.steps(nbytes, self.bucket_bytes):
            made: dict[Place, dict[str, torch.Tensor]] = {}
            for place in self.exchange.target.of(self.rank):
                shapes = self.exchange.writes(place).target_tensors
                made[place] = {
                    key: torch.empty(shapes[key], dtype=execute.dtype_of(dtypes[place][key]), device=wire.device)
                    for key in step.keys[place]
                }
            self._fill(made)
            wire.transfer(step.moves, ready.read, made, ready.dtypes)
            for tensors in made.values():
                yield from tensors.items()

    def _fill(self, written: Mapping[Place, Tensors]) -> None:
        """Write the constants, which nobody sends."""
        for place, tensors in written.items():
            for part in self.exchange.writes(place).fills:
                if part.region.key in tensors:
                    execute.fill(part, tensors[part.region.key])

    def _agreed(
        self,
        method: str,
        source_chunks: Sequence[Chunk],
        target_chunks: Sequence[Chunk],
        *,
        cast: bool,
        padding: str,
        dtype: str | None = None,
    ) -> Ready:
        """This rank's tensors and all ranks' dtypes, once every rank has found that it can go through with it.

        Raises:
            CheckpointError: On every rank, what any of them found.
        """
        own = Stated(arguments=self._arguments(method=method, cast=cast, padding=padding, dtype=dtype))
        read: dict[Place, dict[str, torch.Tensor]] = {}
        written: dict[Place, dict[str, torch.Tensor]] = {}
        try:
            read = held(self.exchange.source.of(self.rank), source_chunks, self.exchange.reads, "source", own)
            if method == "run":
                written = held(self.exchange.target.of(self.rank), target_chunks, self.exchange.writes, "target", own)
            own.faults += shared(read, written)
            if not own.faults:
                own.faults += self._strayed(read, padding)
                own.checksums = self._ties.checksums(read)
        except Exception as error:  # whatever it is, the others wait for word of it
            own.faults.append(f"{type(error).__name__}: {error}")
        own.faults = [f"rank {self.rank}: {fault}" for fault in own.faults]
        found = dict(zip(self.members, collective.everyone(own, self.group), strict=True))
        faults = arguments_that_differ(found) or [fault for theirs in found.values() for fault in theirs.faults]
        faults = faults or ties.faults([theirs.checksums for theirs in found.values()])
        if not faults:
            source = {place: found[place[0]].names["source", place[1].chunk] for place in self.exchange.source.places()}
            if method == "run":
                places = self.exchange.target.places()
                target = {place: found[place[0]].names["target", place[1].chunk] for place in places}
            else:
                target, faults = made_dtypes(self.exchange, source, dtype)
            dtypes = Dtypes(read=source, written=target)
            faults = faults or cast_faults(self.exchange, dtypes, cast=cast)
        if faults:
            raise CheckpointError(listing("the weights cannot be moved, nothing has been", set(faults)))
        return Ready(
            read=read, written=written, dtypes=dtypes, devices={d for one in found.values() for d in one.devices}
        )

    def _strayed(self, read: Mapping[Place, Tensors], padding: str) -> list[str]:
        """The padding of the source that training changed, where that matters."""
        if padding not in ("verify", "drop"):
            raise ConfigError(f"padding={padding!r}, expected 'verify' or 'drop'")
        return [
            f"{fault}; if training changed it, padding='drop' lets go of it"
            for place, tensors in read.items()
            if padding == "verify"
            for fault in execute.constant_faults(self.exchange.reads(place).constants, tensors.__getitem__)
        ]

    def _arguments(self, **of_call: object) -> dict[str, str]:
        """All that every rank must be called with alike."""
        plan, source, target = self.exchange.plan, self.exchange.source, self.exchange.target
        return {
            "columns": f"{plan.source} -> {plan.target}",
            "sizes": str(sorted(plan.sizes.items())),
            "features": str(sorted(plan.features)),
            "padding axes": str((sorted(plan.source_padding.items()), sorted(plan.target_padding.items()))),
            "source": f"{source.topology!r} at ranks {source.ranks}",
            "target": f"{target.topology!r} at ranks {target.ranks}",
            "bucket_bytes": str(self.bucket_bytes),
            "node": str(self.exchange.node),
            **{name: str(value) for name, value in of_call.items()},
        }

    def _wire(self, ready: Ready) -> Wire:
        device = collective.device_of(self.group, ready.devices)
        return Wire(
            group=self.group, ranks=self.exchange.ranks, rank=self.rank, device=device, bucket=self.bucket_bytes
        )
