"""From metadata alone: the plan of the weights and the ledger of the config."""

from __future__ import annotations

import math
from collections.abc import Iterator

from converters.models import family_of
from parity.checks.bench import Bench
from parity.findings import Finding, Measurement
from parity.seeded import key_table


def plan(bench: Bench) -> Iterator[Finding]:
    """Every element of every rank is written once, every element of the checkpoint read once; and back."""
    config, topology = bench.subject.config, bench.case.topology
    family = family_of(config)
    hf, _ = family.fields.read(config)
    per_group = hf["num_attention_heads"] // hf["num_key_value_heads"]
    found = family.plan(
        "hf",
        "megatron",
        config,
        padded_vocab_size=math.ceil(config["vocab_size"] / topology.tp) * topology.tp,
        padded_query_groups=topology.query_groups(hf["num_key_value_heads"], per_group),
    )
    stated = key_table(config)  # what a Llama consists of, said without the table
    names = sorted(set(stated) | set(found.source_tensors))
    astray = [
        f"{key}: the model has {stated.get(key, 'no such tensor')}, the table {found.source_tensors.get(key, 'none')}"
        for key in names
        if stated.get(key) != found.source_tensors.get(key)
    ]
    yield Measurement.proved("plan, coverage", count=len(names), unit="tensors", unproved=astray)
    for check, proof in (
        ("plan, import", found.prove(target=topology)),
        ("plan, export", found.inverse().prove(source=topology)),
    ):
        yield Measurement.proved(check, count=proof.elements, unit="elements", unproved=proof.faults)


def config(bench: Bench) -> Iterator[Finding]:
    """Every config field has a row, and what Megatron is told says the same when it is told back."""
    fields = family_of(bench.subject.config).fields
    there = fields.to_megatron(bench.subject.config)
    back = fields.to_hf(there.megatron, {})
    changed = [
        f"{name}: {value!r} became {back.hf.get(name)!r}"
        for name, value in there.hf.items()
        if back.hf.get(name) != value
    ]
    yield Measurement.proved("config ledger", count=len(there.entries), unit="entries", unproved=changed)
