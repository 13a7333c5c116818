"""The models that the self-test injects faults into: small, unlike each other, with no coincidence but those wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from converters.errors import TopologyError
from converters.sources import read_config
from converters.topology import Topology
from parity.backends import BACKENDS, QUANTISED
from parity.seeded import write_checkpoint
from parity.subjects import Subject, config_of, slug_of, subject
from parity.tiny import Axes, shrink, with_layers

LAYERS = 4
QUANTISABLE = Axes(layers=2, groups=2, heads_per_group=3, hidden=288, ffn=448)
"""Over tp 2, every size of a linear layer is a multiple of 32, and several blocks of 128 lie along most."""
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A model in one layout: where a fault is tried.

    Args:
        model: A name of `configs`.
        topology: The layout.
        backend: What it runs on.
        precision: Of weights and activations, or of matrix products.
    """

    model: str
    topology: Topology
    backend: str = "megatron"
    precision: str = "fp32"

    def __str__(self) -> str:
        unusual = [name for name, usual in ((self.precision, "fp32"), (self.backend, "megatron")) if name != usual]
        return "-".join([self.model, str(self.topology), *unusual])


TP2, PP2, CP2 = Topology(tp=2), Topology(pp=2), Topology(cp=2)
BEDS: tuple[Bed, ...] = (
    Bed(model="tied", topology=TP2),
    Bed(model="biased", topology=TP2),
    Bed(model="square", topology=TP2),
    Bed(model="tied", topology=PP2),
    Bed(model="tied", topology=Topology(pp=2, vpp=2)),
    Bed(model="tied", topology=CP2),
    Bed(model="half", topology=TP2, precision="bf16"),
    Bed(model="tied", topology=TP2, backend="te"),
    Bed(model="biased", topology=TP2, backend="te"),
    Bed(model="ghosts", topology=TP2, backend="te"),
    Bed(model="tied", topology=CP2, backend="te"),
    Bed(model="tied", topology=Topology(tp=2, sp=True), backend="te"),
    *(Bed(model="aligned", topology=TP2, backend="te", precision=precision) for precision in QUANTISED),
)
"""In order of preference: a fault is tried on the first where it shows."""
ANYWHERE = ("tied", "biased", "square", "half")
"""The models of clean runs in further layouts."""
LAYOUTS = (
    Topology(tp=2, sp=True),
    Topology(dp=2),
    Topology(tp=2, pp=2),
    Topology(tp=2, cp=2, sp=True),
    Topology(pp=2, cp=2),
    Topology(tp=2, dp=2),
    Topology(),
    Topology(tp=4, sp=True),
    Topology(pp=4),
    Topology(tp=2, pp=2, vpp=2, sp=True),
    Topology(cp=4),
    Topology(pp=2, dp=2),
    Topology(cp=2, dp=2),
)
"""For clean runs, besides those of `BEDS`: every kind of parallelism by itself and with each other, in four ranks."""


def configs() -> dict[str, dict[str, Any]]:
    """A config for each model of `BEDS`."""
    tied = with_layers(shrink(read_config("Llama-3.2-1B")), LAYERS)
    odd = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "initializer_range": 0.019,
        "attention_dropout": 0.0,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    biased = odd | {
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 203,
        "eos_token_id": [205, 207],
        "head_dim": 20,
        "hidden_size": 70,
        "intermediate_size": 94,
        "max_position_embeddings": 1499,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "rms_norm_eps": 7e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 3456.0,
            "factor": 13.0,
            "high_freq_factor": 5.5,
            "low_freq_factor": 1.375,
            "original_max_position_embeddings": 113,
        },
        "vocab_size": 211,
    }
    square = odd | {  # query and output matrices are square, which is what a transposition needs to be silent
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 195,
        "eos_token_id": 197,
        "hidden_size": 96,
        "intermediate_size": 116,
        "max_position_embeddings": 1201,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "rms_norm_eps": 4e-5,
        "rope_theta": 7777.0,
        "vocab_size": 199,
    }
    return {
        "tied": tied | {"torch_dtype": "float32"},
        "biased": biased,
        "square": square,
        "half": tied | {"torch_dtype": "bfloat16"},
        # groups that do not divide over tp
        "ghosts": odd | biased | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 78},
        "aligned": shrink(read_config("Llama-3.2-1B"), QUANTISABLE)
        | {
            "head_dim": 128,
            "torch_dtype": "bfloat16",
            "vocab_size": 351,  # of which each rank's part is a multiple of 8
        },
    }


@dataclass(frozen=True, kw_only=True)
class Stock:
    """The models and layouts of a self-test.

    Args:
        configs: By name of the model.
        beds: Where faults are tried, in order of preference.
        clean: Where nothing is wrong, in the order that it is tried.
        make: The model of a name, with seeded weights of a seed, in a folder that is given.
    """

    configs: Mapping[str, dict[str, Any]]
    beds: tuple[Bed, ...]
    clean: tuple[Bed, ...]
    make: Callable[[str, Path, int], Subject]


def packaged() -> Stock:
    """Tiny models on which every fault shows somewhere."""
    known = configs()
    # Layouts in turn, each with another model than the time before: their counts have no divisor in common.
    further = [
        Bed(model=name, topology=LAYOUTS[n % len(LAYOUTS)], precision=held(known[name]))
        for n in range(len(ANYWHERE) * len(LAYOUTS))
        for name in [ANYWHERE[n % len(ANYWHERE)]]
    ]
    # Every third on the other backend, where it can be.
    further = [
        there if n % 3 == 2 and fits(known[bed.model], there := replace(bed, backend="te")) else bed
        for n, bed in enumerate(further)
    ]
    clean = tuple(dict.fromkeys((*BEDS, *(bed for bed in further if fits(known[bed.model], bed)))))
    return Stock(
        configs=known,
        beds=BEDS,
        clean=clean,
        make=lambda name, folder, seed: made(name, known[name], folder, seed),
    )


def fits(config: Mapping[str, Any], bed: Bed) -> bool:
    """Whether a model can be cut over the layout of a bed, layers shared out as evenly as they can be."""
    try:
        bed.topology.evenly(config["num_hidden_layers"])
    except TopologyError:
        return False
    return not BACKENDS[bed.backend].refusals(config, bed.topology, bed.precision)


def held(config: Mapping[str, Any]) -> str:
    """The precision that a checkpoint is in: `bf16` or `fp32`."""
    return "bf16" if (config.get("torch_dtype") or config.get("dtype")) == "bfloat16" else "fp32"


def of_model(model: str, *, size: Literal["tiny", "full"]) -> Stock:
    """One model, in the layouts that it fits.

    Args:
        model: As for `--model`.
        size: `tiny`: its config made tiny, with seeded weights. `full`: as it is, with its own weights for each seed.

    Raises:
        ConversionError: No such model, or no layout of two ranks fits it.
    """
    config = config_of(model, size=size)
    if size == "tiny" and config["num_hidden_layers"] > LAYERS:
        config = with_layers(config, LAYERS)
    config = config | {"torch_dtype": "float32"} if size == "tiny" else config
    slug = slug_of(model, size=size)
    stated = [Bed(model=slug, topology=bed.topology, backend=bed.backend) for bed in BEDS if bed.model != "aligned"]
    further = [Bed(model=slug, topology=topology) for topology in LAYOUTS]
    every = [replace(bed, precision=held(config)) for bed in dict.fromkeys([*stated, *further])]
    clean = [bed for bed in every if fits(config, bed)]
    beds = [bed for bed in clean if bed.topology not in LAYOUTS or bed.backend != "megatron"]
    if not beds:
        raise TopologyError(f"{model} fits none of {', '.join(str(bed.topology) for bed in BEDS)}")

    def make(name: str, folder: Path, seed: int) -> Subject:
        return made(name, config, folder, seed) if size == "tiny" else subject(model)

    return Stock(configs={slug: config}, beds=tuple(beds), clean=tuple(clean), make=make)


def made(name: str, config: dict[str, Any], folder: Path, seed: int) -> Subject:
    """The model `name` with seeded weights, in `folder`."""
    dtype = config.get("torch_dtype", "float32")
    accompany(write_checkpoint(config, folder, seed=seed, dtype=dtype, shards=3))
    written = json.loads((folder / "config.json").read_text())
    return Subject(name=name, slug=f"{name}-{seed}", folder=folder, config=written, weights="seeded", origin="config")


def accompany(folder: Path) -> Path:
    """Put the files beside a checkpoint that a converter has to carry."""
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder
