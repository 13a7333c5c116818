"""The Llama model on Transformer Engine layers against transformers' own, on the reference layers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, assert_within_floors, llama, merged, nvllama, sizes
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import converters.te
from converters.errors import CheckpointError, ConfigError
from converters.te import NVLlamaConfig, NVLlamaForCausalLM
from converters.te.arrangement import InputError, arrange
from converters.te.config import NVLlamaConfigError
from converters.te.precision import RecipeError
from converters.te.quantization.recipes import recipe_of

torch.set_num_threads(1)
LAYOUTS = ("bshd", "thd")
ROWS, TOKENS = 3, 11
NONE = torch.ones(ROWS, TOKENS, dtype=torch.long)
RIGHT = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [4], [8]])).long()
LEFT = RIGHT.flip(1)
HOLES = NONE.clone()
HOLES[:, 3:5] = 0
STEP = torch.arange(TOKENS)[None]
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0], [*range(TOKENS)], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
CASES: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "no mask": (None, None),
    "mask of ones": (NONE, None),
    "right padding": (RIGHT, None),
    "left padding": (LEFT, None),
    "left padding, positions": (LEFT, (LEFT.cumsum(1) - 1).clamp(min=0)),
    "holes": (HOLES, None),
    "offset positions": (None, STEP + 70),
    "positions with gaps": (NONE, STEP * 3),
    "packed positions": (None, PACKED),
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def ask(model: Any, **given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits at real tokens, the loss, and gradients by key."""
    model.zero_grad()
    out = model(**{name: value for name, value in given.items() if value is not None}, use_cache=False)
    out.loss.backward()
    mask = given.get("attention_mask")
    keep = torch.ones_like(given["labels"]).bool() if mask is None else mask.bool()
    return out.logits[keep], out.loss, {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str, layout: str, ids: Tensor) -> None:
    tied = case in ("left padding", "packed positions")
    mask, positions = CASES[case]
    labels = ids
    if mask is not None:  # a token after padding is predicted from padding, which means nothing
        before = torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1]
        labels = ids.masked_fill((mask == 0) | (before == 0), -100)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    hf = llama(tie_word_embeddings=tied)
    found = ask(nvllama(hf, layout), **given)
    hf.set_attn_implementation("eager")
    eager = ask(hf, **given)
    hf.set_attn_implementation("sdpa")
    sdpa = ask(hf, **given)
    oracle = ask(hf.double(), **given)
    for index, what in enumerate(("logits", "loss")):
        assert_within_floors(found[index], [eager[index], sdpa[index]], oracle[index], what=what)
    gradients = [merged(one[2]) for one in (eager, sdpa, oracle)]
    assert found[2].keys() == gradients[0].keys()
    for key, gradient in found[2].items():
        one, two, wanted = (each[key] for each in gradients)
        assert_within_floors(gradient, [one, two], wanted, what=key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_gives_zeros_and_logits_to_keep_the_last(layout: str, ids: Tensor) -> None:
    model = nvllama(llama(), layout)
    out = model(ids, attention_mask=LEFT, output_hidden_states=True)
    assert not out.logits[LEFT == 0].any()
    assert not model(ids, attention_mask=RIGHT).logits[RIGHT == 0].any()
    assert len(out.hidden_states) == 3
    assert all(one.shape == (ROWS, TOKENS, 48) for one in out.hidden_states)
    assert torch.equal(out.hidden_states[-1], model.model(ids, attention_mask=LEFT).last_hidden_state)
    assert torch.equal(model(ids, attention_mask=LEFT, logits_to_keep=2).logits, out.logits[:, -2:])
    embedded = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=LEFT).logits, out.logits)
    assert torch.equal(model(ids, attention_mask=LEFT, return_dict=False)[0], out.logits)


def test_hidden_states_are_those_of_transformers(ids: Tensor) -> None:
    hf = llama()
    found = nvllama(hf, "thd")(ids, attention_mask=NONE, output_hidden_states=True).hidden_states
    float32 = hf(ids, output_hidden_states=True, use_cache=False).hidden_states
    oracle = hf.double()(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(found) == len(float32)
    for index, (one, near, wanted) in enumerate(zip(found, float32, oracle, strict=True)):
        assert_within_floors(one, [near], wanted, what=f"hidden state {index}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_of_ones_own_are_the_ones_that_are_rotated_by(layout: str) -> None:
    """A shift of all positions changes logits by rounding only, so angles are looked at, not logits."""
    made = arrange(ROWS, TOKENS, torch.device("cpu"), layout=layout, mask_type="padding_causal", position_ids=STEP + 70)
    assert torch.equal(made.positions[:TOKENS], STEP[0] + 70)


def test_packed_sequences_do_not_see_each_other(ids: Tensor) -> None:
    """Changing one leaves the others' logits as they were, to the bit; padding between them changes nothing."""
    model = nvllama(llama(), "thd")
    row, starts = ids[:1], torch.tensor([0, 4, 9, 11], dtype=torch.int32)
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    before = model(row, **given).logits
    other = row.clone()
    other[0, 4:9] = (other[0, 4:9] + 7) % VOCABULARY
    after = model(other, **given).logits
    assert before.shape == (1, TOKENS, VOCABULARY)
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 9:], before[:, 9:])
    assert not torch.equal(after[:, 4:9], before[:, 4:9])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]])
    assert torch.equal(model(row, position_ids=positions).logits, before)
    assert torch.equal(model(row, position_ids=positions, **given).logits, before)
    alone = [model(row[:, a:b]).logits for a, b in ((0, 4), (4, 9), (9, 11))]
    wide = model.double()
    assert_within_floors(before, [torch.cat(alone, 1)], wide(row, **given).logits, what="alone")


def test_padding_between_packed_sequences_changes_nothing(ids: Tensor) -> None:
    model = nvllama(llama(), "thd")
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    padded = torch.tensor([0, 4, 12], dtype=torch.int32)
    real = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    row = torch.zeros(1, 12, dtype=torch.long)
    row[0, real] = ids[0, :8]
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_q_padded": padded, "pad_between_seqs": True, "max_length_q": 8}
    found = model(row, **given).logits[:, real]
    tight = model(ids[:1, :8], cu_seq_lens_q=starts, max_length_q=5).logits
    wide = model.double()(ids[:1, :8], cu_seq_lens_q=starts, max_length_q=5).logits
    assert_within_floors(found, [tight], wide, what="logits")


@pytest.mark.parametrize(
    ("layout", "given", "says"),
    [
        ("thd", {"position_ids": torch.tensor([[0, 1, 2, 9], [0, 5, 6, 7]]), "attention_mask": NONE[:2, :4]}, "gaps"),
        ("bshd", {"cu_seq_lens_q": torch.tensor([0, 4])}, "packed sequences"),
        ("thd", {"max_length_q": 4}, "2 4"),
        ("thd", {"attention_mask": NONE[:2, :3]}, "expected \\[2 4\\]"),
        ("bshd", {"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "rows \\[1\\]"),
        ("thd", {"use_cache": True}, "allocated before"),
        ("thd", {"past_key_values": DynamicCache()}, "DynamicCache"),
        ("thd", {"output_attentions": True}, "attention probabilities"),
        ("thd", {"inputs_embeds": torch.zeros(2, 4, 48)}, "exactly one"),
    ],
)
def test_what_cannot_be_computed_is_refused(layout: str, given: dict[str, Any], says: str, ids: Tensor) -> None:
    model = NVLlamaForCausalLM(NVLlamaConfig(**sizes(attn_input_format=layout)))
    with pytest.raises(InputError, match=says):
        model(ids[:2, :4], **given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_input_format": "sbhd"}, "attn_input_format must be one of"),
        ({"self_attn_mask_type": "arbitrary"}, "self_attn_mask_type must be one of"),
        ({"attn_input_format": "thd", "self_attn_mask_type": "causal"}, "tell packed sequences apart"),
        ({"layer_precision": ["fp8"]}, "layer_precision must be a list of length 2"),
        ({"layer_precision": ["fp8", "int8"]}, "layer_precision element must be"),
        ({"hidden_act": "gelu"}, "tanh approximation"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "length of the sequence"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "scales cosine and sine"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"num_key_value_heads": 4}, "multiple"),
    ],
)
def test_a_config_without_a_model_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(NVLlamaConfigError, match=says):
        NVLlamaConfig(**sizes(**changes))


def test_rope_frequencies_stay_in_float32_and_survive_loading(tmp_path: Path, ids: Tensor) -> None:
    model = nvllama(llama(), "thd")
    wanted = LlamaRotaryEmbedding(model.config).inv_freq
    with torch.device("meta"):
        blank = NVLlamaForCausalLM(model.config)
    assert all(one.is_meta for one in blank.parameters())
    model.save_pretrained(tmp_path)
    loaded = NVLlamaForCausalLM.from_pretrained(tmp_path)
    for one in (model.to(torch.bfloat16), blank, loaded):
        assert torch.equal(one.model.rotary_emb.inv_freq, wanted)
        assert one.model.rotary_emb(torch.arange(3)).dtype == torch.float32
    blank.init_empty_weights()
    assert not any(one.is_meta for one in blank.parameters())
    assert blank(ids).logits.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading(tmp_path: Path, tied: bool, ids: Tensor) -> None:
    model = nvllama(llama(tie_word_embeddings=tied), "bshd")
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "nvllama"
    assert written["architectures"] == ["NVLlamaForCausalLM"]
    loads = [NVLlamaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]
    for load in loads:
        loaded = load(tmp_path)
        assert type(loaded) is NVLlamaForCausalLM
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
        assert torch.equal(loaded(ids).logits, wanted)
    assert type(AutoModel.from_pretrained(tmp_path)) is converters.te.NVLlamaModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is NVLlamaConfig
    # The recipe's own config.json has another model type, and need not name format and mask.
    for name in ("attn_input_format", "self_attn_mask_type"):
        written.pop(name)
    (tmp_path / "config.json").write_text(json.dumps({**written, "model_type": "llama"}))
    theirs = NVLlamaForCausalLM.from_pretrained(tmp_path)
    assert (theirs.config.attn_input_format, theirs.config.self_attn_mask_type) == ("thd", "padding_causal")
    assert torch.equal(theirs.state_dict()["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_a_parameter_that_a_checkpoint_lacks_is_started_not_left_as_it_was(tmp_path: Path) -> None:
    model = nvllama(llama(), "thd")
    missing = "model.layers.1.layernorm_mlp.fc1_bias"
    norm = "model.layers.0.self_attention.layernorm_qkv.layer_norm_weight"
    kept = {key: value for key, value in model.state_dict().items() if key not in (missing, norm)}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, told = NVLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == {missing, norm}
    assert not loaded.state_dict()[missing].any()
    assert bool((loaded.state_dict()[norm] == 1).all())


def test_precision_of_layers_and_recipes() -> None:
    recipe = recipe_of("fp8-current")
    config = NVLlamaConfig(**sizes())
    with pytest.warns(UserWarning, match="all layers"):
        model = NVLlamaForCausalLM(config, fp8_recipe=recipe)
    assert model.model.precision.of == ("fp8", "fp8")
    assert config.layer_precision is None  # the caller's config is his own
    with pytest.raises(RecipeError, match="Both FP8 and FP4"):
        NVLlamaForCausalLM(config, fp8_recipe=recipe, fp4_recipe=recipe)
    with pytest.raises(RecipeError, match=r"set config\.layer_precision"):
        NVLlamaForCausalLM(config, fp4_recipe=recipe)
    with pytest.raises(RecipeError, match="no fp4_recipe"):
        NVLlamaForCausalLM(NVLlamaConfig(**sizes(layer_precision=["fp4", None])))


def test_only_the_layers_that_are_asked_for_are_quantised(ids: Tensor) -> None:
    """A layer in FP8 changes what comes after it and nothing before; the head is never quantised."""
    hf = llama(hidden_size=96, head_dim=32, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1)
    state = {key: one.to(torch.bfloat16) for key, one in NVLlamaForCausalLM(_config(hf)).state_dict().items()}

    def states(precision: list[str | None] | None) -> tuple[Tensor, ...]:
        recipe = recipe_of("fp8-current") if precision else None
        config = _config(hf, layer_precision=precision, dtype="bfloat16")
        model = NVLlamaForCausalLM(config, fp8_recipe=recipe).eval()
        model.load_state_dict(state)
        out = model(ids, attention_mask=LEFT, output_hidden_states=True)
        assert torch.equal(out.logits, torch.nn.functional.linear(out.hidden_states[-1], state["lm_head.weight"]))
        return tuple(out.hidden_states)

    plain, second = states(None), states([None, "fp8"])
    assert torch.equal(plain[1], second[1])
    assert not torch.equal(plain[2], second[2])
    first = states(["fp8", None])
    assert not torch.equal(plain[1], first[1])


def _config(hf: LlamaForCausalLM, **changes: Any) -> NVLlamaConfig:
    return NVLlamaConfig(**{**hf.config.to_dict(), **changes})


def test_extra_states_are_kept_apart_and_read_back(tmp_path: Path) -> None:
    changes = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 160, "attention_bias": False, "mlp_bias": False}
    config = NVLlamaConfig(**sizes(**changes, layer_precision=["fp8", "fp8"], dtype="bfloat16"))
    recipe = recipe_of("fp8-delayed")
    model = NVLlamaForCausalLM(config, fp8_recipe=recipe)
    row = torch.randint(1, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
    model(row, labels=row).loss.backward()
    assert not [key for key in model.state_dict() if "_extra_state" in key]
    states = model.extra_states()
    assert len(states) == 6
    assert all(one.dtype == torch.uint8 for one in states.values())
    model.save_pretrained(tmp_path)
    model.save_extra_states(tmp_path)
    wanted = model.eval()(row).logits
    loaded = NVLlamaForCausalLM.from_pretrained(tmp_path, fp8_recipe=recipe).eval()
    assert not torch.equal(loaded(row).logits, wanted)  # scales of one, where the model had others
    loaded.load_extra_states(tmp_path)
    assert loaded.extra_states().keys() == states.keys()
    assert torch.equal(loaded(row).logits, wanted)
    with pytest.raises(CheckpointError, match="does not have"):
        loaded.load_extra_states({"model.layers.9.self_attention.proj._extra_state": states[next(iter(states))]})
    with pytest.raises(CheckpointError, match="no such file"):
        loaded.load_extra_states(tmp_path / "elsewhere")


def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor) -> None:
    model = nvllama(llama(), "thd").train()
    wanted = ask(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable()
    found = ask(model, input_ids=ids, labels=ids)
    assert all(torch.equal(found[2][key], one) for key, one in wanted[2].items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delayed = NVLlamaForCausalLM(NVLlamaConfig(**sizes()), fp8_recipe=recipe_of("fp8-delayed")).train()
    delayed.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="amaxes twice"):
        delayed(ids, labels=ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_with_and_without_a_cache(layout: str, ids: Tensor) -> None:
    model = nvllama(llama(), layout)
    given = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **given, return_dict_in_generate=True)
    assert cached.past_key_values is not None
    assert torch.equal(cached.sequences, model.generate(ids, **given, use_cache=False))


def test_heads_of_other_tasks(tmp_path: Path, ids: Tensor) -> None:
    config = NVLlamaConfig(**sizes(num_labels=4))
    shapes = {
        converters.te.NVLlamaForSequenceClassification: (ROWS, 4),
        converters.te.NVLlamaForTokenClassification: (ROWS, TOKENS, 4),
    }
    for kind, shape in shapes.items():
        model = kind(config).eval()
        assert model(ids, attention_mask=RIGHT).logits.shape == shape
        model.save_pretrained(tmp_path)
        assert torch.equal(
            kind.from_pretrained(tmp_path).eval()(ids, attention_mask=RIGHT).logits,
            model(ids, attention_mask=RIGHT).logits,
        )
    answers = converters.te.NVLlamaForQuestionAnswering(config)(ids, attention_mask=RIGHT)
    assert answers.start_logits.shape == (ROWS, TOKENS)


@pytest.mark.parametrize("mask_type", ["padding_causal", "causal", "no_mask", "padding"])
@pytest.mark.parametrize("recipe", ["fp8-delayed", "fp8-current", "fp8-block", "mxfp8", "nvfp4"])
def test_a_batch_of_any_size_under_every_recipe(recipe: str, mask_type: str) -> None:
    """Rows that the GEMMs do not divide are filled up as by hand, with zeros that nobody attends to."""
    changes: dict[str, Any] = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 160}
    changes |= {"attention_bias": False, "mlp_bias": False, "dtype": "bfloat16"}
    changes |= {"layer_precision": ["fp4" if recipe == "nvfp4" else "fp8"] * 2}
    name = "fp4_recipe" if recipe == "nvfp4" else "fp8_recipe"
    by_hand = {"causal": "padding_causal", "no_mask": "padding"}.get(mask_type, mask_type)
    model, padded = (
        NVLlamaForCausalLM(
            NVLlamaConfig(**sizes(**changes, attn_input_format="bshd", self_attn_mask_type=kind)),
            **{name: recipe_of(recipe)},
        ).eval()
        for kind in (mask_type, by_hand)
    )
    padded.load_state_dict(model.state_dict())
    rows = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    wide, mask = (torch.nn.functional.pad(one, (0, 25)) for one in (rows, torch.ones_like(rows)))
    assert not model.get_input_embeddings()(wide[:, 7:]).any()  # padding's own embedding is zero
    wanted, found = padded(wide, attention_mask=mask).logits[:, :7], model(rows).logits
    assert wanted.count_nonzero()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cu_seq_lens_q": [1, 4, 11]}, "must start at 0"),
        ({"cu_seq_lens_q": [0, 7, 4, 11]}, "not decrease"),
        ({"cu_seq_lens_q": [0, 4, 9]}, "end at 11, the tokens"),
        ({"cu_seq_lens_q": [0, 4, 12]}, "end at 11, the tokens"),
        ({"cu_seq_lens_q": [0, 4, 11], "cu_seq_lens_k": [0, 4, 9]}, "cu_seq_lens_k must start"),
        ({"cu_seq_lens_q": [0, 3, 7], "cu_seq_lens_q_padded": [0, 4, 9]}, "cu_seq_lens_q_padded must start"),
        ({"cu_seq_lens_q": [0, 5, 8], "cu_seq_lens_q_padded": [0, 4, 11]}, "do not fit in cu_seq_lens_q_padded"),
    ],
)
def test_boundaries_that_are_not_those_of_the_tokens_are_refused(
    given: dict[str, list[int]], says: str, ids: Tensor
) -> None:
    model = NVLlamaForCausalLM(NVLlamaConfig(**sizes()))
    boundaries = {name: torch.tensor(edges, dtype=torch.int32) for name, edges in given.items()}
    with pytest.raises(InputError, match=says):
        model(ids[:1], **boundaries, max_length_q=8)


def test_a_checkpoint_of_hugging_face_is_not_taken_for_a_start_from_nothing(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"python -m converters convert --from hf --to te .*TARGET"):
        NVLlamaForCausalLM.from_pretrained(tmp_path)


def test_resizing_the_vocabulary_is_refused_before_anything_changes() -> None:
    model = NVLlamaForCausalLM(NVLlamaConfig(**sizes()))
    with pytest.raises(ConfigError, match="convert_llama_te_to_hf"):
        model.resize_token_embeddings(VOCABULARY + 3)
    assert model.config.vocab_size == VOCABULARY
    assert model.model.embed_tokens.weight.shape[0] == VOCABULARY
