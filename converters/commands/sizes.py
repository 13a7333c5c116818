"""Sizes as people write them: `2GB`, `500MB`, `4GiB`."""

from __future__ import annotations

import argparse
import re

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
