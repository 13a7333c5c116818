"""Folders and live models between Hugging Face and Transformer Engine: every bit, every file, every field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import converters.te  # noqa: F401  # tells transformers of the model
from converters import __main__ as command_line
from converters.convert import Conversion, convert_folder
from converters.errors import CheckpointError, ConfigError, ConversionError, TopologyError
from converters.execute import bits
from converters.models import column_of, family_of
from converters.models.llama_fields import TE
from converters.sources import read_config
from converters.te import NVLlamaConfig, NVLlamaForCausalLM, convert
from converters.te.parallel import Parallel
from converters.topology import Topology
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

ODD = with_layers(odd_config(), 2) | {"hidden_size": 30, "intermediate_size": 45}
TIED = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2)
MODELS = {
    "biased": ODD,
    "attention-biased": ODD | {"mlp_bias": False},
    "mlp-biased": ODD | {"attention_bias": False},
    "tied": TIED,
}
DEFAULTS = {
    "attn_input_format": "thd",
    "self_attn_mask_type": "padding_causal",
    "layer_precision": None,
    "use_quantized_model_init": False,
}
QKV_BIAS = "model.layers.0.self_attention.layernorm_qkv.bias"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    shards = {"biased": 3}
    return {name: write_checkpoint(config, root / name, shards=shards.get(name, 1)) for name, config in MODELS.items()}


def tensors(folder: Path) -> Tensors:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(bits(actual[key]), bits(tensor)), key


def parameters(model: torch.nn.Module) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def to_te(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_folder(source, target, target_column="te", **options)


def beside(target: Path) -> list[str]:
    """What a conversion left beside its target."""
    return [path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]


# Configs


SPELLINGS = {
    "as transformers writes it": lambda config: json.dumps(config, indent=2, sort_keys=True) + "\n",
    "on one line": lambda config: json.dumps(config, separators=(",", ":")),
    "with tabs": lambda config: json.dumps(config, indent="\t"),
    "classes last": lambda config: json.dumps(
        {k: v for k, v in config.items() if k != "architectures"} | {"architectures": config["architectures"]}
    ),
    "a space before commas": lambda config: json.dumps(config, separators=(" , ", " : "), indent=1),
    "without classes": lambda config: json.dumps({k: v for k, v in config.items() if k != "architectures"}),
    "without a line's end, in another alphabet": lambda config: json.dumps(
        config | {"_name_or_path": 'лама, "}{"'}, ensure_ascii=False
    ),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_config_there_and_back_is_the_same_text(spelled: Any) -> None:
    text = spelled(odd_config())
    there = TE.from_hf(text, attn_input_format="bshd")
    config = json.loads(there)
    assert (config["model_type"], config["attn_input_format"]) == ("nvllama", "bshd")
    assert config.get("architectures", ["NVLlamaForCausalLM"]) == ["NVLlamaForCausalLM"]
    assert {
        name: value for name, value in config.items() if name not in {*DEFAULTS, "model_type", "architectures"}
    } == {name: value for name, value in json.loads(text).items() if name not in {"model_type", "architectures"}}
    assert TE.to_hf(there) == text
    assert ('\n  "attn_input_format": ' in there) == ('\n  "rms_norm_eps": ' in text), "laid out as the rest"


# What `NVLlamaConfig.save_pretrained` of the recipe writes, and the `auto_map` that its export adds.
RECIPE = odd_config() | {
    "architectures": ["NVLlamaForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_llama_te.NVLlamaConfig"},
    "layer_precision": ["fp8"] * 6,
    "use_quantized_model_init": False,
}


@pytest.mark.parametrize(
    ("config", "column"),
    [
        (odd_config(), "hf"),
        (RECIPE, "te"),
        (odd_config() | {"architectures": ["NVLlamaForCausalLM"]}, "te"),
        (odd_config() | {"model_type": "nvllama", "architectures": None}, "te"),
        (odd_config() | {"architectures": None, "layer_precision": None}, "te"),
        ({"layer_precision": None, "attn_input_format": "bshd"} | odd_config(), "te"),  # its own fields first
    ],
)
def test_the_column_of_a_folder(config: dict[str, Any], column: str) -> None:
    assert column_of(config) == column
    assert family_of(config).name == "llama"
    back = family_of(config).hf_config(config)
    assert column_of(back) == "hf"
    assert back["model_type"] == "llama"
    assert not {*DEFAULTS, "auto_map"} & set(back)
    family_of(config).fields.read(back)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attn_input_format", "sbhd", "attn_input_format='sbhd', expected one of 'thd', 'bshd'"),
        ("self_attn_mask_type", "no_mask", "self_attn_mask_type='no_mask', expected one of"),
        ("layer_precision", ["fp8"], "layer_precision has 1 entries, expected one for each of 6 layers"),
        ("layer_precision", ["fp8", None] * 2 + ["int8", None], "layer_precision has 'int8' in it"),
        ("layer_precision", "fp8", "layer_precision='fp8', expected a list"),
        ("use_quantized_model_init", 1, "use_quantized_model_init=1, expected one of False, True"),
        ("auto_map", {"AutoConfig": "else.where"}, "auto_map"),
        ("attn_format", "thd", "attn_format"),
    ],
)
def test_a_field_with_a_wrong_value_is_refused(field: str, value: Any, message: str) -> None:
    family = family_of(RECIPE)
    with pytest.raises(ConfigError, match=message):
        family.plan("te", "hf", RECIPE | {field: value})
    with pytest.raises(ConfigError):
        TE.from_hf(json.dumps(odd_config()), **{field: value})


# Folders


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = folders[name]
    done = to_te(source, tmp_path / "te")
    convert_folder(tmp_path / "te", tmp_path / "hf", target_column="hf")
    same(tensors(tmp_path / "hf"), tensors(source))
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "te").iterdir()} == files == {p.name for p in (tmp_path / "hf").iterdir()}
    for file in files:
        if not file.endswith(".safetensors") and "index" not in file:
            assert (tmp_path / "hf" / file).read_bytes() == (source / file).read_bytes(), file
    assert done.columns == ("hf", "te")
    assert done.options == DEFAULTS
    held = tensors(tmp_path / "te")
    assert done.tensors == (len(tensors(source)), len(held))
    assert done.bytes == sum(tensor.numel() * 4 for tensor in held.values())
    assert set(map(str, done.carried)) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_single_file_comes_back_to_the_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the safetensors library orders tensors, which is how published files are."""
    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(folders["tied"])
    model.save_pretrained(source)
    to_te(source, tmp_path / "te")
    convert_folder(tmp_path / "te", tmp_path / "hf", target_column="hf")
    for file in source.iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_was_written(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    to_te(folders[name], tmp_path / "te")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "te", output_loading_info=True)
    assert type(model) is NVLlamaForCausalLM
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(parameters(model), tensors(tmp_path / "te"))
    model.save_pretrained(tmp_path / "saved")
    convert_folder(tmp_path / "saved", tmp_path / "hf", target_column="hf")
    same(tensors(tmp_path / "hf"), tensors(folders[name]))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.to_dict()["model_type"] == "llama"


def test_what_the_recipe_writes_converts(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its class names, its `auto_map`, states of quantisation and frequencies as some versions store them."""
    te = tmp_path / "te"
    to_te(folders["mlp-biased"], te)
    config = json.loads((te / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_llama_te.NVLlamaModel"}}
    (te / "config.json").write_text(json.dumps(config | {"model_type": "llama", "layer_precision": ["fp8", None]}))
    (te / "modeling_llama_te.py").write_text("")
    held = tensors(te)
    model = AutoModelForCausalLM.from_pretrained(folders["mlp-biased"])
    frequencies = {"model.rotary_emb.inv_freq": model.model.rotary_emb.inv_freq.clone()}
    states = {"model.layers.0.self_attention.proj._extra_state": torch.arange(3, dtype=torch.uint8)}
    save_file(held | frequencies | states, te / "model.safetensors", metadata={"format": "pt"})
    done = convert_folder(te, tmp_path / "hf", target_column="hf")
    same(tensors(tmp_path / "hf"), tensors(folders["mlp-biased"]))
    assert done.dropped.keys() == {*frequencies, *states}
    assert list(done.let_go) == ["layer_precision=['fp8', None]"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (folders["mlp-biased"] / "config.json").read_text()
    )
    assert not (tmp_path / "hf" / "modeling_llama_te.py").exists()
    frequencies["model.rotary_emb.inv_freq"][2] *= 1.01
    save_file(held | frequencies, te / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not what the config's rope fields give"):
        convert_folder(te, tmp_path / "other", target_column="hf")


def test_a_conversion_that_fails_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    te, target = tmp_path / "te", tmp_path / "hf"
    to_te(folders["mlp-biased"], te)
    held = tensors(te)
    held[QKV_BIAS][5] = 1
    save_file(held, te / "model.safetensors", metadata={"format": "pt"})
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{QKV_BIAS}: 1 of .* elements that must be 0 are not"):
        convert_folder(te, target, target_column="hf", overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not beside(target)
    held[QKV_BIAS][5] = 0
    held["model.norm.weights"] = held.pop("model.norm.weight")
    save_file(held, te / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(did you mean 'model.norm.weights'\?\)"):
        convert_folder(te, target, target_column="hf", overwrite=True)
    assert not beside(target)


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    source, target = folders["tied"], tmp_path / "te"
    with pytest.raises(ConversionError, match="in the 'hf' column already"):
        convert_folder(source, target, target_column="hf")
    with pytest.raises(ConfigError, match="is in the 'hf' column, expected 'te'"):
        convert_folder(source, target, source_column="te", target_column="hf")
    with pytest.raises(ConversionError, match="'meta' is no column of checkpoint folders, expected hf, te, megatron"):
        convert_folder(source, target, target_column="meta")
    with pytest.raises(ConfigError, match=r"attn_format \(did you mean 'attn_input_format'"):
        to_te(source, target, options={"attn_format": "thd"})
    with pytest.raises(CheckpointError, match="is the source itself"):
        to_te(source, source, overwrite=True)
    gelu = tmp_path / "gelu"
    write_checkpoint(TIED | {"hidden_act": "gelu"}, gelu)
    with pytest.raises(ConfigError, match="hidden_act='gelu', where only 'silu'"):
        to_te(gelu, target)
    assert not target.exists()
    to_te(source, target)
    with pytest.raises(CheckpointError, match="exists already"):
        to_te(source, target)
    to_te(source, target, overwrite=True)
    assert not beside(target)


def test_a_bridge_to_megatron_says_to_convert_first(folders: dict[str, Path], tmp_path: Path) -> None:
    from converters.bridge import AutoBridge

    to_te(folders["tied"], tmp_path / "te")
    with pytest.raises(ConfigError, match=r"in the 'te' column, expected 'hf': convert it first"):
        AutoBridge.from_hf_pretrained(tmp_path / "te")
    assert not AutoBridge.can_handle(tmp_path / "te")


def test_a_tied_head_that_is_stored_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(TIED, source)
    held = tensors(source)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    to_te(source, tmp_path / "te")
    assert "lm_head.weight" in tensors(tmp_path / "te")
    convert_folder(tmp_path / "te", tmp_path / "hf", target_column="hf")
    same(tensors(tmp_path / "hf"), held)
    model = convert.load(tmp_path / "te", device="cpu")
    convert.save(model, source, tmp_path / "saved")
    same(tensors(tmp_path / "saved"), held)


def test_the_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = command_line.main(["convert", *map(str, arguments)])
        return code, *capsys.readouterr()

    te, back = tmp_path / "te", tmp_path / "hf"
    code, out, err = call("--from", "hf", "--to", "te", "--option", "attn_input_format=bshd", folders["mlp-biased"], te)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert f"source {folders['mlp-biased']} (hf) target {te} (te) tensors 27 -> 23" in words
    assert 'config attn_input_format: "bshd"' in words
    assert "elements that one side lacks, all zero" in words
    assert call("--to", "hf", "--quiet", te, back) == (0, "", "")
    same(tensors(back), tensors(folders["mlp-biased"]))
    code, out, err = call("--to", "hf", te, back)
    assert (code, out) == (2, "")
    assert "exists already" in err
    assert "expected NAME=VALUE" in call("--to", "te", "--option", "thd", folders["tied"], tmp_path / "x")[2]
    for pp in (["--pp", "2"], ["--pp", "2", "--vpp", "2"]):
        assert command_line.main(["plan", "--model", str(te), "--from", "te", "--to", "megatron", *pp]) == 2
        assert "has no pipeline stages" in capsys.readouterr().err
    assert command_line.main(["plan", "--model", str(te), "--from", "te", "--to", "hf", "--tp", "3"]) == 0
    assert "proved" in capsys.readouterr().out


def test_files_convert_without_transformers_and_megatron(folders: dict[str, Path], tmp_path: Path) -> None:
    code = """
import sys
from converters.__main__ import main
code = main(["convert", "--to", "te", *sys.argv[1:]])
assert not {"transformers", "megatron", "transformer_engine"} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders["tied"]), str(tmp_path / "te")],
        env={**os.environ, "PYTHONPATH": str(Path(command_line.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "20 -> 14" in done.stdout


# Live models


@pytest.mark.parametrize("name", MODELS)
def test_live_models_convert_both_ways(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    hf = LlamaForCausalLM.from_pretrained(folders[name], attn_implementation="eager").train()
    hf.model.rotary_emb.inv_freq *= 1.5  # what the model turns by, whatever its config says
    te = convert.convert_llama_hf_to_te(hf, attn_input_format="bshd", self_attn_mask_type="causal")
    assert (type(te), te.training, te.device) == (NVLlamaForCausalLM, True, hf.device)
    assert (te.config.attn_input_format, te.config.self_attn_mask_type) == ("bshd", "causal")
    to_te(folders[name], tmp_path / "te")
    same(parameters(te), tensors(tmp_path / "te"))
    assert torch.equal(te.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)
    tied = bool(hf.config.tie_word_embeddings)
    assert (te.lm_head.weight is te.model.embed_tokens.weight) == tied
    ids = torch.arange(24).reshape(2, 12)
    expected, actual = hf.eval()(ids).logits, te.eval()(ids).logits
    assert (expected - actual).abs().max() < 1e-4 * expected.abs().max()
    back = convert.convert_llama_te_to_hf(te)
    assert (type(back), back.training) == (LlamaForCausalLM, False)
    same(parameters(back), parameters(hf))
    assert torch.equal(back.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert back.config.to_diff_dict() == hf.config.to_diff_dict()
    assert back.generation_config.to_dict() == hf.generation_config.to_dict()


def test_a_live_model_keeps_its_dtype_and_config_fields(folders: dict[str, Path]) -> None:
    hf = LlamaForCausalLM.from_pretrained(folders["biased"]).to(torch.bfloat16)
    te = convert.convert_llama_hf_to_te(hf, layer_precision=["fp8", None])
    assert (te.dtype, te.config.dtype) == (torch.bfloat16, torch.bfloat16)
    back = convert.convert_llama_te_to_hf(te, attention_dropout=0.25)
    same(parameters(back), parameters(hf))
    assert back.config.attention_dropout == 0.25
    assert not set(DEFAULTS) & set(back.config.to_dict())
    hf.model.norm.float()
    with pytest.raises(CheckpointError, match="parameters of bfloat16 and float32, expected one dtype"):
        convert.convert_llama_hf_to_te(hf)


def test_a_live_model_that_has_no_counterpart_is_refused(folders: dict[str, Path]) -> None:
    te = convert.load(folders["mlp-biased"], device="cpu")
    with torch.no_grad():
        te.get_parameter(QKV_BIAS)[3] = 1
    with pytest.raises(CheckpointError, match=r"1 of .* elements that must be 0 are not"):
        convert.convert_llama_te_to_hf(te)
    te.model.parallel = Parallel(topology=Topology(tp=2))
    with pytest.raises(TopologyError, match="cut over tp=2 ranks"):
        convert.convert_llama_te_to_hf(te)
    fields = LlamaConfig(**ODD).to_dict() | {"hidden_act": "gelu"}
    with pytest.raises(ConfigError, match="hidden_act"):
        convert.convert_llama_hf_to_te(LlamaForCausalLM(LlamaConfig(**fields)))


@pytest.mark.parametrize("name", MODELS)
def test_load_and_save(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, te = folders[name], tmp_path / "te"
    to_te(source, te)
    model = convert.load(source, device="cpu")
    assert not model.training
    same(parameters(model), tensors(te))
    same(parameters(convert.load(te, device="cpu", attn_input_format="bshd")), tensors(te))
    stated = json.loads((source / "generation_config.json").read_text())
    assert model.generation_config.eos_token_id == stated["eos_token_id"]
    for column, like in (("hf", source), ("te", te)):
        for of in (source, te):
            convert.save(model, of, tmp_path / "saved", column=column, overwrite=True)
            same(tensors(tmp_path / "saved"), tensors(like))
            for file in ("config.json", "tokenizer.json", "generation_config.json"):
                assert (tmp_path / "saved" / file).read_bytes() == (like / file).read_bytes(), (column, of, file)


def test_what_is_saved_is_what_the_model_is_by_now(folders: dict[str, Path], tmp_path: Path) -> None:
    model = convert.load(folders["tied"], device="cpu", dtype=torch.bfloat16, cast=True)
    model.config.rope_parameters["rope_theta"] = 54321.0
    convert.save(model, folders["tied"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    was = json.loads((folders["tied"] / "config.json").read_text())
    changed = {name for name in config if config[name] != was.get(name)}
    assert changed == {"rope_theta", "dtype"}
    assert (config["rope_theta"], config["dtype"]) == (54321.0, "bfloat16")
    rounded = {key: tensor.to(torch.bfloat16) for key, tensor in tensors(folders["tied"]).items()}
    same(tensors(tmp_path / "hf"), rounded)


def test_a_dtype_changes_only_on_request(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="a cast must be asked for"):
        convert.load(folders["tied"], device="cpu", dtype=torch.bfloat16)
    assert convert.load(folders["tied"], device="cpu", dtype=torch.bfloat16, cast=True).dtype == torch.bfloat16


def test_integers_are_never_cast(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(TIED, source)
    held = tensors(source)
    held["model.layers.1.mlp.down_proj.weight"] = held["model.layers.1.mlp.down_proj.weight"].to(torch.int8)
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.layernorm_mlp.fc2_weight: int8 -> float32"):
        convert.load(source, device="cpu", cast=True)


def test_a_recipe_is_for_every_layer_unless_the_config_says(folders: dict[str, Path]) -> None:
    from converters.te.quantization import recipe_of

    plain = convert.load(folders["tied"], device="cpu", recipe=recipe_of("fp8-current"))
    assert plain.config.layer_precision == ["fp8", "fp8"]
    fp4 = convert.load(folders["tied"], device="cpu", recipe=recipe_of("nvfp4"))
    assert fp4.config.layer_precision == ["fp4", "fp4"]
    some = convert.load(folders["tied"], device="cpu", recipe=recipe_of("mxfp8"), layer_precision=[None, "fp8"])
    assert some.config.layer_precision == [None, "fp8"]


def test_the_config_is_what_both_sides_read(folders: dict[str, Path], tmp_path: Path) -> None:
    to_te(folders["biased"], tmp_path / "te", options={"layer_precision": ["fp8", "fp4"]})
    config = NVLlamaConfig.from_pretrained(tmp_path / "te")
    assert (config.layer_precision, config.attn_input_format) == (["fp8", "fp4"], "thd")
    plain = LlamaConfig.from_pretrained(folders["biased"])
    fields = ("head_dim", "rope_parameters", "rms_norm_eps", "attention_bias", "mlp_bias", "eos_token_id", "dtype")
    assert {name: getattr(config, name) for name in fields} == {name: getattr(plain, name) for name in fields}


@pytest.mark.parametrize(
    ("recipe", "asked", "says"),
    [
        ("mxfp8", ["fp4", None], r"fp8 layers, .* fp4: layers \[0\], unquantised: layers \[1\]"),
        ("nvfp4", [None, None], r"fp4 layers, .* unquantised: layers \[0, 1\]"),
        ("nvfp4", ["fp8", "fp4"], r"fp4 layers, .* fp8: layers \[0\], fp4: layers \[1\]"),
    ],
)
def test_a_recipe_that_layers_do_not_run_in_is_refused(
    folders: dict[str, Path], recipe: str, asked: list[str | None], says: str
) -> None:
    from converters.te.quantization import recipe_of

    with pytest.raises(ConfigError, match=says):
        convert.load(folders["tied"], device="cpu", recipe=recipe_of(recipe), layer_precision=asked)


def test_an_option_that_no_config_has_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"attn_input_fromat='bshd' \(did you mean 'attn_input_format'"):
        convert.load(folders["tied"], device="cpu", attn_input_fromat="bshd")
    assert convert.load(folders["tied"], device="cpu", rms_norm_eps=0.5).config.rms_norm_eps == 0.5
