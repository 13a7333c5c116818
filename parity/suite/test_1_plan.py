"""From metadata alone: the plan of the weights and the ledger of the config."""

from __future__ import annotations

import math

from converters.models import family_of
from converters.topology import Topology
from parity.case import Case
from parity.record import Record
from parity.seeded import key_table
from parity.subjects import Subject


def _padded(vocab: int, topology: Topology) -> int:
    return math.ceil(vocab / topology.tp) * topology.tp


def test_plan(case: Case, subject: Subject, record: Record) -> None:
    """Every element of every rank is written once, every element of the checkpoint read once; and back."""
    family = family_of(subject.config)
    vocab = _padded(subject.config["vocab_size"], case.topology)
    hf, _ = family.fields.read(subject.config)
    per_group = hf["num_attention_heads"] // hf["num_key_value_heads"]
    groups = case.topology.query_groups(hf["num_key_value_heads"], per_group)
    plan = family.plan("hf", "megatron", subject.config, padded_vocab_size=vocab, padded_query_groups=groups)
    stated = key_table(subject.config)  # what a Llama consists of, said without the table
    names = sorted(set(stated) | set(plan.source_tensors))
    astray = [
        f"{key}: the model has {stated.get(key, 'no such tensor')}, the table {plan.source_tensors.get(key, 'none')}"
        for key in names
        if stated.get(key) != plan.source_tensors.get(key)
    ]
    record.proved("plan, coverage", count=len(names), unit="tensors", unproved=astray)
    for check, proof in (
        ("plan, import", plan.prove(target=case.topology)),
        ("plan, export", plan.inverse().prove(source=case.topology)),
    ):
        record.proved(check, count=proof.elements, unit="elements", unproved=proof.faults)


def test_config(case: Case, subject: Subject, record: Record) -> None:
    """Every config field has a row, and what Megatron is told says the same when it is told back."""
    fields = family_of(subject.config).fields
    there = fields.to_megatron(subject.config)
    back = fields.to_hf(there.megatron, {})
    changed = [
        f"{name}: {value!r} became {back.hf.get(name)!r}"
        for name, value in there.hf.items()
        if back.hf.get(name) != value
    ]
    record.proved("config ledger", count=len(there.entries), unit="entries", unproved=changed)
