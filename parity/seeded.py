"""Checkpoints made from a config alone: real safetensors files with seeded or coded weights.

The names and shapes of a Llama checkpoint are stated here a second time, plainly and on purpose: the converters' table
is proved against checkpoints that owe it nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters.errors import ConfigError
from parity import coded
from parity.shards import ITEMSIZE, write_shards
from parity.tiny import require_llama
from parity.tokenizer import write_byte_tokenizer

Config = dict[str, Any]
Kind = Literal["seeded", "coded"]
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_CHUNK = 1 << 20  # elements


def key_table(config: Config) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the checkpoint, in the order of the model.

    A tied head has no tensor of its own.

    Source: huggingface/transformers 5.23.0, models/llama/modeling_llama.py (`LlamaAttention`, `LlamaMLP`,
        `LlamaDecoderLayer`, `LlamaForCausalLM`); `torch.nn.Linear.weight` is (out, in).
    """
    require_llama(config)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    linears = {
        "self_attn.q_proj": (q, hidden, attention_bias),
        "self_attn.k_proj": (kv, hidden, attention_bias),
        "self_attn.v_proj": (kv, hidden, attention_bias),
        "self_attn.o_proj": (hidden, q, attention_bias),
        "mlp.gate_proj": (ffn, hidden, mlp_bias),
        "mlp.up_proj": (ffn, hidden, mlp_bias),
        "mlp.down_proj": (hidden, ffn, mlp_bias),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        table[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            if name == "mlp.gate_proj":
                table[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            table[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                table[f"{prefix}.{name}.bias"] = (rows,)
    table["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        table["lm_head.weight"] = (vocab, hidden)
    return table


def parameters(config: Config) -> int:
    """Number of parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in key_table(config).values())


def write_checkpoint(
    config: Config,
    folder: Path,
    *,
    kind: Kind = "seeded",
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder: weights, config.json, generation_config.json and a tokenizer with a chat template.

    Args:
        config: A Llama config; written with `dtype` as its dtype, otherwise as it is.
        folder: Created if need be.
        kind: `seeded` is random such that every tensor matters to the logits; `coded` is `parity.coded`: each element
            says where it came from.
        seed: Of the random weights.
        dtype: `float32` or `bfloat16` (rounded to nearest even).
        shards: Number of weight files; an index is written when there are several.

    Raises:
        ConfigError: Not a Llama config, an unknown dtype, or more elements than codes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    table = key_table(config)
    stored = DTYPES[dtype]
    starts = coded.starts(table)
    if kind == "coded" and stored == "F32":
        coded.require_room(parameters(config))
    folder.mkdir(parents=True, exist_ok=True)

    def chunks(key: str) -> Iterator[bytes]:
        count = math.prod(table[key])
        if kind == "coded":
            for start in range(starts[key], starts[key] + count, _CHUNK):
                yield coded.codes(start, min(_CHUNK, starts[key] + count - start), stored)
            return
        scale, shift = _scale(key, table[key], config)
        for values in _normal(seed, key, count):
            yield _bytes(values * np.float32(scale) + np.float32(shift), stored)

    write_shards(folder, {key: (stored, shape) for key, shape in table.items()}, chunks, shards=shards)
    _write_artefacts(folder, config, dtype)
    return folder


def checkpoint_bytes(config: Config, dtype: str = "float32") -> int:
    """Size of the weights in bytes."""
    return parameters(config) * ITEMSIZE[DTYPES[dtype]]


def _scale(key: str, shape: tuple[int, ...], config: Config) -> tuple[float, float]:
    """Standard deviation and mean of a tensor.

    Logits come out with a standard deviation of about 2. Queries and keys are large enough for attention to be far
    from uniform, so that positions matter; an untied embedding is small enough for eps to matter in the first norm.
    """
    if "norm" in key:
        return 0.2, 1.0
    if key.endswith(".bias"):
        return 0.3, 0.0
    if key == "lm_head.weight" or (key == "model.embed_tokens.weight" and config.get("tie_word_embeddings")):
        return 2.0 / math.sqrt(shape[1]), 0.0
    if key == "model.embed_tokens.weight":
        return 0.05, 0.0
    gain = 1.5 if "q_proj" in key or "k_proj" in key else 1.0
    return gain / math.sqrt(shape[1]), 0.0


def _normal(seed: int, key: str, count: int) -> Iterator[np.ndarray]:
    """`count` numbers of mean 0 and variance 1 in float32, in pieces, a function of (seed, key) alone.

    The sum of four 16-bit integers, which is near enough to normal and never beyond 3.5: integers all the way to one
    multiplication, so that the bits are the same under every version of numpy and on every machine. (Only a bit
    generator's raw stream is guaranteed; `standard_normal` may change.)
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    unit = np.float32(1.0 / math.sqrt(4 * (2**32 - 1) / 12))
    for start in range(0, count, _CHUNK):
        raw = np.asarray(stream.random_raw(min(_CHUNK, count - start)), dtype="<u8")
        total = raw.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int32)
        yield (total - 2 * 65535).astype(np.float32) * unit


def _bytes(values: np.ndarray, stored: str) -> bytes:
    """float32 values as little-endian bytes of a safetensors dtype."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    if stored == "BF16":
        # Round to nearest even: add half of the last kept place, less one bit where that place is even.
        bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return bits.tobytes()


def _write_artefacts(folder: Path, config: Config, dtype: str) -> None:
    spelling = "dtype" if "dtype" in config else "torch_dtype"
    (folder / "config.json").write_text(json.dumps(config | {spelling: dtype}, indent=2, sort_keys=True) + "\n")
    vocab = config["vocab_size"]
    eos = config.get("eos_token_id")
    stops = [token for token in (eos if isinstance(eos, list) else [eos]) if token is not None] or [vocab - 1]
    bos = config.get("bos_token_id")
    bos = vocab - 3 if bos is None else bos
    if len(stops) == 1:  # a list is what a converter loses
        stops.append(next(token for token in range(vocab - 1, 0, -1) if token not in (*stops, bos)))
    generation: Config = {"_from_model_config": False, "bos_token_id": bos, "eos_token_id": stops, "do_sample": False}
    if (pad := config.get("pad_token_id")) is not None:
        generation["pad_token_id"] = pad
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_byte_tokenizer(folder, vocab_size=vocab, bos=bos, eos=stops[0], pad=pad)
