"""The converter under test, as two callables: into Megatron-Core models, and out of them.

Any converter can be checked. Name it with `--converter module:attribute` (or an entry point of the group
`parity.converters`); the attribute is an object with these two methods, or a class of such objects that takes no
arguments. Both are called in real ranks, on every rank, with Megatron-Core's parallel state set up:

    class Mine:
        def to_megatron(self, folder, settings):
            ...  # build this rank's chunks of the model in `folder`, load them, and return them
        def to_hf(self, chunks, source, target):
            ...  # write the model in `chunks` as a checkpoint folder `target`; `source` is one with the same config
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.errors import SourceError, near
from converters.topology import Topology

if TYPE_CHECKING:
    from torch.nn import Module

GROUP = "parity.converters"
OWN = "llama-parity"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a model is built for.

    Args:
        topology: The parallel layout, with its layers placed.
        precision: Of weights and activations: `fp32` or `bf16`. A checkpoint in another dtype is to be cast.
            Below (`fp8-delayed` and the like), that of matrix products in Transformer Engine's layers; weights and
            activations are `bf16` then.
        backend: `megatron` or `te`.
    """

    topology: Topology
    precision: str
    backend: str = "megatron"


class Converter(Protocol):
    """Both directions between a Hugging Face checkpoint folder and live Megatron-Core models. Collective."""

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Module]:
        """This rank's model chunks (`GPTModel`, bare or wrapped), one for each of its virtual stages, loaded."""

    def to_hf(self, chunks: Sequence[Module], source: Path, target: Path) -> None:
        """Write the model in `chunks` as a Hugging Face folder.

        Args:
            chunks: A model with the config of `source`, and the layout that it was built for.
            source: The checkpoint folder that the model stems from; its other files are to be carried over.
            target: The folder to make; it does not exist.
        """


class WithTe(Protocol):
    """What a converter has besides, for `--backend te`. Collective."""

    def to_te(self, folder: Path, settings: Settings) -> Module:
        """This rank's part of the model on Transformer Engine's layers, loaded."""

    def te_to_hf(self, model: Module, source: Path, target: Path) -> None:
        """Write it as a Hugging Face folder; see `Converter.to_hf`."""


class WithFp8(Protocol):
    """What a converter has besides, for FP8 checkpoints. From folder to folder, in one process."""

    def quantize(self, source: Path, target: Path, scheme: str) -> None:
        """Write the plain checkpoint `source` in an FP8 format, a name of `parity.statement.fp8.FORMATS`."""

    def dequantize(self, source: Path, target: Path) -> None:
        """Write the FP8 checkpoint `source` as a plain one in float32."""


class Own:
    """This package's converter, by way of `AutoBridge`."""

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Module]:
        """As `Converter.to_megatron`; each rank reads its own bytes."""
        from converters.bridge import AutoBridge

        # The precision was asked for: a checkpoint in another dtype is cast, and held against torch's own cast.
        provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(cast=True)
        return built(provider, settings)

    def to_hf(self, chunks: Sequence[Module], source: Path, target: Path) -> None:
        """As `Converter.to_hf`; ranks write their own bytes."""
        from converters.bridge import AutoBridge

        AutoBridge.from_hf_pretrained(source).save_hf_pretrained(chunks, target)

    def to_te(self, folder: Path, settings: Settings) -> Module:
        """As `WithTe.to_te`; each rank reads its own bytes."""
        from converters.te import convert

        return convert.load(folder, **te_options(settings))

    def te_to_hf(self, model: Any, source: Path, target: Path) -> None:
        """As `WithTe.te_to_hf`."""
        from converters.te import convert

        convert.save(model, source, target)

    def quantize(self, source: Path, target: Path, scheme: str) -> None:
        """As `WithFp8.quantize`; blocks may reach over the edge of a weight, as those of tiny models do."""
        from converters.quantized.export import quantize

        quantize(source, target, scheme, partial_blocks=True)

    def dequantize(self, source: Path, target: Path) -> None:
        """As `WithFp8.dequantize`."""
        from converters.quantized.restore import dequantize

        dequantize(source, target, dtype="float32")


def te_options(settings: Settings) -> dict[str, Any]:
    """What the model on Transformer Engine's layers is loaded with."""
    import torch

    from converters.te.quantization import recipe_of
    from parity.backends import below_bf16, held_in

    return {
        "topology": settings.topology,
        "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[held_in(settings.precision)],
        "recipe": recipe_of(settings.precision) if below_bf16(settings.precision) else None,
        # The precision was asked for: a checkpoint in another dtype is cast, and held against torch's own cast.
        "cast": True,
        "attn_input_format": "bshd",
    }


def built(provider: Any, settings: Settings) -> list[Module]:
    """A provider's model under `settings`, with groups of zeros where the heads do not divide over tp."""
    import torch

    provider.topology = settings.topology
    provider.pad_query_groups()
    provider.params_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
    chunks: list[Module] = provider.provide_distributed_model(wrap_with_ddp=False)
    return chunks


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def require(name: str) -> None:
    """Refuse the name of a converter that cannot be there, without importing it.

    Raises:
        SourceError: Neither our own, nor an entry point, nor an attribute of a module that can be found.
    """
    known = [OWN, *_entry_points()]
    module, colon, attribute = name.partition(":")
    if not colon and name not in known:
        raise SourceError(f"no converter {name!r}{near(name, known)}; expected {', '.join(known)}, or module:attribute")
    try:
        missing = colon and importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        missing = True
    if missing or (colon and not attribute):
        raise SourceError(f"the converter {name!r} cannot be imported: expected module:attribute, on the Python path")


def find(name: str) -> Converter:
    """The converter called `name`: our own, an entry point, or `module:attribute`.

    Raises:
        SourceError: There is none, it cannot be imported, or it lacks one of the two methods.
    """
    require(name)
    if name == OWN:
        return Own()
    try:
        if ":" not in name:
            found = _entry_points()[name].load()
        else:
            module, _, attribute = name.partition(":")
            found = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SourceError(f"the converter {name!r} cannot be imported: {error}") from error
    converter = found() if isinstance(found, type) else found
    missing = [method for method in ("to_megatron", "to_hf") if not callable(getattr(converter, method, None))]
    if missing:
        raise SourceError(f"the converter {name!r} has no {' and no '.join(missing)}: expected both callables")
    return converter  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Named:
    """A converter by name, which is found where it is used: what is sent to ranks."""

    name: str = OWN

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Module]:
        """As `Converter.to_megatron`."""
        return find(self.name).to_megatron(folder, settings)

    def to_hf(self, chunks: Sequence[Module], source: Path, target: Path) -> None:
        """As `Converter.to_hf`."""
        find(self.name).to_hf(chunks, source, target)

    def to_te(self, folder: Path, settings: Settings) -> Module:
        """As `WithTe.to_te`."""
        return with_te(find(self.name)).to_te(folder, settings)

    def te_to_hf(self, model: Module, source: Path, target: Path) -> None:
        """As `WithTe.te_to_hf`."""
        with_te(find(self.name)).te_to_hf(model, source, target)

    def quantize(self, source: Path, target: Path, scheme: str) -> None:
        """As `WithFp8.quantize`."""
        with_fp8(find(self.name)).quantize(source, target, scheme)

    def dequantize(self, source: Path, target: Path) -> None:
        """As `WithFp8.dequantize`."""
        with_fp8(find(self.name)).dequantize(source, target)


def with_fp8(converter: Any) -> WithFp8:
    """The converter, which must write and read FP8 checkpoints.

    Raises:
        SourceError: It does not.
    """
    if reason := without_fp8(converter):
        raise SourceError(reason)
    return converter  # type: ignore[no-any-return]


def without_fp8(converter: Any) -> str:
    """Why a converter has no FP8 checkpoints, or an empty string."""
    inner = find(converter.name) if isinstance(converter, Named) else getattr(converter, "inner", converter)
    inner = find(inner.name) if isinstance(inner, Named) else inner
    missing = [method for method in ("quantize", "dequantize") if not callable(getattr(inner, method, None))]
    return f"the converter has no {' and no '.join(missing)}, which FP8 checkpoints need" if missing else ""


def with_te(converter: Any) -> WithTe:
    """The converter, which must have both callables for `--backend te`.

    Raises:
        SourceError: It has not.
    """
    if reason := without_te(converter):
        raise SourceError(reason)
    return converter  # type: ignore[no-any-return]


def without_te(converter: Any) -> str:
    """Why a converter has no `--backend te`, or an empty string."""
    missing = [method for method in ("to_te", "te_to_hf") if not callable(getattr(converter, method, None))]
    return f"the converter has no {' and no '.join(missing)}, which --backend te calls" if missing else ""
