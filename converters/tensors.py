"""What a tensor is to files and plans: a shape and a dtype by name; and what guards names and shapes. No torch.

A dtype is `str(torch.dtype)` without `torch.`: `bfloat16`, `float8_e4m3fn`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from converters.errors import CheckpointError, listing, near

ITEMSIZE: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""Bytes of one element. Complex numbers are no weights of any model here, and have no name."""

CODES: Mapping[str, str] = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}
"""Names of the dtypes that safetensors headers spell in code, in the order in which the library writes tensors.

Source: huggingface/safetensors 0.8.0, bindings/python/py_src/safetensors/torch.py, _TYPES; order by saving them all.
"""
CODE_OF: Mapping[str, str] = {name: code for code, name in CODES.items()}

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""Dtypes by the class that `torch.save` names for a storage; dtypes that are not here are saved as untyped bytes.

Source: pytorch 2.13.0, torch/storage.py, _dtype_to_storage_type_map.
"""
STORAGE_OF: Mapping[str, str] = {name: storage for storage, name in STORAGES.items()}

QUANTIZED = ("float8_", "float4_")
"""How the names of dtypes begin that mean nothing without their scales."""

FLOATS = frozenset(name for name in ITEMSIZE if name.startswith(("float", "bfloat")))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a stored tensor.

    Attributes:
        shape: As torch has it; a `float4_e2m1fn_x2` element is two numbers.
        dtype: A key of `ITEMSIZE`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


def check_layers(layers: int, found: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse a config of more layers than the tensors can have, before a plan for all of them is made.

    Raises:
        CheckpointError: There are neither so many tensors nor so many layers in one.
    """
    stacked = [info.shape[0] for key, info in found.items() if ".layers." in key and info.shape]
    most = max([len(found), *stacked])
    if layers > most:
        raise CheckpointError(
            f"{where} does not hold what its config promises: {layers:,} layers, and its {len(found):,} tensors cannot "
            "be of so many. Compare num_hidden_layers in config.json with the keys, and fetch or write both again"
        )


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo], where: str, allowed: Iterable[str] = ()
) -> None:
    """Compare the tensors that a plan knows with those that a store holds.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors; all of them.
    """
    problems = []
    missing = [key + near(key, set(found) - set(expected)) for key in expected if key not in found]
    unexpected = set(found) - set(expected) - set(allowed)
    shapes = [
        f"{key}: expected {list(shape)}, found {list(found[key].shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    for title, names in (("missing", missing), ("that nothing maps", unexpected), ("of another shape", shapes)):
        if names:
            problems.append(listing(f"tensors {title}", names))
    if problems:
        title, advice = f"{where} does not hold what its config promises:", "Config and tensors are not of one model"
        raise CheckpointError(
            "\n".join([title, *problems, f"{advice}, or one of them is damaged: compare them, or fetch both again"])
        )
