"""A live module as a store: its parameters, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from converters.errors import CheckpointError
from converters.execute import info_of
from converters.tensors import TensorInfo


class ModuleStore:
    """The parameters of a module, by name.

    Args:
        module: A bare model chunk. Buffers and `_extra_state` are no weights and are left out.

    Raises:
        CheckpointError: A parameter that is not contiguous.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = {name: parameter.data for name, parameter in module.named_parameters()}
        strided = sorted(name for name, tensor in self._parameters.items() if not tensor.is_contiguous())
        if strided:
            raise CheckpointError(f"parameters must be contiguous, these are not: {', '.join(strided)}")

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every parameter."""
        return {name: info_of(tensor) for name, tensor in self._parameters.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """The parameter itself."""
        return self._parameters[key]
