"""How arguments and results travel between the caller and its ranks: as pickles, in files that only they write."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import IO, Any


def write(path: Path, value: object) -> None:
    """Pickle `value` into `path`, which appears only when it is whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        _Pickler(file).dump(value)
    part.replace(path)


def read(path: Path) -> Any:
    """What `write` wrote. Not for a file from elsewhere: a pickle can run any code."""
    with path.open("rb") as file:
        return pickle.load(file)


class _Memory:
    """Stands for the memory of CPU tensors in a pickle: its bytes, once however many tensors share it."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        return _memory, (torch.empty(0, dtype=torch.uint8).set_(self.storage).numpy().tobytes(),)


class _Pickler(pickle.Pickler):
    """Pickles plain CPU tensors as their shape, strides and memory; everything else in the ordinary way.

    torch's own way is slower, copies shared memory for each tensor, and names whatever `torch.storage._load_from_bytes`
    is at the moment: in a rank that has imported Megatron, that is a function of Megatron's, so that its reader, the
    process that runs the tests, would import Megatron too.

    Source: NVIDIA/Megatron-LM core_v0.19.2, megatron/core/__init__.py (assigns `safe_load_from_bytes`).
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._memories: dict[int, _Memory] = {}

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.is_quantized or obj.is_conj() or obj.is_neg() or vars(obj):
            return NotImplemented
        storage = obj.untyped_storage()
        memory = self._memories.setdefault(storage.data_ptr(), _Memory(storage))
        return _tensor, (memory, obj.dtype, obj.storage_offset(), obj.shape, obj.stride(), obj.requires_grad)


def _memory(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _tensor(memory: Any, dtype: Any, offset: int, shape: Any, stride: Any, requires_grad: bool) -> Any:
    import torch

    tensor = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), offset, shape, stride)
    return tensor.requires_grad_(requires_grad)
