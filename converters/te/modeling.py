"""The Llama model on Transformer Engine layers: one file for real layers and for their reference.

Source: NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/modeling_llama_te.py, for names and arguments;
    transformers 5.23.0, models/llama/modeling_llama.py, for what is computed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from converters.te.angles import RotaryAngles
from converters.te.arrangement import Arrangement, InputError, arrange, packed
from converters.te.cache_step import cached
from converters.te.config import NVLlamaConfig
from converters.te.generation import CachedGeneration
from converters.te.layers import layers_for
from converters.te.parallel import Parallel, clear_padding
from converters.te.precision import TOKENS_MULTIPLE, Precision
from converters.te.pretrained import NVLlamaPreTrainedModel, dtype_of, mark_started, normal, place_of

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens_q_padded", "cu_seq_lens_k_padded", "pad_between_seqs")
LENGTHS = ("max_length_q", "max_length_k")


class NVLlamaModel(NVLlamaPreTrainedModel):
    """The decoder: embedding, layers, final norm.

    Args:
        config: The model.
        fp8_recipe: Recipe of the layers that `config.layer_precision` calls `fp8`; of all layers where it is `None`.
        fp4_recipe: Recipe of those that it calls `fp4`.
        parallel: This rank's groups; `None` is one rank alone.
        device: Where the layers are to run, which decides what they are; by default a GPU where there is one.

    Raises:
        RecipeError: Recipes that do not fit `config.layer_precision`.
        TopologyError: Sizes that do not divide over the ranks.
    """

    def __init__(
        self,
        config: NVLlamaConfig,
        fp8_recipe: Any = None,
        fp4_recipe: Any = None,
        *,
        parallel: Parallel | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config)
        self.parallel = parallel or Parallel()
        self.parallel.check(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.te_layers = layers_for(device)
        self.precision = Precision.resolve(config, fp8_recipe, fp4_recipe)
        place = place_of(self.te_layers, device)
        with torch.device(place):
            self.embed_tokens = self.parallel.embedding(config)
        self.layers = nn.ModuleList(self._layer(index, place) for index in range(config.num_hidden_layers))
        self.norm = self.te_layers.RMSNorm(
            config.hidden_size,
            eps=config.rms_norm_eps,
            dtype=dtype_of(config),
            device=place,
            **self.parallel.norm_options(),
        )
        self.rotary_emb = RotaryAngles(config)
        self.gradient_checkpointing = False
        self.parallel.set_context(self.layers)
        mark_started(self)
        self.post_init()  # type: ignore[no-untyped-call]
        clear_padding(self, config, self.parallel)

    def _layer(self, index: int, place: torch.device) -> nn.Module:
        config: Any = self.config
        with self.get_autocast_context(index, init=True):
            return self.te_layers.TransformerLayer(
                hidden_size=config.hidden_size,
                ffn_hidden_size=config.intermediate_size,
                num_attention_heads=self.parallel.heads(config),
                num_gqa_groups=self.parallel.groups(config),
                kv_channels=config.head_dim,
                layernorm_epsilon=config.rms_norm_eps,
                hidden_dropout=0.0,
                attention_dropout=config.attention_dropout or 0.0,
                init_method=normal(config),
                output_layer_init_method=normal(config),
                layer_number=index + 1,
                params_dtype=dtype_of(config),
                device=place,
                bias=config.te_bias,
                fuse_qkv_params=True,
                qkv_weight_interleaved=True,
                normalization="RMSNorm",
                activation=config.te_activation,
                attn_input_format=config.attn_input_format,
                self_attn_mask_type=config.self_attn_mask_type,
                **self.parallel.layer_options(),
            )

    def get_autocast_context(
        self, layer_number: int | None, init: bool = False, outer: bool = False
    ) -> AbstractContextManager[Any]:
        """The context of layer number `layer_number` (from 0): to run in, to be built in (`init`), or of all layers.

        Source: the recipe's method of this name.
        """
        if outer or layer_number is None:
            return self.precision.around(self.te_layers)
        if init:
            return self.precision.building(layer_number, self.te_layers)
        return self.precision.running(layer_number, self.te_layers)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: `[b s]`; packed, `[1 t]`.
            attention_mask: `[b s]`, 1 for a token and 0 for padding, on any side; with a cache, also of what it holds.
                Not looked at where `cu_seq_lens_q` says where sequences are.
            position_ids: `[b s]` or `[1 s]`; counted from the first token by default.
            past_key_values: A cache, `InferenceParams`: see `generation.cache_for`.
            inputs_embeds: `[b s h]` in the place of `input_ids`.
            use_cache: Whether a cache is wanted; it has to be given.
            **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `cu_seq_lens_q_padded`, `cu_seq_lens_k_padded` (`[n + 1]`
                int32), `max_length_q`, `max_length_k` and `pad_between_seqs`, of packed sequences (thd);
                `output_hidden_states`; `is_first_microbatch`.

        Returns:
            `last_hidden_state` `[b s h]`, zero at padding; `hidden_states` of the embedding, of each layer but the
            last, and of the final norm, each of that shape.

        Raises:
            InputError: Inputs that the layers cannot compute as asked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("You must specify exactly one of input_ids or inputs_embeds")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise InputError("output_attentions: the layers do not give out attention probabilities")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        embedded = inputs_embeds if inputs_embeds.dim() == 3 else inputs_embeds[None]
        arrangement = self._arrange(embedded, attention_mask, position_ids, past_key_values, use_cache, kwargs)
        angles = self.rotary_emb(arrangement.positions)
        options = dict(arrangement.options)
        if kwargs.get("is_first_microbatch") is not None:
            options["is_first_microbatch"] = kwargs["is_first_microbatch"]
        everything = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        states: list[Tensor] = [embedded] if everything else []

        def back(made: Tensor) -> Tensor:
            return arrangement.leave(self.parallel.gather_tokens(made))

        hidden = self.parallel.split_tokens(arrangement.enter(embedded))
        with self.get_autocast_context(None, outer=True):
            for index, layer in enumerate(self.layers):
                if everything and index:
                    states.append(back(hidden))
                hidden = self._run(index, layer, hidden, rotary_pos_emb=angles, **options)
        last = back(self.norm(hidden))
        if everything:
            states.append(last)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if everything else None,
        )

    def _run(self, index: int, layer: nn.Module, hidden: Tensor, **options: Any) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            with self.get_autocast_context(index):
                made: Tensor = layer(hidden, **options)
                return made

        if not (self.gradient_checkpointing and self.training):
            return run(hidden)
        if self.precision.delayed:
            raise InputError(
                "gradient checkpointing under delayed scaling would record amaxes twice a step: take a recipe that "
                "scales by the current tensor, or gradient_checkpointing_disable()"
            )
        if "inference_params" in options:
            raise InputError("gradient checkpointing would write the cache twice: call eval(), or pass no cache")
        made: Tensor = self._gradient_checkpointing_func(run, hidden)
        return made

    def _arrange(
        self,
        embedded: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        given: dict[str, Any],
    ) -> Arrangement:
        rows, columns = embedded.shape[:2]
        layout, cp_size = self.config.attn_input_format, self.parallel.cp_size
        boundaries = {name: given[name] for name in (*PACKED, *LENGTHS) if given.get(name) is not None}
        # A padded batch may come with its longest length (the recipe's bshd collator): the layers see it themselves.
        is_packed = any(name in boundaries for name in PACKED) or (layout == "thd" and bool(boundaries))
        if cache is not None and not hasattr(cache, "pre_step"):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}; these layers keep keys and values in InferenceParams: "
                "pass converters.te.generation.cache_for(model, ...)"
            )
        if cache is None and use_cache:
            raise InputError(
                "use_cache=True without past_key_values: the cache is allocated before the first call, pass "
                "converters.te.generation.cache_for(model, max_batch_size=..., max_sequence_length=...)"
            )
        if cache is not None and (is_packed or cp_size > 1 or not self.config.self_attn_mask_type.endswith("causal")):
            raise InputError(
                "a cache takes a batch [b s] of a causal model, neither packed nor under context parallelism"
            )
        if cache is not None and self.parallel.sequence_parallel:
            raise InputError(
                "a cache under sequence parallelism: a step has too few tokens to cut over the ranks. Build the model "
                "without it to generate (the weights are the same), or pass use_cache=False"
            )
        if is_packed:
            if layout != "thd" or rows != 1:
                raise InputError(
                    f"{sorted(boundaries)} describe packed sequences, [1 t] with attn_input_format='thd'; found "
                    f"[{rows} {columns}] with {layout!r}"
                )
            return packed(columns, embedded.device, given=boundaries, position_ids=position_ids, cp_size=cp_size)
        if cache is not None:
            return cached(
                rows,
                columns,
                embedded.device,
                cache,
                layout=layout,
                attention_mask=attention_mask,
                position_ids=position_ids,
                multiple=TOKENS_MULTIPLE if self.precision.quantized else 1,
            )
        return arrange(
            rows,
            columns,
            embedded.device,
            layout=layout,
            mask_type=self.config.self_attn_mask_type,
            attention_mask=attention_mask,
            position_ids=position_ids,
            multiple=self._multiple(layout),
            cp_size=cp_size,
        )

    def _multiple(self, layout: str) -> int:
        """Of which the tokens of a batch are to be: on each sequence-parallel rank what quantised GEMMs want."""
        if layout == "bshd" and not self.precision.quantized:
            return 1  # sequence parallelism cuts the rows of a batch there, which more columns do not help
        return (TOKENS_MULTIPLE if self.precision.quantized else 1) * self.parallel.parts


class NVLlamaForCausalLM(NVLlamaPreTrainedModel, CachedGeneration, GenerationMixin):
    """The decoder with a language-model head, which is never quantised. See `NVLlamaModel` for the arguments."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # an instance variable there

    def __init__(
        self,
        config: NVLlamaConfig,
        fp8_recipe: Any = None,
        fp4_recipe: Any = None,
        *,
        parallel: Parallel | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config)
        self.model = NVLlamaModel(config, fp8_recipe, fp4_recipe, parallel=parallel, device=device)
        self.vocab_size = config.vocab_size
        layers = self.model.te_layers
        with layers.quantized_model_init(enabled=False):
            self.lm_head = layers.Linear(
                config.hidden_size,
                self.model.parallel.vocabulary(config),
                bias=False,
                params_dtype=dtype_of(config),
                device=place_of(layers, device),
                init_method=normal(config),
                **self.model.parallel.head_options(),
            )
        mark_started(self)
        self.post_init()  # type: ignore[no-untyped-call]
        clear_padding(self, config, self.model.parallel)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given. See `NVLlamaModel.forward` for the other arguments.

        Args:
            input_ids: As there.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: As `input_ids`; the label of a token is compared with the logits of the one before it; -100 counts
                for nothing. In packed sequences the first label of each has to be -100 (the collator sees to it).
            shift_labels: Labels shifted already, in the place of `labels`; context parallelism needs them.
            use_cache: As there.
            logits_to_keep: The last so many tokens, or these, `[n]`; 0 is all.
            **kwargs: As there; `num_items_in_batch`, what the sum of losses is divided by.

        Returns:
            `logits` `[b s v]` (zero at padding, packed `[1 t v]`), `loss` `[]`.
        """
        parallel = self.model.parallel
        if labels is not None and shift_labels is None and parallel.cp_size > 1:
            raise InputError(
                "labels under context parallelism would be shifted within each rank's part: pass shift_labels, "
                "shifted while the sequence was whole (converters.te.collator.split_for_context_parallel does it)"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with self.model.te_layers.autocast(enabled=False) if self.model.precision.quantized else nullcontext():
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        logits = parallel.gather_logits(logits, self.vocab_size)
        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is not None and parallel.cp_size > 1 and kwargs.get("num_items_in_batch") is None:
                kwargs["num_items_in_batch"] = parallel.count(shift_labels)  # over all parts of the sequences
            loss = self.loss_function(
                logits=logits, labels=labels, shift_labels=shift_labels, vocab_size=self.vocab_size, **kwargs
            )
            loss = parallel.sum_over_context(loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class NVLlamaForSequenceClassification(GenericForSequenceClassification, NVLlamaPreTrainedModel):
    """The decoder with a head that classifies sequences."""


class NVLlamaForQuestionAnswering(GenericForQuestionAnswering, NVLlamaPreTrainedModel):
    """The decoder with a head that finds where an answer begins and ends."""

    base_model_prefix = "transformer"  # transformers' own name for it in Llama, and so the recipe's


class NVLlamaForTokenClassification(GenericForTokenClassification, NVLlamaPreTrainedModel):
    """The decoder with a head that classifies tokens."""
