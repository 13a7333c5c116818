"""`generate()`: the same tokens with a cache, without one, and from transformers' Llama of the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from converters.errors import CacheError, ConversionError
from converters.te import NVLlamaConfig, NVLlamaForCausalLM
from converters.te.generation import HFInferenceParams, cache_for
from converters.te.quantization.recipes import recipe_of
from converters.te.reference import InferenceParams
from parity.bounds import allowed, largest

HEADS, GROUPS, WIDTH, HIDDEN = 6, 2, 10, 48
NEW = 9
LENGTHS = (7, 3, 5)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": HIDDEN,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
    "initializer_range": 0.25,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 700.0,
        "factor": 5.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    "bos_token_id": 1,
    "eos_token_id": 60,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sampled-three-each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "beams-sampled": {"do_sample": True, "num_beams": 3},
}
CACHES: dict[str, int | None] = {"contiguous": None, "pages-1": 1, "pages-3": 3, "pages-7": 7}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def _te(llama: LlamaForCausalLM, layout: str) -> NVLlamaForCausalLM:
    config = NVLlamaConfig(**SIZES, attn_input_format=layout, self_attn_mask_type="padding_causal")
    model = NVLlamaForCausalLM(config, device="cpu").eval()
    model.load_state_dict(_merged(llama.state_dict()))
    return model


def _merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' Llama by the TE model's names, written out by hand."""
    made = {name: state[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(SIZES["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"model.layers.{layer}"
        q, k, v = (
            state[f"{old}.self_attn.{name}_proj.weight"].view(GROUPS, -1, WIDTH, HIDDEN) for name in ("q", "k", "v")
        )
        gate, up = (state[f"{old}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        made |= {
            f"{new}.self_attention.layernorm_qkv.layer_norm_weight": state[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.layernorm_qkv.weight": torch.cat([q, k, v], dim=1).reshape(-1, HIDDEN),
            f"{new}.self_attention.proj.weight": state[f"{old}.self_attn.o_proj.weight"],
            f"{new}.layernorm_mlp.layer_norm_weight": state[f"{old}.post_attention_layernorm.weight"],
            f"{new}.layernorm_mlp.fc1_weight": torch.cat([gate, up]),
            f"{new}.layernorm_mlp.fc2_weight": state[f"{old}.mlp.down_proj.weight"],
        }
    return made


@pytest.fixture(scope="module", params=["thd", "bshd"])
def model(llama: LlamaForCausalLM, request: pytest.FixtureRequest) -> NVLlamaForCausalLM:
    return _te(llama, request.param)


@pytest.fixture(scope="module")
def thd(llama: LlamaForCausalLM) -> NVLlamaForCausalLM:
    return _te(llama, "thd")


def _prompts(side: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(2, 60, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: Any, prompts: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**prompts, **({"max_new_tokens": NEW} | options))


@pytest.fixture(scope="module")
def expected(llama: LlamaForCausalLM) -> dict[str, Tensor]:
    made = {name: _generate(llama, _prompts("left"), **how) for name, how in DECODING.items()}
    rows = [tuple(row.tolist()) for tokens in made.values() for row in tokens[:, max(LENGTHS) :]]
    assert len(set(rows)) > len(rows) // 2, "these weights say the same whatever is asked"
    return made


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("kind", ["default", "none", "pages-3", "pages-7"])
def test_tokens_are_those_of_transformers(
    model: NVLlamaForCausalLM, expected: dict[str, Tensor], how: str, kind: str
) -> None:
    options: dict[str, Any] = dict(DECODING[how])
    if kind == "none":
        options["use_cache"] = False
    elif kind in CACHES:
        rows = len(LENGTHS) * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        options["past_key_values"] = _cache(model, rows, CACHES[kind])
    assert torch.equal(_generate(model, _prompts("left"), **options), expected[how])


def _cache(model: NVLlamaForCausalLM, rows: int, page_size: int | None, length: int = max(LENGTHS) + NEW - 1) -> Any:
    pages: dict[str, Any] = {} if page_size is None else {"paged": True, "page_size": page_size}
    return cache_for(model, max_batch_size=rows, max_sequence_length=length, **pages)


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("kind", ["default", "none", "pages-3"])
def test_right_padding(model: NVLlamaForCausalLM, expected: dict[str, Tensor], how: str, kind: str) -> None:
    """The new tokens are those of the prompts padded on the left, and the prompts come back as they were."""
    prompts, options, width = _prompts("right"), dict(DECODING[how]), max(LENGTHS)
    if kind == "none":
        options["use_cache"] = False
    elif kind in CACHES:
        options["past_key_values"] = _cache(model, len(LENGTHS) * options.get("num_beams", 1), CACHES[kind])
    made = _generate(model, prompts, **options, return_dict_in_generate=True).sequences
    assert torch.equal(made[:, width:], expected[how][:, width:])
    each = len(made) // len(LENGTHS)
    assert torch.equal(made[:, :width], prompts["input_ids"].repeat_interleave(each, dim=0))


@pytest.mark.parametrize("given", ["no mask", "embeddings", "embeddings and ids"])
def test_right_padding_that_is_told_otherwise(
    model: NVLlamaForCausalLM, expected: dict[str, Tensor], given: str
) -> None:
    """The mask comes from the padding's id, as transformers infers it; embeddings are moved as ids are."""
    prompts, width = _prompts("right"), max(LENGTHS)
    assert bool((prompts["input_ids"] == SIZES["pad_token_id"]).any())
    if given == "no mask":
        del prompts["attention_mask"]
    else:
        with torch.no_grad():
            prompts["inputs_embeds"] = model.model.embed_tokens(prompts["input_ids"])
        if given == "embeddings":
            del prompts["input_ids"]
    made = _generate(model, prompts, do_sample=False)
    assert torch.equal(made[:, -NEW:], expected["greedy"][:, width:])
    assert given == "embeddings" or torch.equal(made[:, :width], _prompts("right")["input_ids"])


def test_a_token_that_also_ends_a_text_is_no_padding(thd: NVLlamaForCausalLM, llama: LlamaForCausalLM) -> None:
    prompts = {"input_ids": _prompts("right")["input_ids"]}
    options = {"do_sample": False, "eos_token_id": [SIZES["eos_token_id"], SIZES["pad_token_id"]], "pad_token_id": 0}
    assert torch.equal(_generate(thd, prompts, **options), _generate(llama, prompts, **options))


@pytest.fixture(scope="module")
def floor(llama: LlamaForCausalLM) -> tuple[Tensor, float]:
    """Logits of whole sequences in one forward, and the bound: two evaluations of transformers' own apart."""
    made = _generate(llama, _prompts("left"), do_sample=False)
    mask = torch.cat([_prompts("left")["attention_mask"], torch.ones(len(LENGTHS), NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": made, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        eager = llama(**given).logits
        llama.set_attn_implementation("sdpa")
        sdpa = llama(**given).logits
        llama.set_attn_implementation("eager")
    real = mask.bool()
    apart = largest(sdpa[real].numpy(), eager[real].numpy()).value
    return eager, allowed(apart, float(eager[real].abs().max()))


@pytest.mark.parametrize("kind", ["none", "contiguous", "pages-1"])
def test_logits_of_each_new_token(model: NVLlamaForCausalLM, floor: tuple[Tensor, float], kind: str) -> None:
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if kind == "none":
        options["use_cache"] = False
    else:
        options["past_key_values"] = _cache(model, len(LENGTHS), CACHES[kind])
    made = torch.stack(_generate(model, _prompts("left"), **options).logits, dim=1)
    whole, bound = floor
    assert largest(made.numpy(), whole[:, -NEW - 1 : -1].numpy()).value <= bound


@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("cuts", [(16,), (7, 1, 8), (1, 2, 3, 4, 6)])
def test_logits_of_a_prompt_in_parts(
    llama: LlamaForCausalLM,
    model: NVLlamaForCausalLM,
    floor: tuple[Tensor, float],
    page_size: int | None,
    cuts: tuple[int, ...],
) -> None:
    """Every token of sequences of different lengths, whatever the columns of each call: some rows have none in some."""
    made = _generate(llama, _prompts("left"), do_sample=False)
    mask = torch.cat([_prompts("left")["attention_mask"], torch.ones(len(LENGTHS), NEW, dtype=torch.long)], dim=1)
    whole, bound = floor
    cache = _cache(model, len(LENGTHS) + 1, page_size, max(LENGTHS) + NEW)
    start = 0
    with torch.no_grad():
        for cut in cuts:
            part = slice(start, start + cut)
            seen = mask[:, : start + cut] if start % 2 else mask[:, part]  # of all columns so far, or of the new ones
            logits = model(made[:, part], attention_mask=seen, past_key_values=cache).logits
            real = mask[:, part].bool()
            assert largest(logits[real].numpy(), whole[:, part][real].numpy()).value <= bound, (start, cut)
            start += cut
            assert cache.get_seq_length() == start
    assert list(cache.sequences.values()) == [length + NEW for length in LENGTHS]


@pytest.mark.parametrize("page_size", [None, 3])
def test_prefill_chunks(model: NVLlamaForCausalLM, expected: dict[str, Tensor], page_size: int | None) -> None:
    cache = _cache(model, len(LENGTHS), page_size)
    made = _generate(model, _prompts("left"), do_sample=False, prefill_chunk_size=2, past_key_values=cache)
    assert torch.equal(made, expected["greedy"])


@pytest.mark.parametrize("page_size", [None, 3])
def test_a_cache_goes_on_and_starts_anew(
    model: NVLlamaForCausalLM, expected: dict[str, Tensor], page_size: int | None
) -> None:
    # Two columns are padding in every row: columns of the batch are more than tokens of any sequence.
    prompts = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in _prompts("left").items()}
    cache = _cache(model, len(LENGTHS), page_size)
    for _ in range(2):
        first = _generate(model, prompts, do_sample=False, max_new_tokens=4, past_key_values=cache)
        mask = torch.cat([prompts["attention_mask"], torch.ones(len(LENGTHS), 4, dtype=torch.long)], dim=1)
        again = {"input_ids": first, "attention_mask": mask}
        made = _generate(model, again, do_sample=False, max_new_tokens=NEW - 4, past_key_values=cache)
        assert torch.equal(made[:, 2:], expected["greedy"])
        cache.reset()


@pytest.mark.parametrize("page_size", [None, 2])
def test_guessed_tokens_are_taken_back(
    llama: LlamaForCausalLM, model: NVLlamaForCausalLM, page_size: int | None
) -> None:
    prompts = {"input_ids": torch.tensor([[5, 9, 5, 9, 5, 9, 5]])}
    plain = _generate(llama, prompts, do_sample=False)
    cache = _cache(model, 1, page_size, 40)
    made = _generate(model, prompts, do_sample=False, prompt_lookup_num_tokens=3, past_key_values=cache)
    assert torch.equal(made, plain)


@pytest.mark.parametrize("layout", ["thd", "bshd"])
@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_quantised_layers(layout: str, how: str) -> None:
    """Under MXFP8 each token has its own scales, so a token's logits do not depend on what is computed beside it."""
    torch.manual_seed(8)
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "initializer_range": 0.2}
    whole, model = (
        NVLlamaForCausalLM(
            NVLlamaConfig(**sizes, attn_input_format=form, layer_precision=["fp8", None, "fp8"]),
            recipe_of("mxfp8"),
            device="cpu",
        ).eval()
        for form in ("thd", layout)
    )
    model.load_state_dict(whole.state_dict())
    plain = _generate(whole, _prompts("left"), **DECODING[how], use_cache=False)
    assert torch.equal(_generate(model, _prompts("left"), **DECODING[how]), plain)
    rows = len(LENGTHS) * DECODING[how].get("num_beams", 1)
    assert torch.equal(
        _generate(model, _prompts("left"), **DECODING[how], past_key_values=_cache(model, rows, 4)), plain
    )
    if layout == "thd":
        small: Any = cache_for(model, max_batch_size=2, max_sequence_length=20)
        with pytest.raises(CacheError, match=r"has 4: .* one sequence of padding for a quantised model"):
            _generate(model, _prompts("left"), past_key_values=small)


def test_the_cache_is_that_of_the_layers(thd: NVLlamaForCausalLM) -> None:
    cache: Any = cache_for(thd, max_batch_size=2, max_sequence_length=10, paged=True, page_size=4)
    assert isinstance(cache, HFInferenceParams)
    assert isinstance(cache, InferenceParams)
    assert (cache.num_heads_kv, cache.head_dim_k, cache.dtype) == (GROUPS, WIDTH, torch.float32)
    assert (cache.max_sequence_length, cache.total_num_pages, cache.get_max_length()) == (12, 6, 12)
    assert sorted(cache.cache_manager.cache) == [1, 2, 3]
    by_hand: Any = HFInferenceParams(
        max_batch_size=1, max_sequence_length=8, num_heads_kv=2, head_dim_k=4, dtype=torch.bfloat16, device="cpu"
    )
    by_hand.allocate_memory(1)
    assert by_hand.get_seq_length() == 0
    assert not by_hand.is_compileable


def test_caches_that_do_not_fit(thd: NVLlamaForCausalLM) -> None:
    short = _cache(thd, 3, None, 12)
    with pytest.raises(
        CacheError, match=r"room for 12 tokens a sequence.*\n  sequence 0: 12 tokens held \+ 1 new = 13"
    ):
        _generate(thd, _prompts("left"), do_sample=False, past_key_values=short)
    with pytest.raises(CacheError, match=r"room for 3 sequences .* has 9: allocate .* times num_beams"):
        _generate(thd, _prompts("left"), num_beams=3, past_key_values=_cache(thd, 3, 4))
    half = cache_for(thd, max_batch_size=3, max_sequence_length=20, dtype=torch.bfloat16)
    with pytest.raises(CacheError, match=r"keys are torch\.float32, the cache torch\.bfloat16"):
        _generate(thd, _prompts("left"), past_key_values=half)
    with pytest.raises(ConversionError, match="past_key_values is a DynamicCache"):
        _generate(thd, _prompts("left"), past_key_values=DynamicCache())
    with pytest.raises(CacheError, match="cache_implementation is 'quantized'"):
        _generate(thd, _prompts("left"), cache_implementation="quantized")


def test_a_cache_that_holds_another_prompt(thd: NVLlamaForCausalLM) -> None:
    cache = _cache(thd, 3, None, 40)
    _generate(thd, _prompts("left"), do_sample=False, past_key_values=cache)
    other = {name: value.flip(0) for name, value in _prompts("left", (4, 20, 30)).items()}
    with pytest.raises(ConversionError, match="the cache holds"):
        _generate(thd, other, past_key_values=cache)
