"""What each mutation makes of a draft."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from converters import axes
from converters.stores.safetensors import DTYPES
from parity.faults import mutations
from parity.faults.breaks import INDEX, NotHereError
from parity.faults.drafts import PREFIX, Draft, Scene
from parity.faults.mutations import ROPE


@functools.singledispatch
def apply(mutation: Any, draft: Draft, scene: Scene) -> None:
    """Change `draft` as `mutation` says."""
    raise TypeError(f"{mutation} is not a mutation of a folder")


@apply.register
def _(mutation: mutations.Exchange, draft: Draft, scene: Scene) -> None:
    for one, other in draft.keys((mutation.one, mutation.other), mutation.part, scene.layers):
        draft.tensors[one], draft.tensors[other] = draft.tensors[other], draft.tensors[one]


@apply.register
def _(mutation: mutations.Reorder, draft: Draft, scene: Scene) -> None:
    part = mutation.part if mutation.along == "rows" else "weight"
    at, taken = (_positions(text, scene.sizes) for text in (mutation.read, mutation.written))
    order = torch.empty_like(at)
    order[at] = taken  # where the right code would read this, the wrong one finds that
    for keys in draft.keys(mutation.names, part, scene.layers):
        tensors = [draft.tensors[key] for key in keys]
        whole = torch.cat(tensors)
        if mutation.along == "elements":
            moved = whole.flatten()[order].view_as(whole)
        else:
            moved = whole.index_select(0 if mutation.along == "rows" else 1, order)
        parted = moved.split([tensor.size(0) for tensor in tensors])
        draft.tensors |= {key: tensor.contiguous() for key, tensor in zip(keys, parted, strict=True)}


def _positions(text: str, sizes: Mapping[str, int]) -> torch.Tensor:
    """The position of each element in the order of its axis indices, axes and cells sorted by name."""
    out = []
    found = axes.boxes(axes.Product(axes.parse(text)), sizes)
    for box in sorted(found, key=lambda box: sorted(box.ranges)):
        positions = torch.tensor(box.offset)
        for axis in sorted(box.ranges):
            start, stop = box.ranges[axis]
            positions = positions[..., None] + torch.arange(start, stop) * box.strides[axis]
        out.append(positions.flatten())
    return torch.cat(out)


@apply.register
def _(mutation: mutations.Shards, draft: Draft, scene: Scene) -> None:
    dim, tp = ("rows", "columns").index(mutation.along), scene.topology.tp
    for name in mutation.names:
        for (key,) in draft.keys((name,), "both" if dim == 0 else "weight", scene.layers):
            tensor = draft.tensors[key]
            *parts, rest = tensor.split([tensor.size(dim) // tp] * tp + [tensor.size(dim) % tp], dim)
            draft.tensors[key] = torch.cat([*reversed(parts), rest], dim)


@apply.register
def _(mutation: mutations.Layers, draft: Draft, scene: Scene) -> None:
    count = scene.config["num_hidden_layers"]
    runs = scene.topology.placement(count)
    sources = MOVES[mutation.move](count, [(run.start, run.stop, run.pp, run.chunk) for run in runs])
    old = dict(draft.tensors)
    for key in old:
        if match := re.match(rf"{re.escape(PREFIX)}(\d+)\.(.*)", key):
            draft.tensors[key] = old[f"{PREFIX}{sources[int(match[1])]}.{match[2]}"]


Run = tuple[int, int, int, int]
MOVES: Mapping[str, Callable[[int, list[Run]], list[int]]] = {
    "next": lambda n, _: [(layer + 1) % n for layer in range(n)],
    "previous": lambda n, _: [(layer - 1) % n for layer in range(n)],
    "exchanged": lambda n, _: [1, 0, *range(2, n)],
    # Whose layers the stages, or the chunks of a stage, take for their own.
    "stages": lambda _, runs: [layer for start, stop, _, _ in reversed(runs) for layer in range(start, stop)],
    "chunks": lambda _, runs: [
        layer for start, stop, _, _ in sorted(runs, key=lambda run: (run[2], run[3])) for layer in range(start, stop)
    ],
    "boundary": lambda n, runs: [
        layer - 1 if layer in {start for start, _, _, _ in runs[1:]} else layer for layer in range(n)
    ],
    "first twice": lambda n, _: [0, *range(n - 1)],
}


@apply.register
def _(mutation: mutations.Roll, draft: Draft, scene: Scene) -> None:
    for (key,) in draft.keys((mutation.name,), "both", scene.layers):
        draft.tensors[key] = draft.tensors[key].roll(mutation.by, dims=0)


@apply.register
def _(mutation: mutations.SwapRows, draft: Draft, scene: Scene) -> None:
    for (key,) in draft.keys((mutation.name,), "weight", scene.layers):
        tensor = draft.tensors[key].clone()
        tensor[[mutation.one, mutation.other]] = tensor[[mutation.other, mutation.one]]
        draft.tensors[key] = tensor


@apply.register
def _(mutation: mutations.Values, draft: Draft, scene: Scene) -> None:
    for name in mutation.names:
        for (key,) in draft.keys((name,), mutation.part, scene.layers):
            tensor = draft.tensors[key].clone()
            part = tensor[_chosen(mutation.rows, tensor.size(0), scene)]
            if tensor.dim() == 2:
                part = part[:, _chosen(mutation.columns, tensor.size(1), scene)]
            part.copy_(value(mutation.how, part))
            draft.tensors[key] = tensor


def _chosen(which: str, size: int, scene: Scene) -> slice:
    starts = {"all": 0, "last shard": size - size // scene.topology.tp, "last": size - 1, "first half": 0}
    return slice(starts[which], size // 2 if which == "first half" else None)


def value(how: str, tensor: torch.Tensor) -> torch.Tensor:
    """What becomes of the values of `tensor`."""
    if how == "initial":
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(11)).mul(0.02).to(tensor)
    if how in ("truncated", "last bit"):
        wide = tensor.float().contiguous().view(torch.int32)
        kept = wide.bitwise_and(-65536) if how == "truncated" else wide.bitwise_xor(1 << (32 - 8 * tensor.itemsize))
        return kept.view(torch.float32).to(tensor)
    values = {
        "zeros": lambda: torch.zeros_like(tensor),
        "ones": lambda: torch.ones_like(tensor),
        "nan": lambda: torch.full_like(tensor, math.nan),
        "infinity": lambda: torch.full_like(tensor, math.inf),
        "minus one": lambda: tensor - 1,
        "rounded": lambda: tensor.bfloat16().to(tensor),
        "scaled": lambda: tensor * 1.01,
        "half": lambda: tensor.half().to(tensor),
    }
    return values[how]()


@apply.register
def _(mutation: mutations.Duplicate, draft: Draft, scene: Scene) -> None:
    for key, of in draft.keys((mutation.name, mutation.of), "both", scene.layers):
        draft.tensors[key] = draft.tensors[of].clone()


@apply.register
def _(mutation: mutations.Presence, draft: Draft, scene: Scene) -> None:
    if mutation.how == "added":
        for name in mutation.names:
            draft.tensors[name] = torch.zeros(3, dtype=next(iter(draft.tensors.values())).dtype)
            draft.file_of[name] = next(iter(draft.metadata))
    else:
        for name in mutation.names:
            for (key,) in list(draft.keys((name,), mutation.part, scene.layers)):
                del draft.tensors[key]
    _reindex(draft)


@apply.register
def _(mutation: mutations.Resize, draft: Draft, scene: Scene) -> None:
    for (key,) in draft.keys((mutation.name,), "both", scene.layers):
        tensor = draft.tensors[key]
        more = tensor.new_zeros(max(mutation.by, 0), *tensor.shape[1:])
        draft.tensors[key] = torch.cat([tensor[: tensor.size(0) + min(mutation.by, 0)], more])
        if mutation.config:
            draft.config = draft.config | {"vocab_size": draft.tensors[key].size(0)}


@apply.register
def _(mutation: mutations.Retype, draft: Draft, scene: Scene) -> None:
    for name in mutation.names:
        for (key,) in draft.keys((name,), "both", scene.layers):
            draft.tensors[key] = draft.tensors[key].to(DTYPES[mutation.dtype])


@apply.register
def _(mutation: mutations.ConfigField, draft: Draft, scene: Scene) -> None:
    config = draft.config
    _, dot, name = mutation.field.partition("rope.")
    if mutation.field == "rope":
        config.pop("rope_scaling", None)
        if modern := config.get("rope_parameters"):
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": modern["rope_theta"]}
    else:
        ropes = [config[rope] for rope in ROPE if isinstance(config.get(rope), dict)]
        field = name if dot else mutation.field
        places = ropes if dot else [config]
        if field == "rope_theta":
            places = [place for place in (config, *ropes) if field in place]
        for place in places:
            if field in place or mutation.how == "set":
                _change(place, field, mutation)
    draft.config = config


def _change(place: dict[str, Any], field: str, mutation: mutations.ConfigField) -> None:
    if mutation.how == "lost":
        del place[field]
    elif mutation.how == "times":
        place[field] = type(place[field])(place[field] * mutation.value)
    else:
        place[field] = mutation.value if mutation.how == "set" else not place[field]


@apply.register
def _(mutation: mutations.Restored, draft: Draft, scene: Scene) -> None:
    draft.files[mutation.name] = (scene.source / mutation.name).read_bytes()


@apply.register
def _(mutation: mutations.File, draft: Draft, scene: Scene) -> None:
    if mutation.how == "lost":
        draft.files.pop(mutation.name, None)
    elif mutation.how == "stale":
        draft.files[mutation.name] = draft.files[mutation.name].replace(b"e", b"E", 1)
    else:
        content = json.loads(draft.files[mutation.name])
        content["eos_token_id"] = content["eos_token_id"][0]
        draft.files[mutation.name] = json.dumps(content, indent=2).encode() + b"\n"


@apply.register
def _(mutation: mutations.Broken, draft: Draft, scene: Scene) -> None:
    if mutation.how == "the source's files":
        source = Draft(scene.source)
        draft.broken.append(mutation.how)
        draft.tensors, draft.file_of, draft.metadata = source.tensors, source.file_of, source.metadata
    elif mutation.how == "straddling layer skipped":
        files: dict[str, set[str]] = {}
        for key, file in draft.file_of.items():
            files.setdefault(key.split(".")[2] if key.startswith(PREFIX) else key, set()).add(file)
        for key in draft.tensors:
            if key.startswith(PREFIX) and len(files[key.split(".")[2]]) > 1:
                draft.tensors[key] = value("initial", draft.tensors[key])
    elif mutation.how == "boundary shard never written":
        if len(draft.metadata) < 2:
            raise NotHereError("the weights are in one file")
        lost = sorted(draft.metadata)[1]
        for key in [key for key, file in draft.file_of.items() if file == lost]:
            del draft.tensors[key], draft.file_of[key]
        del draft.metadata[lost]
        _reindex(draft)
    else:
        draft.broken.append(mutation.how)


def _reindex(draft: Draft) -> None:
    """The index agrees with the files again."""
    if INDEX in draft.files:
        index = json.loads(draft.files[INDEX])
        index["weight_map"] = {key: draft.file_of[key] for key in sorted(draft.tensors)}
        draft.files[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
