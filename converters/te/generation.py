"""`generate()` with a key-value cache: Transformer Engine's cache as transformers sees it, on both kinds of layers.

    cache = cache_for(model, max_batch_size=2, max_sequence_length=256)
    model.generate(ids, attention_mask=mask, past_key_values=cache)

Without `past_key_values` a cache of the right size is made; with `use_cache=False` none is. transformers counts
columns of the padded batch, the layers count tokens of each sequence: padding is never stored.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import GenerationMixin

from converters.errors import CacheError
from converters.te.cache_rows import remove_last, reorder_rows
from converters.te.layers import Layers, layers_for
from converters.te.precision import TOKENS_MULTIPLE
from converters.te.reference.cache_steps import ContiguousSteps, PagedSteps, check_new_tokens


class HFInferenceParams:
    """Transformer Engine's `InferenceParams` with what transformers' `generate()` asks of a cache.

    An instance is also one of the layers' own `InferenceParams`: the real one on a GPU, else the reference. It takes
    their arguments, and `device`: where the model is, which is what decides between the two (by default a GPU where
    there is one).

    Attributes:
        columns: Columns of the padded batch seen so far: the longest row of input ids, padding and all.

    Source: NVIDIA/bionemo-framework bionemo-recipes/models/llama3/modeling_llama_te.py `HFInferenceParams`;
    transformers 5.23.0 cache_utils.py `Cache`, generation/utils.py.
    """

    columns = 0
    is_compileable = False
    is_croppable = True

    def __new__(cls, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> HFInferenceParams:
        made: HFInferenceParams = object.__new__(_cache_class(layers_for(device)) if cls is HFInferenceParams else cls)
        return made

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        """As in `InferenceParams`; `columns` follows the longest sequence."""
        super().pre_step(step_dict)  # type: ignore[misc]  # the other base's
        self.columns = max(self.sequences.values(), default=0)  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Forget every sequence; memory stays."""
        super().reset()  # type: ignore[misc]
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that the cache stands for, padding included: where the next input ids begin."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a sequence may have."""
        length: int = self.max_sequence_length  # type: ignore[attr-defined]
        return length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """As `get_max_length`, by the name of transformers 4."""
        return self.get_max_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` held, lengths included; contiguous or paged."""
        reorder_rows(self.cache_manager, beam_idx.tolist())  # type: ignore[attr-defined]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; if positive, the length to keep, as in transformers 4."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        remove_last(self.cache_manager, count)  # type: ignore[attr-defined]
        self.columns -= count

    def activate_past_recording(self) -> None:
        """Nothing to do: any number of tokens can be taken back."""


class _OnTransformerEngine:
    """What the reference's `InferenceParams` has and Transformer Engine's lacks: checks, and prompts in parts."""

    layers_stepped: set[int] | None = None

    def __init__(self, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        from transformer_engine.pytorch.attention import inference

        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        steps, manager = (
            (PagedSteps, inference.PagedKVCacheManager)
            if given.get("is_paged")
            else (ContiguousSteps, inference.NonPagedKVCacheManager)
        )
        if given.get("custom_cache_manager") is None:
            given["custom_cache_manager"] = type(manager.__name__, (steps, manager), {})
        super().__init__(**given)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.layers_stepped = None

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        super().pre_step(step_dict)  # type: ignore[misc]
        self.step_lengths = list(step_dict.values())
        self.layers_stepped = set()

    def step(self, layer_number: int, new_k: Tensor, new_v: Tensor, qkv_format: str) -> Any:
        check_new_tokens(self, layer_number, new_k, new_v, qkv_format)
        return super().step(layer_number, new_k, new_v, qkv_format)  # type: ignore[misc]


@functools.cache
def _cache_class(layers: Layers) -> type:
    real = layers.kind == "transformer_engine"
    bases = (HFInferenceParams, *((_OnTransformerEngine,) if real else ()), layers.InferenceParams)
    return type("HFInferenceParams", bases, {"__doc__": HFInferenceParams.__doc__})


def cache_for(
    model: nn.Module,
    *,
    max_batch_size: int,
    max_sequence_length: int,
    paged: bool = False,
    page_size: int = 256,
    qkv_format: str | None = None,
    dtype: torch.dtype | None = None,
) -> HFInferenceParams:
    """A cache with memory for every layer of a model, its sizes taken from the layers.

    Args:
        model: An NVLlama model, of one tensor-parallel rank where there are several.
        max_batch_size: Sequences at once: the batch times `num_beams` or `num_return_sequences`. A quantised model in
            thd gets room for one more, which fills each step up to the multiple of tokens that its GEMMs want.
        max_sequence_length: Tokens a sequence, prompt and new ones; rounded up to whole pages.
        paged: Pages, not rows.
        page_size: Tokens a page. FlashAttention 2 takes multiples of 256, other backends any.
        qkv_format: bshd or thd; by default the model's.
        dtype: Of keys and values; by default the model's.
    """
    decoder: Any = getattr(model, "model", model)
    attention = decoder.layers[0].self_attention
    weight = decoder.embed_tokens.weight
    qkv_format = qkv_format or decoder.config.attn_input_format
    if decoder.precision.quantized and qkv_format == "thd":  # one more sequence fills steps up: see cache_step.py
        max_batch_size, max_sequence_length = max_batch_size + 1, max(max_sequence_length, TOKENS_MULTIPLE)
    length = -(-max_sequence_length // page_size) * page_size if paged else max_sequence_length
    pages = {"page_size": page_size, "total_num_pages": max_batch_size * (length // page_size)} if paged else {}
    cache: Any = HFInferenceParams(
        max_batch_size=max_batch_size,
        max_sequence_length=length,
        num_heads_kv=attention.num_gqa_groups_per_partition,
        head_dim_k=attention.hidden_size_per_attention_head,
        dtype=dtype or weight.dtype,
        is_paged=paged,
        max_ctx_len=length,
        qkv_format=qkv_format,
        device=weight.device,
        **pages,
    )
    for layer in decoder.layers:
        cache.allocate_memory(layer.layer_number)
    result: HFInferenceParams = cache
    return result


class CachedGeneration(GenerationMixin):
    """transformers' `generate()`, with a cache of this package's by default, and right for right-padded prompts."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a prompt may have its padding on the right.

        transformers takes the next token from the last column, which is padding there. The rows are generated with
        their padding moved to the left, and come back as they were given, new tokens behind. Without a mask, tokens
        of the padding's id are padding wherever transformers takes them for it.

        Tensor-parallel ranks that sample go on from the first one's random numbers, so that all draw the same tokens.
        """
        parent: Any = super()  # typed there for a model alone
        model: Any = self
        given = kwargs.get("input_ids") if inputs is None else inputs
        embedded = kwargs.get("inputs_embeds")
        asked = _asked(model, args[0] if args else None, kwargs)
        if asked["do_sample"] and model.model.parallel.tp_group is not None:
            _draw_alike(model.model.parallel.tp_group, model.device)
        mask = kwargs.get("attention_mask")
        if mask is None and given is not None and embedded is None:
            mask = _not_padding(given, asked["pad_token_id"], asked["eos_token_id"])
        rows = given if embedded is None else embedded
        if rows is None or mask is None or mask.shape != rows.shape[:2] or bool(mask[:, -1].all()):
            return parent.generate(inputs, *args, **kwargs)
        order = mask.bool().long().argsort(dim=1, stable=True)
        kwargs["attention_mask"] = mask.gather(1, order)
        if embedded is not None:
            kwargs["inputs_embeds"] = embedded.gather(1, order[..., None].expand_as(embedded))
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].expand_as(order).gather(1, order)
        if given is None or given.shape != order.shape:  # of embeddings alone, only the new tokens come back
            return parent.generate(inputs, *args, **kwargs)
        kwargs.pop("input_ids", None)
        made = parent.generate(given.gather(1, order), *args, **kwargs)
        sequences = made if isinstance(made, Tensor) else made.sequences
        sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), dim=0)
        return made

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *sizes: Any
    ) -> Any:
        """Where transformers makes the cache of one `generate()`.

        Source: transformers 5.23.0 generation/utils.py `GenerationMixin._prepare_cache_for_generation`.
        """
        parent: Any = super()
        model: Any = self
        given = model_kwargs.get("past_key_values")
        if given is not None and not hasattr(given, "cache_manager"):
            raise CacheError(
                f"past_key_values is a {type(given).__name__}; these layers keep keys and values in InferenceParams: "
                "pass converters.te.generation.cache_for(model, ...), or leave it out"
            )
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise CacheError(
                f"cache_implementation is {generation_config.cache_implementation!r}, one of transformers' own caches; "
                "leave it out, or pass past_key_values=cache_for(model, paged=True, ...) for pages"
            )
        if given is not None or generation_config.use_cache is False:
            return parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, *sizes
            )
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        length = max(1, generation_config.max_length - 1, *(size for size in sizes if isinstance(size, int)))
        model_kwargs["past_key_values"] = cache_for(model, max_batch_size=rows, max_sequence_length=length)
        return None


def _asked(model: Any, config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a `generate()` goes by: its own arguments, else those of its generation config, else the model's."""
    configs = [one for one in (config, kwargs.get("generation_config"), model.generation_config) if one is not None]
    found = {}
    for name in ("do_sample", "pad_token_id", "eos_token_id"):
        said = (kwargs.get(name), *(getattr(one, name, None) for one in configs))
        found[name] = next((value for value in said if value is not None), None)
    return found


def _not_padding(ids: Tensor, padding: int | None, ends: int | list[int] | None) -> Tensor | None:
    """The mask `[b s]` that transformers infers: tokens that are not the padding's id, unless that also ends a text.

    Source: transformers 5.23.0 generation/utils.py `GenerationMixin._prepare_attention_mask_for_generation`.
    """
    if padding is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    if padding in torch.as_tensor([] if ends is None else ends).flatten().tolist():
        return None
    return ids.ne(padding).long()


def _draw_alike(group: ProcessGroup, device: torch.device) -> None:
    """Give every rank of `group` the state of the first one's random numbers, on the CPU and where the model is."""
    first = dist.get_global_rank(group, 0)
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, first, group=group)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, first, group=group)
        torch.cuda.set_rng_state(state.cpu(), device)
