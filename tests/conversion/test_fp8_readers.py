"""FP8 checkpoints: transformers reads what is written, and nothing here reads it by mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fp8_folders import FORMATS, Q, copied, model, tensors_of

from converters.bridge import AutoBridge
from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.quantized.export import quantize
from converters.quantized.restore import dequantize
from parity.subjects import config_of


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_else_reads_codes_without_their_scales(tmp_path: Path, made: dict[str, Path], name: str) -> None:
    with pytest.raises(ConversionError, match="quantised weights; make them plain first: python -m converters dequant"):
        AutoBridge.from_hf_pretrained(made[name])
    with pytest.raises(ConfigError, match="make it plain first: python -m converters dequantize"):  # pytest --model
        config_of(str(made[name]))
    folder = copied(made[name], tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is quantised \(F8_E4M3\) and needs its scales; make the checkpoint"):
        _ = AutoBridge.from_hf_pretrained(folder).weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_computes_with_the_same_weights(tmp_path: Path, name: str, dtype: str) -> None:
    """Its own loader and its own dequantisation: every weight and every logit equal those of the folder made plain."""
    pytest.importorskip("accelerate", reason="transformers loads FP8 checkpoints with accelerate")
    if name != "fine-grained":
        pytest.importorskip("compressed_tensors", reason="transformers reads this format with compressed-tensors")
    transformers = pytest.importorskip("transformers")
    quantize(model(tmp_path / "plain", dtype=dtype), tmp_path / "fp8", name)
    dequantize(tmp_path / "fp8", tmp_path / "back")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "fp8")
    # On a machine with a GPU as well: not its FP8 kernels, which quantise activations.
    config.quantization_config |= {"dequantize": True}
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = load(tmp_path / "fp8", config=config).cpu().eval(), load(tmp_path / "back").eval()
    held = theirs.state_dict()
    assert set(held) == set(ours.state_dict())
    wrong = [key for key, value in ours.state_dict().items() if not torch.equal(value, held[key])]
    assert not wrong
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("name", ["compressed-tensors", "compressed-tensors-channel"])
def test_compressed_tensors_decompresses_to_the_same_weights(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The default way, in which transformers holds codes and scales, the scales in the model's own dtype."""
    pytest.importorskip("accelerate", reason="transformers loads FP8 checkpoints with accelerate")
    pytest.importorskip("compressed_tensors", reason="transformers reads this format with compressed-tensors")
    transformers = pytest.importorskip("transformers")
    dequantize(made[name], tmp_path / "back")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(made[name]).eval()
    linear = theirs.model.layers[1].self_attn.q_proj
    assert linear.weight.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        theirs(torch.arange(3, 9)[None])  # the first forward decompresses
    assert torch.equal(linear.weight, tensors_of(tmp_path / "back")[Q])
