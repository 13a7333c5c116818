"""Below bfloat16: matrix products as the recipe says, the state of its scales, and checkpoints in FP8."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from parity.backends import below_bf16
from parity.causes import Cause
from parity.checks.bench import Bench, NotApplicable, measures
from parity.converter import without_fp8
from parity.findings import Finding, Measurement
from parity.probes import probes
from parity.rank_failure import RankFailure

if TYPE_CHECKING:
    from parity.observation.fp8_folders import Checked
    from parity.observation.te.products import Product

LAYERS = 2
"""Of a checkpoint, how many are written in FP8: the rest are written by the same code."""


@measures("products")
def products(bench: Bench) -> Iterator[Finding]:
    """Quantised products, forward and backward, beside a second statement of the recipe, but for one rounding.

    Raises:
        NotApplicable: Products are not quantised.
    """
    case = bench.case
    if not below_bf16(case.precision):
        raise NotApplicable(f"products are not quantised in {case.precision}")
    vocab_size = bench.subject.config["vocab_size"]
    ranks: list[list[Product]] = bench.ranks(
        "observation.te.products:compared", bench.converter, bench.subject.folder, bench.settings, vocab_size
    )
    found = [one for rank in ranks for one in rank]
    for name in dict.fromkeys(one.name for one in found):
        mine = [one for one in found if one.name == name]
        nothing = [one for one in mine if one.size == 0]
        worst = max(mine, key=lambda one: one.off / one.bound if one.off == one.off else float("inf"))
        over = [one for one in mine if one.over and one.size != 0]
        part = name.partition(",")[0]
        if over and name == "forward" and all(one.plain <= one.bound for one in over):
            part = "off"
        yield Measurement.within(
            f"products, {name}",
            measured=float("inf") if nothing else worst.off,
            bound=worst.bound,
            unit="of what chance makes of it" if worst.drawn else "of the product's rms",
            where=(nothing or [worst])[0].where,
            detail="\n".join(
                [f"{one.where}: measures nothing: the stated product is zero" for one in nothing[:6]]
                + [f"{one.where}: {one.off:.2e}; from the plain product {one.plain:.2e}" for one in over[:6]]
            ),
            causes=[Cause(kind="quantisation", what=(part,))] if over else [],
        )


@measures("fp8 state")
def state(bench: Bench) -> Iterator[Finding]:
    """Scales and histories of delayed scaling, saved and loaded: the same logits; a state of other weights is refused.

    Raises:
        NotApplicable: The recipe keeps no state.
    """
    if bench.case.precision != "fp8-delayed":
        raise NotApplicable(f"{bench.case.precision} keeps no state between steps")
    subject = bench.subject
    probe = probes(subject.config, subject.folder, prose=subject.weights != "seeded")[0]
    ranks = bench.ranks("observation.te.state:reloaded", bench.converter, subject.folder, bench.settings, probe)
    differing = [f"rank {rank}: {line}" for rank, lines in enumerate(ranks) for line in lines]
    yield Measurement.equal(
        "fp8 state",
        count=bench.case.topology.world_size,
        unit="ranks' states",
        differing=differing,
        causes=[Cause(kind="quantisation", what=("state",))] if differing else [],
    )


@measures("checkpoints, fp8")
def checkpoints(bench: Bench) -> Iterator[Finding]:
    """The first layers written in each FP8 format: what codes and scales stand for, by the format's definition.

    Raises:
        NotApplicable: The converter writes none.
    """
    if reason := without_fp8(bench.converter):
        raise NotApplicable(reason)

    def ask() -> Checked | RankFailure:
        with bench.scratch() as scratch:
            given = (bench.converter, bench.subject.folder, Path(scratch), LAYERS)
            try:
                made: Checked = bench.alone("observation.fp8_folders:checked", *given)
            except RankFailure as failure:
                return failure
            return made

    # Layouts and precisions play no part.
    key = ("fp8", bench.subject.slug, pickle.dumps(bench.converter))
    found: Checked | RankFailure = bench.shared.once(key, ask)
    if isinstance(found, RankFailure):
        raise found
    wrong = [f"{scheme}: {line}" for scheme, lines in found.lines.items() for line in lines]
    kinds = dict.fromkeys("scales" if "scale" in line or "stands for" in line else "tensors" for line in wrong)
    yield Measurement.equal(
        f"checkpoints, fp8, first {LAYERS} layers",
        count=found.count,
        unit="tensors",
        differing=wrong,
        causes=[Cause(kind="quantisation", what=(kind,)) for kind in kinds],
    )
