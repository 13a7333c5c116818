"""A converter with a fault, made from any converter without looking into it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.topology import Topology
from parity.converter import Converter, Settings, with_fp8, with_te
from parity.faults.breaks import InjectionError, NotHereError
from parity.faults.mutations import Live, Mutation, OnFolder, Patch, Quantised

if TYPE_CHECKING:
    from torch.nn import Module

    from parity.faults.drafts import Draft


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """`inner`, wrong in one way: on the way in, on the way out, or in both.

    Args:
        inner: The converter under test.
        on_import: Applied to the folder that it reads, to the model that it returns, or to what that computes.
        on_export: Applied to the model that it writes, or to the folder that it wrote.
        topology: The parallel layout, which some faults depend on.
        layers: The layers that are wrong; none means all.
        scratch: A folder that all ranks see, for mutated copies. The caller removes it.
    """

    inner: Converter
    on_import: tuple[Mutation, ...] = ()
    on_export: tuple[Mutation, ...] = ()
    topology: Topology
    layers: tuple[int, ...] = ()
    scratch: Path

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Module]:
        """As `Converter.to_megatron`, of a mutated copy of `folder`."""
        from parity.faults.patches import PATCHES

        return self._imported(folder, PATCHES, lambda mutated: self.inner.to_megatron(mutated, settings))

    def to_hf(self, chunks: Sequence[Module], source: Path, target: Path) -> None:
        """As `Converter.to_hf`, then the folder is mutated."""
        self._exported(chunks, source, target, lambda: self.inner.to_hf(chunks, source, target))

    def to_te(self, folder: Path, settings: Settings) -> Module:
        """As `WithTe.to_te`, of a mutated copy of `folder`."""
        from parity.faults.te_patches import PATCHES

        inner = with_te(self.inner)
        (model,) = self._imported(folder, PATCHES, lambda mutated: [inner.to_te(mutated, settings)])
        return model

    def te_to_hf(self, model: Module, source: Path, target: Path) -> None:
        """As `WithTe.te_to_hf`, then the folder is mutated."""
        inner = with_te(self.inner)
        self._exported([model], source, target, lambda: inner.te_to_hf(model, source, target))

    def quantize(self, source: Path, target: Path, scheme: str) -> None:
        """As `WithFp8.quantize`, then the folder is mutated."""
        from parity.faults.fp8_folders import change

        with_fp8(self.inner).quantize(source, target, scheme)
        for mutation in self.on_export:
            if isinstance(mutation, Quantised) and mutation.scheme == scheme:
                change(mutation.how, source, target)

    def dequantize(self, source: Path, target: Path) -> None:
        """As `WithFp8.dequantize`."""
        with_fp8(self.inner).dequantize(source, target)

    def _imported(
        self,
        folder: Path,
        patches: Mapping[str, Callable[[Sequence[Module]], None]],
        build: Callable[[Path], Sequence[Module]],
    ) -> Sequence[Module]:
        from parity.faults.patches import apply_live

        config = json.loads((folder / "config.json").read_text())
        with self._mutated(folder) as mutated:
            models = build(mutated)
        for mutation in self.on_import:
            if isinstance(mutation, Live):
                apply_live(mutation, models, config["vocab_size"], self.topology)
            elif isinstance(mutation, Patch):
                patches[mutation.name](models)
        return models

    def _exported(self, models: Sequence[Module], source: Path, target: Path, write: Callable[[], None]) -> None:
        import torch.distributed as dist

        from converters import collective
        from parity.faults.patches import apply_live

        config = json.loads((source / "config.json").read_text())
        for mutation in self.on_export:
            if isinstance(mutation, Live):
                apply_live(mutation, models, config["vocab_size"], self.topology)
        write()
        changes = _on_folder(self.on_export)
        if not changes:
            return

        def change() -> None:
            draft = self._changed(target, source, changes)
            shutil.rmtree(target)
            draft.write(target)

        if dist.is_initialized():
            dist.barrier()  # every rank has written its part
        collective.on_first(change)

    @contextlib.contextmanager
    def _mutated(self, folder: Path) -> Iterator[Path]:
        """The folder to read: a mutated copy, written by the first rank, or the folder itself."""
        import torch.distributed as dist

        from converters import collective

        changes = _on_folder(self.on_import)
        if not changes:
            yield folder
            return

        def write() -> Path:
            copy = Path(tempfile.mkdtemp(prefix="mutated-", dir=self.scratch))
            self._changed(folder, folder, changes).write(copy)
            return copy

        copy = collective.on_first(write)
        yield copy
        if dist.is_initialized():
            dist.barrier()  # nobody reads any more
        if collective.rank() == 0:
            shutil.rmtree(copy)

    def _changed(self, folder: Path, source: Path, changes: Sequence[OnFolder]) -> Draft:
        """The checkpoint in `folder`, changed."""
        from parity.faults.drafts import Draft, Scene
        from parity.faults.mutate import apply

        config: dict[str, Any] = json.loads((source / "config.json").read_text())
        layers = self.layers or tuple(range(config["num_hidden_layers"]))
        draft, scene = Draft(folder), Scene(config=config, topology=self.topology, layers=layers, source=source)
        before = draft.copy()
        for mutation in changes:
            try:
                apply(mutation, draft, scene)
            except NotHereError:
                raise
            except Exception as error:
                raise InjectionError(f"{mutation} in {folder}: {type(error).__name__}: {error}") from error
        if draft.same(before) and not any(mutation.idle for mutation in changes):
            raise NotHereError(f"{changes} changes nothing in {folder}")
        return draft


def _on_folder(given: Sequence[Mutation]) -> list[OnFolder]:
    return [mutation for mutation in given if not isinstance(mutation, Live | Patch | Quantised)]
