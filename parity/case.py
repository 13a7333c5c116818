"""The cases that a run consists of: every combination that was asked for, less those that cannot exist."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.errors import TopologyError
from converters.topology import Topology
from parity.backends import BACKENDS, below_bf16, whole
from parity.options import Options

if TYPE_CHECKING:
    from parity.subjects import Size, Weights


class ConfigOf(Protocol):
    """What tells the HF config of a model before any weight is read; `parity.subjects.config_of` is one."""

    def __call__(self, model: str, *, revision: str | None, size: Size, layers: int | None) -> Mapping[str, Any]:
        """The config, with `size` and `layers` applied."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one layout, precision and backend: what a check is given.

    Args:
        model: As it was given to `--model`.
        slug: The model's part of the id; cases that agree in it share one subject.
        topology: The parallel layout, with its layers placed.
        precision: A name of `parity.backends.PRECISIONS`.
        backend: What the model is compared with.
        device: `auto`, `cpu` or `cuda`.
        revision: Commit, tag or branch on the hub.
        weights: `checkpoint` or `seeded`.
        size: `full`, `tiny` or, for quantised matrix products, `tiny-aligned`.
        layers: Number of first layers kept, or `None` for all.
        trust_remote_code: Whether code that comes with the model may run.
        rank_timeout: Seconds that ranks may take over one check.
        ghost_groups: Key-value groups of zeros that it takes for heads to divide over tp.
        converter: The converter under test, by name (see `parity.converter`).
        max_floors: Noise floors that a measurement may be away from its reference.
        against: Another checkpoint, which is held against the model instead of a converted one.
    """

    model: str
    slug: str
    topology: Topology
    precision: str = "fp32"
    backend: str = "megatron"
    device: str = "auto"
    revision: str | None = None
    weights: Weights = "checkpoint"
    size: Size = "full"
    layers: int | None = None
    trust_remote_code: bool = False
    rank_timeout: float = 300.0
    ghost_groups: int = 0
    converter: str = "llama-parity"
    max_floors: float = 10.0
    against: str | None = None

    @property
    def id(self) -> str:
        """For example `llama-3.2-1b-tiny-tp2-pp1-fp32-megatron`; parts at their default stay out, but for tp and pp."""
        return "-".join([self.slug, self.topology_id, self.precision, self.backend])

    @property
    def topology_id(self) -> str:
        """The layout's part of the id: cases that agree in it share an xdist worker."""
        counted = [name for name, on in self._counted if on]
        return "-".join([str(self.topology), *(f"count-{name}" for name in counted)])

    @property
    def note(self) -> str:
        """What was chosen for this case rather than asked for, as a clause, or an empty string."""
        chosen = []
        counted = [f"the {name}" for name, on in self._counted if on]
        if counted:
            each = "counts as a layer" if len(counted) == 1 else "count as a layer each"
            chosen.append(f"layers do not divide evenly, so {' and '.join(counted)} {each}")
        if self.ghost_groups:
            added = (
                "a key-value group of zeros is"
                if self.ghost_groups == 1
                else f"{self.ghost_groups} key-value groups of zeros are"
            )
            chosen.append(f"heads do not divide over tp, so {added} added (exact)")
        return "; ".join(chosen)

    @property
    def _counted(self) -> tuple[tuple[str, bool], ...]:
        return (("embedding", self.topology.count_embedding), ("loss", self.topology.count_loss))


def matrix(options: Options, config_of: ConfigOf) -> tuple[list[Case], list[tuple[str, str]]]:
    """Every combination that `options` ask for, and those left out as `(id, reason)`.

    Raises:
        ConversionError: A model that cannot be found (from `config_of`), or a config without the fields that decide.
    """
    cases: list[Case] = []
    left_out: list[tuple[str, str]] = []
    for model, slug in slugs(options).items():
        configs: dict[Size, Mapping[str, Any]] = {}
        sizes = (options.tp, options.pp, options.vpp, options.cp, options.dp, options.sp)
        backends = options.backend
        if options.against is not None:  # two checkpoints are compared as they are: layouts and backends play no part
            sizes, backends = ((1,),) * 5 + ((False,),), ("against",)
        for (tp, pp, vpp, cp, dp, sp), precision, backend in itertools.product(
            itertools.product(*sizes), options.precision, backends
        ):
            size: Size = "tiny-aligned" if options.size == "tiny" and below_bf16(precision) else options.size
            if size not in configs:
                configs[size] = config_of(model, revision=options.revision, size=size, layers=options.layers)
            config = configs[size]
            shared: dict[str, Any] = {
                "model": model,
                "slug": slug + "-aligned" * (size == "tiny-aligned"),
                "precision": precision,
                "backend": backend,
                "device": options.device,
                "revision": options.revision,
                "weights": options.weights,
                "size": size,
                "layers": options.layers,
                "trust_remote_code": options.trust_remote_code,
                "rank_timeout": options.rank_timeout,
                "converter": options.converter,
                "max_floors": options.max_floors,
                "against": options.against,
            }
            reasons: list[str] = []
            try:
                topology = Topology(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, sp=sp)
            except TopologyError as error:
                mesh = (
                    f"tp{tp}-pp{pp}"
                    + f"-vpp{vpp}" * (vpp > 1)
                    + f"-cp{cp}" * (cp > 1)
                    + f"-dp{dp}" * (dp > 1)
                    + "-sp" * sp
                )
                left_out.append(("-".join([shared["slug"], mesh, precision, backend]), str(error)))
                continue
            try:
                topology = topology.evenly(whole(config, "num_hidden_layers"))
            except TopologyError as error:
                reasons.append(str(error))
            side = BACKENDS.get(backend, BACKENDS["megatron"])
            reasons += side.refusals(config, topology, precision)
            case = Case(topology=topology, ghost_groups=side.ghosts(config, topology), **shared)
            if reasons:
                left_out.append((case.id, "; ".join(reasons)))
            else:
                cases.append(case)
    return cases, left_out


def slugs(options: Options) -> dict[str, str]:
    """The id part of each model: what its subject is called, after the folder or owner where two would be alike."""
    from parity.subjects import slug_of

    short = {
        model: slug_of(model, weights=options.weights, size=options.size, layers=options.layers)
        for model in options.models
    }
    alike = [slug for slug in short.values() if list(short.values()).count(slug) > 1]
    return {model: f"{_owner(model)}-{slug}" if slug in alike else slug for model, slug in short.items()}


def _owner(model: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", str(Path(model).parent).lower()).strip("-.")
