"""In bfloat16 one wrong token among many that are right is found: in decoding, and in what leaves a block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from converters.topology import Topology
from parity.bounds import Floats, share_held, worst
from parity.case import Case
from parity.checks import decoding
from parity.findings import Measurement
from parity.observation.activations import reached, yardstick
from parity.observation.decoding import Decoded, Prompt, References, Text

SEEDS = range(5)
NOISE, WRONG = 0.01, 6.0
"""Of a bfloat16 logit, and how many times as far a wrong token is."""
SHAPE = (2, 32, 512)
TEXT = (2, 24, 512)


def noisy(rng: np.random.Generator, exact: Floats, tp: int = 1, wrong: tuple[int, ...] | None = None) -> Floats:
    """`exact` as bfloat16 rounds it over `tp` ranks; the token at `wrong` is `WRONG` times as far."""
    size = np.full(exact.shape[:2], NOISE * np.sqrt(2 * tp - 1))
    size *= rng.uniform(0.7, 1.3, size.shape)
    if wrong is not None:
        size[wrong] = NOISE * WRONG
    return (exact + size[..., None] * rng.standard_normal(exact.shape)).astype(np.float32)


def case(tp: int) -> Case:
    return Case(model="m", slug="m", topology=Topology(tp=tp), precision="bf16")


def said(rng: np.random.Generator) -> References:
    exact, along = (rng.standard_normal(shape).astype(np.float32) for shape in (SHAPE, TEXT))
    whole, fused, cached = (noisy(rng, exact) for _ in range(3))
    text = noisy(rng, along)
    return References(
        whole=whole,
        fused=fused,
        cached=cached,
        oracle=exact,
        texts=(Text(tokens=text.argmax(axis=-1), logits=text),),
        oracles=(along,),
    )


def decoded(seed: int, tp: int, wrong: tuple[int, ...] | None) -> dict[str, Measurement]:
    rng = np.random.default_rng(seed)
    references = said(rng)
    assert references.oracle is not None
    own = decoding._spread(references)
    stepwise = noisy(rng, references.oracle, tp, wrong)
    actual = Decoded(whole=stepwise, stepwise=stepwise, parts=noisy(rng, references.oracle, tp), texts=())
    (oracle,), (expected,) = references.oracles, references.texts
    logits = noisy(rng, oracle, tp, wrong)
    text = Text(tokens=logits.argmax(axis=-1), logits=logits)
    prompt = Prompt(name="greedy", tokens=np.zeros((2, 5), dtype=np.int64), padding=(0, 0), new=TEXT[1])
    found = [*decoding._logits(case(tp), actual, references, own)]
    found += decoding._text(case(tp), prompt, text, expected, oracle, own, 0.0)
    return {one.check: one for one in found if isinstance(one, Measurement)}


@pytest.mark.parametrize("tp", [1, 2])
def test_one_wrong_step_of_decoding_is_found(tp: int) -> None:
    for seed in SEEDS:
        clean = decoded(seed, tp, None)
        assert all(one.passed for one in clean.values()), [one.verdict for one in clean.values()]
        assert min(one.margin for one in clean.values() if one.margin is not None) > 1.3
        found = decoded(seed, tp, (1, 23))
        for name in ("decode with cache", "greedy, logits"):
            assert found[name].passed, "the mean over all tokens does not see it"
            assert not found[f"{name}, worst token"].passed
            assert found[f"{name}, worst token"].where == "sequence 1, token 23"
        assert all(one.passed for name, one in found.items() if name.startswith("decode in parts"))


@pytest.mark.parametrize("tp", [1, 2])
def test_one_wrong_token_of_a_block_is_found(tp: int) -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        exact = rng.standard_normal(SHAPE).astype(np.float32)
        sticks = {"layers.0": yardstick([noisy(rng, exact) for _ in range(3)], exact)}
        (clean,) = reached(sticks, {"layers.0": noisy(rng, exact, tp)}, precision="bf16", tp=tp)
        assert clean.share < 0.8
        (found,) = reached(sticks, {"layers.0": noisy(rng, exact, tp, (1, 3))}, precision="bf16", tp=tp)
        assert not found.within
        assert found.place == "sequence 1, token 3"
        coarse = exact + np.float32(2.4 * NOISE * np.sqrt(2 * tp - 1)) * rng.standard_normal(SHAPE).astype(np.float32)
        (everywhere,) = reached(sticks, {"layers.0": coarse}, precision="bf16", tp=tp)
        assert not everywhere.within
        assert everywhere.floor == sticks["layers.0"].spread.rms
        lost = noisy(rng, exact, tp)
        lost[0, 5, 7] = np.nan
        (found,) = reached(sticks, {"layers.0": lost}, precision="bf16", tp=tp)
        assert not found.within


def test_greedy_text_that_parts_in_float32_is_compared_up_to_there() -> None:
    rng = np.random.default_rng(0)
    references = replace(said(rng), oracle=None, oracles=())
    (expected,) = references.texts
    tokens, logits = expected.tokens.copy(), expected.logits.copy()
    tokens[1, 4] += 1
    logits[1, 5:] += 7  # answers to another question
    prompt = Prompt(name="greedy", tokens=np.zeros((2, 5), dtype=np.int64), padding=(0, 0), new=TEXT[1])
    one = replace(case(1), precision="fp32")
    own = decoding._spread(references)
    *_, held = decoding._text(one, prompt, Text(tokens=tokens, logits=logits), expected, None, own, 0.0)
    assert held.measured == 0
    logits[1, 4] += 7
    *_, held = decoding._text(one, prompt, Text(tokens=tokens, logits=logits), expected, None, own, 0.0)
    assert not held.passed


def test_below_bfloat16_a_tenth_of_the_tokens_counts_among_all_alone() -> None:
    exact = np.zeros((40, 8), dtype=np.float32)
    found = exact.copy()
    found[:, 0] = np.arange(40)  # each token is farther off than the one before it
    assert worst(found, exact, axis=1).where == (39,)
    assert worst(found, exact, axis=1, share=share_held("bf16")).where == (39,)
    assert worst(found, exact, axis=1, share=share_held("mxfp8")).where == (35,)


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_what_is_no_number_is_never_left_out(strange: float) -> None:
    exact = np.zeros((40, 8), dtype=np.float32)
    found = exact.copy()
    found[7, 3] = strange
    assert not np.isfinite(worst(found, exact, axis=1, share=0.5).value)
