"""FP8 checkpoints: what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_folders import UP, copied, rewritten

from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.quantized.export import quantize
from converters.quantized.restore import dequantize
from parity.seeded import write_checkpoint
from parity.tiny import odd_config


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, s: t.pop(s), "{key} is quantised, and {scale} is missing"),
        (lambda t, s: t.update({s: t[s].t().contiguous()}), "{scale} has shape [2, 5], expected [5, 2]"),
        (lambda t, s: t.update({s: t[s].to(torch.int32)}), "{scale} is int32, expected bfloat16 or float16 or float32"),
        (lambda t, s: t[s][3].neg_(), "{scale} has 2 that are not positive finite numbers, the first at 6: -"),
        (lambda t, s: t[s][1, 1].zero_(), "{scale} has 1 that are not positive finite numbers, the first at 3: 0.0"),
        (lambda t, s: t[s][0, 1].fill_(float("nan")), "{scale} has 1 that are not positive finite numbers"),
        (lambda t, s: t[s][0, 1].fill_(float("inf")), "the first at 1: inf"),
        (lambda t, s: t[UP].view(torch.uint8)[7, 9].fill_(0x7F), "{key}: element [7, 9] is nan"),
        (lambda t, s: t.update({UP: t[UP].float()}), "{scale} scales nothing: {key} is not quantised"),
        (lambda t, s: t.update({UP: t[UP].float()}), "{key} is float32, and the config says that it is quantised"),
        (
            lambda t, s: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight is quantised, and lm_head.weight_scale_inv is missing",
        ),
        (lambda t, s: t[s].fill_(1e37), "{key}: a code times its scale is infinite in bfloat16"),
        (lambda t, s: t.pop("model.norm.weight"), "tensors missing"),
        (lambda t, s: t.update(stray=torch.ones(1)), "tensors that nothing maps"),
    ],
)
def test_scales_that_are_wrong(tmp_path: Path, made: dict[str, Path], edit: Any, message: str) -> None:
    folder = copied(made["fine-grained"], tmp_path / "fp8")
    scale = UP + "_scale_inv"
    rewritten(folder, lambda tensors: edit(tensors, scale))
    with pytest.raises(CheckpointError) as error:
        dequantize(folder, tmp_path / "back")
    assert message.format(key=UP, scale=scale) in str(error.value)
    if "{" in message and "infinite" not in message:
        assert "model.safetensors: " in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, made: dict[str, Path], number: float) -> None:
    source = copied(made["plain"], tmp_path / "plain")
    rewritten(source, lambda tensors: tensors[UP][5, 17].fill_(number))
    with pytest.raises(CheckpointError, match=rf"{UP}: element \[5, 17\] is {number}: a quantised weight"):
        quantize(source, tmp_path / "fp8", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_crash_leaves_nothing(tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("x")
    count = 0

    def fails(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(made["plain"], tmp_path / "fp8", "fine-grained", progress=fails)
    count = 0
    with pytest.raises(KeyboardInterrupt):
        dequantize(made["fine-grained"], tmp_path / "old", overwrite=True, progress=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.json"]


def test_targets(tmp_path: Path, made: dict[str, Path]) -> None:
    target = tmp_path / "there"
    target.mkdir()
    for run in (
        lambda **how: quantize(made["plain"], target, "compressed-tensors", **how),
        lambda **how: dequantize(made["compressed-tensors"], target, **how),
    ):
        with pytest.raises(CheckpointError, match="exists already"):
            run()
        run(overwrite=True)
        assert (target / "model.safetensors").is_file()
        for path in target.iterdir():
            path.unlink()
    with pytest.raises(CheckpointError, match="holds the source"):
        quantize(made["plain"], made["plain"], "compressed-tensors", overwrite=True)


def test_what_is_not_quantised_here(tmp_path: Path, made: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is quantised already"):
        quantize(made["fine-grained"], tmp_path / "x", "compressed-tensors")
    with pytest.raises(ConfigError, match="expected that of an FP8 checkpoint"):
        dequantize(made["plain"], tmp_path / "x")
    with pytest.raises(ConfigError, match="expected one of compressed-tensors, "):
        quantize(made["plain"], tmp_path / "x", "int8")
    odd = write_checkpoint(odd_config(), tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"q_proj.weight: \[360, 210\](.|\n)*--partial-blocks"):
        quantize(odd, tmp_path / "x", "fine-grained")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), "awq", "quant_method='awq', expected 'compressed-tensors' or 'fp8'"),
        (("format",), "pack-quantized", "format='pack-quantized', expected 'float-quantized'"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme={'num_bits': 8}, expected None"),
        (("config_groups", "group_0", "weights", "num_bits"), 4, "group_0.weights.num_bits=4, expected 8"),
        (("config_groups", "group_0", "weights", "strategy"), "block", "strategy='block', expected 'tensor'"),
        (("config_groups", "group_0", "targets"), ["re:.*q_proj"], "targets=['re:.*q_proj'], expected ['Linear']"),
        (("config_groups",), {}, "expected one group for all linear layers"),
        (("ignore",), ["lm_head", "re:.*layers.1.mlp.*"], "up_proj.weight is quantised, and the config says"),
    ],
)
def test_configs_that_are_not_read(
    tmp_path: Path, made: dict[str, Path], path: tuple[str, ...], value: Any, message: str
) -> None:
    folder = copied(made["compressed-tensors"], tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    at = config["quantization_config"]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as error:
        dequantize(folder, tmp_path / "back")
    assert message in str(error.value)
