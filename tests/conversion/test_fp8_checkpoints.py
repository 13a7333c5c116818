"""FP8 checkpoints: what is written, that it comes back, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fp8_folders import FORMATS, UP, K, Q, digests, model, rewritten, tensors_of

from converters import __main__ as command_line
from converters.errors import CheckpointError
from converters.files import safetensors
from converters.quantized.export import quantize
from converters.quantized.restore import dequantize
from converters.quantized.schemes import SCHEMES


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written(tmp_path: Path, name: str) -> None:
    source = model(tmp_path / "plain", shards=2)
    before = digests(source)
    written = quantize(source, tmp_path / "fp8", name)
    assert digests(source) == before
    plain, made = tensors_of(source), tensors_of(tmp_path / "fp8")
    suffix = "_scale_inv" if name == "fine-grained" else "_scale"
    shape = {"compressed-tensors": [1], "compressed-tensors-channel": [512, 1], "fine-grained": [4, 2]}[name]
    assert list(made[Q + suffix].shape) == shape
    linears = [key for key in plain if "_proj.weight" in key]
    assert len(linears) == 14
    for key in linears:
        scale = made.pop(key + suffix)
        codes = made.pop(key)
        assert (codes.dtype, scale.dtype, codes.shape) == (torch.float8_e4m3fn, torch.float32, plain[key].shape)
        # What a reader does: the scale of an element's own block.
        rows, columns = codes.shape
        grid = scale.view(1, 1) if scale.ndim == 1 else scale
        each = grid.repeat_interleave(128 if name == "fine-grained" else max(rows // len(grid), 1), 0)
        each = each.repeat_interleave(columns // grid.shape[1], 1)
        error = (codes.float() * each - plain[key].float()).abs()
        assert bool((error <= each * 16).all())
        assert bool((error <= plain[key].float().abs() / 16 + each * 2.0**-10).all())
    # Embedding, norms, biases, the head: bit for bit, and nothing else is there.
    assert set(made) == set(plain) - set(linears)
    assert all(torch.equal(made[key], plain[key]) for key in made)
    assert {one.key for one in written if one.kind == "quantised"} == set(linears)
    assert 0.5 < max(one.worst or 0.0 for one in written) <= 1
    said = json.loads((tmp_path / "fp8/config.json").read_text())
    assert said.pop("quantization_config") == SCHEMES[name].config()
    assert said == json.loads((source / "config.json").read_text())
    for file in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "fp8" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_made_plain_and_made_again(tmp_path: Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files, byte for byte: index, config, codes, scales. In the other dtype the same codes and scales."""
    monkeypatch.setattr(safetensors, "MAX_SHARD_BYTES", 500_000)
    odd = {"hidden_size": 200, "intermediate_size": 435, "head_dim": 24}  # partial blocks
    source = model(tmp_path / "plain", dtype=dtype, shards=3, **odd)
    quantize(source, tmp_path / "fp8", name, partial_blocks=True)
    back = dequantize(tmp_path / "fp8", tmp_path / "back")
    assert all(one.idempotent for one in back if one.kind == "dequantised")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    quantize(tmp_path / "back", tmp_path / "again", name, partial_blocks=True)
    assert digests(tmp_path / "again") == digests(tmp_path / "fp8")
    index = json.loads((tmp_path / "fp8" / safetensors.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "fp8"))
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    dequantize(tmp_path / "fp8", tmp_path / "other", dtype=other)
    held = tensors_of(tmp_path / "other")
    assert {str(tensor.dtype) for tensor in held.values()} == {f"torch.{other}"}
    assert json.loads((tmp_path / "other/config.json").read_text())["torch_dtype"] == other
    quantize(tmp_path / "other", tmp_path / "third", name, partial_blocks=True)
    first, third = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "third")
    for key in first:
        if "_proj.weight" in key:
            assert torch.equal(first[key].view(torch.uint8), third[key].view(torch.uint8)), key


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    source = model(tmp_path / "plain", tie_word_embeddings=True)
    quantize(source, tmp_path / "fp8", "compressed-tensors")
    assert not any(key.startswith("lm_head") for key in tensors_of(tmp_path / "fp8"))
    # A head that somebody quantised apart from its embedding.
    target = tmp_path / "fp8"
    rewritten(
        target,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn),
                "lm_head.weight_scale": torch.ones(1),
            }
        ),
    )
    with pytest.raises(CheckpointError, match=r"lm_head.weight is quantised, and a tied head shares") as error:
        dequantize(target, tmp_path / "back")
    assert "lm_head.weight is quantised, and the config says that it is kept" in str(error.value)


def test_zero_blocks_come_back(tmp_path: Path) -> None:
    source = model(tmp_path / "plain")
    rewritten(source, lambda tensors: tensors[Q][128:300].zero_())
    for name in FORMATS:
        quantize(source, tmp_path / name, name)
        back = dequantize(tmp_path / name, tmp_path / f"{name}-back")
        assert all(one.idempotent for one in back if one.kind == "dequantised")
        assert int(tensors_of(tmp_path / f"{name}-back")[Q][128:300].count_nonzero()) == 0


def test_a_float16_model_becomes_float32(tmp_path: Path) -> None:
    """Codes of small weights would vanish in float16."""
    source = model(tmp_path / "plain")
    rewritten(source, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    quantize(source, tmp_path / "fp8", "fine-grained")
    back = dequantize(tmp_path / "fp8", tmp_path / "back")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "back").values()} == {torch.float32}
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"
    assert all(one.idempotent for one in back if one.kind == "dequantised")


def test_scales_of_others(tmp_path: Path) -> None:
    """Another writer's scales: float32 of every bit, bfloat16, a scalar; read, and said not to come back."""
    quantize(model(tmp_path / "plain"), tmp_path / "fp8", "compressed-tensors")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q + "_scale"] = tensors[Q + "_scale"] * 1.37
        tensors[K + "_scale"] = tensors[K + "_scale"].to(torch.bfloat16)
        tensors[UP + "_scale"] = tensors[UP + "_scale"].view(())
        tensors[Q.removesuffix(".weight") + ".input_scale"] = torch.ones(1)

    rewritten(tmp_path / "fp8", edit)
    held = tensors_of(tmp_path / "fp8")
    back = {one.key: one for one in dequantize(tmp_path / "fp8", tmp_path / "back", dtype="float32")}
    assert [back[key].idempotent for key in (Q, K, UP)] == [False, True, True]
    assert back[Q.removesuffix(".weight") + ".input_scale"].kind == "dropped"
    for key in (Q, K, UP):
        expected = held[key].float() * held[key + "_scale"].float()
        assert torch.equal(tensors_of(tmp_path / "back")[key], expected)


def test_the_commands(tmp_path: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    fp8, back = tmp_path / "fp8", tmp_path / "back"
    assert command_line.main(["quantize", "--format", "fine-grained", str(made["plain"]), str(fp8)]) == 0
    said = capsys.readouterr().out
    assert "q_proj quantised" in said
    assert "bits kept" in said
    assert digests(fp8) == digests(made["fine-grained"])
    assert command_line.main(["dequantize", str(fp8), str(back)]) == 0
    assert "quantised again, 14 of 14 weights have the same codes and scales" in capsys.readouterr().out
    assert command_line.main(["dequantize", str(fp8), str(back)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert set(SCHEMES) == set(command_line.quantized.FORMATS)
