"""Generation with Megatron-Core's KV cache, and the check that holds it against transformers: clean and faulty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from converters.errors import ConfigError
from converters.megatron import generation
from converters.topology import Topology
from parity.bounds import Floats
from parity.case import Case
from parity.checks import decoding
from parity.checks.bench import Bench, NotApplicable, Shared
from parity.findings import Lines, Measurement
from parity.observation.decoding import Prompt, Text
from parity.ranks import Zygote
from parity.subjects import Subject, subject

ONE = Topology()
Answer = tuple[list[list[int]], "list[Any] | None"]


def wrote(tiny: Tiny, topology: Topology, requests: Sequence[tuple[torch.Tensor, dict[str, Any]]]) -> list[Answer]:
    """In a rank: the continuations of several batches, and the logits where this rank has them."""
    chunks, provider = tiny_llama.build(tiny, topology)
    before = _switches(chunks)
    answers = []
    for prompts, options in requests:
        said = generation.generate(chunks, prompts, 8, vocab_size=provider.vocab_size, return_logits=True, **options)
        answers.append((said.tokens.tolist(), None if said.logits is None else list(said.logits.shape)))
    assert _switches(chunks) == before
    return answers


def _switches(chunks: Sequence[Any]) -> list[Any]:
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings", "training")
    modules = [module for chunk in chunks for module in (chunk.config, *chunk.modules())]
    return [getattr(module, name, None) for module in modules for name in names]


@pytest.mark.parametrize("topology", [ONE, Topology(tp=2, pp=2, sp=True)], ids=str)
def test_greedy_text_is_that_of_transformers(topology: Topology, models: dict[str, Tiny], zygote: Zygote) -> None:
    """Also of a tied model, behind padding, and up to a stop token; the same on every rank."""
    tiny = models["tied"]
    prompts, _ = tiny_llama.probe(tiny)
    plain = continued(tiny, prompts)
    stop = plain[1][3]
    padded = torch.cat([prompts[:, 11:], prompts[:, :5]], dim=1)
    short = continued(tiny, prompts[:, :5])
    requests: list[Any] = [
        (prompts, {}),
        (prompts, {"stop": (stop,)}),
        (padded, {"padding": (5, 5, 5)}),
        (torch.cat([prompts[:1, :10], padded[1:]]), {"padding": (0, 5, 5)}),
    ]
    found = zygote.run(wrote, tiny, topology, requests, world=topology.world_size, coords=topology.coords(), timeout=60)
    last = topology.world_size - topology.tp
    for rank, answers in enumerate(found):
        tokens = [answer for answer, _ in answers]
        assert tokens[0] == plain
        assert tokens[2] == short
        assert tokens[3][1:] == short[1:]
        length = len(tokens[1][0])
        assert length == max(row.index(stop) + 1 if stop in row else 8 for row in plain)
        for row, whole in zip(tokens[1], plain, strict=True):
            end = whole.index(stop) if stop in whole else length
            assert row == whole[:end] + [stop] * (length - end)
        assert answers[0][1] == (None if rank < last else [3, 8, tiny.config["vocab_size"]])


def continued(tiny: Tiny, prompts: torch.Tensor) -> list[list[int]]:
    """Eight tokens that transformers finds most likely after each prompt, without a cache."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, attn_implementation="eager")
    tokens = prompts
    for _ in range(8):
        with torch.no_grad():
            best = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    found: list[list[int]] = tokens[:, prompts.size(1) :].tolist()
    return found


def refused(tiny: Tiny, topology: Topology) -> list[str]:
    """In a rank: what generation says to each thing that it cannot do."""
    from converters.megatron.generation import Decoder, generate

    chunks, provider = tiny_llama.build(tiny, topology)
    prompts, _ = tiny_llama.probe(tiny)
    size = {"vocab_size": provider.vocab_size}
    attempts: list[Callable[[], Any]] = [lambda: generate(chunks, prompts, 8, **size)]
    if topology == ONE:

        def blind() -> None:
            for layer in chunks[0].decoder.layers:
                layer.self_attention.core_attention.scale_mask_softmax.scaled_masked_softmax_fusion = True

        attempts = [
            lambda: generate(chunks, prompts[0], 8, **size),
            lambda: generate(chunks, prompts + provider.vocab_size, 0, **size),
            lambda: generate(chunks, prompts, 8, padding=(1,), **size),
            lambda: generate(chunks, prompts, 8, padding=(0, 16, 1), **size),
            lambda: Decoder(chunks, batch=3, max_length=15).feed(prompts),
            lambda: (blind(), generate(chunks, prompts, 8, padding=(0, 1, 2), **size)),
            lambda: [
                decoder.feed(part)
                for decoder in [Decoder(chunks, batch=3, max_length=16)]
                for part in prompts.split(8, dim=1)
            ],
        ]
    said = []
    for attempt in attempts:
        try:
            attempt()
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (
            ONE,
            (
                "must be int64 of shape [b s]",
                "ids from 131 to 261 of 131",
                "padding must be one number of tokens for each of 3 rows",
                "a prompt must have a token",
                "at most 15 tokens, found 3 of 16",
                "prompts must have one length",
                "a prompt must be fed whole",
            ),
        ),
        (Topology(cp=2), ("context parallelism over 2 ranks",)),
        (Topology(pp=2, vpp=2), ("found 2: interleaved stages cannot",)),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused(
    topology: Topology, expected: tuple[str, ...], models: dict[str, Tiny], zygote: Zygote
) -> None:
    for said in zygote.run(refused, models["untied"], topology, world=topology.world_size, timeout=60):
        assert len(said) == len(expected), said
        for words, sentence in zip(expected, said, strict=True):
            assert words in sentence


def test_the_padding_of_the_vocabulary_is_never_chosen() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0, 0.0], [-1.0, -2.0, -3.0, 0.0]])
    assert generation.next_tokens(logits, 3).tolist() == [1, 0]


# The check itself: a fault in a rank must turn it red.


@dataclass(frozen=True, kw_only=True)
class Faulty(Bench):
    """A bench whose Megatron ranks have a fault."""

    fault: str

    def ranks(self, function: str, *arguments: Any) -> list[Any]:
        return self.shared.zygote.run(
            planted, self.fault, f"parity.{function}", *arguments, world=self.case.topology.world_size, timeout=60
        )


def planted(fault: str, function: str, *arguments: Any) -> Any:
    """In a rank: `function` with a fault in generation."""
    import importlib

    if fault != "none":
        name, wrong = FAULTS[fault]
        setattr(generation, name, wrong(getattr(generation, name)))
    module, _, called = function.partition(":")
    return getattr(importlib.import_module(module), called)(*arguments)


def stale(right: Callable[..., int]) -> Callable[..., int]:
    return lambda context: max(right(context) - (context.sequence_len_offset > decoding.PREFILL), 0)


def ahead(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda start, count, padding: right(start, count, padding) + (start > 0)


def unpadded(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda start, count, padding: right(start, count, None)


def local(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Each tensor-parallel rank chooses from its own part of the vocabulary."""

    def choose(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        from megatron.core import parallel_state

        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        part = logits.chunk(size, dim=-1)[rank]
        return part.argmax(dim=-1) + rank * part.size(-1)

    return choose


def second(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda logits, vocab_size: logits[:, :vocab_size].topk(2).indices[:, 1]


FAULTS: dict[str, tuple[str, Any]] = {
    "cache stale by one": ("cache_length", stale),
    "positions off by one": ("decode_positions", ahead),
    "padding ignored": ("hidden_slots", unpadded),
    "best of one rank": ("next_tokens", local),
    "second best": ("next_tokens", second),
}
TEXTS = {"greedy generation", "greedy generation, padded"}
LOGITS = {f"{name}, logits" for name in TEXTS}
DECODED = {"decode with cache", "decode, own forward"}


@pytest.fixture(scope="module")
def tiny_subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject("Llama-3.2-1B", size="tiny", cache=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def shared(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(zygote=zygote, folder=tmp_path_factory.mktemp("shared"))


def bench(made: Subject, shared: Shared, fault: str, topology: Topology, precision: str = "fp32") -> Faulty:
    topology = topology.evenly(made.config["num_hidden_layers"])
    case = Case(model="Llama-3.2-1B", slug=made.slug, topology=topology, precision=precision, size="tiny")
    return Faulty(case=case, subject=made, shared=shared, fault=fault)


@pytest.mark.parametrize(
    ("fault", "topology", "red", "maybe"),
    [
        ("none", Topology(tp=2), set(), set()),
        ("cache stale by one", ONE, DECODED | LOGITS | {"decode in parts"}, TEXTS),
        ("positions off by one", ONE, DECODED | LOGITS | {"decode in parts"}, TEXTS),
        ("padding ignored", ONE, {"greedy generation, padded, logits"}, {"greedy generation, padded"}),
        ("best of one rank", Topology(tp=2), TEXTS, LOGITS),
    ],
    ids=lambda given: None if isinstance(given, (set, frozenset)) else str(given),  # a set has no order to name it by
)
def test_a_fault_in_decoding_is_found(
    fault: str, topology: Topology, red: set[str], maybe: set[str], tiny_subject: Subject, shared: Shared
) -> None:
    """Logits tell; greedy text may stay the same for a while, where a fault is small."""
    findings = list(decoding.with_cache(bench(tiny_subject, shared, fault, topology)))
    measured = {finding.check: finding for finding in findings if isinstance(finding, Measurement)}
    assert set(measured) == DECODED | {"decode in parts"} | TEXTS | LOGITS
    failed = {check for check, one in measured.items() if not one.passed}
    assert red <= failed <= red | maybe, [one.verdict for one in measured.values()]
    (picture,) = [finding for finding in findings if isinstance(finding, Lines)]
    assert {len(curve) for curve in picture.curves.values()} == {decoding.LENGTH}


@pytest.mark.parametrize(
    ("fault", "red"),
    [("none", set()), ("second best", TEXTS), ("padding ignored", {"greedy generation, padded, logits"})],
)
def test_below_float32_each_token_is_the_best_by_its_own_logits(
    fault: str, red: set[str], tiny_subject: Subject, shared: Shared
) -> None:
    findings = decoding.with_cache(bench(tiny_subject, shared, fault, ONE, "bf16"))
    failed = {one.check for one in findings if isinstance(one, Measurement) and not one.passed}
    assert red <= failed <= red | {f"{check}, worst {what}" for check in red for what in ("token", "row")}


@pytest.mark.parametrize("topology", [Topology(cp=2), Topology(pp=2, vpp=2)], ids=str)
def test_layouts_without_a_cache_are_left_out_with_a_reason(
    topology: Topology, tiny_subject: Subject, shared: Shared
) -> None:
    with pytest.raises(NotApplicable, match="Megatron-Core"):
        next(decoding.with_cache(bench(tiny_subject, shared, "none", topology)))


def test_text_is_compared_up_to_where_the_reference_is_undecided() -> None:
    """A near tie ends the comparison and is told; before it, another token is a difference; none at all is no proof."""
    lead = np.array([[4.0, 3.0, 1.0], [2.0, 5.0, 0.0], [1.0, 1.0005, 0.0], [9.0, 0.0, 0.0]], dtype=np.float32)
    expected = text([0, 1, 1, 0], lead)
    prompt = Prompt(name="greedy", tokens=np.zeros((1, 5), dtype=np.int64), padding=(2,), new=4)
    same = decoding.written(prompt, text([0, 1, 0, 2], lead), expected, 1e-3)
    assert same.passed
    assert same.unit == "of 2 decided tokens differ"
    assert "undecided from step 2 of 4, by 5.00e-04" in same.detail
    assert "prompts of 3 tokens" in same.detail
    other = decoding.written(prompt, text([0, 2, 1, 0], lead), expected, 1e-4)
    assert not other.passed
    assert "row 0 step 1: expected token 1, found 2; their logits are [5. 0.] in transformers, [5. 0.]" in other.detail
    assert not decoding.written(prompt, text([0, 1, 1, 0], lead), expected, 5.0).passed


def text(tokens: list[int], logits: Floats) -> Text:
    return Text(tokens=np.array([tokens]), logits=logits[None])
