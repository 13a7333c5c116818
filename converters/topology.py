"""Mesh sizes, rank coordinates, and which layers a pipeline stage holds.

A `Topology` is the whole mesh, a `Coord` one rank's (and one model chunk's) place in it, a `Mesh` the two together:
what a layout asks for the window that its rank holds of an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from converters.errors import LayoutError, TopologyError

MeshDim = Literal["tp", "pp", "cp", "ep", "etp", "dp"]
Stage = Literal["first", "last", "last-not-first"]
MESH_DIMS: tuple[str, ...] = ("tp", "pp", "cp", "ep", "etp", "dp")
STAGES: tuple[str, ...] = ("first", "last", "last-not-first")


@dataclass(frozen=True, kw_only=True, order=True)
class Coord:
    """Where a rank stands: its index along each mesh dim. `chunk` is the model chunk under interleaving (VPP).

    `etp`, `ep` and `edp` (replicas of an expert) are a second view of the same ranks as `tp`, `cp` and `dp`.
    """

    tp: int = 0
    pp: int = 0
    chunk: int = 0
    cp: int = 0
    ep: int = 0
    etp: int = 0
    edp: int = 0
    dp: int = 0

    def __str__(self) -> str:
        others = [name for name in ("chunk", "cp", "dp", "ep") if getattr(self, name)]
        return " ".join(f"{name}={getattr(self, name)}" for name in ("tp", "pp", *others))


@dataclass(frozen=True, kw_only=True)
class ModelChunk:
    """One contiguous run of layers `[start, stop)`: chunk `chunk` of pipeline stage `pp`."""

    pp: int
    chunk: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the parallel mesh, with Megatron-Core's rank order (tp fastest, then cp, ep, dp, and pp slowest).

    Args:
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        vpp: Model chunks per pipeline stage (virtual pipeline size); 1 is no interleaving.
        cp: Context-parallel size.
        ep: Expert-parallel size, folded into tp x cp x dp.
        etp: Tensor-parallel size inside an expert; `None` is the value of `tp`.
        dp: Data-parallel size.
        sp: Sequence parallelism. It moves activations only; weights do not depend on it.
        first_stage_layers: Layers on the first stage where it differs from the others
            (`num_layers_in_first_pipeline_stage`).
        last_stage_layers: Likewise for the last stage.
        count_embedding: Count the embedding as a layer of the first chunk (`account_for_embedding_in_pipeline_split`).
        count_loss: Count the output layer as a layer of the last chunk (`account_for_loss_in_pipeline_split`).

    Raises:
        TopologyError: A size below one, or a combination that Megatron-Core refuses.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/parallel_state.py `RankGenerator` and
        megatron/core/transformer/transformer_config.py `__post_init__`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    sp: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    count_embedding: bool = False
    count_loss: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "dp", "expert_tp"):
            if getattr(self, name) < 1:
                raise TopologyError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TopologyError(f"{name} must be at least 1 where it is set, found {getattr(self, name)}")
        if self.vpp > 1 and self.pp == 1:
            raise TopologyError(f"vpp={self.vpp} needs pp of at least 2: with one stage there is nothing to interleave")
        if self.sp and self.tp == 1:
            raise TopologyError("sequence parallelism needs tp of at least 2: it shards over the tensor-parallel group")
        uneven = self.first_stage_layers is not None or self.last_stage_layers is not None
        if uneven and (self.count_embedding or self.count_loss):
            raise TopologyError(
                "layers per first or last stage cannot be combined with counting the embedding or the loss as a layer"
            )
        if None not in (self.first_stage_layers, self.last_stage_layers) and self.pp == 2 and self.vpp > 1:
            raise TopologyError(
                "layers per first and last stage need a stage between them under interleaving: Megatron-Core divides "
                "by their number. Set one of the two"
            )
        if uneven and self.pp == 1:
            raise TopologyError("layers per first or last stage need pp of at least 2")
        if (self.tp * self.cp * self.dp) % (self.expert_tp * self.ep):
            raise TopologyError(
                f"ep={self.ep} x etp={self.expert_tp} must divide tp x cp x dp = {self.tp * self.cp * self.dp}"
            )

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size inside an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def world_size(self) -> int:
        """Ranks in the mesh."""
        return self.tp * self.pp * self.cp * self.dp

    def size(self, dim: str) -> int:
        """Size of the mesh dim named `dim`."""
        if dim not in MESH_DIMS:
            raise LayoutError(f"unknown mesh dim '/{dim}', expected one of {', '.join('/' + d for d in MESH_DIMS)}")
        return self.expert_tp if dim == "etp" else int(getattr(self, dim))

    def coord(self, rank: int) -> Coord:
        """The place of global rank `rank`, as Megatron-Core orders ranks (`tp-cp-ep-dp-pp`)."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is outside a world of {self.world_size}")
        within, pp = rank % (self.tp * self.cp * self.dp), rank // (self.tp * self.cp * self.dp)
        return Coord(
            tp=within % self.tp,
            cp=within // self.tp % self.cp,
            dp=within // (self.tp * self.cp),
            pp=pp,
            etp=within % self.expert_tp,
            ep=within // self.expert_tp % self.ep,
            edp=within // (self.expert_tp * self.ep),
        )

    def coords(self) -> tuple[Coord, ...]:
        """The place of every rank, in rank order (model chunk 0)."""
        return tuple(self.coord(rank) for rank in range(self.world_size))

    def chunks_of(self, coord: Coord) -> tuple[Coord, ...]:
        """The rank at `coord` once for each model chunk that it holds."""
        return tuple(replace(coord, chunk=chunk) for chunk in range(self.vpp))

    def shards(self) -> Iterator[Coord]:
        """Every (rank, model chunk) of the mesh, in rank order."""
        for coord in self.coords():
            yield from self.chunks_of(coord)

    def placement(self, layers: int) -> tuple[ModelChunk, ...]:
        """The model chunks in the order of the layers that they hold: all stages of chunk 0, then of chunk 1, ...

        Raises:
            TopologyError: The layers do not divide as Megatron-Core requires; the message names placements that do.

        Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/transformer_block.py
            `get_num_layers_to_build` and transformer_layer.py `get_transformer_layer_offset` (both alike in 0.19.2).
        """
        sizes = self._stage_sizes(layers)
        per_chunk = [size // self.vpp for size in sizes]
        out: list[ModelChunk] = []
        start = 0
        for chunk in range(self.vpp):
            for pp in range(self.pp):
                count = per_chunk[pp]
                count -= self.count_embedding and pp == 0 and chunk == 0
                count -= self.count_loss and pp == self.pp - 1 and chunk == self.vpp - 1
                out.append(ModelChunk(pp=pp, chunk=chunk, start=start, stop=start + count))
                start += count
        return tuple(out)

    def _stage_sizes(self, layers: int) -> list[int]:
        """Layers a pipeline stage, the embedding and the loss included where they are counted as layers."""
        total = layers + self.count_embedding + self.count_loss
        middle, stages = total, self.pp
        for fixed in (self.first_stage_layers, self.last_stage_layers):
            if fixed is not None:
                middle, stages = middle - fixed, stages - 1
        if middle < 0 or (stages == 0 and middle) or (stages and middle % stages):
            raise TopologyError(self._does_not_divide(layers, f"{middle} layers do not divide over {stages} stages"))
        sizes = [middle // stages if stages else 0] * self.pp
        if self.first_stage_layers is not None:
            sizes[0] = self.first_stage_layers
        if self.last_stage_layers is not None:
            sizes[-1] = self.last_stage_layers
        odd = [size for size in sizes if size % self.vpp]
        if odd:
            raise TopologyError(
                self._does_not_divide(layers, f"{odd[0]} layers of a stage do not divide over vpp={self.vpp} chunks")
            )
        return sizes

    def _does_not_divide(self, layers: int, why: str) -> str:
        counted = [name for name, on in (("embedding", self.count_embedding), ("loss", self.count_loss)) if on]
        with_counted = f" (with the {' and the '.join(counted)} counted as a layer)" if counted else ""
        return (
            f"{layers} layers{with_counted} do not fit pp={self.pp} vpp={self.vpp}: {why}. "
            "Set the layers of the first or last stage, or count the embedding and the loss as layers"
        )

    def evenly(self, layers: int) -> Topology:
        """This topology, or, where its layers do not divide, the same with the one even placement that does.

        Tried in order: as it stands, the loss and the embedding counted as a layer each, the loss alone, the embedding
        alone. A placement that was set explicitly is never changed.

        Raises:
            TopologyError: None of them divides.
        """
        explicit = self.first_stage_layers is not None or self.last_stage_layers is not None
        counts = [(self.count_embedding, self.count_loss)]
        if not explicit and counts == [(False, False)] and self.pp > 1:
            counts += [(True, True), (False, True), (True, False)]
        first: TopologyError | None = None
        for embedding, loss in counts:
            candidate = replace(self, count_embedding=embedding, count_loss=loss)
            try:
                candidate.placement(layers)
                return candidate
            except TopologyError as error:
                first = first or error
        assert first is not None
        raise first

    def query_groups(self, groups: int, heads_per_group: int) -> int:
        """The least number of key-value groups, `groups` or more, that Megatron-Core can cut over tp.

        More than `groups` means groups of zeros (ghosts): exact, and left zero by training.

        Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/attention.py `Attention.__init__`: tp divides
            the groups, or the groups divide tp and each rank takes its part of a group's query heads.
        """
        count = groups
        while count % self.tp and (self.tp % count or heads_per_group % (self.tp // count)):
            count += 1
        return count

    def whole_query_groups(self, groups: int) -> int:
        """The least number of key-value groups, `groups` or more, of which tp gives each rank as many whole ones.

        Source: NVIDIA/TransformerEngine v2.20.2, pytorch/attention/multi_head_attention.py `MultiheadAttention`: tp
            must divide the groups; no rank holds a part of one.
        """
        return -(-groups // self.tp) * self.tp

    def __str__(self) -> str:
        shown = [f"tp{self.tp}", f"pp{self.pp}"]
        shown += [f"{name}{getattr(self, name)}" for name in ("vpp", "cp", "ep", "dp") if getattr(self, name) > 1]
        shown += [f"etp{self.etp}"] if self.etp not in (None, self.tp) else []
        return "-".join(shown + ["sp"] * self.sp)


@dataclass(frozen=True)
class Mesh:
    """A topology seen from one place in it: which part of an axis is held there."""

    topology: Topology
    coord: Coord

    def window(self, dim: str, extent: int) -> tuple[int, int]:
        """The half-open range of an axis (or assembled dim) of `extent` elements that is held here under `/dim`.

        `pp` follows the layer placement; every other mesh dim cuts into equal parts.

        Raises:
            LayoutError: `extent` does not divide.
        """
        if dim == "pp":
            for chunk in self.topology.placement(extent):
                if (chunk.pp, chunk.chunk) == (self.coord.pp, self.coord.chunk):
                    return chunk.start, chunk.stop
            raise TopologyError(f"no pipeline stage at {self.coord} in {self.topology}")
        parts, index = self.topology.size(dim), int(getattr(self.coord, dim))
        if extent % parts:
            raise LayoutError(f"an extent of {extent} does not divide over {dim}={parts}")
        size = extent // parts
        return index * size, (index + 1) * size

    def holds(self, stage: str) -> bool:
        """Whether this model chunk is the pipeline's `first`, its `last`, or its last without being its first."""
        first = self.coord.pp == 0 and self.coord.chunk == 0
        last = self.coord.pp == self.topology.pp - 1 and self.coord.chunk == self.topology.vpp - 1
        return {"first": first, "last": last, "last-not-first": last and not first}[stage]
