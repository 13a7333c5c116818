"""What Megatron-LM's arguments and Megatron-Bridge's `run_config.yaml` say of a model, as fields of a ledger, and back.

Fields are plain data, as in `Ledger.megatron`: dtypes and activations by name. Nothing of Megatron is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from reprlib import repr as brief
from typing import Any, Literal

from converters import artefacts
from converters.errors import ConfigError, listing
from converters.files.settings_table import ARGUMENT_OF, EXECUTION, HARD_CODED, REQUIRED, ROWS, SWITCHES, Setting
from converters.models import FAMILIES, Family
from converters.rows import Dropped

Source = Literal["args", "run_config"]
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"
HALF = {"bf16": "bfloat16", "fp16": "float16"}
ACTIVATIONS = {"silu": "torch.nn.functional.silu", "gelu": "torch.nn.functional.gelu"}
NAMES = {"torch._C._nn.gelu": "gelu", **{target: name for name, target in ACTIVATIONS.items()}}
MLM_VOCAB_MULTIPLE = 128
NOT_RECORDED = "not recorded"
"""The activation of a gated MLP has no default: Megatron-Bridge leaves functions out of some of its configs."""
GHOSTS = "ghost_query_groups"
"""How many of the groups are zeros, which no other program writes or reads."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a checkpoint.

    Attributes:
        fields: Every field of the table, and the switches that are on, by the ledger's names.
        where: The file that they are from, for messages.
        said: The fields that the file gives; the others are at Megatron's default.
        remarks: What the file does not say exactly.
    """

    fields: Mapping[str, Any]
    where: str
    said: frozenset[str]
    remarks: tuple[str, ...] = ()


def from_args(args: Mapping[str, Any], where: str) -> Settings:
    """The settings in the arguments that Megatron-LM keeps in a checkpoint.

    Args:
        args: The attributes of its `argparse.Namespace`; dtypes by name.
        where: The file, for messages.

    Raises:
        ConfigError: Arguments that are missing or contradict each other; all of them.
    """
    found, problems = _read(args, "args")
    remarks: list[str] = []
    if "vocab_size" not in found and args.get("padded_vocab_size") is not None:
        found["vocab_size"] = args["padded_vocab_size"]
        remarks.append(
            f"vocab_size: {where} gives only the padded vocabulary, {found['vocab_size']}; the rows of padding become "
            "words (give the model's config, --like HF_DIR, to leave them out)"
        )
    # Without the flag `num_query_groups` is 1, and means nothing.
    if args.get("group_query_attention") is False:
        found.pop("num_query_groups", None)
    if "swiglu" in args and "activation_func" not in found:
        found |= {"activation_func": "silu" if args["swiglu"] else "gelu", "gated_linear_unit": bool(args["swiglu"])}
    switches = {name: args.get(ARGUMENT_OF.get(name, name)) for name in SWITCHES}
    return _settled(found, switches, args.get(GHOSTS), where, problems, remarks)


def from_run_config(model: Mapping[str, Any], where: str) -> Settings:
    """The settings in the `model` section of a `run_config.yaml`, flat (a provider) or nested (a builder's config).

    Raises:
        ConfigError: Members that are missing, contradict each other, or that nothing here knows; all of them.
    """
    flat = {**_section(model, "transformer"), **model}
    found, problems = _read(flat, "run_config")
    known = {name for row in ROWS for name in row.members}
    patterns = [
        p
        for row in FAMILIES[0].fields.rows
        if isinstance(row, Dropped) and row.side == "megatron"
        for p in row.patterns
    ]
    switches = {
        name: value
        for name, value in flat.items()
        if name not in known
        and (name in SWITCHES or not any(fnmatchcase(name, pattern) for pattern in (*EXECUTION, *patterns)))
    }
    return _settled(found, switches, flat.get(GHOSTS), where, problems, [])


def to_args(
    fields: Mapping[str, Any], *, iteration: int, model_id: str | None = None, stacked: bool = True
) -> dict[str, Any]:
    """The arguments that describe a model to Megatron-LM, dtypes by name.

    Besides the model: no optimizer and no random state is in the checkpoint, the layout is one rank's, and the
    tokenizer is Hugging Face's. `padded_vocab_size` is left to Megatron-LM, which pads for the layout that it runs,
    unless the checkpoint is padded.

    Args:
        fields: `Ledger.megatron`, and the padded sizes of the checkpoint where it has any (those of `Family.plan`).
        iteration: Of training.
        model_id: The model's name on the hub.
        stacked: Whether its layers are stacked.
    """
    out: dict[str, Any] = {}
    fields = _with_ghosts(fields)
    for row in ROWS:
        value = fields.get(row.field, row.default)
        out |= dict.fromkeys(row.arguments, not value if row.negated else value)
    gated = out["gated_linear_unit"]
    return out | {
        "swiglu": gated and out["activation_func"] == "silu",
        "squared_relu": False,
        "quick_geglu": False,
        "openai_gelu": False,
        "group_query_attention": fields["num_query_groups"] != fields["num_attention_heads"],
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "multi_latent_attention": False,
        "num_experts": None,
        "hetereogenous_dist_checkpoint": not stacked,
        GHOSTS: fields[GHOSTS],
        "padded_vocab_size": fields.get("padded_vocab_size"),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "make_vocab_size_divisible_by": MLM_VOCAB_MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": model_id,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }


def to_run_config(fields: Mapping[str, Any], *, model_id: str | None = None, stacked: bool = True) -> dict[str, Any]:
    """What `run_config.yaml` holds for Megatron-Bridge: a provider with the model's fields, and that there is no state.

    The vocabulary is padded to a multiple of the ranks and no further.
    """
    model: dict[str, Any] = {"_target_": PROVIDER}
    fields = _with_ghosts(fields)
    for row in ROWS:
        model |= dict.fromkeys(row.members, fields.get(row.field, row.default))
    model |= {
        "activation_func": {"_target_": ACTIVATIONS[fields["activation_func"]], "_call_": False},
        "params_dtype": {"_target_": f"torch.{fields['params_dtype']}", "_call_": False},
        "make_vocab_size_divisible_by": 1,
        "should_pad_vocab": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "hetereogenous_dist_checkpoint": not stacked,
        GHOSTS: fields[GHOSTS],
        "hf_model_id": model_id,
    }
    return {
        "model": model,
        "checkpoint": {
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": False,
        },
        "tokenizer": {
            "_target_": TOKENIZER,
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": model_id,
            "hf_tokenizer_kwargs": {},
        },
    }


def beyond_megatron(fields: Mapping[str, Any]) -> list[str]:
    """What of a model Megatron-LM and Megatron-Bridge do not read, and would compute otherwise."""
    if not fields.get("rope_scaling"):
        return []
    return [
        f"{name}={fields[name]!r}: Megatron-LM and Megatron-Bridge always take {fixed!r}"
        for name, fixed in HARD_CODED.items()
        if fields.get(name, fixed) != fixed
    ]


def hf_config(settings: Settings) -> tuple[Family, dict[str, Any]]:
    """The family and the `config.json` of a model that only its settings describe.

    Spelled as transformers 4 and 5 both read it. What is no part of the settings (token ids) is left out.

    Raises:
        ConfigError: Settings that no family has.
    """
    refusals = []
    defaults = {row.field: row.default for row in ROWS} | SWITCHES
    for family in FAMILIES:
        try:
            hf = dict(family.fields.to_hf(settings.fields, defaults).hf)
        except ConfigError as error:
            refusals.append(str(error))
            continue
        config = {"architectures": [family.architecture], "model_type": family.fields.family}
        scaled = hf.get("rope_type", "default") != "default"
        if not scaled:
            hf.pop("rope_type", None)
        spellings = {known.name: _older(known.paths) for known in family.fields.fields}
        start: dict[str, Any] = config | ({"rope_scaling": {}} if scaled else {})
        return family, json.loads(artefacts.patched(start, hf, spellings))
    raise ConfigError("\n".join([f"{settings.where}: no Hugging Face model has these settings:", *refusals]))


def differences(config: Mapping[str, Any], settings: Settings, name: str) -> list[str]:
    """Where a `config.json` and a checkpoint's settings describe the model alike, but not the run that made it.

    Args:
        config: The config.
        settings: The checkpoint's.
        name: Of the config, for messages.

    Returns:
        Lines for fields that do not change what the model computes (a dropout, the longest sequence in training).

    Raises:
        ConfigError: Fields that do; all of them.
    """
    family = next((family for family in FAMILIES if family.fields.family == config.get("model_type")), FAMILIES[0])
    ledger = family.fields.to_megatron(family.hf_config(config))
    spelled = {name: "/".join(entry.hf) for entry in ledger.entries for name in entry.megatron if entry.hf}
    weighs = {row.field: row.computes for row in ROWS}
    lines: dict[bool, list[str]] = {True: [], False: []}
    for field, value in ledger.megatron.items():
        held = settings.fields.get(field)
        if field in weighs and field in settings.said and held != value:
            hf = spelled.get(field, field)
            shown = f"{hf}: " if hf == field else f"{hf} ({field}): "
            lines[weighs[field]].append(f"{shown}{value!r} in {name}, {held!r} in {settings.where}")
    on = [
        f"{field}: {brief(value)} in {settings.where}, and {name} has no such thing"
        for field, value in settings.fields.items()
        if field not in weighs
    ]
    if lines[True] or on:
        raise ConfigError(
            listing(f"{name} is not the config of the model in the checkpoint; they differ in", lines[True] + on)
            + f"\nGive the config of that model, or correct {name}"
        )
    return lines[False]


def _with_ghosts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a checkpoint with key-value groups of zeros: Megatron takes them for groups."""
    groups = fields["num_query_groups"]
    padded = fields.get("padded_query_groups") or groups
    heads = fields["num_attention_heads"] // groups * padded
    return {**fields, "num_query_groups": padded, "num_attention_heads": heads, GHOSTS: padded - groups}


def _older(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths that transformers 4 knew, for fields that it and 5 spell differently."""
    older = tuple(path for path in paths if not path.startswith("rope_parameters.") and path != "dtype")
    return older or tuple(paths)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _read(given: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], list[str]]:
    """The fields that a settings file gives, and what is wrong with them."""
    found: dict[str, Any] = {}
    problems: list[str] = []
    for row in ROWS:
        names = row.arguments if source == "args" else row.members
        if row.field == "max_position_embeddings":
            # The second is the length of a run's sequences: the model's where nothing else is said.
            names = names[:1] if given.get(names[0]) is not None else names[1:]
        values = {name: _plain(given[name]) for name in names if given.get(name) is not None}
        faults = [fault for value in values.values() if (fault := _misfit(row, value))]
        if not faults and len({repr(value) for value in values.values()}) > 1:
            faults = [f"{row.field} is said twice and differently: {brief(values)}"]
        problems += faults
        for value in list(values.values())[:1]:
            found[row.field] = not value if row.negated and source == "args" else value
    return found, problems


def _misfit(row: Setting, value: Any) -> str | None:
    """What is wrong with the type of a value."""
    if row.default is REQUIRED or row.field in ("num_query_groups", "kv_channels"):
        wrong = not isinstance(value, int) or isinstance(value, bool) or value < 1
        return f"{row.field}={brief(value)}, expected a positive integer" if wrong else None
    if isinstance(row.default, bool):
        return None if isinstance(value, bool) else f"{row.field}={brief(value)}, expected true or false"
    if isinstance(row.default, (int, float)) or row.default is None:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fits else f"{row.field}={brief(value)}, expected a number"
    return None if isinstance(value, str) else f"{row.field}={brief(value)}, expected a name"


def _plain(value: Any) -> Any:
    """A value of a settings file as a ledger has it: `{_target_: torch.bfloat16, _call_: false}` is `bfloat16`."""
    if isinstance(value, Mapping) and isinstance(value.get("_target_"), str):
        value = value["_target_"]
    if isinstance(value, str):
        return NAMES.get(value, value.removeprefix("torch.nn.functional.").removeprefix("torch."))
    return value


def _settled(
    found: dict[str, Any],
    switches: Mapping[str, Any],
    ghosts: Any,
    where: str,
    problems: list[str],
    remarks: list[str],
) -> Settings:
    """The settings with what follows from others filled in, as Megatron does when a config is finalised."""
    said = frozenset(found)
    fields = {row.field: found.get(row.field, row.default) for row in ROWS}
    problems += [f"{name} is missing" for name, value in fields.items() if value is REQUIRED]
    if fields["rope_scaling"] and fields["rope_scaling_factor"] is None:
        problems.append("rope_scaling is on, and rope_scaling_factor is missing")
    if fields["bf16"] and fields["fp16"]:
        problems.append("bf16 and fp16 are both on")
    if problems:
        raise ConfigError(listing(f"{where}: settings that describe no model", problems))
    if fields["num_query_groups"] is None:
        fields["num_query_groups"] = fields["num_attention_heads"]
    if type(ghosts) is int and 0 < ghosts < fields["num_query_groups"]:
        per_group = fields["num_attention_heads"] // fields["num_query_groups"]
        fields["num_query_groups"] -= ghosts
        fields["num_attention_heads"] = fields["num_query_groups"] * per_group
    if fields["kv_channels"] is None:
        fields["kv_channels"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields["add_bias_linear"]:
        fields["add_qkv_bias"] = True
    if fields["gated_linear_unit"] and "activation_func" not in said:
        fields["activation_func"] = NOT_RECORDED
    for flag, dtype in HALF.items():
        if fields[flag]:
            fields["params_dtype"] = dtype
        fields[flag] = fields["params_dtype"] == dtype
    on = {
        name: value
        for name, value in switches.items()
        if value is not None and value is not False and value != SWITCHES.get(name)
    }
    off = {name: value for name, value in switches.items() if value is False and SWITCHES.get(name) is True}
    return Settings(fields=fields | on | off, where=where, said=said, remarks=tuple(remarks))
