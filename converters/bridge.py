"""`AutoBridge`: Hugging Face checkpoints in and out of live Megatron-Core models, with the API Megatron users know.

Every rank reads and writes its own bytes. Nothing is broadcast on the way in; on the way out a rank either maps the
files of the export and writes its part of them, or, for streaming, contributes its part of each tensor to a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from converters import artefacts, collective, execute, export
from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.execute import Only, Store, Transfer
from converters.export import Part
from converters.fields import Ledger
from converters.models import FAMILIES, Family, column_of, family_of
from converters.plan import Plan
from converters.sources import Source, resolve
from converters.stores import safetensors
from converters.stores.modules import ModuleStore
from converters.tensors import check_tensors
from converters.topology import Mesh

if TYPE_CHECKING:
    from converters.convert import Conversion
    from converters.megatron.provider import GPTModelProvider

OF_A_MODEL = ("device_map", "attn_implementation", "low_cpu_mem_usage")
"""Arguments of `from_pretrained` that say how a model is built."""


class AutoBridge:
    """A Hugging Face model, as a source of Megatron models and a pattern for exports.

    Args:
        source: Where it was found; its folder is `None` for a config alone.
        trust_remote_code: Carry Python files of the repository over to exports.

    Source: NVIDIA-NeMo/Megatron-Bridge 0.6, models/conversion/auto_bridge.py `AutoBridge` (names of methods).
    """

    def __init__(self, source: Source, *, trust_remote_code: bool = False) -> None:
        self.source = source
        self.family: Family = family_of(source.config)
        if (column := column_of(source.config)) != "hf":
            raise ConfigError(
                f"{source.name} is in the {column!r} column, expected 'hf': convert it first "
                "(python -m converters convert --to hf SOURCE TARGET)"
            )
        self.ledger: Ledger = self.family.fields.to_megatron(source.config)
        self.trust_remote_code = trust_remote_code
        self._weights: safetensors.SafetensorsFolder | None = None

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> AutoBridge:
        """The bridge for a checkpoint folder or a hub id, weights included.

        Raises:
            SourceError: No such model, or no safetensors weights.
            ConfigError: A config field that does not translate.
        """
        found = resolve(str(path), revision=revision, token=token, trust_remote_code=trust_remote_code)
        return cls(found, trust_remote_code=trust_remote_code)

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        """The bridge for a config alone (a `LlamaConfig`, or a dict as in config.json): models without weights."""
        fields = config if isinstance(config, Mapping) else config.to_diff_dict()
        named = {"architectures": ["LlamaForCausalLM"], **fields}
        return cls(Source(name="config", folder=None, config=named, origin="packaged config"))

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The architectures that can be converted."""
        return [family.architecture for family in FAMILIES]

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether a config (an object or a dict) names a supported architecture."""
        named = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
        return bool(set(named or ()) & set(cls.list_supported_models()))

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether `from_hf_pretrained` would accept the config at `path`."""
        try:
            cls(resolve(str(path), weights=False, trust_remote_code=trust_remote_code))
        except ConversionError:
            return False
        return True

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        low_memory_save: bool = False,
        overwrite: bool = False,
        stacked: bool = True,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> Conversion:
        """Write a Hugging Face checkpoint as a Megatron one, file to file: no model is built, on any device.

        Args:
            hf_model_id: Folder or hub id.
            megatron_path: The folder to make.
            low_memory_save: Has no effect: it never takes more than some megabytes.
            overwrite: Replace the target where it exists.
            stacked: Layers stacked in one tensor each, or a tensor for each layer (`hetereogenous_dist_checkpoint`).
            show_progress: Draw a bar on standard error where it takes long.
            **kwargs: Of `from_hf_pretrained` there and here: `torch_dtype` or `dtype` (round every tensor to it),
                `revision`, `token`, `trust_remote_code`; `device_map`, `attn_implementation` and `low_cpu_mem_usage`
                say how a model would be built, and have no effect. All others are those of
                `converters.convert.convert_folder`.

        Raises:
            ConversionError: As `converters.convert.convert_folder`.

        Source: NVIDIA-NeMo/Megatron-Bridge, models/conversion/auto_bridge.py `AutoBridge.import_ckpt` (its parameters).
        """
        from converters.convert import convert_folder

        options = {name: value for name, value in kwargs.items() if name not in OF_A_MODEL}
        dtype = options.pop("torch_dtype", options.pop("dtype", None))
        if isinstance(dtype, torch.dtype):
            dtype = execute.name_of(dtype)
        return convert_folder(
            hf_model_id,
            megatron_path,
            source_column="hf",
            target_column="megatron",
            dtype=None if dtype == "auto" else dtype,
            overwrite=overwrite,
            stacked=stacked,
            quiet=not show_progress,
            **options,
        )

    def export_ckpt(
        self,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        source_path: str | Path | None = None,
        *,
        overwrite: bool = False,
        **options: Any,
    ) -> Conversion:
        """Write a Megatron checkpoint as a Hugging Face one, file to file: no model is built, on any device.

        Config, tokenizer, the other files, and which tensors lie in which file are those of this bridge's model.

        Args:
            megatron_path: The checkpoint, or one of its iterations.
            hf_path: The folder to make.
            show_progress: Draw a bar on standard error where it takes long.
            strict: Every tensor of the model must be there, and no other. There is no other way: `False` has no effect.
            source_path: Another model to take config and files from.
            overwrite: Replace the target where it exists.
            **options: Those of `converters.convert.convert_folder`: `iteration`, `dtype`, `max_shard_size`, ...

        Raises:
            ConversionError: As `converters.convert.convert_folder`.

        Source: NVIDIA-NeMo/Megatron-Bridge, models/conversion/auto_bridge.py `AutoBridge.export_ckpt` (its parameters).
        """
        from converters.convert import convert_folder

        return convert_folder(
            megatron_path,
            hf_path,
            source_column="megatron",
            target_column="hf",
            like=self.source if source_path is None else source_path,
            quiet=not show_progress,
            overwrite=overwrite,
            **{"trust_remote_code": self.trust_remote_code, **options},
        )

    @property
    def weights(self) -> safetensors.SafetensorsFolder:
        """The checkpoint's tensors.

        Raises:
            CheckpointError: The bridge was made from a config alone.
        """
        if self._weights is None:
            if self.source.folder is None:
                raise CheckpointError(f"{self.source.name}: only a config is known, there are no weights to load")
            self._weights = safetensors.SafetensorsFolder(self.source.folder)
        return self._weights

    @property
    def stored(self) -> frozenset[str]:
        """Features of what the checkpoint stores beyond the model: a copy of a tied head, rotary buffers."""
        if self.source.folder is None:
            return frozenset()
        tied = bool(self.ledger.hf["tie_word_embeddings"])
        return self.family.stored("hf", self.weights.tensors().keys(), tied=tied)

    def plan(self, provider: GPTModelProvider, *, features: frozenset[str] | None = None) -> Plan:
        """The whole plan, Hugging Face to the names of `provider`'s layer spec."""
        from converters.megatron import specs

        column = "megatron_local" if specs.resolve(provider.layer_spec) == "local" else "megatron"
        extra = self.stored if features is None else features
        if provider.layernorm_zero_centered_gamma:
            extra |= {"layernorm_zero_centered_gamma"}
        config = self.source.config
        return self.family.plan(
            "hf",
            column,
            config,
            padded_vocab_size=provider.padded_vocab_size,
            padded_query_groups=provider.num_query_groups,
            features=extra,
        )

    def to_megatron_provider(self, load_weights: bool = True, *, cast: bool = False) -> GPTModelProvider:
        """A provider of this model. Set parallel sizes on it, then `provide_distributed_model()`.

        Args:
            load_weights: Fill the model with the checkpoint when it is built.
            cast: Allow the weights to be rounded to the provider's dtype where that is not the checkpoint's.
        """
        from converters.megatron.translate import provider_for

        provider = provider_for(self.ledger.megatron)
        if load_weights:
            provider.perform_initialization = False
            provider.register_pre_wrap_hook(lambda chunks: self._load(chunks, provider, cast) and None)
        return provider

    def load_hf_weights(self, model: Sequence[torch.nn.Module], *, cast: bool = False) -> None:
        """Fill a model with the checkpoint; every rank reads its own bytes.

        Args:
            model: This rank's model chunks.
            cast: Allow rounding to the model's dtype.

        Raises:
            CheckpointError: Tensors missing, unmapped or misshapen; a dtype change not asked for.
        """
        self._load(model, _config_of(model), cast)

    def _load(self, model: Sequence[torch.nn.Module], provider: GPTModelProvider, cast: bool) -> list[Transfer]:
        plan = self.plan(provider)
        # What a rank does not read must be there as well: the checkpoint is held against the whole plan.
        check_tensors(plan.source_tensors, self.weights.tensors(), str(self.source.folder))
        out = []
        for chunk, mesh in zip(_bare(model), _meshes(provider), strict=True):
            part = plan.restrict(target=mesh)
            out.append(execute.run(part, Only(self.weights, part.source_tensors), ModuleStore(chunk), cast=cast))
        return out

    def export_hf_weights(
        self, model: Sequence[torch.nn.Module], *, padding: str = "verify"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each Hugging Face tensor in turn, whole, on every rank, in the model's dtype and on its device. Collective.

        Args:
            model: This rank's model chunks.
            padding: `verify`: padding rows and biases that the Hugging Face model lacks must still be zero. `drop`:
                let go of what training made of them.

        Raises:
            CheckpointError: A constant or a tied tensor that is not what it must be.
        """
        parts = self._parts(model, padding)
        whole = self.plan(_config_of(model)).inverse()
        dtypes = export.dtypes_of(parts)
        device = next(model[0].parameters()).device
        copies = [(plan, store, _by_target(plan)) for plan, store in parts]
        for key, shape in whole.target_tensors.items():
            tensor = torch.zeros(shape, dtype=execute.dtype_of(dtypes[key]), device=device)
            for _, store, by_target in copies:
                for copy in by_target.get(key, ()):
                    if copy.kind != "verify" and not copy.source_replica:
                        execute.apply(copy, store.tensor(copy.source.key), tensor)
            collective.add_parts(tensor)
            if key in whole.tied:
                collective.agree(_tied_faults(copies, key, tensor))
            yield key, tensor

    def save_hf_pretrained(
        self,
        model: Sequence[torch.nn.Module],
        path: str | Path,
        *,
        overwrite: bool = False,
        padding: str = "verify",
    ) -> None:
        """Write a Hugging Face folder: weights, config, and every other file of the source byte for byte. Collective.

        The folder appears when it is complete, or not at all. Ranks map the same files, so they must be of one machine;
        across machines, write what `export_hf_weights` yields. Files and the order of tensors follow the source.

        Args:
            model: This rank's model chunks.
            path: The folder to make.
            overwrite: Replace it where it exists.
            padding: As in `export_hf_weights`.

        Raises:
            CheckpointError: The target exists, or a value that must be equal is not.
            ConfigError: The provider computes something that a Hugging Face config cannot say.
        """
        provider = _config_of(model)
        export.save(
            Path(path).absolute(),
            self.plan(provider).inverse(),
            self._parts(model, padding),
            config=lambda: self.hf_config(provider),
            like=self.weights.files.pattern if self.source.folder else None,
            carry_from=self.source.folder,
            code=self.trust_remote_code,
            overwrite=overwrite,
        )

    def hf_config(self, provider: GPTModelProvider) -> bytes:
        """The config.json of an export: the source's own bytes, or with the fields that the provider changed.

        Raises:
            ConfigError: A field of the provider that a Hugging Face config cannot say.
        """
        from converters.megatron.translate import fields_of

        values, defaults = fields_of(provider)
        found = self.family.fields.to_hf(values, defaults).hf
        changes = {name: value for name, value in found.items() if value != self.ledger.hf[name]}
        # What the model no longer has (the factors of a rope scaling that was switched off) is set to null.
        changes |= {name: None for name, was in self.ledger.hf.items() if was is not None and name not in found}
        if not changes and self.source.folder is not None:
            return (self.source.folder / "config.json").read_bytes()
        spellings = {known.name: known.paths for known in self.family.fields.fields}
        return artefacts.patched(self.source.config, changes, spellings).encode()

    def _parts(self, model: Sequence[torch.nn.Module], padding: str) -> list[Part]:
        """For each model chunk its part of the export and where its tensors live, checked on every rank."""
        provider = _config_of(model)
        held = zip(_bare(model), _meshes(provider), strict=True)
        return export.parts_of(self.plan(provider).inverse(), held, padding=padding)


def _by_target(plan: Plan) -> dict[str, list[Any]]:
    return {key: copies for key, copies, _ in plan.by_target()}


def _tied_faults(copies: list[tuple[Plan, Store, dict[str, list[Any]]]], key: str, first: torch.Tensor) -> list[str]:
    found = [
        execute.tied_fault(copy, store.tensor(copy.source.key), first)
        for _, store, by_target in copies
        for copy in by_target.get(key, ())
        if copy.kind == "verify"
    ]
    return [fault for fault in found if fault]


def _bare(model: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    from converters.megatron.provider import unwrap

    return [unwrap(chunk) for chunk in model]


def _config_of(model: Sequence[torch.nn.Module]) -> GPTModelProvider:
    from converters.megatron.provider import GPTModelProvider

    config = _bare(model)[0].config
    if not isinstance(config, GPTModelProvider):
        raise ConfigError(f"the model's config is a {type(config).__name__}, expected one built by a GPTModelProvider")
    return config


def _meshes(provider: GPTModelProvider) -> list[Mesh]:
    """This rank's place, once for each of its model chunks."""
    topology = provider.topology
    coord = topology.coord(collective.rank())
    return [Mesh(topology, chunk) for chunk in topology.chunks_of(coord)]
