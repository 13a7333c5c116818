"""Small folders of safetensors, good and bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from converters.files.safetensors import INDEX

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path) -> dict[str, Any]:
    """Two files and their index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, folder / FIRST)
    save_file({"c": torch.ones(4)}, folder / SECOND)
    index = {"metadata": {"total_size": 64}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def entry(start: int, stop: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    """What a header says of a tensor; by default a vector of float32."""
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def raw(header: Mapping[str, Any] | str, data: int) -> bytes:
    """A file with any header, before `data` bytes."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)
