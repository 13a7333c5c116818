"""A checkpoint folder in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.stores.safetensors import DTYPES, NAMES
from converters.topology import Topology
from parity.faults.breaks import BREAKS

INDEX = "model.safetensors.index.json"
PREFIX = "model.layers."


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a mutation happens.

    Args:
        config: The checkpoint's config.
        topology: The parallel layout.
        layers: The layers whose tensors are mutated; tensors outside of layers always are.
        source: The checkpoint that a restored file comes from.
    """

    config: Mapping[str, Any]
    topology: Topology
    layers: tuple[int, ...]
    source: Path

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes that a `Reorder` may name."""
        config = self.config
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        groups = config.get("num_key_value_heads") or heads
        dim, tp = config.get("head_dim") or hidden // heads, self.topology.tp
        named = {"group": groups, "rep": heads // groups, "head": heads, "dim": dim, "half": 2, "pair": dim // 2}
        named |= {"q": 1, "k": 1, "v": 1, "gate": 1, "up": 1, "hidden": hidden, "ffn": config["intermediate_size"]}
        return named | {"shard": tp, "part": config["intermediate_size"] // tp, "narrow": dim * groups // heads // 2}


class Draft:
    """A folder of safetensors files, whole, to be changed and written.

    Args:
        folder: Its weights must be safetensors.

    Attributes:
        tensors: By key.
        file_of: The weight file of each key, in the order of their bytes.
        files: Every other file's content, the config's and index's included.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.metadata: dict[str, Any] = {}
        self.broken: list[str] = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, content = str(path.relative_to(folder)), path.read_bytes()
            if path.suffix != ".safetensors":
                self.files[name] = content
                continue
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            self.metadata[name] = header.pop("__metadata__", None)
            body = bytearray(content[8 + length :])
            for key, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                start, stop = info["data_offsets"]
                raw = torch.frombuffer(body, dtype=torch.uint8)[start:stop].clone()
                self.tensors[key] = raw.view(DTYPES[info["dtype"]]).view(info["shape"])
                self.file_of[key] = name

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; assign to change it."""
        found: dict[str, Any] = json.loads(self.files["config.json"])
        return found

    @config.setter
    def config(self, config: dict[str, Any]) -> None:
        self.files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def keys(self, names: tuple[str, ...], part: str, layers: tuple[int, ...]) -> Iterator[list[str]]:
        """The keys of `names`: together for each of `layers`, weights and biases apart."""
        within = names[0].startswith(("self_attn", "mlp", "input_", "post_"))
        for prefix in [f"{PREFIX}{layer}." for layer in layers] if within else [""]:
            for kind in ("weight", "bias") if part == "both" else (part,):
                keys = [f"{prefix}{name}.{kind}" for name in names]
                if all(key in self.tensors for key in keys):
                    yield keys

    def same(self, other: Draft) -> bool:
        """Whether both are the same bytes."""
        if (self.files, self.broken, self.file_of) != (other.files, other.broken, other.file_of):
            return False
        return self.tensors.keys() == other.tensors.keys() and all(
            mine is other.tensors[key]
            or (
                mine.dtype == other.tensors[key].dtype
                and mine.shape == other.tensors[key].shape
                and torch.equal(mine.view(-1).view(torch.uint8), other.tensors[key].view(-1).view(torch.uint8))
            )
            for key, mine in self.tensors.items()
        )

    def copy(self) -> Draft:
        """Another draft of the same tensors, which mutations replace and never write into."""
        other = copy.copy(self)
        other.tensors, other.file_of, other.files = dict(self.tensors), dict(self.file_of), dict(self.files)
        other.metadata, other.broken = dict(self.metadata), list(self.broken)
        return other

    def write(self, folder: Path) -> None:
        """Write the folder, which must not hold anything yet. Unchanged, it has the bytes that it was read from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, metadata in self.metadata.items():
            header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
            at, bodies = 0, []
            for key, tensor in self.tensors.items():
                if self.file_of[key] == name:
                    body = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    header[key] = {
                        "dtype": NAMES[tensor.dtype],
                        "shape": list(tensor.shape),
                        "data_offsets": [at, at + len(body)],
                    }
                    at += len(body)
                    bodies.append(body)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(bodies))
        for how in self.broken:
            BREAKS[how](folder)
