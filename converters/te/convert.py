"""Checkpoints and live models in and out of the Llama model on Transformer Engine layers, each rank its own bytes.

Source: NVIDIA/bionemo-framework 3a9d005, bionemo-recipes/models/llama3/convert.py, for the names and results of
    `convert_llama_hf_to_te` and `convert_llama_te_to_hf`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from converters import artefacts, execute, export
from converters.checkpoint import Checkpoint
from converters.errors import CheckpointError, ConfigError, TopologyError, listing, near
from converters.execute import Only, Transfer
from converters.files.safetensors import SafetensorsFiles
from converters.models import Family, family_of
from converters.plan import Plan
from converters.te.config import NVLlamaConfig
from converters.te.megatron import megatron_to_te, te_to_megatron
from converters.te.modeling import NVLlamaForCausalLM
from converters.te.parallel import Parallel
from converters.te.stores import TeStore
from converters.tensors import check_tensors
from converters.topology import Mesh, Topology

__all__ = [
    "convert_llama_hf_to_te",
    "convert_llama_te_to_hf",
    "load",
    "megatron_to_te",
    "save",
    "te_to_megatron",
]

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def convert_llama_hf_to_te(model_hf: LlamaForCausalLM, **config_kwargs: Any) -> NVLlamaForCausalLM:
    """The same model on Transformer Engine layers, on the same device and in the same dtype.

    Args:
        model_hf: Is read, not changed.
        **config_kwargs: Fields of `NVLlamaConfig`, beside or instead of those of the model.

    Raises:
        ConfigError: A model that Transformer Engine's layers cannot be.
        CheckpointError: Parameters of several dtypes, or that do not fit the config.
    """
    fields = model_hf.config.to_dict() | config_kwargs
    fields |= {"model_type": NVLlamaConfig.model_type, "architectures": ["NVLlamaForCausalLM"]}
    model_te = NVLlamaForCausalLM(NVLlamaConfig(**fields | {"dtype": _dtype(model_hf)}), device=model_hf.device)
    config = hf_config(model_hf.config)
    _move(_family(config).plan("hf", "te", config), model_hf, model_te, "the Hugging Face model")
    angles = model_te.model.rotary_emb
    angles.inv_freq = model_hf.model.rotary_emb.inv_freq.detach().to(angles.inv_freq, copy=True)
    return _alike(model_te, model_hf)


def convert_llama_te_to_hf(model_te: NVLlamaForCausalLM, **config_kwargs: Any) -> LlamaForCausalLM:
    """The same model as transformers has it, on the same device and in the same dtype.

    Args:
        model_te: Is read, not changed; one rank holds all of it.
        **config_kwargs: Fields of `LlamaConfig`, beside or instead of those of the model.

    Raises:
        TopologyError: The model is cut over ranks; `save` writes such a one.
        ConfigError: A model that `LlamaForCausalLM` cannot be.
        CheckpointError: A bias that `LlamaForCausalLM` lacks and that is not zero.
    """
    if parallel_of(model_te).tp_size > 1:
        raise TopologyError(
            f"the model is cut over tp={parallel_of(model_te).tp_size} ranks, and none holds all of it: write it with "
            "converters.te.convert.save, and load what was written"
        )
    config = hf_config(model_te.config)
    own = {option.name for dialect in _family(config).dialects for option in dialect.options}
    fields = {name: value for name, value in model_te.config.to_dict().items() if name not in {*own, "auto_map"}}
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | config_kwargs
    made = LlamaConfig(**fields | {"dtype": _dtype(model_te)})
    with torch.device(model_te.device):
        model_hf: LlamaForCausalLM = LlamaForCausalLM._from_config(made, dtype=_dtype(model_te))
    _move(_family(config).plan("te", "hf", config), model_te, model_hf, "the Transformer Engine model")
    frequencies = model_hf.model.rotary_emb
    frequencies.inv_freq = model_te.model.rotary_emb.inv_freq.to(frequencies.inv_freq, copy=True)
    return _alike(model_hf, model_te)


def load(
    folder: str | Path,
    *,
    topology: Topology | None = None,
    parallel: Parallel | None = None,
    dtype: torch.dtype | None = None,
    recipe: Any = None,
    device: torch.device | str | None = None,
    cast: bool = False,
    **options: Any,
) -> NVLlamaForCausalLM:
    """This rank's part of the model in a checkpoint folder, of Hugging Face or of Transformer Engine. Collective.

    Every rank reads the bytes that it holds, and no others.

    Args:
        folder: The checkpoint, or a hub id.
        topology: The mesh: tp, cp, dp, and sequence parallelism. By default one rank alone.
        parallel: The mesh with its groups, where they exist already; in the place of `topology`.
        dtype: Of the weights; by default that of the checkpoint.
        recipe: A recipe of Transformer Engine that every layer's matrix products run in, where the config's own
            `layer_precision` does not say which do.
        device: Where the model runs; by default a GPU where there is one.
        cast: Allow the weights to be rounded to `dtype`.
        **options: Fields of `NVLlamaConfig`: `attn_input_format`, `layer_precision`, ...

    Raises:
        SourceError: No such model, or no safetensors weights.
        ConfigError: A model that Transformer Engine's layers cannot be, an option that no config has, or a recipe that
            the layers' precision has no use for, or that does not serve all of them.
        TopologyError: Sizes that do not divide over the ranks, or another number of ranks.
        CheckpointError: Tensors missing, unmapped or misshapen; a dtype change not asked for.
    """
    if topology is not None and parallel is not None:
        raise TopologyError("both topology and parallel say how the model is cut: pass one of them")
    groups = parallel or Parallel.of(topology or Topology())
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    config = te_config(checkpoint, dtype=dtype, **options)
    recipes: dict[str, Any] = {}
    if recipe is not None:
        precision = "fp4" if type(recipe).__name__.startswith("NVFP4") else "fp8"
        config.layer_precision = config.layer_precision or [precision] * config.num_hidden_layers
        _check_recipe(recipe, precision, config.layer_precision)
        recipes = {f"{precision}_recipe": recipe}
    model = NVLlamaForCausalLM(config, **recipes, parallel=groups, device=device)
    fill(model, checkpoint, cast=cast)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def te_config(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, **options: Any) -> NVLlamaConfig:
    """The config of the model in a checkpoint folder.

    Args:
        checkpoint: In either column.
        dtype: Of the weights; by default the checkpoint's own, which need not be what its config says.
        **options: Fields of `NVLlamaConfig`.

    Raises:
        ConfigError: An option that is none.
    """
    dialect = checkpoint.family.dialect("te")
    assert dialect is not None
    own = {option.name for option in dialect.options}
    known = {*own, *NVLlamaConfig().to_dict(), *checkpoint.hf} - {"dtype"}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(
            "no such options: " + ", ".join(f"{name}={options[name]!r}{near(name, known)}" for name in unknown)
        )
    fields = json.loads(checkpoint.config_text("te", {name: value for name, value in options.items() if name in own}))
    held = {execute.dtype_of(info.dtype) for key, info in checkpoint.tensors.items() if not key.endswith("inv_freq")}
    stated = getattr(torch, str(checkpoint.hf["dtype"]))
    chosen = dtype or (held.pop() if len(held) == 1 else stated)
    fields = {name: value for name, value in fields.items() if name not in ("torch_dtype", "dtype")}
    return NVLlamaConfig(**fields | options, dtype=chosen)


def _check_recipe(recipe: Any, precision: str, wanted: list[str | None]) -> None:
    """Refuse a recipe that not every quantised layer runs in.

    Raises:
        ConfigError: No layer wants a recipe of its kind, or some want one of the other.
    """
    layers = {one: [index for index, asked in enumerate(wanted) if asked == one] for one in ("fp8", "fp4", None)}
    other = "fp4" if precision == "fp8" else "fp8"
    if layers[precision] and not layers[other]:
        return
    found = ", ".join(f"{one or 'unquantised'}: layers {at}" for one, at in layers.items() if at)
    raise ConfigError(
        f"{type(recipe).__name__} is a recipe for {precision} layers, and layer_precision has {found}: pass "
        f"layer_precision with {precision!r} and None alone, or build NVLlamaForCausalLM with fp8_recipe and "
        "fp4_recipe and give it to converters.te.convert.fill"
    )


def fill(model: NVLlamaForCausalLM, checkpoint: Checkpoint, *, cast: bool = False) -> Transfer:
    """Write a checkpoint into this rank's part of a model. Reads this rank's bytes only.

    Raises:
        CheckpointError: As `load`.
    """
    parallel = parallel_of(model)
    mesh = Mesh(parallel.topology, parallel.coord)
    plan = checkpoint.plan("te", **sizes_of(model), unpadded="source")
    # What a rank does not read must be there as well: the checkpoint is held against the whole plan.
    check_tensors(plan.source_tensors, checkpoint.tensors, str(checkpoint.folder))
    part = plan.restrict(target=mesh)
    with TeStore(model, copies=_stores_head(plan), write=True) as store:
        source = Only(checkpoint.weights, part.source_tensors)
        return execute.run(part, source, store, cast=cast, where=str(checkpoint.folder))


def save(
    model: NVLlamaForCausalLM,
    source: str | Path,
    target: str | Path,
    *,
    column: str = "hf",
    overwrite: bool = False,
    padding: str = "verify",
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint folder: weights, config, and every other file of the source byte for byte. Collective.

    The folder appears when it is complete, or not at all. Ranks map the same files, so they must be of one machine.

    Args:
        model: This rank's part of the model.
        source: The checkpoint that the model stems from, in either column.
        target: The folder to make.
        column: `hf` or `te`.
        overwrite: Replace the target where it exists.
        padding: `verify`: what pads the model (rows, groups, biases that it lacks) must still be zero. `drop`: let go
            of what training made of it.
        trust_remote_code: Carry the source's Python files over.

    Raises:
        CheckpointError: The target exists, or a value that must be equal is not.
        ConfigError: No such column, a model that it cannot have, or a source of other sizes.
    """
    if column not in ("hf", "te"):
        raise ConfigError(f"column={column!r}, expected 'hf' or 'te'")
    checkpoint = Checkpoint.open(source)
    _same_sizes(model, checkpoint)
    parallel = parallel_of(model)
    config = hf_config(model.config)
    features = checkpoint.stored & {"stored_lm_head"}
    # A folder holds the model in one piece, without what pads it over ranks.
    whole = checkpoint.family.plan("te", column, config, features=features, **sizes_of(model), unpadded="target")
    parts = export.parts_of(
        whole,
        [(model, Mesh(parallel.topology, parallel.coord))],
        padding=padding,
        stored=lambda module: TeStore(module, copies=_stores_head(whole)),
    )
    export.save(
        Path(target).absolute(),
        whole,
        parts,
        config=lambda: config_of(model, checkpoint, column).encode(),
        like=checkpoint.files.pattern if isinstance(checkpoint.files, SafetensorsFiles) else None,
        carry_from=checkpoint.folder,
        code=trust_remote_code,
        overwrite=overwrite,
    )


def _same_sizes(model: NVLlamaForCausalLM, checkpoint: Checkpoint) -> None:
    """Refuse the checkpoint of another model: its tokenizer and files would stand beside weights that are not its own.

    Raises:
        ConfigError: A size differs; all that do.
    """
    found = checkpoint.family.fields.read(hf_config(model.config))[0]
    wrong = [
        f"{name}: {found[name]}, the source {checkpoint.hf[name]}"
        for name in SIZES
        if found[name] != checkpoint.hf[name]
    ]
    if wrong:
        raise ConfigError(
            listing(f"the model does not stem from {checkpoint.folder}: sizes differ", wrong)
            + "\nPass the checkpoint that the model was made from as the source"
        )


def config_of(model: NVLlamaForCausalLM, checkpoint: Checkpoint, column: str) -> str:
    """The config.json of an export: that of the checkpoint, with the fields that are the model's own by now.

    Raises:
        ConfigError: A model that the column cannot have.
    """
    family = checkpoint.family
    found = family.fields.read(hf_config(model.config))[0]
    changes = {name: value for name, value in found.items() if value != checkpoint.hf[name]}
    text = checkpoint.config_text("hf")
    if changes:
        spellings = {known.name: known.paths for known in family.fields.fields}
        text = artefacts.patched(json.loads(text), changes, spellings)
    dialect = family.dialect(column)
    if dialect is None:
        return text
    return dialect.from_hf(text, **{option.name: getattr(model.config, option.name) for option in dialect.options})


def parallel_of(model: NVLlamaForCausalLM) -> Parallel:
    """Where this rank stands among those that share the model."""
    found: Parallel = model.model.parallel
    return found


def hf_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The config of a live model as `config.json` would have it, of Hugging Face's column."""
    fields = {"architectures": None, **config.to_diff_dict(), "model_type": config.model_type}
    if fields["architectures"] is None:
        del fields["architectures"]
    return family_of(fields).hf_config(fields)


def _family(config: Mapping[str, Any]) -> Family:
    return family_of(config)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of a model's parameters.

    Raises:
        CheckpointError: They have several.
    """
    found = {parameter.dtype for parameter in model.parameters()}
    if len(found) != 1:
        raise CheckpointError(
            f"parameters of {' and '.join(sorted(map(execute.name_of, found)))}, expected one dtype: convert the model "
            "with .to(dtype) first"
        )
    return found.pop()


def _move(plan: Plan, source: torch.nn.Module, target: torch.nn.Module, where: str) -> None:
    with TeStore(target, write=True) as into:
        execute.run(plan, TeStore(source), into, where=where)


Model = TypeVar("Model", bound=torch.nn.Module)


def _alike(model: Model, other: torch.nn.Module) -> Model:
    """`model` with what it has in common with the one that it was made from, beside weights and config."""
    if getattr(other, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(other.generation_config)
    return model.train(other.training)


def _stores_head(plan: Plan) -> bool:
    """Whether the model has to show its tied head under its own name, because a folder stores it so."""
    return "stored_lm_head" in plan.features


def sizes_of(model: NVLlamaForCausalLM) -> dict[str, Any]:
    """Rows and groups that the model is built with, over all ranks."""
    parallel = parallel_of(model)
    return {
        "padded_vocab_size": parallel.vocabulary(model.config),
        "padded_query_groups": parallel.groups(model.config),
    }
