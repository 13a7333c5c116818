"""FP8 checkpoints written by the converter under test, beside an independent statement, and there and back again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from converters.stores.safetensors import SafetensorsFolder
from parity.converter import Converter, with_fp8
from parity.folders import read
from parity.statement.fp8 import FORMATS, LINEAR, differences, restored


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found.

    Attributes:
        count: Tensors compared, in all formats.
        lines: What differs, by format.
    """

    count: int
    lines: dict[str, list[str]]


def checked(converter: Converter, folder: Path, scratch: Path, layers: int) -> Checked:
    """Write the first `layers` layers of a checkpoint in each format, and hold it to the statement. In one process."""
    tools = with_fp8(converter)
    plain = _first_layers(folder, scratch / "plain", layers)
    source = read(plain)
    lines: dict[str, list[str]] = {}
    count = 0
    for scheme, form in FORMATS.items():
        target, back, again = (scratch / f"{scheme}-{name}" for name in ("fp8", "back", "again"))
        tools.quantize(plain, target, scheme)
        written = tensors(target)
        found = differences(source, written, json.loads((target / "config.json").read_text()), form)
        count += len(written)
        if not found:
            tools.dequantize(target, back)
            restored_by_it = read(back)
            for key in (key for key in source if LINEAR.fullmatch(key)):
                if not torch.equal(restored_by_it[key], restored(written[key], written[key + form.suffix], form)):
                    found.append(f"{key}: not code times scale, once it was made plain again")
            tools.quantize(back, again, scheme)
            twice = tensors(again)
            for key in (name for name in written if LINEAR.fullmatch(name.removesuffix(form.suffix))):
                if written[key].contiguous().view(torch.uint8).ne(twice[key].contiguous().view(torch.uint8)).any():
                    found.append(f"{key}: other bytes when it is quantised again")
        lines[scheme] = found
        for made in (target, back, again):
            shutil.rmtree(made, ignore_errors=True)
    return Checked(count=count, lines=lines)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder that may be in FP8."""
    store = SafetensorsFolder(folder, quantized=True)
    return {key: store.tensor(key).clone() for key in store.tensors()}


def _first_layers(folder: Path, target: Path, layers: int) -> Path:
    """The checkpoint with its first layers only."""
    config = json.loads((folder / "config.json").read_text())
    count = min(layers, config["num_hidden_layers"])
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}, indent=2) + "\n")
    kept = {
        key: tensor.contiguous()
        for key, tensor in read(folder).items()
        if not key.startswith("model.layers.") or int(key.split(".")[2]) < count
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target
