"""Which model a Megatron checkpoint holds: by the config that it carries, by a model given, or by its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import settings as megatron_settings
from converters.files.megatron_folder import MegatronFolder
from converters.models import require_hf
from converters.sources import Source, config_text
from converters.tensors import TensorInfo

CONFIG = "config.json"


class UnknownModel(CheckpointError):
    """A checkpoint that does not say which model it holds."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The Hugging Face model that a Megatron checkpoint holds.

    Attributes:
        source: The checkpoint, with the model's config.
        text: Of that `config.json`.
        artefacts: The folder of its other files; `None` where nothing is known of any.
        remarks: Where config and settings differ in what does not change the model, and what is known of neither.
    """

    source: Source
    text: str
    artefacts: Path | None
    remarks: tuple[str, ...]


def model_of(folder: MegatronFolder, name: str, like: Source | None) -> Model:
    """The model in a Megatron checkpoint.

    Args:
        folder: The checkpoint.
        name: What it was asked for as.
        like: The Hugging Face model that it is said to be of; it comes before what the checkpoint carries.

    Raises:
        ConfigError: A config that is not that of the model in the checkpoint, or settings that no model has.
        SourceError: A config that is none.
        UnknownModel: It says nothing of its model, and nobody else does.
    """
    artefacts = folder.hf_folder if like is None else like.folder
    settings = folder.settings
    if like is not None:
        require_hf(like.config)
        text = config_text(like.folder / CONFIG)[0] if like.folder else json.dumps(like.config, indent=2) + "\n"
        config, where = like.config, f"{like.name}'s config.json"
    elif artefacts is not None and (artefacts / CONFIG).is_file():
        where = str(artefacts / CONFIG)
        text, config = config_text(artefacts / CONFIG)
    elif settings is None:
        raise UnknownModel(
            f"{folder.root}: neither settings nor a config of the model are in the checkpoint; give the model that it "
            "is of: --like HF_DIR (in Python like=...)"
        )
    else:
        _, config = megatron_settings.hf_config(settings)
        text, where = json.dumps(config, indent=2) + "\n", ""
    remarks = list(settings.remarks) if settings is not None else []
    if settings is not None and where:
        remarks += megatron_settings.differences(config, settings, where)
    source = Source(name=name, folder=folder.root, config=dict(config), origin="folder")
    return Model(source=source, text=text, artefacts=artefacts, remarks=tuple(remarks))


def padding(tensors: Mapping[str, TensorInfo], hf: Mapping[str, Any]) -> dict[str, int]:
    """The padded sizes of a checkpoint, from the shapes of its tensors; those that are not padded are left out.

    Args:
        tensors: Whole ones.
        hf: The model's fields.
    """
    found = {}
    rows = _rows(tensors, "word_embeddings.weight")
    if rows is not None and rows > hf["vocab_size"]:
        found["padded_vocab_size"] = rows
    groups = hf["num_key_value_heads"]
    each = (hf["num_attention_heads"] // groups + 2) * hf["head_dim"]
    rows = _rows(tensors, "self_attention.linear_qkv.weight")
    if rows is not None and rows % each == 0 and rows // each > groups:
        found["padded_query_groups"] = rows // each
    return found


def _rows(tensors: Mapping[str, TensorInfo], name: str) -> int | None:
    shape = next((info.shape for key, info in tensors.items() if key.endswith(name)), ())
    return shape[-2] if len(shape) >= 2 else None
