"""A live model on Transformer Engine layers as a store, quantised parameters and tied heads included."""

from __future__ import annotations

from types import TracebackType

import torch

from converters.stores.modules import ModuleStore

TIED = ("lm_head.weight", "model.embed_tokens.weight")


class TeStore(ModuleStore):
    """The parameters of a model, by name.

    A parameter that a layer holds quantised is handed out as a copy in its own dtype; what was written into the copy is
    quantised when the next one is asked for, or at the end of the `with` block. One copy exists at a time.

    Args:
        module: The model.
        copies: Show a tied head under its own name too.
        write: Whether it is to be written.
    """

    def __init__(self, module: torch.nn.Module, *, copies: bool = False, write: bool = False) -> None:
        super().__init__(module)
        self._write = write
        head, embedding = TIED
        if copies and head not in self._parameters and embedding in self._parameters:
            self._parameters[head] = self._parameters[embedding]
        self._open: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> TeStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._close()

    def tensor(self, key: str) -> torch.Tensor:
        """The parameter itself, or the copy of a quantised one."""
        held = self._parameters[key]
        if type(held) is torch.Tensor:
            return held
        if self._open is None or self._open[0] is not held:
            self._close()
            plain = held.dequantize().contiguous()
            self._open = held, plain
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            held, plain = self._open
            if self._write:
                with torch.no_grad():
                    held.copy_(plain)
            self._open = None
