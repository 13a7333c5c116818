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

from converters.execute import bits as bits_of
from converters.topology import Topology
from parity import coded
from parity.causes import Cause
from parity.diagnosis.diagnose import diagnose
from parity.diagnosis.provenance import Bools, Floats, bits
from parity.diagnosis.verdicts import Trace
from parity.folders import Lazy, widened
from parity.statement.live import Chunk

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

    @classmethod
    def of(cls, folder: Path, source: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Pullback:
        """The shared files in `folder` for the tensors of `source`."""
        table = {key: tuple(tensor.shape) for key, tensor in source.items()}
        return cls(folder, table, tied=bool(config["tie_word_embeddings"]))

    def create(self) -> None:
        """Make the files, empty. Once, before any rank writes."""
        for name, width in (("values", 4), ("wrong", 1)):
            with (self._folder / name).open("wb") as file:
                file.truncate(self._size * width)

    def keys(self, name: str, numbers: torch.Tensor) -> list[str]:
        """The tensors of the checkpoint that a parameter is made of."""
        if self._tied and name == "output_layer.weight":
            return [HEAD]
        held = np.unique(numbers.numpy())
        firsts = np.array(list(self._numbers.starts.values())) + 1
        places = np.unique(np.searchsorted(firsts, held[held > 0], side="right") - 1)
        keys = list(self._numbers)
        return [keys[place] for place in places]

    def keep(self, chunk: Chunk, config: Mapping[str, Any], topology: Topology) -> list[Trace]:
        """Keep the wrong elements of one model chunk.

        Args:
            chunk: The chunk.
            config: Of the checkpoint, transformers' defaults filled in.
            topology: The layout.

        Returns:
            What has no place in the checkpoint: parameters that are missing, strange, or of another shape or dtype, and
            padding that is not zero.
        """
        strange = sorted(set(chunk.held) - set(chunk.stated))
        traces = [Trace(keys=(name,), kind="extra tensors", elements=chunk.held[name].numel()) for name in strange]
        wrong = {name: right for name, right in chunk.stated.items() if not _same(chunk.held.get(name), right)}
        if not wrong:
            return traces
        numbers = chunk.statement(self._numbers, config, topology, chunk.place, **chunk.choices)
        for name, right in wrong.items():
            keys, found = tuple(self.keys(name, numbers[name])), chunk.held.get(name)
            kind, count, detail = "padding", right.numel(), "not zero"
            if found is None:
                kind, detail = "missing tensors", ""
            elif found.shape != right.shape:
                kind, detail = "shape", f"{name}: expected {list(right.shape)}, found {list(found.shape)}"
            elif found.dtype != right.dtype:
                kind, detail = "dtype", f"found {str(found.dtype).removeprefix('torch.')}"
            else:
                count = self._put(name, numbers[name], found, right)
            if count:
                traces.append(Trace(keys=keys, kind=kind, elements=count, detail=detail))
        return traces

    def _put(self, name: str, numbers: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> int:
        """Keep the wrong elements of one parameter; how many wrong ones have no place, which is padding."""
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
        return int(beside.sum())

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
        changed = self.changed()
        if not changed:
            return []
        expected = {**source, HEAD: source[EMBEDDING]} if self._tied else dict(source)

        def held(key: str, right: Floats) -> Floats:
            return np.where(*changed[key], right) if key in changed else right

        homes = {HEAD: EMBEDDING} if self._tied else {}
        found = Lazy(expected, held)
        return diagnose(
            Lazy(expected), found, config, topology, table=self._numbers.table if is_coded else None, homes=homes
        )


def _same(actual: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether a parameter is there, and equal to the bit."""
    if actual is None or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return torch.equal(bits_of(actual.detach().cpu().contiguous()), bits_of(expected.contiguous()))
