"""What the self-test found: as a table of faults by checks, and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parity.causes import Cause
from parity.faults.catalogue import NOT_YET, Fault
from parity.selftest import run as selftest
from parity.selftest.run import KILLS, Outcome, selected

if TYPE_CHECKING:
    from parity.selftest.models import Stock

SCHEMA = "llama-parity/self-test/1"
LEGEND = (
    "i, e, c: caught where the fault is in the import, the export, or in both such that they cancel; upper case: the "
    "conversion itself refused or broke; in brackets: in some of the variants only; · looked at and passed"
)
Result = dict[str, Any]


def result(outcomes: Sequence[Outcome], names: str, stock: Stock, *, converter: str, seconds: float) -> Result:
    """Everything that was found, JSON-able; see `SCHEMA`."""
    faulty = [one for one in outcomes if one.variant.fault is not None]
    real = [one for one in faulty if not one.variant.fault.equivalent]  # type: ignore[union-attr]  # it has a fault
    clean = [one for one in outcomes if one.variant.fault is None]
    equivalent = [one for one in faulty if one not in real]
    tried = [one for one in real if one.applicable]
    survivors = [one for one in tried if not one.killed or one.missed]
    alarms = [one for one in (*clean, *equivalent) if one.killed]
    broken = [one for one in outcomes if "broken" in one.verdicts.values()]  # a clean run no less than a faulty one
    judged = [one.named for one in tried if one.named is not None]
    faults = {one.variant.fault.name for one in tried}  # type: ignore[union-attr]
    homeless = [fault for fault in selected(names) if fault.name not in {one.variant.fault.name for one in faulty}]  # type: ignore[union-attr]
    summary = {
        "passed": not survivors and not alarms and not broken and bool(tried or clean),
        "faults": len(faults),
        "variants": len(tried),
        "caught": len(tried) - len(survivors),
        "only_refused": sum(one.killed and "caught" not in one.verdicts.values() for one in tried),
        "survivors": len(survivors),
        "clean_runs": len(clean),
        "false_alarms": len(alarms),
        "broken": len(broken),
        "equivalent": len(equivalent),
        "not_applicable": len(NOT_YET) + len(homeless),
        "diagnosed": len(judged),
        "diagnosed_rightly": sum(map(bool, judged)),
        "seconds": round(seconds, 1),
    }
    return {
        "schema": SCHEMA,
        "summary": summary,
        "converter": converter,
        "checks": [check.name for check in selftest.CHECKS],
        "faults": [_fault(fault) for fault in selected(names)],
        "variants": [_variant(one) for one in outcomes],
        "not_applicable": [{"name": name, "reason": reason} for name, reason in NOT_YET]
        + [{"name": fault.name, "reason": f"needs {_needs(fault)}"} for fault in homeless],
        "beds": [str(bed) for bed in stock.beds],
        "versions": {name: _version(name) for name in ("llama-parity", "torch", "transformers", "megatron-core")}
        | {"python": platform.python_version()},
    }


def _needs(fault: Fault) -> str:
    """What a bed has to be and have."""
    backends, precisions = " or ".join(fault.backends), " or ".join(fault.precisions)
    return ", ".join([*fault.needs, f"backend {backends}", *([f"precision {precisions}"] if precisions else [])])


def _fault(fault: Fault) -> dict[str, Any]:
    return {
        "name": fault.name,
        "family": fault.family,
        "source": fault.source,
        "at": list(fault.at),
        "needs": list(fault.needs),
        "backends": list(fault.backends),
        "precisions": list(fault.precisions),
        "causes": [asdict(cause) for cause in fault.causes],
        "equivalent": fault.equivalent,
    }


def _variant(one: Outcome) -> dict[str, Any]:
    variant = one.variant
    return {
        "fault": None if variant.fault is None else variant.fault.name,
        "at": None if variant.fault is None else variant.at,
        "layers": list(variant.layers),
        "bed": str(variant.bed),
        "seed": variant.seed,
        "verdicts": dict(one.verdicts),
        "killed": one.killed,
        "causes": {check: causes[:2] for check, causes in one.causes.items() if causes},
        "named": one.named,
        "said": {check: text for check, text in one.said.items() if text},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write(path: Path, found: Result) -> None:
    """Write the result.

    Raises:
        OSError: It cannot be written.
    """
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def show(console: Console, outcomes: Sequence[Outcome], found: Result) -> None:
    """Print the matrix, what survived, false alarms, and the score."""
    by_fault: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.variant.fault is not None:
            by_fault.setdefault(one.variant.fault.name, []).append(one)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("fault", overflow="fold", min_width=36)
    had_a_say = {name for one in outcomes for name, verdict in one.verdicts.items() if verdict != "not applicable"}
    used = [check.name for check in selftest.CHECKS if check.name in had_a_say]
    for name in used:
        table.add_column(name)
    family = ""
    for fault, group in by_fault.items():
        if group[0].variant.fault.family != family:  # type: ignore[union-attr]  # it has a fault
            family = group[0].variant.fault.family  # type: ignore[union-attr]
            table.add_row(f"[bold]{family}[/bold]")
        survives = any(one.applicable and not one.killed for one in group) and not group[0].variant.fault.equivalent  # type: ignore[union-attr]
        table.add_row(fault, *(_cell(group, name) for name in used), style="red" if survives else "")
    if by_fault:
        console.print(table)
        console.print(LEGEND, style="dim", markup=False)
    for name, reason in ((one["name"], one["reason"]) for one in found["not_applicable"]):
        console.print(f"not applicable: {name}: {reason}", style="dim", markup=False)
    for one in outcomes:
        fault_of = one.variant.fault
        if (fault_of is None or fault_of.equivalent) and one.killed:
            console.print(f"false alarm: {one.variant.id}", style="red", markup=False)
            for check, text in one.said.items():
                if one.verdicts[check] in KILLS:
                    console.print(f"  {check}: {text}", markup=False)
        elif fault_of is not None and fault_of.equivalent:
            console.print(
                f"equivalent: {one.variant.id} passes, as it should: {fault_of.equivalent}", style="dim", markup=False
            )
        elif "broken" in one.verdicts.values():
            console.print(
                f"broken: {one.variant.id}: {'; '.join(filter(None, one.said.values()))}", style="red", markup=False
            )
        elif not one.applicable:
            reasons = "; ".join(dict.fromkeys(text for text in one.said.values() if text))
            console.print(f"not applicable: {one.variant.id}: {reasons}", style="dim", markup=False)
        elif fault_of is not None and one.missed:
            missed = " and ".join(one.missed)
            console.print(f"survives: {one.variant.id} ({missed} had to see it and passed)", style="red", markup=False)
        elif fault_of is not None and not one.killed:
            verdicts = ", ".join(f"{check} {verdict}" for check, verdict in one.verdicts.items())
            console.print(f"survives: {one.variant.id} ({verdicts})", style="red", markup=False)
    summary = found["summary"]
    console.print(
        f"{summary['faults']} faults, {summary['variants']} variants: {summary['caught']} caught "
        f"({summary['only_refused']} of them by the converter's own refusal alone), "
        f"{summary['survivors']} survive; {summary['clean_runs']} clean runs, {summary['false_alarms']} false alarms; "
        f"{summary['not_applicable']} faults not applicable; {summary['seconds']:.0f} s",
        style="bold green" if summary["passed"] else "bold red",
    )
    if summary["diagnosed"]:
        rightly, of = summary["diagnosed_rightly"], summary["diagnosed"]
        console.print(f"diagnosis: {rightly} of {of} variants named rightly ({rightly / of:.1%})")
        wrongly = [one for one in outcomes if one.named is False]
        for one in wrongly:
            said = dict.fromkeys(str(Cause.from_json(cause)) for causes in one.causes.values() for cause in causes[:2])
            console.print(f"named otherwise: {one.variant.id}: {'; '.join(said)}", style="dim", markup=False)


def _cell(group: Sequence[Outcome], check: str) -> str:
    shown = []
    for at in ("import", "export", "cancel"):
        verdicts = [one.verdicts[check] for one in group if one.variant.at == at and check in one.verdicts]
        verdicts = [verdict for verdict in verdicts if verdict != "not applicable"]
        killed = [verdict for verdict in verdicts if verdict in KILLS]
        if not verdicts:
            continue
        letter = at[0] if all(verdict == "caught" for verdict in killed) else at[0].upper()
        shown.append("·" if not killed else letter if len(killed) == len(verdicts) else f"({letter})")
    return " ".join(shown)
