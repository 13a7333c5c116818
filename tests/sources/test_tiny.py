from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import CheckpointError, ConfigError
from converters.sources import PACKAGED, read_config
from parity import coded
from parity.seeded import _bytes, key_table, parameters, write_checkpoint
from parity.shards import read_entries
from parity.tiny import llama3_bands, odd_config, shrink, with_layers

Config = dict[str, Any]
NAMES = sorted(PACKAGED)


def variants() -> dict[str, Config]:
    """Tiny models that differ in features: every one a checkpoint must be written for."""
    return {
        "llama-3.2": shrink(read_config("Llama-3.2-1B")),
        "llama-2": shrink(read_config("Llama-2-7b-hf")),
        "smollm2": shrink(read_config("SmolLM2-135M")),
        "odd": odd_config(),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_has_no_coincidences(name: str) -> None:
    original = read_config(name)
    config = shrink(original)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, hidden, ffn = config["head_dim"], config["hidden_size"], config["intermediate_size"]
    mha = original["num_attention_heads"] == original["num_key_value_heads"]
    axes = [config["num_hidden_layers"], heads, head_dim, head_dim // 2, hidden, ffn, config["vocab_size"]]
    axes += [heads * head_dim, 2 * ffn, (heads + 2 * groups) * head_dim]
    axes += [] if mha else [groups, heads // groups, groups * head_dim]
    assert len(set(axes)) == len(axes)
    assert (groups == heads) == mha
    assert head_dim != hidden // heads
    assert config["vocab_size"] % 2
    assert all(heads % tp == 0 and ffn % tp == 0 for tp in (1, 2, 4, 8))
    assert config["rms_norm_eps"] not in (1e-5, 1e-6)
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    assert theta not in (1e4, 5e5)
    assert parameters(config) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_features_and_spellings_survive(name: str) -> None:
    original = read_config(name)
    before = copy.deepcopy(original)
    config = shrink(original)
    assert original == before, "shrinking must not change its argument"
    assert config.keys() - original.keys() <= {"head_dim"}
    assert original.keys() <= config.keys()
    for field in ("tie_word_embeddings", "model_type", "hidden_act", "dtype", "torch_dtype", "architectures"):
        assert config.get(field) == original.get(field)
    for field in ("rope_scaling", "rope_parameters"):
        old, new = original.get(field), config.get(field)
        assert (old and old.keys()) == (new and new.keys())


def test_llama3_bands_each_hold_a_frequency_and_factors_are_told_apart() -> None:
    small, large = shrink(read_config("Llama-3.1-8B")), shrink(read_config("Llama-3.2-1B"))
    for config in (small, large, odd_config()):
        rope = config["rope_scaling"]
        assert min(llama3_bands(config["rope_theta"], config["head_dim"], rope)) >= 1
        assert rope["original_max_position_embeddings"] < 120
        assert (rope["low_freq_factor"], rope["high_freq_factor"]) != (1.0, 4.0)
    assert small["rope_scaling"]["factor"] not in (8.0, large["rope_scaling"]["factor"])


def test_rope_in_the_modern_spelling_and_token_ids_keep_their_relations() -> None:
    config = read_config("Llama-3.2-1B")
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    config |= {"rope_parameters": rope, "eos_token_id": [128001, 128009], "pad_token_id": 128001}
    tiny = shrink(config)
    assert "rope_theta" not in tiny
    assert tiny["rope_parameters"]["rope_theta"] == pytest.approx(3e5)
    assert tiny["rope_parameters"]["original_max_position_embeddings"] == 76
    assert tiny["pad_token_id"] == tiny["eos_token_id"][0] < tiny["eos_token_id"][1] < tiny["vocab_size"]
    assert tiny["bos_token_id"] < tiny["eos_token_id"][0]
    assert shrink(config | {"pad_token_id": -1})["pad_token_id"] == -1


def test_what_cannot_be_shrunk_is_refused() -> None:
    config = read_config("Llama-3.2-1B")
    with pytest.raises(ConfigError, match="'mixtral'"):
        shrink(config | {"model_type": "mixtral"})
    with pytest.raises(ConfigError, match="'longrope'"):
        shrink(config | {"rope_scaling": {"rope_type": "longrope"}})
    with pytest.raises(ConfigError, match="lacks hidden_size"):
        shrink(config | {"hidden_size": None})
    assert with_layers(config, 3)["num_hidden_layers"] == 3
    for layers in (0, 17):
        with pytest.raises(ConfigError, match="from 1 to the model's 16"):
            with_layers(config, layers)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", variants())
def test_transformers_loads_what_is_written(name: str, dtype: str, shards: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = variants()[name]
    folder = write_checkpoint(config, tmp_path, dtype=dtype, shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    assert len(list(folder.glob("*.safetensors"))) == shards
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not [found for found in info.values() if found]
    assert model.dtype == getattr(torch, dtype)
    assert model.num_parameters() == parameters(config)
    with torch.no_grad():
        tokens = torch.randint(config["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(0))
        logits = model(tokens).logits.float()
    assert 1.0 < logits.std() < 4.0
    assert logits.abs().max() < 20
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert model.generation_config.eos_token_id == stops
    assert len(set(stops)) >= 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Hello 2026 é!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == stops[0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "[user] hi<eos>"


@pytest.mark.parametrize("name", variants())
def test_every_tensor_and_every_constant_matters_to_the_logits(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = variants()[name]
    folder = write_checkpoint(config, tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained
    tokens = torch.randint(config["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = load(folder)
        clean = model(tokens).logits
        for key in [key for key in key_table(config) if ".layers." not in key or ".layers.3." in key]:
            weight = model.get_parameter(key)
            saved = weight.clone()
            weight[..., 0] *= 1.01
            changed = (model(tokens).logits - clean).abs().max()
            weight.copy_(saved)
            if key.endswith("k_proj.bias"):
                continue  # only its rotated part can be felt: softmax does not see what all keys share
            assert changed > 1e-5, key
        assert (load(folder, rms_norm_eps=1e-5)(tokens).logits - clean).abs().max() > 1e-3
        if rope := config.get("rope_scaling"):
            for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                path = folder / "config.json"
                changed_config = copy.deepcopy(config)
                changed_config["rope_scaling"][field] = type(rope[field])(rope[field] * 1.1 + 1)
                path.write_text(json.dumps(changed_config))
                assert (load(folder)(tokens).logits - clean).abs().max() > 1e-3, field


def test_seeded_weights_depend_on_seed_and_key_alone(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = shrink(read_config("Llama-3.2-1B"))
    a, b, c = (
        load_file(write_checkpoint(cfg, tmp_path / name, seed=seed) / "model.safetensors")
        for name, cfg, seed in (("a", config, 0), ("b", with_layers(config, 2), 0), ("c", config, 1))
    )
    assert all(np.array_equal(a[key], b[key]) for key in b)
    assert not any(np.array_equal(a[key], c[key]) for key in a)
    layers = [a[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)]
    assert not any(np.array_equal(x, y) for x, y in itertools.combinations(layers, 2))
    norm = a["model.layers.0.input_layernorm.weight"]
    assert 0.05 < norm.std() < 0.4
    assert not (norm == 1).any()
    # These bits are what goldens of seeded models rest on: the same for ever and everywhere.
    first = a["model.norm.weight"][:3].view(np.uint32).tolist()
    assert first == [1060968295, 1065962942, 1066346887]


@pytest.mark.parametrize("name", variants())
def test_coded_weights_say_where_they_came_from(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = variants()[name]
    table = key_table(config)
    folder = write_checkpoint(config, tmp_path, kind="coded")
    tensors = load_file(folder / "model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == table
    everything = np.concatenate([tensors[key].ravel() for key in table])
    assert np.isfinite(everything).all()
    assert (np.abs(everything) >= np.finfo(np.float32).tiny).all(), "no zero and no subnormal"
    assert len(np.unique(everything.view(np.uint32))) == everything.size, "one code an element"
    for key in table:
        assert np.array_equal(tensors[key].view(np.uint32), coded.expected(table, key))
    k = tensors["model.layers.3.self_attn.k_proj.weight"]
    assert coded.where_from(table, float(k[12, 5])) == "model.layers.3.self_attn.k_proj.weight[12, 5]"
    assert coded.where_from(table, 0.0) == "zero"
    near_misses = [coded.decode(table, float(x)) for x in (k[12, 5] * np.float32(1.01), np.nan, np.inf, 1e300)]
    assert ("model.layers.3.self_attn.k_proj.weight", (12, 5)) not in near_misses
    with pytest.raises(ConfigError, match="did you mean"):
        coded.expected(table, "model.layers.3.self_attn.kproj.weight")


@given(st.integers(0, coded.CAPACITY - 1))
def test_every_code_is_finite_and_decodes_to_its_number(number: int) -> None:
    table = {"t": (coded.CAPACITY,)}
    value = float(np.frombuffer(coded.codes(number, 1, "F32"), "<f4")[0])
    assert math.isfinite(value)
    assert coded.decode(table, value) == ("t", (number,))


def test_coded_bfloat16_tells_places_apart_without_naming_them(tmp_path: Path) -> None:
    config = shrink(read_config("Llama-3.2-1B"))
    table = key_table(config)
    entries = read_entries(write_checkpoint(config, tmp_path, kind="coded", dtype="bfloat16"))
    bits = {key: np.frombuffer(b"".join(entries[key].chunks()), "<u2").reshape(table[key]) for key in table}
    assert all(np.array_equal(bits[key], coded.expected(table, key, "BF16")) for key in table)
    a, b = bits["model.layers.0.self_attn.k_proj.weight"], bits["model.layers.0.self_attn.v_proj.weight"]
    assert (a == b).mean() < 1e-3
    assert (a[:, 1:] == a[:, :-1]).mean() < 1e-3
    exponent = np.concatenate([x.ravel() for x in bits.values()]) >> 7 & 0xFF
    assert exponent.min() >= 1
    assert exponent.max() <= 254


def test_more_elements_than_codes_and_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the 4,261,412,864 codes"):
        write_checkpoint(read_config("Llama-3.1-8B"), tmp_path / "a", kind="coded")
    with pytest.raises(ConfigError, match="expected float32 or bfloat16"):
        write_checkpoint(odd_config(), tmp_path / "b", dtype="float64")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    exact = load_file(write_checkpoint(odd_config(), tmp_path / "a") / "model.safetensors")
    rounded = load_file(write_checkpoint(odd_config(), tmp_path / "b", dtype="bfloat16") / "model.safetensors")
    assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)
    # Ties are too rare in random weights to be left to chance: odd and even last places, both signs.
    ties = ((np.arange(0x3F00, 0x3F40, dtype=np.uint32) << 16) + 0x8000).view(np.float32)
    ties = np.concatenate([ties, -ties])
    bits = np.frombuffer(_bytes(ties, "BF16"), "<i2")
    assert np.array_equal(bits, torch.from_numpy(ties).bfloat16().view(torch.int16).numpy())


def test_damaged_weight_files_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(with_layers(odd_config(), 1), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        CheckpointError, match=r"(?s)model\.safetensors is not a safetensors file.*'lm_head.weight' .* truncated"
    ):
        read_entries(folder)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_entries(folder)
