"""Transformer Engine in bf16 and FP8 beside transformers in bf16: tokens a second, and peak memory.

    python ci/bench/te.py --json te.json                       # a Llama of the size of Llama-3.2-1B
    python ci/bench/te.py --size tiny --device cpu --repeat 1  # the reference layers: that it runs, not how fast

Random weights, one set for all. What is measured: a forward over whole sequences that keeps keys and values (prefill);
the tokens after it, one at a time, greedily, with a cache (decode); a training step, forward and backward with AdamW.
The contestants take turns within each repetition, each after the others, so that clocks and heat are the same for all;
medians are shown, and their ratios to transformers. Weights are quantised once a prefill and kept for the decode after
it, once a training step. FP8 decodes batches of a multiple of 8 rows only: its matrix products take no others.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
BASE = "transformers bf16"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to run the model.

    Attributes:
        name: In the table.
        precision: Of a recipe; None for bf16.
        build: Makes the model on the device, for as long as its turn lasts.
    """

    name: str
    precision: str | None
    build: Callable[[], Any]


def llama(size: str, device: str) -> Any:
    """The one of transformers: random weights, the same each time, bf16, SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES[size],
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def on_te(build: Callable[[], Any], precision: str | None) -> Any:
    """The same weights on Transformer Engine's layers (the reference's, on the CPU), padded rows as they are (bshd)."""
    from converters.te import NVLlamaConfig, NVLlamaForCausalLM
    from converters.te.convert import convert_llama_hf_to_te
    from converters.te.quantization import recipe_of

    layers = {"attn_input_format": "bshd", "self_attn_mask_type": "padding_causal"}
    model = convert_llama_hf_to_te(build(), **layers)
    if precision is None:
        return model.eval()
    fields = model.config.to_dict() | {"layer_precision": ["fp8"] * model.config.num_hidden_layers}
    quantised = NVLlamaForCausalLM(NVLlamaConfig(**fields), fp8_recipe=recipe_of(precision), device=model.device)
    quantised.load_state_dict(model.state_dict())
    quantised.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    return quantised.eval()


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """The one that the others' ratios are to comes first."""
    build = partial(llama, options.size, options.device)
    found = [Contestant(name=BASE, precision=None, build=build)]
    for precision in (None, *options.precision):
        name = f"TE {precision or 'bf16'}"
        found.append(Contestant(name=name, precision=precision, build=partial(on_te, build, precision)))
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, run: Callable[[], object]) -> float:
    """Seconds."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def cache_of(model: Any, options: argparse.Namespace) -> Any:
    """What keeps keys and values, empty."""
    if not hasattr(model.model, "te_layers"):
        from transformers import DynamicCache

        return DynamicCache(config=model.config)
    from converters.te.generation import cache_for

    # FlashAttention 2 takes caches of a multiple of 256 tokens only.
    length = -(-(options.prompt + options.new) // 256) * 256
    return cache_for(model, max_batch_size=options.batch, max_sequence_length=length)


def prefill(model: Any, ids: Tensor, cache: Any, options: dict[str, Any]) -> Tensor:
    """The prompt goes into the cache; the token after it, `[b 1]`."""
    options = dict.fromkeys(options, True)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **options).logits
    token: Tensor = logits[:, -1:].argmax(-1)
    return token


def decode(model: Any, ids: Tensor, first: list[Tensor], cache: Any, new: int, options: dict[str, Any]) -> None:
    """`new` tokens, one at a time."""
    token = first[0]
    mask = torch.ones(ids.shape[0], ids.shape[1] + new, dtype=ids.dtype, device=ids.device)
    with torch.no_grad():
        for end in range(ids.shape[1] + 1, ids.shape[1] + new + 1):
            given = {"attention_mask": mask[:, :end], "past_key_values": cache, "logits_to_keep": 1, **options}
            token = model(token, **given).logits[:, -1:].argmax(-1)


def training_step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, and one step of the optimizer."""
    optimizer.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def measure(contestant: Contestant, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each part and, on a GPU, its peak memory in MiB, over the counted runs."""
    found = _measure(contestant, options)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return found


def _measure(contestant: Contestant, options: argparse.Namespace) -> dict[str, list[float]]:
    cuda, model = options.device == "cuda", contestant.build()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SIZES[options.size]["vocab_size"], (options.batch, options.prompt), generator=generator)
    ids = ids.to(options.device)
    taught = torch.cat([ids] * -(-options.train_batch // len(ids)))[: options.train_batch, : options.train_length]
    found: dict[str, list[float]] = {}

    def note(part: str, run: Callable[[], object], index: int) -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(options.device, run)
        if index:  # the first run of each compiles and allocates
            found.setdefault(part, []).append(seconds)
            if cuda:
                found.setdefault(f"{part} peak", []).append(torch.cuda.max_memory_allocated() / 2**20)

    # Only quantised weights are kept between calls; the value says whether they are made anew.
    kept = {"is_first_microbatch": False} if contestant.precision else {}
    for index in range(options.repeat + 1):
        first: list[Tensor] = []
        cache = cache_of(model, options)
        note("prefill", partial(_first, first, model, ids, cache, kept), index)
        if contestant.precision is None or options.batch % 8 == 0:
            note("decode", partial(decode, model, ids, first, cache, options.new, kept), index)
        cache = None
    if options.train_batch:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)
        for index in range(options.repeat + 1):
            note("training", partial(training_step, model, taught, optimizer), index)
    return found


def _first(kept: list[Tensor], *given: Any) -> None:
    kept.append(prefill(*given))


def summarize(times: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant and part."""
    tokens = {
        "prefill": options.batch * options.prompt,
        "decode": options.batch * options.new,
        "training": options.train_batch * options.train_length,
    }
    rows = []
    for part, count in tokens.items():
        base = statistics.median(times[BASE][part]) if part in times[BASE] else 0.0
        for name, found in times.items():
            if part not in found:
                continue
            seconds = statistics.median(found[part])
            rows.append(
                {
                    "part": part,
                    "contestant": name,
                    "tokens_per_second": count / seconds,
                    "ratio": base / seconds,
                    "spread": max(found[part]) / min(found[part]),
                    "peak_mib": max(found.get(f"{part} peak", [0.0])),
                    "runs": len(found[part]),
                }
            )
    return rows


def device_of(options: argparse.Namespace) -> str:
    """Refuse what would say nothing.

    Raises:
        SystemExit: No GPU, and not the tiny size on the CPU.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no NVIDIA GPU here, and this compares speed on one; --device cpu --size tiny tries the program"
        )
    if options.device == "cpu" and options.size != "tiny":
        raise SystemExit(
            f"--size {options.size} on the CPU would take hours and say nothing; it takes --size tiny only"
        )
    return str(options.device)


def versions(device: str) -> dict[str, str]:
    """Of what took part."""
    import importlib.metadata

    found: dict[str, str] = {"torch": str(torch.__version__)}
    for name in ("transformers", "transformer-engine"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", default="fp8-delayed,fp8-current,fp8-block", help="recipes, comma-separated")
    parser.add_argument("--batch", type=int, default=8, help="rows of prefill and decode")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens a row")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded a row")
    parser.add_argument("--train-batch", type=int, default=4, help="rows of a training step; 0 leaves it out")
    parser.add_argument("--train-length", type=int, default=2048, help="tokens a row there")
    parser.add_argument("--repeat", type=int, default=5, help="counted runs of each")
    parser.add_argument("--rounds", type=int, default=2, help="how often the contestants take turns")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args()
    options.precision = [name for name in options.precision.split(",") if name]
    device = device_of(options)
    if device == "cpu":
        torch.set_num_threads(1)
        options.prompt, options.new = min(options.prompt, 32), min(options.new, 4)
        options.train_length = min(options.train_length, 32)
    times: dict[str, dict[str, list[float]]] = {}
    found = contestants(options)
    for turn in range(options.rounds):
        for contestant in found[::-1] if turn % 2 else found:
            for part, values in measure(contestant, options).items():
                times.setdefault(contestant.name, {}).setdefault(part, []).extend(values)
            print(f"round {turn + 1}: {contestant.name} done", file=sys.stderr, flush=True)
    times = {contestant.name: times[contestant.name] for contestant in found}
    rows = summarize(times, options)
    made = versions(device)
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    print(
        f"size {options.size}: {options.batch} x {options.prompt} prompt, {options.new} new, training "
        f"{options.train_batch} x {options.train_length}; medians of {options.rounds} x {options.repeat} runs"
    )
    print(f"{'':9} {'':18} {'tokens/s':>12} {'x transformers':>15} {'peak MiB':>10} {'slowest/fastest':>16}")
    for row in rows:
        print(
            f"{row['part']:9} {row['contestant']:18} {row['tokens_per_second']:12,.0f} {row['ratio']:15.2f} "
            f"{row['peak_mib']:10,.0f} {row['spread']:16.2f}"
        )
    if options.json:
        text = json.dumps({"versions": made, "options": asked, "rows": rows, "seconds": times}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
