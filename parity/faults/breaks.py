"""Weight files and indices that cannot be trusted, made from those of a written folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError

INDEX = "model.safetensors.index.json"


class NotHereError(ConversionError):
    """The fault cannot be put here: the model, or the checkpoint, lacks the part."""


class InjectionError(ConversionError):
    """The injection of a fault failed, which says nothing of a check."""


def require_index(folder: Path) -> None:
    """Raises: NotHereError where the weights are in one file."""
    if not (folder / INDEX).is_file():
        raise NotHereError(f"{folder} has no index")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _truncated(folder: Path) -> None:
    last = _weights(folder)[-1]
    last.write_bytes(last.read_bytes()[:-16])


def _in_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = _weights(folder)[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change({key: info for key, info in header.items() if key != "__metadata__"})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _overlapping(folder: Path) -> None:
    def change(infos: dict[str, Any]) -> None:
        first, second = [info for info in infos.values() if len(info["shape"]) == 2][:2]
        size = second["data_offsets"][1] - second["data_offsets"][0]
        second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]

    _in_header(folder, change)


def _header_dtype(folder: Path) -> None:
    """The bytes are right, and are said to be of another dtype of their size."""

    def change(infos: dict[str, Any]) -> None:
        info = list(infos.values())[-1]
        info["dtype"] = {"F32": "I32", "BF16": "F16", "F16": "BF16"}[info["dtype"]]

    _in_header(folder, change)


def _in_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    require_index(folder)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _index_promises(folder: Path) -> None:
    _in_index(folder, lambda where: where.update({"model.layers.99.mlp.up_proj.weight": min(where.values())}))


def _index_lacks(folder: Path) -> None:
    def change(where: dict[str, str]) -> None:
        del where["model.norm.weight"]

    _in_index(folder, change)


def _shard_lost(folder: Path) -> None:
    _weights(folder)[-1].unlink()


def _nothing_saved(folder: Path) -> None:
    for path in (*_weights(folder), folder / INDEX):
        path.unlink(missing_ok=True)


def _stale_file(folder: Path) -> None:
    """One file of an older export beside the index and its shards; transformers loads it rather than them."""
    require_index(folder)
    (folder / "model.safetensors").write_bytes(_weights(folder)[0].read_bytes())


def _unnamed_shard(folder: Path) -> None:
    require_index(folder)
    (folder / "model-00099-of-00099.safetensors").write_bytes(_weights(folder)[0].read_bytes())


BREAKS: Mapping[str, Callable[[Path], None]] = {
    "truncated": _truncated,
    "overlapping": _overlapping,
    "header dtype": _header_dtype,
    "index promises": _index_promises,
    "index lacks": _index_lacks,
    "shard lost": _shard_lost,
    "nothing saved": _nothing_saved,
    "stale file beside shards": _stale_file,
    "shard that no index names": _unnamed_shard,
    "the source's files": lambda _: None,
}
