"""Greedy generation with Megatron-Core models and their KV cache, under tensor and pipeline parallelism.

The cache is Megatron-Core's own `StaticInferenceContext`. What it does, and what follows here:

- It holds keys before rotation, and each step rotates all of them again, by the rows of one table of angles. Megatron
  fills that table by slot; here it is filled by position, which begins behind a row's padding, as in transformers.
  (Attention feels differences of positions only, so that this padding moves nothing but roundings.)
- Its local attention masks by what it is given, and makes a square causal mask where it is given none. So a mask is
  built for a prompt in several parts, and for padding. Transformer Engine's attention goes by a mask type instead and
  looks at no mask: it can have neither, and is refused.
- Sequence parallelism cuts a sequence that is one token long; it is off while generating, and on again afterwards.
  Interleaved stages and context parallelism are refused, the first by Megatron's own inference as well.

Source: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2 (the same in both), under megatron/core:
    transformer/attention.py `Attention._adjust_key_value_for_inference` (cache, rotation, mask type),
    fusions/fused_softmax.py `FusedScaleMaskSoftmax.forward_torch_softmax` (masks),
    inference/model_inference_wrappers/abstract_model_inference_wrapper.py `AbstractModelInferenceWrapper` (stages).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_, send_to_next_pipeline_rank
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from converters.errors import ConfigError
from converters.megatron.provider import unwrap


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a model wrote.

    Args:
        tokens: `[b n]` int64, new tokens only, the same on every rank. After a stop token a row repeats it.
        logits: `[b n v]` float32, by which each was chosen; `None` where not asked for, and before the last stage.
    """

    tokens: Tensor
    logits: Tensor | None = None


def generate(
    chunks: Sequence[torch.nn.Module],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    vocab_size: int,
    padding: Sequence[int] | None = None,
    stop: Collection[int] = (),
    return_logits: bool = False,
) -> Generated:
    """Continue each prompt with the most likely token, again and again. Collective: every rank passes the same.

    Args:
        chunks: This rank's model, wrapped or not, as the one item of a sequence.
        tokens: `[b s]` int64. Prompts of one length, or filled up on their left with any valid id.
        max_new_tokens: Tokens to write at most.
        vocab_size: Rows of the vocabulary without padding: only these are chosen.
        padding: How many tokens on the left of each row are filling.
        stop: Tokens that end a row. The text ends when every row has.
        return_logits: Keep the logits of every step.

    Raises:
        ConfigError: A prompt that cannot be continued, or a model or layout that cannot generate.
    """
    problems = []
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype != torch.int64:
        problems.append(
            f"prompts must be int64 of shape [b s], found {tokens.dtype} {list(tokens.shape)}: prompts of several "
            "lengths are filled up on their left, which `padding` tells"
        )
    elif int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        problems.append(f"prompts hold ids from {int(tokens.min())} to {int(tokens.max())} of {vocab_size}")
    elif max(padding or (), default=0) >= tokens.size(1):
        problems.append(f"a prompt must have a token, found padding of {list(padding or ())} in {tokens.size(1)} slots")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if problems:
        raise ConfigError("nothing can be generated:\n  " + "\n  ".join(problems))

    decoder = Decoder(chunks, batch=len(tokens), max_length=tokens.size(1) + max_new_tokens, padding=padding)
    written: list[Tensor] = []
    seen: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    ends = torch.tensor(sorted(stop), dtype=torch.int64)
    step = tokens
    for _ in range(max_new_tokens):
        logits = decoder.feed(step)
        chosen = _agreed(None if logits is None else next_tokens(logits[:, -1], vocab_size), len(tokens)).cpu()
        chosen = torch.where(ended, written[-1] if written else chosen, chosen)
        written.append(chosen)
        if logits is not None and return_logits:
            seen.append(logits[:, -1, :vocab_size].float())
        ended |= torch.isin(chosen, ends)
        if bool(ended.all()):
            break
        step = chosen[:, None]
    return Generated(tokens=torch.stack(written, dim=1), logits=torch.stack(seen, dim=1) if seen else None)


class Decoder:
    """One batch of sequences, fed to a model piece by piece. Every rank feeds the same.

    Args:
        chunks: This rank's model, wrapped or not, as the one item of a sequence.
        batch: Sequences.
        max_length: Tokens of the longest, padding and new ones included: what is kept free in the cache.
        padding: How many tokens on the left of each sequence are filling; `None` for none.
        every_token: Logits of every token that is fed, not only of the last.

    Raises:
        ConfigError: A model or layout that cannot generate.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        batch: int,
        max_length: int,
        padding: Sequence[int] | None = None,
        every_token: bool = False,
    ) -> None:
        self.padding = None if padding is None or not any(padding) else torch.tensor(padding, dtype=torch.int64)
        _require(chunks, batch, padding)
        self.model = unwrap(chunks[0])
        if self.padding is not None:
            _require_masks(self.model, "prompts must have one length: padding on the left is hidden by a mask")
        self.batch = batch
        self.context = StaticInferenceContext(batch, max_length)
        # The flag moved from the context (0.16) into its config (0.19).
        holder = getattr(self.context, "config", self.context)
        holder.materialize_only_last_token_logits = not every_token
        self._positions = torch.zeros(batch if self.padding is not None else 1, max_length, dtype=torch.int64)

    def feed(self, tokens: Tensor) -> Tensor | None:
        """Let the model read on.

        Args:
            tokens: `[b s]` int64, the next tokens of each sequence.

        Returns:
            Logits, `[b s v']` or `[b 1 v']` (see `every_token`), over the padded vocabulary and whole on every rank of
            the last stage; `None` on other stages.

        Raises:
            ConfigError: More tokens than there is room for; or a prompt in parts, with layers that take no mask.
        """
        start, count = cache_length(self.context), tokens.size(1)
        stop, room = start + count, self.context.max_sequence_length
        if len(tokens) != self.batch or stop > room:
            raise ConfigError(
                f"expected {self.batch} sequences of at most {room} tokens, found {len(tokens)} of {stop}: "
                "make the decoder for more"
            )
        hidden = hidden_slots(start, count, self.padding)
        if hidden is not None and start and count > 1:
            _require_masks(self.model, "a prompt must be fed whole: in parts, the later ones need a mask")
        device = torch.cuda.current_device()
        positions = decode_positions(start, count, self.padding)
        self._positions[:, start:stop] = positions
        self.context.sequence_len_offset = start
        if start and count == 1:
            self.context.enable_decode_mode()
        else:
            self.context.enable_prefill_mode()
        with _generating(self.model), _rotating_by(self.model, self._positions[:, :stop]), torch.no_grad():
            if not self.model.pre_process:
                self.model.set_input_tensor(_received(self.model.config, count, self.batch))
            output: Tensor = self.model(
                tokens.to(device),
                positions.expand(self.batch, -1).to(device),
                None if hidden is None else hidden.to(device),
                inference_context=self.context,
                runtime_gather_output=True,  # each tensor-parallel rank sees the whole vocabulary
            )
        self.context.increment_sequence_len_offset(count)
        if self.model.post_process:
            return output
        send_to_next_pipeline_rank(output.contiguous(), parallel_state.get_pipeline_model_parallel_group())
        return None


def cache_length(context: StaticInferenceContext) -> int:
    """Tokens of each sequence that are in the cache: the slot that the next one goes to."""
    return int(context.sequence_len_offset)


def decode_positions(start: int, count: int, padding: Tensor | None) -> Tensor:
    """Positions of the tokens in slots `start` to `start + count - 1`, `[b s]` int64, or `[1 s]` if all are alike.

    A sequence begins behind its padding, whose own position is 0.
    """
    slots = torch.arange(start, start + count)[None]
    return slots if padding is None else (slots - padding[:, None]).clamp(min=0)


def hidden_slots(start: int, count: int, padding: Tensor | None) -> Tensor | None:
    """What the tokens in slots `start` to `start + count - 1` must not see: `[b 1 s slots]` bool, true is hidden.

    `None` where nothing is hidden, or where the model's own causal mask is the right one.
    """
    if padding is None and (start == 0 or count == 1):
        return None
    slots = torch.arange(start + count)
    hidden = (slots > torch.arange(start, start + count)[:, None])[None, None]
    return hidden if padding is None else hidden | (slots < padding[:, None])[:, None, None]


def next_tokens(logits: Tensor, vocab_size: int) -> Tensor:
    """The most likely token of each row, `[b]` int64, by logits `[b v']`; the padding of the vocabulary is no token."""
    return logits[:, :vocab_size].argmax(dim=-1)


def _agreed(chosen: Tensor | None, batch: int) -> Tensor:
    """What the last stage chose, `[b]` int64, on every stage."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        assert chosen is not None
        return chosen
    tokens = torch.empty(batch, dtype=torch.int64, device=torch.cuda.current_device()) if chosen is None else chosen
    torch.distributed.broadcast(tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return tokens


def _received(config: Any, count: int, batch: int) -> Tensor:
    """The previous stage's output, `[s b h]`."""
    dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
    states = torch.empty(count, batch, config.hidden_size, dtype=dtype, device=torch.cuda.current_device())
    recv_from_prev_pipeline_rank_(states, parallel_state.get_pipeline_model_parallel_group())
    return states


def _require(chunks: Sequence[torch.nn.Module], batch: int, padding: Sequence[int] | None) -> None:
    problems = []
    if len(chunks) != 1:
        problems.append(f"one model chunk a rank is needed, found {len(chunks)}: interleaved stages cannot (use vpp=1)")
    cp = parallel_state.get_context_parallel_world_size()
    if cp > 1:
        problems.append(f"the KV cache holds whole sequences, and context parallelism over {cp} ranks cuts them (cp=1)")
    if chunks and unwrap(chunks[0]).config.flash_decode:
        problems.append("flash_decode=True rotates by slot in a kernel of its own: set it to False")
    if padding is not None and (len(padding) != batch or min(padding) < 0):
        problems.append(f"padding must be one number of tokens for each of {batch} rows, found {list(padding)}")
    if problems:
        raise ConfigError("this model cannot generate here:\n  " + "\n  ".join(problems))


def honours_masks(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether the model attends by the mask that it is given: left padding and prompts in parts need that."""
    cores = [layer.self_attention.core_attention for chunk in chunks for layer in unwrap(chunk).decoder.layers]
    return all(
        isinstance(core, DotProductAttention) and not core.scale_mask_softmax.scaled_masked_softmax_fusion
        for core in cores
    )


def _require_masks(model: Any, what: str) -> None:
    if not honours_masks([model]):
        core = type(model.decoder.layers[0].self_attention.core_attention).__name__
        raise ConfigError(
            f"{what}, and {core} of this model looks at none: use layer_spec='local' with masked_softmax_fusion=False"
        )


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Dropout and sequence parallelism off, Megatron's inference mode on, and all as it was afterwards.

    Megatron's own switch, `set_model_to_sequence_parallel`, would turn on what had been off before.
    """
    switched = [
        (holder, name)
        for holder in [model.config, *model.modules()]
        for name in ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
        if getattr(holder, name, False) is True
    ]
    training = model.training
    # 0.19 has a flag of the process where 0.16 goes by the context.
    mode = getattr(importlib.import_module("megatron.core.inference.utils"), "InferenceMode", None)
    model.eval()
    for holder, name in switched:
        setattr(holder, name, False)
    try:
        with contextlib.nullcontext() if mode is None else mode.active():
            yield
    finally:
        for holder, name in switched:
            setattr(holder, name, True)
        model.train(training)


@contextlib.contextmanager
def _rotating_by(model: Any, positions: Tensor) -> Iterator[None]:
    """Let slot i of the cache be rotated by `positions[:, i]` (`[b slots]` or `[1 slots]`), with the model's angles."""
    embedding = model.rotary_pos_emb
    table = embedding.get_emb(int(positions.max()) + 1)[:, 0, 0]  # [positions d]
    angles = table[positions.t().to(table.device)][:, :, None]  # [slots b 1 d]
    embedding.forward = lambda *_, **__: angles
    try:
        yield
    finally:
        del embedding.forward
