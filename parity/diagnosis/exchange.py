"""Which part of a model is to blame: transformers is given Megatron's weights, config or frequencies, one by one.

If transformers with a part of the Megatron model computes what Megatron does, that part is what differs. What no part
explains is computation, and the first tap that is still wrong says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.topology import Topology
from parity.causes import Cause, field_name
from parity.diagnosis.held import Held, checkpoint, pullback
from parity.observation import taps
from parity.observation.activations import Floats, Reach, Yardstick, first_wrong, merged, reached
from parity.observation.observe import DTYPES
from parity.probes import Probe

SAME = 2.0**-16
"""Two frequencies are the same within this: transformers and Megatron-Core differ by 2^-23, bfloat16 by 2^-9."""
SHOWN = 6
"""Tensors that a line names."""
ROPE = ("rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Failing:
    """A forward that fails, and how it is judged.

    Args:
        folder: The checkpoint.
        probe: What was asked; one segment a row.
        precision: `fp32` or `bf16`.
        topology: The parallel layout.
        floors: As in `parity.bounds`.
    """

    folder: Path
    probe: Probe
    precision: str
    topology: Topology
    floors: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to blame.

    Args:
        first: The first tap at which Megatron is not where it must be; `None` if there is none.
        causes: What explains it.
        lines: The same for people.
    """

    first: Reach | None
    causes: tuple[Cause, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that transformers can take over from the Megatron model.

    Args:
        causes: What it is if it is to blame.
        line: The same for people.
        config: Changes a `LlamaConfig`.
        model: Changes a `LlamaForCausalLM`.
    """

    causes: tuple[Cause, ...]
    line: str
    config: Callable[[Any], None] = lambda config: None
    model: Callable[[Any], None] = lambda model: None


def judge(failing: Failing, held: Sequence[Held], scratch: Path) -> Verdict:
    """Say what is to blame. In one process without Megatron.

    Args:
        failing: The forward.
        held: What each rank's model is.
        scratch: Where ranks left the tensors that differ.
    """
    config = _config(failing.folder)
    actual = merged([rank.taps for rank in held])
    plain = _yardsticks(failing, ())
    first = _first_wrong(failing, plain, actual)
    if first is None:
        return Verdict(first=None, causes=(), lines=("every tap is within its bound",))
    weights = _weights(failing, scratch)
    fields = _fields(config, held)
    rope, beyond = _rope(config, held)
    parts = [part for part in (weights, *fields, rope) if part is not None]
    rest: Reach | None = first
    blamed: list[Part] = []
    if parts:
        full = _yardsticks(failing, parts)
        computed = {name: stick.expected for name, stick in full.items()}
        rest = _first_wrong(failing, full, actual)
        for part in parts:
            others = plain if len(parts) == 1 else _yardsticks(failing, [one for one in parts if one is not part])
            if _first_wrong(failing, others, computed) is not None:
                blamed.append(part)
    causes = [cause for part in blamed for cause in part.causes]
    lines = [f"first wrong: {_place(first)}"]
    lines += [part.line for part in blamed]
    lines += [f"{part.line}; this does not matter here" for part in parts if part not in blamed]
    lines += ["weights: equal to the bit"] if weights is None else []
    lines += ["config: nothing differs that the model says of itself"] if not fields and rope is None else []
    if rest is not None:
        cause = _computation(rest, [*beyond, *(pair for rank in held for pair in rank.beyond)])
        causes.append(cause)
        known = "transformers with all of the above still computes otherwise, " if blamed else ""
        lines.append(f"computation: {known}first at {_place(rest)}: {cause.detail or 'look there'}")
    elif blamed:
        lines.append("transformers with that computes what Megatron does")
    stray = sorted({line for rank in held for line in rank.stray})
    lines += [f"parameters: {line}" for line in stray[:SHOWN]]
    return Verdict(first=first, causes=tuple(causes), lines=tuple(lines))


def _config(folder: Path) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(folder)


def _yardsticks(failing: Failing, parts: Sequence[Part]) -> dict[str, Yardstick]:
    """What transformers with `parts` of the Megatron model computes."""
    from transformers import LlamaForCausalLM

    config = _config(failing.folder)
    for part in parts:
        part.config(config)
    model = LlamaForCausalLM.from_pretrained(
        failing.folder, config=config, dtype=DTYPES[failing.precision], attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for part in parts:
            part.model(model)
    return taps.yardsticks(model, failing.probe, failing.precision)


def _first_wrong(failing: Failing, sticks: Mapping[str, Yardstick], actual: Mapping[str, Floats]) -> Reach | None:
    """The first tap of `actual` that is not within its bound. Both sides may have NaN at the same places."""
    both = {name: np.isnan(stick.expected) & np.isnan(actual[name]) for name, stick in sticks.items() if name in actual}
    numbers = {
        name: replace(sticks[name], expected=np.where(nan, 0, sticks[name].expected)) for name, nan in both.items()
    }
    found = {name: np.where(nan, 0, actual[name]) for name, nan in both.items()}
    return first_wrong(
        reached(numbers, found, precision=failing.precision, tp=failing.topology.tp, floors=failing.floors)
    )


def _place(reach: Reach) -> str:
    return f"{reach.tap} ({reach.place}): {reach.measured:.2g}, allowed {reach.bound:.2g}"


def _weights(failing: Failing, scratch: Path) -> Part | None:
    """The tensors that ranks hold otherwise than the checkpoint."""
    source, config = checkpoint(failing.folder, failing.precision), taps.hf_config(failing.folder)
    pulled = pullback(scratch, source, config)
    changed = pulled.changed()
    if not changed:
        return None
    # A tied head on another stage than the embedding is a parameter of its own.
    apart = failing.topology.pp * failing.topology.vpp > 1

    def give(model: Any) -> None:
        if apart and model.lm_head.weight is model.model.embed_tokens.weight:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, (wrong, values) in changed.items():
            right = parameters[name]
            right.copy_(torch.where(torch.from_numpy(wrong.copy()), torch.from_numpy(values.copy()), right))

    counts = [f"{name} ({int(wrong.sum()):,} elements)" for name, (wrong, _) in changed.items()]
    more = f" and {len(counts) - SHOWN} more" * (len(counts) > SHOWN)
    return Part(
        causes=tuple(pulled.causes(source, config, failing.topology, is_coded=False)),
        line=f"weights: {', '.join(counts[:SHOWN])}{more} differ from the checkpoint",
        model=give,
    )


def _fields(config: Any, held: Sequence[Held]) -> list[Part]:
    """Fields of the config, the rope's aside, that a rank's model has otherwise."""
    parts = []
    for name in ("rms_norm_eps", "hidden_act", "head_dim", "tie_word_embeddings"):
        said = getattr(config, name)
        for value in sorted({rank.fields[name] for rank in held if name in rank.fields} - {said}, key=repr)[:1]:
            if isinstance(said, float) and abs(value - said) <= 1e-6 * abs(said):
                continue
            part = _field_part(name, said, value)
            # The two that say nothing new to transformers (shapes and ties are the weights') are not tried out.
            parts.append(
                part if name in ("head_dim", "tie_word_embeddings") else replace(part, config=_setting(name, value))
            )
    return parts


def _setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda config: setattr(config, name, value)


def _field_part(name: str, said: Any, value: Any) -> Part:
    text = f"{name} is {value!r} where the checkpoint says {said!r}"
    return Part(causes=(Cause(kind="config", what=(name,), detail=text),), line=f"config: {text}")


def _rope(config: Any, held: Sequence[Held]) -> tuple[Part | None, list[tuple[str, str]]]:
    """The frequencies that a rank's model turns by, if they are not the checkpoint's, and what explains them."""
    said = {name: config.rope_parameters[name] for name in ROPE if name in config.rope_parameters}
    right = frequencies(config, said)
    wrong = [rank for rank in held if not _same(rank.frequencies, right)]
    if not wrong:
        return None, []
    rank = wrong[0]
    used = rank.frequencies

    def turn(model: Any) -> None:
        model.model.rotary_emb.inv_freq.copy_(torch.from_numpy(used))

    for guess in _guesses(said, rank, right):
        if _same(used, frequencies(config, guess)):
            names = ["rope_type"] if guess["rope_type"] != said["rope_type"] else _differing(said, guess)
            texts = [
                f"{_spelled(name)} is {guess[name]!r} where the checkpoint says {said.get(name)!r}" for name in names
            ]
            causes = tuple(
                Cause(kind="config", what=(_spelled(name),), detail=text)
                for name, text in zip(names, texts, strict=True)
            )
            return Part(causes=causes, line=f"config: {'; '.join(texts)}", model=turn), []
    if len(used) != len(right):
        return None, [("rope", f"it turns by {len(used)} frequencies where there must be {len(right)}")]
    rounded = torch.from_numpy(right).bfloat16().float().numpy()
    how = "rounded to bfloat16" if _same(used, rounded) else "those of no config that is known here"
    at = int(np.argmax(np.abs(used / right - 1)))
    text = f"frequencies (inv_freq) are {how}: number {at} is {used[at]:.8g} and should be {right[at]:.8g}"
    return Part(
        causes=(Cause(kind="computation", what=("rope",), detail=text),), line=f"computation: rope: {text}", model=turn
    ), [("rope", text)]


def _guesses(said: Mapping[str, Any], rank: Held, right: Floats) -> list[dict[str, Any]]:
    """Rope fields that may stand behind the frequencies of `rank`: what its model states first, then one field each."""
    used = rank.frequencies.astype(np.float64)
    stated = {name: rank.fields[name] for name in ROPE if name in rank.fields}
    hard_coded = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    same_type = stated.get("rope_type") == said["rope_type"]
    guesses: list[dict[str, Any]] = [{**said, **stated} if same_type else {"rope_theta": said["rope_theta"], **stated}]
    guesses.append({"rope_type": "default", "rope_theta": said["rope_theta"]})
    if len(used) == len(right) and len(used) > 1:
        theta = float(used[1] ** -len(used))
        guesses += [{**said, "rope_theta": value} for value in (float(f"{theta:.3g}"), float(f"{theta:.5g}"), theta)]
        if "factor" in said:
            factor = float(said["factor"] * right[-1] / used[-1])
            guesses += [{**said, "factor": value} for value in (float(f"{factor:.4g}"), factor)]
    if said["rope_type"] == "llama3":
        guesses += [{**said, **hard_coded}, {**said, **hard_coded, "factor": 8.0}]
        guesses += [{**said, name: value} for name, value in hard_coded.items()]
    return guesses


def _differing(said: Mapping[str, Any], guess: Mapping[str, Any]) -> list[str]:
    """The fields in which two ropes differ; of another type, what follows from the type is not said."""
    if guess["rope_type"] != said["rope_type"]:
        return ["rope_type"]
    return [name for name in ROPE if name != "rope_type" and name in guess and not _close(guess[name], said.get(name))]


def _close(one: Any, other: Any) -> bool:
    return other is not None and abs(one - other) <= 1e-6 * abs(other)


def _spelled(name: str) -> str:
    """As a config spells it. The type is what a scaling is known by: another type is another scaling."""
    return "rope_scaling" if name == "rope_type" else field_name(f"rope_scaling.{name}")


def frequencies(config: Any, rope: Mapping[str, Any]) -> Floats:
    """Transformers' inverse frequencies for `config` with other rope fields, `[head_dim / 2]` float32."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim")}
    sizes["max_position_embeddings"] = config.max_position_embeddings
    made = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(rope)))
    found: Floats = made.inv_freq.detach().float().numpy()
    return found


def _same(one: Floats, other: Floats) -> bool:
    return one.shape == other.shape and bool((np.abs(one - other) <= SAME * np.abs(other)).all())


def _computation(reach: Reach, beyond: Sequence[tuple[str, str]]) -> Cause:
    """The sub-module behind a tap, or what is known of the model that explains it."""
    part = reach.tap.rpartition(".")[2]
    name = {
        "embedding": "embedding",
        "input_norm": "norm",
        "post_norm": "norm",
        "final_norm": "norm",
        "attention": "attention",
        "mlp": "mlp",
        "logits": "head",
    }.get(part, "mlp")
    suspects = {"attention": ("rope", "attention")}.get(name, (name,))
    known = [(part, text) for part, text in dict.fromkeys(beyond) if part in suspects]
    if known:
        return Cause(kind="computation", what=(known[0][0],), where=reach.tap, detail="; ".join(t for _, t in known))
    return Cause(kind="computation", what=(name,), where=reach.tap)
