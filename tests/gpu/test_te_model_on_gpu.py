"""The Llama model on Transformer Engine's own layers: against the reference on the CPU, and against transformers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, attention_backend, lacking, needs_te, precisions, reset_recipes
from side_by_side import compare, distances, flat, random
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from converters.te import NVLlamaForCausalLM
from converters.te.convert import convert_llama_hf_to_te, convert_llama_te_to_hf, load
from converters.te.generation import cache_for
from converters.te.quantization import recipe_of
from parity import bounds

pytestmark = needs_te

Record = Callable[[str, object], None]
LAYOUTS = ("bshd", "thd")
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY, ROWS, COLUMNS = 131, 4, 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 3e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 700.0,
        "factor": 5.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    "bos_token_id": 1,
    "eos_token_id": 130,
    "pad_token_id": 0,
}
KINDS = {
    "biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
}
WHOLE = torch.ones(ROWS, COLUMNS, dtype=torch.long)
RIGHT = (torch.arange(COLUMNS) < torch.tensor([[24], [7], [16], [1]])).long()
MASKS = {"no mask": None, "right padding": RIGHT, "left padding": RIGHT.flip(1)}


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    yield
    if not lacking():
        reset_recipes()


def llama(kind: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The one of transformers on the CPU, every parameter random, norms around one."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **KINDS[kind], attn_implementation="eager")).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            noise = random(*parameter.shape, seed=index)
            # Parameters alone: `model.to(dtype)` would round the frequencies of the rotary embedding as well.
            parameter.data = (1 + 0.3 * noise if "norm" in name else 0.2 * noise).to(dtype)
    model.config.dtype = dtype
    return model


def oracle_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in float64. By SDPA: the eager mask overflows there, and rows of padding become NaN."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("sdpa")
    return wide


def on_te(model: LlamaForCausalLM, layout: str) -> NVLlamaForCausalLM:
    """On Transformer Engine's layers, on the GPU."""
    made = convert_llama_hf_to_te(copy.deepcopy(model).to(DEVICE), attn_input_format=layout).eval()
    assert made.device.type == DEVICE
    return made


def on_reference(model: LlamaForCausalLM, layout: str) -> NVLlamaForCausalLM:
    return convert_llama_hf_to_te(model, attn_input_format=layout).eval()


def batch(mask: Tensor | None) -> dict[str, Tensor]:
    """Ids and labels; a token after padding is predicted from padding, which means nothing."""
    ids = torch.randint(1, VOCABULARY, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(3))
    if mask is None:
        return {"input_ids": ids, "labels": ids}
    before = torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1]
    labels = ids.masked_fill((mask == 0) | (before == 0), -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def ask(model: Any, given: dict[str, Any], keep: Tensor | None = None) -> dict[str, Tensor]:
    """Logits (where `keep`), the loss, and gradients by key, on the CPU."""
    model.zero_grad()
    placed = {name: each.to(model.device) if isinstance(each, Tensor) else each for name, each in given.items()}
    out = model(**placed, use_cache=False)
    out.loss.backward()
    found = {"logits": out.logits if keep is None else out.logits[keep.to(out.logits.device)], "loss": out.loss}
    found["logits"] = found["logits"].reshape(-1, VOCABULARY)
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: each.detach().cpu() for name, each in found.items()}


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_every_gradient(
    kind: str, case: str, layout: str, dtype: torch.dtype, record_property: Record
) -> None:
    mask = MASKS[case]
    given, keep = batch(mask), None if mask is None else mask.bool()
    hf = llama(kind, dtype)
    found = ask(on_te(hf, layout), given, keep)
    record_property("attention backend", attention_backend())
    expected = ask(on_reference(hf, layout), given, keep)
    wide = oracle_of(hf)
    compare(found, expected, ask(on_reference(wide, layout), given, keep), record_property)
    # And against transformers, on the same device, by its own kernels.
    evaluations = []
    for attention in ("eager", "sdpa"):
        theirs = copy.deepcopy(hf).to(DEVICE)
        theirs.set_attn_implementation(attention)
        evaluations.append(ask(theirs, given, keep))
    oracle = ask(wide, given, keep)
    for name in ("logits", "loss"):
        limit, distance = distances(found[name], [one[name] for one in evaluations], oracle[name])
        record_property(f"{name}, share of the bound that transformers sets", distance / limit)
        assert distance <= limit, f"{name}: {distance:.3g} from transformers in float64, allowed {limit:.3g}"


LENGTHS = (13, 1, 24, 6)
SLOTS = (16, 4, 24, 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [LENGTHS, SLOTS], ids=["packed", "in slots"])
def test_packed_sequences_are_rows_of_a_padded_batch(
    slots: tuple[int, ...], dtype: torch.dtype, record_property: Record
) -> None:
    """Logits, loss and gradients; nothing leaks, tails count for nothing."""
    if slots != LENGTHS and dtype == torch.float32:
        pytest.skip("Transformer Engine has no attention in float32 with padding between packed sequences")
    mask = (torch.arange(COLUMNS) < torch.tensor(LENGTHS)[:, None]).long()
    padded = batch(mask)
    starts, ends = boundaries(slots), boundaries(LENGTHS)
    total = int(starts[-1])
    row, labels = torch.zeros(1, total, dtype=torch.long), torch.full((1, total), -100)
    keep = torch.zeros(1, total, dtype=torch.bool)
    for index, length in enumerate(LENGTHS):
        place = slice(int(starts[index]), int(starts[index]) + length)
        row[0, place], keep[0, place] = padded["input_ids"][index, :length], True
        labels[0, place] = padded["labels"][index, :length]
        labels[0, place.start] = -100
    given: dict[str, Any] = {"input_ids": row, "labels": labels, "max_length_q": max(slots), "max_length_k": max(slots)}
    given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    if slots != LENGTHS:
        given |= {"cu_seq_lens_q_padded": starts, "cu_seq_lens_k_padded": starts, "pad_between_seqs": True}
    hf = llama("biased", dtype)
    found = ask(on_te(hf, "thd"), given, keep)
    record_property("attention backend", attention_backend())
    expected = ask(on_reference(hf, "bshd"), padded, mask.bool())
    oracle = ask(on_reference(oracle_of(hf), "bshd"), padded, mask.bool())
    compare(found, expected, oracle, record_property)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", precisions())
def test_each_recipe(precision: str, layout: str, tmp_path: Path, record_property: Record) -> None:
    """Two training steps: as near to float64 without a recipe as the reference, and much nearer to the reference."""
    hf = llama("biased", torch.bfloat16)
    hf.save_pretrained(tmp_path)
    given, keep = batch(RIGHT), RIGHT.bool()
    models = [
        load(tmp_path, recipe=recipe_of(precision), device=device, attn_input_format=layout)
        for device in (DEVICE, "cpu")
    ]
    for _ in range(2):
        found, expected = (ask(model, given, keep) for model in models)
    oracle = ask(on_reference(oracle_of(hf), layout), given, keep)
    compare(found, expected, oracle, record_property)
    theirs = bounds.rms(flat(expected["logits"]), flat(oracle["logits"])).value
    between = bounds.rms(flat(found["logits"]), flat(expected["logits"])).value
    record_property("logits: distance to the reference, in its own errors", between / theirs)
    assert between < theirs, "the logits differ as by another quantisation"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_and_files_keep_every_bit(kind: str, tmp_path: Path) -> None:
    hf = llama(kind, torch.bfloat16)
    weights = dict(hf.state_dict())
    hf.save_pretrained(tmp_path / "hf")
    model = on_te(hf, "thd")
    reference = dict(on_reference(hf, "thd").state_dict())
    assert_equal_weights(model.state_dict(), reference)
    assert_equal_weights(convert_llama_te_to_hf(model).state_dict(), weights)
    assert_equal_weights(load(tmp_path / "hf", device=DEVICE).state_dict(), reference)
    model.save_pretrained(tmp_path / "te")
    again = NVLlamaForCausalLM.from_pretrained(tmp_path / "te", dtype=torch.bfloat16).to(DEVICE).eval()
    assert again.model.te_layers.kind == model.model.te_layers.kind
    assert_equal_weights(again.state_dict(), reference)
    ids = batch(None)["input_ids"].to(DEVICE)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def assert_equal_weights(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    wrong = [key for key, value in expected.items() if not torch.equal(found[key].cpu(), value.cpu())]
    assert not wrong


@pytest.mark.parametrize("precision", precisions("fp8-delayed"))
def test_state_of_delayed_scaling_goes_through_files(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by Transformer Engine's layers, read by the reference and by its own; both then compute alike."""
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")  # these bytes were made a line ago
    llama("tied", torch.bfloat16).save_pretrained(tmp_path)
    given = batch(None)
    model = load(tmp_path, recipe=recipe_of(precision), device=DEVICE)
    ask(model, given)
    model.save_extra_states(tmp_path)
    same, ours = (load(tmp_path, recipe=recipe_of(precision), device=device) for device in (DEVICE, "cpu"))
    for each in (same, ours):
        each.load_extra_states(tmp_path)
    saved = model.extra_states()
    assert saved.keys() == ours.extra_states().keys() == same.extra_states().keys()
    assert len(saved) == 3 * SIZES["num_hidden_layers"]
    found, again, expected = (ask(each, given)["logits"] for each in (model, same, ours))
    assert torch.equal(found, again)
    fresh = load(tmp_path, recipe=recipe_of(precision), device="cpu")
    without = bounds.rms(flat(ask(fresh, given)["logits"]), flat(found)).value
    assert bounds.rms(flat(expected), flat(found)).value < without, "the state that was read makes no difference"


# --- generation -------------------------------------------------------------------------------------------------------

NEW, PROMPTS = 9, (7, 3, 5)
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sampled-three-each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
}
CACHES: dict[str, int | None] = {"contiguous": None, "pages-1": 1, "pages-3": 3, "pages-256": 256}


def prompts(side: str) -> dict[str, Tensor]:
    generator, width = torch.Generator().manual_seed(11), max(PROMPTS)
    ids, mask = (torch.zeros(len(PROMPTS), width, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(PROMPTS):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(2, 130, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    placed = {name: each.to(model.device) for name, each in given.items()}
    return model.generate(**placed, **({"max_new_tokens": NEW} | options))


def cache_options(model: Any, kind: str, rows: int, length: int = max(PROMPTS) + NEW - 1) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "none":
        return {"use_cache": False}
    pages: dict[str, Any] = {} if CACHES[kind] is None else {"paged": True, "page_size": CACHES[kind]}
    return {"past_key_values": cache_for(model, max_batch_size=rows, max_sequence_length=length, **pages)}


@pytest.fixture(scope="module")
def told() -> dict[str, Tensor]:
    """The tokens of transformers on the same device."""
    model = llama("tied").to(DEVICE)
    made = {name: generate(model, prompts("left"), **how).cpu() for name, how in DECODING.items()}
    rows = [tuple(row.tolist()) for tokens in made.values() for row in tokens[:, max(PROMPTS) :]]
    assert len(set(rows)) > len(rows) // 2, "these weights say the same whatever is asked"
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def speaker(request: pytest.FixtureRequest) -> NVLlamaForCausalLM:
    return on_te(llama("tied"), request.param)


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("kind", ["default", "none", *CACHES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_those_of_transformers(
    speaker: NVLlamaForCausalLM, told: dict[str, Tensor], side: str, kind: str, how: str, record_property: Record
) -> None:
    options = DECODING[how]
    rows = len(PROMPTS) * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    made = generate(speaker, prompts(side), **options, **cache_options(speaker, kind, rows)).cpu()
    record_property("attention backend", attention_backend())
    width = max(PROMPTS)
    assert torch.equal(made[:, width:], told[how][:, width:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["none", *CACHES])
def test_logits_of_a_prompt_in_steps(kind: str, layout: str, dtype: torch.dtype, record_property: Record) -> None:
    """A prompt, two tokens, then one after another: as near to the whole at once in float64 as transformers' are."""
    hf = llama("biased", dtype)
    given = prompts("left")
    ids = torch.cat([given["input_ids"], torch.arange(2, 2 + 3 * NEW).view(3, NEW)], dim=1)
    mask = torch.cat([given["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        oracle = oracle_of(hf)(**whole).logits[real]
        evaluations = []
        for attention in ("eager", "sdpa"):
            theirs = copy.deepcopy(hf).to(DEVICE)
            theirs.set_attn_implementation(attention)
            placed = {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in whole.items()}
            evaluations.append(theirs(**placed).logits.cpu()[real])
        model = on_te(hf, layout)
        cache = cache_options(model, kind, len(PROMPTS) + 1, max(PROMPTS) + NEW)
        cache.pop("use_cache", None)
        starts = (0, 7, 9, *range(10, 7 + NEW + 1)) if cache else (0, 7 + NEW)
        parts = []
        for start, end in itertools.pairwise(starts):
            seen = mask[:, :end] if cache else mask
            out = model(ids[:, start:end].to(DEVICE), attention_mask=seen.to(DEVICE), **cache)
            parts.append(out.logits.cpu())
    record_property("attention backend", attention_backend())
    limit, distance = distances(torch.cat(parts, dim=1)[real], evaluations, oracle)
    record_property("share of the bound", distance / limit)
    assert distance <= limit, f"{distance:.3g} from float64, allowed {limit:.3g}"
