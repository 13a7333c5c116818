"""What leaves each block of the imported model is what leaves it in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from parity.checks.bench import Bench
from parity.findings import Finding, Lines, Measurement
from parity.observation.activations import LOGITS, Reach, Yardstick, merged, reached
from parity.probes import probes


def every_block(bench: Bench) -> Iterator[Finding]:
    """The embedding, each block and the final norm, within bounds measured in this run; and the error by layer."""
    case, subject = bench.case, bench.subject

    def ask() -> Mapping[str, Yardstick]:
        found: Mapping[str, Yardstick] = bench.alone(
            "observation.taps:reference", subject.folder, probe, case.precision
        )
        return found

    probe = probes(subject.config, subject.folder, prose=subject.weights != "seeded")[0]
    sticks = bench.shared.once(("blocks", case.slug, case.precision), ask)
    ranks = bench.ranks("observation.taps:of_blocks", bench.converter, subject.folder, bench.settings, probe)
    actual = merged(ranks)
    found = reached(sticks, actual, precision=case.precision, tp=case.topology.tp, floors=case.max_floors)
    missing = [name for name in sticks if name != LOGITS and name not in actual]
    if missing:
        yield Measurement.equal("activations", count=len(sticks), unit="blocks", differing=missing)
    if not found:
        return
    worst = max(found, key=lambda reach: reach.share)
    yield Measurement.within(
        "activations, every block",
        measured=worst.share,
        bound=1,
        unit="of the bound, at the worst block",
        where=f"{worst.tap}, {worst.place}",
        detail="\n".join([_line(reach) for reach in found if not reach.within][:3] or [_line(worst)])
        + f"\nprobe: {probe.about or probe.name}",
    )
    yield Lines(
        title="error by layer",
        x="layer",
        y="max |Δ|" if case.precision == "fp32" else "rms from fp32 in a token's own size, of all or of the worst",
        curves={
            "measured": [reach.measured for reach in found],
            "floor": [reach.floor for reach in found],
            "bound": [reach.bound for reach in found],
        },
        ticks=[reach.tap.removeprefix("layers.") for reach in found],
    )


def _line(reach: Reach) -> str:
    return f"{reach.tap}: {reach.measured:.2e} at {reach.place}, floor {reach.floor:.2e}, allowed {reach.bound:.2e}"
