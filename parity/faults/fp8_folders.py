"""What can be wrong with an FP8 checkpoint, done to a folder that was written rightly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity.faults.breaks import NotHereError

Tensors = dict[str, Tensor]


def change(how: str, source: Path, target: Path) -> None:
    """Do the change of that name to the folder `target`, which was made of `source`.

    Raises:
        NotHereError: It changes nothing here.
    """
    (path,) = sorted(target.glob("*.safetensors"))
    tensors = load_file(path)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    CHANGES[how](tensors)
    if before.keys() == tensors.keys() and all(
        before[key].shape == tensors[key].shape
        and torch.equal(before[key].contiguous().view(torch.uint8), tensors[key].contiguous().view(torch.uint8))
        for key in before
    ):
        raise NotHereError(f"{how} changes nothing in {target}")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.is_file():
        said = json.loads(index.read_text())
        said["weight_map"] = dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(said, indent=2) + "\n")


def _scales(tensors: Tensors) -> list[str]:
    return [key for key in tensors if key.endswith(("_scale", "_scale_inv"))]


def _each(made: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """The scales of every weight, changed."""

    def apply(tensors: Tensors) -> None:
        for key in _scales(tensors):
            tensors[key] = made(tensors[key])

    return apply


def _one_for_all(tensors: Tensors) -> None:
    """One scale for all blocks, and codes that fit it."""
    for key in _scales(tensors):
        weight, scale = key.removesuffix("_scale_inv").removesuffix("_scale"), tensors[key]
        codes = tensors[weight].float()
        rows, columns = codes.shape
        down, across = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
        height, width = (128, 128) if key.endswith("_inv") else (down, across)
        each = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        most = float(scale.max())
        tensors[weight] = (codes * each / most).to(torch.float8_e4m3fn)
        tensors[key] = torch.full_like(scale, most)


def _transposed(scale: Tensor) -> Tensor:
    """As rows of another grid of blocks: the numbers in the order of columns."""
    return scale.T.reshape(scale.shape)


def _head(tensors: Tensors) -> None:
    embedding = tensors["model.embed_tokens.weight"].float()
    scale = embedding.abs().max() / 448
    tensors["lm_head.weight"] = (embedding / scale).to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = scale.reshape(1)


CHANGES: Mapping[str, Callable[[Tensors], None]] = {
    "one scale for all blocks": _one_for_all,
    "scales transposed": _each(_transposed),
    "scales trimmed": _each(lambda scale: scale[:-1] if len(scale) > 1 else scale),
    "scales all alike": _each(lambda scale: torch.full_like(scale, float(scale.flatten()[0]))),
    "scales of the first shard twice": _each(
        lambda scale: torch.cat([scale[: len(scale) // 2]] * 2) if len(scale) % 2 == 0 else scale
    ),
    "scales inverted": _each(lambda scale: 1 / scale),
    "head quantised": _head,
}
"""By name; each changes tensors in place."""
