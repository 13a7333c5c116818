"""Weights, in real ranks, bit for bit: each direction by itself, then there and back; and the config in the model."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import ConfigError
from converters.topology import Mesh
from parity.backends import BACKENDS
from parity.causes import Cause
from parity.checks.bench import Bench, measures
from parity.diagnosis.verdicts import merged
from parity.findings import Finding, Measurement
from parity.rank_failure import RankFailure
from parity.seeded import key_table
from parity.shards import read_entries
from parity.statement import ledgers
from parity.statement.config import disagreements

if TYPE_CHECKING:
    from parity.folders import Found
    from parity.observation.weights import Imported


@measures("import, coded")
def imported(bench: Bench) -> Iterator[Finding]:
    """Each rank holds what an independent statement of the backend's layout says, element by element."""
    ranks = _import(bench)
    differing = [line for rank in ranks for line in rank.found.differing]
    traces = [trace for rank in ranks for trace in rank.traces]
    causes = [cause for rank in ranks for cause in rank.found.causes]
    causes = list(dict.fromkeys([*causes, *merged(traces, key_table(bench.subject.config))]))
    count = sum(rank.found.count for rank in ranks)
    yield Measurement.equal("import, coded", count=count, unit="parameters", differing=differing, causes=causes)
    yield from _picture(*(rank.found for rank in ranks))


@measures("config, in the model")
def config_in_the_model(bench: Bench) -> Iterator[Finding]:
    """The built model computes with what its config demands, by transformers' own reading of it: eps, rope, sizes."""
    folder = bench.subject.folder
    wanted = bench.shared.once(("demanded", str(folder)), lambda: bench.alone("statement.config:demanded", folder))
    lines: dict[str, Cause] = {}
    count = 0
    for found in (facts for rank in _import(bench) for facts in rank.facts):
        count += len(found)
        lines.update(disagreements(wanted, found, bench.subject.config))
    causes = list(dict.fromkeys(lines.values()))
    yield Measurement.equal("config, in the model", count=count, unit="fields", differing=list(lines), causes=causes)


@measures("coverage")
def coverage(bench: Bench) -> Iterator[Finding]:
    """Every tensor name and every config field of both sides is accounted for: moved, derived, constant or dropped."""
    from converters.models import family_of

    ranks = _import(bench)
    config, family = bench.subject.config, family_of(bench.subject.config)
    held = {name for rank in ranks for name in rank.parameters}
    stored = read_entries(bench.subject.folder)
    features = {"stored_lm_head"} if config.get("tie_word_embeddings") and "lm_head.weight" in stored else set()
    features |= {"stored_inv_freq"} if any(key.endswith("rotary_emb.inv_freq") for key in stored) else set()
    topology, side = bench.case.topology, BACKENDS[bench.case.backend]
    # Local layers have norms of their own: so many names, so many columns.
    local = side.name == "megatron" and not any(name.endswith("linear_fc1.layer_norm_weight") for name in held)
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    plan = family.plan(
        "hf",
        side.name + "_local" * local,
        config,
        padded_vocab_size=topology.tp * -(-config["vocab_size"] // topology.tp),
        padded_query_groups=side.groups(topology, groups, config["num_attention_heads"] // groups),
        features=frozenset(features),
    )
    # Which of them holds a tensor depends on the stage and, where tp is larger than the groups, on the tp rank.
    places = [Mesh(topology, place) for place in topology.shards() if not place.cp + place.dp]
    plans = [plan.restrict(target=place) for place in places]
    yield from ledgers.findings("tensors", list(ledgers.tensor_rows(plans, stored, held, side.name)))
    fields = {name for rank in ranks for name in rank.fields}
    try:
        dialect = family.dialect(side.name)
        if dialect is None:
            rows = list(ledgers.config_rows(family.fields, config, fields))
        else:
            rows = list(ledgers.dialect_rows(family.fields, dialect, config, fields))
    except ConfigError as error:  # another converter than ours may have taken it
        yield Measurement.proved("coverage, config", count=1, unit="configs", unproved=[str(error)])
        return
    yield from ledgers.findings("config", rows)


@measures("export, coded")
def exported(bench: Bench) -> Iterator[Finding]:
    """A model set up by the independent statement exports the checkpoint that the statement was made from."""
    with bench.scratch() as scratch:
        target = Path(scratch) / "exported"
        found = bench.ranks(
            "observation.weights:exported", bench.converter, bench.coded, bench.blank, bench.settings, target
        )[0]
    yield Measurement.equal(
        "export, coded",
        count=found.count,
        unit="tensors and files",
        differing=found.differing,
        causes=found.causes,
    )
    yield from _picture(found)


@measures("round trip")
def round_trip(bench: Bench) -> Iterator[Finding]:
    """The model's own weights, imported and saved: the same keys, shapes, dtypes, bits, config and tokenizer files."""
    with bench.scratch() as scratch:
        target = Path(scratch) / "exported"
        folder = bench.subject.folder
        found = bench.ranks("observation.weights:round_trip", bench.converter, folder, bench.settings, target)[0]
    yield Measurement.equal(
        "round trip", count=found.count, unit="tensors and files", differing=found.differing, causes=found.causes
    )
    yield from _picture(found)


def _picture(*found: Found) -> Iterator[Finding]:
    """Where the tensor with the most wrong elements is wrong, if one is."""
    seen = [one.worst for one in found if one.worst is not None]
    if seen:
        yield max(seen, key=lambda one: one.elements).picture


def _import(bench: Bench) -> list[Imported]:
    """What every rank says of an import of the coded checkpoint; imported once for all checks that ask.

    Raises:
        RankFailure: A rank failed, now or when it was asked before.
    """

    def ask() -> list[Imported] | RankFailure:
        with bench.scratch() as scratch:
            try:
                return bench.ranks(
                    "observation.weights:imported", bench.converter, bench.coded, bench.settings, Path(scratch)
                )
            except RankFailure as failure:
                return failure

    # Converters of one session differ: the self-test's are all faulty in another way.
    found: list[Imported] | RankFailure = bench.shared.once(
        ("imported", bench.case.id, bench.case.topology, pickle.dumps(bench.converter)), ask
    )
    if isinstance(found, RankFailure):
        raise found
    return found
