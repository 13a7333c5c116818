"""From metadata alone: the plan of the weights and the ledger of the config."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from converters.dialect import Dialect
from converters.models import family_of
from parity.backends import BACKENDS
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
        bench.case.backend,
        config,
        padded_vocab_size=math.ceil(config["vocab_size"] / topology.tp) * topology.tp,
        padded_query_groups=BACKENDS[bench.case.backend].groups(topology, hf["num_key_value_heads"], per_group),
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
    """Every config field has a row, and what the backend is told says the same when it is told back."""
    dialect = family_of(bench.subject.config).dialect(bench.case.backend)
    if dialect is not None:
        yield _dialect(bench, dialect)
        return
    fields = family_of(bench.subject.config).fields
    there = fields.to_megatron(bench.subject.config)
    back = fields.to_hf(there.megatron, {})
    changed = [
        f"{name}: {value!r} became {back.hf.get(name)!r}"
        for name, value in there.hf.items()
        if back.hf.get(name) != value
    ]
    yield Measurement.proved("config ledger", count=len(there.entries), unit="entries", unproved=changed)


def _dialect(bench: Bench, dialect: Dialect) -> Measurement:
    """The text of a config under another class name: what is added is the dialect's own, and the way back is exact."""
    text = (bench.subject.folder / "config.json").read_text(encoding="utf-8")
    there = dialect.from_hf(text)
    before, after = json.loads(text), json.loads(there)
    own = {"model_type", "architectures", *(option.name for option in dialect.options)}
    changed = [
        f"{name}: {before.get(name)!r} became {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if name not in own and before.get(name) != after.get(name)
    ]
    changed += [] if dialect.speaks(after) else ["the config made is not of the dialect, by its own reading"]
    changed += [] if dialect.to_hf(there) == text else ["config.json there and back is not the same text"]
    return Measurement.proved("config ledger", count=len(after), unit="entries", unproved=changed)
