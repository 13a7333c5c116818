"""Byte-level BPE tokenizers written as files, without a tokenizer library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte.

    Source: huggingface/tokenizers 0.23, tokenizers/src/pre_tokenizers/byte_level.rs `bytes_char` (GPT-2's alphabet).
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(spare)) for byte in range(0x100)]


def write_tokenizer(
    folder: Path,
    *,
    vocab: dict[str, int],
    merges: list[str],
    special: list[str],
    digits: bool,
    config: dict[str, Any],
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        folder: Where they go.
        vocab: Id of each token, special ones included.
        merges: Pairs joined by a space, most frequent first.
        special: The tokens of `vocab` that text is never split into by merging.
        digits: Whether each digit is a token of its own.
        config: Fields of tokenizer_config.json (bos_token, eos_token, chat_template, ...).
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits = [{"type": "Digits", "individual_digits": True}] * digits + [byte_level]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    # The generic class takes tokenizer.json as it stands; a model's own class may rebuild the pre-tokenizer.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_byte_tokenizer(folder: Path, *, vocab_size: int, bos: int, eos: int, pad: int | None) -> None:
    """Write a tokenizer of bytes (as many as the vocabulary has room for) with named special tokens at given ids."""
    names = {bos: "<bos>", eos: "<eos>"}
    if pad is not None and pad >= 0:
        names.setdefault(pad, "<pad>")
    free = (index for index in range(vocab_size) if index not in names)
    vocab = dict(zip(byte_alphabet(), free, strict=False)) | {name: index for index, name in names.items()}
    config: dict[str, Any] = {"bos_token": names[bos], "eos_token": names[eos], "chat_template": CHAT_TEMPLATE}
    if pad in names:
        config["pad_token"] = names[pad]
    write_tokenizer(folder, vocab=vocab, merges=[], special=list(names.values()), digits=False, config=config)
