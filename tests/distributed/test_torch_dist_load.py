"""Checkpoints that Megatron-Core's own `dist_checkpointing` reads and writes, in real ranks, against ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_dist_ranks

from converters.files import dcp, torch_archive
from converters.files.safetensors import SafetensorsFiles
from converters.files.stream import stream
from converters.models import family_of
from converters.sources import read_config
from converters.tensors import TensorInfo
from converters.topology import Topology
from parity.ranks import Zygote

Run = Callable[..., list[Any]]
METADATA = (
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    b'"common_backend": "torch", "common_backend_version": 1}'
)
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def plan_of(folder: Path, config: dict[str, Any], column: str, *, back: bool = False) -> Any:
    family = family_of(config)
    tied = bool(config.get("tie_word_embeddings"))
    stored = family.stored("hf", SafetensorsFiles(folder).tensors(), tied=tied)
    plan = family.plan("hf", column, config, features=stored)
    return plan.inverse() if back else plan


def write(source: Path, target: Path, column: str) -> None:
    """A checkpoint of Megatron-Core 0.16 out of a folder of Hugging Face's."""
    config = read_config(str(source))
    files, plan = SafetensorsFiles(source), plan_of(source, config, column)
    dtype = next(iter(files.tensors().values())).dtype
    tensors = {key: TensorInfo(tuple(shape), dtype) for key, shape in plan.target_tensors.items()}
    layers = config["num_hidden_layers"]
    stacked = column == "megatron_dist"
    states = [
        f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}"
        if stacked
        else f"decoder.layers.{layer}.{name}._extra_state/shard_0_1"
        for layer in range(layers)
        for name in LINEARS
    ]
    cut = {key: 1 for key in tensors if stacked and key.startswith("decoder.layers.")}
    layout = dcp.lay_out(tensors, split=cut, extra_states=states)
    target.mkdir()
    for path, size in layout.sizes.items():
        with (target / path).open("wb") as file:
            file.truncate(size)
            for at, content in layout.fixed[path]:
                file.seek(at)
                file.write(content)
    assert len(list(stream([(plan, files)], layout.chunks, target))) == len(layout.chunks)
    small = {**layout.small, Path("common.pt"): torch_archive.save({}), Path("metadata.json"): METADATA}
    for path, content in small.items():
        (target / path).write_bytes(content)


def elements(files: Any, key: str) -> Any:
    """The bits of a tensor, put together from its extents."""
    info = files.tensors()[key]
    out = np.empty(info.shape, np.dtype(f"u{info.nbytes // info.elements}"))
    for extent in files.extents(key):
        held = np.fromfile(extent.file, out.dtype, int(np.prod(extent.shape)), offset=extent.offset)
        box = tuple(slice(start, start + size) for start, size in zip(extent.starts, extent.shape, strict=True))
        out[box] = held.reshape(extent.shape)
    return out


@pytest.mark.parametrize("name", ["odd", "tied"])
@pytest.mark.parametrize("column", ["megatron_dist", "megatron"])
def test_megatron_loads_what_is_written(
    name: str, column: str, checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path
) -> None:
    """Under `raise_all`: no key is missing and none is left over; and every bit is the one that `AutoBridge` loads."""
    folder = tmp_path / "written"
    write(checkpoints[name], folder, column)
    fields = {} if column == "megatron_dist" else {"hetereogenous_dist_checkpoint": True}
    tp = 2 if name == "tied" else 1
    layouts = [Topology(tp=tp, pp=2), Topology()]
    for topology in layouts if column == "megatron_dist" else layouts[:1]:
        wrong = in_ranks(torch_dist_ranks.load, checkpoints[name], topology, folder, **fields)
        assert wrong == [[]] * topology.world_size, topology


@pytest.mark.parametrize("topology", [Topology(tp=2, pp=2), Topology(pp=2, vpp=2), Topology(dp=2)], ids=str)
def test_what_megatron_writes_is_read(
    topology: Topology, checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path
) -> None:
    """Every bit, from whatever layout; what is no weight is told and left alone."""
    with_optimizer = topology.dp > 1
    in_ranks(torch_dist_ranks.save, checkpoints["tied"], topology, tmp_path / "saved", optimizer=with_optimizer)
    write(checkpoints["tied"], tmp_path / "written", "megatron_dist")
    found, expected = dcp.DcpFiles(tmp_path / "saved"), dcp.DcpFiles(tmp_path / "written")
    for key, info in expected.tensors().items():
        rows = info.shape[0]  # the embedding is padded to a multiple of tp
        np.testing.assert_array_equal(elements(found, key)[:rows], elements(expected, key), err_msg=key)
    assert set(found.tensors()) == set(expected.tensors())
    assert "16 objects" in found.left_alone["_extra_state"]
    assert ("optimizer state" in found.left_alone) == with_optimizer
    if "common_state" in found.left_alone:  # Megatron-Core 0.19
        content = found.object("common_state/shard_0_1")
        assert torch_archive.read(content, where="common_state")[0]["iteration"] == 7


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
def test_what_torch_cuts_over_a_mesh_is_read(mesh: tuple[int, ...], zygote: Zygote, tmp_path: Path) -> None:
    """Of seven rows the last rank has fewer, and of one row all but one rank have none."""
    zygote.run(torch_dist_ranks.save_cut, tmp_path, mesh, world=math.prod(mesh), timeout=60)
    files = dcp.DcpFiles(tmp_path, prefix="model.")
    expected = torch_dist_ranks.whole(7, 5)
    assert len(files.extents("box")) == math.prod(mesh)
    np.testing.assert_array_equal(elements(files, "rows"), expected.numpy().view(np.uint32))
    np.testing.assert_array_equal(elements(files, "box"), expected.bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(elements(files, "few"), np.zeros(1, np.uint32))
