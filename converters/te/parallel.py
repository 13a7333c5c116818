"""Tensor, sequence and context parallelism of the model: groups, padded sizes, vocabulary, and gradients.

Tensor parallelism cuts weights, context parallelism sequences; sequence parallelism cuts, between the GEMMs, the
activations that tensor parallelism would repeat on each of its ranks. Data-parallel ranks only replicate: what reduces
gradients over them (torch's DDP, say) is the user's.

    parallel = Parallel.of(Topology(tp=2, cp=2))            # every rank
    model = converters.te.convert.load(folder, parallel=parallel)
    model(**batch).loss.backward()
    reduce_gradients(model)                                   # before the optimizer, as Megatron's finalize_model_grads

A model that is trained from nothing wants another seed on each tensor-parallel rank, else their shards start alike; the
ranks along the other dims want the same.

Context parallelism takes `shift_labels`, shifted while the sequence was whole, and each rank's part of the batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from converters.errors import ConfigError, TopologyError
from converters.te.reference import distributed
from converters.te.vocabulary import VocabularyParallelEmbedding
from converters.topology import Coord, Topology

IGNORED = -100  # a label that counts for nothing, as in torch.nn.functional.cross_entropy

# Parameters that every tensor-parallel rank holds whole; under sequence parallelism each sees its tokens only.
REPLICATED = ("layer_norm_weight", "norm.weight", "proj.bias", "fc2_bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class Parallel:
    """Where this rank stands among those that share the model, and the groups that it speaks with.

    `Parallel()` is one rank alone: every method then returns what it was given.

    Attributes:
        topology: The mesh.
        coord: This rank's place in it.
        tp_group: The ranks that share each weight; `None` where tp is 1.
        cp_group: The ranks that share each sequence; `None` where cp is 1.
        cp_ranks: The global ranks of `cp_group`, in its order.
        cp_comm_type: How Transformer Engine's attention exchanges keys and values (`p2p`, `all_gather`, `a2a`). The
            reference gathers whichever it is.
    """

    topology: Topology = field(default_factory=Topology)
    coord: Coord = field(default_factory=Coord)
    tp_group: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None
    cp_ranks: tuple[int, ...] = (0,)
    cp_comm_type: str = "p2p"

    @classmethod
    def of(cls, topology: Topology, *, cp_comm_type: str = "p2p", timeout_minutes: float = 30) -> Parallel:
        """The groups of `topology` over `torch.distributed`'s default process group, as `topology` orders ranks.

        Collective: every rank of the default process group calls it.

        Args:
            topology: The mesh; its size is the world size. One rank needs no process group.
            cp_comm_type: See the attribute.
            timeout_minutes: How long a collective in these groups may take.

        Raises:
            TopologyError: A mesh that this model cannot have, no process group, or one of another size.
        """
        refused = {name: getattr(topology, name) for name in ("pp", "vpp", "ep") if getattr(topology, name) > 1}
        if refused:
            asked = ", ".join(f"{name}={size}" for name, size in refused.items())
            raise TopologyError(
                f"the Transformer Engine model runs under tp, cp, dp and sequence parallelism, found {asked} in "
                f"{topology}: the Megatron-Core column has pipelines"
            )
        if topology.world_size == 1:
            return cls(topology=topology)
        if not dist.is_initialized():
            raise TopologyError(
                f"{topology} needs a process group of {topology.world_size} ranks, and torch.distributed is not "
                "initialised: call torch.distributed.init_process_group first"
            )
        if (world := dist.get_world_size()) != topology.world_size:
            raise TopologyError(
                f"{topology} is a mesh of {topology.world_size} ranks, and this process group has {world}"
            )
        timeout = datetime.timedelta(minutes=timeout_minutes)
        tp_group, _ = _group_of(topology, "tp", timeout)
        cp_group, cp_ranks = _group_of(topology, "cp", timeout)
        return cls(
            topology=topology,
            coord=topology.coord(dist.get_rank()),
            tp_group=tp_group,
            cp_group=cp_group,
            cp_ranks=cp_ranks,
            cp_comm_type=cp_comm_type,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self  # a copy of a model stands at the same place and speaks with the same groups

    @property
    def tp_size(self) -> int:
        """Ranks that share each weight."""
        return self.topology.tp

    @property
    def tp_rank(self) -> int:
        """This rank's index among them."""
        return self.coord.tp

    @property
    def cp_size(self) -> int:
        """Ranks that share each sequence."""
        return self.topology.cp

    @property
    def cp_rank(self) -> int:
        """This rank's index among them."""
        return self.coord.cp

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between GEMMs are cut over `tp_group`."""
        return self.topology.sp

    @property
    def parts(self) -> int:
        """What the tokens of the layers' input have to divide into: tp under sequence parallelism, else 1."""
        return self.tp_size if self.sequence_parallel else 1

    def groups(self, config: Any) -> int:
        """Key-value groups that the layers are built with, over all ranks: the config's, and ghosts so that tp divides.

        Args:
            config: A Hugging Face Llama config, as are the others' here.
        """
        return self.topology.whole_query_groups(config.num_key_value_heads)

    def heads(self, config: Any) -> int:
        """Query heads that the layers are built with, over all ranks: the config's, and those of the ghost groups."""
        per_group: int = config.num_attention_heads // config.num_key_value_heads
        return self.groups(config) * per_group

    def vocabulary(self, config: Any) -> int:
        """Rows of the embedding over all ranks: the config's, and zeros so that tp divides."""
        rows: int = -(-config.vocab_size // self.tp_size) * self.tp_size
        return rows

    def check(self, config: Any) -> None:
        """Refuse a config whose sizes tp does not divide and that no padding helps.

        Raises:
            TopologyError: The intermediate size does not divide over tp.
        """
        if config.intermediate_size % self.tp_size:
            raise TopologyError(
                f"intermediate_size={config.intermediate_size} does not divide over tp={self.tp_size}: choose a tp "
                "that divides it (heads and vocabulary are padded, this is not)"
            )

    def layer_options(self) -> dict[str, Any]:
        """What a `TransformerLayer` is told of its tensor parallelism; nothing where tp is 1."""
        if self.tp_size == 1:
            return {}
        return {
            "tp_group": self.tp_group,
            "tp_size": self.tp_size,
            "set_parallel_mode": True,
            "sequence_parallel": self.sequence_parallel,
        }

    def head_options(self) -> dict[str, Any]:
        """What the `Linear` of the language-model head is told: its rows are cut; nothing where tp is 1."""
        if self.tp_size == 1:
            return {}
        return {"parallel_mode": "column", "tp_group": self.tp_group, "tp_size": self.tp_size}

    def norm_options(self) -> dict[str, Any]:
        """What the final `RMSNorm` is told; nothing without sequence parallelism."""
        return {"sequence_parallel": True} if self.sequence_parallel else {}

    def embedding(self, config: Any) -> torch.nn.Embedding:
        """The embedding, of this rank's rows where tp is above 1; its parameter `weight` is `[v/tp h]`."""
        if self.tp_size == 1:
            return torch.nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id, dtype=config.dtype)
        return VocabularyParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            config.pad_token_id,
            dtype=config.dtype,
            rows=self.vocabulary(config) // self.tp_size,
            group=self.tp_group,
        )

    def set_context(self, layers: Iterable[torch.nn.Module]) -> None:
        """Tell each `TransformerLayer` its context-parallel group; nothing where cp is 1."""
        if self.cp_group is None:
            return
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # one, as the layers take turns
        for layer in layers:
            layer.set_context_parallel_group(self.cp_group, list(self.cp_ranks), stream, self.cp_comm_type)  # type: ignore[operator]

    def split_tokens(self, hidden: Tensor) -> Tensor:
        """This rank's part of `hidden` along dim 0 under sequence parallelism.

        Dim 0 is what Transformer Engine's layers gather: tokens in `thd`, and in `bshd` whole sequences of the batch.

        Args:
            hidden: `[t h]` or `[b s h]`, equal on every rank of `tp_group`.

        Raises:
            ConfigError: tp does not divide dim 0.
        """
        if not self.sequence_parallel:
            return hidden
        if hidden.size(0) % self.tp_size:
            what, remedy = (
                ("tokens", "pad the packed sequences to a multiple")
                if hidden.dim() == 2
                else ("sequences of a batch", "the layers gather dim 0, which in bshd is the batch: use a multiple")
            )
            raise ConfigError(
                f"sequence parallelism cuts {hidden.size(0)} {what} over tp={self.tp_size}, which does not divide: "
                f"{remedy} of {self.tp_size}, or build the model without sequence parallelism: its weights are the same"
            )
        return distributed.split(hidden, self.tp_group)

    def gather_tokens(self, hidden: Tensor) -> Tensor:
        """The inverse of `split_tokens`: `hidden` of every rank of `tp_group`, along dim 0."""
        if not self.sequence_parallel:
            return hidden
        return distributed.join(hidden, self.tp_group)

    def gather_logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits of the whole vocabulary `[... vocab_size]`, without padding, from each rank's `[... v/tp]`."""
        if self.tp_size == 1:
            return logits
        return distributed.join(logits, self.tp_group, dim=-1)[..., :vocab_size]

    def count(self, labels: Tensor) -> Tensor:
        """Labels that count, over all parts of the sequences: what divides the sum of their losses. `[]` int64."""
        found = (labels != IGNORED).sum()
        if self.cp_group is not None:
            dist.all_reduce(found, group=self.cp_group)
        return found

    def sum_over_context(self, loss: Tensor) -> Tensor:
        """The sum over `cp_group` of each rank's share of a loss; backward, each rank sees the gradient of its own."""
        return distributed.reduce(loss, self.cp_group)


def clear_padding(model: torch.nn.Module, config: Any, parallel: Parallel) -> None:
    """Zero, in a model that was just initialised, the ghost groups and the rows that pad the vocabulary.

    Zeros they stay: they have no gradient. A checkpoint that is loaded writes them anyway.
    """
    groups, rows = parallel.groups(config), parallel.vocabulary(config)
    if (groups, rows) == (config.num_key_value_heads, config.vocab_size):
        return
    groups, rows = groups // parallel.tp_size, rows // parallel.tp_size
    per_group = config.num_attention_heads // config.num_key_value_heads
    real = max(config.num_key_value_heads - parallel.tp_rank * groups, 0)  # more than there are clear nothing
    words = max(config.vocab_size - parallel.tp_rank * rows, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm_qkv.weight", "layernorm_qkv.bias")):
                parameter[real * (per_group + 2) * config.head_dim :].zero_()
            elif name.endswith("proj.weight"):
                parameter[:, real * per_group * config.head_dim :].zero_()
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter[words:].zero_()


def reduce_gradients(model: torch.nn.Module, parallel: Parallel | None = None) -> None:
    """Add up, in place, the gradients that each rank has a part of: call it after backward, before the optimizer.

    Under context parallelism that is every parameter's, over the ranks that share the sequences; under sequence
    parallelism those of parameters that the tensor-parallel ranks hold whole, norms and biases after a row-parallel
    GEMM, as each rank saw its own tokens. Without either nothing happens. Collective over both groups.

    Args:
        model: A model of this package, or one that wraps it.
        parallel: Its parallelism; by default what it was built with.
    """
    held = (getattr(module, "parallel", None) for module in model.modules())
    parallel = parallel or next((one for one in held if isinstance(one, Parallel)), Parallel())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if parallel.cp_group is not None:
            dist.all_reduce(parameter.grad, group=parallel.cp_group)
        if parallel.sequence_parallel and name.endswith(REPLICATED):
            dist.all_reduce(parameter.grad, group=parallel.tp_group)


def _group_of(topology: Topology, dim: str, timeout: datetime.timedelta) -> tuple[ProcessGroup | None, tuple[int, ...]]:
    """This rank's group along a mesh dim, and the global ranks in it. Every rank makes every group, in one order."""
    here = dist.get_rank()
    if topology.size(dim) == 1:
        return None, (here,)
    members: dict[Coord, list[int]] = {}
    for rank, coord in enumerate(topology.coords()):
        members.setdefault(Coord(**{d: getattr(coord, d) for d in ("tp", "cp", "dp") if d != dim}), []).append(rank)
    found: tuple[ProcessGroup | None, tuple[int, ...]] = (None, ())
    for ranks in members.values():
        group = dist.new_group(ranks, timeout=timeout)
        if here in ranks:
            found = group, tuple(ranks)
    return found
