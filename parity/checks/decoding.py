"""The imported model says with a KV cache what it says without, and writes what transformers writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.bounds import Floats, allowed, largest, nearness, rms
from parity.case import Case
from parity.checks.bench import Bench, NotApplicable
from parity.findings import Finding, Lines, Measurement
from parity.probes import Probe, probes

if TYPE_CHECKING:
    from parity.observation.decoding import Decoded, Prompt, References, Text

ROWS, LENGTH, PREFILL = 2, 32, 20
"""Sequences, the tokens of each that are compared, and how many are fed together before the rest, one by one."""
NEW, SHORTER = 24, 7
"""Tokens to write (half of it for the padded batch), and by how many the second prompt of that batch is shorter."""
MASKLESS = "left padding and prompts in parts are not asked: these layers take no mask"


def with_cache(bench: Bench) -> Iterator[Finding]:
    """Logits with the cache against the whole forward and transformers, and greedy text, token for token.

    Raises:
        NotApplicable: Megatron-Core has no KV cache in this layout.
    """
    case = bench.case
    if reasons := without_cache(case):
        raise NotApplicable("; ".join(reasons))
    asked, prompts, said = _asked(bench)
    bound = _bound(case, said)
    found = bench.ranks(
        "observation.decoding:decoded", bench.converter, bench.subject.folder, bench.settings, asked, PREFILL, prompts
    )
    (actual,) = [one for one in found if one is not None]
    yield from _logits(actual, said, bound)
    yield _picture(actual, said, bound)
    told = [trio for trio in zip(prompts, actual.texts, said.texts, strict=True) if trio[1] is not None]
    oracles: list[Floats | None] = [None] * len(told)
    if said.oracle is not None:
        given = [prompt for prompt, _, _ in told], [text for _, text, _ in told]
        oracles = bench.alone("observation.decoding:oracle_along", bench.subject.folder, *given, case.precision)
    for (prompt, text, expected), oracle in zip(told, oracles, strict=True):
        assert text is not None
        yield from _text(prompt, text, expected, oracle, bound)


def without_cache(case: Case) -> list[str]:
    """Why Megatron-Core cannot decode in this layout; empty where it can.

    Source: NVIDIA/Megatron-LM core_v0.16.1 (the same in core_v0.19.2): megatron/core/inference/
        model_inference_wrappers/abstract_model_inference_wrapper.py `AbstractModelInferenceWrapper.__init__` and
        transformer/attention.py `Attention._adjust_key_value_for_inference`, which cuts nothing over cp.
    """
    reasons = []
    if case.topology.vpp > 1:
        reasons.append("Megatron-Core's inference has no interleaved stages (vpp)")
    if case.topology.cp > 1:
        reasons.append("Megatron-Core's KV cache holds whole sequences, which context parallelism (cp) cuts")
    return reasons


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a logit is held to, derived from transformers with and without its cache.

    Args:
        logits: The largest difference that is allowed, or in bfloat16 the rms distance from the oracle.
        spread: The same of transformers itself: the floor.
        detail: What it was derived from.
    """

    logits: float
    spread: float
    detail: str


def _asked(bench: Bench) -> tuple[Probe, tuple[Prompt, ...], References]:
    """What is asked of this case's model, and what transformers says, in the case's precision; asked once."""
    from parity.observation.decoding import Prompt

    subject, precision = bench.subject, bench.case.precision

    def ask() -> tuple[Probe, tuple[Prompt, ...], References]:
        text, *_ = probes(subject.config, subject.folder, prose=subject.weights != "seeded")
        cut = np.s_[:ROWS, :LENGTH]
        found = Probe(name=text.name, tokens=text.tokens[cut], labels=text.labels[cut])
        even = found.tokens[:, :PREFILL]
        # The second row is shorter: what is on its left is another text, which a model that looks at it would continue.
        left = found.tokens[1:, PREFILL : PREFILL + SHORTER]
        ragged = np.concatenate([even[:1], np.concatenate([left, even[1:, : PREFILL - SHORTER]], axis=1)])
        prompts = (
            Prompt(name="greedy generation", tokens=even, padding=(0, 0), new=NEW),
            Prompt(name="greedy generation, padded", tokens=ragged, padding=(0, SHORTER), new=NEW // 2),
        )
        said = bench.alone("observation.decoding:references", subject.folder, found, PREFILL, prompts, precision)
        return found, prompts, said

    found: tuple[Probe, tuple[Prompt, ...], References] = bench.shared.once(
        ("decoded", bench.case.slug, precision), ask
    )
    return found


def _bound(case: Case, said: References) -> Bound:
    evaluations = [said.whole, said.fused, said.cached]
    if said.oracle is None:
        spread = max(largest(one, said.whole).value for one in evaluations)
        bound = allowed(spread, float(np.abs(said.whole).max()), case.max_floors)
        detail = f"floor {spread:.2e}: transformers against itself, with its cache and without, and evaluated otherwise"
        return Bound(logits=bound, spread=spread, detail=detail)
    near = max(rms(one, said.oracle).value for one in evaluations)
    near = max(near, *(rms(text.logits, oracle).value for text, oracle in zip(said.texts, said.oracles, strict=True)))
    detail = f"transformers' own distance from its float32 oracle, with its cache and without: {near:.2e}"
    return Bound(logits=nearness(near, case.topology.tp, case.max_floors), spread=near, detail=detail)


def _logits(actual: Decoded, said: References, bound: Bound) -> Iterator[Finding]:
    """Each way of decoding against transformers, and in float32 against the same model's whole forward too."""
    ways = [("decode with cache", actual.stepwise, said.whole)]
    if said.oracle is None:
        ways.append(("decode, own forward", actual.stepwise, actual.whole))
    if actual.parts is not None:
        ways.append(("decode in parts", actual.parts, said.whole))
    for check, found, whole in ways:
        distance = largest(found, whole) if said.oracle is None else rms(found, said.oracle)
        row, token, entry = distance.where
        detail = [bound.detail, f"{len(found)} x {found.shape[1]} tokens, the first {PREFILL} together"]
        detail += [MASKLESS] if actual.parts is None else []
        yield Measurement.within(
            check,
            measured=distance.value,
            bound=bound.logits,
            unit="max |Δ|" if said.oracle is None else "rms from fp32",
            where=f"sequence {row}, token {token}, vocabulary row {entry}",
            detail="\n".join(detail),
        )


def _picture(actual: Decoded, said: References, bound: Bound) -> Lines:
    expected = said.whole if said.oracle is None else said.oracle

    def by_token(found: Floats) -> list[float]:
        difference = np.abs(found.astype(np.float64) - expected)
        over = (0, 2)
        by = difference.max(axis=over) if said.oracle is None else np.sqrt((difference**2).mean(axis=over))
        return [float(value) for value in by]

    curves = {"megatron, cache": by_token(actual.stepwise), "transformers, cache": by_token(said.cached)}
    if actual.parts is not None:
        curves["megatron, cache, in parts"] = by_token(actual.parts)
    return Lines(
        title=f"Decoding: error by token, the first {PREFILL} together, then one by one",
        x="token",
        y="max |Δ logit|" if said.oracle is None else "rms from fp32, logits",
        curves=curves,
        marks={"floor": bound.spread, "gate": bound.logits},
    )


def _text(prompt: Prompt, found: Text, expected: Text, oracle: Floats | None, bound: Bound) -> Iterator[Measurement]:
    """Greedy text, and the logits of its tokens: against transformers' own, or against an oracle along this text."""
    if oracle is None:
        yield written(prompt, found, expected, bound.logits)
        # Where the texts part, what follows answers to other questions.
        alike = np.cumprod(found.tokens == expected.tokens, axis=1)[:, :-1]
        asked = np.concatenate([np.ones_like(alike[:, :1]), alike], axis=1)[..., None] == 1
        distance = largest(np.where(asked, found.logits, expected.logits), expected.logits)
    else:
        yield chosen(prompt, found)
        distance = rms(found.logits, oracle)
    row, step, entry = distance.where
    yield Measurement.within(
        f"{prompt.name}, logits",
        measured=distance.value,
        bound=bound.logits,
        unit="max |Δ|" if oracle is None else "rms from fp32",
        where=f"row {row}, step {step}, vocabulary row {entry}",
        detail=f"{bound.detail}\n{_about(prompt)}",
    )


def written(prompt: Prompt, found: Text, expected: Text, bound: float) -> Measurement:
    """Greedy text in float32, token for token, up to where the reference itself is undecided.

    Two logits that are no farther apart than two bounds may change places. From the first token that is so, either
    continuation is right, and the texts may part; from the first that differs, the rest follows from it.
    """
    count, differing, notes = 0, [], []
    for row, (ours, theirs) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        for step, (token, right) in enumerate(zip(ours, theirs, strict=True)):
            second, best = np.partition(expected.logits[row, step], -2)[-2:]
            if not best - second > 2 * bound:
                notes.append(f"row {row}: undecided from step {step} of {len(theirs)}, by {best - second:.2e}")
                break
            count += 1
            if token != right:
                theirs_of, ours_of = (text.logits[row, step, [right, token]] for text in (expected, found))
                differing.append(
                    f"row {row} step {step}: expected token {right}, found {token}; "
                    f"their logits are {theirs_of} in transformers, {ours_of} here"
                )
                break
    notes.insert(0, f"{_about(prompt)}; decided by a lead of more than {2 * bound:.2e}")
    return Measurement.equal(
        prompt.name, count=count, unit="decided tokens", differing=differing, detail="\n".join(notes)
    )


def chosen(prompt: Prompt, found: Text) -> Measurement:
    """Greedy text below float32, where roundings choose between tokens: each is the best by its own logits."""
    best = found.logits.max(axis=-1)
    own = np.take_along_axis(found.logits, found.tokens[..., None], axis=-1)[..., 0]
    differing = [
        f"row {row} step {step}: token {found.tokens[row, step]} has {own[row, step]}, the best {best[row, step]}"
        for row, step in np.argwhere(~(own == best))
    ]
    return Measurement.equal(
        prompt.name, count=found.tokens.size, unit="tokens", differing=differing, detail=_about(prompt)
    )


def _about(prompt: Prompt) -> str:
    lengths = " and ".join(str(prompt.tokens.shape[1] - padding) for padding in prompt.padding)
    return f"prompts of {lengths} tokens, continued by {prompt.new}"
