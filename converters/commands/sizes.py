"""Sizes as people write them, `2GB`, `500MB`, `4GiB`, counts, and places."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from converters.files import place

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of a size; GB counts in thousands, as `max_shard_size` of transformers does.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    match = re.fullmatch(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)", text.strip())
    unit = UNITS.get(match["unit"].upper()) if match else None
    if match is None or unit is None or not (count := int(float(match["number"]) * unit)):
        raise argparse.ArgumentTypeError(f"expected a size as 2GB or 500MB, found {text!r}")
    return count


def count(text: str) -> int:
    """How many there are of something that there must be.

    Raises:
        argparse.ArgumentTypeError: No positive integer.
    """
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text.strip()):
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text!r}")
    return int(text)


def natural(text: str) -> int:
    """How many there are of something that there need not be.

    Raises:
        argparse.ArgumentTypeError: No integer from 0 on.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text!r}")
    return int(text)


def folder(text: str) -> Path:
    """A path, with `~` as the shell has it."""
    return Path(place.expanded(text))
