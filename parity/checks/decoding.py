"""The imported model says with a KV cache what it says without, and writes what transformers writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from parity.backends import BACKENDS
from parity.bounds import Floats, Spread, allowed, nearness, share_held, spread
from parity.case import Case
from parity.checks.bench import Bench, NotApplicable
from parity.checks.forward import held
from parity.diagnosis.localise import explained
from parity.findings import Finding, Lines, Measurement
from parity.probes import Probe, probes

if TYPE_CHECKING:
    from parity.observation.decoding import Beams, Decoded, Prompt, References, Text

ROWS, LENGTH, PREFILL = 2, 32, 20
"""Sequences, the tokens of each that are compared, and how many are fed together before the rest, one by one."""
NEW, SHORTER = 24, 7
"""Tokens to write (half of it for the padded batch), and by how many the second prompt of that batch is shorter."""
MASKLESS = "left padding and prompts in parts are not asked: these layers take no mask"


@explained
def with_cache(bench: Bench) -> Iterator[Finding]:
    """Logits with the cache against the whole forward and transformers, and greedy text, token for token.

    Raises:
        NotApplicable: The backend has no KV cache in this layout.
    """
    case = bench.case
    if reasons := BACKENDS[case.backend].without_cache(case.topology, case.precision):
        raise NotApplicable("; ".join(reasons))
    asked, prompts, said = _asked(bench)
    own = _spread(said, share_held(case.precision))
    found = bench.ranks(
        "observation.decoding:decoded", bench.converter, bench.subject.folder, bench.settings, asked, PREFILL, prompts
    )
    (actual,) = [one for one in found if one is not None]
    yield from _logits(case, actual, said, own)
    yield _picture(case, actual, said, own)
    if actual.beams is not None and said.beams is not None:
        yield searched(prompts[0], actual.beams, said.beams, _within(case, said, own))
    told = [trio for trio in zip(prompts, actual.texts, said.texts, strict=True) if trio[1] is not None]
    oracles: list[Floats | None] = [None] * len(told)
    if said.oracle is not None:
        given = [prompt for prompt, _, _ in told], [text for _, text, _ in told]
        oracles = bench.alone("observation.decoding:oracle_along", bench.subject.folder, *given, case.precision)
    for (prompt, text, expected), oracle in zip(told, oracles, strict=True):
        assert text is not None
        yield from _text(case, prompt, text, expected, oracle, own, _within(case, said, own))


def _asked(bench: Bench) -> tuple[Probe, tuple[Prompt, ...], References]:
    """What is asked of this case's model, and what transformers says, in the case's precision; asked once."""
    from parity.observation.decoding import Prompt

    subject, precision = bench.subject, bench.case.precision
    beams = BACKENDS[bench.case.backend].beams and precision == "fp32"

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
        given = (subject.folder, found, PREFILL, prompts, precision, beams)
        said = bench.alone("observation.decoding:references", *given)
        return found, prompts, said

    found: tuple[Probe, tuple[Prompt, ...], References] = bench.shared.once(
        ("decoded", bench.case.slug, precision, beams), ask
    )
    return found


def _spread(said: References, share: float = 1.0) -> Spread:
    """How far transformers is from itself, in float32, or from its oracle: in all of its answers, at their worst."""
    expected = said.whole if said.oracle is None else said.oracle
    answers = [([said.whole, said.fused, said.cached], expected)]
    answers += [([text.logits], oracle) for text, oracle in zip(said.texts, said.oracles, strict=bool(said.oracles))]
    spreads = [spread([_by_token(one) for one in found], _by_token(right), share) for found, right in answers]
    return Spread(
        largest=max(one.largest for one in spreads),
        rms=max(one.rms for one in spreads),
        token=max(one.token for one in spreads),
        row=max(one.row for one in spreads),
    )


def _by_token(logits: Floats) -> Floats:
    """`[b s v]` as `[b*s v]`."""
    return logits.reshape(-1, logits.shape[-1])


def _logits(case: Case, actual: Decoded, said: References, own: Spread) -> Iterator[Finding]:
    """Each way of decoding against transformers, and in float32 against the same model's whole forward too."""
    expected = said.whole if said.oracle is None else said.oracle
    ways = [("decode with cache", actual.stepwise, expected)]
    if said.oracle is None:
        ways.append(("decode, own forward", actual.stepwise, actual.whole))
    if actual.parts is not None:
        ways.append(("decode in parts", actual.parts, expected))
    if actual.paged is not None:
        ways.append(("decode with cache of pages", actual.paged, expected))
    detail = [f"{len(expected)} x {expected.shape[1]} tokens, the first {PREFILL} together"]
    detail += [MASKLESS] if actual.parts is None else []
    at = np.argwhere(np.ones(expected.shape[:2], dtype=bool))
    for check, found, right in ways:
        yield from held(check, found, right, own, at=at, case=case, detail="\n".join(detail))


def _picture(case: Case, actual: Decoded, said: References, own: Spread) -> Lines:
    """Error by token, the worst sequence's: in float32 the largest over the vocabulary, below it the rms."""
    expected = said.whole if said.oracle is None else said.oracle

    def by_token(found: Floats) -> list[float]:
        difference = np.abs(found.astype(np.float64) - expected)
        by = difference.max(axis=2) if said.oracle is None else np.sqrt((difference**2).mean(axis=2))
        return [float(value) for value in by.max(axis=0)]

    curves = {f"{case.backend}, cache": by_token(actual.stepwise), "transformers, cache": by_token(said.cached)}
    if actual.parts is not None:
        curves[f"{case.backend}, cache, in parts"] = by_token(actual.parts)
    gate = _within(case, said, own) if said.oracle is None else nearness(own.token, case.topology.tp, case.max_floors)
    return Lines(
        title=f"Decoding: error by token, the first {PREFILL} together, then one by one",
        x="token",
        y="max |Δ logit|" if said.oracle is None else "rms from fp32, logits",
        curves=curves,
        marks={"floor": own.largest if said.oracle is None else own.token, "gate": gate},
    )


def _within(case: Case, said: References, own: Spread) -> float:
    """How far a logit may be from transformers' in float32."""
    return allowed(own.largest, float(np.abs(said.whole).max()), case.max_floors)


def _text(
    case: Case, prompt: Prompt, found: Text, expected: Text, oracle: Floats | None, own: Spread, within: float
) -> Iterator[Measurement]:
    """Greedy text, and the logits of its tokens: against transformers' own, or against an oracle along this text."""
    asked = np.ones(found.tokens.shape, dtype=bool)
    if oracle is None:
        yield written(prompt, found, expected, within)
        # Where the texts part, what follows answers to other questions.
        asked[:, 1:] = np.cumprod(found.tokens == expected.tokens, axis=1)[:, :-1] == 1
    else:
        yield chosen(prompt, found)
    right = expected.logits if oracle is None else oracle
    detail = f"{_about(prompt)}; tokens are counted from the first that is written"
    yield from held(f"{prompt.name}, logits", found.logits, right, own, at=np.argwhere(asked), case=case, detail=detail)


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


def searched(prompt: Prompt, found: Beams, expected: Beams, bound: float) -> Measurement:
    """Beam search in float32: the best beam, token for token, where its score leads those that could take its place.

    A score is a mean of log-probabilities, each of which differs by no more than two bounds of a logit. Another text
    may be the best only where its score is that near to the best one's.
    """
    off = np.abs(found.scores.astype(np.float64) - expected.scores)
    differing = [
        f"row {row}: expected {theirs.tolist()} with the score {score}, found {ours.tolist()} with {own}"
        for row, (ours, theirs, own, score) in enumerate(
            zip(found.tokens, expected.tokens, found.scores, expected.scores, strict=True)
        )
        if not off[row] <= 2 * bound
    ]
    apart = [str(row) for row in range(len(off)) if not np.array_equal(found.tokens[row], expected.tokens[row])]
    detail = f"{_about(prompt)}; scores differ by at most {off.max():.2e}, of {2 * bound:.2e} allowed"
    detail += f"; other texts of that score: rows {', '.join(apart)}" * bool(apart)
    return Measurement.equal("beam search", count=found.tokens.size, unit="tokens", differing=differing, detail=detail)


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
