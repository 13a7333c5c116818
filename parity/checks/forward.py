"""The imported model computes what transformers computes, on every token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.bounds import Distance, allowed, floor, largest, nearness, rms
from parity.case import Case
from parity.checks.bench import Bench
from parity.devices import device_of
from parity.findings import Finding, Measurement
from parity.probes import Probe, probe

if TYPE_CHECKING:
    from parity.measure import References


def asked(bench: Bench) -> tuple[Probe, References]:
    """The probe of this case's model, and what transformers says to it in the case's precision; asked once."""

    def ask() -> tuple[Probe, References]:
        subject = bench.subject
        found = probe(subject.config, subject.folder, prose=subject.weights != "seeded")
        return found, bench.alone("measure:references", subject.folder, found, bench.case.precision)

    found: tuple[Probe, References] = bench.shared.once(("asked", bench.case.slug, bench.case.precision), ask)
    return found


def logits_and_loss(bench: Bench) -> Iterator[Finding]:
    """Logits and loss of every token, within a bound measured in this run (see `parity.bounds`)."""
    case = bench.case
    probe, said = asked(bench)
    if not all(np.isfinite(one.logits).all() for one in (said.eager, *said.others)):
        yield Measurement.proved(
            "reference",
            count=1,
            unit="references",
            unproved=[
                f"transformers itself gives logits that are no numbers for {bench.subject.folder}: look for NaN and "
                "infinity in the checkpoint's tensors; nothing can be compared"
            ],
        )
        return
    found = bench.ranks("measure:forward", bench.converter, bench.subject.folder, bench.settings, probe)
    (actual,) = [one for one in found if one is not None]
    for check, of in (("logits", attrgetter("logits")), ("loss", attrgetter("loss"))):
        exact = of(said.eager)
        if case.precision == "fp32":
            spread = floor([exact, *(of(other) for other in said.others)])
            bound = allowed(spread, float(np.abs(exact).max()), case.max_floors)
            distance = largest(of(actual), exact)
            unit, detail = "max |Δ|", f"floor {spread:.2e}: transformers against itself, evaluated otherwise"
        else:
            near = max(rms(of(one), of(said.oracle)).value for one in (said.eager, *said.others))
            bound = nearness(near, case.topology.tp, case.max_floors)
            distance = rms(of(actual), of(said.oracle))
            unit, detail = "rms from fp32", f"transformers' own distance from its float32 oracle: {near:.2e}"
        yield Measurement.within(
            check,
            measured=distance.value,
            bound=bound,
            unit=unit,
            where=_place(distance),
            detail=f"{detail}\nprobe: {probe.name}\nweights alone are checked bit for bit by 'import, coded': if that "
            "passes, look at the config ledger (rope, eps, head_dim, activation) before the tensors",
        )
    if exactly(case, bench.subject.config):
        differing = int((actual.logits != said.eager.logits).sum())
        names = [f"{differing:,} logits"] if differing else []
        yield Measurement.equal("logits, to the bit", count=actual.logits.size, unit="logits", differing=names)


def exactly(case: Case, config: Mapping[str, Any]) -> bool:
    """Whether Megatron's own layers run the very operations of transformers' eager attention, in the same order.

    The two scale attention scores at different places, which rounds alike only where the scale, one over the root of
    head_dim, is a power of two. And the two hold tokens in another order, which a matrix product sees where its sizes
    leave a remainder for a kernel of 16 lanes.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if any(size % 16 for size in (config["hidden_size"], config["intermediate_size"], heads * head_dim)):
        return False
    one = case.topology.tp == case.topology.cp == case.topology.vpp == 1
    return one and case.precision == "fp32" and device_of(case) == "cpu" and math.log2(head_dim) % 2 == 0


def _place(distance: Distance) -> str:
    names = ("sequence", "token", "vocabulary row")
    return ", ".join(f"{name} {at}" for name, at in zip(names, distance.where, strict=False))
