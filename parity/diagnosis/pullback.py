"""What an import did, seen in Hugging Face's space: each wrong element of a rank, put where the checkpoint has it.

The independent statement is asked where every element of the checkpoint belongs: not with the weights, but with the
elements' numbers. So it works for any weights. Ranks write their wrong elements into two sparse files that they share;
what no rank writes is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.topology import Coord, Topology
from parity import coded
from parity.causes import Cause
from parity.diagnosis.diagnose import diagnose
from parity.diagnosis.provenance import Bools, Floats, bits
from parity.diagnosis.verdicts import Trace
from parity.folders import Lazy, widened
from parity.statement.weights import expected_shard

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Numbers(Mapping[str, torch.Tensor]):
    """In place of each tensor of a checkpoint, the numbers of its elements, counted through from 1; 0 is none."""

    def __init__(self, table: coded.Table) -> None:
        self.table, self.starts = table, coded.starts(table)
        self.total = sum(math.prod(shape) for shape in table.values())
        self._dtype = torch.int32 if self.total < 2**31 - 1 else torch.int64

    def __getitem__(self, key: str) -> torch.Tensor:
        first = self.starts[key] + 1
        return torch.arange(first, first + math.prod(self.table[key]), dtype=self._dtype).view(self.table[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


class Pullback:
    """The wrong elements of all ranks, in the tensors of the checkpoint.

    Args:
        folder: Where the shared files are, the same for every rank.
        table: Shape of every tensor of the checkpoint.
        tied: The head is the embedding: its copy, where a stage holds one, is a tensor of its own here.
    """

    def __init__(self, folder: Path, table: coded.Table, *, tied: bool) -> None:
        self._folder, self._tied = folder, tied
        self._numbers = Numbers(table)
        self._table = {**table, HEAD: table[EMBEDDING]} if tied else table
        self._starts = coded.starts(self._table)
        self._size = sum(math.prod(shape) for shape in self._table.values())

    def create(self) -> None:
        """Make the files, empty. Once, before any rank writes."""
        for name, width in (("values", 4), ("wrong", 1)):
            with (self._folder / name).open("wb") as file:
                file.truncate(self._size * width)

    def numbers(
        self, config: Mapping[str, Any], topology: Topology, place: Coord, **choices: Any
    ) -> dict[str, torch.Tensor]:
        """For each parameter of a chunk the number of what belongs at each element; `choices` as in the statement."""
        return expected_shard(self._numbers, config, topology, place, **choices)

    def keys(self, name: str, numbers: torch.Tensor) -> list[str]:
        """The tensors of the checkpoint that a parameter is made of."""
        if self._tied and name == "output_layer.weight":
            return [HEAD]
        held = np.unique(numbers.numpy())
        firsts = np.array(list(self._numbers.starts.values())) + 1
        places = np.unique(np.searchsorted(firsts, held[held > 0], side="right") - 1)
        keys = list(self._numbers)
        return [keys[place] for place in places]

    def put(self, name: str, numbers: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> list[Trace]:
        """Keep the wrong elements of one parameter.

        Returns:
            What has no place in the checkpoint: padding that is not zero.
        """
        found, at = widened(actual), numbers.numpy().ravel().astype(np.int64)
        wrong = bits(found) != bits(widened(expected))
        beside = wrong & (at == 0)
        wrong &= at > 0
        places = at[wrong] - 1
        if self._tied and name == "output_layer.weight":
            places += self._starts[HEAD] - self._numbers.starts[EMBEDDING]
        if len(places):
            np.memmap(self._folder / "values", np.float32, "r+")[places] = found[wrong]
            np.memmap(self._folder / "wrong", np.uint8, "r+")[places] = 1
        count = int(beside.sum())
        detail = "not zero"
        keys = tuple(self.keys(name, numbers))
        return [Trace(keys=keys, kind="padding", elements=count, detail=detail)] if count else []

    def changed(self) -> dict[str, tuple[Bools, Floats]]:
        """Each tensor that ranks hold otherwise: which of its elements are wrong, and what is there."""
        wrong = np.memmap(self._folder / "wrong", np.uint8, "r").view(bool)
        values = np.memmap(self._folder / "values", np.float32, "r")
        out = {}
        for key, shape in self._table.items():
            at = slice(self._starts[key], self._starts[key] + math.prod(shape))
            if wrong[at].any():
                out[key] = (wrong[at].reshape(shape), values[at].reshape(shape))
        return out

    def causes(
        self, source: Mapping[str, torch.Tensor], config: Mapping[str, Any], topology: Topology, *, is_coded: bool
    ) -> list[Cause]:
        """The diagnosis of what all ranks have put, against the checkpoint in the model's dtype."""
        wrong = np.memmap(self._folder / "wrong", np.uint8, "r")
        values = np.memmap(self._folder / "values", np.float32, "r")
        expected = {**source, HEAD: source[EMBEDDING]} if self._tied else dict(source)

        def changed(key: str, right: Floats) -> Floats:
            at = slice(self._starts[key], self._starts[key] + right.size)
            mask = wrong[at].view(bool)
            return np.where(mask, values[at], right.ravel()).reshape(right.shape) if mask.any() else right

        if not wrong.any():
            return []
        homes = {HEAD: EMBEDDING} if self._tied else {}
        found = Lazy(expected, changed)
        return diagnose(
            Lazy(expected), found, config, topology, table=self._numbers.table if is_coded else None, homes=homes
        )
