"""`GPTModelProvider`: a Megatron-Core config that builds its own model, with the names Megatron-Bridge users know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from converters.errors import ConfigError
from converters.megatron import parallel, rope, runtime, specs
from converters.topology import Topology

Hook = Callable[[list[MegatronModule]], "list[MegatronModule] | None"]
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Hooks(list[Hook]):
    """Hooks of a provider. Megatron-Core deep-copies its config in places, and a bound method would copy its owner."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        return self


@dataclass
class GPTModelProvider(TransformerConfig):  # type: ignore[misc]  # megatron-core is untyped
    """What a GPT model is and how it is laid out over ranks.

    A plain data object until `finalize`: parallel sizes and dtypes may be set on it after construction, and only then
    are they checked and completed. Fields of `TransformerConfig` keep Megatron-Core's defaults.

    Args:
        share_embeddings_and_output_weights: The head is the transposed embedding.
        make_vocab_size_divisible_by: Each rank's share of the vocabulary is a multiple of this.
        should_pad_vocab: Pad the vocabulary to a multiple of `make_vocab_size_divisible_by` x tp.
        position_embedding_type: Only `"rope"`.
        rotary_base: Theta.
        rotary_percent: Share of a head's channels that are rotated.
        rope_scaling: Llama 3.1's scaling of frequencies.
        rope_scaling_factor: Its factor.
        rope_low_freq_factor: Its `low_freq_factor`.
        rope_high_freq_factor: Its `high_freq_factor`.
        rope_original_max_position_embeddings: Its context length before scaling, in tokens.
        seq_len_interpolation_factor: Positions are divided by this (linear RoPE scaling).
        seq_length: The longest sequence, in tokens.
        max_position_embeddings: The longest sequence that the HF model states, whatever `seq_length` is.
        vocab_size: Vocabulary without padding.
        parallel_output: Leave each rank its part of the logits. Training needs it.
        fp16_lm_cross_entropy: Passed to Megatron-Core.
        zero_biases: With `add_bias_linear`, which biases are zeros because the HF model has none there. It does not
            change the model; it is kept so that an export knows what to leave out.
        ghost_query_groups: Key-value groups of zeros among `num_query_groups` (see `pad_query_groups`).
        layer_spec: `"te"`, `"local"`, or `"auto"`: Transformer Engine on a GPU, local layers without one.

    Source: NVIDIA-NeMo/Megatron-Bridge 0.6, src/megatron/bridge/models/gpt_provider.py `GPTModelProvider` (names).
    """

    share_embeddings_and_output_weights: bool = True
    make_vocab_size_divisible_by: int = 1
    should_pad_vocab: bool = True
    position_embedding_type: Literal["rope"] = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    seq_len_interpolation_factor: float | None = None
    seq_length: int = 1024
    max_position_embeddings: int | None = None
    vocab_size: int | None = None
    parallel_output: bool = True
    fp16_lm_cross_entropy: bool = False
    zero_biases: Literal["none", "mlp", "attention"] = "none"
    ghost_query_groups: int = 0
    layer_spec: specs.LayerSpec = "auto"
    _hooks: _Hooks = field(default_factory=_Hooks, init=False, repr=False)

    def __post_init__(self) -> None:
        """Nothing yet: the parallel sizes may still change. See `finalize`."""

    def finalize(self) -> None:
        """Complete and check the config, Megatron-Core's own checks included. May be called again after a change.

        Raises:
            ConfigError: Fields that contradict each other, or that this provider does not build.
            TopologyError: Parallel sizes that the model cannot have.
        """
        self._check()
        self._settle_dtypes()
        if specs.resolve(self.layer_spec) == "local":
            for name, value in specs.WITHOUT_FUSED_KERNELS.items():
                setattr(self, name, value)
            self.transformer_impl = "local"
        if self.virtual_pipeline_model_parallel_size == 1:
            self.virtual_pipeline_model_parallel_size: int | None = None  # Megatron-Core takes 1 for interleaving
        if self.pipeline_model_parallel_size > 1:
            if self.pipeline_dtype is None:
                self.pipeline_dtype: torch.dtype | None = self.params_dtype
            if self.virtual_pipeline_model_parallel_size is not None:
                # With two stages the next and the previous rank are the same: batched, an activation and a gradient in
                # flight between them can be taken for one another, and the gradients are wrong without an error.
                self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        self.topology.placement(self.num_layers)
        try:
            super().__post_init__()
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"Megatron-Core refuses this config: {error}") from error

    def _check(self) -> None:
        problems = []
        if self.pipeline_model_parallel_layout is not None:
            problems.append(
                f"pipeline_model_parallel_layout={self.pipeline_model_parallel_layout!r} is not supported yet: use "
                "num_layers_in_first/last_pipeline_stage or account_for_embedding/loss_in_pipeline_split"
            )
        if self.vocab_size is None:
            problems.append("vocab_size is not set")
        tp = self.tensor_model_parallel_size
        if self.ffn_hidden_size is not None and self.ffn_hidden_size % tp:
            problems.append(f"a feed-forward width of {self.ffn_hidden_size} does not divide over tp={tp}")
        if self.position_embedding_type != "rope":
            problems.append(f"position_embedding_type must be 'rope', found {self.position_embedding_type!r}")
        if self.rope_scaling and self.seq_len_interpolation_factor is not None:
            problems.append("rope_scaling (Llama 3) and seq_len_interpolation_factor (linear) exclude each other")
        if problems:
            raise ConfigError("this model cannot be built:\n  " + "\n  ".join(problems))

    def _settle_dtypes(self) -> None:
        """Bring `fp16`, `bf16` and `params_dtype` into agreement: a flag decides, or the dtype where no flag is set."""
        flags = [name for name in HALF if getattr(self, name)]
        if len(flags) > 1:
            raise ConfigError("fp16 and bf16 exclude each other, and both are set")
        if flags and self.params_dtype not in (torch.float32, HALF[flags[0]]):
            raise ConfigError(f"{flags[0]}=True contradicts params_dtype={self.params_dtype}")
        if flags:
            self.params_dtype: torch.dtype = HALF[flags[0]]
        for name, dtype in HALF.items():
            setattr(self, name, self.params_dtype == dtype)

    def pad_query_groups(self) -> int:
        """Add as many key-value groups of zeros as it takes for heads to divide over tensor parallelism.

        Exact: a group of zeros adds zeros to the residual stream, has no gradient, and stays zero in training. Call it
        when the parallel sizes are set and before `finalize`.

        Returns:
            The number of groups added, now `ghost_query_groups`.
        """
        groups = self.num_query_groups - self.ghost_query_groups
        per_group = self.num_attention_heads // self.num_query_groups
        self.num_query_groups: int = self.topology.query_groups(groups, per_group)
        self.num_attention_heads: int = self.num_query_groups * per_group
        self.ghost_query_groups = self.num_query_groups - groups
        return self.ghost_query_groups

    @property
    def topology(self) -> Topology:
        """The mesh that the parallel sizes describe; data parallelism fills the world where there is one.

        Raises:
            TopologyError: Sizes that do not form a mesh, or do not divide the world.
        """
        vpp = self.virtual_pipeline_model_parallel_size
        tp, pp, cp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size
        dp = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            dp = max(1, torch.distributed.get_world_size() // (tp * pp * cp))
        return Topology(
            tp=tp,
            pp=pp,
            vpp=1 if vpp is None else vpp,
            cp=cp,
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
            dp=dp,
            sp=self.sequence_parallel,
            first_stage_layers=self.num_layers_in_first_pipeline_stage,
            last_stage_layers=self.num_layers_in_last_pipeline_stage,
            count_embedding=self.account_for_embedding_in_pipeline_split,
            count_loss=self.account_for_loss_in_pipeline_split,
        )

    @topology.setter
    def topology(self, mesh: Topology) -> None:
        self.tensor_model_parallel_size = mesh.tp
        self.pipeline_model_parallel_size = mesh.pp
        self.virtual_pipeline_model_parallel_size = mesh.vpp if mesh.vpp > 1 else None
        self.context_parallel_size = mesh.cp
        self.expert_model_parallel_size = mesh.ep
        self.expert_tensor_parallel_size = mesh.etp
        self.sequence_parallel = mesh.sp
        self.num_layers_in_first_pipeline_stage = mesh.first_stage_layers
        self.num_layers_in_last_pipeline_stage = mesh.last_stage_layers
        self.account_for_embedding_in_pipeline_split = mesh.count_embedding
        self.account_for_loss_in_pipeline_split = mesh.count_loss

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks.

        Raises:
            ConfigError: No vocabulary, or one that does not divide and may not be padded.
        """
        if self.vocab_size is None:
            raise ConfigError("vocab_size is not set")
        multiple: int = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        if self.should_pad_vocab:
            return -(-self.vocab_size // multiple) * multiple
        if self.vocab_size % self.tensor_model_parallel_size:
            raise ConfigError(
                f"a vocabulary of {self.vocab_size} does not divide over tp={self.tensor_model_parallel_size}: "
                "set should_pad_vocab=True"
            )
        return self.vocab_size

    def initialize_model_parallel(self, seed: int = 1234) -> None:
        """Create Megatron-Core's process groups for this topology and seed its generators. Collective."""
        parallel.initialize(self.topology, seed=seed)

    def register_pre_wrap_hook(self, hook: Hook) -> None:
        """Have `hook` called, in order of registration, with the bare model chunks before they are wrapped.

        It may change them in place and return `None`, or return other ones.
        """
        self._hooks.append(hook)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one model chunk of this rank. The provider is its config and must be finalised.

        Args:
            pre_process: Whether it has the embedding; by default where the pipeline says so.
            post_process: Whether it has the final norm and the head; likewise.
            vp_stage: Which model chunk, under interleaving.
        """
        runtime.require()
        topology, stage = self.topology, parallel_state.get_pipeline_model_parallel_rank()
        chunk = vp_stage or 0
        if pre_process is None:
            pre_process = stage == 0 and chunk == 0
        if post_process is None:
            post_process = stage == topology.pp - 1 and chunk == topology.vpp - 1
        model = GPTModel(
            config=self,
            transformer_layer_spec=specs.block_spec(self, vp_stage=vp_stage, pp_rank=stage),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            vp_stage=vp_stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        # Megatron-Core takes only the factor of Llama 3's scaling and hard-codes the rest, and for the linear one
        # multiplies positions by a rounded 1/factor. So frequencies are set, always, before a forward caches angles.
        model.rotary_pos_emb.inv_freq = rope.frequencies_of(self).to(torch.cuda.current_device())
        return model

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        *,
        wrap_with_ddp: bool = False,
        mixed_precision_wrapper: Callable[[Any, MegatronModule], MegatronModule] | None = Float16Module,
        pre_wrap_hook: Hook | Sequence[Hook] | None = None,
    ) -> list[MegatronModule]:
        """Build this rank's model chunks: finalise, initialise parallel state if need be, build, hook, wrap.

        Args:
            ddp_config: How Megatron-Core's DDP reduces gradients.
            wrap_with_ddp: Wrap each chunk in it.
            mixed_precision_wrapper: Wraps each chunk under fp16 or bf16; `None` leaves it bare.
            pre_wrap_hook: Used in place of the registered hooks.

        Returns:
            One module for each model chunk, in order.

        Raises:
            ConfigError: `wrap_with_ddp` without `ddp_config`.
        """
        if wrap_with_ddp and ddp_config is None:
            raise ConfigError("wrap_with_ddp=True needs ddp_config, a megatron.core DistributedDataParallelConfig")
        self.finalize()
        if not parallel_state.is_initialized():
            self.initialize_model_parallel()
        vpp = self.virtual_pipeline_model_parallel_size
        stages: list[int | None] = [None] if vpp is None else list(range(vpp))
        chunks: list[MegatronModule] = [self.provide(vp_stage=stage) for stage in stages]
        hooks = self._hooks if pre_wrap_hook is None else pre_wrap_hook
        for hook in [hooks] if callable(hooks) else hooks:
            chunks = hook(chunks) or chunks
        for chunk in chunks:
            parallel.mark_cuts(chunk)
            for parameter in chunk.parameters():
                set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            chunk.to(torch.cuda.current_device())
        if self.params_dtype in HALF.values() and mixed_precision_wrapper is not None:
            chunks = [mixed_precision_wrapper(self, chunk) for chunk in chunks]
        if wrap_with_ddp:
            chunks = [
                # Chunks after the first reduce while earlier ones still compute, so only the first may be bucketed.
                DistributedDataParallel(self, ddp_config, chunk, disable_bucketing=index > 0)
                for index, chunk in enumerate(chunks)
            ]
        return chunks


def unwrap(chunk: MegatronModule) -> GPTModel:
    """The model inside its wrappers (`Float16Module`, DDP)."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
